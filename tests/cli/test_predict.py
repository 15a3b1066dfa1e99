"""`ichprog predict` and `ichprog explain`."""

import csv
import errno
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

import ichprog

from support.phantoms import brain_hu


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predict_prints_a_line_and_writes_a_row_for_each_scan(run, bright_model, small_scan, tmp_path):
    result = run("predict", small_scan, "-m", bright_model, "-o", tmp_path / "out.csv")
    assert "prognosis poor" in result.stdout
    assert result.stderr.count("research only") == 1
    (row,) = rows(tmp_path / "out.csv")
    assert list(row) == [
        "scan", "model", "status",
        "prognosis_label", "prognosis_good", "prognosis_poor", "prognosis_std",
        "gcs_label", "gcs_13-15", "gcs_9-12", "gcs_3-8", "gcs_std",
        "age_label", "age_<80", "age_>=80", "age_std",
        "warnings", "error_code", "error_message", "notice",
    ]  # fmt: skip
    assert (row["scan"], row["status"], row["error_code"], row["error_message"]) == (str(small_scan), "ok", "", "")
    assert "in-plane-spacing" in row["warnings"]
    assert "research only" not in row["warnings"]


def test_the_table_of_results_holds_the_prediction_in_four_decimals(run, bright_model, small_scan, tmp_path):
    run("predict", small_scan, "-m", bright_model, "-o", tmp_path / "out.csv")
    (row,) = rows(tmp_path / "out.csv")
    prediction = ichprog.predict(bright_model, small_scan)
    for name, task in prediction.tasks.items():
        assert sum(task.probabilities.values()) == pytest.approx(1)
        assert {label: row[f"{name}_{label}"] for label in task.probabilities} == {
            label: f"{value:.4f}" for label, value in task.probabilities.items()
        }
        assert row[f"{name}_label"] == task.label
        assert row[f"{name}_std"] == f"{task.std[task.label]:.4f}"


def test_one_fold_has_no_standard_deviation(run, bright_model, small_scan, tmp_path):
    run("predict", small_scan, "-m", bright_model, "--fold", 0, "-o", tmp_path / "out.csv")
    (row,) = rows(tmp_path / "out.csv")
    assert (row["prognosis_std"], row["gcs_std"], row["age_std"]) == ("", "", "")


def test_results_of_a_cohort_name_the_patients(run, bright_model, small_scan, tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text("patient,scan\nP7,small.nii.gz\nP8,none.nii.gz\n")
    result = run("predict", table, "-m", bright_model, "-o", tmp_path / "out.csv", code=1)
    assert result.stdout.startswith(f"P7  {small_scan}  prognosis")
    first, second = rows(tmp_path / "out.csv")
    assert next(iter(first)) == "patient"
    assert (first["patient"], first["status"]) == ("P7", "ok")
    assert (second["patient"], second["status"], second["error_code"]) == ("P8", "failed", "not-found")


def test_warnings_name_the_scan(run, bright_model, small_scan):
    result = run("predict", small_scan, "-m", bright_model)
    assert f"{small_scan}: in-plane-spacing: " in result.stderr


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_results_hold_the_whole_prediction(run, bright_model, small_scan, tmp_path, suffix):
    other = tmp_path / "other.nii.gz"
    shutil.copy(small_scan, other)
    out = tmp_path / f"out{suffix}"
    printed = run("predict", small_scan, other, "-m", bright_model, "-o", out, "--json").stdout.splitlines()
    text = out.read_text()
    written = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    assert written == [json.loads(line) for line in printed]
    assert [prediction["scan"] for prediction in written] == [str(small_scan), str(other)]
    assert list(written[0]) == ["scan", "model", "tasks", "warnings", "provenance"]
    assert "research only" in written[0]["provenance"]["notice"]


def write_bad_files(folder):
    """Write every kind of file that is no head CT; return a phrase of each error message by file name."""
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
        "empty": "empty", "truncated": "cannot be read", "text": "cannot be read", "flat": "volume",
        "series": "several volumes", "mr": "HU", "eight_bit": "8-bit", "three_slices": "3 slices",
        "zero": "empty", "nan": "NaN", "small_numbers": "HU",
    }  # fmt: skip


def test_bad_scans_are_recorded_and_the_others_are_predicted(run, bright_model, small_scan, tmp_path):
    phrases = write_bad_files(tmp_path / "bad")
    result = run("predict", tmp_path / "bad", small_scan, tmp_path / "none", "-m", bright_model, "-o",
                 tmp_path / "out.csv", code=1)  # fmt: skip
    by_name = {row["scan"].rpartition("/")[2].removesuffix(".nii.gz"): row for row in rows(tmp_path / "out.csv")}
    assert set(by_name) == {*phrases, "small", "none"}
    for name, phrase in phrases.items():
        row = by_name[name]
        assert phrase in row["error_message"], name
        assert (row["status"], row["prognosis_poor"], row["warnings"]) == ("failed", "", "")
        assert row["error_code"]
    assert by_name["none"]["error_code"] == "not-found"
    assert float(by_name["small"]["prognosis_poor"]) > 0.5
    assert result.stdout.count("FAILED") == len(phrases) + 1


def test_a_folder_is_searched_for_scans(run, bright_model, small_scan, tmp_path):
    for group in ("GOOD_PROGNOSIS", "POOR_PROGNOSIS"):
        (tmp_path / "data" / group).mkdir(parents=True)
        shutil.copy(small_scan, tmp_path / "data" / group / "7_brain.nii.gz")
    (tmp_path / "data" / "notes.txt").write_text("x")
    maps = tmp_path / "maps"
    run("predict", tmp_path / "data", "-m", bright_model, "--explain", "grad_cam", "--maps", maps,
        "--task", "prognosis", "--task", "gcs", "--masks", tmp_path / "masks")  # fmt: skip
    names = sorted(path.name for path in maps.iterdir())
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


def test_a_scan_given_twice_is_predicted_once(run, bright_model, small_scan, tmp_path):
    (tmp_path / "scans").mkdir()
    scan = shutil.copy(small_scan, tmp_path / "scans")
    assert len(run("predict", tmp_path / "scans", scan, "-m", bright_model).stdout.splitlines()) == 1


def test_an_empty_folder_fails_with_a_message(run, bright_model, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("predict", tmp_path / "empty", "-m", bright_model, code=1)
    assert "empty: the folder holds no scan" in result.stdout


def test_explain_writes_maps(run, bright_model, small_scan, tmp_path):
    out = tmp_path / "maps"
    result = run("explain", small_scan, "-m", bright_model, "--method", "guided_grad_cam", "--method", "grad_cam",
                 "--task", "age", "--label", "<80", "--option", "layer=features.1", "-o", out, "--json")  # fmt: skip
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert [saliency["method"] for saliency in printed] == ["guided_grad_cam", "grad_cam"]
    assert {saliency["label"] for saliency in printed} == {"<80"}
    assert printed[1]["grid_shape"] == [20, 96, 96]
    names = sorted(path.name for path in out.iterdir())
    assert names == [".explain.json", "small_age_grad_cam.nii.gz", "small_age_guided_grad_cam.nii.gz"]


def test_results_appear_whole_or_not_at_all(run, bright_model, small_scan, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("unchanged")
    result = run("predict", small_scan, "-m", bright_model, "-o", out, "--overwrite", "--explain", "grad_cam",
                 "--maps", small_scan, code=1)  # fmt: skip
    assert "small.nii.gz" in result.stderr
    assert out.read_text() == "unchanged"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bright", "out.csv", "small.nii.gz"]


def test_the_folder_of_the_results_is_created(run, bright_model, small_scan, tmp_path):
    run("predict", small_scan, "-m", bright_model, "-o", tmp_path / "none" / "deeper" / "out.csv")
    assert len(rows(tmp_path / "none" / "deeper" / "out.csv")) == 1


def test_results_that_cannot_be_written_fail_before_any_scan_is_predicted(run, bright_model, small_scan):
    result = run("predict", small_scan, "-m", bright_model, "-o", small_scan / "out.csv", code=1)
    assert "small.nii.gz" in result.stderr
    assert result.stdout == ""


def test_a_full_disk_is_reported(run, bright_model, small_scan, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib, "save", fail)
    result = run("explain", small_scan, "-m", bright_model, "-o", tmp_path / "maps", code=1)
    assert "No space left on device" in result.stderr
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [".explain.json"]


def test_predict_offline_uses_what_fetch_has_cached(run, hub_server, scan_path):
    printed = run("fetch", "perez2023.prognosis").stdout.splitlines()
    assert [line.split()[1:3] for line in printed] == [["fold", "0"], ["fold", "1"]]
    n_requests = len(hub_server.requests)
    assert "prognosis" in run("predict", scan_path, "-m", "perez2023.prognosis", "--offline").stdout
    assert len(hub_server.requests) == n_requests


def test_predict_without_network_and_cache_names_the_command_that_fetches(run, scan_path):
    result = run("predict", scan_path, "-m", "perez2023.prognosis", code=1)
    assert "ichprog fetch perez2023.prognosis" in result.stderr
