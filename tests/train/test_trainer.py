"""Training a fold: steps, checkpoints, early stopping, loss curves."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import ichprog
from ichprog import RunError, registry
from ichprog.backbones import Backbone
from ichprog.spec import PluginRef
from ichprog.train import PRESETS, QUIRKS, folds, grid_cache, train, trainer
from ichprog.train.fold_job import FoldJob

from support.cohorts import QUICK, plain_backbone, read_table, run_checksums


def test_steps_cover_every_patient_without_a_batch_of_one():
    protocol = PRESETS["default"].replace(batch_size=4, accumulation_steps=2)
    for number in range(2, 40):
        made = steps_of(number, protocol)
        assert sorted(p for step in made for batch in step for p in batch) == list(range(number))
        assert all(len(batch) >= 2 for step in made for batch in step)
        assert all(len(step) == 2 for step in made[:-1])
        together = steps_of(number, protocol, 2) if number >= 4 else []
        assert all(len(batch[rank::2]) >= 2 for step in together for batch in step for rank in (0, 1))


def steps_of(number, protocol, team_size=1):
    return [[batch.tolist() for batch in step] for step in trainer.plan_steps(number, protocol, team_size)]


def test_drop_last_gives_the_published_steps():
    """As a loop does that counts batches from one and steps where the next count divides."""
    for batches in range(3, 40):
        counted, expected = [], []
        for index in range(1, batches + 1):
            counted.append(index)
            if (index + 1) % 3 == 0:
                expected.append(counted)
                counted = []
        made = steps_of(8 * batches, PRESETS["paper"])
        assert [[batch[0] // 8 + 1 for batch in step] for step in made] == expected


def test_auc_is_the_mean_over_thresholds(spec):
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    probabilities, target = random.dirichlet([1, 1, 1], 60), random.integers(-1, 3, 60)
    known = target >= 0
    cuts = [roc_auc_score(target[known] >= k, probabilities[known, k:].sum(1)) for k in (1, 2)]
    assert trainer.auc(spec.task("gcs"), probabilities, target) == pytest.approx(np.mean(cuts))
    assert math.isnan(trainer.auc(spec.task("gcs"), probabilities, np.zeros(60, int)))


def test_training_learns_the_outcome(trained):
    from sklearn.metrics import roc_auc_score

    rows = read_table(trained / "out_of_fold.csv")
    truth = [row["prognosis_true"] == "poor" for row in rows]
    assert len(rows) == 32
    assert roc_auc_score(truth, [float(row["prognosis_poor"]) for row in rows]) > 0.9
    assert [row["patient"] for row in rows] == [f"P{number:02}" for number in range(32)]
    assert [row["gcs_true"] == "" for row in rows] == [number % 3 == 0 for number in range(32)]
    assert all(
        sum(float(row[f"gcs_{label}"]) for label in ("13-15", "9-12", "3-8")) == pytest.approx(1) for row in rows
    )


def test_the_paper_preset_trains_with_learned_weights_and_a_tracker(cohort, spec, tmp_path, options):
    protocol = PRESETS["paper"].replace(epochs=2, validation_fraction=0.2, loss_weighting="uncertainty")
    settings = {"folds": 4, "only_folds": [3], "name": "small.paper"}
    settings["options"] = dataclasses.replace(options, trackers=["tensorboard"])
    out = train(cohort, spec, tmp_path / "run", protocol=protocol, **settings)
    record = json.loads((out / "run.json").read_text())
    assert record["quirks"] == [sentence for _, sentence in QUIRKS]
    assert record["results"]["3"]["calibration"] == {}
    log = read_table(out / "log.csv")
    assert float(log[-1]["log_variance_gcs"]) != 0
    assert ichprog.load_model(f"local-dir:{out}").spec.name == "small.paper"
    assert list((out / "trackers").rglob("events.out.tfevents.*"))


def test_the_checkpoint_holds_the_whole_state(cohort, spec, tmp_path, monkeypatch, options):
    """The second moments, the schedule by plateaus and the learned weights, with dropout."""
    spec = dataclasses.replace(spec, backbone=PluginRef("compact", {"width": 4, "dropout": 0.3}))
    changes = {"epochs": 4, "validation_fraction": 0.2, "loss_weighting": "uncertainty", "learning_rate": 0.05}
    protocol = PRESETS["paper"].replace(batch_size=4, plateau_patience=0, plateau_factor=0.5, **changes)
    settings = {"folds": 4, "only_folds": [1], "protocol": protocol, "options": options, "resume": True}
    whole = train(cohort, spec, tmp_path / "whole", **settings)
    rates = [float(row["learning_rate"]) for row in read_table(whole / "log.csv")]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]
    conclude = trainer.TrainerState.end_epoch

    def interrupted(state, row):
        if state.epoch in (1, 2) and state.epoch not in stopped:
            stopped.append(state.epoch)
            raise KeyboardInterrupt
        conclude(state, row)

    stopped = []
    monkeypatch.setattr(trainer.TrainerState, "end_epoch", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(cohort, spec, tmp_path / "run", **settings)
    train(cohort, spec, tmp_path / "run", **settings)
    assert run_checksums(tmp_path / "run") == run_checksums(whole)


def test_a_fold_stops_early_at_its_best_epoch(cohort, spec, tmp_path, options):
    protocol = QUICK.replace(epochs=30, patience=2, learning_rate=0.0001)
    out = train(cohort, spec, tmp_path / "run", folds=4, only_folds=[0], protocol=protocol, options=options)
    log, result = read_table(out / "log.csv"), json.loads((out / "run.json").read_text())["results"]["0"]
    losses = [float(row["val_loss"]) for row in log]
    assert result["best"]["epoch"] == int(np.argmin(losses))
    assert len(log) == min(30, int(np.argmin(losses)) + 3)


def test_training_restores_the_settings_of_torch(cohort, spec, tmp_path, options):
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.backends.cudnn.deterministic, torch.is_grad_enabled()
    train(cohort, spec, tmp_path / "run", folds=4, only_folds=[0], protocol=QUICK.replace(epochs=1), options=options)
    after = torch.get_rng_state(), torch.backends.cudnn.deterministic, torch.is_grad_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


class Spoilt(Backbone):
    """Loses its way over one scan."""

    def forward(self, grid):
        features = super().forward(grid)
        worst = self.training and grid.amax() == Spoilt.worst
        return features * math.nan if worst else features


def test_a_nan_loss_names_its_patients(folder, cohort, spec, tmp_path, monkeypatch, options):
    made = plain_backbone()
    registry.register_backbone("spoilt", lambda: Spoilt(made.features, made.out_channels, made.cam_layer))
    loaded = []
    monkeypatch.setattr(trainer, "augment", lambda values, *_: values)
    load = FoldJob.load_grids
    monkeypatch.setattr(
        FoldJob,
        "load_grids",
        lambda job, patients, device: loaded.append(patients) or load(job, patients, device),
    )
    bad = folds.split(cohort.labels(spec.tasks[0]), 4, validation_fraction=QUICK.validation_fraction)[0].train[7]
    scan, name = cohort.patients[bad].scan, cohort.patients[bad].name
    values = np.load(grid_cache.prepare([scan], spec.input, brain="auto", folder=folder / "c/grids")[0])
    Spoilt.worst = float(values.max())
    spec = dataclasses.replace(spec, backbone=PluginRef("spoilt", {}))
    try:
        with pytest.raises(
            RunError, match=rf"fold 0, epoch 0: the loss is nan \(prognosis nan, gcs nan.*{name}"
        ) as caught:
            train(cohort, spec, tmp_path / "run", folds=4, only_folds=[0], protocol=QUICK, options=options)
        assert all(f"P{int(patient):02}" in str(caught.value) for patient in loaded[-1])
    finally:
        registry.backbones.unregister("spoilt")
