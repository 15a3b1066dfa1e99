"""The training of ichprog with the published settings: the counterpart of `published_training.py`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ichprog import zoo
from ichprog.train import PRESETS, grid_cache, trainer
from ichprog.train.callbacks import Callback
from ichprog.train.distributed import DistributedContext
from ichprog.train.fold_job import FoldJob
from ichprog.train.folds import Fold


def epoch_runner(
    scans: Sequence[Path],
    targets: torch.Tensor,
    folder: Path,
    *,
    precision: str,
    batch: int = 8,
    shape: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Callable[[], float]:
    """Preprocess scans and return a function that trains for one epoch and returns the mean loss.

    Args:
        scans: Brain-only NIfTI files.
        targets: `(N, 4)`, as `published_training.Training` takes them.
        folder: Folder of the grid cache.
        precision: "float32" or "bfloat16".
        batch: Scans per step.
        shape: Shape of the grid (D, H, W). By default the shape of the model.
        seed: Random seed of the weights, the order and the augmentation.
    """
    spec = zoo.find(zoo.DEFAULT)
    if shape:
        spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, shape=shape))
    changes = {"accumulation_steps": 1, "balance": "none", "precision": precision, "batch_size": batch, "seed": seed}
    protocol = PRESETS["paper"].replace(**changes)
    poor, some, severe, old = targets.long().T.numpy()
    labels = dict(zip((task.name for task in spec.tasks), (poor, some + severe, old), strict=True))
    everyone = np.arange(len(scans))
    files = grid_cache.prepare(scans, spec.input, brain="given", folder=folder / "grids")
    names, checkpoint = [path.name for path in scans], folder / "none"
    job = FoldJob(spec, protocol, 0, Fold(everyone, everyone, everyone), names, files, labels, checkpoint)
    context = DistributedContext("cpu")
    state = trainer.TrainerState(job, context)

    def run_epoch() -> float:
        loss = trainer.run_epoch(state, job, context, Callback())["loss"]
        state.epoch += 1
        return loss

    return run_epoch
