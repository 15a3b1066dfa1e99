"""The arrows between the rooms run downward only, and light doors stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ichprog
from ichprog import zoo

HOUSE = Path(ichprog.__file__).parent
# From the ground up; a room may use rooms of lower floors, and its own floor where that is said below.
FLOORS = [
    {"errors", "spec"},
    {"registry"},
    {"zoo", "grid", "scan", "results", "scores", "backbones", "heads", "saliency"},
    {"hub"},
    {"network"},
    {"runtime"},
    {"model"},
    {"cohort", "simulate", "testing", "costs"},
    {"train", "release"},
    {"report"},
    {"study"},
    {"cli"},
]
SIDEWAYS = {("spec", "errors"), ("simulate", "cohort")}
# Plugins know only the contracts, scan and grid nothing of networks, spec nothing of anything.
NEVER = {
    "spec": {"registry"},
    "scan": {"registry", "zoo"},
    "grid": {"registry", "zoo"},
    "backbones": {"registry", "zoo", "spec"},
    "heads": {"registry", "zoo", "spec"},
    "saliency": {"registry", "zoo", "spec"},
}


def room_of(path):
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path):
    """Rooms that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ichprog":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ichprog."))


FILES = sorted(p for p in HOUSE.rglob("*.py") if p.name != "__main__.py" and p != HOUSE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_arrows_run_downward(path):
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room = room_of(path)
    assert room in floor, f"{room} has no floor: give it one here and in docs/architecture.md"
    for other in set(imports(path)) - {room}:
        assert floor[other] < floor[room] or (room, other) in SIDEWAYS, f"{room} -> {other} runs up"
        assert other not in NEVER.get(room, ()), f"{room} must not know {other}"


def test_every_room_is_a_file_or_folder_of_its_name():
    rooms = {
        p.name.removesuffix(".py")
        for p in HOUSE.iterdir()
        if not p.name.startswith((".", "_")) and p.name != "py.typed"
    }
    assert rooms == set().union(*FLOORS)
    assert not rooms & {"utils", "helpers", "common", "base", "core"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_no_file_is_two_ideas(path):
    assert len(path.read_text().splitlines()) <= 500


KNOW_PATIENTS = {"cohort", "scores", "simulate"}  # columns, clinical variables, and patients who have them


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) not in KNOW_PATIENTS], ids=lambda p: str(p.relative_to(HOUSE))
)
def test_no_task_is_known_by_name(path):
    """Tasks are data: apart from the default model's name, only docstrings may speak of them."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    said |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    said |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    tasks = {task.name for spec in ichprog.list_models() for task in spec.tasks}
    for text in said - docstrings - {zoo.DEFAULT}:
        assert not tasks & set(re.findall(r"\w+", text)), f"{path.name} knows a task by name: {text!r}"


def modules_after(*arguments):
    code = "import sys, runpy\nsys.argv[0] = 'ichprog'\ntry: runpy.run_module('ichprog', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\nprint('\\n', *sorted(sys.modules))"
    if not arguments:
        code = "import sys, ichprog\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("models",), ("models", "--json"), ("predict", "--help")])
def test_light_doors_stay_light(arguments):
    assert not {"torch", "monai", "openvino", "scipy", "nibabel", "huggingface_hub"} & modules_after(*arguments)


def test_importing_brings_nothing_but_the_standard_library():
    assert {m.split(".")[0] for m in modules_after()} & {"numpy", "click", "tqdm"} == set()


def test_every_public_name_arrives():
    for name in ichprog.__all__:
        assert getattr(ichprog, name).__doc__
    assert set(ichprog.__all__) <= set(dir(ichprog))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ichprog.nothing  # noqa: B018
