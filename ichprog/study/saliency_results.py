"""The maps of a study's variants: each of the network that did not see the patient, measured once and kept.

What was measured is in `saliency.csv` of the study's folder, a row a map.
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichprog.cohort import Cohort
from ichprog.errors import RunError
from ichprog.evaluation import faithfulness, localization
from ichprog.evaluation.localization import MapMetrics
from ichprog.io import atomic_write
from ichprog.spec import ModelSpec
from ichprog.study.config import Study

if TYPE_CHECKING:
    from ichprog.model import Model

_STEPS = 10  # of the insertion and deletion curves
_TEXT = {"variant", "patient", "task", "label", "method"}
_SAID = {"True": True, "False": False, "": None}


def member(out: Path, variant: str, fold: int | None, cache_dir: str | Path | None = None) -> "Model":
    """A variant as it was trained in a fold.

    Args:
        out: The study's folder.
        variant: The variant.
        fold: The fold; all of them for None.
        cache_dir: Where compiled networks are kept.
    """
    from ichprog.model import load_model

    return load_model(f"local-dir:{out / 'runs' / variant}", fold=fold, cache_dir=cache_dir)


def members(study: Study, out: Path, cache_dir: str | Path | None = None) -> dict[str, "Callable[[int | None], Model]"]:
    """By variant that is done in every fold, a function from a fold to its model."""

    def of(name: str) -> "Callable[[int | None], Model]":
        return lambda fold: member(out, name, fold, cache_dir)

    return {variant.name: of(variant.name) for variant in study.variants if _done(study, out, variant.name)}


def with_task(
    study: Study, models: "dict[str, Callable[[int | None], Model]]", task: str
) -> "dict[str, Callable[[int | None], Model]]":
    """Those of `members` that have a task.

    Args:
        study: The study.
        models: What `members` gives.
        task: The task.

    Raises:
        RunError: None of them has it.
    """
    found = {name: of for name, of in models.items() if task in [each.name for each in study.variant(name).spec.tasks]}
    if not found:
        raise RunError(f"no variant of {study.name} with the task {task} is done in every fold; run the study first.")
    return found


def _done(study: Study, out: Path, variant: str) -> bool:
    config = out / "runs" / variant / "config.json"
    return config.is_file() and len(ModelSpec.read(config).weights.sha256) == study.folds


def tested(out: Path) -> dict[str, int]:
    """By patient, the fold that tests it.

    Args:
        out: The study's folder.
    """
    parts = json.loads((out / "study.json").read_text("utf-8"))["membership"]
    return {patient: int(fold) for fold, part in parts.items() for patient in part["test"]}


def measured(
    study: Study, cohort: Cohort, out: Path, maps_of: int, cache_dir: str | Path | None = None
) -> list[MapMetrics]:
    """What is measured of the maps of the first patients with a mask; what was measured before is read.

    Args:
        study: The study.
        cohort: Its patients.
        out: Its folder.
        maps_of: Of how many patients.
        cache_dir: Where compiled networks are kept.

    Raises:
        ScanError: A scan or a mask cannot be read.
    """
    path, where, folds = out / "saliency.csv", localization.masks(cohort), tested(out)
    wanted = [patient for patient in cohort.patients if patient.name in where and patient.name in folds][:maps_of]
    kept = _read(path) if path.is_file() else []
    done = {(row.variant, row.patient, row.method) for row in kept}
    models = members(study, out, cache_dir)
    for variant in study.variants:
        left = [p for p in wanted if any((variant.name, p.name, method) not in done for method in variant.saliency)]
        if not left or variant.name not in models:
            continue
        rows = localization.measured(
            {variant.name: models[variant.name]},
            Cohort(tuple(left), cohort.source),
            folds=folds,
            methods=variant.saliency,
            steps=_STEPS,
            brain=study.brain,
        )
        again = {patient.name for patient in left}
        kept = [row for row in kept if row.variant != variant.name or row.patient not in again] + list(rows)
        _write(path, kept)
    names = {patient.name for patient in wanted}
    return [row for row in kept if row.patient in names]


def randomised(
    study: Study, cohort: Cohort, out: Path, variant: str, cache_dir: str | Path | None = None
) -> Iterator[dict[str, Any]]:
    """The model-randomisation check of a variant's methods, on the first patient with a mask.

    Args:
        study: The study.
        cohort: Its patients.
        out: Its folder.
        variant: The variant.
        cache_dir: Where compiled networks are kept.

    Returns:
        Rows for a table.
    """
    where, folds = localization.masks(cohort), tested(out)
    patient = next(each for each in cohort.patients if each.name in where and each.name in folds)
    model, methods = member(out, variant, folds[patient.name], cache_dir), study.variant(variant).saliency
    found = faithfulness.randomised(
        model, patient.scan, task=[model.spec.tasks[0].name], method=list(methods), brain=study.brain
    )
    for (task, method), stages in found.items():
        for stage in stages:
            about = {"variant": variant, "task": task, "method": method, "layers": stage.layers}
            yield about | {"down_to": stage.down_to, "likeness": stage.spearman}


def _write(path: Path, rows: list[MapMetrics]) -> None:
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [each.name for each in dataclasses.fields(MapMetrics)])
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in rows)


def _read(path: Path) -> list[MapMetrics]:
    with path.open(encoding="utf-8", newline="") as file:
        return [MapMetrics(**{name: _value(name, cell) for name, cell in row.items()}) for row in csv.DictReader(file)]


def _value(name: str, cell: str) -> Any:
    if name in _TEXT:
        return cell
    if cell in _SAID:
        return _SAID[cell]
    return int(cell) if name == "fold" else float(cell)
