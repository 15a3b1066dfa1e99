"""Localization of saliency maps: whether maps lie in the lesion.

If a cohort has lesion masks, `measure_maps` measures each map against its mask, and `summarise_maps` averages over
patients. `compare_maps` draws the maps of several models side by side. Whether maps follow the network is tested in
`ichprog.evaluation.faithfulness`.

Maps and masks are `(i, j, k)` in LPS order. Positive values of a map speak for the label. A map without positive values
is empty. An empty map counts as empty, not as wrong.

A map is measured in the brain, at its true resolution: all voxels of a cell have the value of the cell. If the highest
cell is larger than the lesion, the pointing game is therefore the lesion's share of the cell. Two baselines without a
network are measured at the same resolution: the nearness of the centre of the brain, and the share of voxels from
`DENSE_HU[0]` to `DENSE_HU[1]` HU.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ichprog import preprocessing
from ichprog.cohort import Cohort, Patient, find_masks
from ichprog.errors import CohortError, UnknownNameError
from ichprog.evaluation.faithfulness import RANDOM, deletion_insertion
from ichprog.metrics.agreement import hemisphere_correct, pointing_game, relevance_mass_accuracy
from ichprog.model import Model, explain, load_model, predict
from ichprog.results import Saliency
from ichprog.scan import Scan, load_regions, read
from ichprog.spec import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ichprog.scan.brain import Brain

DENSE_HU = (50.0, 100.0)
"""Densities of the baseline by HU: acute blood, and denser than most of the brain."""

Models = Mapping[str, str | Model | Callable[[int | None], Model]]  # by variant; a function takes a fold


@dataclass(frozen=True)
class MapMetrics:
    """The metrics of one map. Shares are from 0 to 1; an undefined metric is None.

    Attributes:
        variant: Name of the model in the study.
        fold: Fold of the explained network; None for all folds.
        patient: Name of the patient.
        task: Name of the task.
        label: The explained label.
        method: The saliency method.
        empty: Whether the map has no positive value.
        pointing_game: Result of `pointing_game`.
        relevance_mass_accuracy: Result of `relevance_mass_accuracy`.
        lesion_share: Share of the brain volume that is lesion: both metrics of a constant map.
        hemisphere_correct: Result of `hemisphere_correct`.
        deletion: Area under the deletion curve; lower is better.
        insertion: Area under the insertion curve; higher is better.
        random_deletion: Area under the deletion curve of a random order.
        random_insertion: Area under the insertion curve of a random order.
        cell_ml: Volume of a cell of the map.
        centre_pointing_game: Pointing game of the centre of the brain.
        centre_mass_accuracy: Relevance mass accuracy of the nearness of the centre of the brain.
        dense_pointing_game: Pointing game of the densest cells, by the share of voxels in `DENSE_HU`.
        dense_mass_accuracy: Relevance mass accuracy of the share of voxels in `DENSE_HU`.
    """

    variant: str
    fold: int | None
    patient: str
    task: str
    label: str
    method: str
    empty: bool
    pointing_game: float | None
    relevance_mass_accuracy: float | None
    lesion_share: float
    hemisphere_correct: bool | None
    deletion: float | None = None
    insertion: float | None = None
    random_deletion: float | None = None
    random_insertion: float | None = None
    cell_ml: float | None = None
    centre_pointing_game: float | None = None
    centre_mass_accuracy: float | None = None
    dense_pointing_game: float | None = None
    dense_mass_accuracy: float | None = None


_METRICS = tuple(field.name for field in dataclasses.fields(MapMetrics)[6:])
_GAINS = {  # name, better value and worse value: a difference above 0 is better than chance
    "relevance_mass_gain": ("relevance_mass_accuracy", "lesion_share"),
    "deletion_gain": ("random_deletion", "deletion"),
    "insertion_gain": ("insertion", "random_insertion"),
    "pointing_gain_over_centre": ("pointing_game", "centre_pointing_game"),
    "pointing_gain_over_dense": ("pointing_game", "dense_pointing_game"),
    "mass_gain_over_centre": ("relevance_mass_accuracy", "centre_mass_accuracy"),
    "mass_gain_over_dense": ("relevance_mass_accuracy", "dense_mass_accuracy"),
}


def measure_maps(
    models: Models,
    cohort: Cohort,
    *,
    folds: Mapping[str, int] | None,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] = ("guided_backprop", "grad_cam", "guided_grad_cam"),
    tolerance_mm: float = 0.0,
    steps: int = 0,
    brain: "Brain" = "auto",
) -> Iterator[MapMetrics]:
    """Measure the maps of several models for every patient with a lesion mask.

    Args:
        models: By variant a name that `load_model` takes, a Model, or a function from a fold to a Model.
        cohort: The patients.
        folds: By name of the patient the fold whose test part contains the patient. Only this fold's network explains
            the patient, and patients without a fold are left out. None for a cohort that no fold was trained on; then
            the map is the mean over all folds.
        tasks: Tasks to explain, if the model has them. By default all tasks.
        methods: Saliency methods.
        tolerance_mm: As in `pointing_game`.
        steps: Steps of the deletion and insertion curves; 0 computes none. A map takes two network passes for each
            step, and so does the random order.
        brain: As in `explain`.

    Yields:
        The metrics of one map.

    Raises:
        CohortError: No patient with a fold has a mask, or a mask does not exist.
        ScanError: A scan or a mask cannot be read, or they do not belong together.
        UnknownNameError: No model has a task, or no method or fold has this name.

    Examples:
        ```python
        cohort = Cohort.read("patients/cohort.csv")
        rows = measure_maps({"compact": "compact.prognosis_gcs3_age"}, cohort, folds=None, methods=["grad_cam"])
        print(summarise_maps(rows)[0]["pointing_game"])
        ```
    """
    masks = find_masks(cohort)
    patients = [patient for patient in cohort.patients if patient.name in masks]
    patients = [patient for patient in patients if folds is None or patient.name in folds]
    if not patients:
        raise CohortError(
            f"{cohort.source}: none of {len(cohort)} patients has a mask and a fold. Add a column `mask`, or put "
            "masks/<patient>.nii.gz next to the folder of the scans."
        )
    known_tasks: set[str] = set()
    for fold in sorted({folds[patient.name] for patient in patients}) if folds is not None else [None]:
        for variant, source in models.items():
            model = _load_fold(source, fold)
            names = [task.name for task in model.spec.tasks]
            known_tasks.update(names)
            names = [name for name in names if tasks is None or name in tasks]
            for patient in patients if names else []:
                if folds is not None and folds[patient.name] != fold:
                    continue
                scan = model.load_scan(patient.scan, brain=brain)
                lesion = load_regions(masks[patient.name], scan) > 0
                maps = explain(model, scan, task=names, method=list(methods))
                for metrics in _measure(model, scan, lesion, maps, tolerance_mm, steps):
                    yield MapMetrics(variant, fold, patient.name, **metrics)
    for name in set(tasks or ()) - known_tasks:
        raise UnknownNameError("task of any model", name, sorted(known_tasks))


def _load_fold(source: str | Model | Callable[[int | None], Model], fold: int | None) -> Model:
    """Return the model of a fold, or of all folds for None."""
    if isinstance(source, str):
        return load_model(source, fold=fold)
    if not isinstance(source, Model):
        return source(fold)
    return source if fold is None else source.fold(fold)


def _measure(
    model: Model,
    scan: Scan,
    lesion: np.ndarray,
    maps: Mapping[tuple[str, str], Saliency],
    tolerance_mm: float,
    steps: int,
) -> Iterator[dict[str, Any]]:
    """Yield the metrics of each map of a patient."""
    brain = cast("np.ndarray", scan.brain)
    inside = lesion & brain
    curves = deletion_insertion(model, scan, maps, steps=steps) if steps else {}
    for (task, method), saliency in maps.items():
        cells = _number_cells(saliency.grid_map.shape, model, scan)
        values = np.where(brain, saliency.grid_map.ravel()[cells], 0)
        baselines = _measure_baselines(scan, brain, inside, cells, tolerance_mm)
        metrics = {
            "task": task,
            "label": saliency.label,
            "method": method,
            "empty": not values.max() > 0,
            "pointing_game": pointing_game(values, inside, spacing=scan.spacing, tolerance_mm=tolerance_mm),
            "relevance_mass_accuracy": relevance_mass_accuracy(values, inside),
            "lesion_share": float(inside.sum() / brain.sum()),
            "hemisphere_correct": hemisphere_correct(values, inside, brain),
            "cell_ml": scan.hu.size * float(np.prod(scan.spacing)) / 1000 / saliency.grid_map.size,
            **baselines,
        }
        for prefix, key in (("", (task, method)), ("random_", (task, RANDOM))):
            if key in curves:
                metrics[f"{prefix}deletion"] = curves[key].deletion_area
                metrics[f"{prefix}insertion"] = curves[key].insertion_area
        yield metrics


def _number_cells(shape: tuple[int, ...], model: Model, scan: Scan) -> np.ndarray:
    """Return for each voxel `(i, j, k)` the number of its cell in a map of a shape."""
    numbers = np.arange(np.prod(shape)).reshape(shape)
    return preprocessing.cells_to_scan(numbers, cast("tuple[int, int, int]", scan.hu.shape), model.spec.input)


def _measure_baselines(
    scan: Scan, brain: np.ndarray, lesion: np.ndarray, cells: np.ndarray, tolerance_mm: float
) -> dict[str, float | None]:
    """Return the metrics of both baselines. Each cell has the mean over its voxels in the brain."""
    places = np.argwhere(brain) * np.asarray(scan.spacing)
    distance = np.linalg.norm(places - places.mean(0), axis=1)
    hu = scan.hu[brain]
    scores = {
        "centre": 1 - distance / max(distance.max(), 1e-6),
        "dense": ((hu >= DENSE_HU[0]) & (hu <= DENSE_HU[1])).astype(float),
    }
    own, n_cells = cells[brain], int(cells.max()) + 1
    counts = np.bincount(own, minlength=n_cells)
    metrics: dict[str, float | None] = {}
    for name, score in scores.items():
        means = np.bincount(own, score, minlength=n_cells) / counts.clip(min=1)
        values = np.where(brain, means[cells], 0)
        hit = pointing_game(values, lesion, spacing=scan.spacing, tolerance_mm=tolerance_mm)
        metrics[f"{name}_pointing_game"] = hit
        metrics[f"{name}_mass_accuracy"] = relevance_mass_accuracy(values, lesion)
    return metrics


def summarise_maps(rows: Iterable[MapMetrics], *, n_bootstrap: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Average each metric over the patients for whom the metric is defined, with 95 % intervals.

    Intervals are percentiles of the bootstrap over patients, with the same samples for all maps of the same patients.
    `relevance_mass_gain`, `deletion_gain` and `insertion_gain` are the differences from chance, and names with `over`
    the differences from a baseline; above 0 is better.

    Args:
        rows: The result of `measure_maps`.
        n_bootstrap: Number of bootstrap samples.
        seed: Random seed.

    Returns:
        For each variant, task and method a dict with these names, the number of `maps`, and for each metric
        `{"value", "low", "high", "patients"}`. A metric that is defined for no patient is None. An interval needs two
        patients.
    """
    groups: dict[tuple[str, str, str], list[MapMetrics]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.task, row.method), []).append(row)
    summaries = []
    for key, group in groups.items():
        columns = {name: _column(group, name) for name in _METRICS}
        columns |= {name: columns[better] - columns[worse] for name, (better, worse) in _GAINS.items()}
        names: dict[str, Any] = dict(zip(("variant", "task", "method"), key, strict=True))
        means = {name: _mean_with_interval(values, n_bootstrap, seed) for name, values in columns.items()}
        summaries.append(names | {"maps": len(group)} | means)
    return summaries


def _column(rows: Sequence[MapMetrics], name: str) -> np.ndarray:
    values = [getattr(row, name) for row in rows]
    return np.array([np.nan if value is None else float(value) for value in values])


def _mean_with_interval(values: np.ndarray, n_bootstrap: int, seed: int) -> dict[str, float | int | None] | None:
    """Return the mean of the values that are not NaN, with its interval."""
    defined = ~np.isnan(values)
    if not defined.any():
        return None
    low = high = None
    if defined.sum() > 1:
        samples = np.random.default_rng(seed).integers(len(values), size=(n_bootstrap, len(values)))
        counts = defined[samples].sum(1)
        sums = np.where(defined, values, 0)[samples].sum(1)
        low, high = (float(q) for q in np.quantile(sums[counts > 0] / counts[counts > 0], (0.025, 0.975)))
    return {"value": float(values[defined].mean()), "low": low, "high": high, "patients": int(defined.sum())}


def compare_maps(
    models: Models,
    cohort: Cohort,
    slices: Sequence[tuple[str, int | None]],
    *,
    folds: Mapping[str, int] | None,
    task: str | None = None,
    label: str | None = None,
    method: str = "guided_backprop",
    brain: "Brain" = "auto",
    **options: Any,
) -> "Figure":
    """Draw the maps of several models: slices in rows, models in columns, with each model's probability of the label.

    Args:
        models: As in `measure_maps`.
        cohort: The patients.
        slices: Names of patients with the number of a slice, counted from 1 at the lowest. None chooses the slice with
            most lesion, or without a mask the slice with the strongest value of the first model's map.
        folds: As in `measure_maps`.
        task: A task that all models have. By default the first model's first task.
        label: The explained label. By default the most severe.
        method: Saliency method.
        brain: As in `explain`.
        **options: Options of the method.

    Returns:
        A matplotlib figure as `ichprog.reporting.maps.draw_maps` describes it.

    Raises:
        UnknownNameError: No patient, slice, task, label, method or fold has this name.
        ScanError: A scan or a mask cannot be read, or they do not belong together.
        IchprogError: matplotlib is not installed.

    Examples:
        ```python
        figure = compare_maps({"compact": "compact.prognosis_gcs3_age"}, cohort, [("p0001", None)], folds=None)
        figure.savefig("maps.png")
        ```
    """
    from ichprog.reporting.maps import MapPanel, SliceRow, draw_maps

    patients = {patient.name: patient for patient in cohort.patients}
    for name, _ in slices:
        if name not in patients or (folds is not None and name not in folds):
            raise UnknownNameError("patient that can be explained", name, patients if folds is None else folds)
    masks = find_masks(cohort)
    notices: dict[str, None] = {}
    rows = []
    for name, number in slices:
        panels: list[MapPanel] = []
        for variant, source in models.items():
            model = _load_fold(source, None if folds is None else folds[name])
            about = model.spec.task(task or model.spec.tasks[0].name)
            task, notices[model.spec.notice] = about.name, None
            scan = model.load_scan(patients[name].scan, brain=brain)
            saliency = explain(model, scan, task=task, label=label, method=method, **options)
            probability = predict(model, scan)[task].probabilities[saliency.label]
            panels.append(MapPanel(variant, saliency.label, probability, read(saliency.image).hu))
        lesion = load_regions(masks[name], scan) > 0 if name in masks else None
        number = _choose_slice(number, lesion, panels[0].values)
        title = f"{name}{_truth(patients[name], about)}"
        rows.append(SliceRow(title, scan.hu, cast("np.ndarray", scan.brain), lesion, number, panels))
    return draw_maps(rows, title="\n".join([f"{task}, {method}", *notices]))


def _choose_slice(number: int | None, lesion: np.ndarray | None, values: np.ndarray) -> int:
    """Return the number of a slice from 1."""
    if number is None:
        has_lesion = lesion is not None and lesion.any()
        strength = cast("np.ndarray", lesion).sum((0, 1)) if has_lesion else values.clip(min=0).max((0, 1))
        return int(strength.argmax()) + 1
    if not 1 <= number <= values.shape[2]:
        raise UnknownNameError("slice", number, range(1, values.shape[2] + 1))
    return number


def _truth(patient: Patient, task: Task) -> str:
    """Return the true label for a title."""
    cell = patient.columns.get(task.target.column)
    return f", truth: {task.labels[task.target.index(float(cell))]}" if cell else ""
