"""Measure where haemorrhages are located, and write `docs/location.md`: `python benchmarks/location.py OUT`.

OUT receives simulated whole heads of the preset "realistic" with their masks and extracted brains, and is reused. The
constants of `ichprog.location` were chosen on the patients of one seed; the page reports those of another. With
`--real FOLDER`, the page also has counts of real heads: FOLDER holds NIfTI files of `../shared/data/ct_ich/build.py`.
"""

import argparse
import csv
import dataclasses
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichprog.io import atomic_write
from ichprog.location import Location, locate
from ichprog.location.atlas import load_atlas
from ichprog.location.locate import TENTORIUM_SHARE, TENTORIUM_SLOPE
from ichprog.location.midline import measure_midline_shift
from ichprog.location.registration import register
from ichprog.metrics.bootstrap import wilson_interval
from ichprog.scan import read
from ichprog.scan.brain import extract_brain, run_extractor
from ichprog.scan.morphology import bounding_box
from ichprog.simulate import PRESETS, Patient
from ichprog.simulate.population import SITES

PAGE = Path(__file__).parents[1] / "docs" / "location.md"
CHOSEN, REPORTED = 31, 32
LARGE_OF, LARGE_SHIFTS = 250, 22  # patients among whom large shifts are looked for, and how many are taken
LATERAL_MM = 10.0  # the middle of a lateral haemorrhage is at least this far from the midline
SCATTERED = {"subarachnoid", "convexity"}  # sites whose blood spreads through cisterns and sulci
LOCATIONS = ("lobar", "deep", "infratentorial")
AIR_HU = -1000
FLUID_HU, SYMMETRIC = 18.0, (0.35, 0.65)
PLAUSIBLE_MM, PLAUSIBLE_SCALE, STRAIGHT_MM = 3.5, (0.85, 1.45), 3.0


@dataclass(frozen=True)
class Located:
    """A simulated patient with a haemorrhage and its location.

    Attributes:
        patient: The patient.
        found: The location.
        seconds: Processor time of `locate`.
    """

    patient: Patient
    found: Location
    seconds: float

    @property
    def site(self) -> str:
        """Return the name of the site."""
        return self.patient.person.site

    @property
    def is_lateral(self) -> bool:
        """Return whether the haemorrhage is one piece on one side."""
        return self.site not in SCATTERED and abs(float(self.patient.shape.middle[0])) >= LATERAL_MM


def simulate(patient: Patient, folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a patient, from the folder if they are there.

    Only the box around the brain is stored. Outside of it, the arrays that are returned hold no blood and air.
    """
    path = folder / f"{patient.seed}_{patient.number:03d}.npz"
    if not path.exists():
        acquired = patient.scan(skull=True)
        spacing = np.abs(np.diag(acquired.affine)[:3])
        brain = extract_brain(acquired.hu.astype(np.float32), tuple(spacing))
        box = bounding_box(brain | acquired.inside)
        arrays = {"hu": acquired.hu[box], "blood": acquired.blood[box], "brain": brain[box], "mm": spacing}
        arrays |= {"start": np.array([at.start for at in box]), "shape": np.array(acquired.hu.shape)}
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in ("hu", "blood", "brain", "mm", "start", "shape")}
    box = tuple(slice(a, a + n) for a, n in zip(arrays["start"], arrays["hu"].shape, strict=True))
    for name, outside in (("hu", AIR_HU), ("blood", 0), ("brain", False)):
        whole = np.full(tuple(arrays["shape"]), outside, np.float32 if name == "hu" else arrays[name].dtype)
        whole[box] = arrays[name]
        arrays[name] = whole
    return arrays


def measure(patients: Iterable[Patient], folder: Path) -> list[Located]:
    """Locate the haemorrhages of patients by their true masks; patients without haemorrhage are left out."""
    located = []
    for patient in patients:
        if not patient.person.bleeds:
            continue
        arrays = simulate(patient, folder)
        start = time.process_time()
        found = locate(arrays["blood"], arrays["brain"], arrays["hu"], tuple(arrays["mm"]))
        located.append(Located(patient, found, time.process_time() - start))
    return located


def with_large_shifts(seed: int) -> list[Patient]:
    """Return patients with larger haemorrhages: those with the largest midline shifts, and as many others."""
    options = dataclasses.replace(PRESETS["realistic"], small_bleeds=False, without_blood=0.0)
    patients = [Patient(seed, number, options) for number in range(LARGE_OF)]
    by_shift = sorted(patients, key=lambda patient: -patient.shape.midline_shift_mm())
    others = sorted(by_shift[LARGE_SHIFTS:], key=lambda patient: patient.number)[:LARGE_SHIFTS]
    return [patient for pair in zip(by_shift[:LARGE_SHIFTS], others, strict=True) for patient in pair]


def summarise_shifts(located: Sequence[Located]) -> list[tuple[str, str]]:
    """Return the figures of the midline shift as rows of a table."""
    measured = [one for one in located if one.found.midline_shift_mm is not None]
    found = np.array([one.found.midline_shift_mm for one in measured], float)
    true = np.array([one.patient.shape.midline_shift_mm() for one in measured])
    error = np.abs(found - true)
    low, high = np.array([one.found.midline_shift_interval_mm for one in measured], float).T
    return [
        ("patients, measured", f"{len(located)}, {len(measured)}"),
        ("true shift: median, largest", f"{np.median(true):.1f} mm, {true.max():.1f} mm"),
        ("error: median, 90 % quantile", f"{np.median(error):.1f} mm, {np.quantile(error, 0.9):.1f} mm"),
        ("Pearson correlation", f"{np.corrcoef(found, true)[0, 1]:.2f}"),
        ("true shift in the interval", _rate(int(((low <= true) & (true <= high)).sum()), len(measured))),
    ]


def fit_tentorium(shares: np.ndarray, infratentorial: np.ndarray) -> float:
    """Fit the slope of a logistic function of the share below the tentorium whose middle is TENTORIUM_SHARE.

    The targets are those of Platt (1999), so that the slope stays finite if a share separates the patients.
    """
    above, below = int((~infratentorial).sum()), int(infratentorial.sum())
    target = np.where(infratentorial, (below + 1) / (below + 2), 1 / (above + 2))
    slopes = np.arange(1.0, 40.0, 0.1)
    p = 1 / (1 + np.exp(-slopes[:, None] * (shares - TENTORIUM_SHARE)))
    loss = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(1)
    return float(slopes[loss.argmin()])


def summarise(located: Sequence[Located]) -> list[tuple[str, str]]:
    """Return the figures of patients as rows of a table."""
    below = np.array([one.patient.person.infratentorial for one in located])
    p = np.array([one.found.infratentorial for one in located])
    lateral = [one for one in located if one.is_lateral]
    right_side = sum(one.found.side == {1: "left", -1: "right"}[one.patient.person.side] for one in lateral)
    inside = [one for one in located if SITES[one.site].kind == "parenchymal"]
    right_place = sum(one.found.location == SITES[one.site].location for one in inside)
    kinds = [one for one in located if SITES[one.site].kind != "parenchymal"]
    right_kind = sum(
        str(one.found.location).startswith(SITES[one.site].kind[:8]) for one in kinds if one.site != "epidural"
    )
    right_kind += sum(one.found.location == "subdural_epidural" for one in kinds if one.site == "epidural")
    return [
        ("patients with haemorrhage, infratentorial ones", f"{len(located)}, {below.sum()}"),
        ("infratentorial: accuracy", _rate(int(((p > 0.5) == below).sum()), len(located))),
        ("infratentorial: mean squared error of the probability", f"{np.mean((p - below) ** 2):.4f}"),
        ("side of lateral haemorrhages", _rate(right_side, len(lateral))),
        ("lobar, deep or infratentorial, of parenchymal haemorrhages", _rate(right_place, len(inside))),
        ("kind as the location, of other haemorrhages", _rate(right_kind, len(kinds))),
        ("median processor time", f"{np.median([one.seconds for one in located]):.2f} s"),
    ]


def confusion(located: Iterable[Located]) -> list[str]:
    """Return a table of the true and the found location of parenchymal haemorrhages."""
    counts: Counter[tuple[str, str]] = Counter()
    for one in located:
        if SITES[one.site].kind == "parenchymal":
            counts[SITES[one.site].location, str(one.found.location)] += 1
    others = sorted({found for _, found in counts} - set(LOCATIONS))
    columns = [*LOCATIONS, *others]
    lines = [
        f"| true location | {' | '.join(f'found: {name}' for name in columns)} |",
        "| --- |" + " --- |" * len(columns),
    ]
    return lines + [f"| {true} | {' | '.join(str(counts[true, name]) for name in columns)} |" for true in LOCATIONS]


def check_real_heads(folder: Path) -> list[str]:
    """Return a table of the number of real heads whose registration and midline are plausible."""
    with (folder / "cohort.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heads = [(row["haemorrhage"] == "1", check_real_head(folder / row["scan"])) for row in rows]
    groups = [[checks for bleeds, checks in heads if bleeds == group] for group in (False, True)]
    lines = [
        f"| check | {len(groups[0])} heads without haemorrhage | {len(groups[1])} heads with haemorrhage |",
        "| --- | --- | --- |",
    ]
    counts = {name: [sum(checks[name] for checks in group) for group in groups] for name in heads[0][1]}
    return lines + [f"| {name} | {without} | {bleeding} |" for name, (without, bleeding) in counts.items()]


def check_real_head(path: Path) -> dict[str, bool]:
    """Return which checks of the registration and the midline a real head passes."""
    atlas, scan = load_atlas(), read(path)
    brain = run_extractor(scan)
    registration = register(brain, scan.spacing, atlas)
    voxels = np.stack(np.nonzero(brain))[:, ::5]
    points = registration.to_atlas(voxels, scan.spacing)
    regions, hu = atlas.regions_at(points), scan.hu[tuple(voxels)]
    ventricles, thalamus = (regions == atlas.names.index(name) for name in ("ventricles", "thalamus"))
    right = float(np.mean(points[0, ventricles & (hu < FLUID_HU)] > 0))
    shift = measure_midline_shift(scan.hu, np.zeros(brain.shape, np.uint8), registration, scan.spacing).mm
    low, high = PLAUSIBLE_SCALE
    return {
        f"median distance of the surfaces below {PLAUSIBLE_MM:g} mm": registration.residual_mm < PLAUSIBLE_MM,
        f"scales from {low:g} to {high:g}": bool(((registration.scale > low) & (registration.scale < high)).all()),
        "ventricles of the atlas less dense than its thalamus": bool(
            np.median(hu[ventricles]) < np.median(hu[thalamus])
        ),
        f"fluid of the ventricles: {100 * SYMMETRIC[0]:.0f} to {100 * SYMMETRIC[1]:.0f} % on the right": (
            SYMMETRIC[0] < right < SYMMETRIC[1]
        ),
        "midline shift measured": shift is not None,
        f"midline shift measured, below {STRAIGHT_MM:g} mm": shift is not None and shift < STRAIGHT_MM,
    }


def _rate(right: int, count: int) -> str:
    low, high = wilson_interval(right, count)
    return f"{right} of {count}, {right / max(count, 1):.2f} ({low:.2f} to {high:.2f})"


def write_page(marker: str, lines: Sequence[str]) -> None:
    """Replace the lines between the markers of the page."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = rf"(<!-- {marker}: written by benchmarks/location.py -->\n).*?(<!-- end of {marker} -->)"
    text, count = re.subn(
        pattern, lambda found: found[1] + "\n" + "\n".join(lines) + "\n\n" + found[2], text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE}: expected one pair of markers named {marker}.")
    with atomic_write(PAGE) as part:
        part.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--patients", type=int, default=95, help="patients of each seed, a third without blood")
    parser.add_argument("--shifts", type=int, default=2 * LARGE_SHIFTS, help="patients with larger haemorrhages")
    parser.add_argument("--real", type=Path, help="folder of real heads")
    parser.add_argument("--page", action="store_true", help="write the page")
    options = parser.parse_args()
    located = {
        seed: measure((Patient(seed, number, "realistic") for number in range(options.patients)), options.output)
        for seed in (CHOSEN, REPORTED)
    }
    chosen = located[CHOSEN]
    p = np.array([one.found.infratentorial for one in chosen])
    shares = TENTORIUM_SHARE + np.log(p / (1 - p)) / TENTORIUM_SLOPE
    slope = fit_tentorium(shares, np.array([one.patient.person.infratentorial for one in chosen]))
    print(f"seed {CHOSEN}: slope {slope:.1f} of the logistic function of the tentorium")
    tables = {seed: dict(summarise(patients)) for seed, patients in located.items()}
    lines = [f"| | seed {CHOSEN}, chosen on | seed {REPORTED}, reported |", "| --- | --- | --- |"]
    lines += [f"| {name} | {tables[CHOSEN][name]} | {tables[REPORTED][name]} |" for name in tables[REPORTED]]
    lines += ["", f"Parenchymal haemorrhages of seed {REPORTED}:", "", *confusion(located[REPORTED])]
    print("\n".join(lines))
    large = {s: measure(with_large_shifts(s)[: options.shifts], options.output / "large") for s in (CHOSEN, REPORTED)}
    shifts = {seed: dict(summarise_shifts(patients)) for seed, patients in large.items()}
    shift_lines = [f"| | seed {CHOSEN}, chosen on | seed {REPORTED}, reported |", "| --- | --- | --- |"]
    shift_lines += [f"| {name} | {shifts[CHOSEN][name]} | {shifts[REPORTED][name]} |" for name in shifts[REPORTED]]
    print("\n".join(shift_lines))
    real: list[str] = []
    if options.real:
        real = check_real_heads(options.real)
        print("\n".join(real))
    if options.page:
        write_page("figures", lines)
        write_page("midline shift", shift_lines)
        if real:
            write_page("real heads", real)


if __name__ == "__main__":
    main()
