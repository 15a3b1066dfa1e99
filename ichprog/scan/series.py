"""Group DICOM files into stacks of parallel slices and select the stack of the head CT."""

import functools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ichprog.errors import ScanError
from ichprog.limits import MAX_DICOM_BYTES, MAX_DICOM_FILES
from ichprog.pseudonyms import pseudonym
from ichprog.scan.jpeg import StoredSize, stored_size

AIR_HU = -1024.0
_TISSUE_HU = 200.0
TOLERANCE_MM = 0.05  # a tenth of the allowed geometry error; headers round to about this
_SAME_ORIENTATION = 0.005  # in direction cosines, 0.3 degrees
_MAX_OBLIQUITY_DEG = 40.0  # slices tilted further are not axial
_USUAL_SPACING_MM = 5.0  # of radiology reports and, about, of the published networks' training scans
_WHOLE_HEAD_SHARE = 0.8
_TAGS = """
    SOPInstanceUID StudyInstanceUID SeriesInstanceUID SeriesNumber SeriesDescription AcquisitionNumber Modality
    ImageType BodyPartExamined ConvolutionKernel ContrastBolusAgent ContrastBolusAgentSequence SliceThickness
    PixelSpacing Rows Columns ImagePositionPatient ImageOrientationPatient SamplesPerPixel RescaleSlope
    RescaleIntercept RescaleType PixelPaddingValue SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
"""
_DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"

_SCOUT = re.compile(r"scout|topogram|locali[sz]er|surview|scanogram")
_HEAD = re.compile(r"head|brain|skull|crani|cereb|neuro|stroke|kopf|sch(ä|ae)del|hirn|cr[aâ]ne|cabeza|encef")
_ELSEWHERE = re.compile(r"spine|neck|chest|thora|lung|abdom|pelvi|facial|\bface\b|sinus|orbit|temporal|extrem")
_VESSELS = re.compile(r"angio|\bct[avp]\b|perfusion|venogra")
_ENHANCED = re.compile(r"contrast|enhanced|\bce(ct)?\b|\bc ?\+|\+ ?c\b")
_PLAIN = re.compile(r"\b(no|non|without|w/?o|pre|plain|sans|ohne|nativ\w*)\b|unenhanced|noncontrast|\bnect\b")
_NO_AGENT = re.compile(r"(no|non|none|nil|n|n/a|0|-|no .*|without.*|w/?o.*)?")
# Canon's FC30 and Philips' YB are sharp, and Siemens' H60s where H31s is not.
_SHARP = re.compile(r"bone|edge|lung|sharp|knochen|\bfc[358]\d|\by[b-e]\b|^[bhjqtu][a-z]?[5-9]\d")
_CONTRAST, _ONE_SLICE = "contrast medium was given", "a single slice"


@dataclass(frozen=True, eq=False)
class Image:
    """One slice: the header of a file or of one of its frames, and a function that opens the file."""

    name: str
    open: Callable[[], IO[bytes]]
    frame: int
    header: Any

    def text(self, keyword: str) -> str:
        """Return a value as written, or an empty text if it is absent.

        The conversion of pydicom warns about every malformed value through Python's process-wide filters. Many real
        files have malformed values that do not matter here.
        """
        value = getattr(self.header.get_item(keyword), "value", None) or b""
        encodings = self.header.original_character_set or "latin-1"
        encoding = encodings if isinstance(encodings, str) else encodings[-1]
        return value.decode(encoding, "replace").strip(" \0") if isinstance(value, bytes) else str(value)

    def numbers(self, keyword: str, count: int) -> np.ndarray:
        """Return a value as numbers, or an empty array if it is not that many numbers."""
        try:
            numbers = np.array([float(part) for part in self.text(keyword).split("\\")])
        except ValueError:
            return np.empty(0)
        return numbers if len(numbers) == count and np.isfinite(numbers).all() else np.empty(0)

    def number(self, keyword: str, default: float) -> float:
        """Return a value as a number, or a default if it is none."""
        return float([*self.numbers(keyword, 1), default][0])

    @property
    def pixel_geometry(self) -> tuple[float, ...]:
        """Return rows, columns and, if stated, the height and width of a pixel in mm."""
        header = self.header
        return (header.get("Rows", 0), header.get("Columns", 0), *self.numbers("PixelSpacing", 2).round(4).tolist())

    @property
    def orientation(self) -> np.ndarray:
        """Return LPS directions along rows and down columns, `(6,)`, or zeros if the slice states no position."""
        cosines, position = self.numbers("ImageOrientationPatient", 6), self.numbers("ImagePositionPatient", 3)
        return cosines if cosines.size and position.size and np.cross(cosines[:3], cosines[3:]).any() else np.zeros(6)


class Stack:
    """Parallel slices of one series, from foot to head.

    Attributes:
        images: The slices in order.
        axes: `(3, 3)` unit vectors in LPS, one in each row: along the rows of a slice, down its columns, towards the
            head. Zeros if the slices state no position.
        offsets: `(slices, 3)` mm along the axes, from the first pixel of the first slice to that of each slice.
    """

    def __init__(self, images: Iterable[Image]) -> None:
        self.images = tuple(images)
        self.axes, self.offsets = np.zeros((3, 3)), np.zeros((len(self.images), 3))
        row, column = self.images[0].orientation.reshape(2, 3)
        if row.any():
            row = row / np.linalg.norm(row)
            column = column - row * (row @ column)  # headers are rounded: make the axes orthonormal
            column = column / np.linalg.norm(column)
            normal = np.cross(row, column)
            self.axes = np.array([row, column, normal if normal[2] >= 0 else -normal])
            offsets = np.array([image.numbers("ImagePositionPatient", 3) for image in self.images]) @ self.axes.T
            order = np.argsort(offsets[:, 2], kind="stable")
            self.images = tuple(self.images[n] for n in order)
            self.offsets = offsets[order] - offsets[order[0]]
        self.depths = self.offsets[:, 2]
        self.coverage = float(self.depths[-1])

    def text(self, keyword: str) -> str:
        """Return a value of the first slice as written."""
        return self.images[0].text(keyword)

    @property
    def slice_spacing(self) -> float:
        """Return the usual distance of neighbouring slices in mm, or 0 for a single slice.

        This is the lower quartile of the distances. If half of a head has thin slices and half thick ones, a larger
        value would discard acquired slices; a single narrow gap between two blocks does not count.
        """
        gaps = np.diff(self.depths)
        gaps = gaps[gaps > TOLERANCE_MM]
        return float(np.quantile(gaps, 0.25, method="lower")) if gaps.size else 0.0

    @property
    def is_sharp(self) -> bool:
        """Return whether the series was reconstructed with a kernel for bone or lung."""
        return any(_SHARP.search(self.text(tag).lower()) for tag in ("ConvolutionKernel", "SeriesDescription"))

    @property
    def is_derived(self) -> bool:
        """Return whether the series was computed from other slices."""
        return bool(re.search("^DERIVED|REFORMAT|MPR|MIP|PROJECTION", self.text("ImageType").upper()))

    def summary(self) -> dict[str, Any]:
        """Return what distinguishes this stack from others, as plain data."""
        return {
            "number": self.text("SeriesNumber"),
            "description": self.text("SeriesDescription"),
            "pseudonym": pseudonym(self.text("SeriesInstanceUID")),
            "slices": len(self.images),
            "spacing_mm": round(self.slice_spacing, 3),
            "coverage_mm": round(self.coverage, 1),
            "kernel": self.text("ConvolutionKernel"),
            "kind": "derived" if self.is_derived else "original",
        }

    def __str__(self) -> str:
        return "series " + ", ".join(f"{key} {value}" for key, value in self.summary().items() if value != "")


def iter_files(path: Path, opened: ExitStack) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Yield name and opener of every file, in an order that does not depend on the file system."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            yield str(file.relative_to(path)), functools.partial(_open, file)
    elif path.suffix.lower() == ".zip":
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
        except (OSError, zipfile.BadZipFile) as error:
            raise ScanError(f"{path}: cannot be read as a zip: {error}. Copy it again.", code="unreadable") from error
        for member in sorted(archive.infolist(), key=lambda each: each.filename):
            if member.file_size > MAX_DICOM_BYTES:
                size, most = member.file_size, f"<= {MAX_DICOM_BYTES}"
                message = f"{path}: {member.filename} has {size} bytes when unpacked; {most} are read."
                raise ScanError(message, code="too-large", measured=size, expected=most, unit="bytes")
            if not member.is_dir():
                yield member.filename, functools.partial(archive.open, member)
    else:
        yield path.name, functools.partial(_open, path)


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def has_dicom_magic(start: bytes) -> bool:
    """Return whether bytes start like DICOM: with the preamble, or with an element of group 0002 or 0008."""
    tag = start[1::-1] + start[3:1:-1] if start[:1] == b"\0" else start[:4]
    short = start[4:6].isupper() or start[5:8] == b"\0\0\0"  # two letters of a VR, or a small length
    return start[128:] == b"DICM" or (tag[:2] in (b"\x02\0", b"\x08\0") and tag[3:] == b"\0" and short)


def read_images(
    files: Iterable[tuple[str, Callable[[], IO[bytes]]]], series: str | None = None
) -> tuple[list[Image], dict[str, int]]:
    """Return every image once, and the number of DICOM files, other files and repeated images.

    Args:
        files: Name and opener of each file.
        series: Series Instance UID, its pseudonym, or number of the only series whose images are returned.
    """
    images: dict[tuple[Any, ...], Image] = {}
    count = {"dicom": 0, "repeated": 0, "other": 0}
    for number, (name, opener) in enumerate(files):
        if number >= MAX_DICOM_FILES:
            message = f"{name}: more than {MAX_DICOM_FILES} files. Give the folder of one study."
            raise ScanError(message, code="too-large", measured=number, expected=f"<= {MAX_DICOM_FILES}", unit="files")
        try:
            found = _images_of_file(name, opener)
            # some anonymisers give every slice the same UID, so the position identifies the image
            identities = [
                tuple(map(image.text, ("SeriesInstanceUID", "SOPInstanceUID", "ImagePositionPatient")))
                for image in found
            ]
        except ScanError:
            raise
        except Exception as error:  # a damaged file makes pydicom and zipfile raise almost anything
            raise _unreadable(name, error) from error
        count["dicom" if found else "other"] += 1
        if series is not None and found and series not in _names_of_series(found[0]):
            continue
        for image, same in zip(found, identities, strict=True):
            count["repeated"] += images.setdefault((same, same[1] or name, image.frame), image) is not image
    return list(images.values()), count


def _names_of_series(image: Image) -> tuple[str, ...]:
    """Return what a user may call the series of an image: its UID, its pseudonym and its number."""
    uid = image.text("SeriesInstanceUID")
    return uid, pseudonym(uid), image.text("SeriesNumber")


def _images_of_file(name: str, opener: Callable[[], IO[bytes]]) -> list[Image]:
    """Return the images of a file; none if it is a DICOMDIR, or only starts like DICOM by chance."""
    from pydicom import dcmread

    with opener() as file:
        start = file.read(132)
        if not has_dicom_magic(start):
            return []
        file.seek(0)
        header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=[*_TAGS.split()])
        ended = not file.read(1)
    found = [Image(name, opener, number, frame) for number, frame in enumerate(_frames(header))]
    if not found[0].text("SeriesInstanceUID"):
        if start[128:] == b"DICM" and header.file_meta.get("MediaStorageSOPClassUID") != _DICOMDIR:
            raise _unreadable(name, "its header ends early")
        return []
    if found[0].text("Modality") == "CT" and ended and header.file_meta.get("TransferSyntaxUID") != _DEFLATED:
        raise _unreadable(name, "it ends before its pixels")
    return found


def _unreadable(name: str, cause: object) -> ScanError:
    message = f"{name}: a damaged or truncated DICOM file: {cause}. Copy the file again; the series needs it."
    return ScanError(message, code="unreadable")


def _frames(header: Any) -> list[Any]:
    """Return a header for each image of a file; in an enhanced CT, shared and per-frame values are merged."""
    from pydicom import Dataset

    frames = []
    for own in header.get("PerFrameFunctionalGroupsSequence", ()):
        flat = Dataset()
        flat.update(header)
        for group in (group for groups in (*header.get("SharedFunctionalGroupsSequence", ()), own) for group in groups):
            if group.VR == "SQ" and group.value:
                flat.update(group.value[0])
        frames.append(flat)
    return frames or [header]


def group_stacks(images: Iterable[Image]) -> list[Stack]:
    """Group slices by series and orientation; scouts of a series form groups of their own."""
    groups: list[tuple[tuple[str, bool], np.ndarray, list[Image]]] = []
    for image in images:
        key = (image.text("SeriesInstanceUID"), "LOCALIZER" in image.text("ImageType").upper())
        orientation = image.orientation
        for known, direction, members in groups:
            if key == known and np.abs(direction - orientation).max() < _SAME_ORIENTATION:
                members.append(image)
                break
        else:
            groups.append((key, orientation, [image]))
    return [Stack(members) for _, _, members in groups]


def choose_stack(stacks: list[Stack], path: Path) -> tuple[Stack, dict[str, Any]]:
    """Select one stack, without repeated slices, and record the selection."""
    reasons = [(stack, rejection_reason(stack)) for stack in stacks]
    excluded = [(stack, why) for stack, why in reasons if why]
    left, reason, dropped = [stack for stack, why in reasons if not why], "the only axial non-contrast head CT", 0
    if not left:
        causes = sorted({why for _, why in excluded})
        code = "contrast" if _CONTRAST in causes else "too-few-slices" if _ONE_SLICE in causes else "no-ct"
        message = (
            f"{path}: holds no axial CT of the head without contrast medium and with at least two slices. "
            f"Found {'; '.join(f'{stack}: {why}' for stack, why in excluded)}. Give the folder of a whole series."
        )
        raise ScanError(message, code=code, measured=causes, expected="an axial non-contrast head CT")
    if len({stack.text("StudyInstanceUID") for stack in left}) == 1:
        left, reason = _prefer(left, reason, excluded)
    if len(left) == 1:
        left, dropped = _drop_repeats(left[0], path)
        left, reason = _prefer(left, reason, excluded)
    if len(left) > 1:
        message = (
            f"{path}: {len(left)} series are suitable axial non-contrast head CTs, and no rule selects one: "
            f"{'; '.join(map(str, left))}. Give a folder with the files of one series."
        )
        measured = [stack.summary() for stack in left]
        raise ScanError(message, code="several-series", measured=measured, expected="one series")
    return left[0], {
        "series": {**left[0].summary(), "reason": reason},
        "other_series": [{**stack.summary(), "reason": why} for stack, why in excluded],
        "duplicates_dropped": dropped,
    }


def rejection_reason(stack: Stack) -> str:
    """Return why a stack is no axial non-contrast head CT, or an empty text if it is one.

    Args:
        stack: The stack.
    """
    first, modality, unit = stack.images[0], stack.text("Modality"), stack.text("RescaleType").upper()
    description = stack.text("SeriesDescription").lower().replace("_", " ")
    names_part = _HEAD.search(description) or _ELSEWHERE.search(description)
    part = description if names_part else stack.text("BodyPartExamined").lower()
    tilt = float(np.degrees(np.arccos(np.clip(stack.axes[2, 2], -1, 1))))
    contrast = (
        any(not _NO_AGENT.fullmatch(image.text("ContrastBolusAgent").lower()) for image in stack.images)
        or first.header.get("ContrastBolusAgentSequence")
        or _VESSELS.search(description)
        or (_ENHANCED.search(description) and not _PLAIN.search(description))
    )
    reasons = (
        (modality != "CT", f"modality {modality or 'unstated'}, not CT"),
        ("LOCALIZER" in stack.text("ImageType").upper() or _SCOUT.search(description), "a scout"),
        (first.header.get("SamplesPerPixel", 1) != 1, "a colour image"),
        (not stack.axes.any() or len(first.pixel_geometry) < 4, "states no position of its pixels"),
        (unit not in ("", "HU", "US"), f"values in {unit}, not HU"),
        (tilt > _MAX_OBLIQUITY_DEG, f"slices are tilted {tilt:.0f} degrees from axial"),
        (_ELSEWHERE.search(part) and not _HEAD.search(part), f"another part of the body ({part})"),
        (contrast, _CONTRAST),
        (stack.coverage < TOLERANCE_MM, _ONE_SLICE),
    )
    return next((why for applies, why in reasons if applies), "")


def _prefer(stacks: list[Stack], reason: str, excluded: list[tuple[Stack, str]]) -> tuple[list[Stack], str]:
    """Return the best of the suitable stacks of one study and the reason; add the others to the excluded ones."""
    min_coverage = _WHOLE_HEAD_SHARE * max(stack.coverage for stack in stacks)
    preferences: tuple[tuple[str, Callable[[Stack], float]], ...] = (
        ("a soft-tissue kernel", lambda stack: not stack.is_sharp),
        ("an original, not a reformat", lambda stack: not stack.is_derived),
        ("the whole head", lambda stack: stack.coverage >= min_coverage),
        ("the slice spacing nearest 5 mm", lambda stack: -abs(round(2 * stack.slice_spacing) / 2 - _USUAL_SPACING_MM)),
    )
    for quality, score in preferences:
        best = max(map(score, stacks))
        worse = [stack for stack in stacks if score(stack) < best]
        if worse:
            excluded += [(stack, f"another has {quality}") for stack in worse]
            stacks, reason = [stack for stack in stacks if score(stack) == best], f"preferred for {quality}"
    return stacks, reason


def _drop_repeats(stack: Stack, path: Path) -> tuple[list[Stack], int]:
    """Return stacks without repeated slices, split by acquisition if needed, and the number of dropped copies."""
    unique: list[Image] = []
    positions = np.split(np.arange(len(stack.images)), np.flatnonzero(np.diff(stack.depths) > TOLERANCE_MM) + 1)
    for here in positions:
        images = [stack.images[n] for n in here]
        seen: list[np.ndarray] = []
        for image, hu in zip(images, read_hu(images) if len(images) > 1 else [np.empty(0)], strict=True):
            if not any(np.array_equal(hu, other) for other in seen):
                unique.append(image)
                seen.append(hu)
    dropped = len(stack.images) - len(unique)
    if len(unique) == len(positions):
        return [Stack(unique)], dropped
    acquisitions = sorted({image.text("AcquisitionNumber") for image in unique})
    parts = [Stack(image for image in unique if image.text("AcquisitionNumber") == one) for one in acquisitions]
    crossed = any(np.diff(part.depths).min(initial=np.inf) <= TOLERANCE_MM for part in parts)
    if crossed or max(part.coverage for part in parts) < _WHOLE_HEAD_SHARE * stack.coverage:
        message = (
            f"{path}: {stack} holds different pixels at the same positions, several acquisitions or reconstructions, "
            "and acquisition numbers do not separate them into whole series. Export one of them."
        )
        raise ScanError(
            message, code="mixed-positions", measured=len(unique), expected=len(positions), unit="different slices"
        )
    return parts, dropped


def read_hu(images: Iterable[Image]) -> Iterator[np.ndarray]:
    """Yield the HU of each slice, `(row, column)` float32."""
    from pydicom import dcmread
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    name, data = "", cast(Any, None)
    for image in images:
        try:
            if image.name != name:  # all frames of one file are decoded from one read
                with image.open() as file:
                    name, data = image.name, dcmread(BytesIO(file.read()), force=True)
                _check_stored_sizes(data)
            if not data.file_meta.get("TransferSyntaxUID"):
                implicit = data.original_encoding[0]
                data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            stored = pixel_array(data, index=image.frame)
        except Exception as error:  # decoders raise almost anything
            syntax = data.file_meta.get("TransferSyntaxUID") if image.name == name else None
            if not (syntax and syntax.is_compressed and "PixelData" in data):
                raise _unreadable(image.name, error) from error
            message = (
                f"{image.name}: pixels in {syntax.name} ({syntax}) cannot be decoded: {error}. Copy the file again, "
                "or export it uncompressed."
            )
            expected = "uncompressed, JPEG 2000, JPEG Lossless, JPEG-LS or RLE"
            raise ScanError(message, code="pixel-data", measured=str(syntax), expected=expected) from error
        yield _hu(stored, image)


def _check_stored_sizes(data: Any) -> None:
    """Refuse compressed frames of another size than the header's, for which a decoder might ask for much memory.

    Raises:
        ValueError: A frame has another size.
    """
    from pydicom import uid
    from pydicom.encaps import generate_frames

    families = (uid.JPEGTransferSyntaxes, uid.JPEGLSTransferSyntaxes, uid.JPEG2000TransferSyntaxes)
    if "PixelData" not in data or not any(data.file_meta.get("TransferSyntaxUID") in family for family in families):
        return
    expected = StoredSize(int(data.Rows), int(data.Columns), int(data.get("SamplesPerPixel") or 1))
    tables = [data.get(name) for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    extended = None if None in tables else tuple(tables)
    count = int(data.get("NumberOfFrames") or 1)
    for frame in generate_frames(data.PixelData, number_of_frames=count, extended_offsets=extended):
        if (found := stored_size(frame)) != expected:
            raise ValueError(f"the compressed stream has the size {tuple(found)} and the header {tuple(expected)}")


def _hu(stored: np.ndarray, image: Image) -> np.ndarray:
    """Convert stored values to HU, with air in the padding."""
    slope, intercept = image.number("RescaleSlope", 1), image.number("RescaleIntercept", 0)
    hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    padding = image.header.get_item("PixelPaddingValue")
    if padding is not None and padding.value:
        # Compared as 16 bits without sign, because exporters write it with the wrong one.
        bits = int.from_bytes(padding.value[:2], "little" if padding.is_little_endian else "big")
        padded = stored.astype(np.uint16) == bits
        if padded.any() and abs(hu[padded][0]) > _TISSUE_HU:  # else it is also the value of water or brain
            hu[padded] = AIR_HU
    return cast(np.ndarray, np.maximum(hu, np.float32(AIR_HU)))
