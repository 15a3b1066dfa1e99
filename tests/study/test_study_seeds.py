"""Studies whose variants are trained with several seeds, and learning curves with equal steps and several draws."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ichprog import SpecError
from ichprog.cohort import Cohort
from ichprog.evaluation.predictions import Predictions, TaskPredictions
from ichprog.study import analysis, jobs, manifest
from ichprog.study.config import Study
from ichprog.study.sections import ReportContext, build_sections

from support.small_study import job_names

PATIENTS, FOLDS = 60, 3
STUDY = """
name = "seeds"
cohort = ["cohort.csv"]
folds = 3
seeds = [3, 5, 8]
n_bootstrap = 200
brain = "given"
baseline = []
[learning_curve]
sizes = [10]
variants = ["one"]
equal = ["epochs", "steps"]
draws = 2
[[variant]]
name = "one"
model = "compact.prognosis_gcs3_age"
tasks = ["prognosis"]
[[variant]]
name = "two"
model = "compact.prognosis_gcs3_age"
tasks = ["prognosis"]
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Return a study with made-up predictions. Those of the fold of patient 0 are shifted towards one label."""
    folder, random = tmp_path_factory.mktemp("seeds"), np.random.default_rng(1)
    rows = ["patient,scan,poor_outcome,gcs,age"]
    for number in range(PATIENTS):
        (folder / f"{number}.nii.gz").touch()
        rows.append(f"p{number},{number}.nii.gz,{number // 3 % 2},9,70")
    (folder / "cohort.csv").write_text("\n".join(rows))
    (folder / "study.toml").write_text(STUDY)
    study, cohort = Study.read(folder / "study.toml"), Cohort.read(folder / "cohort.csv")
    truth, names = cohort.labels(study.main_task), tuple(patient.name for patient in cohort.patients)
    entries = {}
    for run in study.runs:
        for split in ("validation", "test"):
            fold = (np.arange(PATIENTS) + (split == "validation")) % FOLDS
            signal = 0.7 if run.startswith("one") else 1.5
            score = signal * truth + random.standard_normal(PATIENTS) + 4 * (fold == 0) * run.startswith("one")
            p = 1 / (1 + np.exp(-score))
            entries[run, "prognosis", split] = TaskPredictions(names, fold, truth, np.column_stack([1 - p, p]))
    return study, cohort, Predictions(entries)


@pytest.fixture(scope="module")
def results(example):
    return analysis.analyse(*example)


def auroc(predictions, run, fold=None):
    entry = predictions.entries[run, "prognosis", "test"]
    chosen = slice(None) if fold is None else entry.fold == fold
    return roc_auc_score(entry.truth[chosen], entry.probabilities[chosen, 1])


def test_every_variant_and_every_draw_is_a_run(example):
    study, _, _ = example
    assert list(study.runs) == [
        *("one", "one@seed5", "one@seed8", "two", "two@seed5", "two@seed8"),
        *("one@10", "one@10@draw1", "one@10@steps", "one@10@steps@draw1"),
    ]
    assert [study.seed_of(run) for run in study.runs.values()] == [3, 5, 8, 3, 5, 8, 3, 5, 3, 5]


def test_a_metric_is_the_mean_over_trainings(example, results):
    _, _, predictions = example
    by_seed = [auroc(predictions, run) for run in ("two", "two@seed5", "two@seed8")]
    found = results.metrics["two"]["prognosis"]["auroc"]
    assert found["value"] == pytest.approx(np.mean(by_seed))
    assert found["low"] < found["value"] < found["high"]
    assert "two@seed5" not in results.metrics
    in_fold = [auroc(predictions, run, 1) for run in ("two", "two@seed5", "two@seed8")]
    assert results.per_fold["two"]["prognosis"]["auroc"][1] == pytest.approx(np.mean(in_fold))
    curve = [auroc(predictions, run) for run in ("one@10@steps", "one@10@steps@draw1")]
    assert results.metrics["one@10@steps"]["prognosis"]["auroc"]["value"] == pytest.approx(np.mean(curve))


def test_comparisons_and_variances_use_all_trainings(example, results):
    _, _, predictions = example
    row = next(row for row in results.comparisons if row["metric"] == "auroc" and row["variant"] == "two")
    one, two = (
        np.mean([auroc(predictions, run) for run in (name, f"{name}@seed5", f"{name}@seed8")])
        for name in ("one", "two")
    )
    assert row["reference"] == "one"
    assert row["difference"] == pytest.approx(two - one)
    assert row["method"] == "bootstrap of patients and trainings"
    assert 0 < row["p_folds"] <= 1
    (variance,) = (row for row in results.variances if row["variant"] == "two")
    by_seed = [auroc(predictions, run) for run in ("two", "two@seed5", "two@seed8")]
    assert variance["seeds_sd"] == pytest.approx(np.std(by_seed, ddof=1))
    assert [variance["lowest"], variance["highest"]] == pytest.approx([min(by_seed), max(by_seed)])


def test_the_report_shows_seeds_and_folds_that_disagree(example, results, tmp_path):
    study, cohort, _ = example
    record = manifest.build_manifest(study, cohort)
    untrained = dataclasses.replace(results, mistakes=[])  # pictures of mistakes need trained networks
    context = ReportContext(study, tmp_path, cohort, untrained, record)
    text = str(build_sections(context, saliency_patients=0))
    assert "Every variant was trained with 3 random seeds" in text
    assert "of all folds together disagrees with that of the single folds for one (" in text
    assert "two (" not in text
    assert "drawn 2 times" in text
    assert "one@seed5" not in text
    with (tmp_path / "tables" / "learning-curve-steps.csv").open() as file:
        fewer, whole = csv.DictReader(file)
    assert (int(fewer["size"]), int(whole["size"])) == (10, 36)
    assert int(fewer["epochs"]) > int(whole["epochs"])


def test_seeds_and_draws_are_trained(patients_folder, make_study, tmp_path):
    text = (
        'name = "seeds"\ncohort = ["cohort.csv"]\nfolds = 2\nseeds = [4, 9]\nbrain = "given"\ndevice = "cpu"\n'
        "baseline = []\n[protocol]\nepochs = 2\nwarmup_epochs = 1\npatience = 2\nbatch_size = 4\n"
        'validation_fraction = 0.25\n[learning_curve]\nsizes = [5]\nequal = ["steps"]\ndraws = 2\n'
        '[[variant]]\nname = "one"\nmodel = "spec.json"\ntasks = ["prognosis"]\n'
    )
    study = make_study(text, more="")
    statuses = jobs.run(study, tmp_path / "out", cache_dir=patients_folder / "c")
    runs = ("one", "one@seed9", "one@5@steps", "one@5@steps@draw1")
    assert job_names(statuses) == [f"{run}-{fold}" for run in runs for fold in (0, 1)]
    records = {run: json.loads((tmp_path / "out/runs" / run / "run.json").read_text()) for run in runs}
    protocols = {run: record["protocol"] for run, record in records.items()}
    assert [protocols[run]["seed"] for run in runs] == [4, 9, 4, 9]
    # 10 patients in batches of 4 are 3 steps, and 5 patients are 1 or 2
    assert [protocols[run]["epochs"] for run in runs[:2]] == [2, 2]
    assert protocols["one@5@steps"]["epochs"] > 2
    for fold in ("0", "1"):
        parts = [records[run]["membership"][fold] for run in runs]
        assert parts[0] == parts[1]
        assert parts[2]["train"] == parts[0]["train"][:5]
        assert set(parts[3]["train"]) < set(parts[0]["train"])
        assert parts[3]["train"] != parts[2]["train"]
        assert parts[3]["test"] == parts[0]["test"]
    found = Predictions.read(tmp_path / "out/predictions.csv").entries
    first, second = (found[run, "prognosis", "test"].probabilities for run in runs[:2])
    assert first.shape == second.shape
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds = [3, 3]", r"Invalid seeds \[3, 3\]. Expected different numbers"),
        ("seeds = [-1]", "Invalid seeds"),
        ("draws = 0", "Invalid learning_curve.draws 0. Expected 1 or more"),
        ('equal = ["steps", "steps"]', "Invalid learning_curve.equal"),
    ],
    ids=["repeated seed", "negative seed", "no draw", "repeated budget"],
)
def test_wrong_values_are_refused(tmp_path, change, message):
    key = change.split(" =")[0]
    lines = [change if line.split(" =")[0] == key else line for line in STUDY.splitlines()]
    (tmp_path / "study.toml").write_text("\n".join(lines))
    with pytest.raises(SpecError, match=message):
        Study.read(tmp_path / "study.toml")
