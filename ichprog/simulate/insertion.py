"""Add a known amount of blood to a given head, real or simulated.

The head is mapped to the template by the extents of its brain along its longest axis and across. The shapes are those
of the simulation. The tissue that may bleed is found in the head itself: fluid for blood in ventricles and sulci, the
surface of the brain for collections under the skull.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import InvalidValueError, UnknownNameError
from ichprog.scan import Scan, read
from ichprog.scan.brain import isolate_brain
from ichprog.scan.morphology import Box, bounding_box, resample
from ichprog.simulate.anatomy import template
from ichprog.simulate.haemorrhage import Shape, draw_shape, fullest, mask_value
from ichprog.simulate.population import draw_person

if TYPE_CHECKING:
    import nibabel as nib

    from ichprog.scan.brain import Brain

_SITES = {  # by kind: sites of the simulation, each with the largest volume in mL that fits
    "parenchymal": {"lobar": 120.0, "putamen": 100.0, "thalamus": 30.0, "cerebellum": 35.0, "pons": 8.0},
    "ventricular": {"thalamus": np.inf},
    "subarachnoid": {"subarachnoid": np.inf, "convexity": np.inf},
    "subdural": {"subdural": np.inf},
    "epidural": {"epidural": np.inf},
}
KINDS = tuple(_SITES)
_POINT_MM, _POINTS_PER_SLICE, _COARSE_MM = 1.0, 2, 2.0
_FLUID_HU, _TISSUE_HU = 10.0, 28.0  # a voxel of fluid, and one without fluid
_CLIP_HU = (-20.0, 100.0)
_VENTRICLE_MM = 4.0  # how far outside the template's ventricles fluid belongs to the ventricles of a head
_VENTRICLE_DEPTH_MM = 15.0
_EXTENT = (0.5, 99.5)  # percentiles between which a brain extends


@dataclass(frozen=True, eq=False)
class _Points:
    """Hold points in the box around a brain; arrays are `(x, y, z)`.

    Attributes:
        place: `(3, x, y, z)` position in the template's skull, in mm.
        depth: Depth below the surface of the brain, in mm, negative outside.
        ventricle: Distance from the template's ventricles, in mm, negative inside.
        hu: Smoothed HU.
        volume_ml: Volume of one point, in mL.
    """

    place: np.ndarray
    depth: np.ndarray
    ventricle: np.ndarray
    hu: np.ndarray
    volume_ml: float


def add_haemorrhage(
    scan: Any, kind: str, volume_ml: float, *, seed: int = 0, brain: "Brain" = "auto"
) -> tuple["nib.Nifti1Image", "nib.Nifti1Image"]:
    """Add a haemorrhage of known kind and volume to a head CT.

    Blood has 55 to 75 HU, and voxels at its edge show partial volumes. A rim of oedema surrounds parenchymal blood. The
    noise of the scan remains. No tissue is displaced, so there is no midline shift.

    Args:
        scan: The head: a path, a nibabel image or another source that `ichprog.predict` takes.
        kind: "parenchymal", "ventricular", "subarachnoid", "subdural" or "epidural".
        volume_ml: Volume of the blood, in mL.
        seed: Random seed of site, side and shape.
        brain: How the brain is found, as in `ichprog.predict`.

    Returns:
        The scan with the blood, and its mask with the values of `MASK_VALUES`, both in the space of the source. The
        mask has the volume, to within one voxel.

    Raises:
        UnknownNameError: There is no such kind.
        InvalidValueError: The volume is not above 0, or exceeds what fits, such as into narrow ventricles.
        ScanError: The scan cannot be read, or no brain is found.
        IchprogError: nilearn, which provides the template, is not installed.

    Examples:
        ```python
        image, mask = add_haemorrhage("head.nii.gz", "subdural", 20.0, seed=1)
        ```
    """
    if kind not in _SITES:
        raise UnknownNameError("kind of haemorrhage", kind, _SITES)
    if not 0 < volume_ml < np.inf:
        raise InvalidValueError("volume_ml", volume_ml, "a number of mL above 0")
    head = read(scan)
    inside = head.brain if head.brain is not None else isolate_brain(head, brain)[1]
    random = np.random.default_rng([seed, KINDS.index(kind)])
    box = bounding_box(inside)
    points = _points(head, inside, box)
    shape = _draw(kind, volume_ml, random)
    rank = _rank(shape, kind, points)
    blood = _share(rank, kind, volume_ml, points)

    dense = random.uniform(56, 70) + 4 * shape.lump(points.place * np.float32(1.9)) - 6 * (kind == "ventricular")
    change = blood * (dense - points.hu)
    if kind == "parenchymal":
        around = np.maximum(rank - rank[blood > 0].max(), 0)
        rim = random.uniform(3, 9) * np.exp(-((around / random.uniform(3, 7)) ** 2))
        change -= rim * (1 - blood) * (1 - _fluid(points.hu)) * (points.depth > 0)
    share, change = (_to_voxels(values, head.hu[box].shape) * inside[box] for values in (blood, change))

    voxels = np.zeros(head.hu.shape, np.uint8)
    voxels[box] = fullest(share, volume_ml / (float(np.prod(head.spacing)) / 1000)) * np.uint8(mask_value(kind))
    hu = head.hu.copy()
    hu[box] += change
    return head.image(np.rint(hu).astype(np.int16)), head.image(voxels)


def _draw(kind: str, volume_ml: float, random: np.random.Generator) -> Shape:
    """Draw the site and shape of a haemorrhage."""
    sites = [site for site, most_ml in _SITES[kind].items() if volume_ml <= most_ml] or [next(iter(_SITES[kind]))]
    person = replace(
        draw_person(random),
        site=str(random.choice(sites)),
        side=int(random.choice([-1, 1])),
        volume_ml=volume_ml,
    )
    return draw_shape(person, random, ratio=1.0)


def _points(head: Scan, inside: np.ndarray, box: Box) -> _Points:
    """Compute the points of a head: 1 mm apart in the plane, and two per slice."""
    from scipy import ndimage

    shape, spacing = inside[box].shape, np.array(head.spacing)
    cells = [*(max(2, round(n * mm / _POINT_MM)) for n, mm in zip(shape[:2], spacing, strict=False))]
    cells.append(shape[2] * _POINTS_PER_SLICE)
    coarse = [max(2, round(n * mm / _COARSE_MM)) for n, mm in zip(shape, spacing, strict=True)]
    mask = np.pad(resample(inside[box].astype(np.float32), coarse) > 0.5, 1)
    mm = spacing * shape / coarse
    signed = ndimage.distance_transform_edt(mask, mm) - ndimage.distance_transform_edt(~mask, mm)
    depth = resample(signed[1:-1, 1:-1, 1:-1].astype(np.float32), cells) - np.float32(_COARSE_MM / 2)

    matrix, offset = _to_template(head, inside)
    index = [(np.arange(m) + 0.5) * n / m - 0.5 + at.start for m, n, at in zip(cells, shape, box, strict=True)]
    place = np.tensordot(matrix, np.stack(np.meshgrid(*index, indexing="ij")), 1) + offset.reshape(3, 1, 1, 1)
    place = place.astype(np.float32)
    form = template()
    brain_hu = np.clip(head.hu[box], *_CLIP_HU)
    weight = ndimage.gaussian_filter(resample(inside[box].astype(np.float32), cells), (1.0, 1.0, 0.5))
    hu = ndimage.gaussian_filter(resample(brain_hu * inside[box], cells), (1.0, 1.0, 0.5)) / np.maximum(weight, 1e-3)
    volume_ml = float(np.prod(spacing * shape / cells)) / 1000
    return _Points(place, depth, form.at(form.ventricle, place), hu, volume_ml)


def _to_template(head: Scan, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix `(3, 3)` and offset `(3,)` from voxels to mm of the template."""
    form = template()
    known = form.coarse[:, None] + _COARSE_MM * np.argwhere(form.depth > 0).T
    step = max(1, round(_COARSE_MM / head.spacing[0]))
    where = np.argwhere(inside[::step, ::step]).T * np.array([[step], [step], [1]])
    to_mm = head.affine
    turn, low, high = _extent(to_mm[:3, :3] @ where + to_mm[:3, 3:])
    known_turn, known_low, known_high = _extent(known)
    scale = (known_high - known_low) / (high - low)
    matrix = known_turn @ np.diag(scale) @ turn.T
    offset = known_turn @ (known_low - scale * low)
    return matrix @ to_mm[:3, :3], matrix @ to_mm[:3, 3] + offset


def _extent(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the axes of a brain as columns `(3, 3)`, and its lowest and highest positions along them, in mm.

    The second axis is the longest one, from posterior to anterior. The first one is horizontal.
    """
    longest = np.linalg.eigh(np.cov(points))[1][:, -1]
    front = longest * np.sign(longest[1])
    right = np.cross(front, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    turn = np.stack([right, front, np.cross(right, front)], axis=1)
    low, high = np.percentile(turn.T @ points, _EXTENT, axis=1)
    return turn, low, high


def _fluid(hu: np.ndarray) -> np.ndarray:
    """Return the fraction of fluid by HU."""
    fraction: np.ndarray = np.clip((_TISSUE_HU - hu) / (_TISSUE_HU - _FLUID_HU), 0, 1)
    return fraction


def _rank(shape: Shape, kind: str, points: _Points) -> np.ndarray:
    """Return the order in which points bleed, infinite where they cannot."""
    fluid = _fluid(points.hu)
    if kind == "ventricular":
        bleeds = (points.ventricle < _VENTRICLE_MM) & (points.depth > _VENTRICLE_DEPTH_MM) & (fluid > 0.4)
        towards = (points.place - shape.middle.astype(np.float32).reshape(3, 1, 1, 1)) ** 2
        order = 0.5 * np.sqrt(towards.sum(0)) + 0.5 * points.place[1] + 6 * shape.lump(points.place)
        return np.where(bleeds, order, np.inf)
    rank, bleeds = shape.tissue_rank(points.place, points.depth, points.ventricle, fluid)
    return np.where(bleeds, rank, np.inf)


def _share(rank: np.ndarray, kind: str, volume_ml: float, points: _Points) -> np.ndarray:
    """Return the fraction of blood at each point."""
    wanted, possible = round(volume_ml / points.volume_ml), int(np.isfinite(rank).sum())
    if wanted >= possible:
        expected = f"less than the {possible * points.volume_ml:.1f} mL that can hold {kind} blood in this head"
        raise InvalidValueError("volume_ml", volume_ml, expected)
    level = np.partition(rank, wanted, axis=None)[wanted]
    share: np.ndarray = np.clip(0.5 - (rank - level), 0, 1).astype(np.float32)
    return share


def _to_voxels(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Average points over each slice and interpolate them to voxels."""
    return resample(values.reshape(*values.shape[:2], shape[2], _POINTS_PER_SLICE).mean(-1), shape)
