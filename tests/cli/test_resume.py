"""Files of results: nothing is lost by an interruption, and a resumed run ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from ichprog.cli import main
from ichprog.model import Model

from support.cohorts import read_table
from support.phantoms import brain_hu

SCANS = 5


@pytest.fixture
def folder(tmp_path):
    """Return a folder with five scans, one of which cannot be read."""
    (tmp_path / "scans").mkdir()
    for number in range(SCANS):
        image = nib.Nifti1Image(brain_hu((96, 96, 20), (50 + number, 40, 10)), np.diag([-2.2, -2.2, 7.0, 1.0]))
        image.to_filename(tmp_path / "scans" / f"{number}.nii.gz")
    (tmp_path / "scans" / "3.nii.gz").write_bytes(b"damaged")
    return tmp_path


@pytest.fixture
def predict(folder, bright_model):
    """Return a function that predicts the scans into a file."""

    def run(name, *arguments):
        command = ["predict", str(folder / "scans"), "-m", bright_model, "--runtime", "torch", "-o", str(folder / name)]
        return CliRunner().invoke(main, [*command, *map(str, arguments)])

    return run


def interrupt_after(monkeypatch, count, error=KeyboardInterrupt):
    """Let the prediction of a scan be interrupted after some scans."""
    original, calls = Model._prediction, iter(range(100))

    def prediction(self, *arguments):
        if next(calls) >= count:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(Model, "_prediction", prediction)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_an_interrupted_run_is_resumed_with_the_same_bytes(suffix, folder, predict, monkeypatch):
    whole = predict(f"whole.{suffix}")
    assert whole.exit_code == 1  # one scan cannot be read
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        stopped = predict(f"resumed.{suffix}")
    assert "Interrupted. 2 of 5 results are in" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert not (folder / f"resumed.{suffix}").exists()
    resumed = predict(f"resumed.{suffix}", "--resume")
    assert resumed.exit_code == 1
    assert "2 of 5 scans have results" in resumed.stderr
    assert "0.nii.gz" not in resumed.stdout
    assert (folder / f"resumed.{suffix}").read_bytes() == (folder / f"whole.{suffix}").read_bytes()
    assert {path.name for path in folder.iterdir()} >= {f"whole.{suffix}", f"resumed.{suffix}"}
    assert not [path.name for path in folder.iterdir() if "journal" in path.name]


def test_a_finished_file_is_neither_overwritten_nor_predicted_again(folder, predict, monkeypatch):
    predict("results.csv")
    before = (folder / "results.csv").read_bytes()
    refused = predict("results.csv")
    assert refused.exit_code == 1
    assert "exists. Continue the run with --resume" in refused.output
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0, AssertionError)
        assert predict("results.csv", "--resume").exit_code == 1  # the failed scan stays failed
    assert (folder / "results.csv").read_bytes() == before
    assert predict("results.csv", "--overwrite").exit_code == 1
    assert (folder / "results.csv").read_bytes() == before


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_new_and_failed_scans_are_added_to_a_finished_file(suffix, folder, predict):
    predict(f"results.{suffix}")
    scan = (folder / "scans" / "1.nii.gz").read_bytes()
    for name in ("3", "5"):
        (folder / "scans" / f"{name}.nii.gz").write_bytes(scan)
    assert predict(f"results.{suffix}", "--resume").exit_code == 1  # 3 stays failed
    assert predict(f"results.{suffix}", "--resume", "--retry-failed").exit_code == 0
    predict(f"whole.{suffix}")
    assert (folder / f"results.{suffix}").read_bytes() == (folder / f"whole.{suffix}").read_bytes()


def test_a_run_with_other_settings_is_not_resumed(predict, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        predict("results.csv")
    other = predict("results.csv", "--resume", "--brain", "given")
    assert other.exit_code == 1
    assert "belongs to another run: brain was auto, is given" in other.output


def test_a_journal_that_was_cut_in_the_middle_of_a_line_loses_that_line_only(folder, predict, monkeypatch):
    predict("whole.csv")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        predict("results.csv")
    journal = folder / "results.csv.journal"
    journal.write_text(journal.read_text()[:-30])
    assert "1 of 5 scans have results" in predict("results.csv", "--resume").stderr
    assert (folder / "results.csv").read_bytes() == (folder / "whole.csv").read_bytes()


def test_shards_together_give_all_scans(folder, predict):
    predict("whole.csv")
    rows = []
    for number in (1, 2):
        predict(f"{number}.csv", "--shard", f"{number}/2")
        rows += read_table(folder / f"{number}.csv")
    whole = read_table(folder / "whole.csv")
    without_notice = [{k: v for k, v in row.items() if k != "notice"} for row in sorted(rows, key=lambda r: r["scan"])]
    assert without_notice == [{k: v for k, v in row.items() if k != "notice"} for row in whole]
    assert "Expected K/N with K from 1 to N" in predict("x.csv", "--shard", "3/2").output


@pytest.mark.parametrize("name", ["results.csv", "results.json", "results.csv.journal"])
def test_a_file_that_holds_no_results_is_refused_and_kept(name, folder, predict):
    (folder / name).write_text("no results")
    result = predict(name.removesuffix(".journal"), "--resume")
    assert result.exit_code == 1
    assert f"{name} cannot be read as results" in result.output
    assert (folder / name).read_text() == "no results"
    assert predict("other.csv", "--retry-failed").exit_code == 2


def test_resuming_needs_a_file(folder, bright_model):
    result = CliRunner().invoke(main, ["predict", str(folder / "scans"), "-m", bright_model, "--resume"])
    assert result.exit_code == 2
    assert "need -o" in result.output


def start(folder, name, *arguments):
    command = [sys.executable, "-m", "ichprog", "predict", "scans", "-m", "compact.prognosis_gcs3_age"]
    command += ["--runtime", "torch", "-o", name, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_loses_no_result(folder):
    whole = start(folder, "whole.jsonl")
    whole.communicate()
    assert whole.returncode == 1
    process = start(folder, "results.jsonl")
    journal, deadline = folder / "results.jsonl.journal", time.monotonic() + 120
    while time.monotonic() < deadline and (not journal.exists() or journal.read_text().count("\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "results.jsonl").exists()
    resumed = start(folder, "results.jsonl", "--resume")
    _, messages = resumed.communicate()
    assert "of 5 scans have results" in messages
    assert (folder / "results.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert len([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]) == SCANS


# `nibabel.save` ends the process as a kill does, before the second file that it writes has its name.
KILLED_WHILE_WRITING = """
import os, signal, sys
import nibabel

save, calls = nibabel.save, iter(range(9))

def save_and_die(image, path):
    save(image, path)
    if next(calls):
        os.kill(os.getpid(), signal.SIGKILL)

nibabel.save = save_and_die
from ichprog.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "arguments",
    [["predict", "--masks", "masks", "-o", "results.csv"], ["explain", "--method", "grad_cam", "-o", "maps"]],
    ids=["masks of predict", "maps of explain"],
)
def test_a_process_killed_while_it_writes_leaves_no_other_file_once_resumed(arguments, folder):
    command, *options = arguments
    once, twice = folder / "once", folder / "twice"
    for place in (once, twice):
        place.mkdir()
    model = ["-m", "compact.prognosis_gcs3_age", "--fold", "0", "--runtime", "torch"]
    run = [command, str(folder / "scans"), *model, *options]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *run], cwd=twice, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    partial = [path for path in twice.rglob(".*.nii.gz") if path.is_file()]
    assert len(partial) == 1
    for place, extra in ((once, []), (twice, ["--resume"])):
        subprocess.run([sys.executable, "-m", "ichprog", *run, *extra], cwd=place, capture_output=True)
    assert files(twice) == files(once)
    assert len([name for name in files(once) if name.endswith(".nii.gz")]) >= SCANS - 1


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_reader_that_ends_early_does_not_cost_the_file(folder):
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "ichprog", "predict", "scans", "-m", "compact.prognosis_gcs3_age"]
    command += ["--runtime", "torch", "-o", "results.csv"]
    process = subprocess.Popen(command, cwd=folder, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.close(reader)  # nobody reads
    _, messages = process.communicate()
    assert "Broken pipe" not in messages
    assert "Traceback" not in messages
    assert len(read_table(Path(folder) / "results.csv")) == SCANS


def test_only_scans_without_maps_are_explained_again(folder, bright_model, monkeypatch):
    command = ["explain", str(folder / "scans"), "-m", bright_model, "--runtime", "torch", "--method", "grad_cam"]
    command += ["-o", str(folder / "maps")]
    assert CliRunner().invoke(main, command).exit_code == 1  # one scan cannot be read
    maps = {path.name: path.read_bytes() for path in (folder / "maps").glob("[0-9]*")}
    assert len(maps) == SCANS - 1
    (folder / "maps" / "1_prognosis_grad_cam.nii.gz").unlink()
    explained = []
    original = Model.load_scan

    def load_scan(self, source, **options):
        explained.append(Path(str(source)).name)
        return original(self, source, **options)

    monkeypatch.setattr(Model, "load_scan", load_scan)
    resumed = CliRunner().invoke(main, [*command, "--resume"])
    assert "3 of 5 scans have their maps" in resumed.stderr
    assert [name for name in explained if name.endswith(".gz")][:2] == ["1.nii.gz", "3.nii.gz"]
    assert {path.name: path.read_bytes() for path in (folder / "maps").glob("[0-9]*")} == maps
