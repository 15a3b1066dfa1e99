"""Paired comparisons, checked against statsmodels, scikit-learn, scipy, published examples and brute force."""

import math
import warnings
from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from ichprog.metrics import compare, comparisons, compute

from support.predictions import two_models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
    from statsmodels.stats.multitest import multipletests


@pytest.mark.parametrize(("kind", "labels"), [("binary", 2), ("ordinal", 3)])
def test_a_comparison_equals_one_with_samples_drawn_by_hand(kind, labels):
    truth, first, second = two_models(40, labels=labels)
    found = compare(truth, first, second, kind=kind, thresholds=(0.4, 0.6), n_bootstrap=200, seed=7)
    samples = np.random.default_rng(7).integers(40, size=(200, 40))

    def both(sample):
        return [
            compute(truth[sample], p[sample], kind=kind, thresholds=limit) for p, limit in ((first, 0.4), (second, 0.6))
        ]

    drawn = [both(sample) for sample in samples]
    one, other = both(np.arange(40))
    assert list(found) == list(one)
    for name, row in found.items():
        assert (row["first"], row["second"], row["n"]) == (pytest.approx(one[name]), pytest.approx(other[name]), 40)
        assert row["difference"] == pytest.approx(one[name] - other[name], abs=1e-12)
        if row["method"] == "delong":
            assert (name, kind) == ("auroc", "binary")
            continue
        differences = np.array([a[name] - b[name] for a, b in drawn])
        differences = differences[np.isfinite(differences)]
        low, high = np.quantile(differences, [0.025, 0.975])
        assert (row["low"], row["high"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
        rarer = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())
        assert row["p"] == pytest.approx(min(1, 2 * (rarer + 1) / (len(differences) + 1)))


def test_the_better_model_has_a_difference_and_a_model_has_none_from_itself():
    truth, first, second = two_models(300, better=2)
    found = compare(truth, first, second, kind="binary")
    assert found["auroc"]["low"] > 0.05
    assert found["auroc"]["p"] < 1e-4
    assert found["brier"]["high"] < 0
    assert found["brier"]["p"] == pytest.approx(2 / 1001)
    for row in compare(truth, first, first, kind="binary").values():
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_a_comparison_without_patients_has_no_values():
    for row in compare([], np.empty((0, 2)), np.empty((0, 2)), kind="binary", n_bootstrap=5).values():
        assert (row["n"], row["difference"], row["p"]) == (0, None, None)


@pytest.mark.parametrize("truth", [[0, 1], [1, 1], [1]])
def test_few_patients_give_finite_values_or_none(truth):
    p = np.linspace(0.3, 0.8, len(truth))
    found = compare(truth, p, p, kind="binary", n_bootstrap=20)
    assert found["auroc"]["p"] is None
    assert all(value is None or math.isfinite(value) for row in found.values() for value in list(row.values())[:6])


def test_the_paired_bootstrap_agrees_with_a_paired_t_test():
    random = np.random.default_rng(0)
    a = random.normal(0, 1, 80)
    b = a + random.normal(0.3, 0.5, 80)
    found = comparisons.paired_bootstrap(lambda s: b[s].mean(), lambda s: a[s].mean(), 80, n_bootstrap=2000)
    test = stats.ttest_rel(b, a).confidence_interval()
    assert found["difference"] == pytest.approx((b - a).mean())
    assert (found["low"], found["high"]) == pytest.approx(tuple(test), abs=0.02)
    assert found["p"] == pytest.approx(2 / 2001)
    nothing = comparisons.paired_bootstrap(lambda s: np.nan, lambda s: 1.0, 80, n_bootstrap=10)
    assert nothing == {"difference": None, "low": None, "high": None, "p": None}


def test_p_values_of_the_bootstrap_are_uniform_without_a_difference():
    random = np.random.default_rng(0)
    found = []
    for seed in range(300):
        d = random.normal(0, 1, 50)
        row = comparisons.paired_bootstrap(lambda s, d=d: d[s].mean(), lambda s: 0.0, 50, n_bootstrap=200, seed=seed)
        found.append(row["p"])
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.05)


def brute_delong(truth, *scores):
    """Areas and their covariance, pair by pair, as DeLong et al. write them."""
    truth = np.array(truth)
    wins = []
    for score in np.array(scores, float):
        a, b = score[truth == 1], score[truth == 0]
        wins.append([[(x > y) + (x == y) / 2 for y in b] for x in a])
    wins = np.array(wins, float)  # (S, positive, negative)
    areas = wins.mean(axis=(1, 2))
    m, n = wins.shape[1:]
    covariance = np.zeros((len(scores), len(scores)))
    for r in range(len(scores)):
        for s in range(len(scores)):
            by_positive = (wins[r].mean(axis=1) - areas[r]) @ (wins[s].mean(axis=1) - areas[s]) / (m - 1) / m
            by_negative = (wins[r].mean(axis=0) - areas[r]) @ (wins[s].mean(axis=0) - areas[s]) / (n - 1) / n
            covariance[r, s] = by_positive + by_negative
    return areas, covariance


@pytest.mark.parametrize("seed", range(6))
def test_delong_equals_brute_force(seed):
    truth, first, second = two_models(45, seed=seed)
    digits = [12, 1, 2, 0, 1, 12][seed]
    a, b = np.round(first[:, 1], digits), np.round(second[:, 1], digits)
    areas, covariance = brute_delong(truth, a, b)
    difference, error, p = comparisons.delong(truth, a, b)
    assert difference == pytest.approx(areas[0] - areas[1])
    assert difference == pytest.approx(
        sklearn_metrics.roc_auc_score(truth, a) - sklearn_metrics.roc_auc_score(truth, b)
    )
    assert error == pytest.approx(math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    assert p == pytest.approx(2 * stats.norm.sf(abs(difference) / error))
    area, low, high = comparisons.delong_interval(truth, a, coverage=0.9)
    expected = stats.norm(areas[0], math.sqrt(covariance[0, 0])).interval(0.9)
    assert (area, low, high) == pytest.approx((areas[0], expected[0], min(expected[1], 1)))


OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def test_delong_equals_the_published_example():
    """Total protein and K-G score of 43 patients with ovarian cancer of DeLong et al. 1988.

    Data and figures as in the SAS/STAT User's Guide, LOGISTIC, "Comparing Receiver Operating Characteristic Curves".
    """
    _, protein, score, truth = np.array(OVARIAN.split(), float).reshape(-1, 4).T
    assert comparisons.delong_interval(truth, 10 - score) == pytest.approx((0.7258, 0.5243, 0.9273), abs=5e-5)
    assert comparisons.delong_interval(truth, protein) == pytest.approx((0.6478, 0.4518, 0.8439), abs=5e-5)
    assert comparisons.delong(truth, protein, 10 - score) == pytest.approx((-0.0780, 0.1046, 0.4561), abs=5e-5)


def test_areas_of_separated_tied_and_few_patients():
    truth, separated = [0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]
    assert comparisons.delong_interval(truth, separated) == (1, 1, 1)
    assert comparisons.delong(truth, separated, separated) == (0, 0, 1)
    assert math.isnan(comparisons.delong(truth, separated, separated[::-1])[2])
    assert comparisons.delong_interval(truth, [0.5] * 4)[0] == 0.5
    assert np.isnan(comparisons.delong(truth, [0.1, np.nan, 0.8, 0.9], separated)).all()
    for few in ([0, 1], [0, 0, 1], [1, 1], []):
        assert np.isnan(comparisons.delong(few, few, few)).all()
        assert np.isnan(comparisons.delong_interval(few, few)).all()


def test_the_interval_of_an_area_reaches_its_coverage():
    """The area of two normal samples one apart is Phi(1 / sqrt(2))."""
    random, hits = np.random.default_rng(0), 0
    truth = np.repeat([0, 1], 60)
    for _ in range(400):
        _, low, high = comparisons.delong_interval(truth, random.normal(truth, 1))
        hits += low <= stats.norm.cdf(1 / math.sqrt(2)) <= high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_statsmodels(seed):
    p = np.random.default_rng(seed).beta(0.3, 2, 9)
    p[4] = p[2]
    expected = multipletests(p, method="holm")[1]
    np.testing.assert_allclose(comparisons.holm(p), expected)
    np.testing.assert_allclose(comparisons.holm([np.nan, *p, np.nan]), [np.nan, *expected, np.nan])


def test_holm_of_no_one_and_three_p_values():
    assert comparisons.holm([]).tolist() == []
    assert comparisons.holm([0.04]).tolist() == [0.04]
    assert np.isnan(comparisons.holm([np.nan])).all()
    for order in permutations([0.01, 0.02, 0.9]):
        assert dict(zip(order, comparisons.holm(order), strict=True)) == pytest.approx(
            {0.01: 0.03, 0.02: 0.04, 0.9: 0.9}
        )


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 6), (5, 1), (9, 9), (31, 14)])
def test_mcnemar_equals_statsmodels(one, other):
    first = np.array([1] * one + [0] * other + [1, 1, 0])
    second = np.array([0] * one + [1] * other + [1, 1, 0])
    expected = statsmodels_mcnemar([[2, one], [other, 1]], exact=True).pvalue if one + other else 1.0
    assert comparisons.mcnemar(first, second) == (one, other, pytest.approx(expected))


def test_correlations_equal_those_of_scipy():
    random = np.random.default_rng(0)
    outcome = random.integers(2, size=90).astype(float)
    columns = {
        "near": outcome + random.normal(0, 1, 90),
        "far": random.normal(0, 1, 90),
        "whole": np.round(random.normal(10, 2, 90) - outcome),
        "alike": np.full(90, 3.0),
        "blank": np.full(90, np.nan),
    }
    columns["near"][:20] = np.nan
    outcome[-5:] = np.nan
    rows = comparisons.correlations(columns, outcome)
    assert [row["name"] for row in rows] == list(columns)
    p = []
    for row in rows[:3]:
        values = columns[row["name"]]
        expected = stats.spearmanr(values, outcome, nan_policy="omit")
        both = np.isfinite(values + outcome)
        assert (row["n"], row["rho"], row["p"]) == (
            both.sum(),
            pytest.approx(expected.statistic),
            pytest.approx(expected.pvalue),
        )
        assert -1 < row["low"] < row["rho"] < row["high"] < 1
        p.append(row["p"])
    assert [row["p_holm"] for row in rows[:3]] == pytest.approx(multipletests(p, method="holm")[1].tolist())
    for row, n in zip(rows[3:], (85, 0), strict=True):
        assert row == {"name": row["name"], "n": n} | dict.fromkeys(["rho", "low", "high", "p", "p_holm"])


def test_correlations_of_few_patients():
    (perfect,) = comparisons.correlations({"a": [1.0, 2, 3, 4]}, [1, 2, 3, 4])
    assert (perfect["rho"], perfect["high"]) == (1, pytest.approx(1))
    (few,) = comparisons.correlations({"a": [1.0, 3, 2]}, [1, 2, 3])
    assert (few["rho"], few["low"], few["high"]) == (0.5, None, None)
    (two,) = comparisons.correlations({"a": [1.0, 3]}, [1, 2])
    assert two["rho"] is None


@pytest.mark.parametrize("r", [0.0, 0.6])
def test_the_interval_of_a_correlation_reaches_its_coverage(r):
    """Of two normal columns the true rank correlation is 6 / pi * arcsin(r / 2)."""
    random, hits = np.random.default_rng(0), 0
    truth = 6 / math.pi * math.asin(r / 2)
    for _ in range(400):
        a, noise = random.normal(size=(2, 50))
        (row,) = comparisons.correlations({"a": a}, r * a + math.sqrt(1 - r * r) * noise)
        hits += row["low"] <= truth <= row["high"]
    assert 0.92 <= hits / 400 <= 0.98
