"""Adding a model to the zoo takes one JSON file and affects no other model."""

import json

import pytest
from click.testing import CliRunner

import ichprog
from ichprog import zoo
from ichprog.cli import main
from ichprog.study import Study, template

NAME = "perez2023.scratch"


@pytest.fixture
def scratch_model(tmp_path, monkeypatch):
    """Add a model on another repository to the zoo, as one JSON file of an installed package."""
    package = tmp_path / "scratch_zoo"
    package.mkdir()
    (package / "__init__.py").touch()
    spec = zoo.find("perez2023.prognosis").to_dict()
    spec |= {"name": NAME, "weights": spec["weights"] | {"repo": "org/scratch", "revision": "0" * 40}}
    (package / f"{NAME}.json").write_text(json.dumps(spec))
    info = tmp_path / "scratch_zoo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scratch-zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ichprog.models]\nscratch = scratch_zoo\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return NAME


def test_a_new_model_is_listed_found_and_printed(scratch_model):
    assert scratch_model in [spec.name for spec in ichprog.list_models()]
    assert zoo.find(scratch_model).weights.repo == "org/scratch"
    listed = CliRunner().invoke(main, ["models"]).stdout
    assert any(line.startswith(f"{scratch_model} ") for line in listed.splitlines())
    printed = CliRunner().invoke(main, ["spec", scratch_model]).stdout
    assert json.loads(printed) == zoo.find(scratch_model).to_dict()


def test_a_new_model_on_another_repository_fails_to_fetch_alone(scratch_model, hub_server):
    result = CliRunner().invoke(main, ["fetch", scratch_model, "perez2023.prognosis", "--json"])
    assert result.exit_code == 1
    assert {json.loads(line)["model"] for line in result.stdout.splitlines()} == {"perez2023.prognosis"}
    assert f"{scratch_model}: hf-hub:org/scratch" in result.stderr


def test_a_new_model_leaves_the_study_templates_unchanged(scratch_model, tmp_path):
    (tmp_path / "study.toml").write_text(template("paper"))
    assert scratch_model not in {variant.spec.name for variant in Study.read(tmp_path / "study.toml").variants}


def test_spec_prints_a_json_object_that_can_be_edited_and_read(tmp_path):
    printed = json.loads(CliRunner().invoke(main, ["spec", "densenet121.age"]).stdout)
    edited = printed | {"name": "densenet121.mine", "summary": "Edited."}
    assert ichprog.ModelSpec.from_dict(edited).summary == "Edited."
    for schema in ("model", "study"):
        assert json.loads(CliRunner().invoke(main, ["spec", "--schema", schema]).stdout)["type"] == "object"
    assert CliRunner().invoke(main, ["spec", "densenet121.agee"]).exit_code == 2
    assert CliRunner().invoke(main, ["spec"]).exit_code == 2
