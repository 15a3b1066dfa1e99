"""Imports between packages point downward only, and light entry points import no large library."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ichprog
from ichprog import zoo

PACKAGE = Path(ichprog.__file__).parent
# From the lowest to the highest. A module imports lower layers, and its own layer only if SIDEWAYS allows it.
LAYERS = [
    {"errors", "limits", "notebook", "schema", "spec", "io", "journal", "parallel", "pseudonyms"},
    {"registry"},
    {
        "zoo",
        "scan",
        "preprocessing",
        "results",
        "result_files",
        "calibration",
        "cohort",
        "clinical",
        "clinical_scores",
        "backbones",
        "heads",
        "fusions",
        "saliency",
    },
    {"hub", "sources", "location"},
    {"networks", "detection"},
    {"runtime"},
    {"model"},
    {"metrics", "reporting", "simulate", "testing", "profiling"},
    {"train", "evaluation"},
    {"study", "export", "pacs"},
    {"cli"},
]
SIDEWAYS = {
    ("schema", "errors"),
    ("spec", "errors"),
    ("spec", "limits"),
    ("spec", "notebook"),
    ("limits", "errors"),
    ("spec", "schema"),
    ("io", "errors"),
    ("notebook", "errors"),
    ("journal", "errors"),
    ("journal", "io"),
    ("parallel", "errors"),
    ("parallel", "io"),
    ("parallel", "pseudonyms"),  # workers of a cluster get the key
    ("pseudonyms", "errors"),
    ("pseudonyms", "io"),
    ("result_files", "results"),
    ("calibration", "results"),  # it describes how unusual a scan is
    ("clinical", "calibration"),  # combinations with clinical values are changes of log-odds
    ("clinical_scores", "results"),  # a haemorrhage has variables of the scores
    ("reporting", "metrics"),  # labels of metrics in tables
    ("pacs", "export"),  # it stores the objects of a prediction
    ("evaluation", "train"),  # leakage control reads the folds and the run directory
}
# Imports that point downward and are forbidden all the same.
FORBIDDEN = {
    "spec": {"registry"},
    "scan": {"registry", "zoo"},
    "preprocessing": {"registry", "zoo"},
    "location": {"registry", "zoo"},
    "backbones": {"registry", "zoo", "spec"},
    "heads": {"registry", "zoo", "spec"},
    "fusions": {"registry", "zoo", "spec"},
    "saliency": {"registry", "zoo", "spec"},
    "metrics": set().union(*LAYERS) - {"errors", "metrics"},  # arrays in, numbers out
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py" and p != PACKAGE / "__init__.py")


def package_of(path):
    """Return the top-level module or package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_packages(path):
    """Yield the ichprog packages that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ichprog":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ichprog."))


def relative_name(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=relative_name)
def test_imports_point_downward(path):
    layer_of = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    package = package_of(path)
    assert package in layer_of, f"{package} has no layer: add it to LAYERS and to docs/architecture.md"
    for other in set(imported_packages(path)) - {package, "__version__"}:
        assert layer_of[other] < layer_of[package] or (package, other) in SIDEWAYS, f"{package} -> {other} points up"
        assert other not in FORBIDDEN.get(package, ()), f"{package} must not import {other}"


def test_no_two_modules_import_each_other():
    """Imports for types only and imports inside functions count, too."""
    modules = {".".join(("ichprog", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    modules = {name: path for name, path in modules.items() if path.stem != "__init__"}
    imports = {name: modules.keys() & set(imported_names(path)) for name, path in modules.items()}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError with the modules of a cycle


def imported_names(path):
    """Yield the full name of everything that a file imports with `from`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_layer_and_a_telling_name():
    modules = {path.stem for path in PACKAGE.glob("[!._]*.py")}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules == set().union(*LAYERS)
    assert not {path.stem for path in FILES} & {"utils", "helpers", "common", "base", "core", "misc"}


def test_the_architecture_page_lists_every_module_with_its_layer():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    for number, layer in enumerate(LAYERS, 1):
        for module in layer:
            assert re.search(rf"^\| {number} \| .*`{module}`.* \|", page, re.MULTILINE), module


KNOW_PATIENTS = {"cohort", "clinical_scores", "simulate"}  # columns, clinical variables, and simulated patients


SUBJECTS = {"haemorrhage"}  # words for what every scan is about, although a task has the same name


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) not in KNOW_PATIENTS], ids=relative_name)
def test_no_code_knows_a_task_by_name(path):
    """Tasks are data: apart from the default model's name, only docstrings may name them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    texts |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    texts |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    tasks = {task.name for spec in ichprog.list_models() for task in spec.tasks} - SUBJECTS
    for text in texts - docstrings - {zoo.DEFAULT}:
        assert not tasks & set(re.findall(r"\w+", text)), f"{path.name} knows a task by name: {text!r}"


def imported_modules(*arguments):
    """Return the names of all modules after `import ichprog`, or after the command with these arguments."""
    code = "import sys, runpy\nsys.argv[0] = 'ichprog'\ntry: runpy.run_module('ichprog', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\nprint('\\n', *sorted(sys.modules))"
    if not arguments:
        code = "import sys, ichprog\nprint(*sorted(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(process.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("models",), ("models", "--json"), ("predict", "--help")])
def test_light_entry_points_import_no_large_library(arguments):
    assert not {"torch", "monai", "openvino", "scipy", "nibabel", "huggingface_hub"} & imported_modules(*arguments)


def test_importing_ichprog_needs_only_the_standard_library():
    assert not {name.split(".")[0] for name in imported_modules()} & {"numpy", "click", "tqdm", "msgspec"}


def test_every_public_name_has_a_docstring():
    for name in ichprog.__all__:
        assert getattr(ichprog, name).__doc__
    assert set(ichprog.__all__) <= set(dir(ichprog))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ichprog.nothing  # noqa: B018


def test_the_citation_file_has_the_version_of_the_package():
    citation = (PACKAGE.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ichprog.__version__}\n" in citation
