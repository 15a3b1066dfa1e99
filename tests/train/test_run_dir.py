"""The directory of a run: a model, its record, resuming and refusals."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest

import ichprog
from ichprog import RunError, SpecError, UnknownNameError
from ichprog.spec import PluginRef
from ichprog.train import TrainOptions, resolve_spec, train, trainer

from support.cohorts import QUICK, read_table, run_checksums, with_columns


def test_a_run_is_a_model_that_predicts_the_out_of_fold_table(trained, cohort):
    rows = {row["patient"]: row for row in read_table(trained / "out_of_fold.csv")}
    models = {fold: ichprog.load_model(f"local-dir:{trained}", fold=fold) for fold in range(4)}
    for patient in cohort.patients[::4]:
        row = rows[patient.name]
        prediction = ichprog.predict(models[int(row["fold"])], patient.scan)
        for task in prediction.tasks:
            for label, value in prediction[task].probabilities.items():
                assert value == pytest.approx(float(row[f"{task}_{label}"]), abs=1e-5)
            assert prediction[task].label == row[f"{task}_label"]
    whole = ichprog.load_model(f"local-dir:{trained}")
    assert whole.check_golden_output()["state"] == "holds"
    assert [file.fold for file in whole.weights] == [0, 1, 2, 3]


def test_the_validation_table_equals_the_predictions_of_the_model(trained, cohort):
    scans = {patient.name: patient.scan for patient in cohort.patients}
    membership = json.loads((trained / "run.json").read_text())["membership"]
    for fold in range(4):
        rows = read_table(trained / "folds" / str(fold) / "validation.csv")
        assert [row["patient"] for row in rows] == membership[str(fold)]["validation"]
        prediction = ichprog.predict(ichprog.load_model(f"local-dir:{trained}", fold=fold), scans[rows[0]["patient"]])
        for task in prediction.tasks:
            for label, value in prediction[task].probabilities.items():
                assert value == pytest.approx(float(rows[0][f"{task}_{label}"]), abs=1e-5)


def test_a_run_records_its_settings_and_results(trained, cohort):
    record = json.loads((trained / "run.json").read_text())
    assert record["protocol"] == QUICK.to_dict()
    assert record["versions"]["torch"]
    assert record["command"]
    assert record["source"] == cohort.source
    tested = [name for fold in record["membership"].values() for name in fold["test"]]
    assert sorted(tested) == [patient.name for patient in cohort.patients]
    for fold in range(4):
        result = record["results"][str(fold)]
        assert result["epochs"] == 16
        assert set(result["calibration"]) == {"prognosis", "gcs", "age"}
    log = read_table(trained / "log.csv")
    assert len(log) == 4 * 16
    assert {
        "fold",
        "epoch",
        "learning_rate",
        "loss",
        "loss_gcs",
        "val_loss",
        "val_auc_prognosis",
        "val_balanced_accuracy",
    } <= set(log[0])
    rates = [float(row["learning_rate"]) for row in log[:16]]
    assert rates[2] == max(rates)
    assert rates[-1] < 0.02 * max(rates)
    assert not list(trained.rglob("checkpoint.pt"))
    config = ichprog.ModelSpec.read(trained / "config.json")
    assert config.limits[0] == "Trained on 32 patients. Not tested on patients of another cohort."
    assert (record["origin"]["simulated"], record["description"]) == (0, "small.three")
    assert set(config.weights.sha256) == {f"fold{fold}.safetensors" for fold in range(4)}


def test_single_folds_give_the_same_files_as_all_at_once(trained, cohort, spec, tmp_path, options):
    """As when they are spread over machines; and a run that is done is left as it is."""
    for only in ([2], [0, 1], None):
        train(cohort, spec, tmp_path / "run", folds=4, only_folds=only, protocol=QUICK, options=options, resume=True)
    assert run_checksums(tmp_path / "run") == run_checksums(trained)
    weights = tmp_path / "run" / "fold0.safetensors"
    written = weights.stat().st_mtime_ns
    train(cohort, spec, tmp_path / "run", folds=4, protocol=QUICK, options=options, resume=True)
    assert weights.stat().st_mtime_ns == written


def test_a_run_with_enough_validation_patients_is_calibrated(trained, cohort, spec, tmp_path, options, monkeypatch):
    assert ichprog.load_model(f"local-dir:{trained}", runtime="torch").spec.calibration is None  # too few
    monkeypatch.setattr("ichprog.train.calibration.MIN_PATIENTS", 10)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    train(cohort, spec, run, folds=4, protocol=QUICK, options=options, resume=True)
    model = ichprog.load_model(f"local-dir:{run}", runtime="torch")
    membership = json.loads((run / "run.json").read_text())["membership"]
    patients = {name for fold in membership.values() for name in fold["validation"]}
    assert model.spec.calibration.patients == f"{len(patients)} patients, the validation parts of the training."
    prediction = ichprog.predict(model, cohort.patients[0].scan, coverage=0.8)
    assert prediction["prognosis"].label_set
    assert not prediction.input_distance.is_unusual
    for fold in range(4):
        rows = read_table(run / "folds" / str(fold) / "validation_inputs.csv")
        assert [row["patient"] for row in rows] == membership[str(fold)]["validation"]


def test_a_fold_locked_by_another_process_is_refused(cohort, spec, tmp_path, options):
    from filelock import FileLock

    theirs = tmp_path / "run" / "folds" / "0"
    settings = {"folds": 4, "protocol": QUICK.replace(epochs=1), "options": options, "resume": True}
    train(cohort, spec, tmp_path / "run", only_folds=[1], **settings)
    theirs.mkdir()
    with FileLock(theirs / ".lock"), pytest.raises(RunError, match=r"fold 0 of .* is being trained by another process"):
        train(cohort, spec, tmp_path / "run", **settings)


@pytest.mark.parametrize(
    ("grids_there", "expected_message"),
    [(False, "prepared grids need .* GB, 0.00 GB are free"), (True, "run needs .* GB, 0.00 GB")],
)
def test_a_full_disk_is_reported_before_training(
    grids_there, expected_message, folder, cohort, spec, tmp_path, monkeypatch
):
    def usage(path):
        return SimpleNamespace(free=100 if grids_there or "grids" in str(path) else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(RunError, match=expected_message):
        train(
            cohort,
            spec,
            tmp_path / "run",
            folds=4,
            protocol=QUICK,
            options=TrainOptions(cache_dir=folder / "c" if grids_there else tmp_path / "c"),
        )
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_is_reported_with_the_remedy(cohort, spec, tmp_path, monkeypatch, options):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.TrainerState, "save", full)
    with pytest.raises(RunError, match=r"disk of .*run is full\. Free some space and resume with `--resume`"):
        train(cohort, spec, tmp_path / "run", folds=4, only_folds=[0], protocol=QUICK, options=options)


def test_a_folder_of_another_run_is_refused_with_the_differences(trained, cohort, spec, tmp_path, options):
    settings = {"folds": 4, "protocol": QUICK, "options": options, "resume": True}
    other = dataclasses.replace(spec, backbone=PluginRef("compact", {"width": 8}))
    with pytest.raises(RunError, match=r"holds another run: model\.backbone differs"):
        train(cohort, other, trained, **settings)
    with pytest.raises(RunError, match=r"protocol\.learning_rate was 0\.02, is 0\.1; folds was 4, is 3"):
        train(cohort, spec, trained, **settings | {"protocol": QUICK.replace(learning_rate=0.1), "folds": 3})
    with pytest.raises(RunError, match=r"cohort\.sha256 was"):
        train(with_columns(cohort, age=lambda i: str(20 + 70 * (i % 2))), spec, trained, **settings)
    with pytest.raises(RunError, match="`--resume`"):
        train(cohort, spec, trained, **settings | {"resume": False})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not a run"):
        train(cohort, spec, tmp_path, **settings)
    with pytest.raises(UnknownNameError, match="Unknown fold '7'"):
        train(cohort, spec, tmp_path / "run", **settings | {"only_folds": [7]})


def test_resolve_spec_accepts_every_kind_of_name(trained, folder, tmp_path):
    assert resolve_spec(str(folder / "spec.json")).name == "small.three"
    assert resolve_spec(f"local-dir:{trained}").name == "small.three"
    assert resolve_spec("perez2023.prognosis").name == "perez2023.prognosis"
    with pytest.raises(UnknownNameError, match="Unknown model 'perez'"):
        resolve_spec("perez")
    with pytest.raises(SpecError, match="cannot be read"):
        resolve_spec(tmp_path / "none.json")
