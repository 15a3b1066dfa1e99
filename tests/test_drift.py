"""The answers that `benchmarks/drift.py` compares between versions of dependencies."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from packaging.utils import canonicalize_name

from ichprog import zoo

ROOT = Path(__file__).parents[1]
DRIFT = runpy.run_path(str(ROOT / "benchmarks" / "drift.py"), run_name="drift")
STORED = json.loads((ROOT / "benchmarks" / "drift.json").read_text())


def test_the_stored_answers_cover_every_embedded_model_and_every_published_architecture():
    """To renew them, run `python benchmarks/drift.py --write`."""
    embedded = {spec.name for spec in zoo.list_models() if spec.weights.repo is None}
    assert {name.split(", ")[0] for name in STORED["answers"]} - {"reading and preprocessing"} == embedded | {
        *DRIFT["PUBLISHED"]
    }
    architectures = {spec.backbone.name for spec in zoo.list_models() if spec.weights.repo is not None}
    assert {zoo.find(name).backbone.name for name in DRIFT["PUBLISHED"]} == architectures


def test_the_stored_answers_are_those_of_the_locked_versions():
    lock = (ROOT / "requirements.lock").read_text()
    for name, number in STORED["versions"].items():
        assert f"\n{canonicalize_name(name)}=={number} " in lock


def test_a_changed_answer_is_found(capsys):
    answers = STORED["answers"]
    name = "perez2023.prognosis, torch, float32"
    assert DRIFT["check"](answers, answers)
    for change in (2e-4, np.nan):
        assert not DRIFT["check"](answers | {name: [number + change for number in answers[name]]}, answers)
    rounded = {name.replace("float32", "bfloat16"): [number + 1e-2 for number in answers[name]]}
    assert DRIFT["check"](rounded, answers)
    assert "1.0e-02" in capsys.readouterr().out


@pytest.mark.slow
def test_this_environment_gives_the_stored_answers():
    assert DRIFT["check"](dict(DRIFT["answers"]()), STORED["answers"])
