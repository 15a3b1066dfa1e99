"""Locate a haemorrhage: side, location, regions, and whether it lies below the tentorium."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ichprog.errors import InvalidValueError, ScanError
from ichprog.location.atlas import Atlas, load_atlas
from ichprog.location.midline import measure_midline_shift
from ichprog.location.registration import register
from ichprog.scan.volume import Spacing

KINDS = ("parenchymal", "ventricular", "subarachnoid", "subdural_epidural")  # values 1 to 4 of a mask
INFRATENTORIAL = ("brain stem", "cerebellum")
DEEP = ("basal ganglia", "thalamus")
_VENTRICULAR = KINDS.index("ventricular") + 1
_LEAST_OUTSIDE = 0.1  # share of the blood that must lie outside the ventricles to be the source of the haemorrhage
_BOTH_SIDES = 0.2  # smaller share on the other side: the haemorrhage has one side
_MIDLINE_MM = 22.0  # blood on both sides that lies closer than this to the midsagittal plane is in the midline
_DEEP_SHARE = 0.4  # of a deep haemorrhage; chosen on simulated patients, see `benchmarks/location.py`
TENTORIUM_SHARE, TENTORIUM_SLOPE = 0.5, 8.0  # of the logistic function; the slope was fitted to the same patients


@dataclass(frozen=True)
class Location:
    """Where a haemorrhage lies.

    Attributes:
        side: "left", "right", "both", "midline", or None without blood. Like the location, it is that of the kind with
            the most blood outside the ventricles, or of the blood in the ventricles if there is hardly any other.
        location: "lobar", "deep" or "infratentorial" for parenchymal blood. Other blood has its kind: "ventricular",
            "subarachnoid" or "subdural_epidural". None without blood.
        infratentorial: Probability that the haemorrhage lies below the tentorium, 0 without blood.
        shares: Share of all blood in each region of the atlas.
        midline_shift_mm: Distance of the ventricles from the midsagittal plane in mm, or None if it was not measured.
        midline_shift_interval_mm: Interval that contains 90 % of the true values, or None.
        midline_shift_reason: Why the midline shift was not measured, or None.
    """

    side: str | None
    location: str | None
    infratentorial: float
    shares: Mapping[str, float]
    midline_shift_mm: float | None = None
    midline_shift_interval_mm: tuple[float, float] | None = None
    midline_shift_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain data.

        Examples:
            >>> Location("left", "deep", 0.01, {"thalamus": 1.0}).to_dict()["side"]
            'left'
        """
        interval = self.midline_shift_interval_mm
        return {
            "side": self.side,
            "location": self.location,
            "infratentorial": self.infratentorial,
            "shares": dict(self.shares),
            "midline_shift_mm": self.midline_shift_mm,
            "midline_shift_interval_mm": None if interval is None else list(interval),
            "midline_shift_reason": self.midline_shift_reason,
        }


def locate(mask: np.ndarray, brain: np.ndarray, hu: np.ndarray, spacing_mm: Spacing) -> Location:
    """Locate a haemorrhage by registration of the brain to an atlas.

    The plane of symmetry of the brain mask divides left from right, so the position of the head in the scanner does
    not matter. The kind with the most blood outside the ventricles determines side, location and tentorium.

    Args:
        mask: `(i, j, k)` whole numbers in LPS order: 0 no blood, 1 parenchymal, 2 ventricular, 3 subarachnoid, 4
            subdural or epidural.
        brain: `(i, j, k)` bool brain mask.
        hu: `(i, j, k)` HU.
        spacing_mm: Voxel spacing along i, j and k, in mm.

    Returns:
        The location.

    Raises:
        InvalidValueError: The arrays differ in shape, the mask has other values, or a spacing is not above 0.
        ScanError: `no-brain`: the brain mask is empty.

    Examples:
        ```python
        scan = ichprog.scan.read("head.nii.gz")
        brain = ichprog.scan.brain.extract_brain(scan.hu, scan.spacing)
        print(locate(mask, brain, scan.hu, scan.spacing).location)
        ```
    """
    _validate(mask, brain, hu, spacing_mm)
    atlas = load_atlas()
    registration = register(brain, spacing_mm, atlas)
    shift = measure_midline_shift(hu, mask, registration, spacing_mm)
    of_shift = (shift.mm, shift.interval_mm, shift.reason)
    blood = np.stack(np.nonzero(mask))
    if not blood.size:
        return Location(None, None, 0.0, MappingProxyType(dict.fromkeys(atlas.names, 0.0)), *of_shift)
    kinds = mask[tuple(blood)]
    points = registration.to_atlas(blood, spacing_mm)
    regions = atlas.regions_at(points)
    kind = _main_kind(kinds)
    is_main = kinds == kind
    of_kind = _shares(regions[is_main], atlas)
    infratentorial = _infratentorial(of_kind)
    return Location(
        _side(points[0, is_main] / registration.scale[0]),
        _location(kind, infratentorial, of_kind),
        infratentorial,
        MappingProxyType(_shares(regions, atlas)),
        *of_shift,
    )


def _validate(mask: np.ndarray, brain: np.ndarray, hu: np.ndarray, spacing_mm: Spacing) -> None:
    """Refuse arrays of different shapes, unknown values of a mask, wrong spacings, and a brain without voxels."""
    if mask.ndim != 3:
        raise InvalidValueError("mask", f"of shape {mask.shape}", "an array with three axes")
    for name, array in (("brain", brain), ("hu", hu)):
        if array.shape != mask.shape:
            raise InvalidValueError(name, f"of shape {array.shape}", f"the shape {mask.shape} of the mask")
    if len(spacing_mm) != 3 or not all(0 < mm < np.inf for mm in spacing_mm):
        raise InvalidValueError("spacing_mm", spacing_mm, "three numbers above 0")
    lowest, highest = float(mask.min()), float(mask.max())
    if lowest < 0 or highest > len(KINDS) or not np.issubdtype(mask.dtype, np.integer):
        value = f"of {mask.dtype} with values from {lowest:g} to {highest:g}"
        raise InvalidValueError("mask", value, f"whole numbers from 0 to {len(KINDS)}")
    if not brain.any():
        message = "the brain mask is empty. Pass the mask of the brain of this scan."
        raise ScanError(message, code="no-brain", measured=0, expected="> 0", unit="mL")


def _main_kind(kinds: np.ndarray) -> int:
    """Return the kind with the most voxels outside the ventricles, or ventricular if there is hardly any other."""
    counts = np.bincount(kinds, minlength=len(KINDS) + 1)
    outside = counts.copy()
    outside[_VENTRICULAR] = 0
    return int(outside.argmax()) if outside.sum() >= _LEAST_OUTSIDE * counts.sum() else _VENTRICULAR


def _shares(regions: np.ndarray, atlas: Atlas) -> dict[str, float]:
    """Return the share of voxels in each region."""
    counts = np.bincount(regions, minlength=len(atlas.names))
    return {name: float(count / regions.size) for name, count in zip(atlas.names, counts, strict=True)}


def _side(x_mm: np.ndarray) -> str:
    """Return the side of blood by its distances to the right of the midsagittal plane, in mm."""
    right = float(np.mean(x_mm > 0))
    if min(right, 1 - right) < _BOTH_SIDES:
        return "right" if right > 0.5 else "left"
    return "midline" if np.percentile(np.abs(x_mm), 90) < _MIDLINE_MM else "both"


def _infratentorial(shares: Mapping[str, float]) -> float:
    """Return the probability of an infratentorial haemorrhage by its share below the tentorium."""
    below = sum(shares[name] for name in INFRATENTORIAL)
    return float(1 / (1 + np.exp(-TENTORIUM_SLOPE * (below - TENTORIUM_SHARE))))


def _location(kind: int, infratentorial: float, shares: Mapping[str, float]) -> str:
    """Return the location of parenchymal blood, or the kind of other blood."""
    name = KINDS[kind - 1]
    if name != "parenchymal":
        return name
    if infratentorial > 0.5:
        return "infratentorial"
    return "deep" if sum(shares[region] for region in DEEP) > _DEEP_SHARE else "lobar"
