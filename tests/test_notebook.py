"""How objects show themselves: short as text, and as an escaped table in a notebook."""

import dataclasses
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

import ichprog
from ichprog import CohortError, zoo
from ichprog.cli import main
from ichprog.cohort import Cohort, Patient
from ichprog.results import ClinicalUse, InputDistance

from support.phantoms import brain_hu


class Cells(HTMLParser):
    """Collect the cells of a table and the other texts."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.notes, self.tags, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.in_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data
        else:
            self.notes.append(data)


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "<script>x.nii.gz"
    nib.Nifti1Image(brain_hu((96, 96, 20), (60, 40, 10)), np.diag([-2.2, -2.2, 7.0, 1.0])).to_filename(path)
    return path


@pytest.fixture
def model(bright_model):
    return ichprog.load_model(bright_model, runtime="torch")


def test_a_prediction_is_one_line_and_a_table(model, scan):
    prediction = ichprog.predict(model, scan)
    label = prediction["prognosis"].label
    assert len(repr(prediction)) < 300
    assert f"prognosis {label} {prediction['prognosis'].probabilities[label]:.3f}" in repr(prediction)
    shown = Cells(prediction._repr_html_())
    assert set(shown.tags) <= {"p", "b", "table", "tr", "th", "td"}  # the name of the file is no markup
    assert "<script>x.nii.gz" in shown.notes[0]
    assert len(shown.rows) == 1 + sum(len(task.probabilities) for task in prediction.values())
    assert [f"{label} (predicted)"] == [row[1] for row in shown.rows[1:] if row[0] == "prognosis" and "(" in row[1]]
    assert prediction.provenance["notice"] in shown.notes


def test_calibration_clinical_values_and_abstentions_are_shown(model, scan):
    prediction = ichprog.predict(model, scan)
    calibrated = dataclasses.replace(
        prediction["prognosis"], calibrated={"good": 0.25, "poor": 0.75}, label_set=("good", "poor")
    )
    shown = Cells(
        dataclasses.replace(
            prediction, tasks={**prediction.tasks, "prognosis": calibrated}, coverage=0.9,
            clinical=ClinicalUse({"age": 71.0}, ("gcs",), {}),
            input_distance=InputDistance(1.0, 2.0, "noise", 0.1, (0.0, 0.2)),
        )._repr_html_()
    )  # fmt: skip
    assert shown.rows[0][-2:] == ["calibrated", "set for 90%"]
    assert ["0.750", "yes"] in [row[-2:] for row in shown.rows]
    assert any(note.startswith("Abstains from prognosis") for note in shown.notes)
    assert "Clinical values: age 71; missing: gcs." in shown.notes


def test_a_failed_scan_shows_its_error(model, tmp_path):
    prediction = ichprog.predict(model, [tmp_path / "none.nii.gz"], on_error="record")[0]
    assert repr(prediction).endswith("no result, not-found>")
    assert Cells(prediction._repr_html_()).rows[1][0] == "not-found"


def test_maps_models_and_descriptions_show_themselves(model, scan):
    saliency = ichprog.explain(model, scan)
    assert ["task", "prognosis: poor"] in Cells(saliency._repr_html_()).rows
    assert ["runtime", "torch"] in Cells(model._repr_html_()).rows
    assert [row[0] for row in Cells(zoo.find("perez2023.prognosis")._repr_html_()).rows[1:]] == ["prognosis"]


def test_a_cohort_shows_its_first_patients():
    patients = [Patient(f"P{n}", ichprog.cohort.Path(f"{n}.nii.gz"), {"gcs": str(n)}) for n in range(12)]
    shown = Cells(Cohort(tuple(patients), "cohort.csv")._repr_html_())
    assert shown.rows[0] == ["patient", "scan", "gcs"]
    assert len(shown.rows) == 11
    assert "2 more patients." in shown.notes


def test_a_saved_map_is_nearly_exact_small_and_says_what_it_is(model, scan, tmp_path):
    saliency = ichprog.explain(model, scan)
    written = nib.load(saliency.save(tmp_path / "map.nii.gz"))
    exact = np.asarray(saliency.image.dataobj)
    assert np.abs(written.get_fdata() - exact).max() <= np.ptp(exact) / 65_000
    assert written.get_data_dtype() == np.int16
    assert written.header["descrip"].item().startswith(b"guided_backprop of prognosis poor, ")
    empty = dataclasses.replace(saliency, grid_map=np.zeros_like(saliency.grid_map))
    assert not nib.load(empty.save(tmp_path / "empty.nii")).get_fdata().any()


def test_the_command_draws_the_maps(bright_model, scan, tmp_path):
    command = ["explain", str(scan), "-m", bright_model, "-o", str(tmp_path / "maps"), "--png", "--runtime", "torch"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "maps" / "<script>x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_cohort_is_made_of_a_pandas_table(scan):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"Patient": [1, 2], "scan": [scan.name, scan.name], "gcs": [7, None], "ward": ["A", "B"]})
    cohort = Cohort.from_frame(frame, folder=scan.parent)
    assert [patient.name for patient in cohort.patients] == ["1", "2"]
    assert [patient.scan for patient in cohort.patients] == [scan, scan]
    assert np.array_equal(cohort.numbers("gcs"), [7, np.nan], equal_nan=True)
    with pytest.raises(CohortError, match="no column patient"):
        Cohort.from_frame(frame.drop(columns="Patient"))
    with pytest.raises(CohortError, match="does not exist"):
        Cohort.from_frame(frame, folder=scan.parent / "elsewhere")
