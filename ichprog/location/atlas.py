"""The atlas: regions of the brain and the surface of the brain, in MNI space.

Coordinates are mm: x to the right, y to anterior, z to superior. The atlas is symmetric, and the file holds its right
half. `scripts/build_atlas.py` builds the file.

Source: BLAST-CT (github.com/biomedia-mira/blast-ct, commit ccfa6ef), Apache-2.0, see `LICENSE.blast-ct`.
"""

import functools
from dataclasses import dataclass
from importlib.resources import files

import numpy as np


@dataclass(frozen=True, eq=False)
class Atlas:
    """Hold the regions and the surface of the brain.

    Attributes:
        names: Names of the regions.
        region: `(x, y, z)` index of the region, right half. Voxels outside the brain have the nearest region.
        region_mm: Voxel spacing of `region`, in mm.
        distance: `(x, y, z)` depth below the surface of the brain in mm, negative outside, right half.
        distance_mm: Voxel spacing of `distance`, in mm.
        first: `(3,)` position of the first voxel of both, in mm.
    """

    names: tuple[str, ...]
    region: np.ndarray
    region_mm: float
    distance: np.ndarray
    distance_mm: float
    first: np.ndarray

    def regions_at(self, points: np.ndarray) -> np.ndarray:
        """Return the index of the region at points; points outside the atlas have the region of its edge.

        Args:
            points: `(3, n)` in mm of the atlas.
        """
        index = np.rint((_fold(points) - self.first[:, None]) / self.region_mm).astype(np.intp)
        limit = np.array(self.region.shape)[:, None] - 1
        result: np.ndarray = self.region[tuple(np.clip(index, 0, limit))]
        return result

    def depth_at(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interpolate the depth below the surface of the brain at points, and its slope.

        Args:
            points: `(3, n)` in mm of the atlas.

        Returns:
            Depth `(n,)` in mm, and its derivative `(3, n)` along each axis.
        """
        limit = np.array(self.distance.shape)[:, None] - 1
        index = np.clip((_fold(points) - self.first[:, None]) / self.distance_mm, 0, limit - 1e-6)
        low = index.astype(np.intp)
        part = index - low
        depth, slope = np.zeros(points.shape[1]), np.zeros(points.shape)
        for corner in np.ndindex(2, 2, 2):
            upper = np.array(corner)[:, None]
            share = np.where(upper, part, 1 - part)
            values = self.distance[tuple(low + upper)]
            depth += values * share.prod(0)
            for axis in range(3):
                others = np.delete(share, axis, 0).prod(0)
                slope[axis] += values * others * (1 if corner[axis] else -1)
        slope[0] *= np.where(points[0] < 0, -1, 1)
        return depth, slope / self.distance_mm


@functools.cache
def load_atlas() -> Atlas:
    """Load the atlas once per process."""
    with files(__package__).joinpath("atlas.npz").open("rb") as file, np.load(file) as stored:
        return Atlas(
            tuple(str(name) for name in stored["names"]),
            stored["region"],
            float(stored["region_mm"]),
            stored["distance"] * np.float32(stored["unit_mm"]),
            float(stored["distance_mm"]),
            stored["first"].astype(float),
        )


def _fold(points: np.ndarray) -> np.ndarray:
    """Map points of the left half to the right half."""
    return np.stack([np.abs(points[0]), points[1], points[2]])
