"""The brain in a head CT, found by density and shape.

Networks of this library were trained on scans in which everything but the brain is 0. Here a whole head becomes such
a scan by morphology: the brain is the large soft piece inside the bone. Everything is decided on a grid of about 2 mm
and in mm, so that slices of 0.6 mm and of 7 mm are treated alike; only the last millimetres towards the bone are
decided voxel by voxel.
"""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from ichprog.errors import ScanError, UnknownNameError
from ichprog.scan.morphology import Box, banded, bounds, distance, filled, largest, pieces, weigh, weights, within
from ichprog.scan.volume import AIR_HU, Scan

BrainMode = Literal["auto", "extract", "given"]

LEAST_ML = 100.0
SKULL_ML = 60.0  # less bone than this is calcification, metal or a crumb of skull
_SKULL_MM = 80.0  # and so is what is narrower
_STEP_MM = 2.0
_SOFT_HU = (-20.0, 140.0)  # cerebrospinal fluid with noise; above the densest clot, below bone mixed with brain
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
        UnknownNameError: There is no such mode.
    """
    if mode not in get_args(BrainMode):
        raise UnknownNameError("brain mode", mode, get_args(BrainMode))


def sees_skull(scan: Scan) -> bool:
    """Whether a scan shows a skull, so that the brain is still to be extracted.

    A skull is one piece of at least 60 mL denser than soft tissue and 80 mm wide and long. Calcifications, clips,
    coils and crumbs of skull left by another extraction are smaller.

    Args:
        scan: The scan, in HU.
    """
    if scan.extremes[1] <= _SOFT_HU[1]:
        return False
    return skull_in(scan.coarse > _SOFT_HU[1], scan.coarse_form[1]) is not None


def skull_in(dense: np.ndarray, spacing: tuple[float, ...]) -> Box | None:
    """Where a mask's largest piece lies, if it has the volume and the extent of a skull.

    Args:
        dense: `(i, j, k)` bool.
        spacing: Distance of voxels along i, j and k, in mm.
    """

    def enough(mask: np.ndarray) -> bool:
        return bool(np.count_nonzero(mask) * np.prod(spacing) / 1000 >= SKULL_ML)

    if not enough(dense) or not enough(piece := largest(dense)):
        return None
    box = bounds(piece)
    wide = all((at.stop - 1 - at.start) * mm >= _SKULL_MM for at, mm in zip(box[:2], spacing[:2], strict=True))
    return box if wide else None


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
    coarse, (_, spacing) = scan.coarse, scan.coarse_form
    dense = coarse > _SOFT_HU[1]
    around = skull_in(dense, spacing)
    if around is None:
        raise _no_brain(scan, "no skull is seen. Give brain='given' if the scan holds the brain alone")
    # little of a scan is head, and no brain lies beyond the skull
    margin = [int(_SCALP_MM * 2 / mm) for mm in spacing]
    box = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(around, margin, strict=True))
    whole, coarse, dense = coarse.shape, coarse[box], dense[box]

    skull = pieces(dense, lambda sizes: sizes >= _CLIP_ML * 1000 / np.prod(spacing))
    soft = (coarse > _SOFT_HU[0]) & ~skull & _below_scalp(coarse, spacing)
    core = largest(~within(~soft, _CORE_MM, spacing), among=_ringed(skull))
    brain = soft & within(core, np.nextafter(_CORE_MM + _STEP_MM, 0), spacing)
    area_cm2 = brain.sum((0, 1)) * spacing[0] * spacing[1] / 100
    brain[..., : np.argmax(area_cm2 >= _CANAL_CM2)] = False
    brain = filled(brain)
    if brain.sum() * np.prod(spacing) / 1000 < LEAST_ML:
        raise _no_brain(scan, "nothing large and soft lies inside the bone")
    everywhere = np.zeros(whole, bool)
    everywhere[box] = brain
    return _to_the_bone(everywhere, scan)


def _to_the_bone(brain: np.ndarray, scan: Scan) -> np.ndarray:
    """A brain on the coarse grid as one in full resolution that ends where soft tissue does.

    Args:
        brain: Bool on the coarse grid.
        scan: The scan, in HU.
    """
    _, spacing = scan.coarse_form
    matrices = [weights(m, n) for m, n in zip(brain.shape, scan.hu.shape, strict=True)]
    fine, box = [], []  # the voxels that can be within the rim, and the coarse ones that these are made of
    for matrix, at, mm in zip(matrices, bounds(brain), spacing, strict=True):
        rim = int(_RIM_MM / mm) + 1
        voxels = np.flatnonzero(matrix[:, max(0, at.start - rim) : at.stop + rim].any(1))
        fine.append(slice(voxels[0], voxels[-1] + 1))
        cells = np.flatnonzero(matrix[fine[-1]].any(0))
        box.append(slice(cells[0], cells[-1] + 1))
    # a voxel's value is mixed from cells no further apart than this: where one is beyond it, none is in the rim
    mixed = 2 * float(np.linalg.norm(np.maximum(spacing, scan.spacing)))
    inside, most = brain[tuple(box)], _RIM_MM + mixed + _STEP_MM
    beyond = np.minimum(distance(inside, spacing, most), most) - np.minimum(distance(~inside, spacing, most), most)
    outward = weigh(beyond.T, [banded(m[f, b]) for m, f, b in zip(matrices, fine, box, strict=True)][::-1]).T
    hu = scan.hu[tuple(fine)]
    found = np.zeros_like(scan.hu, bool)
    found[tuple(fine)] = largest(
        (outward <= -_RIM_MM) | ((outward < _RIM_MM) & (hu > _SOFT_HU[0]) & (hu < _SOFT_HU[1]))
    )
    return found


def brain_only(scan: Scan, mode: BrainMode) -> tuple[Scan, np.ndarray, dict[str, Any]]:
    """A scan as the networks know it, with everything but the brain at 0 HU.

    Args:
        scan: The scan, in HU.
        mode: "extract" finds the brain; "given" says the scan holds the brain alone and changes nothing; "auto"
            extracts where a skull is seen.

    Returns:
        The scan with 0 HU outside the brain; the brain, `(i, j, k)` bool; and what was done, ready for JSON.

    Raises:
        UnknownNameError: There is no such mode.
        ScanError: `no-brain`: no brain is found.
    """
    if holds_brain_alone(scan, mode):
        kept, mask, done = scan, filled(scan.matter), "given"
    else:
        mask, done = extract(scan), "extracted"
        hu, box = np.zeros_like(scan.hu), bounds(mask)
        hu[box] = np.where(mask[box], scan.hu[box], np.float32(0))
        kept = dataclasses.replace(scan, hu=hu)
    ml = round(float(np.count_nonzero(mask) * np.prod(scan.spacing) / 1000), 1)
    return kept, mask, {"brain": done, "brain_ml": ml}


def holds_brain_alone(scan: Scan, mode: BrainMode) -> bool:
    """Whether a scan is taken as it is, without extraction.

    Args:
        scan: The scan, in HU.
        mode: As in `brain_only`.

    Raises:
        UnknownNameError: There is no such mode.
    """
    refuse_unknown_mode(mode)
    return mode == "given" or (mode == "auto" and not sees_skull(scan))


def _below_scalp(coarse: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Where a brain can be: deeper than a scalp under the outside air; air in sinuses and wounds is not outside."""
    wide = ~within(coarse >= AIR_HU, _OPEN_MM, spacing)  # cuts nostrils and ear canals off
    sides = np.zeros_like(wide)
    sides[[0, -1]] = sides[:, [0, -1]] = True
    return ~within(pieces(wide, lambda sizes: sizes > 0, among=sides), _OPEN_MM + _SCALP_MM, spacing)


def _ringed(skull: np.ndarray) -> np.ndarray:
    """Where bone lies to the right, left, front and back: in the head, hardly in a neck that is larger."""
    ringed = np.ones_like(skull)
    for axis in (0, 1):
        ringed &= np.logical_or.accumulate(skull, axis) & np.flip(
            np.logical_or.accumulate(np.flip(skull, axis), axis), axis
        )
    return ringed


def _no_brain(scan: Scan, why: str) -> ScanError:
    return ScanError(f"{scan.name}: no brain is found: {why}.", code="no-brain", expected=f">= {LEAST_ML:g}", unit="mL")
