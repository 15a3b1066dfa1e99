"""`haemorrhage`, and predictions with a haemorrhage, by a model that finds blood by its density."""

import csv
import functools
import json
import re

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog.errors import InvalidValueError, ScanError
from ichprog.result_files import haemorrhage_table, prediction_table, results_file
from ichprog.scan.morphology import dilate_mm
from ichprog.simulate import MASK_VALUES

from support import dicom_series, phantoms
from support.models import local_detector, torch_model

pytestmark = pytest.mark.usefixtures("registered_intensity_backbone")

SPACING = (1.5, 1.5, 5.0)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return torch_model(local_detector(tmp_path_factory.mktemp("models") / "detector"))


@functools.cache
def brain_with_blood(*pieces):
    """Return a brain without calcification, with spheres of blood in known places."""
    brain = phantoms.brain_only(phantoms.head(SPACING, blood=list(pieces), blood_hu=62.0, noise=1.0))
    return phantoms.scan_of(np.where(brain.hu > 75, phantoms.BRAIN, brain.hu), brain.affine)


def image_of(scan):
    return nib.Nifti1Image(scan.hu, scan.affine)


@pytest.fixture(scope="module")
def bleeding():
    return image_of(brain_with_blood("deep", "lobar"))


@pytest.fixture(scope="module")
def found(detector, bleeding):
    """Return the haemorrhage of the bleeding brain."""
    return ichprog.haemorrhage(bleeding, model=detector)


@pytest.fixture(scope="module")
def healthy():
    return image_of(brain_with_blood())


def true_volume_ml():
    blood = phantoms.head(SPACING, blood=["deep", "lobar"]).blood
    return blood.sum() * np.prod(SPACING) / 1000


def test_a_haemorrhage_is_found_measured_and_shown_in_the_space_of_the_scan(found, bleeding):
    assert found.is_present
    assert found.probability > found.threshold == 0.4
    assert found.regions == MASK_VALUES
    assert found.volume_ml["total"] == pytest.approx(true_volume_ml(), rel=0.2)
    assert found.volume_ml["parenchymal"] > 0.9 * found.volume_ml["total"]
    mask = np.asarray(found.mask.dataobj)
    assert mask.shape == bleeding.shape
    assert np.array_equal(found.mask.affine, bleeding.affine)
    assert (mask > 0).sum() * np.prod(SPACING) / 1000 == pytest.approx(found.volume_ml["total"])
    blood = phantoms.head(SPACING, blood=["deep", "lobar"]).blood
    assert 2 * ((mask == 1) & blood).sum() > 0.8 * ((mask == 1).sum() + blood.sum())
    slices = np.array(found.slice_probabilities) > 0.4
    assert (slices == blood.any((0, 1))).mean() > 0.95  # the uppermost slice holds little blood
    assert found.intraventricular == found.prediction["bleeding"].segmentation.region_probabilities["ventricular"]


def test_intervals_follow_from_the_spec_and_are_unknown_for_other_parts(found):
    volume = found.volume_ml["total"]
    assert found.intervals_ml["total"] == pytest.approx(((volume + 1) * 0.8 - 1, (volume + 1) * 1.5 - 1))
    assert found.intervals_ml["ventricular"] is None
    assert set(found.intervals_ml) == set(found.volume_ml) == {"total", *MASK_VALUES}


def test_a_scan_without_blood_has_none(detector, healthy):
    found = ichprog.haemorrhage(healthy, model=detector)
    assert not found.is_present
    assert found.volume_ml["total"] == 0
    assert found.intervals_ml["total"] == (0, 0.5)
    assert (found.side, found.location, found.infratentorial) == (None, None, None)
    assert "no-blood" not in {warning.code for warning in found.warnings}  # absence is a result here


@pytest.mark.parametrize(
    ("blood", "side", "place"),
    [("deep", "left", "deep"), ("occipital", "right", "lobar"), ("cerebellar", "left", "infratentorial")],
)
def test_a_haemorrhage_has_its_place_in_any_voxel_order(detector, blood, side, place):
    image = image_of(brain_with_blood(blood))
    for each in (image, image.slicer[::-1, :, ::-1]):
        found = ichprog.haemorrhage(each, model=detector)
        assert (found.side, found.location) == (side, place)
        assert (found.infratentorial > 0.5) == (place == "infratentorial")
        assert sum(found.shares.values()) == pytest.approx(1)
        assert found.midline_shift_mm is not None or found.midline_shift_reason
        low, high = found.midline_shift_interval_mm or (0, 0)
        assert low <= (found.midline_shift_mm or 0) <= high  # the ventricles of these brains are in the middle
        assert low < 3


def test_a_haemorrhage_as_plain_data_has_the_names_of_its_attributes(found):
    data = json.loads(json.dumps(found.to_dict()))
    for name, value in data.items():
        own = getattr(found, name)
        if name not in ("warnings", "intervals_ml"):
            assert value == (list(own) if isinstance(own, tuple) else own), name
    assert data["limits"] == ["Density alone decides.", "Old blood is missed."]
    assert data["intervals_ml"]["total"] == list(found.intervals_ml["total"])
    assert data["provenance"]["model"] == "intensity.bleeding"
    public = {name for name in dir(found) if name[0] != "_"}
    assert public - set(data) == {"prediction", "task", "mask", "error", "patient", "to_dict"}


def test_one_scan_gives_one_result_and_several_give_as_many(detector, bleeding, healthy, tmp_path):
    assert isinstance(ichprog.haemorrhage(bleeding, model=detector), ichprog.Haemorrhage)
    several = ichprog.haemorrhage([bleeding, healthy], model=detector)
    assert [each.is_present for each in several] == [True, False]
    assert next(iter(ichprog.haemorrhage(iter([healthy]), model=detector))).probability < 0.1
    healthy.to_filename(tmp_path / "scan.nii.gz")
    (tmp_path / "table.csv").write_text("patient,scan\nP1,scan.nii.gz\n")
    (row,) = ichprog.haemorrhage(tmp_path / "table.csv", model=detector)
    assert (row.patient, row.scan) == ("P1", str(tmp_path / "scan.nii.gz"))


def test_the_error_of_a_scan_is_raised_or_recorded(detector, healthy):
    with pytest.raises(ScanError, match="no such file"):
        ichprog.haemorrhage("none.nii.gz", model=detector)
    failed, fine = ichprog.haemorrhage(["none.nii.gz", healthy], model=detector, on_error="record")
    assert (failed.error["code"], fine.error) == ("not-found", None)
    assert failed.to_dict()["error"]["code"] == "not-found"
    for name in ("probability", "is_present", "mask", "volume_ml"):
        with pytest.raises(ScanError, match=r"has no prediction: none\.nii\.gz: no such file"):
            getattr(failed, name)
    with pytest.raises(InvalidValueError, match="Invalid on_error"):
        ichprog.haemorrhage(healthy, model=detector, on_error="skip")


def test_a_model_that_finds_no_haemorrhage_is_refused(detector, bright_model, bleeding):
    message = "Invalid model for haemorrhages 'bright.prognosis_gcs3_age'. Expected a model with a task that has a mask"
    with pytest.raises(InvalidValueError, match=message):
        ichprog.haemorrhage(bleeding, model=torch_model(bright_model))
    with pytest.raises(InvalidValueError, match=message):
        ichprog.predict(detector, bleeding, haemorrhage=torch_model(bright_model))


def test_a_prediction_has_the_haemorrhage_of_its_scan(found, detector, bright_model, bleeding, monkeypatch):
    outcome = torch_model(bright_model)
    alone = ichprog.predict(outcome, bleeding)
    calls = []
    load = ichprog.scan.load_deferred
    monkeypatch.setattr(
        ichprog.scan, "load_deferred", lambda *args, **options: calls.append(1) or load(*args, **options)
    )
    prediction = ichprog.predict(outcome, bleeding, haemorrhage=detector)
    assert len(calls) == 1  # one reading and one extraction for both networks
    assert alone.haemorrhage is None
    assert "haemorrhage" not in alone.to_dict()
    assert prediction.haemorrhage.volume_ml == found.volume_ml
    assert prediction.haemorrhage.probability == found.probability
    assert prediction["prognosis"] == alone["prognosis"]
    assert json.loads(json.dumps(prediction.to_dict()))["haemorrhage"]["volume_ml"] == found.volume_ml


def test_a_model_with_further_tasks_finds_haemorrhages_in_the_same_run(detector, bleeding, monkeypatch):
    runs = []
    runtime, run = detector.fold_runtimes[0], detector.fold_runtimes[0].run

    def counted(grids, *others):
        runs.append(grids)
        return run(grids, *others)

    monkeypatch.setattr(runtime, "run", counted)
    prediction = ichprog.predict(detector, bleeding, haemorrhage=detector)
    assert len(runs) == 1
    assert prediction.haemorrhage.volume_ml == prediction["bleeding"].segmentation.volume_ml


def test_the_network_replaces_the_density_check_of_blood(detector, bright_model):
    outcome = torch_model(bright_model)
    thin = brain_with_blood(((35, 10, 30), 6))  # smaller than the least component that the check sees
    assert "no-blood" in {warning.code for warning in ichprog.predict(outcome, image_of(thin)).warnings}
    prediction = ichprog.predict(outcome, image_of(thin), haemorrhage=detector)
    assert prediction.haemorrhage.is_present
    assert "no-blood" not in {warning.code for warning in prediction.warnings}


def test_absent_blood_is_a_warning_for_a_model_of_bleeding_patients(detector, bright_model, healthy):
    prediction = ichprog.predict(torch_model(bright_model), healthy, haemorrhage=detector)
    (warning,) = [warning for warning in prediction.warnings if warning.code == "no-blood"]
    assert "intensity.bleeding gives a probability of 0.0" in warning.message
    assert (warning.expected, warning.unit) == ("> 0.4", "probability")
    assert warning.measured == pytest.approx(prediction.haemorrhage.probability, abs=1e-4)


def test_a_table_of_haemorrhages_has_volumes_with_intervals_and_limits(detector, bleeding, tmp_path):
    results = ichprog.haemorrhage([bleeding, "none.nii.gz"], model=detector, on_error="record")
    with results_file(tmp_path / "out.csv", haemorrhage_table(detector.spec), {"model": detector.spec.name}) as file:
        for result in results:
            file.add(result)
    first, second = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert first["present"] == "yes"
    for part, interval in results[0].intervals_ml.items():
        assert float(first[f"{part}_ml"]) == pytest.approx(results[0].volume_ml[part], abs=1e-4)
        low = first[f"{part}_low_ml"]
        assert low == "" if interval is None else float(low) == pytest.approx(interval[0], abs=1e-4)
    assert first["notice"].endswith("Density alone decides.")
    assert (second["status"], second["error_code"], second["total_ml"]) == ("failed", "not-found", "")
    frame = ichprog.to_frame(results)
    assert list(frame["status"]) == ["ok", "failed"]
    assert frame["total_ml"][0] == results[0].volume_ml["total"]


def test_a_table_of_predictions_has_columns_for_the_haemorrhage(detector, bright_model, bleeding, tmp_path):
    outcome = torch_model(bright_model)
    prediction = ichprog.predict(outcome, bleeding, haemorrhage=detector)
    table = prediction_table(outcome.spec, detector=detector.spec)
    with results_file(tmp_path / "out.csv", table, {"model": outcome.spec.name}) as file:
        file.add(prediction)
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert float(row["blood_total_ml"]) == pytest.approx(prediction.haemorrhage.volume_ml["total"], abs=1e-4)
    assert row["prognosis_label"]
    assert row["notice"].endswith("Density alone decides.")


def warning_of(found, code):
    """Return the only warning with a code."""
    (warning,) = [warning for warning in found.warnings if warning.code == code]
    return warning


def test_doubtful_heads_give_warnings_in_units(detector):
    for side, cut in [("top", {"high": (95, 115, 45)}), ("bottom", {"low": (-95, -120, -15)})]:
        cropped = phantoms.head(SPACING, blood="deep", **cut)
        warning = warning_of(ichprog.haemorrhage(image_of(cropped.scan), model=detector), "cropped-brain")
        assert warning.unit == "%"
        assert re.search(rf"inside the brain at the {side}: about \d+ mL of brain are missing", warning.message)
    operated = phantoms.head(SPACING, blood="deep", defect=((60, 0, 40), 40))
    assert warning_of(ichprog.haemorrhage(image_of(operated.scan), model=detector), "skull-gap").unit == "cm2"
    whole = phantoms.head(SPACING, blood="deep")
    bone = whole.scan.hu > 300
    thick = bone & dilate_mm(~bone & ~whole.brain & (whole.scan.hu > -50), 6.0, SPACING)  # all but 1 mm inside
    infant = np.where(thick, phantoms.MUSCLE, whole.scan.hu)
    thin = ichprog.haemorrhage((infant, whole.scan.affine), model=detector)
    assert warning_of(thin, "thin-skull").unit == "mm"
    given = ichprog.haemorrhage(image_of(whole.scan), model=detector, brain="given")
    assert "Use brain='extract'" in warning_of(given, "skull-present").message


def test_a_brain_without_its_skull_gives_a_warning_with_its_volume(found, detector, bright_model, bleeding):
    warning = warning_of(found, "brain-only")
    brain_ml = phantoms.head(SPACING).brain.sum() * np.prod(SPACING) / 1000
    assert (warning.measured, warning.unit) == (pytest.approx(brain_ml, rel=0.01), "mL")
    assert "blood between brain and skull may have been removed" in warning.message
    prediction = ichprog.predict(torch_model(bright_model), bleeding, haemorrhage=detector)
    assert "brain-only" in {each.code for each in prediction.haemorrhage.warnings}
    assert "brain-only" not in {each.code for each in prediction.warnings}  # outcome models were made for such scans


def test_contrast_medium_is_refused(detector, tmp_path):
    dicom_series.write(tmp_path, count=25, tags={"ContrastBolusAgent": "Omnipaque"})
    with pytest.raises(ScanError, match="without contrast") as raised:
        ichprog.haemorrhage(tmp_path, model=detector)
    assert raised.value.code == "contrast"


def test_a_mask_of_another_scan_is_refused(detector, bleeding):
    other = nib.Nifti1Image(np.ones((50, 60, 20), np.uint8), bleeding.affine)
    with pytest.raises(ScanError, match="50, 60, 20") as raised:
        ichprog.haemorrhage(bleeding, model=detector, brain=other)
    assert (raised.value.code, raised.value.unit) == ("mask-geometry", "voxels")
