"""Losses, label weights, learned task weights and recalibration."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ichprog import heads, networks
from ichprog.spec import PluginRef
from ichprog.train import PRESETS, trainer
from ichprog.train.losses import Objective, label_weights, mean_loss, recalibrate

from support.cohorts import SHAPE


def some(number=12, labels=3, seed=0):
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.standard_normal((number, labels - 1))).float()
    target = torch.from_numpy(random.integers(-1, labels, number))
    return logits, target


def test_a_loss_is_the_mean_over_patients_with_a_label():
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


def test_class_weights_equal_those_of_cross_entropy():
    logits, target = some(labels=4)
    weights = torch.tensor([3.0, 1.0, 0.5])
    found = mean_loss(heads.softmax(4, ["a", "b", "c"]), logits, target.clamp(max=2), weights)
    expected = functional.cross_entropy(logits, target.clamp(max=2), weight=weights, ignore_index=-1)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_class_weights_are_inverse_to_the_frequency(spec):
    labels = {task.name: np.zeros(12, int) for task in spec.tasks}
    labels["gcs"][:] = [0] * 6 + [1] * 3 + [-1] * 3
    weights = label_weights(spec, labels, np.arange(12), "class_weights")["gcs"]
    assert weights[:2].tolist() == [0.75, 1.5]
    assert label_weights(spec, labels, np.arange(12), "none")["gcs"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_batches_sum_to_the_loss_of_their_step(weighting, spec):
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
    whole = trainer._label_weight_sums(objective, job, np.arange(16))

    def gradient(batches):
        objective.zero_grad()
        total = 0.0
        for batch in batches:
            mine = trainer._label_weight_sums(objective, job, batch)
            targets = {task: torch.from_numpy(known[batch]) for task, known in labels.items()}
            loss, _ = objective(values[batch], targets, {task: mine[task] / whole[task] for task in whole})
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in objective.parameters()])

    one, at_once = gradient([np.arange(16)])
    several, in_parts = gradient([np.arange(0, 6), np.arange(6, 9), np.arange(9, 16)])
    assert several == pytest.approx(one, rel=1e-5)
    assert torch.allclose(in_parts, at_once, atol=1e-6)


def test_learned_weights_converge_to_the_inverse_loss(spec):
    """For losses that stay the same, every s ends at log L, and each task's weight at 1 / L."""
    objective = Objective(networks.build(spec), spec, PRESETS["default"].replace(loss_weighting="uncertainty"), {})
    losses = {"prognosis": torch.tensor(0.2), "gcs": torch.tensor(1.0), "age": torch.tensor(3.0)}
    optimiser = torch.optim.LBFGS([objective.log_variance], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        total = torch.stack(objective.weighted_terms(losses)).sum()
        total.backward()
        return total

    optimiser.step(closure)
    assert torch.allclose(objective.log_variance.detach(), torch.log(torch.tensor([0.2, 1.0, 3.0])), atol=1e-3)
    best = float(torch.stack(objective.weighted_terms(losses)).sum().detach())
    assert objective.total({task: float(loss) for task, loss in losses.items()}) == pytest.approx(best, abs=1e-4)


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


def test_only_heads_with_rescale_are_recalibrated():
    features = torch.randn(5, 4, 2, 2, 2)
    for build in (heads.ordinal, heads.softmax):
        head = build(4, ["a", "b", "c"])
        before, shift = head(features), torch.tensor([0.3, -0.2, 0.1])[: head(features).shape[1]]
        head.rescale_(torch.tensor(1.7), shift)
        assert torch.allclose(head(features), 1.7 * before + shift, atol=1e-5)

    class Bare(nn.Module):
        loss = staticmethod(functional.cross_entropy)

    assert recalibrate(Bare(), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)) is None
