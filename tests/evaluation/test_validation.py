"""External validation: events, decision curves, subgroups, a second model, and refusals before any scan is read."""

import dataclasses
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from sklearn.metrics import brier_score_loss, roc_auc_score

import ichprog
from ichprog import CohortError, InvalidValueError, SpecError, UnknownNameError, registry, zoo
from ichprog.cli import main
from ichprog.cli.evaluate import evaluate as command
from ichprog.cohort import Cohort
from ichprog.evaluation import evaluate, validation
from ichprog.evaluation.predictions import TaskPredictions
from ichprog.evaluation.report import tripod_facts
from ichprog.metrics import comparisons
from ichprog.reporting import tripod

from support.models import fill_heads, local_model, mean_backbone
from support.predictions import three_labels, two_labels

pytestmark = pytest.mark.usefixtures("one_thread")


def predictions_of(truth, probabilities):
    names = tuple(f"P{number}" for number in range(len(truth)))
    return TaskPredictions(names, np.zeros(len(truth), int), truth, probabilities)


def task(name):
    return zoo.find("densenet121.prognosis_gcs3_age").task(name)


# figures of an event


def test_an_event_of_ordered_labels_is_a_label_or_a_later_one():
    truth, p = three_labels(80)
    events = validation.validate_events(task("gcs"), predictions_of(truth, p), n_bootstrap=20)
    assert [each.event for each in events] == ["9-12 or later", "3-8"]
    for k, each in enumerate(events, start=1):
        tail = p[:, k:].sum(axis=1)
        assert each.metrics["auroc"]["value"] == pytest.approx(roc_auc_score(truth >= k, tail))
        assert each.metrics["brier"]["value"] == pytest.approx(brier_score_loss(truth >= k, tail))
        assert each.counts == {
            "patients": 80,
            "observed": (truth >= k).sum(),
            "expected": pytest.approx(tail.sum()),
        }


def test_the_decision_curve_is_net_benefit_compared_with_all_and_none():
    truth, p = two_labels(70)
    (event,) = validation.validate_events(
        task("prognosis"), predictions_of(truth, np.stack([1 - p, p], 1)), n_bootstrap=5
    )
    curve = event.decision_curve
    for index in (9, 49, 79):
        t = curve["thresholds"][index]
        hits, false_alarms = (truth[p > t] == 1).sum(), (truth[p > t] == 0).sum()
        assert curve["model"][index] == pytest.approx((hits - false_alarms * t / (1 - t)) / 70)
        assert curve["all"][index] == pytest.approx(truth.mean() - (1 - truth.mean()) * t / (1 - t))
    better = [
        t for t, own, everyone in zip(curve["thresholds"], curve["model"], curve["all"], strict=True)
        if own > max(everyone, 0) + 1e-12
    ]  # fmt: skip
    ranges = validation.better_thresholds(curve)
    assert {t for t in curve["thresholds"] if any(low <= t <= high for low, high in ranges)} == set(better)
    gaps = np.diff([limit for span in ranges for limit in span])[1::2]
    assert (gaps > 0.015).all(), "neighbouring ranges are one"
    useless = curve | {"model": np.minimum(curve["all"], 0)}
    assert validation.better_thresholds(useless) == []


def test_recalibration_repairs_a_shifted_model_on_patients_it_was_not_fitted_to():
    random = np.random.default_rng(0)
    x = random.normal(0, 1.2, 300)
    truth, p = (random.random(300) < 1 / (1 + np.exp(-x))).astype(int), 1 / (1 + np.exp(-(2 * x + 1.5)))
    (event,) = validation.validate_events(
        task("prognosis"), predictions_of(truth, np.stack([1 - p, p], 1)), n_bootstrap=20
    )
    intercept, both = event.recalibrations
    assert abs(intercept.metrics["calibration_intercept"]["value"]) < 0.1
    assert intercept.metrics["calibration_slope"]["value"] == pytest.approx(
        event.metrics["calibration_slope"]["value"], abs=0.05
    )
    assert both.metrics["calibration_slope"]["value"] == pytest.approx(1, abs=0.1)
    assert both.metrics["brier"]["value"] < event.metrics["brier"]["value"]
    assert both.metrics["brier"]["value"] == pytest.approx(brier_score_loss(truth, both.probabilities))
    assert both.patients_needed <= 50
    assert both.calibration["count"].sum() == 300


def test_too_few_patients_of_an_outcome_have_no_recalibration():
    truth = np.array([1, 0, 0, 0])
    p = np.array([[0.2, 0.8], [0.6, 0.4], [0.7, 0.3], [0.1, 0.9]])
    (event,) = validation.validate_events(
        task("prognosis"), predictions_of(truth, p), targets=[("sensitivity", 0.9)], n_bootstrap=5
    )
    assert event.recalibrations == ()
    assert event.operating_points[0]["cross_fitted"] is None
    (none,) = validation.validate_events(
        task("prognosis"), predictions_of(truth * 0, p), targets=[("sensitivity", 0.9)], n_bootstrap=5
    )
    assert none.operating_points == ()


# a model on a cohort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a table of 14 patients with small scans whose poor outcomes have more blood."""
    root = tmp_path_factory.mktemp("patients")
    random = np.random.default_rng(0)
    rows = ["patient,scan,poor_outcome,gcs,age,sex,site"]
    for number in range(14):
        poor = number % 2
        i, j, k = np.ogrid[:48, :48, :20]
        brain = ((i - 24) / 15) ** 2 + ((j - 24) / 18) ** 2 + ((k - 10) / 9) ** 2 <= 1
        size = random.uniform(4, 8) + 2 * poor
        blood = ((i - 20) / size) ** 2 + ((j - 28) / size) ** 2 + ((k - 10) / 5) ** 2 <= 1
        hu = np.where(brain, np.where(blood, 68, 33) + 4 * random.standard_normal(brain.shape), 0)
        nib.Nifti1Image(hu.round().astype(np.int16), np.diag([-4.5, -4.5, 7, 1])).to_filename(root / f"{number}.nii.gz")
        outcome = "" if number == 5 else poor
        sex = "" if number == 3 else "FM"[number % 3 == 0]
        rows.append(f"N{number},{number}.nii.gz,{outcome},{15 - 6 * poor},{60 + number},{sex},")
    (root / "cohort.csv").write_text("\n".join(rows))
    return root


@pytest.fixture
def models(tmp_path):
    """Return the names of two models of three tasks that differ in their heads."""
    ichprog.register_backbone("mean", mean_backbone)
    yield [
        local_model(tmp_path / name, "mean", shape=(20, 48, 48), adjust=lambda state, at=at: fill_heads(state, *at))
        for name, at in {"one": (30.0, -1.0), "two": (-9.0, 0.4)}.items()
    ]
    registry.backbones.unregister("mean")


def load(name):
    return ichprog.load_model(name, runtime="torch")


def test_everything_of_an_external_validation_is_reported(folder, models, tmp_path):
    cohort = Cohort.read(folder / "cohort.csv")
    found = evaluate(
        load(models[0]), cohort, brain="given", n_bootstrap=20, subgroups=["sex"], at_sensitivity=[0.9],
        at_specificity=[0.8, 1], compare=load(models[1]),
    )  # fmt: skip
    own = found.labelled("prognosis")
    (event,) = found.events["prognosis"]
    assert [(point["rate"], point["required"]) for point in event.operating_points] == [
        ("sensitivity", 0.9),
        ("specificity", 0.8),
        ("specificity", 1.0),
    ]
    assert found.missing_labels == {"prognosis": 1, "gcs": 0, "age": 0}

    rows = [row for row in found.subgroups if row["task"] == "prognosis"]
    sex = {patient.name: patient.columns["sex"] or "blank" for patient in cohort.patients}
    for row in rows:
        members = [sex[name] == row["group"] for name in own.patients]
        assert row["patients"] == sum(members)
        assert row["with_last_label"] == own.truth[members].sum()
    assert [row["group"] for row in rows] == ["F", "M", "blank"]
    assert sum(row["patients"] for row in rows) == len(own) == 13
    group_f = own.select(np.array([sex[name] == "F" for name in own.patients]))
    assert rows[0]["auroc"]["value"] == pytest.approx(roc_auc_score(group_f.truth, group_f.probabilities[:, 1]))

    second = found.predictions.entries[f"{found.model.name} (second)", "prognosis", "test"].labelled()
    assert second.patients == own.patients
    expected = comparisons.compare(
        own.truth, own.probabilities, second.probabilities, kind="binary", n_bootstrap=20, seed=0
    )
    rows = found.comparison.rows["prognosis"]
    assert rows["auroc"] == expected["auroc"]
    assert rows["brier"] == expected["brier"]
    assert rows["auroc"]["difference"] == pytest.approx(
        roc_auc_score(own.truth, own.probabilities[:, 1]) - roc_auc_score(own.truth, second.probabilities[:, 1])
    )
    assert found.comparison.patients == {"prognosis": 13, "gcs": 14, "age": 14}

    found.write(tmp_path / "out")
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert written["subgroups"][0]["group"] == "F"
    assert written["comparison"]["patients"]["age"] == 14
    report = (tmp_path / "out/report.html").read_text()
    for words in ("Operating points", "cross-fitted", "Subgroups", "Comparison of models", "treat none", "TRIPOD+AI"):
        assert words in report, words
    assert "N13" not in report
    card = (tmp_path / "out/model_card_section.md").read_text()
    index = yaml.safe_load(card.split("---")[1])["model-index"][0]
    results = {
        (each["task"]["name"], metric["type"]): metric["value"]
        for each in index["results"]
        for metric in each["metrics"]
    }
    assert results["prognosis: poor", "roc_auc"] == pytest.approx(event.metrics["auroc"]["value"], abs=6e-4)
    assert "ichprog cannot know whether the model was trained on these patients" in card


@pytest.fixture
def no_prediction(monkeypatch):
    """Fail a test that predicts a scan."""

    def predict_iter(*_, **__):
        raise AssertionError("a scan was predicted")

    monkeypatch.setattr(ichprog.model.Model, "predict_iter", predict_iter)


@pytest.mark.parametrize("rate", [0, 1.2, -0.5, 95])
@pytest.mark.parametrize("argument", ["at_sensitivity", "at_specificity"])
def test_a_rate_outside_its_range_is_refused_at_once(argument, rate, folder, models, no_prediction):
    with pytest.raises(InvalidValueError, match=rf"Invalid {argument} {rate}. Expected a number above 0 and at most 1"):
        evaluate(models[0], folder / "cohort.csv", **{argument: [0.9, rate]})


def test_a_missing_or_blank_subgroup_column_is_refused_at_once(folder, models, no_prediction):
    with pytest.raises(UnknownNameError, match=r"Unknown column of .*'sexx'. Did you mean sex"):
        evaluate(models[0], folder / "cohort.csv", subgroups=["sexx"])
    with pytest.raises(InvalidValueError, match="Invalid subgroup column 'site'"):
        evaluate(models[0], folder / "cohort.csv", subgroups=["site"])


def test_a_model_is_not_compared_with_itself_even_in_another_folder(folder, models, tmp_path, no_prediction):
    with pytest.raises(InvalidValueError, match="Both have the same weights"):
        evaluate(load(models[0]), folder / "cohort.csv", compare=load(models[0]))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    with pytest.raises(InvalidValueError, match="Both have the same weights"):
        evaluate(load(models[0]), folder / "cohort.csv", compare=load(f"local-dir:{tmp_path / 'copy'}"))


def test_models_without_a_shared_task_are_not_compared(folder, models, no_prediction):
    first, second = load(models[0]), load(models[1])
    tasks = tuple(
        dataclasses.replace(each, labels=tuple(f"{label}?" for label in each.labels)) for each in second.spec.tasks
    )
    second.spec = dataclasses.replace(second.spec, tasks=tasks)
    with pytest.raises(SpecError, match="share no task with the same labels and column"):
        evaluate(first, folder / "cohort.csv", compare=second)


def test_patients_with_one_label_only_are_refused_at_once(folder, models, no_prediction):
    cohort = Cohort.read(folder / "cohort.csv")
    alike = tuple(
        dataclasses.replace(patient, columns={"poor_outcome": "1", "age": "60"}) for patient in cohort.patients
    )
    with pytest.raises(CohortError, match=r"no task has patients with two labels \(prognosis: 14 poor; age: 14 <80\)"):
        evaluate(load(models[0]), Cohort(alike, "alike.csv"))


def test_the_command_prints_operating_points_subgroups_and_the_comparison(folder, models, tmp_path, monkeypatch):
    monkeypatch.setitem(main.commands, "evaluate", command)
    options = ["--runtime", "torch", "--brain", "given", "--n-bootstrap", "10", "--at-sensitivity", "0.9"]
    options += ["--summary", str(tmp_path / "shared/north.json")]
    done = CliRunner().invoke(
        main, ["evaluate", models[0], str(folder / "cohort.csv"), *options, "--subgroup", "SEX", "--compare", models[1]]
    )
    assert done.exit_code == 0, done.output
    for words in (
        "prognosis: 7 are good, 6 are poor, 1 without a label",
        "poor at sensitivity 0.9, the same patients: threshold 0.",
        "poor at sensitivity 0.9, other patients (cross-fitted): threshold 0.",
        "poor, intercept and slope: slope",
        "patients needed: too few patients to say",
        "prognosis, SEX F: ",
        "compared with mean.prognosis_gcs3_age (second), on the same patients.",
        "difference",
    ):
        assert words in done.stdout, words
    summary = json.loads((tmp_path / "shared/north.json").read_text())
    assert summary["tasks"] == {}
    assert set(summary["withheld"]) == {"prognosis", "gcs", "age"}, "14 patients are too few"
    assert summary["weights"][0]["sha256"] == load(models[0]).weights[0].sha256
    wrong = CliRunner().invoke(main, ["evaluate", models[0], str(folder / "cohort.csv"), "--at-sensitivity", "95"])
    assert wrong.exit_code == 2
    assert "at most 1" in wrong.output


# the checklist


def test_the_checklist_of_an_evaluation_is_filled_from_its_facts():
    described = {
        "label_counts": {"prognosis": {"good": 2, "poor": 3}}, "labels_missing": {"prognosis": 1}, "patients": 7,
        "scored": 6, "left_out": 1, "failed": 0, "leakage": "Nothing is known.", "intervals": "95 % intervals",
        "metrics": {"prognosis": {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}}}, "cohort": "a/north.csv",
        "subgroups": [{"column": "sex"}], "comparison": None, "simulated": 0,
    }  # fmt: skip
    facts = tripod_facts(zoo.find("densenet121.prognosis_gcs3_age"), described)
    answers = {row["number"]: row["answer"] for row in tripod.fill_checklist(facts, kind="evaluation")}
    assert answers["12a"] == "Not applicable: the model was developed before."
    assert answers["5a"].startswith("north.csv, which served for evaluation only. Nothing is known.")
    assert "prognosis (good: 2, poor: 3)" in answers["20a"]
    assert "AUROC 0.800 (0.700 to 0.900)" in answers["23a"]
    assert "sex" in answers["14"]
    assert answers["17"] == "To be written by the authors."
    assert not any("{" in answer for answer in answers.values())
