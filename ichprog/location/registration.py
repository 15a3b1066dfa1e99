"""Register a brain to the atlas by its surface, with NumPy alone.

The map has nine parameters: rotation, translation and one scale for each axis. It brings the surface of the brain mask
to the surface of the atlas. The atlas is symmetric, so the plane `x = 0` is the plane of symmetry of the brain.
"""

from dataclasses import dataclass

import numpy as np

from ichprog.location.atlas import Atlas
from ichprog.scan.morphology import bounding_box
from ichprog.scan.volume import Spacing

_STEP_MM = 2.5  # distance of the voxels whose surface is used
_POINTS = 2500  # most points on the surface
_PITCHES_DEG = (-20.0, 0.0, 20.0)  # where the search starts
_ITERATIONS = (6, 14)  # from each start, and from the best one
_OUTLIER_MM = 4.0  # a surface farther away than this weighs less
_SURFACE_SD_MM, _INDEPENDENT = 3.0, 200.0  # expected distance of the surfaces, and number of independent points
_ANGLE_SD = np.radians([15.0, 8.0, 8.0])  # pitch, roll, yaw
_SCALE_SD = 0.06


@dataclass(frozen=True, eq=False)
class Registration:
    """Map a scan to the atlas.

    Attributes:
        matrix: `(3, 3)` from mm of the scan, `spacing * (-i, -j, k)`, to mm of the atlas.
        offset: `(3,)` in mm of the atlas.
        scale: `(3,)` mm of the atlas per mm of the head, along the axes of the atlas.
        residual_mm: Median distance between the surfaces of the brain and of the atlas, in mm of the atlas.
    """

    matrix: np.ndarray
    offset: np.ndarray
    scale: np.ndarray
    residual_mm: float

    def to_atlas(self, index: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
        """Map voxels to mm of the atlas.

        Args:
            index: `(3, n)` voxels (i, j, k) in LPS order.
            spacing_mm: Voxel spacing along i, j and k, in mm.
        """
        result: np.ndarray = self.matrix @ (index * _ras(spacing_mm)) + self.offset[:, None]
        return result

    def to_voxels(self, points: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
        """Map mm of the atlas to voxels.

        Args:
            points: `(3, n)` in mm of the atlas.
            spacing_mm: Voxel spacing along i, j and k, in mm.
        """
        result: np.ndarray = np.linalg.solve(self.matrix, points - self.offset[:, None]) / _ras(spacing_mm)
        return result


def register(brain: np.ndarray, spacing_mm: Spacing, atlas: Atlas) -> Registration:
    """Register a brain mask to an atlas.

    Args:
        brain: `(i, j, k)` bool brain mask in LPS order, not empty.
        spacing_mm: Voxel spacing along i, j and k, in mm.
        atlas: The atlas.
    """
    surface, weights, inside = _surface(brain, spacing_mm)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in atlas.distance.shape), indexing="ij")).reshape(3, -1)
    known = atlas.first[:, None] + atlas.distance_mm * grid[:, atlas.distance.ravel() > 0]
    centre = (np.percentile(inside, 1, axis=1) + np.percentile(inside, 99, axis=1)) / 2
    fits = []
    for pitch in _PITCHES_DEG:
        fit = _Fit.start(np.radians(pitch), inside - centre[:, None], known)
        fits.append(fit.improve(surface - centre[:, None], weights, atlas, _ITERATIONS[0]))
    best = min(fits, key=lambda fit: fit.cost).improve(surface - centre[:, None], weights, atlas, _ITERATIONS[1])
    matrix = best.scale[:, None] * best.turn
    depth, _ = atlas.depth_at(matrix @ (surface - centre[:, None]) + best.offset[:, None])
    return Registration(matrix, best.offset - matrix @ centre, best.scale, float(np.median(np.abs(depth))))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Hold the parameters of a registration and their cost."""

    turn: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    size: float  # expected scale
    cost: float = np.inf

    @classmethod
    def start(cls, pitch: float, inside: np.ndarray, known: np.ndarray) -> "_Fit":
        """Return the rotation by a pitch, with the extents matched."""
        turn = _rotation(np.array([pitch, 0.0, 0.0]))
        turned = turn @ inside
        known_low, known_high = np.percentile(known, (1, 99), axis=1)
        known_low[0] = -known_high[0]
        low, high = np.percentile(turned, (1, 99), axis=1)
        size = float(np.prod((known_high - known_low)[:2] / (high - low)[:2]) ** 0.5)
        offset = (known_low + known_high) / 2 - size * (low + high) / 2
        # The lower end of a brain depends on where the scan begins, so the upper ends are matched.
        offset[2] = known_high[2] - size * high[2]
        return cls(turn, np.full(3, size), offset, size)

    def improve(self, surface: np.ndarray, weights: np.ndarray, atlas: Atlas, iterations: int) -> "_Fit":
        """Return the fit after Gauss-Newton steps with weights that outliers lose."""
        fit = self
        for _ in range(iterations):
            fit = fit._step(surface, weights, atlas)
        return fit

    def _step(self, surface: np.ndarray, weights: np.ndarray, atlas: Atlas) -> "_Fit":
        turned = self.turn @ surface
        depth, slope = atlas.depth_at(self.scale[:, None] * turned + self.offset[:, None])
        pull = slope * self.scale[:, None]
        rotation = np.cross(turned.T, pull.T)  # derivative by a rotation about each axis
        jacobian = np.hstack([rotation, slope.T, (pull * turned).T])
        robust = weights / (1 + (depth / _OUTLIER_MM) ** 2) * (_INDEPENDENT / _SURFACE_SD_MM**2)
        prior = np.concatenate([1 / _ANGLE_SD**2, np.full(3, 1e-6), np.full(3, 1 / _SCALE_SD**2)])
        now = np.concatenate([_angles(self.turn), np.zeros(3), np.log(self.scale / self.size)])
        normal = jacobian.T @ (robust[:, None] * jacobian) + np.diag(prior)
        change = -np.linalg.solve(normal, jacobian.T @ (robust * depth) + prior * now)
        cost = float((weights * np.log1p((depth / _OUTLIER_MM) ** 2)).sum())
        change = np.clip(change, [-0.15] * 3 + [-15] * 3 + [-0.1] * 3, [0.15] * 3 + [15] * 3 + [0.1] * 3)
        return _Fit(
            _rotation(change[:3]) @ self.turn,
            self.scale * np.exp(change[6:]),
            self.offset + change[3:6],
            self.size,
            cost,
        )


def _surface(brain: np.ndarray, spacing_mm: Spacing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points on the surface of a mask with weights that add to 1, and points inside.

    The surface consists of the faces between voxels inside and outside. Faces at the ends of the array are left out,
    because the brain may continue there.
    """
    box = bounding_box(brain)
    wider = tuple(slice(max(0, at.start - n), at.stop + n) for at, n in zip(box, (8, 8, 1), strict=True))
    steps = tuple(max(1, round(_STEP_MM / mm)) for mm in spacing_mm)
    mask = brain[wider][:: steps[0], :: steps[1], :: steps[2]]
    mm = np.array(spacing_mm) * steps
    first = np.array([at.start for at in wider])[:, None] * _ras(spacing_mm)
    to_mm = mm[:, None] * np.array([[-1.0], [-1.0], [1.0]])
    points, areas = [], []
    for axis in range(3):
        faces = np.argwhere(np.diff(mask, axis=axis)).T + np.eye(3)[axis][:, None] / 2
        points.append(faces)
        areas.append(np.full(faces.shape[1], np.delete(mm, axis).prod()))
    surface, area = np.concatenate(points, axis=1), np.concatenate(areas)
    chosen = np.arange(0, area.size, max(1, area.size // _POINTS))
    inside = np.argwhere(mask).T
    weights = area[chosen] / area[chosen].sum()
    return first + to_mm * surface[:, chosen], weights, first + to_mm * inside


def _ras(spacing_mm: Spacing) -> np.ndarray:
    """Return the factors `(3, 1)` from voxels in LPS order to mm to the right, to anterior and to superior."""
    i, j, k = spacing_mm
    return np.array([[-i], [-j], [k]], float)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Return the matrix of the rotation about a vector by its length (Rodrigues)."""
    angle = float(np.linalg.norm(angles))
    x, y, z = angles / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    result: np.ndarray = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return result


def _angles(turn: np.ndarray) -> np.ndarray:
    """Return the vector whose rotation is a matrix, for angles below 90 degrees."""
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
    sine = float(np.linalg.norm(axis))
    result: np.ndarray = axis * (np.arcsin(min(1.0, sine)) / max(sine, 1e-12))
    return result
