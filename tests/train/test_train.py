"""Training: who trains whom, what is minimised, what is left behind, and that nothing can stop it for good."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import ichprog
from ichprog import CohortError, RunError, SpecError, UnknownNameError, heads, networks, registry, zoo
from ichprog.backbones import Backbone
from ichprog.cli import main
from ichprog.cohort import Cohort
from ichprog.spec import PluginRef
from ichprog.train import (
    PRESETS,
    QUIRKS,
    Protocol,
    allocator,
    folds,
    grid_cache,
    mixed_precision,
    spec_of,
    train,
    trainer,
)
from ichprog.train.augmentation import augment
from ichprog.train.losses import Objective, label_weights, mean_loss, recalibrate

SHAPE = (8, 24, 24)
QUICK = PRESETS["default"].replace(epochs=16, patience=0, batch=5, lr=0.02, validation=0.2, rotation_p=0.3)
RESULTS = ["config.json", "out_of_fold.csv", "log.csv"]


def plain(*, width=6):
    """A backbone without normalisation: what one process computes, two compute together."""
    layers = nn.Sequential(nn.Conv3d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv3d(width, width, 3, 2, 1), nn.ReLU())
    return Backbone(layers, width, "features.2")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So that tests do not fight for cores, and every process of this page computes alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    registry.register_backbone("plain", plain)
    yield
    registry.backbones.unregister("plain")
    torch.set_num_threads(threads)


def ball(voxels, centre, radii):
    return sum(((x - c) / r) ** 2 for x, c, r in zip(voxels, centre, radii, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table of 32 patients, whose outcome is how large a bleeding is; every third GCS is blank."""
    root = tmp_path_factory.mktemp("patients")
    random = np.random.default_rng(0)
    rows = ["patient,scan,poor_outcome,gcs,age"]
    for number in range(32):
        poor = number % 8 in (1, 3, 4, 6, 7)
        centre = np.append(random.integers(17, 31, 2), random.integers(4, 7))
        i, j, k = np.ogrid[:48, :48, :10]
        noise = 4 * random.standard_normal((48, 48, 10))
        bled = ball((i, j, k), centre, (8, 8, 2.5) if poor else (3, 3, 1)) <= 1
        hu = np.where(ball((i, j, k), (24, 24, 5), (15, 18, 4.6)) <= 1, np.where(bled, 68, 33) + noise, 0)
        hu = hu.round().astype(np.int16)
        nib.Nifti1Image(hu, np.diag([-4.5, -4.5, 14, 1])).to_filename(root / f"{number}.nii.gz")
        gcs = "" if number % 3 == 0 else (5 if poor else 14)
        rows.append(f"P{number:02},{number}.nii.gz,{int(poor)},{gcs},{85 if number % 4 == 0 else 60}")
    (root / "cohort.csv").write_text("\n".join(rows))
    spec = zoo.find(zoo.DEFAULT)
    contract = dataclasses.replace(
        spec.input, shape=SHAPE, expected_ranges=dataclasses.replace(spec.input.expected_ranges, blood_dense_ml=0.0)
    )
    small = dataclasses.replace(spec, name="small.three", backbone=PluginRef("compact", {"width": 4}), input=contract)
    (root / "spec.json").write_text(json.dumps(small.to_dict()))
    grid_cache.prepare(
        [p.scan for p in Cohort.read(root / "cohort.csv").patients], contract, brain="auto", folder=root / "c/grids"
    )
    return root


@pytest.fixture(scope="module")
def cohort(folder):
    return Cohort.read(folder / "cohort.csv")


@pytest.fixture(scope="module")
def spec(folder):
    return ichprog.ModelSpec.read(folder / "spec.json")


@pytest.fixture(scope="module")
def trained(folder, cohort, spec, tmp_path_factory):
    """A run of four folds."""
    return train(cohort, spec, tmp_path_factory.mktemp("run") / "run", folds=4, protocol=QUICK, cache_dir=folder / "c")


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sums(run):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in [*(run / n for n in RESULTS), *run.glob("*.safetensors")]
    }


# who trains whom


def published_labels():
    return np.random.RandomState(0).permutation([0] * 99 + [1] * 162)


def test_the_published_folds_exactly():
    """Against scikit-learn used as the published code does, and the checksum of what imbalanced-learn 0.14.2 gave."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    labels = published_labels()
    made = folds.split(labels, 10)
    theirs = StratifiedKFold(10, shuffle=True, random_state=1).split(np.zeros((261, 1)), labels)
    for fold, (rest, test) in zip(made, theirs, strict=True):
        inner, chosen = train_test_split(rest, test_size=0.1, random_state=1, stratify=labels[rest])
        assert all(np.array_equal(a, b) for a, b in zip(fold, (inner, chosen, test), strict=True))
    whole = [[folds.oversample(f.train, labels).tolist(), f.validation.tolist(), f.test.tolist()] for f in made]
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    assert digest == "705aee791de00ab75a5171e40a1059db75999a2c9fa67af0e66de9066692a2d5"


def test_oversampling_draws_as_published():
    labels = np.array([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 2, 2, 1])
    drawn = folds.oversample(np.arange(15), labels).tolist()  # imbalanced-learn 0.14.2, random_state=2
    assert drawn[15:] == [0, 3, 0, 8, 8, 0, 8, 13, 13, 13, 13, 13, 13, 13, 12]
    with_unknown = folds.oversample(np.arange(16), np.append(labels, -1)).tolist()
    assert [p for p in with_unknown if p != 15] == drawn
    assert with_unknown.count(15) == 1


def test_patients_without_the_first_label_only_train():
    labels = published_labels().copy()
    labels[::7] = -1
    for fold in folds.split(labels, 5):
        assert set(np.flatnonzero(labels < 0)) <= set(fold.train)
        assert (labels[fold.validation] >= 0).all()
        assert (labels[fold.test] >= 0).all()
        assert sorted(np.concatenate(fold)) == list(range(261))


# how


def test_the_published_preset_has_its_quirks_and_ours_has_none():
    assert PRESETS["paper"].quirks() == [sentence for _, sentence in QUIRKS]
    assert PRESETS["default"].quirks() == []
    assert len(PRESETS["paper"].replace(zoom_how="random").quirks()) == len(QUIRKS) - 1


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"epoch": 3}, UnknownNameError, "Unknown field of a protocol 'epoch'.*Did you mean epochs"),
        ({"epochs": 0}, RunError, "epochs lies between 1 and 1e.06, not at 0"),
        ({"epochs": 3.5}, RunError, "epochs is a int, not 3.5"),
        ({"lr": "fast"}, RunError, "lr is a float, not 'fast'"),
        ({"lr": math.nan}, RunError, "lr lies between"),
        ({"balance": "both"}, RunError, r"balance is one of \['none', 'class_weights', 'oversample'\], not 'both'"),
        ({"recalibrate": 1}, RunError, "recalibrate is a bool, not 1"),
    ],
)
def test_a_protocol_refuses_what_it_cannot_be(change, error, said):
    with pytest.raises(error, match=said):
        PRESETS["default"].replace(**change)


def test_a_whole_number_serves_for_a_fraction():
    assert PRESETS["default"].replace(lr=1).lr == 1.0


def test_steps_take_every_patient_and_never_a_batch_of_one():
    protocol = PRESETS["default"].replace(batch=4, accumulate=2)
    for number in range(2, 40):
        made = steps_of(number, protocol)
        assert sorted(p for step in made for batch in step for p in batch) == list(range(number))
        assert all(len(batch) >= 2 for step in made for batch in step)
        assert all(len(step) == 2 for step in made[:-1])
        together = steps_of(number, protocol, 2) if number >= 4 else []
        assert all(len(batch[rank::2]) >= 2 for step in together for batch in step for rank in (0, 1))


def steps_of(number, protocol, team_size=1):
    return [[batch.tolist() for batch in step] for step in trainer.steps(np.arange(number), protocol, team_size)]


def test_published_steps_begin_short_and_drop_what_is_left():
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


def still(**changes):
    nothing = {"rotation": 0, "zoom": 0, "shift": 0, "flip_p": 0, "noise": 0, "gain": 0, "offset": 0}
    return PRESETS["default"].replace(**nothing | changes)


def smooth(shape, number=1):
    """Blobs that interpolation of any kind hardly changes."""
    from scipy import ndimage

    noise = np.random.default_rng(0).standard_normal((number, 1, *shape))
    made = ndimage.gaussian_filter(noise, (0, 0, 3, 3, 3))
    return torch.from_numpy(made / np.abs(made).max()).float()


def test_without_augmentation_grids_are_as_they_were(spec):
    values = smooth((16, 20, 24), 2)
    assert torch.equal(augment(values, still(), spec.input, [(1,), (2,)]), values)


def test_a_scan_is_altered_by_its_seed_alone(spec):
    values = smooth((16, 20, 24), 3)
    together = augment(values, PRESETS["default"], spec.input, [(7, 1), (7, 2), (7, 3)])
    alone = augment(values[1:2], PRESETS["default"], spec.input, [(7, 2)])
    assert torch.allclose(together[1:2], alone, atol=1e-6)
    other = augment(values[1:2], PRESETS["default"], spec.input, [(7, 4)])
    assert not torch.allclose(alone, other, atol=1e-2)


def inner(values):
    return values[..., 5:-5, 5:-5, 5:-5]


def test_the_published_zoom_magnifies_every_scan_as_the_published_transform_does(spec):
    from monai.transforms import Zoom

    values = smooth((24, 28, 32), 4)
    made = augment(values, still(zoom=0.1, zoom_how="always"), spec.input, [(i,) for i in range(4)])
    there = torch.stack([torch.as_tensor(Zoom(1.1, mode="trilinear")(scan)) for scan in values])
    assert (inner(made) - inner(there)).abs().max() < 0.06
    assert (inner(made) - inner(values)).abs().amax((1, 2, 3, 4)).min() > 0.09


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_in_cells_is_that_of_the_published_transform(axis, spec, monkeypatch):
    from monai.transforms import Rotate

    drawn = [0.0, 0.0, 0.0]
    drawn[axis] = 1.0

    class Draw:
        random = staticmethod(lambda: 0.4)
        uniform = staticmethod(lambda low, high, size=None: np.array(drawn) if size else 0.0)

    contract = dataclasses.replace(spec.input, shape=(24, 30, 36))
    values = smooth((24, 30, 36))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Draw())
    made = augment(values, still(rotation=5, rotation_p=0.5, rotation_in="cells"), contract, [(1,)])
    angles = [0.0, 0.0, 0.0]
    angles[axis] = math.pi / 36
    there = [torch.as_tensor(Rotate([s * a for a in angles], keep_size=True)(values[0])) for s in (1, -1)]
    assert min((inner(made[0]) - inner(one)).abs().max() for one in there) < 0.01
    assert (inner(made[0]) - inner(values[0])).abs().max() > 0.05


def test_rotation_in_mm_leans_a_flat_grid_less(spec):
    """A grid of few high cells: an angle in cells leans the head by several times as many mm."""
    contract = dataclasses.replace(spec.input, shape=(8, 64, 64))
    low, high = contract.expected_ranges.coverage_mm
    values = torch.zeros(1, 1, 8, 64, 64)
    values[..., 4, :, :] = 1
    kept = {}
    for how in ("mm", "cells"):
        made = augment(values, still(rotation=8, rotation_p=1, rotation_in=how), contract, [(3,)])
        kept[how] = float(made[0, 0, 4].mean())
    assert kept["cells"] < kept["mm"]
    assert low < high


def test_flip_exchanges_left_and_right_and_nothing_else(spec):
    values = smooth((8, 10, 12))
    made = augment(values, still(flip_p=1), spec.input, [(1,)])
    assert torch.allclose(made, values.flip(-1), atol=1e-5)


def test_noise_contrast_and_brightness(spec):
    values = torch.zeros(50, 1, 8, 10, 12)
    seeds = [(i,) for i in range(50)]
    noisy = augment(values, still(noise=0.01, noise_p=0.5), spec.input, seeds)
    altered = [scan.std() for scan in noisy if scan.any()]
    assert 15 <= len(altered) <= 35
    assert torch.stack(altered).mean() == pytest.approx(0.01, rel=0.02)
    values[..., 6:] = 0.5
    shifted = augment(values, still(gain=0.1, offset=0.02), spec.input, seeds)
    assert not shifted[..., :6].any()
    inside = shifted[..., 6:].flatten(1)
    assert (inside - inside[:, :1]).abs().max() == 0
    assert 0.43 <= inside.min() < 0.47
    assert 0.53 < inside.max() <= 0.57


# what is minimised


def some(number=12, labels=3, seed=0):
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.standard_normal((number, labels - 1))).float()
    target = torch.from_numpy(random.integers(-1, labels, number))
    return logits, target


def test_a_tasks_loss_is_over_the_patients_with_its_label():
    logits, target = some()
    head = heads.ordinal(4, ["a", "b", "c"])
    terms = []
    for row, label in zip(logits.double().numpy(), target.numpy(), strict=True):
        if label >= 0:
            terms += [-np.log(1 / (1 + np.exp(-z if label > k else z))) for k, z in enumerate(row)]
    assert float(mean_loss(head, logits, target, torch.ones(3))) == pytest.approx(np.mean(terms), rel=1e-5)
    nobody = logits.clone().requires_grad_()
    mean_loss(head, nobody, torch.full((12,), -1), torch.ones(3)).backward()
    assert nobody.grad is not None
    assert not nobody.grad.any()


def test_class_weights_are_those_of_cross_entropy():
    logits, target = some(labels=4)
    weights = torch.tensor([3.0, 1.0, 0.5])
    found = mean_loss(heads.softmax(4, ["a", "b", "c"]), logits, target.clamp(max=2), weights)
    expected = functional.cross_entropy(logits, target.clamp(max=2), weight=weights, ignore_index=-1)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_labels_weigh_inversely_to_their_number(spec):
    labels = {task.name: np.zeros(12, int) for task in spec.tasks}
    labels["gcs"][:] = [0] * 6 + [1] * 3 + [-1] * 3
    weights = label_weights(spec, labels, np.arange(12), "class_weights")["gcs"]
    assert weights[:2].tolist() == [0.75, 1.5]
    assert label_weights(spec, labels, np.arange(12), "none")["gcs"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_batches_of_a_step_sum_to_the_loss_over_all_its_patients(weighting, spec):
    """However a step is cut into batches and processes, its gradient is that of all its patients at once."""
    random = np.random.default_rng(1)
    spec = dataclasses.replace(spec, backbone=PluginRef("plain", {}))
    labels = {task.name: random.integers(-1, len(task.labels), 16) for task in spec.tasks}
    labels["age"][:8] = -1
    values = torch.from_numpy(random.random((16, 1, *SHAPE))).float()
    protocol = PRESETS["default"].replace(loss_weighting=weighting)
    weights = label_weights(spec, labels, np.arange(16), "class_weights")
    objective = Objective(networks.build(spec), spec, protocol, weights)
    job = SimpleNamespace(labels=labels)
    whole = trainer._weight(objective, job, np.arange(16))

    def gradient(batches):
        objective.zero_grad()
        total = 0.0
        for batch in batches:
            mine = trainer._weight(objective, job, batch)
            targets = {task: torch.from_numpy(known[batch]) for task, known in labels.items()}
            loss, _ = objective(values[batch], targets, {task: mine[task] / whole[task] for task in whole})
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in objective.parameters()])

    one, at_once = gradient([np.arange(16)])
    several, in_parts = gradient([np.arange(0, 6), np.arange(6, 9), np.arange(9, 16)])
    assert several == pytest.approx(one, rel=1e-5)
    assert torch.allclose(in_parts, at_once, atol=1e-6)


def test_uncertainty_weighs_a_task_by_its_own_loss(spec):
    """For losses that stay the same, every s ends at log L, and each task's weight at 1 / L."""
    objective = Objective(networks.build(spec), spec, PRESETS["default"].replace(loss_weighting="uncertainty"), {})
    losses = {"prognosis": torch.tensor(0.2), "gcs": torch.tensor(1.0), "age": torch.tensor(3.0)}
    optimiser = torch.optim.LBFGS([objective.log_variance], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        total = torch.stack(objective.weighted(losses)).sum()
        total.backward()
        return total

    optimiser.step(closure)
    assert torch.allclose(objective.log_variance.detach(), torch.log(torch.tensor([0.2, 1.0, 3.0])), atol=1e-3)
    best = float(torch.stack(objective.weighted(losses)).sum().detach())
    assert objective.judge({task: float(loss) for task, loss in losses.items()}) == pytest.approx(best, abs=1e-4)


def test_recalibration_undoes_oversampling():
    """Scores of a balanced training set against patients of whom one in six has the label."""
    from scipy import optimize
    from sklearn.metrics import log_loss

    random = np.random.default_rng(0)
    scores = random.standard_normal(3000) * 1.5
    target = random.random(3000) < 1 / (1 + np.exp(-(0.6 * scores - 1.6)))
    head = heads.ordinal(4, ["a", "b"])
    few, many = slice(0, 200), slice(200, None)
    scale, (shift,) = recalibrate(
        head, torch.from_numpy(scores[few])[:, None].float(), torch.from_numpy(target[few] * 1)
    )

    def posterior(values):
        logits = np.exp(values[0]) * scores[few] + values[1]
        return np.logaddexp(0, np.where(target[few], -logits, logits)).sum() + (values**2).sum() / 2

    expected = optimize.minimize(posterior, [0, 0]).x
    assert [math.log(scale), shift] == pytest.approx(expected.tolist(), abs=1e-3)
    before, after = (
        log_loss(target[many], 1 / (1 + np.exp(-logits))) for logits in (scores[many], scale * scores[many] + shift)
    )
    assert after < before - 0.1


def test_a_head_is_rescaled_in_place_and_another_left_alone():
    features = torch.randn(5, 4, 2, 2, 2)
    for build in (heads.ordinal, heads.softmax):
        head = build(4, ["a", "b", "c"])
        before, shift = head(features), torch.tensor([0.3, -0.2, 0.1])[: head(features).shape[1]]
        head.rescale_(torch.tensor(1.7), shift)
        assert torch.allclose(head(features), 1.7 * before + shift, atol=1e-5)

    class Bare(nn.Module):
        loss = staticmethod(functional.cross_entropy)

    assert recalibrate(Bare(), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)) is None


def test_auc_is_the_mean_over_cuts(spec):
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    probabilities, target = random.dirichlet([1, 1, 1], 60), random.integers(-1, 3, 60)
    known = target >= 0
    cuts = [roc_auc_score(target[known] >= k, probabilities[known, k:].sum(1)) for k in (1, 2)]
    assert trainer.auc(spec.task("gcs"), probabilities, target) == pytest.approx(np.mean(cuts))
    assert math.isnan(trainer.auc(spec.task("gcs"), probabilities, np.zeros(60, int)))


# a run


def test_training_learns_what_decides_the_outcome(trained):
    from sklearn.metrics import roc_auc_score

    rows = table(trained / "out_of_fold.csv")
    truth = [row["prognosis_true"] == "poor" for row in rows]
    assert len(rows) == 32
    assert roc_auc_score(truth, [float(row["prognosis_poor"]) for row in rows]) > 0.9
    assert [row["patient"] for row in rows] == [f"P{number:02}" for number in range(32)]
    assert [row["gcs_true"] == "" for row in rows] == [number % 3 == 0 for number in range(32)]
    assert all(
        sum(float(row[f"gcs_{label}"]) for label in ("13-15", "9-12", "3-8")) == pytest.approx(1) for row in rows
    )


def test_a_run_is_a_model_whose_answers_are_those_out_of_fold(trained, cohort):
    rows = {row["patient"]: row for row in table(trained / "out_of_fold.csv")}
    models = {fold: ichprog.load_model(f"local-dir:{trained}", fold=fold) for fold in range(4)}
    for patient in cohort.patients[::4]:
        row = rows[patient.name]
        prediction = ichprog.predict(models[int(row["fold"])], patient.scan)
        for task in prediction.tasks:
            for label, value in prediction[task].probabilities.items():
                assert value == pytest.approx(float(row[f"{task}_{label}"]), abs=1e-5)
            assert prediction[task].label == row[f"{task}_label"]
    whole = ichprog.load_model(f"local-dir:{trained}")
    assert whole.check_golden_output()["state"] == "holds"
    assert [file.fold for file in whole.weights] == [0, 1, 2, 3]


def test_the_validation_part_is_answered_by_the_networks_that_are_kept(trained, cohort):
    scans = {patient.name: patient.scan for patient in cohort.patients}
    membership = json.loads((trained / "run.json").read_text())["membership"]
    for fold in range(4):
        rows = table(trained / "folds" / str(fold) / "validation.csv")
        assert [row["patient"] for row in rows] == membership[str(fold)]["validation"]
        prediction = ichprog.predict(ichprog.load_model(f"local-dir:{trained}", fold=fold), scans[rows[0]["patient"]])
        for task in prediction.tasks:
            for label, value in prediction[task].probabilities.items():
                assert value == pytest.approx(float(rows[0][f"{task}_{label}"]), abs=1e-5)


def test_a_run_says_what_it_was(trained, cohort):
    said = json.loads((trained / "run.json").read_text())
    assert said["protocol"] == QUICK.to_dict()
    assert said["versions"]["torch"]
    assert said["command"]
    assert said["source"] == cohort.source
    tested = [name for fold in said["membership"].values() for name in fold["test"]]
    assert sorted(tested) == [patient.name for patient in cohort.patients]
    for fold in range(4):
        result = said["results"][str(fold)]
        assert result["epochs"] == 16
        assert set(result["calibration"]) == {"prognosis", "gcs", "age"}
    log = table(trained / "log.csv")
    assert len(log) == 4 * 16
    assert {"fold", "epoch", "lr", "loss", "loss_gcs", "val_loss", "val_auc_prognosis", "val_balanced_accuracy"} <= set(
        log[0]
    )
    rates = [float(row["lr"]) for row in log[:16]]
    assert rates[2] == max(rates)
    assert rates[-1] < 0.02 * max(rates)
    assert not list(trained.rglob("checkpoint.pt"))
    config = ichprog.ModelSpec.read(trained / "config.json")
    assert config.limits[0].startswith("These weights were trained anew, on 32 patients.")
    assert set(config.weights.sha256) == {f"fold{fold}.safetensors" for fold in range(4)}


def test_folds_one_by_one_are_the_same_as_all_at_once(trained, folder, cohort, spec, tmp_path):
    """As when they are spread over machines; and a run that is done is left as it is."""
    for only in ([2], [0, 1], None):
        train(cohort, spec, tmp_path / "run", folds=4, only=only, protocol=QUICK, cache_dir=folder / "c", resume=True)
    assert sums(tmp_path / "run") == sums(trained)
    weights = tmp_path / "run" / "fold0.safetensors"
    written = weights.stat().st_mtime_ns
    train(cohort, spec, tmp_path / "run", folds=4, protocol=QUICK, cache_dir=folder / "c", resume=True)
    assert weights.stat().st_mtime_ns == written


def test_folds_made_elsewhere_are_taken_as_they_are(trained, folder, cohort, spec, tmp_path):
    """Those of a run give that run again; fewer patients to train on are another run, tested on the same ones."""
    labels = cohort.labels(spec.tasks[0])
    parts = folds.split(labels, 4, seed=QUICK.split_seed, validation=QUICK.validation)
    asked = {"only": [1], "protocol": QUICK, "cache_dir": folder / "c"}
    train(cohort, spec, tmp_path / "same", folds=parts, **asked)
    assert (tmp_path / "same/fold1.safetensors").read_bytes() == (trained / "fold1.safetensors").read_bytes()
    fewer = [fold._replace(train=fold.train[:16]) for fold in parts]
    train(cohort, spec, tmp_path / "fewer", folds=fewer, **asked)
    said = json.loads((tmp_path / "fewer/run.json").read_text())["membership"]["1"]
    assert said["train"] == [cohort.patients[place].name for place in parts[1].train[:16]]
    tested = [[row["patient"] for row in table(tmp_path / run / "out_of_fold.csv")] for run in ("same", "fewer")]
    assert tested[0] == tested[1]
    assert len(tested[0]) == 8
    with pytest.raises(RunError, match="holds another run: parts was"):
        train(cohort, spec, tmp_path / "fewer", folds=parts, resume=True, **asked)
    with pytest.raises(UnknownNameError, match="Unknown fold of this run '4'"):
        train(cohort, spec, tmp_path / "other", folds=parts, **asked | {"only": [4]})


def test_a_model_of_another_task_is_tested_on_the_folds_of_the_first(folder, cohort, spec, tmp_path):
    """Its own label is blank for every third patient, and its folds are not split by it."""
    parts = folds.split(cohort.labels(spec.task("prognosis")), 4, seed=1, validation=0.2)
    alone = dataclasses.replace(spec, tasks=(spec.task("gcs"),), name="small.one")
    run = train(
        cohort,
        alone,
        tmp_path / "run",
        folds=parts,
        only=[0, 1],
        protocol=QUICK.replace(epochs=2),
        cache_dir=folder / "c",
    )
    rows = table(run / "out_of_fold.csv")
    tested = {cohort.patients[place].name for fold in parts[:2] for place in fold.test}
    assert {row["patient"] for row in rows} == tested
    assert any(row["gcs_true"] == "" for row in rows)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "cannot be trained on. there is none"),
        ([([0, 1], [], [3])], "fold 0: a part has no patients"),
        ([([0, 1], [2], [99])], "fold 0: takes positions from 0 to 31, each in one of its parts"),
        ([([0, 1], [2], [2])], "fold 0: takes positions from 0 to 31, each in one of its parts"),
        ([([0, 2, 5], [3], [4])], "fold 0, prognosis: of 3 who train 3 are 'good', 0 are 'poor'"),
        ([([1, 4, 5, 16], [3], [2]), ([1, 4, 5, 16], [3], [2])], "a patient is tested in two folds"),
    ],
)
def test_folds_made_elsewhere_are_refused_where_they_are_none(parts, said, cohort, spec, tmp_path):
    made = [folds.Fold(*(np.array(part, np.int64) for part in fold)) for fold in parts]
    with pytest.raises(CohortError, match=said):
        train(cohort, spec, tmp_path / "run", folds=made)
    assert not (tmp_path / "run").exists()


DRIVER = """
import os, signal, sys
import pathlib
import torch
torch.set_num_threads(1)
import ichprog
from ichprog.train import trainer, train
sys.path.insert(0, {tests!r})
from test_train import QUICK, plain

def dying(work, at):
    left = [at]
    def step(*given, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*given, **options)
    return step

what, _, at = os.environ.get("DIE", "").partition(":")
if what == "batch":
    trainer.augment = dying(trainer.augment, int(at))
if what == "file":
    pathlib.Path.replace = dying(pathlib.Path.replace, int(at))
ichprog.register_backbone("plain", plain)
table, spec, out, cache = sys.argv[1:]
only = [0] if "WORLD_SIZE" in os.environ else None
train(table, spec, out, folds=4, only=only, protocol=QUICK, cache_dir=cache, device="cpu", resume=True)
"""


def drive(tmp_path, folder, spec, out, launcher=(sys.executable,), **environment):
    """Trains in another process, as the driver says."""
    script, description = tmp_path / "driver.py", tmp_path / "spec.json"
    script.write_text(DRIVER.format(tests=str(Path(__file__).parent)))
    description.write_text(json.dumps(spec.to_dict()))
    command = [*launcher, script, folder / "cohort.csv", description, out, folder / "c"]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_a_killed_run_goes_on_to_the_same_files(trained, folder, spec, tmp_path):
    """Killed in the first pass, between two passes, while a fold is finished, and in a pass of a later fold."""
    out = tmp_path / "run"
    for death in ("batch:2", "file:9", "file:26", "batch:70"):
        killed = drive(tmp_path, folder, spec, out, DIE=death)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (out / "config.json").exists()
    done = drive(tmp_path, folder, spec, out)
    assert done.returncode == 0, done.stderr
    assert sums(out) == sums(trained)
    assert not [path for path in out.rglob(".*-*") if path.is_file()], "nothing half-written is left"


def test_two_processes_train_as_one(folder, cohort, spec, tmp_path):
    """Without normalisation over a batch, two gloo processes and one give the same network."""
    spec = dataclasses.replace(spec, backbone=PluginRef("plain", {}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    launcher.append(f"--master-port={port}")
    done = drive(tmp_path, folder, spec, tmp_path / "two", launcher)
    assert done.returncode == 0, done.stderr
    train(cohort, spec, tmp_path / "one", folds=4, only=[0], protocol=QUICK, cache_dir=folder / "c")
    for one, two in zip(*(table(tmp_path / run / "out_of_fold.csv") for run in ("one", "two")), strict=True):
        assert one["patient"] == two["patient"]
        assert float(one["prognosis_poor"]) == pytest.approx(float(two["prognosis_poor"]), abs=1e-3)
    logs = [table(tmp_path / run / "log.csv") for run in ("one", "two")]
    assert [float(row["loss"]) for row in logs[0]] == pytest.approx([float(row["loss"]) for row in logs[1]], abs=1e-3)
    patient = cohort.patients[int(table(tmp_path / "two" / "out_of_fold.csv")[0]["patient"][1:])]
    assert 0 <= ichprog.predict(f"local-dir:{tmp_path / 'two'}", patient.scan)["prognosis"].probabilities["poor"] <= 1


@pytest.mark.slow
def test_accelerate_launch_runs_the_command(folder, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--module", "ichprog"]
    command += [
        "train",
        folder / "cohort.csv",
        "-m",
        folder / "spec.json",
        "-o",
        tmp_path / "run",
        "--folds=4",
        "--only-fold=1",
    ]
    command += ["--epochs=2", "--cache-dir", folder / "c", "--preset=paper", "--set=validation=0.2"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"local-dir:{tmp_path / 'run'}") == 1
    assert ichprog.load_model(f"local-dir:{tmp_path / 'run'}").check_golden_output()["state"] == "holds"


def test_the_published_preset_and_learned_weights_run(folder, cohort, spec, tmp_path):
    protocol = PRESETS["paper"].replace(epochs=2, validation=0.2, loss_weighting="uncertainty")
    asked = {"folds": 4, "only": [3], "name": "small.paper", "tensorboard": True, "cache_dir": folder / "c"}
    out = train(cohort, spec, tmp_path / "run", protocol=protocol, **asked)
    said = json.loads((out / "run.json").read_text())
    assert said["quirks"] == [sentence for _, sentence in QUIRKS]
    assert said["results"]["3"]["calibration"] == {}
    log = table(out / "log.csv")
    assert float(log[-1]["log_variance_gcs"]) != 0
    assert ichprog.load_model(f"local-dir:{out}").spec.name == "small.paper"
    assert list((out / "tensorboard" / "fold3").iterdir())


def test_every_state_of_a_training_is_in_the_checkpoint(folder, cohort, spec, tmp_path, monkeypatch):
    """The second moments, the schedule by plateaus and the learned weights, with dropout."""
    spec = dataclasses.replace(spec, backbone=PluginRef("compact", {"width": 4, "dropout": 0.3}))
    changes = {"epochs": 4, "validation": 0.2, "loss_weighting": "uncertainty", "lr": 0.05}
    protocol = PRESETS["paper"].replace(batch=4, plateau_patience=0, plateau_factor=0.5, **changes)
    asked = {"folds": 4, "only": [1], "protocol": protocol, "cache_dir": folder / "c", "resume": True}
    whole = train(cohort, spec, tmp_path / "whole", **asked)
    rates = [float(row["lr"]) for row in table(whole / "log.csv")]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]
    conclude = trainer.State.conclude

    def interrupted(state, row):
        if state.epoch in (1, 2) and state.epoch not in stopped:
            stopped.append(state.epoch)
            raise KeyboardInterrupt
        conclude(state, row)

    stopped = []
    monkeypatch.setattr(trainer.State, "conclude", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(cohort, spec, tmp_path / "run", **asked)
    train(cohort, spec, tmp_path / "run", **asked)
    assert sums(tmp_path / "run") == sums(whole)


def test_a_fold_that_another_process_trains_is_left_to_it(folder, cohort, spec, tmp_path):
    from filelock import FileLock

    theirs = tmp_path / "run" / "folds" / "0"
    asked = {"folds": 4, "protocol": QUICK.replace(epochs=1), "cache_dir": folder / "c", "resume": True}
    train(cohort, spec, tmp_path / "run", only=[1], **asked)
    theirs.mkdir()
    with FileLock(theirs / ".lock"), pytest.raises(RunError, match=r"fold 0 of .* is being trained by another process"):
        train(cohort, spec, tmp_path / "run", **asked)


def test_a_fold_stops_early_and_keeps_its_best(folder, cohort, spec, tmp_path):
    protocol = QUICK.replace(epochs=30, patience=2, lr=0.0001)
    out = train(cohort, spec, tmp_path / "run", folds=4, only=[0], protocol=protocol, cache_dir=folder / "c")
    log, result = table(out / "log.csv"), json.loads((out / "run.json").read_text())["results"]["0"]
    losses = [float(row["val_loss"]) for row in log]
    assert result["best"]["epoch"] == int(np.argmin(losses))
    assert len(log) == min(30, int(np.argmin(losses)) + 3)


def test_training_leaves_no_switch_of_torch_changed(folder, cohort, spec, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.backends.cudnn.deterministic, torch.is_grad_enabled()
    train(cohort, spec, tmp_path / "run", folds=4, only=[0], protocol=QUICK.replace(epochs=1), cache_dir=folder / "c")
    after = torch.get_rng_state(), torch.backends.cudnn.deterministic, torch.is_grad_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


class Spoilt(Backbone):
    """Loses its way over one scan."""

    def forward(self, grid):
        features = super().forward(grid)
        worst = self.training and grid.amax() == Spoilt.worst
        return features * math.nan if worst else features


def test_a_loss_that_is_no_number_names_its_patients(folder, cohort, spec, tmp_path, monkeypatch):
    made = plain()
    registry.register_backbone("spoilt", lambda: Spoilt(made.features, made.out_channels, made.cam_layer))
    loaded = []
    monkeypatch.setattr(trainer, "augment", lambda values, *_: values)
    load = trainer.Job.load
    monkeypatch.setattr(
        trainer.Job, "load", lambda job, patients, device: loaded.append(patients) or load(job, patients, device)
    )
    bad = folds.split(cohort.labels(spec.tasks[0]), 4, validation=QUICK.validation)[0].train[7]
    scan, name = cohort.patients[bad].scan, cohort.patients[bad].name
    values = np.load(grid_cache.prepare([scan], spec.input, brain="auto", folder=folder / "c/grids")[0])
    Spoilt.worst = float(values.max())
    spec = dataclasses.replace(spec, backbone=PluginRef("spoilt", {}))
    try:
        with pytest.raises(
            RunError, match=rf"fold 0, epoch 0: the loss is nan \(prognosis nan, gcs nan.*{name}"
        ) as caught:
            train(cohort, spec, tmp_path / "run", folds=4, only=[0], protocol=QUICK, cache_dir=folder / "c")
        assert all(f"P{int(patient):02}" in str(caught.value) for patient in loaded[-1])
    finally:
        registry.backbones.unregister("spoilt")


# in what precision

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(
    mixed_precision.lack(CPU) is not None, reason="no processor that multiplies in bfloat16"
)


def plain_losses(network, values, targets, epochs):
    """The published way without anything else: eager float32, one batch a pass, BCE over the known patients."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.005, weight_decay=1e-4, amsgrad=True)
    network.train()
    found = []
    for _ in range(epochs):
        optimiser.zero_grad()
        loss = 0
        for (task, weight), logits in zip(
            {"prognosis": 0.4, "gcs": 0.3, "age": 0.3}.items(), network(values).values(), strict=True
        ):
            known = targets[task] >= 0
            beyond = targets[task][known, None] > torch.arange(logits.shape[1])
            loss = loss + weight * functional.binary_cross_entropy_with_logits(logits[known], beyond.float())
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    ("precision", "within"), [("float32", 1e-3), pytest.param("bfloat16", 0.02, marks=needs_bfloat16)]
)
def test_the_loss_curve_is_that_of_a_plain_loop(precision, within, folder, cohort, spec, tmp_path):
    from safetensors.torch import load_file

    changes = {"batch": 32, "balance": "none", "recalibrate": False, "validation": 0.2, "precision": precision}
    changes |= {"schedule": "plateau", "plateau_patience": 99, "weight_decay": 1e-4, "amsgrad": True}
    protocol, asked = still(**changes), {"folds": 4, "only": [0], "cache_dir": folder / "c"}
    begun = train(cohort, spec, tmp_path / "begun", protocol=protocol.replace(epochs=1, lr=1e-12), **asked)
    out = train(cohort, spec, tmp_path / "run", protocol=protocol.replace(epochs=12, lr=0.005), **asked)

    part = folds.split(cohort.labels(spec.tasks[0]), 4, validation=0.2)[0].train
    files = grid_cache.prepare(
        [cohort.patients[p].scan for p in part], spec.input, brain="auto", folder=folder / "c/grids"
    )
    values = torch.from_numpy(np.stack([np.load(file) for file in files])[:, None])
    targets = {task.name: torch.from_numpy(cohort.labels(task)[part]) for task in spec.tasks}
    first = networks.build(spec)
    first.load_state_dict(load_file(begun / "fold0.safetensors"))
    expected = plain_losses(first, values, targets, 12)
    assert expected[-1] < 0.7 * expected[0]
    assert [float(row["loss"]) for row in table(out / "log.csv")] == pytest.approx(expected, rel=within)


@needs_bfloat16
@pytest.mark.parametrize(
    ("kernel", "stride", "depth"), [(2, 1, 1), (3, 1, 2), (5, 1, 2), (5, 1, 3), (5, 1, 4), (5, 2, 4), (3, 1, 9)]
)
def test_convolutions_are_right_however_short_their_input(kernel, stride, depth):
    """PyTorch's own weight gradients are anything up to infinity in all but the last of these."""
    torch.manual_seed(0)
    layer = nn.Conv3d(16, 32, kernel, stride, kernel // 2).to(memory_format=torch.channels_last_3d)
    values, direction = torch.randn(2, 16, depth, 9, 9), None
    found = []
    for rounded in (False, True):
        given = values.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        with mixed_precision.computing(CPU, rounded=rounded):
            made = layer(given)
        direction = torch.randn_like(made) if direction is None else direction
        found.append([made, *torch.autograd.grad(made, [given, layer.weight], direction.to(made.dtype))])
    for exact, near in zip(*found, strict=True):
        assert (near - exact).abs().max() < 0.02 * exact.abs().max()


@needs_bfloat16
def test_pooling_keeps_precision_and_layout():
    values = torch.rand(2, 4, 6, 6, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    with mixed_precision.computing(CPU, rounded=True):
        for pool, own in ((nn.AvgPool3d(2), functional.avg_pool3d), (nn.MaxPool3d(3, 2), functional.max_pool3d)):
            made = pool(values)
            assert made.dtype == torch.bfloat16
            assert made.is_contiguous(memory_format=torch.channels_last_3d)
            size = (2,) if isinstance(pool, nn.AvgPool3d) else (3, 2)
            assert torch.allclose(made.double(), own(values.double(), *size), rtol=2**-8)


class Faulty(TorchFunctionMode):
    """A processor whose convolutions are wrong in bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made * 1.1 if func is torch.conv3d and torch.is_autocast_enabled("cpu") else made


@needs_bfloat16
def test_bfloat16_on_a_processor_is_asked_for_and_refused_to_a_network_it_would_spoil(folder, cohort, spec, tmp_path):
    asked = {"folds": 4, "only": [0], "cache_dir": folder / "c"}
    protocol = QUICK.replace(epochs=2)
    wrong = pytest.raises(RunError, match=r"(?s)'bfloat16': on this processor a convolution of 2 x 1 x 8.*'float32'")
    with Faulty(), wrong:
        train(cohort, spec, tmp_path / "asked", protocol=protocol.replace(precision="bfloat16"), **asked)
    for precision in ("auto", "float32", "bfloat16"):
        train(cohort, spec, tmp_path / precision, protocol=protocol.replace(precision=precision), **asked)
    said = {
        run: json.loads((tmp_path / run / "run.json").read_text())["results"]["0"]["precision"]
        for run in ("auto", "float32", "bfloat16")
    }
    assert said == {"auto": "float32", "float32": "float32", "bfloat16": "bfloat16"}
    assert sums(tmp_path / "auto") == sums(tmp_path / "float32") != sums(tmp_path / "bfloat16")
    assert [row["bfloat16"] for row in table(tmp_path / "bfloat16" / "log.csv")] == ["1.0", "1.0"]


def test_a_processor_without_bfloat16_does_not_train_in_it(folder, cohort, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_precision, "supports_bfloat16", lambda: False)
    with pytest.raises(RunError, match="'bfloat16': this processor does not multiply in bfloat16"):
        train(cohort, spec, tmp_path / "run", folds=4, only=[0], cache_dir=folder / "c", device="cpu",
              protocol=QUICK.replace(precision="bfloat16"))  # fmt: skip
    assert not (tmp_path / "run").exists()


# what is refused, before anything begins


def rewritten(cohort, **columns):
    patients = [
        dataclasses.replace(p, columns=dict(p.columns) | {k: v(i) for k, v in columns.items()})
        for i, p in enumerate(cohort.patients)
    ]
    return dataclasses.replace(cohort, patients=tuple(patients))


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"age": lambda i: "60"}, {}, "age: of 32 patients 32 are '<80', 0 are '>=80'.*two labels"),
        ({"gcs": lambda i: ""}, {}, "gcs: of 32 patients 0 are '13-15'"),
        (
            {"poor_outcome": lambda i: str(int(i < 3))},
            {},
            "29 are 'good', 3 are 'poor' are fewer than 4 folds.*at most 3",
        ),
        ({}, {"folds": 1}, "1 folds: at least 2"),
        (
            {},
            {"folds": 4, "protocol": QUICK.replace(validation=0.01)},
            "leave 24 to train on, and 0.01 of them for validation",
        ),
    ],
)
def test_too_few_patients_are_refused(columns, options, said, folder, cohort, spec, tmp_path):
    options = {"folds": 4, "protocol": QUICK, "cache_dir": folder / "c"} | options
    with pytest.raises(CohortError, match=said):
        train(rewritten(cohort, **columns), spec, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_scans_that_cannot_be_read_are_all_named(cohort, spec, tmp_path):
    patients = list(cohort.patients)
    for number in (3, 9):
        (tmp_path / f"bad{number}.nii.gz").write_bytes(b"no scan")
        patients[number] = dataclasses.replace(patients[number], scan=tmp_path / f"bad{number}.nii.gz")
    broken = dataclasses.replace(cohort, patients=tuple(patients[2:14]))
    with pytest.raises(CohortError, match=r"(?s)2 of 12 scans cannot be used.*bad3\.nii.*bad9\.nii"):
        train(
            broken,
            spec,
            tmp_path / "run",
            folds=2,
            protocol=QUICK.replace(validation=0.4),
            cache_dir=tmp_path / "c",
            workers=2,
        )
    assert not (tmp_path / "run").exists()
    assert len(list((tmp_path / "c" / "grids").glob("*.npy"))) == 10, "the others are kept for the next time"


def test_grids_are_prepared_once(folder, cohort, spec, monkeypatch):
    monkeypatch.setattr("ichprog.scan.examine", None)
    scans = [patient.scan for patient in cohort.patients]
    files = grid_cache.prepare(scans, spec.input, brain="auto", folder=folder / "c/grids")
    assert np.load(files[0]).shape == SHAPE
    others = grids_of(scans, dataclasses.replace(spec.input, pad_slices=False), "auto")
    given = grids_of(scans, spec.input, "given")
    assert not set(files) & {*others, *given}
    doubted = dataclasses.replace(
        spec.input, expected_ranges=dataclasses.replace(spec.input.expected_ranges, slices=(1, 2))
    )
    assert grids_of(scans, doubted, "auto") == [path.name for path in files]


def grids_of(scans, contract, brain):
    recipe = json.dumps(
        [grid_cache._RECIPE, brain, {k: v for k, v in dataclasses.asdict(contract).items() if k != "expected_ranges"}]
    )
    return [f"{grid_cache._key(scan, recipe)}.npy" for scan in scans]


def test_a_changed_scan_is_prepared_anew(folder, tmp_path):
    shutil.copy(folder / "0.nii.gz", tmp_path / "scan.nii.gz")
    before = grid_cache._key(tmp_path / "scan.nii.gz", "recipe")
    os.utime(tmp_path / "scan.nii.gz", ns=(1, 1))
    assert grid_cache._key(tmp_path / "scan.nii.gz", "recipe") != before
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"1")
    before = grid_cache._key(tmp_path / "series", "recipe")
    (tmp_path / "series" / "2.dcm").write_bytes(b"2")
    assert grid_cache._key(tmp_path / "series", "recipe") != before


@pytest.mark.parametrize(
    ("grids_there", "said"),
    [(False, "prepared grids need .* GB, 0.00 GB are free"), (True, "run needs .* GB, 0.00 GB")],
)
def test_a_full_disk_is_said_before(grids_there, said, folder, cohort, spec, tmp_path, monkeypatch):
    def usage(path):
        return SimpleNamespace(free=100 if grids_there or "grids" in str(path) else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(RunError, match=said):
        train(
            cohort,
            spec,
            tmp_path / "run",
            folds=4,
            protocol=QUICK,
            cache_dir=folder / "c" if grids_there else tmp_path / "c",
        )
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_is_said_with_what_to_do(folder, cohort, spec, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.State, "save", full)
    with pytest.raises(RunError, match=r"disk of .*run is full\. Make room and go on by `--resume`"):
        train(cohort, spec, tmp_path / "run", folds=4, only=[0], protocol=QUICK, cache_dir=folder / "c")


def test_a_folder_of_another_run_is_refused_with_what_differs(trained, folder, cohort, spec, tmp_path):
    asked = {"folds": 4, "protocol": QUICK, "cache_dir": folder / "c", "resume": True}
    other = dataclasses.replace(spec, backbone=PluginRef("compact", {"width": 8}))
    with pytest.raises(RunError, match=r"holds another run: model\.backbone differs"):
        train(cohort, other, trained, **asked)
    with pytest.raises(RunError, match=r"protocol\.lr was 0\.02, is 0\.1; folds was 4, is 3"):
        train(cohort, spec, trained, **asked | {"protocol": QUICK.replace(lr=0.1), "folds": 3})
    with pytest.raises(RunError, match=r"cohort\.sha256 was"):
        train(rewritten(cohort, age=lambda i: str(20 + 70 * (i % 2))), spec, trained, **asked)
    with pytest.raises(RunError, match="`--resume`"):
        train(cohort, spec, trained, **asked | {"resume": False})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no run"):
        train(cohort, spec, tmp_path, **asked)
    with pytest.raises(UnknownNameError, match="Unknown fold of this run '7'"):
        train(cohort, spec, tmp_path / "run", **asked | {"only": [7]})


def test_what_is_trained_may_be_named_in_any_way(trained, folder, tmp_path):
    assert spec_of(str(folder / "spec.json")).name == "small.three"
    assert spec_of(f"local-dir:{trained}").name == "small.three"
    assert spec_of("perez2023.prognosis").name == "perez2023.prognosis"
    with pytest.raises(UnknownNameError, match="Unknown model 'perez'"):
        spec_of("perez")
    with pytest.raises(SpecError, match="cannot be read"):
        spec_of(tmp_path / "none.json")


# the command


def command(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def test_the_command_trains(folder, tmp_path):
    asked = [folder / "cohort.csv", "-m", folder / "spec.json", "-o", tmp_path / "run", "--folds", 4, "--only-fold", 0]
    asked += ["--cache-dir", folder / "c", "--epochs", 1, "--set", "validation=0.2", "--preset", "paper", "--seed", 3]
    done = command(*asked)
    assert done.exit_code == 0, done.output
    assert f"local-dir:{tmp_path / 'run'}" in done.stdout
    assert "fold 0  epoch 0 of 1  validation AUC  prognosis" in done.stdout
    assert done.stderr.count("as published:") == len(QUIRKS)
    again = command(*asked)
    assert again.exit_code == 1
    assert "--resume" in again.stderr
    assert command(*asked, "--resume").exit_code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["protocol"]["seed"] == 3


def test_several_tables_are_taken_together(folder, cohort, tmp_path):
    """Two cohorts, one of which knows no outcome: its patients train, and are not tested."""
    first, second = (
        dataclasses.replace(cohort, patients=part) for part in (cohort.patients[:20], cohort.patients[20:])
    )
    first.write(folder / "first.csv")
    rewritten(second, poor_outcome=lambda i: "").write(folder / "second.csv")
    asked = [
        "-m",
        folder / "spec.json",
        "-o",
        tmp_path / "run",
        "--folds",
        2,
        "--only-fold",
        0,
        "--epochs",
        1,
        "--set",
        "validation=0.2",
    ]
    done = command(folder / "first.csv", folder / "second.csv", *asked, "--cache-dir", folder / "c")
    assert done.exit_code == 0, done.output
    fold = json.loads((tmp_path / "run" / "run.json").read_text())["membership"]["0"]
    assert {f"P{number}" for number in range(20, 32)} <= set(fold["train"])
    assert len(table(tmp_path / "run" / "out_of_fold.csv")) == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "papers"], "Unknown preset 'papers'.*Did you mean paper"),
        (["--set", "lrr=1"], "Unknown field of a protocol 'lrr'"),
        (["--set", "lr"], "--set takes NAME=VALUE"),
        (["--set", "lr=quick"], "lr is a float, not 'quick'"),
        (["--loss-weighting", "learned"], "loss_weighting is one of"),
        (["-m", "densenet"], "Unknown model 'densenet'"),
        (["--folds", "40"], "fewer than 40 folds"),
    ],
)
def test_wrong_use_is_answered_before_anything_begins(arguments, said, folder, tmp_path):
    done = command(folder / "cohort.csv", "-o", tmp_path / "run", *arguments)
    assert done.exit_code == 2
    assert re.search(said, " ".join(done.stderr.split()))
    assert not (tmp_path / "run").exists()


def test_the_protocol_is_explained():
    """In the docstring, and in the page's table with the values of both presets."""
    names = [field.name for field in dataclasses.fields(Protocol)]
    assert all(f"{name}: " in Protocol.__doc__ for name in names)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    told = []
    for row in re.findall(r"^\| (`[a-z_]+`.*) \|$", page.partition("## Presets")[2], re.MULTILINE):
        cells = [cell.strip().replace("`", "") for cell in row.split("|")]
        if len(cells) == 4:
            told += (fields := cells[0].split(", "))
            for preset, values in zip(("default", "paper"), cells[1:3], strict=True):
                for name, value in zip(fields, values.split(", ") if values else (), strict=bool(values)):
                    held = getattr(PRESETS[preset], name)
                    assert (value if isinstance(held, str) else json.loads(value)) == held, (preset, name)
    assert told == names
    assert page.partition("### Quirks")[2].partition("## The folder")[0].count("\n- ") == len(QUIRKS)


# Memory


FAULTS = """
import resource, sys
import torch
from ichprog.train import allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "none":
    allocator._room = lambda page: 0
found = [faults()]
with allocator.kept(torch.device("cpu")) as keep:
    faults()
    keep()
    faults()
    found.append(faults())
print(*found, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory when told")
@pytest.mark.parametrize("room", ["enough", "none"])
def test_memory_is_kept_from_step_to_step_where_there_is_room(room):
    done = subprocess.run([sys.executable, "-c", FAULTS, room], capture_output=True, text=True, check=True)
    before, within, after = map(int, done.stdout.split())
    assert before > 10_000
    assert after > 10_000
    assert within < 1000 if room == "enough" else within > 10_000


def test_memory_of_other_devices_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("the C library was asked"))
    with allocator.kept(torch.device("cuda")) as keep:
        keep()
