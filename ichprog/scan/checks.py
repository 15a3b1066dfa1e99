"""What is impossible about a scan, and what is doubtful, in units.

`refuse_unless_ct` comes before the brain is extracted, so that a picture without HU or a clipped one is called what it
is and not a head without a brain. `check` comes after it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ichprog.errors import ScanError, ScanWarning
from ichprog.scan.brain import LEAST_ML, SKULL_ML, sees_skull, skull_in
from ichprog.scan.morphology import Box, banded, bounds, largest, weigh_slices, weights, within
from ichprog.scan.volume import AIR_HU, Scan
from ichprog.spec import ExpectedRanges

_FEWEST_SLICES = 8
_VOXEL_MM = (0.1, 15.0)
_EXTENT_MM = (40.0, 1000.0)
_TISSUE_HU = (0.0, 90.0)  # where the median of a head without its air lies; muscle and bone lift it
_BRAIN_HU = (10.0, 60.0)  # where the median of a brain alone lies
_CEILING_HU = 200.0  # clipped lower, bone cannot be told from what it lies against
_SKULL_HU = 140.0
_FAT_HU = -30.0  # a whole head that is clipped lower is whole in soft tissue and bone
_OFFSET_HU = (1000.0, 1130.0)  # soft tissue in a scan that is stored without its offset of 1000 or 1024
_OFFSET_ML = 300.0  # more than a skull has of one such band
_TOP_CM2, _SIDE_CM2, _BOTTOM_CM2 = 25.0, 10.0, 60.0
_BLOOD_HU = (50.0, 100.0)
_BLOOD_DEEP_MM, _BLOOD_SHALLOW_MM, _BLOOD_THICK_MM = 5.0, 3.0, 2.5
_SINUS_ML = 5.0


def refuse_unless_ct(scan: Scan) -> None:
    """Refuses what cannot be a head CT in HU.

    A value that is merely unusual passes; `check` doubts it.

    Args:
        scan: The scan as it was read.

    Raises:
        ScanError: `spacing`: voxels or extent in mm that no head has. `too-few-slices`: under 8. `empty`: one value
            everywhere. `windowed`: a whole head clipped so low that bone and soft tissue are one. `eight-bit`: a
            picture of 0 to 255. `not-hu`: any other values that are not HU, among them HU with an offset of 1024.
    """
    refuse_geometry(scan)
    low, high = scan.extremes
    seen = [round(low, 3), round(high, 3)]
    if low == high:
        raise ScanError(f"{scan.name}: every voxel is {low:g}; the scan is empty.", code="empty", measured=low)

    def refusal(code: str, found: str, measured: Any, expected: str) -> ScanError:
        message = f"{scan.name}: {found}. A head CT in HU is needed: air -1000, water 0, brain 20 to 45, bone above 300"
        return ScanError(f"{message}.", code=code, measured=measured, expected=expected, unit="HU")

    if high - low < 20:
        raise refusal("not-hu", f"all values lie between {low:g} and {high:g}, rescaled or normalised", seen, "HU")
    empty, share = scan.background
    if high > _OFFSET_HU[0]:
        offset = (scan.hu > _OFFSET_HU[0]) & (scan.hu < _OFFSET_HU[1])
        shifted = _values(scan, offset & scan.matter)
        if _ml(offset, scan) > _OFFSET_ML and shifted.size:
            near = round(_median(shifted))
            found = (
                f"soft tissue has a value near {near}: an offset of about 1024 was not subtracted (RescaleIntercept)"
            )
            raise refusal("not-hu", found, near, "20 to 45 in brain")

    tissue = _values(scan, scan.matter)
    middle = _median(tissue) if tissue.size else empty
    if high < _CEILING_HU and _is_clipped_skull(scan, high - 1e-3 * (high - low)):
        found = f"a skull's worth of voxels has the highest value, {high:g}: clipped to a window, bone cannot be seen"
        raise refusal("windowed", found, seen, f"a highest value of at least {_CEILING_HU:g}")
    skull = sees_skull(scan)
    in_hu = _TISSUE_HU[0] <= middle <= _TISSUE_HU[1]
    if skull and in_hu and low < _FAT_HU:
        return
    # a brain alone lies in one constant value: 0 mostly, -1024 or the like sometimes
    strange = 0 if low > AIR_HU else np.count_nonzero((scan.hu <= AIR_HU) & (np.abs(scan.hu - empty) > 0.5))
    if not skull and share > 0.5 and strange < 0.1 * tissue.size and _BRAIN_HU[0] <= middle <= _BRAIN_HU[1]:
        return
    if low >= 0 and 100 < high <= 255 and bool((scan.hu == np.round(scan.hu)).all()):
        found = f"whole numbers from {low:g} to {high:g} with a median of {middle:g}: an 8-bit picture, its HU are lost"
        raise refusal("eight-bit", found, seen, "-1000 to 3000")
    if skull and in_hu:
        found = f"a whole head without a value under {low:.4g}: clipped to a window, or no CT"
        raise refusal("windowed", found, seen, f"a lowest value under {_FAT_HU:g}")
    found = f"values run from {low:.4g} to {high:.4g}, half of those above air over {middle:.4g}: not HU (an MR image?)"
    raise refusal("not-hu", found, round(middle, 1), f"a median of {_TISSUE_HU[0]:g} to {_TISSUE_HU[1]:g}")


def check(scan: Scan, mask: np.ndarray, expected_ranges: ExpectedRanges, *, given: bool) -> tuple[ScanWarning, ...]:
    """Doubts about a scan whose brain is known.

    Args:
        scan: The scan as it was read.
        mask: `(i, j, k)` bool, true in the brain.
        expected_ranges: What a scan for the model looks like.
        given: Whether the brain was given and not extracted.

    Returns:
        One warning for each of these that is out of bounds: `slices`, `in-plane-spacing`, `slice-spacing`,
        `coverage`, `field-of-view`, `obliquity`, `brain-volume`, `cropped-brain`, `skull-present`, `windowed`,
        `no-blood`.

    Raises:
        ScanError: `no-brain`: the brain has less than 100 mL.
    """
    brain_ml = _ml(mask, scan)
    if brain_ml < LEAST_ML:
        raise ScanError(
            f"{scan.name}: holds {brain_ml:.0f} mL of brain; at least {LEAST_ML:g} mL is needed.",
            code="no-brain",
            measured=round(brain_ml, 1),
            expected=f">= {LEAST_ML:g}",
            unit="mL",
        )
    extent = [n * mm for n, mm in zip(scan.hu.shape, scan.spacing, strict=True)]
    slices, obliquity = scan.hu.shape[2], float(scan.record.get("obliquity_deg", 0.0))
    measured = (
        ("slices", "the number of slices", [slices], expected_ranges.slices, "slices"),
        ("in-plane-spacing", "the pixel spacing", scan.spacing[:2], expected_ranges.in_plane_spacing_mm, "mm"),
        ("slice-spacing", "the distance of slices", [scan.spacing[2]], expected_ranges.slice_spacing_mm, "mm"),
        ("coverage", "the extent from foot to head", [extent[2]], expected_ranges.coverage_mm, "mm"),
        ("field-of-view", "the extent of a slice", extent[:2], expected_ranges.field_of_view_mm, "mm"),
        (
            "obliquity",
            "the turn against the patient's axes",
            [obliquity],
            (0.0, expected_ranges.obliquity_deg),
            "degrees",
        ),
        ("brain-volume", "the volume of the brain", [brain_ml], expected_ranges.brain_ml, "mL"),
    )
    found = (_out_of_bounds(*row) for row in measured)
    doubts = [*found, *_cropped(scan, mask), _bloodless(scan, mask, expected_ranges.blood_dense_ml)]
    if given:
        doubts += [_skull_present(scan), _clipped(scan, mask)]
    return tuple(doubt for doubt in doubts if doubt is not None)


def refuse_geometry(scan: Scan) -> None:
    """Refuses a scan with voxels, slices or an extent that no head CT has.

    Args:
        scan: The scan as it was read.

    Raises:
        ScanError: `spacing` or `too-few-slices`, as in `refuse_unless_ct`.
    """
    extent = [round(float(n * mm), 2) for n, mm in zip(scan.hu.shape, scan.spacing, strict=True)]
    measured: list[float]
    if min(scan.spacing) < _VOXEL_MM[0] or max(scan.spacing) > _VOXEL_MM[1]:
        what, bounds = "voxels of", _VOXEL_MM
        measured = [float(f"{mm:.3g}") for mm in scan.spacing]
    elif scan.hu.shape[2] < _FEWEST_SLICES:
        raise ScanError(
            f"{scan.name}: has {scan.hu.shape[2]} slices; a head CT of at least {_FEWEST_SLICES} is needed.",
            code="too-few-slices",
            measured=scan.hu.shape[2],
            expected=f">= {_FEWEST_SLICES}",
            unit="slices",
        )
    elif min(extent) < _EXTENT_MM[0] or max(extent) > _EXTENT_MM[1]:
        what, measured, bounds = "an extent of", extent, _EXTENT_MM
    else:
        return
    raise ScanError(
        f"{scan.name}: {what} {' x '.join(f'{mm:g}' for mm in measured)} mm; a head CT has {bounds[0]:g} to "
        f"{bounds[1]:g} mm. Are the units or the affine wrong?",
        code="spacing",
        measured=measured,
        expected=list(bounds),
        unit="mm",
    )


def _out_of_bounds(code: str, what: str, values: Any, bounds: tuple[float, float], unit: str) -> ScanWarning | None:
    low, high = bounds
    if all(low * 0.999 <= v <= high * 1.001 for v in values):
        return None
    text = " x ".join(f"{v:.4g}" for v in values)
    measured = [float(f"{v:.4g}") for v in values]
    return ScanWarning(
        code,
        f"{what} is {text} {unit}; {low:g} to {high:g} is usual for this model.",
        measured=measured if len(measured) > 1 else measured[0],
        expected=list(bounds),
        unit=unit,
    )


def _cropped(scan: Scan, mask: np.ndarray) -> list[ScanWarning]:
    """Faces of the scan that cut through the brain; at the bottom it may end at the foramen magnum."""
    i, j, k = scan.spacing
    faces = (
        ("top", mask[:, :, -1], i * j, _TOP_CM2),
        ("bottom", mask[:, :, 0], i * j, _BOTTOM_CM2),
        ("right side", mask[0], j * k, _SIDE_CM2),
        ("left side", mask[-1], j * k, _SIDE_CM2),
        ("front", mask[:, 0], i * k, _SIDE_CM2),
        ("back", mask[:, -1], i * k, _SIDE_CM2),
    )
    return [
        ScanWarning(
            "cropped-brain",
            f"the scan ends inside the brain: {area:.0f} cm2 of it are cut at the {side}; up to {most:g} is usual.",
            measured=round(area, 1),
            expected=f"<= {most:g}",
            unit="cm2",
        )
        for side, face, mm2, most in faces
        if (area := float(np.count_nonzero(face)) * mm2 / 100) > most
    ]


def _bloodless(scan: Scan, mask: np.ndarray, least_ml: float) -> ScanWarning | None:
    """Doubts a brain without a piece as dense and as thick as a haematoma.

    On a grid of 2 mm noise is averaged away; what is under 5 mm thick is dura, a vessel or the edge of bone. Venous
    sinuses remain. They lie at the brain's edge, so a piece counts in full from 5 mm under it, and nearer only as far
    as it is larger than sinuses are: a thin or small haematoma against the skull can go unseen, not a large one.
    """
    if least_ml <= 0:
        return None
    box = bounds(mask)
    _, spacing = scan.coarse_form
    floor, ceiling = np.float32(_BLOOD_HU[0] - 20), np.float32(1.2 * _BLOOD_HU[1])
    slices = zip(np.moveaxis(scan.hu[box], 2, 0), np.moveaxis(mask[box], 2, 0), strict=True)
    above = ((np.minimum(hu, ceiling) - floor) * inside for hu, inside in slices)
    coarse = _averaged(above, box, scan) + floor
    brain = _averaged(np.moveaxis(mask[box], 2, 0), box, scan) > 0.5
    near = tuple(slice(max(0, at.start - 1), at.stop + 1) for at in bounds(brain))  # so that the brain ends in it
    coarse, around = coarse[near], ~brain[near]
    dense = (coarse > _BLOOD_HU[0]) & (coarse < _BLOOD_HU[1])

    def thickest_ml(deeper_than: float) -> float:
        there = dense & ~within(around, np.nextafter(deeper_than, 0), spacing)
        core = ~within(~there, _BLOOD_THICK_MM, spacing)
        piece = largest(there & within(core, _BLOOD_THICK_MM, spacing))
        return float(np.count_nonzero(piece) * np.prod(spacing) / 1000)

    blood_ml = max(thickest_ml(_BLOOD_DEEP_MM), thickest_ml(_BLOOD_SHALLOW_MM) - _SINUS_ML, 0.0)
    if blood_ml >= least_ml:
        return None
    return ScanWarning(
        "no-blood",
        f"no haemorrhage is seen: the largest piece of {_BLOOD_HU[0]:g} to {_BLOOD_HU[1]:g} HU in the brain has "
        f"{blood_ml:.1f} mL, and the model was made for scans with at least {least_ml:g} mL. Old, thin or very small "
        "haemorrhages can go unseen.",
        measured=round(blood_ml, 2),
        expected=f">= {least_ml:g}",
        unit="mL",
    )


def _skull_present(scan: Scan) -> ScanWarning | None:
    if not sees_skull(scan):
        return None
    return ScanWarning(
        "skull-present",
        "the scan was said to hold the brain alone, but a skull is seen; brain='extract' takes it off.",
        measured="skull",
        expected="brain alone",
    )


def _clipped(scan: Scan, mask: np.ndarray) -> ScanWarning | None:
    """Doubts a brain whose highest value is shared by far more voxels than the values just under it."""
    values = _values(scan, mask)
    high = float(values.max())
    at, under = np.count_nonzero(values == high), np.count_nonzero((values < high) & (values >= high - 3))
    if high >= _CEILING_HU or at < 20 or at < under:
        return None
    return ScanWarning(
        "windowed",
        f"{at} voxels share exactly the highest value, {high:g} HU: the scan seems clipped to a window.",
        measured=high,
        expected=f">= {_CEILING_HU:g}",
        unit="HU",
    )


def _is_clipped_skull(scan: Scan, value: float) -> bool:
    """Whether the voxels of a value and above form a skull."""
    top = scan.hu >= value
    if _ml(top, scan) < SKULL_ML / 8:  # too little for a skull, however averaging spreads it
        return False
    box = bounds(top)
    averaged = _averaged(np.moveaxis(top[box], 2, 0), box, scan)
    return skull_in(averaged > 0.5, scan.coarse_form[1]) is not None


def _averaged(slices: Iterable[np.ndarray], box: Box, scan: Scan) -> np.ndarray:
    """Values in a box of a scan, `(i, j)` for each k, which are 0 around it, on the scan's coarse grid."""
    shape, _ = scan.coarse_form
    return weigh_slices(
        slices, [banded(weights(n, m)[:, at]) for n, m, at in zip(scan.hu.shape, shape, box, strict=True)]
    )


def _values(scan: Scan, mask: np.ndarray) -> np.ndarray:
    """HU where a mask is true, in the order of memory."""
    values: np.ndarray = scan.hu.T[mask.T]
    return values


def _median(values: np.ndarray) -> float:
    """The median, counted where all values are whole numbers."""
    whole = values.astype(np.int16)
    if not np.array_equal(whole, values):
        return float(np.median(values))
    lowest = int(whole.min())
    counts = np.zeros(int(whole.max()) - lowest + 1, int)
    for part in np.array_split(whole, whole.size // 2**16 + 1):  # numpy counts in integers of four times the size
        counts += np.bincount(part.astype(int) - lowest, minlength=counts.size)
    middle = np.searchsorted(np.cumsum(counts), [(whole.size - 1) // 2, whole.size // 2], "right") + lowest
    return float(middle.mean())


def _ml(mask: np.ndarray, scan: Scan) -> float:
    return float(np.count_nonzero(mask) * np.prod(scan.spacing) / 1000)
