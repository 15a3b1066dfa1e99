"""Masks in three dimensions, and grids over the same extent: what finding and checking a brain is made of.

SciPy has most of this. Its import alone costs more than all that is done here with a scan, and it looks at every voxel
where runs of equal ones do: connected pieces are found among the runs of a mask along its rows.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Box = tuple[slice, ...]
Bands = list[tuple[np.ndarray, slice]]

_BAND = 8  # rows of a matrix at once: few enough to leave zeros out and to keep a BLAS from starting threads


def bounds(mask: np.ndarray) -> Box:
    """The smallest box around a mask; an empty one where nothing is in it.

    Args:
        mask: Bool array.
    """
    axes = range(mask.ndim)
    seen = [np.flatnonzero(mask.any(tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0) for at in seen)


def pieces(mask: np.ndarray, keep: Callable[[np.ndarray], np.ndarray], among: np.ndarray | None = None) -> np.ndarray:
    """Some of a mask's connected pieces; voxels are connected where they share a face.

    Args:
        mask: `(i, j, k)` bool.
        keep: From every piece's number of voxels to whether it is kept.
        among: Where voxels count; everywhere if not given.
    """
    box = bounds(mask)
    padded = _padded(mask[box], edge=False)
    starts, ends, piece = _runs(padded)
    if among is None:
        sizes = ends - starts
    else:
        counts = np.zeros_like(padded)  # in the same order of memory
        counts[1:-1, 1:-1, 1:-1] = among[box]
        counted = np.concatenate([[0], np.cumsum(counts.ravel("K"))])
        sizes = counted[ends] - counted[starts]
    kept = keep(np.bincount(piece, sizes))[piece]
    found = np.zeros_like(mask)
    found[box] = _drawn(starts[kept], ends[kept], padded)
    return found


def largest(mask: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """The largest connected piece of a mask.

    Args:
        mask: `(i, j, k)` bool.
        among: Where voxels count towards a piece's size; everywhere if not given.
    """
    return pieces(mask, lambda sizes: np.arange(1, sizes.size + 1) == np.argmax(np.append(0, sizes)), among)


def filled(mask: np.ndarray) -> np.ndarray:
    """A mask with its holes: whatever cannot be reached from beyond the array without crossing it.

    Args:
        mask: `(i, j, k)` bool.
    """
    box = bounds(mask)
    padded = _padded(~mask[box], edge=True)
    starts, ends, piece = _runs(padded)
    outside = piece == 0
    found = np.zeros_like(mask)
    found[box] = ~_drawn(starts[outside], ends[outside], padded)
    return found


def within(mask: np.ndarray, mm: float, spacing: Sequence[float]) -> np.ndarray:
    """The voxels that lie up to some distance from a mask, the mask among them.

    Args:
        mask: `(i, j, k)` bool.
        mm: The distance.
        spacing: Distance of voxels along each axis, in mm.
    """
    reach = [int(mm / step) for step in spacing]
    i, j, k = (np.arange(-r, r + 1) * step for r, step in zip(reach, spacing, strict=True))
    ball = np.sqrt((i * i)[:, None, None] + (j * j)[:, None] + k * k) <= mm
    padded = np.pad(mask, [(r, r) for r in reach])  # so that a step in the array is a step in memory
    flat, found = padded.ravel(), np.zeros(padded.size, bool)
    far, near = padded.shape[1] * padded.shape[2], padded.shape[2]
    run = flat.copy()  # the mask, longer along k by as much as the ball is
    for half in range(reach[2] + 1):
        if half:
            run[half:] |= flat[:-half]
            run[:-half] |= flat[half:]
        for a, b in np.argwhere(ball.sum(2) == 2 * half + 1) - reach[:2]:
            step = int(a * far + b * near)
            found[max(step, 0) : found.size + min(step, 0)] |= run[max(-step, 0) : run.size - max(step, 0)]
    return found.reshape(padded.shape)[tuple(slice(r, r + n) for r, n in zip(reach, mask.shape, strict=True))]


def distance(mask: np.ndarray, spacing: Sequence[float], most: float) -> np.ndarray:
    """How far from a mask each voxel lies.

    Args:
        mask: Bool array.
        spacing: Distance of voxels along each axis, in mm.
        most: Distances in mm are right up to here, and greater than this, maybe infinite, beyond.

    Returns:
        float32 distance to the nearest voxel of the mask in mm, 0 in it.
    """
    square = np.where(mask, np.float32(0), np.float32(np.inf))
    for axis, mm in enumerate(spacing):
        here = square.swapaxes(axis, 0)
        least = here.copy()
        for step in range(1, int(most / mm) + 1):
            more = np.float32((step * mm) ** 2)
            np.minimum(least[step:], here[:-step] + more, out=least[step:])
            np.minimum(least[:-step], here[step:] + more, out=least[:-step])
        square = least.swapaxes(axis, 0)
    return np.sqrt(square)


def resample(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Values on another grid over the same extent: linear towards a finer grid, averaged towards a coarser one.

    Args:
        values: An array of numbers with at least two axes.
        shape: Its shape on the other grid.

    Returns:
        float32 array of that shape.
    """
    return weigh(values, [banded(weights(n, m)) for n, m in zip(values.shape, shape, strict=True)])


def weights(n: int, m: int) -> np.ndarray:
    """Triangular weights, as wide as the coarser of two grids over one extent.

    Args:
        n: Cells of the grid where values are known.
        m: Cells of the grid where they are wanted.

    Returns:
        `(m, n)` float32, every row adding to 1.
    """
    far = np.abs((np.arange(m)[:, None] + 0.5) / m - (np.arange(n) + 0.5) / n)
    triangles = np.maximum(0, 1 - far * min(n, m)).astype(np.float32)
    shares: np.ndarray = triangles / triangles.sum(1, keepdims=True)
    return shares


def banded(matrix: np.ndarray) -> Bands:
    """A matrix whose rows are 0 but for a few neighbouring columns, cut into a few rows each and without its zeros.

    Args:
        matrix: `(new, old)` weights of old positions at new ones.

    Returns:
        For each band its rows of weights and the old positions that they are of.
    """
    bands = []
    for start in range(0, len(matrix), _BAND):
        rows = matrix[start : start + _BAND]
        _, old = bounds(rows > 0)
        bands.append((rows[:, old], old))
    return bands


def weigh(values: np.ndarray, matrices: Sequence[Bands]) -> np.ndarray:
    """Weighted sums along the first axes of an array.

    Args:
        values: An array of numbers with at least two axes.
        matrices: For each axis, the weights; axes beyond these stay as they are.

    Returns:
        float32 array of the new shape.
    """
    return np.ascontiguousarray(_weighed(values, matrices))


def _weighed(values: np.ndarray, matrices: Sequence[Bands]) -> np.ndarray:
    """As `weigh`, in whatever order of memory it comes out."""
    values = np.asarray(values, np.float32)
    growth = [sum(len(rows) for rows, _ in bands) / n for bands, n in zip(matrices, values.shape, strict=False)]
    for axis in np.argsort(growth, kind="stable"):  # shrink first, grow last
        # A BLAS takes two axes, one of which has its numbers side by side.
        *outer, inner = sorted((a for a in range(values.ndim) if a != axis), key=lambda a: -values.strides[a])
        order = (*outer, int(axis), inner)
        turned = values.transpose(order)
        sums = [rows @ turned[..., old, :] for rows, old in matrices[axis]]
        values = np.concatenate(sums, -2).transpose(np.argsort(order))
    return values


def weigh_slices(slices: Iterable[np.ndarray], matrices: Sequence[Bands]) -> np.ndarray:
    """Weighted sums along every axis of an array that need not be in memory as a whole.

    Args:
        slices: `(i, j)` for each k.
        matrices: The weights for i, j and k.

    Returns:
        `(i, j, k)` float32 array of the new shape.
    """
    i, j, k = matrices
    planes = np.stack([_weighed(plane.T, (j, i)) for plane in slices])
    return np.ascontiguousarray(_weighed(planes, (k,)).transpose(2, 1, 0))


def _padded(mask: np.ndarray, *, edge: bool) -> np.ndarray:
    """A mask with one voxel more on all sides; rows stay rows in memory."""
    return np.pad(mask.copy("K"), 1, constant_values=edge)


def _runs(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of true voxels along the rows of a mask, and the connected piece that each belongs to.

    Args:
        padded: `(a, b, c)` bool, contiguous in one order or the other, its outermost voxels all alike.

    Returns:
        Where in memory each run starts, where it ends, and its piece, numbered from 0 in order of their first runs.
    """
    flat = padded.ravel("K")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        edges = np.concatenate([[0], edges, [flat.size]])
    starts, ends = edges[::2], edges[1::2]
    pairs = []
    for step in sorted(padded.strides)[1:]:  # runs that lie side by side in neighbouring rows
        first = np.searchsorted(ends, starts - step, "right")
        count = np.maximum(np.searchsorted(starts, ends - step) - first, 0)
        here = np.repeat(np.arange(starts.size), count)
        pairs.append((here, np.arange(here.size) - np.repeat(np.cumsum(count) - count - first, count)))
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    piece = np.arange(starts.size)  # the first run that a run is known to be connected with
    while one.size:
        apart = piece[one] != piece[other]
        one, other = one[apart], other[apart]
        low, high = np.minimum(piece[one], piece[other]), np.maximum(piece[one], piece[other])
        np.minimum.at(piece, high, low)
        while not np.array_equal(piece, nearer := piece[piece]):
            piece = nearer
    first = piece == np.arange(piece.size)
    return starts, ends, (np.cumsum(first) - 1)[piece]


def _drawn(starts: np.ndarray, ends: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """Runs as a mask again, without its padding."""
    edges = np.concatenate([[0], np.column_stack([starts, ends]).ravel(), [padded.size]])
    flat = np.repeat(np.arange(edges.size - 1) % 2 == 1, np.diff(edges))
    return flat.reshape(padded.shape, order="F" if padded.flags.fnc else "C")[1:-1, 1:-1, 1:-1]
