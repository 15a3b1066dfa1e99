"""Leave out of a result what may identify a patient: paths, and what comes from the header of a DICOM file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ichprog.pseudonyms import DIGITS, pseudonym

_STUDY_NAME = re.compile(rf"/(patient-[0-9a-f]{{{DIGITS}}})/(study-[0-9a-f]{{{DIGITS}}})$")  # of a DicomStudy
_FREE_TEXT = {"pseudonym", "description", "reason"}  # of a DICOM series
_HIDDEN = (
    "The message of the error is not shown, because it may hold identifiers of the patient. --identifiers shows it."
)


def is_dicom(scan: str) -> bool:
    """Return whether a scan of this name may be DICOM: everything but a NIfTI file.

    Args:
        scan: Name of the scan in a result.
    """
    return not scan.lower().endswith((".nii", ".nii.gz"))


def public_name(scan: str) -> str:
    """Return a name of a scan without folders; for DICOM a pseudonym.

    The pseudonym of a study is the one that `ichprog scans` lists. Another DICOM source has a pseudonym of its path.

    Args:
        scan: Name of the scan in a result.

    Examples:
        >>> public_name("cases/smith/head.nii.gz"), len(public_name("exports/smith^john"))
        ('head', 17)
    """
    if found := _STUDY_NAME.search(scan):
        return "_".join(found.groups())
    if is_dicom(scan):
        return f"scan-{pseudonym(scan)}"
    return Path(scan).name.removesuffix(".gz").removesuffix(".nii")


def without_identifiers(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a result in which the path of the scan is replaced by a name.

    Identifiers, descriptions and file names of DICOM series are left out, and so is the message of an error of a DICOM
    scan. The folders of weight files are left out, too.

    Args:
        record: A result as plain data.
        name: Name to show instead of the path.
    """
    scan = str(record.get("scan", ""))
    public: dict[str, Any] = _clean(record, scan, name)
    error = record.get("error")
    if isinstance(error, Mapping) and is_dicom(scan):
        public["error"] = {"code": error.get("code"), "message": _HIDDEN}
    return public


def _clean(value: Any, scan: str, name: str, key: str = "") -> Any:
    if isinstance(value, Mapping):
        is_series = key in ("series", "other_series")
        kept = {k: v for k, v in value.items() if not (is_series and k in _FREE_TEXT)}
        return {k: _clean(v, scan, name, str(k)) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        return [_clean(each, scan, name, key) for each in value]
    if not isinstance(value, str):
        return value
    if key == "source" and ("/" in value or "\\" in value) and "://" not in value:
        return Path(value.replace("\\", "/")).name  # a weight file
    return re.sub(rf"(?<![\w/]){re.escape(scan)}(?!\w)", lambda _: name, value) if scan else value
