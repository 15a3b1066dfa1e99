"""What a study found: every figure from `predictions.csv`, how sure it is, and what it is held against.

Nothing is tuned on the patients it is told of: thresholds, recalibration and conformal limits come from the validation
part of the fold that answers, and are only applied to its test part.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ichprog import metrics as metrics_package
from ichprog.cohort import Cohort
from ichprog.errors import CohortError
from ichprog.evaluation.predictions import Predictions, TaskPredictions, align
from ichprog.metrics import agreement, calibration, comparisons, conformal, discrimination, subgroups
from ichprog.metrics.bootstrap import finite
from ichprog.spec import Task
from ichprog.study.config import Study

Row = dict[str, Any]
Interval = Mapping[str, float | None]
Metrics = dict[str, dict[str, dict[str, Interval]]]  # by run, task and metric

_MISTAKES = 5  # of a variant that are told


@dataclass(frozen=True)
class TaskAnalysis:
    """What one variant or baseline says of one task's test patients, with what validation patients make of it.

    Attributes:
        task: The task.
        predictions: Test predictions of the `N` labelled patients.
        thresholds: Decision threshold of each patient `(N,)`. For two labels it is chosen on the validation part of the
            fold that predicts; for more labels it is the task's own.
        recalibrated: Predictions of two labels after recalibration on that validation part; otherwise None.
        sets: `(N, K)` bool, the conformal sets.
    """

    task: Task
    predictions: TaskPredictions
    thresholds: np.ndarray
    recalibrated: TaskPredictions | None
    sets: np.ndarray


@dataclass(frozen=True)
class StudyResults:
    """All that a study found.

    Attributes:
        judged: By run, a variant or baseline or a variant at a size, and task.
        metrics: By run, task and metric, each `{"value", "low", "high"}`.
        per_fold: By run, task and metric, a value a fold.
        comparisons: Rows: a run less its reference, a metric each, with p adjusted over all runs of that metric.
        correlations: Rows: columns with the outcome that folds are split by.
        subgroups: Rows: groups of patients, by run.
        readers: By variant, what `comparisons.readers` says.
        mistakes: Rows: the most confident mistakes of each run.
    """

    judged: Mapping[str, Mapping[str, TaskAnalysis]]
    metrics: Metrics
    per_fold: Mapping[str, Mapping[str, Mapping[str, list[float | None]]]]
    comparisons: list[Row]
    correlations: list[Row]
    subgroups: list[Row]
    readers: Mapping[str, Any]
    mistakes: list[Row]


def judge(study: Study, cohort: Cohort, predictions: Predictions) -> StudyResults:
    """Judges everything that has been predicted.

    Args:
        study: The study.
        cohort: Its patients.
        predictions: What was said of them.

    Raises:
        CohortError: The readers' table cannot be used, or a column is not of numbers where cuts are given.
        UnknownNameError: The cohort has no such column.
    """
    judged = {
        run: {name: _judged(study, predictions, run, name) for name in predictions.tasks(run)}
        for run in predictions.variants
    }
    main = study.split_by
    return StudyResults(
        judged,
        {run: {name: _metrics(one, study) for name, one in tasks.items()} for run, tasks in judged.items()},
        {run: {name: _per_fold(one, study.folds) for name, one in tasks.items()} for run, tasks in judged.items()},
        _comparisons(study, judged),
        _correlations(study, cohort),
        _subgroups(study, cohort, judged),
        _readers(study, {run: tasks[main] for run, tasks in judged.items() if main in tasks}),
        [row for run, tasks in judged.items() if main in tasks for row in _mistakes(run, tasks[main])],
    )


def task_of(study: Study, run: str, name: str) -> Task:
    """A task as a variant or baseline of a study understands it.

    Args:
        study: The study.
        run: The variant, perhaps at a size, or the baseline.
        name: The task.
    """
    return study.runs[run][0].spec.task(name) if run in study.runs else study.task(name)


def curve(study: Study, metrics: Metrics, trained_on: int, metric: str = "auroc") -> dict[str, dict[int, Interval]]:
    """The learning curve of the task that folds are split by: by variant and number of patients, a metric.

    Args:
        study: The study.
        metrics: Those of its `StudyResults`.
        trained_on: How many patients a fold trains on where all do.
        metric: Which one.
    """
    found: dict[str, dict[int, Interval]] = {}
    for name in study.sized:
        for size in (*study.sizes, None):
            run = name if size is None else f"{name}@{size}"
            if study.split_by in metrics.get(run, {}):
                found.setdefault(name, {})[size or trained_on] = metrics[run][study.split_by][metric]
    return found


def _judged(study: Study, predictions: Predictions, run: str, name: str) -> TaskAnalysis:
    task = task_of(study, run, name)
    test = predictions.entries[run, name, "test"].labelled()
    validation = predictions.entries[run, name, "validation"].labelled()
    binary = task.kind == "binary"
    thresholds, sets = np.full(len(test), task.decision_threshold), np.ones(test.probabilities.shape, bool)
    recalibrated = test.probabilities.copy()
    for fold in np.unique(test.fold):
        own, held_out = test.fold == fold, validation.select(validation.fold == fold)
        sets[own] = conformal.conformal_sets(
            held_out.truth, held_out.probabilities, test.probabilities[own], coverage=study.coverage
        )
        if binary:
            thresholds[own] = discrimination.choose_threshold(held_out.truth, held_out.probabilities[:, 1])
            line = calibration.fit_recalibration(held_out.truth, held_out.probabilities[:, 1])
            p = calibration.recalibrate(test.probabilities[own, 1], *line)
            recalibrated[own] = np.column_stack([1 - p, p])
    after = TaskPredictions(test.patients, test.fold, test.truth, recalibrated) if binary else None
    return TaskAnalysis(task, test, thresholds, after, sets)


def _metrics(one: TaskAnalysis, study: Study) -> dict[str, Interval]:
    kind, options = one.task.kind, dict[str, Any](n_bootstrap=study.draws, seed=study.seed)
    found: dict[str, Interval] = {**_with_intervals(one, study)}
    if one.recalibrated is not None:
        after = metrics_package.compute_with_intervals(
            one.recalibrated.truth, one.recalibrated.probabilities, kind=kind, **options
        )
        found |= {
            each.name + metrics_package.RECALIBRATED: after[each.name]
            for each in metrics_package.registered(kind)
            if each.recalibrated
        }
    return found | conformal.set_metrics(one.sets, one.predictions.truth, **options)


def _with_intervals(one: TaskAnalysis, study: Study, own: Any = slice(None)) -> dict[str, dict[str, float | None]]:
    """Return every metric of the analysed patients, or of some of these patients."""
    return metrics_package.compute_with_intervals(
        one.predictions.truth[own], one.predictions.probabilities[own], kind=one.task.kind,
        thresholds=one.thresholds[own], n_bootstrap=study.draws, seed=study.seed,
    )  # fmt: skip


def _per_fold(one: TaskAnalysis, folds: int) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for fold in range(folds):
        own = one.predictions.fold == fold
        limits = one.thresholds[own]
        figures = metrics_package.compute(
            one.predictions.truth[own], one.predictions.probabilities[own], kind=one.task.kind, thresholds=limits
        )
        if one.task.kind == "binary":
            figures["threshold"] = float(limits[0]) if len(limits) else math.nan
        for name, value in figures.items():
            found.setdefault(name, []).append(finite(value))
    return found


def _comparisons(study: Study, judged: Mapping[str, Mapping[str, TaskAnalysis]]) -> list[Row]:
    """Each run against its reference: the first variant with this task alone, or else the first with it, at its size.

    Holm's adjustment is over all runs that one metric of one task is compared of, those at a size apart.
    """
    families: dict[tuple[str, tuple[str, ...], str, bool], list[Row]] = {}
    for run, tasks in judged.items():
        size = study.runs[run][1] if run in study.runs else None
        for name, one in tasks.items():
            reference = _reference(study, one.task, size, judged)
            if reference in (None, run):
                continue
            other = judged[str(reference)][name]
            first, second = align(one.predictions, other.predictions)
            figures = comparisons.compare(
                one.predictions.truth[first], one.predictions.probabilities[first],
                other.predictions.probabilities[second], kind=one.task.kind,
                thresholds=(one.thresholds[first], other.thresholds[second]), n_bootstrap=study.draws, seed=study.seed,
            )  # fmt: skip
            for each in metrics_package.registered(one.task.kind):
                if each.compared:
                    key = (name, one.task.labels, each.name, size is not None)
                    row = {"task": name, "metric": each.name, "variant": run, "reference": reference}
                    families.setdefault(key, []).append(row | figures[each.name])
    rows = []
    for family in families.values():
        known = [math.nan if row["p"] is None else row["p"] for row in family]
        rows += [row | {"p_holm": finite(p)} for row, p in zip(family, comparisons.holm(known), strict=True)]
    return rows


def _reference(study: Study, task: Task, size: int | None, judged: Mapping[str, Any]) -> str | None:
    has = [v for v in study.variants if any((t.name, t.labels) == (task.name, task.labels) for t in v.spec.tasks)]
    alone = [variant for variant in has if len(variant.spec.tasks) == 1]
    for variant in [*alone, *has]:
        run = variant.name if size is None else f"{variant.name}@{size}"
        if run in judged:
            return run
    return None


def _correlations(study: Study, cohort: Cohort) -> list[Row]:
    labels = cohort.labels(study.task(study.split_by))
    outcome = np.where(labels < 0, np.nan, labels)
    return comparisons.correlations({name: cohort.numbers(name) for name in study.correlations}, outcome)


def groups(cohort: Cohort, column: str, cuts: Sequence[float]) -> dict[str, np.ndarray]:
    """Groups of patients by a column, `(N,)` bool by name; blanks are in none.

    Args:
        cohort: The patients.
        column: The column.
        cuts: Numbers where a group ends and the next begins; a number that is a cut begins one. Without any, each
            value is a group, or each third where numbers take many values.

    Raises:
        UnknownNameError: The cohort has no such column.
        CohortError: Cuts are given and the column is not of numbers.
    """
    if not cuts:
        return subgroups.by_value([patient.columns.get(column, "") for patient in cohort.patients])
    return subgroups.by_edges(cohort.numbers(column), cuts)


def _subgroups(study: Study, cohort: Cohort, judged: Mapping[str, Mapping[str, TaskAnalysis]]) -> list[Row]:
    places = {patient.name: place for place, patient in enumerate(cohort.patients)}
    rows = []
    for column, cuts in study.subgroups.items():
        for group, members in groups(cohort, column, cuts).items():
            for run, tasks in judged.items():
                if study.split_by not in tasks or (run in study.runs and study.runs[run][1] is not None):
                    continue
                one = tasks[study.split_by]
                own = np.array([members[places[name]] for name in one.predictions.patients], bool)
                figures = _with_intervals(one, study, own)
                about = {"column": column, "group": group, "variant": run, "patients": int(own.sum())}
                about["with_last_label"] = int((one.predictions.truth[own] == len(one.task.labels) - 1).sum())
                names = [each.name for each in metrics_package.registered(one.task.kind) if each.in_subgroups]
                rows.append(about | {name: figures[name] for name in names})
    return rows


def _readers(study: Study, judged: Mapping[str, TaskAnalysis]) -> dict[str, Any]:
    """Each trained variant beside the readers, at its thresholds."""
    if study.readers is None:
        return {}
    table = _calls(study.readers)
    found = {}
    for run, one in judged.items():
        if run not in study.runs or study.runs[run][1] is not None or one.task.kind != "binary":
            continue
        calls = {
            reader: [said.get(patient, math.nan) for patient in one.predictions.patients]
            for reader, said in table.items()
        }
        model = (one.predictions.probabilities[:, 1] > one.thresholds).astype(int)
        found[run] = agreement.compare_readers(one.predictions.truth, calls, model)
    return found


def _calls(path: Path) -> dict[str, dict[str, float]]:
    """By reader and patient, 0 or 1; a table with the column `patient` and one for each reader; blank is not read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"{path}: the readers' table cannot be read: {error}") from error
    names = list(rows[0]) if rows else []
    if "patient" not in names or len(names) < 2:
        raise CohortError(f"{path}: the readers' table needs the column patient and one for each reader; has {names}")
    found: dict[str, dict[str, float]] = {name: {} for name in names if name != "patient"}
    for number, row in enumerate(rows, start=2):
        for reader, said in found.items():
            cell = (row[reader] or "").strip()
            if cell not in ("", "0", "1"):
                raise CohortError(f"{path}: row {number}: reader {reader} says {cell}; 0 and 1 are allowed, or blank")
            if cell:
                said[row["patient"].strip()] = float(cell)
    return found


def _mistakes(run: str, one: TaskAnalysis) -> Iterator[Row]:
    """The patients whose true label was thought least probable, among those who are told wrong."""
    truth, p = one.predictions.truth, one.predictions.probabilities
    of_true = p[np.arange(len(truth)), truth]
    wrong = np.flatnonzero(of_true < p.max(1))
    for place in wrong[np.argsort(of_true[wrong], kind="stable")][:_MISTAKES]:
        yield {
            "variant": run,
            "patient": one.predictions.patients[place],
            "fold": int(one.predictions.fold[place]),
            "truth": one.task.labels[int(truth[place])],
            "told": one.task.labels[int(p[place].argmax())],
            "probability": float(p[place].max()),
        }
