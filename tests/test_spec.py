"""A model as data: what is read strictly and what the zoo says."""

import json

import pytest

import ichprog
from ichprog import SpecError, UnknownNameError
from ichprog.spec import ModelSpec

from support import reference_pipeline

SPEC = {s.name: s for s in ichprog.list_models()}["densenet121.prognosis_gcs3_age"]


def changed(path, value):
    """The fields of a good spec with one of them changed, or removed where `value` is `KeyError`."""
    data = json.loads(json.dumps(SPEC.to_dict()))
    *inner, last = path
    place = data
    for key in inner:
        place = place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return data


def paths(data, prefix=()):
    """Every field of nested objects."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(data, dict):
            yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*prefix, key))


FREE = ("options", "expected_ranges", "keys", "sha256")  # mappings whose keys are not fields
FIELDS = [p for p in paths(SPEC.to_dict()) if not any(key in FREE for key in p[:-1])]


def test_a_spec_survives_json():
    assert ModelSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


@pytest.mark.parametrize("path", FIELDS, ids=lambda p: ".".join(map(str, p)))
def test_every_field_is_needed(path):
    with pytest.raises(SpecError, match=f"missing field .*{path[-1]}"):
        ModelSpec.from_dict(changed(path, KeyError))


@pytest.mark.parametrize(
    "path", [(), ("input",), ("input", "window"), ("tasks", 0), ("tasks", 1, "head"), ("weights",), ("licence",)]
)
def test_no_field_is_made_up(path):
    with pytest.raises(SpecError, match=r"unknown field .*colour"):
        ModelSpec.from_dict(changed((*path, "colour"), "red"))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("name",), 3, "name: must be a str, is 3"),
        (("input", "shape"), [40, 301], r"input.shape: must have 3 entries, has 2"),
        (("input", "shape"), [40, 301, 301.5], r"input.shape\[2\]: must be a int"),
        (("input", "shape"), [40, 0, 301], "positive"),
        (("input", "window", "above"), "clip", "must be one of"),
        (("input", "window", "high"), 10, "low must be below high"),
        (("input", "expected_ranges"), {"coverage": [220, 90]}, r"Expected \[lowest, highest\], got \[220.0, 90.0\]"),
        (("tasks",), [], "at least one task"),
        (("tasks", 1, "name"), "prognosis", "each name once"),
        (("tasks", 0, "labels"), ["good"], "two or more"),
        (("tasks", 0, "labels"), ["good", "good"], "different"),
        (("tasks", 0, "threshold"), 1.5, "between 0 and 1"),
        (("tasks", 0, "loss_weight"), 0, "must be positive"),
        (("tasks", 0, "loss_weight"), float("nan"), "must be a float"),
        (("weights", "revision"), "main", "40 hex digits"),
        (("weights", "repo"), None, "both or neither"),
        (("weights", "format"), "onnx", "must be one of"),
        (("input", "brain_only"), 1, "must be a bool"),
        (("backbone",), "densenet121", "must be an object"),
    ],
)
def test_what_is_against_the_rules_is_said(path, value, said):
    with pytest.raises(SpecError, match=said):
        ModelSpec.from_dict(changed(path, value))


@pytest.mark.parametrize(
    ("probabilities", "label"),
    [
        ((0.5, 0.3, 0.2), "13-15"),
        ((0.4, 0.3, 0.3), "9-12"),  # P(>0) is 0.6, P(>1) 0.3, and the most probable label another
        ((0.3, 0.15, 0.55), "3-8"),
        ((0.0, 1.0, 0.0), "9-12"),
    ],
)
def test_labels_in_order_are_decided_by_what_lies_beyond_them(probabilities, label):
    task = SPEC.task("gcs")
    assert task.decide(dict(zip(task.labels, probabilities, strict=True))) == label


def test_labels_without_order_are_decided_by_the_most_probable():
    task = ModelSpec.from_dict(changed(("tasks", 1, "threshold"), None)).task("gcs")
    assert task.decide({"13-15": 0.4, "9-12": 0.3, "3-8": 0.3}) == "13-15"


def test_an_unknown_task_names_those_there_are():
    with pytest.raises(UnknownNameError, match=r"Unknown task of .* 'gsc'.*Did you mean gcs"):
        SPEC.task("gsc")


def test_the_zoo_holds_the_published_models():
    specs = {spec.name: spec for spec in ichprog.list_models()}
    for name, (folder, _, _, tasks) in reference_pipeline.PUBLISHED.items():
        spec = specs[name]
        assert spec.weights.folder == folder
        assert tuple(task.name for task in spec.tasks) == tasks
        assert spec.weights.repo == "trustworthy-ai/MultitaskLearning_ICH_Prognosis"
        assert spec.weights.revision == "7698c8ac4775bb1bc9426b3ce64e2f49cb529f50"
        assert spec.backbone.name == name.split(".")[0]
        assert "none stated" in spec.licence.weights
        assert spec.licence.code == "MIT"
        said = " ".join(spec.limits)
        assert "one centre" in said
        assert "withdrawal of care" in said
        assert "research" in spec.notice
        assert "horizon" in said


def test_loss_weights_are_those_of_the_protocol():
    specs = {spec.name: [task.loss_weight for task in spec.tasks] for spec in ichprog.list_models("densenet121.*")}
    assert specs["densenet121.prognosis_gcs3_age"] == specs["densenet121.prognosis_gcs2_age"] == [0.4, 0.3, 0.3]
    assert specs["densenet121.prognosis_gcs3"] == specs["densenet121.prognosis_gcs2"] == [0.4, 0.3]
    assert specs["densenet121.prognosis_age"] == [0.5, 0.3]


def test_models_are_listed_by_pattern():
    assert [spec.name for spec in ichprog.list_models("perez*")] == ["perez2023.prognosis"]
    assert ichprog.list_models("none.*") == []
