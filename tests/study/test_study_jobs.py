"""The cells of a study: each once, on the same folds, by whoever there is, and none lost with a worker that dies."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

import ichprog.train
from ichprog import CohortError, RunError, SpecError, UnknownNameError, parallel, zoo
from ichprog.cohort import Cohort
from ichprog.evaluation.predictions import Predictions
from ichprog.spec import PluginRef
from ichprog.study import config, jobs
from ichprog.study.config import Study
from ichprog.study.manifest import load_cohort, split_folds
from ichprog.train import folds

from support.cohorts import ellipsoid, read_table

pytestmark = pytest.mark.usefixtures("one_thread")

STUDY = """
name = "small"
cohort = ["cohort.csv"]
folds = 2
brain = "given"
device = "cpu"
correlations = ["age"]
[protocol]
epochs = 12
batch_size = 4
validation_fraction = 0.25
[[variant]]
name = "one"
model = "spec.json"
tasks = ["prognosis"]
[[variant]]
name = "gcs"
model = "spec.json"
tasks = ["gcs"]
[[variant]]
name = "all"
model = "spec.json"
"""
BASELINES = """
[[baseline]]
name = "majority"
kind = "majority"
[[baseline]]
name = "clinical"
kind = "logistic"
columns = ["age", "gcs"]
[[baseline]]
name = "fusion"
kind = "fusion"
variant = "all"
columns = ["age"]
[[baseline]]
name = "score"
kind = "logistic"
columns = ["ich_score"]
optional = true
"""
JOBS = ["one-0", "one-1", "gcs-0", "gcs-1", "all-0", "all-1", "majority", "clinical", "fusion"]


@pytest.fixture(autouse=True)
def one_thread_in_workers(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """28 made patients; the GCS of every seventh is blank."""
    root = tmp_path_factory.mktemp("patients")
    random = np.random.default_rng(0)
    rows = ["patient,scan,poor_outcome,gcs,age"]
    i, j, k = np.ogrid[:40, :40, :10]
    for number in range(28):
        poor = number % 5 in (1, 3)
        blood = ellipsoid((i, j, k), (22, 18, 5), (6, 6, 2.5) if poor else (3, 3, 1)) <= 1
        noise = 4 * random.standard_normal((40, 40, 10))
        hu = np.where(ellipsoid((i, j, k), (20, 20, 5), (13, 16, 4.6)) <= 1, np.where(blood, 68, 33) + noise, 0)
        nib.Nifti1Image(hu.round().astype(np.int16), np.diag([-4.5, -4.5, 14, 1])).to_filename(
            root / f"{number}.nii.gz"
        )
        gcs = "" if number % 7 == 0 else random.choice([5, 10, 14])
        rows.append(f"P{number:02},{number}.nii.gz,{int(poor)},{gcs},{random.integers(60, 95)}")
    (root / "cohort.csv").write_text("\n".join(rows))
    spec = zoo.find("compact.prognosis_gcs3_age")
    contract = dataclasses.replace(
        spec.input,
        shape=(8, 24, 24),
        expected_ranges={"no-blood": (None, None)},
    )
    small = dataclasses.replace(spec, name="small.three", backbone=PluginRef("compact", {"width": 4}), input=contract)
    (root / "spec.json").write_text(json.dumps(small.to_dict()))
    return root


@pytest.fixture
def study(folder):
    """Makes a study of text, beside the patients."""

    def making(text=STUDY, more=BASELINES):
        (folder / "study.toml").write_text(text + more)
        return Study.read(folder / "study.toml")

    return making


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A whole study, done by one process."""
    (folder / "whole.toml").write_text(STUDY + BASELINES)
    out = tmp_path_factory.mktemp("whole") / "out"
    found = jobs.run(Study.read(folder / "whole.toml"), out, cache_dir=folder / "c")
    assert {status.state for status in found} == {"done"}, [status.error for status in found]
    return out


def copied(done, to):
    shutil.copytree(done, to)
    return to


def names(found, state="done"):
    return [status.job.name for status in found if status.state == state]


# what comes out


def test_all_variants_share_their_folds_and_the_baselines_too(done, folder):
    said = Predictions.read(done / "predictions.csv")
    assert said.variants == ("one", "gcs", "all", "majority", "clinical", "fusion")
    assert said.tasks("all") == ("prognosis", "gcs", "age")
    cohort = Cohort.read(folder / "cohort.csv")
    parts = folds.split(cohort.labels(zoo.find("densenet121.prognosis").tasks[0]), 2, seed=1, validation=0.25)
    for answers in said.entries.values():
        assert answers.probabilities.sum(1) == pytest.approx(1)
    for (_, _, split), answers in said.entries.items():
        for number, fold in enumerate(parts):
            expected = {cohort.patients[place].name for place in getattr(fold, split)}
            assert {p for p, at in zip(answers.patients, answers.fold, strict=True) if at == number} == expected
    assert {len(answers) for (_, _, split), answers in said.entries.items() if split == "test"} == {28}
    one, several = (said.entries[name, "gcs", "test"] for name in ("gcs", "all"))
    assert one.truth.tolist() == several.truth.tolist()
    assert [int(t) for t in one.truth if t < 0] == [-1] * 4, "blank in the table"


def test_predictions_are_those_of_the_runs(done):
    said = Predictions.read(done / "predictions.csv")
    for fold in (0, 1):
        for split, file in (("test", "predictions.csv"), ("validation", "validation.csv")):
            rows = {row["patient"]: row for row in read_table(done / "runs/all/folds" / str(fold) / file)}
            answers = said.entries["all", "gcs", split]
            mine = [i for i, at in enumerate(answers.fold) if at == fold]
            assert {answers.patients[i] for i in mine} == set(rows)
            for i in mine:
                row = rows[answers.patients[i]]
                theirs = [float(row[f"gcs_{label}"]) for label in ("13-15", "9-12", "3-8")]
                assert answers.probabilities[i].tolist() == theirs
                assert answers.truth[i] == (["13-15", "9-12", "3-8"].index(row["gcs_true"]) if row["gcs_true"] else -1)


def test_a_study_says_what_it_was(done, folder):
    said = json.loads((done / "study.json").read_text())
    assert said["compared"] | {"sha256": ""} == {
        "patients": 28, "sha256": "", "folds": 2, "stratify_by": "prognosis", "split_seed": 1, "validation": 0.25,
        "brain": "given",
    }  # fmt: skip
    assert said["cohort"]["simulated"] is False
    assert set(said["variants"]) == {"one", "gcs", "all"}
    assert said["variants"]["all"]["model"]["name"] == "all"
    assert said["variants"]["all"]["protocol"]["recalibrate"] is False
    assert said["left_out"] == {"score": "the cohort has no column ich_score"}
    tested = [name for fold in said["membership"].values() for name in fold["test"]]
    assert sorted(tested) == [f"P{number:02}" for number in range(28)]
    assert said["versions"]["torch"]
    assert ichprog.load_model(f"local-dir:{done / 'runs/all'}").spec.name == "all"


def test_what_is_done_is_left_alone(done, folder, study, tmp_path):
    out = copied(done, tmp_path / "out")
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".json", ".log")
    }
    told = []
    found = jobs.run(study(), out, cache_dir=folder / "c", progress=told.append)
    assert names(found) == names(told) == JOBS
    kept = {path: path.stat().st_mtime_ns for path in before if path.name != "study.json"}
    assert kept == {path: when for path, when in before.items() if path.name != "study.json"}
    assert (out / "predictions.csv").read_bytes() == (done / "predictions.csv").read_bytes()


def test_only_what_is_missing_is_done(done, folder, study, tmp_path, monkeypatch):
    """A fold whose model was not joined yet, a baseline, and a variant that the study did not have."""
    out = copied(done, tmp_path / "out")
    (out / "runs/gcs/config.json").unlink()
    (out / "baselines/clinical.csv").unlink()
    trained = []
    from ichprog.train import trainer

    train_fold = trainer.train_fold
    monkeypatch.setattr(
        trainer, "train_fold", lambda job, *rest: trained.append((job.spec.name, job.fold)) or train_fold(job, *rest)
    )
    asked = study(
        STUDY + '[[variant]]\nname = "new"\nmodel = "spec.json"\ntasks = ["prognosis"]\nshape = [4, 16, 16]\n'
    )
    assert names(jobs.status(asked, out), "missing") == ["gcs-0", "gcs-1", "new-0", "new-1", "clinical"]
    found = jobs.run(asked, out, cache_dir=folder / "c")
    assert len(names(found)) == 11
    assert trained == [("new", 0), ("new", 1)]
    again, before = (Predictions.read(at / "predictions.csv").entries for at in (out, done))
    assert len(again) == len(before) + 2
    assert all(again[key].probabilities.tolist() == answers.probabilities.tolist() for key, answers in before.items())


def test_a_baseline_that_changed_is_fitted_again(done, folder, study, tmp_path):
    out = copied(done, tmp_path / "out")
    jobs.run(study(more=BASELINES.replace('["age", "gcs"]', '["age"]')), out, cache_dir=folder / "c")
    again, before = (Predictions.read(at / "predictions.csv").entries for at in (out, done))
    key = ("clinical", "prognosis", "test")
    assert again[key].probabilities.tolist() != before[key].probabilities.tolist()
    assert again["fusion", *key[1:]].probabilities.tolist() == before["fusion", *key[1:]].probabilities.tolist()


def test_a_learning_curve_trains_on_fewer_and_tests_on_the_same(folder, study, tmp_path):
    curve = '[learning_curve]\nsizes = [6, 8]\nvariants = ["one"]\n'
    asked = dataclasses.replace(study(more=curve), baselines=())
    asked = dataclasses.replace(asked, variants=asked.variants[:1])
    found = jobs.run(asked, tmp_path / "out", cache_dir=folder / "c")
    assert names(found) == [f"{run}-{fold}" for run in ("one", "one@6", "one@8") for fold in (0, 1)]
    runs = {
        run: json.loads((tmp_path / "out/runs" / run / "run.json").read_text()) for run in ("one", "one@6", "one@8")
    }
    for fold in ("0", "1"):
        whole, six, eight = (runs[run]["membership"][fold] for run in ("one", "one@6", "one@8"))
        assert (whole["train"][:6], whole["train"][:8]) == (six["train"], eight["train"])
        assert whole["test"] == six["test"] == eight["test"]
        assert whole["validation"] == six["validation"]
    said = Predictions.read(tmp_path / "out/predictions.csv")
    assert said.variants == ("one", "one@6", "one@8")
    one, six = (said.entries[name, "prognosis", "test"] for name in ("one", "one@6"))
    assert one.patients == six.patients
    assert one.probabilities.tolist() != six.probabilities.tolist()


# what goes wrong


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(folder, study, tmp_path, monkeypatch):
    train = ichprog.train.train

    def failing(cohort, spec, out, **options):
        if (out.name, options["only_folds"]) == ("gcs", [1]):
            raise RunError("the disk is full")
        if (out.name, options["only_folds"]) == ("all", [0]):
            raise ZeroDivisionError("a mistake in a plugin")
        return train(cohort, spec, out, **options)

    monkeypatch.setattr(ichprog.train, "train", failing)
    told = []
    found = jobs.run(study(), tmp_path / "out", cache_dir=folder / "c", progress=told.append)
    assert names(found, "failed") == ["gcs-1", "all-0", "fusion"]
    assert sorted(names(told)) == sorted(names(found)) == sorted(set(JOBS) - {"gcs-1", "all-0", "fusion"})
    said = {status.job.name: status.error for status in found}
    assert said["gcs-1"] == "RunError: the disk is full" == (tmp_path / "out/jobs/gcs-1.error").read_text().strip()
    assert said["all-0"].startswith("Traceback")
    assert "in failing" in said["all-0"]
    assert said["fusion"] == "RunError: Variant all is not done in every fold. Run the study again."
    assert Predictions.read(tmp_path / "out/predictions.csv").variants == ("one", "majority", "clinical")
    monkeypatch.undo()
    assert names(jobs.run(study(), tmp_path / "out", cache_dir=folder / "c")) == JOBS
    assert not list((tmp_path / "out/jobs").glob("*.error"))


def test_status_of_a_study_that_was_not_begun_and_of_a_cell_that_is_at_work(done, study, tmp_path):
    found = jobs.status(study(), tmp_path / "none")
    assert names(found, "missing") == [*JOBS, "score"]
    assert not (tmp_path / "none").exists()
    out = copied(done, tmp_path / "out")
    (out / "baselines/majority.csv").unlink()
    with FileLock(out / "jobs/.majority.lock"):
        assert names(jobs.status(study(), out), "running") == ["majority"]
    assert names(jobs.status(study(), out), "missing") == ["majority"]


def test_a_cell_that_another_process_does_is_left_to_it(done, folder, study, tmp_path):
    out = copied(done, tmp_path / "out")
    (out / "baselines/majority.csv").unlink()
    with FileLock(out / "jobs/.majority.lock"):
        found = jobs.run(study(), out, cache_dir=folder / "c")
    assert names(found, "running") == ["majority"]
    assert "majority" not in Predictions.read(out / "predictions.csv").variants


def test_a_folder_of_another_study_is_refused_with_what_differs(done, folder, study, tmp_path):
    out = copied(done, tmp_path / "out")
    before = (out / "study.json").read_bytes()

    def refused(said, text):
        with pytest.raises(RunError, match=said):
            jobs.run(study(text), out, cache_dir=folder / "c")
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
        jobs.run(study(), tmp_path / "else", cache_dir=folder / "c")
    assert [path.name for path in (tmp_path / "else").iterdir()] == ["notes.txt"]


def test_a_variant_that_was_never_trained_may_change(done, folder, study, tmp_path):
    out = copied(done, tmp_path / "out")
    shutil.rmtree(out / "runs/gcs")
    asked = study(STUDY.replace('tasks = ["gcs"]', 'tasks = ["gcs"]\nprotocol = { epochs = 1 }'))
    assert names(jobs.run(asked, out, cache_dir=folder / "c")) == JOBS
    assert len(read_table(out / "runs/gcs/folds/0/log.csv")) == 1


@pytest.mark.parametrize(
    ("text", "error", "said"),
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
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_trained(text, error, said, folder, study, tmp_path):
    with pytest.raises(error, match=said):
        jobs.run(study(text), tmp_path / "out", cache_dir=folder / "c")
    assert not list(tmp_path.glob("out/runs/*"))
    assert not (tmp_path / "out/predictions.csv").exists()


def test_a_baselines_column_that_is_not_there(folder, study, tmp_path):
    with pytest.raises(
        UnknownNameError, match=r"Unknown column of .* 'ages'\. Did you mean age.* Baseline clinical needs it"
    ):
        jobs.run(study(more=BASELINES.replace('"age", "gcs"', '"ages"')), tmp_path / "out", cache_dir=folder / "c")


# several processes


def test_processes_do_the_same_as_one_though_one_of_them_is_killed(done, folder, study, tmp_path):
    told, killed, seen = [], [], set()

    def watch(status):
        told.append(status)
        working = multiprocessing.active_children()
        seen.update(process.pid for process in working)
        if len(told) == 2 and not killed:
            killed.append(working[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    found = jobs.run(study(), tmp_path / "out", workers=2, cache_dir=folder / "c", progress=watch)
    assert names(found) == JOBS
    assert killed
    assert len(seen) > 2, "others took its place"
    assert (tmp_path / "out/predictions.csv").read_bytes() == (done / "predictions.csv").read_bytes()


def test_what_kills_every_process_fails_alone():
    from support import crashing_job

    ended = {}
    parallel.run_jobs(range(5), crashing_job.work, lambda item, error: ended.setdefault(item, error), workers=2)
    assert ended.pop(2) == "its process died each time; it may need more memory than there is"
    assert ended == {0: None, 1: None, 3: "wrong", 4: None}


def test_workers_of_dask_do_the_same_though_one_of_them_is_killed(done, folder, study, tmp_path):
    from distributed import LocalCluster

    told, killed = [], []
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local:

        def watch(status):
            told.append(status)
            if len(told) == 2 and not killed:
                killed.append(local.workers[0].pid)
                os.kill(killed[0], signal.SIGKILL)

        with parallel.cluster(scheduler=local.scheduler_address) as executor:
            found = jobs.run(study(), tmp_path / "out", executor=executor, cache_dir=folder / "c", progress=watch)
        assert killed[0] not in [nanny.pid for nanny in local.workers.values()]
    assert names(found) == JOBS
    assert (tmp_path / "out/predictions.csv").read_bytes() == (done / "predictions.csv").read_bytes()


def test_no_scheduler_at_an_address(monkeypatch):
    monkeypatch.setattr(parallel, "SCHEDULER_TIMEOUT_S", 1)
    with (
        pytest.raises(RunError, match=r"No dask scheduler answers at tcp://127\.0\.0\.1:1: "),
        parallel.cluster(scheduler="tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.slow
def test_the_smoke_study_is_done_from_nothing(tmp_path):
    """Its patients are simulated on the spot, and are there for the cells of other processes."""
    (tmp_path / "study.toml").write_text(config.template("smoke"))
    asked = Study.read(tmp_path / "study.toml")
    found = jobs.run(asked, tmp_path / "out", workers=2)
    assert {status.state for status in found} == {"done"}
    cohort = load_cohort(asked, tmp_path / "out")
    assert len(cohort) == 24
    said = Predictions.read(tmp_path / "out/predictions.csv")
    assert len(said.entries["all", "prognosis", "test"]) == 24
    assert len(split_folds(asked, cohort)) == 2
    assert json.loads((tmp_path / "out/study.json").read_text())["cohort"]["simulated"] is True
