"""Conformal label sets."""

import numpy as np
import pytest

from ichprog.metrics.bootstrap import wilson_interval
from ichprog.metrics.conformal import METRICS, conformal_sets, set_metrics, set_statistics

from support.predictions import three_labels


def test_sets_hold_the_labels_within_the_limit_computed_by_hand():
    validation = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    truth = [0, 1, 1, 1]  # 1 - p of the true label: 0.1, 0.3, 0.6, 0.2
    p = np.array([[0.75, 0.25], [0.5, 0.5], [0.71, 0.29], [0.39, 0.61]])
    # k = ceil(5 * 0.6) = 3: the limit is 0.3, so that labels of 0.7 and more are in
    np.testing.assert_array_equal(conformal_sets(truth, validation, p, coverage=0.6), [[1, 0], [0, 0], [1, 0], [0, 0]])
    assert conformal_sets(truth, validation, p, coverage=0.9).all()
    assert conformal_sets([], np.empty((0, 2)), p).all()


def test_sets_reach_their_coverage_on_average():
    reached = []
    for seed in range(60):
        (old, validation), (truth, p) = three_labels(99, seed=2 * seed), three_labels(400, seed=2 * seed + 1)
        sets = conformal_sets(old, validation, p, coverage=0.8)
        statistics = set_statistics(sets, truth)
        assert statistics["size"] == sets.sum() / 400
        reached.append(statistics["coverage"])
    assert np.mean(reached) == pytest.approx(0.8, abs=0.02)
    assert np.isnan(set_statistics(np.empty((0, 3), bool), [])["coverage"])
    by_hand = set_statistics(np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool), [0, 1, 0, 0])
    assert by_hand == {"coverage": 0.5, "size": 1.0, "one": 0.5, "none": 0.25}


def test_coverage_has_wilsons_interval_and_size_a_bootstrap_interval():
    sets = np.array([[1, 0], [1, 1], [0, 1], [0, 1]], bool)
    found = set_metrics(sets, [0, 1, 0, 1], n_bootstrap=200)
    low, high = wilson_interval(3, 4)
    assert found["conformal_coverage"] == {"value": 0.75, "low": float(low), "high": float(high)}
    assert found["conformal_size"]["low"] <= found["conformal_size"]["value"] == 1.25 <= found["conformal_size"]["high"]
    undefined = {"value": None, "low": None, "high": None}
    assert set_metrics(np.empty((0, 2), bool), []) == dict.fromkeys(METRICS, undefined)
