"""Plugins of distributions that are really installed, good and bad, and the suite that tells one from the other."""

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
    "saliency": "plugins-saliency.md",
    "brain_extractor": "plugins-brain.md",
}


# the contract suite, over everything registered


@pytest.mark.parametrize("name", [name for name in registry.backbones.names() if not name.endswith("/*")])
def test_every_backbone_keeps_its_contract(name):
    # to compile DenseNet121 takes long, and other tests do
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
    """A backbone that keeps its contract, to be spoilt."""

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
    """Registers plugins for one test."""
    added = []

    def add(plugins, plugin):
        plugins.register("spoilt", plugin)
        added.append(plugins)

    yield add
    for plugins in added:
        plugins.unregister("spoilt")


@pytest.mark.parametrize(("module", "said"), [
    (WrongChannels, "features must be (2, 5, any, any, any), is (2, 4, 8, 16, 16)"),
    (Flat, "features must be (2, 4, any, any, any), is (2, 4)"),
    (LayerUnused, "its cam_layer 'spare' is not used"),
    (Dropping, "must leave torch's random numbers as it was"),
    (OverTheBatch, "must not depend on what is beside it"),
    (InPlace, "must leave the input as it was"),
    (Idle, "parameters that take no part: never"),
    (Frozen, "all its parameters are frozen"),
    (OfOneSize, "grids (3, 1, 40, 64, 80) after (32, 64, 64) must be answered, or refused by a PluginError"),
    (OfOneBatch, "must not depend on what is beside it"),
    (Counting, "must leave the numbers of the network as it was"),
    (Blind, "features must depend on the grid"),
    (Remembering, "filled into another of its kind"),
    (Failing, "ZeroDivisionError: by zero"),
    (Untraceable, "features must depend on the grid"),
])  # fmt: skip
def test_a_spoilt_backbone_is_told_what_it_breaks(registered, module, said):
    registered(registry.backbones, module)
    with pytest.raises(PluginError, match="backbone 'spoilt' of this session breaks its contract") as caught:
        testing.check_backbone("spoilt", shape=(32, 64, 64))
    assert said in str(caught.value)


def test_one_that_only_torch_can_run_may_say_so(registered):
    class OnlyTorch(Small):
        def forward(self, grid):
            features = self.layers(grid)
            return features if float(features.detach().sum()) < 1e9 else features * 2  # asks for a number on the way

    registered(registry.backbones, OnlyTorch)
    testing.check_backbone("spoilt", export=False)
    with pytest.raises(PluginError, match="it must run outside of torch"):
        testing.check_backbone("spoilt")


def test_a_backbone_of_one_size_may_refuse_others_in_words(registered):
    registered(registry.backbones, Refusing)
    testing.check_backbone("spoilt")


class Plain(nn.Module):
    """A head that keeps its contract, to be spoilt."""

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


def test_what_is_spoilt_here_keeps_its_contract_before(registered):
    registered(registry.backbones, Small)
    testing.check_backbone("spoilt")
    registered(registry.heads, Plain)
    testing.check_head("spoilt")
    registered(registry.saliency, gradient)
    testing.check_saliency("spoilt")


@pytest.mark.parametrize(("head", "said"), [
    (Unscaled, "must add to one"),
    (Summed, "the mean over the batch"),
    (Backwards, "make the true label the most probable"),
    (Deaf, "the probability of 'low' does not depend on the logits"),
    (Misscaled, "scale x logits + shift"),
])  # fmt: skip
def test_a_spoilt_head_is_told_what_it_breaks(registered, head, said):
    registered(registry.heads, head)
    with pytest.raises(PluginError, match=f"head 'spoilt' of this session breaks its contract: .*{re.escape(said)}"):
        testing.check_head("spoilt")


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
    handle.remove()  # not where the score raises
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


@pytest.mark.parametrize(("method", "said"), [
    (unsigned, "must be signed"),
    (scaled, "must not be scaled"),
    (mirrored, "of what speaks for a lesion on the low side"),
    (noisy, "torch's random numbers"),
    (hooked, "the hooks of the network"),
    (training, "the modes of the network"),
    (leaving, "the attributes of the network"),
    (accumulating, "the input's gradient"),
    (silent, "a bad target must not be passed over in silence"),
    (flat, "a map is a tensor (D, H, W), this is one of (6912,)"),
])  # fmt: skip
def test_a_spoilt_method_is_told_what_it_breaks(registered, method, said):
    registered(registry.saliency, method)
    with pytest.raises(PluginError, match=f"'spoilt' of this session breaks its contract: .*{re.escape(said)}"):
        testing.check_saliency("spoilt")


def test_a_method_that_refuses_an_option_is_told_so(registered, bright_model, scan_path):
    def picky(score, grid, network, *, steps=1):
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be 1 at least")
        return gradient(score, grid, network)

    registered(registry.saliency, picky)
    model = ichprog.load_model(bright_model, fold=0)
    assert ichprog.explain(model, scan_path, method="spoilt").method == "spoilt"
    with pytest.raises(PluginError, match=r"'spoilt' refuses its options {'steps': 0}: steps is 0; it must be 1"):
        ichprog.explain(model, scan_path, method="spoilt", steps=0)


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
    """A fresh environment that sees what is installed here, with a pip of its own."""
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
    "newer": ("newer", "was made for ichprog >=99", {"code": "build = None", "requires": "ichprog>=99"}),
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


def test_bad_distributions_spoil_their_own_names_only(environment, bad_ones, tmp_path, scan_path):
    states = json.loads(run(environment, environment / "bin" / "python", "-m", "ichprog", "plugins", "--json").stdout)
    problems = {(state["distribution"], state["name"]): state["problem"] for state in states}
    for name, (claimed, said, _) in BAD.items():
        if name != "breaks":  # which only shows when it is built
            assert said in problems[f"ichprog-{name}", claimed]
            assert f"ichprog-{name} 1.2.3" in problems[f"ichprog-{name}", claimed]
    assert "ichprog-claims 1.2.3" in problems["ichprog", "perez2023"]
    fine = {name for (_, name), problem in problems.items() if problem is None}
    assert {"compact", "densenet121", "ordinal", "softmax", "grad_cam", "breaks"} <= fine

    code = f"""
        import json
        import ichprog
        from ichprog import registry, testing
        told = {{}}
        for name in ("raises", "lacks", "perez2023", "newer", "breaks"):
            try:
                testing.check_backbone(name)
            except ichprog.errors.PluginError as error:
                told[name] = str(error)
        model = ichprog.load_model("compact.prognosis_gcs3_age", runtime="torch")
        told["answer"] = len(ichprog.predict(model, {str(scan_path)!r}).tasks)
        print(json.dumps(told))
        """
    told = json.loads(run(environment, environment / "bin" / "python", "-c", textwrap.dedent(code)).stdout)
    assert told["answer"] == 3
    for name, (claimed, said, _) in BAD.items():
        assert said in told[claimed]
        assert f"ichprog-{name} 1.2.3" in told[claimed]


def test_the_captum_plugin_works_where_it_is_installed(environment, tmp_path, scan_path):
    folder, pip, python = (
        ROOT / "plugins" / "ichprog-captum",
        environment / "bin" / "pip",
        environment / "bin" / "python",
    )
    copied = shutil.copytree(folder, tmp_path / "plugin")  # building leaves nothing beside the source
    run(environment, pip, "install", "--no-deps", "--no-build-isolation", copied, "captum>=0.8")
    try:
        assert re.search(r"^\d+ passed", run(environment, python, "-m", "pytest", "-q", "-rN", cwd=copied).stdout, re.M)
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
        assert "deep_lift does not hold for this network" in refused.stderr
    finally:
        run(environment, pip, "uninstall", "-y", "ichprog-captum", "captum")


@pytest.mark.parametrize("kind", list(PAGES))
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
    told = page.partition("The first line writes four files: ")[2].partition("\n\n")[0]
    assert all(f"`{path.relative_to(folder)}`" in told for path in written)


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
    "backbone": (registry.backbones, testing.check_backbone, test_a_spoilt_backbone_is_told_what_it_breaks),
    "head": (registry.heads, testing.check_head, test_a_spoilt_head_is_told_what_it_breaks),
    "saliency": (registry.saliency, testing.check_saliency, test_a_spoilt_method_is_told_what_it_breaks),
    "brain_extractor": (
        registry.brain_extractors,
        testing.check_brain_extractor,
        test_a_broken_brain_extractor_is_named,
    ),
}


@pytest.mark.parametrize("kind", list(CHECKS))
def test_what_the_pages_say_of_mistakes_is_what_is_shown(registered, kind):
    """Each message on the page, word by word, by what is spoilt above."""
    page = (ROOT / "docs" / PAGES[kind]).read_text(encoding="utf-8")
    told = re.findall(r"^\| .* \| `(.+)` \|$", page.partition("\n## Mistakes\n")[2], re.MULTILINE)
    assert len(told) >= 5
    plugins, check, examples = CHECKS[kind]
    shown = []
    for plugin, _ in examples.pytestmark[0].args[1]:
        plugins.register("spoilt", plugin)
        try:
            with pytest.raises(PluginError) as caught:
                check("spoilt")
        finally:
            plugins.unregister("spoilt")
        shown.append(str(caught.value).partition(" breaks its contract: ")[2])
    for message in told:
        assert any(re.match(rf"{re.escape(message)}[.;]", one) for one in shown), message


@pytest.mark.parametrize(("arguments", "said"), [
    (["Tiny"], "lower-case letters"),
    (["class"], "lower-case letters"),
    (["../tiny"], "lower-case letters"),
    (["compact"], "exists already, from ichprog"),
    (["ordinal", "--kind", "head"], "exists already, from ichprog"),
    (["tiny", "-o", "."], "exists already"),
    (["tiny", "--kind", "model"], "backbone"),
])  # fmt: skip
def test_a_new_plugin_is_refused_a_name_or_place_that_does_not_do(arguments, said):
    result = CliRunner().invoke(main, ["plugins", "new", *arguments])
    assert result.exit_code == 2
    assert said in result.output
