"""Limits of what is read, checked before memory is asked for. Each is far beyond any model, cohort or head CT."""

import math
from collections.abc import Iterable

from ichprog.errors import ScanError

MAX_GRID_CELLS = 2**26
"""Cells of a network's grid, 18 times those of the published networks."""

MAX_DESCRIPTION_BYTES = 16 * 2**20
"""Size of a model description (`config.json`)."""

MAX_WEIGHT_BYTES = 4 * 2**30
"""Size of one weight file, packed and unpacked, and of all its tensors."""

MAX_VOXELS = 2**29
"""Voxels of a scan; 2,048 slices of 512 x 512."""

MAX_DICOM_FILES = 50_000
"""Files of a DICOM folder or .zip."""

MAX_DICOM_BYTES = 2**30
"""Size of one DICOM file, packed and unpacked."""


def check_voxels(shape: Iterable[int], name: str) -> None:
    """Refuse a shape with more voxels than any head CT has, before memory is asked for.

    Args:
        shape: Shape of the array.
        name: Name of the source, for the message.

    Raises:
        ScanError: The shape has more voxels than `MAX_VOXELS`.
    """
    lengths = tuple(map(int, shape))
    if (count := math.prod(lengths)) > MAX_VOXELS:
        raise ScanError(
            f"{name}: has {count} voxels, shape {lengths}; at most {MAX_VOXELS} are read. Resample the "
            "scan, or give one volume.",
            code="too-large",
            measured=count,
            expected=f"<= {MAX_VOXELS}",
            unit="voxels",
        )
