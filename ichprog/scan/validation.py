"""Validation of a scan: refuse what cannot be a head CT in HU.

`validate_ct` runs before the brain is extracted, so that an image without HU or a clipped image is named as such.
"""

from typing import Any

import numpy as np

from ichprog.errors import ScanError
from ichprog.scan.brain import MIN_SKULL_ML, find_skull, has_skull
from ichprog.scan.measurements import extent_mm, masked_values, resample_box, volume_ml
from ichprog.scan.morphology import bounding_box
from ichprog.scan.volume import AIR_HU, Scan

CLIPPED_HU = 200.0  # a lower maximum does not separate bone from what lies next to it
_MIN_SLICES = 8
_VOXEL_MM = (0.1, 15.0)
_EXTENT_MM = (40.0, 1000.0)
_TISSUE_HU = (0.0, 90.0)  # the median of a head without its air; muscle and bone raise it
_BRAIN_HU = (10.0, 60.0)  # the median of a brain alone
_FAT_HU = -30.0  # a whole head with lower values is not clipped in soft tissue
_OFFSET_HU = (1000.0, 1130.0)  # soft tissue in a scan that is stored without its offset of 1000 or 1024
_OFFSET_ML = 300.0  # more than a skull has in one such band


def validate_ct(scan: Scan) -> None:
    """Refuse what cannot be a head CT in HU.

    A value that is merely unusual passes; `check_scan` warns about it.

    Args:
        scan: The scan as it was read.

    Raises:
        ScanError: `spacing`: voxels or extent in mm that no head has. `too-few-slices`: under 8. `empty`: one value
            everywhere. `windowed`: a whole head clipped so low that bone and soft tissue have the same value.
            `eight-bit`: an image of 0 to 255. `not-hu`: other values that are not HU, including HU with an offset
            of 1024.
    """
    validate_geometry(scan)
    low, high = scan.hu_range
    if low == high:
        raise ScanError(f"{scan.name}: every voxel is {low:g}; the scan is empty.", code="empty", measured=low)
    if high - low < 20:
        raise _not_hu_error(
            scan, "not-hu", f"all values lie between {low:g} and {high:g}, rescaled or normalised", _rounded(scan), "HU"
        )
    _refuse_offset(scan)
    if high < CLIPPED_HU and _is_clipped_skull(scan, high - 1e-3 * (high - low)):
        found = f"as many voxels as a skull has are {high:g}, the highest value: clipped to a window without bone"
        raise _not_hu_error(scan, "windowed", found, _rounded(scan), f"a highest value of at least {CLIPPED_HU:g}")
    _refuse_other_values(scan)


def _refuse_offset(scan: Scan) -> None:
    """Refuse HU that are stored with an offset of about 1024."""
    if scan.hu_range[1] <= _OFFSET_HU[0]:
        return
    in_band = (scan.hu > _OFFSET_HU[0]) & (scan.hu < _OFFSET_HU[1])
    shifted = masked_values(scan, in_band & scan.foreground)
    if volume_ml(in_band, scan) > _OFFSET_ML and shifted.size:
        median = round(_median(shifted))
        found = f"soft tissue has values near {median}: an offset of about 1024 was not subtracted (RescaleIntercept)"
        raise _not_hu_error(scan, "not-hu", found, median, "20 to 45 in brain")


def _refuse_other_values(scan: Scan) -> None:
    """Refuse values that are those of neither a whole head nor a brain alone."""
    low, high = scan.hu_range
    background, share = scan.background
    tissue = masked_values(scan, scan.foreground)
    median = _median(tissue) if tissue.size else background
    has_bone = has_skull(scan)
    in_hu = _TISSUE_HU[0] <= median <= _TISSUE_HU[1]
    if has_bone and in_hu and low < _FAT_HU:
        return
    # the background of a brain alone is one value: usually 0, sometimes -1024 or similar
    mixed = 0 if low > AIR_HU else np.count_nonzero((scan.hu <= AIR_HU) & (np.abs(scan.hu - background) > 0.5))
    if not has_bone and share > 0.5 and mixed < 0.1 * tissue.size and _BRAIN_HU[0] <= median <= _BRAIN_HU[1]:
        return
    if low >= 0 and 100 < high <= 255 and bool((scan.hu == np.round(scan.hu)).all()):
        found = f"integers from {low:g} to {high:g} with a median of {median:g}: an 8-bit image, its HU are lost"
        raise _not_hu_error(scan, "eight-bit", found, _rounded(scan), "-1000 to 3000")
    if has_bone and in_hu:
        found = f"a whole head without a value below {low:.4g}: clipped to a window, or no CT"
        raise _not_hu_error(scan, "windowed", found, _rounded(scan), f"a lowest value under {_FAT_HU:g}")
    found = f"values range from {low:.4g} to {high:.4g}, with a median of {median:.4g} above air: not HU (an MR image?)"
    raise _not_hu_error(scan, "not-hu", found, round(median, 1), f"a median of {_TISSUE_HU[0]:g} to {_TISSUE_HU[1]:g}")


def _not_hu_error(scan: Scan, code: str, found: str, measured: Any, expected: str) -> ScanError:
    message = f"{scan.name}: {found}. A head CT in HU is needed: air -1000, water 0, brain 20 to 45, bone above 300."
    return ScanError(message, code=code, measured=measured, expected=expected, unit="HU")


def _rounded(scan: Scan) -> list[float]:
    return [round(value, 3) for value in scan.hu_range]


def validate_geometry(scan: Scan) -> None:
    """Refuse a scan with voxels, slices or an extent that no head CT has.

    Args:
        scan: The scan as it was read.

    Raises:
        ScanError: `spacing` or `too-few-slices`, as in `validate_ct`.
    """
    extent = [round(mm, 2) for mm in extent_mm(scan)]
    measured: list[float]
    if min(scan.spacing) < _VOXEL_MM[0] or max(scan.spacing) > _VOXEL_MM[1]:
        quantity, limits = "voxels of", _VOXEL_MM
        measured = [float(f"{mm:.3g}") for mm in scan.spacing]
    elif scan.hu.shape[2] < _MIN_SLICES:
        raise ScanError(
            f"{scan.name}: has {scan.hu.shape[2]} slices; a head CT of at least {_MIN_SLICES} is needed.",
            code="too-few-slices",
            measured=scan.hu.shape[2],
            expected=f">= {_MIN_SLICES}",
            unit="slices",
        )
    elif min(extent) < _EXTENT_MM[0] or max(extent) > _EXTENT_MM[1]:
        quantity, measured, limits = "an extent of", extent, _EXTENT_MM
    else:
        return
    raise ScanError(
        f"{scan.name}: {quantity} {' x '.join(f'{mm:g}' for mm in measured)} mm; a head CT has {limits[0]:g} to "
        f"{limits[1]:g} mm. Check the units and the affine.",
        code="spacing",
        measured=measured,
        expected=list(limits),
        unit="mm",
    )


def _is_clipped_skull(scan: Scan, value: float) -> bool:
    """Return whether the voxels of at least a value form a skull."""
    top = scan.hu >= value
    if volume_ml(top, scan) < MIN_SKULL_ML / 8:  # too little for a skull, however averaging spreads it
        return False
    box = bounding_box(top)
    lowres = resample_box(np.moveaxis(top[box], 2, 0), box, scan)
    return find_skull(lowres > 0.5, scan.lowres_geometry[1]) is not None


def _median(values: np.ndarray) -> float:
    """Return the median, by counting if all values are integers."""
    integers = values.astype(np.int16)
    if not np.array_equal(integers, values):
        return float(np.median(values))
    lowest = int(integers.min())
    counts = np.zeros(int(integers.max()) - lowest + 1, int)
    for part in np.array_split(integers, integers.size // 2**16 + 1):  # numpy counts in integers of four times the size
        counts += np.bincount(part.astype(int) - lowest, minlength=counts.size)
    middle = np.searchsorted(np.cumsum(counts), [(integers.size - 1) // 2, integers.size // 2], "right") + lowest
    return float(middle.mean())


def worker_died_error(name: str, reason: object) -> ScanError:
    """Return the error of a scan whose worker process died each time.

    Args:
        name: Name of the scan.
        reason: How the worker died, as a sentence without full stop.
    """
    return ScanError(f"{name}: {reason}. Try the scan with one worker.", code="worker-died")
