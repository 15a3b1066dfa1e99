"""The embedded model and the demo run without a network and without data."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import zoo
from ichprog.simulate import Patient
from ichprog.simulate.anatomy import Individual
from ichprog.simulate.haemorrhage import draw_haemorrhage
from ichprog.simulate.scanner import acquire

NAME = "compact.prognosis_gcs3_age"
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def model():
    return ichprog.load_model(NAME, offline=True)


def picture(**changes):
    """Return one simulated brain with changes to the patient and a fixed random seed."""
    person = dataclasses.replace(Patient(11, 4, "plain").person, **changes)
    random = np.random.default_rng(3)
    individual = Individual(person.marks, random)
    exposure = acquire(individual, draw_haemorrhage(person, individual, random), np.random.default_rng(3))
    return nib.Nifti1Image(exposure.hu, exposure.affine)


def test_the_embedded_model_is_small_verified_and_labelled_as_simulated(model):
    assert len(model.weights) >= 3
    assert sum(file.path.stat().st_size for file in model.weights) <= 2_000_000
    assert {file.path.name: file.sha256 for file in model.weights} == dict(model.spec.weights.sha256)
    assert model.check_golden_output()["state"] == "holds"
    assert "simulated" in model.spec.notice
    prediction = ichprog.predict(model, picture(volume_ml=20.0))
    assert "simulated" in prediction.provenance["notice"]
    assert prediction["prognosis"].std is not None


def test_the_documented_results_are_the_measured_ones():
    """Otherwise run `python docs/embedded.py FOLDER`."""
    spec, readme = zoo.find(NAME), (DOCS.parent / "README.md").read_text()
    figures = json.loads((DOCS / "embedded.json").read_text())
    assert {figure["task"] for figure in figures} == {task.name for task in spec.tasks}
    for figure in figures:
        (said,) = (limit for limit in spec.limits if f"a simulated {figure['what']} on" in limit)
        shown = [f"{figure[who][part]:.3f}" for who in ("model", "oracle") for part in range(3)]
        assert all(number in said for number in shown)
        row = next(line for line in readme.splitlines() if line.startswith(f"| {figure['what']} |"))
        assert all(number in row for number in shown)
        assert figure["patients"] == 300
    prognosis = next(figure for figure in figures if figure["task"] == "prognosis")
    assert prognosis["model"][0] > prognosis["oracle"][0] - 0.05


def test_predictions_follow_the_haemorrhage_and_the_atrophy(model):
    marks = Patient(11, 4, "plain").person.marks
    small, large = (
        ichprog.predict(model, picture(site="putamen", volume_ml=volume, ventricular=share))
        for volume, share in ((4.0, 0.0), (90.0, 0.5))
    )
    assert large["prognosis"].probabilities["poor"] > small["prognosis"].probabilities["poor"] + 0.1
    assert large["gcs"].probabilities["13-15"] < small["gcs"].probabilities["13-15"] - 0.1
    young, old = (
        ichprog.predict(model, picture(volume_ml=15.0, marks=dict.fromkeys(marks, size))) for size in (-2.0, 2.0)
    )
    assert old["age"].probabilities[">=80"] > young["age"].probabilities[">=80"] + 0.3


def test_the_demo_needs_no_network_and_no_cache(tmp_path):
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "none")}
    environment = {k: v for k, v in os.environ.items() if k != "ICHPROG_CACHE"} | closed
    done = subprocess.run(
        [sys.executable, "-m", "ichprog", "demo", "--output", "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout
    assert "simulated" in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["prognosis", "gcs", "age", "haemorrhage"]
    out = tmp_path / "out"
    with (out / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["prognosis_good"]) + float(row["prognosis_poor"]) == pytest.approx(1)
    assert "simulated" in row["notice"]
    (scan,) = (out / "scans").iterdir()
    (mask,) = (out / "masks").iterdir()
    maps = sorted(out.glob("*_grad_cam.nii.gz"))
    assert len(maps) == 3
    for path in (mask, *maps):
        assert nib.load(path).shape == nib.load(scan).shape
        np.testing.assert_allclose(nib.load(path).affine, nib.load(scan).affine)
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none" / "ichprog").exists()
