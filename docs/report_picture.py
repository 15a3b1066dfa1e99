"""Photograph the report of a simulated patient: `python docs/report_picture.py FOLDER` writes `docs/report.png`.

It needs Chromium. FOLDER keeps the cohort for another run: a report says that a patient is simulated if the cohort's
record does. The patient is that of `docs/pictures.py`.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from pictures import DOCS, MODEL, PATIENT, SEED

import ichprog
from ichprog.reporting.pdf import find_chromium
from ichprog.simulate import Patient, simulate

SIZE = (1280, 1100)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",  # the viewer needs WebGL
    "--virtual-time-budget=60000", f"--window-size={SIZE[0]},{SIZE[1]}",
)  # fmt: skip


def main() -> None:
    """Write the report and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    simulate(args.folder, patients=PATIENT + 1, seed=SEED, skull=True)
    scan, _ = Patient(SEED, PATIENT).paths(args.folder, dicom=False)
    prediction = ichprog.predict(MODEL, scan, haemorrhage=True)
    with tempfile.TemporaryDirectory() as folder:
        page = ichprog.save_report(prediction, scan, Path(folder) / "report.html")
        command = [find_chromium(), *FLAGS, f"--user-data-dir={folder}/profile", f"--screenshot={DOCS / 'report.png'}"]
        subprocess.run([*command, page.as_uri()], check=True)  # noqa: S603


if __name__ == "__main__":
    main()
