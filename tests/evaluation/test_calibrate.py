"""`calibrate` and `fuse`: a model that was calibrated on a cohort, or combined with clinical values."""

import json
import math

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import expit, logit

import ichprog
from ichprog import CohortError, InvalidValueError, RunError, SpecError, UnknownNameError, registry
from ichprog.cli import main
from ichprog.cohort import Cohort
from ichprog.evaluation import calibrate, evaluate, fuse
from ichprog.export import export

from support.cohorts import read_table, with_columns
from support.models import fill_heads, local_model, mean_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENTS = 100
SPACING = np.diag([-7.0, -7.0, 14.0, 1.0])


def brain(level, *, noise=1.0, seed=0):
    """Return a scan whose brain has one density in HU, with noise."""
    i, j, k = np.ogrid[:32, :32, :10]
    inside = ((i - 16) / 10) ** 2 + ((j - 16) / 12) ** 2 + ((k - 5) / 4.6) ** 2 <= 1
    hu = np.where(inside, level + noise * np.random.default_rng(seed).standard_normal(inside.shape), 0)
    return nib.Nifti1Image(hu.round().astype(np.int16), SPACING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a cohort whose outcome depends on the density and on age, and a model that knows the density."""
    root, random = tmp_path_factory.mktemp("patients"), np.random.default_rng(0)
    rows = ["patient,scan,poor_outcome,gcs,age,ward"]
    for number in range(PATIENTS):
        level, age = random.uniform(25, 55), random.integers(50, 95)
        brain(level, seed=number).to_filename(root / f"{number}.nii.gz")
        poor = random.random() < expit((level - 40) / 6 + (age - 72) / 6)
        given = age if number % 10 else ""
        rows.append(f"P{number},{number}.nii.gz,{int(poor)},{random.integers(3, 16)},{given},{number % 2}")
    (root / "cohort.csv").write_text("\n".join(rows))
    registry.register_backbone("mean", mean_backbone)
    local_model(root / "model", "mean", shape=(8, 32, 32), folds=2, adjust=lambda state: fill_heads(state, 60.0, -9.0))
    description = json.loads((root / "model" / "config.json").read_text())
    description["input"]["expected_ranges"]["no-blood"] = [None, None]  # that check takes longer than the rest
    (root / "model" / "config.json").write_text(json.dumps(description))
    yield root
    registry.backbones.unregister("mean")


@pytest.fixture(scope="module")
def cohort(folder):
    return Cohort.read(folder / "cohort.csv")


@pytest.fixture(scope="module")
def model(folder):
    return ichprog.load_model(f"local-dir:{folder / 'model'}", runtime="torch")


@pytest.fixture(scope="module")
def calibrated(model, cohort, folder):
    calibrate(model, cohort, folder / "calibrated")
    return ichprog.load_model(f"local-dir:{folder / 'calibrated'}", runtime="torch")


@pytest.fixture(scope="module")
def fused(model, cohort, folder):
    return fuse(model, cohort, ["age"], folder / "fused", tasks=["prognosis"])


@pytest.fixture(scope="module")
def fused_model(fused, folder):
    assert fused.tasks[0].patients == PATIENTS - PATIENTS // 10
    return ichprog.load_model(f"local-dir:{folder / 'fused'}", runtime="torch")


@pytest.fixture(scope="module")
def answers(calibrated, cohort):
    return ichprog.predict(calibrated, cohort)


def invoke(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments), "--runtime", "torch"])


def test_a_calibrated_model_answers_like_before_and_adds_what_it_knows(model, calibrated):
    scan = brain(47)
    before, after = ichprog.predict(model, scan), ichprog.predict(calibrated, scan)
    assert after["prognosis"].probabilities == before["prognosis"].probabilities
    assert before.coverage is before.input_distance is before["prognosis"].calibrated is None
    (change,) = calibrated.spec.calibration.tasks["prognosis"].adjustments
    raw = after["prognosis"].probabilities["poor"]
    assert after["prognosis"].calibrated["poor"] == pytest.approx(expit(change.slope * logit(raw) + change.intercept))
    assert after.coverage == 0.9
    assert not after.input_distance.is_unusual
    assert json.loads(json.dumps(after.to_dict()))["tasks"]["prognosis"]["label_set"]
    with pytest.raises(InvalidValueError, match=r"has no calibration.*`ichprog calibrate`"):
        ichprog.predict(model, scan, coverage=0.9)
    with pytest.raises(InvalidValueError, match="between 0 and 1"):
        ichprog.predict(calibrated, scan, coverage=90)


def test_calibrated_probabilities_agree_with_the_outcomes(answers, calibrated, cohort):
    task = calibrated.spec.task("prognosis")
    truth, found = cohort.labels(task), [each["prognosis"] for each in answers]
    raw, after = np.array([[each.probabilities["poor"], each.calibrated["poor"]] for each in found]).T
    assert abs(after.mean() - truth.mean()) < 0.02 < abs(raw.mean() - truth.mean())
    hit = np.mean([task.labels[label] in each.label_set for label, each in zip(truth, found, strict=True)])
    assert 0.86 <= hit <= 0.97


def test_an_unusual_scan_is_flagged_and_every_task_abstains(calibrated):
    found = ichprog.predict(calibrated, brain(40, noise=9.0))
    assert found.input_distance.is_unusual
    assert list(found.abstained) == ["prognosis", "gcs", "age"]
    assert "unlike" in found.abstained["age"]


def test_the_command_line_calibrates_and_prints_sets(folder, tmp_path):
    out, arguments = tmp_path / "out", ["calibrate", f"local-dir:{folder / 'model'}", folder / "cohort.csv", "-o"]
    result = invoke(*arguments, out)
    assert result.exit_code == 0, result.output
    assert f"prognosis: {PATIENTS} patients; log-odds change by slope" in result.output
    assert "sets for 90 % hold the label of 8" in result.output
    brain(40).to_filename(tmp_path / "scan.nii.gz")
    named = ["-m", f"local-dir:{out}", "-o", tmp_path / "results.csv"]
    result = invoke("predict", tmp_path / "scan.nii.gz", *named, "--coverage", 0.8)
    assert result.exit_code == 0, result.output
    assert "at 80% coverage:" in result.output
    (row,) = read_table(tmp_path / "results.csv")
    calibrated = [float(row[f"prognosis_calibrated_{label}"]) for label in ("good", "poor")]
    assert sum(calibrated) == pytest.approx(1, abs=1e-3)
    assert row["coverage"] == "0.8000"
    assert row["prognosis_set"]
    assert float(row["input_distance"]) < float(row["input_distance_threshold"])
    again = invoke(*arguments, out)
    assert again.exit_code == 1
    assert "is not an empty folder" in again.output


def test_too_few_patients_are_an_error_with_their_number(model, cohort, tmp_path):
    few = Cohort(cohort.patients[:40], "few.csv")
    with pytest.raises(CohortError, match=r"prognosis 40, .*at least 50"):
        calibrate(model, few, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CohortError, match="36 patients have a label of prognosis and a number in age"):
        fuse(model, few, ["age"], tmp_path / "out", tasks=["prognosis"])


def test_the_combination_is_that_of_a_logistic_regression(fused_model, answers, cohort):
    from sklearn.linear_model import LogisticRegression

    (age,), task = fused_model.spec.clinical, fused_model.spec.task("prognosis")
    both = next(each for each in task.combinations if each.known == ("age",))
    ages = cohort.numbers("age")
    known = ~np.isnan(ages)
    p = np.array([each["prognosis"].probabilities["poor"] for each in answers])
    design = np.column_stack([logit(p), (ages - age.centre) / age.scale])[known]
    reference = LogisticRegression(C=1e6, max_iter=1000).fit(design, cohort.labels(task)[known])
    change = both.adjustments[0]
    scores = design @ [change.slope, change.coefficients["age"]] + change.intercept
    assert np.corrcoef(scores, reference.decision_function(design))[0, 1] > 0.995
    assert np.polyfit(reference.decision_function(design), scores, 1)[0] == pytest.approx(0.9, abs=0.1)  # shrunk


def test_a_fused_model_uses_what_is_known_and_says_what_it_changed(fused_model):
    scan = brain(40)
    old, young, unknown = (
        ichprog.predict(fused_model, scan, clinical=values) for values in ({"age": 92}, {"age": 52}, None)
    )
    assert old["prognosis"].probabilities["poor"] > 0.6 > 0.4 > young["prognosis"].probabilities["poor"]
    assert old.clinical.used == {"age": 92}
    assert unknown.clinical.missing == ("age",)
    assert unknown.clinical.contributions["prognosis"] == {}
    odds = [logit(each["prognosis"].probabilities["poor"]) for each in (old, unknown)]
    assert old.clinical.contributions["prognosis"]["age"] == pytest.approx(odds[0] - odds[1])
    assert old["age"].probabilities == young["age"].probabilities  # predicted from the image alone
    with pytest.raises(InvalidValueError, match=r"age 150\. Expected a number from 18 to 110 years"):
        ichprog.predict(fused_model, scan, clinical={"age": 150})


def test_the_figures_of_a_fusion_come_from_patients_that_were_not_fitted(fused, fused_model, cohort):
    (task,) = fused.tasks
    image, clinical, both = (task.auroc[name][0] for name in ("image", "clinical", "both"))
    assert both > max(image, clinical)
    assert task.gain[0] == pytest.approx(both - max(image, clinical))
    assert "cannot know" in fused.leakage
    evaluation = evaluate(fused_model, cohort, n_bootstrap=10)  # with the ages of the table
    assert evaluation.metrics["prognosis"]["auroc"]["value"] > both - 0.02
    assert "If they are among these, the metrics are too good." in evaluation.leakage.sentence


def test_a_fused_model_can_be_explained_and_refuses_to_be_exported(fused_model, tmp_path):
    saliency = ichprog.explain(fused_model, brain(40), method="grad_cam", clinical={"age": 80})
    assert not saliency.empty
    with pytest.raises(SpecError, match="no part of the network"):
        export(fused_model, tmp_path / "out")


def test_the_command_line_combines_and_reports_the_gain(folder, tmp_path):
    named = [f"local-dir:{folder / 'model'}", folder / "cohort.csv", "--columns", "age,ward", "--task", "prognosis"]
    result = invoke("fuse", *named, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert described["tasks"][0]["task"] == "prognosis"
    assert described["tasks"][0]["gain"][0] > 0
    spec = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(spec["tasks"][0]["combinations"]) == 4
    assert [value["lowest"] for value in spec["clinical"]] == [18, 0]  # age as in the zoo, ward by the cohort


@pytest.mark.parametrize(
    ("columns", "tasks", "error", "message"),
    [
        (["agee"], None, UnknownNameError, "Did you mean age"),
        (["age"], ["age"], InvalidValueError, "would predict itself"),
        (["age", "gcs", "ward", "x", "y"], None, InvalidValueError, "one to 4 columns"),
        (["scanner"], None, CohortError, "two different numbers"),
    ],
)
def test_wrong_columns_are_refused_before_anything_is_predicted(
    columns, tasks, error, message, model, cohort, tmp_path
):
    table = with_columns(cohort, scanner=lambda _: "1", x=str, y=str)
    with pytest.raises(error, match=message):
        fuse(model, table, columns, tmp_path / "out", tasks=tasks)


def test_a_model_with_clinical_values_is_not_fused_again(fused_model, cohort, tmp_path):
    with pytest.raises(InvalidValueError, match="uses clinical values already"):
        fuse(fused_model, cohort, ["gcs"], tmp_path / "out")


def test_a_folder_that_is_in_use_is_refused(model, cohort, folder):
    with pytest.raises(RunError, match="not an empty folder"):
        fuse(model, cohort, ["age"], folder)


def test_the_weights_and_the_record_of_a_run_stay_with_the_model(calibrated, model, folder):
    assert [file.sha256 for file in calibrated.weights] == [file.sha256 for file in model.weights]
    assert math.isfinite(calibrated.spec.calibration.inputs.threshold)
    assert {path.name for path in (folder / "calibrated").iterdir()} == {
        "config.json",
        "fold0.safetensors",
        "fold1.safetensors",
    }
