"""What the sections of a report are built from, and where they write tables and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.cohort import Cohort
from ichprog.metrics import PRIMARY
from ichprog.reporting import figures, tables
from ichprog.reporting.html import Picture, Table
from ichprog.spec import Task
from ichprog.study.analysis import Row, StudyResults, TaskAnalysis
from ichprog.study.config import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportContext:
    """What the sections of a report are built from.

    Attributes:
        study: Study.
        out: Folder of the study.
        cohort: Patients of the study.
        results: Results of the study.
        record: Content of `study.json`.
        cache_dir: Cache of compiled networks.
    """

    study: Study
    out: Path
    cohort: Cohort
    results: StudyResults
    record: Mapping[str, Any]
    cache_dir: str | Path | None = None

    @cached_property
    def tasks(self) -> list[Task]:
        """Return every task of the study, the main task first. A task with other labels is another task."""
        tasks = [self.study.main_task, *(task for variant in self.study.variants for task in variant.spec.tasks)]
        return list({(task.name, task.labels): task for task in tasks}.values())

    @cached_property
    def truth(self) -> dict[str, np.ndarray]:
        """Return the indices of the true labels of all patients `(N,)` by task, -1 if unknown."""
        return {task.name: self.cohort.labels(task) for task in self.tasks}

    def analyses_of(self, task: Task) -> dict[str, TaskAnalysis]:
        """Return the analyses of a task by run, without repetitions and learning-curve runs.

        Args:
            task: Task. Runs with other labels of the task are left out.
        """
        return {
            run: one
            for run, by_task in self.results.analyses.items()
            if (one := by_task.get(task.name))
            and one.task.labels == task.labels
            and not (self.study.is_curve_run(run) or self.study.is_repetition(run))
        }

    @cached_property
    def best_run(self) -> str:
        """Return the trained variant with the highest primary metric of the main task."""
        runs = [run for run in self.analyses_of(self.study.main_task) if run in self.study.runs]
        if not runs:
            return next(iter(self.results.analyses))
        return max(runs, key=lambda run: self.results.metrics[run][self.study.stratify_by][PRIMARY]["value"] or 0.0)

    def is_ambiguous(self, task: Task) -> bool:
        """Return whether the study has the task with other labels as well.

        Args:
            task: Task.
        """
        return sum(each.name == task.name for each in self.tasks) > 1

    def write_table(
        self,
        name: str,
        rows: Sequence[tables.Row],
        columns: tables.Columns,
        caption: str,
        *,
        folded: bool = False,
    ) -> Table:
        """Write a table into the folder of the study, and return the table for the report.

        Args:
            name: Name of the files.
            rows: Rows.
            columns: Columns.
            caption: What the table shows.
            folded: Whether the table is closed until the reader opens it.
        """
        tables.write(rows, columns, self.out / "tables", name, caption)
        return Table(rows, columns, caption, folded)

    def write_figure(self, name: str, figure: "Figure", caption: str, *, raster: bool = False) -> Picture:
        """Write a figure into the folder of the study, and return the picture for the report.

        Args:
            name: Name of the files.
            figure: Figure.
            caption: What the figure shows.
            raster: Whether the report shows the PNG instead of the SVG.
        """
        vector, pixels = figures.save(figure, self.out / "figures", name)
        return Picture(pixels if raster else vector, caption)


def join_interval(row: Row, name: str) -> Row:
    """Return a row whose value is an interval, as tables take it."""
    return row | {name: {"value": row[name], "low": row["low"], "high": row["high"]}}
