"""Find the DICOM studies in a folder or .zip, and describe the series of each."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ichprog.errors import ScanError
from ichprog.io import write_csv
from ichprog.pseudonyms import pseudonym
from ichprog.scan.series import (
    choose_stack,
    group_stacks,
    has_dicom_magic,
    iter_files,
    read_images,
    rejection_reason,
)

_DICOMDIR = "DICOMDIR"  # the index of an export, by its standard name


@dataclass(frozen=True)
class DicomStudy:
    """One DICOM study of several in a folder or .zip.

    Its name has pseudonyms instead of the identifiers of the patient and of the study.

    Attributes:
        path: The folder or .zip.
        patient: Identifier of the patient, or "".
        uid: Study Instance UID.
        files: Names of the files of the study, relative to the folder or in the .zip.
        series: Series Instance UID, pseudonym or number of the series to read; None for the best one.
    """

    path: Path
    patient: str
    uid: str
    files: frozenset[str]
    series: str | None = None

    def __str__(self) -> str:
        return f"{self.path}/patient-{pseudonym(self.patient)}/study-{pseudonym(self.uid)}"

    def __repr__(self) -> str:
        return f"<DicomStudy {self}, {len(self.files)} files>"


def find_studies(path: Path) -> list[DicomStudy]:
    """Return the DICOM studies in a folder with all subfolders, or in a .zip, by their first file.

    Each file is opened once, and its pixels are not read.

    Args:
        path: A folder or a .zip.

    Raises:
        ScanError: The .zip cannot be read.
    """
    found: dict[tuple[str, str], list[str]] = {}
    with ExitStack() as opened:
        for name, opener in iter_files(path, opened):
            if Path(name).name.upper() == _DICOMDIR:
                continue
            if (identity := _identity(opener)) is not None:
                found.setdefault(identity, []).append(name)
    return [DicomStudy(path, patient, uid, frozenset(files)) for (patient, uid), files in found.items()]


def study_of(source: Any) -> DicomStudy | None:
    """Return the DICOM study of one scan, or None if it is no DICOM.

    Args:
        source: A source of one scan, as `scan.find_scans` returns it.

    Raises:
        ScanError: A .zip cannot be read.
    """
    if isinstance(source, DicomStudy):
        return source
    if isinstance(source, str | Path) and (Path(source).is_dir() or Path(source).suffix.lower() == ".zip"):
        return next(iter(find_studies(Path(source))), None)
    return None


def _identity(opener: Callable[[], IO[bytes]]) -> tuple[str, str] | None:
    """Return the patient and study of a file; None if it is no readable DICOM file."""
    from pydicom import dcmread

    try:
        with opener() as file:
            if not has_dicom_magic(file.read(132)):
                return None
            file.seek(0)
            tags = ["PatientID", "StudyInstanceUID"]
            header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
        return str(header.get("PatientID", "") or ""), str(header.get("StudyInstanceUID", "") or "")
    except Exception:  # reading the study reports the damage
        return "", ""


@dataclass(frozen=True)
class StudySummary:
    """What a study holds, and which series would be read.

    Attributes:
        study: The study.
        series: Each series as plain data: number, description, slices, spacing, coverage, kernel, kind, whether it is
            `taken`, and the `reason`.
        problem: Why no series can be taken, or None.
    """

    study: DicomStudy
    series: tuple[dict[str, Any], ...]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain data, with pseudonyms instead of identifiers."""
        names = {"patient": pseudonym(self.study.patient), "study": pseudonym(self.study.uid)}
        return {"scan": str(self.study), **names, "series": list(self.series), "problem": self.problem}


def describe_study(study: DicomStudy) -> StudySummary:
    """Describe the series of a study without reading their pixels, unless slices are repeated.

    Args:
        study: The study.

    Raises:
        ScanError: A file cannot be read.
    """
    with ExitStack() as opened:
        files = ((name, opener) for name, opener in iter_files(study.path, opened) if name in study.files)
        images, _ = read_images(files, study.series)
        stacks = group_stacks(images)
        try:
            _, record = choose_stack(stacks, study.path)
        except ScanError as error:
            rows = [{**stack.summary(), "taken": False, "reason": rejection_reason(stack)} for stack in stacks]
            return StudySummary(study, tuple(rows), str(error))
    rows = [{**record["series"], "taken": True}]
    rows += [{**other, "taken": False} for other in record["other_series"]]
    return StudySummary(study, tuple(rows), None)


def write_mapping(studies: Iterable[DicomStudy], target: Path) -> None:
    """Write a table of the pseudonyms with the identifiers behind them.

    Args:
        studies: The studies.
        target: Path of the .csv file. It identifies patients, so that only this user may read it; keep it apart from
            the results.
    """
    rows = [[str(study), pseudonym(study.patient), study.patient, pseudonym(study.uid), study.uid] for study in studies]
    write_csv(target, ["scan", "patient", "PatientID", "study", "StudyInstanceUID"], rows, is_private=True)
