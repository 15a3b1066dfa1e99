"""Operating points: thresholds by trying every one, rates by scikit-learn and statsmodels, and cross-fitting."""

import math
import warnings

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from ichprog import InvalidValueError
from ichprog.metrics.operating_points import operating_point, rates_at, stratified_parts, threshold_at

from support.predictions import two_labels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.proportion import proportion_confint


def sensitivity_specificity(truth, positive):
    (tn, fp), (fn, tp) = confusion_matrix(truth, positive)
    return {"sensitivity": tp / (tp + fn), "specificity": tn / (tn + fp)}


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("required", [0.5, 0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("rate", ["sensitivity", "specificity"])
def test_the_threshold_is_the_best_of_all(rate, required, digits):
    truth, p = two_labels(60, seed=3, digits=digits)
    other = "specificity" if rate == "sensitivity" else "sensitivity"
    found = sensitivity_specificity(truth, p > threshold_at(truth, p, rate, required))
    every = [sensitivity_specificity(truth, p > limit) for limit in [-1, *np.unique(p)]]
    allowed = [rates for rates in every if rates[rate] >= required - 1e-12]
    assert found[rate] >= required - 1e-12
    assert found[other] == max(rates[other] for rates in allowed)


def test_probabilities_of_zero_and_one_have_a_threshold():
    assert (np.array([0.0, 0.0, 1.0]) > threshold_at([1, 0, 1], [0.0, 0.0, 1.0], "sensitivity", 1.0)).all()
    assert not (np.array([0.0, 1.0]) > threshold_at([1, 0], [0.0, 1.0], "specificity", 1.0)).any()
    assert math.isnan(threshold_at([0, 0], [0.1, 0.2], "sensitivity", 0.9))


@pytest.mark.parametrize("required", [0, -0.1, 1.01, 95, math.nan])
def test_a_rate_outside_its_range_is_refused(required):
    with pytest.raises(InvalidValueError, match="above 0 and at most 1"):
        threshold_at([0, 1], [0.1, 0.9], "sensitivity", required)


def test_rates_have_wilson_intervals():
    truth, p = two_labels(80, seed=1)
    rates = rates_at(truth, p > 0.6)
    (tn, fp), (fn, tp) = confusion_matrix(truth, p > 0.6)
    for name, hits, n in [
        ("sensitivity", tp, tp + fn),
        ("specificity", tn, tn + fp),
        ("ppv", tp, tp + fp),
        ("npv", tn, tn + fn),
    ]:
        low, high = proportion_confint(hits, n, method="wilson")
        assert rates[name] == pytest.approx({"value": hits / n, "low": low, "high": high})
    assert rates["called_positive"] == tp + fp


def test_cross_fitted_rates_use_thresholds_of_other_patients():
    truth, p = two_labels(50, seed=5)
    point = operating_point(truth, p, "sensitivity", 0.9, folds=5, seed=2)
    part = stratified_parts(truth, 5, seed=2)
    positive = np.zeros(50, bool)
    limits = []
    for k in range(5):
        inside = part == k
        limits.append(threshold_at(truth[~inside], p[~inside], "sensitivity", 0.9))
        positive[inside] = p[inside] > limits[-1]
    expected = sensitivity_specificity(truth, positive)
    assert {name: point["cross_fitted"][name]["value"] for name in expected} == pytest.approx(expected)
    assert (point["cross_fitted"]["threshold_low"], point["cross_fitted"]["threshold_high"]) == (
        min(limits),
        max(limits),
    )
    assert point["same_patients"]["sensitivity"]["value"] >= 0.9


def test_the_sensitivity_on_the_same_patients_is_too_good():
    """Without any information, the best threshold on few patients keeps its sensitivity only on these patients."""
    random, same, other = np.random.default_rng(0), [], []
    for _ in range(60):
        truth, p = np.arange(20) % 2, random.random(20)
        point = operating_point(truth, p, "sensitivity", 0.85, folds=10)
        rates = [point[kind] for kind in ("same_patients", "cross_fitted")]
        for values, each in zip((same, other), rates, strict=True):
            values.append(each["sensitivity"]["value"] + each["specificity"]["value"])
    assert np.mean(same) > np.mean(other) + 0.03


def test_parts_have_equal_shares_of_the_outcome():
    truth = np.array([1] * 7 + [0] * 23)
    part = stratified_parts(truth, 10)
    assert np.bincount(part[truth == 1]).tolist() == [1] * 7
    assert set(np.bincount(part[truth == 0])) == {3, 4}
    assert stratified_parts([1, 0, 0], 5) is None
