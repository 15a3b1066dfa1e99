"""Training callbacks: progress on standard error, the log on disk, experiment trackers."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ichprog.errors import IchprogError, UnknownNameError, missing_extra
from ichprog.train.fold_job import FoldJob
from ichprog.train.run_dir import RunDir


class Callback:
    """React to the events of a training. The methods of this base class do nothing."""

    def on_fold_start(self, job: FoldJob, history: Sequence[Mapping[str, float]]) -> None:
        """Handle the start of a fold.

        Args:
            job: The fold.
            history: Log rows of the epochs that an earlier run has completed.
        """

    def on_batch_end(self, job: FoldJob, n_batches: int, loss: float) -> None:
        """Handle the end of a batch.

        Args:
            job: The fold.
            n_batches: Number of batches per epoch.
            loss: Loss of the batch.
        """

    def on_epoch_end(self, job: FoldJob, row: Mapping[str, float]) -> None:
        """Handle the end of an epoch.

        Args:
            job: The fold.
            row: The epoch's log row.
        """

    def on_fold_end(self) -> None:
        """Handle the end of a fold, whether it succeeded or failed."""

    def close(self) -> None:
        """Release resources after the last fold."""


class CallbackList(Callback):
    """Call several callbacks in order.

    Args:
        callbacks: The callbacks.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def on_fold_start(self, job: FoldJob, history: Sequence[Mapping[str, float]]) -> None:
        """Forward the event."""
        for callback in self.callbacks:
            callback.on_fold_start(job, history)

    def on_batch_end(self, job: FoldJob, n_batches: int, loss: float) -> None:
        """Forward the event."""
        for callback in self.callbacks:
            callback.on_batch_end(job, n_batches, loss)

    def on_epoch_end(self, job: FoldJob, row: Mapping[str, float]) -> None:
        """Forward the event."""
        for callback in self.callbacks:
            callback.on_epoch_end(job, row)

    def on_fold_end(self) -> None:
        """Forward the event."""
        for callback in self.callbacks:
            callback.on_fold_end()


class ProgressCallback(Callback):
    """Show a progress bar on a terminal, otherwise print one line per epoch, on standard error."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.last_row: Mapping[str, float] | None = None
        self.position = 0.0

    def on_fold_start(self, job: FoldJob, history: Sequence[Mapping[str, float]]) -> None:
        """Open the progress bar."""
        self.last_row = history[-1] if history else None
        self.position = float(len(history))
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total} epochs [{elapsed}<{remaining}]{postfix}"
            self.bar = tqdm(
                total=job.protocol.epochs,
                initial=len(history),
                desc=f"fold {job.fold}",
                bar_format=layout,
                file=sys.stderr,
            )

    def on_batch_end(self, job: FoldJob, n_batches: int, loss: float) -> None:
        """Advance the progress bar by a batch."""
        if self.bar is not None:
            self._advance(self.position + 1 / n_batches)
            self.bar.set_postfix_str(f"loss {loss:.3f}{self._format_validation(job)}")

    def on_epoch_end(self, job: FoldJob, row: Mapping[str, float]) -> None:
        """Show the epoch's loss and validation scores."""
        self.last_row = row
        scores = f"loss {row['loss']:.3f}{self._format_validation(job)}"
        if self.bar is not None:
            self._advance(row["epoch"] + 1)
            self.bar.set_postfix_str(scores)
        else:
            sys.stderr.write(f"fold {job.fold}, epoch {row['epoch'] + 1:.0f} of {job.protocol.epochs}: {scores}\n")
            sys.stderr.flush()

    def on_fold_end(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _advance(self, position: float) -> None:
        self.position = min(position, self.bar.total)  # fractions of an epoch may sum to a little more
        self.bar.update(self.position - self.bar.n)

    def _format_validation(self, job: FoldJob) -> str:
        if self.last_row is None:
            return ""
        aucs = ", ".join(f"{task} {self.last_row[f'val_auc_{task}']:.2f}" for task in job.labels)
        return f"; validation loss {self.last_row['val_loss']:.3f}, AUC {aucs}"


class LogCallback(Callback):
    """Write a fold's log after each epoch.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.history: list[Mapping[str, float]] = []

    def on_fold_start(self, job: FoldJob, history: Sequence[Mapping[str, float]]) -> None:  # noqa: ARG002
        """Take over the rows of an earlier run."""
        self.history = list(history)

    def on_epoch_end(self, job: FoldJob, row: Mapping[str, float]) -> None:
        """Append the row and write the log."""
        self.history.append(row)
        self.run_dir.write_log(job.fold, self.history)


class TrackerCallback(Callback):
    """Send the log to experiment trackers through Accelerate.

    Args:
        names: Names of trackers, such as "tensorboard", "mlflow", "trackio" or "wandb".
        run_dir: The run directory. Its name becomes the project; local trackers write to its `trackers` folder.

    Raises:
        UnknownNameError: A tracker does not exist.
        IchprogError: Accelerate or a tracker's package is not installed.
    """

    def __init__(self, names: Sequence[str], run_dir: RunDir) -> None:
        try:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
            from accelerate.utils import LoggerType
        except ImportError as error:
            raise missing_extra("train", "accelerate", "Experiment tracking") from error
        self.run_dir = run_dir
        self.trackers: list[Any] = []
        missing = set(LoggerType.list()) - {str(name) for name in get_available_trackers()}
        for name in names:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise UnknownNameError("tracker", name, LOGGER_TYPE_TO_CLASS)
            if name in missing:
                package = {"comet_ml": "comet-ml"}.get(name, name)
                raise IchprogError(f"The tracker {name!r} needs {package}. Install it with: pip install {package}.")
        self.classes = [LOGGER_TYPE_TO_CLASS[name] for name in dict.fromkeys(names)]

    def on_fold_start(self, job: FoldJob, history: Sequence[Mapping[str, float]]) -> None:  # noqa: ARG002
        """Start the trackers with the first fold and store the protocol."""
        if self.trackers:
            return
        folder = self.run_dir.path / "trackers"
        for tracker_class in self.classes:
            folders = [str(folder)] if tracker_class.requires_logging_directory else []
            tracker = tracker_class(self.run_dir.path.resolve().name, *folders)
            tracker.start()
            fields = {
                key: str(each) if isinstance(each, list) else each for key, each in job.protocol.to_dict().items()
            }
            tracker.store_init_configuration({"model": job.spec.name, **fields})
            self.trackers.append(tracker)

    def on_epoch_end(self, job: FoldJob, row: Mapping[str, float]) -> None:
        """Log every finite value of the row, with the fold in its name."""
        values = {
            f"fold{job.fold}/{name}": value
            for name, value in row.items()
            if name not in ("fold", "epoch") and math.isfinite(value)
        }
        for tracker in self.trackers:
            tracker.log(values, step=int(row["epoch"]))

    def close(self) -> None:
        """Finish the trackers."""
        while self.trackers:
            self.trackers.pop().finish()
