"""Bootstrap samples and intervals, checked against scipy and statsmodels."""

import warnings

import numpy as np
import pytest
from scipy import stats

from ichprog.metrics import bootstrap

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.proportion import proportion_confint


def test_samples_have_the_size_of_the_cohort_and_of_the_strata():
    groups = np.array([0] * 10 + [1] * 30)
    free, stratified = (
        bootstrap.resample_counts(40, n_bootstrap=200, seed=1, strata=strata) for strata in (None, groups)
    )
    assert (free.sum(axis=1) == 40).all()
    assert (stratified[:, :10].sum(axis=1) == 10).all()
    assert len(set(free[:, :10].sum(axis=1))) > 5
    np.testing.assert_array_equal(free, bootstrap.resample_counts(40, n_bootstrap=200, seed=1))
    assert (free != bootstrap.resample_counts(40, n_bootstrap=200, seed=2)).any()
    counted = bootstrap.bootstrap(lambda sample: np.bincount(sample, minlength=40), 40, n_bootstrap=200, seed=1)
    np.testing.assert_array_equal(counted, free)
    assert bootstrap.bootstrap(np.mean, 40, n_bootstrap=7).shape == (7,)


def test_intervals_equal_those_of_scipy():
    data = np.random.default_rng(0).exponential(size=40)
    samples = bootstrap.bootstrap(lambda sample: data[sample].mean(), 40, n_bootstrap=999)
    left_out = np.array([np.delete(data, patient).mean() for patient in range(40)])
    intervals = {
        "percentile": bootstrap.percentile_interval(samples, coverage=0.9),
        "BCa": bootstrap.bca_interval(samples, data.mean(), left_out, coverage=0.9),
    }
    for method, ends in intervals.items():
        seed = stats.bootstrap((data,), np.mean, n_resamples=50, rng=np.random.default_rng(0))
        seed.bootstrap_distribution = samples
        expected = stats.bootstrap(
            (data,), np.mean, n_resamples=0, bootstrap_result=seed, method=method, confidence_level=0.9
        ).confidence_interval
        assert ends == pytest.approx(tuple(expected), rel=1e-9)
    assert intervals["BCa"][0] > intervals["percentile"][0]  # of a skewed sample


def test_undefined_samples_are_ignored():
    samples = np.array([np.nan, 1.0, 2.0, 3.0])
    assert bootstrap.percentile_interval(samples, coverage=0.5) == (1.5, 2.5)
    assert np.isnan(bootstrap.percentile_interval(np.array([np.nan]))).all()
    assert np.isnan(bootstrap.bca_interval(np.array([np.nan]), 0.5, np.array([0.4]))).all()
    assert bootstrap.bca_interval(np.array([1.0, 1.0]), 1.0, np.array([1.0, 1.0])) == (1, 1)


def test_wilson_intervals_equal_those_of_statsmodels():
    k, n = np.array([0, 1, 5, 17, 20]), np.array([20, 3, 10, 20, 20])
    intervals = bootstrap.wilson_interval(k, n, coverage=0.9)
    np.testing.assert_allclose(intervals, proportion_confint(k, n, alpha=0.1, method="wilson"), atol=1e-12)
    assert np.isnan(bootstrap.wilson_interval(0, 0)).all()
