"""Compare decoding compressed DICOM in this process with a child process for each series.

Run `PYTHONPATH=tests python benchmarks/decoder_process.py`. The child has limits of memory and processor time, as
a guard against faults of the decoders would need. Rounds alternate, and medians of seconds for one series are printed.
"""

import resource
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from ichprog.scan.dicom import read_series

from support import dicom_series

ROUNDS, SLICES = 5, 32
MEMORY, SECONDS = 8 << 30, 60


def read_with_limits(path: str) -> np.ndarray:
    """Return the HU of a series, read under the limits of a guarded process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    return read_series(Path(path)).hu


def main() -> None:
    """Read each series in both ways."""
    dicom_series.ROWS = dicom_series.COLUMNS = 512
    dicom_series.PIXEL_MM = 0.45
    with tempfile.TemporaryDirectory() as scratch:
        for syntax, name in ((JPEG2000Lossless, "JPEG 2000"), (JPEGLSLossless, "JPEG-LS")):
            folder = Path(scratch) / name
            dicom_series.write(folder, count=SLICES, syntax=syntax)
            read_series(folder)  # imports
            times: dict[str, list[float]] = {"here": [], "child": []}
            for _ in range(ROUNDS):
                start = time.perf_counter()
                here = read_series(folder).hu
                times["here"].append(time.perf_counter() - start)
                start = time.perf_counter()
                with get_context("spawn").Pool(1) as pool:
                    child = pool.apply(read_with_limits, (str(folder),))
                times["child"].append(time.perf_counter() - start)
                if not np.array_equal(here, child):
                    raise ValueError("the processes read different values")
            medians = ", ".join(f"{where} {statistics.median(each):.2f} s" for where, each in times.items())
            print(f"{name}, {SLICES} slices of 512 x 512: {medians}", flush=True)


if __name__ == "__main__":
    main()
