import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib.metadata import entry_points

import ichprog_captum as methods
import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ichprog_captum.wrappers import faster_threads
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import ichprog
from ichprog import registry, saliency, testing
from ichprog.cli import main
from ichprog.errors import PluginError, UnknownNameError
from ichprog.networks import build as build_network
from ichprog.spec import PluginRef

AT_LAYERS = ["captum_grad_cam", "captum_guided_grad_cam", "layer_gradient_x_activation"]
NAMES = [*AT_LAYERS, "captum_guided_backprop", "deep_lift", "integrated_gradients", "occlusion", "smooth_grad"]


class Network(nn.Module):
    cam_layer = "backbone.3"

    def __init__(self, *, inplace=False, functional_relu=False, shared=False):
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.ReLU(inplace), nn.ReLU(inplace)
        self.backbone = nn.Sequential(
            nn.Conv3d(1, 4, 3), first, nn.Conv3d(4, 6, 3, stride=2), first if shared else second
        )
        self.unused = nn.Conv3d(1, 2, 3)
        self.never = nn.Identity()
        self.linear = nn.Linear(6, 2)
        self.functional_relu = functional_relu
        self.seen = []  # how many grids came at once
        self.breaks_at = []  # at which of its calls

    def forward(self, grid):
        self.seen.append(len(grid))
        features = self.backbone(grid)
        self.unused(grid)
        if len(self.seen) in self.breaks_at:
            raise KeyError("broken")
        if self.functional_relu:
            features = functional.relu(features - 0.05) ** 2
        return self.linear(features.mean((2, 3, 4)))


def example(**options):
    network = Network(**options).double().eval().requires_grad_(False)
    torch.manual_seed(1)
    grid = torch.rand(1, 1, 8, 12, 14, dtype=torch.float64).requires_grad_()
    return (lambda grids: network(grids)[:, 1]), grid, network


def state_of(network, grid):
    """Return everything that a method could change by mistake."""
    modules = [
        {name: list(value) if isinstance(value, dict) else id(value) for name, value in vars(module).items()}
        for module in network.modules()
    ]
    torch_state = torch.get_rng_state().tolist(), torch.is_grad_enabled(), list(warnings.filters)
    return modules, torch_state, grid.grad, grid.requires_grad, grid.tolist()


def test_the_entry_points_name_all_methods():
    found = entry_points(group="ichprog.saliency")
    assert {one.name for one in found if one.dist.name == "ichprog-captum"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_keeps_its_contract(name):
    testing.check_saliency(name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_methods_leave_nothing_behind_and_run_one_grid_at_a_time(name, inplace):
    score, grid, network = example(inplace=inplace)
    before = state_of(network, grid)
    found = getattr(methods, name)(score, grid, network)
    assert state_of(network, grid) == before
    assert found.ndim == 3
    assert not found.requires_grad
    assert found.dtype == grid.dtype
    assert max(network.seen) == (2 if name == "deep_lift" else 1)
    with pytest.raises(IndexError):
        getattr(methods, name)(lambda grids: network(grids)[:, 7], grid, network)
    assert state_of(network, grid) == before
    passes = len(network.seen) - 1  # without the bad target's
    for call in {1, min(2, passes), passes}:
        network.seen.clear()
        network.breaks_at[:] = [call]
        with pytest.raises(KeyError, match="broken"):
            getattr(methods, name)(score, grid, network)
        assert state_of(network, grid) == before


def test_integrated_gradients_match_the_hand_computation():
    score, grid, network = example()
    zeros, weights = np.polynomial.legendre.leggauss(20)
    total = torch.zeros_like(grid)
    for point, weight in zip((1 + zeros) / 2, weights / 2, strict=True):
        at = (point * grid.detach()).requires_grad_()
        total += weight * torch.autograd.grad(score(at).sum(), at)[0]
    by_hand = (total * grid.detach())[0, 0]
    found = methods.integrated_gradients(score, grid, network, steps=20)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-6 * by_hand.abs().amax().item())
    network.seen.clear()
    together = methods.integrated_gradients(score, grid, network, steps=20, batch=8)
    torch.testing.assert_close(together, found, rtol=1e-9, atol=1e-15)
    assert max(network.seen) == 8
    assert sum(network.seen) == 20
    difference = (score(grid) - score(torch.zeros_like(grid))).item()
    fine = methods.integrated_gradients(score, grid, network, steps=300)
    assert fine.sum().item() == pytest.approx(difference, abs=1e-3 * fine.abs().sum().item())


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("window", "stride"), [((3, 5, 6), (2, 3, 6)), ("3, 5,6", "2,3,6"), ([3, 5, 6], (3, 5, 4))])
def test_occlusion_matches_the_hand_computation(window, stride, batch):
    score, grid, network = example()
    found = methods.occlusion(score, grid, network, window=window, stride=stride, batch=batch)
    assert max(network.seen) == batch
    step = (2, 3, 6) if isinstance(stride, str) else stride
    falls, covered = torch.zeros(8, 12, 14, dtype=torch.float64), torch.zeros(8, 12, 14)
    starts = [range(0, n - size + far, far) for n, size, far in zip((8, 12, 14), (3, 5, 6), step, strict=True)]
    for k in starts[0]:
        for i in starts[1]:
            for j in starts[2]:
                place = (slice(k, k + 3), slice(i, i + 5), slice(j, j + 6))
                emptied = grid.detach().clone()
                emptied[0, 0][place] = 0
                falls[place] += (score(grid) - score(emptied)).item()
                covered[place] += 1
    torch.testing.assert_close(found, falls / covered, rtol=1e-6, atol=1e-9)


def test_occlusion_takes_the_documented_number_of_passes():
    score, _, network = example()
    methods.occlusion(score, torch.rand(1, 1, 10, 31, 31, dtype=torch.float64), network)
    assert len(network.seen) == 4 * 7 * 7 + 1  # windows of 3 x 7 x 7 every 3, 4 and 4
    network.seen.clear()
    methods.occlusion(score, torch.rand(1, 1, 8, 12, 14, dtype=torch.float64), network, window=100)
    assert len(network.seen) == 2


def test_the_faster_number_of_threads_is_used_and_restored(monkeypatch):
    used, before = [2], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    for slower in (1, 2):
        with faster_threads(lambda slow=slower: time.sleep(0.2 * (used[-1] == slow)), torch.device("cpu")):
            before.append(used[-1])
        assert used[-1] == 2
    assert before == [2, 1]


def test_grad_cam_equals_that_of_ichprog():
    score, grid, network = example()
    for layer in (None, "3", "0", "backbone.2"):
        ours = saliency.grad_cam(score, grid, network, layer=layer).detach()
        found = methods.captum_grad_cam(score, grid, network, layer=layer)
        torch.testing.assert_close(found, ours, rtol=1e-9, atol=1e-15)
    # behind the last layer there is a mean over space only
    pointwise = methods.layer_gradient_x_activation(score, grid, network)
    torch.testing.assert_close(pointwise, saliency.grad_cam(score, grid, network).detach(), rtol=1e-9, atol=1e-15)


def test_layer_gradient_x_activation_sums_to_what_a_linear_head_sees():
    _, grid, network = example()
    weights = torch.randn(6, 2, 4, 5, dtype=torch.float64)
    found = methods.layer_gradient_x_activation(
        lambda grids: (network.backbone(grids) * weights).sum((1, 2, 3, 4)), grid, network
    )
    torch.testing.assert_close(found, (network.backbone(grid) * weights).sum(1)[0].detach(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"shared": True}])
def test_guided_methods_equal_those_of_ichprog(options):
    score, grid, network = example(**options)
    for name in ("guided_backprop", "guided_grad_cam"):
        ours = getattr(saliency, name)(score, grid, network).detach()
        assert ours.abs().amax() > 0
        torch.testing.assert_close(getattr(methods, f"captum_{name}")(score, grid, network), ours, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("backbone", "shape"), [("compact", (16, 32, 32)), ("perez2023", (40, 42, 44))])
def test_methods_hold_for_backbones_and_heads_of_ichprog(backbone, shape):
    """The ReLU of a head is a module, so captum sees all there are."""
    (like,) = ichprog.list_models("compact.prognosis_gcs3_age")
    torch.manual_seed(0)
    spec = replace(
        like, backbone=PluginRef(backbone, {}), tasks=(replace(like.tasks[0], head=PluginRef("ordinal", {})),)
    )
    network = build_network(spec).double().eval().requires_grad_(False)
    assert network.heads[spec.tasks[0].name].activation
    grid = torch.rand(1, 1, *shape, dtype=torch.float64).requires_grad_()

    def score(grids):
        return network(grids)[spec.tasks[0].name][:, 0]

    for name in ("guided_backprop", "guided_grad_cam"):
        ours = getattr(saliency, name)(score, grid, network).detach()
        assert ours.abs().amax() > 0
        torch.testing.assert_close(getattr(methods, f"captum_{name}")(score, grid, network), ours, rtol=1e-9, atol=0)
    difference = (score(grid) - score(torch.zeros_like(grid))).item()
    found = methods.deep_lift(score, grid, network)
    assert found.sum().item() == pytest.approx(difference, abs=1e-9 * found.abs().sum().item())


def test_guided_methods_refuse_relus_that_captum_does_not_see():
    for name in ("captum_guided_backprop", "captum_guided_grad_cam"):
        with pytest.raises(PluginError, match=rf"{name} .* 1 of 3 .* Use ichprog's own {name[7:]},"):
            getattr(methods, name)(*example(functional_relu=True))
        _, grid, network = example()
        with pytest.raises(PluginError, match="this network has none"):
            getattr(methods, name)(lambda grids: network.unused(grids).mean((1, 2, 3, 4)), grid, network)  # noqa: B023


def test_smooth_grad_is_the_gradient_without_noise_and_the_same_by_its_seed():
    score, grid, network = example()
    (gradient,) = torch.autograd.grad(score(grid).sum(), grid)
    assert torch.allclose(methods.smooth_grad(score, grid, network, noise=1e-9), gradient[0, 0], atol=1e-7)
    one, again, other = (methods.smooth_grad(score, grid, network, noise=0.3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    expected = torch.zeros_like(grid)
    for noise in torch.randn(400, *grid.shape[1:], generator=torch.Generator().manual_seed(3)).double():
        at = (grid.detach() + 0.3 * noise).requires_grad_()
        expected += torch.autograd.grad(score(at).sum(), at)[0] / 400
    many = methods.smooth_grad(score, grid, network, noise=0.3, samples=400)
    assert torch.corrcoef(torch.stack([many.ravel(), expected.ravel()]))[0, 1] > 0.99


def test_deep_lift_sums_to_the_difference():
    from monai.networks.nets import DenseNet

    score, grid, network = example()
    difference = (score(grid) - score(torch.zeros_like(grid))).item()
    assert methods.deep_lift(score, grid, network).sum().item() == pytest.approx(difference, rel=1e-9)
    dense = DenseNet(3, 1, 2, init_features=4, growth_rate=2, block_config=(2, 2), bn_size=2)
    dense = dense.double().eval().requires_grad_(False)
    grid = torch.rand(1, 1, 32, 32, 32, dtype=torch.float64).requires_grad_()
    difference = (dense(grid) - dense(torch.zeros_like(grid)))[0, 1].item()
    found = methods.deep_lift(lambda grids: dense(grids)[:, 1], grid, dense)
    assert found.sum().item() == pytest.approx(difference, rel=1e-6)


def test_deep_lift_refuses_where_it_does_not_hold():
    for options in ({"functional_relu": True}, {"shared": True}):
        score, grid, network = example(**options)
        before = state_of(network, grid)
        with pytest.raises(PluginError, match=r"deep_lift is not valid .* integrated_gradients"):
            methods.deep_lift(score, grid, network)
        assert state_of(network, grid) == before


@pytest.mark.parametrize("name", AT_LAYERS)
def test_unusable_layers_are_refused(name):
    for layer, error, message in (
        ("backbone.9", UnknownNameError, "backbone.9"),
        ("bakbone.3", UnknownNameError, r"bakbone.3.*backbone\.3"),
        ("linear", PluginError, "'linear' has no features"),
        ("never", PluginError, "does not depend on layer 'never'"),
        ("unused", PluginError, "does not depend on layer 'unused'"),
    ):
        with pytest.raises(error, match=message):
            getattr(methods, name)(*example(), layer=layer)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("integrated_gradients", {"steps": 0}, "steps is 0"),
    ("integrated_gradients", {"batch": "two"}, "batch is 'two'"),
    ("smooth_grad", {"samples": 1.5}, "samples is 1.5"),
    ("smooth_grad", {"samples": True}, "samples is True"),
    ("smooth_grad", {"noise": -1}, "noise is -1"),
    ("smooth_grad", {"noise": float("nan")}, "noise is nan"),
    ("smooth_grad", {"noise": "much"}, "noise is 'much'"),
    ("smooth_grad", {"seed": None}, "seed is None"),
    ("occlusion", {"window": (2, 2)}, "slices, rows, columns"),
    ("occlusion", {"window": "2,x,2"}, "window is 'x'"),
    ("occlusion", {"window": 0}, "window is 0"),
    ("occlusion", {"window": 2, "stride": 3}, "skips cells"),
    ("occlusion", {"batch": 0}, "batch is 0"),
])  # fmt: skip
def test_invalid_options_are_refused(name, options, message):
    score, grid, network = example()
    with pytest.raises(ValueError, match=message):
        getattr(methods, name)(score, grid, network, **options)
    assert not network.seen


def test_nothing_is_printed_and_warnings_of_the_network_come_through(capsys):
    score, grid, network = example()

    def warning(grids):
        warnings.warn("of the network's own", stacklevel=1)
        return score(grids)

    for name in NAMES:
        with pytest.warns(UserWarning, match="of the network's own") as caught:
            getattr(methods, name)(warning, grid, network)
        assert len({str(one.message) for one in caught}) == 1
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_progress_bar(monkeypatch, capsys):
    score, grid, network = example()

    def slow(grids):
        time.sleep(0.3)
        return score(grids)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    methods.integrated_gradients(slow, grid, network, steps=6)
    out, shown = capsys.readouterr()
    assert out == ""
    assert "6/6" in shown or "5/6" in shown


def test_captum_is_imported_when_it_is_needed():
    code = "import sys, ichprog, ichprog_captum; sys.exit('captum' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def bright():
    """One channel that is high where the grid is; every ReLU a module."""
    convolution = nn.Conv3d(1, 1, 3, padding=1)
    nn.init.constant_(convolution.weight, 1 / 27)
    nn.init.constant_(convolution.bias, -0.45)
    layers = nn.Sequential(convolution, nn.ReLU(inplace=True), nn.AvgPool3d((2, 3, 3)))
    layers.out_channels, layers.cam_layer = 1, "2"
    return layers


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model in a folder, whose heads are linear on the mean, and a scan."""
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path / "cache"))
    ichprog.register_backbone("captum_bright", bright)
    (like,) = ichprog.list_models("compact.prognosis_gcs3_age")
    linear = {"pool": "average", "activation": False}
    spec = replace(
        like,
        name="captum_bright.prognosis_gcs3_age",
        backbone=PluginRef("captum_bright", {}),
        tasks=tuple(replace(task, head=PluginRef("ordinal", linear)) for task in like.tasks),
        input=replace(like.input, shape=(20, 48, 48)),
        weights=replace(like.weights, repo=None, revision=None, folder="", format="safetensors", keys={}, sha256={}),
        golden_output=None,
    )
    folder = tmp_path / "bright"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec.to_dict()))
    torch.manual_seed(0)
    state = {
        key: values.abs() * 40 + 300 if key.endswith("linear.weight") else values
        for key, values in build_network(spec).state_dict().items()
    }
    save_file(state, folder / "model.safetensors")
    i, j, k = np.ogrid[:256, :256, :30]
    brain = ((i - 128) / 75) ** 2 + ((j - 128) / 90) ** 2 + ((k - 15) / 14) ** 2 <= 1
    blood = ((i - 160) / 20) ** 2 + ((j - 110) / 20) ** 2 + ((k - 16) / 4) ** 2 <= 1
    hu = np.where(blood, 68, np.where(brain, 33, 0)).astype(np.int16)
    nib.Nifti1Image(hu, np.diag([-0.94, -0.94, 5.0, 1.0])).to_filename(tmp_path / "scan.nii.gz")
    yield f"local-dir:{folder}", tmp_path / "scan.nii.gz"
    registry.backbones.unregister("captum_bright")


def test_explain_by_all_methods_at_once(model):
    name, scan = model
    tasks = ["prognosis", "age"]
    own = ["grad_cam", "guided_backprop", "guided_grad_cam"]
    found = ichprog.explain(name, scan, task=tasks, method=NAMES + own, steps=4, samples=4, window="10,12,12")
    assert found.keys() == {(task, method) for task in tasks for method in NAMES + own}
    for task in tasks:
        for how in own:
            ours = found[task, how].grid_map
            np.testing.assert_allclose(found[task, f"captum_{how}"].grid_map, ours, rtol=1e-4, atol=1e-6 * ours.max())
        for how in NAMES:
            assert not found[task, how].empty
            assert found[task, how].image.shape == (256, 256, 30)
    assert found["age", "occlusion"].provenance["options"] == {"window": "10,12,12"}


def test_explain_on_the_command_line(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ICHPROG_BACKGROUND_COMPILE", "0")  # tests leave no processes behind
    name, scan = model
    words = ["explain", str(scan), "-m", name, "-o", str(tmp_path / "maps"), "--json"]
    for how in ("integrated_gradients", "occlusion", "deep_lift"):
        words += ["--method", how]
    words += ["--task", "prognosis", "--task", "age", "--option", "steps=4", "--option", "window=10,12,12"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    maps = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(maps) == 6
    for one in maps:
        assert nib.load(one["map"]).shape == (256, 256, 30)
    unknown = CliRunner().invoke(main, [*words, "--option", "setps=4"])
    assert unknown.exit_code == 2
    assert "steps" in unknown.stderr


def test_the_number_of_passes_is_logged_before_the_first_pass(caplog):
    score, grid, network = example()
    with caplog.at_level("INFO", logger="ichprog"):
        methods.integrated_gradients(score, grid, network, steps=6)
    assert [record.message for record in caplog.records] == ["This map takes 6 passes through the network."]
