"""The table of what every variant says of every patient, from which every figure can be recomputed.

Columns: `variant, fold, split, patient, task, truth, p_0, p_1, ...`. `split` is "validation" or "test"; `truth` is the
index of the label, blank where it is not known; `p_k` is the probability of label k in the task's order, blank beyond
the task's last label.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichprog.errors import RunError
from ichprog.io import atomic_write

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class TaskPredictions:
    """What one variant says of one task, fold by fold, in one split.

    Attributes:
        patients: `N` names; in "test" each once, in "validation" once a fold at most.
        fold: `(N,)` int64, the fold whose member says it.
        truth: `(N,)` int64 label indices, -1 where not known.
        probabilities: `(N, K)` float64, of each label in order.
    """

    patients: tuple[str, ...]
    fold: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.patients)

    def only(self, chosen: np.ndarray) -> "TaskPredictions":
        """Those at these places.

        Args:
            chosen: `(N,)` bool, or places.
        """
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        patients = tuple(self.patients[int(place)] for place in places)
        return TaskPredictions(patients, self.fold[places], self.truth[places], self.probabilities[places])

    def known(self) -> "TaskPredictions":
        """Those whose truth is known."""
        return self.only(self.truth >= 0)


@dataclass(frozen=True)
class Predictions:
    """The whole table.

    Attributes:
        answers: By (variant, task, split).
    """

    answers: Mapping[tuple[str, str, str], TaskPredictions]

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants, in the table's order."""
        return tuple(dict.fromkeys(variant for variant, _, _ in self.answers))

    def tasks(self, variant: str) -> tuple[str, ...]:
        """The tasks of a variant, in the table's order."""
        return tuple(dict.fromkeys(task for name, task, _ in self.answers if name == variant))

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Reads the table.

        Raises:
            RunError: It is not there, or a row is not as it must be.
        """
        rows: dict[tuple[str, str, str], list[tuple[str, int, int, list[float]]]] = {}
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for number, row in enumerate(csv.DictReader(file), start=2):
                    try:
                        if row["split"] not in SPLITS:
                            raise ValueError(f"split {row['split']!r} is none of {', '.join(SPLITS)}")
                        said = [float(cell) for name, cell in row.items() if name.startswith("p_") and cell]
                        entry = row["patient"], int(row["fold"]), int(row["truth"] or -1), said
                        rows.setdefault((row["variant"], row["task"], row["split"]), []).append(entry)
                    except (KeyError, ValueError, TypeError, AttributeError) as error:
                        raise RunError(f"{path}: row {number} is no prediction ({error})") from error
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls({key: _answers(entries) for key, entries in rows.items()})

    def write(self, path: Path) -> Path:
        """Writes the table, whole or not at all; `read` of it gives the same numbers again."""
        most = max((each.probabilities.shape[1] for each in self.answers.values()), default=0)
        with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["variant", "fold", "split", "patient", "task", "truth", *(f"p_{k}" for k in range(most))])
            for (variant, task, split), each in self.answers.items():
                entries = zip(each.patients, each.fold, each.truth, each.probabilities.tolist(), strict=True)
                for patient, fold, truth, said in entries:
                    blank = [""] * (most - len(said))
                    table.writerow(
                        [variant, int(fold), split, patient, task, int(truth) if truth >= 0 else "", *said, *blank]
                    )
        return path


def _answers(entries: Iterable[tuple[str, int, int, list[float]]]) -> TaskPredictions:
    patients, fold, truth, said = zip(*entries, strict=True)
    return TaskPredictions(patients, np.array(fold, np.int64), np.array(truth, np.int64), np.array(said, np.float64))
