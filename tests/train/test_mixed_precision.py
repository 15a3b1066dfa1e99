"""Training in bfloat16, and the loss curve in both precisions."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ichprog import RunError, networks
from ichprog.train import folds, grid_cache, mixed_precision, train

from support.cohorts import QUICK, read_table, run_checksums

CPU = torch.device("cpu")


needs_bfloat16 = pytest.mark.skipif(
    mixed_precision.unsupported_reason(CPU) is not None, reason="no processor that multiplies in bfloat16"
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
def test_the_loss_curve_equals_a_plain_loop(
    precision, within, folder, cohort, spec, tmp_path, options, without_augmentation
):
    from safetensors.torch import load_file

    changes = {
        "batch_size": 32,
        "balance": "none",
        "recalibrate": False,
        "validation_fraction": 0.2,
        "precision": precision,
    }
    changes |= {"schedule": "plateau", "plateau_patience": 99, "weight_decay": 1e-4, "amsgrad": True}
    protocol, settings = without_augmentation(**changes), {"folds": 4, "only_folds": [0], "options": options}
    initial = train(
        cohort, spec, tmp_path / "initial", protocol=protocol.replace(epochs=1, learning_rate=1e-12), **settings
    )
    out = train(cohort, spec, tmp_path / "run", protocol=protocol.replace(epochs=12, learning_rate=0.005), **settings)

    part = folds.split(cohort.labels(spec.tasks[0]), 4, validation_fraction=0.2)[0].train
    files = grid_cache.prepare(
        [cohort.patients[p].scan for p in part], spec.input, brain="auto", folder=folder / "c/grids"
    )
    values = torch.from_numpy(np.stack([np.load(file) for file in files])[:, None])
    targets = {task.name: torch.from_numpy(cohort.labels(task)[part]) for task in spec.tasks}
    first = networks.build(spec)
    first.load_state_dict(load_file(initial / "fold0.safetensors"))
    expected = plain_losses(first, values, targets, 12)
    assert expected[-1] < 0.7 * expected[0]
    assert [float(row["loss"]) for row in read_table(out / "log.csv")] == pytest.approx(expected, rel=within)


@needs_bfloat16
@pytest.mark.parametrize(
    ("kernel", "stride", "depth"), [(2, 1, 1), (3, 1, 2), (5, 1, 2), (5, 1, 3), (5, 1, 4), (5, 2, 4), (3, 1, 9)]
)
def test_convolutions_of_short_inputs_are_correct_in_bfloat16(kernel, stride, depth):
    """PyTorch's own weight gradients are anything up to infinity in all but the last of these."""
    torch.manual_seed(0)
    layer = nn.Conv3d(16, 32, kernel, stride, kernel // 2).to(memory_format=torch.channels_last_3d)
    values, direction = torch.randn(2, 16, depth, 9, 9), None
    found = []
    for rounded in (False, True):
        given = values.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        with mixed_precision.autocast(CPU, is_bfloat16=rounded):
            made = layer(given)
        direction = torch.randn_like(made) if direction is None else direction
        found.append([made, *torch.autograd.grad(made, [given, layer.weight], direction.to(made.dtype))])
    for exact, near in zip(*found, strict=True):
        assert (near - exact).abs().max() < 0.02 * exact.abs().max()


POINTWISE = """
import torch
from ichprog.train import mixed_precision

torch.manual_seed(0)
torch.set_num_threads(2)
layer, values, direction, found = torch.nn.Conv3d(128, 128, 1), torch.randn(2, 128, 5, 38, 38), None, []
for rounded in (False, True):
    given = values.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with mixed_precision.autocast(torch.device("cpu"), is_bfloat16=rounded):
        made = layer(given)
    direction = torch.randn_like(made) if direction is None else direction
    assert made.dtype == (torch.bfloat16 if rounded else torch.float32)
    assert made.is_contiguous(memory_format=torch.channels_last_3d)
    found.append([made, *torch.autograd.grad(made, [given, *layer.parameters()], direction.to(made.dtype))])
for exact, near in zip(*found, strict=True):
    assert (near - exact).abs().max() < 0.02 * exact.abs().max()
"""


@needs_bfloat16
def test_convolutions_with_kernels_of_size_1_end_and_are_correct_in_bfloat16():
    """With two threads, the weight gradient of PyTorch's own never ends on a processor with AMX."""
    subprocess.run([sys.executable, "-c", POINTWISE], check=True, timeout=300)


@needs_bfloat16
def test_pooling_preserves_precision_and_layout():
    values = torch.rand(2, 4, 6, 6, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    with mixed_precision.autocast(CPU, is_bfloat16=True):
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
def test_bfloat16_on_a_cpu_needs_a_request_and_correct_convolutions(cohort, spec, tmp_path, options):
    settings = {"folds": 4, "only_folds": [0], "options": options}
    protocol = QUICK.replace(epochs=2)
    wrong = pytest.raises(RunError, match=r"(?s)'bfloat16': on this processor a convolution of 2 x 1 x 8.*'float32'")
    with Faulty(), wrong:
        train(cohort, spec, tmp_path / "settings", protocol=protocol.replace(precision="bfloat16"), **settings)
    for precision in ("auto", "float32", "bfloat16"):
        train(cohort, spec, tmp_path / precision, protocol=protocol.replace(precision=precision), **settings)
    record = {
        run: json.loads((tmp_path / run / "run.json").read_text())["results"]["0"]["precision"]
        for run in ("auto", "float32", "bfloat16")
    }
    assert record == {"auto": "float32", "float32": "float32", "bfloat16": "bfloat16"}
    assert (
        run_checksums(tmp_path / "auto") == run_checksums(tmp_path / "float32") != run_checksums(tmp_path / "bfloat16")
    )
    assert [row["bfloat16"] for row in read_table(tmp_path / "bfloat16" / "log.csv")] == ["1.0", "1.0"]


def test_bfloat16_is_refused_on_a_cpu_without_it(cohort, spec, tmp_path, monkeypatch, options):
    monkeypatch.setattr(mixed_precision, "supports_bfloat16", lambda: False)
    options = dataclasses.replace(options, device="cpu")
    with pytest.raises(RunError, match="'bfloat16': this processor does not multiply in bfloat16"):
        train(cohort, spec, tmp_path / "run", folds=4, protocol=QUICK.replace(precision="bfloat16"), options=options)
    assert not (tmp_path / "run").exists()
