"""Write simulated CT series of a phantom with dense blobs, whose HU are known at every point of the patient."""

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from scipy.spatial.transform import Rotation

TISSUE_HU = 40.0
BLOB_SIGMA_MM = 8.0
BLOBS_LPS = np.array([[-40.0, -20.0, 45.0], [35.0, 25.0, 60.0], [-5.0, 40.0, 80.0]])
ROWS, COLUMNS, PIXEL_MM = 90, 100, 2.0
STUDY = "1.2.826.0.1.3680043.8.498.1"


def hu_at(lps: np.ndarray) -> np.ndarray:
    """Return the HU of the phantom: tissue and three blobs of up to 500, 600 and 700 HU more.

    Args:
        lps: Points `(..., 3)` in LPS mm.
    """
    hu = np.full(lps.shape[:-1], TISSUE_HU)
    for height, centre in zip((500, 600, 700), BLOBS_LPS, strict=True):
        hu += height * np.exp(-((lps - centre) ** 2).sum(-1) / (2 * BLOB_SIGMA_MM**2))
    return hu


def slices(
    *, gaps: Any = 5.0, count: int = 26, tilt: float = 0.0, turn: tuple[float, float, float] = (0, 0, 0)
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the position, orientation and HU of each slice, from foot to head.

    Args:
        gaps: Distances between slices along the table in mm: one number, or one for each pair of neighbours.
        count: Number of slices, if `gaps` is one number.
        tilt: Tilt of the gantry in degrees, positive if its anterior side leans towards the head.
        turn: Rotation of slices and table about x, y and z, in degrees.
    """
    turned = Rotation.from_euler("xyz", turn, degrees=True)
    gantry = turned * Rotation.from_euler("x", -tilt, degrees=True)
    row, column = gantry.apply([1, 0, 0]), gantry.apply([0, 1, 0])
    travel = turned.apply([0, 0, 1])
    gaps = np.full(count - 1, gaps) if np.isscalar(gaps) else np.asarray(gaps)
    along = np.concatenate([[0], np.cumsum(gaps)])
    middle = np.array([0, 0, 62.0]) + np.outer(along - along[-1] / 2, travel)
    r, c = np.mgrid[:ROWS, :COLUMNS][..., None] * PIXEL_MM
    first = middle - (COLUMNS - 1) / 2 * PIXEL_MM * row - (ROWS - 1) / 2 * PIXEL_MM * column
    return [(p, np.concatenate([row, column]), hu_at(p + r * column + c * row)) for p in first]


def write(
    folder: Path,
    *,
    missing: tuple[int, ...] = (),
    syntax: Any = ExplicitVRLittleEndian,
    slope: float = 1.0,
    intercept: float = -1024.0,
    signed: bool = False,
    bits: int = 16,
    numbered_from: int = 0,
    tags: dict[str, Any] | None = None,
    **geometry: Any,
) -> list[Path]:
    """Write a series under shuffled file names, and return its files from foot to head.

    Args:
        folder: Folder of the files. It is created if it does not exist.
        missing: Numbers of the slices that are not written.
        syntax: Transfer syntax of the pixel data.
        slope: Rescale slope. None writes neither slope nor intercept.
        intercept: Rescale intercept, in HU.
        signed: Whether stored values are signed.
        bits: Number of bits stored.
        numbered_from: Number of the first file name, to write several series into one folder.
        tags: DICOM values to set in every file, by keyword. None removes the value.
        geometry: As in `slices`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scanned = slices(**geometry)
    names = np.random.default_rng(0).permutation(len(scanned)) + numbered_from
    series = generate_uid()
    files = []
    for number, ((position, orientation, hu), name) in enumerate(zip(scanned, names, strict=True)):
        if number in missing:
            continue
        stored = np.round(hu if slope is None else (hu - intercept) / slope)
        data = _file(CTImageStorage, stored, signed=signed, bits=bits)
        data.SeriesInstanceUID = series
        data.InstanceNumber = len(scanned) - number
        data.PixelSpacing = [PIXEL_MM, PIXEL_MM]
        data.ImagePositionPatient = [_decimal(v) for v in position]
        data.ImageOrientationPatient = [_decimal(v) for v in orientation]
        if slope is not None:
            data.RescaleSlope, data.RescaleIntercept = slope, intercept
        change(data, **(tags or {}))
        file = folder / f"{name:04d}.dcm"
        if syntax == RLELossless:
            data.compress(RLELossless)
        data.save_as(file, enforce_file_format=True)
        if syntax not in (ExplicitVRLittleEndian, RLELossless):
            transcode(file, syntax)
        files.append(file)
    return files


def write_enhanced(file: Path, **geometry: Any) -> None:
    """Write a series as one multi-frame file, with frames from head to foot.

    Args:
        file: Path of the file.
        geometry: As in `slices`.
    """
    scanned = slices(**geometry)[::-1]
    stored = np.stack([np.round(hu + 1024) for _, _, hu in scanned])
    data = _file(EnhancedCTImageStorage, stored)
    data.NumberOfFrames = len(scanned)
    data.SeriesInstanceUID = generate_uid()
    shared = Dataset()
    shared.PixelMeasuresSequence = _items(PixelSpacing=[PIXEL_MM, PIXEL_MM], SliceThickness=5)
    shared.PixelValueTransformationSequence = _items(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    shared.PlaneOrientationSequence = _items(ImageOrientationPatient=[_decimal(v) for v in scanned[0][1]])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for position, _, _ in scanned:
        frame = Dataset()
        frame.PlanePositionSequence = _items(ImagePositionPatient=[_decimal(v) for v in position])
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.save_as(file, enforce_file_format=True)


def change(data: Dataset, **tags: Any) -> None:
    """Set DICOM values by keyword. None removes the value."""
    for keyword, value in tags.items():
        if value is not None:
            setattr(data, keyword, value)
        elif keyword in data:
            delattr(data, keyword)


def transcode(file: Path, syntax: str) -> None:
    """Change the transfer syntax of a file in place, as an archive does."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(file))
    assert reader.Read()
    changer = gdcm.ImageChangeTransferSyntax()
    changer.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    changer.SetInput(reader.GetImage())
    assert changer.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(file))
    writer.SetFile(reader.GetFile())
    writer.SetImage(changer.GetOutput())
    assert writer.Write()


def _file(sop_class: str, stored: np.ndarray, *, signed: bool = False, bits: int = 16) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = STUDY
    data.Modality = "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SeriesNumber, data.SeriesDescription = 2, "Head 5.0 H31s"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = stored.shape[-2:]
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(signed)
    data.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    return data


def _items(**tags: Any) -> Sequence:
    item = Dataset()
    change(item, **tags)
    return Sequence([item])


def _decimal(value: float) -> str:
    """Return a number as a decimal string of at most 16 characters, the limit of DICOM."""
    return f"{value:.8f}"
