"""Comparisons on the same patients, against statsmodels, scikit-learn, scipy, published examples and brute force."""

import dataclasses
import math
import warnings
from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as peers

from ichprog import zoo
from ichprog.evaluation.predictions import TaskPredictions
from ichprog.metrics import comparisons as room
from ichprog.metrics import discrimination

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.contingency_tables import mcnemar as peer_mcnemar
    from statsmodels.stats.inter_rater import fleiss_kappa as peer_fleiss
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint

TWO, THREE, _ = zoo.find(zoo.DEFAULT).tasks


def answered(truth, probabilities, names=None):
    truth = np.array(truth, np.int64)
    names = tuple(names or (f"p{number}" for number in range(len(truth))))
    return TaskPredictions(names, np.zeros(len(truth), np.int64), truth, np.array(probabilities, np.float64))


def pair(n=120, seed=0, labels=2, better=1.0):
    """Two variants' answers on the same patients, the first better than the second."""
    random = np.random.default_rng(seed)
    truth = random.integers(labels, size=n)
    shared = random.normal(0, 1, (n, labels))
    both = []
    for skill in (0.4 + better, 0.4):
        logits = skill * np.eye(labels)[truth] + shared + random.normal(0, 0.7, (n, labels))
        both.append(answered(truth, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)))
    return both


# ---- two variants ----


@pytest.mark.parametrize("task", [TWO, THREE], ids=["two labels", "three labels"])
def test_a_comparison_is_what_drawing_both_by_hand_gives(task):
    first, second = pair(40, labels=len(task.labels))
    found = room.compare(task, first, second, (0.4, 0.6), draws=200, seed=7)
    places = np.random.default_rng(7).integers(40, size=(200, 40))
    drawn = [
        (discrimination.metrics(task, first.only(place), 0.4), discrimination.metrics(task, second.only(place), 0.6))
        for place in places
    ]
    one, other = discrimination.metrics(task, first, 0.4), discrimination.metrics(task, second, 0.6)
    assert list(found) == list(one)
    for name, row in found.items():
        assert (row["first"], row["second"], row["n"]) == (pytest.approx(one[name]), pytest.approx(other[name]), 40)
        assert row["difference"] == pytest.approx(one[name] - other[name], abs=1e-12)
        if row["method"] == "delong":
            assert (name, len(task.labels)) == ("auroc", 2)
            continue
        differences = np.array([a[name] - b[name] for a, b in drawn])
        differences = differences[np.isfinite(differences)]
        low, high = np.quantile(differences, [0.025, 0.975])
        assert (row["low"], row["high"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
        rarer = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())
        assert row["p"] == pytest.approx(min(1, 2 * (rarer + 1) / (len(differences) + 1)))


def test_the_better_variant_is_found_and_none_where_both_are_one():
    first, second = pair(300, better=2)
    found = room.compare(TWO, first, second)
    assert found["auroc"]["low"] > 0.05
    assert found["auroc"]["p"] < 1e-4
    assert found["brier"]["high"] < 0
    assert found["brier"]["p"] == pytest.approx(2 / 1001)
    for row in room.compare(TWO, first, first).values():
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_only_patients_of_both_are_compared_whatever_their_order():
    first, second = pair(60)
    order = np.random.default_rng(0).permutation(60)[:50]
    limits = np.linspace(0.3, 0.7, 60)
    some = room.compare(TWO, first.only(np.arange(45)), second.only(order), (limits[:45], limits[order]), draws=50)
    both = np.array(sorted(set(order) & set(range(45))))
    assert some == room.compare(TWO, first.only(both), second.only(both), (limits[both], limits[both]), draws=50)
    assert some["auroc"]["n"] == len(both) < 45


def test_answers_that_cannot_be_compared():
    first, second = pair(10)
    wrong = dataclasses.replace(second, truth=1 - second.truth)
    with pytest.raises(ValueError, match="the truth of p0, p1, p2, p3, p4 is not the same in both"):
        room.compare(TWO, first, wrong, draws=5)
    with pytest.raises(ValueError, match="twice"):
        room.compare(TWO, first.only(np.array([0, 0])), second, draws=5)
    strangers = dataclasses.replace(second, patients=tuple("abcdefghij"))
    for row in room.compare(TWO, first, strangers, draws=5).values():
        assert (row["n"], row["difference"], row["p"]) == (0, None, None)


@pytest.mark.parametrize("truth", [[0, 1], [1, 1], [1]])
def test_few_patients_give_no_nonsense(truth):
    p = np.linspace(0.3, 0.8, len(truth))
    answers = answered(truth, np.stack([1 - p, p], axis=1))
    found = room.compare(TWO, answers, answers, draws=20)
    assert found["auroc"]["p"] is None
    assert all(value is None or math.isfinite(value) for row in found.values() for value in list(row.values())[:6])


def test_a_paired_bootstrap_of_any_statistic():
    random = np.random.default_rng(0)
    a = random.normal(0, 1, 80)
    b = a + random.normal(0.3, 0.5, 80)
    found = room.paired_bootstrap(lambda s: b[s].mean(), lambda s: a[s].mean(), 80, draws=2000)
    test = stats.ttest_rel(b, a).confidence_interval()
    assert found["difference"] == pytest.approx((b - a).mean())
    assert (found["low"], found["high"]) == pytest.approx(tuple(test), abs=0.02)
    assert found["p"] == pytest.approx(2 / 2001)
    nothing = room.paired_bootstrap(lambda s: np.nan, lambda s: 1.0, 80, draws=10)
    assert nothing == {"difference": None, "low": None, "high": None, "p": None}


def test_p_of_the_bootstrap_is_even_where_nothing_differs():
    random = np.random.default_rng(0)
    found = []
    for seed in range(300):
        d = random.normal(0, 1, 50)
        row = room.paired_bootstrap(lambda s, d=d: d[s].mean(), lambda s: 0.0, 50, draws=200, seed=seed)
        found.append(row["p"])
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.05)


# ---- areas ----


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
def test_delong_against_brute_force(seed):
    first, second = pair(45, seed=seed)
    digits = [12, 1, 2, 0, 1, 12][seed]
    a, b = np.round(first.probabilities[:, 1], digits), np.round(second.probabilities[:, 1], digits)
    areas, covariance = brute_delong(first.truth, a, b)
    difference, error, p = room.delong(first.truth, a, b)
    assert difference == pytest.approx(areas[0] - areas[1])
    assert difference == pytest.approx(peers.roc_auc_score(first.truth, a) - peers.roc_auc_score(first.truth, b))
    assert error == pytest.approx(math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    assert p == pytest.approx(2 * stats.norm.sf(abs(difference) / error))
    area, low, high = room.delong_interval(first.truth, a, coverage=0.9)
    expected = stats.norm(areas[0], math.sqrt(covariance[0, 0])).interval(0.9)
    assert (area, low, high) == pytest.approx((areas[0], expected[0], min(expected[1], 1)))


OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def test_delong_on_the_patients_of_delong():
    """Total protein and K-G score of 43 patients with ovarian cancer of DeLong et al. 1988.

    Data and figures as in the SAS/STAT User's Guide, LOGISTIC, "Comparing Receiver Operating Characteristic Curves".
    """
    _, protein, score, truth = np.array(OVARIAN.split(), float).reshape(-1, 4).T
    assert room.delong_interval(truth, 10 - score) == pytest.approx((0.7258, 0.5243, 0.9273), abs=5e-5)
    assert room.delong_interval(truth, protein) == pytest.approx((0.6478, 0.4518, 0.8439), abs=5e-5)
    assert room.delong(truth, protein, 10 - score) == pytest.approx((-0.0780, 0.1046, 0.4561), abs=5e-5)


def test_areas_of_hard_cases():
    truth, parted = [0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]
    assert room.delong_interval(truth, parted) == (1, 1, 1)
    assert room.delong(truth, parted, parted) == (0, 0, 1)
    assert math.isnan(room.delong(truth, parted, parted[::-1])[2])
    assert room.delong_interval(truth, [0.5] * 4)[0] == 0.5
    assert np.isnan(room.delong(truth, [0.1, np.nan, 0.8, 0.9], parted)).all()
    for few in ([0, 1], [0, 0, 1], [1, 1], []):
        assert np.isnan(room.delong(few, few, few)).all()
        assert np.isnan(room.delong_interval(few, few)).all()


def test_the_interval_of_an_area_covers_as_it_says():
    """The area of two normal samples one apart is Phi(1 / sqrt(2))."""
    random, hits = np.random.default_rng(0), 0
    truth = np.repeat([0, 1], 60)
    for _ in range(400):
        _, low, high = room.delong_interval(truth, random.normal(truth, 1))
        hits += low <= stats.norm.cdf(1 / math.sqrt(2)) <= high
    assert 0.92 <= hits / 400 <= 0.98


# ---- families, pairs, agreement ----


@pytest.mark.parametrize("seed", range(5))
def test_holm_against_statsmodels(seed):
    p = np.random.default_rng(seed).beta(0.3, 2, 9)
    p[4] = p[2]
    expected = multipletests(p, method="holm")[1]
    np.testing.assert_allclose(room.holm(p), expected)
    np.testing.assert_allclose(room.holm([np.nan, *p, np.nan]), [np.nan, *expected, np.nan])


def test_holm_of_little():
    assert room.holm([]).tolist() == []
    assert room.holm([0.04]).tolist() == [0.04]
    assert np.isnan(room.holm([np.nan])).all()
    for order in permutations([0.01, 0.02, 0.9]):
        assert dict(zip(order, room.holm(order), strict=True)) == pytest.approx({0.01: 0.03, 0.02: 0.04, 0.9: 0.9})


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 6), (5, 1), (9, 9), (31, 14)])
def test_mcnemar_against_statsmodels(one, other):
    first = np.array([1] * one + [0] * other + [1, 1, 0])
    second = np.array([0] * one + [1] * other + [1, 1, 0])
    expected = peer_mcnemar([[2, one], [other, 1]], exact=True).pvalue if one + other else 1.0
    assert room.mcnemar(first, second) == (one, other, pytest.approx(expected))


def test_kappas_against_their_peers():
    random = np.random.default_rng(0)
    calls = random.integers(3, size=(50, 1)) * (random.random((50, 5)) < 0.6)
    counts = np.stack([(calls == label).sum(axis=1) for label in range(3)], axis=1)
    assert room.fleiss_kappa(counts) == pytest.approx(peer_fleiss(counts, method="fleiss"))
    a, b = calls[:, 0], calls[:, 1]
    assert room.cohen_kappa(a, b) == pytest.approx(peers.cohen_kappa_score(a, b))
    assert room.cohen_kappa(a, a) == 1
    assert room.cohen_kappa([0, 1, 0, 1], [1, 0, 1, 0]) == -1
    for undefined in ([], np.empty((0, 2)), [[3, 0], [3, 0]], [[1, 0], [0, 1]]):
        assert math.isnan(room.fleiss_kappa(undefined))
    assert math.isnan(room.cohen_kappa([], []))
    assert math.isnan(room.cohen_kappa([1, 1], [1, 1]))
    with pytest.raises(ValueError, match="2 to 3 readers"):
        room.fleiss_kappa([[3, 0], [1, 1]])


# ---- readers ----


def test_readers_beside_a_model():
    random = np.random.default_rng(1)
    truth = random.integers(2, size=80)
    calls = {
        name: np.where(random.random(80) < skill, truth, 1 - truth)
        for name, skill in (("A", 0.9), ("B", 0.6), ("C", 0.7))
    }
    model = np.where(random.random(80) < 0.8, truth, 1 - truth)
    calls["B"] = np.where(np.arange(80) < 20, -1, calls["B"])
    calls["C"] = np.where(np.arange(80) >= 70, np.nan, calls["C"])
    found = room.readers(truth, calls, model)
    tests = []
    for name, given in calls.items():
        read = given >= 0
        y, said, mine, row = truth[read], given[read], model[read], found["readers"][name]
        assert row["n"] == read.sum()
        for figure, part in (("accuracy", y >= 0), ("sensitivity", y == 1), ("specificity", y == 0)):
            hits = (said == y)[part]
            low, high = proportion_confint(hits.sum(), len(hits), method="wilson")
            assert row[figure] == pytest.approx({"value": hits.mean(), "low": low, "high": high})
            ours = (mine == y)[part]
            test = row["against_model"][figure]
            assert test["difference"] == pytest.approx(ours.mean() - hits.mean())
            table = [[(ours & hits).sum(), (ours & ~hits).sum()], [(~ours & hits).sum(), (~ours & ~hits).sum()]]
            assert (test["model_only"], test["reader_only"]) == (table[0][1], table[1][0])
            assert test["p"] == pytest.approx(peer_mcnemar(table, exact=True).pvalue)
            tests.append(test)
    adjusted = multipletests([test["p"] for test in tests], method="holm")[1]
    assert [test["p_holm"] for test in tests] == pytest.approx(adjusted.tolist())
    assert found["model"]["sensitivity"]["value"] == pytest.approx(peers.recall_score(truth, model))
    counts = np.stack([sum(given[20:70] == label for given in calls.values()) for label in (0, 1)], axis=1)
    assert found["fleiss"] == {"kappa": pytest.approx(peer_fleiss(counts)), "n": 50}
    pairs = {(row["first"], row["second"]): row for row in found["cohen"]}
    assert list(pairs) == [("A", "B"), ("A", "C"), ("B", "C")]
    expected = peers.cohen_kappa_score(calls["A"][20:].astype(int), calls["B"][20:].astype(int))
    assert pairs["A", "B"] == {"first": "A", "second": "B", "kappa": pytest.approx(expected), "n": 60}


def test_readers_of_little():
    nobody = room.readers([0, 1], {}, [0, 1])
    assert nobody["readers"] == {}
    assert nobody["fleiss"] == {"kappa": None, "n": 0}
    one = room.readers([1, 1], {"A": [1, -1]}, [1, 0])
    assert one["fleiss"]["kappa"] is None
    assert one["readers"]["A"]["specificity"] == {"value": None, "low": None, "high": None}
    assert one["readers"]["A"]["against_model"]["specificity"]["p"] is None
    assert one["readers"]["A"]["against_model"]["accuracy"]["p_holm"] == 1
    with pytest.raises(ValueError, match="reader A must be 2 of 0 and 1"):
        room.readers([0, 1], {"A": [2, 1]}, [0, 1])
    with pytest.raises(ValueError, match="got 3 with"):
        room.readers([0, 1], {"A": [0, 1, 1]}, [0, 1])


# ---- columns ----


def test_correlations_against_scipy():
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
    rows = room.correlations(columns, outcome)
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


def test_correlations_of_little():
    (perfect,) = room.correlations({"a": [1.0, 2, 3, 4]}, [1, 2, 3, 4])
    assert (perfect["rho"], perfect["high"]) == (1, pytest.approx(1))
    (few,) = room.correlations({"a": [1.0, 3, 2]}, [1, 2, 3])
    assert (few["rho"], few["low"], few["high"]) == (0.5, None, None)
    (two,) = room.correlations({"a": [1.0, 3]}, [1, 2])
    assert two["rho"] is None


@pytest.mark.parametrize("r", [0.0, 0.6])
def test_the_interval_of_a_correlation_covers_as_it_says(r):
    """Of two normal columns the true rank correlation is 6 / pi * arcsin(r / 2)."""
    random, hits = np.random.default_rng(0), 0
    truth = 6 / math.pi * math.asin(r / 2)
    for _ in range(400):
        a, noise = random.normal(size=(2, 50))
        (row,) = room.correlations({"a": a}, r * a + math.sqrt(1 - r * r) * noise)
        hits += row["low"] <= truth <= row["high"]
    assert 0.92 <= hits / 400 <= 0.98
