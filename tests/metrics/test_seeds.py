"""Metrics over several trainings: intervals, tests and variances, against brute force and other libraries."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from ichprog import InvalidValueError
from ichprog.metrics import seeds
from ichprog.metrics.bootstrap import resample_counts


def trainings(random, truth, number, *, signal=1.0, spread=0.4):
    """Return probabilities of several trainings, which share the signal and a part of the noise of a patient."""
    shared = signal * truth + random.standard_normal(len(truth))
    scores = [shared + spread * random.standard_normal(len(truth)) for _ in range(number)]
    return [1 / (1 + np.exp(-score)) for score in scores]


@pytest.fixture
def random():
    return np.random.default_rng(5)


def test_the_value_is_the_mean_and_the_interval_that_of_a_double_bootstrap(random):
    truth = (random.random(120) < 0.4).astype(int)
    probabilities = trainings(random, truth, 4)
    found = seeds.compute_over_seeds(
        truth, probabilities, kind="binary", thresholds=[0.5] * 4, n_bootstrap=500, seed=2
    )["auroc"]
    assert found["value"] == pytest.approx(np.mean([roc_auc_score(truth, p) for p in probabilities]))
    brute = []
    for _ in range(400):
        patients = random.integers(120, size=120)
        drawn = random.integers(4, size=3)
        brute.append(np.mean([roc_auc_score(truth[patients], probabilities[k][patients]) for k in drawn]))
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(brute, (0.025, 0.975)), atol=0.02)


def test_one_training_has_the_interval_of_its_patients(random):
    truth = (random.random(60) < 0.5).astype(int)
    (p,) = trainings(random, truth, 1)
    found = seeds.compute_over_seeds(truth, [p], kind="binary", thresholds=[0.5], n_bootstrap=300, seed=3)["auroc"]
    counts = resample_counts(60, n_bootstrap=300, seed=3)
    samples = [roc_auc_score(truth, p, sample_weight=weights) for weights in counts]
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(samples, (0.025, 0.975)))


def test_a_difference_between_models_covers_what_trainings_vary(random):
    """Two models with the same signal differ by chance of the training; a single pair of trainings overlooks it."""
    truth = (random.random(100) < 0.5).astype(int)
    rejected = 0
    for _ in range(20):
        first, second = (
            [1 / (1 + np.exp(-(2 + shift) * (truth - 0.5 + random.standard_normal(100)))) for shift in shifts]
            for shifts in random.normal(0, 0.3, (2, 4))
        )
        row = seeds.compare_over_seeds(
            truth, first, second, kind="binary", thresholds=([0.5] * 4,) * 2, n_bootstrap=150
        )["auroc"]
        assert row["low"] <= row["difference"] <= row["high"]
        rejected += row["p"] < 0.05
    assert rejected <= 5  # of 20 at a level of 0.05


def test_a_clear_difference_is_found(random):
    truth = (random.random(300) < 0.5).astype(int)
    first, second = trainings(random, truth, 5, signal=2.0), trainings(random, truth, 5, signal=0.5)
    row = seeds.compare_over_seeds(truth, first, second, kind="binary", thresholds=([0.5] * 5,) * 2, n_bootstrap=400)
    assert row["auroc"]["p"] < 0.01
    assert row["auroc"]["low"] > 0
    assert row["auroc"]["n"] == 300


def test_variances_are_those_that_were_drawn(random):
    """The analysis of variance recovers the standard deviations of folds, trainings and the rest."""
    found = []
    for _ in range(300):
        values = 0.7 + random.normal(0, 0.05, 5) + random.normal(0, 0.02, (6, 1)) + random.normal(0, 0.01, (6, 5))
        found.append([seeds.crossed_components(values)[name] ** 2 for name in ("folds_sd", "seeds_sd", "rest_sd")])
    np.testing.assert_allclose(np.sqrt(np.mean(found, axis=0)), [0.05, 0.02, 0.01], rtol=0.1)


@pytest.mark.filterwarnings("ignore:The MLE may be on the boundary")  # a warning of its optimiser, not of its result
def test_variances_equal_those_of_a_mixed_model(random):
    """REML of statsmodels gives the same estimates for a balanced table if none is zero."""
    import pandas as pd
    import statsmodels.api as sm

    values = 0.7 + random.normal(0, 0.05, 6) + random.normal(0, 0.03, (6, 1)) + random.normal(0, 0.01, (6, 6))
    rows = [(value, s, f, 0) for s, row in enumerate(values) for f, value in enumerate(row)]
    table = pd.DataFrame(rows, columns=["value", "training", "fold", "all"])
    fitted = sm.MixedLM.from_formula(
        "value ~ 1", groups="all", vc_formula={"fold": "0 + C(fold)", "training": "0 + C(training)"}, data=table
    ).fit(reml=True)
    found = seeds.crossed_components(values)
    np.testing.assert_allclose(fitted.vcomp, [found["folds_sd"] ** 2, found["seeds_sd"] ** 2], rtol=0.02)
    assert fitted.scale == pytest.approx(found["rest_sd"] ** 2, rel=0.02)


def test_the_corrected_test_widens_the_usual_one():
    differences = np.array([0.01, 0.03, 0.02, 0.05, 0.04])
    usual = stats.ttest_1samp(differences, 0)
    mean, p = seeds.corrected_resampled_test(differences, 0.25)
    assert mean == pytest.approx(0.03)
    corrected = usual.statistic * np.sqrt((1 / 5) / (1 / 5 + 0.25))
    assert p == pytest.approx(2 * stats.t.sf(corrected, 4))
    assert np.isnan(seeds.corrected_resampled_test([0.1, 0.1], 0.5)[1])


def test_a_metric_that_no_sample_defines_has_no_variance_between_patients(random):
    labels = np.ones(20, int)  # there is no AUROC of one label
    found = seeds.seed_variance(labels, [random.random(20)] * 2, "auroc", kind="binary", thresholds=[0.5] * 2)
    assert np.isnan(found["patients_sd"])


def test_seed_variance_separates_trainings_from_patients(random):
    truth = (random.random(150) < 0.5).astype(int)
    same = trainings(random, truth, 1) * 3
    found = seeds.seed_variance(truth, same, "auroc", kind="binary", thresholds=[0.5] * 3, n_bootstrap=300)
    assert found["seeds_sd"] == pytest.approx(0)
    assert found["lowest"] == found["highest"]
    assert found["patients_sd"] > 0.01


@pytest.mark.parametrize(
    "call",
    [
        lambda: seeds.crossed_components([[0.6, 0.7]]),
        lambda: seeds.corrected_resampled_test([0.1, 0.2], 0),
        lambda: seeds.compute_over_seeds([0, 1], [], kind="binary", thresholds=[]),
        lambda: seeds.seed_variance([0, 1], [[0.1, 0.9]], "auroc", kind="binary", thresholds=[0.5]),
    ],
    ids=["components", "corrected test", "intervals", "variance"],
)
def test_too_few_values_are_refused(call):
    with pytest.raises(InvalidValueError):
        call()
