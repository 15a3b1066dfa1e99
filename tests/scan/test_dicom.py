"""A series on disk comes out as one upright volume whose voxels lie where they lay in the patient."""

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import (
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from pydicom.valuerep import DSfloat

from ichprog.errors import ScanError
from ichprog.scan import dicom
from ichprog.scan.jpeg import stored_size

from support.dicom_series import BLOB_SIGMA_MM, BLOBS_LPS, PIXEL_MM, TISSUE_HU, change, slices, write, write_enhanced

REAL_HEAD = Path(__file__).parents[3] / "shared" / "data" / "head_ct_ge_dicom.zip"
RAS = np.diag([-1.0, -1.0, 1.0])  # from LPS and back


def codes(series):
    return [warning.code for warning in series.warnings]


def worst_error_mm(series):
    """How far the centres of the blobs lie from where they were put."""
    ijk = np.indices(series.hu.shape).reshape(3, -1)
    lps = RAS @ (series.affine[:3, :3] @ ijk + series.affine[:3, 3:])
    brightness = np.ravel(series.hu) - TISSUE_HU
    errors = []
    for blob in BLOBS_LPS:
        near = np.linalg.norm(lps - blob[:, None], axis=0) < 3 * BLOB_SIGMA_MM
        errors.append(np.linalg.norm(lps[:, near] @ brightness[near] / brightness[near].sum() - blob))
    return max(errors)


def refused(path):
    with pytest.raises(ScanError) as caught:
        dicom.read_series(path)
    return caught.value


# --- geometry -------------------------------------------------------------------------------------------------------

HALVES = [2.5] * 20 + [5.0] * 15
IRREGULAR = [3.0, 4.5, 5.0, 3.5, 4.0] * 6

GEOMETRIES = {
    "straight": ({}, []),
    "thin": ({"gaps": 2.5, "count": 51}, []),
    "tilt": ({"tilt": 18.5}, ["gantry-tilt"]),
    "tilt to the other side": ({"tilt": -18.5}, ["gantry-tilt"]),
    "thin and tilt": ({"gaps": 2.5, "count": 51, "tilt": 25.0}, ["gantry-tilt"]),
    "two spacings": ({"gaps": HALVES}, ["uneven-slices"]),
    "irregular": ({"gaps": IRREGULAR}, ["uneven-slices"]),
    "tilt and two spacings": ({"gaps": HALVES, "tilt": -18.5}, ["gantry-tilt", "uneven-slices"]),
    "missing slice": ({"missing": (11,)}, ["missing-slice"]),
    "tilt and missing slices": ({"missing": (11, 18), "tilt": 12.0}, ["gantry-tilt", "missing-slice"]),
    "oblique": ({"turn": (12.0, -8.0, 5.0)}, []),
    "oblique and tilt": ({"turn": (5.0, 8.0, -10.0), "tilt": 15.0}, ["gantry-tilt"]),
    "face down": ({"turn": (0.0, 0.0, 180.0)}, []),
    "on the side": ({"turn": (0.0, 0.0, 90.0)}, []),
    "feet first, columns reversed": ({"turn": (0.0, 180.0, 0.0)}, []),
}


@pytest.mark.parametrize(("geometry", "doubts"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_voxels_lie_where_they_lay_in_the_patient(tmp_path, geometry, doubts):
    write(tmp_path, **geometry)
    series = dicom.read_series(tmp_path)

    assert worst_error_mm(series) < 0.5
    assert codes(series) == doubts
    steps = series.affine[:3, :3]
    assert (np.sign(np.diag(steps)) == [-1, -1, 1]).all()
    assert (np.abs(steps).argmax(axis=0) == [0, 1, 2]).all()
    assert series.hu.dtype == np.float32
    assert series.record["resampled"] == bool(doubts)
    assert json.loads(json.dumps(series.record)) == series.record
    cosines = steps.T @ steps / np.outer(*[np.linalg.norm(steps, axis=0)] * 2)
    np.testing.assert_allclose(cosines, np.eye(3), atol=1e-6)


def test_a_straight_even_series_keeps_its_pixels_and_its_place(tmp_path):
    write(tmp_path, gaps=4.0, count=20)
    series = dicom.read_series(tmp_path)
    scanned = slices(gaps=4.0, count=20)
    expected = np.stack([np.round(hu).T for _, _, hu in scanned], axis=2)
    np.testing.assert_array_equal(series.hu, expected)
    np.testing.assert_allclose(RAS @ series.affine[:3, 3], scanned[0][0], atol=1e-6)
    np.testing.assert_allclose(series.affine[:3, :3], RAS @ np.diag([PIXEL_MM, PIXEL_MM, 4.0]), atol=1e-9)


def test_rounded_positions_are_even_enough(tmp_path):
    files = write(tmp_path, gaps=4.8, count=20)
    for file in files:
        data = dcmread(file)
        data.ImagePositionPatient = [round(float(v), 1) for v in data.ImagePositionPatient]
        data.save_as(file)
    series = dicom.read_series(tmp_path)
    assert not series.record["resampled"]
    assert worst_error_mm(series) < 0.5


@pytest.mark.parametrize("tilt", [18.5, -18.5])
def test_the_tilt_is_said_with_its_sign(tmp_path, tilt):
    write(tmp_path, tilt=tilt)
    series = dicom.read_series(tmp_path)
    (doubt,) = series.warnings
    assert doubt.measured == series.record["tilt_deg"] == pytest.approx(tilt, abs=0.01)
    assert doubt.unit == "degrees"


def test_a_tilted_volume_has_room_for_every_slice_and_air_around(tmp_path):
    write(tmp_path, tilt=18.5)
    series = dicom.read_series(tmp_path)
    drift_px = 25 * 5 * np.sin(np.radians(18.5)) / PIXEL_MM
    assert series.hu.shape[1] == 90 + np.ceil(drift_px)
    assert series.hu.min() == -1024
    assert 0.95 < (series.hu >= TISSUE_HU - 1).sum() / (26 * 90 * 100) <= 1.0


def test_gaps_and_missing_slices_are_said_in_mm(tmp_path):
    write(tmp_path, missing=(5, 6, 20))
    series = dicom.read_series(tmp_path)
    assert series.record["missing_slices"] == 3
    assert series.record["gaps_mm"] == {"5.00": 20, "10.00": 1, "15.00": 1}
    assert series.record["slice_spacing_mm"] == pytest.approx(5)
    assert series.hu.shape[2] == 26
    (doubt,) = series.warnings
    assert (doubt.code, doubt.measured, doubt.expected, doubt.unit) == ("missing-slice", 15.0, 5.0, "mm")
    kept = dicom.read_series(tmp_path).hu[..., [0, 10, 25]]
    expected = np.stack([np.round(slices()[n][2]).T for n in (0, 10, 25)], axis=2)
    np.testing.assert_allclose(kept, expected, atol=1e-3)


def test_thick_slices_above_thin_ones_are_uneven_not_missing(tmp_path):
    lower = write(tmp_path, gaps=HALVES, tags={"SliceThickness": 2.5})
    for file in lower[20:]:
        data = dcmread(file)
        data.SliceThickness = 5
        data.save_as(file)
    series = dicom.read_series(tmp_path)
    assert series.record["missing_slices"] == 0
    assert codes(series) == ["uneven-slices"]
    assert series.warnings[0].measured == [2.5, 5.0]
    assert series.record["slice_spacing_mm"] == pytest.approx(2.5)


def test_a_hole_is_not_interpolated(tmp_path):
    write(tmp_path, missing=tuple(range(8, 14)))
    assert refused(tmp_path).code == "gap"


@pytest.mark.skipif(not REAL_HEAD.exists(), reason="the real head is not here")
def test_a_real_tilted_uneven_head(tmp_path):
    series = dicom.read_series(REAL_HEAD)
    assert series.record["tilt_deg"] == pytest.approx(18.5, abs=0.05)
    assert codes(series) == ["gantry-tilt", "uneven-slices"]
    assert series.record["gaps_mm"] == {"1.08": 1, "4.00": 13, "7.00": 13}
    assert 2.5 <= series.record["slice_spacing_mm"] <= 5
    assert series.hu.min() == -1024

    # Values come from the files, places from the standard's own equation, not from the reader.
    from scipy.ndimage import map_coordinates

    with zipfile.ZipFile(REAL_HEAD) as archive:
        files = [dcmread(io.BytesIO(archive.read(n))) for n in archive.namelist() if n.endswith(".dcm")]
    corners = []
    for data in files:
        row, column = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
        height, width = map(float, data.PixelSpacing)
        r, c = np.mgrid[100:412:7, 100:412:7].reshape(2, -1)
        place = np.array(data.ImagePositionPatient, float)
        lps = place[:, None] + np.outer(column, r * height) + np.outer(row, c * width)
        corners += [place, place + column * height * (data.Rows - 1) + row * width * (data.Columns - 1)]
        to_voxel = np.linalg.inv(series.affine)
        ijk = to_voxel[:3, :3] @ (RAS @ lps) + to_voxel[:3, 3:]
        read_back = map_coordinates(series.hu, ijk, order=1, mode="nearest")
        true = data.pixel_array[r, c]
        brain = (true > 20) & (true < 45)
        if brain.sum() > 200:
            assert np.median(np.abs(read_back - true)[brain]) < 4
    inside = np.linalg.inv(series.affine) @ np.vstack([RAS @ np.transpose(corners), np.ones(len(corners))])
    assert (inside[:3].T > -0.01).all()
    assert (inside[:3].max(axis=1) < np.array(series.hu.shape) - 0.99).all()


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        {"signed": True, "intercept": 0.0},
        {"signed": False, "intercept": -1024.0},
        {"signed": False, "intercept": -1024.0, "bits": 12},
        {"signed": True, "intercept": -24.0, "bits": 12},
        {"signed": True, "intercept": -1000.0, "slope": 0.5},
        {"tags": {"PhotometricInterpretation": "MONOCHROME1"}},
    ],
    ids=str,
)
def test_hu_whatever_is_stored(tmp_path, stored):
    write(tmp_path, count=25, **stored)
    expected = np.stack([hu.T for _, _, hu in slices(count=25)], axis=2)
    np.testing.assert_allclose(dicom.read_series(tmp_path).hu, expected, atol=0.51)


def test_each_slice_has_its_own_rescale(tmp_path):
    files = write(tmp_path, count=25)
    data = dcmread(files[3])
    data.RescaleIntercept = -1000
    data.save_as(files[3])
    expected = np.stack([hu.T for _, _, hu in slices(count=25)], axis=2)
    np.testing.assert_allclose(dicom.read_series(tmp_path).hu[..., 3], expected[..., 3] + 24, atol=0.51)


def test_no_rescale_is_a_doubt(tmp_path):
    write(tmp_path, slope=None, signed=True)
    series = dicom.read_series(tmp_path)
    assert codes(series) == ["no-rescale"]
    assert worst_error_mm(series) < 0.5


@pytest.mark.parametrize("padding", [-2000, 30000])
def test_padding_becomes_air_before_it_can_bleed(tmp_path, padding):
    files = write(tmp_path, signed=True, intercept=0.0, tilt=18.5)
    for file in files:
        data = dcmread(file)
        pixels = data.pixel_array.copy()
        pixels[:20] = padding
        data.PixelData = pixels.tobytes()
        data.PixelPaddingValue = padding
        data["PixelPaddingValue"].VR = "SS"
        data.save_as(file)
    series = dicom.read_series(tmp_path)
    assert series.hu.min() == -1024
    assert series.hu.max() < TISSUE_HU + 701
    assert worst_error_mm(series) < 0.5


def test_a_padding_value_that_is_also_water_is_not_believed(tmp_path):
    write(tmp_path, signed=True, intercept=0.0, tags={"PixelPaddingValue": int(TISSUE_HU)})
    assert dicom.read_series(tmp_path).hu.min() == TISSUE_HU


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax", [JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless], ids=lambda s: s.keyword
)
def test_compressed_pixels_are_the_same_pixels(tmp_path, syntax, signed):
    stored = {"gaps": 20.0, "count": 4, "signed": signed, "intercept": 0.0 if signed else -1024.0}
    write(tmp_path / "plain", **stored)
    files = write(tmp_path / "compressed", syntax=syntax, **stored)
    assert dcmread(files[0]).file_meta.TransferSyntaxUID == syntax
    compressed, plain = (dicom.read_series(tmp_path / name).hu for name in ("compressed", "plain"))
    np.testing.assert_array_equal(compressed, plain)


@pytest.mark.parametrize(
    ("syntax", "rows_after"),
    [(JPEG2000Lossless, b"\xff\x51\x00\x29\x00\x00"), (JPEGLosslessSV1, b"\xff\xc3"), (JPEGLSLossless, b"\xff\xf7")],
    ids=lambda value: getattr(value, "keyword", ""),
)
def test_a_stream_of_another_size_reaches_no_decoder(tmp_path, syntax, rows_after):
    """A decoder would ask for memory for the size of the stream before it compares this size with the header."""
    file = write(tmp_path, syntax=syntax, count=4)[1]
    data = file.read_bytes()
    if syntax == JPEG2000Lossless:
        place = data.index(rows_after) + len(rows_after) + 4  # the height, after the width
        changed = data[:place] + (2**26).to_bytes(4, "big") + data[place + 4 :]
    else:
        place = data.index(rows_after) + 5
        changed = data[:place] + b"\xff\xff" + data[place + 2 :]
    file.write_bytes(changed)
    error = refused(tmp_path)
    assert error.code == "pixel-data"
    assert re.search(r"the compressed stream has the size|\d+ tiles", str(error))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff" * 2**21 + bytes.fromhex("c3 000b 10 0200 0100 01 011100"),  # too late
        b"\x00" * 2**21 + bytes.fromhex("ff4fff51") + bytes(38),
        bytes.fromhex("ff4fff51") + bytes(38),  # tiles without a size
    ],
    ids=["empty", "cut", "late frame", "late codestream", "no tiles"],
)
def test_a_stream_without_a_size_near_its_start_is_refused(data):
    with pytest.raises(ValueError, match="states no size"):
        stored_size(data)


def test_an_unknown_compression_is_named(tmp_path):
    for file in write(tmp_path, syntax=JPEG2000Lossless, count=3):
        data = dcmread(file)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"
        data.save_as(file)
    error = refused(tmp_path)
    assert error.code == "pixel-data"
    assert "1.2.840.10008.1.2.4.201" in str(error)


# --- what is in the folder ------------------------------------------------------------------------------------------


def test_order_subfolders_zip_and_other_files_do_not_matter(tmp_path):
    files = write(tmp_path / "plain", count=25)
    expected = dicom.read_series(tmp_path / "plain")
    mess = tmp_path / "mess"
    for n, file in enumerate(files):
        place = mess / f"D{n % 3}" / f"IM{(n * 7) % 25:03d}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    (mess / "readme.txt").write_text("text, and no DICOM")
    (mess / "empty").touch()
    (mess / "picture.png").write_bytes(bytes(range(256)))
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", mess)
    for path in (mess, Path(archive)):
        series = dicom.read_series(path)
        np.testing.assert_array_equal(series.hu, expected.hu)
        np.testing.assert_array_equal(series.affine, expected.affine)
        assert series.record["files"] == {"dicom": 25, "repeated": 0, "other": 3}


def test_a_multi_frame_file(tmp_path):
    write(tmp_path / "single", tilt=18.5, count=25)
    write_enhanced(tmp_path / "all.dcm", tilt=18.5, count=25)
    series = dicom.read_series(tmp_path / "all.dcm")
    np.testing.assert_array_equal(series.hu, dicom.read_series(tmp_path / "single").hu)
    assert worst_error_mm(series) < 0.5


def test_files_without_preamble(tmp_path):
    for file in write(tmp_path, count=25):
        data = dcmread(file)
        plain = data.__class__(str(file), data, preamble=None, is_implicit_VR=True)
        plain.save_as(file, implicit_vr=True, little_endian=True)
        assert file.read_bytes()[128:132] != b"DICM"
        assert dicom.is_dicom(file)
    assert worst_error_mm(dicom.read_series(tmp_path)) < 0.5


def test_is_dicom(tmp_path):
    (file, *_) = write(tmp_path, count=2)
    text = tmp_path / "a.txt"
    text.write_text("text")
    assert dicom.is_dicom(file)
    assert dicom.is_dicom(Path(get_testdata_file("ExplVR_LitEndNoMeta.dcm")))
    assert dicom.is_dicom(Path(get_testdata_file("ExplVR_BigEndNoMeta.dcm")))
    assert not dicom.is_dicom(text)


def take(folder, **tags):
    """Writes one more series with these tags into a folder."""
    return write(folder, numbered_from=100 * len(list(folder.glob("*"))), tags=tags)


def test_the_soft_thick_original_plain_head_is_taken(tmp_path):
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesDescription": "Topogram", "SeriesNumber": 1}
    write(tmp_path, count=2, numbered_from=1000, turn=(-90.0, 0.0, 0.0), tags=scout)
    take(tmp_path, SeriesNumber=3, SeriesDescription="Head 5.0 H60s", ConvolutionKernel="H60s")
    thin = {"SeriesNumber": 4, "SeriesDescription": "Head 1.25 H31s", "ConvolutionKernel": "H31s"}
    write(tmp_path, gaps=1.25, count=101, numbered_from=2000, tags=thin)
    mpr = {"ImageType": ["DERIVED", "SECONDARY", "MPR"], "SeriesNumber": 5, "SeriesDescription": "Head cor"}
    write(tmp_path, turn=(-90.0, 0.0, 0.0), numbered_from=3000, tags=mpr)
    write(tmp_path, numbered_from=4000, tags={**mpr, "SeriesNumber": 6, "SeriesDescription": "Head ax MPR"})
    agent = {"SeriesNumber": 7, "SeriesDescription": "Head 5.0", "ContrastBolusAgent": "Iomeron 400"}
    write(tmp_path, numbered_from=5000, tags=agent)
    write(tmp_path, numbered_from=6000, tags={"SeriesNumber": 8, "SeriesDescription": "CTA Head"})
    write(tmp_path, numbered_from=7000, tags={"SeriesNumber": 9, "SeriesDescription": "C-Spine 5.0"})
    write(tmp_path, count=8, numbered_from=8000, tags={"SeriesNumber": 10, "SeriesDescription": "Head 5.0 repeat"})
    write(tmp_path, numbered_from=9000, tags={"SeriesNumber": 2, "ConvolutionKernel": "H31s"})

    record = dicom.read_series(tmp_path).record
    assert record["series"]["number"] == "2"
    assert record["series"]["slices"] == 26
    why = {other["number"]: other["reason"] for other in record["other_series"]}
    assert why == {
        "1": "a scout",
        "3": "another has a soft-tissue kernel",
        "4": "another has the slice spacing nearest 5 mm",
        "5": "slices are tilted 90 degrees from axial",
        "6": "another has an original, not a reformat",
        "7": "contrast medium was given",
        "8": "contrast medium was given",
        "9": "another part of the body (c-spine 5.0)",
        "10": "another has the whole head",
    }


@pytest.mark.parametrize(
    ("tags", "contrast"),
    [
        ({"SeriesDescription": "Head without contrast"}, False),
        ({"SeriesDescription": "HEAD W/O CONTRAST 5MM"}, False),
        ({"SeriesDescription": "non-contrast head"}, False),
        ({"ContrastBolusAgent": "NONE"}, False),
        ({"ContrastBolusAgent": ""}, False),
        ({"SeriesDescription": "Head C+"}, True),
        ({"SeriesDescription": "HEAD_WITH_CONTRAST"}, True),
        ({"SeriesDescription": "Angio head"}, True),
        ({"ContrastBolusAgent": "Omnipaque"}, True),
    ],
    ids=str,
)
def test_contrast_is_refused(tmp_path, tags, contrast):
    write(tmp_path, count=25, tags=tags)
    if contrast:
        error = refused(tmp_path)
        assert error.code == "contrast"
        assert "without contrast" in str(error)
    else:
        dicom.read_series(tmp_path)


def test_two_that_cannot_be_told_apart_are_listed(tmp_path):
    for number in (4, 5):
        write(tmp_path, numbered_from=number * 100, tags={"SeriesNumber": number, "ConvolutionKernel": "H31s"})
    error = refused(tmp_path)
    assert error.code == "several-series"
    assert [one["number"] for one in error.measured] == ["4", "5"]
    assert "H31s" in str(error)


def test_studies_are_not_weighed_against_each_other(tmp_path):
    write(tmp_path)
    write(tmp_path, gaps=2.5, count=51, numbered_from=100, tags={"StudyInstanceUID": generate_uid()})
    assert refused(tmp_path).code == "several-series"


def test_a_scout_inside_the_series_is_dropped(tmp_path):
    files = write(tmp_path)
    scout = write(tmp_path, count=2, numbered_from=100, turn=(-90.0, 0.0, 0.0))
    data = dcmread(scout[0])
    change(data, SeriesInstanceUID=dcmread(files[0]).SeriesInstanceUID, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    data.save_as(scout[0])
    scout[1].unlink()
    series = dicom.read_series(tmp_path)
    assert series.hu.shape[2] == 26
    assert worst_error_mm(series) < 0.5


def test_duplicates_are_dropped_and_counted(tmp_path):
    files = write(tmp_path)
    shutil.copy(files[3], tmp_path / "again.dcm")
    data = dcmread(files[9])
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.save_as(tmp_path / "sent twice.dcm")
    series = dicom.read_series(tmp_path)
    assert series.hu.shape[2] == 26
    assert series.record["files"]["repeated"] == 1
    assert series.record["duplicates_dropped"] == 1
    assert not series.warnings


def one_uid(files, like, **tags):
    uid = dcmread(like).SeriesInstanceUID
    for file in files:
        data = dcmread(file)
        change(data, SeriesInstanceUID=uid, **tags)
        data.save_as(file)


def test_mixed_acquisitions(tmp_path):
    first = write(tmp_path, tags={"AcquisitionNumber": 1})
    second = write(tmp_path, intercept=-1020.0, numbered_from=100, tags={"AcquisitionNumber": 1})
    for file in second:
        data = dcmread(file)
        data.RescaleIntercept = -1010
        data.save_as(file)
    one_uid(second, first[0])
    assert refused(tmp_path).code == "mixed-positions"
    one_uid(second, first[0], AcquisitionNumber=2)
    assert refused(tmp_path).code == "several-series"
    for file in second[10:]:
        file.unlink()
    series = dicom.read_series(tmp_path)
    assert worst_error_mm(series) < 0.5
    assert [other["slices"] for other in series.record["other_series"]] == [10]


def test_slices_of_different_form(tmp_path):
    files = write(tmp_path)
    data = dcmread(files[4])
    data.PixelSpacing = [1.9, 1.9]
    data.save_as(files[4])
    assert refused(tmp_path).code == "uneven-slices-shape"


def test_no_ct(tmp_path):
    write(tmp_path, tags={"Modality": "MR"})
    error = refused(tmp_path)
    assert error.code == "no-ct"
    assert "modality MR" in str(error)


def test_no_dicom(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert refused(tmp_path).code == "no-dicom"
    index = get_testdata_file("DICOMDIR")
    if index:
        shutil.copy(index, tmp_path)
        assert refused(tmp_path).code == "no-dicom"


def test_one_slice(tmp_path):
    (file, *_) = write(tmp_path)
    assert refused(file).code == "too-few-slices"


@pytest.mark.parametrize("kept", [140, 500, 1000, 9000])
def test_a_truncated_file_is_named(tmp_path, kept):
    files = write(tmp_path)
    files[7].write_bytes(files[7].read_bytes()[:kept])
    error = refused(tmp_path)
    assert error.code == "unreadable"
    assert files[7].name in str(error)


def test_a_zip_that_is_none(tmp_path):
    path = tmp_path / "a.zip"
    path.write_text("not a zip")
    assert refused(path).code == "unreadable"


def test_headers_out_of_form_are_read_without_a_word(tmp_path):
    for file in write(tmp_path, count=25):
        data = dcmread(file)
        data.ImagePositionPatient = [DSfloat(f"{v:.17f}", validation_mode=0) for v in data.ImagePositionPatient]
        data.save_as(file)
        raw = file.read_bytes()
        uid = str(data.SeriesInstanceUID).encode()
        raw = raw.replace(b"Head 5.0 H31s", b"K\xf6pf 5 \xff\xfe\xfd   ").replace(uid, uid.replace(b".826.", b".026."))
        file.write_bytes(raw)
    series = dicom.read_series(tmp_path)
    assert worst_error_mm(series) < 0.5
    assert len(series.record["series"]["pseudonym"]) == 12


def test_importing_costs_nothing():
    code = "import sys, ichprog.scan.dicom; print([m for m in ('pydicom', 'torch') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_implicit_syntax(tmp_path):
    for file in write(tmp_path, count=25, tags={"PixelPaddingValue": 0}):
        data = dcmread(file)
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        data.save_as(file, enforce_file_format=True)
    assert worst_error_mm(dicom.read_series(tmp_path)) < 0.5
