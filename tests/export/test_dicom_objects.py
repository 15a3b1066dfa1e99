"""DICOM objects lie where the mask lies, say what the prediction says, and are the same when repeated."""

import dataclasses
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pydicom import dcmread
from pydicom.dataset import Dataset
from scipy.ndimage import map_coordinates

import ichprog
from ichprog.cli import main
from ichprog.errors import ScanError
from ichprog.scan.source_series import read_source_series
from ichprog.simulate.dicom import save_series
from ichprog.simulate.scanner import SimulatedScan

from support.dicom_series import write, write_enhanced
from support.models import SHARED, local_detector

pytest.importorskip("highdicom")
from ichprog.export.dicom import build_objects, images, save_objects
from ichprog.export.dicom.identity import build_context

pytestmark = pytest.mark.usefixtures("registered_intensity_backbone", "one_thread")

PATIENT = {
    "PatientName": "Müller^Ada", "PatientID": "secret-17", "PatientBirthDate": "19440229", "PatientSex": "F",
    "StudyDate": "20240102", "StudyTime": "030405", "StudyID": "S1", "AccessionNumber": "A1",
    "StudyDescription": "Head", "PatientIdentityRemoved": "NO", "IssuerOfPatientID": "ward",
    "ReferringPhysicianName": "", "SpecificCharacterSet": "ISO_IR 100",
}  # fmt: skip
GEOMETRIES = {
    "straight": {},
    "tilted-uneven": {"tilt": -12.0, "gaps": [4.0] * 14 + [1.1] + [7.0] * 9},
    "turned": {"turn": (4.0, -3.0, 8.0)},
}


@pytest.fixture(scope="module")
def detector(tmp_path_factory, registered_intensity_backbone):
    """Return a model that finds blood by its density."""
    return ichprog.load_model(local_detector(tmp_path_factory.mktemp("models") / "detector"), runtime="torch")


@pytest.fixture(scope="module", params=GEOMETRIES)
def found(request, tmp_path_factory, detector):
    """Return a series of each geometry, its prediction, and its images as files read by pydicom."""
    folder = tmp_path_factory.mktemp("series") / request.param
    write(folder, tags=PATIENT, **GEOMETRIES[request.param])
    scan = detector.load_scan(folder, brain="given")
    prediction = ichprog.predict(detector, scan, haemorrhage=detector)
    saliency = ichprog.explain(detector, scan)
    context = build_context(prediction, read_source_series(folder))
    built = {
        "haemorrhage": images.segment_haemorrhage(context, prediction.haemorrhage),
        "brain": images.segment_brain(context, scan),
        "map": images.parametric_map(context, saliency, 1),
    }
    return folder, scan, prediction, saliency, {name: reread(data) for name, data in built.items()}


def build(source, model, *, methods=("guided_backprop",)):
    scan = model.load_scan(source, brain="given")
    prediction = ichprog.predict(model, scan, haemorrhage=model)
    maps = list(ichprog.explain(model, scan, task=["bleeding"], method=methods).values()) if methods else []
    objects = {name: reread(data) for name, data in build_objects(prediction, scan, source, maps=maps).items()}
    return source, scan, prediction, maps, objects


@pytest.fixture(scope="module")
def straight(tmp_path_factory, detector):
    folder = tmp_path_factory.mktemp("series") / "one"
    write(folder, tags=PATIENT)
    return build(folder, detector)


def reread(data):
    return dcmread(BytesIO(to_bytes(data)))


def to_bytes(data):
    buffer = BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def pixel_positions(header, position=None):
    """Return the LPS mm of every pixel of a slice or frame, `(rows, columns, 3)`, from the attributes alone."""
    origin = np.array(header.ImagePositionPatient if position is None else position, float)
    row, column = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    height, width = (float(value) for value in header.PixelSpacing)
    r, c = np.mgrid[: header.Rows, : header.Columns][..., None]
    return origin + c * width * row + r * height * column


def frame_header(data, frame):
    """Return position, orientation and pixel size of a frame of a multi-frame object."""
    shared, own = data.SharedFunctionalGroupsSequence[0], data.PerFrameFunctionalGroupsSequence[frame]
    flat = Dataset()
    flat.Rows, flat.Columns = data.Rows, data.Columns
    flat.ImagePositionPatient = own.PlanePositionSequence[0].ImagePositionPatient
    flat.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    flat.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
    return flat


def segment_of(data, frame):
    """Return the segment of a frame; the segment of all frames is stated once."""
    groups = data.PerFrameFunctionalGroupsSequence[frame], data.SharedFunctionalGroupsSequence[0]
    (item,) = next(group.SegmentIdentificationSequence for group in groups if "SegmentIdentificationSequence" in group)
    return int(item.ReferencedSegmentNumber)


def source_of(data, frame):
    """Return SOP Instance UID and frame number of the source of a frame."""
    derived = data.PerFrameFunctionalGroupsSequence[frame].DerivationImageSequence[0]
    source = derived.SourceImageSequence[0]
    return str(source.ReferencedSOPInstanceUID), source.get("ReferencedFrameNumber")


def to_voxels(image, lps):
    """Return the voxel coordinates of an image at points in LPS mm."""
    inverse = np.linalg.inv(image.affine)
    return (lps * (-1, -1, 1)) @ inverse[:3, :3].T + inverse[:3, 3]


def agree_within_half_a_millimetre(pixels, image, region, lps):
    """Return whether every pixel has the value of a voxel that lies at most half a millimetre from it."""
    values = np.asarray(image.dataobj) == region
    agree = np.zeros(pixels.shape, bool)
    for shift in (np.zeros(3), *(0.5 * np.eye(3)), *(-0.5 * np.eye(3))):
        at = np.rint(to_voxels(image, lps + shift)).astype(int)
        inside = ((at >= 0) & (at < values.shape)).all(-1)
        at = np.clip(at, 0, np.array(values.shape) - 1)
        agree |= pixels == (values[tuple(np.moveaxis(at, -1, 0))] & inside)
        if agree.all():
            return True
    return False


def check_segmentation(data, image, headers):
    """Compare every slice of the source with the mask; a frame that is absent is empty."""
    frames = np.atleast_3d(data.pixel_array).reshape(-1, data.Rows, data.Columns)
    shown = {}
    for number, pixels in enumerate(frames):
        segment = segment_of(data, number)
        uid, _ = source_of(data, number)
        shown[uid, segment] = pixels
        lps = pixel_positions(frame_header(data, number))
        np.testing.assert_allclose(lps, pixel_positions(headers[uid]), atol=1e-3)
        assert agree_within_half_a_millimetre(pixels > 0, image, segment, lps)
    for uid, header in headers.items():
        for segment in (int(item.SegmentNumber) for item in data.SegmentSequence):
            if (uid, segment) not in shown:
                empty = np.zeros((header.Rows, header.Columns), bool)
                assert agree_within_half_a_millimetre(empty, image, segment, pixel_positions(header))


def read_headers(folder):
    return {str(header.SOPInstanceUID): header for header in map(dcmread, sorted(folder.rglob("*.dcm")))}


def test_a_segmentation_lies_where_the_mask_lies(found):
    folder, _, prediction, _, objects = found
    mask = prediction.haemorrhage.mask
    check_segmentation(objects["haemorrhage"], mask, read_headers(folder))
    assert (np.asarray(mask.dataobj) == 1).any()
    assert (np.asarray(mask.dataobj) == 2).any()
    labels = [item.SegmentLabel for item in objects["haemorrhage"].SegmentSequence]
    assert labels == list(prediction.haemorrhage.regions)
    check_segmentation(objects["brain"], ichprog.brain_mask(found[1]), read_headers(folder))


def test_a_parametric_map_is_the_map_at_the_pixels_of_the_series(found):
    folder, _, _, saliency, objects = found
    headers = read_headers(folder)
    data = objects["map"]
    values = np.asarray(saliency.image.dataobj, float)
    planes = data.pixel_array
    assert len(planes) == len(headers)
    for number in range(0, len(planes), 5):
        at = to_voxels(saliency.image, pixel_positions(headers[source_of(data, number)[0]]))
        expected = map_coordinates(values, np.moveaxis(at, -1, 0), order=1, mode="nearest")
        inside = ((at > -0.5) & (at < np.array(values.shape) - 0.5)).all(-1)
        np.testing.assert_allclose(planes[number][inside], expected[inside], atol=1e-6 * np.abs(values).max())
        assert not planes[number][~inside].any()
    assert np.abs(planes).max() > 0.5 * np.abs(values).max() > 0


def test_an_enhanced_ct_is_segmented_frame_by_frame(tmp_path, detector):
    file = tmp_path / "enhanced.dcm"
    write_enhanced(file)
    header = dcmread(file)
    _, _, prediction, _, objects = build(file, detector, methods=())
    data = objects["haemorrhage"]
    assert data.NumberOfFrames > 2
    for number in range(data.NumberOfFrames):
        pixels = data.pixel_array[number] > 0
        segment = segment_of(data, number)
        uid, frame = source_of(data, number)
        assert uid == header.SOPInstanceUID
        lps = pixel_positions(frame_header(data, number))
        np.testing.assert_allclose(lps, pixel_positions(frame_header(header, int(frame) - 1)), atol=1e-3)
        assert agree_within_half_a_millimetre(pixels, prediction.haemorrhage.mask, segment, lps)


@pytest.mark.skipif(not (SHARED / "head_ct_ge_dicom.zip").exists(), reason="needs the real tilted series")
def test_the_masks_of_a_real_tilted_series_lie_on_its_slices(tmp_path, detector):
    shutil.unpack_archive(SHARED / "head_ct_ge_dicom.zip", tmp_path)
    scan = detector.load_scan(tmp_path)
    prediction = ichprog.predict(detector, scan, haemorrhage=detector)
    objects = {name: reread(data) for name, data in build_objects(prediction, scan, tmp_path).items()}
    headers = {str(each.SOPInstanceUID): each for each in map(dcmread, filter(Path.is_file, tmp_path.rglob("*")))}
    headers = {uid: each for uid, each in headers.items() if each.SeriesInstanceUID == source_series(objects)}
    assert "gantry-tilt" in [warning.code for warning in prediction.warnings]
    check_segmentation(objects["brain"], ichprog.brain_mask(scan), headers)
    check_segmentation(objects["haemorrhage"], prediction.haemorrhage.mask, headers)


def source_series(objects):
    return objects["brain"].ReferencedSeriesSequence[0].SeriesInstanceUID


def content(item):
    """Yield every content item of a report."""
    yield item
    for inner in item.get("ContentSequence", ()):
        yield from content(inner)


def code_of(item):
    (concept,) = item.ConceptNameCodeSequence
    return concept.get("CodeValue") or concept.get("LongCodeValue"), concept.CodingSchemeDesignator


def numbers(report):
    """Return every measured value with its unit, in order, by code and scheme."""
    values = {}
    for item in content(report):
        if item.get("ValueType") == "NUM" and item.get("RelationshipType") == "CONTAINS":
            (measured,) = item.MeasuredValueSequence
            unit = measured.MeasurementUnitsCodeSequence[0].CodeValue
            values.setdefault(code_of(item), []).append((float(measured.NumericValue), unit))
    return values


def test_the_report_states_every_result_with_codes_and_units(straight):
    _, _, prediction, _, objects = straight
    report, blood = objects["report"], prediction.haemorrhage
    values = numbers(report)
    for label, p in prediction["bleeding"].probabilities.items():
        assert values[f"probability:bleeding:{label}", "99ICHPROG"] == [(pytest.approx(p, abs=1e-6), "1")]
    assert values["122157", "DCM"] == [(pytest.approx(blood.probability, abs=1e-6), "1")]
    volumes = [(pytest.approx(volume, abs=1e-5), "mL") for volume in blood.volume_ml.values()]
    assert values["118565006", "SCT"] == volumes
    texts = [str(item.TextValue) for item in content(report) if item.get("ValueType") == "TEXT"]
    assert any("For research only, not for patient care" in text for text in texts)
    assert prediction.warnings
    for warning in prediction.warnings:
        assert any(text.startswith(f"Warning {warning.code}") for text in texts)
    (weights,) = prediction.provenance["weights"]
    assert f"weights of fold 0: SHA-256 {weights['sha256']}" in texts
    names = {code_of(item): item for item in content(report) if item.get("ConceptNameCodeSequence")}
    assert names["111001", "DCM"].TextValue == prediction.model  # Algorithm Name
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert {item.CodingSchemeDesignator for item in report.CodingSchemeIdentificationSequence} == {"99ICHPROG"}


def test_the_report_refers_to_the_series_and_to_the_segments(straight):
    folder, _, prediction, _, objects = straight
    report, mask = objects["report"], objects["haemorrhage"]
    segments = [
        int(reference.ReferencedSegmentNumber)
        for item in content(report)
        for reference in item.get("ReferencedSOPSequence", ())
        if reference.ReferencedSOPInstanceUID == mask.SOPInstanceUID
    ]
    shown = [
        number for region, number in prediction.haemorrhage.regions.items() if prediction.haemorrhage.volume_ml[region]
    ]
    assert segments == shown
    evidence = [
        str(reference.ReferencedSOPInstanceUID)
        for study in (
            *report.CurrentRequestedProcedureEvidenceSequence,
            *report.get("PertinentOtherEvidenceSequence", ()),
        )
        for series in study.ReferencedSeriesSequence
        for reference in series.ReferencedSOPSequence
    ]
    assert set(read_headers(folder)) | {str(mask.SOPInstanceUID)} <= set(evidence)


def test_every_object_carries_the_patient_and_the_caution(straight):
    _, _, _, _, objects = straight
    assert set(objects) == {"haemorrhage", "brain", "report", "page", "map_bleeding_guided_backprop"}
    for data in objects.values():
        for keyword, value in PATIENT.items():
            if keyword not in ("SpecificCharacterSet", "ReferringPhysicianName"):
                assert str(data[keyword].value) == value, keyword
        assert data.SeriesDescription.endswith("FOR RESEARCH ONLY")
        assert len({data.SOPInstanceUID, data.SeriesInstanceUID, data.StudyInstanceUID}) == 3
        assert not any(element.VR == "UN" for element in data)
    assert {data.Modality for data in objects.values()} == {"SEG", "SR", "OT"}
    page = objects["page"].pixel_array
    assert page.ndim == 3
    assert page.std() > 20


def test_objects_have_what_older_editions_of_the_standard_require(straight):
    """PS3.3 of 2020: Content Identification Macro (table 10-12), Frame Anatomy (C.7.6.16-8), SC Equipment (C.8-24)."""
    *_, objects = straight
    for name in ("haemorrhage", "brain", "map_bleeding_guided_backprop"):
        assert objects[name].ContentCreatorName == ""
    (shared,) = objects["map_bleeding_guided_backprop"].SharedFunctionalGroupsSequence
    (anatomy,) = shared.FrameAnatomySequence
    assert anatomy.FrameLaterality == "U"
    assert [(each.CodeValue, each.CodingSchemeDesignator) for each in anatomy.AnatomicRegionSequence] == [
        ("69536005", "SCT")
    ]
    assert (objects["page"].ConversionType, objects["page"].PatientOrientation) == ("WSD", "")


def test_the_same_prediction_gives_the_same_bytes(straight):
    source, scan, prediction, maps, objects = straight
    again = build_objects(prediction, scan, source, maps=maps)
    assert {name: to_bytes(data) for name, data in again.items()} == {n: to_bytes(d) for n, d in objects.items()}


def test_other_weights_give_other_identifiers(straight):
    source, scan, prediction, _, objects = straight
    weights = [{**each, "sha256": "0" * 64} for each in prediction.provenance["weights"]]
    other = dataclasses.replace(prediction, provenance={**prediction.provenance, "weights": weights})
    data = images.segment_brain(build_context(other, read_source_series(source)), scan)
    assert data.SOPInstanceUID != objects["brain"].SOPInstanceUID
    assert data.SeriesInstanceUID != objects["brain"].SeriesInstanceUID


def test_malformed_attributes_and_hostile_names_do_not_break_out_of_their_values(tmp_path, detector):
    tags = {**dict.fromkeys(PATIENT), "PatientName": "ada", "PatientSex": "F"}
    for file in write(tmp_path / "series", tags=tags):
        data = dcmread(file)
        data.add_new(0x00100030, "LO", "around 1944")  # written as it is, and no date
        data.add_new(0x00080020, "LO", "2024-99-99")
        data.save_as(file)
    scan = detector.load_scan(tmp_path / "series", brain="given")
    prediction = ichprog.predict(detector, scan, haemorrhage=detector)
    name = 'a\\b\x00\x1b"><script>$\n' + "x" * 200
    hostile = dataclasses.replace(prediction, model=name, tasks={name: prediction["bleeding"]})
    for data in map(reread, build_objects(hostile, scan, tmp_path / "series").values()):
        assert (data.PatientName, data.PatientSex, data.PatientBirthDate, data.StudyDate) == ("ada", "F", "", "")
        assert "\x1b" not in str(data)
        assert all(len(str(value)) <= 64 for value in (data.SeriesDescription, data.ManufacturerModelName))
        assert data.ManufacturerModelName.startswith('a/b "><script>$ x')


def test_a_scan_without_a_series_is_refused(straight):
    _, scan, prediction, _, _ = straight
    with pytest.raises(ScanError, match="no DICOM series") as caught:
        build_objects(prediction, scan, "scan.nii.gz")
    assert caught.value.code == "no-dicom"


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of the package dicom3tools")
def test_dciodvfy_finds_no_error(straight, tmp_path):
    *_, objects = straight
    for path in save_objects(objects, tmp_path):
        result = subprocess.run(["dciodvfy", path], capture_output=True, text=True, errors="replace")
        assert not [line for line in result.stderr.splitlines() if line.startswith("Error")], path.name


def test_simulated_series_have_what_objects_copy(tmp_path):
    hu = np.full((40, 50, 12), 34.0)
    hu[10:20, 10:20, 4:7] = 65.0
    scan = SimulatedScan(hu, np.zeros(hu.shape, np.uint8), hu > 0, np.diag([-4.0, -4.0, 8.0, 1.0]))
    save_series(scan, tmp_path / "series", "sim1", 61, "M")
    (first, *_) = read_headers(tmp_path / "series").values()
    assert {"PatientBirthDate", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"} <= set(first.dir())
    if shutil.which("dciodvfy"):
        result = subprocess.run(["dciodvfy", tmp_path / "series" / "001.dcm"], capture_output=True, text=True)
        assert "Error" not in result.stderr


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_the_command_writes_the_objects_and_no_other_output_names_the_patient(tmp_path):
    write(tmp_path / "in" / "head", tags=PATIENT)
    model = local_detector(tmp_path / "model")
    result = invoke(
        "predict", tmp_path / "in" / "head", "-m", model, "--runtime", "torch", "--brain", "given", "--haemorrhage",
        "--haemorrhage-model", model, "--explain", "guided_backprop", "-o", tmp_path / "out.json",
        "--masks", tmp_path / "masks", "--dicom-out", tmp_path / "objects",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "objects" / "head").iterdir()}
    assert names == {"haemorrhage.dcm", "brain.dcm", "report.dcm", "page.dcm", "map_bleeding_guided_backprop.dcm"}
    assert dcmread(tmp_path / "objects" / "head" / "report.dcm").PatientID == PATIENT["PatientID"]
    texts = [result.output, (tmp_path / "out.json").read_text(), *(path.name for path in tmp_path.rglob("*"))]
    for text in texts:
        assert not any(value in text for value in ("Müller", "secret-17", "19440229"))


def test_the_command_refuses_nifti_and_maps_without_a_folder(tmp_path):
    (tmp_path / "scan.nii.gz").touch()
    result = invoke("predict", tmp_path / "scan.nii.gz", "--dicom-out", tmp_path / "objects")
    assert result.exit_code == 2
    assert "needs DICOM series" in result.output
    result = invoke("predict", tmp_path / "scan.nii.gz", "--explain", "grad_cam")
    assert result.exit_code == 2
    assert "--explain needs --maps, --report or --dicom-out" in result.output
