"""The table of predictions: what every variant predicts for every patient, from which every metric can be recomputed.

Columns: `variant, fold, split, patient, task, truth, p_0, p_1, ...`. `split` is "validation" or "test". `truth` is the
index of the true label, blank if unknown. `p_k` is the probability of label k in the task's order, blank beyond the
task's last label.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichprog.errors import InvalidValueError, RunError
from ichprog.io import read_csv, write_csv

SPLITS = ("validation", "test")
Key = tuple[str, str, str]  # variant, task and split


@dataclass(frozen=True)
class TaskPredictions:
    """The predictions of one variant for one task in one split.

    Attributes:
        patients: Names of N patients; in "test" each name once, in "validation" once for each fold at most.
        fold: Fold whose network predicts the patient `(N,)` int64.
        truth: Indices of the true labels `(N,)` int64, -1 if unknown.
        probabilities: Probabilities of the K labels `(N, K)` float64.
    """

    patients: tuple[str, ...]
    fold: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.patients)

    def select(self, chosen: np.ndarray) -> "TaskPredictions":
        """Return the predictions of some patients.

        Args:
            chosen: Whether each patient is chosen `(N,)` bool, or indices of patients.
        """
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        patients = tuple(self.patients[int(index)] for index in indices)
        return TaskPredictions(patients, self.fold[indices], self.truth[indices], self.probabilities[indices])

    def labelled(self) -> "TaskPredictions":
        """Return the predictions of the patients whose true label is known."""
        return self.select(self.truth >= 0)


@dataclass(frozen=True)
class Predictions:
    """The whole table of predictions.

    Attributes:
        entries: Predictions by (variant, task, split).
    """

    entries: Mapping[Key, TaskPredictions]

    @property
    def variants(self) -> tuple[str, ...]:
        """Return the variants, in the order of the table."""
        return tuple(dict.fromkeys(variant for variant, _, _ in self.entries))

    def tasks(self, variant: str) -> tuple[str, ...]:
        """Return the tasks of a variant, in the order of the table.

        Args:
            variant: Name of the variant.
        """
        return tuple(dict.fromkeys(task for name, task, _ in self.entries if name == variant))

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Read a table of predictions.

        Args:
            path: Path of the CSV file.

        Raises:
            RunError: The file cannot be read, or a row is no prediction.
        """
        rows: dict[Key, list[tuple[str, int, int, list[float]]]] = {}
        try:
            table = read_csv(path)
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        for number, row in enumerate(table, start=2):
            try:
                if row["split"] not in SPLITS:
                    raise ValueError(f"split {row['split']!r} is none of {', '.join(SPLITS)}")
                probabilities = [float(cell) for name, cell in row.items() if name.startswith("p_") and cell]
                entry = row["patient"], int(row["fold"]), int(row["truth"] or -1), probabilities
                rows.setdefault((row["variant"], row["task"], row["split"]), []).append(entry)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise RunError(f"{path}: row {number} is no prediction ({error}).") from error
        return cls({key: _task_predictions(entries) for key, entries in rows.items()})

    def write(self, path: Path) -> Path:
        """Write the table, so that `read` returns equal numbers. An interruption leaves no partial file.

        Args:
            path: Path of the CSV file.
        """
        width = max((each.probabilities.shape[1] for each in self.entries.values()), default=0)
        columns = ["variant", "fold", "split", "patient", "task", "truth", *(f"p_{k}" for k in range(width))]
        rows = (
            [variant, int(fold), split, patient, task, int(truth) if truth >= 0 else "", *probabilities]
            + [""] * (width - len(probabilities))
            for (variant, task, split), each in self.entries.items()
            for patient, fold, truth, probabilities in zip(
                each.patients, each.fold, each.truth, each.probabilities.tolist(), strict=True
            )
        )
        write_csv(path, columns, rows)
        return path


def align(first: TaskPredictions, second: TaskPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices in both of the patients whom both predict, in the order of the first.

    Args:
        first: Predictions of one variant.
        second: Predictions of another variant.

    Raises:
        InvalidValueError: A patient occurs twice, or has another true label in the second.

    Examples:
        >>> a = TaskPredictions(("p1", "p2"), np.zeros(2, int), np.array([0, 1]), np.full((2, 2), 0.5))
        >>> align(a, a.select(np.array([1])))
        (array([1]), array([0]))
    """
    indices = []
    for predictions in (first, second):
        indices.append({patient: index for index, patient in enumerate(predictions.patients)})
        if len(indices[-1]) < len(predictions):
            twice = next(p for i, p in enumerate(predictions.patients) if indices[-1][p] != i)
            raise InvalidValueError("patient", twice, "each patient once", "Compare predictions of the test split.")
    both = [patient for patient in first.patients if patient in indices[1]]
    one, other = (np.array([index[patient] for patient in both], np.int64) for index in indices)
    differ = np.flatnonzero(first.truth[one] != second.truth[other])
    if differ.size:
        names = ", ".join(both[index] for index in differ[:5])
        raise InvalidValueError("true labels of patients", names, "the same in both", "Compare on one cohort.")
    return one, other


def _task_predictions(entries: Iterable[tuple[str, int, int, list[float]]]) -> TaskPredictions:
    patients, fold, truth, probabilities = zip(*entries, strict=True)
    return TaskPredictions(
        patients, np.array(fold, np.int64), np.array(truth, np.int64), np.array(probabilities, np.float64)
    )
