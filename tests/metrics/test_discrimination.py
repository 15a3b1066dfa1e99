"""Discrimination and decisions, checked against scikit-learn, statsmodels and brute force."""

import warnings
from itertools import product

import numpy as np
import pytest
from scipy import optimize, special
from sklearn import metrics as sklearn_metrics

from ichprog.metrics import compute
from ichprog.metrics.calibration import log_odds
from ichprog.metrics.discrimination import choose_threshold, net_benefit

from support.predictions import three_labels, two_labels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import statsmodels.api as sm


@pytest.mark.parametrize(("seed", "digits"), [(0, None), (1, 1), (2, 2), (3, 0)])
def test_metrics_of_two_labels_equal_those_of_scikit_learn_and_statsmodels(seed, digits):
    y, p = two_labels(seed=seed, digits=digits)
    thresholds = np.random.default_rng(seed).choice([0.3, 0.55, 0.7], len(y))
    found = compute(y, p, kind="binary", thresholds=thresholds)
    expected = {
        "auroc": sklearn_metrics.roc_auc_score(y, p),
        "auprc": sklearn_metrics.average_precision_score(y, p),
        "brier": sklearn_metrics.brier_score_loss(y, p),
        "log_loss": sklearn_metrics.log_loss(y, p),
    }
    for ending, called in (("", p > thresholds), ("_at_half", p > 0.5)):
        expected |= {
            "accuracy" + ending: sklearn_metrics.accuracy_score(y, called),
            "balanced_accuracy" + ending: sklearn_metrics.balanced_accuracy_score(y, called),
            "sensitivity" + ending: sklearn_metrics.recall_score(y, called),
            "specificity" + ending: sklearn_metrics.recall_score(1 - y, ~called),
            "ppv" + ending: sklearn_metrics.precision_score(y, called),
            "npv" + ending: sklearn_metrics.precision_score(1 - y, ~called),
            "f1" + ending: sklearn_metrics.f1_score(y, called),
        }
    calibration = {name: found.pop(name) for name in ("calibration_slope", "calibration_intercept")}
    assert found == pytest.approx(expected, rel=1e-12)
    x = log_odds(p)
    with np.errstate(over="ignore"):
        fit = sm.GLM(y, sm.add_constant(x), family=sm.families.Binomial()).fit()
    large = optimize.brentq(lambda a: special.expit(x + a).sum() - y.sum(), -40, 40, xtol=1e-12)
    assert calibration["calibration_slope"] == pytest.approx(fit.params[1], abs=1e-6)
    assert calibration["calibration_intercept"] == pytest.approx(large, abs=1e-8)


def test_metrics_of_labels_without_order_equal_those_of_scikit_learn():
    y, p = three_labels()
    assert compute(y, p, kind="nominal") == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(y, p.argmax(axis=1)),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, p.argmax(axis=1)),
            "auroc": sklearn_metrics.roc_auc_score(y, p, multi_class="ovr"),
            "log_loss": sklearn_metrics.log_loss(y, p),
        }
    )


def test_the_area_of_every_ranking_of_four_patients_equals_its_definition():
    """All ways in which four patients can be ranked, ties included, against the definition of the area."""
    for p in product([0.2, 0.5, 0.8], repeat=4):
        wins = [(a > b) + (a == b) / 2 for a in p[:2] for b in p[2:]]
        assert compute([1, 1, 0, 0], p, kind="binary")["auroc"] == pytest.approx(np.mean(wins))


@pytest.mark.parametrize("seed", range(8))
def test_the_chosen_threshold_has_the_highest_balanced_accuracy(seed):
    y, p = two_labels(31, seed=seed, digits=1 + seed % 2)
    chosen = choose_threshold(y, p)
    every = [sklearn_metrics.balanced_accuracy_score(y, p > cut) for cut in [-1, *np.unique(p)]]
    assert sklearn_metrics.balanced_accuracy_score(y, p > chosen) == pytest.approx(max(every))


def test_the_threshold_is_a_half_if_none_is_better_than_chance():
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)
    # two thresholds are equally good: the one nearer to 0.5 is chosen
    assert choose_threshold([0, 1, 0, 1], [0.1, 0.3, 0.45, 0.65]) == pytest.approx(0.55)
    for truth, p in [([], []), ([1, 1], [0.2, 0.8]), ([0, 1], [0.7, 0.7]), ([1, 0], [0.1, 0.9])]:
        assert choose_threshold(truth, p) == 0.5
    low, high = 0.3, np.nextafter(0.3, 1)
    assert (np.array([low, high]) > choose_threshold([0, 1], [low, high])).tolist() == [False, True]


def test_net_benefit_equals_that_computed_by_hand():
    """At a threshold of 0.2 a false positive costs a quarter of a true positive."""
    truth = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    p = [0.9, 0.6, 0.1, 0.7, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
    found = net_benefit(truth, p, [0.2, 0.5])
    assert found["model"] == pytest.approx([2 / 10 - 2 / 10 * 0.25, 2 / 10 - 1 / 10])
    assert found["all"] == pytest.approx([0.3 - 0.7 * 0.25, 0.3 - 0.7])
    assert found["none"].tolist() == [0, 0]
    np.testing.assert_allclose(net_benefit(truth, p, [0.0])["model"], 0.3)
    assert np.isnan(net_benefit([], [], [0.5])["all"]).all()
