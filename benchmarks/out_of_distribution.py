"""How well scores tell unlike scans apart: `python benchmarks/out_of_distribution.py FOLDER`.

Each score is fitted to full scans of simulated patients with a haemorrhage, and compared on other such patients and on
scans that differ from them: noise, thick slices, contrast, a phantom of the body, no haemorrhage and, with
`--real COHORT.csv`, real heads. The script prints for each kind the AUROC against the other patients and the share
beyond the threshold, and for the outcome the coverage of conformal sets. It writes the table into
`docs/calibration.md`.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

import ichprog
from ichprog import preprocessing
from ichprog.calibration import adjust, conformal_set, input_statistics, measure_distance
from ichprog.model import Model
from ichprog.simulate import simulate
from ichprog.spec import TaskCalibration
from ichprog.train.calibration import USUAL_SHARE, fit_inputs, fit_task

MODEL = "compact.prognosis_gcs3_age_v2"
PAGE = Path(__file__).parents[1] / "docs" / "calibration.md"
FITTED = ("full-calibration", {"patients": 300, "seed": 6})  # the folders of docs/embedded.py
TESTED = ("full", {"patients": 200, "seed": 2})
INFANT_YEARS = 2.0
Score = Callable[[np.ndarray], np.ndarray]


def load(folder: Path, model: Model, name: str, options: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return grids `(N, D, H, W)`, outcomes `(N,)`, -1 without haemorrhage, and ages `(N,)` of simulated patients."""
    table = simulate(folder / name, **options)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    scans = (model.load_scan(table.parent / row["scan"]) for row in rows)
    grids = np.stack([preprocessing.prepare(scan.hu, model.spec.input) for scan in scans])
    outcomes = np.array([int(row["poor_outcome"] or -1) for row in rows])
    return grids, outcomes, np.array([float(row["age"]) for row in rows])


def thicken(grid: np.ndarray, slices: int) -> np.ndarray:
    """Return a grid as if the scan had few, thick slices: averaged, and padded to the height of the grid."""
    height = len(grid)
    fine = grid[(np.arange(slices * 8) * height) // (slices * 8)].reshape(slices, 8, *grid.shape[1:]).mean(1)
    padded = np.zeros_like(grid)
    first = (height - slices) // 2
    padded[first : first + slices] = fine
    return padded


def body_phantom(shape: tuple[int, int, int], random: np.random.Generator) -> np.ndarray:
    """Return a grid like that of an abdomen: soft tissue that fills the plane, organs, fat, and noise."""
    _, j, i = (
        np.linspace(-1, 1, n).reshape([-1 if axis == k else 1 for k in range(3)]) for axis, n in enumerate(shape)
    )
    body = (i / 0.95) ** 2 + (j / 0.7) ** 2 < 1
    values = np.full(shape, 0.25)
    for _ in range(8):
        x, y, size = random.uniform(-0.5, 0.5), random.uniform(-0.4, 0.4), random.uniform(0.1, 0.35)
        values = np.where((i - x) ** 2 + (j - y) ** 2 < size**2, random.uniform(0.3, 0.8), values)
    noisy = values + 0.03 * random.standard_normal(shape)
    return np.where(body, noisy, 0).clip(0, 1).astype(np.float32)


def shifted(grids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the same patients as other scanners or other modalities would show them."""
    random, inside = np.random.default_rng(0), grids > 0

    def noisy(hu: float) -> np.ndarray:
        return np.where(inside, grids + hu / 80 * random.standard_normal(grids.shape), 0).clip(0, 1)

    return {
        "noise of 1.5 HU more": noisy(1.5),
        "noise of 3 HU more": noisy(3.0),
        "20 thick slices": np.stack([thicken(grid, 20) for grid in grids]),
        "14 thick slices": np.stack([thicken(grid, 14) for grid in grids]),
        "5 HU brighter": np.where(inside, grids + 5 / 80, 0).clip(0, 1),
        "other contrast (gamma 0.7)": grids**0.7,
        "inverted contrast, like MR": np.where(inside, 1 - grids, 0),
        "phantom of the body": np.stack([body_phantom(grids.shape[1:], random) for _ in grids]),
    }


def features(model: Model, grids: np.ndarray) -> np.ndarray:
    """Return the mean features of the first network `(N, C)`."""
    import torch

    backbone = model.torch_module().backbone
    with torch.inference_mode():
        parts = [
            backbone(torch.from_numpy(grids[k : k + 16].astype(np.float32))[:, None]).mean((2, 3, 4))
            for k in range(0, len(grids), 16)
        ]
    return torch.cat(parts).numpy()


def feature_scores(fitted: np.ndarray) -> dict[str, Score]:
    """Return the Mahalanobis distance and the distance of the fifth neighbour, for standardised features."""
    mean, scale = fitted.mean(0), fitted.std(0) + 1e-9
    z = (fitted - mean) / scale
    precision = LedoitWolf().fit(z).precision_

    def mahalanobis(values: np.ndarray) -> np.ndarray:
        other = (values - mean) / scale
        return np.sqrt(np.einsum("ij,jk,ik->i", other, precision, other))

    def neighbour(values: np.ndarray) -> np.ndarray:
        other = (values - mean) / scale
        return np.sort(np.linalg.norm(other[:, None] - z[None], axis=2), axis=1)[:, 5]

    return {"features, Mahalanobis": mahalanobis, "features, neighbours": neighbour}


def coverage(model: Model, fitted: TaskCalibration, grids: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of patients whose conformal set for 90 % holds the outcome."""
    task = model.spec.tasks[0]
    p = adjust(task, probabilities(model, grids), fitted.adjustments)
    hits = [task.labels[label] in conformal_set(task, fitted, row, 0.9) for row, label in zip(p, truth, strict=True)]
    return float(np.mean(hits))


def probabilities(model: Model, grids: np.ndarray) -> np.ndarray:
    """Return the probabilities `(N, K)` of the first task."""
    name, parts = model.spec.tasks[0].name, []
    for start in range(0, len(grids), 32):
        outputs = model.predict_grids(grids[start : start + 32].astype(np.float32))
        parts.append(np.mean([fold[name].probabilities for fold in outputs], axis=0))
    return np.concatenate(parts)


def real_heads(model: Model, cohort: Path) -> dict[str, np.ndarray]:
    """Return the grids of real heads: infants, others with and without haemorrhage."""
    with cohort.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds: dict[str, list[np.ndarray]] = {}
    for row in rows:
        is_infant = float(row["age"]) < INFANT_YEARS
        bleeds = "with haemorrhage" if row["haemorrhage"] == "1" else "without haemorrhage"
        scan = model.load_scan(cohort.parent / row["scan"])
        kind = "real infants" if is_infant else f"real heads {bleeds}"
        kinds.setdefault(kind, []).append(preprocessing.prepare(scan.hu, model.spec.input))
    return {kind: np.stack(grids) for kind, grids in kinds.items()}


def main() -> None:
    """Fit each score, measure it on every kind of scan, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=100, help="patients of each kind")
    parser.add_argument("--real", type=Path, metavar="COHORT", help="table of real heads with age and haemorrhage")
    args = parser.parse_args()
    model = ichprog.load_model(MODEL)
    grids, outcomes, _ = load(args.folder, model, *FITTED)
    grids, outcomes = grids[outcomes >= 0], outcomes[outcomes >= 0]
    others, truth, ages = load(args.folder, model, *TESTED)
    bleeds = np.flatnonzero(truth >= 0)[: args.patients]
    fitted = fit_task(model.spec.tasks[0], outcomes, probabilities(model, grids))
    distribution = fit_inputs([input_statistics(grid) for grid in grids])
    of_features = feature_scores(features(model, grids))

    kinds = {"simulated patients like those": others[bleeds], **shifted(others[bleeds])}
    kinds["no haemorrhage"] = others[np.flatnonzero(truth < 0)[: args.patients]]
    with_labels = list(kinds)[:-2]  # the phantom has no outcome either
    young = np.flatnonzero((truth >= 0) & (ages < 40))[: args.patients]
    kinds["younger than 40 years"] = others[young]
    if args.real:
        kinds |= real_heads(model, args.real)

    def of_statistics(values: np.ndarray) -> np.ndarray:
        return np.array([measure_distance(distribution, input_statistics(grid)).distance for grid in values])

    scores: dict[str, dict[str, np.ndarray]] = {
        "statistics of the grid": {k: of_statistics(v) for k, v in kinds.items()}
    }
    described = {kind: features(model, values) for kind, values in kinds.items()}
    for name, score in of_features.items():
        scores[name] = {kind: score(values) for kind, values in described.items()}
    usual, *unlike = kinds
    limits = {name: np.quantile(of_kind[usual], USUAL_SHARE) for name, of_kind in scores.items()}
    limits["statistics of the grid"] = distribution.threshold
    lines = [f"| scans | {' | '.join(f'{name}: AUROC, flagged' for name in scores)} | sets for 90 % cover |"]
    lines.append("| --- " * (len(scores) + 2) + "|")
    for kind in (usual, *unlike):
        cells = []
        for name, of_kind in scores.items():
            both = np.concatenate([of_kind[usual], of_kind[kind]])
            area = roc_auc_score(np.repeat([0, 1], [len(of_kind[usual]), len(of_kind[kind])]), both)
            flagged = (of_kind[kind] > limits[name]).mean()
            cells.append(f"{flagged:.2f}" if kind == usual else f"{area:.2f}, {flagged:.2f}")
        labels = truth[young] if kind.startswith("younger") else truth[bleeds]
        known = kind in with_labels or kind.startswith("younger")
        covered = f"{coverage(model, fitted, kinds[kind], labels):.2f}" if known else ""
        lines.append(f"| {kind} ({len(kinds[kind])}) | {' | '.join(cells)} | {covered} |")
    text = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- out of distribution -->", "<!-- end -->"
    before, _, rest = text.partition(begin)
    PAGE.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
