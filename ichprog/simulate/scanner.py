"""CT scanner: HU of a head in slices, with blur, noise and streaks.

Tissue is composed on points 1 mm apart, two per slice thickness, and averaged over the slice, so that voxels show
partial volumes. HU are those of textbooks: fluid 0 to 10, white matter 25 to 30, grey matter 33 to 40, clotted blood 55
to 80, calcium over 100.
"""

from dataclasses import dataclass

import numpy as np

from ichprog.scan.morphology import resample
from ichprog.simulate.anatomy import CENTRE, Individual
from ichprog.simulate.haemorrhage import Shape

_PIXELS = 512
_FINE_MM, _LATTICE_MM = 1.0, 4.0
_POINTS_PER_SLICE = 2
_FLUID, _GREY, _WHITE, _CALCIUM, _DURA = 7.0, 40.0, 31.0, 260.0, 55.0
_BONE, _MARROW, _FAT, _SKIN, _AIR = 1250.0, 700.0, -95.0, 45.0, -1000.0
_CALCIFIED = ((23, -40, 12), (-23, -40, 12), (0, -27, 4))  # plexus in both atria, pineal gland


@dataclass(frozen=True, eq=False)
class SimulatedScan:
    """Hold a simulated scan.

    Attributes:
        hu: `(i, j, k)` int16 HU, in LPS order.
        blood: `(i, j, k)` uint8, 1 in the haemorrhage, 2 in blood inside the ventricles.
        inside: `(i, j, k)` bool, true inside the skull.
        affine: `(4, 4)` from voxel to RAS mm.
    """

    hu: np.ndarray
    blood: np.ndarray
    inside: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class _Field:
    """Hold points of a box in the scanner and their positions in the template; arrays are `(x, y, z)`.

    Attributes:
        low: `(3,)` lower corner of the box in the scanner, in mm.
        points: `(3, x, y, z)` in mm of the template's skull.
        source: `(3, x, y, z)` position in the template of each point's tissue, in mm.
        depth: Depth below the inside of the skull, in mm.
        ventricle: Distance from the ventricles, in mm.
        volume_ml: Volume of one point, in mL.
    """

    low: np.ndarray
    points: np.ndarray
    source: np.ndarray
    depth: np.ndarray
    ventricle: np.ndarray
    volume_ml: float


def acquire(individual: Individual, shape: Shape, random: np.random.Generator, *, skull: bool = False) -> SimulatedScan:
    """Acquire a scan of a head.

    Args:
        individual: The head.
        shape: The haemorrhage.
        random: Random generator.
        skull: Whether the whole head is visible; by default, voxels outside the skull's inside are 0.
    """
    turn = _rotation(np.radians(random.normal(0, (5.0, 3.0, 3.5))))
    reach = _skull_bounds(individual, turn)
    height = float(np.ptp(reach[2]))
    spacing = float(random.choice([s for s in (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.0, 5.0) if 24 <= height / s + 1 <= 52]))
    slices = int(np.ceil(height / spacing)) + int(random.integers(0, 3))
    margin = np.array([24.0, 26.0, 12.0]) if skull else np.array([4.0, 4.0, 0.0])
    low, high = reach[:, 0] - margin, reach[:, 1] + margin
    low[2] = reach[2, 0] - random.uniform(0, spacing)
    slices += int(np.ceil((margin[2] + spacing) / spacing)) if skull else 0
    cells = (*(int(np.ceil((high[a] - low[a]) / _FINE_MM)) for a in range(2)), slices * _POINTS_PER_SLICE)
    size = np.array([cells[0] * _FINE_MM, cells[1] * _FINE_MM, slices * spacing])
    field = _field(individual, shape, turn, low, size, cells, spacing / _POINTS_PER_SLICE * _FINE_MM**2 / 1000)
    hu, blood = _tissue(field, individual, shape, random)
    if skull:
        hu = _head(hu, field, random)
    layers = [hu, *blood, np.clip(field.depth + 0.5, 0, 1)]
    return _digitise(layers, low, size, (slices, spacing), random, skull)


def _rotation(angles: np.ndarray) -> np.ndarray:
    (a, b, c), zero, one = angles, 0.0, 1.0
    pitch = np.array([[one, zero, zero], [zero, np.cos(a), -np.sin(a)], [zero, np.sin(a), np.cos(a)]])
    roll = np.array([[np.cos(b), zero, np.sin(b)], [zero, one, zero], [-np.sin(b), zero, np.cos(b)]])
    yaw = np.array([[np.cos(c), -np.sin(c), zero], [np.sin(c), np.cos(c), zero], [zero, zero, one]])
    turn: np.ndarray = pitch @ roll @ yaw
    return turn


def _to_template(points: np.ndarray, individual: Individual, turn: np.ndarray) -> np.ndarray:
    """Map points of the scanner, whose origin is the middle of the skull, to the template, `(3, ...)` mm."""
    middle = (CENTRE * individual.scale).reshape(3, *[1] * (points.ndim - 1))
    return individual.to_template(np.tensordot(turn.T, points, 1) + middle).astype(np.float32)


def _skull_bounds(individual: Individual, turn: np.ndarray) -> np.ndarray:
    """Return the bounds of the inside of the skull in the scanner, `(3, 2)` mm."""
    axis = np.arange(-108.0, 109.0, 6.0)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    depth = individual.template.at(individual.template.depth, _to_template(points, individual, turn))
    inside = points[:, depth > 0]
    return np.stack([inside.min(1) - 2, inside.max(1) + 2], axis=1)


def _field(
    individual: Individual,
    shape: Shape,
    turn: np.ndarray,
    low: np.ndarray,
    size: np.ndarray,
    cells: tuple[int, ...],
    volume_ml: float,
) -> _Field:
    """Compute smooth maps on a lattice of 4 mm and interpolate them to the points."""
    lattice = [max(2, round(length / _LATTICE_MM)) for length in size]
    axes = [lo + (np.arange(n) + 0.5) * length / n for lo, n, length in zip(low, lattice, size, strict=True)]
    points = _to_template(np.stack(np.meshgrid(*axes, indexing="ij")), individual, turn)
    form = individual.template
    depth = form.at(form.depth, points)
    source = individual.tissue_source(points, shape.displacement(points, depth).astype(np.float32))
    ventricle = form.at(form.ventricle, source)
    spread = [resample(values, cells) for values in (*points, *source, depth, ventricle)]
    return _Field(low, np.stack(spread[:3]), np.stack(spread[3:6]), spread[6], spread[7], volume_ml)


def _tissue(
    field: _Field, individual: Individual, shape: Shape, random: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return HU inside the skull, and the fractions of haemorrhage and of blood in the ventricles."""
    where = np.nonzero(field.depth > -1.0)
    points, source = (np.stack([axis[where] for axis in points]) for points in (field.points, field.source))
    depth, ventricle = field.depth[where], field.ventricle[where]
    form = individual.template
    grey, white = form.at(form.grey, source), form.at(form.white, source)
    fluid = np.clip(1 - grey - white, 0, 1) ** np.float32(individual.sulci)
    grey_share = grey / np.maximum(grey + white, 1e-3)
    pale = individual.pallor_hu * np.exp(-np.maximum(ventricle, 0) / 13)
    solid = _GREY * grey_share + (_WHITE - pale) * (1 - grey_share)
    hu = _FLUID * fluid + solid * (1 - fluid)
    falx = np.exp(-((source[0] / 0.9) ** 2)) * (ventricle > 8) * (source[2] > 4) * np.clip(fluid + 0.2, 0, 1)
    hu += falx * (_DURA - hu) * 0.6
    for place in _CALCIFIED:
        far = np.sqrt(((source - np.array(place, np.float32)[:, None]) ** 2).sum(0))
        size = individual.calcified_mm * float(random.uniform(0.6, 1.3))
        hu += np.clip((size - far) / 1.2, 0, 1) * (_CALCIUM - hu) * (size > 0.9)

    haemorrhage, rank = _haemorrhage(field, shape, points, depth, ventricle, fluid)
    entered = _ventricular_blood(shape, points, ventricle, fluid, random) * (1 - haemorrhage)
    uneven = shape.lump(points * np.float32(1.9))
    dense = random.uniform(56, 68) + 4.0 * uneven
    if not shape.in_fluid and shape.person.volume_ml > 15 and random.random() < 0.15:  # unclotted blood
        level = shape.middle[1] + random.normal(0, 3)
        dense = dense - 14 + 18 * np.clip((level - points[1]) / 2, 0, 1)
    if not (shape.in_fluid or shape.subdural):
        around = np.maximum(rank, 0)
        hu -= random.uniform(3, 9) * np.exp(-((around / random.uniform(3, 7)) ** 2)) * (1 - fluid)
    share = haemorrhage * (0.55 + 0.45 * fluid if shape.in_fluid else 1)
    hu += share * (dense - hu)
    hu += entered * (dense - 6 - hu)
    hu += random.uniform(1, 4) * np.exp(-np.maximum(depth, 0) / 6)  # beam hardening
    hu += _streaks(points, random)

    whole = np.full(field.depth.shape, _FLUID, np.float32)
    blood = [np.zeros(field.depth.shape, np.float32) for _ in range(2)]
    for target, values in zip([whole, *blood], [hu, haemorrhage, entered], strict=True):
        target[where] = values
    return whole, blood


def _haemorrhage(
    field: _Field, shape: Shape, points: np.ndarray, depth: np.ndarray, ventricle: np.ndarray, fluid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the fraction of haemorrhage at each point, and the distance from its edge in mm, positive outside."""
    rank = shape.rank(points, depth)
    if shape.in_fluid:
        may_bleed = (fluid > 0.3) & (ventricle > 3) & (depth > 0)
    elif shape.subdural:
        may_bleed = (depth > 0) & (rank < 100)
    else:
        may_bleed = (depth > 1) & ((ventricle > 1) | (fluid < 0.3))
    rank[~may_bleed] += 1e3
    wanted = min(round(shape.person.volume_ml / field.volume_ml), int(may_bleed.sum()))
    rank -= np.partition(rank, wanted)[wanted]
    return np.clip(0.5 - rank, 0, 1).astype(np.float32), rank


def _ventricular_blood(
    shape: Shape,
    points: np.ndarray,
    ventricle: np.ndarray,
    fluid: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    """Return the fraction of blood in the ventricles, which fills them from the haemorrhage and from posterior."""
    filled = np.zeros(len(ventricle), np.float32)
    inside = np.flatnonzero((ventricle < 1.5) & (fluid > 0.35))
    if shape.person.ventricular == 0 or not inside.size:
        return filled
    points = points[:, inside]
    near = np.sqrt(((points - shape.middle.astype(np.float32)[:, None]) ** 2).sum(0))
    order = 0.5 * near + random.uniform(0.2, 0.8) * points[1] + 6 * shape.lump(points)
    level = np.quantile(order, shape.person.ventricular)
    filled[inside] = (order <= level) * np.clip(fluid[inside] * 1.3, 0, 1)
    return filled


def _streaks(points: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the dark bar between the petrous bones and the streaks around them, in HU."""
    x, y, z = points
    height = np.exp(-(((z + 36) / 9) ** 2))
    bar = -random.uniform(3, 10) * np.exp(-(((y + 26) / 6) ** 2) - (x / 40) ** 2)
    for side in (-1, 1):
        across, along = x - 36 * side, y + 26
        angle = np.arctan2(along, across) * random.uniform(10, 16) + random.uniform(0, 6)
        bar += random.uniform(1, 5) * np.sin(angle) * np.exp(-np.hypot(across, along) / 32)
    streaks: np.ndarray = bar * height
    return streaks


def _head(hu: np.ndarray, field: _Field, random: np.random.Generator) -> np.ndarray:
    """Add bone, scalp, a simple face and a simple neck around the inside of the skull."""
    x, y, z = field.points
    out = -field.depth
    thick = random.uniform(5.5, 8) + np.sin(x / 17) + np.sin(y / 23)
    soft = (np.hypot(x / 60, (y + 28) / 66) < 1) & (z < -52)
    soft |= (x / 58) ** 2 + ((y - 52) / 46) ** 2 + ((z + 62) / 46) ** 2 < 1
    skin = np.where(out < thick + 3.5, _FAT, np.where(out < thick + 6, _SKIN, _AIR))
    head = np.where(soft & (out > thick), _SKIN, skin)
    head = np.where((x / 16) ** 2 + ((y - 62) / 14) ** 2 + ((z + 46) / 16) ** 2 < 1, _AIR, head)
    bone = np.where((out < 1.8) | (out > thick - 1.8), _BONE, _MARROW)
    head = np.where(out < thick, bone, head)
    spine = np.hypot(x, y + 40)
    head = np.where((spine < 20) & (z < -64), _BONE, head)
    head = np.where((spine < 10) & (z < -58), 30.0, head)  # the foramen magnum and the canal below
    return np.where(out < 0, hu, head).astype(np.float32)


def _digitise(
    layers: list[np.ndarray],
    low: np.ndarray,
    size: np.ndarray,
    cut: tuple[int, float],
    random: np.random.Generator,
    skull: bool,
) -> SimulatedScan:
    """Convert points to pixels: average over the slice, interpolate in the plane, add noise."""
    slices, spacing = cut
    mm = max(float(random.uniform(215, 245)), float(size[:2].max()) + 8) / _PIXELS
    middle = low[:2] + size[:2] / 2 + random.normal(0, 3, 2)
    first = middle + mm * (_PIXELS - 1) / 2  # the patient's right and front, from where pixels run to left and back
    boxes, matrices = [], []
    for axis in range(2):
        at = (first[axis] - mm * np.arange(_PIXELS) - low[axis]) / _FINE_MM - 0.5
        seen = np.flatnonzero((at > -1) & (at < layers[0].shape[axis]))
        boxes.append(slice(int(seen[0]), int(seen[-1]) + 1))
        far = np.abs(at[seen][:, None] - np.arange(layers[0].shape[axis]))
        matrices.append(np.maximum(0, 1 - far).astype(np.float32))

    def seen_as(layer: np.ndarray) -> np.ndarray:
        mean = layer.reshape(*layer.shape[:2], slices, _POINTS_PER_SLICE).mean(-1)
        across = np.tensordot(matrices[0], mean, 1)
        pixels: np.ndarray = np.matmul(matrices[1], across)
        return pixels

    hu, haemorrhage, entered, inside = (seen_as(layer) for layer in layers)
    hu += _noise(hu.shape, random) * random.uniform(2.2, 3.6) * (5 / spacing) ** 0.5
    within = inside > 0.5
    outside = _AIR if skull else 0.0
    pixels = np.full((_PIXELS, _PIXELS, slices), outside, np.int16)
    blood = np.zeros(pixels.shape, np.uint8)
    mask = np.zeros(pixels.shape, bool)
    box = tuple(boxes)
    pixels[box] = np.rint(np.maximum(hu if skull else np.where(within, hu, 0), -1024))
    blood[box] = np.where(within & (haemorrhage > 0.5), 1, np.where(within & (entered > 0.5), 2, 0))
    mask[box] = within
    affine = np.diag([-mm, -mm, spacing, 1.0])
    affine[:3, 3] = [*first, low[2] + spacing / 2]
    return SimulatedScan(pixels, blood, mask, affine)


def _noise(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return noise of standard deviation 1 with the short-range correlation of a soft kernel."""
    i, j, k = shape
    grain = random.standard_normal((i + 6, j + 6, k), np.float32)
    for _ in range(2):
        grain = grain[1:] + grain[:-1]
        grain = grain[:, 1:] + grain[:, :-1]
    fine = grain[2:-2, 2:-2]
    coarse = (grain[:-4, 2:-2] + grain[4:, 2:-2] + grain[2:-2, :-4] + grain[2:-2, 4:]) / 4
    noise: np.ndarray = fine - 0.5 * coarse
    result: np.ndarray = noise / noise[:, :, : 1 + k // 8].std()
    return result
