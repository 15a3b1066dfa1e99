"""Convert a scan to the grid of a network, and a map over the grid to the scan.

Source: the published preprocessing of Cobo et al., MLMI 2024 (doi 10.1007/978-3-031-73290-4_2).
Both directions use the same geometry: along each axis the voxels of the scan, zero-padded to `padded` voxels, have the
same extent as the cells of the grid.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ichprog.spec import InputSpec, Window


def prepare(hu: np.ndarray, contract: InputSpec) -> np.ndarray:
    """Return the grid of a scan.

    Args:
        hu: `(i, j, k)` HU in LPS order: i to the patient's left, j to posterior, k to superior.
        contract: Input contract of the model.

    Returns:
        `(D, H, W)` float32: slices from inferior to superior, rows from anterior to posterior, columns from the
        patient's right to left, values in [0, 1].

    Examples:
        ```python
        grid = prepare(model.load_scan("scan.nii.gz").hu, model.spec.input)
        ```
    """
    planes = np.asarray(hu, np.float32, order="F").transpose(2, 1, 0)
    (count, before, padded), *in_plane = _layout(planes.shape, contract)
    slices, (rows, columns) = _cells(count, padded), (_cells(cells, voxels) for cells, _, voxels in in_plane)
    grid = np.zeros(contract.shape, np.float32)
    for index, plane in enumerate(planes, before):  # one plane fits the CPU cache
        visible = _in_window(plane, contract.window)
        if not visible.any():
            continue
        high, wide = rows.covering(np.flatnonzero(visible.any(1))), columns.covering(np.flatnonzero(visible.any(0)))
        values = _window(plane[rows.voxels(high), columns.voxels(wide)], contract.window)
        means = columns.average(rows.average(values, high).T, wide).T
        for cell in np.flatnonzero((slices.first <= index) & (index < slices.beyond)):
            grid[cell, high, wide] += means / np.float32(slices.beyond[cell] - slices.first[cell])
    return grid


def to_scan(values: np.ndarray, shape: tuple[int, int, int], contract: InputSpec) -> np.ndarray:
    """Resample a map over the grid to the voxels of the scan.

    Each axis is interpolated linearly between the centres of the cells, and constant beyond the outermost centres.

    Args:
        values: `(d, h, w)`: slices, rows, columns over the extent of the grid, at its resolution or a lower one.
        shape: Shape `(i, j, k)` of the scan in LPS order.
        contract: Input contract of the model.

    Returns:
        `(i, j, k)` float32.

    Examples:
        ```python
        values = to_scan(saliency.grid_map, scan.hu.shape, model.spec.input)
        ```
    """
    slices, rows, columns = (
        (np.arange(voxels) + before + 0.5) * (cells / padded) - 0.5
        for voxels, cells, (_, before, padded) in zip(
            shape[::-1], values.shape, _layout(shape[::-1], contract), strict=True
        )
    )
    planes = _interpolate(np.asarray(values, np.float32), 0, slices)
    result = np.empty(shape[::-1], np.float32)
    for into, plane in zip(result, planes, strict=True):  # one plane fits the CPU cache
        into[:] = _interpolate(_interpolate(plane, 0, rows), 1, columns)
    return result.transpose(2, 1, 0)


def cells_to_scan(values: np.ndarray, shape: tuple[int, int, int], contract: InputSpec) -> np.ndarray:
    """Return for each voxel of the scan the value of the cell with the voxel's centre, without interpolation.

    Args:
        values: As in `to_scan`.
        shape: Shape `(i, j, k)` of the scan in LPS order.
        contract: Input contract of the model.

    Returns:
        `(i, j, k)` of the type of the values.

    Examples:
        >>> from ichprog import zoo
        >>> contract = zoo.find("compact.prognosis_gcs3_age").input
        >>> cells_to_scan(np.array([[[1, 2]]]), (4, 1, 1), contract)[:, 0, 0].tolist()
        [1, 1, 2, 2]
    """
    indices = (
        np.floor((np.arange(voxels) + before + 0.5) * (cells / padded)).astype(int).clip(0, cells - 1)
        for voxels, cells, (_, before, padded) in zip(
            shape[::-1], values.shape, _layout(shape[::-1], contract), strict=True
        )
    )
    return values[np.ix_(*indices)].transpose(2, 1, 0)


def prepare_regions(mask: np.ndarray, regions: int, contract: InputSpec) -> np.ndarray:
    """Return the fraction of each cell of the grid that lies in each region of a mask.

    Args:
        mask: `(i, j, k)` region numbers in LPS order, 0 outside all regions.
        regions: Number of regions.
        contract: Input contract of the model.

    Returns:
        `(regions, D, H, W)` float32.

    Examples:
        >>> from ichprog import zoo
        >>> contract = zoo.find("compact.prognosis_gcs3_age").input
        >>> prepare_regions(np.ones((56, 56, 12), np.uint8), 2, contract).mean((1, 2, 3)).tolist()
        [1.0, 0.0]
    """
    full = replace(contract, window=Window(0.0, 1.0, "one"))
    return np.stack([prepare((mask == number).astype(np.float32), full) for number in range(1, regions + 1)])


def slices_to_scan(values: np.ndarray, slices: int, contract: InputSpec) -> np.ndarray:
    """Interpolate one value for each slice of the grid to the slices of the scan.

    Args:
        values: `(d,)` over the extent of the grid along its slices.
        slices: Number of slices of the scan.
        contract: Input contract of the model.

    Returns:
        `(slices,)`, from inferior to superior.

    Examples:
        >>> from ichprog import zoo
        >>> slices_to_scan(np.array([0.0, 1.0]), 4, zoo.find("compact.prognosis_gcs3_age").input).tolist()
        [0.0, 0.25, 0.75, 1.0]
    """
    result: np.ndarray = to_scan(values[:, None, None], (1, 1, slices), contract)[0, 0]
    return result


def _layout(shape: tuple[int, ...], contract: InputSpec) -> Iterator[tuple[int, int, int]]:
    """Yield cells, voxels padded in front and voxels after padding, for slices, rows and columns."""
    for axis, (voxels, cells) in enumerate(zip(shape, contract.shape, strict=True)):
        padded = max(voxels, cells) if axis == 0 and contract.pad_slices else voxels
        yield cells, (padded - voxels) // 2, padded


def _in_window(hu: np.ndarray, window: Window) -> np.ndarray:
    """Return where the windowed values can differ from 0."""
    above = hu > np.float32(window.low)
    return above & (hu < np.float32(window.high)) if window.above == "zero" else above


def _window(hu: np.ndarray, window: Window) -> np.ndarray:
    """Scale HU to [0, 1], in the published order of operations so that values at the edges round in the same way."""
    values = (hu - np.float32(window.low)) / np.float32(window.high - window.low)
    values[values >= 1] = 0 if window.above == "zero" else 1
    values[values < 0] = 0
    return values


class _Cells(NamedTuple):
    """The cells of adaptive average pooling along one axis: a cell is the mean of neighbouring voxels.

    Attributes:
        first: The first voxel of each cell, floor(c n / m).
        beyond: The first voxel after each cell, ceil((c + 1) n / m).
    """

    first: np.ndarray
    beyond: np.ndarray

    def covering(self, voxels: np.ndarray) -> slice:
        """Return the cells that contain voxels between the first and the last of these voxels."""
        start = np.searchsorted(self.beyond, voxels[0], "right")
        return slice(int(start), int(np.searchsorted(self.first, voxels[-1], "right")))

    def voxels(self, cells: slice) -> slice:
        """Return the voxels of neighbouring cells."""
        return slice(int(self.first[cells.start]), int(self.beyond[cells.stop - 1]))

    def average(self, values: np.ndarray, cells: slice) -> np.ndarray:
        """Average the voxels of neighbouring cells.

        Args:
            values: `(voxels, others)`, all voxels of these cells.
            cells: The cells.

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
    """Interpolate one axis at fractional cell positions."""
    positions = positions.clip(0, values.shape[axis] - 1)
    left = np.floor(positions).astype(int)
    right = np.minimum(left + 1, values.shape[axis] - 1)
    column = [1] * values.ndim
    column[axis] = len(positions)
    weight = (positions - left).astype(np.float32).reshape(column)
    result: np.ndarray = values.take(left, axis) * (1 - weight) + values.take(right, axis) * weight
    return result
