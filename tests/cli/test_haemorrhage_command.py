"""`ichprog haemorrhage`, `ichprog predict --haemorrhage`, and clinical scores."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import clinical_scores

from support import phantoms
from support.models import local_detector

pytestmark = pytest.mark.usefixtures("registered_intensity_backbone")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return local_detector(tmp_path_factory.mktemp("models") / "detector")


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """Path of a brain with a deep haemorrhage of about 11 mL."""
    head = phantoms.head(blood="deep", blood_hu=62.0, noise=1.0)
    brain = phantoms.brain_only(head)
    path = tmp_path_factory.mktemp("scans") / "brain.nii.gz"
    nib.Nifti1Image(np.where(brain.hu > 75, phantoms.BRAIN, brain.hu).astype(np.int16), brain.affine).to_filename(path)
    return path


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def torch_only(*arguments):
    """Return arguments with the runtime that compiles nothing."""
    return (*arguments, "--runtime", "torch")


def test_a_line_a_row_and_a_mask_for_each_scan(run, detector, scan, tmp_path):
    out, masks = tmp_path / "out.csv", tmp_path / "masks"
    result = run(
        *torch_only("haemorrhage", scan, tmp_path / "none.nii.gz", "-m", detector, "-o", out, "--masks", masks), code=1
    )
    expected = ichprog.haemorrhage(scan, model=ichprog.load_model(detector, runtime="torch"))
    volume, (low, high) = expected.volume_ml["total"], expected.intervals_ml["total"]
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{scan}  haemorrhage present ")
    assert f"total {volume:.1f} mL ({low:.1f} to {high:.1f})" in lines[0]
    assert "  left  deep  " in lines[0]
    assert "FAILED" in lines[1]
    assert lines[-1] == "Limits: Density alone decides."
    assert result.stderr.count("research only") == 1
    first, second = rows(out)
    assert (first["status"], first["present"], first["location"]) == ("ok", "yes", "deep")
    assert float(first["total_ml"]) == pytest.approx(volume, abs=1e-4)
    assert second["error_code"] == "not-found"
    (path,) = masks.iterdir()
    assert path.name == "brain_haemorrhage.nii.gz"
    assert np.array_equal(nib.load(path).get_fdata(), np.asarray(expected.mask.dataobj))


def test_json_has_the_same_names_as_the_result(run, detector, scan, tmp_path):
    result = run(*torch_only("haemorrhage", scan, "-m", detector, "--json", "-o", tmp_path / "out.json"))
    (line,) = result.stdout.splitlines()
    expected = ichprog.haemorrhage(scan, model=ichprog.load_model(detector, runtime="torch")).to_dict()
    assert list(json.loads(line)) == list(expected)
    assert json.loads((tmp_path / "out.json").read_text()) == [json.loads(line)]
    assert "limits" in expected


def test_a_model_that_finds_no_haemorrhage_is_wrong_use(run, bright_model, scan):
    result = run(*torch_only("haemorrhage", scan, "-m", bright_model), code=2)
    assert "Invalid model for haemorrhages 'bright.prognosis_gcs3_age'" in result.output


def test_predict_finds_the_haemorrhage_as_well(run, bright_model, detector, scan, tmp_path):
    out, masks = tmp_path / "out.csv", tmp_path / "masks"
    arguments = ("predict", scan, "-m", bright_model, "--haemorrhage", "--haemorrhage-model", detector)
    result = run(*torch_only(*arguments, "-o", out, "--masks", masks))
    assert "prognosis" in result.stdout.splitlines()[0]
    assert "haemorrhage present" in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[-1] == "Limits: Density alone decides."
    (row,) = rows(out)
    assert row["prognosis_label"]
    assert (row["blood_present"], row["blood_side"]) == ("yes", "left")
    assert "Density alone decides." in row["notice"]
    assert sorted(path.name for path in masks.iterdir()) == ["brain_brain.nii.gz", "brain_haemorrhage.nii.gz"]


def test_a_model_for_haemorrhages_that_nothing_uses_is_wrong_use(run, detector):
    result = run("predict", "none.nii.gz", "--haemorrhage-model", detector, code=2)
    assert "--haemorrhage-model needs --haemorrhage or --scores" in result.output


def test_scores_are_printed_with_their_outcome_and_sources(run, bright_model, detector, scan, tmp_path):
    clinical = ("--scores", "--clinical", "age=71", "--clinical", "gcs=9")
    arguments = ("predict", scan, "-m", bright_model, "--haemorrhage-model", detector, *clinical)
    found = ichprog.haemorrhage(scan, model=ichprog.load_model(detector, runtime="torch"))
    expected = clinical_scores.from_haemorrhage(found, {"age": 71, "gcs": 9})
    text = run(*torch_only(*arguments, "-o", tmp_path / "out.csv")).stdout
    low, high = expected.ich.low, expected.ich.high
    number = f"{low}" if low == high else f"{low} to {high}"
    assert f"ICH score {number}: death within 30 days {expected.ich.share_low:.0%}" in text
    assert "gcs 9 (given), age 71 (given), volume_ml " in text
    assert f"FUNC score {expected.func.low} to {expected.func.high}: independence at 90 days" in text
    assert "impaired_before unknown" in text
    (row,) = rows(tmp_path / "out.csv")
    assert {name: float(row[name]) for name in clinical_scores.SCORE_COLUMNS} == expected.to_row()
    data = json.loads(run(*torch_only(*arguments, "--json")).stdout)
    assert data["scores"] == json.loads(json.dumps(expected.to_dict()))
    alone = run(*torch_only("haemorrhage", scan, "-m", detector, *clinical)).stdout
    assert [line for line in alone.splitlines() if " score " in line] == [
        line for line in text.splitlines() if " score " in line
    ]


def test_the_rows_of_a_table_have_their_own_clinical_values(run, detector, scan, tmp_path):
    table = tmp_path / "patients.csv"
    shutil.copy(scan, tmp_path / "other.nii.gz")
    table.write_text(f"patient,scan,age,gcs,cognitive_impairment\nA,{scan},85,3,1\nB,other.nii.gz,,15,0\n")
    lines = run(*torch_only("haemorrhage", table, "-m", detector, "--scores", "--json")).stdout.splitlines()
    scores = [json.loads(line)["scores"] for line in lines]
    first, second = ({v["name"]: v for v in (*s["ich"]["variables"], *s["func"]["variables"])} for s in scores)
    assert (first["age"]["value"], first["gcs"]["value"]) == (85, 3)
    assert (first["impaired_before"]["value"], second["impaired_before"]["value"]) == (True, False)
    assert (second["age"]["source"], second["gcs"]["source"]) == ("unknown", "given")
    table.write_text(f"patient,scan,age,gcs\nA,{scan},85,99\n")
    result = run(*torch_only("haemorrhage", table, "-m", detector, "--scores"), code=2)
    assert "Patient A: Invalid gcs 99.0" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scores", "--clinical", "gcs=99"], "Invalid gcs 99.0. Expected whole numbers from 3 to 15"),
        (["--scores", "--clinical", "agee=7"], "Unknown clinical value 'agee'. Did you mean age"),
        (["--scores", "--clinical", "age"], "Expected NAME=VALUE, such as location=lobar"),
        (["--clinical", "age=71"], "--clinical needs --scores"),
        (["another.nii.gz", "--scores", "--clinical", "age=71"], "there are 2 scans"),
    ],
)
def test_wrong_clinical_values_are_refused_before_a_scan_is_read(run, detector, arguments, message):
    assert message in run("haemorrhage", "none.nii.gz", *arguments, "-m", detector, code=2).output
