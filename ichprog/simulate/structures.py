"""Dense structures of a normal head and beam hardening, which can be taken for blood.

Positions are in mm of the template. Venous sinuses lie on the skull, so they follow its depth. The other structures
follow the tissue. HU: venous blood 31 to 68, see `ichprog.simulate.realism`; dura and arteries a little above grey
matter; calcium over 100. Sizes, and how often something calcifies, are assumed.
"""

import itertools

import numpy as np

from ichprog.simulate.realism import Range, Realism

_SIDE_SINUS = ((-96, -20), (-80, -24), (-62, -28), (-49, -34), (-41, -44), (-36, -54))  # y, z: transverse, sigmoid
_STRAIGHT_SINUS = ((-44, 4), (-62, 1), (-80, -11), (-93, -20))  # y, z in the midline, from the great vein
_TORCULA = (0.0, -93.0, -20.0)
_ARTERIES = (  # basilar and both middle cerebral arteries
    ((0, -24, -42), (0, -16, -30), (0, -10, -18)),
    ((8, 4, -16), (24, 6, -13), (38, 2, -8)),
    ((-8, 4, -16), (-24, 6, -13), (-38, 2, -8)),
)
_PETROUS = ((58, -38, -26), (14, -20, -34))  # ridge on the right
_CALCIFIED = {  # places on the right, largest radius in mm, share of patients with an average mark of calcification
    "pallidum": (((19, -3, -1),), 5.0, 0.10),
    "plexus": (((23, -40, 12), (20, -34, 16)), 6.0, 0.35),
    "carotid": (((13, 0, -22),), 3.5, 0.25),
    "vertebral": (((8, -36, -50),), 3.0, 0.12),
}


def add_structures(
    hu: np.ndarray,
    points: np.ndarray,
    source: np.ndarray,
    depth: np.ndarray,
    realism: Realism,
    calcification: float,
    random: np.random.Generator,
) -> None:
    """Add venous sinuses, dura, arteries and calcifications to a head, in place.

    Args:
        hu: `(n,)` HU of points inside the skull.
        points: `(3, n)` position in the template's skull, in mm.
        source: `(3, n)` position in the template of each point's tissue, in mm.
        depth: `(n,)` depth below the inside of the skull, in mm.
        realism: Options of the simulation.
        calcification: Mark of calcification, in standard deviations.
        random: Random generator.
    """
    of_sinuses, of_dura, of_arteries, of_calcium = random.spawn(4)
    if realism.arteries:
        _add_arteries(hu, source, of_arteries)
    if realism.dura:
        _add_dura(hu, source, depth, of_dura)
    if realism.sinus_hu is not None:
        _add_sinuses(hu, points, depth, realism.sinus_hu, of_sinuses)
    if realism.calcification:
        _add_calcifications(hu, source, calcification, of_calcium)


def add_beam_hardening(
    hu: np.ndarray, points: np.ndarray, depth: np.ndarray, largest_hu: float, random: np.random.Generator
) -> None:
    """Brighten the brain next to the skull and behind the petrous bones, in place.

    The correction of beam hardening for water leaves a bright rim inside bone, which decays within about a centimetre.

    Args:
        hu: `(n,)` HU of points inside the skull.
        points: `(3, n)` position in the template's skull, in mm.
        depth: `(n,)` depth below the inside of the skull, in mm.
        largest_hu: Largest brightening, in HU.
        random: Random generator.
    """
    rim, decay_mm = random.uniform(0.2, 0.8) * largest_hu, random.uniform(3, 8)
    shell = np.flatnonzero(depth < 4 * decay_mm)
    near = points[:, shell]
    uneven = np.ones(len(shell), np.float32)
    for _ in range(3):
        wave = random.normal(0, 1, 3).astype(np.float32) * np.float32(2 * np.pi / 90)
        uneven += np.float32(0.35) * np.sin(wave @ near + np.float32(random.uniform(0, 2 * np.pi)))
    hu[shell] += np.float32(rim) * np.maximum(uneven, 0) * np.exp(-np.maximum(depth[shell], 0) / np.float32(decay_mm))
    low = np.flatnonzero((points[2] < -8) & (points[1] < 5))
    mirrored = np.stack([np.abs(points[0, low]), points[1, low], points[2, low]])
    behind = np.float32(random.uniform(0, largest_hu)) * np.exp(
        -_distance_to_path(mirrored, _PETROUS) / np.float32(random.uniform(6, 14))
    )
    hu[low] += behind


def _add_sinuses(
    hu: np.ndarray, points: np.ndarray, depth: np.ndarray, sinus_hu: Range, random: np.random.Generator
) -> None:
    """Add the superior sagittal, straight, transverse and sigmoid sinuses and the torcula."""
    density = random.uniform(*sinus_hu)
    radius, aside = random.uniform(2.5, 5.0), random.uniform(-2, 2)
    right = random.uniform(0.3, 0.75)  # one transverse sinus is often the larger
    side_radius = 7.0 * np.array([1 - right, right])
    straight_radius = random.uniform(1.2, 2.4)

    shell = np.flatnonzero((depth < 10) & (np.abs(points[0]) < 9))
    x, y, z = points[:, shell]
    reach = np.float32(radius) * (0.55 + 0.45 * np.clip((60 - y) / 130, 0, 1))
    distance = np.hypot(x - np.float32(aside), depth[shell] - reach)
    distance = np.where((z > -18) & ((y < 0) | (z > 8)), distance, np.inf)
    _blend(hu, shell, reach - distance, density)

    shell = np.flatnonzero((depth < 11) & (points[1] < -28) & (points[2] < -8) & (points[2] > -62))
    x, y, z = points[:, shell]
    reach = np.where(x > 0, side_radius[1], side_radius[0]).astype(np.float32)
    distance = np.hypot(_distance_to_path(np.stack([y, z]), _SIDE_SINUS), depth[shell] - reach)
    _blend(hu, shell, reach - distance, density)

    middle = np.flatnonzero((np.abs(points[0]) < 8) & (points[1] < -40) & (points[2] > -32) & (points[2] < 10))
    x, y, z = points[:, middle]
    distance = np.hypot(_distance_to_path(np.stack([y, z]), _STRAIGHT_SINUS), x)
    _blend(hu, middle, np.float32(straight_radius) - distance, density)
    towards = points[:, middle] - np.array(_TORCULA, np.float32)[:, None]
    _blend(hu, middle, np.float32(radius + 1) - np.sqrt((towards**2).sum(0)), density)


def _add_dura(hu: np.ndarray, source: np.ndarray, depth: np.ndarray, random: np.random.Generator) -> None:
    """Add the lining of the skull, falx and tentorium of varying density, and plaques of calcium in the falx."""
    density, half_mm, share = random.uniform(45, 75), random.uniform(0.5, 1.4), random.uniform(0.2, 1.0)
    lining = np.flatnonzero(depth < 4)
    _blend(hu, lining, np.float32(random.uniform(0.5, 2.0)) - depth[lining], density)
    middle = np.flatnonzero((np.abs(source[0]) < 4) & (source[2] > -14) & (depth > -1))
    x, y, z = source[:, middle]
    above = np.hypot((y + 20) / 62, (z - 8) / 34) > 1  # the free edge lies above the corpus callosum
    falx = above & ((y < -30) | (z > 0))
    _blend(hu, middle, np.where(falx, np.float32(half_mm) - np.abs(x), -1), density, share)
    if random.random() < 0.15:
        place = np.array([0.0, *((30, 40), (0, 58), (-40, 56))[int(random.integers(3))]], np.float32)
        away = np.hypot(x * 3, np.hypot(y - place[1], z - place[2]) / random.uniform(1, 2.5))
        _blend(hu, middle, np.float32(random.uniform(2, 5)) - away, random.uniform(120, 500))
    low = np.flatnonzero((source[2] < 6) & (source[2] > -36) & (source[1] < -34))
    x, y, z = source[:, low]
    aside = np.abs(x)
    height = 2 - 3.6 * np.sqrt(aside) - 0.008 * aside * np.maximum(y + 64, 0)
    height = np.minimum(height, -22 + 1.35 * (y + 88))
    inside = (aside > np.clip(14 + 0.5 * (y + 50), 0, 20)) & (aside < 60)
    _blend(hu, low, np.where(inside, np.float32(half_mm) - np.abs(z - height) * 0.8, -1), density, share)


def _add_arteries(hu: np.ndarray, source: np.ndarray, random: np.random.Generator) -> None:
    """Add the basilar and middle cerebral arteries."""
    density, radius = random.uniform(38, 56), random.uniform(1.2, 2.2)
    low = np.flatnonzero((source[2] < 0) & (source[2] > -46) & (source[1] < 14) & (source[1] > -30))
    near = source[:, low]
    for path in _ARTERIES:
        _blend(hu, low, np.float32(radius) - _distance_to_path(near, path), density)


def _add_calcifications(hu: np.ndarray, source: np.ndarray, mark: float, random: np.random.Generator) -> None:
    """Add calcified basal ganglia, choroid plexus and arteries, more often with a high mark of calcification."""
    for places, largest_mm, share in _CALCIFIED.values():
        odds = share / (1 - share) * np.exp(1.2 * mark)
        present = random.random() < odds / (1 + odds)
        for place in places:
            for side in (-1, 1):
                middle = np.array(place, np.float32) * np.array([side, 1, 1], np.float32) + random.normal(0, 1.5, 3)
                radius, density = random.uniform(0.25, 1) * largest_mm, random.uniform(70, 350)
                if present:
                    near = np.flatnonzero(np.abs(source - middle[:, None].astype(np.float32)).max(0) < largest_mm + 1)
                    away = source[:, near] - middle[:, None].astype(np.float32)
                    _blend(hu, near, np.float32(radius) - np.sqrt((away**2).sum(0)), density)


def _blend(hu: np.ndarray, where: np.ndarray, depth_mm: np.ndarray, density: float, share: float = 1.0) -> None:
    """Move HU towards a density, in place, by the depth of points inside a structure.

    Args:
        hu: `(n,)` HU.
        where: Indices of points.
        depth_mm: Depth of these points inside the structure, in mm.
        density: Density of the structure, in HU.
        share: Largest share of the structure in a point.
    """
    part = np.clip(depth_mm + 0.5, 0, 1).astype(np.float32) * np.float32(share)
    hu[where] += part * (np.float32(density) - hu[where])


def _distance_to_path(points: np.ndarray, path: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """Return the distance of points `(axes, n)` from straight segments between the positions of a path, in mm."""
    nearest = np.full(points.shape[1], np.inf, np.float32)
    for start, end in itertools.pairwise(path):
        origin = np.array(start, np.float32)
        along = np.array(end, np.float32) - origin
        away = points - origin[:, None]
        part = np.clip(along @ away / (along @ along), 0, 1)
        np.minimum(nearest, ((away - along[:, None] * part) ** 2).sum(0), out=nearest)
    result: np.ndarray = np.sqrt(nearest)
    return result
