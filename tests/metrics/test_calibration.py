"""Calibration and recalibration, checked against statsmodels, scikit-learn and scipy."""

import math
import warnings

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.calibration import calibration_curve as sklearn_calibration_curve

from ichprog.metrics import compute
from ichprog.metrics.calibration import (
    calibration_curve,
    fit_recalibration,
    log_odds,
    probability_histogram,
    recalibrate,
)

from support.predictions import two_labels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import statsmodels.api as sm
    from statsmodels.stats.proportion import proportion_confint


def test_separated_outcomes_and_constant_probabilities_have_no_slope():
    separated = compute([0, 0, 1, 1], [0.0, 0.2, 0.2, 1.0], kind="binary")
    alike = compute([0, 1, 1, 0], [0.3] * 4, kind="binary")
    assert math.isnan(separated["calibration_slope"])
    assert math.isnan(alike["calibration_slope"])
    assert alike["auroc"] == 0.5
    assert alike["calibration_intercept"] == pytest.approx(-math.log(0.3 / 0.7))
    assert np.isfinite(separated["log_loss"])


def test_recalibration_of_many_patients_is_logistic_regression():
    random = np.random.default_rng(0)
    x = random.normal(0, 1.5, 20000)
    truth = random.random(20000) < 1 / (1 + np.exp(-(0.6 * x - 0.8)))
    p = 1 / (1 + np.exp(-x))
    slope, intercept = fit_recalibration(truth, p)
    fit = sm.GLM(truth, sm.add_constant(x), family=sm.families.Binomial()).fit().params
    assert (intercept, slope) == pytest.approx(tuple(fit), abs=2e-3)
    again = compute(truth, recalibrate(p, slope, intercept), kind="binary")
    assert again["calibration_slope"] == pytest.approx(1, abs=5e-3)
    assert again["calibration_intercept"] == pytest.approx(0, abs=5e-3)


@pytest.mark.parametrize(
    ("truth", "p"),
    [([0, 1, 1, 0, 1], [0.2, 0.9, 0.4, 0.5, 0.7]), ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]), ([1, 1, 1], [0.0, 0.5, 1.0])],
)
def test_recalibration_of_few_patients_maximises_likelihood_times_prior(truth, p):
    x, y = log_odds(p), np.array(truth)

    def loss(at):
        q = 1 / (1 + np.exp(-(math.exp(at[0]) * x + at[1])))
        likelihood = stats.bernoulli.logpmf(y, np.clip(q, 1e-300, 1 - 1e-16)).sum()
        return -likelihood - stats.norm(0, 1).logpdf(at[0]) - stats.norm(0, 2).logpdf(at[1])

    best = optimize.minimize(loss, [0.1, 0.1], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    assert fit_recalibration(truth, p) == pytest.approx((math.exp(best[0]), best[1]), abs=1e-4)


def test_recalibration_without_patients_changes_nothing_and_keeps_ranks():
    assert fit_recalibration([], []) == (1, 0)
    p = np.array([0.01, 0.3, 0.31, 0.99])
    np.testing.assert_allclose(recalibrate(p, 1, 0), p)
    slope, intercept = fit_recalibration([1, 1, 0, 0], p)  # the wrong way round
    assert slope > 0
    assert (np.diff(recalibrate(p, slope, intercept)) > 0).all()


@pytest.mark.parametrize("quantile", [True, False])
@pytest.mark.parametrize("digits", [None, 1])
def test_the_calibration_curve_equals_that_of_scikit_learn(quantile, digits):
    y, p = two_labels(digits=digits)
    found = calibration_curve(y, p, bins=7, quantile=quantile)
    observed, predicted = sklearn_calibration_curve(y, p, n_bins=7, strategy="quantile" if quantile else "uniform")
    np.testing.assert_allclose(found["observed"], observed)
    np.testing.assert_allclose(found["predicted"], predicted)
    assert found["count"].sum() == len(y)
    low, high = proportion_confint(np.rint(found["observed"] * found["count"]), found["count"], method="wilson")
    np.testing.assert_allclose([found["low"], found["high"]], [low, high])


def test_the_calibration_curve_has_one_bin_for_equal_probabilities_and_none_without_patients():
    alike = calibration_curve([0, 1, 1], [0.4] * 3)
    assert (alike["predicted"].tolist(), alike["count"].tolist()) == ([pytest.approx(0.4)], [3])
    assert all(len(column) == 0 for column in calibration_curve([], []).values())


def test_histograms_count_every_patient_by_outcome():
    found = probability_histogram([0, 0, 1, 1, 1], [0.0, 0.49, 0.5, 1.0, 0.96], bins=4)
    assert found["edges"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found["counts"].tolist() == [[1, 1, 0, 0], [0, 0, 1, 2]]
