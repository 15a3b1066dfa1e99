"""Analyse the predictions of a study: metrics with intervals, comparisons, subgroups, readers and mistakes.

No threshold or calibration uses test patients. Thresholds, recalibration and conformal limits are fitted to the
validation part of the fold that predicts a patient, and applied to the test part of that fold.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ichprog import metrics as metrics_package
from ichprog.cohort import Cohort
from ichprog.errors import CohortError
from ichprog.evaluation.predictions import Predictions, TaskPredictions, align
from ichprog.io import read_csv
from ichprog.metrics import Kind, agreement, calibration, comparisons, conformal, discrimination, seeds, subgroups
from ichprog.metrics.bootstrap import finite
from ichprog.spec import Task
from ichprog.study.config import Run, Study
from ichprog.study.study_file import Budget

_T = TypeVar("_T")
Row = dict[str, Any]
Interval = Mapping[str, float | None]
Metrics = dict[str, dict[str, dict[str, Interval]]]  # by run, task and metric

_MAX_MISTAKES = 5  # of each run
_progress = logging.getLogger("ichprog.progress")


@dataclass(frozen=True)
class TaskAnalysis:
    """Test predictions of one run for one task, with what was fitted to the validation parts.

    Attributes:
        task: Task.
        predictions: Test predictions of the `N` labelled patients.
        thresholds: Decision threshold of each patient `(N,)`. For two labels it is chosen on the validation part of the
            fold that predicts. For more labels it is the task's own.
        recalibrated: Predictions of two labels after recalibration on that validation part. Otherwise None.
        sets: Conformal sets `(N, K)` bool.
    """

    task: Task
    predictions: TaskPredictions
    thresholds: np.ndarray
    recalibrated: TaskPredictions | None
    sets: np.ndarray


Analyses = Mapping[str, Mapping[str, TaskAnalysis]]  # by run and task
Repetitions = Sequence[TaskAnalysis]  # of one run with different seeds, for one task


@dataclass(frozen=True)
class StudyResults:
    """Results of a study. A run is a variant, a baseline, or a variant on fewer patients.

    A run that was repeated with other seeds stands for all its repetitions: each metric is their mean, and intervals
    and tests include both patients and repetitions. Conformal sets, readers and mistakes are those of the first seed.

    Attributes:
        analyses: Analyses by run and task, each repetition by its own name.
        metrics: Intervals `{"value", "low", "high"}` by run, task and metric.
        per_fold: One value for each fold, by run, task and metric.
        variances: Rows: by how much the primary metric of a repeated run varies with seeds, folds and patients.
        comparisons: Rows: difference between a run and its reference in one metric, with p adjusted over all runs.
        correlations: Rows: correlation of a column with the outcome of the main task.
        subgroups: Rows: metrics of a group of patients, by run.
        readers: Comparison with readers by variant, as `agreement.compare_readers` returns it.
        mistakes: Rows: the most confident mistakes of each run.
    """

    analyses: Analyses
    metrics: Metrics
    per_fold: Mapping[str, Mapping[str, Mapping[str, list[float | None]]]]
    variances: list[Row]
    comparisons: list[Row]
    correlations: list[Row]
    subgroups: list[Row]
    readers: Mapping[str, Any]
    mistakes: list[Row]


def analyse(study: Study, cohort: Cohort, predictions: Predictions) -> StudyResults:
    """Analyse all predictions of a study.

    Args:
        study: Study.
        cohort: Patients of the study.
        predictions: Predictions of all runs.

    Raises:
        CohortError: The readers' table cannot be used, or a column with bounds is not numeric.
        UnknownNameError: The cohort lacks a column.

    Examples:
        ```python
        results = analyse(study, cohort, Predictions.read(Path("out/predictions.csv")))
        print(results.metrics["prognosis"]["prognosis"]["auroc"])
        ```
    """
    analyses = {
        run: {name: _analyse_task(study, predictions, run, name) for name in predictions.tasks(run)}
        for run in predictions.variants
    }
    groups = _group_repetitions(study, analyses)
    main = {run: tasks[study.stratify_by] for run, tasks in groups.items() if study.stratify_by in tasks}
    first = {run: repeated[0] for run, repeated in main.items()}
    per_fold = {run: {name: _per_fold(each, study.folds) for name, each in by.items()} for run, by in groups.items()}
    return StudyResults(
        analyses,
        {run: {name: _metrics(each, study) for name, each in by_task.items()} for run, by_task in _announced(groups)},
        per_fold,
        [row for run, by_task in groups.items() for row in _variances(study, run, by_task)],
        _comparisons(study, groups),
        _correlations(study, cohort),
        _subgroups(study, cohort, main),
        _readers(study, first),
        [row for run, one in first.items() for row in _mistakes(run, one)],
    )


def _announced(groups: Mapping[str, _T]) -> Iterator[tuple[str, _T]]:
    """Yield each run with its value, and log its name and number."""
    for number, (run, value) in enumerate(groups.items(), 1):
        _progress.info("Computing the metrics of %s, run %d of %d.", run, number, len(groups))
        yield run, value
    _progress.info("Comparing the runs.")


def learning_curves(
    study: Study, metrics: Metrics, full_size: int, budget: Budget = "epochs", metric: str = metrics_package.PRIMARY
) -> dict[str, dict[int, Interval]]:
    """Return the learning curves of the main task: intervals of a metric by variant and number of training patients.

    Args:
        study: Study.
        metrics: Metrics of its `StudyResults`.
        full_size: Number of training patients of a fold if all are used.
        budget: What is equal at all sizes.
        metric: Metric.
    """
    curves: dict[str, dict[int, Interval]] = {}
    for name in study.curve_variants:
        for size in (*study.curve_sizes, None):
            run = name if size is None else Run(study.variant(name), size, budget).group
            if study.stratify_by in metrics.get(run, {}):
                curves.setdefault(name, {})[size or full_size] = metrics[run][study.stratify_by][metric]
    return curves


def _group_repetitions(study: Study, analyses: Analyses) -> dict[str, dict[str, list[TaskAnalysis]]]:
    """Return the analyses by run and task, those of its repetitions in one list."""
    return {
        run: {
            name: [analyses[each][name] for each in study.repetitions(run) if each in analyses]
            for name in analyses[run]
        }
        for run in analyses
        if not study.is_repetition(run)
    }


def _analyse_task(study: Study, predictions: Predictions, run: str, name: str) -> TaskAnalysis:
    """Fit thresholds, recalibration and conformal limits to validation parts, and apply each to its test part."""
    task = study.runs[run].variant.spec.task(name) if run in study.runs else study.task(name)
    test = predictions.entries[run, name, "test"].labelled()
    validation = predictions.entries[run, name, "validation"].labelled()
    binary = task.kind == "binary"
    thresholds, sets = np.full(len(test), task.decision_threshold), np.ones(test.probabilities.shape, bool)
    recalibrated = test.probabilities.copy()
    for fold in np.unique(test.fold):
        in_fold, held_out = test.fold == fold, validation.select(validation.fold == fold)
        sets[in_fold] = conformal.conformal_sets(
            held_out.truth, held_out.probabilities, test.probabilities[in_fold], coverage=study.coverage
        )
        if binary:
            thresholds[in_fold] = discrimination.choose_threshold(held_out.truth, held_out.probabilities[:, 1])
            slope, intercept = calibration.fit_recalibration(held_out.truth, held_out.probabilities[:, 1])
            p = calibration.recalibrate(test.probabilities[in_fold, 1], slope, intercept)
            recalibrated[in_fold] = np.column_stack([1 - p, p])
    after = TaskPredictions(test.patients, test.fold, test.truth, recalibrated) if binary else None
    return TaskAnalysis(task, test, thresholds, after, sets)


def _metrics(repeated: Repetitions, study: Study) -> dict[str, Interval]:
    kind, options = repeated[0].task.kind, dict[str, Any](n_bootstrap=study.n_bootstrap, seed=study.bootstrap_seed)
    metrics: dict[str, Interval] = {**_with_intervals(repeated, study)}
    if repeated[0].recalibrated is not None:
        after = _intervals(
            repeated[0].predictions.truth,
            [each.recalibrated.probabilities for each in repeated if each.recalibrated],
            [0.5] * len(repeated),
            kind,
            study,
        )
        metrics |= {
            each.name + metrics_package.RECALIBRATED: after[each.name]
            for each in metrics_package.registered(kind)
            if each.recalibrated
        }
    return metrics | conformal.set_metrics(repeated[0].sets, repeated[0].predictions.truth, **options)


def _with_intervals(
    repeated: Repetitions, study: Study, chosen: Any = slice(None)
) -> dict[str, dict[str, float | None]]:
    """Return every metric of the analysed patients, or of some of these patients."""
    return _intervals(
        repeated[0].predictions.truth[chosen],
        [each.predictions.probabilities[chosen] for each in repeated],
        [each.thresholds[chosen] for each in repeated],
        repeated[0].task.kind,
        study,
    )


def _intervals(
    truth: np.ndarray, probabilities: Sequence[np.ndarray], thresholds: Sequence[Any], kind: Kind, study: Study
) -> dict[str, dict[str, float | None]]:
    """Return every metric with an interval over patients, and over repetitions if there are several."""
    options = dict[str, Any](kind=kind, n_bootstrap=study.n_bootstrap, seed=study.bootstrap_seed)
    if len(probabilities) > 1:
        return seeds.compute_over_seeds(truth, probabilities, thresholds=thresholds, **options)
    return metrics_package.compute_with_intervals(truth, probabilities[0], thresholds=thresholds[0], **options)


def _per_fold(repeated: Repetitions, folds: int) -> dict[str, list[float | None]]:
    """Return the mean of each metric over repetitions, by fold."""
    return {name: [finite(value) for value in values.mean(0)] for name, values in _by_fold(repeated, folds).items()}


def _by_fold(repeated: Repetitions, folds: int) -> dict[str, np.ndarray]:
    """Return each metric of S repetitions in F folds `(S, F)`, and the threshold of a task with two labels."""
    values: dict[str, np.ndarray] = {}
    for row, one in enumerate(repeated):
        for fold in range(folds):
            in_fold = one.predictions.fold == fold
            thresholds = one.thresholds[in_fold]
            metrics = metrics_package.compute(
                one.predictions.truth[in_fold],
                one.predictions.probabilities[in_fold],
                kind=one.task.kind,
                thresholds=thresholds,
            )
            if one.task.kind == "binary":
                metrics["threshold"] = float(thresholds[0]) if len(thresholds) else math.nan
            for name, value in metrics.items():
                values.setdefault(name, np.full((len(repeated), folds), math.nan))[row, fold] = value
    return values


def _variances(study: Study, run: str, by_task: Mapping[str, Repetitions]) -> Iterator[Row]:
    """Yield by how much the primary metric of a repeated run varies with seeds, folds and patients."""
    for name, repeated in by_task.items():
        if len(repeated) < 2 or study.is_curve_run(run):
            continue
        kind, metric = repeated[0].task.kind, metrics_package.PRIMARY
        of_patients = seeds.seed_variance(
            repeated[0].predictions.truth,
            [each.predictions.probabilities for each in repeated],
            metric,
            kind=kind,
            thresholds=[each.thresholds for each in repeated],
            n_bootstrap=study.n_bootstrap,
            seed=study.bootstrap_seed,
        )
        of_folds = seeds.crossed_components(_by_fold(repeated, study.folds)[metric])
        row: Row = {"task": name, "variant": run, "repetitions": len(repeated)}
        row |= {key: finite(value) for key, value in of_patients.items()}
        yield row | {f"fold_{key}": finite(value) for key, value in of_folds.items()}


def _comparisons(study: Study, groups: Mapping[str, Mapping[str, Repetitions]]) -> list[Row]:
    """Compare each run with its reference of the same size.

    Holm's adjustment is over all runs that are compared in one metric of one task. Learning-curve runs are adjusted
    separately.
    """
    families: dict[tuple[str, tuple[str, ...], str, bool], list[Row]] = {}
    for run, tasks in groups.items():
        for name, repeated in tasks.items():
            reference = _find_reference(study, repeated[0].task, run, groups)
            if reference in (None, run):
                continue
            other = groups[str(reference)][name]
            by_fold = _compare_by_fold(study, repeated, other)
            for metric, row in _compare_pair(study, repeated, other).items():
                key = (name, repeated[0].task.labels, metric, study.is_curve_run(run))
                pair = {"task": name, "metric": metric, "variant": run, "reference": reference}
                families.setdefault(key, []).append(pair | row | {"p_folds": by_fold.get(metric)})
    rows = []
    for family in families.values():
        p_values = [math.nan if row["p"] is None else row["p"] for row in family]
        rows += [row | {"p_holm": finite(p)} for row, p in zip(family, comparisons.holm(p_values), strict=True)]
    return rows


def _compare_by_fold(study: Study, repeated: Repetitions, other: Repetitions) -> dict[str, float | None]:
    """Return p of each metric's difference over folds, corrected for training parts that overlap."""
    first, second = (_by_fold(each, study.folds) for each in (repeated, other))
    test_share = 1 / (study.folds - 1)
    return {
        name: finite(seeds.corrected_resampled_test(first[name].mean(0) - second[name].mean(0), test_share)[1])
        for name in first
    }


def _compare_pair(study: Study, repeated: Repetitions, other: Repetitions) -> dict[str, Row]:
    """Compare two runs on their common patients, by metric."""
    first, second = align(repeated[0].predictions, other[0].predictions)
    truth, kind = repeated[0].predictions.truth[first], repeated[0].task.kind
    sides = [
        ([each.predictions.probabilities[common] for each in side], [each.thresholds[common] for each in side])
        for side, common in ((repeated, first), (other, second))
    ]
    options = dict[str, Any](kind=kind, n_bootstrap=study.n_bootstrap, seed=study.bootstrap_seed)
    (p, p_thresholds), (q, q_thresholds) = sides
    if len(p) == len(q) == 1:
        rows = comparisons.compare(truth, p[0], q[0], thresholds=(p_thresholds[0], q_thresholds[0]), **options)
    else:
        rows = seeds.compare_over_seeds(truth, p, q, thresholds=(p_thresholds, q_thresholds), **options)
    return {each.name: {**rows[each.name]} for each in metrics_package.registered(kind) if each.compared}


def _find_reference(study: Study, task: Task, run: str, analyses: Mapping[str, Any]) -> str | None:
    """Return the run that a run is compared with, at its size.

    It is the first variant of this task only with the backbone of a variant of several tasks, so that the two differ in
    their tasks alone; or else the first variant of this task only, or the first with this task.
    """
    with_task = [
        variant
        for variant in study.variants
        if any((each.name, each.labels) == (task.name, task.labels) for each in variant.spec.tasks)
    ]
    single_task = [variant for variant in with_task if len(variant.spec.tasks) == 1]
    backbones = {variant.spec.backbone.name for variant in with_task if variant not in single_task}
    alike = [variant for variant in single_task if variant.spec.backbone.name in backbones]
    like = study.runs.get(run, Run(study.variants[0]))
    names = [replace(like, variant=variant).group for variant in [*alike, *single_task, *with_task]]
    return next((name for name in names if name in analyses), None)


def _correlations(study: Study, cohort: Cohort) -> list[Row]:
    labels = cohort.labels(study.main_task)
    outcome = np.where(labels < 0, np.nan, labels)
    return comparisons.correlations({name: cohort.numbers(name) for name in study.correlations}, outcome)


def _subgroups(study: Study, cohort: Cohort, groups: Mapping[str, Repetitions]) -> list[Row]:
    index_of = {patient.name: index for index, patient in enumerate(cohort.patients)}
    rows = []
    for column, edges in study.subgroups.items():
        for group, members in _split_groups(cohort, column, edges).items():
            for run, repeated in groups.items():
                if study.is_curve_run(run):
                    continue
                one = repeated[0]
                chosen = np.array([members[index_of[name]] for name in one.predictions.patients], bool)
                metrics = _with_intervals(repeated, study, chosen)
                row: Row = {"column": column, "group": group, "variant": run, "patients": int(chosen.sum())}
                row["with_last_label"] = int((one.predictions.truth[chosen] == len(one.task.labels) - 1).sum())
                names = [each.name for each in metrics_package.registered(one.task.kind) if each.in_subgroups]
                rows.append(row | {name: metrics[name] for name in names})
    return rows


def _split_groups(cohort: Cohort, column: str, edges: Sequence[float]) -> dict[str, np.ndarray]:
    """Split patients into groups by a column, `(N,)` bool by group. Patients with a blank are in no group."""
    if not edges:
        return subgroups.by_value([patient.columns.get(column, "") for patient in cohort.patients])
    return subgroups.by_edges(cohort.numbers(column), edges)


def _readers(study: Study, analyses: Mapping[str, TaskAnalysis]) -> dict[str, Any]:
    """Compare each trained variant, at its thresholds, with the readers."""
    if study.readers is None:
        return {}
    calls_by_reader = _read_calls(study.readers)
    compared = {}
    for run, one in analyses.items():
        if run not in study.runs or study.is_curve_run(run) or one.task.kind != "binary":
            continue
        calls = {
            reader: [by_patient.get(patient, math.nan) for patient in one.predictions.patients]
            for reader, by_patient in calls_by_reader.items()
        }
        model = (one.predictions.probabilities[:, 1] > one.thresholds).astype(int)
        compared[run] = agreement.compare_readers(one.predictions.truth, calls, model)
    return compared


def _read_calls(path: Path) -> dict[str, dict[str, float]]:
    """Read the calls 0 or 1 by reader and patient: a column `patient` and one column for each reader, or blank."""
    try:
        rows = read_csv(path, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"{path}: the readers' table cannot be read: {error}.") from error
    names = list(rows[0]) if rows else []
    if "patient" not in names or len(names) < 2:
        raise CohortError(
            f"{path}: the readers' table has the columns {names}. Expected the column patient and one for each reader."
        )
    calls: dict[str, dict[str, float]] = {name: {} for name in names if name != "patient"}
    for number, row in enumerate(rows, start=2):
        for reader, by_patient in calls.items():
            cell = (row[reader] or "").strip()
            if cell not in ("", "0", "1"):
                raise CohortError(f"{path}: row {number}: Invalid call {cell!r} of {reader}. Expected 0, 1 or blank.")
            if cell:
                by_patient[row["patient"].strip()] = float(cell)
    return calls


def _mistakes(run: str, one: TaskAnalysis) -> Iterator[Row]:
    """Yield the wrongly predicted patients with the lowest probability of the true label."""
    truth, p = one.predictions.truth, one.predictions.probabilities
    p_true = p[np.arange(len(truth)), truth]
    wrong = np.flatnonzero(p_true < p.max(1))
    for index in wrong[np.argsort(p_true[wrong], kind="stable")][:_MAX_MISTAKES]:
        yield {
            "variant": run,
            "patient": one.predictions.patients[index],
            "fold": int(one.predictions.fold[index]),
            "truth": one.task.labels[int(truth[index])],
            "predicted": one.task.labels[int(p[index].argmax())],
            "probability": float(p[index].max()),
        }
