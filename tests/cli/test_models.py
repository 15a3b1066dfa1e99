"""`ichprog models`, `fetch` and `doctor`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ichprog
from ichprog import zoo

from support import reference_pipeline
from support.hub_server import HubServer
from support.models import REPOSITORY


def test_models_lists_the_zoo(run):
    assert len(run("models").stdout.splitlines()) == len(zoo.list_models())
    listed = json.loads(run("models", "densenet121.*", "--json").stdout)
    assert [model["name"] for model in listed] == [spec.name for spec in zoo.list_models("densenet121.*")]
    assert listed[0]["input"]["window"] == {"low": 15.0, "high": 100.0, "above": "zero"}


def test_models_refuses_a_pattern_that_matches_no_model(run):
    result = run("models", "zzz*", code=2)
    assert "Unknown model or pattern 'zzz*'. Expected one of: " in result.stderr
    assert result.stdout == ""


@pytest.fixture
def hub_of_small_files(tmp_path, monkeypatch):
    """Serve a file of a few numbers for every published model. To fetch it, no network is built."""
    for name in reference_pipeline.PUBLISHED:
        path = reference_pipeline.checkpoint(name, tmp_path / "hub" / REPOSITORY.repo)
        path.parent.mkdir(parents=True)
        keys = zoo.find(name).weights.keys or {"": ""}
        torch.save({f"{prefix}weight": torch.ones(2) for prefix in keys}, path)
    with HubServer(tmp_path / "hub", REPOSITORY.revision) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_fetch_all_continues_after_a_failure(run, hub_of_small_files):
    hub_of_small_files.faults["/Baseline_DenseNet_PrognosisICH/"] = 500
    result = run("fetch", "--all", "--json", code=1)
    fetched = {json.loads(line)["model"] for line in result.stdout.splitlines()}
    assert set(reference_pipeline.PUBLISHED) - fetched == {"densenet121.prognosis"}
    assert "densenet121.prognosis" in result.stderr
    assert "500" in result.stderr


def test_doctor_reports_valid_and_damaged_files(run, hub_server):
    report = json.loads(run("doctor", "perez2023.prognosis", "--json").stdout)
    assert report["model"]["golden_output"]["state"] == "none stored"
    assert "torch" in report["installed"]
    assert all(plugin["problem"] is None for plugin in report["plugins"])
    assert [file["is_valid"] for file in report["cache"]["files"]] == [True, True]
    assert REPOSITORY.repo in report["cache"]["files"][0]["source"]
    path = Path(report["cache"]["files"][0]["path"])
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    assert "DAMAGED" in run("doctor", code=1).stdout


def test_doctor_detects_weights_that_compute_wrongly(run, bright_model, tmp_path):
    model = ichprog.load_model(bright_model, runtime="torch")
    grids = np.random.default_rng(3).random((1, 8, 12, 12), np.float32)
    config = tmp_path / "bright" / "config.json"
    data = json.loads(config.read_text())
    data["golden_output"] = {
        "seed": 3,
        "shape": [8, 12, 12],
        "logits": {
            str(fold): {task: output.logits[0].tolist() for task, output in outputs.items()}
            for fold, outputs in enumerate(model.predict_grids(grids))
        },
    }
    config.write_text(json.dumps(data))
    assert "golden output: holds" in run("doctor", bright_model).stdout
    path = tmp_path / "bright" / "fold1.safetensors"
    state = load_file(path)
    state["backbone.features.0.bias"] += torch.tensor(0.01)
    save_file(state, path)
    assert "golden output: differs" in run("doctor", bright_model, code=1).stdout
