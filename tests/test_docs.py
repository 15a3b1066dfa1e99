"""The examples of the documentation run, every public name and option is documented, and the site builds."""

import ast
import doctest
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import click
import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

import ichprog
from ichprog import zoo
from ichprog.cli import main
from ichprog.scan.checks import CHECKS
from ichprog.scan.codes import ERRORS, READ_WARNINGS

from support import reference_pipeline
from support.hub_server import HubServer
from support.models import REPOSITORY
from support.phantoms import brain_hu

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def run_commands(example):
    """Run each line `$ ichprog ...` and compare its output with the lines below; `...` matches anything."""
    for block in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        command, _, expected = block.partition("\n")
        program, *arguments = shlex.split(command)
        if program != "ichprog":
            continue
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}"
        if expected.strip():
            expected = re.sub(r"^ +", "", expected, flags=re.MULTILINE)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            is_equal = doctest.OutputChecker().check_output(expected, result.output, flags)
            assert is_equal, f"{command}\n{result.output}"


@pytest.fixture(scope="session")
def small_hub(tmp_path_factory):
    """A Hub with one fold of the two models that the pages use, and a cache for all pages."""
    root = tmp_path_factory.mktemp("docs-hub")
    for name in (zoo.DEFAULT, "perez2023.prognosis"):
        reference_pipeline.save(name, root / REPOSITORY.repo, seed=0)
    cache = tmp_path_factory.mktemp("docs-cache")
    with HubServer(root, REPOSITORY.revision) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        for name in (zoo.DEFAULT, "perez2023.prognosis"):  # so that no page announces the download by chance
            ichprog.load_model(name, cache_dir=cache, runtime="torch")
        yield server.url, cache


@pytest.fixture
def reader(small_hub, tmp_path, monkeypatch):
    """A working folder with scans, and a Hub."""
    url, cache = small_hub
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("ICHPROG_CACHE", str(cache))
    (tmp_path / "scans").mkdir()
    scan = nib.Nifti1Image(brain_hu((256, 256, 30)), np.diag([-0.94, -0.94, 5, 1]))
    for name in ("scan", "scans/1", "scans/2"):
        scan.to_filename(tmp_path / f"{name}.nii.gz")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, reader):
    from sybil import Sybil
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

    parsers = [PythonCodeBlockParser(), CodeBlockParser(language="console", evaluator=run_commands)]
    for example in Sybil(parsers).parse(page).examples():
        example.evaluate()


def test_every_block_of_code_is_run_or_is_data():
    """Python and console blocks run; bash blocks set up a machine, and the other languages are data."""
    languages = [word for page in PAGES for word in re.findall(r"^ *```(\S*)$", page.read_text(), re.MULTILINE)]
    assert set(languages) <= {"", "python", "console", "bash", "toml", "json", "yaml", "text"}
    assert languages.count("python") >= 10


def test_the_model_pages_are_up_to_date():
    """Run `python docs/models.py` if this fails."""
    pages = runpy.run_path(str(DOCS / "models.py"))["pages"]()
    assert {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "models").iterdir()} == pages
    assert len(pages) == 2 * len([entry for entry in zoo.entries() if entry.distribution == "ichprog"]) + 1


def codes_in_scans():
    """Return every code of a ScanError or a ScanWarning in the source of `scan`."""
    codes = set()
    positions = {"ScanWarning": 0, "register_check": 0, "_not_hu_error": 1}  # of the code among the arguments
    for path in (ROOT / "ichprog" / "scan").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            texts = []
            if isinstance(node, ast.keyword) and node.arg == "code":
                texts = [node.value]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in positions:
                texts = [node.args[positions[node.func.id]]]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "code":
                texts = [constant for constant in ast.walk(node.value) if isinstance(constant, ast.Constant)]
            codes |= {text.value for text in texts if isinstance(text, ast.Constant)}
    return codes


def test_every_code_of_a_scan_is_in_a_table():
    assert {*CHECKS, *(code.code for code in (*READ_WARNINGS, *ERRORS))} == codes_in_scans()


def test_the_tables_of_scan_checks_are_up_to_date():
    """Run `python docs/scan_checks.py` if this fails."""
    page = (DOCS / "scans.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "scan_checks.py"))["updated_page"](page) == page


def test_every_command_has_a_table_of_its_options():
    """Run `python docs/command_line.py` if this fails."""
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "command_line.py"))["updated_page"](page) == page
    _, *parts = re.split(r"^##+ (.+)$", page, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert sections.keys() - commands(main).keys() == {"Shell completion", "Exit codes"}
    assert sections.keys() >= set(main.commands)
    assert "`ichprog -v " in page
    for path, command in commands(main).items():
        section = sections.get(path, "")
        for other in re.findall(r"As in \[`ichprog ([\w ]+)`\]", section):
            section += sections[other]
        assert f"`ichprog {path}" in page
        for option in command.params:
            if isinstance(option, click.Option) and not {"--json", "--help"} & set(option.opts):
                assert all(re.search(rf"`{spelling}[ `]", section) for spelling in option.opts), (path, option.opts)


def commands(group, before=""):
    """Return the commands of a group and of its groups, by their names."""
    found = {}
    for name, command in group.commands.items():
        found[before + name] = command
        found |= commands(command, f"{before}{name} ") if isinstance(command, click.Group) else {}
    return found


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference.md").read_text()
    for name in ichprog.__all__:
        assert f"::: ichprog.{name}\n" in text or f"`{name}(" in text, name


def test_every_page_has_a_picture():
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        assert re.search(r"!\[[^\]]+\]\(\S+\.(?:svg|png)\)", page.read_text(encoding="utf-8")), page.name


def test_the_diagrams_show_what_their_texts_say():
    """Run `python docs/diagrams.py` if this fails."""
    sources = {path.stem: path.read_text() for path in (DOCS / "pictures").glob("*.dot")}
    sources["architecture"] = runpy.run_path(str(DOCS / "diagrams.py"))["architecture"]()
    for name, source in sources.items():
        picture = ElementTree.parse(DOCS / "pictures" / f"{name}.svg")
        shown = {text.text.strip() for text in picture.iter("{http://www.w3.org/2000/svg}text")}
        nodes = re.sub(r"<\w+> ", "", source)  # the names of the fields of a table
        labels = {
            line for label in re.findall(r'label="((?:[^"\\]|\\.)*)"', nodes) for line in re.split(r"\\n|\|", label)
        }
        assert {label.replace('\\"', '"').strip() for label in labels} == shown, name


@pytest.mark.parametrize("builder", ["mkdocs", "zensical"])
def test_the_site_builds_and_loads_nothing_from_outside(builder, tmp_path):
    """Material for MkDocs builds the site, and so does its successor from the same file."""
    for needed in (builder, "material", "mkdocstrings"):
        pytest.importorskip(needed)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "ichprog").symlink_to(ROOT / "ichprog")
    built = subprocess.run(
        [sys.executable, "-m", builder, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source|object|embed)\b[^>]*>", text):
            assert 'rel="canonical"' in tag or not re.search(r"""(?:src|href|data)=["']?(?:https?:)?//""", tag), tag
        assert not re.search(r"<[^>]+class=\"mermaid", text), "the theme brings mermaid from outside"
        examples = re.findall(r'<details class="example".*?</details>', text, re.DOTALL)
        assert not any("<blockquote>" in example for example in examples), "name the section Examples"
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
