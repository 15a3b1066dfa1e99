"""CT scanner: HU of a head in slices, with blur, noise and streaks.

Tissue is composed on points, two per slice thickness, and averaged over the slice, so that voxels show partial volumes.
Within a slice the points are as far apart as the pixels, at least 1 mm. HU are those of textbooks: fluid 0 to 10, white
matter 25 to 30, grey matter 33 to 40, clotted blood 55 to 80, calcium over 100.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from ichprog.scan.morphology import cut_bands, resample_separable, triangle_weights
from ichprog.simulate.anatomy import CENTRE, Individual, gyri_displacement
from ichprog.simulate.haemorrhage import MASK_VALUES, Shape, fullest, mask_value
from ichprog.simulate.realism import PLAIN, Realism
from ichprog.simulate.structures import add_beam_hardening, add_structures

MATRIX = 512
"""Number of pixels along an edge of a slice, as of most CT scanners."""

_FINE_MM, _LATTICE_MM = 1.0, 4.0
_FIELD_OF_VIEW_MM = (215.0, 245.0)
_SMOOTHING = 1.5  # half the width of the interpolation of points further apart, which show structures as steps
_POINTS_PER_SLICE = 2
_FLUID, _CALCIUM, _DURA = 7.0, 260.0, 55.0
_BONE, _MARROW, _FAT, _SKIN, _AIR = 1250.0, 700.0, -95.0, 45.0, -1000.0
_MOST_TILT_DEG = 25.0
_SPACINGS_MM = (2.5, 3.0, 4.0, 5.0, 5.0, 5.0, 6.0, 7.5)
_WINDOWS = ((-20.0, 100.0), (-900.0, 2300.0))  # brain and bone, lowest and highest HU
_GREY_LEVELS = 255
_CALCIFIED = ((23, -40, 12), (-23, -40, 12), (0, -27, 4))  # plexus in both atria, pineal gland


@dataclass(frozen=True, eq=False)
class SimulatedScan:
    """Hold a simulated scan.

    Attributes:
        hu: `(i, j, k)` int16 HU, in LPS order.
        blood: `(i, j, k)` uint8: 1 parenchymal, 2 ventricular, 3 subarachnoid, 4 subdural or epidural haemorrhage.
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


@dataclass(frozen=True)
class _Protocol:
    """Hold the settings of a scanner.

    Attributes:
        slices: Number of slices.
        spacing: Distance between slices, in mm.
        overlap: Share of each slice that it has in common with its two neighbours, 0 to 0.5.
        sharpness: Of the reconstruction kernel: below 0 soft, 0 linear interpolation, above 0 sharp.
        noise_hu: Range of the standard deviation of the noise of slices of 5 mm, in HU.
        windowed: Whether HU are quantised.
        matrix: Number of pixels along an edge of a slice.
        fine_mm: Distance of the points of the tissue within a slice, in mm.
        mask_ml: Volume of the mask of the haemorrhage, or None for the voxels more than half full of blood.
    """

    slices: int
    spacing: float
    overlap: float
    sharpness: float
    noise_hu: tuple[float, float]
    windowed: bool
    matrix: int
    fine_mm: float
    mask_ml: float | None


def acquire(
    individual: Individual,
    shape: Shape,
    random: np.random.Generator,
    *,
    skull: bool = False,
    realism: Realism = PLAIN,
    matrix: int = MATRIX,
) -> SimulatedScan:
    """Acquire a scan of a head.

    Args:
        individual: The head.
        shape: The haemorrhage.
        random: Random generator.
        skull: Whether the whole head is visible; by default, voxels outside the skull's inside are 0.
        realism: Options of the simulation.
        matrix: Number of pixels along an edge of a slice. Fewer pixels are the means of the pixels of a full matrix,
            approximately, and are faster to compute.
    """
    fine_mm = max(_FINE_MM, _FIELD_OF_VIEW_MM[0] / matrix)
    of_gyri, of_tissue, of_protocol = random.spawn(3)
    angles = random.normal(0, (realism.tilt_deg, 3.0, 3.5))
    turn = _rotation(np.radians(np.clip(angles, -_MOST_TILT_DEG, _MOST_TILT_DEG)))
    reach = _skull_bounds(individual, turn)
    height = float(np.ptp(reach[2]))
    spacing = float(random.choice([s for s in (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.0, 5.0) if 24 <= height / s + 1 <= 52]))
    if realism.thick_slices:
        spacing = float(of_protocol.choice(_SPACINGS_MM))
    slices = int(np.ceil(height / spacing)) + int(random.integers(0, 3))
    margin = np.array([24.0, 26.0, 12.0]) if skull else np.array([4.0, 4.0, 0.0])
    low, high = reach[:, 0] - margin, reach[:, 1] + margin
    low[2] = reach[2, 0] - random.uniform(0, spacing)
    slices += int(np.ceil((margin[2] + spacing) / spacing)) if skull else 0
    cells = (*(int(np.ceil((high[a] - low[a]) / fine_mm)) for a in range(2)), slices * _POINTS_PER_SLICE)
    size = np.array([cells[0] * fine_mm, cells[1] * fine_mm, slices * spacing])
    gyri = partial(gyri_displacement, amplitude_mm=realism.gyri_mm, random=of_gyri) if realism.gyri_mm else None
    field = _field(individual, shape, turn, low, size, cells, spacing / _POINTS_PER_SLICE * fine_mm**2 / 1000, gyri)
    hu, blood = _tissue(field, individual, shape, random, realism, of_tissue)
    if skull:
        hu = _head(hu, field, random)
    layers = [hu, *blood, np.clip(field.depth + 0.5, 0, 1)]
    protocol = _Protocol(
        slices,
        spacing,
        float(of_protocol.choice([0.0, 0.0, 0.25, 0.5])) if realism.thick_slices and spacing < 5 else 0.0,
        float(of_protocol.uniform(-1, 1)) if realism.kernels else 0.0,
        realism.noise_hu,
        bool(of_protocol.random() < realism.windowed),
        matrix,
        fine_mm,
        shape.person.volume_ml if realism.exact_masks else None,
    )
    value = mask_value(shape.person.kind) if shape.person.bleeds else 0
    return _digitise(layers, low, size, protocol, value, random, skull)


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
    gyri: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
) -> _Field:
    """Compute smooth maps on a lattice of 4 mm and interpolate them to the points."""
    lattice = [max(2, round(length / _LATTICE_MM)) for length in size]
    axes = [lo + (np.arange(n) + 0.5) * length / n for lo, n, length in zip(low, lattice, size, strict=True)]
    points = _to_template(np.stack(np.meshgrid(*axes, indexing="ij")), individual, turn)
    form = individual.template
    depth = form.at(form.depth, points)
    source = individual.tissue_source(points, shape.displacement(points, depth).astype(np.float32))
    if gyri is not None:
        source = source + gyri(points, depth)
    ventricle = form.at(form.ventricle, source)
    bands = [cut_bands(triangle_weights(n, m)) for n, m in zip(lattice, cells, strict=True)]
    spread = [resample_separable(values, bands) for values in (*points, *source, depth, ventricle)]
    return _Field(low, np.stack(spread[:3]), np.stack(spread[3:6]), spread[6], spread[7], volume_ml)


def _tissue(
    field: _Field,
    individual: Individual,
    shape: Shape,
    random: np.random.Generator,
    realism: Realism,
    of_realism: np.random.Generator,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return HU inside the skull, and the fractions of haemorrhage and of blood in the ventricles."""
    of_structures, of_hardening, of_tissue = of_realism.spawn(3)
    where = np.flatnonzero(field.depth > -1.0)
    points, source = (np.stack([axis.ravel()[where] for axis in each]) for each in (field.points, field.source))
    depth, ventricle = field.depth.ravel()[where], field.ventricle.ravel()[where]
    form = individual.template
    grey, white = form.at(form.grey, source), form.at(form.white, source)
    fluid = np.clip(1 - grey - white, 0, 1) ** np.float32(individual.sulci)
    grey_share = grey / np.maximum(grey + white, 1e-3)
    if realism.sharp_tissue:
        grey_share = np.clip(1.8 * grey_share - 0.4, 0, 1)
    pale = individual.pallor_hu * np.exp(-np.maximum(ventricle, 0) / 13)
    solid_grey, solid_white = of_tissue.uniform(*realism.grey_hu), of_tissue.uniform(*realism.white_hu)
    solid = solid_grey * grey_share + (solid_white - pale) * (1 - grey_share)
    hu = _FLUID * fluid + solid * (1 - fluid)
    falx = np.exp(-((source[0] / 0.9) ** 2)) * (ventricle > 8) * (source[2] > 4) * np.clip(fluid + 0.2, 0, 1)
    hu += falx * (_DURA - hu) * 0.6
    for place in _CALCIFIED:
        size = individual.calcified_mm * float(random.uniform(0.6, 1.3))
        if size > 0.9:
            away = source - np.array(place, np.float32)[:, None]
            near = np.flatnonzero(np.abs(away).max(0) < size)
            far = np.sqrt((away[:, near] ** 2).sum(0))
            hu[near] += np.clip((size - far) / 1.2, 0, 1) * (_CALCIUM - hu[near])
    add_structures(hu, points, source, depth, realism, shape.person.marks["calcification"], of_structures)

    haemorrhage, rank = _haemorrhage(field, shape, points, depth, ventricle, fluid)
    entered = _ventricular_blood(shape, points, ventricle, fluid, random) * (1 - haemorrhage)
    bleeding = np.flatnonzero((haemorrhage > 0) | (entered > 0))
    dense = random.uniform(56, 68) + 4.0 * shape.lump(points[:, bleeding] * np.float32(1.9))
    if not shape.in_fluid and shape.person.volume_ml > 15 and random.random() < 0.15:  # unclotted blood
        level = shape.middle[1] + random.normal(0, 3)
        dense = dense - 14 + 18 * np.clip((level - points[1, bleeding]) / 2, 0, 1)
    if shape.person.bleeds and not (shape.in_fluid or shape.subdural):
        around = np.maximum(rank, 0)
        hu -= random.uniform(3, 9) * np.exp(-((around / random.uniform(3, 7)) ** 2)) * (1 - fluid)
    share = haemorrhage * (0.55 + 0.45 * fluid if shape.in_fluid else 1)
    hu[bleeding] += share[bleeding] * (dense - hu[bleeding])
    hu[bleeding] += entered[bleeding] * (dense - 6 - hu[bleeding])
    hu += random.uniform(1, 4) * np.exp(-np.maximum(depth, 0) / 6)  # beam hardening
    hu += _streaks(points, random)
    if realism.hardening_hu:
        add_beam_hardening(hu, points, depth, realism.hardening_hu, of_hardening)
    hu += np.float32(of_tissue.normal(0, realism.calibration_hu))

    whole = np.full(field.depth.shape, _FLUID, np.float32)
    blood = [np.zeros(field.depth.shape, np.float32) for _ in range(2)]
    for target, values in zip([whole, *blood], [hu, haemorrhage, entered], strict=True):
        target.ravel()[where] = values
    return whole, blood


def _haemorrhage(
    field: _Field, shape: Shape, points: np.ndarray, depth: np.ndarray, ventricle: np.ndarray, fluid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the fraction of haemorrhage at each point, and the distance from its edge in mm, positive outside."""
    if not shape.person.bleeds:
        return np.zeros(len(depth), np.float32), np.full(len(depth), np.inf, np.float32)
    rank, may_bleed = shape.tissue_rank(points, depth, ventricle, fluid)
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
    protocol: _Protocol,
    value: int,
    random: np.random.Generator,
    skull: bool,
) -> SimulatedScan:
    """Convert points to pixels: average over the slice, apply the kernel in the plane, add noise."""
    slices, spacing = protocol.slices, protocol.spacing
    matrix, fine_mm = protocol.matrix, protocol.fine_mm
    mm = max(float(random.uniform(*_FIELD_OF_VIEW_MM)), float(size[:2].max()) + 8) / matrix
    middle = low[:2] + size[:2] / 2 + random.normal(0, 3, 2)
    first = middle + mm * (matrix - 1) / 2  # the patient's right and front, from where pixels run to left and back
    boxes, matrices, kernels = [], [], []
    for axis in range(2):
        at = (first[axis] - mm * np.arange(matrix) - low[axis]) / fine_mm - 0.5
        seen = np.flatnonzero((at > -1) & (at < layers[0].shape[axis]))
        boxes.append(slice(int(seen[0]), int(seen[-1]) + 1))
        far = np.abs(at[seen][:, None] - np.arange(layers[0].shape[axis]))
        if fine_mm > _FINE_MM:  # kernels differ by less than these pixels
            smooth = np.maximum(0, 1 - far / _SMOOTHING)
            matrices.append((smooth / smooth.sum(1, keepdims=True)).astype(np.float32))
            kernels.append(matrices[-1])
        else:
            matrices.append(np.maximum(0, 1 - far).astype(np.float32))
            kernels.append(_kernel(far, protocol.sharpness) if protocol.sharpness else matrices[-1])

    def seen_as(layer: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        # much faster than the mean over an axis of two points
        mean = sum(layer[..., part::_POINTS_PER_SLICE] for part in range(_POINTS_PER_SLICE)) / _POINTS_PER_SLICE
        if protocol.overlap:
            padded = np.pad(mean, [(0, 0), (0, 0), (1, 1)], "edge")
            mean = (1 - protocol.overlap) * mean + protocol.overlap / 2 * (padded[..., :-2] + padded[..., 2:])
        across = np.tensordot(weights[0], mean, 1)
        pixels: np.ndarray = np.matmul(weights[1], across)
        return pixels

    hu = seen_as(layers[0], kernels)
    haemorrhage, entered, inside = (seen_as(layer, matrices) for layer in layers[1:])
    noise = _noise(hu.shape, random, protocol.sharpness) * random.uniform(*protocol.noise_hu) * (5 / spacing) ** 0.5
    hu += noise if matrix == MATRIX else noise * _noise_share(MATRIX / matrix, protocol.sharpness)
    if protocol.windowed:
        hu = _quantise(hu)
    within = inside > 0.5
    outside = _AIR if skull else 0.0
    pixels = np.full((matrix, matrix, slices), outside, np.int16)
    blood = np.zeros(pixels.shape, np.uint8)
    mask = np.zeros(pixels.shape, bool)
    box = tuple(boxes)
    pixels[box] = np.rint(np.maximum(hu if skull else np.where(within, hu, 0), -1024))
    bleeds, fills = within & (haemorrhage > 0.5), within & (entered > 0.5)
    if protocol.mask_ml is not None:
        bleeds = fullest(haemorrhage * within, protocol.mask_ml * 1000 / (mm**2 * spacing))
        fills = fullest(entered * within, float(entered.sum()))
    blood[box] = np.where(bleeds, value, np.where(fills, MASK_VALUES["ventricular"], 0))
    mask[box] = within
    affine = np.diag([-mm, -mm, spacing, 1.0])
    affine[:3, 3] = [*first, low[2] + spacing / 2]
    return SimulatedScan(pixels, blood, mask, affine)


def _kernel(distance: np.ndarray, sharpness: float) -> np.ndarray:
    """Return the weights of points at a distance in mm: Gaussian for a soft kernel, with overshoot for a sharp one.

    Args:
        distance: `(pixels, points)` in mm.
        sharpness: From -1, a standard deviation of 1.2 mm, to 1, the cubic convolution of Keys (1981) with a of -1.
    """
    if sharpness < 0:
        weights = np.exp(-((distance / (0.5 - 0.7 * sharpness)) ** 2) / 2)
    else:
        a, near = -0.3 - 0.7 * sharpness, np.minimum(distance, 2)
        inner = (a + 2) * near**3 - (a + 3) * near**2 + 1
        weights = np.where(near < 1, inner, a * (near**3 - 5 * near**2 + 8 * near - 4))
    weights = np.where(distance < 4, weights, 0)
    result: np.ndarray = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return result


def _quantise(hu: np.ndarray) -> np.ndarray:
    """Return HU in the steps of a brain window of 8 bits, and in those of a bone window outside it."""
    (low, high), (lowest, highest) = _WINDOWS
    fine, coarse = ((b - a) / _GREY_LEVELS for a, b in _WINDOWS)
    bone = lowest + coarse * np.rint((np.clip(hu, lowest, highest) - lowest) / coarse)
    brain = low + fine * np.rint((np.clip(hu, low, high) - low) / fine)
    outside = np.where(hu < low, np.minimum(bone, low), np.maximum(bone, high))
    result: np.ndarray = np.where((hu < low) | (hu > high), outside, brain)
    result[hu < lowest + coarse] = _AIR
    return result


def _noise(shape: tuple[int, ...], random: np.random.Generator, sharpness: float = 0.0) -> np.ndarray:
    """Return noise of standard deviation 1 with the short-range correlation of a kernel."""
    i, j, k = shape
    noise = _correlate(random.standard_normal((i + 6, j + 6, k), np.float32), sharpness)
    result: np.ndarray = noise / noise[:, :, : 1 + k // 8].std()
    return result


def _correlate(grain: np.ndarray, sharpness: float) -> np.ndarray:
    """Return noise with the short-range correlation of a kernel, 6 pixels smaller in the plane than white noise."""
    for _ in range(2):
        grain = grain[1:] + grain[:-1]
        grain = grain[:, 1:] + grain[:, :-1]
    fine = grain[2:-2, 2:-2]
    coarse = (grain[:-4, 2:-2] + grain[4:, 2:-2] + grain[2:-2, :-4] + grain[2:-2, 4:]) / 4
    noise: np.ndarray = fine - (0.5 + 0.35 * sharpness) * coarse
    return noise


@cache
def _noise_share(pixels: float, sharpness: float) -> float:
    """Return the standard deviation of the mean noise of `pixels` x `pixels` pixels, relative to that of one pixel."""
    white = np.zeros((19, 19, 1), np.float32)
    white[9, 9] = 1
    response = _correlate(white, sharpness)[..., 0]  # of one pixel to white noise
    reach = int(np.ceil(pixels / 2 + 0.5))
    weights = np.clip(pixels / 2 + 0.5 - np.abs(np.arange(-reach, reach + 1)), 0, 1) / pixels
    mean = np.array([np.convolve(row, weights) for row in response])
    mean = np.array([np.convolve(column, weights) for column in mean.T])
    return float(np.sqrt((mean**2).sum() / (response**2).sum()))
