"""`predict`, `explain` and the command line accept the same sources."""

import shutil

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import Cohort, InvalidValueError, ScanError

from support.phantoms import brain_hu

AFFINE = np.diag([-2.5, -2.5, 5.0, 1.0])


@pytest.fixture
def folder(tmp_path):
    """A folder of two scans in a folder of their own."""
    hu = brain_hu((96, 96, 30))
    (tmp_path / "scans" / "inner").mkdir(parents=True)
    for name in ("scans/a.nii.gz", "scans/inner/b.nii.gz"):
        nib.Nifti1Image(hu, AFFINE).to_filename(tmp_path / name)
    return tmp_path / "scans"


@pytest.fixture
def table(folder):
    path = folder.parent / "cohort.csv"
    path.write_text("patient,scan\nlast,scans/inner/b.nii.gz\nfirst,scans/a.nii.gz\n")
    return path


@pytest.fixture
def model(bright_model):
    return ichprog.load_model(bright_model)


def poor(prediction):
    return prediction["prognosis"].probabilities["poor"]


def test_a_folder_of_scans_gives_a_list(model, folder):
    predictions = ichprog.predict(model, folder)
    assert isinstance(predictions, list)
    assert [each.scan for each in predictions] == [str(folder / "a.nii.gz"), str(folder / "inner" / "b.nii.gz")]
    assert len(ichprog.predict(model, str(folder / "inner"))) == 1


def test_a_table_and_a_cohort_give_a_list_with_the_names_of_the_patients(model, table):
    for source in (table, str(table), Cohort.read(table)):
        predictions = ichprog.predict(model, source)
        assert [each.patient for each in predictions] == ["last", "first"]
        assert [each.scan.rpartition("/")[2] for each in predictions] == ["b.nii.gz", "a.nii.gz"]
        assert predictions[0].to_dict()["patient"] == "last"
    assert ichprog.predict(model, table.with_name("scans") / "a.nii.gz").patient is None


def test_a_patient_without_a_scan_is_recorded_by_name(model, table, folder):
    (folder / "a.nii.gz").unlink()
    last, first = ichprog.predict(model, table, on_error="record")
    assert (last.error, first.patient, first.error["code"]) == (None, "first", "not-found")


def test_an_array_with_an_affine_is_the_image_of_both(model):
    hu = brain_hu((96, 96, 30))
    expected = ichprog.predict(model, nib.Nifti1Image(hu, AFFINE))
    for array in (hu, hu.astype(np.int64), hu.astype(np.float64)):
        prediction = ichprog.predict(model, (array, AFFINE))
        assert poor(prediction) == poor(expected)
        assert prediction.scan == "array in memory"
    assert [poor(each) for each in ichprog.predict(model, [(hu, AFFINE)] * 2)] == [poor(expected)] * 2


def test_sources_of_all_kinds_are_mixed_in_one_list(model, folder, table):
    image = nib.Nifti1Image(brain_hu((96, 96, 30)), AFFINE)
    predictions = ichprog.predict(model, [folder, image, table, folder / "a.nii.gz"])
    assert [each.patient for each in predictions] == [None, None, None, "last", "first", None]
    assert len({poor(each) for each in predictions}) == 1


def test_any_other_iterable_gives_an_iterator_that_reads_one_scan_ahead(model, folder):
    reached = []

    def paths():
        for name in ("a.nii.gz", "inner/b.nii.gz", "inner", "a.nii.gz"):
            reached.append(name)
            yield folder / name

    predictions = ichprog.predict(model, paths())
    assert reached == []
    assert next(predictions).scan == str(folder / "a.nii.gz")
    assert len(reached) == 2
    assert len(list(predictions)) == 3


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (np.zeros((4, 4, 4)), "'ndarray'"),
        (None, "'NoneType'"),
        (5, "'int'"),
        (b"scan.nii.gz", "'bytes'"),
        ({"scan": "scan.nii.gz"}, "'dict'"),
        ([np.zeros((4, 4, 4))], "'ndarray'"),
        (["scan.nii.gz", None], "'NoneType'"),
    ],
)
def test_predict_refuses_by_name_what_holds_no_scan(source, kind):
    with pytest.raises(InvalidValueError, match=rf"type of scan {kind}. Expected a NIfTI file, .* or several of these"):
        ichprog.predict("no model is loaded before the scans are checked", source)


def test_an_array_alone_is_refused_with_what_is_missing():
    with pytest.raises(InvalidValueError, match=r"An array has no geometry: give \(array, affine\)"):
        ichprog.predict("compact.prognosis_gcs3_age", np.zeros((4, 4, 4)))


def test_an_affine_of_another_shape_is_refused(model):
    with pytest.raises(InvalidValueError, match=r"shapes of a tuple .*affine of shape \(4, 4\)"):
        ichprog.predict(model, (brain_hu((96, 96, 30)), np.eye(3)))


def test_arrays_that_hold_no_numbers_are_no_scans(model):
    with pytest.raises(ScanError, match="bool") as error:
        ichprog.predict(model, (np.ones((96, 96, 30), bool), AFFINE))
    assert error.value.code == "not-scalar"


def test_an_array_of_paths_is_an_iterable_of_scans(model, folder):
    paths = np.array([str(folder / "a.nii.gz"), str(folder / "inner" / "b.nii.gz")])
    assert len(list(ichprog.predict(model, paths))) == 2


def test_explain_takes_any_source_of_one_scan(model, folder):
    from_folder = ichprog.explain(model, folder / "inner", method="grad_cam")
    from_array = ichprog.explain(model, (brain_hu((96, 96, 30)), AFFINE), method="grad_cam")
    np.testing.assert_array_equal(from_folder.grid_map, from_array.grid_map)
    with pytest.raises(InvalidValueError, match=r"Expected one scan. This holds 2 scans"):
        ichprog.explain(model, folder)


def test_an_empty_folder_is_an_error_that_says_so(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match=r"empty: the folder holds no scan"):
        ichprog.predict(model, tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty")
    with pytest.raises(ScanError, match="no such file or folder"):
        ichprog.predict(model, tmp_path / "empty")
