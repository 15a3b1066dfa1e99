"""Measure how many scans `ichprog predict` answers per second with 1, 2 and 4 worker processes.

    python benchmarks/throughput.py --scans 24 --workers 1 2 4

The scans are copies of simulated whole heads. Every run must write the same bytes. The rate counts from the first
result to the last, so that it is that of a long run; start-up is the time to the first result.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ichprog.simulate import Patient

HEADS = 4


def write_scans(folder: Path, number: int) -> None:
    """Write simulated whole heads, and copies of them under other names."""
    heads = [Patient(0, index).save(folder.parent / "heads", skull=True)[0] for index in range(HEADS)]
    folder.mkdir()
    for index in range(number):
        shutil.copyfile(heads[index % HEADS], folder / f"{index:04}.nii.gz")


def measure(folder: Path, model: str, workers: int) -> tuple[float, float, bytes]:
    """Return start-up in seconds, scans per second after it, and the results."""
    target = folder / f"results-{workers}.csv"
    command = [sys.executable, "-m", "ichprog", "predict", "scans", "-m", model, "-o", target.name, "--overwrite"]
    start, times = time.monotonic(), [0.0]
    with subprocess.Popen(
        [*command, "--workers", str(workers)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        times += [time.monotonic() - start for line in process.stdout if line.startswith("scans")]
    assert process.returncode == 0
    return times[1], (len(times) - 2) / (times[-1] - times[1]), target.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=24, help="number of scans")
    parser.add_argument("--model", default="compact.prognosis_gcs3_age_v2", help="model that predicts")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of worker processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), set()
        os.environ.setdefault("ICHPROG_CACHE", str(folder / "cache"))
        write_scans(folder / "scans", options.scans)
        subprocess.run(  # compiles the networks
            [sys.executable, "-m", "ichprog", "predict", "scans/0000.nii.gz", "-m", options.model],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        threads = os.environ.get("OMP_NUM_THREADS", "unset")
        print(f"{options.scans} whole heads, {options.model}, {os.cpu_count()} processors, OMP_NUM_THREADS {threads}")
        print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
        print("workers  start-up (s)  scans/s  speed-up")
        first = None
        for workers in options.workers:
            start_up, rate, written = measure(folder, options.model, workers)
            first, results = first or rate, results | {written}
            print(f"{workers:7}  {start_up:12.1f}  {rate:7.2f}  {rate / first:8.2f}", flush=True)
        print("same bytes:", "yes" if len(results) == 1 else "NO")


if __name__ == "__main__":
    main()
