"""The contract suite, and plugins of installed distributions that keep or break their contracts."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional

import ichprog
from ichprog import registry, testing
from ichprog.backbones import Backbone
from ichprog.cli import main
from ichprog.errors import PluginError

ROOT = Path(__file__).parents[1]
PAGES = {
    "backbone": "plugins-backbone.md",
    "head": "plugins-head.md",
    "fusion": "plugins-fusion.md",
    "saliency": "plugins-saliency.md",
    "brain_extractor": "plugins-brain.md",
}


# the contract suite, over everything registered


@pytest.mark.parametrize("name", [name for name in registry.backbones.names() if not name.endswith("/*")])
def test_every_backbone_keeps_its_contract(name):
    # other tests compile DenseNet121, which takes long
    testing.check_backbone(
        name, shape=(40, 64, 64) if name == "perez2023" else (32, 64, 64), export=name != "densenet121"
    )


@pytest.mark.parametrize("name", registry.saliency.names())
def test_every_saliency_method_keeps_its_contract(name):
    testing.check_saliency(name)


@pytest.mark.parametrize("name", registry.brain_extractors.names())
def test_every_brain_extractor_keeps_its_contract(name):
    testing.check_brain_extractor(name)


class Small(nn.Module):
    """A backbone that keeps its contract, as a base of broken ones."""

    out_channels, cam_layer = 4, "layers.2"

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 4, 3, 4, 1), nn.BatchNorm3d(4), nn.ReLU())

    def forward(self, grid):
        return self.layers(grid)


class WrongChannels(Small):
    out_channels = 5


class Flat(Small):
    def forward(self, grid):
        return self.layers(grid).mean((2, 3, 4))


class LayerUnused(Small):
    cam_layer = "spare"

    def __init__(self):
        super().__init__()
        self.spare = nn.ReLU()


class Dropping(Small):
    def forward(self, grid):
        return functional.dropout(self.layers(grid))  # in evaluation too


class OverTheBatch(Small):
    def forward(self, grid):
        features = self.layers(grid)
        return features - features.mean(0, keepdim=True)


class InPlace(Small):
    def forward(self, grid):
        with torch.no_grad():
            grid.mul_(0.5).mul_(2).add_(1e-3)
        return self.layers(grid)


class Idle(Small):
    def __init__(self):
        super().__init__()
        self.never = nn.Parameter(torch.zeros(1))


class Frozen(Small):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class OfOneSize(Small):
    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.rand(1, 4, 8, 16, 16))

    def forward(self, grid):
        return self.layers(grid) + self.places


class OfOneBatch(Small):
    def forward(self, grid):
        features = self.layers(grid)
        return features * (1 + (len(grid) > 2))


class Refusing(OfOneSize):
    def forward(self, grid):
        if grid.shape[2:] != (32, 64, 64):
            raise PluginError(f"it takes grids of 32 x 64 x 64, not {tuple(grid.shape[2:])}")
        return super().forward(grid)


class Counting(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("asked", torch.zeros(1))

    def forward(self, grid):
        self.asked += 1
        return self.layers(grid)


class Blind(Small):
    def forward(self, grid):
        return self.layers(torch.zeros_like(grid)) + 0 * self.layers(grid)


class Remembering(Small):
    def __init__(self):
        super().__init__()
        self.noise = torch.rand(4, 1, 1, 1)  # not in its state

    def forward(self, grid):
        return self.layers(grid) + self.noise


class Failing(Small):
    def forward(self, grid):
        raise ZeroDivisionError("by zero")


class Untraceable(Small):
    def forward(self, grid):
        return self.layers(torch.from_numpy(grid.detach().numpy().copy())) + 0 * grid.mean()


@pytest.fixture
def registered():
    """Register plugins for one test."""
    added = []

    def add(plugins, plugin):
        plugins.register("broken", plugin)
        added.append(plugins)

    yield add
    for plugins in added:
        plugins.unregister("broken")


@pytest.mark.parametrize(("module", "message"), [
    (WrongChannels, "features must be (2, 5, any, any, any), is (2, 4, 8, 16, 16)"),
    (Flat, "features must be (2, 4, any, any, any), is (2, 4)"),
    (LayerUnused, "its cam_layer 'spare' is not used"),
    (Dropping, "must not change the random state of torch"),
    (OverTheBatch, "must not depend on the other grids"),
    (InPlace, "must not change the input"),
    (Idle, "parameters without a gradient: never"),
    (Frozen, "all its parameters are frozen"),
    (OfOneSize, "grids (3, 1, 40, 64, 80) after (32, 64, 64) must work, or raise a PluginError"),
    (OfOneBatch, "must not depend on the other grids"),
    (Counting, "must not change the weights and buffers of the network"),
    (Blind, "features must depend on the grid"),
    (Remembering, "a second backbone with its state"),
    (Failing, "ZeroDivisionError: by zero"),
    (Untraceable, "features must depend on the grid"),
])  # fmt: skip
def test_the_error_names_the_rule_that_a_backbone_breaks(registered, module, message):
    registered(registry.backbones, module)
    with pytest.raises(PluginError, match="backbone 'broken' of this session breaks its contract") as caught:
        testing.check_backbone("broken", shape=(32, 64, 64))
    assert message in str(caught.value)


def test_export_can_be_left_out_for_a_backbone_that_only_torch_runs(registered):
    class OnlyTorch(Small):
        def forward(self, grid):
            features = self.layers(grid)
            return (
                features if float(features.detach().sum()) < 1e9 else features * 2
            )  # needs a number that no graph has

    registered(registry.backbones, OnlyTorch)
    testing.check_backbone("broken", export=False)
    with pytest.raises(PluginError, match="OpenVINO must run it"):
        testing.check_backbone("broken")


def test_a_backbone_may_refuse_other_shapes_with_a_plugin_error(registered):
    registered(registry.backbones, Refusing)
    testing.check_backbone("broken")


class Plain(nn.Module):
    """A head that keeps its contract, as a base of broken ones."""

    def __init__(self, in_channels, labels):
        super().__init__()
        self.linear = nn.Linear(in_channels, len(labels))

    def forward(self, features):
        return self.linear(features.mean((2, 3, 4)))

    def probabilities(self, logits):
        return logits.softmax(1)

    def loss(self, logits, target):
        return functional.cross_entropy(logits, target)


class Unscaled(Plain):
    def probabilities(self, logits):
        return logits.sigmoid()


class Summed(Plain):
    def loss(self, logits, target):
        return functional.cross_entropy(logits, target, reduction="sum")


class Backwards(Plain):
    def loss(self, logits, target):
        return functional.cross_entropy(-logits, target)


class Deaf(Plain):
    def probabilities(self, logits):
        return torch.cat([logits[:, :1] * 0 + 0.2, logits[:, 1:].softmax(1) * 0.8], 1)


class Misscaled(Plain):
    @torch.no_grad()
    def rescale_(self, scale, shift):
        self.linear.bias.add_(shift)


def test_the_unbroken_plugins_keep_their_contracts(registered):
    registered(registry.backbones, Small)
    testing.check_backbone("broken")
    registered(registry.heads, Plain)
    testing.check_head("broken")
    registered(registry.saliency, gradient)
    testing.check_saliency("broken")


@pytest.mark.parametrize(("head", "message"), [
    (Unscaled, "must sum to one"),
    (Summed, "the mean over the batch"),
    (Backwards, "make the true label the most probable"),
    (Deaf, "the probability of 'low' does not depend on the logits"),
    (Misscaled, "scale x logits + shift"),
])  # fmt: skip
def test_the_error_names_the_rule_that_a_head_breaks(registered, head, message):
    registered(registry.heads, head)
    with pytest.raises(PluginError, match=f"head 'broken' of this session breaks its contract: .*{re.escape(message)}"):
        testing.check_head("broken")


def gradient(score, grid, network):
    return torch.autograd.grad(score(grid).sum(), grid)[0][0, 0]


def unsigned(score, grid, network):
    return gradient(score, grid, network).abs()


def scaled(score, grid, network):
    found = gradient(score, grid, network)
    return found / found.abs().amax()


def mirrored(score, grid, network):
    return gradient(score, grid, network).flip(2)


def noisy(score, grid, network):
    return gradient(score, grid + 0.1 * torch.rand_like(grid), network)


def hooked(score, grid, network):
    handle = network.backbone[1].register_forward_hook(lambda *_: None)
    found = gradient(score, grid, network)
    handle.remove()  # not removed if the score raises
    return found


def training(score, grid, network):
    network.train()
    return gradient(score, grid, network)


def leaving(score, grid, network):
    network.backbone[1].output = gradient(score, grid, network)
    return network.backbone[1].output


def accumulating(score, grid, network):
    score(grid).sum().backward()
    return grid.grad[0, 0].clone()


def silent(score, grid, network):
    try:
        return gradient(score, grid, network)
    except Exception:
        return torch.zeros(grid.shape[2:])


def flat(score, grid, network):
    return gradient(score, grid, network).ravel()


@pytest.mark.parametrize(("method", "message"), [
    (unsigned, "must be signed"),
    (scaled, "must not be scaled"),
    (mirrored, "a lesion on the low side"),
    (noisy, "the random state of torch"),
    (hooked, "the hooks of the network"),
    (training, "the modes of the network"),
    (leaving, "the attributes of the network"),
    (accumulating, "the gradient of the input"),
    (silent, "a bad target must raise an error"),
    (flat, "a map is a tensor (D, H, W), this map is a tensor (6912,)"),
])  # fmt: skip
def test_the_error_names_the_rule_that_a_method_breaks(registered, method, message):
    registered(registry.saliency, method)
    with pytest.raises(PluginError, match=f"'broken' of this session breaks its contract: .*{re.escape(message)}"):
        testing.check_saliency("broken")


def test_an_option_that_a_method_refuses_is_named(registered, bright_model, scan_path):
    def picky(score, grid, network, *, steps=1):
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be 1 at least")
        return gradient(score, grid, network)

    registered(registry.saliency, picky)
    model = ichprog.load_model(bright_model, fold=0)
    assert ichprog.explain(model, scan_path, method="broken").method == "broken"
    with pytest.raises(PluginError, match=r"'broken' refuses its options {'steps': 0}: steps is 0; it must be 1"):
        ichprog.explain(model, scan_path, method="broken", steps=0)


# families of names


def test_a_family_takes_the_rest_of_the_name(registered, bright_model):
    def family(rest, *, width=2):
        assert rest.count("/") == 1
        layers = nn.Sequential(nn.Conv3d(1, width, 3, 4, 1), nn.ReLU())
        return Backbone(layers, width, "features.1")

    registry.backbones.register("many/*", family)
    try:
        testing.check_backbone("many/of/them", width=3)
        assert registry.backbones.entry("many/of/them").name == "many/*"
        for name in ("many", "many/", "man/y"):
            with pytest.raises(ichprog.errors.UnknownNameError, match=re.escape(name)):
                registry.backbones.load(name)
        with pytest.raises(PluginError, match=r"claimed by this session and this session"):
            registry.backbones.register("many/one", family)
    finally:
        registry.backbones.unregister("many/*")


# real distributions


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Create an environment with its own pip that sees the installed packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (site / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return folder


def run(environment, *command, cwd=None, fine=True, cache=None):
    variables = {"PATH": f"{environment / 'bin'}:/usr/bin:/bin", "HF_ENDPOINT": "http://127.0.0.1:9"}
    variables |= {"HOME": str(environment), "ICHPROG_CACHE": str(cache or environment / "cache")}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert not fine or done.returncode == 0, done.stdout + done.stderr
    return done


def distribution(folder, name, code, *, version="1.2.3", requires="ichprog", group="backbones", claims=None):
    package = f"ichprog_{name}"
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(textwrap.dedent(code))
    (folder / "pyproject.toml").write_text(
        textwrap.dedent(f"""\
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "ichprog-{name}"
        version = "{version}"
        dependencies = ["{requires}"]
        [project.entry-points."ichprog.{group}"]
        {claims or name} = "{package}:build"
        """)
    )
    return folder


BAD = {
    "raises": ("raises", "RuntimeError: not today", {"code": "raise RuntimeError('not today')"}),
    "lacks": ("lacks", "No module named 'a_package_that_is_not_there'", {"code": "import a_package_that_is_not_there"}),
    "claims": ("perez2023", "is claimed by ichprog", {"code": "build = None", "claims": "perez2023"}),
    "newer": ("newer", "requires ichprog >=99", {"code": "build = None", "requires": "ichprog>=99"}),
    "breaks": ("breaks", "out_channels", {"code": "from torch import nn\ndef build():\n    return nn.Identity()"}),
}


@pytest.fixture
def bad_ones(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    made = [distribution(folder / name, name, **about) for name, (_, _, about) in BAD.items()]
    pip = environment / "bin" / "pip"
    run(environment, pip, "install", "--no-deps", "--no-build-isolation", *made)
    yield
    run(environment, pip, "uninstall", "-y", *(f"ichprog-{name}" for name in BAD))


def test_broken_distributions_affect_only_their_own_names(environment, bad_ones, tmp_path, scan_path):
    states = json.loads(run(environment, environment / "bin" / "python", "-m", "ichprog", "plugins", "--json").stdout)
    problems = {(state["distribution"], state["name"]): state["problem"] for state in states}
    for name, (claimed, message, _) in BAD.items():
        if name != "breaks":  # found only when the backbone is built
            assert message in problems[f"ichprog-{name}", claimed]
            assert f"ichprog-{name} 1.2.3" in problems[f"ichprog-{name}", claimed]
    assert "ichprog-claims 1.2.3" in problems["ichprog", "perez2023"]
    fine = {name for (_, name), problem in problems.items() if problem is None}
    assert {"compact", "densenet121", "ordinal", "softmax", "grad_cam", "breaks"} <= fine

    code = f"""
        import json
        import ichprog
        from ichprog import registry, testing
        results = {{}}
        for name in ("raises", "lacks", "perez2023", "newer", "breaks"):
            try:
                testing.check_backbone(name)
            except ichprog.errors.PluginError as error:
                results[name] = str(error)
        model = ichprog.load_model("compact.prognosis_gcs3_age", runtime="torch")
        results["answer"] = len(ichprog.predict(model, {str(scan_path)!r}).tasks)
        print(json.dumps(results))
        """
    results = json.loads(run(environment, environment / "bin" / "python", "-c", textwrap.dedent(code)).stdout)
    assert results["answer"] == 3
    for name, (claimed, message, _) in BAD.items():
        assert message in results[claimed]
        assert f"ichprog-{name} 1.2.3" in results[claimed]


@pytest.mark.slow  # `.ci/run` runs the tests of the plugin itself
def test_the_captum_plugin_works_where_it_is_installed(environment, tmp_path, scan_path):
    folder, pip, python = (
        ROOT / "plugins" / "ichprog-captum",
        environment / "bin" / "pip",
        environment / "bin" / "python",
    )
    copied = shutil.copytree(folder, tmp_path / "plugin")  # building writes no files into the source folder
    run(environment, pip, "install", "--no-deps", "--no-build-isolation", copied, "captum>=0.8")
    try:
        methods = ("integrated_gradients", "smooth_grad", "captum_grad_cam", "grad_cam")
        asked = [word for method in methods for word in ("--method", method)]
        asked += ["--task", "prognosis", "--task", "age", "--option", "steps=2", "--option", "samples=2", "--json"]
        command = (python, "-m", "ichprog", "explain", scan_path, "-m", "compact.prognosis_gcs3_age", "--fold", "0")
        lines = run(environment, *command, *asked, "-o", tmp_path / "maps").stdout.splitlines()
        maps = {(one["task"], one["method"]): nib.load(one["map"]).get_fdata() for one in map(json.loads, lines)}
        assert maps.keys() == {(task, method) for task in ("prognosis", "age") for method in methods}
        for task in ("prognosis", "age"):
            np.testing.assert_allclose(maps[task, "captum_grad_cam"], maps[task, "grad_cam"], rtol=1e-3, atol=1e-6)
        refused = run(environment, *command, "--method", "deep_lift", "-o", tmp_path / "maps", fine=False)
        assert refused.returncode == 1
        assert "deep_lift is not valid for this network" in refused.stderr
    finally:
        run(environment, pip, "uninstall", "-y", "ichprog-captum", "captum")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "backbone")) for kind in PAGES]
)
def test_the_page_of_a_kind_is_followed_to_the_letter(environment, tmp_path, kind):
    page = (ROOT / "docs" / PAGES[kind]).read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(ichprog plugins new .*?)^```$", page, re.DOTALL | re.MULTILINE)
    (name,) = re.findall(rf"^ichprog plugins new (\w+) --kind {kind}$", block, re.MULTILINE)
    if kind != "backbone":  # the line is the same, and takes long for what it brings into a new environment to build in
        install = 'pip install -e ".[dev]"'
        assert install in block
        block = block.replace(install, "pip install --no-deps --no-build-isolation .")
    for command in ("ichprog", "pytest"):  # which an environment of one's own would have
        script = environment / "bin" / command
        script.write_text(f'#!/bin/sh\nexec {environment / "bin" / "python"} -m {command} "$@"\n')
        script.chmod(0o755)
    try:
        done = run(environment, "bash", "-ec", block, cwd=tmp_path)
        assert "1 passed" in done.stdout
        shown = {"saliency": "saliency method", "brain_extractor": "brain extractor"}.get(kind, kind)
        assert re.search(rf"^{shown} +{name} +ichprog-{name} 0.1.0 +loads$", done.stdout, re.MULTILINE)
    finally:
        run(environment, environment / "bin" / "pip", "uninstall", "-y", f"ichprog-{name}")
    folder = tmp_path / f"ichprog-{name}"
    written = [path for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".md")]
    written = [path for path in written if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    assert len(written) == 4
    assert not re.search(r"\$[a-z]", "".join(path.read_text() for path in written))
    listed = page.partition("The first line writes four files: ")[2].partition("\n\n")[0]
    assert all(f"`{path.relative_to(folder)}`" in listed for path in written)


def _ringed(hu, spacing_mm):
    bone = hu > 300
    brain = ~bone & (hu > -20)
    for axis in (0, 1):
        before = np.logical_or.accumulate(bone, axis)
        brain &= before & np.flip(np.logical_or.accumulate(np.flip(bone, axis), axis), axis)
    return brain


def _shrinking(hu, spacing_mm):
    mask = _ringed(hu, spacing_mm)
    hu += 1
    return mask


def _random(hu, spacing_mm):
    return _ringed(hu, spacing_mm) & (np.random.default_rng().random(hu.shape) > 0.01)


def _failing_on_air(hu, spacing_mm):
    mask = _ringed(hu, spacing_mm)
    np.argwhere(mask)[0]
    return mask


@pytest.mark.parametrize(
    ("extract", "message"),
    [
        (lambda hu, spacing_mm: _ringed(hu, spacing_mm).astype(np.int64), "bool array"),
        (lambda hu, spacing_mm: _ringed(hu, spacing_mm).T, "bool array"),
        (_shrinking, "must not be changed"),
        (_random, "the same mask"),
        (lambda hu, spacing_mm: hu > 0, "Dice"),
        (_failing_on_air, "air must give"),
    ],
    ids=["integers", "transposed", "changed HU", "random", "whole head", "fails on air"],
)
def test_a_broken_brain_extractor_is_named(extract, message):
    registry.brain_extractors.register("broken", extract)
    try:
        with pytest.raises(PluginError, match=message):
            testing.check_brain_extractor("broken")
    finally:
        registry.brain_extractors.unregister("broken")


CHECKS = {
    "backbone": (registry.backbones, testing.check_backbone, test_the_error_names_the_rule_that_a_backbone_breaks),
    "head": (registry.heads, testing.check_head, test_the_error_names_the_rule_that_a_head_breaks),
    "saliency": (registry.saliency, testing.check_saliency, test_the_error_names_the_rule_that_a_method_breaks),
    "brain_extractor": (
        registry.brain_extractors,
        testing.check_brain_extractor,
        test_a_broken_brain_extractor_is_named,
    ),
}


@pytest.mark.parametrize("kind", list(CHECKS))
def test_the_messages_on_the_pages_are_the_real_messages(registered, kind):
    """Compare each message on the page with the message of a broken plugin of this file."""
    page = (ROOT / "docs" / PAGES[kind]).read_text(encoding="utf-8")
    messages = re.findall(r"^\| .* \| `(.+)` \|$", page.partition("\n## Mistakes\n")[2], re.MULTILINE)
    assert len(messages) >= 5
    plugins, check, examples = CHECKS[kind]
    shown = []
    for plugin, _ in examples.pytestmark[0].args[1]:
        plugins.register("broken", plugin)
        try:
            with pytest.raises(PluginError) as caught:
                check("broken")
        finally:
            plugins.unregister("broken")
        shown.append(str(caught.value).partition(" breaks its contract: ")[2])
    for message in messages:
        assert any(re.match(rf"{re.escape(message)}[.;]", one) for one in shown), message


@pytest.mark.parametrize(("arguments", "message"), [
    (["Tiny"], "lower-case letters"),
    (["class"], "lower-case letters"),
    (["../tiny"], "lower-case letters"),
    (["compact"], "exists already, from ichprog"),
    (["ordinal", "--kind", "head"], "exists already, from ichprog"),
    (["tiny", "-o", "."], "exists already"),
    (["tiny", "--kind", "model"], "backbone"),
])  # fmt: skip
def test_a_new_plugin_needs_a_valid_name_and_a_free_folder(arguments, message):
    result = CliRunner().invoke(main, ["plugins", "new", *arguments])
    assert result.exit_code == 2
    assert message in result.output
