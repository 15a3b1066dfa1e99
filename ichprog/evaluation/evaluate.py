"""Evaluate a model on a cohort with leakage control."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ichprog import metrics as metrics_package
from ichprog.cohort import Cohort, Origin
from ichprog.errors import CohortError, ScanError, missing_extra
from ichprog.evaluation.leakage import LeakageReport, check_leakage
from ichprog.evaluation.predictions import Predictions, TaskPredictions
from ichprog.io import write_json
from ichprog.metrics.calibration import calibration_curve
from ichprog.model import Model, load_model, resolve_brain
from ichprog.reporting import tables
from ichprog.results import Prediction
from ichprog.spec import ModelSpec, Task

if TYPE_CHECKING:
    from ichprog.scan.brain import Brain

SEVERAL_FOLDS = -1  # stored as the fold of a prediction that is the mean of several folds

Metrics = dict[str, dict[str, metrics_package.Interval]]  # by task and metric
Curves = dict[str, dict[str, dict[str, np.ndarray]]]  # by task and event


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model for a cohort, and their metrics.

    Attributes:
        model: The specification of the model.
        cohort: Source of the cohort.
        predictions: Predictions in split "test" of a variant with the model's name. The fold of a mean of several folds
            is `SEVERAL_FOLDS`.
        metrics: `value`, `low` and `high` by task and metric.
        calibration: By task and event the arrays of `calibration_curve`. An event is a label, or a label or later.
        leakage: The folds that may predict each patient, and why.
        left_out: Names of the patients that no fold of the model may predict.
        unlabelled: Names of the patients without a label of any task.
        unscored: Column of the labels by task, for tasks without any labelled patient.
        failed: The scans that could not be read, each with `patient`, `scan`, `code` and `message`.
        warnings: Warnings about scans by name of the patient.
        origin: How many patients are simulated.
        intervals: How the intervals were computed, as a sentence without full stop.
        provenance: Provenance of the model, as plain data.
    """

    model: ModelSpec
    cohort: str
    predictions: Predictions
    metrics: Metrics
    calibration: Curves
    leakage: LeakageReport
    left_out: tuple[str, ...]
    unlabelled: tuple[str, ...]
    unscored: Mapping[str, str]
    failed: tuple[Mapping[str, Any], ...]
    warnings: Mapping[str, list[dict[str, Any]]]
    origin: Origin
    intervals: str
    provenance: Mapping[str, Any]

    def labelled(self, task: str) -> TaskPredictions:
        """Return the predictions of a task for the patients with a label.

        Args:
            task: Name of the task.
        """
        return self.predictions.entries[self.model.name, task, "test"].labelled()

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of patients, and how many were scored, left out, unlabelled or failed."""
        n = len(self.leakage.folds)
        lost = {"left_out": len(self.left_out), "unlabelled": len(self.unlabelled), "failed": len(self.failed)}
        return {"patients": n, "scored": n - sum(lost.values()), **lost}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the predictions as plain data, ready for JSON."""
        return {
            "model": self.model.name,
            "cohort": self.cohort,
            **self.counts,
            "leakage": self.leakage.sentence,
            "leakage_source": self.leakage.source,
            "metrics": self.metrics,
            "label_counts": {name: self._count_labels(self.model.task(name)) for name in self.metrics},
            "thresholds": {name: self.model.task(name).threshold for name in self.metrics},
            "calibration": {
                task: {
                    event: {name: values.tolist() for name, values in curve.items()} for event, curve in curves.items()
                }
                for task, curves in self.calibration.items()
            },
            "tasks_not_scored": dict(self.unscored),
            "patients_left_out": list(self.left_out),
            "patients_without_labels": list(self.unlabelled),
            "scans_failed": [dict(each) for each in self.failed],
            "warnings": dict(self.warnings),
            "simulated": self.origin.simulated,
            "intervals": self.intervals,
            "provenance": dict(self.provenance),
            "notice": self.model.notice,
        }

    def write(self, folder: str | Path) -> Path:
        """Write the evaluation into a folder. An interruption leaves no partial file.

        `predictions.csv` and `metrics.json` have the format of a study. `evaluation.json` is `to_dict`. `tables` has
        metrics and calibration curves as CSV, Markdown and LaTeX. `calibration.svg` and `.png` show the curves.

        Args:
            folder: The folder, created if missing.

        Returns:
            The folder.

        Raises:
            IchprogError: matplotlib is not installed; only the figure is missing then.
        """
        from ichprog.reporting import figures

        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        self.predictions.write(out / "predictions.csv")
        write_json(out / "metrics.json", {self.model.name: self.metrics})
        write_json(out / "evaluation.json", self.to_dict())
        caption = f"{self.model.name} on {self.counts['scored']} patients of {self.cohort}. {self.leakage.sentence}"
        caption += f" {self.intervals}. {self.model.notice}"
        columns = {"task": "task", "n": "patients", "metric": "metric", "value": "value"}
        tables.write(self._metric_rows(), columns, out / "tables", "metrics", caption)
        binned = ("task", "event", "predicted", "observed", "low", "high", "count")
        tables.write(self._calibration_rows(), binned, out / "tables", "calibration", caption)
        if self.calibration:
            figures.save(figures.calibration(self.calibration), out, "calibration")
        return out

    def _count_labels(self, task: Task) -> dict[str, int]:
        counts = np.bincount(self.labelled(task.name).truth, minlength=len(task.labels))
        return dict(zip(task.labels, counts.tolist(), strict=True))

    def _metric_rows(self) -> Iterator[dict[str, Any]]:
        for task, values in self.metrics.items():
            n = len(self.labelled(task))
            for name, value in values.items():
                yield {"task": task, "n": n, "metric": tables.readable_name(name), "value": value}

    def _calibration_rows(self) -> Iterator[dict[str, Any]]:
        for task, curves in self.calibration.items():
            for event, curve in curves.items():
                for values in zip(*curve.values(), strict=True):
                    numbers = (value.item() for value in values)
                    yield {"task": task, "event": event, **dict(zip(curve, numbers, strict=True))}


def evaluate(
    model: Model | str,
    cohort: Cohort | str | Path,
    *,
    brain: "Brain" = "auto",
    n_bootstrap: int = 1000,
    seed: int = 0,
    ci_method: Literal["percentile", "bca"] = "percentile",
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model on a cohort.

    A patient is predicted only by folds that were not trained on the patient, as `check_leakage` finds. Thresholds are
    the model's own; no threshold uses patients of the cohort. A scan that cannot be read is recorded, and its patient
    is in no metric.

    Args:
        model: A model, or a name that `load_model` takes.
        cohort: The patients, or the path of their table. A task whose column the table lacks is not scored.
        brain: As in `predict`.
        n_bootstrap: Number of bootstrap samples over patients for 95 % intervals.
        seed: Random seed.
        ci_method: "percentile" or "bca".
        progress: Whether to show a progress bar on standard error.

    Raises:
        CohortError: The table is wrong, has the column of no task, or has no patient that the model may predict.
        RunError: The model's run.json cannot be read.
        UnknownNameError, SpecError, WeightsError, PluginError: As in `load_model`.
        IchprogError: The extra `study` is not installed.

    Example:
        ```python
        from ichprog.evaluation import evaluate

        evaluation = evaluate("compact.prognosis_gcs3_age", "patients/cohort.csv")
        print(evaluation.leakage.sentence)
        print(evaluation.metrics["prognosis"]["auroc"])
        ```
    """
    if find_spec("scipy") is None:
        raise missing_extra("study", "scipy", "Evaluating a model")
    brain = resolve_brain(brain)
    table = cohort if isinstance(cohort, Cohort) else Cohort.read(cohort, scans=False)
    loaded = load_model(model) if isinstance(model, str) else model
    spec = loaded.spec
    labels, unscored = _read_labels(spec, table)
    leakage = check_leakage(spec, loaded.weights, table)
    has_label = np.any([values >= 0 for values in labels.values()], axis=0)
    left_out = [index for index, folds in enumerate(leakage.folds) if not folds]
    unlabelled = [index for index, folds in enumerate(leakage.folds) if folds and not has_label[index]]
    scored = [index for index, folds in enumerate(leakage.folds) if folds and has_label[index]]
    if not scored:
        raise CohortError(
            f"{table.source}: no patient can be scored: {len(left_out)} may not be predicted, {len(unlabelled)} have "
            f"no label of {spec.name}. {leakage.sentence}"
        )
    results = _predict(loaded, table, {index: leakage.folds[index] for index in scored}, brain, progress=progress)
    predictions = {task: _task_predictions(spec.task(task), table, truth, results) for task, truth in labels.items()}
    labelled = {task: each.labelled() for task, each in predictions.items()}
    labelled = {task: each for task, each in labelled.items() if len(each)}
    metrics = {
        task: metrics_package.compute_with_intervals(
            each.truth, each.probabilities, kind=spec.task(task).kind, thresholds=spec.task(task).decision_threshold,
            n_bootstrap=n_bootstrap, seed=seed, ci_method=ci_method,
        )
        for task, each in labelled.items()
    }  # fmt: skip
    names = [patient.name for patient in table.patients]
    used = {fold for index in scored for fold in leakage.folds[index]}
    provenance = loaded.provenance()
    return Evaluation(
        model=spec,
        cohort=table.source,
        predictions=Predictions({(spec.name, task, "test"): each for task, each in predictions.items() if len(each)}),
        metrics=metrics,
        calibration={task: _calibrate(spec.task(task), each) for task, each in labelled.items()},
        leakage=leakage,
        left_out=tuple(names[index] for index in left_out),
        unlabelled=tuple(names[index] for index in unlabelled),
        unscored=unscored,
        failed=tuple(results.failed[index] for index in sorted(results.failed)),
        warnings={names[index]: results.warnings[index] for index in sorted(results.warnings)},
        origin=table.origin,
        intervals=f"95 % intervals: {ci_method} bootstrap over patients, {n_bootstrap} samples, seed {seed}",
        provenance=provenance | {"weights": [each for each in provenance["weights"] if each["fold"] in used]},
    )


def _read_labels(spec: ModelSpec, cohort: Cohort) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the true labels `(N,)` of each task with a labelled patient, and the column of each other task."""
    present = set().union(*(patient.columns for patient in cohort.patients))
    labels = {task.name: cohort.labels(task) for task in spec.tasks if task.target.column in present}
    labels = {task: values for task, values in labels.items() if (values >= 0).any()}
    columns = {task.name: task.target.column for task in spec.tasks}
    if not labels:
        raise CohortError(
            f"{cohort.source}: no patient has a label of {spec.name}. Fill one of the columns "
            f"{', '.join(dict.fromkeys(columns.values()))}."
        )
    return labels, {task: column for task, column in columns.items() if task not in labels}


@dataclass
class _ScanResults:
    """Results by index of the patient in the cohort."""

    predictions: dict[int, tuple[Prediction, int]] = field(default_factory=dict)  # with the stored fold
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    warnings: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


def _predict(
    model: Model,
    cohort: Cohort,
    folds_of: Mapping[int, tuple[int, ...]],
    brain: "Brain",
    *,
    progress: bool,
) -> _ScanResults:
    """Predict each patient by one fold, or by the mean of all folds."""
    from tqdm import tqdm

    results = _ScanResults()
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, folds in folds_of.items():
        groups.setdefault(folds, []).append(index)
    with tqdm(total=len(folds_of), unit="scan", file=sys.stderr, disable=not progress) as bar:
        for folds, indices in groups.items():
            member = model.fold(folds[0]) if len(folds) == 1 else model
            scans = [cohort.patients[index].scan for index in indices]
            for index, (prediction, scan) in zip(indices, member.predict_iter(scans, brain=brain), strict=True):
                bar.update()
                if isinstance(scan, ScanError):
                    patient = cohort.patients[index].name
                    error = prediction.error or {}
                    results.failed[index] = {"patient": patient, "scan": prediction.scan, **error}
                    continue
                results.predictions[index] = prediction, folds[0] if len(folds) == 1 else SEVERAL_FOLDS
                if scan.warnings:
                    results.warnings[index] = [warning.to_dict() for warning in scan.warnings]
            for runtime in member.fold_runtimes:
                runtime.release_memory()
    return results


def _task_predictions(task: Task, cohort: Cohort, truth: np.ndarray, results: _ScanResults) -> TaskPredictions:
    """Return the predictions of one task in the order of the cohort."""
    indices = sorted(results.predictions)
    predictions = [results.predictions[index] for index in indices]
    probabilities = [
        [prediction[task.name].probabilities[label] for label in task.labels] for prediction, _ in predictions
    ]
    return TaskPredictions(
        tuple(cohort.patients[index].name for index in indices),
        np.array([fold for _, fold in predictions], np.int64),
        truth[indices],
        np.array(probabilities, np.float64).reshape(-1, len(task.labels)),
    )


def _calibrate(task: Task, predictions: TaskPredictions) -> dict[str, dict[str, np.ndarray]]:
    """Return a calibration curve for each event of a task."""
    p, truth, labels = predictions.probabilities, predictions.truth, task.labels
    if task.kind == "nominal":
        return {label: calibration_curve(truth == k, p[:, k]) for k, label in enumerate(labels)}
    return {
        label if k == len(labels) - 1 else f"{label} or later": calibration_curve(
            truth >= k, np.clip(p[:, k:].sum(axis=1), 0, 1)
        )
        for k, label in enumerate(labels)
        if k
    }
