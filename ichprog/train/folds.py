"""Which patients train, choose and test in each fold: the published split, by seed and order."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ichprog.errors import CohortError, missing_extra
from ichprog.spec import ModelSpec, Task

_SHOWN = 10  # problems that are spelt out


class Fold(NamedTuple):
    """Positions of patients in a cohort, each `(n,)`.

    Attributes:
        train: Whose loss is minimised.
        validation: By whom a pass is chosen and probabilities are recalibrated.
        test: Who is predicted in the end, and was used for nothing.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(labels: np.ndarray, n: int, *, seed: int = 1, validation: float = 0.1) -> list[Fold]:
    """The folds of a cohort.

    On the patients whose label is known, in the cohort's order: stratified folds of the shuffled patients, and of each
    fold's other patients a stratified share for validation. Patients without the label train in every fold.

    Args:
        labels: `(N,)` label indices of the first task, -1 where not known.
        n: The number of folds.
        seed: Seed of both.
        validation: Share of the validation part.

    Source: the protocol of Cobo et al. 2024, with scikit-learn's `StratifiedKFold` and `train_test_split`.
    """
    try:
        from sklearn.model_selection import StratifiedKFold, train_test_split
    except ImportError as error:
        raise missing_extra("train", "scikit-learn", "Splitting a cohort into folds") from error

    known, unknown = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    folds = []
    for rest, test in StratifiedKFold(n, shuffle=True, random_state=seed).split(known, labels[known]):
        train, chosen = train_test_split(
            known[rest], test_size=validation, random_state=seed, stratify=labels[known[rest]]
        )
        folds.append(Fold(np.concatenate([train, unknown]), chosen, known[test]))
    return folds


def oversample(part: np.ndarray, labels: np.ndarray, *, seed: int = 2) -> np.ndarray:
    """A training part in which every label of the first task is as frequent as the most frequent one.

    Args:
        part: Positions of patients.
        labels: `(N,)` label indices of all patients, -1 where not known.
        seed: Seed of the draw.

    Returns:
        The part, and after it the patients that are drawn again, with replacement, label by label.

    Source: the draw of imbalanced-learn's `RandomOverSampler`.
    """
    own = labels[part]
    present, counts = np.unique(own[own >= 0], return_counts=True)
    random = np.random.RandomState(seed)  # the published draw is of the old generator
    again = [
        part[np.flatnonzero(own == label)[random.randint(0, count, counts.max() - count)]]
        for label, count in zip(present, counts, strict=True)
        if count < counts.max()
    ]
    return np.concatenate([part, *again])


def refuse_unless_enough(spec: ModelSpec, labels: Mapping[str, np.ndarray], n: int, validation: float) -> None:
    """Refuses a cohort that cannot be split into folds, before anything else is done.

    Args:
        spec: The model.
        labels: For each task `(N,)` label indices, -1 where not known.
        n: The number of folds.
        validation: Share of the validation part.

    Raises:
        CohortError: There are fewer than two folds, a task has patients of one label only, the first task has too few
            of one, or the validation part would miss one.
    """
    if n < 2:
        raise CohortError(f"{n} folds: at least 2 are needed, one to test on and others to train on.")
    problems, patients = [], len(labels[spec.tasks[0].name])
    for task in spec.tasks:
        counts = _counts(task, labels[task.name])
        if sum(count > 0 for count in counts.values()) < 2:
            problems.append(
                f"{task.name}: of {patients} patients {_said(counts)}, by column {task.target.column!r}; a task needs "
                "patients of two labels or more. Fill the column, or leave the task out of the model."
            )
    first = spec.tasks[0]
    counts = {label: count for label, count in _counts(first, labels[first.name]).items() if count}
    if not problems and min(counts.values()) < n:
        problems.append(
            f"{first.name}: {_said(counts)} are fewer than {n} folds; every fold tests patients of each label. "
            f"Choose at most {min(counts.values())} folds, or bring more patients."
        )
    if problems:
        raise CohortError("the cohort cannot be trained on. " + " ".join(problems))
    known, rarest = sum(counts.values()), min(counts.values())
    rest = known - -(-known // n)
    # the share is rounded up; each label is needed on both sides of it
    if rest * validation <= len(counts) - 1 or rarest - -(-rarest // n) < 2:
        raise CohortError(
            f"{first.name}: of {_said(counts)}, {n} folds leave {rest} to train on, and {validation:g} of them for "
            "validation; both need patients of each label. Raise the protocol's `validation`, or bring more patients."
        )


def refuse_unless_usable(spec: ModelSpec, labels: Mapping[str, np.ndarray], parts: Sequence[Fold]) -> None:
    """Refuses folds that were made elsewhere and cannot be trained on, before anything else is done.

    Args:
        spec: The model.
        labels: For each task `(N,)` label indices, -1 where not known.
        parts: The folds.

    Raises:
        CohortError: There is no fold, a part is empty, a patient is not there, is in two parts of a fold or is tested
            in two folds, a task is known with one label only where it is trained, or the first task is not known in a
            validation part.
    """
    patients, first = len(labels[spec.tasks[0].name]), spec.tasks[0]
    problems = [] if parts else ["there is none; give one or more."]
    for number, fold in enumerate(parts):
        everyone = np.concatenate(fold)
        if not all(len(part) for part in fold):
            problems.append(f"fold {number}: a part has no patients; each needs some.")
        elif everyone.min() < 0 or everyone.max() >= patients or len(np.unique(everyone)) < len(everyone):
            problems.append(f"fold {number}: takes positions from 0 to {patients - 1}, each in one of its parts.")
        else:
            for task in spec.tasks:
                counts = _counts(task, labels[task.name][fold.train])
                if sum(count > 0 for count in counts.values()) < 2:
                    problems.append(
                        f"fold {number}, {task.name}: of {len(fold.train)} who train {_said(counts)}; a task "
                        "needs patients of two labels or more. Take more of them, or leave the task out of the model."
                    )
            if not (labels[first.name][fold.validation] >= 0).any():
                problems.append(
                    f"fold {number}, {first.name}: of {len(fold.validation)} who validate none is known; "
                    f"fill column {first.target.column!r}, or take more of them."
                )
    if not problems and len(np.unique(tested := np.concatenate([fold.test for fold in parts]))) < len(tested):
        problems.append("a patient is tested in two folds; each is tested once at most.")
    if problems:
        raise CohortError("the folds cannot be trained on. " + " ".join(problems[:_SHOWN]))


def _counts(task: Task, labels: np.ndarray) -> dict[str, int]:
    return {label: int((labels == index).sum()) for index, label in enumerate(task.labels)}


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} are {label!r}" for label, count in counts.items())
