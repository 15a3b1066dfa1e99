"""Evaluate a model on a cohort with leakage control."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ichprog import metrics as metrics_package
from ichprog.cohort import Cohort, Origin
from ichprog.errors import CohortError, InvalidValueError, missing_extra
from ichprog.evaluation import validation
from ichprog.evaluation.cohort_predictions import Plan, open_journal, plan_patients, predict_patients, tabulate
from ichprog.evaluation.leakage import LeakageReport
from ichprog.evaluation.predictions import Predictions, TaskPredictions
from ichprog.evaluation.validation import EventValidation, ModelComparison
from ichprog.io import remove_partial_files, write_json
from ichprog.metrics.calibration import calibration_curve
from ichprog.model import Model, load_model, resolve_brain
from ichprog.spec import ModelSpec, Task

if TYPE_CHECKING:
    from ichprog.scan.brain import Brain

_progress = logging.getLogger("ichprog.progress")
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
        events: By task the figures of each event: local recalibration, decision curve and operating points.
        subgroups: Rows: metrics of a group of patients, by task and column.
        comparison: A second model on the same patients, or None.
        leakage: The folds that may predict each patient, and why.
        left_out: Names of the patients that no fold of the model may predict.
        unlabelled: Names of the patients without a label of any task.
        missing_labels: Number of predicted patients without a label, by task.
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
    events: Mapping[str, tuple[EventValidation, ...]]
    subgroups: Sequence[Mapping[str, Any]]
    comparison: ModelComparison | None
    leakage: LeakageReport
    left_out: tuple[str, ...]
    unlabelled: tuple[str, ...]
    missing_labels: Mapping[str, int]
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
            "label_counts": {name: self.count_labels(name) for name in self.metrics},
            "labels_missing": dict(self.missing_labels),
            "thresholds": {name: self.model.task(name).threshold for name in self.metrics},
            "calibration": {
                task: {
                    event: {name: values.tolist() for name, values in curve.items()} for event, curve in curves.items()
                }
                for task, curves in self.calibration.items()
            },
            "events": {task: {each.event: each.to_dict() for each in events} for task, events in self.events.items()},
            "subgroups": [dict(row) for row in self.subgroups],
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
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

    def count_labels(self, task: str) -> dict[str, int]:
        """Return the number of predicted patients with each label.

        Args:
            task: Name of the task.
        """
        labels = self.model.task(task).labels
        counts = np.bincount(self.labelled(task).truth, minlength=len(labels))
        return dict(zip(labels, counts.tolist(), strict=True))

    def summary(self, *, min_count: int = 5) -> dict[str, Any]:
        """Return counts and sums of many patients, which `pool_summaries` combines with those of other hospitals.

        Args:
            min_count: Smallest number of patients behind any number.

        Raises:
            InvalidValueError: The smallest number is below 3.
        """
        from ichprog.evaluation.summary import build_summary

        return build_summary(
            self.model,
            self.provenance["weights"],
            self.events,
            simulated=self.origin.simulated > 0,
            min_count=min_count,
        )

    def write(self, folder: str | Path) -> Path:
        """Write the evaluation into a folder. An interruption leaves no partial file.

        `predictions.csv` and `metrics.json` have the format of a study. `evaluation.json` is `to_dict`. `tables` has
        all tables as CSV, Markdown and LaTeX. `figures` has the figures as SVG and PNG. `report.html` has all of it in
        one file, and `model_card_section.md` the section for a model card.

        Args:
            folder: The folder, created if missing.

        Returns:
            The folder.

        Raises:
            IchprogError: matplotlib or Jinja2 is not installed; only figures and report are missing then.
        """
        from ichprog.evaluation import report

        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for part in (out, out / "tables", out / "figures"):
            remove_partial_files(part)
        self.predictions.write(out / "predictions.csv")
        write_json(out / "metrics.json", {self.model.name: self.metrics})
        write_json(out / "evaluation.json", self.to_dict())
        report.write(out, self.model, self.to_dict(), self.events)
        return out


def evaluate(
    model: Model | str,
    cohort: Cohort | str | Path,
    *,
    brain: "Brain" = "auto",
    n_bootstrap: int = 1000,
    seed: int = 0,
    ci_method: Literal["percentile", "bca"] = "percentile",
    subgroups: Sequence[str] = (),
    at_sensitivity: Sequence[float] = (),
    at_specificity: Sequence[float] = (),
    compare: Model | str | None = None,
    progress: bool = False,
    executor: Executor | None = None,
    workers: int = 1,
    journal: str | Path | None = None,
    resume: bool = False,
) -> Evaluation:
    """Evaluate a model on a cohort.

    A patient is predicted only by folds that were not trained on the patient, as `check_leakage` finds. Thresholds are
    the model's own, except those of `at_sensitivity` and `at_specificity`, which are chosen on the cohort and therefore
    reported cross-fitted as well. A scan that cannot be read is recorded, and its patient is in no metric.

    Args:
        model: A model, or a name that `load_model` takes.
        cohort: The patients, or the path of their table. A task whose column the table lacks is not scored.
        brain: As in `predict`.
        n_bootstrap: Number of bootstrap samples over patients for 95 % intervals.
        seed: Random seed.
        ci_method: "percentile" or "bca".
        subgroups: Columns of the cohort that divide the patients into subgroups, by value or by terciles of numbers.
        at_sensitivity: Sensitivities at which an operating point is reported, each above 0 and at most 1.
        at_specificity: Specificities at which an operating point is reported, each above 0 and at most 1.
        compare: Another model, which is compared on the patients that both may predict.
        progress: Whether to show a progress bar on standard error.
        executor: Executor whose workers predict the scans, such as that of `parallel.cluster`. By default, processes of
            this machine.
        workers: Number of processes if there is no executor. 1 predicts in this process.
        journal: File to which each prediction is written at once. It stays; delete it when it is not needed any more.
        resume: Whether to use the predictions in the journal of an interrupted run.

    Raises:
        CohortError: The table is wrong, has the column of no task, has no patient that the model may predict, or has
            patients of one label only.
        InvalidValueError: A sensitivity or specificity is not above 0 and at most 1, or a model is compared with
            itself.
        SpecError: The models to compare share no task.
        RunError: The model's run.json cannot be read, or the journal cannot be used.
        UnknownNameError, SpecError, WeightsError, PluginError: As in `load_model`.
        IchprogError: The extra `study` is not installed.

    Examples:
        ```python
        from ichprog.evaluation import evaluate

        evaluation = evaluate("compact.prognosis_gcs3_age", "patients/cohort.csv")
        print(evaluation.leakage.sentence)
        print(evaluation.metrics["prognosis"]["auroc"])
        ```
    """
    if find_spec("scipy") is None:
        raise missing_extra("study", "scipy", "Evaluating a model")
    run = {"brain": str(brain)}
    brain = resolve_brain(brain)
    targets = validation.operating_targets(at_sensitivity, at_specificity)
    table = cohort if isinstance(cohort, Cohort) else Cohort.read(cohort, scans=False)
    validation.check_subgroup_columns(table, subgroups)
    loaded = load_model(model) if isinstance(model, str) else model
    other = load_model(compare) if isinstance(compare, str) else compare
    spec = loaded.spec
    plan = plan_patients(loaded, table)
    validation.check_two_labels(spec, table.source, plan.labels, plan.scored)
    other_plan = None if other is None else _plan_comparison(loaded, other, table, plan)

    where: dict[str, Any] = {"progress": progress, "executor": executor, "workers": workers}
    with open_journal(None if journal is None else Path(journal), run, resume=resume) as kept:
        results = predict_patients(loaded, table, plan, brain, journal=kept, **where)
        if other is not None and other_plan is not None:
            other_results = predict_patients(other, table, other_plan, brain, journal=kept, **where)
    predictions = tabulate(spec, table, plan, results)
    labelled = {task: each.labelled() for task, each in predictions.items()}
    labelled = {task: each for task, each in labelled.items() if len(each)}
    entries = {(spec.name, task, "test"): each for task, each in predictions.items() if len(each)}
    comparison = None
    if other is not None and other_plan is not None:
        others = tabulate(other.spec, table, other_plan, other_results)
        name = other.spec.name if other.spec.name != spec.name else f"{spec.name} (second)"
        entries |= {(name, task, "test"): each for task, each in others.items() if len(each)}
        comparison = _compare(loaded, other, name, predictions, others, other_plan, n_bootstrap=n_bootstrap, seed=seed)
    _progress.info("Computing the metrics with %d bootstrap samples.", n_bootstrap)
    metrics = {
        task: metrics_package.compute_with_intervals(
            each.truth, each.probabilities, kind=spec.task(task).kind, thresholds=spec.task(task).decision_threshold,
            n_bootstrap=n_bootstrap, seed=seed, ci_method=ci_method,
        )
        for task, each in labelled.items()
    }  # fmt: skip
    fitted = [task.name for task in spec.tasks if task.combinations]
    if fitted:
        note = (
            f"The combination of {', '.join(fitted)} with clinical values was fitted to patients that ichprog does not "
        )
        note += "know. If they are among these, the metrics are too good."
        plan = replace(plan, leakage=replace(plan.leakage, sentence=f"{plan.leakage.sentence} {note}"))
    names = [patient.name for patient in table.patients]
    used = {fold for index in plan.scored for fold in plan.leakage.folds[index]}
    provenance = loaded.provenance()
    tasks = {task: (spec.task(task), each) for task, each in labelled.items()}
    return Evaluation(
        model=spec,
        cohort=table.source,
        predictions=Predictions(entries),
        metrics=metrics,
        calibration={task: _calibrate(spec.task(task), each) for task, each in labelled.items()},
        events={
            task: validation.validate_events(
                spec.task(task), each, targets=targets, n_bootstrap=n_bootstrap, seed=seed, ci_method=ci_method
            )
            for task, each in labelled.items()
        },
        subgroups=validation.subgroup_rows(
            subgroups, table, tasks, n_bootstrap=n_bootstrap, seed=seed, ci_method=ci_method
        ),
        comparison=comparison,
        leakage=plan.leakage,
        left_out=tuple(names[index] for index in plan.left_out),
        unlabelled=tuple(names[index] for index in plan.unlabelled),
        missing_labels={task: int((each.truth < 0).sum()) for task, each in predictions.items()},
        unscored=plan.unscored,
        failed=tuple(results.failed[index] for index in sorted(results.failed)),
        warnings={names[index]: results.warnings[index] for index in sorted(results.warnings)},
        origin=table.origin,
        intervals=f"95 % intervals: {ci_method} bootstrap over patients, {n_bootstrap} samples, seed {seed}",
        provenance=provenance | {"weights": [each for each in provenance["weights"] if each["fold"] in used]},
    )


def _plan_comparison(first: Model, second: Model, cohort: Cohort, plan: Plan) -> Plan:
    """Return the plan of the second model, for patients and tasks that both models have."""
    if _identity(first) == _identity(second):
        raise InvalidValueError(
            "model to compare", second.spec.name, f"another model than {first.spec.name}",
            "Both have the same weights. Choose other weights, or leave the comparison out.",
        )  # fmt: skip
    shared = [task for task in validation.shared_tasks(first.spec, second.spec) if task in plan.labels]
    other = plan_patients(second, cohort)
    both = [index for index in other.scored if index in set(plan.scored)]
    if not shared or not both:
        raise CohortError(
            f"{cohort.source}: {first.spec.name} and {second.spec.name} cannot be compared. No patient that both may "
            "predict has a label of a task of both. Compare on other patients."
        )
    return replace(other, labels={task: other.labels[task] for task in shared}, scored=both)


def _identity(model: Model) -> tuple[Any, ...]:
    """Return what determines a model's predictions: networks, tasks, preprocessing and weights."""
    files = tuple((file.fold, file.sha256) for file in model.weights)
    return model.spec.backbone, model.spec.tasks, model.spec.input, files


def _compare(
    first: Model,
    second: Model,
    name: str,
    predictions: Mapping[str, TaskPredictions],
    others: Mapping[str, TaskPredictions],
    plan: Plan,
    *,
    n_bootstrap: int,
    seed: int,
) -> ModelComparison:
    tasks = {
        task: (first.spec.task(task), predictions[task], second.spec.task(task), each) for task, each in others.items()
    }
    left_out = [task.name for task in first.spec.tasks if task.name not in tasks]
    return validation.compare_models(name, plan.leakage.sentence, tasks, left_out, n_bootstrap=n_bootstrap, seed=seed)


def _calibrate(task: Task, predictions: TaskPredictions) -> dict[str, dict[str, np.ndarray]]:
    """Return a calibration curve for each event of a task."""
    events = validation.task_events(task, predictions.truth, predictions.probabilities)
    return {event: calibration_curve(truth, p) for event, (truth, p) in events.items()}
