"""Run all benchmarks and write `docs/speed.md` with its plots: `python benchmarks/report.py`.

The measurements are stored in `benchmarks/results.json`, and the page is written from this file. `--from
benchmarks/results.json` only writes the page. If suites are named, only these run, and the stored measurements of other
suites stay if they have the same versions. Measurements of other machines always stay.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import string
import subprocess
import sys
import tempfile
import textwrap
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results.json", HERE.parent / "docs"
PAGE = "speed.md"
LIBRARIES = ("ichprog", "numpy", "scipy", "nibabel", "torch", "openvino", "monai", "medcam", "accelerate")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # the instruction sets that matter here
ROOF = "intensity"  # the axis of the roofline plot; every other axis has its own plot
SUITES = ("start_up", "prepare", "predict", "roofline", "explain", "report", "train_step")  # in the page's order


def measure(suites: list[str], rounds: int | None, keyword: str | None, *, slow: bool) -> tuple[dict[str, Any], bool]:
    """Run the suites.

    Returns:
        The results, and whether every suite passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        # -P: measure the installed package, not the current folder
        command = [sys.executable, "-P", "-m", "pytest", *(suites or [str(HERE)]), f"--benchmark-json={path}"]
        command += ["-m", ""] if slow else []
        command += [f"--rounds={rounds}"] if rounds else []
        command += ["-k", keyword] if keyword else []
        passed = subprocess.run(command, check=False).returncode == 0
        if not path.exists():
            sys.exit("No results: pytest wrote no file.")
        return condense(json.loads(path.read_text(encoding="utf-8"))), passed


def condense(run: dict[str, Any]) -> dict[str, Any]:
    """Reduce the JSON of pytest-benchmark to the machine and one record per measurement: median, minimum, maximum."""
    machine, cpu = run["machine_info"], run["machine_info"]["cpu"]
    installed = {each.name: each.version for each in distributions()}
    return {
        "machine": {
            "processor": cpu["brand_raw"],
            "cores": cpu["count"],
            "instructions": [name for name in INSTRUCTIONS if name in cpu.get("flags", ())],
            "system": f"{machine['system']} {machine['machine']}",
        },
        "versions": {
            "Python": platform.python_version(),
            **{name: installed[name] for name in LIBRARIES if name in installed},
        },
        "date": run["datetime"][:10],
        "records": [
            {"suite": Path(test["fullname"].split("::")[0]).stem.removeprefix("test_"), **_summarise(record)}
            for test in run["benchmarks"]
            for record in test["extra_info"].get("records", [])
        ],
    }


def _summarise(record: dict[str, Any]) -> dict[str, Any]:
    summary = {key: value for key, value in record.items() if key in ("what", "unit") or value}
    for side in {"ours", "peer"} & summary.keys():
        values = summary[side]
        summary[side] = {"median": median(values), "min": min(values), "max": max(values), "rounds": len(values)}
    return summary


def merge(old: list[dict[str, Any]], new: dict[str, Any], *, whole: bool = False) -> list[dict[str, Any]]:
    """Merge new results of one machine into the stored results.

    Args:
        old: Stored results, one entry per machine.
        new: New results of one machine.
        whole: Whether all suites ran. Otherwise stored records of the machine stay if they have the same versions.
    """
    merged, same = list(old), [index for index, one in enumerate(old) if one["machine"] == new["machine"]]
    for index in same:
        if old[index]["versions"] == new["versions"] and not whole:
            records = {
                (record["suite"], record["what"]): record for record in [*old[index]["records"], *new["records"]]
            }
            new = new | {"records": sorted(records.values(), key=lambda record: SUITES.index(record["suite"]))}
        elif not whole:
            print("Dropped the stored records of this machine: they have other versions.", file=sys.stderr)
        merged[index] = new
    return merged if same else [*merged, new]


def check_target(record: dict[str, Any]) -> tuple[float, bool]:
    """Return the value that a record compares with its target, and whether the target is met."""
    quantity, bound, target = record["target"]
    ours, peer = record["ours"]["median"], record.get("peer", {}).get("median", math.nan)
    value = {"ratio": ours / peer, "difference": ours - peer, "ours": ours}[quantity]
    return value, value <= target if bound == "at most" else value >= target


def page(results: list[dict[str, Any]]) -> str:
    """Return the text of the page."""
    machines = list(zip(string.ascii_uppercase, results, strict=False))
    parts = [_opening(machines)]
    for suite in SUITES:
        title, text = describe(suite)
        own = [(letter, [record for record in one["records"] if record["suite"] == suite]) for letter, one in machines]
        pictures = [
            f"![{title} on {letter}, by {axis}]({plot_file(letter, suite, axis)})"
            for letter, records in own
            for _, axis in plots(records)
        ]
        parts += [f"## {title}", text, "\n\n".join(pictures), _table(own)]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe(suite: str) -> tuple[str, str]:
    """Return the title and the description of a suite, from the docstring of its file."""
    path = HERE / f"test_{suite}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    title, _, text = (docstring or suite.replace("_", " ").capitalize()).partition("\n")
    return title.rstrip("."), text.strip()


def _opening(machines: list[tuple[str, dict[str, Any]]]) -> str:
    setups, summaries = [], []
    for letter, one in machines:
        machine, targets = one["machine"], [record for record in one["records"] if "target" in record]
        instructions = f" with {', '.join(machine['instructions'])}" if machine["instructions"] else ""
        versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
        text = f"- **{letter}**: {machine['cores']} cores of {machine['processor']}{instructions}, {machine['system']}"
        text = f"{text}, on {one['date']}; {versions}. {one.get('note', '')}"
        setups.append(textwrap.fill(text, 120, subsequent_indent="  "))
        missed = [record for record in targets if not check_target(record)[1]]
        summaries.append(f"![Ratios and their targets on {letter}]({plot_file(letter)})")
        summaries.append(f"**On {letter}, {len(targets) - len(missed)} of {len(targets)} targets are met.**")
        if missed:
            lines = [f"- {_name(record)}: {_value_and_target(record)}" for record in missed]
            summaries[-1] += " Missed:\n\n" + "\n".join(lines)
    return "\n\n".join([_INTRODUCTION, *summaries, _METHODS, "\n".join(setups), _COMMANDS])


_INTRODUCTION = """\
# Speed

This page compares ichprog with peers that do the same work. Bars to the left of 1 show less time or memory than the
peer, bars to the right more scans per second. Black lines are targets."""

_METHODS = """\
## How it was measured

Both are measured in alternation, in one run on one machine. Times hold for that machine only. Ratios carry over to
similar machines. A value is the median of the rounds, with the minimum and the maximum in brackets. Scans are simulated
and have 512 x 512 x 32 voxels by default. Weights are random in the published layout. Neither changes the amount of
computation. The machines:"""

_COMMANDS = """\
```bash
pip install -e ".[study]" --group bench
python benchmarks/report.py
```

This runs all suites, adds or replaces the results of the machine, and writes this page. `pytest
benchmarks/test_prepare.py` runs one suite and writes nothing."""


def _table(machines: list[tuple[str, list[dict[str, Any]]]]) -> str:
    rows = [["machine", "measurement", "ours", "peer", "ours : peer", "target", "met"], ["---"] * 7]
    for letter, record in [(letter, record) for letter, records in machines for record in records]:
        peer = record.get("peer")
        ratio = _digits(record["ours"]["median"] / peer["median"]) if peer and record["unit"] else ""
        cells = [
            letter,
            record["what"],
            _value(record, "ours"),
            f"{_value(record, 'peer')}, {record['peer_name']}" if peer else "",
        ]
        met = ["", ""]
        if "target" in record:
            met = [_target(record), "yes" if check_target(record)[1] else "**no**"]
        rows.append([*cells, ratio, *met])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else "Not measured yet."


def _name(record: dict[str, Any]) -> str:
    return f"{describe(record['suite'])[0]}: {record['what']}"


def _value_and_target(record: dict[str, Any]) -> str:
    quantity = record["target"][0]
    value = check_target(record)[0]
    return f"{_digits(value) if quantity == 'ratio' else _with_unit(value, record['unit'])}, target {_target(record)}"


def _target(record: dict[str, Any]) -> str:
    quantity, bound, target = record["target"]
    if quantity == "ratio":
        return f"{bound} {_digits(target)}"
    return f"{bound} {_with_unit(target, record['unit'])}{' more' if quantity == 'difference' else ''}"


def _value(record: dict[str, Any], side: str) -> str:
    one, unit = record[side], record["unit"]
    shown = _with_unit(one["median"], unit)
    if one["rounds"] == 1:
        return shown
    scale = 1000 if shown.endswith(" ms") else 1
    return f"{shown} ({_digits(one['min'] * scale)} to {_digits(one['max'] * scale)})"


def _with_unit(value: float, unit: str) -> str:
    if unit == "s" and abs(value) < 1:
        value, unit = value * 1000, "ms"
    return f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    """Format a value with three significant digits, and with an exponent only below 0.001."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def plots(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the pairs of suite and axis that have a plot."""
    return list(dict.fromkeys((record["suite"], axis) for record in records for axis in record.get("at", ())))


def plot_file(letter: str, *words: str) -> str:
    """Return the file name of the plot of a suite along an axis, or without words of the plot of all ratios."""
    return f"{'-'.join(['speed', letter.lower(), *words])}.svg"


def digest(records: list[dict[str, Any]]) -> str:
    """Return the hash of the records that a plot shows; it is written into the plot."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def draw(results: list[dict[str, Any]]) -> None:
    """Draw every plot into `docs/` and delete outdated plots."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    for old in DOCS.glob("speed*.svg"):
        old.unlink()
    style = {"svg.hashsalt": "ichprog", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with mpl.rc_context(style):
        for letter, one in zip(string.ascii_uppercase, results, strict=False):
            records = one["records"]
            for words in [(), *plots(records)]:
                canvas = Figure(figsize=(7.5, 4.2), layout="constrained")
                plot = canvas.add_subplot()
                if not words:
                    _draw_ratios(plot, records)
                else:
                    suite, axis = words
                    own = [record for record in records if record["suite"] == suite]
                    (_draw_roofline if axis == ROOF else _draw_series)(plot, own, axis)
                plot.spines[["top", "right"]].set_visible(False)
                metadata = {"Date": None, "Creator": None, "Description": digest(records)}
                canvas.savefig(DOCS / plot_file(letter, *words), metadata=metadata)


OURS, PEER, OTHER = "#2a6f97", "#8d99ae", "#c1121f"


def _draw_ratios(plot: Any, records: list[dict[str, Any]]) -> None:
    """Draw the ratio of ichprog to its peer for each record, with the target."""
    shown = [record for record in records if record.get("target", ("",))[0] == "ratio"][::-1]
    rows, checks = range(len(shown)), [check_target(record) for record in shown]
    for met, colour, label in ((True, OURS, "ours : peer, target met"), (False, OTHER, "ours : peer, target missed")):
        own = [(row, value) for row, (value, is_met) in zip(rows, checks, strict=True) if is_met == met]
        plot.barh(
            [row for row, _ in own], [value - 1 for _, value in own], left=1, color=colour, height=0.6, label=label
        )
    plot.plot([record["target"][2] for record in shown], rows, "|k", markersize=14, markeredgewidth=2, label="target")
    plot.axvline(1, color=PEER, linewidth=1)
    plot.set_xscale("log")
    names = [f"{_name(record)}  {_digits(value)}" for record, (value, _) in zip(shown, checks, strict=True)]
    plot.set_yticks(rows, [name.replace("`", "") for name in names], fontsize=7.5)
    plot.set_xlabel("ours : peer")
    plot.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _draw_series(plot: Any, records: list[dict[str, Any]], axis: str) -> None:
    """Draw ichprog and its peer along an axis, with the range of the rounds."""
    shown = sorted((record for record in records if axis in record.get("at", ())), key=lambda one: one["at"][axis])
    for side, colour in (("peer", PEER), ("ours", OURS)):
        points = [(record["at"][axis], record[side]) for record in shown if side in record]
        positions, medians = [position for position, _ in points], [one["median"] for _, one in points]
        below, above = [one["min"] for _, one in points], [one["max"] for _, one in points]
        label = side if side == "ours" else shown[0].get("peer_name")
        plot.plot(positions, medians, "o-", color=colour, label=label)
        plot.fill_between(positions, below, above, color=colour, alpha=0.2, linewidth=0)
    plot.set_ylim(bottom=0)
    plot.set_xlim(left=0)
    plot.set_xlabel(axis)
    plot.set_ylabel(shown[0]["unit"])
    plot.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _draw_roofline(plot: Any, records: list[dict[str, Any]], axis: str) -> None:
    """Draw the measured speeds and the limits set by products and memory; a point without a limit is the peer."""
    points = [record for record in records if axis in record.get("at", ())]
    copy_rate = next((record["ours"]["median"] for record in records if record["unit"] == "GB/s"), None)
    colours = iter((OURS, OTHER))
    for point in points:
        position, speed = point["at"][axis], point["ours"]["median"]
        colour = next(colours) if "peer" in point else PEER
        plot.plot(position, speed, "o", color=colour, label=f"{point['what']}: {_digits(speed)} {point['unit']}")
        if "peer" in point:
            limit = point["peer"]["median"]
            edge = limit / copy_rate if copy_rate else 1
            plot.plot([1, edge, 1000], [limit / edge, limit, limit], color=colour, linewidth=1)
            plot.annotate(
                f"{point['peer_name']}: {_digits(limit)}", (1000, limit), ha="right", va="bottom", color=colour
            )
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_xlabel("operations for each byte")
    plot.set_ylabel(points[0]["unit"])
    plot.legend(frameon=False, loc="lower right")


def main() -> None:
    """Run the suites of the command line, and write results, page and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help="suites, such as benchmarks/test_prepare.py; by default all")
    parser.add_argument("-k", metavar="KEYWORD", help="run only tests that match, as in pytest")
    parser.add_argument("--rounds", type=int, metavar="N", help="number of rounds of each measurement")
    parser.add_argument("--not-slow", action="store_true", help="skip slow measurements")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="write the page from these results and measure nothing"
    )
    arguments, passed = parser.parse_args(), True
    if arguments.source:
        results = json.loads(arguments.source.read_text(encoding="utf-8"))
    else:
        measured, passed = measure(arguments.suites, arguments.rounds, arguments.k, slow=not arguments.not_slow)
        stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
        whole = passed and not (arguments.suites or arguments.k or arguments.not_slow)
        results = merge(stored, measured, whole=whole)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (DOCS / PAGE).write_text(page(results), encoding="utf-8")
    draw(results)
    if not passed:
        sys.exit("Some suites failed. The page has the results of the others.")


if __name__ == "__main__":
    main()
