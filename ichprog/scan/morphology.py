"""Binary morphology and separable resampling of three-dimensional arrays, with NumPy alone.

The import of SciPy takes longer than the brain extraction of a scan. Connected components are labelled from runs of
equal voxels along the rows of a mask, which is faster than visiting every voxel.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Box = tuple[slice, ...]
Bands = list[tuple[np.ndarray, slice]]

_BAND_ROWS = 8  # few enough to leave zeros out and to keep a BLAS from starting threads


def bounding_box(mask: np.ndarray) -> Box:
    """Return the smallest box that contains a mask, or an empty box if the mask is empty.

    Args:
        mask: Bool array.

    Examples:
        >>> bounding_box(np.array([[False, True, True], [False, False, False]]))
        (slice(0, 1, None), slice(1, 3, None))
    """
    axes = range(mask.ndim)
    occupied = [np.flatnonzero(mask.any(tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0) for at in occupied)


def filter_components(
    mask: np.ndarray, keep: Callable[[np.ndarray], np.ndarray], count_in: np.ndarray | None = None
) -> np.ndarray:
    """Return the connected components of a mask that a criterion keeps.

    Voxels are connected if they share a face.

    Args:
        mask: `(i, j, k)` bool.
        keep: Function from the sizes of all components, in voxels, to whether each component is kept.
        count_in: Voxels that count towards the size of a component; all voxels by default.

    Examples:
        >>> line = np.array([1, 1, 0, 1, 0], bool)[:, None, None]
        >>> filter_components(line, lambda sizes: sizes >= 2).ravel().astype(int)
        array([1, 1, 0, 0, 0])
    """
    box = bounding_box(mask)
    padded = _pad(mask[box], edge=False)
    starts, ends, component = _label_runs(padded)
    if count_in is None:
        sizes = ends - starts
    else:
        counts = np.zeros_like(padded)  # in the same memory order
        counts[1:-1, 1:-1, 1:-1] = count_in[box]
        cumulative = np.concatenate([[0], np.cumsum(counts.ravel("K"))])
        sizes = cumulative[ends] - cumulative[starts]
    is_kept = keep(np.bincount(component, sizes))[component]
    result = np.zeros_like(mask)
    result[box] = _draw_runs(starts[is_kept], ends[is_kept], padded)
    return result


def largest_component(mask: np.ndarray, count_in: np.ndarray | None = None) -> np.ndarray:
    """Return the largest connected component of a mask.

    Args:
        mask: `(i, j, k)` bool.
        count_in: Voxels that count towards the size of a component; all voxels by default.

    Examples:
        >>> line = np.array([1, 1, 0, 1, 0], bool)[:, None, None]
        >>> largest_component(line).ravel().astype(int)
        array([1, 1, 0, 0, 0])
    """
    return filter_components(
        mask, lambda sizes: np.arange(1, sizes.size + 1) == np.argmax(np.append(0, sizes)), count_in
    )


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Return a mask with its holes filled.

    A hole is what cannot be reached from outside the array without crossing the mask.

    Args:
        mask: `(i, j, k)` bool.

    Examples:
        >>> shell = np.ones((3, 3, 3), bool)
        >>> shell[1, 1, 1] = False
        >>> bool(fill_holes(shell).all())
        True
    """
    box = bounding_box(mask)
    padded = _pad(~mask[box], edge=True)
    starts, ends, component = _label_runs(padded)
    is_outside = component == 0
    result = np.zeros_like(mask)
    result[box] = ~_draw_runs(starts[is_outside], ends[is_outside], padded)
    return result


def dilate_mm(mask: np.ndarray, radius_mm: float, spacing: Sequence[float]) -> np.ndarray:
    """Return the voxels that lie within a distance of a mask, the mask included.

    Args:
        mask: `(i, j, k)` bool.
        radius_mm: Distance in mm.
        spacing: Voxel spacing along each axis, in mm.

    Examples:
        >>> point = np.array([0, 0, 1, 0, 0], bool)[:, None, None]
        >>> dilate_mm(point, 2.0, (2.0, 1.0, 1.0)).ravel().astype(int)
        array([0, 1, 1, 1, 0])
    """
    reach = [int(radius_mm / step) for step in spacing]
    i, j, k = (np.arange(-r, r + 1) * step for r, step in zip(reach, spacing, strict=True))
    ball = np.sqrt((i * i)[:, None, None] + (j * j)[:, None] + k * k) <= radius_mm
    padded = np.pad(mask, [(r, r) for r in reach])  # so that a step in the array is a step in memory
    flat, result = padded.ravel(), np.zeros(padded.size, bool)
    step_i, step_j = padded.shape[1] * padded.shape[2], padded.shape[2]
    run = flat.copy()  # the mask, extended along k by half the ball's extent there
    for half in range(reach[2] + 1):
        if half:
            run[half:] |= flat[:-half]
            run[:-half] |= flat[half:]
        for a, b in np.argwhere(ball.sum(2) == 2 * half + 1) - reach[:2]:
            step = int(a * step_i + b * step_j)
            result[max(step, 0) : result.size + min(step, 0)] |= run[max(-step, 0) : run.size - max(step, 0)]
    return result.reshape(padded.shape)[tuple(slice(r, r + n) for r, n in zip(reach, mask.shape, strict=True))]


def distance_mm(mask: np.ndarray, spacing: Sequence[float], limit_mm: float) -> np.ndarray:
    """Return the distance from every voxel to the nearest voxel of a mask.

    Args:
        mask: Bool array.
        spacing: Voxel spacing along each axis, in mm.
        limit_mm: Distances up to this limit are exact; all others are greater than the limit or infinite.

    Returns:
        float32 distances in mm, 0 in the mask.

    Examples:
        >>> distance_mm(np.array([True, False, False]), [2.0], 10.0)
        array([0., 2., 4.], dtype=float32)
    """
    squared = np.where(mask, np.float32(0), np.float32(np.inf))
    for axis, mm in enumerate(spacing):
        before = squared.swapaxes(axis, 0)
        after = before.copy()
        for step in range(1, int(limit_mm / mm) + 1):
            added = np.float32((step * mm) ** 2)
            np.minimum(after[step:], before[:-step] + added, out=after[step:])
            np.minimum(after[:-step], before[step:] + added, out=after[:-step])
        squared = after.swapaxes(axis, 0)
    return np.sqrt(squared)


def resample(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resample an array to another grid over the same extent.

    Values are interpolated linearly towards a finer grid and averaged towards a coarser one.

    Args:
        values: Array of numbers with at least two axes.
        shape: Shape of the other grid.

    Returns:
        float32 array of that shape.

    Examples:
        >>> resample(np.array([[0.0, 2.0, 4.0, 6.0]]), (1, 2)).round(2)
        array([[0.86, 5.14]], dtype=float32)
    """
    return resample_separable(
        values, [cut_bands(triangle_weights(n, m)) for n, m in zip(values.shape, shape, strict=True)]
    )


def triangle_weights(n: int, m: int) -> np.ndarray:
    """Return triangular resampling weights, as wide as the coarser of two grids over one extent.

    Args:
        n: Number of cells of the known grid.
        m: Number of cells of the wanted grid.

    Returns:
        `(m, n)` float32; every row adds up to 1.

    Examples:
        >>> triangle_weights(2, 3)
        array([[1. , 0. ],
               [0.5, 0.5],
               [0. , 1. ]], dtype=float32)
    """
    distance = np.abs((np.arange(m)[:, None] + 0.5) / m - (np.arange(n) + 0.5) / n)
    triangles = np.maximum(0, 1 - distance * min(n, m)).astype(np.float32)
    weights: np.ndarray = triangles / triangles.sum(1, keepdims=True)
    return weights


def cut_bands(matrix: np.ndarray) -> Bands:
    """Cut a banded matrix into groups of rows and drop the columns that are zero in each group.

    Args:
        matrix: `(m, n)` weights; the nonzero weights of every row are neighbours.

    Returns:
        For each group of rows, its nonzero columns and where these columns lie.
    """
    bands = []
    for start in range(0, len(matrix), _BAND_ROWS):
        rows = matrix[start : start + _BAND_ROWS]
        _, columns = bounding_box(rows > 0)
        bands.append((rows[:, columns], columns))
    return bands


def resample_separable(values: np.ndarray, matrices: Sequence[Bands]) -> np.ndarray:
    """Multiply the leading axes of an array by one banded matrix each.

    Args:
        values: Array of numbers with at least two axes.
        matrices: One banded matrix for each leading axis; the remaining axes do not change.

    Returns:
        float32 array of the new shape.
    """
    return np.ascontiguousarray(_resample_axes(values, matrices))


def resample_slices(slices: Iterable[np.ndarray], matrices: Sequence[Bands]) -> np.ndarray:
    """Multiply every axis of a stack of slices by a banded matrix, without the whole stack in memory.

    Args:
        slices: `(i, j)` for each k.
        matrices: Banded matrices for i, j and k.

    Returns:
        `(i, j, k)` float32 array of the new shape.
    """
    i, j, k = matrices
    planes = np.stack([_resample_axes(plane.T, (j, i)) for plane in slices])
    return np.ascontiguousarray(_resample_axes(planes, (k,)).transpose(2, 1, 0))


def _resample_axes(values: np.ndarray, matrices: Sequence[Bands]) -> np.ndarray:
    """Compute `resample_separable` in whatever memory order results."""
    values = np.asarray(values, np.float32)
    growth = [sum(len(rows) for rows, _ in bands) / n for bands, n in zip(matrices, values.shape, strict=False)]
    for axis in np.argsort(growth, kind="stable"):  # shrink first, grow last
        # A BLAS needs two axes, one of them contiguous in memory.
        *outer, inner = sorted((a for a in range(values.ndim) if a != axis), key=lambda a: -values.strides[a])
        order = (*outer, int(axis), inner)
        transposed = values.transpose(order)
        products = [rows @ transposed[..., columns, :] for rows, columns in matrices[axis]]
        values = np.concatenate(products, -2).transpose(np.argsort(order))
    return values


def _pad(mask: np.ndarray, *, edge: bool) -> np.ndarray:
    """Pad a mask by one voxel on all sides and keep its memory order."""
    return np.pad(mask.copy("K"), 1, constant_values=edge)


def _label_runs(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the runs of true voxels along the rows of a mask and the connected component of each run.

    Args:
        padded: `(a, b, c)` bool, contiguous in C or Fortran order; its outermost voxels are all equal.

    Returns:
        Start and end of each run in memory, and its component, numbered from 0 in order of their first runs.
    """
    flat = padded.ravel("K")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        edges = np.concatenate([[0], edges, [flat.size]])
    starts, ends = edges[::2], edges[1::2]
    pairs = []
    for step in sorted(padded.strides)[1:]:  # runs that touch in neighbouring rows
        first = np.searchsorted(ends, starts - step, "right")
        count = np.maximum(np.searchsorted(starts, ends - step) - first, 0)
        run = np.repeat(np.arange(starts.size), count)
        pairs.append((run, np.arange(run.size) - np.repeat(np.cumsum(count) - count - first, count)))
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    root = np.arange(starts.size)  # the first run that each run is connected with, as found until now
    while one.size:
        apart = root[one] != root[other]
        one, other = one[apart], other[apart]
        low, high = np.minimum(root[one], root[other]), np.maximum(root[one], root[other])
        np.minimum.at(root, high, low)
        while not np.array_equal(root, shorter := root[root]):
            root = shorter
    is_first = root == np.arange(root.size)
    return starts, ends, (np.cumsum(is_first) - 1)[root]


def _draw_runs(starts: np.ndarray, ends: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """Return runs as a mask without the padding."""
    edges = np.concatenate([[0], np.column_stack([starts, ends]).ravel(), [padded.size]])
    flat = np.repeat(np.arange(edges.size - 1) % 2 == 1, np.diff(edges))
    return flat.reshape(padded.shape, order="F" if padded.flags.fnc else "C")[1:-1, 1:-1, 1:-1]
