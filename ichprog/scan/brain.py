"""Isolate the brain of a head CT: by an extractor, by a mask, or unchanged if the scan holds the brain alone.

The networks of this library were trained on scans in which everything but the brain is 0. The built-in extractor uses
density and shape: the brain is the large soft component inside the bone. It works on a grid of about 2 mm and in mm,
so slices of 0.6 mm and of 7 mm are treated alike. Only the last 3 mm towards the bone are decided voxel by voxel.
"""

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ichprog.errors import PluginError, ScanError, UnknownNameError
from ichprog.scan.morphology import (
    Box,
    bounding_box,
    cut_bands,
    dilate_mm,
    distance_mm,
    fill_holes,
    filter_components,
    largest_component,
    resample_separable,
    triangle_weights,
)
from ichprog.scan.volume import AIR_HU, Scan, Spacing, image_name, lowres_geometry, lowres_hu, read_voxels, to_lps

if TYPE_CHECKING:
    import nibabel as nib

BrainMode = Literal["auto", "extract", "given"]

MIN_BRAIN_ML = 100.0
MIN_SKULL_ML = 60.0  # less bone than this is calcification, metal or a remnant of the skull
_MIN_SKULL_MM = 80.0
_GRID_MM = 2.0
_SOFT_HU = (-20.0, 140.0)  # cerebrospinal fluid with noise; above the densest clot, below bone mixed with brain
_MIN_BONE_ML = 5.0  # smaller dense components lie inside the brain: calcifications, clips, coils
_NOSTRIL_MM = 6.0  # half the width of nostrils and ear canals, behind which air is not outside air
_SCALP_MM = 5.0
_NECK_MM = 8.0  # half the width of the connections to cut: orbital fissures and spinal canal
_CANAL_CM2 = 12.0  # a smaller slice below all others lies below the foramen magnum, which has 7 to 10
_RIM_MM = 3.0  # the extra width of bone on the low-resolution grid
_MAX_MASK_OFFSET_MM = 0.5


@dataclass(frozen=True)
class BrainExtractor:
    """A brain extractor by name.

    Attributes:
        name: Name for results and messages.
        extract: Function `extract(hu, spacing_mm)` that returns a bool mask, all `(i, j, k)` in LPS order. If it has a
            keyword parameter `lowres`, it also receives the HU on a grid of about 2 mm.
        owner: Distribution and version that provide the extractor.
    """

    name: str
    extract: Callable[..., np.ndarray]
    owner: str

    def __str__(self) -> str:
        return f"{self.name} ({self.owner})"


if TYPE_CHECKING:
    Mask = Path | nib.spatialimages.SpatialImage | np.ndarray
    Brain = str | BrainExtractor | Mask


def validate_brain_mode(brain: Any) -> None:
    """Refuse a text that is no brain mode, before a scan is read.

    Args:
        brain: A brain mode; a BrainExtractor or a mask passes.

    Raises:
        UnknownNameError: The text is no brain mode.
    """
    if isinstance(brain, str) and brain not in get_args(BrainMode):
        raise UnknownNameError("brain mode", brain, get_args(BrainMode))


def has_skull(scan: Scan) -> bool:
    """Return whether a scan shows a skull, so that the brain must be extracted.

    A skull is one component of at least 60 mL denser than soft tissue, and 80 mm wide and long. Calcifications, clips,
    coils and remnants left by another extraction are smaller.

    Args:
        scan: The scan, in HU.
    """
    if scan.hu_range[1] <= _SOFT_HU[1]:
        return False
    return find_skull(scan.lowres > _SOFT_HU[1], scan.lowres_geometry[1]) is not None


def find_skull(dense: np.ndarray, spacing: tuple[float, ...]) -> Box | None:
    """Return the bounding box of the largest component, or None if that is too small for a skull.

    Args:
        dense: `(i, j, k)` bool mask of dense voxels.
        spacing: Voxel spacing along i, j and k, in mm.
    """

    def is_large(mask: np.ndarray) -> bool:
        return bool(np.count_nonzero(mask) * np.prod(spacing) / 1000 >= MIN_SKULL_ML)

    if not is_large(dense) or not is_large(component := largest_component(dense)):
        return None
    box = bounding_box(component)
    is_wide = all((at.stop - 1 - at.start) * mm >= _MIN_SKULL_MM for at, mm in zip(box[:2], spacing[:2], strict=True))
    return box if is_wide else None


def extract_brain(hu: np.ndarray, spacing_mm: Spacing, *, lowres: np.ndarray | None = None) -> np.ndarray:
    """Extract the brain of a whole head, with the fluid in and around it and any blood inside the skull.

    Bone is every large component denser than 140 HU. Soft tissue lies between -20 and 140 HU, deeper than the scalp.
    The core of the soft tissue is 8 mm away from everything else, which cuts orbits, nerves and neck off. The largest
    component of the core that is ringed by bone is grown back, cut below the foramen magnum and filled. At full
    resolution it is then extended by up to 3 mm of soft voxels towards the bone.

    Limits: meninges and venous sinuses remain, and so do slivers behind bone thinner than 3 mm, such as the roof of an
    orbit. Below a wide skull defect, 5 mm of scalp are removed and other tissue outside the dura, such as muscle,
    remains. Brain that swells to within 5 mm of the skin is cut there. Skulls of infants and heads full of metal
    streaks were not tested.

    Args:
        hu: `(i, j, k)` HU of a whole head in LPS order.
        spacing_mm: Voxel spacing along i, j and k, in mm.
        lowres: The HU on a grid of about 2 mm, as `lowres_hu` computes them; computed if None.

    Returns:
        `(i, j, k)` bool brain mask.

    Raises:
        ScanError: `no-brain`: there is no skull, or nothing of at least 100 mL inside the skull.
    """
    if lowres is None:
        lowres = lowres_hu(hu, spacing_mm)
    _, spacing = lowres_geometry(hu.shape, spacing_mm)
    dense = lowres > _SOFT_HU[1]
    skull_box = find_skull(dense, spacing)
    if skull_box is None:
        raise _no_brain_error("no skull is visible. Use brain='given' if the scan holds the brain alone")
    # only a part of a scan is head, and the brain lies inside the skull
    margin = [int(_SCALP_MM * 2 / mm) for mm in spacing]
    box = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(skull_box, margin, strict=True))
    brain = np.zeros(lowres.shape, bool)
    brain[box] = _lowres_brain(lowres[box], dense[box], spacing)
    return _refine_to_bone(brain, hu, spacing_mm)


def _lowres_brain(lowres: np.ndarray, dense: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Return the brain mask on the low-resolution grid."""
    skull = filter_components(dense, lambda sizes: sizes >= _MIN_BONE_ML * 1000 / np.prod(spacing))
    soft = (lowres > _SOFT_HU[0]) & ~skull & _deeper_than_scalp(lowres, spacing)
    core = largest_component(~dilate_mm(~soft, _NECK_MM, spacing), count_in=_ringed_by_bone(skull))
    brain: np.ndarray = soft & dilate_mm(core, np.nextafter(_NECK_MM + _GRID_MM, 0), spacing)
    area_cm2 = brain.sum((0, 1)) * spacing[0] * spacing[1] / 100
    brain[..., : np.argmax(area_cm2 >= _CANAL_CM2)] = False
    brain = fill_holes(brain)
    if brain.sum() * np.prod(spacing) / 1000 < MIN_BRAIN_ML:
        raise _no_brain_error("nothing large and soft lies inside the bone. Check that the scan shows the whole head")
    return brain


def _refine_to_bone(brain: np.ndarray, hu: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
    """Resample a low-resolution brain mask to full resolution and extend it to where soft tissue ends."""
    _, spacing = lowres_geometry(hu.shape, spacing_mm)
    matrices = [triangle_weights(m, n) for m, n in zip(brain.shape, hu.shape, strict=True)]
    fine, box = [], []  # the voxels that can lie in the rim, and the low-resolution cells that contribute to them
    for matrix, at, mm in zip(matrices, bounding_box(brain), spacing, strict=True):
        rim = int(_RIM_MM / mm) + 1
        voxels = np.flatnonzero(matrix[:, max(0, at.start - rim) : at.stop + rim].any(1))
        fine.append(slice(voxels[0], voxels[-1] + 1))
        cells = np.flatnonzero(matrix[fine[-1]].any(0))
        box.append(slice(cells[0], cells[-1] + 1))
    # the cells that contribute to one voxel lie at most this far apart: if one is further out, none is in the rim
    mixed = 2 * float(np.linalg.norm(np.maximum(spacing, spacing_mm)))
    inside, limit = brain[tuple(box)], _RIM_MM + mixed + _GRID_MM
    signed = np.minimum(distance_mm(inside, spacing, limit), limit) - np.minimum(
        distance_mm(~inside, spacing, limit), limit
    )
    bands = [cut_bands(m[f, b]) for m, f, b in zip(matrices, fine, box, strict=True)]
    outward = resample_separable(signed.T, bands[::-1]).T
    near = hu[tuple(fine)]
    mask = np.zeros_like(hu, bool)
    mask[tuple(fine)] = largest_component(
        (outward <= -_RIM_MM) | ((outward < _RIM_MM) & (near > _SOFT_HU[0]) & (near < _SOFT_HU[1]))
    )
    return mask


MORPHOLOGY = BrainExtractor("morphology", extract_brain, "ichprog")


def run_extractor(scan: Scan, extractor: BrainExtractor = MORPHOLOGY) -> np.ndarray:
    """Run a brain extractor on a scan and check its mask.

    Args:
        scan: A whole head, in HU.
        extractor: The extractor; the built-in one by default.

    Returns:
        `(i, j, k)` bool brain mask.

    Raises:
        ScanError: The extractor found no brain, or failed on this scan.
        PluginError: The extractor returned something else than a bool mask of the scan's shape.
    """
    options = {"lowres": scan.lowres} if "lowres" in inspect.signature(extractor.extract).parameters else {}
    try:
        mask = extractor.extract(scan.hu, scan.spacing, **options)
    except ScanError as error:
        details = {"measured": error.measured, "expected": error.expected, "unit": error.unit}
        raise ScanError(f"{scan.name}: {error}", code=error.code, **details) from error
    except Exception as error:  # a plugin can fail in any way, and other scans must still be processed
        raise ScanError(
            f"{scan.name}: the brain extractor {extractor.name!r} failed: {type(error).__name__}: {error}. "
            "Use another extractor or a mask.",
            code="extractor-failed",
        ) from error
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != scan.hu.shape:
        is_array = isinstance(mask, np.ndarray)
        got = f"{mask.dtype} {mask.shape}" if is_array else type(mask).__name__
        raise PluginError(
            f"Brain extractor {extractor.name!r} breaks its contract: Expected a bool array {scan.hu.shape}, got {got}."
        )
    return mask


def load_mask(mask: "Mask", scan: Scan) -> np.ndarray:
    """Load a brain mask for a scan.

    Args:
        mask: Path of an image file, a nibabel image, or an array in the shape and voxel order of the source. Voxels
            are 0 outside the brain and one other value in the brain.
        scan: The scan.

    Returns:
        `(i, j, k)` bool brain mask in the voxel order of `scan.hu`.

    Raises:
        ScanError: `unreadable` or `not-found`: the file cannot be read. `mask-geometry`: shape or affine differ from
            the scan's. `mask-values`: the mask has more than two values.
    """
    if isinstance(mask, np.ndarray):
        name, values, affine = "brain mask", mask, scan.source_affine
    else:
        name, values, affine = _read_mask(mask)
        name = f"brain mask {name}"
    if values.ndim < 3 or max(values.shape[3:], default=1) > 1:
        raise _mask_geometry_error(scan, name, "shape", list(values.shape), list(scan.source_shape), "voxels")
    values, affine = to_lps(values.reshape(values.shape[:3]), affine)
    if values.shape != scan.hu.shape:
        raise _mask_geometry_error(scan, name, "shape in LPS order", list(values.shape), list(scan.hu.shape), "voxels")
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(values.shape) - 1)
    shift = affine - scan.affine
    offset = float(np.linalg.norm(corners @ shift[:3, :3].T + shift[:3, 3], axis=1).max())
    if not offset <= _MAX_MASK_OFFSET_MM:
        limit = f"<= {_MAX_MASK_OFFSET_MM:g}"
        raise _mask_geometry_error(scan, name, "distance between corners", round(offset, 2), limit, "mm")
    inside: np.ndarray = values != 0
    positive = values[inside]
    if positive.size and not (positive == positive[0]).all():
        count = int(np.unique(values).size)
        raise ScanError(
            f"{scan.name}: {name} has {count} different values. Expected 0 outside the brain and 1 in it.",
            code="mask-values",
            measured=count,
            expected="<= 2",
            unit="values",
        )
    return np.asfortranarray(inside)


def _read_mask(mask: Any) -> tuple[str, np.ndarray, np.ndarray]:
    """Return name, voxels and affine of a mask image."""
    import nibabel as nib

    if not isinstance(mask, str | Path):
        if not hasattr(mask, "dataobj"):
            raise ScanError(
                f"Cannot read a brain mask from a {type(mask).__name__}. Expected a path, a nibabel image or an array.",
                code="unreadable",
            )
        return image_name(mask), read_voxels(mask), mask.affine
    if not Path(mask).exists():
        raise ScanError(f"{mask}: no such brain mask. Check the path.", code="not-found")
    try:
        image: Any = nib.load(mask)
        return str(mask), read_voxels(image), image.affine
    except Exception as error:  # nibabel and zlib raise almost anything for a damaged file
        raise ScanError(
            f"{mask}: cannot be read as a brain mask: {error}. Give a NIfTI file.", code="unreadable"
        ) from error


def _mask_geometry_error(scan: Scan, name: str, what: str, measured: Any, expected: Any, unit: str) -> ScanError:
    return ScanError(
        f"{scan.name}: {name} does not fit the scan: {what} is {measured} {unit}, expected {expected}. "
        "Resample the mask to the scan.",
        code="mask-geometry",
        measured=measured,
        expected=expected,
        unit=unit,
    )


def isolate_brain(scan: Scan, brain: "Brain") -> tuple[Scan, np.ndarray, dict[str, Any]]:
    """Set everything but the brain to 0 HU.

    Args:
        scan: The scan, in HU.
        brain: "extract" extracts the brain; "given" states that the scan holds the brain alone and changes nothing;
            "auto" extracts if a skull is visible. A BrainExtractor extracts with that extractor. A mask, as in
            `load_mask`, is applied.

    Returns:
        The scan with 0 HU outside the brain; the brain mask, `(i, j, k)` bool; and a record of the step, as plain data.

    Raises:
        UnknownNameError: There is no such mode.
        ScanError: No brain is found, or the mask does not fit the scan.
    """
    if is_brain_only(scan, brain):
        isolated, mask, record = scan, fill_holes(scan.foreground), {"brain": "given"}
    else:
        if isinstance(brain, str | BrainExtractor):
            extractor = brain if isinstance(brain, BrainExtractor) else MORPHOLOGY
            mask, record = run_extractor(scan, extractor), {"brain": "extracted", "brain_extractor": str(extractor)}
        else:
            mask, record = load_mask(brain, scan), {"brain": "mask"}
            if not isinstance(brain, np.ndarray):
                record["brain_mask"] = str(brain) if isinstance(brain, Path) else image_name(brain)
        hu, box = np.zeros_like(scan.hu), bounding_box(mask)
        hu[box] = np.where(mask[box], scan.hu[box], np.float32(0))
        isolated = dataclasses.replace(scan, hu=hu)
    ml = round(float(np.count_nonzero(mask) * np.prod(scan.spacing) / 1000), 1)
    return isolated, mask, {**record, "brain_ml": ml}


def is_brain_only(scan: Scan, brain: "Brain") -> bool:
    """Return whether a scan is used unchanged, without extraction or mask.

    Args:
        scan: The scan, in HU.
        brain: As in `isolate_brain`.

    Raises:
        UnknownNameError: There is no such mode.
    """
    validate_brain_mode(brain)
    return isinstance(brain, str) and (brain == "given" or (brain == "auto" and not has_skull(scan)))


def brain_key(brain: "Brain") -> str:
    """Return a text that identifies a brain mode, an extractor or a mask, for caches of prepared grids.

    The text changes with the version and source code of an extractor and with the content of a mask.

    Args:
        brain: As in `isolate_brain`.

    Examples:
        >>> brain_key("auto")
        'auto'
    """
    if isinstance(brain, str):
        return brain
    digest = hashlib.sha256()
    if isinstance(brain, BrainExtractor):
        with contextlib.suppress(OSError, TypeError):  # compiled code or a callable object has no source
            digest.update(inspect.getsource(brain.extract).encode())
        return f"{brain} {digest.hexdigest()}"
    if isinstance(brain, Path):
        return f"mask {hashlib.sha256(brain.read_bytes()).hexdigest()}"
    voxels = brain if isinstance(brain, np.ndarray) else read_voxels(brain)
    digest.update(f"{voxels.shape} {voxels.dtype} {getattr(brain, 'affine', None)}".encode())
    digest.update(np.ascontiguousarray(voxels).tobytes())
    return f"mask {digest.hexdigest()}"


def _deeper_than_scalp(lowres: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Return the voxels deeper than the scalp under the outside air; air in sinuses and wounds is not outside."""
    wide = ~dilate_mm(lowres >= AIR_HU, _NOSTRIL_MM, spacing)  # cuts nostrils and ear canals off
    sides = np.zeros_like(wide)
    sides[[0, -1]] = sides[:, [0, -1]] = True
    outside = filter_components(wide, lambda sizes: sizes > 0, count_in=sides)
    return ~dilate_mm(outside, _NOSTRIL_MM + _SCALP_MM, spacing)


def _ringed_by_bone(skull: np.ndarray) -> np.ndarray:
    """Return the voxels with bone to the right, left, front and back: many in the head, few in a larger neck."""
    ringed = np.ones_like(skull)
    for axis in (0, 1):
        ringed &= np.logical_or.accumulate(skull, axis) & np.flip(
            np.logical_or.accumulate(np.flip(skull, axis), axis), axis
        )
    return ringed


def _no_brain_error(why: str) -> ScanError:
    return ScanError(f"no brain is found: {why}.", code="no-brain", expected=f">= {MIN_BRAIN_ML:g}", unit="mL")
