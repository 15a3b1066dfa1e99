"""What the DICOM objects of one prediction share: identifiers, the source series, codes and texts."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ichprog.results import Prediction
from ichprog.scan.source_series import SourceSeries

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept
    from pydicom.dataset import Dataset

SCHEME = "99ICHPROG"
"""Designator of the private coding scheme, for what no standard code exists."""

CAUTION = "FOR RESEARCH ONLY"
"""What every series description ends with."""

MANUFACTURER = "ichprog"
_SEXES = ("", "F", "M", "O")
_NO_DATE, _NO_TIME = "19000101", "000000"  # if the source series states none
_EMPTY_IF_UNKNOWN = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ObjectContext:
    """What the objects of one prediction share.

    Attributes:
        series: The source series, with headers that have every attribute that objects need.
        prediction: The prediction.
        key: What determines the objects: the source, the models with their weights, and the options of the prediction.
        patient_name: Name of the patient as the series has it; highdicom warns about some names that real series have,
            so the headers have none.
    """

    series: SourceSeries
    prediction: Prediction
    key: tuple[str, ...]
    patient_name: Any

    @property
    def headers(self) -> "tuple[Dataset, ...]":
        """Return the headers of the source series."""
        return self.series.headers

    @property
    def notice(self) -> str:
        """Return the notice of the model."""
        return str(self.prediction.provenance["notice"])

    def uid(self, *parts: str) -> str:
        """Return a unique identifier that is the same whenever the same object is made.

        Args:
            parts: What distinguishes the object from others of the same prediction.
        """
        from pydicom.uid import generate_uid

        return str(generate_uid(entropy_srcs=[json.dumps([*self.key, *parts])]))

    def attributes(self, kind: str, description: str, number: int) -> dict[str, Any]:
        """Return the attributes that every object has, as arguments of highdicom.

        Args:
            kind: What distinguishes the object from others of the same prediction.
            description: Description of the series.
            number: Number of the series.
        """
        return {
            "series_instance_uid": self.uid(kind, "series"),
            "sop_instance_uid": self.uid(kind),
            "series_number": number,
            "instance_number": 1,
            "manufacturer": MANUFACTURER,
            "manufacturer_model_name": clean_text(self.prediction.model, 64),
            "software_versions": software_versions(self.prediction.provenance),
            "device_serial_number": weights_hash(self.prediction.provenance)[:16],
            "series_description": f"{clean_text(description, 63 - len(CAUTION))} {CAUTION}",
            "specific_character_set": "ISO_IR 192",
        }

    def finish(self, data: "Dataset", kind: str) -> "Dataset":
        """Replace what highdicom takes from the clock or from chance, and return the object.

        Dates are those of the source series, so that the same object has the same bytes whenever it is made.

        Args:
            data: The object.
            kind: As in `attributes`.
        """
        for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
            if keyword in data:
                delattr(data, keyword)
        if "PatientName" in data:
            del data.PatientName  # the element is that of the header
        data.PatientName = self.patient_name
        if "Rows" in data:
            data.BodyPartExamined = "HEAD"
        if "ContentLabel" in data and "ContentCreatorName" not in data:
            data.ContentCreatorName = ""  # editions before 2021 require the element, which may be empty
        date, time = source_datetime(self.headers[0])
        for keyword, value in {
            "ContentDate": date, "ContentTime": time,
            "DateOfSecondaryCapture": date, "TimeOfSecondaryCapture": time,
        }.items():  # fmt: skip
            if keyword in data:
                setattr(data, keyword, value)
        for item in data.get("ContributingEquipmentSequence", ()):
            item.ContributionDateTime = date + time
        dimensions = self.uid(kind, "dimensions")
        for item in (*data.get("DimensionOrganizationSequence", ()), *data.get("DimensionIndexSequence", ())):
            item.DimensionOrganizationUID = dimensions
        return data


def build_context(prediction: Prediction, series: SourceSeries) -> ObjectContext:
    """Return what the objects of a prediction share.

    Args:
        prediction: The prediction of a scan that was read from the series.
        series: The source series.
    """
    key = [str(header.get("SOPInstanceUID", "")) for header in series.headers]
    key += [json.dumps(series.positions.tolist()), *_determinants(prediction)]
    if prediction.haemorrhage is not None:
        key += _determinants(prediction.haemorrhage.prediction)
    context = ObjectContext(series, prediction, tuple(key), series.headers[0].get("PatientName") or "")
    for header in series.headers:
        complete_header(header, context.uid("frame of reference"), series.slice_spacing)
    return context


def _determinants(prediction: Prediction) -> list[str]:
    """Return what determines the values of a prediction, as texts."""
    made = prediction.provenance
    known = None if prediction.clinical is None else dict(prediction.clinical.used)
    options = [made["precision"], made["versions"]["ichprog"], made["scan"].get("brain"), known, prediction.coverage]
    return [prediction.model, *(str(each["sha256"]) for each in made["weights"]), json.dumps(options, default=str)]


def complete_header(header: "Dataset", frame_of_reference: str, slice_mm: float) -> None:
    """Give a header of the source series the attributes that objects copy from it, in place.

    Values that are not allowed become empty, as the standard wants for unknown ones.

    Args:
        header: The header.
        frame_of_reference: Identifier of the coordinate system, if the series states none.
        slice_mm: Thickness of a slice in mm, if the series states none.
    """
    from pydicom.valuerep import DA, TM

    allowed: dict[str, Callable[[Any], Any]] = {
        "PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM, "PatientSex": _SEXES.index
    }  # fmt: skip
    for keyword in _EMPTY_IF_UNKNOWN:
        try:
            value = header.get(keyword) or ""
            allowed.get(keyword, str)(value)
        except Exception:  # a malformed value makes pydicom raise almost anything
            value = ""
        setattr(header, keyword, value)
    if not header.get("FrameOfReferenceUID"):
        header.FrameOfReferenceUID = frame_of_reference
    if not header.get("SliceThickness"):
        header.SliceThickness = round(slice_mm, 4)
    header.PatientName = ""
    if "DeidentificationMethod" in header and not header.DeidentificationMethod:  # may not be empty
        header.DeidentificationMethod = "not stated"
    header.PositionReferenceIndicator = header.get("PositionReferenceIndicator") or ""


def source_datetime(header: "Dataset") -> tuple[str, str]:
    """Return date and time of the source series, as DICOM writes them.

    Args:
        header: A header of the series.
    """
    from pydicom.valuerep import DA, TM

    for part in ("Acquisition", "Content", "Series", "Study"):
        try:
            date = str(DA(header.get(f"{part}Date") or "") or "")
            time = str(TM(header.get(f"{part}Time") or "") or "")
        except Exception:  # a malformed date; the next one may be right
            date = ""
        if date:
            return date, time or _NO_TIME
    return _NO_DATE, _NO_TIME


def weights_hash(provenance: Any) -> str:
    """Return the SHA-256 of the weights of a model, or of those of all its folds.

    Args:
        provenance: Provenance of the prediction.
    """
    hashes = [str(each["sha256"]) for each in provenance["weights"]]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def software_versions(provenance: Any) -> list[str]:
    """Return the version of this package, and the hash of the weights, as texts of at most 64 characters.

    Args:
        provenance: Provenance of the prediction.
    """
    return [clean_text(f"ichprog {provenance['versions']['ichprog']}", 64), weights_hash(provenance)]


def clean_text(value: object, limit: int) -> str:
    """Return a text that DICOM allows in one value: printable, without a backslash, and not too long.

    Args:
        value: The text, which may come from the description of a model or from a file.
        limit: Largest number of characters.
    """
    text = " ".join("".join(each if each.isprintable() else " " for each in str(value)).replace("\\", "/").split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def private_code(parts: Iterable[str], meaning: str) -> "CodedConcept":
    """Return a code of the private scheme.

    Args:
        parts: What the code is for, such as the names of a task and of its label.
        meaning: The meaning, for people.
    """
    from highdicom.sr import CodedConcept

    return CodedConcept(clean_text(":".join(parts), 64), SCHEME, clean_text(meaning, 64))
