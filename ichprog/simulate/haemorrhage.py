"""Haemorrhages: location, shape, and displacement of tissue.

All coordinates are in the template's space (`Individual.to_template`). A rank, one number at each point, grows from the
middle of the haemorrhage outwards. The haemorrhage consists of the points of lowest rank, as many as its volume needs.
So the volume is exact, and the shape stays inside the tissue that may bleed.
"""

from dataclasses import dataclass

import numpy as np

from ichprog.simulate.anatomy import CENTRE, Individual, template
from ichprog.simulate.population import Person
from ichprog.simulate.realism import PLAIN, Realism

_MIDDLES = {  # mm in the template, on the left for side 1; one of several is drawn
    "putamen": [(26, 2, 2)],
    "thalamus": [(13, -17, 8)],
    "lobar": [(30, 32, 22), (36, -30, 44), (46, -22, -14), (26, -76, 8), (24, 8, 48), (34, -56, 32)],
    "cerebellum": [(22, -62, -34)],
    "pons": [(2, -26, -32)],
    "subdural": [(60, 5, 36), (58, -25, 44), (52, 35, 30)],
    "subarachnoid": [(4, 6, -18)],
    "epidural": [(58, -5, 8), (52, 35, 22), (48, -66, 26)],
    "convexity": [(34, -18, 58), (52, -38, 34), (34, 42, 34), (44, 8, 2), (8, 30, 54)],
}
_THINNER_MM = 12.0  # how much thinner a crescent is 55 mm away from its middle
MASK_VALUES = {"parenchymal": 1, "ventricular": 2, "subarachnoid": 3, "subdural_epidural": 4}
_DISPLACED = 0.7  # share of the volume that displaces tissue; the rest tears and compresses tissue
_SKULL_FADE_MM = 10.0  # depth over which displacement fades towards the skull
_SUBDURAL_FADE_MM = 130.0  # distance over which displacement by a subdural haemorrhage fades


@dataclass(frozen=True, eq=False)
class Shape:
    """Describe the shape of a haemorrhage.

    Attributes:
        person: The patient.
        middle: `(3,)` mm in the template's skull.
        stretch: `(3, 3)` matrix of determinant 1 that maps an ellipsoid to a ball.
        lumps: `(n, n, n)` smooth noise with 3 mm voxels that makes the edge irregular.
        radius_mm: Radius of a ball of the same volume, in mm of the template.
        ratio: mm of the template per mm of this head.
        thinner_mm: How much thinner a crescent is 55 mm away from its middle, in mm. A small number spreads blood
            thinly, a large one makes a lens.
    """

    person: Person
    middle: np.ndarray
    stretch: np.ndarray
    lumps: np.ndarray
    radius_mm: float
    ratio: float
    thinner_mm: float = _THINNER_MM

    @property
    def subdural(self) -> bool:
        """Return whether the haemorrhage is a crescent or a lens between brain and skull."""
        return self.person.kind in ("subdural", "epidural")

    @property
    def in_fluid(self) -> bool:
        """Return whether the haemorrhage fills cisterns and sulci."""
        return self.person.kind == "subarachnoid"

    @property
    def outward(self) -> np.ndarray:
        """Return the unit vector from the middle of the skull to the haemorrhage."""
        towards: np.ndarray = self.middle - CENTRE
        result: np.ndarray = towards / np.linalg.norm(towards)
        return result

    def rank(self, points: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return the rank of points, approximately in mm near the edge.

        Args:
            points: `(3, ...)` in mm of the template.
            depth: Depth of the points below the inside of the skull, in mm.
        """
        shape = (3, *[1] * (points.ndim - 1))
        away = points - self.middle.reshape(shape).astype(np.float32)
        uneven = self.lump(points)
        if self.subdural:
            return depth + self._off_axis(points) * (1 + 0.15 * uneven)
        radius: np.ndarray = np.sqrt((np.tensordot(self.stretch.astype(np.float32), away, 1) ** 2).sum(0))
        if self.in_fluid:
            radius *= 1 + 0.35 * uneven
            if self.person.site == "subarachnoid":  # cisterns and fissures before the sulci under the skull
                radius += 5 * np.maximum(10 - depth, 0)
        else:
            radius *= 1 + 0.16 * uneven + 0.07 * self.lump(points * np.float32(2.3))
        return radius

    def tissue_rank(
        self, points: np.ndarray, depth: np.ndarray, ventricle: np.ndarray, fluid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rank of points, and whether the tissue there may bleed.

        Args:
            points: `(3, ...)` in mm of the template.
            depth: Depth of the points below the inside of the skull, in mm.
            ventricle: Distance from the ventricles, in mm.
            fluid: Fraction of fluid.
        """
        rank = self.rank(points, depth)
        if self.in_fluid:
            return rank, (fluid > 0.3) & (ventricle > 3) & (depth > 0)
        if self.subdural:
            return rank, (depth > 0) & (rank < 100)
        return rank, (depth > 1) & ((ventricle > 1) | (fluid < 0.3))

    def displacement(self, points: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return how far the haemorrhage has displaced the tissue at points, `(3, ...)` mm.

        Incompressible tissue at a distance r from the middle of a ball of radius R would move to the cube root of
        r^3 + R^3. Tissue moves by a share of that distance. The displacement fades towards the skull, where fluid is
        displaced.

        Args:
            points: `(3, ...)` in mm of the template.
            depth: Depth of the points below the inside of the skull, in mm.
        """
        shape = (3, *[1] * (points.ndim - 1))
        result: np.ndarray
        if self.in_fluid or not self.person.bleeds:
            return np.zeros_like(points)
        if self.subdural:
            thick = np.maximum(self._thickness() - self._off_axis(points), 0)
            behind = 62 - np.tensordot(self.outward.astype(np.float32), points - CENTRE.reshape(shape), 1)
            moved = thick * np.clip(1 - behind / _SUBDURAL_FADE_MM, 0, 1) * np.clip(depth / 4, 0, 1)
            result = -self.outward.reshape(shape) * moved
            return result
        away = points - self.middle.reshape(shape)
        distance = np.maximum(np.sqrt((away**2).sum(0)), 1e-3)
        before = np.cbrt(np.maximum(distance**3 - self.radius_mm**3, 0))
        share = _DISPLACED * np.clip(depth / _SKULL_FADE_MM, 0, 1)
        result = away / distance * (distance - before) * share
        return result

    def midline_shift_mm(self) -> float:
        """Return the displacement of the septum across the midline, in mm of this head."""
        septum = np.array([0.0, 8.0, 14.0])
        depth = template().at(template().depth, septum[:, None].astype(np.float32))
        return float(abs(self.displacement(septum[:, None], depth)[0, 0]) / self.ratio)

    def _thickness(self) -> float:
        """Return the thickness in mm at the middle of a crescent: its volume is half the thickness times its area."""
        ml = self.person.volume_ml * self.ratio**3
        return float((2 * ml * 1000 / (np.pi * 62**2)) ** 0.5 * 3.1 * (self.thinner_mm / _THINNER_MM) ** 0.5)

    def _off_axis(self, points: np.ndarray) -> np.ndarray:
        """Return how much thinner a crescent is at a point than at its middle, in mm; a large number outside of it."""
        from_centre = points - CENTRE.reshape(3, *[1] * (points.ndim - 1)).astype(np.float32)
        along = np.tensordot(self.outward.astype(np.float32), from_centre, 1)
        across = np.sqrt(np.maximum((from_centre**2).sum(0) - along**2, 0))
        return np.where(along > 28, self.thinner_mm * (across / 55) ** 2, 1e3).astype(np.float32)

    def lump(self, points: np.ndarray) -> np.ndarray:
        """Return the noise at points `(3, ...)` in mm, with standard deviation 1."""
        from scipy import ndimage

        middle = np.asarray(self.lumps.shape, np.float32).reshape(3, *[1] * (points.ndim - 1)) / 2
        index = (points - self.middle.reshape(middle.shape).astype(np.float32)) / np.float32(3) + middle
        lump: np.ndarray = ndimage.map_coordinates(self.lumps, index, order=1, mode="grid-wrap", output=np.float32)
        return lump


def draw_haemorrhage(
    person: Person, individual: Individual, random: np.random.Generator, realism: Realism = PLAIN
) -> Shape:
    """Draw the haemorrhage of a patient.

    Args:
        person: The patient.
        individual: The patient's head.
        random: Random generator.
        realism: Options of the simulation.
    """
    ratio = float(1 / np.prod(individual.scale) ** (1 / 3))
    return draw_shape(person, random, ratio, all_kinds=realism.all_kinds)


def draw_shape(person: Person, random: np.random.Generator, ratio: float, *, all_kinds: bool = True) -> Shape:
    """Draw the shape of a haemorrhage.

    Args:
        person: The patient.
        random: Random generator.
        ratio: mm of the template per mm of the patient's head.
        all_kinds: Whether crescents may be thin and widespread.
    """
    thinner_mm = _THINNER_MM
    if person.kind == "epidural":
        thinner_mm = float(random.spawn(1)[0].uniform(28, 60))
    elif all_kinds:
        thinner_mm = float(random.spawn(1)[0].uniform(3, 12))
    middles = _MIDDLES.get(person.site, [(0, 0, 0)])
    middle = np.array(middles[int(random.integers(len(middles)))], float)
    middle[0] *= -person.side  # x runs to the right
    wander = {"pons": 2.0, "thalamus": 2.5, "putamen": 3.0, "subarachnoid": 4.0, "cerebellum": 4.0}
    middle += random.normal(0, wander.get(person.site, 7.0), 3)
    axes, _ = np.linalg.qr(random.normal(size=(3, 3)))
    lengths = np.exp(random.normal(0, 0.22, 3))
    lengths /= np.prod(lengths) ** (1 / 3)
    return Shape(
        person,
        middle,
        axes @ np.diag(1 / lengths) @ axes.T,
        _smooth_noise(random),
        float((3 * person.volume_ml * 1000 / (4 * np.pi)) ** (1 / 3) * ratio),
        ratio,
        thinner_mm,
    )


def fullest(share: np.ndarray, wanted: float) -> np.ndarray:
    """Return the mask of the voxels with the most blood, as many as wanted if so many have blood.

    Args:
        share: Fraction of blood of each voxel.
        wanted: Number of voxels.

    Examples:
        >>> fullest(np.array([0.1, 0.9, 0.4, 0.0]), 2.2)
        array([False,  True,  True, False])
    """
    some = np.flatnonzero(share > 0)
    count = min(round(wanted), len(some))
    mask = np.zeros(share.shape, bool)
    if count:
        mask.ravel()[some[np.argpartition(share.ravel()[some], -count)[-count:]]] = True
    return mask


def mask_value(kind: str) -> int:
    """Return the value of a kind of haemorrhage in masks.

    Args:
        kind: "parenchymal", "ventricular", "subarachnoid", "subdural" or "epidural".

    Examples:
        >>> mask_value("subdural")
        4
    """
    return MASK_VALUES["subdural_epidural" if kind in ("subdural", "epidural") else kind]


def _smooth_noise(random: np.random.Generator) -> np.ndarray:
    from scipy import ndimage

    noise = ndimage.gaussian_filter(random.normal(size=(48, 48, 48)), 2.2, mode="wrap")
    result: np.ndarray = (noise / noise.std()).astype(np.float32)
    return result
