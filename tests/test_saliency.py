"""Saliency methods, compared with brute force, on planted lesions, and without side effects."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ichprog import PluginError, UnknownNameError, registry, saliency
from ichprog.backbones import Backbone
from ichprog.heads import Ordinal, ordinal
from ichprog.networks import Network

METHODS = registry.saliency.names()


class Functional(nn.Module):
    """ReLUs as functions, one of them in place with its return value dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 6, 3, stride=2)
        self.out_channels, self.cam_layer = 6, "second"

    def forward(self, grid):
        x = self.first(grid)
        functional.relu_(x)
        return torch.relu(self.second(x))


def networks(dtype=torch.float64):
    """Small networks whose ReLUs are modules, modules in place, and functions."""
    torch.manual_seed(5)
    made = {}
    for inplace in (False, True):
        layers = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace), nn.MaxPool3d(2),
            nn.Conv3d(4, 6, 3), nn.ReLU(inplace), nn.Conv3d(6, 6, 1), nn.ReLU(inplace),
        )  # fmt: skip
        made["in place" if inplace else "modules"] = Backbone(layers, 6, "features.6")
    made["functions"] = Functional()
    for name, backbone in made.items():
        heads = {"a": ordinal(6, ("no", "yes")), "b": ordinal(6, ("low", "mid", "high"), pool="max")}
        made[name] = Network(backbone, heads).to(dtype).eval().requires_grad_(requires_grad=False)
    return made


class _Guided(torch.autograd.Function):
    """The rule of guided backpropagation as an autograd function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.clamp(min=0) * (x > 0)


class _GuidedReLU(nn.Module):
    def forward(self, x):
        return _Guided.apply(x)


def brute_force_guided(network, grid, pick):
    """Guided backpropagation by rebuilding the network with its rule in every ReLU."""
    network = copy.deepcopy(network)
    if isinstance(network.backbone, Functional):
        backbone = network.backbone
        backbone.forward = lambda x: _Guided.apply(backbone.second(_Guided.apply(backbone.first(x))))
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, _GuidedReLU())
    for head in network.heads.values():
        forward = super(Ordinal, head).forward
        head.forward = lambda features, head=head, forward=forward: (
            setattr(head, "activation", False) or forward(_Guided.apply(features))
        )
    grid = grid.detach().clone().requires_grad_()
    pick(network(grid)).sum().backward()
    return grid.grad[0, 0]


def brute_force_cam(network, grid, pick, layer):
    """Grad-CAM by finite differences: each channel of the layer is moved a little, all of its cells together."""
    step, moved = 1e-6, {}

    def move(module, args, output):
        moved["output"] = output.detach().clone()
        output = output.clone()
        output[:, moved["channel"]] += moved["step"]
        return output

    module = network.get_submodule(layer)
    weights = []
    for channel in range(6):
        values = []
        for sign in (1, -1):
            moved |= {"channel": channel, "step": sign * step}
            hook = module.register_forward_hook(move)
            values.append(pick(network(grid)).item())
            hook.remove()
        cells = moved["output"][0, 0].numel()
        weights.append((values[0] - values[1]) / (2 * step) / cells)
    return (torch.tensor(weights, dtype=grid.dtype)[:, None, None, None] * moved["output"][0]).sum(0)


def pick_a(logits):
    return logits["a"][:, 0]


def pick_b(logits):
    return logits["b"][:, 1]


PICKS = [pick_a, pick_b]


@pytest.fixture
def grid():
    torch.manual_seed(5)
    return torch.rand(1, 1, 8, 10, 12, dtype=torch.float64).requires_grad_()


@pytest.fixture(params=["modules", "in place", "functions"])
def network(request):
    return networks()[request.param]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pick", PICKS)
def test_guided_backprop_applies_the_rule_to_every_relu(network, grid, pick, shared):
    score = saliency.Score(saliency.TorchPass(network, grid, []), pick) if shared else lambda x: pick(network(x))
    got = saliency.guided_backprop(score, grid, network)
    assert torch.allclose(got, brute_force_guided(network, grid, pick), atol=1e-12)
    assert got.abs().sum() > 0


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pick", PICKS)
def test_grad_cam_equals_finite_differences(network, grid, pick, shared):
    layer = network.cam_layer
    score = saliency.Score(saliency.TorchPass(network, grid, [layer]), pick) if shared else lambda x: pick(network(x))
    got = saliency.grad_cam(score, grid, network)
    expected = brute_force_cam(network, grid.detach(), pick, layer)
    assert torch.allclose(got, expected, atol=1e-7)
    assert got.abs().sum() > 0


def test_grad_cam_takes_any_layer_by_name_from_network_or_backbone(grid):
    network = networks()["modules"]
    full = saliency.grad_cam(lambda x: pick_a(network(x)), grid, network, layer="backbone.features.3")
    short = saliency.grad_cam(lambda x: pick_a(network(x)), grid, network, layer="features.3")
    assert full.shape == (4, 5, 6)
    assert torch.equal(full, short)


def test_guided_grad_cam_is_the_product(network, grid):
    def score(x):
        return pick_a(network(x))

    cam = saliency.grad_cam(score, grid, network).clamp(min=0)[None, None]
    large = functional.interpolate(cam, (8, 10, 12), mode="trilinear")[0, 0]
    expected = large * saliency.guided_backprop(score, grid, network)
    assert torch.allclose(saliency.guided_grad_cam(score, grid, network), expected)


def state_of(network, grid):
    """Return everything that a method could change by mistake."""
    hooks = [
        len(getattr(module, kind))
        for module in network.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    flags = [
        (module.training, getattr(module, "inplace", None), module.forward.__func__) for module in network.modules()
    ]
    parameters = [(p.requires_grad, p.grad is None, p.clone()) for p in network.parameters()]
    return hooks, flags, [(a, b) for a, b, _ in parameters], [p for *_, p in parameters], grid.grad is None


def same(before, after):
    return before[:3] == after[:3] and before[4] == after[4] and all(map(torch.equal, before[3], after[3]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", ["success", "bad target", "crash", "bad layer"])
def test_methods_leave_nothing_behind(method, end, grid):
    network = networks()["in place"]
    before = state_of(network, grid)
    attribute = registry.saliency.load(method)

    def score(x):
        logits = network(x)
        if end == "crash":
            raise ZeroDivisionError
        return logits["a"][:, 5 if end == "bad target" else 0]

    if end == "success":
        attribute(score, grid, network)
    elif end == "bad layer":
        if method == "guided_backprop":
            pytest.skip("takes no layer")
        with pytest.raises(UnknownNameError, match=r"Unknown layer 'features.66'.*Did you mean"):
            attribute(score, grid, network, layer="features.66")
    else:
        with pytest.raises((IndexError, ZeroDivisionError)):
            attribute(score, grid, network)
    assert same(before, state_of(network, grid))
    assert torch.is_grad_enabled()


def test_methods_and_tasks_share_one_forward_pass(grid):
    network = networks()["modules"]
    runs = []
    hook = network.backbone.register_forward_hook(lambda *_: runs.append(1))
    shared = saliency.TorchPass(network, grid, [network.cam_layer])
    for pick in PICKS:
        for method in ("guided_backprop", "grad_cam", "guided_grad_cam"):
            registry.saliency.load(method)(saliency.Score(shared, pick), grid, network)
    hook.remove()
    assert len(runs) == 1


def test_a_network_without_relus_is_refused(grid):
    backbone = Backbone(nn.Sequential(nn.Conv3d(1, 2, 3), nn.GELU()), 2, "features.0")
    network = Network(backbone, {"a": ordinal(2, ("no", "yes"), activation=False)}).double().eval()
    with pytest.raises(PluginError, match="needs ReLUs"):
        saliency.guided_backprop(lambda x: pick_a(network(x)), grid, network)
    assert saliency.grad_cam(lambda x: pick_a(network(x)), grid, network).shape == (6, 8, 10)


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_lesion_is_found(method):
    """The score grows with bright cells, and the grid has one bright block."""
    convolution = nn.Conv3d(1, 1, 3, padding=1)
    nn.init.constant_(convolution.weight, 1 / 27)
    nn.init.constant_(convolution.bias, -0.5)
    head = ordinal(1, ("no", "yes"))
    nn.init.constant_(head.linear.weight, 1.0)
    network = Network(Backbone(nn.Sequential(convolution, nn.ReLU()), 1, "features.1"), {"a": head}).eval()
    grid = torch.full((1, 1, 12, 20, 16), 0.3)
    grid[0, 0, 3:6, 4:8, 11:15] = 0.9
    found = registry.saliency.load(method)(lambda x: pick_a(network(x)), grid.requires_grad_(), network).detach()
    d, h, w = torch.unravel_index(found.argmax(), found.shape)
    assert (3 <= d < 6, 4 <= h < 8, 11 <= w < 15) == (True, True, True)
    assert found[:, :, :8].abs().max() == 0
