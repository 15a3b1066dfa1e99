"""Head CTs on disk: reading, brain isolation and checks, with a `Scan` as the result.

`volume` holds `Scan` and reads NIfTI. `series` selects a DICOM series and `dicom` reads it as a volume. `brain`
isolates the brain. `validation` refuses impossible scans, and `checks` warns about unusual ones. Both use
`measurements`. This package knows no networks and no registry.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.scan.brain import (
    BrainExtractor,
    BrainMode,
    brain_key,
    extract_brain,
    is_brain_only,
    isolate_brain,
    validate_brain_mode,
)
from ichprog.scan.checks import (
    CHECKS,
    check_scan,
    format_range,
    register_check,
    resolve_ranges,
)
from ichprog.scan.validation import validate_ct, validate_geometry
from ichprog.scan.volume import Scan, load_regions, read, source_image, source_slices
from ichprog.spec import ExpectedRanges

if TYPE_CHECKING:
    import nibabel as nib

    from ichprog.scan.brain import Brain

__all__ = [
    "CHECKS",
    "BrainExtractor",
    "BrainMode",
    "Scan",
    "brain_key",
    "brain_mask",
    "extract_brain",
    "find_scans",
    "format_range",
    "load",
    "load_deferred",
    "load_regions",
    "read",
    "register_check",
    "resolve_ranges",
    "source_image",
    "source_slices",
    "validate_brain_mode",
]


def load(source: Any, *, expected_ranges: ExpectedRanges, brain: "Brain" = "auto") -> Scan:
    """Read a scan, check it, and set everything but the brain to 0 HU.

    Args:
        source: A source that `read` takes. A scan that was loaded before is returned unchanged.
        expected_ranges: Ranges of scan checks that differ from their defaults, by check code.
        brain: "auto" extracts the brain if a skull is visible, "extract" always, "given" never. A BrainExtractor
            extracts with that extractor. A mask (path, nibabel image, or array in the shape of the source) is applied.

    Raises:
        ScanError: The scan or mask cannot be read, they do not match, or the scan is no head CT.
        UnknownNameError: There is no such brain mode.
        SpecError: `expected_ranges` names an unknown check.
    """
    return load_deferred(source, expected_ranges=expected_ranges, brain=brain)[1]()


def load_deferred(
    source: Any, *, expected_ranges: ExpectedRanges, brain: "Brain" = "auto"
) -> tuple[np.ndarray, Callable[[], Scan]]:
    """Read what a network needs of a scan, and defer the checks.

    If a scan holds the brain alone, no check changes the network's input, so the network can start at once.

    Args:
        source: As in `load`.
        expected_ranges: As in `load`.
        brain: As in `load`.

    Returns:
        `(i, j, k)` HU with 0 outside the brain, and a function that finishes the checks. The function returns and
        raises what `load` does; no result may be reported before it returned.

    Raises:
        ScanError: The scan or mask cannot be read, they do not match, or no brain can be extracted.
        UnknownNameError: There is no such brain mode.
    """
    validate_brain_mode(brain)
    scan = read(source)
    if scan.brain is not None:
        return scan.hu, lambda: scan
    validate_geometry(scan)

    def finish(isolated: Scan, mask: np.ndarray, record: dict[str, Any]) -> Scan:
        warnings = check_scan(scan, mask, expected_ranges, given=record["brain"] == "given")
        return dataclasses.replace(
            isolated, brain=mask, record={**scan.record, **record}, warnings=(*scan.warnings, *warnings)
        )

    if is_brain_only(scan, brain):

        def validate_and_finish() -> Scan:
            validate_ct(scan)
            return finish(*isolate_brain(scan, "given"))

        return scan.hu, validate_and_finish
    validate_ct(scan)
    isolated, mask, record = isolate_brain(scan, "extract" if isinstance(brain, str) else brain)
    return isolated.hu, lambda: finish(isolated, mask, record)


def brain_mask(scan: Any, *, brain: "Brain" = "extract") -> "nib.Nifti1Image":
    """Return the brain mask of a scan as an image in the shape and affine of the source.

    Args:
        scan: A source that `read` takes.
        brain: As in `load`. A scan that was loaded before keeps its mask.

    Raises:
        ScanError: The scan or mask cannot be read, they do not match, or no brain is found.
        UnknownNameError: There is no such brain mode.
    """
    head = read(scan)
    mask = head.brain
    if mask is None:
        validate_ct(head)
        mask = isolate_brain(head, brain)[1]
    return head.image(np.asarray(mask, np.uint8))


def find_scans(path: str | Path) -> list[Path]:
    """Find the scans in a folder.

    A folder is one scan if it, or its subfolders together, hold the DICOM files of one study. Otherwise every NIfTI
    file and every .zip in the folder is a scan, and the subfolders are searched in the same way.

    Args:
        path: A file, a DICOM folder, or a folder of scans.

    Returns:
        Sorted paths that `read` takes, or the path itself if it is no folder or holds no scans.
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
    studies = [uid for inner in folders if (uid := dicom.study_uid(inner)) is not None]
    if len(studies) > 1 and len(set(studies)) == 1:
        return [folder]
    scans = [file for file in files if file.name.endswith((".nii", ".nii.gz", ".zip"))]
    return sorted(scans + [scan for inner in folders for scan in _scans_in(inner)])
