import ichprog_captum as methods
import pytest
import torch
from torch import nn
from torch.nn import functional

from ichprog import saliency, testing
from ichprog.errors import PluginError, UnknownName

NAMES = ["captum_grad_cam", "captum_guided_grad_cam", "deep_lift", "integrated_gradients", "occlusion", "smooth_grad"]


class Network(nn.Module):
    cam_layer = "backbone.3"

    def __init__(self, *, inplace=False, functional_relu=False):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv3d(1, 4, 3), nn.ReLU(inplace), nn.Conv3d(4, 6, 3, stride=2), nn.ReLU(inplace)
        )
        self.linear = nn.Linear(6, 2)
        self.functional_relu = functional_relu
        self.largest = 0

    def forward(self, grid):
        self.largest = max(self.largest, len(grid))
        features = self.backbone(grid)
        if self.functional_relu:
            features = functional.relu(features - 0.05) ** 2
        return self.linear(features.mean((2, 3, 4)))


def asked(**options):
    network = Network(**options).double().eval().requires_grad_(False)
    torch.manual_seed(1)
    grid = torch.rand(1, 1, 8, 12, 14, dtype=torch.float64).requires_grad_()
    return (lambda grids: network(grids)[:, 1]), grid, network


@pytest.mark.parametrize("name", NAMES)
def test_the_contract(name):
    testing.check_saliency(name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_one_grid_at_a_time_and_the_network_as_it_was(name, inplace):
    score, grid, network = asked(inplace=inplace)
    found = getattr(methods, name)(score, grid, network)
    assert found.ndim == 3
    assert not found.requires_grad
    assert network.largest <= (2 if name == "deep_lift" else 1)
    assert [module.inplace for module in network.modules() if isinstance(module, nn.ReLU)] == [inplace] * 2


def test_integrated_gradients_by_hand():
    score, grid, network = asked()
    found = methods.integrated_gradients(score, grid, network, steps=300)
    points = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    total = torch.zeros_like(grid)
    for point in points:
        at = (point * grid.detach()).requires_grad_()
        total += torch.autograd.grad(score(at).sum(), at)[0]
    by_hand = (total / len(points) * grid.detach())[0, 0]
    assert torch.corrcoef(torch.stack([found.ravel(), by_hand.ravel()]))[0, 1] > 0.999
    difference = (score(grid) - score(torch.zeros_like(grid))).item()
    assert found.sum().item() == pytest.approx(difference, rel=1e-2)


def test_occlusion_by_hand():
    score, grid, network = asked()
    found = methods.occlusion(score, grid, network, window=(4, 6, 7), stride=(4, 6, 7))
    for k, i, j in [(0, 0, 0), (4, 6, 7), (0, 6, 0)]:
        emptied = grid.detach().clone()
        emptied[..., k : k + 4, i : i + 6, j : j + 7] = 0
        fall = (score(grid) - score(emptied)).item()
        assert found[k : k + 4, i : i + 6, j : j + 7].numpy() == pytest.approx(fall, rel=1e-6)


def test_grad_cam_is_that_of_ichprog():
    score, grid, network = asked()
    ours = saliency.grad_cam(score, grid, network).detach()
    assert torch.allclose(methods.captum_grad_cam(score, grid, network), ours, rtol=1e-6, atol=1e-12)
    other = methods.captum_grad_cam(score, grid, network, layer="0")
    assert torch.allclose(other, saliency.grad_cam(score, grid, network, layer="0").detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
def test_guided_grad_cam_is_that_of_ichprog(inplace):
    score, grid, network = asked(inplace=inplace)
    ours = saliency.guided_grad_cam(score, grid, network).detach()
    assert ours.abs().amax() > 0
    found = methods.captum_guided_grad_cam(score, grid, network)
    assert torch.allclose(found, ours, rtol=1e-6, atol=1e-12)


def test_smooth_grad_is_the_gradient_without_noise_and_the_same_by_its_seed():
    score, grid, network = asked()
    (gradient,) = torch.autograd.grad(score(grid).sum(), grid)
    assert torch.allclose(methods.smooth_grad(score, grid, network, noise=1e-9), gradient[0, 0], atol=1e-7)
    one, again, other = (methods.smooth_grad(score, grid, network, noise=0.3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_deep_lift_sums_to_the_difference_or_says_that_it_does_not_hold():
    score, grid, network = asked()
    difference = (score(grid) - score(torch.zeros_like(grid))).item()
    assert methods.deep_lift(score, grid, network).sum().item() == pytest.approx(difference, rel=1e-3)
    with pytest.raises(PluginError, match=r"deep_lift does not hold .* integrated_gradients"):
        methods.deep_lift(*asked(functional_relu=True))


@pytest.mark.parametrize(("name", "options", "error", "said"), [
    ("captum_grad_cam", {"layer": "backbone.9"}, UnknownName, "backbone.9"),
    ("captum_guided_grad_cam", {"layer": "bakbone.3"}, UnknownName, "bakbone.3"),
    ("integrated_gradients", {"steps": 0}, ValueError, "steps is 0"),
    ("smooth_grad", {"samples": 1.5}, ValueError, "samples is 1.5"),
    ("smooth_grad", {"noise": -1}, ValueError, "noise is -1"),
    ("occlusion", {"window": (2, 2)}, ValueError, "slices, rows, columns"),
    ("occlusion", {"window": 2, "stride": 3}, ValueError, "leaves cells out"),
])  # fmt: skip
def test_wrong_options(name, options, error, said):
    with pytest.raises(error, match=said):
        getattr(methods, name)(*asked(), **options)


def test_a_network_without_relu_modules_is_refused():
    network = nn.Sequential(nn.Conv3d(1, 1, 3))
    network.cam_layer = "0"
    with pytest.raises(PluginError, match="ReLUs that are modules"):
        methods.captum_guided_grad_cam(
            lambda grid: network(grid).mean((1, 2, 3, 4)), torch.rand(1, 1, 5, 5, 5), network
        )
