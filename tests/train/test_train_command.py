"""The command `ichprog train`."""

import dataclasses
import json
import re
import sys

import pytest
from click.testing import CliRunner

from ichprog.cli import main
from ichprog.train import QUIRKS

from support.cohorts import read_table, with_columns

FAST = ["--only-fold", 0, "--epochs", 1, "--set", "validation_fraction=0.2"]


@pytest.fixture
def run_train(folder, tmp_path):
    """Run the command with the small model; the run's folder is `run`."""

    def run(*arguments):
        fixed = ["-m", folder / "spec.json", "-o", tmp_path / "run", "--cache-dir", folder / "c"]
        return CliRunner().invoke(main, ["train", *map(str, [*fixed, *arguments])])

    return run


def read_record(tmp_path):
    return json.loads((tmp_path / "run" / "run.json").read_text())


def test_the_command_trains_and_prints_the_out_of_fold_auc(run_train, folder, tmp_path):
    arguments = [folder / "cohort.csv", "--folds", 4, *FAST, "--preset", "paper", "--seed", 3]
    done = run_train(*arguments)
    assert done.exit_code == 0, done.output
    assert f"local-dir:{tmp_path / 'run'}" in done.stdout
    pattern = r"prognosis: out-of-fold AUC 0\.\d{3} \(95 % CI [01]\.\d{3} to [01]\.\d{3}\), 8 patients, 1 fold\n"
    assert re.search(pattern, done.stdout)
    assert done.stderr.count("as published:") == len(QUIRKS)
    assert "fold 0, epoch 1 of 1: loss" in done.stderr
    again = run_train(*arguments)
    assert again.exit_code == 1
    assert "--resume" in again.stderr
    assert run_train(*arguments, "--resume").exit_code == 0
    assert read_record(tmp_path)["protocol"]["seed"] == 3


def test_the_auc_is_that_of_the_out_of_fold_table(trained):
    from sklearn.metrics import roc_auc_score

    from ichprog.train.summary import out_of_fold_aucs

    rows = read_table(trained / "out_of_fold.csv")
    prognosis, gcs, _ = out_of_fold_aucs(trained)
    expected = roc_auc_score([r["prognosis_true"] == "poor" for r in rows], [float(r["prognosis_poor"]) for r in rows])
    assert prognosis.auc == pytest.approx(expected)
    assert prognosis.low <= prognosis.auc <= prognosis.high
    assert (prognosis.patients, prognosis.folds) == (32, 4)
    assert gcs.patients == sum(row["gcs_true"] != "" for row in rows)


def test_several_tables_are_combined(run_train, folder, cohort, tmp_path):
    """The patients of a second table without outcomes are trained on and not tested."""
    first, second = (
        dataclasses.replace(cohort, patients=part) for part in (cohort.patients[:20], cohort.patients[20:])
    )
    first.write(folder / "first.csv")
    with_columns(second, poor_outcome=lambda i: "").write(folder / "second.csv")
    done = run_train(folder / "first.csv", folder / "second.csv", "--folds", 2, *FAST)
    assert done.exit_code == 0, done.output
    fold = read_record(tmp_path)["membership"]["0"]
    assert {f"P{number}" for number in range(20, 32)} <= set(fold["train"])
    assert len(read_table(tmp_path / "run" / "out_of_fold.csv")) == 10


def test_tasks_are_edited_on_the_command_line(run_train, folder, tmp_path):
    edits = ["--head", "gcs=softmax", "--drop-task", "age", "--loss-weight", "gcs=0.25"]
    done = run_train(folder / "cohort.csv", "--folds", 4, *FAST, *edits)
    assert done.exit_code == 0, done.output
    prognosis, gcs = read_record(tmp_path)["model"]["tasks"]
    assert prognosis["name"] == "prognosis"
    assert gcs["head"]["name"] == "softmax"
    assert gcs["loss_weight"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        (["--preset", "papers"], "Unknown preset 'papers'. Did you mean paper"),
        (["--set", "learningrate=1"], "Unknown key of protocol 'learningrate'. Did you mean learning_rate"),
        (["--set", "learning_rate"], "Invalid --set 'learning_rate'. Expected NAME=VALUE"),
        (["--set", "learning_rate=quick"], "Invalid protocol.learning_rate 'quick'. Expected a finite number"),
        (["--loss-weighting", "learned"], "Invalid protocol.loss_weighting 'learned'. Expected 'fixed' or"),
        (["-m", "densenet"], "Unknown model 'densenet'"),
        (["--folds", "40"], "fewer than 40 folds"),
        (["--head", "gsc=softmax"], "Unknown task .*'gsc'. Did you mean gcs"),
        (["--head", "gcs=softmaxx", "--folds", "4", "--set", "validation_fraction=0.2"], "'softmaxx'.*softmax"),
        (["--loss-weight", "gcs=high"], "Invalid --loss-weight gcs 'high'. Expected a number"),
        (["--drop-task", "gcs", "--drop-task", "age", "--drop-task", "prognosis"], "at least one task"),
        (
            ["--track", "tensorbord", "--folds", "4", "--set", "validation_fraction=0.2"],
            "Unknown tracker 'tensorbord'. Did you mean tensorboard",
        ),
    ],
)
def test_wrong_use_is_refused_before_training(arguments, expected_message, run_train, folder, tmp_path):
    done = run_train(folder / "cohort.csv", *arguments)
    assert done.exit_code == 2, done.output
    text = " ".join(done.stderr.split())
    assert re.search(expected_message, text)
    assert len(text) < 700
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "expected_message"),
    [
        ("sklearn.model_selection", [], "scikit-learn. Install it with: pip install 'ichprog[train]'"),
        (
            "accelerate.tracking",
            ["--track", "tensorboard"],
            "accelerate. Install it with: pip install 'ichprog[train]'",
        ),
    ],
)
def test_a_missing_extra_is_one_sentence(module, arguments, expected_message, run_train, folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    done = run_train(folder / "cohort.csv", "--folds", 4, *FAST, *arguments)
    assert done.exit_code == 1
    assert expected_message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
