"""Specs are read strictly, upgraded from older versions and described by a JSON Schema."""

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

import ichprog
from ichprog import SpecError, UnknownNameError, zoo
from ichprog.spec import ModelSpec, model_schema

from support import reference_pipeline

SPEC = {s.name: s for s in ichprog.list_models()}["densenet121.prognosis_gcs3_age"]


def changed(path, value):
    """Return the fields of a valid spec with one of them changed, or removed if `value` is `KeyError`."""
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
    """Yield the path of every field of nested objects."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(data, dict):
            yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*prefix, key))


FREE = ("options", "keys", "sha256", "expected_ranges")  # mappings whose keys are not fields
FIELDS = [
    path for path in paths(SPEC.to_dict())
    if not any(key in FREE for key in path[:-1]) and path[0] not in ("schema_version", "requires")
]  # fmt: skip
DATA = Path(__file__).parent / "data"


def test_a_spec_equals_itself_after_json():
    assert ModelSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


@pytest.mark.parametrize("path", FIELDS, ids=lambda p: ".".join(map(str, p)))
def test_every_field_is_required(path):
    with pytest.raises(SpecError, match=f"Missing key .*{path[-1]}"):
        ModelSpec.from_dict(changed(path, KeyError))


@pytest.mark.parametrize(
    "path", [(), ("input",), ("input", "window"), ("tasks", 0), ("tasks", 1, "head"), ("weights",), ("licence",)]
)
def test_an_unknown_field_is_refused(path):
    with pytest.raises(SpecError, match=r"Unknown key .*'colour'.* Expected one of: "):
        ModelSpec.from_dict(changed((*path, "colour"), "red"))


def test_an_unknown_field_comes_with_the_nearest_one():
    with pytest.raises(
        SpecError, match=r"Unknown key of input\.window 'hihg'\. Did you mean high\? Expected one of: low"
    ):
        ModelSpec.from_dict(changed(("input", "window", "hihg"), 100))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("name",), 3, "Invalid name 3. Expected a string"),
        (("input", "shape"), [40, 301], r"Invalid input.shape \[40, 301\]. Expected a list of 3 entries"),
        (("input", "shape"), [40, 301, 301.5], r"Invalid input.shape\[2\] 301.5. Expected a whole number"),
        (("input", "shape"), [40, 0, 301], r"Invalid input.shape \[40, 0, 301\]. Expected positive numbers"),
        (("input", "window", "above"), "clip", "Invalid input.window.above 'clip'. Expected 'zero' or 'one'"),
        (("input", "window", "high"), 10, r"Invalid input.window \[15.0, 10.0\]. Expected low < high"),
        (
            ("input", "expected_ranges"),
            {"coverage": [20, 7]},
            r"expected_ranges.coverage \[20.0, 7.0\]. Expected \[low",
        ),
        (("input", "expected_ranges"), {"coverage": 20}, "Invalid input.expected_ranges.coverage 20. Expected a list"),
        (("tasks",), [], "one or more tasks"),
        (("tasks", 1, "name"), "prognosis", "different names"),
        (("tasks", 0, "labels"), ["good"], r"labels \['good'\]. Expected two or more different labels"),
        (("tasks", 0, "labels"), ["good", "good"], "two or more different labels"),
        (("tasks", 1, "target", "bin_edges"), [9, 13], r"bin_edges \[9.0, 13.0\]. Expected 2 decreasing numbers"),
        (("tasks", 1, "target", "bin_edges"), [13], "Expected 2 decreasing numbers for 3 labels"),
        (("tasks", 0, "threshold"), 1.5, "Invalid tasks.prognosis.threshold 1.5. Expected a number between 0 and 1"),
        (("tasks", 0, "loss_weight"), 0, "Expected a positive number"),
        (("tasks", 0, "loss_weight"), float("nan"), r"Invalid tasks\[0\].loss_weight nan. Expected a finite number"),
        (("weights", "revision"), "main", "Invalid weights.revision 'main'. Expected a commit of 40 hex digits"),
        (("weights", "repo"), None, "both repo and revision"),
        (("weights", "format"), "onnx", "Invalid weights.format 'onnx'. Expected 'pickle' or 'safetensors'"),
        (("input", "brain_only"), 1, "Invalid input.brain_only 1. Expected true or false"),
        (("backbone",), "densenet121", "Invalid backbone 'densenet121'. Expected an object"),
        (("schema_version",), "1", "Invalid schema_version '1'. Expected a whole number up to 1"),
    ],
)
def test_an_invalid_value_is_refused(path, value, message):
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_dict(changed(path, value))


def test_a_version_1_spec_can_be_read_for_ever():
    """The file is frozen: a new version of the format adds an upgrade, and never changes this file."""
    data = json.loads((DATA / "model-v1.json").read_text())
    spec = ModelSpec.from_dict(data)
    assert data["schema_version"] == 1
    assert {key: value for key, value in spec.to_dict().items() if key in data} == data
    assert ModelSpec.read(DATA / "model-v1.json") == spec


def test_a_version_0_spec_is_upgraded():
    data = json.loads((DATA / "model-v0.json").read_text())
    assert "schema_version" not in data
    spec = ModelSpec.from_dict(data)
    ranges = spec.input.expected_ranges
    assert spec.task("gcs").target == SPEC.task("gcs").target
    assert (ranges["brain-volume"], ranges["no-blood"], ranges["obliquity"]) == ((700, 2000), (1, None), (0, 25))
    assert spec.golden_output == SPEC.golden_output
    data["tasks"][0]["target"]["cuts"] = [1, 2]
    with pytest.raises(SpecError, match="Expected 1 increasing numbers for 2 labels"):
        ModelSpec.from_dict(data)


def test_a_newer_version_is_refused_with_the_version_of_ichprog_that_reads_it():
    newer = SPEC.to_dict() | {"schema_version": 2, "requires": "ichprog>=0.7", "new_field": 1}
    with pytest.raises(SpecError, match=r"schema_version 2\. .* up to 1; .* needs ichprog>=0\.7\. Run: pip install"):
        ModelSpec.from_dict(newer)


def test_the_shipped_model_schema_is_current():
    """Otherwise run `ichprog spec --schema model > ichprog/schemas/model.schema.json`."""
    assert json.loads(files("ichprog").joinpath("schemas/model.schema.json").read_text()) == model_schema()


def test_every_spec_of_the_zoo_is_valid_by_the_schema():
    validator = jsonschema.Draft202012Validator(model_schema())
    validator.check_schema(model_schema())
    for entry in (entry for entry in zoo.entries() if entry.distribution == "ichprog"):
        validator.validate(json.loads(entry.target.read_text()))
    validator.validate(json.loads((DATA / "model-v1.json").read_text()))


@pytest.mark.parametrize(
    ("path", "value"),
    [(("colour",), 1), (("input", "window", "above"), "clip"), (("tasks", 0, "labels"), KeyError), (("name",), 3)],
)
def test_the_schema_refuses_what_the_reader_refuses(path, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(path, value), model_schema())


@pytest.mark.parametrize(
    ("probabilities", "label"),
    [
        ((0.5, 0.3, 0.2), "13-15"),
        ((0.4, 0.3, 0.3), "9-12"),  # P(>0) is 0.6 and P(>1) 0.3; another label is the most probable
        ((0.3, 0.15, 0.55), "3-8"),
        ((0.0, 1.0, 0.0), "9-12"),
    ],
)
def test_ordered_labels_are_decided_by_the_threshold(probabilities, label):
    task = SPEC.task("gcs")
    assert task.decide(dict(zip(task.labels, probabilities, strict=True))) == label


def test_unordered_labels_are_decided_by_the_highest_probability():
    task = ModelSpec.from_dict(changed(("tasks", 1, "threshold"), None)).task("gcs")
    assert task.decide({"13-15": 0.4, "9-12": 0.3, "3-8": 0.3}) == "13-15"


def test_an_unknown_task_lists_the_known_tasks():
    with pytest.raises(UnknownNameError, match=r"Unknown task of .* 'gsc'.*Did you mean gcs"):
        SPEC.task("gsc")


def test_the_zoo_contains_the_published_models():
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
        limits = " ".join(spec.limits)
        assert "one centre" in limits
        assert "withdrawal of care" in limits
        assert "research" in spec.notice
        assert "horizon" in limits


def test_loss_weights_are_as_published():
    specs = {spec.name: [task.loss_weight for task in spec.tasks] for spec in ichprog.list_models("densenet121.*")}
    assert specs["densenet121.prognosis_gcs3_age"] == specs["densenet121.prognosis_gcs2_age"] == [0.4, 0.3, 0.3]
    assert specs["densenet121.prognosis_gcs3"] == specs["densenet121.prognosis_gcs2"] == [0.4, 0.3]
    assert specs["densenet121.prognosis_age"] == [0.5, 0.3]


def test_models_are_listed_by_pattern():
    assert [spec.name for spec in ichprog.list_models("perez*")] == ["perez2023.prognosis"]
    assert ichprog.list_models("none.*") == []
