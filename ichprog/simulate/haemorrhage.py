"""Blood in a head: where it lies, what shape it takes, and what it pushes aside.

Everything is said in the template's skull (`Individual.own`). A shape is one number at each point, which grows from
the middle of the haemorrhage outwards; the haemorrhage is what lies under the level at which it has its volume. So the
volume is exact and the shape stays inside the tissue that may bleed.
"""

from dataclasses import dataclass

import numpy as np

from ichprog.simulate.anatomy import CENTRE, Individual, template
from ichprog.simulate.population import Person

_MIDDLES = {  # mm in the template, on the left for side 1; several are drawn from
    "putamen": [(26, 2, 2)],
    "thalamus": [(13, -17, 8)],
    "lobar": [(30, 32, 22), (36, -30, 44), (46, -22, -14), (26, -76, 8), (24, 8, 48), (34, -56, 32)],
    "cerebellum": [(22, -62, -34)],
    "pons": [(2, -26, -32)],
    "subdural": [(60, 5, 36), (58, -25, 44), (52, 35, 30)],
    "subarachnoid": [(4, 6, -18)],
}
_GIVES = 0.7  # of the push, what tissue does not take up by being torn and squeezed
_ROOM_MM = 10.0  # over which the push of a haemorrhage fades towards the skull
_FAR_MM = 130.0  # where the push of a subdural haemorrhage has faded


@dataclass(frozen=True, eq=False)
class Shape:
    """A haemorrhage that can be drawn.

    Attributes:
        person: Whose it is.
        middle: `(3,)` mm in the template's skull.
        stretch: `(3, 3)` that makes an ellipsoid of a ball, of determinant 1.
        lumps: `(n, n, n)` smooth noise, one cell each 3 mm, that makes its edge irregular.
        radius_mm: Of a ball of its volume, in the template's mm.
        ratio: Template mm for each mm of this head.
    """

    person: Person
    middle: np.ndarray
    stretch: np.ndarray
    lumps: np.ndarray
    radius_mm: float
    ratio: float

    @property
    def subdural(self) -> bool:
        """Whether it lies between brain and skull, as a crescent."""
        return self.person.site == "subdural"

    @property
    def in_fluid(self) -> bool:
        """Whether it lies in the fluid of cisterns and sulci."""
        return self.person.site == "subarachnoid"

    @property
    def outward(self) -> np.ndarray:
        """Unit vector from the middle of the skull to the haemorrhage."""
        towards: np.ndarray = self.middle - CENTRE
        found: np.ndarray = towards / np.linalg.norm(towards)
        return found

    def rank(self, own: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """The number that grows outwards; in mm at the edge, as far as that can be.

        Args:
            own: `(3, ...)` mm in the template's skull.
            depth: mm under the inside of the skull there.
        """
        shape = (3, *[1] * (own.ndim - 1))
        away = own - self.middle.reshape(shape).astype(np.float32)
        uneven = self.lump(own)
        if self.subdural:
            return depth + self._off_axis(own) * (1 + 0.15 * uneven)
        radius: np.ndarray = np.sqrt((np.tensordot(self.stretch.astype(np.float32), away, 1) ** 2).sum(0))
        if self.in_fluid:  # cisterns and fissures before the sulci under the skull
            radius *= 1 + 0.35 * uneven
            radius += 5 * np.maximum(10 - depth, 0)
        else:
            radius *= 1 + 0.16 * uneven + 0.07 * self.lump(own * np.float32(2.3))
        return radius

    def push(self, own: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """How far the haemorrhage has pushed what is at a point, `(3, ...)` mm.

        If tissue did not shrink, what lay at a distance r from the middle of a ball of radius R would lie at the cube
        root of r^3 + R^3; it moves a part of that. The push fades towards the skull, where fluid gives way.

        Args:
            own: `(3, ...)` mm in the template's skull.
            depth: mm under the inside of the skull there.
        """
        shape = (3, *[1] * (own.ndim - 1))
        found: np.ndarray
        if self.in_fluid:
            return np.zeros_like(own)
        if self.subdural:
            thick = np.maximum(self._thickness() - self._off_axis(own), 0)
            behind = 62 - np.tensordot(self.outward.astype(np.float32), own - CENTRE.reshape(shape), 1)
            moved = thick * np.clip(1 - behind / _FAR_MM, 0, 1) * np.clip(depth / 4, 0, 1)
            found = -self.outward.reshape(shape) * moved
            return found
        away = own - self.middle.reshape(shape)
        distance = np.maximum(np.sqrt((away**2).sum(0)), 1e-3)
        before = np.cbrt(np.maximum(distance**3 - self.radius_mm**3, 0))
        room = _GIVES * np.clip(depth / _ROOM_MM, 0, 1)
        found = away / distance * (distance - before) * room
        return found

    def midline_shift_mm(self) -> float:
        """How far the septum is pushed to the other side, in mm of this head."""
        septum = np.array([0.0, 8.0, 14.0])
        depth = template().at(template().depth, septum[:, None].astype(np.float32))
        return float(abs(self.push(septum[:, None], depth)[0, 0]) / self.ratio)

    def _thickness(self) -> float:
        """Mm of a crescent at its middle that holds the volume: half of it times its foot's area."""
        ml = self.person.volume_ml * self.ratio**3
        return float((2 * ml * 1000 / (np.pi * 62**2)) ** 0.5 * 3.1)

    def _off_axis(self, own: np.ndarray) -> np.ndarray:
        """How much thinner a crescent is at a point than at its middle, in mm; much where it does not reach."""
        from_centre = own - CENTRE.reshape(3, *[1] * (own.ndim - 1)).astype(np.float32)
        along = np.tensordot(self.outward.astype(np.float32), from_centre, 1)
        across = np.sqrt(np.maximum((from_centre**2).sum(0) - along**2, 0))
        return np.where(along > 28, 12 * (across / 55) ** 2, 1e3).astype(np.float32)

    def lump(self, own: np.ndarray) -> np.ndarray:
        """Its noise at points `(3, ...)` in mm, of standard deviation 1."""
        from scipy import ndimage

        middle = np.asarray(self.lumps.shape, np.float32).reshape(3, *[1] * (own.ndim - 1)) / 2
        index = (own - self.middle.reshape(middle.shape).astype(np.float32)) / np.float32(3) + middle
        lump: np.ndarray = ndimage.map_coordinates(self.lumps, index, order=1, mode="grid-wrap", output=np.float32)
        return lump


def shape_of(person: Person, individual: Individual, random: np.random.Generator) -> Shape:
    """The haemorrhage of a person.

    Args:
        person: Who.
        individual: Their head.
        random: Where chance comes from.
    """
    places = _MIDDLES[person.site]
    middle = np.array(places[int(random.integers(len(places)))], float)
    middle[0] *= -person.side  # x runs to the right
    wander = {"pons": 2.0, "thalamus": 2.5, "putamen": 3.0, "subarachnoid": 4.0, "cerebellum": 4.0}
    middle += random.normal(0, wander.get(person.site, 7.0), 3)
    axes, _ = np.linalg.qr(random.normal(size=(3, 3)))
    lengths = np.exp(random.normal(0, 0.22, 3))
    lengths /= np.prod(lengths) ** (1 / 3)
    ratio = float(1 / np.prod(individual.scale) ** (1 / 3))
    return Shape(
        person,
        middle,
        axes @ np.diag(1 / lengths) @ axes.T,
        _smooth_noise(random),
        float((3 * person.volume_ml * 1000 / (4 * np.pi)) ** (1 / 3) * ratio),
        ratio,
    )


def _smooth_noise(random: np.random.Generator) -> np.ndarray:
    from scipy import ndimage

    noise = ndimage.gaussian_filter(random.normal(size=(48, 48, 48)), 2.2, mode="wrap")
    found: np.ndarray = (noise / noise.std()).astype(np.float32)
    return found
