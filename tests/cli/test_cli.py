"""The command line, as its user meets it."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from ichprog import zoo
from ichprog.cli import main

from support.models import REPOSITORY
from support.phantoms import brain_hu


@pytest.fixture
def run():
    def invoke(*arguments, code=0):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture
def small_scan(tmp_path):
    path = tmp_path / "small.nii.gz"
    nib.Nifti1Image(brain_hu((96, 96, 30)), np.diag([-2.5, -2.5, 5, 1])).to_filename(path)
    return path


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_models_lists_the_zoo(run):
    assert len(run("models").stdout.splitlines()) >= 10
    listed = json.loads(run("models", "densenet121.*", "--json").stdout)
    assert [m["name"] for m in listed] == [s.name for s in zoo.list_models("densenet121.*")]
    assert listed[0]["input"]["window"] == {"low": 15.0, "high": 100.0, "above": "zero"}
    assert run("models", "nothing*").stdout == ""


def test_predict_writes_a_line_and_a_row_a_scan(run, bright_model, small_scan, tmp_path):
    result = run("predict", small_scan, "-m", bright_model, "-o", tmp_path / "out.csv")
    assert "prognosis poor" in result.stdout
    assert "research only" in result.stderr
    (row,) = rows(tmp_path / "out.csv")
    assert list(row) == [
        "scan", "model",
        "prognosis_label", "prognosis_good", "prognosis_poor",
        "gcs_label", "gcs_13-15", "gcs_9-12", "gcs_3-8",
        "age_label", "age_<80", "age_>=80",
        "warnings",
    ]  # fmt: skip
    assert row["scan"] == str(small_scan)
    for task in ("prognosis", "gcs", "age"):
        values = [float(v) for key, v in row.items() if key.startswith(f"{task}_") and not key.endswith("_label")]
        assert sum(values) == pytest.approx(1)
    assert "in-plane-spacing" in row["warnings"]
    assert "research only" in row["warnings"]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_results_as_json(run, bright_model, small_scan, tmp_path, ending):
    other = tmp_path / "other.nii.gz"
    shutil.copy(small_scan, other)
    out = tmp_path / f"out{ending}"
    printed = run("predict", small_scan, other, "-m", bright_model, "-o", out, "--json").stdout.splitlines()
    text = out.read_text()
    written = json.loads(text) if ending == ".json" else [json.loads(line) for line in text.splitlines()]
    assert written == [json.loads(line) for line in printed]
    assert [w["scan"] for w in written] == [str(small_scan), str(other)]
    assert list(written[0]) == ["scan", "model", "tasks", "warnings", "provenance"]


def bad_files(folder):
    """Every kind of file that is no head CT, with a word of what is said about it."""
    hu = brain_hu((64, 64, 30))
    affine = np.diag([-3.8, -3.8, 5, 1])
    rng = np.random.default_rng(0)
    folder.mkdir()

    def save(name, values):
        nib.Nifti1Image(values, affine).to_filename(folder / f"{name}.nii.gz")

    save("whole", hu)
    (folder / "empty.nii.gz").touch()
    (folder / "truncated.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:4000])
    (folder / "text.nii.gz").write_text("dear diary")
    save("flat", hu[:, :, 0])
    save("series", np.stack([hu] * 3, axis=-1))
    save("mr", (np.where(hu > 0, 400 + 200 * rng.random(hu.shape), 0)).astype(np.int16))
    save("eight_bit", (np.clip(hu, 0, 80) / 80 * 255).astype(np.uint8))
    save("three_slices", hu[:, :, 14:17])
    save("zero", np.zeros_like(hu))
    save("nan", np.where(hu == 68, np.nan, hu).astype(np.float32))
    save("small_numbers", (hu / 100).astype(np.float32))
    (folder / "whole.nii.gz").unlink()
    return {
        "empty": "the file is empty", "truncated": "cannot be read", "text": "cannot be read", "flat": "no volume",
        "series": "a series of volumes", "mr": "not HU", "eight_bit": "8-bit", "three_slices": "3 slices",
        "zero": "empty", "nan": "NaN", "small_numbers": "HU",
    }  # fmt: skip


def test_bad_input_is_recorded_and_the_rest_goes_on(run, bright_model, small_scan, tmp_path):
    said = bad_files(tmp_path / "bad")
    result = run("predict", tmp_path / "bad", small_scan, tmp_path / "none", "-m", bright_model, "-o",
                 tmp_path / "out.csv", code=1)  # fmt: skip
    found = {row["scan"].rpartition("/")[2].removesuffix(".nii.gz"): row for row in rows(tmp_path / "out.csv")}
    assert set(found) == {*said, "small", "none"}
    for name, words in said.items():
        assert words in found[name]["warnings"], name
        assert found[name]["prognosis_poor"] == ""
    assert "no such file" in found["none"]["warnings"]
    assert float(found["small"]["prognosis_poor"]) > 0.5
    assert result.stdout.count("FAILED") == len(said) + 1


def test_a_folder_is_searched_for_scans(run, bright_model, small_scan, tmp_path):
    for group in ("GOOD_PROGNOSIS", "POOR_PROGNOSIS"):
        (tmp_path / "data" / group).mkdir(parents=True)
        shutil.copy(small_scan, tmp_path / "data" / group / "7_brain.nii.gz")
    (tmp_path / "data" / "notes.txt").write_text("x")
    maps = tmp_path / "maps"
    run("predict", tmp_path / "data", "-m", bright_model, "--explain", "grad_cam", "--maps", maps,
        "--task", "prognosis", "--task", "gcs", "--masks", tmp_path / "masks")  # fmt: skip
    names = sorted(p.name for p in maps.iterdir())
    assert names == sorted(
        f"{group}_PROGNOSIS_7_brain_{task}_grad_cam.nii.gz"
        for group in ("GOOD", "POOR")
        for task in ("prognosis", "gcs")
    )
    written = nib.load(maps / names[0])
    assert written.shape == (96, 96, 30)
    assert np.allclose(written.affine, nib.load(small_scan).affine)
    mask = nib.load(tmp_path / "masks" / "GOOD_PROGNOSIS_7_brain_brain.nii.gz")
    assert set(np.unique(mask.get_fdata())) == {0, 1}


def test_explain_writes_maps(run, bright_model, small_scan, tmp_path):
    out = tmp_path / "maps"
    result = run("explain", small_scan, "-m", bright_model, "--method", "guided_grad_cam", "--method", "grad_cam",
                 "--task", "age", "--label", "<80", "--option", "layer=features.1", "-o", out, "--json")  # fmt: skip
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert [s["method"] for s in said] == ["guided_grad_cam", "grad_cam"]
    assert {s["label"] for s in said} == {"<80"}
    assert said[1]["grid_shape"] == [20, 96, 96]
    assert sorted(p.name for p in out.iterdir()) == ["small_age_grad_cam.nii.gz", "small_age_guided_grad_cam.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict"], "Missing argument"),
        (["predict", "SCAN", "-m", "densenet121.prognosys"], "Did you mean densenet121.prognosis"),
        (["predict", "SCAN", "-m", "BRIGHT", "--fold", "9"], "Unknown fold"),
        (["predict", "SCAN", "-m", "BRIGHT", "--brain", "perhaps"], "Unknown brain mode 'perhaps'"),
        (["predict", "SCAN", "-m", "BRIGHT", "--device", "tpu"], "Unknown device 'tpu'"),
        (["predict", "SCAN", "-m", "BRIGHT", "-o", "out.xlsx"], "Unknown format of results '.xlsx'"),
        (["predict", "SCAN", "-m", "BRIGHT", "--explain", "grad_cam"], "--explain and --maps go together"),
        (["predict", "SCAN", "-m", "BRIGHT", "--explain", "gradcam", "--maps", "m"], "Did you mean grad_cam"),
        (["explain", "SCAN", "-m", "BRIGHT", "--option", "layer", "-o", "m"], "NAME=VALUE"),
        (["explain", "SCAN", "-m", "BRIGHT", "--task", "sex", "-o", "m"], "Unknown task"),
        (["fetch"], "Give names of models, or --all"),
        (["fetch", "nothing"], "Unknown model 'nothing'"),
        (["doctor", "nothing"], "Unknown model 'nothing'"),
        (["unheard"], "No such command"),
    ],
)
def test_wrong_use_is_said_and_exits_with_2(run, bright_model, small_scan, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    names = {"SCAN": small_scan, "BRIGHT": bright_model}
    assert said in run(*(names.get(a, a) for a in arguments), code=2).stderr


def test_results_appear_whole_or_not_at_all(run, bright_model, small_scan, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("kept")
    result = run("predict", small_scan, "-m", bright_model, "-o", out, "--explain", "grad_cam", "--maps",
                 small_scan, code=1)  # fmt: skip
    assert "small.nii.gz" in result.stderr
    assert out.read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bright", "out.csv", "small.nii.gz"]


def test_an_unwritable_output_is_said_before_any_work(run, bright_model, small_scan, tmp_path):
    result = run("predict", small_scan, "-m", bright_model, "-o", tmp_path / "none" / "out.csv", code=1)
    assert "No such file or directory" in result.stderr
    assert result.stdout == ""


def test_a_full_disk_is_said(run, bright_model, small_scan, monkeypatch, tmp_path):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    result = run("explain", small_scan, "-m", bright_model, "-o", tmp_path / "maps", code=1)
    assert "No space left on device" in result.stderr
    assert list((tmp_path / "maps").iterdir()) == []


def test_fetch_fills_the_cache_and_offline_uses_it(run, hub_server, scan_path):
    printed = run("fetch", "perez2023.prognosis").stdout.splitlines()
    assert [line.split()[1:3] for line in printed] == [["fold", "0"], ["fold", "1"]]
    asked = len(hub_server.requests)
    assert "prognosis" in run("predict", scan_path, "-m", "perez2023.prognosis", "--offline").stdout
    assert len(hub_server.requests) == asked


def test_fetch_all_goes_on_after_a_failure(run, hub_server):
    hub_server.faults["/Baseline_DenseNet_PrognosisICH/"] = 500
    result = run("fetch", "--all", "--json", code=1)
    assert {json.loads(line)["model"] for line in result.stdout.splitlines()} == {
        spec.name for spec in zoo.list_models() if spec.name != "densenet121.prognosis"
    }
    assert "densenet121.prognosis" in result.stderr
    assert "500" in result.stderr


def test_without_network_and_cache_predict_says_the_command(run, scan_path):
    result = run("predict", scan_path, "-m", "perez2023.prognosis", code=1)
    assert "ichprog fetch perez2023.prognosis" in result.stderr


def test_doctor_tells_what_is_whole_and_what_is_not(run, hub_server):
    report = json.loads(run("doctor", "perez2023.prognosis", "--json").stdout)
    assert report["model"]["probe"]["state"] == "none stored"
    assert "torch" in report["installed"]
    assert all(plugin["problem"] is None for plugin in report["plugins"])
    assert [file["is_valid"] for file in report["cache"]["files"]] == [True, True]
    assert REPOSITORY.repo in report["cache"]["files"][0]["source"]
    from pathlib import Path

    path = Path(report["cache"]["files"][0]["path"])
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    assert "DAMAGED" in run("doctor", code=1).stdout


def test_the_golden_probe_tells_weights_that_compute_wrongly(run, bright_model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    import ichprog

    model = ichprog.load_model(bright_model)
    seeded = np.random.default_rng(3).random((1, 8, 12, 12), np.float32)
    config = tmp_path / "bright" / "config.json"
    data = json.loads(config.read_text())
    data["golden_output"] = {
        "seed": 3,
        "shape": [8, 12, 12],
        "logits": {
            str(fold): {task: answer.logits[0].tolist() for task, answer in answers.items()}
            for fold, answers in enumerate(model.predict_grids(seeded))
        },
    }
    config.write_text(json.dumps(data))
    assert "golden probe: holds" in run("doctor", bright_model).stdout
    path = tmp_path / "bright" / "fold1.safetensors"
    state = load_file(path)
    state["backbone.features.0.bias"] += torch.tensor(0.01)
    save_file(state, path)
    assert "golden probe: differs" in run("doctor", bright_model, code=1).stdout
