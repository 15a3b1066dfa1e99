"""The jobs of a study: each runs once, on the same folds, and a worker that dies loses no job."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock

import ichprog.train
from ichprog import CohortError, RunError, SpecError, UnknownNameError, parallel, zoo
from ichprog.cli import main
from ichprog.cohort import Cohort
from ichprog.evaluation.predictions import Predictions
from ichprog.study import jobs, template
from ichprog.study.config import Study
from ichprog.study.manifest import load_cohort, split_folds
from ichprog.train import folds

from support.cohorts import read_table
from support.small_study import BASELINES, JOBS, STUDY, job_names

pytestmark = pytest.mark.usefixtures("one_thread", "one_thread_in_workers")


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


# results


def test_all_variants_and_baselines_share_the_same_folds(finished_study, patients_folder):
    predictions = Predictions.read(finished_study / "predictions.csv")
    assert predictions.variants == ("one", "gcs", "all", "majority", "clinical", "fusion")
    assert predictions.tasks("all") == ("prognosis", "gcs", "age")
    cohort = Cohort.read(patients_folder / "cohort.csv")
    parts = folds.split(cohort.labels(zoo.find("densenet121.prognosis").tasks[0]), 2, seed=1, validation_fraction=0.25)
    for answers in predictions.entries.values():
        assert answers.probabilities.sum(1) == pytest.approx(1)
    for (_, _, split), answers in predictions.entries.items():
        for number, fold in enumerate(parts):
            expected = {cohort.patients[place].name for place in getattr(fold, split)}
            assert {p for p, at in zip(answers.patients, answers.fold, strict=True) if at == number} == expected
    assert {len(answers) for (_, _, split), answers in predictions.entries.items() if split == "test"} == {28}
    one, several = (predictions.entries[name, "gcs", "test"] for name in ("gcs", "all"))
    assert one.truth.tolist() == several.truth.tolist()
    assert [int(t) for t in one.truth if t < 0] == [-1] * 4, "blank in the table"


def test_the_table_of_predictions_equals_the_predictions_of_the_runs(finished_study):
    predictions = Predictions.read(finished_study / "predictions.csv")
    for fold in (0, 1):
        for split, file in (("test", "predictions.csv"), ("validation", "validation.csv")):
            rows = {row["patient"]: row for row in read_table(finished_study / "runs/all/folds" / str(fold) / file)}
            answers = predictions.entries["all", "gcs", split]
            mine = [i for i, at in enumerate(answers.fold) if at == fold]
            assert {answers.patients[i] for i in mine} == set(rows)
            for i in mine:
                row = rows[answers.patients[i]]
                theirs = [float(row[f"gcs_{label}"]) for label in ("13-15", "9-12", "3-8")]
                assert answers.probabilities[i].tolist() == theirs
                assert answers.truth[i] == (["13-15", "9-12", "3-8"].index(row["gcs_true"]) if row["gcs_true"] else -1)


def test_study_json_describes_the_study(finished_study, patients_folder):
    predictions = json.loads((finished_study / "study.json").read_text())
    assert predictions["compared"] | {"sha256": ""} == {
        "patients": 28, "sha256": "", "folds": 2, "stratify_by": "prognosis", "split_seed": 1, "validation": 0.25,
        "brain": "given",
    }  # fmt: skip
    assert predictions["cohort"]["simulated"] == 0
    assert set(predictions["variants"]) == {"one", "gcs", "all"}
    assert predictions["variants"]["all"]["model"]["name"] == "all"
    assert predictions["variants"]["all"]["protocol"]["recalibrate"] is False
    assert predictions["left_out"] == {"score": "the cohort has no column ich_score"}
    tested = [name for fold in predictions["membership"].values() for name in fold["test"]]
    assert sorted(tested) == [f"P{number:02}" for number in range(28)]
    assert predictions["versions"]["torch"]
    assert ichprog.load_model(f"local-dir:{finished_study / 'runs/all'}").spec.name == "all"


def test_finished_jobs_are_not_run_again(finished_study, patients_folder, make_study, tmp_path):
    out = copied(finished_study, tmp_path / "out")
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".json", ".log")
    }
    reported = []
    statuses = jobs.run(make_study(), out, cache_dir=patients_folder / "c", progress=reported.append)
    assert job_names(statuses) == job_names(reported) == JOBS
    kept = {path: path.stat().st_mtime_ns for path in before if path.name != "study.json"}
    assert kept == {path: when for path, when in before.items() if path.name != "study.json"}
    assert (out / "predictions.csv").read_bytes() == (finished_study / "predictions.csv").read_bytes()


def test_only_missing_jobs_are_run(finished_study, patients_folder, make_study, tmp_path, monkeypatch):
    """Missing are the model of a run, a baseline and a new variant."""
    out = copied(finished_study, tmp_path / "out")
    (out / "runs/gcs/config.json").unlink()
    (out / "baselines/clinical.csv").unlink()
    trained = []
    from ichprog.train import trainer

    train_fold = trainer.train_fold
    monkeypatch.setattr(
        trainer, "train_fold", lambda job, *rest: trained.append((job.spec.name, job.fold)) or train_fold(job, *rest)
    )
    study = make_study(
        STUDY + '[[variant]]\nname = "new"\nmodel = "spec.json"\ntasks = ["prognosis"]\nshape = [4, 16, 16]\n'
    )
    assert job_names(jobs.status(study, out), "missing") == ["gcs-0", "gcs-1", "new-0", "new-1", "clinical"]
    statuses = jobs.run(study, out, cache_dir=patients_folder / "c")
    assert len(job_names(statuses)) == 11
    assert trained == [("new", 0), ("new", 1)]
    again, before = (Predictions.read(at / "predictions.csv").entries for at in (out, finished_study))
    assert len(again) == len(before) + 2
    assert all(again[key].probabilities.tolist() == answers.probabilities.tolist() for key, answers in before.items())


def test_a_changed_baseline_is_fitted_again(finished_study, patients_folder, make_study, tmp_path):
    out = copied(finished_study, tmp_path / "out")
    jobs.run(make_study(more=BASELINES.replace('["age", "gcs"]', '["age"]')), out, cache_dir=patients_folder / "c")
    again, before = (Predictions.read(at / "predictions.csv").entries for at in (out, finished_study))
    key = ("clinical", "prognosis", "test")
    assert again[key].probabilities.tolist() != before[key].probabilities.tolist()
    assert again["fusion", *key[1:]].probabilities.tolist() == before["fusion", *key[1:]].probabilities.tolist()


def test_a_learning_curve_trains_on_fewer_patients_with_the_same_test_parts(patients_folder, make_study, tmp_path):
    curve = '[learning_curve]\nsizes = [6, 8]\nvariants = ["one"]\n'
    study = dataclasses.replace(make_study(more=curve), baselines=())
    study = dataclasses.replace(study, variants=study.variants[:1])
    statuses = jobs.run(study, tmp_path / "out", cache_dir=patients_folder / "c")
    assert job_names(statuses) == [f"{run}-{fold}" for run in ("one", "one@6", "one@8") for fold in (0, 1)]
    runs = {
        run: json.loads((tmp_path / "out/runs" / run / "run.json").read_text()) for run in ("one", "one@6", "one@8")
    }
    for fold in ("0", "1"):
        whole, six, eight = (runs[run]["membership"][fold] for run in ("one", "one@6", "one@8"))
        assert (whole["train"][:6], whole["train"][:8]) == (six["train"], eight["train"])
        assert whole["test"] == six["test"] == eight["test"]
        assert whole["validation"] == six["validation"]
    predictions = Predictions.read(tmp_path / "out/predictions.csv")
    assert predictions.variants == ("one", "one@6", "one@8")
    one, six = (predictions.entries[name, "prognosis", "test"] for name in ("one", "one@6"))
    assert one.patients == six.patients
    assert one.probabilities.tolist() != six.probabilities.tolist()


def test_single_jobs_give_the_same_files(finished_study, patients_folder, make_study, tmp_path):
    """Jobs may be started by any program, one at a time, in the order of their stages."""
    study, out = make_study(), copied(finished_study, tmp_path / "out")
    for name in ("runs/all/config.json", "baselines/majority.csv", "baselines/fusion.csv", "predictions.csv"):
        (out / name).unlink()
    path = patients_folder / "study.toml"
    listed = CliRunner().invoke(main, ["study", "jobs", str(path), "-o", str(out), "--json"])
    found = {each["job"]: each["stage"] for each in json.loads(listed.stdout)}
    assert found == {"all-0": 0, "all-1": 0, "majority": 0, "fusion": 1}
    first = CliRunner().invoke(main, ["study", "jobs", str(path), "-o", str(out), "--stage", "1"])
    assert first.stdout.split() == ["fusion"]
    for name in found:
        command = ["study", "run", str(path), "-o", str(out), "--job", name, "--cache-dir", str(patients_folder / "c")]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    assert not (out / "predictions.csv").exists()
    jobs.run(study, out, cache_dir=patients_folder / "c")
    assert (out / "predictions.csv").read_bytes() == (finished_study / "predictions.csv").read_bytes()
    with pytest.raises(UnknownNameError, match=r"Unknown job of the study 'al-0'\. Did you mean all-0"):
        jobs.run(study, out, only=["al-0"])


# failures


def test_a_study_applies_a_mask_to_every_scan(patients_folder, make_study, tmp_path):
    """A mask of the left half blackens the right half of every prepared grid."""
    scan = nib.load(next(each.scan for each in load_cohort(make_study(), tmp_path).patients))
    half = np.zeros(scan.shape, np.uint8)
    half[: scan.shape[0] // 2] = 1
    nib.Nifti1Image(half, scan.affine).to_filename(patients_folder / "half.nii.gz")
    text = STUDY[: STUDY.index("[[variant]]")].replace('brain = "given"', 'brain = "half.nii.gz"')
    text = text.replace("epochs = 12", "epochs = 1") + '[[variant]]\nname = "one"\nmodel = "spec.json"\n'
    study = make_study(text, "[[baseline]]\nname = 'majority'\nkind = 'majority'\n")
    statuses = jobs.run(study, tmp_path / "out", cache_dir=tmp_path / "c")
    assert {status.state for status in statuses} == {"done"}, [status.error for status in statuses]
    record = json.loads((tmp_path / "out/study.json").read_text())
    digest = hashlib.sha256((patients_folder / "half.nii.gz").read_bytes()).hexdigest()
    assert record["compared"]["brain"] == f"mask {digest}"
    grids = [np.load(path) for path in (tmp_path / "c").rglob("*.npy")]
    assert len(grids) == record["compared"]["patients"]
    for grid in grids:
        occupied = np.sort(
            [
                np.count_nonzero(grid[..., : grid.shape[-1] // 2 - 1]),
                np.count_nonzero(grid[..., grid.shape[-1] // 2 + 1 :]),
            ]
        )
        assert occupied[0] == 0 < occupied[1]


def test_a_failed_job_is_recorded_and_the_others_continue(patients_folder, make_study, tmp_path, monkeypatch):
    train = ichprog.train.train

    def failing(cohort, spec, out, **options):
        if (out.name, options["only_folds"]) == ("gcs", [1]):
            raise RunError("the disk is full")
        if (out.name, options["only_folds"]) == ("all", [0]):
            raise ZeroDivisionError("a mistake in a plugin")
        return train(cohort, spec, out, **options)

    monkeypatch.setattr(ichprog.train, "train", failing)
    reported = []
    statuses = jobs.run(make_study(), tmp_path / "out", cache_dir=patients_folder / "c", progress=reported.append)
    assert job_names(statuses, "failed") == ["gcs-1", "all-0", "fusion"]
    assert (
        sorted(job_names(reported)) == sorted(job_names(statuses)) == sorted(set(JOBS) - {"gcs-1", "all-0", "fusion"})
    )
    predictions = {status.job.name: status.error for status in statuses}
    assert (
        predictions["gcs-1"] == "RunError: the disk is full" == (tmp_path / "out/jobs/gcs-1.error").read_text().strip()
    )
    assert predictions["all-0"].startswith("Traceback")
    assert "in failing" in predictions["all-0"]
    assert predictions["fusion"] == "RunError: Variant all is not done in every fold. Run the study again."
    assert Predictions.read(tmp_path / "out/predictions.csv").variants == ("one", "majority", "clinical")
    monkeypatch.undo()
    assert job_names(jobs.run(make_study(), tmp_path / "out", cache_dir=patients_folder / "c")) == JOBS
    assert not list((tmp_path / "out/jobs").glob("*.error"))


def test_status_of_a_study_without_a_folder_and_of_a_running_job(finished_study, make_study, tmp_path):
    statuses = jobs.status(make_study(), tmp_path / "none")
    assert job_names(statuses, "missing") == [*JOBS, "score"]
    assert not (tmp_path / "none").exists()
    out = copied(finished_study, tmp_path / "out")
    (out / "baselines/majority.csv").unlink()
    with FileLock(out / "jobs/.majority.lock"):
        assert job_names(jobs.status(make_study(), out), "running") == ["majority"]
    assert job_names(jobs.status(make_study(), out), "missing") == ["majority"]


def test_a_job_that_another_process_runs_is_skipped(finished_study, patients_folder, make_study, tmp_path):
    out = copied(finished_study, tmp_path / "out")
    (out / "baselines/majority.csv").unlink()
    with FileLock(out / "jobs/.majority.lock"):
        statuses = jobs.run(make_study(), out, cache_dir=patients_folder / "c")
    assert job_names(statuses, "running") == ["majority"]
    assert "majority" not in Predictions.read(out / "predictions.csv").variants


def test_the_folder_of_another_study_is_refused_with_the_differences(
    finished_study, patients_folder, make_study, tmp_path
):
    out = copied(finished_study, tmp_path / "out")
    before = (out / "study.json").read_bytes()

    def refused(message, text):
        with pytest.raises(RunError, match=message):
            jobs.run(make_study(text), out, cache_dir=patients_folder / "c")
        assert (out / "study.json").read_bytes() == before

    refused(r"holds another study: folds was 2, is 3\. Choose another", STUDY.replace("folds = 2", "folds = 3"))
    refused(r"validation was 0\.25, is 0\.3", STUDY.replace("0.25", "0.3"))
    changes = 'backbone = { name = "compact", options = { width = 8 } }\nprotocol = { learning_rate = 0.5 }'
    refused(
        r"variant one: model\.backbone differs; variant one: protocol\.learning_rate was 0\.001, is 0\.5",
        STUDY.replace('tasks = ["prognosis"]', f'tasks = ["prognosis"]\n{changes}'),
    )
    (tmp_path / "else").mkdir()
    (tmp_path / "else/notes.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and holds no study"):
        jobs.run(make_study(), tmp_path / "else", cache_dir=patients_folder / "c")
    assert [path.name for path in (tmp_path / "else").iterdir()] == ["notes.txt"]


def test_an_untrained_variant_may_change(finished_study, patients_folder, make_study, tmp_path):
    out = copied(finished_study, tmp_path / "out")
    shutil.rmtree(out / "runs/gcs")
    study = make_study(STUDY.replace('tasks = ["gcs"]', 'tasks = ["gcs"]\nprotocol = { epochs = 1 }'))
    assert job_names(jobs.run(study, out, cache_dir=patients_folder / "c")) == JOBS
    assert len(read_table(out / "runs/gcs/folds/0/log.csv")) == 1


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            STUDY.replace('["age"]', '["agee"]'),
            UnknownNameError,
            r"Unknown column of .*cohort\.csv 'agee'\. Did you mean age",
        ),
        (STUDY.replace("folds = 2", "folds = 20"), CohortError, "are fewer than 20 folds"),
        (
            STUDY + 'backbone = { name = "compakt", options = {} }\n',
            UnknownNameError,
            r"Unknown backbone 'compakt'\. Did you mean",
        ),
        (STUDY + 'backbone = { name = "compact", options = { w = 1 } }\n', SpecError, "backbone.*compact.*'w'"),
        (STUDY + "[learning_curve]\nsizes = [14]\n", CohortError, "Invalid value 14. Expected less than 10"),
        (
            STUDY + "[learning_curve]\nsizes = [2]\n",
            CohortError,
            "variant gcs@2: .* patients of two labels",
        ),
        (STUDY.replace("cohort.csv", "none.csv"), CohortError, r"none\.csv: cannot be read"),
        (
            STUDY + '[[variant]]\nname = "flat"\nmodel = "perez2023.prognosis"\nshape = [16, 64, 64]\n',
            SpecError,
            r"variant 'flat': backbone 'perez2023' cannot read a grid of \(16, 64, 64\)",
        ),
    ],
)
def test_an_invalid_study_is_refused_before_training(text, error, message, patients_folder, make_study, tmp_path):
    with pytest.raises(error, match=message):
        jobs.run(make_study(text), tmp_path / "out", cache_dir=patients_folder / "c")
    assert not list(tmp_path.glob("out/runs/*"))
    assert not (tmp_path / "out/predictions.csv").exists()


def test_a_missing_column_of_a_baseline_is_refused(patients_folder, make_study, tmp_path):
    with pytest.raises(
        UnknownNameError, match=r"Unknown column of .* 'ages'\. Did you mean age.* Baseline clinical needs it"
    ):
        jobs.run(
            make_study(more=BASELINES.replace('"age", "gcs"', '"ages"')),
            tmp_path / "out",
            cache_dir=patients_folder / "c",
        )


# several workers


@pytest.mark.slow
def test_several_processes_give_the_same_files_as_one_if_a_process_is_killed(
    finished_study, patients_folder, make_study, tmp_path
):
    reported, killed, seen = [], [], set()

    def watch(status):
        reported.append(status)
        working = multiprocessing.active_children()
        seen.update(process.pid for process in working)
        if len(job_names(reported)) == 2 and not killed:
            killed.append(working[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    statuses = jobs.run(make_study(), tmp_path / "out", workers=2, cache_dir=patients_folder / "c", progress=watch)
    assert job_names(statuses) == JOBS
    assert killed
    assert len(seen) > 2, "another process replaces the killed one"
    assert (tmp_path / "out/predictions.csv").read_bytes() == (finished_study / "predictions.csv").read_bytes()


def test_a_job_that_kills_every_process_fails_alone():
    from support import crashing_job

    ended = dict(parallel.map_unordered(crashing_job.work, range(5), workers=2))
    assert str(ended.pop(2)) == "its process died each time; it may need more memory than there is"
    assert ended == {0: None, 1: None, 3: "wrong", 4: None}


@pytest.mark.slow
def test_dask_workers_give_the_same_files_if_a_worker_is_killed(finished_study, patients_folder, make_study, tmp_path):
    from distributed import LocalCluster

    reported, killed = [], []
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local:

        def watch(status):
            reported.append(status)
            if len(job_names(reported)) == 2 and not killed:
                killed.append(local.workers[0].pid)
                os.kill(killed[0], signal.SIGKILL)

        with parallel.cluster(scheduler=local.scheduler_address) as executor:
            statuses = jobs.run(
                make_study(), tmp_path / "out", executor=executor, cache_dir=patients_folder / "c", progress=watch
            )
        assert killed[0] not in [nanny.pid for nanny in local.workers.values()]
    assert job_names(statuses) == JOBS
    assert (tmp_path / "out/predictions.csv").read_bytes() == (finished_study / "predictions.csv").read_bytes()


def test_an_address_without_a_scheduler_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "SCHEDULER_TIMEOUT_S", 1)
    with (
        pytest.raises(RunError, match=r"No dask scheduler answers at tcp://127\.0\.0\.1:1: "),
        parallel.cluster(scheduler="tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.slow
def test_the_smoke_study_runs_on_simulated_patients(tmp_path):
    (tmp_path / "study.toml").write_text(template("smoke"))
    study = Study.read(tmp_path / "study.toml")
    statuses = jobs.run(study, tmp_path / "out", workers=2)
    assert {status.state for status in statuses} == {"done"}
    cohort = load_cohort(study, tmp_path / "out")
    assert len(cohort) == 24
    predictions = Predictions.read(tmp_path / "out/predictions.csv")
    assert len(predictions.entries["all", "prognosis", "test"]) == 24
    assert len(split_folds(study, cohort)) == 2
    assert json.loads((tmp_path / "out/study.json").read_text())["cohort"]["simulated"] == 24


# `Figure.savefig` ends the process as a kill does, before the third file that it writes has its name.
KILLED_WHILE_WRITING = """
import os, signal, sys
from matplotlib.figure import Figure

save, calls = Figure.savefig, iter((0, 0, 1))

def save_and_die(figure, path, **options):
    save(figure, path, **options)
    if next(calls):
        os.kill(os.getpid(), signal.SIGKILL)

Figure.savefig = save_and_die
from ichprog.cli import main
main(sys.argv[1:])
"""


def test_a_report_killed_while_it_is_written_leaves_no_partial_file(finished_study, patients_folder, tmp_path):
    out = copied(finished_study, tmp_path / "out")
    command = ["study", "report", str(patients_folder / "finished.toml"), "--output", str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((out / "figures").glob(".*"))) == 1
    again = CliRunner().invoke(main, [*command, "--cache-dir", str(patients_folder / "c")])
    assert again.exit_code == 0, again.output
    assert list(out.rglob(".*.svg")) == list(out.rglob(".*.png")) == []
    assert len(list((out / "figures").iterdir())) > 3
