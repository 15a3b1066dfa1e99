"""Leakage control: exclude folds that may have been trained on a patient.

A run of `train` lists its patients by name. For some released weights the training cohort and its folds are known
(`released.toml`). For other weights nothing is known, and the report says so.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ichprog.cohort import Cohort
from ichprog.errors import RunError, missing_extra
from ichprog.hub import WeightFile
from ichprog.spec import ModelSpec

_UNKNOWN_NAMES = "ichprog cannot know whether the run contains any of them under another name."


@dataclass(frozen=True)
class LeakageReport:
    """The folds that may predict each patient of a cohort.

    Attributes:
        source: Source of the knowledge: the "run" of the model, the folds of "released" weights, or "nothing".
        folds: For each of N patients the folds whose mean predicts the patient. Empty if every fold of the model may
            have been trained on the patient.
        sentence: What is known and what is not, for readers of the metrics.
    """

    source: Literal["run", "released", "nothing"]
    folds: tuple[tuple[int, ...], ...]
    sentence: str


def check_leakage(spec: ModelSpec, weights: Sequence[WeightFile], cohort: Cohort) -> LeakageReport:
    """Find the folds of a model that were not trained on each patient.

    A patient belongs to the model's run if the names are equal, or differ only by the prefix that `Cohort.join` adds.
    Such a patient is predicted only by the fold that tested this name. Nothing leaks, even if the name belongs to
    another person. A patient of the run that no fold of the model tested is predicted by none. A patient of the run
    under a different name is not found.

    Args:
        spec: The specification of the model.
        weights: Weight file of each fold.
        cohort: The patients.

    Raises:
        RunError: The run.json in the folder of the weights cannot be read, or describes other weights.
        IchprogError: The folds of released weights need scikit-learn, which is not installed.

    Examples:
        ```python
        model = ichprog.load_model("local-dir:run")
        report = check_leakage(model.spec, model.weights, Cohort.read("cohort.csv"))
        print(report.sentence)
        ```
    """
    available = tuple(file.fold for file in weights)
    record = weights[0].path.parent / "run.json"
    if record.is_file():
        return _check_run(_read_record(record, weights), spec, available, cohort)
    released = [each for each in _load_released() if spec.weights.repo in each["repositories"]]
    for each in released:
        if _is_training_cohort(each, cohort):
            return _check_released(each, available, cohort)
    known = "".join(f" These weights were trained on {each['cohort']}." for each in released)
    if released:
        known += " This table is not recognised as that cohort. A table with some of its patients is never recognised."
    return LeakageReport(
        "nothing",
        (available,) * len(cohort),
        f"ichprog cannot know whether the model was trained on these patients.{known} If it was, the metrics are too "
        "good.",
    )


def _check_run(run: Mapping[str, Any], spec: ModelSpec, available: tuple[int, ...], cohort: Cohort) -> LeakageReport:
    tested: dict[str, set[int]] = {}
    for fold, parts in run["membership"].items():
        for part, patients in parts.items():
            for patient in patients:
                tested.setdefault(patient, set()).update([int(fold)] if part == "test" else [])
    folds, members = [], 0
    for matches in _match_names([patient.name for patient in cohort.patients], tested):
        members += bool(matches)
        unseen = set(available).intersection(*(tested[name] for name in matches))
        allowed = tuple(fold for fold in available if fold in unseen)
        folds.append(allowed[:1] if matches else allowed)
    trained_here = _is_same_table(run, spec, cohort)
    return LeakageReport("run", tuple(folds), _describe_run(folds, members, available, trained_here=trained_here))


def _describe_run(
    folds: Sequence[tuple[int, ...]], members: int, available: tuple[int, ...], *, trained_here: bool
) -> str:
    n, mean = len(folds), f"fold {available[0]}" if len(available) == 1 else f"the mean of its {len(available)} folds"
    if trained_here:
        sentences = ["The model was trained on this table: names and labels are equal."]
    elif members:
        sentences = [f"{members} of {n} patients have names of the model's run, which used another table."]
        sentences.append("They are taken for its patients by name alone.")
    else:
        sentences = [f"None of the {n} patients has a name of the model's run. They are scored by {mean}."]
        sentences.append(_UNKNOWN_NAMES)
    if members:
        sentences.append("Each is scored by the fold that tested it, which was not trained on it.")
    if excluded := folds.count(()):
        sentences.append(f"{excluded} are left out: no fold of the model tested them.")
    if 0 < members < n:
        sentences.append(f"The {n - members} others are scored by {mean}. {_UNKNOWN_NAMES}")
    return " ".join(sentences)


def _check_released(released: Mapping[str, Any], available: tuple[int, ...], cohort: Cohort) -> LeakageReport:
    from ichprog.train import folds as folds_module

    labels = cohort.numbers(released["column"]).astype(np.int64)
    try:
        parts = folds_module.split(labels, released["folds"], seed=released["seed"])
    except ImportError as error:
        raise missing_extra("study", "scikit-learn", f"Leakage control of {released['cohort']}") from error
    tested = {int(index): fold for fold, part in enumerate(parts) for index in part.test}
    folds = tuple((tested[index],) if tested[index] in available else () for index in range(len(cohort)))
    counts = " and ".join(f"{count} of {value}" for value, count in released["counts"].items())
    return LeakageReport(
        "released",
        folds,
        f"This table is taken for {released['cohort']}, in the order of its clinical table: it has {len(cohort)} "
        f"patients, {counts} in column {released['column']}. Each is scored by the released fold that tested it, which "
        f"was not trained on it. {folds.count(())} are left out: no fold of the model tested them.",
    )


def _read_record(path: Path, weights: Sequence[WeightFile]) -> Mapping[str, Any]:
    """Return the record of a run after a check that it describes these weights."""
    hint = "The file lists the patients of the run. Restore the folder to its state after training."
    try:
        run: dict[str, Any] = json.loads(path.read_text("utf-8"))
        sums = {int(fold): result["sha256"] for fold, result in run["results"].items()}
        is_complete = all(isinstance(run[key], dict) for key in ("membership", "cohort"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read as the record of a run ({error}). {hint}") from error
    others = [file.fold for file in weights if sums.get(file.fold) != file.sha256]
    if others or not is_complete:
        problem = f"it describes other weights of fold {others[0]}" if others else "it is incomplete"
        raise RunError(f"{path}: {problem}. {hint}")
    return run


def _is_same_table(run: Mapping[str, Any], spec: ModelSpec, cohort: Cohort) -> bool:
    """Return whether the run used this table, by names and labels in their order."""
    from ichprog.train.run_dir import digest

    if any(task.target.column not in cohort.patients[0].columns for task in spec.tasks):
        return False
    labels = {task.name: cohort.labels(task).tolist() for task in spec.tasks}
    return bool(digest([[p.name for p in cohort.patients], labels]) == run["cohort"].get("sha256"))


def _match_names(names: Sequence[str], members: Collection[str]) -> Iterator[tuple[str, ...]]:
    """Yield for each name the members it may refer to: the same name, or names that differ by a prefix."""
    by_tail: dict[str, list[str]] = {}
    for member in members:
        for tail in _tails(member):
            by_tail.setdefault(tail, []).append(member)
    for name in names:
        longer = by_tail.get(name, [])
        yield (name,) if name in members else (*longer, *(tail for tail in _tails(name) if tail in members))


def _tails(name: str) -> list[str]:
    """Return the parts of a name after each underscore."""
    parts = name.split("_")
    return ["_".join(parts[index:]) for index in range(1, len(parts))]


def _load_released() -> list[dict[str, Any]]:
    text = files("ichprog.evaluation").joinpath("released.toml").read_text("utf-8")
    released: list[dict[str, Any]] = tomllib.loads(text)["released"]
    return released


def _is_training_cohort(released: Mapping[str, Any], cohort: Cohort) -> bool:
    """Return whether a cohort has as many patients of each value as the training cohort of released weights."""
    column = released["column"]
    if column not in cohort.patients[0].columns:
        return False
    return Counter(f"{value:g}" for value in cohort.numbers(column)) == Counter(released["counts"])
