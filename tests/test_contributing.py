"""The five commonest changes of CONTRIBUTING.md work as written, and touch only the listed files."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+?)\n(.+?)(?=^##)", CONTRIBUTING, re.MULTILINE | re.DOTALL))


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project that the tests may change."""
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("ichprog", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def install(project):
    """Write the metadata of the project as an installation does, and return the environment that uses it."""
    declared = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = project.parent / "site"
    metadata = site / "ichprog-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ichprog\nVersion: 0.1.0\n")
    groups = declared["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    search_path = os.pathsep.join([str(project), str(site)])
    return os.environ | {"PYTHONPATH": search_path, "PYTHONDONTWRITEBYTECODE": "1"}


def run(command, project, environment):
    process = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def apply(section, project):
    """Make the edits of a section, run its Python block if it names no file, and return its checks.

    A block belongs to the last sentence before it: "Append ... to `FILE`" or "Add one line to `FILE` under `HEADER`".
    """
    checks, position = [], 0
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        introduction, position = section[position : block.start()], block.end()
        language, code = block.groups()
        if language == "bash":
            checks += code.splitlines()
        elif match := re.search(r"Append[^`]*?to `([^`]+)`:\s*$", introduction):
            with (project / match[1]).open("a", encoding="utf-8") as file:
                file.write("\n\n" + code)
        elif match := re.search(r"Add[^`]* to `([^`]+)` under `([^`]+)`", introduction):
            path, header = project / match[1], match[2] + "\n"
            text = path.read_text(encoding="utf-8")
            assert header in text
            path.write_text(text.replace(header, header + code, 1), encoding="utf-8")
        else:
            run([sys.executable, "-c", code], project, os.environ)
    return checks


def test_the_five_changes_are_described():
    assert set(SECTIONS) == {
        "Add a model",
        "Add a backbone",
        "Add a saliency method",
        "Add a metric",
        "Add a scan check",
    }


@pytest.mark.parametrize("title", SECTIONS)
def test_a_change_touches_only_the_listed_files_and_passes_its_check(title, project):
    section, before = SECTIONS[title], files_below(project)
    checks = apply(section, project)
    after = files_below(project)
    listed = set(re.findall(r"`([^`]+)`", re.search(r"^Files: (.+)$", section, re.MULTILINE)[1]))
    assert {name for name in after if after[name] != before.get(name)} == listed
    run([sys.executable, "-m", "ruff", "check", "--no-cache", "ichprog"], project, os.environ)
    environment = install(project)
    ichprog = [sys.executable, "-m", "ichprog"]
    for check in checks:
        program, _, arguments = check.partition(" ")
        words = [*ichprog] if program == "ichprog" else [sys.executable]
        code = re.fullmatch(r'-c "(.+)"', arguments)
        run([*words, *(["-c", code[1]] if code else arguments.split())], project, environment)
