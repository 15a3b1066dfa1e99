"""The runtimes give the same results, compiled graphs are cached and rebuilt, and torch is the fallback."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import ichprog
from ichprog import registry
from ichprog.backbones import Backbone
from ichprog.errors import PluginError, UnknownNameError

from support.models import local_model
from support.phantoms import brain_hu

pytestmark = pytest.mark.compiled

COMPACT = "compact.prognosis_gcs3_age"
SHAPE = (16, 48, 44)


class Dense(nn.Module):
    """Concatenates, adds, and pools both ways, with functional ReLUs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(1, 4, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        self.norm = nn.BatchNorm3d(4)
        self.inner = nn.Conv3d(4, 4, 3, padding=1)
        self.last = nn.Conv3d(8, 6, 1)
        nn.init.uniform_(self.norm.running_mean, -0.1, 0.1)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, grid):
        x = functional.max_pool3d(self.norm(self.first(grid)).relu(), 3, 2, 1)
        x = torch.cat([x, self.inner(x).relu() + x], 1)
        return functional.avg_pool3d(self.last(functional.relu(x)), 2)


class Square(nn.Module):
    def forward(self, x):
        return x * x


def layers(made, channels):
    """Return a function that builds a backbone of layers, with the last one as `cam_layer`."""
    return lambda: Backbone(nn.Sequential(*(modules := made())), channels, f"features.{len(modules) - 1}")


BACKBONES = {
    "dense": layers(lambda: [Dense()], 6),
    "dilated": layers(lambda: [nn.Conv3d(1, 4, 3, dilation=2, padding=1), nn.ReLU(), nn.Conv3d(4, 2, (1, 3, 5))], 2),
    "strides": layers(
        lambda: [nn.Conv3d(1, 3, (4, 5, 3), (3, 2, 4), (1, 0, 2)), nn.ReLU(), nn.Conv3d(3, 40, 2, 2)], 40
    ),
    "pools": layers(
        lambda: [nn.Conv3d(1, 3, 3), nn.MaxPool3d((2, 3, 2), (2, 2, 1)), nn.ReLU(), nn.AvgPool3d((2, 1, 3))], 3
    ),
    "ceil": layers(lambda: [nn.Conv3d(1, 2, 3), nn.ReLU(), nn.MaxPool3d(3, 2, 1, ceil_mode=True)], 2),
}
UNSUPPORTED = {
    "gelu": layers(lambda: [nn.Conv3d(1, 2, 3), nn.ReLU(), nn.GELU(), nn.Conv3d(2, 2, 3)], 2),
    "overlap": layers(lambda: [nn.Conv3d(1, 2, 3), nn.ReLU(), nn.AvgPool3d(3, 2)], 2),
    "product": layers(lambda: [nn.Conv3d(1, 2, 3), nn.ReLU(), Square()], 2),
}


OTHERS = {
    "coordinates": lambda: registry.backbones.load("compact")(width=2, coordinates=True),
    "residual": lambda: registry.backbones.load("compact")(width=2, residual=True),
    "branching": layers(lambda: [Branching()], 2),
}


class Branching(nn.Module):
    """Depends on its input in a way that no graph can express."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(1, 2, 3)

    def forward(self, grid):
        return self.convolution(grid) if float(grid.mean()) > 0.4 else -self.convolution(grid)


@pytest.fixture
def model_of(tmp_path):
    """Register all backbones and build a local model of one by name."""
    made = BACKBONES | UNSUPPORTED | OTHERS
    for name, build in made.items():
        ichprog.register_backbone(name, build)
    yield lambda name: local_model(tmp_path / name, name, shape=SHAPE)
    for name in made:
        registry.backbones.unregister(name)


@pytest.fixture(scope="session")
def image():
    """Return a small simulated brain."""
    return nib.Nifti1Image(brain_hu((96, 96, 24)), np.diag([-2.3, -2.3, 6.0, 1.0]))


@pytest.fixture
def grids():
    return np.random.default_rng(1).random((2, *SHAPE), np.float32)


def logits(model, grids):
    return np.concatenate([answer.logits for answer in model.predict_grids(grids)[0].values()], 1)


def probabilities(model, grids):
    return np.concatenate([answer.probabilities for answer in model.predict_grids(grids)[0].values()], 1)


@pytest.mark.parametrize("backbone", [*BACKBONES, *UNSUPPORTED, "coordinates", "residual"])
def test_both_runtimes_give_the_same_outputs(backbone, model_of, grids):
    name = model_of(backbone)
    fast, slow = (ichprog.load_model(name, runtime=runtime) for runtime in ("auto", "torch"))
    assert (fast.runtime, slow.runtime) == ("openvino", "torch")
    assert np.abs(logits(fast, grids) - logits(slow, grids)).max() < 1e-4
    assert np.abs(probabilities(fast, grids) - probabilities(slow, grids)).max() < 1e-5


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_is_near_float32(backbone, model_of, grids):
    name = model_of(backbone)
    rounded, exact = (ichprog.load_model(name, precision=precision) for precision in ("bfloat16", "float32"))
    if rounded.precision == "float32":
        pytest.skip("this processor does not support bfloat16")
    assert np.abs(probabilities(rounded, grids) - probabilities(exact, grids)).max() < 0.01


@pytest.mark.parametrize(("kernel", "stride", "padding", "columns"), [
    ((7, 7, 7), (2, 2, 2), 3, 31),
    ((3, 5, 4), (1, 2, 2), (1, 0, 2), 30),
    ((2, 2, 1), 2, 0, 9),
    ((1, 1, 2), (3, 1, 2), 0, 11),
])  # fmt: skip
def test_columns_to_channels_keeps_the_numbers(kernel, stride, padding, columns):
    from ichprog.runtime.openvino import backend

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, kernel, stride, padding), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()
    values = torch.rand(1, 1, 12, 13, columns)
    graph = backend.convert(network, values.shape[2:])
    backend.columns_to_channels(graph)
    weights = [op.input_value(1) for op in graph.get_ordered_ops() if op.get_type_name() == "Convolution"]
    assert [tuple(each.get_shape())[:2] for each in weights] == [(4, 2), (3, 4)]
    found = backend.core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values.numpy()])[0]
    assert np.abs(found - network(values).detach().numpy()).max() < 1e-5


METHODS = ["guided_backprop", "grad_cam", "guided_grad_cam"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_compiled_gradient_equals_autograd(backbone, model_of, image):
    name = model_of(backbone)
    arguments = {"task": ["prognosis", "gcs", "age"], "method": METHODS}
    fast, slow = (
        ichprog.explain(ichprog.load_model(name, runtime=runtime), image, **arguments) for runtime in ("auto", "torch")
    )
    for key, found in fast.items():
        assert (found.provenance["runtime"], found.provenance["fallback_reason"]) == ("openvino", None)
        right = slow[key].grid_map
        assert found.grid_map.shape == right.shape
        assert np.abs(found.grid_map - right).max() <= 1e-4 * np.abs(right).max(), key
    assert any(found.grid_map.any() for (_, method), found in fast.items() if method == "guided_backprop")


@pytest.mark.parametrize("backbone", UNSUPPORTED)
def test_torch_explains_networks_with_unsupported_operations(backbone, model_of, image):
    name = model_of(backbone)
    found, right = (
        ichprog.explain(ichprog.load_model(name, runtime=runtime), image) for runtime in ("openvino", "torch")
    )
    assert found.provenance["runtime"] == "torch"
    assert "guided backpropagation cannot be compiled" in found.provenance["fallback_reason"]
    assert right.provenance["fallback_reason"] is None
    assert np.array_equal(found.grid_map, right.grid_map)


def test_torch_explains_other_layers_and_methods_that_need_the_network(model_of, image):
    model = ichprog.load_model(model_of("dense"))
    assert ichprog.explain(model, image, method="grad_cam").provenance["runtime"] == "openvino"
    inner = ichprog.explain(model, image, method="grad_cam", layer="features.0.inner")
    assert (inner.provenance["runtime"], inner.grid_map.shape) == ("torch", (8, 12, 11))
    assert "layer" in inner.provenance["fallback_reason"]
    with pytest.raises(UnknownNameError, match="Unknown layer 'nothing'"):
        ichprog.explain(model, image, method="grad_cam", layer="nothing")
    ichprog.register_saliency("itself", lambda score, grid, network: grid[0, 0])
    try:
        plain = ichprog.explain(model, image, method="itself")
    finally:
        registry.saliency.unregister("itself")
    assert plain.provenance["runtime"] == "torch"
    assert "needs the torch network" in plain.provenance["fallback_reason"]


def test_torch_is_the_fallback_for_a_network_that_cannot_be_compiled(model_of, grids, image):
    name = model_of("branching")
    model = ichprog.load_model(name)
    assert model.runtime == "torch"
    assert "OpenVINO cannot run its network" in model.fallback_reason
    assert ichprog.predict(model, image).provenance["fallback_reason"] == model.fallback_reason
    assert np.array_equal(logits(model, grids), logits(ichprog.load_model(name, runtime="torch"), grids))
    with pytest.raises(PluginError, match=r"cannot run its network.*runtime='torch'"):
        ichprog.load_model(name, runtime="openvino")


def test_a_compiled_network_with_other_probabilities_is_not_used(model_of, monkeypatch, grids):
    from ichprog.runtime.openvino import backend

    convert = backend.convert

    def spoilt(module, *args):
        for parameter in module.parameters():
            parameter.data += 0.1
        graph = convert(module, *args)
        for parameter in module.parameters():
            parameter.data -= 0.1
        return graph

    monkeypatch.setattr(backend, "convert", spoilt)
    model = ichprog.load_model(model_of("dense"))
    assert model.runtime == "torch"
    assert "differ" in model.fallback_reason


def test_grids_of_other_shapes_are_predicted(model_of):
    fast, slow = (
        ichprog.load_model(model_of_name, runtime=r) for r in ("auto", "torch") for model_of_name in [COMPACT]
    )
    other = np.random.default_rng(0).random((3, 16, 64, 80), np.float32)
    assert np.abs(logits(fast, other) - logits(slow, other)).max() < 1e-4


# The cache


def compiled_files():
    return sorted(Path(os.environ["ICHPROG_CACHE"], "compiled").rglob("*.blob"))


CODE = f"""
import sys, numpy as np, ichprog
model = ichprog.load_model({COMPACT!r}, fold=0, precision=sys.argv[1])
grids = np.random.default_rng(1).random((1, 24, 112, 112), np.float32)
print(model.runtime, *["torch" in sys.modules, "monai" in sys.modules])
print(*np.concatenate([a.logits for a in model.predict_grids(grids)[0].values()], 1)[0])
"""


def in_a_process(precision="float32", code=CODE, **options):
    done = subprocess.run(
        [sys.executable, "-c", code, precision], capture_output=True, text=True, check=True, timeout=300, **options
    )
    assert done.stderr == ""
    flags, numbers = done.stdout.splitlines()
    return flags.split(), np.array(numbers.split(), float)


@pytest.fixture(scope="session")
def right():
    """Return the logits of the first fold of the embedded model, computed by torch."""
    grids = np.random.default_rng(1).random((1, 24, 112, 112), np.float32)
    return logits(ichprog.load_model(COMPACT, fold=0, runtime="torch"), grids)[0]


@pytest.fixture
def filled(right):
    """Fill the cache with the graph of the embedded model's first fold and return its file."""
    assert (
        np.abs(
            logits(ichprog.load_model(COMPACT, fold=0), np.random.default_rng(1).random((1, 24, 112, 112), np.float32))[
                0
            ]
            - right
        ).max()
        < 1e-4
    )
    (file,) = compiled_files()
    return file


def test_the_second_use_needs_no_torch(filled, right):
    before = filled.read_bytes()
    flags, found = in_a_process()
    assert flags == ["openvino", "False", "False"]
    # in float32 to the last digits, though the processor may have bfloat16
    assert np.abs(found - right).max() < 2e-5
    assert filled.read_bytes() == before


def test_each_precision_has_its_own_graph(filled, right):
    model = ichprog.load_model(COMPACT, fold=0, precision="bfloat16")
    if model.fallback_reason is not None:
        pytest.skip("this processor does not support bfloat16")
    assert len(compiled_files()) == 2
    _, found = in_a_process("bfloat16")
    assert 1e-4 < np.abs(found - right).max() < 0.2


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1000],
        lambda b: b[:50],
        lambda b: b"",
        lambda b: b[:-5000] + bytes([b[-5000] ^ 1]) + b[-4999:],
        lambda b: b"0" * 8 + b[8:],
        lambda b: b[:8] + b"{}\n" + b[8:],
        lambda b: b[:8] + b[8:].replace(b'"cache_version": ', b'"cache_version": 1'),
        lambda b: b"\n" * 2000,
    ],
    ids=["cut", "cut short", "empty", "a bit", "checksum", "no stamp", "stale", "lines"],
)
def test_damaged_or_outdated_files_are_rebuilt(damage, filled, right):
    whole = filled.read_bytes()
    filled.write_bytes(damage(whole))
    grids = np.random.default_rng(1).random((1, 24, 112, 112), np.float32)
    assert np.abs(logits(ichprog.load_model(COMPACT, fold=0), grids)[0] - right).max() < 1e-4
    assert in_a_process()[0] == ["openvino", "False", "False"]


def test_an_intact_file_of_another_version_is_rebuilt(filled, right):
    """The checksum is right, but the file names another version of OpenVINO or has no graph."""
    content = filled.read_bytes()[8:]
    line, _ = content.split(b"\n", 1)
    for stamp in (line.replace(b'"openvino": "', b'"openvino": "9'), line):
        other = stamp + b"\nno graph"
        filled.write_bytes(b"%08x" % zlib.crc32(other) + other)
        model = ichprog.load_model(COMPACT, fold=0)
        grids = np.random.default_rng(1).random((1, 24, 112, 112), np.float32)
        assert np.abs(logits(model, grids)[0] - right).max() < 1e-4
        assert in_a_process()[0] == ["openvino", "False", "False"]


def test_other_weights_have_another_graph(tmp_path, filled):
    ichprog.load_model(COMPACT, fold=1)
    assert len({file.parent for file in compiled_files()}) == 2


def test_graphs_of_registered_plugins_are_not_cached(model_of):
    ichprog.load_model(model_of("dense"))
    assert compiled_files() == []
    assert not Path(os.environ["ICHPROG_CACHE"], "compiled").exists()


def test_an_unwritable_cache_only_costs_time(monkeypatch, tmp_path, right):
    grids = np.random.default_rng(1).random((1, 24, 112, 112), np.float32)
    (tmp_path / "compiled").write_text("a file where the folder should be")
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path))
    model = ichprog.load_model(COMPACT, fold=0)
    assert model.runtime == "openvino"
    assert np.abs(logits(model, grids)[0] - right).max() < 1e-4


def test_a_full_disk_only_costs_time(right):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    flags, found = in_a_process(code=full + CODE)
    assert flags[0] == "openvino"
    assert np.abs(found - right).max() < 2e-5
    assert compiled_files() == []
    assert [
        p for p in Path(os.environ["ICHPROG_CACHE"], "compiled").rglob("*") if p.is_file() and p.stat().st_size
    ] == []


def test_two_processes_build_one_graph(right):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, "float32"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
        flags, numbers = out.splitlines()
        assert flags.startswith("openvino")
        assert np.abs(np.array(numbers.split(), float) - right).max() < 2e-5
    assert len(compiled_files()) == 1
    assert in_a_process()[0] == ["openvino", "False", "False"]


# Choosing a runtime


def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch, image):
    from ichprog.runtime.openvino import backend

    monkeypatch.setattr(backend, "supports_bfloat16", lambda: False)
    model = ichprog.load_model(COMPACT, fold=0, precision="bfloat16")
    assert (model.runtime, model.precision) == ("openvino", "float32")
    provenance = ichprog.predict(model, image).provenance
    assert provenance["precision"] == "float32"
    assert "does not support bfloat16" in provenance["fallback_reason"]


def test_openvino_refuses_other_devices_than_the_cpu():
    with pytest.raises(UnknownNameError, match=r"device of the runtime openvino.*runtime='torch'"):
        ichprog.load_model(COMPACT, runtime="openvino", device="cuda")
    assert ichprog.load_model(COMPACT, fold=0, runtime="torch", device="cpu").runtime == "torch"


@pytest.mark.parametrize(
    ("method", "loaded"), [("grad_cam", {"predict", "forward", "backward"}), ("itself", {"predict"})]
)
def test_cached_explanation_graphs_are_loaded_only_if_they_are_needed(method, loaded, filled, image):
    ichprog.explain(ichprog.load_model(COMPACT, fold=0), image, method="grad_cam")
    model = ichprog.load_model(COMPACT, fold=0)
    ichprog.register_saliency("itself", lambda score, grid, network: grid[0, 0])
    try:
        ichprog.explain(model, image, method=method)
    finally:
        registry.saliency.unregister("itself")
    assert {graph for graph, _ in model.fold_runtimes[0]._graphs} == loaded


def test_compiling_leaves_logging_and_warnings_unchanged():
    code = f"""
import logging, warnings, torch, monai.networks.nets, ichprog
before = list(warnings.filters)
ichprog.load_model({COMPACT!r}, fold=0)
print(logging.getLogger().handlers == [], logging.getLogger().level, before == warnings.filters)
print(0)
"""
    assert in_a_process(code=code)[0] == ["True", "30", "True"]


def test_tasks_and_methods_share_one_forward_pass_and_one_backward_pass_per_task(model_of, image, monkeypatch):
    """Nine maps of a fold take one run of the forward graph and three of the backward graph."""
    from ichprog.runtime.openvino import runtime

    runs = []
    infer = runtime._CompiledGraph.infer
    monkeypatch.setattr(
        runtime._CompiledGraph, "infer", lambda self, given: (runs.append(len(given)), infer(self, given))[1]
    )
    model = ichprog.load_model(model_of("dense"))
    ichprog.explain(model, image)
    runs.clear()
    assert len(ichprog.explain(model, image, task=["prognosis", "gcs", "age"], method=METHODS)) == 9
    assert sorted(map(bool, (n - 1 for n in runs))) == [False, True, True, True]


def test_scans_are_read_one_ahead_and_predicted_in_order(model_of, image, tmp_path):
    """The error of a scan is reported at its position and does not affect other scans."""
    paths = [tmp_path / f"{number}.nii.gz" for number in range(5)]
    for path in paths:
        nib.save(image, path)
    paths[2].write_bytes(b"nothing")
    model = ichprog.load_model(model_of("dense"))
    found = ichprog.predict(model, paths, on_error="record")
    assert [prediction.scan for prediction in found] == [str(path) for path in paths]
    assert [prediction.error is not None for prediction in found] == [False, False, True, False, False]
    assert len({prediction["gcs"].logits for prediction in found if prediction.error is None}) == 1
    answers = ichprog.predict(model, iter(paths))
    assert [next(answers).scan, next(answers).scan] == [str(path) for path in paths[:2]]
    with pytest.raises(ichprog.errors.ScanError, match=r"2\.nii\.gz"):
        next(answers)
    # an error that is found while the network runs is raised too, and leaves the model usable
    empty = nib.Nifti1Image(np.zeros((96, 96, 24), np.int16), image.affine)
    for _ in range(2):
        with pytest.raises(ichprog.errors.ScanError, match="empty"):
            ichprog.predict(model, empty, brain="given")
    assert ichprog.predict(model, image)["gcs"].logits == found[0]["gcs"].logits
