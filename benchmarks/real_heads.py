"""Measure ichprog on real head CTs and write `docs/real-heads.md`: `python benchmarks/real_heads.py FOLDER -o OUT`.

FOLDER holds `slices.csv`, `patients.csv` and `build.py`, which builds NIfTI files from JPEG slices. OUT receives the
scans, one row for each head in `heads.csv`, one row for each slice in `slices.csv`, and `summary.json`. These files
hold values of single patients and must not be published. The page has counts and summary figures only.

A haemorrhage detector is one function from a head and its scan to scores, registered in DETECTORS.
"""

import argparse
import csv
import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ichprog
from ichprog.cohort import CT_ICH_KINDS
from ichprog.io import write_csv
from ichprog.metrics import compute_weighted
from ichprog.metrics.bootstrap import percentile_interval, resample_counts, wilson_interval
from ichprog.metrics.comparisons import correlations
from ichprog.metrics.operating_points import threshold_at
from ichprog.reporting import figures
from ichprog.scan import CHECKS, read
from ichprog.scan.brain import run_extractor
from ichprog.scan.checks import check_scan, measure_dense_blood, missing_brain_ml
from ichprog.scan.validation import validate_ct

PAGE = Path(__file__).parents[1] / "docs" / "real-heads.md"
MODEL = "compact.prognosis_gcs3_age_v2"
NETWORK = "compact.haemorrhage"
FOLDS = 3
AGE_GROUPS = {"under 18 years": (0, 18), "18 years or older": (18, 200)}
SPECIFICITY = 0.85  # at which the network is used
SMALLEST_GROUP = 4  # figures of fewer bleeding or other heads would tell about single patients
AT_END = 0.002  # a brain ends at a side if a smaller share is missing there
REMOVED_MM = (5, 10, 15, 20, 30, 40, 50)
N_BOOTSTRAP = 2000
METRICS = ("auroc", "sensitivity", "specificity")
SIMULATED_SEED = 5


class Scores(NamedTuple):
    """Scores of a detector for one scan, each from 0 to 1. Blood is called above 0.5, the threshold of the detector.

    Attributes:
        slices: `(k,)` score of each slice, as the file stores the slices.
        patient: Score of the patient.
    """

    slices: np.ndarray
    patient: float


def fold_of(name: str) -> int:
    """Return the fold of the network that was not trained on a head, as in `docs/haemorrhage.py`."""
    return int(re.sub(r"\D", "", name)) % FOLDS


def score_dense_blood(head: "Head", path: Path) -> Scores:
    """Score a scan by the measurement of the check `no-blood`: 1 mL, and 1 cm2 in a slice, give 0.5."""
    scan = read(path)
    blood_ml, area_cm2 = measure_dense_blood(scan, run_extractor(scan))
    return Scores(area_cm2 / (area_cm2 + 1), blood_ml / (blood_ml + 1))


def score_network(head: "Head", path: Path) -> Scores:
    """Score a scan by the fold of the network that was not trained on it."""
    model = _network(fold_of(head.name))
    (task,) = model.spec.tasks
    result = ichprog.predict(model, path)[task.name]
    slices = np.array(result.segmentation.slice_probabilities)
    return Scores(slices, _centre(result.probabilities[task.labels[-1]], task.decision_threshold))


@functools.cache
def _network(fold: int) -> ichprog.Model:
    return ichprog.load_model(NETWORK, fold=fold)


def _centre(probability: float, threshold: float) -> float:
    """Return the probability at other prior odds, so that the threshold becomes 0.5."""
    above, below = probability * (1 - threshold), (1 - probability) * threshold
    return above / (above + below)


DETECTORS: dict[str, Callable[["Head", Path], Scores]] = {
    "the measurement of `no-blood`": score_dense_blood,
    f"`{NETWORK}`": score_network,
}


@dataclass
class Head:
    """One head with what was measured on it.

    Attributes:
        name: Name of the patient.
        age: Age in years.
        slices: `(k, 5)` bool: which slice shows which kind of haemorrhage, in the order of CT_ICH_KINDS.
        volume_ml: Volume of the extracted brain, NaN if none was found.
        seconds: Duration of the extraction.
        warnings: Codes of the warnings.
        missing: Share of the brain that is missing at the top.
        cropping: Removed and estimated mL by side, as `take_slices_off` returns them, if the brain ends there.
        scores: Scores by detector.
        p_poor: Probability of a poor outcome by the embedded model.
        p_old: Probability of an age of 80 or more by the embedded model.
    """

    name: str
    age: float
    slices: np.ndarray
    volume_ml: float = np.nan
    seconds: float = np.nan
    warnings: tuple[str, ...] = ()
    missing: float = np.nan
    cropping: dict[str, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    scores: dict[str, Scores] = dataclasses.field(default_factory=dict)
    p_poor: float = np.nan
    p_old: float = np.nan

    @property
    def bleeds(self) -> bool:
        """Return whether any slice shows a haemorrhage."""
        return bool(self.slices.any())


def build_scans(folder: Path, out: Path, patients: Sequence[int]) -> list[tuple[Head, Path]]:
    """Build the NIfTI files that are missing, and return the heads with their labels and the paths of their scans."""
    people = {int(row["patient"]): row for row in _rows(folder / "patients.csv")}
    chosen = [number for number in sorted(people) if number in patients or not patients]
    missing = [str(number) for number in chosen if not (out / f"{number}.nii.gz").exists()]
    if missing:
        subprocess.run([sys.executable, folder / "build.py", out, "--patients", *missing], check=True)
    labels: dict[int, list[list[bool]]] = {}
    for row in _rows(folder / "slices.csv"):  # from foot to head, as build.py stores them
        labels.setdefault(int(row["patient"]), []).append([row[kind] == "1" for kind in CT_ICH_KINDS])
    heads = [Head(f"ct{number}", float(people[number]["age"]), np.array(labels[number])) for number in chosen]
    return [(head, out / f"{number}.nii.gz") for head, number in zip(heads, chosen, strict=True)]


def measure_head(head: Head, path: Path, model: ichprog.Model) -> None:
    """Extract the brain, check the scan, run the detectors and the embedded model, and store what was measured."""
    scan = read(path)
    start = time.perf_counter()
    try:
        validate_ct(scan)
        mask = run_extractor(scan)
    except ichprog.ScanError as error:
        head.warnings = (f"error {error.code}",)
        return
    head.seconds = time.perf_counter() - start
    head.volume_ml = float(np.count_nonzero(mask) * np.prod(scan.spacing) / 1000)
    head.warnings = tuple(warning.code for warning in check_scan(scan, mask, {}, given=False))
    for side, stack in (("top", mask), ("bottom", mask[:, :, ::-1])):
        share = missing_brain_ml(stack, scan.spacing, "top") / head.volume_ml  # top and bottom have the same curvature
        head.missing = share if side == "top" else head.missing
        if share < AT_END:
            head.cropping[side] = take_slices_off(stack, scan.spacing)
    head.scores = {name: score(head, path) for name, score in DETECTORS.items()}
    prediction = ichprog.predict(model, path)
    head.p_poor, head.p_old = (list(prediction[task].probabilities.values())[-1] for task in ("prognosis", "age"))


def take_slices_off(mask: np.ndarray, spacing: tuple[float, float, float]) -> list[tuple[float, float]]:
    """Take slices off the end of a stack, and return the removed volume and its estimate in mL for each height.

    What the estimate adds beyond the whole brain counts as removed, too.
    """
    stack = mask[:, :, : np.flatnonzero(mask.any((0, 1)))[-1] + 1]
    beyond_ml = missing_brain_ml(stack, spacing, "top")
    pairs = []
    for height in REMOVED_MM:
        count = max(1, round(height / spacing[2]))
        removed_ml = np.count_nonzero(stack[:, :, -count:]) * np.prod(spacing) / 1000
        pairs.append((float(removed_ml) + beyond_ml, missing_brain_ml(stack[:, :, :-count], spacing, "top")))
    return pairs


def summarise_cropping(heads: Sequence[Sequence[tuple[float, float]]]) -> list[dict[str, float]]:
    """Return the removed mL and the relative error of the estimate for each height: median and 90th percentile."""
    rows = []
    for height, pairs in zip(REMOVED_MM, np.array(heads).transpose(1, 0, 2), strict=True):
        removed, estimated = pairs.T
        error = np.abs(estimated / removed - 1)
        row = {"removed_mm": height, "removed_ml": np.median(removed), "median_error": np.median(error)}
        row |= {"p90_error": np.percentile(error, 90), "within_30": np.mean(error <= 0.3)}
        rows.append({key: float(value) for key, value in row.items()})
    return rows


def crop_simulated(patients: int) -> list[list[tuple[float, float]]]:
    """Return the result of `take_slices_off` for simulated patients."""
    from ichprog.simulate import Patient

    pairs = []
    for number in range(patients):
        scan = Patient(SIMULATED_SEED, number, "plain").scan()
        x, y, z = (float(mm) for mm in np.linalg.norm(scan.affine[:3, :3], axis=0))
        pairs.append(take_slices_off(scan.inside, (x, y, z)))
    return pairs


def measure_detector(
    truth: np.ndarray, scores: np.ndarray, patients: np.ndarray
) -> dict[str, tuple[float, float, float]]:
    """Return the AUROC, and sensitivity and specificity at 0.5, each with a 95 % interval over patients.

    Intervals are those of a bootstrap over patients, or Wilson's for a share of patients.

    Args:
        truth: `(N,)` bool, whether each case is positive.
        scores: `(N,)` scores from 0 to 1.
        patients: `(N,)` number of each case's patient. Bootstrap samples are samples of patients.
    """
    _, patient_of = np.unique(patients, return_inverse=True)
    counts = resample_counts(patient_of.max() + 1, n_bootstrap=N_BOOTSTRAP)[:, patient_of]
    weights = np.concatenate([np.ones((1, len(truth))), counts])
    values = compute_weighted(truth, scores, weights, kind="binary")
    figures = {name: (float(values[name][0]), *percentile_interval(values[name][1:])) for name in METRICS}
    if len(truth) == patient_of.max() + 1:  # shares of patients, whose bootstrap intervals vanish at 0 and 1
        for name, group in (("sensitivity", truth), ("specificity", ~truth)):
            low, high = wilson_interval(round(figures[name][0] * group.sum()), group.sum())
            figures[name] = (figures[name][0], float(low), float(high))
    return figures


def detection_rows(heads: Sequence[Head], detector: str) -> list[dict[str, Any]]:
    """Return the figures of one detector: for all heads, by size, by kind and by age, by patient and by slice."""
    others = [head for head in heads if not head.bleeds]
    groups: list[tuple[str, Sequence[Head], list[int]]] = [("all", heads, [*range(len(CT_ICH_KINDS))])]
    large = [head for head in heads if head.slices.any(1).sum() >= 2]
    groups.append(("bleeds in two slices or more", [*large, *others], [*range(len(CT_ICH_KINDS))]))
    for index, kind in enumerate(CT_ICH_KINDS):
        groups.append((kind, [head for head in heads if head.slices[:, index].any()] + others, [index]))
    for name, (low, high) in AGE_GROUPS.items():
        groups.append((name, [head for head in heads if low <= head.age < high], [*range(len(CT_ICH_KINDS))]))
    rows = []
    for name, members, kinds in groups:
        truth = np.array([head.slices[:, kinds].any() for head in members], bool)
        if min(truth.sum(), (~truth).sum()) < SMALLEST_GROUP:
            continue
        row: dict[str, Any] = {"group": name, "bleeding": int(truth.sum()), "other": int((~truth).sum())}
        numbers = np.arange(len(members))
        row["patient"] = measure_detector(truth, np.array([h.scores[detector].patient for h in members]), numbers)
        # A slice with another kind of haemorrhage is neither positive nor negative.
        used = [head.slices[:, kinds].any(1) | ~head.slices.any(1) for head in members]
        slices = [head.slices[:, kinds].any(1)[at] for head, at in zip(members, used, strict=True)]
        scores = [head.scores[detector].slices[at] for head, at in zip(members, used, strict=True)]
        owners = np.repeat(numbers, [len(each) for each in slices])
        row["slice"] = measure_detector(np.concatenate(slices), np.concatenate(scores), owners)
        rows.append(row)
    return rows


def cross_fitted(heads: Sequence[Head], detector: str) -> dict[str, Any]:
    """Return sensitivity and specificity by patient with a threshold that was chosen on the heads of the other folds.

    The threshold is the lowest with a specificity of `SPECIFICITY`, as in `docs/haemorrhage.py`. Bleeds in one slice
    only are left out. Heads of a fold are also left out if the other folds do not have both bleeding and other heads.
    """
    used = [head for head in heads if not head.bleeds or head.slices.any(1).sum() >= 2]
    truth = np.array([head.bleeds for head in used])
    scores = np.array([head.scores[detector].patient for head in used])
    folds = np.array([fold_of(head.name) for head in used])
    called, fitted = np.zeros((2, len(used)), bool)
    for fold in range(FOLDS):
        inside, others = folds == fold, folds != fold
        if len(set(truth[others])) == 2:
            called[inside] = scores[inside] > threshold_at(truth[others], scores[others], "specificity", SPECIFICITY)
            fitted[inside] = True
    figures: dict[str, Any] = {"bleeding": int(truth[fitted].sum()), "other": int((~truth[fitted]).sum())}
    for name, right in (("sensitivity", called[truth & fitted]), ("specificity", ~called[~truth & fitted])):
        if not len(right):
            figures[name] = (np.nan, np.nan, np.nan)
            continue
        low, high = wilson_interval(int(right.sum()), len(right))
        figures[name] = (float(right.mean()), float(low), float(high))
    return figures


def summarise(heads: Sequence[Head], simulated: Sequence[list[tuple[float, float]]]) -> dict[str, Any]:
    """Return all summary figures. They contain no value of a single patient."""
    answered = [head for head in heads if np.isfinite(head.volume_ml)]
    bleeding = [head for head in heads if head.bleeds]
    others = [head for head in heads if not head.bleeds]
    adults = [head for head in answered if head.age >= 18]
    tops, bottoms = ([h.cropping[side] for h in answered if side in h.cropping] for side in ("top", "bottom"))
    cropped = {"real, top": tops[1::2], "simulated, top": simulated, "real, bottom": bottoms}  # tops[::2]: chosen on
    poor = measure_detector(
        np.array([head.bleeds for head in answered]), np.array([h.p_poor for h in answered]), np.arange(len(answered))
    )
    codes = [*CHECKS, *sorted({code for head in heads for code in head.warnings} - set(CHECKS))]
    return {
        "heads": len(heads),
        "bleeding": len(bleeding),
        "kinds": {kind: sum(bool(h.slices[:, at].any()) for h in heads) for at, kind in enumerate(CT_ICH_KINDS)},
        "slices": sum(len(head.slices) for head in heads),
        "bleeding_slices": sum(int(head.slices.any(1).sum()) for head in heads),
        "extraction": {
            "answered": len(answered),
            "volume_ml": _quantiles([head.volume_ml for head in answered]),
            "adult_volume_ml": _quantiles([head.volume_ml for head in adults]),
            "seconds": _quantiles([head.seconds for head in answered]),
        },
        "warnings": {
            code: [sum(code in head.warnings for head in group) for group in (bleeding, others)] for code in codes
        },
        "cropping": {
            kind: {"heads": len(group), "rows": summarise_cropping(group)} for kind, group in cropped.items() if group
        },
        "nearly_whole": sum(head.missing < 0.01 for head in answered),
        "detection": {name: detection_rows(answered, name) for name in DETECTORS},
        "cross_fitted": {name: cross_fitted(answered, name) for name in DETECTORS},
        "age": {
            **correlations({"P(age >= 80)": [h.p_old for h in adults]}, [h.age for h in adults])[0],
            "younger_than_45": sum(h.age < 45 for h in adults),
        },
        "poor": poor["auroc"],
    }


def updated_page(text: str, summary: Mapping[str, Any]) -> str:
    """Return the page with the figures between its markers replaced."""
    begin, end = "<!-- figures: written by benchmarks/real_heads.py -->", "<!-- end of figures -->"
    pattern = f"{re.escape(begin)}.*{re.escape(end)}"
    return re.sub(pattern, lambda _: f"{begin}\n\n{_figures(summary)}\n{end}", text, flags=re.DOTALL)


def _figures(summary: Mapping[str, Any]) -> str:
    extraction, n = summary["extraction"], summary["heads"]
    bleeding = summary["bleeding"]
    parts = [
        f"{n} heads, {bleeding} with a haemorrhage, {summary['slices']} slices, {summary['bleeding_slices']} with a "
        "haemorrhage.",
        "### Brain extraction",
        _table(
            ["quantity", "5th percentile", "25th", "median", "75th", "95th"],
            [
                ["volume of the brain, mL", *(f"{v:.0f}" for v in extraction["volume_ml"])],
                ["the same, 18 years or older, mL", *(f"{v:.0f}" for v in extraction["adult_volume_ml"])],
                ["duration, s", *(f"{v:.2f}" for v in extraction["seconds"])],
            ],
        ),
        f"A brain was found in {extraction['answered']} of {n} heads.",
        "### Warnings",
        _table(
            ["warning", f"{bleeding} bleeding heads", f"{n - bleeding} other heads"],
            [[f"`{code}`", *map(str, counts)] for code, counts in summary["warnings"].items() if any(counts)],
        ),
        "Every other check gave no warning.",
        "### Missing brain",
        f"At the top, less than 1 % of the brain is missing in {summary['nearly_whole']} of {n} heads.",
        _cropping_text(summary["cropping"]),
    ]
    for name, rows in summary["detection"].items():
        left_out = [kind for kind in CT_ICH_KINDS if kind not in {row["group"] for row in rows}]
        note = f"Too few heads for figures of their own: {', '.join(left_out)}." if left_out else ""
        parts += [
            f"### Haemorrhage by {name}",
            note,
            *(_detection_table(rows, level) for level in ("patient", "slice")),
            _cross_fitted_text(summary["cross_fitted"][name]),
        ]
    age = summary["age"]
    parts += [
        "### Embedded model",
        f"`{MODEL}` was trained on simulated patients. Spearman's correlation of its probability of an age of 80 or "
        f"more with the age of {age['n']} adults is {_interval([age['rho'], age['low'], age['high']])}; "
        f"{age['younger_than_45']} of them are younger than 45. Its "
        f"probability of a poor outcome tells bleeding from other heads with an AUC of {_interval(summary['poor'])}.",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _cropping_text(cropping: Mapping[str, Any]) -> str:
    head = ["removed height", "median volume, mL", "median error", "90th percentile", "within 30 %"]
    parts = []
    for kind, result in cropping.items():
        rows = [
            [f"{row['removed_mm']:.0f} mm", f"{row['removed_ml']:.0f}"]
            + [f"{100 * row[key]:.0f} %" for key in ("median_error", "p90_error", "within_30")]
            for row in result["rows"]
        ]
        parts += [f"Slices taken off: {kind}, {result['heads']} heads whose brain ends there.", _table(head, rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts)


def _detection_table(rows: Sequence[Mapping[str, Any]], level: str) -> str:
    cells = [
        [row["group"], str(row["bleeding"]), str(row["other"]), *(_interval(row[level][name]) for name in METRICS)]
        for row in rows
    ]
    return _table([f"by {level}", "bleeding heads", "other heads", "AUC", "sensitivity", "specificity"], cells)


def _cross_fitted_text(figures: Mapping[str, Any]) -> str:
    return (
        f"With the threshold for a specificity of {SPECIFICITY:g} on two folds, applied to the third, "
        f"{figures['bleeding']} bleeds in two slices or more are found with a sensitivity of "
        f"{_interval(figures['sensitivity'])} and a specificity of {_interval(figures['specificity'])}."
    )


def _interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:.2f} ({low:.2f} to {high:.2f})" if np.isfinite(value) else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _quantiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [5, 25, 50, 75, 95])]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_tables(heads: Sequence[Head], out: Path) -> None:
    """Write one row for each head and one for each slice."""
    names = list(DETECTORS)
    write_csv(
        out / "heads.csv",
        ["patient", "age", "haemorrhage", "volume_ml", "seconds", "warnings", "p_poor", "p_old", *names],
        (
            {
                "patient": head.name, "age": head.age, "haemorrhage": int(head.bleeds), "volume_ml": head.volume_ml,
                "seconds": head.seconds, "warnings": " ".join(head.warnings),
                "p_poor": head.p_poor, "p_old": head.p_old,
                **{name: scores.patient for name, scores in head.scores.items()},
            }
            for head in heads
        ),
    )  # fmt: skip
    write_csv(
        out / "slices.csv",
        ["patient", "slice", "haemorrhage", *names],
        (
            {"patient": head.name, "slice": index, "haemorrhage": int(head.slices[index].any())}
            | {name: scores.slices[index] for name, scores in head.scores.items()}
            for head in heads
            for index in range(len(head.slices))
        ),
    )


def draw(summary: Mapping[str, Any]) -> None:
    """Draw the AUC by patient of each detector for each group of heads next to the page."""
    names = {"the measurement of `no-blood`": "density", "`compact.haemorrhage`": "network"}
    rows = {
        f"{row['group']}, {names[name]}": dict(zip(("value", "low", "high"), row["patient"]["auroc"], strict=True))
        for groups in zip(*summary["detection"].values(), strict=True)
        for name, row in zip(summary["detection"], groups, strict=True)
    }
    vector, pixels = figures.save(
        figures.forest(rows, "AUC for any blood, by patient", line=0.5), PAGE.parent, "real-heads"
    )
    pixels.unlink()
    print(vector)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the heads, write the tables, and update the page if all heads were measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--patients", type=int, nargs="*", default=[], help="measure only these, and leave the page")
    parser.add_argument("--simulated", type=int, default=10, help="number of simulated patients for the missing brain")
    options = parser.parse_args(arguments)
    scans = build_scans(options.folder, options.output / "scans", options.patients)
    model = ichprog.load_model(MODEL)
    for head, path in scans:
        measure_head(head, path, model)
        print(f"{head.name}: {head.volume_ml:.0f} mL in {head.seconds:.1f} s", file=sys.stderr)
    heads = [head for head, _ in scans]
    write_tables(heads, options.output)
    summary = summarise(heads, crop_simulated(options.simulated))
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if not options.patients:
        draw(summary)
        PAGE.write_text(updated_page(PAGE.read_text(encoding="utf-8"), summary), encoding="utf-8")
    return summary


if __name__ == "__main__":
    main()
