"""Telling how a training goes: bars, a log on disk, TensorBoard."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ichprog.errors import missing_extra
from ichprog.train.run_dir import Run
from ichprog.train.trainer import Job, Row, Watch


class Onlooker(Watch):
    """Bars on standard error, a fold's log on disk, and events for TensorBoard.

    Args:
        run: The run's folder.
        leads: Whether this process tells; the others of a team keep silent.
        progress: Whether bars are shown.
        tensorboard: Whether events are written.

    Raises:
        IchprogError: Events are requested and TensorBoard is not installed.
    """

    def __init__(self, run: Run, *, leads: bool, progress: bool, tensorboard: bool) -> None:
        self.run, self.leads, self.progress = run, leads, progress and leads
        self.events: Any = None
        self.bar: Any = None
        self.history: list[Row] = []
        self.writer: Any = None
        if tensorboard and leads:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise missing_extra("train", "tensorboard", "Writing TensorBoard events") from error
            self.writer = SummaryWriter

    @contextmanager
    def over(self, fold: int) -> Iterator[None]:
        """While a fold is trained: it is claimed, and its bar and events are closed in the end."""
        with ExitStack() as stack:
            if self.leads:
                stack.enter_context(self.run.claim(fold))
            try:
                yield
            finally:
                if self.bar is not None:
                    self.bar.close()
                if self.events is not None:
                    self.events.close()
                self.bar = self.events = None

    def begin(self, job: Job, history: Sequence[Row]) -> None:
        """Opens the bar and the events where a fold begins or goes on."""
        from tqdm import tqdm

        if not self.leads:
            return
        self.history = list(history)
        if self.progress:
            shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total} epochs [{elapsed}<{remaining}]{postfix}"
            self.bar = tqdm(
                total=job.protocol.epochs,
                initial=len(history),
                desc=f"fold {job.fold}",
                bar_format=shown,
                file=sys.stderr,
            )
        if self.writer is not None:
            self.events = self.writer(self.run.path / "tensorboard" / f"fold{job.fold}", purge_step=len(history))

    def step(self, job: Job, of: int, loss: float) -> None:
        """Moves the bar by a batch."""
        if self.bar is not None:
            self.bar.update(1 / of)
            self.bar.set_postfix_str(f"loss {loss:.3f}{self._last(job)}")

    def row(self, job: Job, row: Row) -> None:
        """Writes a pass into the log."""
        if not self.leads:
            return
        self.history.append(row)
        self.run.log(job.fold, self.history)
        if self.bar is not None:
            self.bar.n = len(self.history)
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}{self._last(job)}")
        if self.events is not None:
            for name, value in row.items():
                if name not in ("fold", "epoch") and not math.isnan(value):
                    self.events.add_scalar(name, value, int(row["epoch"]))
            self.events.flush()

    def _last(self, job: Job) -> str:
        """The validation of the last pass, short."""
        if not self.history:
            return ""
        row = self.history[-1]
        aucs = ", ".join(f"{task} {row[f'val_auc_{task}']:.2f}" for task in job.labels)
        return f"; validation {row['val_loss']:.3f}, AUC {aucs}"
