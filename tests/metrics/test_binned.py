"""AUROC from binned scores, against scikit-learn on the binned and on the unbinned scores, and against DeLong."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from ichprog.metrics.binned import (
    BinnedScores,
    bin_scores,
    binned_auroc,
    binned_auroc_error,
    merge_small_bins,
    rates_at_edges,
)
from ichprog.metrics.comparisons import delong_interval

from support.predictions import two_labels

FINE = np.arange(21) / 20


def test_the_area_of_binned_scores_is_exact_and_the_bound_holds():
    truth, p = two_labels(200, seed=1)
    scores = merge_small_bins(bin_scores(truth, p, FINE), 5)
    bins = np.searchsorted(scores.edges, p, side="right")
    area, bound = binned_auroc([scores])
    assert area == pytest.approx(roc_auc_score(truth, bins), abs=1e-12)
    assert abs(area - roc_auc_score(truth, p)) <= bound
    assert bound < 0.06


def test_sites_with_other_edges_are_pooled_within_the_bound():
    sites = [two_labels(n, seed=seed) for seed, n in enumerate((90, 140, 200))]
    scores = [merge_small_bins(bin_scores(truth, p, FINE), 5) for truth, p in sites]
    assert len({tuple(each.edges) for each in scores}) == 3
    area, bound = binned_auroc(scores)
    truth, p = (np.concatenate(column) for column in zip(*sites, strict=True))
    assert abs(area - roc_auc_score(truth, p)) <= bound
    pairs = [
        (low_high_event, low_high_other, events * others)
        for one in scores
        for low_high_event, events in zip(zip(one.edges[:-1], one.edges[1:], strict=True), one.events, strict=True)
        for other in scores
        for low_high_other, others in zip(
            zip(other.edges[:-1], other.edges[1:], strict=True), other.others, strict=True
        )
    ]
    best = sum(n for event, other, n in pairs if event[1] > other[0]) / sum(n for *_, n in pairs)
    worst = sum(n for event, other, n in pairs if event[0] >= other[1]) / sum(n for *_, n in pairs)
    assert (area - bound, area + bound) == pytest.approx((worst, best))


def test_the_error_is_delongs_for_the_binned_scores():
    truth, p = two_labels(120, seed=2)
    scores = bin_scores(truth, p, FINE)
    bins = np.searchsorted(FINE, p, side="right")
    _, low, high = delong_interval(truth, bins)
    assert binned_auroc_error(scores) == pytest.approx((high - low) / 2 / 1.959963984540054)
    assert np.isnan(binned_auroc_error(BinnedScores(np.array([0.0, 1.0]), np.array([1]), np.array([4]))))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(1, 8),
)
def test_merged_bins_have_no_small_count_and_lose_no_patient(counts, smallest):
    events, others = np.array(counts).T
    fine = BinnedScores(np.linspace(0, 1, len(counts) + 1), events, others)
    merged = merge_small_bins(fine, smallest)
    if min(events.sum(), others.sum()) < smallest:
        assert merged is None
        return
    assert min(merged.events.min(), merged.others.min()) >= smallest
    assert (merged.events.sum(), merged.others.sum()) == (events.sum(), others.sum())
    assert (merged.edges[0], merged.edges[-1]) == (0, 1)
    assert set(merged.edges) <= set(fine.edges)
    at = np.searchsorted(fine.edges, merged.edges)
    assert merged.events.tolist() == [events[a:b].sum() for a, b in itertools.pairwise(at)]


def test_rates_at_the_edges_are_those_of_the_unbinned_scores():
    truth, p = two_labels(100, seed=4)
    rates = rates_at_edges(bin_scores(truth, p, [0, 0.25, 0.5, 0.75, 1]))
    false_positive, sensitivity, thresholds = roc_curve(truth, p, drop_intermediate=False)
    for limit, own, specificity in zip(*rates.values(), strict=True):
        index = np.flatnonzero(thresholds >= limit)[-1]
        assert own == pytest.approx(sensitivity[index])
        assert specificity == pytest.approx(1 - false_positive[index])
