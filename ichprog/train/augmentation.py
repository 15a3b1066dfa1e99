"""Random augmentation of grids, a batch at a time and on the batch's device."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ichprog.errors import SpecError
from ichprog.scan import resolve_ranges
from ichprog.spec import InputSpec
from ichprog.train.protocol import Protocol


def augment(grids: Tensor, protocol: Protocol, contract: InputSpec, seeds: Sequence[Sequence[int]]) -> Tensor:
    """Rotate, resize, shift and flip grids in one resampling, then change their contrast and add noise.

    Each scan has its own seed. Its augmentation depends neither on the other scans of the batch nor on earlier draws.

    Args:
        grids: `(B, 1, D, H, W)`.
        protocol: Kinds and amounts of augmentation.
        contract: Input contract. Its expected extents in mm give the grid's height and width.
        seeds: One random seed for each grid.

    Returns:
        `(B, 1, D, H, W)`, padded with 0.

    Examples:
        ```python
        augmented = augment(grids, PRESETS["default"], spec.input, seeds=[(1, 0), (1, 1)])
        ```
    """
    generators = [np.random.default_rng(list(seed)) for seed in seeds]
    grids = _resample(grids, protocol, contract, generators, "bilinear")
    gains = 1 + protocol.contrast * _draw_signed(generators)
    offsets = protocol.brightness * _draw_signed(generators)
    if protocol.contrast or protocol.brightness:
        column = (-1, 1, 1, 1, 1)
        offset = torch.from_numpy(offsets).to(grids).view(column) * (grids > 0)
        grids = grids * torch.from_numpy(gains).to(grids).view(column) + offset
    noisy = [
        index
        for index, generator in enumerate(generators)
        if generator.random() < protocol.noise_prob and protocol.noise_std
    ]
    if noisy:
        grids = grids.clone()
        for index in noisy:
            source = torch.Generator(grids.device).manual_seed(int(generators[index].integers(2**63)))
            grids[index] += protocol.noise_std * torch.randn(
                grids.shape[1:], generator=source, device=grids.device, dtype=grids.dtype
            )
    return grids


def augment_regions(regions: Tensor, protocol: Protocol, contract: InputSpec, seeds: Sequence[Sequence[int]]) -> Tensor:
    """Rotate, resize, shift and flip the regions of grids as `augment` does with the same seeds, to the nearest cell.

    Args:
        regions: `(B, R, D, H, W)` fraction of each cell in each region.
        protocol: Kinds and amounts of augmentation.
        contract: Input contract.
        seeds: One random seed for each grid.

    Returns:
        `(B, R, D, H, W)`, padded with 0.

    Examples:
        ```python
        moved = augment_regions(regions, PRESETS["default"], spec.input, seeds=[(1, 0), (1, 1)])
        ```
    """
    generators = [np.random.default_rng(list(seed)) for seed in seeds]
    return _resample(regions, protocol, contract, generators, "nearest")


def _resample(
    values: Tensor, protocol: Protocol, contract: InputSpec, generators: Sequence[np.random.Generator], mode: str
) -> Tensor:
    """Rotate, resize, shift and flip grids by transforms that the generators draw."""
    extent = _usual_extent_mm(contract) if protocol.rotation_units == "mm" else np.array(contract.shape, float)
    transforms = np.stack([_draw_affine(generator, protocol, extent) for generator in generators])
    if (transforms == np.eye(3, 4)).all():
        return values
    positions = functional.affine_grid(torch.from_numpy(transforms).to(values), list(values.shape), align_corners=False)
    return functional.grid_sample(values, positions, mode=mode, align_corners=False)


def _usual_extent_mm(contract: InputSpec) -> np.ndarray:
    """Return the usual extent in mm along slices, rows and columns: the geometric mean of the expected range.

    Raises:
        SpecError: The expected range of `coverage` or `field-of-view` has no bound on one side.
    """
    ranges = resolve_ranges(contract.expected_ranges)
    spans = [ranges["coverage"], *2 * [ranges["field-of-view"]]]
    if any(not low or not high for low, high in spans):
        raise SpecError(
            "input.expected_ranges: rotation in mm needs a lowest and a highest value of coverage and field-of-view, "
            f"got {spans}. Give both, or train with a protocol that rotates in cells."
        )
    return np.array([math.sqrt(low * high) for low, high in spans if low and high])


def _draw_affine(generator: np.random.Generator, protocol: Protocol, extent: np.ndarray) -> np.ndarray:
    """Draw the `(3, 4)` map from output to input coordinates that `affine_grid` takes: columns, rows, slices."""
    angles = np.radians(protocol.rotation_degrees) * generator.uniform(-1, 1, 3)
    angles *= generator.random() < protocol.rotation_prob
    size = 1 + protocol.zoom * (1.0 if protocol.zoom_mode == "always" else generator.uniform(-1, 1))
    shift = 2 * protocol.shift * generator.uniform(-1, 1, 3)
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (other for other in range(3) if other != axis)
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        rotation = rotation @ step
    rotation *= extent[None, :] / extent[:, None] / size  # normalised coordinates run from -1 to 1 on every axis
    if generator.random() < protocol.flip_prob:
        rotation[:, 2] *= -1
    return np.concatenate([rotation, shift[:, None]], axis=1)[::-1, [2, 1, 0, 3]].astype(np.float32)


def _draw_signed(generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Draw a number from -1 to 1 with each generator."""
    return np.array([generator.uniform(-1, 1) for generator in generators], np.float32)
