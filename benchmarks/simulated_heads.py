"""Compare simulated heads without blood with real ones, and write the table of `docs/simulation.md`.

`python benchmarks/simulated_heads.py FOLDER`. FOLDER holds scans and `cohort.csv` with the columns `patient`, `scan`,
`age` and `haemorrhage`. Adults without haemorrhage are compared with simulated heads of the same range of ages.
The page receives means over heads only.
"""

import argparse
import csv
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from ichprog import zoo
from ichprog.scan import load
from ichprog.scan.morphology import bounding_box
from ichprog.simulate import PRESETS, Patient

PAGE = Path(__file__).parents[1] / "docs" / "simulation.md"
SEED, ADULT = 77, 18.0
DENSE_HU = (50.0, 100.0)
SMOOTH_MM, LOCAL_MM = 3.0, 15.0
DEPTHS_MM = {"0 to 5 mm": (0, 5), "5 to 10 mm": (5, 10), "over 10 mm": (10, np.inf)}
QUANTILES = (5, 25, 50, 75, 95, 99)


def measure(source: Any) -> dict[str, float]:
    """Measure the brain of one head: by depth under the skull, HU quantiles, noise, contrast and the blood check."""
    scan = load(source, expected_ranges=zoo.find(zoo.DEFAULT).input.expected_ranges, brain="extract")
    box = bounding_box(np.asarray(scan.brain))
    brain, voxels, in_plane = np.asarray(scan.brain)[box], scan.hu[box], scan.spacing[0]
    smooth = _smooth(np.clip(voxels, -50, 150), brain, SMOOTH_MM / in_plane)
    step = max(1, round(1 / in_plane))
    part = (slice(None, None, step), slice(None, None, step))
    spacing = (step * in_plane, step * scan.spacing[1], scan.spacing[2])
    depth = ndimage.distance_transform_edt(np.pad(brain[part], 1), spacing)[1:-1, 1:-1, 1:-1]
    hu, fine = smooth[part], voxels[part]
    found = {}
    for name, (low, high) in DEPTHS_MM.items():
        here = (depth > low) & (depth <= high)
        found[f"voxels of 50 to 100 HU, {name} from the skull (%)"] = 100 * float(_is_dense(fine[here]).mean())
        found[f"the same after smoothing by 3 mm, {name} (%)"] = 100 * float(_is_dense(hu[here]).mean())
        found[f"median, {name} (HU)"] = float(np.median(hu[here]))
    for q in QUANTILES:
        found[f"quantile {q} % deeper than 5 mm (HU)"] = float(np.percentile(hu[depth > 5], q))
    tissue = (depth > 12) & (hu > 15) & (hu < 45)
    noise = (fine - hu)[tissue]
    found["standard deviation of the noise (HU)"] = 1.4826 * float(np.median(np.abs(noise - np.median(noise))))
    local = (hu - _smooth(hu, brain[part], LOCAL_MM / spacing[0]))[depth > 12]
    found["standard deviation of local contrast (HU)"] = float(local.std())
    found["heads in which the check `no-blood` sees blood (%)"] = 100 * float(
        all(warning.code != "no-blood" for warning in scan.warnings)
    )
    return found


def _is_dense(hu: np.ndarray) -> np.ndarray:
    return (hu >= DENSE_HU[0]) & (hu < DENSE_HU[1])


def _smooth(hu: np.ndarray, brain: np.ndarray, pixels: float) -> np.ndarray:
    """Return the mean HU of the brain within a square of the plane."""
    size = (max(1, round(pixels)), max(1, round(pixels)), 1)
    weight = ndimage.uniform_filter(brain.astype(np.float32), size)
    result: np.ndarray = ndimage.uniform_filter(hu * brain.astype(np.float32), size) / np.maximum(weight, 1e-3)
    return result


def real_heads(folder: Path) -> tuple[list[Path], float]:
    """Return the scans of adults without haemorrhage, and the highest age."""
    with (folder / "cohort.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["haemorrhage"] == "0" and float(r["age"]) >= ADULT]
    return [folder / row["scan"] for row in rows], max(float(row["age"]) for row in rows)


def simulated_heads(preset: str, count: int, oldest: float) -> Iterable[nib.Nifti1Image]:
    """Yield whole heads without haemorrhage up to an age."""
    realism = dataclasses.replace(PRESETS[preset], without_blood=1.0, adult_ages=True)
    patients = (Patient(SEED, number, realism) for number in range(10 * count))
    chosen = [patient for patient in patients if patient.person.age <= oldest][:count]
    for patient in chosen:
        acquired = patient.scan(skull=True)
        yield nib.Nifti1Image(acquired.hu, acquired.affine)


def main() -> None:
    """Measure the heads and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--simulated", type=int, default=12, help="number of simulated heads of each preset")
    options = parser.parse_args()
    scans, oldest = real_heads(options.folder)
    sources: dict[str, Callable[[], Iterable[Any]]] = {"real": lambda: scans}
    for preset in PRESETS:
        sources[preset] = lambda preset=preset: simulated_heads(preset, options.simulated, oldest)
    heads: dict[str, list[dict[str, float]]] = {}
    for name, source in sources.items():
        heads[name] = [measure(head) for head in source()]
        print(
            name, {key: round(float(np.mean([h[key] for h in heads[name]])), 2) for key in heads[name][0]}, flush=True
        )
    counts = (f"{name}, {len(measured)} heads" for name, measured in heads.items())
    lines = [f"| mean (standard deviation) | {' | '.join(counts)} |", "| --- |" + " --- |" * len(heads)]
    for name in heads["real"][0]:
        values = [np.array([head[name] for head in measured]) for measured in heads.values()]
        shown = [f"{v.mean():.0f}" if "no-blood" in name else f"{v.mean():.1f} ({v.std():.1f})" for v in values]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    text = "\n".join(lines)
    print(text)
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- table: written by benchmarks/simulated_heads.py -->", "<!-- end of table -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    PAGE.write_text(re.sub(pattern, f"{begin}\n{text}\n{end}", page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
