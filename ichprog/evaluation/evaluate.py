"""How good a model is on a cohort, where nobody is scored by a network that has seen them, as far as one can know."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ichprog import hub
from ichprog import scan as scan_package
from ichprog.cohort import Cohort, Patient
from ichprog.errors import CohortError, ScanError
from ichprog.evaluation.leakage import LeakageReport, guard
from ichprog.evaluation.predictions import Predictions, TaskPredictions
from ichprog.io import write_json
from ichprog.metrics import compute_with_intervals
from ichprog.metrics.calibration import calibration_curve
from ichprog.model import Model
from ichprog.reporting import tables
from ichprog.results import Prediction
from ichprog.runtime import resolve_runtime
from ichprog.spec import ModelSpec, Task

SEVERAL = -1  # the fold of an answer that is the mean of several

Figures = dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True)
class Evaluation:
    """What a model says of a cohort, and how good that is.

    Attributes:
        model: The model.
        cohort: Where the patients came from.
        predictions: The answers in "test", of a variant that is called as the model is; their fold is `SEVERAL` where
            it is the mean of several.
        metrics: By task and figure the `value`, `low` and `high`.
        calibration: By task and event, such as a label or a later one, the arrays of `measure.calibration_curve`.
        guard: Which folds were asked about whom, and why.
        left_out: The patients whom no fold here may be asked about.
        unlabelled: The patients of whom nothing is known that a task asks for.
        unscored: The tasks that nobody is known of, each with the column that was looked for.
        failed: The scans that could not be read, each with `patient`, `scan`, `code` and `message`.
        warnings: The doubts about scans, by patient.
        about: How the figures were made, as plain data.
    """

    model: ModelSpec
    cohort: str
    predictions: Predictions
    metrics: Figures
    calibration: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
    guard: LeakageReport
    left_out: tuple[str, ...]
    unlabelled: tuple[str, ...]
    unscored: Mapping[str, str]
    failed: tuple[Mapping[str, Any], ...]
    warnings: Mapping[str, list[dict[str, Any]]]
    about: Mapping[str, Any]

    def answers(self, task: str) -> TaskPredictions:
        """The answers to a task of those whose truth is known."""
        return self.predictions.entries[self.model.name, task, "test"].labelled()

    @property
    def counts(self) -> dict[str, int]:
        """How many patients there are, and what became of them."""
        n = len(self.guard.folds)
        lost = {"left_out": self.left_out, "unlabelled": self.unlabelled, "failed": self.failed}
        counted = {name: len(those) for name, those in lost.items()}
        return {"patients": n, "scored": n - sum(counted.values()), **counted}

    def to_dict(self) -> dict[str, Any]:
        """All but the predictions as plain data, ready for JSON."""
        return {
            "model": self.model.name,
            "cohort": self.cohort,
            **self.counts,
            "leak": self.guard.sentence,
            "guard": self.guard.by,
            "metrics": self.metrics,
            "truth": {name: self._truth(self.model.task(name)) for name in self.metrics},
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
            **self.about,
            "notice": self.model.notice,
        }

    def write(self, folder: str | Path) -> Path:
        """Writes everything into a folder, each file whole or not at all.

        `predictions.csv` and `metrics.json` are as a study's; `evaluation.json` is `to_dict`; `tables` has the figures
        and calibration curves as CSV, Markdown and LaTeX; `calibration.svg` and `.png` show the curves.

        Args:
            folder: The folder; it is made.

        Returns:
            The folder.

        Raises:
            PluginError: matplotlib is not installed; the figure alone is missing then.
        """
        from ichprog.reporting import figures

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self.predictions.write(place / "predictions.csv")
        for name, data in (("metrics", {self.model.name: self.metrics}), ("evaluation", self.to_dict())):
            write_json(place / f"{name}.json", data)
        caption = f"{self.model.name} on {self.counts['scored']} patients of {self.cohort}. {self.guard.sentence}"
        caption += f" {self.about['intervals']}. {self.model.notice}"
        columns = {"task": "task", "n": "patients", "metric": "figure", "value": "value"}
        tables.write(self._rows(), columns, place / "tables", "metrics", caption)
        binned = ("task", "event", "predicted", "observed", "low", "high", "count")
        tables.write(self._bins(), binned, place / "tables", "calibration", caption)
        if self.calibration:
            figures.save(figures.calibration(self.calibration), place, "calibration")
        return place

    def _truth(self, task: Task) -> dict[str, int]:
        counts = np.bincount(self.answers(task.name).truth, minlength=len(task.labels))
        return dict(zip(task.labels, counts.tolist(), strict=True))

    def _rows(self) -> Iterator[dict[str, Any]]:
        for task, figures in self.metrics.items():
            n = len(self.answers(task))
            for name, value in figures.items():
                yield {"task": task, "n": n, "metric": tables.words(name), "value": value}

    def _bins(self) -> Iterator[dict[str, Any]]:
        for task, curves in self.calibration.items():
            for event, curve in curves.items():
                for values in zip(*curve.values(), strict=True):
                    numbers = (value.item() for value in values)
                    yield {"task": task, "event": event, **dict(zip(curve, numbers, strict=True))}


def evaluate(
    name: str,
    cohort: Cohort | str | Path,
    *,
    brain: scan_package.BrainMode = "auto",
    draws: int = 1000,
    seed: int = 0,
    method: Literal["percentile", "bca"] = "percentile",
    fold: int | None = None,
    device: str = "auto",
    runtime: str = "auto",
    precision: str = "float32",
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Scores a model on a cohort.

    A patient is scored by folds that have not seen them, as `leak.guard` finds out. Thresholds are the model's own:
    nothing is chosen by these patients. A scan that cannot be read is recorded, and its patient is in no figure.

    Args:
        name: A name that `load_model` takes.
        cohort: The patients, or their table. A task whose column the table lacks is not scored.
        brain: "auto" extracts the brain where a skull is seen, "extract" always, "given" never.
        draws: Bootstrap samples, over patients, for intervals of 95 %.
        seed: Where their chance comes from.
        method: Of the intervals: "percentile" or "bca".
        fold: This fold alone, and the patients whom it may be asked about; all there are where not given.
        device: As of `load_model`.
        runtime: As of `load_model`.
        precision: As of `load_model`.
        cache_dir: As of `load_model`.
        offline: As of `load_model`.
        progress: Whether a bar is shown on standard error.

    Raises:
        CohortError: The table is wrong, has the column of no task, or has nobody whom the model may be asked about.
        RunError: The model's run.json cannot be read.
        UnknownNameError, SpecError, WeightsError, PluginError: As of `load_model`.
    """
    scan_package.validate_brain_mode(brain)
    table = cohort if isinstance(cohort, Cohort) else Cohort.read(cohort, scans=False)
    spec, weights = hub.fetch(name, fold=fold, cache_dir=cache_dir, offline=offline)
    labels, unscored = _labels(spec, table)
    guarded = guard(name, spec, weights, table)
    known = [any(values[place] >= 0 for values in labels.values()) for place in range(len(table))]
    left_out = [place for place, folds in enumerate(guarded.folds) if not folds]
    unlabelled = [place for place, folds in enumerate(guarded.folds) if folds and not known[place]]
    asked: dict[tuple[int, ...], list[int]] = {}
    for place, folds in enumerate(guarded.folds):
        if folds and known[place]:
            asked.setdefault(folds, []).append(place)
    if not asked:
        raise CohortError(
            f"{table.source}: nobody is left to be scored: {len(left_out)} patients may not be, {len(unlabelled)} have "
            f"no label of {spec.name}. {guarded.sentence}"
        )
    found: dict[int, tuple[Prediction, int]] = {}
    failed: dict[int, Mapping[str, Any]] = {}
    warnings: dict[int, list[dict[str, Any]]] = {}
    provenance: dict[str, Any] = {}
    used: dict[int, Any] = {}
    choice, cache = resolve_runtime(runtime, device, precision), hub.cache_folder(cache_dir)
    with _bar(sum(map(len, asked.values())), progress) as bar:
        for folds, places in asked.items():
            model = Model.build(spec, [file for file in weights if file.fold in folds], choice, cache)
            provenance = model.provenance()
            used |= {each["fold"]: each for each in provenance["weights"]}
            results = model.predict_iter([table.patients[place].scan for place in places], brain=brain)
            for place, (prediction, examined) in zip(places, results, strict=True):
                bar.update()
                if isinstance(examined, ScanError):
                    patient = table.patients[place].name
                    failed[place] = {"patient": patient, "scan": prediction.scan, **(prediction.error or {})}
                    continue
                found[place] = prediction, folds[0] if len(folds) == 1 else SEVERAL
                if examined.warnings:
                    warnings[place] = [warning.to_dict() for warning in examined.warnings]
    answers = {task: _answers(spec.task(task), table, truth, found) for task, truth in labels.items()}
    figures: Figures = {}
    curves: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for task, said in answers.items():
        if len(those := said.labelled()):
            figures[task] = compute_with_intervals(
                those.truth, those.probabilities, kind=spec.task(task).kind,
                thresholds=spec.task(task).decision_threshold, n_bootstrap=draws, seed=seed, ci_method=method,
            )  # fmt: skip
            curves[task] = _calibration(spec.task(task), those)
    names = [patient.name for patient in table.patients]
    return Evaluation(
        spec,
        table.source,
        Predictions({(spec.name, task, "test"): said for task, said in answers.items() if len(said)}),
        figures,
        curves,
        guarded,
        tuple(names[place] for place in left_out),
        tuple(names[place] for place in unlabelled),
        unscored,
        tuple(failed[place] for place in sorted(failed)),
        {names[place]: warnings[place] for place in sorted(warnings)},
        {
            "simulated": any(_simulated(patient) for patient in table.patients),
            "intervals": f"95 % intervals: {method} bootstrap over patients, {draws} draws, seed {seed}",
            "provenance": provenance | {"weights": [used[fold] for fold in sorted(used)]},
        },
    )


def _labels(spec: ModelSpec, cohort: Cohort) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The true labels `(N,)` of each task that somebody is known of, and the column of each other task."""
    there = set().union(*(patient.columns for patient in cohort.patients))
    labels = {task.name: cohort.labels(task) for task in spec.tasks if task.target.column in there}
    labels = {task: values for task, values in labels.items() if (values >= 0).any()}
    columns = {task.name: task.target.column for task in spec.tasks}
    if not labels:
        raise CohortError(
            f"{cohort.source}: no patient has a label that {spec.name} could be scored by. Fill one of the columns "
            f"{', '.join(dict.fromkeys(columns.values()))}."
        )
    return labels, {task: column for task, column in columns.items() if task not in labels}


def _answers(
    task: Task, cohort: Cohort, truth: np.ndarray, found: Mapping[int, tuple[Prediction, int]]
) -> TaskPredictions:
    """The answers to one task in the cohort's order."""
    places = sorted(found)
    said = [[found[place][0][task.name].probabilities[label] for label in task.labels] for place in places]
    return TaskPredictions(
        tuple(cohort.patients[place].name for place in places),
        np.array([found[place][1] for place in places], np.int64),
        truth[places],
        np.array(said, np.float64).reshape(-1, len(task.labels)),
    )


def _calibration(task: Task, answers: TaskPredictions) -> dict[str, dict[str, np.ndarray]]:
    """A curve for each event that the answers give a probability of."""
    p, truth, labels = answers.probabilities, answers.truth, task.labels
    if task.threshold is None and len(labels) > 2:
        return {label: calibration_curve(truth == k, p[:, k]) for k, label in enumerate(labels)}
    later = {label: "" if k == len(labels) - 1 else " or later" for k, label in enumerate(labels)}
    return {
        label + later[label]: calibration_curve(truth >= k, np.clip(p[:, k:].sum(axis=1), 0, 1))
        for k, label in enumerate(labels)
        if k
    }


def _simulated(patient: Patient) -> bool:
    """Whether a patient's scan lies where `ichprog simulate` writes scans."""
    return (patient.scan.parent.parent / "simulation.json").is_file()


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="scan", file=sys.stderr, disable=not shown)
