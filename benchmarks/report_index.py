"""Measure an index of 5,000 reports in a browser: `PYTHONPATH=tests python benchmarks/report_index.py`.

The peer is pandas' `DataFrame.to_html`, a table with the same columns that neither sorts nor filters. Chromium opens
both files and is timed from the start to the first picture; a click on a heading, a letter of a search and the next
page of the index are timed from the event to the next picture. The script needs Chromium, its driver and selenium.
"""

import argparse
import base64
import io
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ichprog.reporting.pdf import PROGRAMS
from ichprog.reporting.report_index import render_index

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000")
ACTIONS = {
    "sort by a probability": "document.querySelector('th[data-key=p0] button').click()",
    "one letter of a search": "const field = document.getElementById('search'); field.value = field.value ? '' : '7'; "
    "field.dispatchEvent(new Event('input'))",
    "next page": "document.getElementById('next').click()",
}


def summaries(number: int) -> dict[str, dict[str, Any]]:
    """Return the summaries of reports with thumbnails of the usual size, by file name."""
    random = np.random.default_rng(0)
    target = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (96, 96), np.uint8)).save(target, "JPEG", quality=60)
    picture = base64.b64encode(target.getvalue()).decode()
    return {
        f"{index:05}.html": {
            "name": f"P{index}",
            "scan": f"P{index}.nii.gz",
            "model": "compact.prognosis_gcs3_age",
            "tasks": {name: {"label": "poor", "last": "poor", "p": float(random.random())} for name in ("a", "b", "c")},
            "warnings": ["no-blood"] if random.random() < 0.1 else [],
            "blood_ml": float(random.exponential(20)),
            "thumbnail": picture,
            "notice": "",
        }
        for index in range(number)
    }


def open_page(browser: Any, path: Path) -> float:
    """Open a page and return the seconds to its first picture."""
    browser.get(path.as_uri())
    return float(
        browser.execute_async_script(
            "requestAnimationFrame(() => setTimeout(() => arguments[0](performance.now() / 1000)))"
        )
    )


def act(browser: Any, action: str) -> float:
    """Run an action and return the seconds to the next picture."""
    script = "const done = arguments[0]; const start = performance.now(); {action}; "
    script += "requestAnimationFrame(() => setTimeout(() => done((performance.now() - start) / 1000)))"
    return float(browser.execute_async_script(script.replace("{action}", action)))


def main() -> None:
    """Write both pages, open them in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, PROGRAMS)))
    for flag in FLAGS:
        options.add_argument(flag)
    rows = summaries(args.rows)
    with (
        tempfile.TemporaryDirectory() as scratch,
        webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as browser,
    ):
        ours, peer = Path(scratch) / "index.html", Path(scratch) / "peer.html"
        ours.write_text(render_index(rows), encoding="utf-8")
        flat = [
            {**{name: answer["p"] for name, answer in each["tasks"].items()}, **each, "tasks": ""}
            for each in rows.values()
        ]
        table = pd.DataFrame(flat)
        table["thumbnail"] = [f'<img src="data:image/jpeg;base64,{each["thumbnail"]}">' for each in flat]
        peer.write_text(table.to_html(escape=False), encoding="utf-8")
        times: dict[str, list[float]] = {
            "open the index": [],
            "open pandas' table": [],
            **{name: [] for name in ACTIONS},
        }
        for _ in range(args.rounds):
            times["open pandas' table"].append(open_page(browser, peer))
            times["open the index"].append(open_page(browser, ours))
            for name, action in ACTIONS.items():
                times[name].append(act(browser, action))
        print(f"{args.rows} rows; {ours.stat().st_size / 1e6:.1f} MB, pandas {peer.stat().st_size / 1e6:.1f} MB")
        print("| action | median in s | slowest in s |")
        print("| --- | --- | --- |")
        for name, seconds in times.items():
            print(f"| {name} | {median(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
