"""Clinical values: fusions, predictions with any values known, training, maps and export."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import ichprog
from ichprog import (
    CohortError,
    InvalidValueError,
    PluginError,
    SpecError,
    UnknownNameError,
    networks,
    registry,
    testing,
    zoo,
)
from ichprog.cli import main
from ichprog.clinical import encode, leave_one_out, read_values
from ichprog.cohort import Cohort
from ichprog.spec import ClinicalValue, ModelSpec, PluginRef, Weights
from ichprog.train import PRESETS, TrainOptions, train

from support.cohorts import read_table, write_cohort
from support.phantoms import brain_hu

AGE = ClinicalValue("age", "years", 18, 110, 70, 15)
GCS = ClinicalValue("gcs", "points", 3, 15, 12, 4)


def fused_spec(plugin="film", **changes):
    """Return a small model whose outcome uses age and GCS."""
    base = zoo.find("compact.prognosis_gcs3_age")
    tasks = tuple(dataclasses.replace(task, uses_clinical=task.name == "prognosis") for task in base.tasks)
    contract = dataclasses.replace(base.input, shape=(8, 32, 32), expected_ranges={"no-blood": (None, None)})
    fields = {
        "name": "small.fused", "backbone": PluginRef("compact", {"width": 4}), "tasks": tasks, "input": contract,
        "clinical": (AGE, GCS), "fusion": PluginRef(plugin, {}), "golden_output": None,
        "weights": Weights(None, None, "", "safetensors", {}, {}),
    }  # fmt: skip
    return dataclasses.replace(base, **fields | changes)


@pytest.fixture(scope="module", params=["film", "concat"])
def folder(request, tmp_path_factory):
    """Return the folder of a fused model of two folds with random weights."""
    out, spec = tmp_path_factory.mktemp("model"), fused_spec(request.param)
    (out / "config.json").write_text(json.dumps(spec.to_dict()))
    for fold in range(2):
        torch.manual_seed(fold)
        network = networks.build(spec)
        for name, parameter in network.named_parameters():
            if name.startswith("fusion"):
                torch.nn.init.normal_(parameter, std=0.3)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, out / f"fold{fold}.safetensors")
    return out


@pytest.fixture(scope="module")
def model(folder):
    return ichprog.load_model(f"local-dir:{folder}", runtime="torch")


@pytest.fixture(scope="module")
def scan():
    return nib.Nifti1Image(brain_hu((96, 96, 20), (60, 40, 10)), np.diag([-2.2, -2.2, 7.0, 1.0]))


@pytest.mark.parametrize("name", registry.fusions.names())
def test_every_fusion_keeps_the_contract(name):
    testing.check_fusion(name)


def test_a_fusion_that_reads_missing_values_is_refused():
    class Careless(torch.nn.Module):
        def __init__(self, channels, values):
            super().__init__()
            self.linear = torch.nn.Linear(values, channels)

        def forward(self, features, values, known):
            return features + (self.linear(values) + known.sum())[..., None, None, None]

    registry.register_fusion("careless", Careless)
    try:
        with pytest.raises(PluginError, match="a missing value changes the result"):
            testing.check_fusion("careless")
    finally:
        registry.fusions.unregister("careless")


def test_any_values_may_be_missing_and_the_answer_says_which(model, scan):
    nothing = ichprog.predict(model, scan)
    assert nothing.clinical.used == {}
    assert nothing.clinical.missing == ("age", "gcs")
    some = ichprog.predict(model, scan, clinical={"age": 71, "gcs": None})
    both = ichprog.predict(model, scan, clinical={"age": 71, "gcs": 9})
    assert (some.clinical.used, some.clinical.missing) == ({"age": 71.0}, ("gcs",))
    assert (both.clinical.used, both.clinical.missing) == ({"age": 71.0, "gcs": 9.0}, ())
    answers = [each["prognosis"].probabilities["poor"] for each in (nothing, some, both)]
    assert len(set(answers)) == 3
    for task in ("gcs", "age"):  # these see the image alone
        assert nothing[task].probabilities == both[task].probabilities
    assert json.loads(json.dumps(both.to_dict()))["clinical"]["used"] == {"age": 71.0, "gcs": 9.0}


def test_contributions_are_log_odds_with_a_value_less_those_without(model, scan):
    def log_odds(**clinical):
        p = ichprog.predict(model, scan, clinical=clinical)["prognosis"].probabilities["poor"]
        return np.log(p / (1 - p))

    found = ichprog.predict(model, scan, clinical={"age": 80, "gcs": 5}).clinical.contributions
    assert list(found) == ["prognosis"]
    assert found["prognosis"]["age"] == pytest.approx(log_odds(age=80, gcs=5) - log_odds(gcs=5), abs=1e-5)
    assert found["prognosis"]["gcs"] == pytest.approx(log_odds(age=80, gcs=5) - log_odds(age=80), abs=1e-5)


def test_the_network_sees_values_in_units_of_the_spec(model):
    """The prediction equals that of the torch module, fed by hand."""
    spec = model.spec
    grid = np.random.default_rng(0).random((1, *spec.input.shape), np.float32)
    values = torch.tensor([[(85 - 70) / 15, 0.0, 1.0, 0.0]])
    with torch.no_grad():
        expected = model.torch_module(0).outputs(torch.from_numpy(grid)[None], values)["prognosis"][1].numpy()
    np.testing.assert_allclose(encode(spec, {"age": 85.0}), values.numpy()[0])
    found = model.predict_grids(grid, encode(spec, {"age": 85.0})[None])[0]["prognosis"].probabilities
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_openvino_gives_the_same_answers_and_maps(folder, model, scan, tmp_path):
    compiled = ichprog.load_model(f"local-dir:{folder}", runtime="openvino", cache_dir=tmp_path)
    clinical = {"age": 40, "gcs": 14}
    first, second = (ichprog.predict(each, scan, clinical=clinical) for each in (model, compiled))
    for task in first:
        for label, p in first[task].probabilities.items():
            assert second[task].probabilities[label] == pytest.approx(p, abs=1e-5)
    assert second.clinical.contributions["prognosis"] == pytest.approx(
        first.clinical.contributions["prognosis"], abs=1e-4
    )
    for method in ("guided_backprop", "grad_cam"):
        maps = [ichprog.explain(each, scan, method=method, clinical=clinical).grid_map for each in (model, compiled)]
        np.testing.assert_allclose(maps[1], maps[0], atol=1e-5 * max(1.0, float(np.abs(maps[0]).max())))


def test_a_map_holds_the_values_fixed(model, scan):
    maps = {
        years: ichprog.explain(model, scan, method="guided_backprop", clinical={"age": years}) for years in (20, 100)
    }
    assert not np.array_equal(maps[20].grid_map, maps[100].grid_map)
    assert maps[20].provenance["clinical"] == {"age": 20.0}
    image_alone = [
        ichprog.explain(model, scan, task="age", method="guided_backprop", clinical={"age": years}).grid_map
        for years in (20, 100)
    ]
    np.testing.assert_array_equal(*image_alone)
    assert model.torch_module(0).fixed_clinical is None


def test_the_rows_of_a_cohort_have_their_own_values(model, tmp_path):
    cohort = Cohort.read(write_cohort(tmp_path))
    few = dataclasses.replace(cohort, patients=cohort.patients[:3])
    answers = ichprog.predict(model, few, brain="given")
    assert answers[0].clinical.missing == ("gcs",)  # every third GCS is blank
    assert answers[1].clinical.used == {"age": 60.0, "gcs": 5.0}
    with pytest.raises(InvalidValueError, match="one value: in the table or as `clinical`"):
        ichprog.predict(model, few, brain="given", clinical={"age": 50})


def test_the_command_explains_the_rows_of_a_table_with_their_values(folder, model, tmp_path):
    write_cohort(tmp_path)
    table = tmp_path / "cohort.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:3]))  # the second patient has an age and a GCS
    call = ["explain", str(table), "--model", f"local-dir:{folder}", "--runtime", "torch", "--brain", "given", "--json"]
    done = CliRunner().invoke(main, [*call, "-o", str(tmp_path / "maps")])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert [row["provenance"]["clinical"] for row in rows] == [{"age": 85.0}, {"age": 60.0, "gcs": 5.0}]


@pytest.mark.parametrize(
    ("clinical", "error", "message"),
    [
        ({"gcs": 2}, InvalidValueError, "Invalid gcs 2. Expected a number from 3 to 15 points"),
        ({"gcs": 16}, InvalidValueError, "Expected a number from 3 to 15 points"),
        ({"age": -1}, InvalidValueError, "Invalid age -1. Expected a number from 18 to 110 years"),
        ({"age": 150}, InvalidValueError, "18 to 110 years"),
        ({"age": "old"}, InvalidValueError, "Invalid age 'old'. Expected a number"),
        ({"gsc": 9}, UnknownNameError, "gcs"),
    ],
    ids=["low", "high", "negative", "too old", "text", "unknown"],
)
def test_wrong_values_are_refused_in_units(model, scan, clinical, error, message):
    with pytest.raises(error, match=message):
        ichprog.predict(model, scan, clinical=clinical)


def test_a_model_of_the_image_alone_takes_no_values(scan):
    with pytest.raises(UnknownNameError, match="The model uses the image alone"):
        ichprog.predict("compact.prognosis_gcs3_age", scan, clinical={"age": 70})


def test_leave_one_out_encodes_every_pattern():
    spec = fused_spec()
    rows = leave_one_out(spec, read_values(spec, {"gcs": "9", "age": 70.0}))
    np.testing.assert_allclose(rows, [[0, -0.75, 1, 1], [0, -0.75, 0, 1], [0, 0, 1, 0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": None}, "2 values, no fusion, 1 tasks"),
        ({"clinical": ()}, "0 values, a fusion"),
        ({"clinical": (AGE, AGE)}, "Expected different ones"),
        ({"clinical": (dataclasses.replace(AGE, scale=0),)}, "scale > 0"),
        ({"clinical": (dataclasses.replace(AGE, lowest=200),)}, "lowest < highest"),
        (
            {"tasks": tuple(dataclasses.replace(task, uses_clinical=True) for task in fused_spec().tasks)},
            "would predict itself",
        ),
    ],
    ids=["no fusion", "no values", "repeated", "scale", "range", "leak"],
)
def test_specs_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        fused_spec(**changes)


def test_a_spec_survives_its_json():
    spec = fused_spec()
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_training_learns_a_value_and_to_do_without_it(tmp_path):
    """The outcome follows from the age alone; half of the ages are hidden in training."""
    cohort = Cohort.read(write_cohort(tmp_path))
    patients = tuple(
        dataclasses.replace(p, columns={**p.columns, "age": "90" if p.columns["poor_outcome"] == "1" else "40"})
        for p in cohort.patients
    )
    cohort = dataclasses.replace(cohort, patients=patients)
    spec = fused_spec(tasks=fused_spec().tasks[:1], clinical=(AGE,))
    protocol = PRESETS["default"].replace(
        epochs=12, warmup_epochs=1, batch_size=4, learning_rate=1e-2, validation_fraction=0.2, clinical_omission=0.5
    )
    out = train(
        cohort, spec, tmp_path / "run", folds=2, only_folds=[0], protocol=protocol,
        options=TrainOptions(brain="given", cache_dir=tmp_path / "c"),
    )  # fmt: skip
    tested = read_table(out / "out_of_fold.csv")
    poor = [float(row["prognosis_poor"]) for row in tested if row["prognosis_true"] == "poor"]
    good = [float(row["prognosis_poor"]) for row in tested if row["prognosis_true"] == "good"]
    assert min(poor) > max(good)
    trained = ichprog.load_model(f"local-dir:{out}", runtime="torch")
    assert trained.check_golden_output()["state"] == "holds"
    with_age, without = (
        ichprog.predict(trained, patients[1].scan, brain="given", clinical=c) for c in ({"age": 90}, {})
    )
    assert with_age.clinical.contributions["prognosis"]["age"] > 0.5
    assert without["prognosis"].probabilities["poor"] < with_age["prognosis"].probabilities["poor"]
    assert "if known, age" in trained.spec.summary


def test_training_needs_the_column_and_allowed_values(tmp_path):
    cohort = Cohort.read(write_cohort(tmp_path))
    options = TrainOptions(brain="given", cache_dir=tmp_path / "c")
    spec = fused_spec(tasks=fused_spec().tasks[:1], clinical=(dataclasses.replace(AGE, column="nihss"),))
    with pytest.raises(UnknownNameError, match="nihss"):
        train(cohort, spec, tmp_path / "run", folds=2, options=options)
    narrow = fused_spec(tasks=fused_spec().tasks[:1], clinical=(dataclasses.replace(AGE, highest=70),))
    with pytest.raises(CohortError, match="age of patient P00"):
        train(cohort, narrow, tmp_path / "run", folds=2, options=options)


def test_the_onnx_network_has_a_second_input(folder, model, tmp_path):
    import openvino

    from ichprog.export import export

    path = export(f"local-dir:{folder}", tmp_path / "exported", format="onnx")
    file = next(path.glob("*.onnx")) if path.is_dir() else path
    network = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    grid = np.random.default_rng(1).random((1, *model.spec.input.shape), np.float32)
    clinical = encode(model.spec, {"gcs": 6.0})[None]
    found = network({"grid": grid[None], "clinical": clinical})["prognosis"]
    expected = np.mean([fold["prognosis"].probabilities for fold in model.predict_grids(grid, clinical)], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_command_takes_values_and_shows_what_they_changed(folder, scan, tmp_path):
    path = tmp_path / "scan.nii.gz"
    scan.to_filename(path)
    call = ["predict", str(path), "--model", f"local-dir:{folder}", "--runtime", "torch"]
    done = CliRunner().invoke(main, [*call, "--clinical", "age=71", "-o", str(tmp_path / "out.csv")])
    assert done.exit_code == 0, done.output
    assert "clinical values: age 71 (log-odds of prognosis " in done.output
    assert "not known: gcs" in done.output
    (row,) = read_table(tmp_path / "out.csv")
    assert float(row["clinical_age"]) == 71
    assert row["clinical_gcs"] == ""
    assert float(row["prognosis_change_age"]) != 0
    wrong = CliRunner().invoke(main, [*call, "--clinical", "gcs=16"])
    assert wrong.exit_code == 2
    assert "3 to 15 points" in wrong.output
    call = ["predict", str(path), "--model", "compact.prognosis_gcs3_age", "--clinical", "age=71"]
    alone = CliRunner().invoke(main, call)
    assert alone.exit_code == 2
    assert "or a model with clinical values" in alone.output
