"""The embedded models and the demo run without a network and without data."""

import csv
import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import zoo
from ichprog.simulate import Patient, find_realism
from ichprog.simulate.anatomy import Individual
from ichprog.simulate.haemorrhage import draw_haemorrhage
from ichprog.simulate.scanner import acquire

from support.no_network import run_without_network

NAME, FUSED = "compact.prognosis_gcs3_age_v2", "compact.prognosis_gcs3_age_clinical"
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def model():
    return ichprog.load_model(NAME, offline=True)


def picture(**changes):
    """Return one simulated brain with changes to the patient and a fixed random seed."""
    person = dataclasses.replace(Patient(11, 4).person, **changes)
    random = np.random.default_rng(3)
    individual = Individual(person.marks, random, find_realism("realistic").fill_mm)
    realism = find_realism("realistic")
    shape = draw_haemorrhage(person, individual, random, realism)
    exposure = acquire(individual, shape, np.random.default_rng(3), realism=realism)
    return nib.Nifti1Image(exposure.hu, exposure.affine)


def test_the_embedded_model_is_small_verified_and_labelled_as_simulated(model):
    assert sum(file.path.stat().st_size for file in model.weights) <= 4_000_000
    assert {file.path.name: file.sha256 for file in model.weights} == dict(model.spec.weights.sha256)
    assert model.check_golden_output()["state"] == "holds"
    assert "simulated" in model.spec.notice
    prediction = ichprog.predict(model, picture(volume_ml=20.0))
    assert "simulated" in prediction.provenance["notice"]
    assert prediction["prognosis"].label_set
    assert not prediction.input_distance.is_unusual


@pytest.mark.parametrize("name", [NAME, FUSED])
def test_the_documented_results_are_the_measured_ones(name):
    """Otherwise run `python docs/embedded.py FOLDER`."""
    spec, page = zoo.find(name), (DOCS / "evidence.md").read_text()
    results = json.loads((DOCS / "embedded.json").read_text())
    figures = results["figures" if name == NAME else "fused"]
    for figure in figures:
        what = figure["what"] if name == NAME else f"image{''.join(f', {known}' for known in figure['known'])}"
        row = next(line for line in page.splitlines() if line.startswith(f"| {what} |"))
        shown = [f"{number:.3f}" for number in (*figure["model"], *figure["difference"])]
        shown += [f"{figure['best'][0]:.3f}", f"{figure['slope'][0]:.2f}"]
        assert all(number in row for number in shown), what
        assert any(all(number in limit for number in shown) for limit in spec.limits), what
    if name == NAME:
        assert {figure["task"] for figure in figures} == {task.name for task in spec.tasks}
        assert all(len(figure["by_seed"]) >= 4 for figure in figures)
    # a scan on the grid is nearly as good as a full scan
    assert max(results["full_scans"]["mean_difference"]) < 0.05


def test_clinical_values_move_the_outcome_as_in_the_simulation():
    """A patient who is older or less awake is more likely to do badly, whatever else is known."""
    model, scan = ichprog.load_model(FUSED, offline=True), picture(volume_ml=15.0, site="putamen")
    poor = {
        (age, gcs): ichprog.predict(model, scan, clinical={"age": age, "gcs": gcs})["prognosis"].probabilities["poor"]
        for age in (40, 85, None)
        for gcs in (15, 5, None)
    }
    for gcs in (15, 5, None):
        assert poor[85, gcs] > poor[40, gcs] + 0.05
    for age in (40, 85, None):
        assert poor[age, 5] > poor[age, 15] + 0.05
    image, fused = ichprog.load_model(NAME, offline=True), ichprog.predict(model, scan)
    assert ichprog.predict(image, scan)["gcs"].probabilities == pytest.approx(fused["gcs"].probabilities, abs=1e-5)


def test_predictions_follow_the_haemorrhage_and_the_atrophy(model):
    marks = Patient(11, 4).person.marks
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
    done, sockets = run_without_network(tmp_path, "demo", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert sockets == []
    assert "simulated" in done.stdout
    assert "simulated" in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["prognosis", "gcs", "age", "prognosis"]
    assert "with clinical values" in lines[4]
    assert "clinical values: age" in done.stdout
    assert "ICH score" in done.stdout
    assert "FUNC score" in done.stdout
    assert any(line.startswith("haemorrhage") for line in lines)
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
    assert not (tmp_path / "cache" / "ichprog").exists()


def test_the_documented_ablation_is_the_measured_one():
    """Otherwise run `python docs/embedded.py FOLDER --ablation`."""
    page, results = (DOCS / "simulation.md").read_text(), json.loads((DOCS / "embedded-ablation.json").read_text())
    everything, *others = results["rows"]
    for row in others:
        shown = next(line for line in page.splitlines() if line.startswith(f"| {row['design']} |"))
        for what, aucs in row.items():
            if what != "design":
                first, second = (auc - whole for auc, whole in zip(aucs, everything[what], strict=True))
                assert f"| {np.mean(aucs):.3f} ({first:.3f}, {second:.3f}) |" in shown, what
