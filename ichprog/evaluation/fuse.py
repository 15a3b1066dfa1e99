"""Combine a model of the image with clinical values, by a small regression on the answers of fixed networks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog import zoo
from ichprog.calibration import adjust, event_probabilities, log_odds
from ichprog.cohort import Cohort
from ichprog.errors import CohortError, InvalidValueError, UnknownNameError
from ichprog.evaluation.cohort_predictions import plan_patients, predict_patients, tabulate
from ichprog.evaluation.model_folder import check_folder, write_model
from ichprog.evaluation.predictions import TaskPredictions
from ichprog.metrics.comparisons import delong, delong_interval
from ichprog.model import Model, load_model, resolve_brain
from ichprog.spec import Adjustment, ClinicalValue, Combination, ModelSpec, Task
from ichprog.train.calibration import MIN_EVENTS, MIN_PATIENTS

if TYPE_CHECKING:
    from ichprog.scan.brain import Brain

MOST_COLUMNS = 4  # each set of known values has its own fit
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_PARTS = 10


@dataclass(frozen=True)
class FusedTask:
    """The combination of one task, and its figures on patients to whom each fit was not fitted.

    Attributes:
        task: The task with its combinations.
        patients: Number of patients with a label and all values.
        auroc: AUROC of the event in question with its 95 % interval, by input: "image", "clinical" and "both".
        gain: AUROC of both less that of the better one alone, with its 95 % interval.
    """

    task: Task
    patients: int
    auroc: dict[str, tuple[float, float, float]]
    gain: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, ready for JSON."""
        auroc = {name: list(values) for name, values in self.auroc.items()}
        return {"task": self.task.name, "patients": self.patients, "auroc": auroc, "gain": list(self.gain)}


@dataclass(frozen=True)
class Fused:
    """A model of the image that was combined with clinical values.

    Attributes:
        spec: Description of the new model.
        tasks: The combined tasks.
        leakage: Which folds predicted the patients, as a sentence.
    """

    spec: ModelSpec
    tasks: tuple[FusedTask, ...]
    leakage: str


def fuse(
    model: Model | str,
    cohort: Cohort | str | Path,
    columns: Sequence[str],
    output: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    brain: "Brain" = "auto",
    progress: bool = False,
) -> Fused:
    """Combine a model of the image with clinical values of a cohort, and write it into a folder.

    The log-odds of each event become a weighted sum of the log-odds of the image and the values, by a logistic
    regression with a penalty that cross-validation chooses. Each set of known values has its own regression, so that no
    missing value is replaced. The networks stay. A patient is predicted only by folds that were not trained on the
    patient, as in `evaluate`.

    Args:
        model: A model of the image, or a name that `load_model` takes.
        cohort: The patients, or the path of their table, with labels and the columns.
        columns: Columns of clinical values, at most four.
        output: Folder of the new model, for `load_model("local-dir:FOLDER")`. It must be empty or missing.
        tasks: Tasks to combine. By default all with labels whose own column is not among the values.
        brain: As in `predict`.
        progress: Whether to show a progress bar on standard error.

    Raises:
        CohortError: The table lacks a column, or too few patients have the label and all values.
        InvalidValueError: The model has clinical values already, there are too many columns, or a column would predict
            itself.
        RunError: The folder is not empty.
        UnknownNameError, SpecError, WeightsError, PluginError: As in `load_model`.

    Examples:
        ```python
        from ichprog.evaluation import fuse

        fuse("compact.prognosis_gcs3_age", "patients/cohort.csv", ["age", "gcs"], "fused")
        ichprog.predict("local-dir:fused", "scan.nii.gz", clinical={"age": 71, "gcs": 9})
        ```

    Source of one regression for each set of known values: Fletcher Mercaldo and Blume, Biostatistics 2020;21:236-252.
    """
    folder = Path(output)
    check_folder(folder)
    brain = resolve_brain(brain)
    table = cohort if isinstance(cohort, Cohort) else Cohort.read(cohort, scans=False)
    loaded = load_model(model) if isinstance(model, str) else model
    spec = loaded.spec
    values = _clinical_values(spec, table, columns)
    chosen = _choose_tasks(spec, [value.column for value in values], tasks)
    plan = plan_patients(loaded, table)
    numbers = {v.column: (table.numbers(v.column) - v.centre) / v.scale for v in values}
    for name in chosen:
        _check_patients(spec.task(name), table, plan.labels.get(name), numbers, plan.scored)
    results = predict_patients(loaded, table, plan, brain, progress=progress)
    predictions = tabulate(spec, table, plan, results)
    order = sorted(results.predictions)
    given = {column: each[order] for column, each in numbers.items()}
    fused = tuple(_fuse_task(spec.task(name), predictions[name], given) for name in chosen)
    by_name = {each.task.name: each.task for each in fused}
    limit = (
        f"{', '.join(by_name)}: combined with {', '.join(given)} by a regression on {fused[0].patients} patients of "
        f"{Path(table.source).name}. {table.origin.sentence}"
    )
    new = replace(
        spec,
        summary=f"{spec.summary} Combined with {', '.join(given)}, if known.",
        tasks=tuple(by_name.get(task.name, task) for task in spec.tasks),
        clinical=values,
        calibration=None,  # it was that of the answers without clinical values
        limits=(*spec.limits, limit.strip()),
    )
    write_model(loaded, new, folder)
    return Fused(new, fused, plan.leakage.sentence)


def _clinical_values(spec: ModelSpec, cohort: Cohort, columns: Sequence[str]) -> tuple[ClinicalValue, ...]:
    """Return the description of each column: that of a model of the zoo with this value, or by the cohort."""
    if spec.clinical:
        raise InvalidValueError(
            "model", spec.name, "a model of the image alone", "This model uses clinical values already."
        )
    names = list(dict.fromkeys(columns))
    if not 1 <= len(names) <= MOST_COLUMNS:
        raise InvalidValueError("columns", names, f"one to {MOST_COLUMNS} columns")
    known = zoo.clinical_values()
    described = []
    for name in names:
        if not cohort.has_column(name):
            raise UnknownNameError(f"column of {cohort.source}", name, cohort.columns)
        numbers = cohort.numbers(name)
        numbers = numbers[~np.isnan(numbers)]
        if len(numbers) == 0 or numbers.min() == numbers.max():
            raise CohortError(f"{cohort.source}: column {name} needs two different numbers or more.")
        own = ClinicalValue(
            name, "", float(numbers.min()), float(numbers.max()), float(numbers.mean()), float(numbers.std())
        )
        described.append(known.get(name, own))
    return tuple(described)


def _choose_tasks(spec: ModelSpec, columns: Sequence[str], tasks: Sequence[str] | None) -> list[str]:
    for name in tasks or ():
        if spec.task(name).target.column in columns:
            raise InvalidValueError(
                "task", name, f"a task whose column is not among {', '.join(columns)}", "A value would predict itself."
            )
    suitable = [task.name for task in spec.tasks if task.target.column not in columns and task.kind != "nominal"]
    if not suitable:
        raise InvalidValueError("columns", list(columns), "columns that leave a task to be combined")
    return list(tasks or suitable)


def _check_patients(
    task: Task, cohort: Cohort, labels: np.ndarray | None, numbers: dict[str, np.ndarray], scored: Sequence[int]
) -> None:
    """Check before anything is predicted that enough patients have the label and all values."""
    complete = np.zeros(len(cohort), bool)
    complete[list(scored)] = True
    for values in numbers.values():
        complete &= ~np.isnan(values)
    known = np.array([-1]) if labels is None else labels[complete & (labels >= 0)]
    counts = [int((known > k).sum()) for k in range(len(task.labels) - 1)]
    number = 0 if labels is None else len(known)
    fewest = min(min(count, number - count) for count in counts)
    if number < MIN_PATIENTS or fewest < MIN_EVENTS:
        raise CohortError(
            f"{cohort.source}: {number} patients have a label of {task.name} and a number in {', '.join(numbers)}, "
            f"{max(fewest, 0)} of them with the rarer answer. At least {MIN_PATIENTS} and {MIN_EVENTS} are needed. "
            "Add patients, or take fewer columns."
        )


def _fuse_task(task: Task, predictions: TaskPredictions, numbers: dict[str, np.ndarray]) -> FusedTask:
    """Fit one regression for each set of known values and each event of a task."""
    truth, image = predictions.truth, log_odds(event_probabilities(task, predictions.probabilities))
    combinations = []
    for count in range(len(numbers) + 1):
        for known in itertools.combinations(numbers, count):
            rows = (truth >= 0) & np.all([~np.isnan(numbers[name]) for name in known], axis=0)
            combinations.append(Combination(known, _fit_events(truth[rows], image[rows], numbers, known, rows)))
    complete = (truth >= 0) & np.all([~np.isnan(values) for values in numbers.values()], axis=0)
    auroc, gain = _measure(
        task, truth[complete], predictions.probabilities[complete], image[complete], numbers, complete
    )
    return FusedTask(replace(task, combinations=tuple(combinations)), int(complete.sum()), auroc, gain)


def _fit_events(
    truth: np.ndarray, image: np.ndarray, numbers: dict[str, np.ndarray], known: Sequence[str], rows: np.ndarray
) -> tuple[Adjustment, ...]:
    values = np.column_stack([np.empty((int(rows.sum()), 0)), *(numbers[name][rows] for name in known)])
    adjustments = []
    for k in range(image.shape[1]):
        slope, intercept, coefficients = _fit(
            truth > k, image[:, k], values, _choose_penalty(truth > k, image[:, k], values)
        )
        by_column = dict(zip(known, map(_rounded, coefficients), strict=True))
        adjustments.append(Adjustment(_rounded(slope), _rounded(intercept), by_column))
    return tuple(adjustments)


def _choose_penalty(event: np.ndarray, image: np.ndarray, values: np.ndarray) -> float:
    """Return the penalty with the smallest log loss on patients to whom it was not fitted."""
    if values.shape[1] == 0:
        return _PENALTIES[0]
    part = _parts(event)
    losses = []
    for penalty in _PENALTIES:
        loss = 0.0
        for k in range(_PARTS):
            own = part == k
            slope, intercept, coefficients = _fit(event[~own], image[~own], values[~own], penalty)
            margin = np.where(event[own], 1, -1) * (slope * image[own] + intercept + values[own] @ coefficients)
            loss += float(np.logaddexp(0, -margin).sum())
        losses.append(loss)
    return _PENALTIES[int(np.argmin(losses))]


def _fit(event: np.ndarray, image: np.ndarray, values: np.ndarray, penalty: float) -> tuple[float, float, np.ndarray]:
    """Fit a logistic regression whose slope of the image stays above 0.

    The priors of slope and intercept are those of `metrics.calibration.fit_recalibration`; the penalty is that of the
    squared coefficients.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    sign = np.where(event, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_slope, intercept, *coefficients = parameters
        slope, weights = np.exp(log_slope), np.array(coefficients)
        margin = sign * (slope * image + intercept + values @ weights)
        gradient = -sign * expit(-margin)
        value = np.logaddexp(0, -margin).sum() + (log_slope**2 + intercept**2 / 4 + penalty * weights @ weights) / 2
        parts = [(gradient * slope * image).sum() + log_slope, gradient.sum() + intercept / 4]
        return float(value), np.concatenate([parts, values.T @ gradient + penalty * weights])

    limits = [(-4, 4), (-40, 40), *[(-40, 40)] * values.shape[1]]
    found = minimize(loss, np.zeros(2 + values.shape[1]), jac=True, method="L-BFGS-B", bounds=limits, tol=1e-10).x
    return float(np.exp(found[0])), float(found[1]), found[2:]


def _measure(
    task: Task,
    truth: np.ndarray,
    probabilities: np.ndarray,
    image: np.ndarray,
    numbers: dict[str, np.ndarray],
    rows: np.ndarray,
) -> tuple[dict[str, tuple[float, float, float]], tuple[float, float, float]]:
    """Return AUROCs of the last label, of the image, of the values and of both, each fitted to other patients."""
    event, part = truth == len(task.labels) - 1, _parts(truth)
    values = np.column_stack([each[rows] for each in numbers.values()])
    both, clinical = np.empty(len(truth)), np.empty(len(truth))
    for k in range(_PARTS):
        own = part == k
        others = {name: each[rows][~own] for name, each in numbers.items()}
        all_known = np.ones(int((~own).sum()), bool)
        fitted = _fit_events(truth[~own], image[~own], others, tuple(numbers), all_known)
        given = {name: each[rows][own] for name, each in numbers.items()}
        both[own] = adjust(task, probabilities[own], fitted, given)[:, -1]
        nothing = np.zeros(int((~own).sum()))
        _, intercept, coefficients = _fit(
            event[~own], nothing, values[~own], _choose_penalty(event[~own], nothing, values[~own])
        )
        clinical[own] = values[own] @ coefficients + intercept
    scores = {"image": probabilities[:, -1], "clinical": clinical, "both": both}
    auroc = {name: _floats(delong_interval(event, each)) for name, each in scores.items()}
    better = scores["image"] if auroc["image"][0] >= auroc["clinical"][0] else clinical
    difference, error, _ = delong(event, both, better)
    return auroc, _floats((difference, difference - 1.96 * error, difference + 1.96 * error))


def _parts(labels: np.ndarray) -> np.ndarray:
    """Divide patients at random into parts, each with nearly equal shares of every label."""
    random, part = np.random.default_rng(0), np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        part[random.permutation(members)] = np.arange(len(members)) % _PARTS
    return part


def _floats(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = map(float, values)
    return first, second, third


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
