"""What one fold is trained with, and what its training results in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ichprog.networks import Network
from ichprog.spec import ModelSpec
from ichprog.train.folds import Fold
from ichprog.train.protocol import Protocol

LogRow = dict[str, float]


@dataclass(frozen=True)
class FoldJob:
    """Hold everything that one fold is trained with.

    Attributes:
        spec: The model.
        protocol: The protocol.
        fold: The fold's number.
        parts: The fold's patients.
        names: Names of all patients.
        grids: Grids of all patients, .npy files.
        labels: `(N,)` label indices of all patients for each task, -1 if unknown.
        checkpoint: Path of the checkpoint.
        regions: Regions of all patients for each dense task, .npy files.
        clinical: `(N, 2 V)` clinical values of all patients, from `clinical.encode`; None without clinical values.
        start_from: Weights whose backbone the training starts from, a .safetensors file.
    """

    spec: ModelSpec
    protocol: Protocol
    fold: int
    parts: Fold
    names: Sequence[str]
    grids: Sequence[Path]
    labels: Mapping[str, np.ndarray]
    checkpoint: Path
    regions: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    start_from: Path | None = None
    clinical: np.ndarray | None = None

    def candidates(self) -> "list[FoldJob]":
        """Return a job for each learning rate that the fold tries, each with a checkpoint of its own."""
        if not self.protocol.learning_rates:
            return [self]
        return [
            replace(
                self,
                protocol=self.protocol.replace(learning_rate=rate, learning_rates=()),
                checkpoint=self.checkpoint.with_stem(f"{self.checkpoint.stem}-{number}"),
            )
            for number, rate in enumerate(self.protocol.learning_rates)
        ]

    def load_grids(self, patients: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
        """Return the grids `(B, 1, D, H, W)` of patients."""
        stacked = np.stack([np.load(self.grids[int(p)], mmap_mode="r") for p in patients])[:, None]
        return torch.from_numpy(stacked).to(device)

    def load_regions(self, patients: Sequence[int] | np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Return the regions `(B, R, D, H, W)` of patients for each dense task."""
        shape = self.spec.input.shape
        loaded = {task: [np.load(files[int(p)]) for p in patients] for task, files in self.regions.items()}
        return {
            task: torch.from_numpy(
                np.stack([np.broadcast_to(values, (len(values), *shape)) for values in arrays]).astype(np.float32)
            ).to(device)
            for task, arrays in loaded.items()
        }

    def load_clinical(
        self, patients: np.ndarray, device: torch.device, seeds: Sequence[tuple[int, ...]] | None = None
    ) -> Tensor | None:
        """Return the clinical values `(B, 2 V)` of patients, or None for a model of the image alone.

        Args:
            patients: Positions of the patients.
            device: Device of the result.
            seeds: Random seed of each patient, by which values are hidden; None hides none.
        """
        if self.clinical is None:
            return None
        values = self.clinical[patients].copy()
        if seeds is not None:
            number = values.shape[1] // 2
            hidden = [np.random.default_rng([*seed, 1]).random(number) for seed in seeds]
            kept = np.stack(hidden) >= self.protocol.clinical_omission
            values *= np.concatenate([kept, kept], axis=1)
        return torch.from_numpy(values).to(device)

    def targets(self, patients: np.ndarray) -> dict[str, Tensor]:
        """Return `(B,)` label indices of patients for each task."""
        return {task: torch.from_numpy(values[patients]) for task, values in self.labels.items()}

    def seed(self, *purpose: int) -> int:
        """Return a random seed for one purpose within this fold."""
        return int(np.random.SeedSequence([self.protocol.seed, self.fold, *purpose]).generate_state(1)[0])

    def format_names(self, patients: np.ndarray) -> str:
        """Return the names of patients, separated by commas."""
        return ", ".join(self.names[int(patient)] for patient in patients)


@dataclass(frozen=True)
class FoldResult:
    """Hold the result of a fold.

    Attributes:
        network: The network of the best epoch on the CPU, recalibrated if the protocol says so.
        logits: `(n, K)` of the test part for each task.
        validation: `(n, K)` of the validation part for each task.
        history: The log, one row per epoch.
        best: The best epoch's row.
        calibration: Scale and shifts of each task's logits, or None.
        precision: Precision of the training, with the reason if "auto" chose float32.
        learning_rate: Highest learning rate of the training, the best one if several were tried.
    """

    network: Network
    logits: dict[str, Tensor]
    validation: dict[str, Tensor]
    history: list[LogRow]
    best: LogRow
    calibration: dict[str, tuple[float, list[float]] | None]
    precision: str
    learning_rate: float
