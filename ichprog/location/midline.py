"""Measure the midline shift by the fluid of the ventricles.

The shift is the distance of the centre of the fluid in the frontal horns, the bodies of the lateral ventricles and the
third ventricle from the midsagittal plane. Blood in the ventricles counts as fluid.
"""

from dataclasses import dataclass

import numpy as np

from ichprog.location.registration import Registration
from ichprog.scan.volume import Spacing

_BOX_MM = ((-26.0, 26.0), (-5.0, 36.0), (2.0, 23.0))  # x in mm of the head, y and z in mm of the atlas
_STEP_MM = (1.0, 1.0, 3.0)
_SMOOTH_MM = 0.5  # in the plane, to each side
_FLUID_HU, _TISSUE_HU = 10.0, 24.0
_LEAST_ML = 0.5
_LEAST_INSIDE = 0.9  # share of the box that must lie in the scan
_HALF_INTERVAL_MM = 2.7  # 90 % of the errors on simulated patients are smaller, see `benchmarks/location.py`
_VENTRICULAR = 2


@dataclass(frozen=True)
class MidlineShift:
    """A midline shift.

    Attributes:
        mm: Shift in mm, or None if it was not measured.
        interval_mm: Interval that contains 90 % of the true values, or None.
        reason: Why it was not measured, or None.
    """

    mm: float | None = None
    interval_mm: tuple[float, float] | None = None
    reason: str | None = None


def measure_midline_shift(
    hu: np.ndarray, mask: np.ndarray, registration: Registration, spacing_mm: Spacing
) -> MidlineShift:
    """Measure the midline shift of a registered head.

    Args:
        hu: `(i, j, k)` HU in LPS order.
        mask: `(i, j, k)` mask of the blood, as in `locate`.
        registration: The registration of the brain to the atlas.
        spacing_mm: Voxel spacing along i, j and k, in mm.
    """
    axes = [np.arange(low, high + 0.1, step) for (low, high), step in zip(_BOX_MM, _STEP_MM, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    scale = registration.scale
    index = registration.to_voxels(points * [[scale[0]], [1.0], [1.0]], spacing_mm)
    last = np.array(hu.shape)[:, None] - 1
    inside = ((index > -0.5) & (index < last + 0.5)).all(0)
    if inside.mean() < _LEAST_INSIDE:
        return MidlineShift(reason="the frontal horns lie outside the scan")

    def nearest(i_mm: float = 0.0, j_mm: float = 0.0) -> tuple[np.ndarray, ...]:
        offset = np.array([[i_mm / spacing_mm[0]], [j_mm / spacing_mm[1]], [0.0]])
        return tuple(np.clip(np.rint(index + offset).astype(np.intp), 0, last))

    steps = (-_SMOOTH_MM, 0.0, _SMOOTH_MM)
    smooth = np.mean([np.clip(hu[nearest(i, j)], -10, 90) for i in steps for j in steps], axis=0)
    fluid = np.clip((_TISSUE_HU - smooth) / (_TISSUE_HU - _FLUID_HU), 0, 1)
    blood = mask[nearest()]
    fluid = np.where(blood == 0, fluid, blood == _VENTRICULAR) * inside
    fluid_ml = float(fluid.sum() * np.prod(_STEP_MM) / np.prod(scale[1:]) / 1000)
    if fluid_ml < _LEAST_ML:
        return MidlineShift(reason=f"the ventricles hold {fluid_ml:.1f} mL of fluid, less than {_LEAST_ML:g} mL")
    shift = abs(float((fluid * points[0]).sum() / fluid.sum()))
    return MidlineShift(shift, (max(0.0, shift - _HALF_INTERVAL_MM), shift + _HALF_INTERVAL_MM))
