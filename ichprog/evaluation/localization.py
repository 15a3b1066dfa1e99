"""Saliency maps, measured against the lesion: whether they lie where something is to be seen.

Where a cohort has masks of the lesions, `measured` says it of each map, and `summary` of all. `figure` shows the maps
of several models side by side. Whether maps are true to the network is for `ichprog.evaluation.faithfulness`.

Maps over a scan and masks are `(i, j, k)` in LPS order. What is positive in a map speaks for the label. A map with
nothing positive is empty, and is counted as that and not as a miss.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ichprog.cohort import Cohort, Patient
from ichprog.errors import CohortError, ScanError, UnknownNameError, missing_extra
from ichprog.evaluation.faithfulness import RANDOM, curves
from ichprog.model import Model, explain, load_model, predict
from ichprog.results import Saliency
from ichprog.scan import BrainMode, Scan, read
from ichprog.spec import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Models = Mapping[str, str | Model | Callable[[int | None], Model]]  # by variant; a function is asked for a fold

_EVEN = 0.6  # a lesion with a smaller share on its heavier side is on both sides about evenly
_MASK_MM = 1.0  # how far a mask's corners may be from the scan's
_WINDOW = (0.0, 80.0)  # HU from black to white


def pointing(
    values: np.ndarray, lesion: np.ndarray, *, spacing: Sequence[float] = (1.0, 1.0, 1.0), tolerance_mm: float = 0.0
) -> float | None:
    """The pointing game: 1 where the map's highest voxel lies in the lesion, 0 where it does not.

    Where several voxels are the highest it is the share of them that do, as if one were drawn.

    Args:
        values: `(i, j, k)`, the map.
        lesion: `(i, j, k)` bool.
        spacing: Distance of voxels along i, j and k, in mm.
        tolerance_mm: How far from the lesion the voxel may be, in mm.

    Returns:
        None where the map has nothing positive, or there is no lesion.

    Source: Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016 (arXiv 1608.00507).
    """
    from scipy.spatial import cKDTree

    top = values.max()
    if not top > 0 or not lesion.any():
        return None
    highest, inside = (np.argwhere(where) * np.asarray(spacing) for where in (values == top, lesion))
    distance, _ = cKDTree(inside).query(highest)
    return float((distance <= tolerance_mm).mean())


def share_inside(values: np.ndarray, lesion: np.ndarray) -> float | None:
    """The share of what is positive in a map that lies in the lesion.

    A map that knows nothing of it, spread over the brain, has the share of the brain's volume that the lesion takes.

    Args:
        values: `(i, j, k)`, the map.
        lesion: `(i, j, k)` bool.

    Returns:
        None where the map has nothing positive, or there is no lesion.
    """
    positive = values.clip(min=0)
    total = positive.sum(dtype=np.float64)
    return float(positive[lesion].sum(dtype=np.float64) / total) if total > 0 and lesion.any() else None


def side_correct(values: np.ndarray, lesion: np.ndarray, brain: np.ndarray) -> bool | None:
    """Whether more of what is positive in a map lies on the lesion's side of the brain's mid-plane than on the other.

    The mid-plane is the one that best halves the brain from left to right in each of its rows, so that a head may lie
    turned or tilted.

    Args:
        values: `(i, j, k)`, the map.
        lesion: `(i, j, k)` bool.
        brain: `(i, j, k)` bool, with the lesion in it.

    Returns:
        None where the map has nothing positive, there is no lesion, or it has under 60 % on its heavier side.
    """
    side = np.sign(np.arange(len(brain))[:, None, None] - _mid_plane(brain))
    right, left = (float((lesion & (side == sign)).sum()) for sign in (-1, 1))
    positive = values.clip(min=0)
    if not positive.any() or not right + left or max(right, left) / (right + left) < _EVEN:
        return None
    balance = float((positive * side).sum(dtype=np.float64))
    return balance * (left - right) > 0


def _mid_plane(brain: np.ndarray) -> np.ndarray:
    """Where the plane crosses each row of voxels from right to left, `(j, k)`."""
    wide = brain.sum(0)
    j, k = np.nonzero(wide)
    if not j.size:
        return np.full(wide.shape, (len(brain) - 1) / 2)
    middle = (brain.argmax(0) + len(brain) - 1 - brain[::-1].argmax(0))[j, k] / 2
    weight = np.sqrt(wide[j, k].astype(float))
    about = np.stack([np.ones(j.size), j - j.mean(), k - k.mean()], 1)
    (at, by_j, by_k), *_ = np.linalg.lstsq(about * weight[:, None], middle * weight, rcond=None)
    rows, slices = np.ogrid[: wide.shape[0], : wide.shape[1]]
    plane: np.ndarray = at + by_j * (rows - j.mean()) + by_k * (slices - k.mean())
    return plane.round(6)  # a voxel that lies on it is on neither side


def masks(cohort: Cohort) -> dict[str, Path]:
    """The patients of whom there is a mask of the lesion, with where it is.

    The column `mask` says so, by paths relative to the table, and a blank that there is none. Where there is no such
    column, masks are `masks/<patient>.nii.gz` beside the folder of the scans, as `ichprog simulate` writes them.

    Args:
        cohort: The patients.

    Raises:
        CohortError: A mask that the column names is not there.
    """
    found = {}
    for patient in cohort.patients:
        cell = patient.columns.get("mask")
        scan = patient.scan.name.removesuffix(".gz").removesuffix(".nii")  # in joined cohorts patients are renamed
        names = [f"masks/{name}.nii.gz" for name in (patient.name, scan)] if cell is None else [cell]
        folders = [*patient.scan.parents[:2]] if cell is None else [Path(cohort.source).parent, *patient.scan.parents]
        there = [folder / name for name in names if name for folder in folders if (folder / name).is_file()]
        if there:
            found[patient.name] = there[0]
        elif cell:
            raise CohortError(
                f"{cohort.source}: patient {patient.name}: there is no mask {cell}; paths are relative to the table, "
                "and blank where there is none"
            )
    return found


def lesion_in(mask: Any, scan: Scan) -> np.ndarray:
    """Where the lesion is, `(i, j, k)` bool over the scan's voxels.

    Args:
        mask: An image in the scan's own space, or its path; above 0 is lesion.
        scan: The scan.

    Raises:
        ScanError: The mask cannot be read; or `other-scan`: it has another shape or place than the scan.
    """
    found = read(mask)
    corners = np.array(np.meshgrid(*([0, n - 1] for n in scan.hu.shape), [1])).reshape(4, -1)
    away = float(np.linalg.norm((found.affine - scan.affine) @ corners, axis=0).max())
    if found.hu.shape != scan.hu.shape or away > _MASK_MM:
        raise ScanError(
            f"{found.name}: has {found.hu.shape} voxels, up to {away:.1f} mm away from those of the scan {scan.name}, "
            f"which has {scan.hu.shape}. A mask is an image in the scan's own space; give the one drawn on this scan.",
            code="other-scan",
            measured=[*found.hu.shape, round(away, 1)],
            expected=[*scan.hu.shape, 0],
            unit="voxels, and mm",
        )
    return found.hu > 0


@dataclass(frozen=True)
class MapMetrics:
    """What is measured of one map. Shares are from 0 to 1; None is what cannot be said of it.

    Attributes:
        variant: The model's name in the study.
        fold: The fold whose network it explains; None for all.
        patient: The patient.
        task: The task.
        label: The label that is explained.
        method: The saliency method.
        empty: Whether nothing is positive in the map.
        pointing: As `pointing` says.
        inside: As `share_inside` says.
        chance: The share of the brain's volume that the lesion takes.
        side: As `side_correct` says.
        deletion: Area under the deletion curve; the lower, the better the map.
        insertion: Area under the insertion curve; the higher, the better.
        random_deletion: That of a random order.
        random_insertion: That of a random order.
    """

    variant: str
    fold: int | None
    patient: str
    task: str
    label: str
    method: str
    empty: bool
    pointing: float | None
    inside: float | None
    chance: float
    side: bool | None
    deletion: float | None = None
    insertion: float | None = None
    random_deletion: float | None = None
    random_insertion: float | None = None


MEASURES = tuple(field.name for field in dataclasses.fields(MapMetrics)[6:])
_GAINS = {  # what is better than chance by how much: above 0 is better for each
    "inside_gain": ("inside", "chance"),
    "deletion_gain": ("random_deletion", "deletion"),
    "insertion_gain": ("insertion", "random_insertion"),
}


def measured(
    models: Models,
    cohort: Cohort,
    *,
    folds: Mapping[str, int] | None,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] = ("guided_backprop", "grad_cam", "guided_grad_cam"),
    tolerance_mm: float = 0.0,
    steps: int = 0,
    brain: BrainMode = "auto",
) -> Iterator[MapMetrics]:
    """Measures the maps of several models on every patient of whom there is a mask.

    Args:
        models: By variant, a name that `load_model` takes, a Model, or a function from a fold to a Model.
        cohort: The patients; `masks` says who has a mask.
        folds: The fold in whose test part each patient is: only that fold's network explains the patient, and who is
            in none is left out. None for a cohort that no fold has seen: then all folds explain, and the map is the
            mean of theirs.
        tasks: The tasks, of which each model explains those that it has; all where not given.
        methods: The saliency methods.
        tolerance_mm: As in `pointing`.
        steps: Steps of the insertion and deletion curves; 0 leaves them out. A map takes two passes a step, and so
            does the random order.
        brain: As in `predict`.

    Returns:
        A row for each map, one after another.

    Raises:
        CohortError: No patient that can be explained has a mask, or a mask is not there.
        ScanError: A scan or a mask cannot be read, or they do not belong together.
        UnknownNameError: No model has a task, or there is no such method or fold.
    """
    where = masks(cohort)
    chosen = [patient for patient in cohort.patients if patient.name in where]
    chosen = [patient for patient in chosen if folds is None or patient.name in folds]
    if not chosen:
        raise CohortError(
            f"{cohort.source}: none of {len(cohort)} patients has a mask and a fold. Give a column `mask`, or put "
            "masks/<patient>.nii.gz beside the folder of the scans"
        )
    known: set[str] = set()
    for fold in sorted({folds[patient.name] for patient in chosen}) if folds is not None else [None]:
        for variant, source in models.items():
            model = _member(source, fold)
            own = [task.name for task in model.spec.tasks]
            known.update(own)
            own = [name for name in own if tasks is None or name in tasks]
            for patient in chosen if own else []:
                if folds is not None and folds[patient.name] != fold:
                    continue
                scan = model.load_scan(patient.scan, brain=brain)
                lesion = lesion_in(where[patient.name], scan)
                maps = explain(model, scan, task=own, method=list(methods))
                for row in _rows(model, scan, lesion, maps, tolerance_mm, steps):
                    yield MapMetrics(variant, fold, patient.name, **row)
    for name in set(tasks or ()) - known:
        raise UnknownNameError("task of any model", name, sorted(known))


def _member(source: str | Model | Callable[[int | None], Model], fold: int | None) -> Model:
    """A model whose only network is that of a fold; all of them for None."""
    if isinstance(source, str):
        return load_model(source, fold=fold)
    if not isinstance(source, Model):
        return source(fold)
    if fold is None:
        return source
    return source.fold(fold)


def _rows(
    model: Model,
    scan: Scan,
    lesion: np.ndarray,
    maps: Mapping[tuple[str, str], Saliency],
    tolerance_mm: float,
    steps: int,
) -> Iterator[dict[str, Any]]:
    """What is measured of each map of a patient."""
    brain = cast("np.ndarray", scan.brain)
    found = curves(model, scan, maps, steps=steps) if steps else {}
    for (task, method), saliency in maps.items():
        values = read(saliency.image).hu
        row = {
            "task": task,
            "label": saliency.label,
            "method": method,
            "empty": not values.max() > 0,
            "pointing": pointing(values, lesion, spacing=scan.spacing, tolerance_mm=tolerance_mm),
            "inside": share_inside(values, lesion),
            "chance": float((lesion & brain).sum() / brain.sum()),
            "side": side_correct(values, lesion, brain | lesion),
        }
        for prefix, key in (("", (task, method)), ("random_", (task, RANDOM))):
            if key in found:
                row |= {f"{prefix}deletion": found[key].deletion_area, f"{prefix}insertion": found[key].insertion_area}
        yield row


def summary(rows: Iterable[MapMetrics], *, draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """The mean of each measure over the patients of whom it can be said, with 95 % intervals.

    Intervals are percentiles of the bootstrap over patients, with the same draws for all maps of the same patients.
    Beside the measures themselves: `inside_gain`, `deletion_gain` and `insertion_gain`, how much better than chance.

    Args:
        rows: What `measured` gives.
        draws: Draws of the bootstrap.
        seed: Their seed.

    Returns:
        For each variant, task and method: these, `maps`, the number of maps, and for each measure
        `{"value", "low", "high", "patients"}`, or None where it can be said of no patient. An interval takes two.
    """
    groups: dict[tuple[str, str, str], list[MapMetrics]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.task, row.method), []).append(row)
    result = []
    for key, group in groups.items():
        columns = {name: _column(group, name) for name in MEASURES}
        columns |= {name: columns[better] - columns[worse] for name, (better, worse) in _GAINS.items()}
        about = dict(zip(("variant", "task", "method"), key, strict=True)) | {"maps": len(group)}
        result.append(about | {name: _mean(values, draws, seed) for name, values in columns.items()})
    return result


def _column(rows: Sequence[MapMetrics], name: str) -> np.ndarray:
    said = [getattr(row, name) for row in rows]
    return np.array([np.nan if value is None else float(value) for value in said])


def _mean(values: np.ndarray, draws: int, seed: int) -> dict[str, float | int | None] | None:
    """The mean over what is not NaN, with its interval."""
    known = ~np.isnan(values)
    if not known.any():
        return None
    low = high = None
    if known.sum() > 1:
        drawn = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
        counts = known[drawn].sum(1)
        sums = np.where(known, values, 0)[drawn].sum(1)
        low, high = (float(q) for q in np.quantile(sums[counts > 0] / counts[counts > 0], (0.025, 0.975)))
    return {"value": float(values[known].mean()), "low": low, "high": high, "patients": int(known.sum())}


def figure(
    models: Models,
    cohort: Cohort,
    chosen: Sequence[tuple[str, int | None]],
    *,
    folds: Mapping[str, int] | None,
    task: str | None = None,
    label: str | None = None,
    method: str = "guided_backprop",
    brain: BrainMode = "auto",
    **options: Any,
) -> "Figure":
    """Slices in rows, models in columns: each model's map over the slice, with its probability of the label above.

    The patient's right is on the left. Red speaks for the label and blue against it. Each map is scaled by its largest
    value in the slice; how much that is of its largest in the scan is said above, too, for a slice may hold little of
    a map. Where there is a mask of the lesion its outline is drawn.

    Args:
        models: As in `measured`.
        cohort: The patients.
        chosen: Patients and slices, counted from 1 at the foot; None takes the slice with most of the lesion, or
            without a mask the one in which the first model's map is strongest.
        folds: As in `measured`.
        task: A task that all models have; the first one's first where not given.
        label: The label; the most severe where not given.
        method: The saliency method.
        brain: As in `predict`.
        **options: Options of the method.

    Returns:
        A figure of matplotlib, which `.savefig(path)` writes.

    Raises:
        UnknownNameError: There is no such patient, slice, task, label, method or fold.
        ScanError: A scan or a mask cannot be read, or they do not belong together.
        IchprogError: matplotlib is not installed.

    Source: figure 3 of Cobo et al., MLMI 2024 (doi 10.1007/978-3-031-73290-4_2).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("report", "matplotlib", "Drawing a figure") from error

    patients = {patient.name: patient for patient in cohort.patients}
    for name, _ in chosen:
        if name not in patients or (folds is not None and name not in folds):
            raise UnknownNameError("patient that can be explained", name, patients if folds is None else folds)
    where = masks(cohort)
    notices: dict[str, None] = {}
    drawing = Figure(figsize=(2.4 * (len(models) + 1), 2.9 * len(chosen) + 0.7), layout="constrained")
    panels = drawing.subplots(len(chosen), len(models) + 1, squeeze=False)
    for (name, number), (first, *others) in zip(chosen, panels, strict=True):
        fold = None if folds is None else folds[name]
        for axis, (variant, source) in zip(others, models.items(), strict=True):
            model = _member(source, fold)
            about = model.spec.task(task or model.spec.tasks[0].name)
            task, notices[model.spec.notice] = about.name, None
            scan = model.load_scan(patients[name].scan, brain=brain)
            saliency = cast("Saliency", explain(model, scan, task=task, label=label, method=method, **options))
            lesion = lesion_in(where[name], scan) if name in where else None
            values = read(saliency.image).hu
            if axis is others[0]:
                number = _slice(number, lesion, values)
                _draw(first, scan, lesion, number)
                first.set_title(
                    f"{name}{_truth(patients[name], about)}\nslice {number} of {values.shape[2]}", fontsize=8
                )
            share = _draw(axis, scan, lesion, cast("int", number), values)
            probability = predict(model, scan)[task].probabilities[saliency.label]
            axis.set_title(f"{variant}\np({saliency.label}) = {probability:.2f}, map up to {share:.0%}", fontsize=8)
    drawing.suptitle("\n".join([f"{task}, {method}", *notices]), fontsize=9)
    return drawing


def _slice(number: int | None, lesion: np.ndarray | None, values: np.ndarray) -> int:
    """A slice's number from 1, chosen where none is given."""
    if number is None:
        shown = values.clip(min=0).max((0, 1)) if lesion is None or not lesion.any() else lesion.sum((0, 1))
        return int(shown.argmax()) + 1
    if not 1 <= number <= values.shape[2]:
        raise UnknownNameError("slice", number, range(1, values.shape[2] + 1))
    return number


def _truth(patient: Patient, task: Task) -> str:
    """What is known of the patient, for a title."""
    cell = patient.columns.get(task.target.column)
    return f", truth: {task.labels[task.target.index(float(cell))]}" if cell else ""


def _draw(axis: Any, scan: Scan, lesion: np.ndarray | None, number: int, values: np.ndarray | None = None) -> float:
    """A slice, cut out around the brain, with a map over it, and how much of the map's largest value is in it."""
    brain = cast("np.ndarray", scan.brain)
    seen = [np.flatnonzero(brain.any((1 - side, 2))) for side in (0, 1)]
    i, j = (slice(at[0], at[-1] + 1) if at.size else slice(None) for at in seen)
    box = i, j, number - 1
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow(scan.hu[box].T, cmap="gray", vmin=_WINDOW[0], vmax=_WINDOW[1])
    if lesion is not None and lesion[box].any():
        axis.contour(lesion[box].T, [0.5], colors="yellow", linewidths=0.8)
    if values is None:
        return 0.0
    if not values.max() > 0:
        axis.text(0.5, 0.5, "empty map", color="white", ha="center", va="center", transform=axis.transAxes)
        return 0.0
    here = float(np.abs(values[box]).max())
    if here > 0:
        scaled = values[box].T / here
        axis.imshow(scaled, cmap="coolwarm", vmin=-1, vmax=1, alpha=np.clip(np.abs(scaled) * 1.4, 0, 0.75))
    return here / float(np.abs(values).max())
