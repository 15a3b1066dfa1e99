"""Calibration: changes of log-odds, conformal sets, the distance of a scan, and when a prediction abstains."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.special import expit, logit

from ichprog import SpecError, zoo
from ichprog.calibration import adjust, conformal_set, input_statistics, measure_distance
from ichprog.metrics.conformal import conformal_sets
from ichprog.results import InputDistance, Prediction, TaskPrediction
from ichprog.spec import Adjustment, Calibration, Combination, InputDistribution, ModelSpec, TaskCalibration
from ichprog.train.calibration import MIN_PATIENTS, coverage_interval, fit_calibration, fit_inputs, fit_task

SPEC = zoo.find("compact.prognosis_gcs3_age")
BINARY, ORDINAL = SPEC.task("prognosis"), SPEC.task("gcs")


def draw_binary(number, seed, *, slope=1.0, shift=0.0):
    """Return labels and probabilities, which are right if slope is 1 and shift is 0."""
    random = np.random.default_rng(seed)
    odds = random.normal(0, 1.5, number)
    truth = (random.random(number) < expit(odds)).astype(int)
    p = expit((odds - shift) / slope)
    return truth, np.column_stack([1 - p, p])


def draw_ordinal(number, seed):
    random = np.random.default_rng(seed)
    score = random.normal(0, 1.5, number)
    above = expit(np.column_stack([score, score - 1.5]))
    p = np.column_stack([1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1]])
    truth = (random.random((number, 1)) > np.cumsum(p, axis=1)).sum(1)
    sharp = p**2 / (p**2).sum(1, keepdims=True)  # overconfident
    return truth, sharp


def draw_grid(seed, *, noise=0.02):
    random = np.random.default_rng(seed)
    k, j, i = np.ogrid[:12, :32, :32]
    inside = ((i - 16) / 12) ** 2 + ((j - 16) / 14) ** 2 + ((k - 6) / (5 + random.normal(0, 0.2))) ** 2 < 1
    values = random.normal(0.4, 0.02) + noise * random.standard_normal(inside.shape)
    return np.where(inside, values, 0).clip(0, 1).astype(np.float32)


def test_adjusted_probabilities_of_two_labels_follow_the_formula():
    p = np.array([[0.2, 0.8], [0.9, 0.1]])
    actual = adjust(BINARY, p, [Adjustment(1.5, -0.3, {"age": 2.0})], {"age": np.array([0.5, -1.0])})
    expected = expit(1.5 * logit(p[:, 1]) - 0.3 + 2.0 * np.array([0.5, -1.0]))
    assert np.allclose(actual[:, 1], expected)
    assert np.allclose(actual.sum(1), 1)


def test_adjusted_probabilities_of_ordered_labels_never_turn_negative():
    p = np.array([[0.5, 0.3, 0.2]])
    above = expit(logit(0.5) - 2), expit(logit(0.2) + 3)  # in the wrong order
    actual = adjust(ORDINAL, p, [Adjustment(1, -2), Adjustment(1, 3)])
    assert np.allclose(actual, [[1 - above[0], 0, above[0]]])


def test_adjusted_probabilities_of_unordered_labels_sum_to_one():
    task = dataclasses.replace(ORDINAL, threshold=None)
    p = np.array([[0.5, 0.3, 0.2]])
    changed = expit(logit(p) + np.array([0.0, 1.0, 0.0]))
    actual = adjust(task, p, [Adjustment(1, 0), Adjustment(1, 1), Adjustment(1, 0)])
    assert np.allclose(actual, changed / changed.sum())


def test_the_recalibration_equals_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    truth, p = draw_binary(4000, 1, slope=0.6, shift=0.5)
    (fitted,) = fit_task(BINARY, truth, p).adjustments
    reference = LogisticRegression(C=1e6).fit(logit(p[:, 1:]), truth)
    assert fitted.slope == pytest.approx(reference.coef_[0, 0], rel=0.01)
    assert fitted.intercept == pytest.approx(reference.intercept_[0], abs=0.01)


def test_few_events_leave_the_probabilities_as_they_are():
    truth, p = draw_binary(60, 2)
    truth[:] = 0
    truth[:9] = 1
    assert fit_task(BINARY, truth, p).adjustments == (Adjustment(1.0, 0.0),)


@pytest.mark.parametrize(("task", "draw"), [(BINARY, draw_binary), (ORDINAL, draw_ordinal)])
@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_hold_the_label_of_new_patients_with_the_chosen_coverage(task, draw, coverage):
    truth, p = draw(2000, 3)
    fitted = fit_task(task, truth, p)
    new, raw = draw(4000, 4)
    changed = adjust(task, raw, fitted.adjustments)
    sets = [conformal_set(task, fitted, each, coverage) for each in changed]
    hit = np.mean([task.labels[label] in labels for label, labels in zip(new, sets, strict=True)])
    assert hit == pytest.approx(coverage, abs=0.02)


def test_sets_are_those_of_the_metrics_and_hold_the_most_probable_label():
    truth, p = draw_binary(500, 5)
    limit = np.sort(p[np.arange(500), truth])[::-1][int(np.ceil(501 * 0.9)) - 1]
    fitted = TaskCalibration(500, (Adjustment(1, 0),), {"90": float(limit)})
    expected = conformal_sets(truth, p, p, coverage=0.9)
    for row, wanted in zip(p[:50], expected, strict=False):
        wanted[row.argmax()] = True
        assert conformal_set(BINARY, fitted, row, 0.9) == tuple(np.array(BINARY.labels)[wanted])


def test_a_coverage_that_the_patients_cannot_give_yields_every_label():
    truth, p = draw_binary(60, 6)
    fitted = fit_task(BINARY, truth, p)
    assert "99" not in fitted.set_limits  # needs 99 patients
    assert conformal_set(BINARY, fitted, np.array([0.999, 0.001]), 0.99) == BINARY.labels
    low, half = (conformal_set(BINARY, fitted, p[0], coverage) for coverage in (0.3, 0.5))
    assert low == half


def test_the_interval_of_the_coverage_is_that_of_many_calibrations():
    random = np.random.default_rng(7)
    rank = int(np.ceil(101 * 0.9))  # the score of new patients is uniform, so that the limit is the coverage
    reached = [np.sort(random.random(100))[rank - 1] for _ in range(4000)]
    assert coverage_interval(100, 0.9) == pytest.approx(np.quantile(reached, [0.025, 0.975]), abs=0.005)
    assert coverage_interval(5, 0.9) == (1.0, 1.0)


def test_statistics_of_a_grid_equal_a_plain_computation():
    grid = draw_grid(8)
    found = input_statistics(grid)
    inside = grid > 0
    neighbours = [
        abs(grid[k, j, i] - grid[k + 1, j, i])
        for k, j, i in np.ndindex(11, 32, 32)
        if inside[k, j, i] and inside[k + 1, j, i]
    ]
    assert found["difference_of_slices"] == pytest.approx(np.mean(neighbours), rel=1e-5)
    assert found["filled"] == pytest.approx(inside.mean())
    assert found["quantile_0.5"] == pytest.approx(np.median(grid[inside]))
    assert set(input_statistics(np.zeros_like(grid)).values()) == {0.0}


def test_the_distance_tells_other_noise_and_is_a_mahalanobis_distance():
    distribution = fit_inputs([input_statistics(draw_grid(seed)) for seed in range(120)])
    names = list(distribution.mean)
    usual = [measure_distance(distribution, input_statistics(draw_grid(seed))) for seed in range(1000, 1100)]
    noisy = measure_distance(distribution, input_statistics(draw_grid(9, noise=0.04)))
    assert np.mean([each.is_unusual for each in usual]) <= 0.05
    assert noisy.is_unusual
    assert noisy.value > noisy.usual[1]
    statistics = input_statistics(draw_grid(1000))
    z = (np.array([statistics[name] for name in names]) - list(distribution.mean.values())) / list(
        distribution.scale.values()
    )
    expected = mahalanobis(z, np.zeros(len(z)), np.array(distribution.precision))
    assert usual[0].distance == pytest.approx(expected)


def small_calibration(number=80):
    truth, p = draw_binary(number, 10)
    graded, q = draw_ordinal(number, 11)
    graded[: number - MIN_PATIENTS + 1] = -1  # one label too few
    statistics = [input_statistics(draw_grid(seed)) for seed in range(number)]
    return fit_calibration(SPEC, {"prognosis": (truth, p), "gcs": (graded, q)}, statistics, "patients of this test")


def test_a_calibration_survives_the_json_of_a_model():
    fitted = small_calibration()
    assert list(fitted.tasks) == ["prognosis"]
    spec = dataclasses.replace(SPEC, calibration=fitted)
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert "calibration" not in SPEC.to_dict()


def test_too_few_patients_give_no_calibration():
    assert small_calibration(MIN_PATIENTS - 1) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"prognosi": TaskCalibration(60, (Adjustment(1, 0),), {})}}, "Did you mean prognosis"),
        ({"tasks": {"gcs": TaskCalibration(60, (Adjustment(1, 0),), {})}}, "1 adjustments. Expected 2"),
        ({"tasks": {"age": TaskCalibration(60, (Adjustment(0, 0),), {})}}, "slope 0. Expected a number above 0"),
        ({"inputs": InputDistribution({"a": 0.0}, {"b": 1.0}, ((1.0,),), 1.0)}, "the same statistics"),
        ({"inputs": InputDistribution({"a": 0.0}, {"a": 1.0}, ((1.0, 0.0),), 1.0)}, "the same statistics"),
    ],
)
def test_a_wrong_calibration_is_refused_when_the_model_is_read(change, message):
    inputs = InputDistribution({"a": 0.0}, {"a": 1.0}, ((1.0,),), 1.0)
    right = Calibration("patients", {"age": TaskCalibration(60, (Adjustment(1, 0),), {})}, inputs)
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(SPEC, calibration=dataclasses.replace(right, **change))


def test_a_wrong_combination_is_refused_when_the_model_is_read():
    fused = zoo.find("compact.prognosis_gcs3_age_clinical")
    age = fused.clinical[0]
    alone, known = Combination((), (Adjustment(1, 0),)), Combination(("age",), (Adjustment(1, 0, {"age": 1.0}),))

    def combined(*combinations, task="prognosis"):
        tasks = [dataclasses.replace(t, combinations=combinations if t.name == task else ()) for t in SPEC.tasks]
        return dataclasses.replace(SPEC, tasks=tuple(tasks), clinical=(age,))

    spec = combined(alone, known)
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(SpecError, match="every subset"):
        combined(known)
    with pytest.raises(SpecError, match="would predict itself"):
        combined(alone, known, task="age")
    with pytest.raises(SpecError, match="coefficients of"):
        combined(alone, Combination(("age",), (Adjustment(1, 0),)))
    with pytest.raises(SpecError, match="or none of these"):
        combined()


def test_a_prediction_abstains_if_every_label_is_possible_or_the_scan_is_unusual():
    one = TaskPrediction("poor", {"good": 0.4, "poor": 0.6}, (0.4,), None, label_set=("poor",))
    both = dataclasses.replace(one, label_set=("good", "poor"))
    tasks = {"prognosis": both, "age": one, "gcs": dataclasses.replace(one, label_set=None)}
    near = InputDistance(2.0, 5.0, "noise", 0.02, (0.01, 0.03))
    found = Prediction("scan", "model", tasks, (), {}, coverage=0.9, input_distance=near)
    assert found.abstained == {"prognosis": "every label is possible at a coverage of 90%"}
    far = dataclasses.replace(near, distance=9.0, value=0.08)
    unusual = dataclasses.replace(found, input_distance=far).abstained
    assert list(unusual) == ["prognosis", "age", "gcs"]
    assert "distance 9.0, threshold 5.0; noise is 0.08, usually 0.01 to 0.03" in unusual["age"]
