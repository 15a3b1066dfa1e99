"""The published training, rebuilt from its description with MONAI and torch: the peer of our training."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from monai import transforms as t
from monai.data import DataLoader  # PyTorch's, with a seed for each worker's transforms
from torch.nn.functional import binary_cross_entropy_with_logits

from support import reference_pipeline

HEADS = {"binary_head": (1, 0.4), "ordinal_headGCS": (2, 0.3), "ordinal_headAge": (1, 0.3)}  # outputs, loss weight
ANGLE = math.pi / 36


def chain(shape: tuple[int, int, int]) -> t.Compose:
    """Return the transforms from a brain-only NIfTI in LPS order to an augmented grid `(1, D, H, W)`."""
    return t.Compose([
        reference_pipeline.transforms(shape),
        t.RandRotate(range_x=ANGLE, range_y=ANGLE, range_z=ANGLE, prob=0.5),
        t.Zoom(1.1),  # applied to every scan: the published code ignores the probability
        t.RandGaussianNoise(std=0.01, prob=0.5),
        t.ToTensor(track_meta=False),
    ])  # fmt: skip


class Scans(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Read each scan from disk and return it with its targets."""

    def __init__(self, paths: Sequence[Path], targets: torch.Tensor, transform: t.Compose) -> None:
        self.paths, self.targets, self.transform = paths, targets, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(str(self.paths[number])), self.targets[number]


class Training:
    """Train the published network with the published optimiser and data loader.

    Args:
        scans: Brain-only NIfTI files.
        targets: `(N, 4)`: a poor outcome, GCS below 13, GCS below 9, age of 80 or more; each 0 or 1.
        batch: Scans per step.
        shape: Shape of the grid (D, H, W).
        workers: Number of processes that read scans.
        seed: Random seed of the weights, the order and the augmentation.
    """

    def __init__(
        self,
        scans: Sequence[Path],
        targets: torch.Tensor,
        *,
        batch: int = 8,
        shape: tuple[int, int, int] = (40, 301, 301),
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.network = reference_pipeline.MultiTask({head: outputs for head, (outputs, _) in HEADS.items()})
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=1e-4, amsgrad=True)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimiser, patience=5, factor=0.98)
        self.loader = DataLoader(
            Scans(scans, targets, chain(shape)), batch_size=batch, shuffle=True, num_workers=workers
        )

    def run_epoch(self) -> float:
        """Train on every scan once, with one step per batch, and return the mean loss."""
        self.network.train()
        losses = []
        for grids, targets in self.loader:
            self.optimiser.zero_grad()
            loss, first = torch.zeros(()), 0
            for logits, (outputs, weight) in zip(self.network(grids), HEADS.values(), strict=True):
                labels = targets[:, first : first + outputs]
                loss, first = loss + weight * binary_cross_entropy_with_logits(logits, labels), first + outputs
            loss.backward()
            self.optimiser.step()
            self.plateau.step(loss.item())
            losses += [loss.item()] * len(targets)
        return sum(losses) / len(losses)
