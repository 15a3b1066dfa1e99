"""The profiles of plugins agree with other ways of counting."""

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ichprog import profiling, registry, zoo
from ichprog.backbones import Backbone
from ichprog.cli import main
from ichprog.errors import PluginError, SpecError, UnknownNameError

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "profiling.md"
BACKBONE, HEAD, METHOD = registry.backbones.kind, registry.heads.kind, registry.saliency.kind


@pytest.fixture
def registered():
    """Register a plugin as `mine` for one test."""
    added = []

    def add(plugins, plugin, name="mine"):
        plugins.register(name, plugin)
        added.append((plugins, name))

    yield add
    for plugins, name in added:
        plugins.unregister(name)


def by_formula(name, shape):
    """Count the operations of a backbone's convolutions with hooks, in units of 10^9."""
    built, total = registry.backbones.load(name)().eval().to("meta"), 0

    def add(module, given, found):
        nonlocal total
        taps = module.in_channels // module.groups * math.prod(module.kernel_size)
        total += 2 * found.numel() * taps

    for module in built.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(add)
    features = built(torch.empty(1, 1, *shape, device="meta"))
    return total / 1e9, tuple(features.shape[1:])


@pytest.mark.parametrize(("name", "shape"), [
    ("compact", (24, 112, 112)), ("perez2023", (40, 60, 50)), ("densenet121", (32, 48, 40)),
])  # fmt: skip
def test_operations_of_convolutions_match_the_formula(name, shape):
    found = profiling.profile(BACKBONE, name, shape=shape)
    expected, features = by_formula(name, shape)
    assert found.gflop == pytest.approx(expected, rel=1e-12)
    assert found.output_shape == features
    assert found.input_shape == shape
    built = registry.backbones.load(name)().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(torch.rand(1, 1, *shape))
    assert counter.get_total_flops() / 1e9 == pytest.approx(found.gflop, rel=1e-12)
    assert found.parameters == sum(math.prod(values.shape) for values in built.state_dict().values()) - sum(
        math.prod(values.shape) for values in built.buffers()
    )


def test_profile_of_one_convolution_matches_the_hand_count(registered):
    registered(
        registry.backbones, lambda: Backbone(nn.Sequential(nn.Conv3d(1, 6, (1, 2, 3), (1, 2, 1))), 6, "features.0")
    )
    found = profiling.profile(BACKBONE, "mine", shape=(4, 6, 8))
    assert found.parameters == 6 * 1 * 2 * 3 + 6
    assert found.output_shape == (6, 4, 3, 6)
    assert found.gflop == pytest.approx(2 * (6 * 4 * 3 * 6) * (1 * 2 * 3) / 1e9)
    assert (found.distribution, found.version, found.forward, found.backward) == ("this session", "", 1, 0)
    assert 0 < found.seconds < 10


class Copies(nn.Module):
    out_channels, cam_layer = 8, "last"

    def __init__(self):
        super().__init__()
        self.last = nn.ReLU()
        self.register_buffer("held", torch.zeros(1000))

    def forward(self, grid):
        once = grid.repeat(1, 8, 1, 1, 1)
        half = once[:, :4].reshape(1, -1)  # a view
        del once
        twice = (half.view(1, 4, *grid.shape[2:]) + 0).repeat(1, 2, 1, 1, 1)
        del half
        return self.last(twice)


def test_memory_is_the_peak_size_of_all_tensors(registered):
    registered(registry.backbones, Copies)
    shape = (16, 32, 32)
    grid = 4 * math.prod(shape)
    found = profiling.profile(BACKBONE, "mine", shape=shape)
    # the copy of eight channels, which the view keeps alive, half of it, and its repetition; the ReLU needs less
    assert found.memory_bytes == 4000 + grid + (8 + 4 + 8) * grid
    assert found.parameters == 0
    assert found.gflop == 0


def test_memory_and_operations_of_a_head(registered):
    found = profiling.profile(HEAD, "softmax")
    assert found.input_shape == by_formula("densenet121", zoo.find(zoo.DEFAULT).input.shape)[1] == (1024, 1, 9, 9)
    assert found.output_shape == (3,)
    assert found.parameters == 1024 * 3 + 3
    assert found.gflop * 1e9 == pytest.approx(2 * 1024 * 3)
    weights, features = 4 * (1024 * 3 + 3), 4 * 1024 * 81
    assert weights + 2 * features <= found.memory_bytes < weights + 2 * features + 3 * 4 * 1024


def test_passes_of_a_saliency_method_are_counted(registered):
    def several(score, grid, network, *, times=3):
        with torch.no_grad():
            score(torch.cat([grid.detach()] * 4))
        total = torch.zeros_like(grid[0, 0])
        for _ in range(times):
            at = grid.detach().requires_grad_()
            total += torch.autograd.grad(score(at).sum(), at)[0][0, 0]
        return total

    registered(registry.saliency, several)
    found = profiling.profile(METHOD, "mine")
    assert (found.forward, found.backward) == (1 + 4 + 3, 3)  # one pass is shared by all methods
    assert found.parameters is None
    once = profiling.profile(METHOD, "guided_backprop")
    assert (once.forward, once.backward) == (1, 1)
    assert once.input_shape == once.output_shape == found.output_shape
    assert profiling.profile(METHOD, "grad_cam").output_shape == profiling.profile(BACKBONE, "compact").output_shape[1:]
    forward = by_formula("compact", once.input_shape)[0] + 2 * 64 * 1e-9
    assert found.gflop > 8 * forward
    # backward, a convolution takes as many operations as forward, because the weights have no gradient
    assert found.gflop == pytest.approx(8 * forward + 3 * forward, rel=1e-6)
    assert profiling.profile(METHOD, "guided_grad_cam").backward == 2


def test_a_failure_names_the_distribution_and_leaves_the_random_state(registered):
    def failing(score, grid, network):
        torch.autograd.grad(score(grid).sum(), grid)
        raise ZeroDivisionError("by zero")

    registered(registry.saliency, failing)
    before = torch.get_rng_state()
    with pytest.raises(PluginError, match=r"'mine' of this session fails on .*ZeroDivisionError: by zero"):
        profiling.profile(METHOD, "mine")
    profiling.profile(BACKBONE, "compact", shape=(8, 16, 16))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(PluginError, match=r"'perez2023' of ichprog .* fails on \(1, 1, 8, 16, 16\)"):
        profiling.profile(BACKBONE, "perez2023", shape=(8, 16, 16))
    with pytest.raises(SpecError, match=r"cannot read a grid of \(8, 16, 16\)"):
        profiling.profile(HEAD, "softmax", shape=(8, 16, 16))
    registered(registry.heads, lambda channels, labels, *, needed: None)
    with pytest.raises(SpecError, match="needed"):
        profiling.profile(HEAD, "mine")
    with pytest.raises(UnknownNameError, match="kind of plugin"):
        profiling.profile("layer", "mine")


def test_select_finds_plugins_by_name_and_kind(registered):
    registered(
        registry.backbones, lambda rest, **options: Backbone(nn.Sequential(nn.ReLU()), 1, "features.0"), "many/*"
    )
    everything = profiling.select()
    assert ("backbone", "compact") in everything
    assert not any(name.endswith("*") for _, name in everything)
    assert len(everything) == len(set(everything)) >= 10
    assert profiling.select(["many/one", "grad_cam"]) == [(BACKBONE, "many/one"), (METHOD, "grad_cam")]
    assert profiling.profile(BACKBONE, "many/one", shape=(2, 3, 4)).output_shape == (1, 2, 3, 4)
    assert profiling.select(kinds=[HEAD]) == [(HEAD, name) for name in registry.heads.names()]
    with pytest.raises(UnknownNameError, match=r"Unknown backbone or head or saliency method 'compakt'.*compact"):
        profiling.select(["compakt"])
    with pytest.raises(UnknownNameError, match="Unknown head 'compact'"):
        profiling.select(["compact"], [HEAD])
    with pytest.raises(UnknownNameError, match="Unknown kind of plugin 'layer'"):
        profiling.select(kinds=["layer"])


def rows(text):
    """Return each row of the Markdown tables by the name of its plugin."""
    found, heads = {}, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if cells[0] == "name":
            heads = cells
        elif cells[0].startswith("`") and line.startswith("|"):
            found[cells[0].strip("`")] = dict(zip(heads, cells, strict=True))
    return found


def test_the_command_prints_tables_and_json(tmp_path):
    command = ["plugins", "profile", "compact", "--shape", "8", "32", "32"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    written = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "profiles.md"), "--json"])
    assert written.exit_code == 0, written.output
    data = json.loads(written.stdout)
    (profile,) = data["profiles"]
    for text in (shown.stdout, (tmp_path / "profiles.md").read_text()):
        row = rows(text)["compact"]
        assert row["parameters"] == f"{profile['parameters']:,}" == "138,992"
        assert row["grid"] == "8 x 32 x 32"
        assert float(row["GFLOP"]) == pytest.approx(profile["gflop"], rel=5e-3)
        assert float(row["MiB"]) == pytest.approx(profile["memory_bytes"] / 2**20, rel=5e-3)
        assert data["machine"] in text
    assert data["failed"] == []
    of_a_kind = CliRunner().invoke(main, ["plugins", "profile", "--kind", "head", "--kind", "saliency"])
    assert set(rows(of_a_kind.stdout)) == {name for kind, name in profiling.select(kinds=[HEAD, METHOD])}


def test_the_command_lists_what_it_could_not_measure():
    small = ["--shape", "8", "32", "32"]
    partly = CliRunner().invoke(main, ["plugins", "profile", "perez2023", "compact", *small])
    assert partly.exit_code == 1
    assert "- perez2023: backbone 'perez2023' of ichprog" in partly.stdout
    assert "compact" in rows(partly.stdout)
    data = json.loads(CliRunner().invoke(main, ["plugins", "profile", "perez2023", *small, "--json"]).stdout)
    assert [one["name"] for one in data["failed"]] == ["perez2023"]
    unknown = CliRunner().invoke(main, ["plugins", "profile", "compakt"])
    assert unknown.exit_code == 2
    assert "compact" in unknown.stderr


def test_the_page_is_up_to_date():
    """All columns except the times. If the test fails, run `python benchmarks/profile_plugins.py`."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(runpy.run_path(str(ROOT / "benchmarks" / "profile_plugins.py"))["OPENING"])
    page = rows(text)
    ours = [
        name
        for plugins in profiling.REGISTRIES.values()
        for name in plugins.names()
        if plugins.entry(name).distribution == "ichprog"
    ]
    assert set(ours) == {name for name, row in page.items() if row["distribution"].startswith("ichprog ")}
    for name in registry.backbones.names():
        if name in page:
            shape = tuple(map(int, page[name]["grid"].split(" x ")))
            gflop, features = by_formula(name, shape)
            assert page[name]["features"] == " x ".join(map(str, features))
            assert float(page[name]["GFLOP"]) == pytest.approx(gflop, rel=5e-3)
            built = registry.backbones.load(name)()
            assert page[name]["parameters"] == f"{sum(one.numel() for one in built.parameters()):,}"
    for name in registry.heads.names():
        if name in page:
            assert page[name]["parameters"] == f"{profiling.profile(HEAD, name).parameters:,}"
    for name in ("grad_cam", "guided_backprop", "guided_grad_cam"):
        found = profiling.profile(METHOD, name)
        row = page[name]
        assert (row["forward"], row["backward"], row["map"]) == (
            str(found.forward), str(found.backward), " x ".join(map(str, found.output_shape)),
        )  # fmt: skip
        assert float(row["GFLOP"]) == pytest.approx(found.gflop, rel=5e-3)
        assert float(row["MiB"]) == pytest.approx(found.memory_bytes / 2**20, rel=5e-3)
    assert not re.search(r"/(?:tmp|work|home|root)\b", text)
