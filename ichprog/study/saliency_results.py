"""Measure the saliency maps of a study's variants, and store the results.

Each map is computed by the network of the fold whose test part contains the patient. The measurements are stored in
`saliency.csv` in the study's folder, one row for each map, and are not computed again.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichprog.cohort import Cohort, find_masks
from ichprog.errors import RunError
from ichprog.evaluation import faithfulness, localization
from ichprog.evaluation.localization import MapMetrics
from ichprog.io import read_csv, write_csv
from ichprog.spec import ModelSpec
from ichprog.study.config import Study
from ichprog.study.manifest import fold_of_patient, load_cohort

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ichprog.model import Model

Models = Mapping[str, "Callable[[int | None], Model]"]  # by variant, a function from a fold to its model

_CURVE_STEPS = 10  # of the insertion and deletion curves
_TEXT_COLUMNS = {"variant", "patient", "task", "label", "method"}
_CONSTANTS = {"True": True, "False": False, "": None}


def load_fold_model(out: Path, variant: str, fold: int | None, cache_dir: str | Path | None = None) -> "Model":
    """Load a variant as trained in a fold.

    Args:
        out: Folder of the study.
        variant: Name of the variant.
        fold: Fold, or None for the mean over all folds.
        cache_dir: Cache of compiled networks.
    """
    from ichprog.model import load_model

    return load_model(f"local-dir:{out / 'runs' / variant}", fold=fold, cache_dir=cache_dir)


def complete_variants(
    study: Study, out: Path, cache_dir: str | Path | None = None, *, task: str | None = None
) -> Models:
    """Return a function from a fold to its model for each variant that is done in every fold.

    Args:
        study: Study.
        out: Folder of the study.
        cache_dir: Cache of compiled networks.
        task: Task that the variants must have. None includes all variants.

    Raises:
        RunError: No variant with the task is done in every fold.
    """

    def loader(name: str) -> "Callable[[int | None], Model]":
        return lambda fold: load_fold_model(out, name, fold, cache_dir)

    names = [variant.name for variant in study.variants if _is_complete(study, out, variant.name)]
    if task is not None:
        names = [name for name in names if task in [each.name for each in study.variant(name).spec.tasks]]
        if not names:
            raise RunError(
                f"No variant of {study.name} with the task {task} is done in every fold. Run the study first."
            )
    return {name: loader(name) for name in names}


def saliency_figure(
    study: Study,
    out: str | Path,
    slices: Sequence[tuple[str, int | None]] = (),
    *,
    task: str | None = None,
    method: str = "guided_backprop",
    cache_dir: str | Path | None = None,
) -> "Figure":
    """Draw slices in rows and variants in columns, each with its map and its probability.

    Args:
        study: Study.
        out: Folder of the study.
        slices: Patients and their slices, counted from 1. None takes the slice with the largest lesion. By default,
            the first three patients with a lesion mask are drawn.
        task: Task. By default, the task by which the folds are stratified.
        method: Saliency method.
        cache_dir: Cache of compiled networks.

    Returns:
        A matplotlib figure.

    Raises:
        RunError: No variant with the task is done in every fold.
        UnknownNameError: There is no such patient, slice, task or method.

    Examples:
        ```python
        figure = ichprog.study.saliency_figure(study, "out", [("P01", 12)], method="grad_cam")
        figure.savefig("saliency.png")
        ```
    """
    out, task = Path(out), task or study.stratify_by
    cohort, folds = load_cohort(study, out), fold_of_patient(out)
    if not slices:
        with_mask = [name for name in find_masks(cohort) if name in folds]
        slices = [(name, None) for name in (with_mask or list(folds))[:3]]
    models = complete_variants(study, out, cache_dir, task=task)
    return localization.compare_maps(models, cohort, slices, folds=folds, task=task, method=method, brain=study.brain)


def measure_maps(
    study: Study, cohort: Cohort, out: Path, n_patients: int, cache_dir: str | Path | None = None
) -> list[MapMetrics]:
    """Measure the maps of the first patients with a lesion mask, or read the stored measurements.

    Args:
        study: Study.
        cohort: Patients of the study.
        out: Folder of the study.
        n_patients: Number of patients.
        cache_dir: Cache of compiled networks.

    Raises:
        ScanError: A scan or a mask cannot be read.
    """
    path, masks, folds = out / "saliency.csv", find_masks(cohort), fold_of_patient(out)
    patients = [each for each in cohort.patients if each.name in masks and each.name in folds][:n_patients]
    rows = _read_rows(path) if path.is_file() else []
    done = {(row.variant, row.patient, row.method) for row in rows}
    models = complete_variants(study, out, cache_dir)
    for variant in study.variants:
        missing = [p for p in patients if any((variant.name, p.name, m) not in done for m in variant.saliency)]
        if not missing or variant.name not in models:
            continue
        measured = localization.measure_maps(
            {variant.name: models[variant.name]},
            Cohort(tuple(missing), cohort.source),
            folds=folds,
            methods=variant.saliency,
            steps=_CURVE_STEPS,
            brain=study.brain,
        )
        replaced = {patient.name for patient in missing}
        rows = [row for row in rows if row.variant != variant.name or row.patient not in replaced] + list(measured)
        write_csv(path, [field.name for field in dataclasses.fields(MapMetrics)], map(dataclasses.astuple, rows))
    names = {patient.name for patient in patients}
    return [row for row in rows if row.patient in names]


def randomise_parameters(
    study: Study, cohort: Cohort, out: Path, variant: str, cache_dir: str | Path | None = None
) -> Iterator[dict[str, Any]]:
    """Run the parameter-randomisation check of a variant's saliency methods on the first patient with a mask.

    Args:
        study: Study.
        cohort: Patients of the study.
        out: Folder of the study.
        variant: Name of the variant.
        cache_dir: Cache of compiled networks.

    Yields:
        A table row for each task, method and stage of randomisation.
    """
    masks, folds = find_masks(cohort), fold_of_patient(out)
    patient = next(each for each in cohort.patients if each.name in masks and each.name in folds)
    model = load_fold_model(out, variant, folds[patient.name], cache_dir)
    methods = list(study.variant(variant).saliency)
    stages_by_map = faithfulness.parameter_randomisation(
        model, patient.scan, task=[model.spec.tasks[0].name], method=methods, brain=study.brain
    )
    for (task, method), stages in stages_by_map.items():
        for stage in stages:
            source = {"variant": variant, "task": task, "method": method, "layers": stage.layers}
            similarity = {"likeness": stage.spearman, "likeness_sd": stage.spearman_sd, "seeds": stage.seeds}
            yield source | {"down_to": stage.down_to, **similarity}


def _is_complete(study: Study, out: Path, variant: str) -> bool:
    config = out / "runs" / variant / "config.json"
    return config.is_file() and len(ModelSpec.read(config).weights.sha256) == study.folds


def _read_rows(path: Path) -> list[MapMetrics]:
    return [MapMetrics(**{name: _parse_cell(name, cell) for name, cell in row.items()}) for row in read_csv(path)]


def _parse_cell(column: str, cell: str) -> Any:
    if column in _TEXT_COLUMNS:
        return cell
    if cell in _CONSTANTS:
        return _CONSTANTS[cell]
    return int(cell) if column == "fold" else float(cell)
