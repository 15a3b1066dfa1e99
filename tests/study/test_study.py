"""A study from its command to its report, and its analysis of predictions with known properties."""

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

from ichprog import CohortError, RunError
from ichprog import metrics as metrics_package
from ichprog.cli import main
from ichprog.cohort import Cohort
from ichprog.evaluation.predictions import Predictions, TaskPredictions
from ichprog.spec import PluginRef
from ichprog.study import analysis, saliency_results
from ichprog.study.config import Study
from ichprog.study.manifest import load_cohort

PATIENTS, FOLDS = 90, 3
STUDY = """
name = "random predictions"
cohort = ["cohort.csv"]
folds = 3
n_bootstrap = 200
brain = "given"
subgroups = { age = [70], ward = [] }
correlations = ["age", "gcs"]
readers = "readers.csv"
[learning_curve]
sizes = [10]
variants = ["one", "all"]
[[variant]]
name = "one"
model = "compact.prognosis_gcs3_age"
tasks = ["prognosis"]
[[variant]]
name = "all"
model = "compact.prognosis_gcs3_age"
[[baseline]]
name = "majority"
kind = "majority"
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Return a study with random predictions: "all" is better than "one", and both are overconfident."""
    folder, random = tmp_path_factory.mktemp("study"), np.random.default_rng(7)
    poor = random.random(PATIENTS) < 0.6
    gcs, age = random.integers(3, 16, PATIENTS), random.integers(50, 95, PATIENTS)
    rows = ["patient,scan,poor_outcome,gcs,age,ward"]
    for number in range(PATIENTS):
        (folder / f"{number}.nii.gz").touch()
        outcome = "" if number == 5 else int(poor[number])
        rows.append(f"p{number},{number}.nii.gz,{outcome},{gcs[number]},{age[number]},{'NS'[number % 2]}")
    (folder / "cohort.csv").write_text("\n".join(rows))
    calls = ["patient,first,second"]
    calls += [f"p{n},{int(poor[n] ^ (n % 4 == 0))},{'' if n % 3 else int(poor[n])}" for n in range(PATIENTS)]
    (folder / "readers.csv").write_text("\n".join(calls))
    (folder / "study.toml").write_text(STUDY)
    study = Study.read(folder / "study.toml")
    cohort = Cohort.read(folder / "cohort.csv")

    answers = {}
    known = {"one": 0.8, "all": 2.0, "one@10": 0.2, "all@10": 0.5, "majority": 0.0}
    for run, knows in known.items():
        for name in study.runs[run].variant.spec.tasks if run in study.runs else [study.task("prognosis")]:
            truth, labels = cohort.labels(name), len(name.labels)
            for split in ("validation", "test"):
                own = [n for n in range(PATIENTS) if (n + (split == "validation")) % FOLDS < FOLDS]
                fold = np.array([n % FOLDS if split == "test" else (n + 1) % FOLDS for n in own])
                score = 5 * (knows * truth[own] + random.standard_normal(len(own)) * (knows > 0)) - 5
                cuts = 1 / (1 + np.exp(-(score[:, None] - 2 * np.arange(labels - 1))))
                above = np.column_stack([np.ones(len(own)), cuts, np.zeros(len(own))])
                names = tuple(cohort.patients[n].name for n in own)
                answers[run, name.name, split] = TaskPredictions(names, fold, truth[own], above[:, :-1] - above[:, 1:])
    return study, cohort, Predictions(answers)


@pytest.fixture(scope="module")
def results(example):
    return analysis.analyse(*example)


def summarise(study, cohort, results, out):
    """Return the section with the answer of a study."""
    from ichprog.study.sections import ReportContext
    from ichprog.study.sections.summary import summary

    return next(summary(ReportContext(study, out, cohort, results, {})))


def test_the_summary_answers_the_question_with_the_interval_of_the_comparison(example, results, tmp_path):
    study, cohort, predictions = example
    question, answer, without_image, meaning = summarise(study, cohort, results, tmp_path).text
    assert 'also learns gcs and age ("all")' in question
    assert 'prognosis alone ("one")' in question
    row = next(
        r for r in results.comparisons if (r["variant"], r["metric"], r["task"]) == ("all", "auroc", "prognosis")
    )
    assert row["low"] > 0
    assert "Answer: Yes." in answer
    assert f"{row['difference']:.3f} ({row['low']:.3f} to {row['high']:.3f})" in answer
    assert "89 patients, 3 folds" in answer
    assert '"majority" reaches 0.500' in without_image
    predicted = predictions.entries["all", "prognosis", "test"].labelled()
    poor, good = (predicted.probabilities[predicted.truth == label, 1] for label in (1, 0))
    right = (poor[:, None] > good).mean() + 0.5 * (poor[:, None] == good).mean()
    assert f"in {100 * right:.0f} of 100 such pairs" in meaning


def test_the_summary_does_not_claim_what_an_interval_around_zero_does_not_show(example, tmp_path):
    study, cohort, predictions = example
    twin = {
        key: predictions.entries["one", "prognosis", key[2]] if key[:2] == ("all", "prognosis") else value
        for key, value in predictions.entries.items()
    }
    results = analysis.analyse(study, cohort, Predictions(twin))
    answer = summarise(study, cohort, results, tmp_path).text[1]
    assert "cannot tell, because the interval includes zero" in answer
    assert "Yes" not in answer


def test_metrics_are_computed_on_all_test_parts_together(example, results):
    from sklearn.metrics import cohen_kappa_score, mean_squared_error, roc_auc_score

    _, _, predictions = example
    predicted = predictions.entries["all", "prognosis", "test"].labelled()
    assert len(predicted) == PATIENTS - 1
    actual = results.metrics["all"]["prognosis"]["auroc"]
    assert actual["value"] == pytest.approx(roc_auc_score(predicted.truth, predicted.probabilities[:, 1]))
    assert actual["low"] < actual["value"] < actual["high"]
    for fold in range(FOLDS):
        own = predicted.select(predicted.fold == fold)
        actual = results.per_fold["all"]["prognosis"]["auroc"][fold]
        assert actual == pytest.approx(roc_auc_score(own.truth, own.probabilities[:, 1]))
    graded = predictions.entries["all", "gcs", "test"]
    above = np.column_stack([graded.probabilities[:, k:].sum(1) for k in (1, 2)])
    decided = (above > 0.5).sum(1)
    figures = results.metrics["all"]["gcs"]
    assert figures["rmse"]["value"] == pytest.approx(mean_squared_error(graded.truth, decided) ** 0.5)
    kappa = cohen_kappa_score(graded.truth, decided, weights="quadratic")
    assert figures["quadratic_kappa"]["value"] == pytest.approx(kappa)


def changed(predictions, split):
    """Return the predictions of one task with the labels of one split inverted."""
    inverted = {
        key: TaskPredictions(a.patients, a.fold, np.where(a.truth < 0, -1, 1 - a.truth), a.probabilities)
        if key[2] == split
        else a
        for key, a in predictions.entries.items()
        if key[:2] == ("all", "prognosis")
    }
    return Predictions(inverted)


def test_no_threshold_or_calibration_uses_test_patients(example):
    study, cohort, predictions = example
    alike = Predictions({key: a for key, a in predictions.entries.items() if key[:2] == ("all", "prognosis")})
    whole, other_test, other_validation = (
        analysis.analyse(study, cohort, each).analyses["all"]["prognosis"]
        for each in (alike, changed(alike, "test"), changed(alike, "validation"))
    )
    common = np.isin(whole.predictions.patients, other_test.predictions.patients)
    assert np.array_equal(whole.thresholds[common], other_test.thresholds[: common.sum()])
    assert np.array_equal(
        whole.recalibrated.probabilities[common], other_test.recalibrated.probabilities[: common.sum()]
    )
    assert np.array_equal(whole.sets[common], other_test.sets[: common.sum()])
    assert not np.array_equal(whole.thresholds, other_validation.thresholds)
    assert not np.allclose(whole.recalibrated.probabilities, other_validation.recalibrated.probabilities)


def test_a_threshold_is_optimal_on_the_validation_part_of_its_fold(example, results):
    from sklearn.metrics import balanced_accuracy_score

    _, _, predictions = example
    one = results.analyses["all"]["prognosis"]
    for fold in range(FOLDS):
        threshold = one.thresholds[one.predictions.fold == fold]
        assert len(set(threshold)) == 1
        predicted = predictions.entries["all", "prognosis", "validation"].labelled()
        predicted = predicted.select(predicted.fold == fold)
        p = predicted.probabilities[:, 1]
        reached = balanced_accuracy_score(predicted.truth, p > threshold[0])
        assert reached == max(balanced_accuracy_score(predicted.truth, p > cut) for cut in [*p, 0.0])


def test_recalibration_corrects_overconfidence_and_sets_reach_their_coverage(results):
    figures = results.metrics["all"]["prognosis"]
    assert figures["calibration_slope"]["value"] < 0.8  # overconfident by construction
    assert abs(np.log(figures["calibration_slope_recalibrated"]["value"])) < abs(
        np.log(figures["calibration_slope"]["value"])
    )
    assert figures["brier_recalibrated"]["value"] < figures["brier"]["value"]
    assert figures["conformal_coverage"]["low"] < 0.9 < figures["conformal_coverage"]["high"]
    assert 1 <= results.metrics["one"]["prognosis"]["conformal_size"]["value"] <= 2


def test_variants_are_compared_with_a_single_task_variant_of_the_same_backbone(example):
    """In the preset of the paper, the first variant has one task and another backbone."""
    study, cohort, predictions = example
    one = study.variants[0]
    other = replace(one, name="other", spec=replace(one.spec, backbone=PluginRef("perez2023", {})))
    study = replace(study, variants=(other, *study.variants), n_bootstrap=10)
    same = {("other", *key[1:]): entry for key, entry in predictions.entries.items() if key[0] == "one"}
    results = analysis.analyse(study, cohort, Predictions(predictions.entries | same))
    pairs = {row["variant"]: row["reference"] for row in results.comparisons if row["task"] == "prognosis"}
    assert {pairs[name] for name in ("other", "all", "majority")} == {"one"}


def test_variants_are_compared_with_the_single_task_variant_of_the_same_size(example, results):
    from statsmodels.stats.multitest import multipletests

    rows = [row for row in results.comparisons if row["metric"] == "auroc"]
    pairs = {(row["task"], row["variant"]): row["reference"] for row in rows}
    assert pairs == {
        ("prognosis", "all"): "one",
        ("prognosis", "majority"): "one",
        ("prognosis", "all@10"): "one@10",
    }
    family = [row for row in rows if row["variant"] in ("all", "majority")]
    adjusted = multipletests([row["p"] for row in family], method="holm")[1]
    assert [row["p_holm"] for row in family] == pytest.approx(adjusted.tolist())
    row = family[0]
    assert row["difference"] == pytest.approx(row["first"] - row["second"])
    assert row["first"] == results.metrics["all"]["prognosis"]["auroc"]["value"]
    assert row["low"] > 0


def test_subgroups_are_reported_separately(example, results):
    _, cohort, _ = example
    rows = {(row["column"], row["group"]): row for row in results.subgroups if row["variant"] == "all"}
    assert set(rows) == {("age", "< 70"), ("age", ">= 70"), ("ward", "N"), ("ward", "S")}
    young = [n for n, p in enumerate(cohort.patients) if float(p.columns["age"]) < 70 and p.columns["poor_outcome"]]
    assert rows["age", "< 70"]["patients"] == len(young)
    poor = sum(int(cohort.patients[n].columns["poor_outcome"]) for n in young)
    assert rows["age", "< 70"]["with_last_label"] == poor
    for column in ("age", "ward"):
        assert sum(row["patients"] for key, row in rows.items() if key[0] == column) == PATIENTS - 1


def test_readers_are_compared_with_each_trained_variant(results):
    assert set(results.readers) == {"one", "all"}
    first = results.readers["all"]["readers"]["first"]
    right = [n % 4 != 0 for n in range(PATIENTS) if n != 5]
    assert first["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert results.readers["all"]["readers"]["second"]["n"] == len([n for n in range(0, PATIENTS, 3) if n != 5])


def test_the_most_confident_mistakes_come_first(example, results):
    _, _, predictions = example
    predicted = predictions.entries["one", "prognosis", "test"].labelled()
    p = predicted.probabilities[:, 1]
    loss = np.where(predicted.truth == 1, 1 - p, p)
    worst = [predicted.patients[n] for n in np.argsort(-loss)[:5]]
    assert [row["patient"] for row in results.mistakes if row["variant"] == "one"] == worst


def test_the_learning_curve_contains_every_size(example, results):
    study, _, _ = example
    curve = analysis.learning_curves(study, results.metrics, 50)
    assert {name: list(sizes) for name, sizes in curve.items()} == {"one": [10, 50], "all": [10, 50]}
    assert curve["all"][50] == results.metrics["all"]["prognosis"]["auroc"]
    assert curve["all"][10] == results.metrics["all@10"]["prognosis"]["auroc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,first\np1,1\n", "Expected the column patient"),
        ("patient,first\np1,2\n", "row 2: Invalid call '2' of first"),
    ],
)
def test_an_invalid_table_of_readers_is_refused(text, message, example, tmp_path):
    import dataclasses

    study, cohort, predictions = example
    (tmp_path / "readers.csv").write_text(text)
    with pytest.raises(CohortError, match=message):
        analysis.analyse(dataclasses.replace(study, readers=tmp_path / "readers.csv"), cohort, predictions)


def test_a_written_table_of_predictions_reads_back_unchanged(example, tmp_path):
    _, _, predictions = example
    again = Predictions.read(predictions.write(tmp_path / "predictions.csv"))
    assert again.variants == predictions.variants
    for key, predicted in predictions.entries.items():
        assert again.entries[key].patients == predicted.patients
        for name in ("fold", "truth", "probabilities"):
            assert np.array_equal(getattr(again.entries[key], name), getattr(predicted, name))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.headings, self.pictures, self.tag = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])

    def handle_data(self, data):
        if self.tag == "h2" and data.strip():
            self.headings.append(data)
            self.tag = ""


def command(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run a smaller smoke preset from the command to the report."""
    pytest.importorskip("nilearn")
    folder = tmp_path_factory.mktemp("smoke")
    toml, out = folder / "study.toml", folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert command("study", "new", toml, "--preset", "smoke").exit_code == 0
        text = toml.read_text()
        for before, after in (
            ("patients = 24", "patients = 16\nmatrix = 64"),  # few pixels are simulated and read faster
            ("epochs = 6", "epochs = 1"),
            ("n_bootstrap = 200", "n_bootstrap = 50"),
        ):
            assert before in text
            text = text.replace(before, after)
        toml.write_text(text)
        done = command("study", "run", toml, "--output", out, "--saliency-patients", 2, "--cache-dir", folder / "cache")
        assert done.exit_code == 0, done.output
    return toml, out, done


def test_one_command_runs_a_study(smoke):
    _, out, done = smoke
    assert done.stdout.splitlines()[-1] == str(out / "report.html")
    assert done.stderr.splitlines()[-1] == "These patients are simulated. For research only, not for patient care."
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["all"]) == {"prognosis", "gcs", "age"}
    assert set(metrics["all"]["prognosis"]["auroc"]) == {"value", "low", "high"}
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:7] == ["variant", "fold", "split", "patient", "task", "truth", "p_0"]
    tested = [row["patient"] for row in rows if (row["variant"], row["task"], row["split"]) == ("all", "age", "test")]
    assert len(tested) == len(set(tested)) == 16
    for row in rows:
        predicted = [float(value) for name, value in row.items() if name.startswith("p_") and value]
        assert sum(predicted) == pytest.approx(1)


def test_metrics_can_be_recomputed_from_the_table_of_predictions(smoke):
    _, out, _ = smoke
    metrics = json.loads((out / "metrics.json").read_text())
    predictions = Predictions.read(out / "predictions.csv")
    for run in predictions.variants:
        predicted = predictions.entries[run, "prognosis", "test"]
        again = metrics_package.compute(predicted.truth, predicted.probabilities, kind="binary")["auroc"]
        assert metrics[run]["prognosis"]["auroc"]["value"] == pytest.approx(again, nan_ok=True)


def test_the_report_contains_every_section_table_and_figure(smoke):
    _, out, _ = smoke
    text = (out / "report.html").read_text()
    page = Page(text)
    for heading in [
        *(
            "Summary",
            "What was compared",
            "Patients",
            "Results: prognosis",
            "Results: gcs",
            "Probabilities",
            "Subgroups",
        ),
        *("Mistakes", "Saliency", "Training", "Limits", "TRIPOD+AI"),
    ]:
        assert heading in page.headings
    assert all(source.startswith("data:image/") for source in page.pictures)
    assert len(page.pictures) >= 12
    assert "The patients of this study are simulated." in text
    assert "Trained on 16 simulated patients (seed 1, preset " in text
    assert "AUC for a simulated" not in text, "a result of the embedded weights"
    assert "Column poor_outcome of the training patients" in text
    auroc = json.loads((out / "metrics.json").read_text())["all"]["prognosis"]["auroc"]["value"]
    assert re.search(rf"{auroc:.3f} \(", text)
    for name in ("prognosis", "prognosis-compared", "calibration", "saliency", "tripod"):
        assert {path.suffix for path in (out / "tables").glob(f"{name}.*")} == {".csv", ".md", ".tex"}
    assert {path.suffix for path in (out / "figures").glob("prognosis-auroc.*")} == {".svg", ".png"}


@pytest.mark.slow
def test_a_second_report_trains_and_measures_nothing(smoke):
    toml, out, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
    predicted = command("study", "status", toml, "--output", out, "--json")
    assert {each["state"] for each in json.loads(predicted.stdout)} == {"done"}
    report, table = (out / "report.html").read_bytes(), (out / "saliency.csv").read_bytes()
    again = command(
        "study", "report", toml, "--output", out, "--saliency-patients", 2, "--cache-dir", toml.parent / "cache"
    )
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "saliency.csv").read_bytes() == table
    assert (out / "report.html").read_bytes() == report


def test_one_command_draws_the_published_figure(smoke, tmp_path):
    toml, out, _ = smoke
    with (out / "predictions.csv").open() as file:
        patient = next(row["patient"] for row in csv.DictReader(file) if row["split"] == "test")
    target = tmp_path / "figure.png"
    done = command(
        "study", "figure", "saliency", toml, "--output", out, "--patient", f"{patient}:12", "--method", "grad_cam",
        "--figure", target, "--cache-dir", toml.parent / "cache",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert target.read_bytes().startswith(b"\x89PNG")
    wrong = command("study", "figure", "saliency", toml, "--output", out, "--patient", "nobody")
    assert wrong.exit_code == 2
    assert "Unknown patient that can be explained 'nobody'" in wrong.output


@pytest.mark.slow
def test_variants_with_a_missing_fold_are_not_explained(smoke, tmp_path):
    toml, out, _ = smoke
    study, copy = Study.read(toml), tmp_path / "out"
    shutil.copytree(out, copy)
    config = copy / "runs" / "all" / "config.json"
    predicted = json.loads(config.read_text())
    predicted["weights"]["sha256"].popitem()
    config.write_text(json.dumps(predicted))
    models = saliency_results.complete_variants(study, copy)
    assert set(models) == {"prognosis", "prognosis_gcs"}
    assert set(saliency_results.complete_variants(study, copy, task="gcs")) == {"prognosis_gcs"}
    with pytest.raises(RunError, match=r"No variant .* with the task age is done in every fold"):
        saliency_results.complete_variants(study, copy, task="age")
    table = copy / "patients" / "cohort.csv"
    without_masks = [replace(p, columns={**p.columns, "mask": ""}) for p in Cohort.read(table).patients]
    Cohort(tuple(without_masks), str(table)).write(table)
    (copy / "saliency.csv").unlink()
    assert saliency_results.measure_maps(study, load_cohort(study, copy), copy, 2) == []
    done = command(
        "study", "report", toml, "--output", copy, "--saliency-patients", 2, "--cache-dir", toml.parent / "cache"
    )
    assert done.exit_code == 0, done.output
    assert "Nothing was measured: no finished variant" in (copy / "report.html").read_text()


def test_wrong_use_of_the_study_command_is_refused(tmp_path):
    toml = tmp_path / "study.toml"
    assert "Unknown study preset 'none'" in command("study", "new", toml, "--preset", "none").output
    assert command("study", "new", toml, "--preset", "smoke").exit_code == 0
    assert command("study", "new", toml).exit_code == 2
    both = command("study", "run", toml, "--scheduler", "tcp://127.0.0.1:1", "--slurm", "queue=a")
    assert both.exit_code == 2
    toml.write_text(toml.read_text().replace("folds = 2", "fold = 2"))
    wrong = command("study", "run", toml)
    assert wrong.exit_code == 2
    assert "folds" in wrong.output
