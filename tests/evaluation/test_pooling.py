"""Summaries of hospitals: pooled figures equal those of a joint table, and no patient can be recovered."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from sklearn.metrics import brier_score_loss, roc_auc_score

from ichprog import InvalidValueError, RunError, zoo
from ichprog.cli import main
from ichprog.cli.evaluate import evaluate as command
from ichprog.evaluation import pool_summaries
from ichprog.evaluation.pooling import recalibration_step
from ichprog.evaluation.summary import MIN_COUNT, SUMS, build_summary, read_summary
from ichprog.evaluation.validation import EventValidation
from ichprog.metrics import compute
from ichprog.metrics.calibration import calibration_estimates, log_odds

SPEC = zoo.find("densenet121.prognosis_gcs3_age")
WEIGHTS = [{"fold": 0, "sha256": "a" * 64}]
SIZES = {"north": 120, "south": 260, "west": 90}


def event_of(truth, p, name="poor"):
    return EventValidation(name, np.asarray(truth, bool), np.asarray(p, float), {}, (), {}, ())


def patients(n, *, seed, shift=0.0, stretch=1.0):
    random = np.random.default_rng(seed)
    x = random.normal(-0.2, 1.3, n)
    truth = random.random(n) < 1 / (1 + np.exp(-x))
    return truth, 1 / (1 + np.exp(-(stretch * x + shift)))


def summarise(truth, p, *, spec=SPEC, weights=WEIGHTS, **options):
    return build_summary(spec, weights, {"prognosis": [event_of(truth, p)]}, simulated=False, **options)


@pytest.fixture(scope="module")
def hospitals():
    """Return truth and probabilities of three hospitals with other calibrations."""
    return {
        name: patients(n, seed=seed, shift=0.3 * seed, stretch=1 + 0.2 * seed)
        for seed, (name, n) in enumerate(SIZES.items())
    }


def write(folder, summaries):
    paths = []
    for name, summary in summaries.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(summary))
    return paths


@pytest.fixture
def files(hospitals, tmp_path):
    return write(tmp_path, {name: summarise(*each) for name, each in hospitals.items()})


# pooled figures


def test_additive_figures_equal_those_of_a_joint_table(hospitals, files):
    truth, p = (np.concatenate(column) for column in zip(*hospitals.values(), strict=True))
    (task,) = pool_summaries(files).tasks
    found = task.together
    assert (found["patients"], found["events"]) == (470, truth.sum())
    assert found["brier"] == pytest.approx(brier_score_loss(truth, p), abs=1e-9)
    assert found["expected_events"] == pytest.approx(p.sum(), abs=1e-9 * 470)
    assert found["observed_expected"] == pytest.approx(truth.sum() / p.sum(), abs=1e-9)
    design = np.stack([np.ones(470), log_odds(p)], axis=1)
    gradient, information = design.T @ (truth - p), design.T @ (design * (p * (1 - p))[:, None])
    step = np.linalg.inv(information) @ gradient
    assert found["first_step_intercept"] == pytest.approx(step[0], abs=1e-9)
    assert found["first_step_slope"] == pytest.approx(1 + step[1], abs=1e-9)
    chi2 = gradient @ np.linalg.inv(information) @ gradient
    assert found["score_chi2"] == pytest.approx(chi2, rel=1e-9)
    assert found["score_p"] == pytest.approx(stats.chi2.sf(chi2, 2), rel=1e-8)


def test_the_area_of_all_patients_is_within_its_bound(hospitals, files):
    truth, p = (np.concatenate(column) for column in zip(*hospitals.values(), strict=True))
    (task,) = pool_summaries(files).tasks
    assert abs(task.together["auroc"] - roc_auc_score(truth, p)) <= task.together["auroc_bound"] < 0.1
    for row in task.rates:
        assert row["sensitivity"] == pytest.approx((p[truth] >= row["threshold"]).mean(), abs=1e-12)
        assert row["specificity"] == pytest.approx((p[~truth] < row["threshold"]).mean(), abs=1e-12)


def test_each_site_has_the_figures_of_its_own_patients(hospitals, files):
    (task,) = pool_summaries(files).tasks
    for row in task.sites:
        truth, p = hospitals[row["site"]]
        values = compute(truth, p, kind="binary")
        assert row["brier"] == pytest.approx(values["brier"], abs=1e-9)
        assert abs(row["auroc"]["value"] - values["auroc"]) <= row["auroc_bound"]
        assert row["auroc"]["low"] < row["auroc"]["value"] < row["auroc"]["high"]
        assert row["calibration_slope"]["value"] == pytest.approx(values["calibration_slope"], abs=6e-5)
        assert row["calibration_intercept"]["value"] == pytest.approx(values["calibration_intercept"], abs=6e-5)
        error = np.sqrt((1 - truth.mean()) / truth.sum())
        assert row["observed_expected"]["high"] == pytest.approx(truth.sum() / p.sum() * np.exp(1.96 * error), rel=1e-3)
    slopes = task.between_sites["calibration_slope"]
    assert slopes.sites == 3
    assert min(row["calibration_slope"]["value"] for row in task.sites) < slopes.value
    assert slopes.prediction_low < slopes.low < slopes.value < slopes.high < slopes.prediction_high


def test_calibration_estimates_have_the_errors_of_logistic_regression():
    import statsmodels.api as sm

    truth, p = patients(150, seed=7, stretch=1.4)
    x, family = log_odds(p), sm.families.Binomial()
    fit = sm.GLM(truth.astype(float), sm.add_constant(x), family=family).fit()
    offset = sm.GLM(truth.astype(float), np.ones(150), family=family, offset=x).fit()
    found = calibration_estimates(truth, p)
    assert found["slope"] == pytest.approx((fit.params[1], fit.bse[1]), rel=1e-5)
    assert found["intercept"] == pytest.approx((offset.params[0], offset.bse[0]), rel=1e-5)


# privacy


def integers(value):
    """Yield every whole number of a summary's tasks."""
    if isinstance(value, dict):
        for each in value.values():
            yield from integers(each)
    elif isinstance(value, list):
        for each in value:
            yield from integers(each)
    elif isinstance(value, int):
        yield value


@pytest.mark.parametrize("min_count", [3, 5, 10])
def test_no_count_is_below_the_limit_and_none_is_left_out(min_count):
    for seed in range(12):
        truth, p = patients(100 + 10 * seed, seed=seed, shift=seed - 6)
        summary = summarise(truth, p, min_count=min_count)
        for task in summary["tasks"].values():
            assert min(integers([task["with_event"], task["without_event"]])) >= min_count
            # all patients are in the published counts, so that no hidden count follows from a total
            assert (sum(task["with_event"]), sum(task["without_event"])) == (truth.sum(), (~truth).sum())
            assert all(round(edge * 20, 9) == round(edge * 20) for edge in task["edges"])


def test_a_summary_names_no_patient_file_or_extreme_value():
    truth, p = patients(200, seed=3)
    text = json.dumps(summarise(truth, p))
    numbers = {float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", text)}
    assert not {round(float(value), 12) for value in p} & {round(number, 12) for number in numbers}
    for value in (p.min(), p.max(), p[truth].min(), p[~truth].max()):
        assert f"{value:.6f}"[:8] not in text
    assert set(json.loads(text)) == {
        "format", "format_version", "ichprog", "model", "spec_sha256", "weights", "simulated", "min_count", "tasks",
        "withheld", "notice",
    }  # fmt: skip


def test_every_patient_may_have_had_another_score():
    """Another cohort, in which every patient's score differs, has exactly the same counts and sums.

    The sums are seven equations for the scores of 80 patients. A random step along their common tangent, corrected by
    Newton's method, gives the other cohort.
    """
    truth, p = patients(80, seed=5)
    task = summarise(truth, p)["tasks"]["prognosis"]
    edges = np.array(task["edges"])
    sign = np.where(truth, 1.0, 0.0)

    def equations(x):
        q = 1 / (1 + np.exp(-x))
        v = q * (1 - q)
        values = np.array([q @ sign, q @ (1 - sign), q @ q, (sign - q) @ x, v @ x, v @ x**2])
        v1 = v * (1 - 2 * q)
        jacobian = np.stack([v * sign, v * (1 - sign), 2 * q * v, sign - q - v * x, v1 * x + v, v1 * x**2 + 2 * v * x])
        return values, jacobian

    x = log_odds(p)
    target, jacobian = equations(x)
    assert len(target) == len(SUMS)
    np.testing.assert_allclose(target, list(task["sums"].values()), rtol=1e-11)
    direction = np.random.default_rng(0).choice([-1.0, 1.0], 80)
    direction -= np.linalg.pinv(jacobian) @ (jacobian @ direction)
    limits = log_odds(edges)
    below, above = limits[np.searchsorted(edges, p, side="right") - 1], limits[np.searchsorted(edges, p, side="right")]
    other = x + direction * np.minimum(0.05, np.minimum(x - below, above - x) / 2)
    for _ in range(100):
        values, jacobian = equations(other)
        other -= np.linalg.pinv(jacobian) @ (values - target)
        if np.abs(values - target).max() < 1e-13:
            break
    q = 1 / (1 + np.exp(-other))
    again = summarise(truth, q)["tasks"]["prognosis"]
    assert {key: again[key] for key in ("edges", "with_event", "without_event")} == {
        key: task[key] for key in ("edges", "with_event", "without_event")
    }
    np.testing.assert_allclose(list(again["sums"].values()), list(task["sums"].values()), rtol=1e-11)
    assert (np.abs(q - p) > 1e-6).all()
    assert np.median(np.abs(q - p)) > 1e-3


def test_a_task_with_few_patients_is_withheld(tmp_path, hospitals):
    truth, p = patients(49, seed=1)
    few = summarise(truth, p)
    assert few["tasks"] == {}
    assert "fewer than 50 patients" in few["withheld"]["prognosis"]
    one_sided = summarise(np.arange(200) < 4, np.linspace(0, 1, 200))
    assert one_sided["tasks"] == {}
    assert not re.search(r"\b(49|4|196)\b", json.dumps([few["withheld"], one_sided["withheld"]]))
    given = {name: summarise(*each) for name, each in hospitals.items()}
    pooled = pool_summaries(write(tmp_path, given | {"small": few}))
    assert pooled.tasks[0].withheld == ("small",)
    assert pooled.tasks[0].together["patients"] == 470
    with pytest.raises(InvalidValueError, match="not withheld"):
        pool_summaries(write(tmp_path, {"small": few, "other": few}))


def test_only_the_last_label_of_a_task_is_summarised():
    """Events of one task share patients, so that differences of their counts could be small."""
    truth, p = patients(120, seed=2)
    events = {"gcs": [event_of(truth, p, "9-12 or later"), event_of(truth & (p > 0.4), p / 2, "3-8")]}
    summary = build_summary(SPEC, WEIGHTS, events, simulated=False)
    assert summary["tasks"]["gcs"]["event"] == "3-8"


def test_a_limit_that_protects_nobody_is_refused():
    with pytest.raises(InvalidValueError, match="min_count 2"):
        summarise(*patients(100, seed=0), min_count=2)
    assert MIN_COUNT == 5


# refusals


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": "other.model"}, "models: densenet121.prognosis_gcs3_age and other.model"),
        ({"spec_sha256": "f" * 64}, "tasks, preprocessing or networks"),
        ({"weights": [{"fold": 0, "sha256": "b" * 64}]}, "weights"),
        ({"ichprog": "9.9"}, "versions of ichprog"),
    ],
)
def test_summaries_of_other_models_or_versions_are_refused(change, what, hospitals, tmp_path):
    given = {name: summarise(*each) for name, each in hospitals.items()}
    given["south"] |= change
    with pytest.raises(InvalidValueError, match=f"north.json and south.json.*different {what}"):
        pool_summaries(write(tmp_path, given))


def test_a_site_counts_once(files):
    with pytest.raises(InvalidValueError, match="each site once"):
        pool_summaries([*files, files[0]])
    with pytest.raises(InvalidValueError, match="at least 2"):
        pool_summaries(files[:1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda summary: summary.pop("tasks"), "damaged"),
        (lambda summary: summary["tasks"]["prognosis"]["with_event"].__setitem__(0, 4), "a count is below 5"),
        (lambda summary: summary["tasks"]["prognosis"]["edges"].pop(0), "edges and counts"),
        (lambda summary: summary["tasks"]["prognosis"]["sums"].pop("p_squared"), "a number is missing"),
        (lambda summary: summary.update(format_version=2), "has format version 2"),
        (lambda summary: summary.pop("format_version"), "is no summary"),
    ],
)
def test_a_damaged_summary_is_refused(damage, message, files):
    summary = json.loads(files[0].read_text())
    damage(summary)
    files[0].write_text(json.dumps(summary))
    with pytest.raises(RunError, match=message):
        read_summary(files[0])


def test_files_that_are_no_summary_are_refused(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        read_summary(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("patients")
    with pytest.raises(RunError, match="is no JSON"):
        read_summary(tmp_path / "text.json")


def test_alike_probabilities_have_no_recalibration():
    sums = dict.fromkeys(SUMS, 0.0) | {"patients": 10.0, "events": 5.0, "p_with_event": 2.5, "p_without_event": 2.5}
    assert recalibration_step(sums | {"p_squared": 2.5})["first_step_slope"] is None


# the command


def test_the_command_pools_summaries_and_writes_a_report(files, tmp_path, monkeypatch):
    monkeypatch.setitem(main.commands, "evaluate", command)
    given = ["evaluate", "--pool", *map(str, files)]
    text = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "out")])
    assert text.exit_code == 0, text.output
    for words in (
        "densenet121.prognosis_gcs3_age at 3 sites: north, south, west.",
        "north: 120 patients",
        "together: 470 patients; AUROC 0.",
        "AUROC: 0.",
        "I2 ",
        "prediction interval",
    ):
        assert words in text.stdout, words
    shown = json.loads(CliRunner().invoke(main, [*given, "--json"]).stdout)
    assert shown == json.loads((tmp_path / "out/pooled.json").read_text())
    report = (tmp_path / "out/report.html").read_text()
    assert "a new site" in (tmp_path / "out/figures/auroc-prognosis.svg").read_text()
    assert "95 % prediction interval" in report
    assert (tmp_path / "out/tables/sites-prognosis.csv").is_file()
    wrong = CliRunner().invoke(main, ["evaluate", "--pool", str(files[0])])
    assert wrong.exit_code == 2
    missing = CliRunner().invoke(main, ["evaluate", "densenet121.prognosis_gcs3_age"])
    assert missing.exit_code == 2
    assert "COHORT" in missing.output
