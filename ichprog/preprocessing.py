"""The grid a network sees, prepared from a scan as its spec says, and the way back from a map to the scan.

Source of the recipe: the published preprocessing of Cobo et al., MLMI 2024 (doi 10.1007/978-3-031-73290-4_2).
Along each axis both directions are the same geometry: the scan's voxels, zero-padded to `padded` of them, share one
extent with the grid's cells.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ichprog.spec import InputSpec, Window


def prepare(hu: np.ndarray, contract: InputSpec) -> np.ndarray:
    """The grid of a scan.

    Args:
        hu: `(i, j, k)` HU in LPS order: i to the patient's left, j to posterior, k to superior.
        contract: The model's input contract.

    Returns:
        `(D, H, W)` float32: slices from inferior to superior, rows from anterior to posterior, columns from the
        patient's right to left, values in [0, 1].
    """
    planes = np.asarray(hu, np.float32, order="F").transpose(2, 1, 0)
    (count, before, padded), *in_plane = _layout(planes.shape, contract)
    slices, (rows, columns) = _cells(count, padded), (_cells(cells, voxels) for cells, _, voxels in in_plane)
    grid = np.zeros(contract.shape, np.float32)
    for place, plane in enumerate(planes, before):  # one at a time stays in the processor's cache
        seen = _seen(plane, contract.window)
        if not seen.any():
            continue
        high, wide = rows.reached(np.flatnonzero(seen.any(1))), columns.reached(np.flatnonzero(seen.any(0)))
        values = _window(plane[rows.voxels(high), columns.voxels(wide)], contract.window)
        means = columns.average(rows.average(values, high).T, wide).T
        for cell in np.flatnonzero((slices.first <= place) & (place < slices.beyond)):
            grid[cell, high, wide] += means / np.float32(slices.beyond[cell] - slices.first[cell])
    return grid


def to_scan(values: np.ndarray, shape: tuple[int, int, int], contract: InputSpec) -> np.ndarray:
    """A map over the grid, or coarser than it, as values over the scan's voxels.

    Linear interpolation between the map's cells, each axis by itself; nearest beyond the outermost centres.

    Args:
        values: `(d, h, w)`: slices, rows, columns, evenly dividing the grid's extent.
        shape: The scan's `(i, j, k)` shape in LPS order.
        contract: The model's input contract.

    Returns:
        `(i, j, k)` float32 over the scan's voxels.
    """
    slices, rows, columns = (
        (np.arange(voxels) + before + 0.5) * (cells / padded) - 0.5
        for voxels, cells, (_, before, padded) in zip(
            shape[::-1], values.shape, _layout(shape[::-1], contract), strict=True
        )
    )
    planes = _interpolate(np.asarray(values, np.float32), 0, slices)
    result = np.empty(shape[::-1], np.float32)
    for into, plane in zip(result, planes, strict=True):  # one at a time stays in the processor's cache
        into[:] = _interpolate(_interpolate(plane, 0, rows), 1, columns)
    return result.transpose(2, 1, 0)


def _layout(shape: tuple[int, ...], contract: InputSpec) -> Iterator[tuple[int, int, int]]:
    """For slices, rows and columns: the grid's cells, the voxels padded in front, the voxels after padding."""
    for axis, (voxels, cells) in enumerate(zip(shape, contract.shape, strict=True)):
        padded = max(voxels, cells) if axis == 0 and contract.pad_slices else voxels
        yield cells, (padded - voxels) // 2, padded


def _seen(hu: np.ndarray, window: Window) -> np.ndarray:
    """Where a window may leave anything but 0."""
    above = hu > np.float32(window.low)
    return above & (hu < np.float32(window.high)) if window.above == "zero" else above


def _window(hu: np.ndarray, window: Window) -> np.ndarray:
    """HU to [0, 1], in the published order of operations so that values at the edges fall the same way."""
    values = (hu - np.float32(window.low)) / np.float32(window.high - window.low)
    values[values >= 1] = 0 if window.above == "zero" else 1
    values[values < 0] = 0
    return values


class _Cells(NamedTuple):
    """The cells along one axis, as adaptive average pooling has them: cell c is the mean of some of n voxels.

    Attributes:
        first: The first voxel of each cell, floor(c n / m).
        beyond: The first voxel after each cell, ceil((c + 1) n / m).
    """

    first: np.ndarray
    beyond: np.ndarray

    def reached(self, voxels: np.ndarray) -> slice:
        """The cells that have voxels between the first and the last of some."""
        start = np.searchsorted(self.beyond, voxels[0], "right")
        return slice(int(start), int(np.searchsorted(self.first, voxels[-1], "right")))

    def voxels(self, cells: slice) -> slice:
        """All voxels of neighbouring cells."""
        return slice(int(self.first[cells.start]), int(self.beyond[cells.stop - 1]))

    def average(self, values: np.ndarray, cells: slice) -> np.ndarray:
        """The means of neighbouring cells.

        Args:
            values: `(voxels, others)`, all voxels of the cells.
            cells: Which cells.

        Returns:
            `(cells, others)`.
        """
        first, size = self.first[cells] - self.first[cells.start], (self.beyond - self.first)[cells]
        total: np.ndarray = values.take(first, 0)
        for step in range(1, int(size.max())):
            larger = np.flatnonzero(size > step)
            total[larger] += values.take(first[larger] + step, 0)
        total /= size.astype(np.float32)[:, None]
        return total


def _cells(count: int, voxels: int) -> _Cells:
    cell = np.arange(count)
    return _Cells(cell * voxels // count, -(-(cell + 1) * voxels // count))


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
