"""Every script in `examples/` runs to its end on simulated patients, without a network."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("evaluate", "swap_backbone")  # these train or predict many patients
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder that all examples share, so that patients are simulated and graphs are compiled once."""
    pytest.importorskip("nilearn")
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("script", EXAMPLES)
def test_an_example_runs(script, folder, monkeypatch):
    monkeypatch.setenv("ICHPROG_CACHE", str(folder / "cache"))
    process = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout
