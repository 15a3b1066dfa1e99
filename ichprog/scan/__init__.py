"""A CT on disk becomes a `Scan`: read, checked, and left with its brain alone.

`volume` holds the Scan and reads NIfTI, `series` chooses among DICOM series and `dicom` makes a volume of one, `brain`
finds the brain, `checks` says what is impossible and what is doubtful. Nothing in this room knows of networks.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.scan.brain import BrainMode, brain_only, extract, holds_brain_alone, refuse_unknown_mode
from ichprog.scan.checks import check, refuse_geometry, refuse_unless_ct
from ichprog.scan.volume import Scan, image, read
from ichprog.spec import ExpectedRanges

if TYPE_CHECKING:
    import nibabel as nib

__all__ = ["BrainMode", "Scan", "begin", "brain_mask", "examine", "find", "image", "read", "refuse_unknown_mode"]


def examine(source: Any, *, expected_ranges: ExpectedRanges, brain: BrainMode = "auto") -> Scan:
    """Reads a scan, checks it, and leaves nothing but the brain in it.

    Args:
        source: What `read` takes. A scan that was examined already is returned as it is.
        expected_ranges: What the scan is checked against.
        brain: "auto" extracts the brain where a skull is seen, "extract" always, "given" never.

    Raises:
        ScanError: The scan cannot be read, or nothing can be said about it.
        UnknownNameError: There is no such way to treat the brain.
    """
    return begin(source, expected_ranges=expected_ranges, brain=brain)[1]()


def begin(
    source: Any, *, expected_ranges: ExpectedRanges, brain: BrainMode = "auto"
) -> tuple[np.ndarray, Callable[[], Scan]]:
    """Reads a scan as far as a network needs it, and leaves the rest of the examination for later.

    Where the brain is given, nothing that is checked changes what the network sees, so that it can start at once.

    Args:
        source: As in `examine`.
        expected_ranges: As in `examine`.
        brain: As in `examine`.

    Returns:
        `(i, j, k)` HU with nothing but the brain in them, and what ends the examination: it returns and raises what
        `examine` does, and until it has, nothing may be said about the scan.

    Raises:
        ScanError: The scan cannot be read, or no brain can be extracted from it.
        UnknownNameError: There is no such way to treat the brain.
    """
    scan = read(source)
    if scan.brain is not None:
        return scan.hu, lambda: scan
    refuse_unknown_mode(brain)
    refuse_geometry(scan)

    def examined(kept: Scan, mask: np.ndarray, done: dict[str, Any]) -> Scan:
        doubts = check(scan, mask, expected_ranges, given=done["brain"] == "given")
        warnings = (*scan.warnings, *doubts)
        return dataclasses.replace(kept, brain=mask, record={**scan.record, **done}, warnings=warnings)

    if holds_brain_alone(scan, brain):

        def end() -> Scan:
            refuse_unless_ct(scan)
            return examined(*brain_only(scan, "given"))

        return scan.hu, end
    refuse_unless_ct(scan)
    found = brain_only(scan, "extract")
    return found[0].hu, lambda: examined(*found)


def brain_mask(scan: Any) -> "nib.Nifti1Image":
    """The brain in a whole head, as an image of 0 and 1 in the scan's own shape and affine.

    Args:
        scan: A NIfTI path, a DICOM folder or a .zip of one, or a nibabel image.

    Raises:
        ScanError: The scan cannot be read, or no brain is found.
    """
    whole = read(scan)
    if whole.brain is None:
        refuse_unless_ct(whole)
        whole = dataclasses.replace(whole, brain=extract(whole))
    return whole.image(np.asarray(whole.brain, np.uint8))


def find(path: str | Path) -> list[Path]:
    """The scans behind a path.

    A folder is one scan where it, or its folders together, hold the DICOM files of one study. Else every NIfTI file
    and every .zip in it is a scan, and so on in its folders.

    Args:
        path: A file, a DICOM folder, or a folder of scans.

    Returns:
        Paths that `read` takes, sorted; the path itself where it is no folder or holds none.
    """
    path = Path(path)
    return _scans_in(path) or [path] if path.is_dir() else [path]


def _scans_in(folder: Path) -> list[Path]:
    from ichprog.scan import dicom

    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    folders = [entry for entry in entries if entry.is_dir()]
    if any(dicom.is_dicom(file) for file in files):
        return [folder]
    studies = [found for inner in folders if (found := dicom.study(inner)) is not None]
    if len(studies) > 1 and len(set(studies)) == 1:
        return [folder]
    scans = [file for file in files if file.name.endswith((".nii", ".nii.gz", ".zip"))]
    return sorted(scans + [scan for inner in folders for scan in _scans_in(inner)])
