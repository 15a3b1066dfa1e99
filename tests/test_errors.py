"""The errors of missing extras."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from ichprog.cli import EXTRA_OF_COMMAND
from ichprog.errors import IchprogError, missing_extra
from ichprog.train import folds

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NAMED = {
    extra
    for path in (ROOT / "ichprog").rglob("*.py")
    for extra in re.findall(r'missing_extra\("(\w+)"', path.read_text(encoding="utf-8"))
}


def test_a_missing_extra_is_named_in_one_sentence():
    assert str(missing_extra("train", "accelerate", "Training")) == (
        "Training needs accelerate. Install it with: pip install 'ichprog[train]'."
    )
    assert "Install them with" in str(missing_extra("export", "onnx and onnxscript", "Exporting"))


def test_every_extra_that_an_error_names_exists():
    assert set(EXTRAS) >= NAMED
    for extras in EXTRA_OF_COMMAND.values():
        assert set(extras.split(",")) <= set(EXTRAS)


def test_training_without_its_extra_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(IchprogError, match=r"needs scikit-learn. Install it with: pip install 'ichprog\[train\]'\."):
        folds.split(np.array([0, 1] * 4), 2)
