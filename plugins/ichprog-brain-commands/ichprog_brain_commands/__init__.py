"""Installed commands as brain extractors of ichprog.

An extractor writes the scan as NIfTI into a temporary folder, runs a command that it finds on the PATH, and reads the
mask that the command writes. The commands and their weights are not part of this distribution.

A further command is one function with its row in `pyproject.toml`.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ichprog import ScanError

_LAST_LINES = 5  # of a command's output in an error message


def synthstrip(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Extract the brain with the command `mri_synthstrip` or, without it, `synthstrip-docker`.

    SynthStrip marks everything inside the skull, including the fluid. Source: Hoopes et al., NeuroImage
    2022;260:119474.

    Args:
        hu: `(i, j, k)` HU of a whole head in LPS order.
        spacing_mm: Voxel spacing along i, j and k, in mm.

    Returns:
        `(i, j, k)` bool brain mask.

    Raises:
        ScanError: `extractor-failed`: neither command is on the PATH, or the command failed as in `run_command`.
    """
    command = _find(["mri_synthstrip", "synthstrip-docker"], "Install FreeSurfer 7.3 or later, or synthstrip-docker")
    return run_command([command, "-i", "scan.nii.gz", "-m", "mask.nii.gz"], "mask.nii.gz", hu, spacing_mm)


def totalsegmentator(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Extract the brain with the command `TotalSegmentator`, which writes only the class `brain`.

    Source: Wasserthal et al., Radiology: Artificial Intelligence 2023;5(5):e230024.

    Args:
        hu: `(i, j, k)` HU of a whole head in LPS order.
        spacing_mm: Voxel spacing along i, j and k, in mm.

    Returns:
        `(i, j, k)` bool brain mask.

    Raises:
        ScanError: `extractor-failed`: the command is not on the PATH, or failed as in `run_command`.
    """
    command = _find(["TotalSegmentator"], "Install it with: pip install TotalSegmentator")
    arguments = [command, "-i", "scan.nii.gz", "-o", "parts", "--roi_subset", "brain"]
    return run_command(arguments, "parts/brain.nii.gz", hu, spacing_mm)


def run_command(
    command: Sequence[str], mask_file: str, hu: np.ndarray, spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """Run a command on a scan, and return the mask that it writes.

    Args:
        command: Program and arguments. The program runs in a temporary folder that holds the scan as `scan.nii.gz`.
        mask_file: File of the mask, relative to that folder. Voxels are 0 outside the brain.
        hu: `(i, j, k)` HU of a whole head in LPS order.
        spacing_mm: Voxel spacing along i, j and k, in mm.

    Returns:
        `(i, j, k)` bool brain mask.

    Raises:
        ScanError: `extractor-failed`: the command failed, or its mask is missing or does not fit the scan.

    Examples:
        ```python
        run_command(["mine", "scan.nii.gz", "mask.nii.gz"], "mask.nii.gz", hu, spacing_mm)
        ```
    """
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])  # LPS voxels in nibabel's RAS mm
    with tempfile.TemporaryDirectory(prefix="ichprog-brain-") as folder:
        image = nib.Nifti1Image(np.round(hu).astype(np.int16), affine)
        image.header.set_xyzt_units("mm")
        image.to_filename(Path(folder) / "scan.nii.gz")
        process = subprocess.run(  # noqa: S603  # the user chose the command by its name
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        name = Path(command[0]).name
        if process.returncode != 0:
            output = "\n".join((process.stderr or process.stdout).strip().splitlines()[-_LAST_LINES:])
            raise _error(f"{name} failed with exit code {process.returncode}: {output or 'no output'}")
        path = Path(folder) / mask_file
        if not path.exists():
            raise _error(f"{name} wrote no {mask_file}")
        return _read_mask(path, name, hu.shape, affine)


def _find(names: Sequence[str], hint: str) -> str:
    """Return the path of the first command that is on the PATH."""
    for name in names:
        if path := shutil.which(name):
            return path
    raise _error(f"no command {' or '.join(names)} is on the PATH. {hint}, or use --brain auto")


def _read_mask(path: Path, name: str, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Read a mask, in any voxel order, and return it in LPS order."""
    try:
        image: nib.Nifti1Image = nib.load(path)
        reordered = image.as_reoriented(
            nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(("L", "P", "S"))
            )
        )
        mask = np.asarray(reordered.dataobj) > 0.5
    except Exception as error:  # nibabel and zlib raise almost anything for a damaged file
        raise _error(f"the mask of {name} cannot be read: {error}") from error
    if mask.shape != shape or not np.allclose(reordered.affine, affine, atol=0.1):
        raise _error(f"the mask of {name} has shape {mask.shape}, expected {shape} at the same place as the scan")
    return mask


def _error(message: str) -> ScanError:
    return ScanError(f"{message}.", code="extractor-failed")
