"""The brain in a head CT, found by density and shape.

Networks of this library were trained on scans in which everything but the brain is 0. Here a whole head becomes such
a scan by morphology: the brain is the large soft piece inside the bone. Everything is decided on a grid of about 2 mm
and in mm, so that slices of 0.6 mm and of 7 mm are treated alike; only the last millimetres towards the bone are
decided voxel by voxel.
"""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from ichprog.errors import ScanError, UnknownName
from ichprog.scan.volume import Scan

BrainMode = Literal["auto", "extract", "given"]

AIR_HU = -200.0  # fat and all that is softer is above
LEAST_ML = 100.0
_STEP_MM = 2.0
_SOFT_HU = (-20.0, 140.0)  # cerebrospinal fluid with noise; above the densest clot, below bone mixed with brain
_SKULL_ML, _SKULL_MM = 60.0, 80.0  # less bone than this, or narrower, is calcification, metal or a crumb of skull
_CLIP_ML = 5.0  # what is dense and smaller lies inside the brain: calcification, clip, coil
_OPEN_MM = 6.0  # half the width of nostrils and ear canals: air behind them is not outside
_SCALP_MM = 5.0
_CORE_MM = 8.0  # half the width of what is cut through: orbital fissures, the canal of the spine
_CANAL_CM2 = 12.0  # a slice with less, below all others, lies below the foramen magnum, which has 7 to 10
_RIM_MM = 3.0  # bone is that much wider on the coarse grid


def refuse_unknown_mode(mode: str) -> None:
    """Refuses a way to treat the brain that does not exist, before any scan is read.

    Args:
        mode: What was asked for.

    Raises:
        UnknownName: There is no such mode.
    """
    if mode not in get_args(BrainMode):
        raise UnknownName("brain mode", mode, get_args(BrainMode))


def sees_skull(scan: Scan) -> bool:
    """Whether a scan shows a skull, so that the brain is still to be extracted.

    A skull is one piece of at least 60 mL denser than soft tissue and 80 mm wide and long. Calcifications, clips,
    coils and crumbs of skull left by another extraction are smaller.

    Args:
        scan: The scan, in HU.
    """
    coarse, spacing = coarsen(scan.hu, scan.spacing)
    return is_skull(coarse > _SOFT_HU[1], spacing)


def extract(scan: Scan) -> np.ndarray:
    """Finds the brain in a whole head, with the fluid in and around it and any blood inside the skull.

    In order: bone is every large piece denser than 140 HU; soft tissue is what lies between -20 and 140 HU, deeper
    than a scalp under the outside air and not bone; its core is what is 8 mm away from all else, which cuts orbits,
    nerves and neck off; the core's largest piece that is ringed by bone grows back, is cut below the foramen
    magnum and filled, and takes the last 3 mm of soft voxels up to the bone in full resolution.

    What it does not do: meninges and venous sinuses stay in, and so do slivers behind bone under 3 mm thick, such as
    the roof of an orbit or of the ethmoid cells. Under a wide missing piece of skull 5 mm of scalp are
    taken off and the rest of what lies outside the dura, such as muscle, stays in; brain that swells to within
    5 mm of the skin is cut there. Skulls of infants, with thin bone and open sutures, and heads full of metal
    streaks were not tried.

    Args:
        scan: A whole head, in HU.

    Returns:
        `(i, j, k)` bool, true in the brain.

    Raises:
        ScanError: `no-brain`: there is no skull, or nothing of at least 100 mL inside of it.
    """
    from scipy import ndimage

    coarse, spacing = coarsen(scan.hu, scan.spacing)
    dense = coarse > _SOFT_HU[1]
    if not is_skull(dense, spacing):
        raise _no_brain(scan, "no skull is seen. Give brain='given' if the scan holds the brain alone")
    # little of a scan is head, and no brain lies beyond the skull
    margin = [int(_SCALP_MM * 2 / mm) for mm in spacing]
    around = ndimage.find_objects(largest(dense).astype(np.int8))[0]
    box = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(around, margin, strict=True))
    whole, coarse, dense = coarse.shape, coarse[box], dense[box]

    labels, _ = ndimage.label(dense)
    skull = dense & (np.bincount(labels.ravel())[labels] >= _CLIP_ML * 1000 / np.prod(spacing))
    soft = (coarse > _SOFT_HU[0]) & ~skull & _below_scalp(coarse, spacing)
    core = largest(depth(soft, spacing) > _CORE_MM, among=_ringed(skull))
    brain = soft & (depth(~core, spacing) < _CORE_MM + _STEP_MM)
    area_cm2 = brain.sum((0, 1)) * spacing[0] * spacing[1] / 100
    brain[..., : np.argmax(area_cm2 >= _CANAL_CM2)] = False
    brain = ndimage.binary_fill_holes(brain)
    if brain.sum() * np.prod(spacing) / 1000 < LEAST_ML:
        raise _no_brain(scan, "nothing large and soft lies inside the bone")

    outward = np.full(whole, 2 * _RIM_MM, np.float32)
    outward[box] = depth(~brain, spacing) - depth(brain, spacing)
    outward = resample(outward, scan.hu.shape)
    is_soft = (scan.hu > _SOFT_HU[0]) & (scan.hu < _SOFT_HU[1])
    return largest((outward <= -_RIM_MM) | ((outward < _RIM_MM) & is_soft))


def brain_only(scan: Scan, mode: BrainMode) -> tuple[Scan, np.ndarray, dict[str, Any]]:
    """A scan as the networks know it, with everything but the brain at 0 HU.

    Args:
        scan: The scan, in HU.
        mode: "extract" finds the brain; "given" says the scan holds the brain alone and changes nothing; "auto"
            extracts where a skull is seen.

    Returns:
        The scan with 0 HU outside the brain; the brain, `(i, j, k)` bool; and what was done, ready for JSON.

    Raises:
        UnknownName: There is no such mode.
        ScanError: `no-brain`: no brain is found.
    """
    refuse_unknown_mode(mode)
    found = mode == "extract" or (mode == "auto" and sees_skull(scan))
    mask = extract(scan) if found else _given(scan)
    record = {
        "brain": "extracted" if found else "given",
        "brain_ml": round(float(np.count_nonzero(mask) * np.prod(scan.spacing) / 1000), 1),
    }
    return (dataclasses.replace(scan, hu=np.where(mask, scan.hu, np.float32(0))) if found else scan), mask, record


def coarsen(values: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
    """HU on a grid of about 2 mm, clipped so that air and dense bone do not outweigh what they are mixed with.

    Args:
        values: `(i, j, k)` HU.
        spacing: Distance of voxels along i, j and k, in mm.

    Returns:
        HU on the coarse grid, and that grid's spacing in mm.
    """
    shape = tuple(max(2, round(n * mm / _STEP_MM)) for n, mm in zip(values.shape, spacing, strict=True))
    coarse = resample(np.clip(values, 2 * AIR_HU, 500), shape)
    return coarse, tuple(n * mm / m for n, mm, m in zip(values.shape, spacing, shape, strict=True))


def resample(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values on another grid over the same extent: linear towards a finer grid, averaged towards a coarser one.

    Each axis is multiplied with a matrix of triangular weights as wide as the coarser of both grids, which a BLAS
    does in a fraction of the time of a general interpolation.

    Args:
        values: An array of numbers.
        shape: Its shape on the other grid.

    Returns:
        float32 array of that shape.
    """
    values = np.asarray(values, np.float32)
    for axis in sorted(range(values.ndim), key=lambda a: shape[a] / values.shape[a]):  # shrink first, grow last
        n, m = values.shape[axis], shape[axis]
        far = np.abs((np.arange(m)[:, None] + 0.5) / m - (np.arange(n) + 0.5) / n)
        weights = np.maximum(0, 1 - far * min(n, m)).astype(np.float32)
        weights /= weights.sum(1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return np.ascontiguousarray(values)


def largest(mask: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """The largest connected piece of a mask.

    Args:
        mask: Bool array.
        among: Where voxels count towards a piece's size; everywhere if not given.
    """
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel() if among is None else labels[among], minlength=2)
    sizes[0] = 0
    piece: np.ndarray = (labels == np.argmax(sizes)) & mask
    return piece


def depth(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """How far inside a mask each voxel lies; the edge of the scan is no end of the mask.

    Args:
        mask: Bool array.
        spacing: Distance of voxels along each axis, in mm.

    Returns:
        Distance to the nearest voxel outside the mask in mm, 0 outside.
    """
    from scipy import ndimage

    if mask.all():
        return np.full(mask.shape, np.inf, np.float32)
    inside: np.ndarray = ndimage.distance_transform_edt(mask, sampling=spacing)
    return inside


def background(hu: np.ndarray) -> tuple[float, float]:
    """The commonest value on the four sides of a scan, and the share of the sides that has it.

    Args:
        hu: `(i, j, k)` HU.
    """
    sides = np.concatenate([hu[[0, -1]].ravel(), hu[:, [0, -1]].ravel()])
    values, counts = np.unique(sides, return_counts=True)
    return float(values[np.argmax(counts)]), float(counts.max() / sides.size)


def is_skull(dense: np.ndarray, spacing: tuple[float, ...]) -> bool:
    """Whether the largest piece of a mask has the volume and the extent of a skull.

    Args:
        dense: `(i, j, k)` bool.
        spacing: Distance of voxels along i, j and k, in mm.
    """
    piece = np.argwhere(largest(dense))
    if not len(piece):
        return False
    extent = np.ptp(piece, axis=0) * spacing
    return bool(len(piece) * np.prod(spacing) / 1000 >= _SKULL_ML and min(extent[:2]) >= _SKULL_MM)


def _below_scalp(coarse: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Where a brain can be: deeper than a scalp under the outside air; air in sinuses and wounds is not outside."""
    from scipy import ndimage

    wide = depth(coarse < AIR_HU, spacing) > _OPEN_MM  # cuts nostrils and ear canals off
    labels, _ = ndimage.label(wide)
    faces = [labels[[0, -1]], labels[:, [0, -1]]]
    outside = wide & np.isin(labels, np.unique(np.concatenate([f.ravel() for f in faces])))
    below: np.ndarray = depth(~outside, spacing) > _OPEN_MM + _SCALP_MM
    return below


def _ringed(skull: np.ndarray) -> np.ndarray:
    """Where bone lies to the right, left, front and back: in the head, hardly in a neck that is larger."""
    ringed = np.ones_like(skull)
    for axis in (0, 1):
        ringed &= np.logical_or.accumulate(skull, axis) & np.flip(
            np.logical_or.accumulate(np.flip(skull, axis), axis), axis
        )
    return ringed


def _given(scan: Scan) -> np.ndarray:
    """Where a scan that is said to hold the brain alone has something."""
    from scipy import ndimage

    empty, _ = background(scan.hu)
    mask = (np.abs(scan.hu - empty) > 0.5) & (scan.hu > AIR_HU)
    filled: np.ndarray = ndimage.binary_fill_holes(mask)
    return filled


def _no_brain(scan: Scan, why: str) -> ScanError:
    return ScanError(f"{scan.name}: no brain is found: {why}.", code="no-brain", expected=f">= {LEAST_ML:g}", unit="mL")
