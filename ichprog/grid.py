"""The grid a network sees, prepared from a scan as its spec says, and the way back from a map to the scan.

Source of the recipe: the published preprocessing of Cobo et al., MLMI 2024 (doi 10.1007/978-3-031-73290-4_2).
Along each axis both directions are the same geometry: the scan's voxels, zero-padded to `padded` of them, share one
extent with the grid's cells.
"""

from collections.abc import Iterator

import numpy as np

from ichprog.spec import Input, Window


def prepare(hu: np.ndarray, contract: Input) -> np.ndarray:
    """The grid of a scan.

    Args:
        hu: `(i, j, k)` HU in LPS order: i to the patient's left, j to posterior, k to superior.
        contract: The model's input contract.

    Returns:
        `(D, H, W)` float32: slices from inferior to superior, rows from anterior to posterior, columns from the
        patient's right to left, values in [0, 1].
    """
    grid = _window(np.asarray(hu, np.float32), contract.window).transpose(2, 1, 0)
    # Averaging the slice axis first would touch every pixel of the scan; in the plane first shrinks it early.
    for axis, (cells, before, padded) in reversed(list(enumerate(_layout(grid.shape, contract)))):
        grid = _average(grid, axis, cells, before, padded)
    return np.ascontiguousarray(grid)


def to_scan(values: np.ndarray, shape: tuple[int, int, int], contract: Input) -> np.ndarray:
    """A map over the grid, or coarser than it, as values over the scan's voxels.

    Linear interpolation between the map's cells, each axis by itself; nearest beyond the outermost centres.

    Args:
        values: `(d, h, w)`: slices, rows, columns, evenly dividing the grid's extent.
        shape: The scan's `(i, j, k)` shape in LPS order.
        contract: The model's input contract.

    Returns:
        `(i, j, k)` float32 over the scan's voxels.
    """
    result = np.asarray(values, np.float32)
    for axis, (_, before, padded) in enumerate(_layout(shape[::-1], contract)):
        voxels = np.arange(shape[::-1][axis]) + before + 0.5
        result = _interpolate(result, axis, voxels * (result.shape[axis] / padded) - 0.5)
    return np.ascontiguousarray(result.transpose(2, 1, 0))


def _layout(shape: tuple[int, ...], contract: Input) -> Iterator[tuple[int, int, int]]:
    """For slices, rows and columns: the grid's cells, the voxels padded in front, the voxels after padding."""
    for axis, (voxels, cells) in enumerate(zip(shape, contract.shape, strict=True)):
        padded = max(voxels, cells) if axis == 0 and contract.pad_slices else voxels
        yield cells, (padded - voxels) // 2, padded


def _window(hu: np.ndarray, window: Window) -> np.ndarray:
    """HU to [0, 1], in the published order of operations so that values at the edges fall the same way."""
    values = (hu - np.float32(window.low)) / np.float32(window.high - window.low)
    values[values >= 1] = 0 if window.above == "zero" else 1
    values[values < 0] = 0
    return values


def _average(values: np.ndarray, axis: int, cells: int, before: int, padded: int) -> np.ndarray:
    """Adaptive average pooling of one axis: cell c is the mean of voxels floor(c n / m) to ceil((c + 1) n / m)."""
    voxels = values.shape[axis]
    if cells == padded == voxels:
        return values
    first = np.arange(cells) * padded // cells
    beyond = -(-(np.arange(cells) + 1) * padded // cells)
    column = [1] * values.ndim
    column[axis] = cells
    total = np.zeros([cells if a == axis else n for a, n in enumerate(values.shape)], np.float32)
    for step in range(int((beyond - first).max())):
        source = first + step - before
        inside = (first + step < beyond) & (source >= 0) & (source < voxels)
        share = np.where(inside, 1 / (beyond - first), 0).astype(np.float32)
        total += values.take(source.clip(0, voxels - 1), axis) * share.reshape(column)
    return total


def _interpolate(values: np.ndarray, axis: int, positions: np.ndarray) -> np.ndarray:
    """Values of one axis at fractional cell positions."""
    positions = positions.clip(0, values.shape[axis] - 1)
    left = np.floor(positions).astype(int)
    right = np.minimum(left + 1, values.shape[axis] - 1)
    column = [1] * values.ndim
    column[axis] = len(positions)
    share = (positions - left).astype(np.float32).reshape(column)
    result: np.ndarray = values.take(left, axis) * (1 - share) + values.take(right, axis) * share
    return result
