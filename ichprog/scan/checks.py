"""Checks of a scan whose brain mask is known: warn about what is unusual, in units.

`CHECKS` is the table of checks. A new check is one function with its row, which `register_check` adds to the table.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ichprog.errors import ScanError, ScanWarning, SpecError, UnknownNameError
from ichprog.scan.brain import MIN_BRAIN_ML, has_skull
from ichprog.scan.measurements import extent_mm, masked_values, resample_box, volume_ml
from ichprog.scan.morphology import bounding_box, dilate_mm, fill_holes, largest_component
from ichprog.scan.validation import CLIPPED_HU
from ichprog.scan.volume import Scan, Spacing
from ichprog.spec import ExpectedRanges

Range = tuple[float | None, float | None]

_CAP_FIT_MM = 10.0
_SIDES = {  # axis, whether the side is the end of the axis, and curvature of the cross-section as a number
    "top": (2, True, 3.9),
    "bottom": (2, False, 3.9),
    "right side": (0, False, 3.9),
    "left side": (0, True, 3.9),
    "front": (1, False, 2.8),
    "back": (1, True, 2.8),
}
_BLOOD_HU = (50.0, 100.0)
_BLOOD_DEEP_MM, _BLOOD_SHALLOW_MM, _BLOOD_THICK_MM = 5.0, 3.0, 2.5
_SINUS_ML = 5.0
_DENSE_HU, _METAL_HU = 140.0, 2500.0  # the first includes bone mixed with soft tissue
_GAP_MM = 10.0  # the skull is at most this far from the brain
_SKULL_MM, _CAP_MM = 15.0, 25.0


class Finding(NamedTuple):
    """An unusual measurement.

    Attributes:
        message: The finding in one sentence, with its values and units.
        measured: Measured value or values.
        expected: Expected value or range.
    """

    message: str
    measured: Any
    expected: Any


class CheckInput(NamedTuple):
    """Input of a check.

    Attributes:
        scan: The scan as it was read.
        mask: `(i, j, k)` bool brain mask.
        expected: Lowest and highest expected value, None for no bound.
    """

    scan: Scan
    mask: np.ndarray
    expected: Range


FindFunction = Callable[[CheckInput], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    """One check of a scan.

    Attributes:
        code: Code of its warnings, and the key of its range in `input.expected_ranges` of a model.
        description: What its warning means, for the documentation.
        quantity: The measured quantity, for tables of expected ranges.
        unit: Unit of measured and expected values, or None.
        expected: Default range as (lowest, highest), None for no bound; None for a check without a range.
        only_if_given: Whether the check runs only if the scan was given as the brain alone.
        find: Function from a CheckInput to the findings.
    """

    code: str
    description: str
    quantity: str
    unit: str | None
    expected: Range | None
    only_if_given: bool
    find: FindFunction


CHECKS: dict[str, Check] = {}


def register_check(
    code: str,
    description: str,
    *,
    quantity: str = "",
    unit: str | None = None,
    expected: Range | None = None,
    only_if_given: bool = False,
) -> Callable[[FindFunction], FindFunction]:
    """Register a function as a scan check.

    Args:
        code: Code of its warnings, and the key of its range in `input.expected_ranges` of a model.
        description: What its warning means, for the documentation.
        quantity: The measured quantity, for tables of expected ranges.
        unit: Unit of measured and expected values.
        expected: Default range as (lowest, highest), None for no bound; None for a check without a range.
        only_if_given: Whether the check runs only if the scan was given as the brain alone.

    Returns:
        A decorator for a function that takes a `CheckInput` and returns `Finding` objects.

    Examples:
        ```python
        @register_check("density", "an unusual median", quantity="median of the brain", unit="HU", expected=(20, 45))
        def check_density(case: CheckInput) -> list[Finding]:
            median = float(np.median(case.scan.hu[case.mask]))
            return out_of_range([median], case.expected, "the median of the brain", "HU")
        ```
    """

    def register(find: FindFunction) -> FindFunction:
        CHECKS[code] = Check(code, description, quantity, unit, expected, only_if_given, find)
        return find

    return register


def resolve_ranges(overrides: ExpectedRanges) -> dict[str, Range]:
    """Return the expected range of every check: the default, or the override of a model.

    Args:
        overrides: Ranges by check code, as in `input.expected_ranges` of a model.

    Raises:
        SpecError: A code names no check with a range.

    Examples:
        >>> resolve_ranges({"slices": (10, 40)})["slices"]
        (10, 40)
        >>> resolve_ranges({})["slices"]
        (20, 64)
    """
    ranges = {check.code: check.expected for check in CHECKS.values() if check.expected is not None}
    for code in overrides:
        if code not in ranges:
            raise SpecError(f"input.expected_ranges: {UnknownNameError('scan check', code, sorted(ranges))}")
    return {**ranges, **overrides}


def check_scan(scan: Scan, mask: np.ndarray, expected_ranges: ExpectedRanges, *, given: bool) -> list[ScanWarning]:
    """Run all checks on a scan whose brain mask is known.

    Args:
        scan: The scan as it was read.
        mask: `(i, j, k)` bool brain mask.
        expected_ranges: Ranges that differ from the defaults, by check code.
        given: Whether the scan was given as the brain alone.

    Returns:
        The warnings, in the order of `CHECKS`.

    Raises:
        ScanError: `no-brain`: the mask has less than 100 mL.
        SpecError: `expected_ranges` names an unknown check.
    """
    ranges = resolve_ranges(expected_ranges)
    brain_ml = volume_ml(mask, scan)
    if brain_ml < MIN_BRAIN_ML:
        raise ScanError(
            f"{scan.name}: holds {brain_ml:.0f} mL of brain; at least {MIN_BRAIN_ML:g} mL is needed.",
            code="no-brain",
            measured=round(brain_ml, 1),
            expected=f">= {MIN_BRAIN_ML:g}",
            unit="mL",
        )
    return [
        ScanWarning(check.code, finding.message, finding.measured, finding.expected, check.unit)
        for check in CHECKS.values()
        if given or not check.only_if_given
        for finding in check.find(CheckInput(scan, mask, ranges.get(check.code, (None, None))))
    ]


def out_of_range(values: Sequence[float], expected: Range, quantity: str, unit: str) -> list[Finding]:
    """Return a finding if any value is out of range by more than 0.1 percent.

    Args:
        values: Measured values.
        expected: Lowest and highest value, None for no bound.
        quantity: The measured quantity, as the subject of a sentence.
        unit: Unit of all values.

    Examples:
        >>> out_of_range([90.0], (100, 220), "the extent from foot to head", "mm")[0].message
        'the extent from foot to head is 90 mm; 100 to 220 is usual for this model.'
    """
    lowest, highest = expected
    if all((lowest is None or lowest * 0.999 <= v) and (highest is None or v <= highest * 1.001) for v in values):
        return []
    text = " x ".join(f"{v:.4g}" for v in values)
    measured = [float(f"{v:.4g}") for v in values]
    message = f"{quantity} is {text} {unit}; {format_range(expected)} is usual for this model."
    return [Finding(message, measured if len(measured) > 1 else measured[0], list(expected))]


def format_range(expected: Range) -> str:
    """Return a range as text.

    Args:
        expected: Lowest and highest value, None for no bound.

    Examples:
        >>> format_range((20, 64)), format_range((1, None)), format_range((None, 25))
        ('20 to 64', 'at least 1', 'at most 25')
    """
    lowest, highest = expected
    if lowest is None:
        return "any" if highest is None else f"at most {highest:g}"
    return f"at least {lowest:g}" if highest is None else f"{lowest:g} to {highest:g}"


@register_check("slices", "fewer or more slices than usual", quantity="slices", unit="slices", expected=(20, 64))
def _check_slices(case: CheckInput) -> list[Finding]:
    return out_of_range([case.scan.hu.shape[2]], case.expected, "the number of slices", "slices")


@register_check(
    "in-plane-spacing", "smaller or larger pixels than usual", quantity="pixel spacing", unit="mm", expected=(0.3, 1.1)
)
def _check_in_plane_spacing(case: CheckInput) -> list[Finding]:
    return out_of_range(case.scan.spacing[:2], case.expected, "the pixel spacing", "mm")


@register_check(
    "slice-spacing",
    "slices closer together or further apart than usual",
    quantity="slice spacing",
    unit="mm",
    expected=(2.0, 8.0),
)
def _check_slice_spacing(case: CheckInput) -> list[Finding]:
    return out_of_range([case.scan.spacing[2]], case.expected, "the slice spacing", "mm")


@register_check(
    "coverage",
    "an unusual extent from foot to head",
    quantity="extent from foot to head",
    unit="mm",
    expected=(100.0, 220.0),
)
def _check_coverage(case: CheckInput) -> list[Finding]:
    return out_of_range([extent_mm(case.scan)[2]], case.expected, "the extent from foot to head", "mm")


@register_check(
    "field-of-view",
    "an unusual extent of a slice",
    quantity="extent of a slice",
    unit="mm",
    expected=(150.0, 350.0),
)
def _check_field_of_view(case: CheckInput) -> list[Finding]:
    return out_of_range(extent_mm(case.scan)[:2], case.expected, "the extent of a slice", "mm")


@register_check(
    "obliquity",
    "voxel axes rotated from the patient's axes",
    quantity="rotation from the patient's axes",
    unit="degrees",
    expected=(0.0, 25.0),
)
def _check_obliquity(case: CheckInput) -> list[Finding]:
    degrees = float(case.scan.record.get("obliquity_deg", 0.0))
    return out_of_range([degrees], case.expected, "the rotation from the patient's axes", "degrees")


@register_check(
    "brain-volume",
    "an unusual volume of the brain",
    quantity="volume of the brain",
    unit="mL",
    expected=(700.0, 2000.0),
)
def _check_brain_volume(case: CheckInput) -> list[Finding]:
    return out_of_range([volume_ml(case.mask, case.scan)], case.expected, "the volume of the brain", "mL")


@register_check(
    "cropped-brain",
    "the scan ends inside the brain; one warning for each side",
    quantity="missing share of the brain at one side",
    unit="%",
    expected=(None, 2.0),
)
def _check_cropping(case: CheckInput) -> list[Finding]:
    findings = []
    brain_ml = volume_ml(case.mask, case.scan)
    for side in _SIDES:
        missing_ml = missing_brain_ml(case.mask, case.scan.spacing, side)
        share = 100 * missing_ml / (brain_ml + missing_ml)
        if out_of_range([share], case.expected, "", ""):
            message = (
                f"the scan ends inside the brain at the {side}: about {missing_ml:.0f} mL of brain are missing, "
                f"{share:.1f} %; {format_range(case.expected)} % is usual for this model."
            )
            findings.append(Finding(message, measured=round(share, 1), expected=list(case.expected)))
    return findings


def missing_brain_ml(mask: np.ndarray, spacing_mm: Spacing, side: str) -> float:
    """Estimate the volume of brain that lies beyond one side of a scan.

    The brain is continued as the cap of an ellipsoid. Its cross-section is a quadratic function of the distance to the
    side. The curvature is that of a head, and area and slope at the side are fitted to the last centimetre.

    Args:
        mask: `(i, j, k)` bool brain mask in LPS order.
        spacing_mm: Voxel spacing along i, j and k, in mm.
        side: "top", "bottom", "right side", "left side", "front" or "back".

    Returns:
        The volume in mL, 0 if the brain ends before the side.

    Examples:
        >>> z = np.arange(-70, 40, 5.0)  # an ellipsoid that is cut 40 mm above its middle
        >>> x, y = np.ogrid[-90:90, -90:90]
        >>> brain = (x[..., None] / 70) ** 2 + (y[..., None] / 80) ** 2 + (z / 70) ** 2 <= 1
        >>> round(missing_brain_ml(brain, (1, 1, 5), "top"), -1)
        220.0
    """
    axis, is_end, curvature = _SIDES[side]
    step, width, length = (float(mm) for mm in (spacing_mm[axis], *np.delete(spacing_mm, axis)))
    count = max(2, round(_CAP_FIT_MM / step))
    planes = np.moveaxis(mask, axis, 0)
    planes = planes[-count:] if is_end else planes[:count][::-1]
    if not planes[-1].any():
        return 0.0
    areas = np.count_nonzero(planes, axis=(1, 2)) * width * length / 100
    cm = -(np.arange(len(planes))[::-1] + 0.5) * step / 10  # from the side, which is at 0
    slope, area = np.polyfit(cm, areas + curvature * cm**2, 1)
    if area <= 0:
        return 0.0
    height = (slope + np.sqrt(slope**2 + 4 * curvature * area)) / (2 * curvature)
    return float(area * height + slope * height**2 / 2 - curvature * height**3 / 3)


@register_check(
    "no-blood",
    "no component of the brain is as dense and as thick as a haematoma; old, thin or very small ones go undetected",
    quantity="largest component as dense as blood",
    unit="mL",
    expected=(1.0, None),
)
def _check_blood(case: CheckInput) -> list[Finding]:
    minimum_ml, _ = case.expected
    if minimum_ml is None or minimum_ml <= 0:
        return []
    blood_ml, _ = measure_dense_blood(case.scan, case.mask)
    if blood_ml >= minimum_ml:
        return []
    message = (
        f"no haemorrhage is visible: the largest component of {_BLOOD_HU[0]:g} to {_BLOOD_HU[1]:g} HU in the brain has "
        f"{blood_ml:.1f} mL, and the model was made for scans with at least {minimum_ml:g} mL. Old, thin or very small "
        "haemorrhages can go undetected."
    )
    return [Finding(message, measured=round(blood_ml, 2), expected=f">= {minimum_ml:g}")]


def measure_dense_blood(scan: Scan, mask: np.ndarray) -> tuple[float, np.ndarray]:
    """Measure the largest component of the brain that is as dense and as thick as a haematoma.

    A grid of 2 mm averages noise away; what is thinner than 5 mm is dura, a vessel or the edge of bone. Venous sinuses
    remain at the surface of the brain. A component counts fully from a depth of 5 mm on, and nearer to the surface only
    by its volume beyond that of a sinus. A thin or small haematoma at the skull can therefore go undetected.

    Args:
        scan: The scan, in HU.
        mask: `(i, j, k)` bool brain mask.

    Returns:
        The volume in mL, and the area of all such components in each slice, `(k,)` in cm2.
    """
    box = bounding_box(mask)
    _, spacing = scan.lowres_geometry
    low, high = np.float32(_BLOOD_HU[0] - 20), np.float32(1.2 * _BLOOD_HU[1])
    slices = zip(np.moveaxis(scan.hu[box], 2, 0), np.moveaxis(mask[box], 2, 0), strict=True)
    above = ((np.minimum(hu, high) - low) * inside for hu, inside in slices)
    lowres = resample_box(above, box, scan) + low
    brain = resample_box(np.moveaxis(mask[box], 2, 0), box, scan) > 0.5
    near = tuple(slice(max(0, at.start - 1), at.stop + 1) for at in bounding_box(brain))  # the brain ends inside it
    lowres, outside = lowres[near], ~brain[near]
    dense = (lowres > _BLOOD_HU[0]) & (lowres < _BLOOD_HU[1])
    area_cm2 = np.zeros(brain.shape[2])

    def thickest_ml(depth_mm: float) -> float:
        deep = dense & ~dilate_mm(outside, np.nextafter(depth_mm, 0), spacing)
        core = ~dilate_mm(~deep, _BLOOD_THICK_MM, spacing)
        thick = deep & dilate_mm(core, _BLOOD_THICK_MM, spacing)
        area_cm2[near[2]] = thick.sum((0, 1)) * spacing[0] * spacing[1] / 100
        return float(np.count_nonzero(largest_component(thick)) * np.prod(spacing) / 1000)

    shallow_ml = thickest_ml(_BLOOD_SHALLOW_MM) - _SINUS_ML
    blood_ml = max(thickest_ml(_BLOOD_DEEP_MM), shallow_ml, 0.0)
    centres = (np.arange(scan.hu.shape[2]) + 0.5) * scan.spacing[2]
    return blood_ml, np.interp(centres, (np.arange(area_cm2.size) + 0.5) * spacing[2], area_cm2)


@register_check(
    "skull-gap",
    "a wide gap in the skull: a craniectomy, or an extraction that leaked; brain and scalp are hard to separate there",
    quantity="brain without bone outside, above its middle",
    unit="cm2",
    expected=(None, 8.0),
)
def _check_skull_gap(case: CheckInput) -> list[Finding]:
    vault = _vault(case)
    if vault is None:
        return []
    uncovered = vault.surface & ~dilate_mm(vault.bone, _GAP_MM, vault.spacing)
    joined = largest_component(dilate_mm(uncovered, 1.01 * max(vault.spacing), vault.spacing))
    area_cm2 = float(np.count_nonzero(uncovered & joined)) * vault.spacing[0] * vault.spacing[2] / 100
    return out_of_range([area_cm2], case.expected, f"the brain without bone within {_GAP_MM:g} mm", "cm2")


@register_check(
    "thin-skull",
    "a skull as thin as that of an infant or a young child",
    quantity="mean thickness of the skull, with its blurred edges",
    unit="mm",
    expected=(7.0, None),
)
def _check_skull_thickness(case: CheckInput) -> list[Finding]:
    vault = _vault(case)
    if vault is None:
        return []
    slices = slice(0, max(1, vault.bone.shape[2] - round(_CAP_MM / vault.spacing[2])))  # the cap is cut obliquely
    bone = vault.bone & dilate_mm(vault.brain, _SKULL_MM, vault.spacing)
    surface = int(np.count_nonzero(vault.surface[..., slices]))
    mean_mm = int(np.count_nonzero(bone[..., slices])) * vault.spacing[0] / max(1, surface)
    return out_of_range([mean_mm], case.expected, "the mean thickness of the skull", "mm")


class _Vault(NamedTuple):
    """The upper half of the brain with the bone around it, `(i, j, k)` on the grid of about 2 mm."""

    brain: np.ndarray
    surface: np.ndarray
    bone: np.ndarray
    spacing: Spacing


def _vault(case: CheckInput) -> _Vault | None:
    """Return the upper half of the brain with the bone around it, or None without a skull."""
    scan, mask, _ = case
    if not has_skull(scan):
        return None
    box = bounding_box(mask)
    _, spacing = scan.lowres_geometry
    brain = resample_box(np.moveaxis(mask[box], 2, 0), box, scan) > 0.5
    i, j, k = bounding_box(brain)
    margin = [int(_SKULL_MM / mm) + 1 for mm in spacing]
    upper = (
        slice(max(0, i.start - margin[0]), i.stop + margin[0]),
        slice(max(0, j.start - margin[1]), j.stop + margin[1]),
        slice((k.start + k.stop) // 2, k.stop),
    )
    brain = fill_holes(brain)[upper]  # holes are air inside the skull
    surface = brain & dilate_mm(~brain, 1.01 * max(spacing), spacing)
    return _Vault(brain, surface, scan.lowres[upper] > _DENSE_HU, spacing)


@register_check(
    "metal",
    "metal in the slices of the brain, whose streaks hide tissue; not seen if the scan is clipped below 2500 HU",
    quantity="volume of at least 2500 HU",
    unit="mL",
    expected=(None, 0.1),
)
def _check_metal(case: CheckInput) -> list[Finding]:
    if case.scan.hu_range[1] < _METAL_HU:
        return []
    planes = bounding_box(case.mask)[2]
    metal_ml = volume_ml(case.scan.hu[:, :, planes] >= _METAL_HU, case.scan)
    return out_of_range([metal_ml], case.expected, f"the volume of at least {_METAL_HU:g} HU", "mL")


@register_check("skull-present", "the scan was given as the brain alone, but a skull is visible", only_if_given=True)
def _check_skull(case: CheckInput) -> list[Finding]:
    if not has_skull(case.scan):
        return []
    message = "the scan was given as the brain alone, but a skull is visible. Use brain='extract' to remove the skull."
    return [Finding(message, measured="skull", expected="brain alone")]


@register_check("windowed", "a brain alone that seems clipped to a window", unit="HU", only_if_given=True)
def _check_clipping(case: CheckInput) -> list[Finding]:
    """Find a brain in which far more voxels have the highest value than have the values just below it."""
    values = masked_values(case.scan, case.mask)
    high = float(values.max())
    at, below = np.count_nonzero(values == high), np.count_nonzero((values < high) & (values >= high - 3))
    if high >= CLIPPED_HU or at < 20 or at < below:
        return []
    message = f"{at} voxels have exactly the highest value, {high:g} HU: the scan seems clipped to a window."
    return [Finding(message, measured=high, expected=f">= {CLIPPED_HU:g}")]
