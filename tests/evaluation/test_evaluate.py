"""Evaluation of a model on a cohort with leakage control."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import ichprog
from ichprog import CohortError, RunError, UnknownNameError, networks, registry, zoo
from ichprog.cli import main
from ichprog.cli.evaluate import evaluate as command
from ichprog.cohort import Cohort
from ichprog.evaluation import SEVERAL_FOLDS, Predictions, check_leakage
from ichprog.evaluation import evaluate as evaluate_model
from ichprog.spec import PluginRef
from ichprog.train import PRESETS, TrainOptions, train

from support import reference_pipeline
from support.cohorts import read_table
from support.hub_server import HubServer
from support.models import REPOSITORY, bright_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENTS = [f"P{number:02}" for number in range(24)]
TRAIN_ONLY = {"P05", "P17"}  # unknown outcome, known GCS
CANNOT = "ichprog cannot know"


def evaluate(name, cohort, *, fold=None, **options):
    """Evaluate with torch, as small networks are not worth compiling."""
    return evaluate_model(ichprog.load_model(name, fold=fold, runtime="torch"), cohort, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a table of 24 patients with small scans, and a table with three more."""
    root = tmp_path_factory.mktemp("patients")
    random = np.random.default_rng(0)
    rows = ["patient,scan,poor_outcome,gcs,age"]
    for number, name in enumerate([*PATIENTS, "Q0", "Q1", "Q2"]):
        poor = number % 3 != 0
        i, j, k = np.ogrid[:48, :48, :10]
        brain = ((i - 24) / 15) ** 2 + ((j - 24) / 18) ** 2 + ((k - 5) / 4.6) ** 2 <= 1
        size = random.uniform(5, 9) if poor else random.uniform(2, 6)
        blood = ((i - 20) / size) ** 2 + ((j - 28) / size) ** 2 + ((k - 5) / 2.5) ** 2 <= 1
        hu = np.where(brain, np.where(blood, 68, 33) + 4 * random.standard_normal(brain.shape), 0)
        nib.Nifti1Image(hu.round().astype(np.int16), np.diag([-4.5, -4.5, 14, 1])).to_filename(root / f"{name}.nii.gz")
        outcome = "" if name in TRAIN_ONLY else int(poor)
        rows.append(f"{name},{name}.nii.gz,{outcome},{random.integers(3, 16)},{85 if number % 4 == 0 else 60}")
    (root / "all.csv").write_text("\n".join(rows))
    (root / "cohort.csv").write_text("\n".join(rows[: len(PATIENTS) + 1]))
    return root


@pytest.fixture(scope="module")
def spec():
    found = zoo.find(zoo.DEFAULT)
    contract = dataclasses.replace(found.input, shape=(8, 24, 24), expected_ranges={"no-blood": (None, None)})
    return dataclasses.replace(found, name="small.three", backbone=PluginRef("compact", {"width": 4}), input=contract)


@pytest.fixture(scope="module")
def cohort(folder):
    return Cohort.read(folder / "cohort.csv")


@pytest.fixture(scope="module")
def run(folder, cohort, spec, tmp_path_factory):
    """Train a run of three folds."""
    changes = {"epochs": 3, "patience": 0, "batch_size": 8, "learning_rate": 0.02, "validation_fraction": 0.25}
    protocol = PRESETS["default"].replace(**changes)
    out = tmp_path_factory.mktemp("run") / "run"
    return train(cohort, spec, out, folds=3, protocol=protocol, options=TrainOptions(cache_dir=folder / "cache"))


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copied"))


def renamed(cohort, rename):
    """Return a cohort of the renamed patients."""
    kept = [dataclasses.replace(p, name=rename[p.name]) for p in cohort.patients if p.name in rename]
    return Cohort(tuple(kept), "other.csv")


def predicted(found, task):
    answers = found.predictions.entries[found.model.name, task, "test"]
    return {
        patient: (int(fold), p)
        for patient, fold, p in zip(answers.patients, answers.fold, answers.probabilities, strict=True)
    }


def out_of_fold(run, spec, task):
    labels = spec.task(task).labels
    rows = read_table(run / "out_of_fold.csv")
    return {
        row["patient"]: (int(row["fold"]), np.array([float(row[f"{task}_{label}"]) for label in labels]))
        for row in rows
    }


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for patient, (fold, p) in expected.items():
        assert found[patient][0] == fold, patient
        assert np.abs(found[patient][1] - p).max() < 1e-5, patient


# a model that was trained here


def test_every_patient_is_scored_out_of_fold(run, spec, cohort):
    from sklearn import metrics

    found = evaluate(f"local-dir:{run}", cohort)
    for task in ("prognosis", "gcs", "age"):
        assert_alike(predicted(found, task), out_of_fold(run, spec, task))
    assert set(found.left_out) == TRAIN_ONLY
    assert found.counts == {"patients": 24, "scored": 22, "left_out": 2, "unlabelled": 0, "failed": 0}
    assert found.leakage.source == "run"
    assert "trained on this table" in found.leakage.sentence
    assert "2 are left out" in found.leakage.sentence
    assert CANNOT not in found.leakage.sentence

    rows = read_table(run / "out_of_fold.csv")
    truth = [row["prognosis_true"] == "poor" for row in rows]
    p = np.array([float(row["prognosis_poor"]) for row in rows])
    figures = found.metrics["prognosis"]
    assert figures["auroc"]["value"] == pytest.approx(metrics.roc_auc_score(truth, p), abs=1e-9)
    assert figures["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(truth, p > 0.5))
    assert figures["brier"]["value"] == pytest.approx(metrics.brier_score_loss(truth, p), abs=1e-5)
    assert figures["auroc"]["low"] <= figures["auroc"]["value"] <= figures["auroc"]["high"]


def test_patients_of_the_run_are_matched_in_another_table_and_others_are_scored_by_all_folds(run, spec, folder):
    some = Cohort.read(folder / "all.csv")
    kept = {name: name for name in [*PATIENTS[:7], "Q0", "Q1", "Q2"]}
    found = evaluate(f"local-dir:{run}", renamed(some, kept))
    members = {name: out_of_fold(run, spec, "gcs")[name] for name in PATIENTS[:7] if name not in TRAIN_ONLY}
    scans = {p.name: p.scan for p in some.patients}
    model = ichprog.load_model(f"local-dir:{run}", runtime="torch")
    assert len(model.weights) == 3
    for name in ("Q0", "Q1", "Q2"):
        members[name] = SEVERAL_FOLDS, np.array(list(ichprog.predict(model, scans[name])["gcs"].probabilities.values()))
    assert_alike(predicted(found, "gcs"), members)
    assert found.left_out == ("P05",)
    for words in (
        "7 of 10 patients have names",
        "by name alone",
        "3 others are scored by the mean of its 3 folds",
        CANNOT,
    ):
        assert words in found.leakage.sentence


def test_patients_outside_the_run_are_scored_by_all_folds(run, folder):
    others = renamed(Cohort.read(folder / "all.csv"), {"Q0": "Q0", "Q1": "Q1"})
    found = evaluate(f"local-dir:{run}", others)
    assert [fold for fold, _ in predicted(found, "age").values()] == [SEVERAL_FOLDS, SEVERAL_FOLDS]
    assert found.leakage.sentence.startswith("None of the 2 patients has a name of the model's run")
    assert CANNOT in found.leakage.sentence


def test_a_name_with_the_prefix_of_a_joined_table_is_matched(run, spec, cohort):
    """`Cohort.join` adds the prefix if two tables have the same name."""
    found = evaluate(f"local-dir:{run}", renamed(cohort, {name: f"north_{name}" for name in PATIENTS}))
    expected = {f"north_{name}": answer for name, answer in out_of_fold(run, spec, "age").items()}
    assert_alike(predicted(found, "age"), expected)
    assert set(found.left_out) == {f"north_{name}" for name in TRAIN_ONLY}


def allowed_folds(tmp_path, spec, cohort, tests, names):
    """Return the folds that may predict patients with these names, for a run of two folds with these test parts."""
    record = {
        "membership": {
            str(fold): {"train": sorted({n for t in tests for n in t} - set(test)), "validation": [], "test": test}
            for fold, test in enumerate(tests)
        },
        "cohort": {"sha256": "none"},
        "results": {str(fold): {"sha256": f"sum{fold}"} for fold in range(2)},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    files = [
        ichprog.hub.WeightFile(fold, tmp_path / f"fold{fold}.safetensors", f"sum{fold}", "", "") for fold in range(2)
    ]
    people = tuple(dataclasses.replace(cohort.patients[0], name=name) for name in names)
    return check_leakage(spec, files, Cohort(people, "made.csv")).folds


def test_a_name_that_matches_two_patients_is_scored_by_a_fold_that_was_trained_on_neither(tmp_path, spec, cohort):
    tests = [["north_1", "north_2", "south_2", "3"], ["south_1", "4", "east_3"]]
    names = ["1", "2", "3", "4", "west_4", "17", "1_north", "far_north_1"]
    found = allowed_folds(tmp_path, spec, cohort, tests, names)
    assert found == ((), (0,), (0,), (1,), (1,), (0, 1), (0, 1), (0,))


def test_a_single_fold_scores_only_its_test_patients(run, spec, cohort):
    found = evaluate(f"local-dir:{run}", cohort, fold=1)
    expected = {name: answer for name, answer in out_of_fold(run, spec, "age").items() if answer[0] == 1}
    assert_alike(predicted(found, "age"), expected)
    assert len(found.left_out) == 24 - len(expected)
    assert [each["fold"] for each in found.provenance["weights"]] == [1]


def test_patients_of_missing_folds_are_left_out(copied, spec, cohort):
    (copied / "fold2.safetensors").unlink()
    found = evaluate(f"local-dir:{copied}", cohort)
    assert_alike(predicted(found, "age"), {n: a for n, a in out_of_fold(copied, spec, "age").items() if a[0] != 2})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run["results"]["1"].update(sha256="0" * 64), "it describes other weights of fold 1"),
        (lambda run: run.pop("results"), "cannot be read as the record of a run"),
        (lambda run: run.update(membership=None), "is incomplete"),
    ],
)
def test_a_damaged_record_is_refused(damage, message, copied, cohort):
    record = json.loads((copied / "run.json").read_text())
    damage(record)
    (copied / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=message):
        evaluate(f"local-dir:{copied}", cohort)


def test_without_a_record_leakage_is_unknown(copied, cohort):
    (copied / "run.json").unlink()
    found = evaluate(f"local-dir:{copied}", cohort)
    assert found.leakage.source == "nothing"
    assert found.leakage.sentence.startswith(CANNOT)
    assert {fold for fold, _ in predicted(found, "age").values()} == {SEVERAL_FOLDS}
    assert found.counts["scored"] == 24


def test_a_cohort_without_scored_patients_is_an_error(run, cohort):
    with pytest.raises(CohortError, match=r"no patient can be scored: 2 may not be predicted, 0 have no label"):
        evaluate(f"local-dir:{run}", renamed(cohort, {name: name for name in TRAIN_ONLY}))


# released weights


def released_model(root):
    """Write a small model with two folds to the repository of the published models, and return its name."""
    found = zoo.find("perez2023.prognosis")
    weights = dataclasses.replace(found.weights, folder="Small", format="safetensors", keys={})
    contract = dataclasses.replace(found.input, shape=(8, 24, 24), pad_slices=False)
    spec = dataclasses.replace(
        found, name="small.released", backbone=PluginRef("bright", {}), weights=weights, input=contract
    )
    place = root / REPOSITORY.repo / "Small"
    place.mkdir(parents=True)
    torch.manual_seed(0)
    for fold in (0, 3):
        state = {k: v.abs() * 40 + fold for k, v in networks.build(spec).state_dict().items()}
        save_file(state, place / f"fold{fold}.safetensors")
    ichprog.register_model(spec)
    return spec.name


@pytest.fixture
def released(tmp_path, monkeypatch):
    for plugins in (registry.backbones, registry.heads):
        monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(zoo, "_registered", {})
    ichprog.register_backbone("bright", bright_backbone)
    name = released_model(tmp_path / "hub")
    with HubServer(tmp_path / "hub", REPOSITORY.revision) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield name


def published_rows(folder, outcomes):
    """Return a cohort with these outcomes, whose patients share a few scans."""
    scans = [folder / f"{name}.nii.gz" for name in PATIENTS[:3]]
    patient = Cohort.read(folder / "cohort.csv").patients[0]
    people = [
        dataclasses.replace(patient, name=str(n), scan=scans[n % 3], columns={"poor_outcome": str(outcome)})
        for n, outcome in enumerate(outcomes)
    ]
    return Cohort(tuple(people), "published.csv")


OUTCOMES = np.random.RandomState(7).permutation([0] * 99 + [1] * 162)


def test_released_folds_are_scored_on_their_test_patients_only(released, folder):
    from sklearn.model_selection import StratifiedKFold

    cohort = published_rows(folder, OUTCOMES)
    found = evaluate(released, cohort, brain="given", n_bootstrap=10)
    parts = [t for _, t in StratifiedKFold(10, shuffle=True, random_state=1).split(np.zeros(261), OUTCOMES)]
    expected = {}
    for fold in (0, 3):
        scans = [cohort.patients[n].scan for n in parts[fold]]
        model = ichprog.load_model(released, fold=fold, runtime="torch")
        for n, prediction in zip(parts[fold], ichprog.predict(model, scans, brain="given"), strict=True):
            expected[str(n)] = fold, np.array(list(prediction["prognosis"].probabilities.values()))
    assert_alike(predicted(found, "prognosis"), expected)
    assert found.counts["left_out"] == 261 - len(parts[0]) - len(parts[3])
    assert found.leakage.source == "released"
    assert "taken for the published cohort of Cobo et al. 2024" in found.leakage.sentence
    assert f"{found.counts['left_out']} are left out" in found.leakage.sentence
    assert CANNOT not in found.leakage.sentence


@pytest.mark.parametrize(
    "outcomes", [OUTCOMES[:-1], np.append(OUTCOMES, 1), 1 - OUTCOMES, np.where(np.arange(261) == 4, -1, OUTCOMES)]
)
def test_other_cohorts_are_not_taken_for_the_published_cohort(outcomes, released, folder):
    cohort = published_rows(folder, [outcome if outcome >= 0 else "" for outcome in outcomes])
    spec, files = ichprog.hub.fetch(released)
    found = check_leakage(spec, files, cohort)
    assert found.source == "nothing"
    assert found.sentence.startswith(CANNOT)
    assert "trained on the published cohort of Cobo et al. 2024" in found.sentence
    assert found.folds == ((0, 3),) * len(cohort)


def test_other_weights_do_not_recognise_the_published_cohort(bright_model, folder):
    spec, files = ichprog.hub.fetch(bright_model)
    found = check_leakage(spec, files, published_rows(folder, OUTCOMES))
    assert found.source == "nothing"
    assert found.sentence.startswith(CANNOT)
    assert "Cobo" not in found.sentence


def test_every_published_model_of_the_zoo_has_leakage_control(folder):
    cohort = published_rows(folder, OUTCOMES)
    file = ichprog.hub.WeightFile(0, folder, "", "", "")
    for spec in ichprog.list_models():
        expected = "released" if spec.name in reference_pipeline.PUBLISHED else "nothing"
        assert check_leakage(spec, [file], cohort).source == expected


# figures


def test_every_event_has_a_calibration_curve(run, cohort):
    found = evaluate(f"local-dir:{run}", cohort)
    assert {task: list(curves) for task, curves in found.calibration.items()} == {
        "prognosis": ["poor"],
        "gcs": ["9-12 or later", "3-8"],
        "age": [">=80"],
    }
    for task, curves in found.calibration.items():
        answers = found.labelled(task)
        for k, curve in enumerate(curves.values(), start=1):
            assert curve["count"].sum() == len(answers)
            observed = (curve["observed"] * curve["count"]).sum()
            assert observed == pytest.approx((answers.truth >= k).sum())
            predicted = (curve["predicted"] * curve["count"]).sum()
            assert predicted == pytest.approx(answers.probabilities[:, k:].sum())


def test_unknown_labels_are_in_no_metric_and_unknown_columns_are_reported(run, cohort, folder):
    others = renamed(Cohort.read(folder / "all.csv"), {"P00": "P00", "Q0": "Q0", "Q1": "Q1", "Q2": "Q2"})
    cells = ["0", ""], ["1", ""], ["", "81"], ["", ""]
    columns = [{"poor_outcome": outcome, "age": age} for outcome, age in cells]
    people = [dataclasses.replace(p, columns=c) for p, c in zip(others.patients, columns, strict=True)]
    found = evaluate(f"local-dir:{run}", Cohort(tuple(people), "few.csv"))
    assert found.unlabelled == ("Q2",)
    assert found.unscored == {"gcs": "gcs"}
    labelled = {task: found.labelled(task).patients for task in found.metrics}
    assert labelled == {"prognosis": ("P00", "Q0"), "age": ("Q1",)}
    assert found.missing_labels == {"prognosis": 1, "age": 2}
    assert [each.recalibrations for each in (*found.events["prognosis"], *found.events["age"])] == [(), ()]
    assert found.metrics["age"]["accuracy"]["value"] in (0, 1)
    assert found.metrics["age"]["auroc"] == {"value": None, "low": None, "high": None}


# the command


@pytest.fixture
def run_command(monkeypatch):
    monkeypatch.setitem(main.commands, "evaluate", command)
    return lambda *arguments: CliRunner().invoke(main, ["evaluate", "--runtime", "torch", *map(str, arguments)])


def test_the_command_writes_all_files_and_reports_failed_scans(run, folder, tmp_path, run_command):
    shutil.copytree(folder, tmp_path / "patients", ignore=shutil.ignore_patterns("cache"))
    (tmp_path / "patients/P03.nii.gz").write_bytes(b"nothing")
    (tmp_path / "patients/P04.nii.gz").unlink()
    given = f"local-dir:{run}", tmp_path / "patients/cohort.csv", "--n-bootstrap", 50
    text = run_command(*given, "-o", tmp_path / "out")
    assert text.exit_code == 1, text.output
    assert "small.three on" in text.stdout
    assert "20 of 24 patients scored, 2 left out, 2 failed" in text.stdout
    assert "trained on this table" in text.stdout
    assert "patient P03" in text.stderr
    assert "FAILED" in text.stderr
    assert "For research only" in text.stderr

    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    shown = json.loads(run_command(*given, "--json").stdout)
    assert shown == written
    assert [each["patient"] for each in shown["scans_failed"]] == ["P03", "P04"]
    assert shown["patients_left_out"] == ["P05", "P17"]
    assert "trained on this table" in shown["leakage"]
    assert shown["leakage_source"] == "run"
    assert shown["simulated"] == 0
    assert shown["label_counts"]["prognosis"] == {"good": 7, "poor": 13}
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics == {"small.three": shown["metrics"]}
    answers = Predictions.read(tmp_path / "out/predictions.csv")
    assert answers.variants == ("small.three",)
    assert answers.tasks("small.three") == ("prognosis", "gcs", "age")
    assert len(answers.entries["small.three", "gcs", "test"]) == 20
    rows = read_table(tmp_path / "out/tables/metrics.csv")
    assert {row["task"] for row in rows} == {"prognosis", "gcs", "age"}
    auroc = next(row for row in rows if row["metric"] == "AUROC")
    assert float(auroc["value_low"]) == shown["metrics"]["prognosis"]["auroc"]["low"]
    assert {path.name for path in (tmp_path / "out/figures").glob("*.svg")} == {
        *(f"{kind}-{task}.svg" for kind in ("roc", "calibration") for task in ("prognosis", "gcs", "age")),
        *(f"decision-{name}.svg" for name in ("prognosis", "gcs-1", "gcs-2", "age")),
    }
    report = (tmp_path / "out/report.html").read_text()
    assert "Results: prognosis" in report
    assert "TRIPOD+AI" in report
    assert "{" not in (tmp_path / "out/tables/tripod.csv").read_text()
    assert not set(PATIENTS) & set(re.findall(r"\bP\d\d\b", report))


def test_a_cohort_without_label_columns_is_wrong_use(run, folder, tmp_path, run_command):
    (tmp_path / "bare.csv").write_text(f"patient,scan\nQ0,{folder / 'Q0.nii.gz'}\n")
    done = run_command(f"local-dir:{run}", tmp_path / "bare.csv")
    assert done.exit_code == 2
    assert "Fill one of the columns poor_outcome, gcs, age" in done.output
    with pytest.raises(UnknownNameError):
        evaluate("small.nothing", tmp_path / "bare.csv")


def test_several_tables_are_joined(run, folder, tmp_path, run_command):
    lines = (folder / "cohort.csv").read_text().splitlines()
    for name, rows in (("north", lines[1:13]), ("south", lines[13:])):
        (folder / f"{name}.csv").write_text("\n".join([lines[0], *rows]))
    done = json.loads(run_command(f"local-dir:{run}", folder / "north.csv", folder / "south.csv", "--json").stdout)
    assert done["scored"] == 22
    assert "trained on this table" in done["leakage"]


def test_two_workers_give_the_evaluation_of_one_process(run, cohort, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, two = (evaluate(f"local-dir:{run}", cohort, n_bootstrap=10, workers=workers) for workers in (1, 2))
    assert two.to_dict() == one.to_dict()


def test_an_interrupted_evaluation_resumes_with_the_same_files(run, folder, tmp_path, run_command, monkeypatch):
    given = f"local-dir:{run}", folder / "cohort.csv", "--n-bootstrap", 10
    run_command(*given, "-o", tmp_path / "whole")
    predicted, original = [], ichprog.model.Model._prediction

    def interrupt(self, source, *arguments):
        predicted.append(source.name)
        if len(predicted) == 6:
            raise KeyboardInterrupt
        return original(self, source, *arguments)

    monkeypatch.setattr(ichprog.model.Model, "_prediction", interrupt)
    run_command(*given, "-o", tmp_path / "out")
    assert (tmp_path / "out/predictions.journal").read_bytes().count(b"\n") == 6, "the run, and five patients"
    refused = run_command(*given, "-o", tmp_path / "out")
    assert "holds results of an interrupted run. Continue it with --resume" in refused.output
    first = predicted[:5]
    assert run_command(*given, "-o", tmp_path / "out", "--resume").exit_code == 0
    assert len(predicted) == 6 + 22 - 5
    assert not set(first) & set(predicted[6:])
    for name in ("predictions.csv", "metrics.json", "evaluation.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out/predictions.journal").exists()
    assert run_command(*given, "--resume").exit_code == 2
