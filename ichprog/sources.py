"""Resolve what `predict` and `explain` accept (paths, folders, tables, images, arrays) to single scans."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog import scan as scan_package
from ichprog.cohort import Cohort, Patient
from ichprog.errors import InvalidValueError
from ichprog.scan import DicomStudy, Scan

if TYPE_CHECKING:
    import nibabel as nib

    SingleScan = nib.spatialimages.SpatialImage | tuple[np.ndarray, np.ndarray] | Scan | Patient | DicomStudy
    ScanSource = str | Path | SingleScan

TABLE_SUFFIXES = (".csv", ".tsv")
EXPECTED = (
    "a NIfTI file, a DICOM folder or a .zip of one, a folder of scans, a table of patients (.csv), a Cohort, "
    "a nibabel image, a tuple (array, affine), or several of these"
)


def find_scans(source: Any) -> "list[ScanSource]":
    """Return the scans behind one source.

    Args:
        source: A path, a Cohort, or a scan in memory. A folder of scans is searched, and a table of patients is read.
            A folder that holds one DICOM study is one scan; of several studies in one folder or .zip, each is one.

    Returns:
        Sources of one scan each: patients in the order of their table, files in the order of their paths. A path that
        does not exist is returned, because reading the path reports the error.

    Raises:
        InvalidValueError: The source is of a type that holds no scan.
        CohortError: A table of patients cannot be read.

    Examples:
        >>> find_scans("scan.nii.gz")
        [PosixPath('scan.nii.gz')]
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix.lower() in TABLE_SUFFIXES:
            return list(Cohort.read(path, scans=False).patients)
        return list(scan_package.find_scans(path))
    if isinstance(source, Cohort):
        return list(source.patients)
    if _is_scan_in_memory(source):
        return [source]
    hint = "An array has no geometry: give (array, affine)." if _is_array(source) else ""
    raise InvalidValueError("type of scan", type(source).__name__, EXPECTED, hint)


def find_one_scan(source: Any) -> "ScanSource":
    """Return the only scan behind one source.

    Args:
        source: What `find_scans` takes.

    Raises:
        InvalidValueError: The source holds several scans, or none.
        CohortError: A table of patients cannot be read.
    """
    scans = find_scans(source)
    if len(scans) != 1:
        raise InvalidValueError("scan", str(source), "one scan", f"This holds {len(scans)} scans; give one of them.")
    return scans[0]


def resolve(given: Any) -> "tuple[list[ScanSource] | Iterator[ScanSource], bool]":
    """Return the scans behind everything that a user gave, and whether that is one scan by its kind.

    Args:
        given: One source that `find_scans` takes, or an iterable of them.

    Returns:
        A list of scans, or an iterator if `given` is an iterable other than a list or tuple. The second value is false
        for a collection, even if the collection holds one scan.

    Raises:
        InvalidValueError: A source is of a type that holds no scan; an iterator raises this when it reaches the source.
        CohortError: A table of patients cannot be read.
    """
    is_iterable = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | Cohort)
    if is_iterable and not _is_scan_in_memory(given) and not _is_array(given):
        scans = itertools.chain.from_iterable(map(find_scans, given))
        return list(scans) if isinstance(given, list | tuple) else scans, False
    listed = find_scans(given)
    is_path = isinstance(given, str | Path)
    return listed, listed == [Path(given)] if is_path else not isinstance(given, Cohort)


def scan_of(source: "ScanSource") -> Any:
    """Return what `scan.read` takes: the scan of a patient, or the source itself."""
    return source.scan if isinstance(source, Patient) else source


def name_of(source: "ScanSource") -> str:
    """Return the name of a scan before the scan is read."""
    scan = scan_of(source)
    if isinstance(scan, str | Path | DicomStudy):
        return str(scan)
    if isinstance(scan, Scan):
        return scan.name
    return "array in memory" if isinstance(scan, tuple) else scan.get_filename() or "image in memory"


def patient_of(source: "ScanSource") -> str | None:
    """Return the name of the patient if the source is a row of a cohort."""
    return source.name if isinstance(source, Patient) else None


def _is_scan_in_memory(source: Any) -> bool:
    """Return whether an object is a Scan, a row of a cohort, a nibabel image, or an array with its affine."""
    is_pair = isinstance(source, tuple) and len(source) == 2 and all(map(_is_array, source))
    return isinstance(source, Scan | Patient | DicomStudy) or hasattr(source, "dataobj") or is_pair


def _is_array(value: Any) -> bool:
    """Return whether a value is an array of numbers; arrays of paths are iterables of sources."""
    return hasattr(value, "__array__") and not hasattr(value, "dataobj") and np.asarray(value).dtype.kind in "biufc"
