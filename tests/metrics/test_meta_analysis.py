"""Random-effects meta-analysis against statsmodels and the formulas of the sources."""

import warnings

import numpy as np
import pytest
from scipy import stats

from ichprog.metrics.meta_analysis import random_effects

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.meta_analysis import combine_effects


def test_the_pooled_estimate_is_that_of_dersimonian_and_laird():
    y, error = np.array([0.2, 0.9, 0.4, 1.3]), np.array([0.2, 0.15, 0.3, 0.25])
    found = random_effects(y, error)
    expected = combine_effects(y, error**2, method_re="chi2")
    assert found.value == pytest.approx(expected.mean_effect_re)
    assert found.tau2 == pytest.approx(expected.tau2)
    assert found.q == pytest.approx(expected.q)
    assert found.i2 == pytest.approx(expected.i2)
    assert found.high - found.value == pytest.approx(1.959963984540054 * expected.sd_eff_w_re)
    assert found.p == pytest.approx(stats.chi2.sf(expected.q, 3))
    half = stats.t.ppf(0.975, 2) * np.sqrt(expected.tau2 + expected.sd_eff_w_re**2)
    assert found.prediction_low == pytest.approx(found.value - half)
    assert found.prediction_high == pytest.approx(found.value + half)


def test_sites_that_agree_have_no_heterogeneity():
    found = random_effects([0.5, 0.52, 0.49], [0.2, 0.3, 0.25])
    weights = 1 / np.array([0.2, 0.3, 0.25]) ** 2
    assert (found.tau2, found.i2) == (0, 0)
    assert found.value == pytest.approx(weights @ [0.5, 0.52, 0.49] / weights.sum())


def test_limits_are_turned_into_the_scale_of_the_result():
    y, error = np.log([0.8, 1.5, 1.1]), [0.1, 0.1, 0.1]
    plain, scaled = random_effects(y, error), random_effects(y, error, back=np.exp)
    for name in ("value", "low", "high", "prediction_low", "prediction_high"):
        assert getattr(scaled, name) == pytest.approx(np.exp(getattr(plain, name)))


def test_few_sites_have_no_heterogeneity_and_no_prediction_interval():
    one = random_effects([0.4, np.nan, 0.3], [0.1, 0.1, 0.0])
    assert (one.sites, one.tau2, one.i2, one.prediction_low) == (1, None, None, None)
    assert one.value == pytest.approx(0.4)
    two = random_effects([0.4, 0.9], [0.1, 0.1])
    assert two.i2 is not None
    assert two.prediction_low is None
    assert random_effects([np.nan], [0.1]).value is None
