"""Predict the patients of a cohort with leakage control: which patients, by which folds, and what came out."""

import functools
import itertools
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ichprog import preprocessing
from ichprog.calibration import input_statistics
from ichprog.cohort import Cohort, Patient
from ichprog.errors import CohortError, RunError, ScanError
from ichprog.evaluation.leakage import LeakageReport, check_leakage
from ichprog.evaluation.predictions import TaskPredictions
from ichprog.io import file_lock
from ichprog.journal import Journal
from ichprog.model import Model
from ichprog.parallel import WorkerDiedError, map_unordered
from ichprog.results import Prediction
from ichprog.scan import Scan, worker_died_error
from ichprog.spec import ModelSpec, Task

if TYPE_CHECKING:
    from ichprog.scan.brain import Brain

_progress = logging.getLogger("ichprog.progress")
Probabilities = dict[str, dict[str, float]]  # by task and label

SEVERAL_FOLDS = -1  # stored as the fold of a prediction that is the mean of several folds


@dataclass(frozen=True)
class Plan:
    """Which patients of a cohort a model predicts, and with which folds.

    Attributes:
        labels: Indices of the true labels `(N,)` by task, -1 if unknown.
        unscored: Column of the labels of each other task.
        leakage: The folds that may predict each patient.
        left_out: Indices of the patients that no fold may predict.
        unlabelled: Indices of the other patients without a label.
        scored: Indices of the patients to predict.
    """

    labels: dict[str, np.ndarray]
    unscored: dict[str, str]
    leakage: LeakageReport
    left_out: list[int]
    unlabelled: list[int]
    scored: list[int]


def plan_patients(model: Model, cohort: Cohort) -> Plan:
    """Return which patients of a cohort a model predicts, and with which folds.

    Args:
        model: The model.
        cohort: The patients.

    Raises:
        CohortError: No patient has a label of the model and may be predicted by it.
    """
    labels, unscored = _read_labels(model.spec, cohort)
    leakage = check_leakage(model.spec, model.weights, cohort)
    has_label = np.any([values >= 0 for values in labels.values()], axis=0)
    left_out = [index for index, folds in enumerate(leakage.folds) if not folds]
    unlabelled = [index for index, folds in enumerate(leakage.folds) if folds and not has_label[index]]
    scored = [index for index, folds in enumerate(leakage.folds) if folds and has_label[index]]
    if not scored:
        raise CohortError(
            f"{cohort.source}: no patient can be scored: {len(left_out)} may not be predicted, {len(unlabelled)} have "
            f"no label of {model.spec.name}. {leakage.sentence}"
        )
    return Plan(labels, unscored, leakage, left_out, unlabelled, scored)


@dataclass
class ScanResults:
    """Results by index of the patient in the cohort.

    Attributes:
        predictions: Probability of each label by task, with the fold that is stored.
        failed: Errors of scans.
        warnings: Warnings about scans.
        inputs: Statistics of the grids.
    """

    predictions: dict[int, tuple[Probabilities, int]] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    warnings: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    inputs: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, index: int, result: Mapping[str, Any]) -> None:
        """Add the result of a patient, from `_result_of`."""
        if "error" in result:
            self.failed[index] = result["error"]
            return
        self.predictions[index] = result["probabilities"], result["fold"]
        if result["warnings"]:
            self.warnings[index] = result["warnings"]
        if result["inputs"] is not None:
            self.inputs[index] = result["inputs"]


class PatientJournal:
    """Results of patients on the disk, from which an interrupted run continues. `open_journal` returns one.

    Args:
        journal: The journal; None keeps nothing.
        known: Results by key.
    """

    def __init__(self, journal: Journal | None = None, known: Mapping[str, Any] | None = None) -> None:
        self._journal, self._known = journal, known or {}

    def find(self, key: str) -> "Mapping[str, Any] | None":
        """Return the result with a key, or None."""
        return self._known.get(key)

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Add a result. It is on the disk when this function returns."""
        if self._journal is not None:
            self._journal.add({"key": key, "result": result})


@contextmanager
def open_journal(path: Path | None, run: Mapping[str, Any], *, resume: bool) -> Iterator[PatientJournal]:
    """Open a journal of results. It stays when the block ends, unless it is empty.

    Args:
        path: Path of the journal. None keeps nothing.
        run: What determines the results, as plain data.
        resume: Whether to continue the journal of an interrupted run.

    Raises:
        RunError: The journal exists and is not resumed, belongs to another run, or another process writes it.
    """
    if path is None:
        yield PatientJournal()
        return
    if path.exists() and not resume:
        raise RunError(f"{path} holds results of an interrupted run. Continue it with --resume, or delete the file.")
    journal, lock = Journal(path, run), path.with_name(f".{path.name}.lock")
    try:
        with file_lock(lock, timeout_s=0):
            entries = list(journal.read()) if path.exists() else []
            journal.begin(entries)
            try:
                yield PatientJournal(journal, {entry["key"]: entry["result"] for entry in entries})
            finally:
                journal.close()
                if next(journal.read(), None) is None:
                    journal.remove()  # nothing is lost
                lock.unlink(missing_ok=True)
    except TimeoutError:
        raise RunError(f"{path} is being written by another process. Wait for it, or choose another folder.") from None


def predict_patients(
    model: Model,
    cohort: Cohort,
    plan: Plan,
    brain: "Brain",
    *,
    progress: bool,
    with_inputs: bool = False,
    executor: Executor | None = None,
    workers: int = 1,
    journal: PatientJournal | None = None,
) -> ScanResults:
    """Predict each patient by one fold, or by the mean of all folds.

    Args:
        model: The model.
        cohort: The patients.
        plan: Result of `plan_patients`.
        brain: As in `predict`.
        progress: Whether to show a progress bar on standard error.
        with_inputs: Whether the results have the statistics of each grid.
        executor: Executor whose workers predict. By default, processes of this machine.
        workers: Number of processes if there is no executor. 1 predicts in this process.
        journal: Keeps the results for a later run.
    """
    from tqdm import tqdm

    results, journal = ScanResults(), journal or PatientJournal()
    todo: list[_Job] = []
    for index in sorted(plan.scored, key=lambda index: plan.leakage.folds[index]):  # one fold after the other
        folds, patient = plan.leakage.folds[index], cohort.patients[index]
        values, weights = model.clinical_values(patient, None), [file.sha256 for file in model.weights]
        key = json.dumps([model.spec.name, weights, patient.name, str(patient.scan), folds, values])
        found = journal.find(key)
        if found is None:
            todo.append(_Job(index, folds, patient, key))
        else:
            results.add(index, found)
    done: Iterator[tuple[_Job, dict[str, Any] | WorkerDiedError]]
    if executor is None and workers == 1:
        done = _predict_here(model, todo, brain, with_inputs=with_inputs)
    else:
        function = functools.partial(_predict_patient, model, brain, with_inputs)
        done = map_unordered(function, todo, executor=executor, workers=workers)
    n = len(plan.scored)
    if todo:
        _progress.info("Predicting %d scans with %s.", len(todo), model.spec.name)
    with tqdm(total=n, initial=n - len(todo), unit="scan", file=sys.stderr, disable=not progress) as bar:
        for job, result in done:
            if isinstance(result, WorkerDiedError):
                error = worker_died_error(str(job.patient.scan), result)
                result = _result_of(model.error_prediction(job.patient, error), error, job, model, with_inputs=False)
            journal.add(job.key, result)
            results.add(job.position, result)
            bar.update()
    return results


class _Job(NamedTuple):
    """A patient to predict.

    Attributes:
        position: Index in the cohort.
        folds: The folds that may predict the patient.
        patient: The patient, with clinical values.
        key: Key of the result in the journal.
    """

    position: int
    folds: tuple[int, ...]
    patient: Patient
    key: str


def _predict_here(
    model: Model, jobs: list[_Job], brain: "Brain", *, with_inputs: bool
) -> Iterator[tuple[_Job, dict[str, Any]]]:
    """Yield the result of each patient; the next scan is read while the network runs."""
    for folds, group in itertools.groupby(jobs, lambda job: job.folds):
        member, same = _member(model, folds), list(group)
        predictions = member.predict_iter([job.patient for job in same], brain=brain)
        for job, (prediction, scan) in zip(same, predictions, strict=True):
            yield job, _result_of(prediction, scan, job, model, with_inputs=with_inputs)
        for runtime in member.fold_runtimes:
            runtime.release_memory()


def _predict_patient(model: Model, brain: "Brain", with_inputs: bool, job: _Job) -> dict[str, Any]:
    """Return the result of one patient in a worker process."""
    ((_, result),) = _predict_here(model, [job], brain, with_inputs=with_inputs)
    return result


def _member(model: Model, folds: tuple[int, ...]) -> Model:
    return model.fold(folds[0]) if len(folds) == 1 else model


def _result_of(
    prediction: Prediction, scan: Scan | ScanError, job: _Job, model: Model, *, with_inputs: bool
) -> dict[str, Any]:
    """Return what is kept of a prediction, as plain data."""
    if isinstance(scan, ScanError):
        return {"error": {"patient": job.patient.name, "scan": prediction.scan, **(prediction.error or {})}}
    return {
        "fold": job.folds[0] if len(job.folds) == 1 else SEVERAL_FOLDS,
        "probabilities": {name: dict(task.probabilities) for name, task in prediction.tasks.items()},
        "warnings": [warning.to_dict() for warning in scan.warnings],
        "inputs": input_statistics(preprocessing.prepare(scan.hu, model.spec.input)) if with_inputs else None,
    }


def tabulate(spec: ModelSpec, cohort: Cohort, plan: Plan, results: ScanResults) -> dict[str, TaskPredictions]:
    """Return the predictions of each task with labels, in the order of the cohort.

    Args:
        spec: The model.
        cohort: The patients.
        plan: Result of `plan_patients`.
        results: Result of `predict_patients`.
    """
    return {task: _task_predictions(spec.task(task), cohort, truth, results) for task, truth in plan.labels.items()}


def _task_predictions(task: Task, cohort: Cohort, truth: np.ndarray, results: ScanResults) -> TaskPredictions:
    """Return the predictions of one task in the order of the cohort."""
    indices = sorted(results.predictions)
    predictions = [results.predictions[index] for index in indices]
    probabilities = [[probabilities[task.name][label] for label in task.labels] for probabilities, _ in predictions]
    return TaskPredictions(
        tuple(cohort.patients[index].name for index in indices),
        np.array([fold for _, fold in predictions], np.int64),
        truth[indices],
        np.array(probabilities, np.float64).reshape(-1, len(task.labels)),
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
