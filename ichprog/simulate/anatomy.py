"""Anatomy: the MNI152 template, and individual heads as deformations of it.

Coordinates are mm from the template's origin, the anterior commissure: x to the right, y to anterior, z to superior
(RAS, as in nibabel). An individual is a map from its own space to the template's space.

Source of the template: Fonov et al., NeuroImage 2011 (ICBM 152 nonlinear symmetric 2009a), as distributed by nilearn.
"""

import functools
import itertools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.errors import IchprogError, missing_extra

_COARSE_MM = 2.0
_MARGIN = 16  # coarse voxels around the template, space for bone and scalp
_FISSURE_MM = 13.0  # half the width of fissures closed to make the inside of the skull smooth
_FLUID_MM = 1.5  # minimum fluid between brain and skull
CENTRE = np.array([0.0, -18.0, 5.0])  # of the inside of the skull


@dataclass(frozen=True, eq=False)
class Template:
    """Hold the template's tissues and distance maps.

    Attributes:
        grey: `(i, j, k)` fraction of grey matter, 1 mm.
        white: Fraction of white matter, 1 mm.
        fine: `(3,)` position of the first voxel of `grey` and `white`, in mm.
        depth: `(i, j, k)` depth in mm below the inside of the skull, negative outside, 2 mm.
        ventricle: Distance in mm from the ventricles, negative inside, 2 mm.
        outward: `(3, i, j, k)` unit vectors away from the ventricles, 2 mm.
        upward: Unit vectors towards the skull, 2 mm.
        coarse: `(3,)` position of the first voxel of the 2 mm maps, in mm.
        inside_ml: Volume inside the skull, in mL.
    """

    grey: np.ndarray
    white: np.ndarray
    fine: np.ndarray
    depth: np.ndarray
    ventricle: np.ndarray
    outward: np.ndarray
    upward: np.ndarray
    coarse: np.ndarray
    inside_ml: float

    def at(self, values: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Interpolate a map linearly at points.

        Args:
            values: A map of this template, fine or coarse.
            points: `(3, ...)` in mm of the template.
        """
        from scipy import ndimage

        first, mm = (self.fine, 1.0) if values.shape == self.grey.shape else (self.coarse, _COARSE_MM)
        index = (points - first.astype(np.float32).reshape(3, *[1] * (points.ndim - 1))) / np.float32(mm)
        result: np.ndarray = ndimage.map_coordinates(values, index, order=1, mode="nearest", output=np.float32)
        return result

    def coarse_at(self, points: np.ndarray) -> np.ndarray:
        """Interpolate all coarse maps linearly at the same points, as `at` does, several times faster.

        The weights of the eight voxels around a point are computed once, as a row of a sparse matrix.

        Args:
            points: `(3, ...)` in mm of the template.

        Returns:
            `(8, ...)` float32: `depth`, `ventricle`, and the axes of `outward` and of `upward`.
        """
        from scipy import sparse

        index = (points - self.coarse.astype(np.float32).reshape(3, *[1] * (points.ndim - 1))) / np.float32(_COARSE_MM)
        last = np.array(self.depth.shape)[:, None] - 1
        index = np.clip(index.reshape(3, -1).astype(np.float64), 0, last)
        low = np.minimum(np.floor(index), last - 1)
        part = index - low
        weights = np.stack([1 - part, part])
        corners = list(itertools.product((0, 1), repeat=3))
        share = np.stack([weights[i, 0] * weights[j, 1] * weights[k, 2] for i, j, k in corners], axis=1)
        steps = np.ravel_multi_index(np.transpose(corners), self.depth.shape)
        voxel = np.ravel_multi_index(tuple(low.astype(np.int32)), self.depth.shape)
        voxels = (voxel[:, None] + steps).astype(np.int32)
        starts = np.arange(0, share.size + 1, len(corners), dtype=np.int32)
        matrix = sparse.csr_array((share.ravel(), voxels.ravel(), starts), shape=(len(share), self.depth.size))
        values: np.ndarray = (matrix @ self._coarse_maps).T.astype(np.float32)
        return values.reshape(-1, *points.shape[1:])

    @functools.cached_property
    def _coarse_maps(self) -> np.ndarray:
        """Return the coarse maps as `(voxels, 8)` float64."""
        maps = (self.depth, self.ventricle, *self.outward, *self.upward)
        return np.stack([each.ravel() for each in maps], axis=1).astype(np.float64)


@functools.cache
def template() -> Template:
    """Load the template once per process.

    Raises:
        IchprogError: nilearn, which holds the template, is not installed.
    """
    from scipy import ndimage

    (t1, affine), (grey, _), (white, _) = (_read_template(kind) for kind in ("t1", "gm", "wm"))
    fine = affine[:3, 3]
    brain = _downsample(t1) > 0.15
    csf = 1 - _downsample(grey) - _downsample(white)
    coarse = fine + 0.5 - _COARSE_MM * _MARGIN
    bridged = ndimage.distance_transform_edt(~brain) * _COARSE_MM < _FISSURE_MM
    inside = ndimage.distance_transform_edt(bridged) * _COARSE_MM > _FISSURE_MM - _FLUID_MM
    inside = ndimage.binary_fill_holes(inside)
    depth = ndimage.gaussian_filter(_signed_distance(inside), 1.5)
    x, y, z = (c + _COARSE_MM * np.arange(n) for c, n in zip(coarse, inside.shape, strict=True))
    x, y, z = np.meshgrid(np.abs(x), y, z, indexing="ij", sparse=True)
    third = (x < 4) & (y > -25) & (y < 8) & (z > -12) & (z < 10)
    bodies = (x < 36) & (y > -45) & (y < 36) & (z > -3) & (z < 34) & ((x > 7) | (y > -22))
    atria = (x > 9) & (x < 40) & (y > -72) & (y < -22) & (z > -4) & (z < 26)
    fourth = (x < 12) & (y > -52) & (y < -33) & (z > -46) & (z < -22)
    ventricle = _signed_distance((csf > 0.5) & (depth > 20) & (third | bodies | atria | fourth))
    return Template(
        grey,
        white,
        fine,
        depth.astype(np.float32),
        -ventricle,
        _directions(-ventricle),
        -_directions(depth),
        coarse,
        float(inside.sum()) * _COARSE_MM**3 / 1000,
    )


class Individual:
    """Simulate one head: size, shape and marks of age.

    Args:
        marks: Atrophy and the other marks of age, in standard deviations.
        random: Random generator.
        fill_mm: How much closer the surface of the brain is to the skull, in mm.
    """

    def __init__(self, marks: dict[str, float], random: np.random.Generator, fill_mm: float = 0.0) -> None:
        self.template = template()
        inside_ml = float(np.clip(random.normal(1420, 120), 1120, 1750))
        scale = (inside_ml / self.template.inside_ml) ** (1 / 3)
        self.scale = scale * np.exp(random.normal(0, 0.025, 3))
        self._bends = [
            (random.normal(0, 1, 3) * 2.2, random.uniform(-1, 1, 3) * 2 * np.pi / 110, random.uniform(0, 2 * np.pi))
            for _ in range(6)
        ]
        atrophy = marks["atrophy"]
        self.widening_mm = float(np.clip(2.4 + 2.1 * atrophy, -1.0, 9.0))
        self.shrinkage_mm = float(np.clip(2.0 + 1.6 * atrophy - fill_mm, -fill_mm, 7.0))
        self.sulci = float(np.clip(0.85 - 0.26 * atrophy, 0.25, 1.4))  # exponent of the fraction of fluid
        self.pallor_hu = float(np.clip(3.0 + 3.5 * marks["white_matter"], 0.0, 14.0))
        self.calcified_mm = float(np.clip(2.0 + 1.1 * marks["calcification"], 0.0, 4.5))

    def to_template(self, points: np.ndarray) -> np.ndarray:
        """Map points of this head to the template's skull, removing size and bends.

        Args:
            points: `(3, ...)` in mm of this head.
        """
        shape = (3, *[1] * (points.ndim - 1))
        scaled = points / self.scale.reshape(shape)
        bent = scaled.copy()
        for amplitude, wave, phase in self._bends:
            bent += amplitude.reshape(shape) * np.sin(np.tensordot(wave, scaled, 1) + phase) * 0.5
        result: np.ndarray = bent
        return result

    def tissue_source(self, points: np.ndarray, displacement: np.ndarray) -> np.ndarray:
        """Return the position in the template of the tissue at points.

        Args:
            points: `(3, ...)` in mm, as returned by `to_template`.
            displacement: `(3, ...)` displacement by a haemorrhage, in mm.
        """
        form = self.template
        before = points - displacement
        depth, distance, *directions = form.coarse_at(before)
        widened = self.widening_mm * np.exp(-np.maximum(distance, 0) / 14)
        shrunk = self.shrinkage_mm * np.exp(-np.maximum(depth, 0) / 18)
        outward, upward = np.stack(directions[:3]), np.stack(directions[3:])
        result: np.ndarray = before + (-widened * outward + shrunk * upward)
        return result


def gyri_displacement(
    points: np.ndarray, depth: np.ndarray, *, amplitude_mm: float, random: np.random.Generator
) -> np.ndarray:
    """Return a random smooth displacement of tissue that changes the pattern of gyri, `(3, ...)` mm.

    The wavelengths are those of gyri, 30 to 60 mm. The falx stays in the midline, and the surface follows the skull.

    Args:
        points: `(3, ...)` in mm, as returned by `Individual.to_template`.
        depth: Depth of the points below the inside of the skull, in mm.
        amplitude_mm: Standard deviation of the displacement along each axis, in mm.
        random: Random generator.
    """
    waves = 12
    shape = (3, *[1] * (points.ndim - 1))
    moved = np.zeros_like(points)
    for _ in range(waves):
        direction = random.normal(size=3)
        wave = direction / np.linalg.norm(direction) * 2 * np.pi / random.uniform(30, 60)
        amplitude = random.normal(size=3) * amplitude_mm * (2 / waves) ** 0.5
        phase = np.tensordot(wave, points, 1) + random.uniform(0, 2 * np.pi)
        moved += amplitude.reshape(shape) * np.sin(phase)
    moved[0] *= 1 - np.exp(-((points[0] / 12) ** 2))
    result: np.ndarray = (moved * np.clip((depth + 2) / 8, 0, 1)).astype(np.float32)
    return result


def _read_template(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one image of the template from the files of nilearn, which is slow to import.

    Args:
        kind: "t1", "gm" (grey matter) or "wm" (white matter).

    Returns:
        The values with a maximum of 1, and the affine.

    Raises:
        IchprogError: nilearn is not installed, or has no such file.
    """
    import nibabel as nib

    package = find_spec("nilearn")
    if package is None or package.origin is None:
        raise missing_extra("simulate", "nilearn", "Simulating patients")
    path = Path(package.origin).parent / "datasets" / "data" / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.exists():
        raise IchprogError(f"{path}: missing in this version of nilearn. Install another: pip install 'nilearn>=0.12'.")
    image: Any = nib.load(path)
    values = np.asarray(image.dataobj).astype(np.float32)
    return values / values.max(), image.affine


def _downsample(values: np.ndarray) -> np.ndarray:
    """Return a map at half the resolution with the coarse margin around it."""
    even = np.pad(values, [(0, n % 2) for n in values.shape])
    i, j, k = (n // 2 for n in even.shape)
    return np.pad(even.reshape(i, 2, j, 2, k, 2).mean((1, 3, 5)), _MARGIN)


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Return the signed distance to the edge of a mask in mm, negative outside."""
    from scipy import ndimage

    signed: np.ndarray = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    return (signed * _COARSE_MM).astype(np.float32)


def _directions(distance: np.ndarray) -> Any:
    """Return smoothed unit vectors `(3, ...)` along which a distance grows."""
    from scipy import ndimage

    slope = np.stack(np.gradient(ndimage.gaussian_filter(distance, 2)))
    return (slope / np.maximum(np.linalg.norm(slope, axis=0), 0.5)).astype(np.float32)
