"""Descriptions of a study for its report."""

import string
import tomllib
from importlib.resources import files

import numpy as np
import pytest

from ichprog.cohort import Origin
from ichprog.reporting import tripod
from ichprog.study import Study, facts, template

from support.results import METRICS


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.toml").write_text(template("smoke"))
    return Study.read(tmp_path / "study.toml")


def test_a_row_for_each_variant_and_baseline(study):
    rows = {row["name"]: row for row in facts.comparison_table(study).rows}
    assert set(rows) == {each.name for each in (*study.variants, *study.baselines)}
    assert rows["all"]["input"] == "image, 16 x 48 x 48"
    assert rows["fusion"]["input"] == "predictions of all, age, gcs"
    assert rows["majority"]["input"] == "none"


def test_patients_are_counted_by_label(study):
    truth = {"prognosis": np.array([0, 1, 1, -1]), "gcs": np.array([2, 2, 0, -1])}
    rows = {row["task"]: row for row in facts.patients_table(study, truth).rows}
    assert rows["prognosis"] == {"task": "prognosis", "patients": 4, "missing": 1, "labels": "good: 1, poor: 2"}
    assert rows["gcs"]["labels"] == "13-15: 1, 9-12: 0, 3-8: 2"


def test_the_checklist_is_filled_with_the_facts_of_a_study(study):
    truth = {"prognosis": np.array([0, 1, 1, -1, 0, 1])}
    known = facts.tripod_facts(study, truth, METRICS, origin=Origin(6, 6))
    answers = {row["number"]: row["answer"] for row in tripod.fill_checklist(known)}
    assert answers["20a"].startswith("6 patients: prognosis (good: 2, poor: 3).")
    assert "prognosis 1" in answers["11"]
    assert answers["12a"].startswith("2 folds, stratified by prognosis")
    assert "25 %" in answers["12a"]
    assert "one_task 0.712 (0.662 to 0.762)" in answers["23a"]
    assert "<all>" not in answers["23a"], "its AUROC is undefined"
    assert "Patients simulated by ichprog" in answers["5a"]
    mixed = tripod.fill_checklist(facts.tripod_facts(study, truth, METRICS, origin=Origin(6, 2)))
    assert "2 of 6 patients are simulated" in next(row["answer"] for row in mixed if row["number"] == "5a")
    unknown = {row["number"]: row["answer"] for row in tripod.fill_checklist(known | {"patients": None})}
    assert unknown["20a"] == "To be written by the authors."
    assert unknown["12a"] == answers["12a"]


def test_a_study_provides_exactly_the_facts_of_the_checklist(study):
    items = tomllib.loads((files("ichprog.reporting") / "tripod.toml").read_text(encoding="utf-8"))["item"]
    needed = {name for item in items for _, name, _, _ in string.Formatter().parse(item.get("answer", "")) if name}
    provided = facts.tripod_facts(study, {"prognosis": np.array([0, 1])}, METRICS, origin=Origin(2, 0))
    assert needed == set(provided)
