"""Starting from the backbones of another run, frozen backbones, and several learning rates."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from ichprog import InvalidValueError, RunError
from ichprog.cohort import Cohort
from ichprog.spec import PluginRef
from ichprog.train import PRESETS, train

PROTOCOL = PRESETS["default"].replace(epochs=2, warmup_epochs=1, batch_size=4, recalibrate=False)


@pytest.fixture(scope="module")
def started(cohort, spec, tmp_path_factory, options):
    """Return the run that others start from: two folds, one epoch each."""
    out = tmp_path_factory.mktemp("start") / "run"
    return train(cohort, spec, out, folds=2, protocol=PROTOCOL.replace(epochs=1), options=options)


def weights(run, fold=0):
    return load_file(run / f"fold{fold}.safetensors")


def backbone(state):
    return {key: values for key, values in state.items() if key.startswith("backbone.")}


def test_a_frozen_backbone_keeps_its_weights_and_its_statistics(started, cohort, spec, tmp_path, options):
    frozen = train(
        cohort, spec, tmp_path / "run", folds=2, only_folds=[1], options=options,
        protocol=PROTOCOL.replace(freeze_backbone=True), start_from=started,
    )  # fmt: skip
    before, after = weights(started, 1), weights(frozen, 1)
    assert backbone(before).keys() == backbone(after).keys()
    assert all(torch.equal(values, after[key]) for key, values in backbone(before).items())
    heads = [key for key in after if key.startswith("heads.")]
    assert any(not torch.equal(before[key], after[key]) for key in heads)


def test_training_continues_from_the_backbone(started, cohort, spec, tmp_path, options):
    """With a tiny learning rate, the backbone stays near that of the same fold of the other run."""
    run = train(
        cohort, spec, tmp_path / "run", folds=2, options=options,
        protocol=PROTOCOL.replace(learning_rate=1e-9, weight_decay=0.0), start_from=started,
    )  # fmt: skip
    for fold in (0, 1):
        before, after = weights(started, fold), weights(run, fold)
        learned = [key for key in backbone(before) if key.endswith("weight")]
        assert all(torch.allclose(before[key], after[key], atol=1e-5) for key in learned)
    record = json.loads((run / "run.json").read_text())
    assert set(record["start_from"]) == {"0", "1"}
    with pytest.raises(RunError, match="start_from"):  # it is part of what the run is
        train(cohort, spec, run, folds=2, resume=True, options=options,
              protocol=PROTOCOL.replace(learning_rate=1e-9, weight_decay=0.0))  # fmt: skip


def test_other_folds_networks_and_folders_are_refused(started, cohort, spec, tmp_path, options):
    other_folds = PROTOCOL.replace(split_seed=9)
    with pytest.raises(RunError, match=r"held out in fold 0 of this run\. Use the same folds"):
        train(cohort, spec, tmp_path / "a", folds=2, protocol=other_folds, start_from=started, options=options)
    wider = dataclasses.replace(spec, backbone=PluginRef("compact", {"width": 6}))
    with pytest.raises(RunError, match="another backbone or input"):
        train(cohort, wider, tmp_path / "b", folds=2, protocol=PROTOCOL, start_from=started, options=options)
    with pytest.raises(RunError, match="Choose the folder of a run"):
        train(cohort, spec, tmp_path / "c", folds=2, protocol=PROTOCOL, start_from=tmp_path, options=options)
    with pytest.raises(InvalidValueError, match="Give one with `start_from`"):
        train(cohort, spec, tmp_path / "d", folds=2, protocol=PROTOCOL.replace(freeze_backbone=True), options=options)
    assert not list(tmp_path.glob("[abcd]"))


def test_a_fold_keeps_the_best_of_several_learning_rates(cohort, spec, tmp_path, options):
    """The result equals that of the chosen rate alone, and the choice is the lowest validation loss."""
    rates = (1e-7, 3e-3)
    tuned = train(
        cohort, spec, tmp_path / "tuned", folds=2, only_folds=[0], options=options,
        protocol=PROTOCOL.replace(learning_rates=rates),
    )  # fmt: skip
    alone = [
        train(cohort, spec, tmp_path / f"{rate:g}", folds=2, only_folds=[0], options=options,
              protocol=PROTOCOL.replace(learning_rate=rate))
        for rate in rates
    ]  # fmt: skip
    losses = [json.loads((run / "folds/0/result.json").read_text())["best"]["val_loss"] for run in alone]
    chosen = losses.index(min(losses))
    result = json.loads((tuned / "folds/0/result.json").read_text())
    assert result["learning_rate"] == rates[chosen]
    assert result["best"]["val_loss"] == losses[chosen]
    expected, found = weights(alone[chosen]), weights(tuned)
    assert all(torch.equal(values, found[key]) for key, values in expected.items())
    assert not list((tuned / "folds/0").glob("checkpoint*"))


def test_the_command_starts_from_a_run(started, folder, tmp_path):
    from click.testing import CliRunner

    from ichprog.cli import main

    table = folder / "cohort.csv"
    assert len(Cohort.read(table))
    done = CliRunner().invoke(
        main,
        ["train", str(table), "--model", str(started / "config.json"), "--output", str(tmp_path / "run"), "--folds",
         "2", "--only-fold", "0", "--brain", "given", "--epochs", "1", "--set", "warmup_epochs=0", "--set",
         "batch_size=4", "--set", "freeze_backbone=true", "--start-from", str(started), "--cache-dir",
         str(tmp_path / "cache")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert all(
        torch.equal(values, weights(tmp_path / "run")[key]) for key, values in backbone(weights(started)).items()
    )
