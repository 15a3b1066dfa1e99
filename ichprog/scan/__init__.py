"""Head CTs on disk: reading, brain isolation and checks, with a `Scan` as the result.

`volume` holds `Scan` and reads NIfTI. `studies` finds DICOM studies, `series` selects a series of one, and `dicom`
reads it as a volume. `source_series` maps values over a scan to the slices of its series. `brain` isolates the brain.
`validation` refuses impossible scans, and `checks` warns about unusual ones. Both use `measurements`. This package
knows no networks and no registry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import ScanError
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
from ichprog.scan.studies import DicomStudy, StudySummary, describe_study, find_studies, write_mapping
from ichprog.scan.validation import validate_ct, validate_geometry, worker_died_error
from ichprog.scan.volume import Scan, load_regions, read, source_image, source_slices
from ichprog.spec import ExpectedRanges

if TYPE_CHECKING:
    import nibabel as nib

    from ichprog.scan.brain import Brain

__all__ = [
    "CHECKS",
    "BrainExtractor",
    "BrainMode",
    "DicomStudy",
    "Scan",
    "StudySummary",
    "brain_key",
    "brain_mask",
    "describe_study",
    "extract_brain",
    "find_scans",
    "find_studies",
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
    "worker_died_error",
    "write_mapping",
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


def find_scans(path: str | Path) -> "list[Path | DicomStudy]":
    """Find the scans in a folder or a .zip.

    A folder is one scan if it, or its subfolders together, hold the DICOM files of one study. Of several studies in one
    folder or .zip, each is a scan. Otherwise every NIfTI file and every .zip in the folder is a scan, and the
    subfolders are searched in the same way.

    Args:
        path: A file, a DICOM folder, a .zip, or a folder of scans.

    Returns:
        Sorted sources that `read` takes, or the path itself if it holds no scans.
    """
    path = Path(path)
    if path.suffix.lower() == ".zip" and path.is_file():
        return _studies_of(path)
    if not path.is_dir():
        return [path]
    study_of = {path / name: study for study in find_studies(path) for name in study.files}
    return _scans_in(path, study_of) or [path]


def _studies_of(path: Path) -> "list[Path | DicomStudy]":
    """Return the studies in a .zip; the path itself if there is one at most, or if reading it reports an error."""
    try:
        studies = find_studies(path)
    except ScanError:
        return [path]
    return [*studies] if len(studies) > 1 else [path]


def _scans_in(folder: Path, study_of: "Mapping[Path, DicomStudy]") -> "list[Path | DicomStudy]":
    """Return the scans in a folder.

    Args:
        folder: The folder.
        study_of: The study of each DICOM file in the folder and its subfolders.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    folders = [entry for entry in entries if entry.is_dir()]
    below = {file: study for file, study in study_of.items() if file.is_relative_to(folder)}
    places: dict[str, set[str]] = {}  # files and subfolders that hold each study
    for file, study in below.items():
        places.setdefault(study.uid, set()).add(file.relative_to(folder).parts[0])
    if any(file in below for file in files) or any(len(each) > 1 for each in places.values()):
        if len(places) == 1:
            return [folder]
        return [
            dataclasses.replace(
                next(study for study in below.values() if study.uid == uid), path=folder,
                files=frozenset(str(file.relative_to(folder)) for file, each in below.items() if each.uid == uid),
            )
            for uid in places
        ]  # fmt: skip
    scans: list[Path | DicomStudy] = []
    for file in files:
        if file.name.endswith((".nii", ".nii.gz")):
            scans.append(file)
        elif file.name.endswith(".zip"):
            scans += _studies_of(file)
    scans += [scan for inner in folders for scan in _scans_in(inner, below)]
    return sorted(scans, key=str)
