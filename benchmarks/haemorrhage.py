"""Measure `ichprog.haemorrhage` and write its figures into `docs/haemorrhage.md`.

`python benchmarks/haemorrhage.py OUT [--real COHORT.csv]` measures two things:

- 300 simulated patients of a seed that no weights were trained on, by all folds: overlap, volumes, kinds and places.
- Known volumes of blood drawn into the real heads without blood of COHORT.csv, which has the columns patient, scan and
  haemorrhage. Each head is measured by the fold that was not trained on it.

OUT receives the simulated patients, one row for each patient, and one row for each drawn haemorrhage. The rows of real
heads must not be published; the page has summary figures only.
"""

import argparse
import csv
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

import ichprog
from ichprog.errors import InvalidValueError
from ichprog.io import write_csv
from ichprog.metrics.bootstrap import wilson_interval
from ichprog.parallel import parallel_map
from ichprog.simulate import MASK_VALUES, add_haemorrhage, simulate
from ichprog.simulate.insertion import KINDS

PAGE = Path(__file__).parents[1] / "docs" / "haemorrhage.md"
MODEL = "compact.haemorrhage"
SEED, PATIENTS, FOLDS = 22, 300, 3
DRAWN_ML = (1.0, 5.0, 20.0, 50.0)
LEAST_ML = 0.1  # of a kind of blood that a patient is said to have
LATERAL = ("lobar", "putamen", "thalamus", "subdural", "epidural")
SIDES = {"1": "left", "-1": "right"}
N_BOOTSTRAP = 1000
KINDS_PER_HEAD = 2  # for each volume; heads take turns, so that every kind is drawn into two of five heads


def measure_simulated(row: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Return the truth and the answer for one simulated patient, as one row of a table."""
    model = _load(None)
    start = time.perf_counter()
    found = ichprog.haemorrhage(folder / "scans" / f"{row['patient']}.nii.gz", model=model)
    seconds = time.perf_counter() - start
    truth, answer = (np.asarray(image.dataobj) for image in (nib.load(_mask(folder, row)), found.mask))
    return {
        "patient": row["patient"], "kind": row["kind"], "site": row["location"], "seconds": seconds,
        "probability": found.probability, "intraventricular": found.intraventricular,
        "infratentorial": found.infratentorial, "side": found.side, "location": found.location,
        "true_side": SIDES.get(row["side"], ""), "true_infratentorial": int(row["infratentorial"]),
        "dice": _dice(truth > 0, answer > 0),
        **{f"dice_{kind}": _dice(truth == value, answer == value) for kind, value in MASK_VALUES.items()},
        **{f"true_{kind}_ml": float(row[f"{kind}_ml"]) for kind in MASK_VALUES},
        "true_total_ml": sum(float(row[f"{kind}_ml"]) for kind in MASK_VALUES),
        **{f"{kind}_ml": value for kind, value in found.volume_ml.items()},
        **{f"{kind}_covered": _is_covered(found, row, kind) for kind in ("total", *MASK_VALUES)},
    }  # fmt: skip


def _mask(folder: Path, row: Mapping[str, str]) -> Path:
    return folder / "masks" / f"{row['patient']}.nii.gz"


def _dice(truth: np.ndarray, answer: np.ndarray) -> float:
    size = np.count_nonzero(truth) + np.count_nonzero(answer)
    return 2 * np.count_nonzero(truth & answer) / size if size else float("nan")


def _is_covered(found: Any, row: Mapping[str, str], kind: str) -> int:
    low, high = found.intervals_ml[kind]
    true = sum(float(row[f"{each}_ml"]) for each in (MASK_VALUES if kind == "total" else [kind]))
    return int(low <= true <= high)


def measure_drawn(drawing: tuple[Mapping[str, str], str, float], folder: Path) -> dict[str, Any] | None:
    """Return the answer for a haemorrhage drawn into a real head, or None if it does not fit into the head."""
    row, kind, volume_ml = drawing
    number = int(re.sub(r"\D", "", row["patient"]))  # as in `docs/haemorrhage.py`
    try:
        image, mask = add_haemorrhage(folder / row["scan"], kind, volume_ml, seed=1000 + number)
    except InvalidValueError:
        return None
    found = ichprog.haemorrhage(image, model=_load(number % FOLDS))
    answer = np.asarray(found.mask.dataobj)
    return {
        "patient": row["patient"], "kind": kind, "true_ml": volume_ml, "total_ml": found.volume_ml["total"],
        "dice": _dice(np.asarray(mask.dataobj) > 0, answer > 0), "probability": found.probability,
    }  # fmt: skip


@cache
def _load(fold: int | None) -> ichprog.Model:
    return ichprog.load_model(MODEL, fold=fold)


def summarise_simulated(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the summary of the simulated patients: quantity, number of patients, figure and interval."""
    bleeding = [row for row in rows if row["true_total_ml"] >= LEAST_ML]
    clear = [row for row in rows if row["true_total_ml"] == 0]
    table = [_quantile_row("Dice coefficient of all blood, median", bleeding, lambda row: row["dice"])]
    for kind in MASK_VALUES:
        group = [row for row in bleeding if row[f"true_{kind}_ml"] >= 1]
        table.append(_quantile_row(f"the same, {kind}, 1 mL or more", group, lambda row, k=kind: row[f"dice_{k}"]))
    table.append(_quantile_row("absolute volume error in %, median", bleeding, _error))
    for low, high in ((0, 5), (5, 30), (30, np.inf)):
        group = [row for row in bleeding if low <= row["true_total_ml"] < high]
        name = f"the same, {low} to {high:.0f} mL" if np.isfinite(high) else f"the same, {low} mL or more"
        table.append(_quantile_row(name, group, _error))
    table.append(_quantile_row("false volume without blood in mL, 95th percentile", clear, lambda r: r["total_ml"], 95))
    table.append(
        _auc_row("AUC for any blood", rows, lambda r: r["true_total_ml"] >= LEAST_ML, lambda r: r["probability"])
    )
    table.append(
        _auc_row(
            "AUC for blood in ventricles", bleeding, lambda r: r["true_ventricular_ml"] >= LEAST_ML,
            lambda r: r["intraventricular"],
        )
    )  # fmt: skip
    parenchymal = [row for row in bleeding if row["kind"] == "parenchymal" and row["location"]]
    table.append(
        _share_row(
            "infratentorial or not, parenchymal",
            parenchymal,
            lambda r: (r["infratentorial"] > 0.5) == r["true_infratentorial"],
        )
    )
    lateral = [row for row in bleeding if row["site"] in LATERAL and row["true_side"]]
    found = [row for row in lateral if row["side"]]
    table.append(_share_row("lateral bleeds that are found", lateral, lambda r: bool(r["side"])))
    table.append(_share_row("side of lateral bleeds that are found", found, lambda r: r["side"] == r["true_side"]))
    table.append(_share_row("total volume within its interval (nominal 90 %)", rows, lambda r: r["total_covered"]))
    table += [_share_row(f"the same, {kind}", rows, lambda r, k=kind: r[f"{k}_covered"]) for kind in MASK_VALUES]
    table.append(_quantile_row("seconds a scan, read, measured and located", rows, lambda row: row["seconds"]))
    return table


def _error(row: Mapping[str, Any]) -> float:
    return 100 * abs(row["total_ml"] / row["true_total_ml"] - 1)


def summarise_drawn(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the recovered share of drawn volumes by kind and volume, and how many are within 20 %."""
    table = []
    for kind in ("all kinds", *KINDS):
        for volume in DRAWN_ML:
            group = [row for row in rows if row["true_ml"] == volume and kind in ("all kinds", row["kind"])]
            if len(group) < 4:  # figures of fewer heads would tell about single patients
                continue
            share = np.array([row["total_ml"] / row["true_ml"] for row in group])
            low, median, high = np.percentile(share, (25, 50, 75))
            within = int((abs(share - 1) <= 0.2).sum())
            dice = np.median([row["dice"] for row in group])
            recovered, shown = f"{median:.2f} ({low:.2f} to {high:.2f})", f"{100 * within / len(group):.0f} %"
            table.append([kind, f"{volume:.0f}", str(len(group)), recovered, shown, f"{dice:.2f}"])
    return table


def _quantile_row(
    name: str, rows: Sequence[Mapping[str, Any]], value: Callable[[Any], float], quantile: float = 50
) -> list[str]:
    values = np.array([value(row) for row in rows])
    random = np.random.default_rng(0)
    draws = [np.percentile(random.choice(values, len(values)), quantile) for _ in range(N_BOOTSTRAP)]
    return [name, str(len(values)), _interval(np.percentile(values, quantile), *np.percentile(draws, (2.5, 97.5)))]


def _auc_row(
    name: str, rows: Sequence[Mapping[str, Any]], truth: Callable[[Any], bool], score: Callable[[Any], float]
) -> list[str]:
    from sklearn.metrics import roc_auc_score

    true, scores = np.array([truth(row) for row in rows]), np.array([score(row) for row in rows])
    random, draws = np.random.default_rng(0), []
    for _ in range(N_BOOTSTRAP):
        chosen = random.integers(0, len(true), len(true))
        draws.append(roc_auc_score(true[chosen], scores[chosen]))
    return [name, str(len(rows)), _interval(roc_auc_score(true, scores), *np.percentile(draws, (2.5, 97.5)))]


def _share_row(name: str, rows: Sequence[Mapping[str, Any]], is_right: Callable[[Any], Any]) -> list[str]:
    right = sum(bool(is_right(row)) for row in rows)
    low, high = wilson_interval(right, len(rows))
    return [name, str(len(rows)), _interval(right / len(rows), float(low), float(high))]


def _interval(value: float, low: float, high: float) -> str:
    digits = 3 if max(abs(value), abs(high)) < 2 else 1
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def updated_page(text: str, simulated: Sequence[Sequence[str]], drawn: Sequence[Sequence[str]]) -> str:
    """Return the page with the figures between its markers replaced."""
    begin, end = "<!-- figures: written by benchmarks/haemorrhage.py -->", "<!-- end of figures -->"
    parts = [
        f"### {PATIENTS} simulated patients",
        _table(["quantity", "patients", "figure (95 % interval)"], simulated),
    ]
    if drawn:
        head = ["kind", "drawn, mL", "heads", "measured / drawn, median (quartiles)", "within 20 %", "Dice"]
        parts += ["### Blood drawn into real heads", _table(head, drawn)]
    figures = "\n\n".join(part.rstrip("\n") for part in parts)
    pattern = f"{re.escape(begin)}.*{re.escape(end)}"
    return re.sub(pattern, lambda _: f"{begin}\n\n{figures}\n\n{end}", text, flags=re.DOTALL)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write the tables into OUT, and update the page if everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--real", type=Path, metavar="COHORT.csv", help="table of real heads")
    parser.add_argument("--patients", type=int, default=PATIENTS, help="measure fewer, and leave the page")
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate and measure")
    options = parser.parse_args(arguments)
    folder = options.output / "simulated"
    simulate(folder, patients=options.patients, seed=SEED, workers=options.workers)
    rows = _rows(folder / "truth.csv")[: options.patients]
    simulated = list(parallel_map(partial(measure_simulated, folder=folder), rows, workers=options.workers))
    write_csv(options.output / "simulated.csv", list(simulated[0]), simulated)
    real = [row for row in _rows(options.real) if row["haemorrhage"] == "0"] if options.real else []
    drawings = [
        (row, KINDS[(position + 2 * turn) % len(KINDS)], volume)
        for position, row in enumerate(real)
        for turn, volume in product(range(KINDS_PER_HEAD), DRAWN_ML)
    ]
    measure = partial(measure_drawn, folder=options.real.parent if options.real else None)
    drawn = [measured for measured in parallel_map(measure, drawings, workers=options.workers) if measured]
    if drawn:
        write_csv(options.output / "drawn.csv", list(drawn[0]), drawn)
    summary = {"simulated": summarise_simulated(simulated), "drawn": summarise_drawn(drawn)}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.patients == PATIENTS and drawn:
        page = updated_page(PAGE.read_text(encoding="utf-8"), summary["simulated"], summary["drawn"])
        PAGE.write_text(page, encoding="utf-8")
    return summary


if __name__ == "__main__":
    main()
