"""A task with masks as an auxiliary task: the study file of the documentation, with few patients."""

import json
from pathlib import Path

import nibabel as nib
import pytest
from safetensors.numpy import load_file

from ichprog.evaluation.predictions import Predictions
from ichprog.study import Study, run

STUDIES = Path(__file__).parents[2] / "benchmarks" / "study"
SMALLER = {
    "patients = 1200": "patients = 40",
    "seeds = [1, 2, 3, 4, 5]": "seeds = [1]",
    "folds = 3": "folds = 2",
    "epochs = 10": "epochs = 1",
    "warmup_epochs = 1": "warmup_epochs = 0",
    "matrix = 48": "matrix = 24",
}


@pytest.mark.usefixtures("one_thread", "one_thread_in_workers")
def test_masks_of_all_patients_are_learnt_with_the_outcome_of_those_who_bleed(tmp_path):
    text = (STUDIES / "haemorrhage.toml").read_text(encoding="utf-8")
    for long, short in SMALLER.items():
        assert long in text
        text = text.replace(long, short)
    path = tmp_path / "study.toml"
    path.write_text(text.replace('model = "', f'model = "{STUDIES}/'), encoding="utf-8")
    out = tmp_path / "out"
    statuses = run(Study.read(path), out, cache_dir=tmp_path / "cache")
    assert {status.state for status in statuses} == {"done"}, [status.error for status in statuses]
    predictions = Predictions.read(out / "predictions.csv")
    assert predictions.tasks("outcome") == ("prognosis",)
    assert predictions.tasks("outcome_haemorrhage") == ("prognosis", "haemorrhage")
    bleeds = {path.name.split(".")[0]: nib.load(path).get_fdata().any() for path in (out / "patients/masks").iterdir()}
    outcome = predictions.entries["outcome_haemorrhage", "prognosis", "test"]
    assert set(outcome.patients) == {name for name, value in bleeds.items() if value}
    without = {name for name, value in bleeds.items() if not value}
    assert len(without) == 11
    for fold in json.loads((out / "study.json").read_text())["membership"].values():
        assert without < set(fold["train"]), "without blood there is no outcome, but a mask to learn"
    weights = load_file(out / "runs" / "outcome_haemorrhage" / "fold0.safetensors")
    assert any(name.startswith("heads.haemorrhage.voxels") for name in weights)
