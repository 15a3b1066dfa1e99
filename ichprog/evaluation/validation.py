"""External validation of predictions: figures of each event, subgroups, and a second model on the same patients.

An event is what a probability refers to: the last label of two, label k or a later one of ordered labels, or a label
without order against all others.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ichprog import metrics as metrics_package
from ichprog.cohort import Cohort
from ichprog.errors import CohortError, InvalidValueError, SpecError, UnknownNameError
from ichprog.evaluation.predictions import TaskPredictions, align
from ichprog.metrics import comparisons, discrimination, local_recalibration, operating_points, subgroups
from ichprog.metrics.calibration import calibration_curve
from ichprog.spec import ModelSpec, Task

Row = dict[str, Any]
Intervals = dict[str, metrics_package.Interval]

EVENT_METRICS = ("auroc", "brier", "calibration_slope", "calibration_intercept")
RECALIBRATED_METRICS = EVENT_METRICS[1:]
BLANK = "blank"  # subgroup of the patients without a value
_THRESHOLDS = np.arange(1, 100) / 100  # of decision curves


@dataclass(frozen=True)
class Recalibration:
    """A local recalibration, tested on patients to whom it was not fitted.

    Attributes:
        method: Whether the intercept alone was fitted, or the slope as well.
        probabilities: Recalibrated probability of each patient `(N,)`, by a fit to other patients.
        metrics: Brier score, calibration slope and intercept of these probabilities, with intervals.
        calibration: Their `calibration_curve`.
        learning_curve: Gain by number of patients, as `local_recalibration.learning_curve` returns it.
        patients_needed: Number of patients from which on the recalibration helps reliably; None if no number does.
    """

    method: local_recalibration.Method
    probabilities: np.ndarray
    metrics: Intervals
    calibration: dict[str, np.ndarray]
    learning_curve: list[Row]
    patients_needed: int | None

    def to_dict(self) -> Row:
        """Return everything but the probabilities as plain data."""
        return {
            "method": self.method,
            "metrics": self.metrics,
            "calibration": {name: values.tolist() for name, values in self.calibration.items()},
            "learning_curve": self.learning_curve,
            "patients_needed": self.patients_needed,
        }


@dataclass(frozen=True)
class EventValidation:
    """Figures of one event of a task.

    Attributes:
        event: Name of the event.
        truth: Whether the event is true of each labelled patient `(N,)` bool.
        probabilities: Predicted probability of the event `(N,)`.
        metrics: AUROC, Brier score, calibration slope and intercept, with intervals.
        recalibrations: Local recalibrations, empty with fewer than two patients with or without the event.
        decision_curve: Arrays of `net_benefit`.
        operating_points: Rows of `operating_points.operating_point`.
    """

    event: str
    truth: np.ndarray
    probabilities: np.ndarray
    metrics: Intervals
    recalibrations: tuple[Recalibration, ...]
    decision_curve: dict[str, np.ndarray]
    operating_points: tuple[Row, ...]

    @property
    def counts(self) -> Row:
        """Return the number of patients, and the observed and the expected number of events."""
        expected = float(self.probabilities.sum())
        return {"patients": len(self.truth), "observed": int(self.truth.sum()), "expected": expected}

    def to_dict(self) -> Row:
        """Return everything but the predictions as plain data."""
        return {
            **self.counts,
            "metrics": self.metrics,
            "recalibration": [each.to_dict() for each in self.recalibrations],
            "decision_curve": {name: values.tolist() for name, values in self.decision_curve.items()},
            "operating_points": list(self.operating_points),
        }


@dataclass(frozen=True)
class ModelComparison:
    """A second model on the patients that both models may predict.

    Attributes:
        name: Name of the second model in the predictions.
        leakage: What is known about its training patients, as a sentence.
        patients: Number of patients that both models predict, by task.
        rows: By task, the rows of `metrics.compare` by metric. A difference is the first model minus the second.
        left_out_tasks: Tasks that the second model lacks or defines in another way.
    """

    name: str
    leakage: str
    patients: Mapping[str, int]
    rows: Mapping[str, Mapping[str, Row]]
    left_out_tasks: tuple[str, ...]

    def to_dict(self) -> Row:
        """Return the comparison as plain data."""
        return {
            "model": self.name,
            "leakage": self.leakage,
            "patients": dict(self.patients),
            "differences": {task: dict(rows) for task, rows in self.rows.items()},
            "tasks_not_compared": list(self.left_out_tasks),
        }


def task_events(task: Task, truth: np.ndarray, probabilities: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return whether each event of a task is true `(N,)`, and its probability `(N,)`, by name of the event.

    Args:
        task: Task.
        truth: Indices of the true labels `(N,)`.
        probabilities: Probabilities of the K labels `(N, K)`.
    """
    labels = task.labels
    if task.kind == "nominal":
        return {label: (truth == k, probabilities[:, k]) for k, label in enumerate(labels)}
    return {
        label if k == len(labels) - 1 else f"{label} or later": (
            truth >= k,
            np.clip(probabilities[:, k:].sum(axis=1), 0, 1),
        )
        for k, label in enumerate(labels)
        if k
    }


def validate_events(
    task: Task,
    predictions: TaskPredictions,
    *,
    targets: Sequence[tuple[operating_points.Rate, float]] = (),
    n_bootstrap: int = 1000,
    seed: int = 0,
    ci_method: str = "percentile",
) -> tuple[EventValidation, ...]:
    """Compute the figures of each event of a task.

    Args:
        task: Task.
        predictions: Predictions of the labelled patients.
        targets: Required rates of the operating points, such as ("sensitivity", 0.95).
        n_bootstrap: Number of bootstrap samples of intervals.
        seed: Random seed of bootstrap samples, parts and draws.
        ci_method: "percentile" or "bca".
    """
    events = task_events(task, predictions.truth, predictions.probabilities)
    options = {"n_bootstrap": n_bootstrap, "seed": seed, "ci_method": ci_method}
    return tuple(_validate_event(event, truth, p, targets, options) for event, (truth, p) in events.items())


def _validate_event(
    event: str,
    truth: np.ndarray,
    p: np.ndarray,
    targets: Sequence[tuple[operating_points.Rate, float]],
    options: Mapping[str, Any],
) -> EventValidation:
    seed = options["seed"]
    has_both = bool(truth.any() and not truth.all())
    points = [operating_points.operating_point(truth, p, rate, required, seed=seed) for rate, required in targets]
    recalibrations = [_recalibrate(truth, p, method, options) for method in local_recalibration.METHODS]
    curve = discrimination.net_benefit(truth, p, _THRESHOLDS)
    tested = [each for each in recalibrations if each is not None]
    for each in tested:
        curve[f"recalibrated_{each.method}"] = discrimination.net_benefit(truth, each.probabilities, _THRESHOLDS)[
            "model"
        ]
    return EventValidation(
        event, truth, p, _event_metrics(truth, p, EVENT_METRICS, options), tuple(tested), curve,
        tuple(points) if has_both else (),
    )  # fmt: skip


def _recalibrate(
    truth: np.ndarray, p: np.ndarray, method: local_recalibration.Method, options: Mapping[str, Any]
) -> Recalibration | None:
    recalibrated = local_recalibration.cross_fitted(truth, p, method, seed=options["seed"])
    if recalibrated is None:
        return None
    curve = local_recalibration.learning_curve(truth, p, method, seed=options["seed"])
    return Recalibration(
        method,
        recalibrated,
        _event_metrics(truth, recalibrated, RECALIBRATED_METRICS, options),
        calibration_curve(truth, recalibrated),
        curve,
        local_recalibration.patients_needed(curve),
    )


def _event_metrics(truth: np.ndarray, p: np.ndarray, names: Sequence[str], options: Mapping[str, Any]) -> Intervals:
    values = metrics_package.compute_with_intervals(truth, p, kind="binary", **options)
    return {name: values[name] for name in names}


def operating_targets(
    at_sensitivity: Sequence[float], at_specificity: Sequence[float]
) -> list[tuple[operating_points.Rate, float]]:
    """Return the required rates of operating points after a check.

    Args:
        at_sensitivity: Required sensitivities.
        at_specificity: Required specificities.

    Raises:
        InvalidValueError: A rate is not above 0 and at most 1.
    """
    targets: list[tuple[operating_points.Rate, float]] = []
    targets += [("sensitivity", rate) for rate in operating_points.validate_rates("at_sensitivity", at_sensitivity)]
    targets += [("specificity", rate) for rate in operating_points.validate_rates("at_specificity", at_specificity)]
    return targets


def check_subgroup_columns(cohort: Cohort, columns: Sequence[str]) -> None:
    """Check that a cohort has the columns of subgroups.

    Args:
        cohort: The patients.
        columns: Names of columns.

    Raises:
        UnknownNameError: A column does not exist.
        InvalidValueError: A column is blank for every patient.
    """
    for column in columns:
        if not cohort.has_column(column):
            raise UnknownNameError(f"column of {cohort.source}", column, cohort.columns)
        if not any(str(patient.columns.get(column, "")).strip() for patient in cohort.patients):
            raise InvalidValueError("subgroup column", column, "a column with a value for at least one patient")


def check_two_labels(spec: ModelSpec, cohort: str, labels: Mapping[str, np.ndarray], scored: Sequence[int]) -> None:
    """Check that the patients to be scored have two labels of at least one task.

    Args:
        spec: The specification of the model.
        cohort: Source of the cohort, for the message.
        labels: Indices of the true labels of all patients by task, -1 if unknown.
        scored: Indices of the patients to be scored.

    Raises:
        CohortError: Every task has patients of one label only.
    """
    counts = {}
    for name, truth in labels.items():
        known = Counter(truth[list(scored)].tolist())
        counts[name] = {spec.task(name).labels[index]: known[index] for index in sorted(known) if index >= 0}
    if all(len(each) < 2 for each in counts.values()):
        found = "; ".join(
            f"{task}: {', '.join(f'{count} {label}' for label, count in each.items()) or 'no label'}"
            for task, each in counts.items()
        )
        raise CohortError(
            f"{cohort}: no task has patients with two labels ({found}). Discrimination and calibration need patients "
            "of at least two labels of a task. Add patients with another label."
        )


def subgroup_rows(
    columns: Sequence[str],
    cohort: Cohort,
    tasks: Mapping[str, tuple[Task, TaskPredictions]],
    **options: Any,
) -> list[Row]:
    """Return the metrics of subgroups.

    Args:
        columns: Columns that divide the patients, by value or by terciles of numbers.
        cohort: The patients.
        tasks: Task and predictions of its labelled patients, by name of the task.
        **options: Options of `compute_with_intervals`.

    Returns:
        For each task, column and group the number of `patients`, `with_last_label`, the number with the last label, and
        each metric that is reported for subgroups. Patients without a value form the last group.
    """
    index_of = {patient.name: index for index, patient in enumerate(cohort.patients)}
    rows: list[Row] = []
    for column in columns:
        groups = subgroups.by_value([patient.columns.get(column, "") for patient in cohort.patients])
        blank = ~np.any(list(groups.values()), axis=0)
        if blank.any():
            groups[BLANK] = blank
        for name, (task, predictions) in tasks.items():
            own = np.array([index_of[patient] for patient in predictions.patients], np.int64)
            for group, members in groups.items():
                part = predictions.select(members[own])
                row: Row = {"task": name, "column": column, "group": group, "patients": len(part)}
                row["with_last_label"] = int((part.truth == len(task.labels) - 1).sum())
                rows.append(row | _subgroup_metrics(task, part, options))
    return rows


def _subgroup_metrics(task: Task, part: TaskPredictions, options: Mapping[str, Any]) -> Row:
    names = [each.name for each in metrics_package.registered(task.kind) if each.in_subgroups]
    if not len(part):
        return {name: {"value": None, "low": None, "high": None} for name in names}
    values = metrics_package.compute_with_intervals(
        part.truth, part.probabilities, kind=task.kind, thresholds=task.decision_threshold, **options
    )
    return {name: values[name] for name in names}


def shared_tasks(first: ModelSpec, second: ModelSpec) -> tuple[str, ...]:
    """Return the tasks that two models define in the same way.

    Args:
        first: The specification of a model.
        second: The specification of the model that it is compared with.

    Raises:
        SpecError: The models share no task.
    """
    theirs = {task.name: (task.labels, task.target) for task in second.tasks}
    shared = tuple(task.name for task in first.tasks if theirs.get(task.name) == (task.labels, task.target))
    if not shared:
        raise SpecError(
            f"{first.name} and {second.name} cannot be compared: they share no task with the same labels and column. "
            f"{second.name} has the tasks {', '.join(theirs)}. Choose a model with a task of {first.name}."
        )
    return shared


def compare_models(
    name: str,
    leakage: str,
    tasks: Mapping[str, tuple[Task, TaskPredictions, Task, TaskPredictions]],
    left_out_tasks: Sequence[str],
    *,
    n_bootstrap: int,
    seed: int,
) -> ModelComparison:
    """Compare two models on the labelled patients that both predict.

    Args:
        name: Name of the second model.
        leakage: What is known about its training patients.
        tasks: By name of the task, the task and predictions of the first model, and those of the second.
        left_out_tasks: Tasks that are not compared.
        n_bootstrap: Number of bootstrap samples.
        seed: Random seed.
    """
    counts, rows = {}, {}
    for task_name, (task, first, other_task, second) in tasks.items():
        one, other = align(first.labelled(), second.labelled())
        mine, theirs = first.labelled().select(one), second.labelled().select(other)
        counts[task_name] = len(mine)
        if not len(mine):
            continue
        thresholds = (task.decision_threshold, other_task.decision_threshold)
        compared = comparisons.compare(
            mine.truth, mine.probabilities, theirs.probabilities, kind=task.kind, thresholds=thresholds,
            n_bootstrap=n_bootstrap, seed=seed,
        )  # fmt: skip
        names = [each.name for each in metrics_package.registered(task.kind) if each.compared]
        rows[task_name] = {metric: compared[metric] for metric in names}
    return ModelComparison(name, leakage, counts, rows, tuple(left_out_tasks))


def comparison_rows(differences: Mapping[str, Mapping[str, Row]]) -> Iterator[Row]:
    """Yield the rows of a table of a comparison.

    Args:
        differences: Rows of a `ModelComparison` by task and metric, or `differences` of its plain data.
    """
    for task, rows in differences.items():
        for metric, row in rows.items():
            difference = {"value": row["difference"], "low": row["low"], "high": row["high"]}
            yield {"task": task, "metric": metric, **row, "difference": difference}


def better_thresholds(curve: Mapping[str, np.ndarray]) -> list[tuple[float, float]]:
    """Return the ranges of thresholds at which acting by the model is better than acting for all and for none.

    Args:
        curve: Arrays of `net_benefit`.

    Returns:
        The first and the last threshold of each range, empty if there is none.
    """
    better = curve["model"] > np.maximum(curve["all"], 0) + 1e-12
    steps = np.diff(better.astype(np.int64), prepend=0, append=0)
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1) - 1
    thresholds = curve["thresholds"]
    return [(float(thresholds[start]), float(thresholds[end])) for start, end in zip(starts, ends, strict=True)]
