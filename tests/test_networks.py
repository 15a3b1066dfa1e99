"""Networks are built from specs and equal the published ones; every registered plugin fulfils its contract."""

import dataclasses
import inspect

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ichprog
from ichprog import PluginError, SpecError, UnknownNameError, WeightsError, hub, networks, registry, zoo
from ichprog.spec import PluginRef

from support import reference_pipeline


def build_small(backbone: str):
    return registry.backbones.load(backbone)().eval()


@pytest.mark.parametrize("name", registry.backbones.names())
def test_a_backbone_fulfils_its_contract(name):
    backbone = build_small(name)
    grid = torch.rand(2, 1, 40, 64, 64)
    features = backbone(grid)
    assert features.ndim == 5
    assert features.shape[:2] == (2, backbone.out_channels)
    assert backbone.cam_layer in dict(backbone.named_modules())
    assert torch.equal(features, backbone(grid))
    assert torch.allclose(features[:1], backbone(grid[:1]), atol=1e-5)


@pytest.mark.parametrize("name", ["perez2023.prognosis", "densenet121.prognosis"])
def test_a_grid_that_is_too_small_is_refused_with_one_that_is_not(name):
    spec = zoo.find(name)
    small = dataclasses.replace(spec, input=dataclasses.replace(spec.input, shape=(16, 70, 70)))
    with pytest.raises(SpecError, match=r"cannot read a grid of \(16, 70, 70\).* It can read") as refused:
        networks.feature_shape(small)
    advised = tuple(int(size) for size in str(refused.value).rpartition("(")[2].rstrip(").").split(", "))
    features = networks.build(spec).backbone.eval()(torch.zeros(1, 1, *advised))
    larger = dataclasses.replace(spec, input=dataclasses.replace(spec.input, shape=advised))
    assert networks.feature_shape(larger) == features.shape[1:]


def test_a_backbone_that_reads_values_has_features(monkeypatch):
    class Reading(nn.Module):
        out_channels, cam_layer = 1, "layer"

        def __init__(self):
            super().__init__()
            self.layer = nn.AvgPool3d(4)

        def forward(self, grid):
            return self.layer(grid) * (1 if grid.max().item() > 1 else 2)

    spec = zoo.find("compact.prognosis_gcs3_age")
    monkeypatch.setattr(registry.backbones, "load", lambda name: lambda **options: Reading())
    assert networks.feature_shape(spec) == (1, 6, 28, 28)


def test_coordinates_tell_where_something_lies():
    """Without them, the mean of the features of a spot is the same wherever the spot lies."""
    moved = []
    for coordinates in (False, True):
        torch.manual_seed(0)
        backbone = registry.backbones.load("compact")(width=4, coordinates=coordinates).eval()
        places = []
        for place in (24, 40):
            grid = torch.zeros(1, 1, 16, 64, 64)
            grid[..., 8:10, place : place + 2, 32:34] = 1
            places.append((backbone(grid) - backbone(torch.zeros_like(grid))).mean((2, 3, 4)))
        moved.append((torch.dist(*places) / places[0].norm()).item())
    assert moved[0] < 1e-4
    assert moved[1] > 0.1


def test_new_residual_blocks_add_nothing():
    """A trained network can be made deeper without a change of its output."""
    build, grid = registry.backbones.load("compact"), torch.rand(2, 1, 8, 32, 32)
    plain, deeper = build(width=4).eval(), build(width=4, residual=True).eval()
    layers = [layer for layer in plain.features if list(layer.parameters())]
    others = [layer for layer in deeper.features if isinstance(layer, torch.nn.Conv3d | torch.nn.BatchNorm3d)]
    for layer, other in zip(layers, others, strict=True):
        other.load_state_dict(layer.state_dict())
    assert torch.equal(deeper(grid), plain(grid))
    blocks = sum(parameter.numel() for parameter in deeper.parameters()) - sum(p.numel() for p in plain.parameters())
    assert blocks == 27 * (4**2 / 3 + 8**2 + 12**2 + 16**2) + 2 * (4 + 8 + 12 + 16)


@pytest.mark.parametrize("name", registry.heads.names())
@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c"), tuple("abcdefg")])
def test_a_head_fulfils_its_contract(name, labels):
    head = registry.heads.load(name)(16, labels)
    features = torch.randn(5, 16, 1, 3, 2, requires_grad=True)
    logits = head(features)
    probabilities = head.probabilities(logits * 10)
    assert probabilities.shape == (5, len(labels))
    assert (probabilities >= 0).all()
    assert torch.allclose(probabilities.sum(1), torch.ones(5))
    loss = head.loss(logits, torch.arange(5) % len(labels))
    assert loss.ndim == 0
    loss.backward()
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("name", registry.heads.names())
def test_a_head_learns_its_labels(name):
    """Minimising the loss makes the true label the most probable one, so loss and probabilities agree."""
    torch.manual_seed(0)
    build = registry.heads.load(name)
    options = {"activation": False} if "activation" in inspect.signature(build).parameters else {}
    head = build(3, ("a", "b", "c"), **options)
    target = torch.arange(3).repeat(10)
    features = torch.nn.functional.one_hot(target).float()[:, :, None, None, None] + 0.1 * torch.randn(30, 3, 1, 1, 1)
    optimiser = torch.optim.Adam(head.parameters(), 0.1)
    for _ in range(200):
        optimiser.zero_grad()
        head.loss(head(features), target).backward()
        optimiser.step()
    assert (head.probabilities(head(features)).argmax(1) == target).all()


def test_ordinal_probabilities_follow_the_described_codes():
    head = registry.heads.load("ordinal")(4, ("13-15", "9-12", "3-8"))
    logits = torch.tensor([[0.4, -1.1], [-1.0, 2.0]])
    sigmoid = torch.sigmoid(logits)
    first, crossed = head.probabilities(logits)
    assert torch.allclose(first, torch.stack([1 - sigmoid[0, 0], sigmoid[0, 0] - sigmoid[0, 1], sigmoid[0, 1]]))
    assert torch.allclose(crossed, torch.stack([1 - sigmoid[1, 0], torch.tensor(0.0), sigmoid[1, 0]]))
    codes = {0: [0.0, 0.0], 1: [1.0, 0.0], 2: [1.0, 1.0]}
    for label, code in codes.items():
        expected = torch.nn.functional.binary_cross_entropy(sigmoid[:1], torch.tensor([code]))
        assert torch.allclose(head.loss(logits[:1], torch.tensor([label])), expected)


@pytest.mark.parametrize("name", reference_pipeline.PUBLISHED)
def test_a_published_checkpoint_gives_the_published_logits(name, tmp_path):
    """Keys and numbers are equal on a small grid; test_model compares whole scans."""
    spec = zoo.find(name)
    published = reference_pipeline.network(name, seed=7)
    save_file(hub.remap_keys(published.state_dict(), spec.weights.keys, "test"), tmp_path / "fold0.safetensors")
    network = networks.load(spec, tmp_path / "fold0.safetensors")
    grid = torch.rand(2, 1, 40, 64, 64)
    with torch.no_grad():
        expected, actual = published(grid), network(grid)
    for task, values in zip(reference_pipeline.PUBLISHED[name][3], expected, strict=True):
        assert torch.allclose(actual[task], values, atol=1e-5)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_the_number_of_parameters_is_as_documented():
    count = {n: sum(p.numel() for p in build_small(n).parameters()) for n in ("densenet121", "perez2023")}
    assert round(count["densenet121"] / 1e6, 2) == 11.24
    assert round(count["perez2023"] / 1e6, 1) == 0.3


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "not safetensors"])
def test_weights_are_loaded_strictly(change, tmp_path):
    spec = zoo.find("perez2023.prognosis")
    state = networks.build(spec).state_dict()
    path = tmp_path / "fold0.safetensors"
    if change == "missing":
        del state["heads.prognosis.linear.bias"]
    if change == "extra":
        state["heads.prognosis.linear.colour"] = torch.zeros(1)
    if change == "shape":
        state["backbone.features.3.weight"] = torch.zeros(2, 2)
    save_file(state, path)
    if change == "not safetensors":
        path.write_bytes(b"not at all")
    messages = {
        "missing": "heads.prognosis.linear.bias is missing",
        "extra": "heads.prognosis.linear.colour is not part of the network",
        "shape": r"backbone.features.3.weight has shape \[2, 2\] instead of \[32, 16, 3, 3, 3\]",
        "not safetensors": "cannot be read as safetensors",
    }
    with pytest.raises(WeightsError, match=messages[change]):
        networks.load(spec, path)


def with_backbone(name, **options):
    return dataclasses.replace(zoo.find("perez2023.prognosis"), backbone=PluginRef(name, options))


def test_an_unknown_backbone_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Unknown backbone 'densenet112'.*Did you mean densenet121"):
        networks.build(with_backbone("densenet112"))


def test_a_wrong_option_is_refused():
    with pytest.raises(SpecError, match=r"refuses its options .*colour"):
        networks.build(with_backbone("perez2023", colour="red"))


@pytest.fixture
def plugin():
    """Return a function that registers a backbone for one test."""
    names = []

    def register(name, build):
        ichprog.register_backbone(name, build)
        names.append(name)

    yield register
    for name in names:
        registry.backbones.unregister(name)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: "no module", "must build a torch.nn.Module"),
        (torch.nn.Identity, "needs the attributes out_channels"),
        (lambda: 1 / 0, "cannot be built: ZeroDivisionError"),
    ],
)
def test_a_backbone_that_breaks_its_contract_is_named(build, message, plugin):
    plugin("broken", build)
    with pytest.raises(PluginError, match=f"backbone 'broken'.*{message}"):
        networks.build(with_backbone("broken"))


def test_a_missing_cam_layer_is_refused(plugin):
    def build():
        module = torch.nn.Identity()
        module.out_channels, module.cam_layer = 1, "nowhere"
        return module

    plugin("lost", build)
    with pytest.raises(PluginError, match="'nowhere' names none of its modules"):
        networks.build(with_backbone("lost"))


def test_channels_last_changes_only_the_memory_format_of_3d_convolutions():
    """A backbone may contain 2D convolutions, which process single slices."""
    module = nn.ModuleDict({"flat": nn.Conv2d(2, 3, 3), "deep": nn.Conv3d(2, 3, 3), "linear": nn.Linear(2, 3)})
    before = {key: values.clone() for key, values in module.state_dict().items()}
    networks.channels_last(module)
    assert module["deep"].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert module["flat"].weight.is_contiguous()
    for key, values in module.state_dict().items():
        assert torch.equal(values, before[key])
