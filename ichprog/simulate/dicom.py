"""DICOM series of simulated scans, one file per slice, as a scanner would send it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ichprog.simulate.scanner import SimulatedScan

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

_OFFSET = 1024
_YEAR = 2000  # of every simulated study, so that the same simulation gives the same files


def save_series(scan: SimulatedScan, folder: Path, name: str, age: int, sex: str) -> None:
    """Write a series of CT images atomically.

    Args:
        scan: The scan.
        folder: Folder of the series.
        name: Name of the patient. Every identifier is derived from it.
        age: Age in years.
        sex: "F" or "M".
    """
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    study, series = (generate_uid(entropy_srcs=[name, part]) for part in ("study", "series"))
    mm, spacing = float(-scan.affine[0, 0]), float(scan.affine[2, 2])
    first = scan.affine[:3, 3] * (-1, -1, 1)  # DICOM uses LPS, nibabel RAS
    for k in range(scan.hu.shape[2]):
        image = _image(scan.hu[:, :, k])
        image.SOPClassUID = CTImageStorage
        image.SOPInstanceUID = generate_uid(entropy_srcs=[name, str(k)])
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.PatientName, image.PatientID = f"Simulated^{name}", name
        image.PatientAge, image.PatientSex = f"{age:03d}Y", sex
        image.PatientBirthDate, image.ReferringPhysicianName = f"{_YEAR - age}0101", ""
        image.StudyDate = image.SeriesDate = image.AcquisitionDate = image.ContentDate = f"{_YEAR}0101"
        image.StudyTime = image.SeriesTime = image.AcquisitionTime = image.ContentTime = "120000"
        image.StudyID, image.AccessionNumber, image.PatientPosition = "1", "", "HFS"
        image.PositionReferenceIndicator = ""
        image.StudyDescription, image.SeriesDescription = "Simulated head CT, no patient", "HEAD 5mm simulated"
        image.Manufacturer, image.Modality, image.BodyPartExamined = "ichprog simulation", "CT", "HEAD"
        image.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
        image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = 2, k + 1, 1
        image.ConvolutionKernel, image.KVP, image.GantryDetectorTilt = "H31s", "120", "0"
        image.PixelSpacing = [f"{mm:.8g}"] * 2
        image.SliceThickness = f"{spacing:g}"
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [f"{value:.8g}" for value in first + np.array([0, 0, k * spacing])]
        image.FrameOfReferenceUID = generate_uid(entropy_srcs=[name, "frame"])
        image.file_meta.MediaStorageSOPClassUID = CTImageStorage
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.save_as(partial / f"{k + 1:03d}.dcm", enforce_file_format=True)
    partial.replace(folder)


def _image(hu: np.ndarray) -> "FileDataset":
    from pydicom.dataset import FileDataset, FileMetaDataset

    image = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    image.Rows, image.Columns = hu.shape[1], hu.shape[0]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "1", f"-{_OFFSET}", "HU"
    image.WindowCenter, image.WindowWidth = "40", "80"
    image.PixelData = np.ascontiguousarray((hu + _OFFSET).T.astype("<i2")).tobytes()
    return image
