"""Predict the patients of a cohort with leakage control: which patients, by which folds, and what came out."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog import preprocessing
from ichprog.calibration import input_statistics
from ichprog.cohort import Cohort
from ichprog.errors import CohortError, ScanError
from ichprog.evaluation.leakage import LeakageReport, check_leakage
from ichprog.evaluation.predictions import TaskPredictions
from ichprog.model import Model
from ichprog.results import Prediction
from ichprog.spec import ModelSpec, Task

if TYPE_CHECKING:
    from ichprog.scan.brain import Brain

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
        predictions: Predictions, with the fold that is stored.
        failed: Errors of scans.
        warnings: Warnings about scans.
        inputs: Statistics of the grids.
    """

    predictions: dict[int, tuple[Prediction, int]] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    warnings: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    inputs: dict[int, dict[str, float]] = field(default_factory=dict)


def predict_patients(
    model: Model, cohort: Cohort, plan: Plan, brain: "Brain", *, progress: bool, with_inputs: bool = False
) -> ScanResults:
    """Predict each patient by one fold, or by the mean of all folds.

    Args:
        model: The model.
        cohort: The patients.
        plan: Result of `plan_patients`.
        brain: As in `predict`.
        progress: Whether to show a progress bar on standard error.
        with_inputs: Whether the results have the statistics of each grid.
    """
    from tqdm import tqdm

    results = ScanResults()
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in plan.scored:
        groups.setdefault(plan.leakage.folds[index], []).append(index)
    with tqdm(total=len(plan.scored), unit="scan", file=sys.stderr, disable=not progress) as bar:
        for folds, indices in groups.items():
            member = model.fold(folds[0]) if len(folds) == 1 else model
            patients = [cohort.patients[index] for index in indices]  # with their clinical values
            for index, (prediction, scan) in zip(indices, member.predict_iter(patients, brain=brain), strict=True):
                bar.update()
                if isinstance(scan, ScanError):
                    patient = cohort.patients[index].name
                    error = prediction.error or {}
                    results.failed[index] = {"patient": patient, "scan": prediction.scan, **error}
                    continue
                results.predictions[index] = prediction, folds[0] if len(folds) == 1 else SEVERAL_FOLDS
                if with_inputs:
                    results.inputs[index] = input_statistics(preprocessing.prepare(scan.hu, model.spec.input))
                if scan.warnings:
                    results.warnings[index] = [warning.to_dict() for warning in scan.warnings]
            for runtime in member.fold_runtimes:
                runtime.release_memory()
    return results


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
    probabilities = [
        [prediction[task.name].probabilities[label] for label in task.labels] for prediction, _ in predictions
    ]
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
