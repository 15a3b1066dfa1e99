"""Cross-validation folds: the published stratified split, the published oversampling, and checks of folds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ichprog.errors import CohortError, missing_extra
from ichprog.spec import ModelSpec, Task

_MAX_PROBLEMS = 10  # problems listed in one error message


class Fold(NamedTuple):
    """Positions of a fold's patients in a cohort, each `(n,)`.

    Attributes:
        train: Patients whose loss is minimised.
        validation: Patients that select the best epoch and recalibrate the probabilities.
        test: Patients that are predicted at the end and used for nothing else.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(labels: np.ndarray, n: int, *, seed: int = 1, validation_fraction: float = 0.1) -> list[Fold]:
    """Split a cohort into stratified folds.

    Patients with a known label are shuffled and split into stratified folds. A stratified fraction of each fold's
    remaining patients becomes its validation part. Patients without the label train in every fold.

    Args:
        labels: `(N,)` label indices of the first task, -1 if unknown.
        n: Number of folds.
        seed: Random seed of the folds and of the validation parts.
        validation_fraction: Fraction of the validation part.

    Source: the protocol of Cobo et al. 2024, with scikit-learn's `StratifiedKFold` and `train_test_split`.

    Examples:
        >>> folds = split(np.array([0, 1] * 10), 5, validation_fraction=0.25)
        >>> [len(part) for part in folds[0]]
        [12, 4, 4]
    """
    try:
        from sklearn.model_selection import StratifiedKFold, train_test_split
    except ImportError as error:
        raise missing_extra("train", "scikit-learn", "Splitting a cohort into folds") from error

    known, unknown = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    folds = []
    for rest, test in StratifiedKFold(n, shuffle=True, random_state=seed).split(known, labels[known]):
        train, validation = train_test_split(
            known[rest], test_size=validation_fraction, random_state=seed, stratify=labels[known[rest]]
        )
        folds.append(Fold(np.concatenate([train, unknown]), validation, known[test]))
    return folds


def oversample(part: np.ndarray, labels: np.ndarray, *, seed: int = 2) -> np.ndarray:
    """Repeat patients until every label of the first task is as frequent as the most frequent one.

    Args:
        part: Positions of patients.
        labels: `(N,)` label indices of all patients, -1 if unknown.
        seed: Random seed.

    Returns:
        The part, followed by patients drawn with replacement, label by label.

    Source: imbalanced-learn's `RandomOverSampler`.

    Examples:
        >>> labels = np.array([0, 0, 0, 1])
        >>> labels[oversample(np.arange(4), labels)].tolist()
        [0, 0, 0, 1, 1, 1]
    """
    own = labels[part]
    present, counts = np.unique(own[own >= 0], return_counts=True)
    random = np.random.RandomState(seed)  # the published draw uses NumPy's legacy generator
    repeated = [
        part[np.flatnonzero(own == label)[random.randint(0, count, counts.max() - count)]]
        for label, count in zip(present, counts, strict=True)
        if count < counts.max()
    ]
    return np.concatenate([part, *repeated])


def validate_labels(spec: ModelSpec, labels: Mapping[str, np.ndarray], n: int, validation_fraction: float) -> None:
    """Check that a cohort can be split into folds.

    Args:
        spec: The model.
        labels: `(N,)` label indices for each task, -1 if unknown.
        n: Number of folds.
        validation_fraction: Fraction of the validation part.

    Raises:
        CohortError: There are fewer than two folds, a task has only one label, the first task has fewer patients of a
            label than folds, or the validation part would miss a label.
    """
    if n < 2:
        raise CohortError(f"{n} folds: at least 2 are needed, one to test on and others to train on.")
    problems, patients = [], len(labels[spec.tasks[0].name])
    for task in spec.tasks:
        counts = _count_labels(task, labels[task.name])
        if sum(count > 0 for count in counts.values()) < 2:
            problems.append(
                f"{task.name}: of {patients} patients {_format_counts(counts)}, by column {task.target.column!r}; a "
                "task needs patients of two labels or more. Fill the column, or remove the task from the model."
            )
    first = spec.tasks[0]
    counts = {label: count for label, count in _count_labels(first, labels[first.name]).items() if count}
    if not problems and min(counts.values()) < n:
        problems.append(
            f"{first.name}: {_format_counts(counts)} are fewer than {n} folds; every fold tests patients of each "
            f"label. Choose at most {min(counts.values())} folds, or add patients."
        )
    if problems:
        raise CohortError("The cohort cannot be trained on. " + " ".join(problems))
    known, rarest = sum(counts.values()), min(counts.values())
    rest = known - -(-known // n)
    # the validation part is rounded up, and both parts need each label
    if rest * validation_fraction <= len(counts) - 1 or rarest - -(-rarest // n) < 2:
        raise CohortError(
            f"{first.name}: of {_format_counts(counts)}, {n} folds leave {rest} to train on, and "
            f"{validation_fraction:g} of them for validation; both need patients of each label. Raise the protocol's "
            "`validation_fraction`, or add patients."
        )


def validate_folds(spec: ModelSpec, labels: Mapping[str, np.ndarray], folds: Sequence[Fold]) -> None:
    """Check that given folds can be trained on.

    Args:
        spec: The model.
        labels: `(N,)` label indices for each task, -1 if unknown.
        folds: The folds.

    Raises:
        CohortError: There is no fold, a part is empty, a position does not exist, a patient is in two parts of a fold
            or tested in two folds, a task has only one label in a training part, or the first task has no label in a
            validation part.
    """
    patients = len(labels[spec.tasks[0].name])
    problems = [] if folds else ["No fold is given; give one or more."]
    for number, fold in enumerate(folds):
        everyone = np.concatenate(fold)
        if not all(len(part) for part in fold):
            problems.append(f"fold {number}: a part has no patients; each needs some.")
        elif everyone.min() < 0 or everyone.max() >= patients or len(np.unique(everyone)) < len(everyone):
            problems.append(f"fold {number}: takes positions from 0 to {patients - 1}, each in one of its parts.")
        else:
            problems += _label_problems(number, fold, spec, labels)
    if not problems and len(np.unique(tested := np.concatenate([fold.test for fold in folds]))) < len(tested):
        problems.append("A patient is tested in two folds; each is tested at most once.")
    if problems:
        raise CohortError("The folds cannot be trained on. " + " ".join(problems[:_MAX_PROBLEMS]))


def _label_problems(number: int, fold: Fold, spec: ModelSpec, labels: Mapping[str, np.ndarray]) -> list[str]:
    problems, first = [], spec.tasks[0]
    for task in spec.tasks:
        counts = _count_labels(task, labels[task.name][fold.train])
        if sum(count > 0 for count in counts.values()) < 2:
            problems.append(
                f"fold {number}, {task.name}: of {len(fold.train)} training patients {_format_counts(counts)}; a task "
                "needs patients of two labels or more. Take more of them, or remove the task from the model."
            )
    if not (labels[first.name][fold.validation] >= 0).any():
        problems.append(
            f"fold {number}, {first.name}: none of {len(fold.validation)} validation patients has a label; "
            f"fill column {first.target.column!r}, or take more of them."
        )
    return problems


def _count_labels(task: Task, labels: np.ndarray) -> dict[str, int]:
    return {label: int((labels == index).sum()) for index, label in enumerate(task.labels)}


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} are {label!r}" for label, count in counts.items())
