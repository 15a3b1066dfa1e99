"""Compare brain extraction with ichprog's morphology to extraction with cc3d and edt, in cold processes.

Run `python benchmarks/extraction_libraries.py HEAD.nii.gz`. Needs `pip install connected-components-3d edt`. Rounds
alternate between the two, and the medians of import time plus first extraction are printed.
"""

import json
import statistics
import subprocess
import sys
import time

import numpy as np

ROUNDS = 9


def measure(kind: str, path: str) -> None:
    """Print import and extraction time of this process in seconds, and the brain volume in mL."""
    from ichprog.scan import brain, read

    scan = read(path)
    scan.lowres  # noqa: B018  # computed by the checks in any case
    start = time.perf_counter()
    if kind == "cc3d and edt":
        use_libraries(brain)
    imported = time.perf_counter()
    mask = brain.run_extractor(scan)
    end = time.perf_counter()
    volume_ml = float(mask.sum() * np.prod(scan.spacing) / 1000)
    print(json.dumps({"import": imported - start, "extract": end - imported, "volume_ml": volume_ml}))


def use_libraries(brain) -> None:
    """Replace the morphology functions of the extractor."""
    import cc3d
    import edt

    def filter_components(mask, keep, count_in=None):
        labels, n = cc3d.connected_components(np.asarray(mask), connectivity=6, return_N=True)
        counted = labels if count_in is None else labels[count_in]
        sizes = np.bincount(counted.ravel("K"), minlength=n + 1)[1:]
        return np.concatenate([[False], keep(sizes)])[labels]

    def largest_component(mask, count_in=None):
        return filter_components(mask, lambda s: np.arange(1, s.size + 1) == np.argmax(np.append(0, s)), count_in)

    def fill_holes(mask):
        labels = cc3d.connected_components(np.pad(~mask, 1, constant_values=True), connectivity=6)
        return (labels != labels[0, 0, 0])[1:-1, 1:-1, 1:-1]

    def distance_mm(mask, spacing, limit_mm):
        if not mask.any():
            return np.full(mask.shape, np.inf, np.float32)
        return edt.edt(~np.asarray(mask, order="F"), anisotropy=tuple(spacing), order="F")

    def dilate_mm(mask, radius_mm, spacing):
        return distance_mm(mask, spacing, radius_mm) <= radius_mm

    for function in (filter_components, largest_component, fill_holes, distance_mm, dilate_mm):
        setattr(brain, function.__name__, function)


def compare(path: str) -> None:
    """Run both in alternating processes and print their medians."""
    kinds = ("ichprog", "cc3d and edt")
    rows = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            process = [sys.executable, __file__, path, kind]
            rows[kind].append(json.loads(subprocess.run(process, capture_output=True, check=True, text=True).stdout))
    for kind, measured in rows.items():
        print(kind, {key: round(statistics.median(row[key] for row in measured), 3) for key in measured[0]})


if __name__ == "__main__":
    measure(sys.argv[2], sys.argv[1]) if len(sys.argv) > 2 else compare(sys.argv[1])
