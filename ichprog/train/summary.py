"""Summary of a run: the out-of-fold AUC of each task with its confidence interval."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ichprog.io import read_csv
from ichprog.metrics import compute_with_intervals
from ichprog.spec import ModelSpec

_progress = logging.getLogger("ichprog.progress")


@dataclass(frozen=True)
class OutOfFoldAuc:
    """Hold the out-of-fold AUC of a task.

    Attributes:
        task: Name of the task.
        auc: AUC, the mean over thresholds if the task has more than two labels; None if all labels are equal.
        low: Lower limit of the 95 % bootstrap interval over patients, or None.
        high: Upper limit, or None.
        patients: Number of test patients with a known label.
        folds: Number of folds that are done.
    """

    task: str
    auc: float | None
    low: float | None
    high: float | None
    patients: int
    folds: int

    def __str__(self) -> str:
        about = f"{self.patients} patients, {self.folds} fold{'s' if self.folds > 1 else ''}"
        if self.auc is None:
            return f"{self.task}: out-of-fold AUC undefined, all labels are equal ({about})"
        limits = "" if self.low is None or self.high is None else f" (95 % CI {self.low:.3f} to {self.high:.3f})"
        return f"{self.task}: out-of-fold AUC {self.auc:.3f}{limits}, {about}"


def out_of_fold_aucs(run: Path) -> Iterator[OutOfFoldAuc]:
    """Yield the out-of-fold AUC of each task of a run.

    Args:
        run: Directory of the run.

    Examples:
        ```python
        for auc in out_of_fold_aucs(Path("run")):
            print(auc)  # prognosis: out-of-fold AUC 0.806 (95 % CI 0.752 to 0.858), 261 patients, 10 folds
        ```
    """
    _progress.info("Computing out-of-fold AUCs with intervals.")
    yield from compute_aucs(ModelSpec.read(run / "config.json"), read_csv(run / "out_of_fold.csv"))


def compute_aucs(spec: ModelSpec, rows: Sequence[Mapping[str, str]]) -> Iterator[OutOfFoldAuc]:
    """Yield the out-of-fold AUC of each task.

    Args:
        spec: The model.
        rows: Rows of `out_of_fold.csv`.
    """
    folds = len({row["fold"] for row in rows})
    for task in spec.tasks:
        known = [row for row in rows if row[f"{task.name}_true"]]
        if not known:
            yield OutOfFoldAuc(task.name, None, None, None, 0, folds)
            continue
        truth = [task.labels.index(row[f"{task.name}_true"]) for row in known]
        probabilities = [[float(row[f"{task.name}_{label}"]) for label in task.labels] for row in known]
        auroc = compute_with_intervals(truth, probabilities, kind=task.kind)["auroc"]
        yield OutOfFoldAuc(task.name, auroc["value"], auroc["low"], auroc["high"], len(known), folds)
