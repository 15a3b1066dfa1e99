"""Measurements of a scan: extent, volumes, values in a mask, and copies at a low resolution."""

from collections.abc import Iterable

import numpy as np

from ichprog.scan.morphology import Box, cut_bands, resample_slices, triangle_weights
from ichprog.scan.volume import Scan


def extent_mm(scan: Scan) -> list[float]:
    """Return the extent of a scan along i, j and k, in mm."""
    return [n * mm for n, mm in zip(scan.hu.shape, scan.spacing, strict=True)]


def volume_ml(mask: np.ndarray, scan: Scan) -> float:
    """Return the volume of a mask in the space of a scan, in mL.

    Args:
        mask: `(i, j, k)` bool, or a part of it.
        scan: The scan.
    """
    return float(np.count_nonzero(mask) * np.prod(scan.spacing) / 1000)


def masked_values(scan: Scan, mask: np.ndarray) -> np.ndarray:
    """Return the HU in a mask, in memory order."""
    values: np.ndarray = scan.hu.T[mask.T]
    return values


def resample_box(slices: Iterable[np.ndarray], box: Box, scan: Scan) -> np.ndarray:
    """Resample a box of a scan, with zeros around it, to the low-resolution grid.

    Args:
        slices: Values in the box, `(i, j)` for each k.
        box: Where the box lies in the scan.
        scan: The scan.
    """
    shape, _ = scan.lowres_geometry
    return resample_slices(
        slices, [cut_bands(triangle_weights(n, m)[:, at]) for n, m, at in zip(scan.hu.shape, shape, box, strict=True)]
    )
