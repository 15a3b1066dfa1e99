"""Plugins are found by entry points: lazily, in isolation, with one owner for each name.

The distributions here are real metadata on `sys.path`.
"""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import ichprog
from ichprog import PluginError, SpecError, UnknownNameError, registry, zoo


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Return a function that makes an importable distribution with one module and entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, module, code, points, version="1.0"):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [
            f"[{group}]\n" + "\n".join(f"{key} = {value}" for key, value in points[group].items()) for group in points
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{module}.py").write_text(code)
        return tmp_path

    yield make
    for module in [m for m in sys.modules if m.startswith("plug_")]:
        del sys.modules[module]


def test_built_in_plugins_use_entry_points():
    for kind in (registry.backbones, registry.heads, registry.fusions, registry.saliency):
        mine = {point.name for point in entry_points(group=kind.group) if point.dist.name == "ichprog"}
        assert {entry.name for entry in kind.entries()} == mine
    assert registry.backbones.names() == ["compact", "densenet121", "perez2023", "unet"]
    assert registry.heads.names() == ["interval_regression", "ordinal", "proportional_odds", "segmentation", "softmax"]
    assert registry.fusions.names() == ["concat", "film"]
    assert registry.saliency.names() == ["grad_cam", "guided_backprop", "guided_grad_cam"]


def test_a_plugin_is_imported_on_first_use(distribution):
    code = "loaded = True\ndef build(**options):\n    return options\n"
    distribution("plug-good", "plug_good", code, {"ichprog.backbones": {"good": "plug_good:build"}})
    assert "good" in registry.backbones.names()
    assert "plug_good" not in sys.modules
    assert registry.backbones.load("good")(a=1) == {"a": 1}
    assert "plug_good" in sys.modules


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("other = 1", "AttributeError: module 'plug_bad' has no attribute 'build'"),
        ("def build(:", "SyntaxError"),
    ],
)
def test_a_broken_plugin_affects_only_its_own_name(distribution, code, cause):
    distribution("plug-bad", "plug_bad", code, {"ichprog.backbones": {"bad": "plug_bad:build"}}, version="2.3")
    with pytest.raises(PluginError, match=rf"backbone 'bad' of plug-bad 2\.3 cannot be loaded.*{cause}"):
        registry.backbones.load("bad")
    assert callable(registry.backbones.load("perez2023"))
    assert ichprog.list_models()


def test_two_owners_of_a_name_are_both_named(distribution):
    code = "def build():\n    return None\n"
    distribution("plug-one", "plug_one", code, {"ichprog.heads": {"ordinal": "plug_one:build"}})
    with pytest.raises(PluginError, match=r"head 'ordinal' is claimed by ichprog .* and plug-one 1\.0"):
        registry.heads.load("ordinal")
    assert callable(registry.heads.load("softmax"))


def test_registering_refuses_a_name_in_use():
    with pytest.raises(PluginError, match=r"backbone 'densenet121' is claimed by ichprog .* and this session"):
        ichprog.register_backbone("densenet121", lambda: None)
    assert len([e for e in registry.backbones.entries() if e.name == "densenet121"]) == 1


def test_an_unknown_name_lists_the_known_names():
    with pytest.raises(
        UnknownNameError, match=r"Unknown saliency method 'x'. Expected one of: grad_cam, guided_backprop, .*plugins"
    ):
        registry.saliency.load("x")


def spec_fields(name):
    return zoo.find("perez2023.prognosis").to_dict() | {"name": name}


def test_a_distribution_adds_models(distribution):
    root = distribution("plug-models", "plug_unused", "", {"ichprog.models": {"mine": "plug_zoo"}})
    (root / "plug_zoo").mkdir()
    (root / "plug_zoo" / "__init__.py").touch()
    (root / "plug_zoo" / "mine.prognosis.json").write_text(json.dumps(spec_fields("mine.prognosis")))
    (root / "plug_zoo" / "misnamed.json").write_text(json.dumps(spec_fields("other")))
    (root / "plug_zoo" / "broken.json").write_text("{")
    assert [s.name for s in ichprog.list_models("m*")] == ["mine.prognosis"]
    assert zoo.find("mine.prognosis").name == "mine.prognosis"
    with pytest.raises(SpecError, match=r"misnamed.json: name: 'other' differs .*Expected 'misnamed'"):
        zoo.find("misnamed")
    with pytest.raises(SpecError, match=r"broken.json: cannot be read as JSON"):
        zoo.find("broken")


def test_a_broken_package_of_models_affects_no_other_model(distribution):
    distribution("plug-models", "plug_zoo", "1 / 0", {"ichprog.models": {"mine": "plug_zoo"}})
    assert zoo.find("densenet121.prognosis").name == "densenet121.prognosis"


def test_a_model_is_registered_once():
    ichprog.register_model(spec_fields("mine.prognosis"))
    try:
        assert zoo.find("mine.prognosis").summary
        with pytest.raises(PluginError, match="claimed by this session and this session"):
            ichprog.register_model(spec_fields("mine.prognosis"))
        with pytest.raises(PluginError, match="claimed by ichprog"):
            ichprog.register_model(spec_fields("perez2023.prognosis"))
        with pytest.raises(SpecError):
            ichprog.register_model({"name": "x"})
    finally:
        zoo.unregister_model("mine.prognosis")


def test_the_list_of_plugins_shows_which_one_is_broken(distribution, tmp_path):
    distribution("plug-bad", "plug_bad", "1 / 0", {"ichprog.saliency": {"bad": "plug_bad:build"}})
    command = [sys.executable, "-m", "ichprog", "plugins", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    states = {(p["kind"], p["name"]): p for p in json.loads(done.stdout)}
    assert "ZeroDivisionError" in states["saliency method", "bad"]["problem"]
    assert states["saliency method", "bad"]["distribution"] == "plug-bad"
    assert all(p["problem"] is None for key, p in states.items() if key[1] != "bad")
    assert ("model", "perez2023.prognosis") in states


def test_a_package_that_replaces_entry_points_has_no_effect():
    """The backport of importlib.metadata, a dependency of dask, replaces them."""
    pytest.importorskip("importlib_metadata")
    code = "import importlib_metadata\nfrom ichprog import registry\nprint(registry.backbones.load('compact'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "function compact" in done.stdout
