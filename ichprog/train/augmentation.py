"""Grids altered at random for training, a batch at once and on its device."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ichprog.spec import InputSpec
from ichprog.train.protocol import Protocol


def augment(grids: Tensor, protocol: Protocol, contract: InputSpec, seeds: Sequence[Sequence[int]]) -> Tensor:
    """Grids rotated, resized, shifted and mirrored in one resampling, then with other contrast and noise.

    Every scan has a seed of its own, so that what happens to it depends neither on the batch it is in nor on what was
    drawn before.

    Args:
        grids: `(B, 1, D, H, W)`.
        protocol: What is done, and how much of it.
        contract: The input contract: its plausible extents in mm say how high and how wide a grid is.
        seeds: A seed for each.

    Returns:
        `(B, 1, D, H, W)`; what comes in from outside is 0.
    """
    draws = [np.random.default_rng(list(seed)) for seed in seeds]
    if protocol.rotation_in == "mm":
        spans = (contract.expected_ranges.coverage_mm, *2 * (contract.expected_ranges.field_of_view_mm,))
        extent = np.array([math.sqrt(low * high) for low, high in spans])
    else:
        extent = np.array(contract.shape, float)
    motions = np.stack([_motion(draw, protocol, extent) for draw in draws])
    if (motions != np.eye(3, 4)).any():
        places = functional.affine_grid(torch.from_numpy(motions).to(grids), list(grids.shape), align_corners=False)
        grids = functional.grid_sample(grids, places, align_corners=False)
    gains = 1 + protocol.gain * _even(draws)
    offsets = protocol.offset * _even(draws)
    if protocol.gain or protocol.offset:
        column = (-1, 1, 1, 1, 1)
        offset = torch.from_numpy(offsets).to(grids).view(column) * (grids > 0)
        grids = grids * torch.from_numpy(gains).to(grids).view(column) + offset
    noisy = [index for index, draw in enumerate(draws) if draw.random() < protocol.noise_p and protocol.noise]
    if noisy:
        grids = grids.clone()
        for index in noisy:
            source = torch.Generator(grids.device).manual_seed(int(draws[index].integers(2**63)))
            grids[index] += protocol.noise * torch.randn(
                grids.shape[1:], generator=source, device=grids.device, dtype=grids.dtype
            )
    return grids


def _motion(draw: np.random.Generator, protocol: Protocol, extent: np.ndarray) -> np.ndarray:
    """`(3, 4)` from where a value goes to where it comes from, as `affine_grid` takes it: columns, rows, slices."""
    angles = np.radians(protocol.rotation) * draw.uniform(-1, 1, 3) * (draw.random() < protocol.rotation_p)
    size = 1 + protocol.zoom * (1.0 if protocol.zoom_how == "always" else draw.uniform(-1, 1))
    shift = 2 * protocol.shift * draw.uniform(-1, 1, 3)
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (other for other in range(3) if other != axis)
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ step
    turn *= extent[None, :] / extent[:, None] / size  # a grid runs from -1 to 1 whatever its extent
    if draw.random() < protocol.flip_p:
        turn[:, 2] *= -1
    return np.concatenate([turn, shift[:, None]], axis=1)[::-1, [2, 1, 0, 3]].astype(np.float32)


def _even(draws: Sequence[np.random.Generator]) -> np.ndarray:
    return np.array([draw.uniform(-1, 1) for draw in draws], np.float32)
