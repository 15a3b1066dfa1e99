"""The metric registry and how metrics and their intervals are computed."""

import math
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ichprog.errors import InvalidValueError, UnknownNameError
from ichprog.metrics import (
    KINDS,
    bootstrap,
    compute,
    compute_weighted,
    compute_with_intervals,
    label_of,
    metric,
    registered,
    unregister,
)

from support.predictions import three_labels, two_labels


@pytest.mark.parametrize("truth", [[], [0], [1, 1], [0, 0, 0]])
def test_one_outcome_leaves_undefined_what_needs_two(truth):
    p = np.linspace(0.2, 0.9, len(truth))
    found = compute(truth, p, kind="binary")
    for name in ("auroc", "auprc", "balanced_accuracy", "calibration_slope", "calibration_intercept"):
        assert math.isnan(found[name])
    assert math.isnan(found["brier"]) == (not truth)
    both = compute_with_intervals(truth, p, kind="binary", n_bootstrap=20)
    assert both["auroc"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("kind", ["ordinal", "nominal"])
@pytest.mark.parametrize("truth", [[], [2], [1, 1, 1]])
def test_one_label_leaves_undefined_what_needs_more(kind, truth):
    found = compute(truth, np.full((len(truth), 3), 1 / 3), kind=kind)
    assert math.isnan(found["auroc"])
    assert math.isnan(found["balanced_accuracy"])
    assert math.isnan(found["accuracy"]) == (not truth)


@pytest.mark.parametrize("kind", KINDS)
def test_one_nan_probability_leaves_every_metric_undefined(kind):
    truth, p = two_labels(30) if kind == "binary" else three_labels(30)
    p[7] = np.nan
    assert all(math.isnan(value) for value in compute(truth, p, kind=kind).values())
    intervals = compute_with_intervals(truth, p, kind=kind, n_bootstrap=5)
    assert all(row["low"] is None for row in intervals.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_with_weight_k_counts_as_k_patients(kind):
    """All samples at once give what each sample gives alone, ties included."""
    truth, p = two_labels(60, digits=1) if kind == "binary" else three_labels(60)
    weights = bootstrap.resample_counts(60, n_bootstrap=25, seed=4)
    together = compute_weighted(truth, p, weights, kind=kind, thresholds=0.4)
    for number, row in enumerate(weights):
        sample = np.repeat(np.arange(60), row.astype(int))
        alone = compute(truth[sample], p[sample], kind=kind, thresholds=0.4)
        assert {name: values[number] for name, values in together.items()} == pytest.approx(alone, nan_ok=True)


@pytest.mark.parametrize("ci_method", ["percentile", "bca"])
def test_metrics_have_intervals(ci_method):
    truth, p = two_labels()
    options = {"kind": "binary", "thresholds": 0.4, "n_bootstrap": 300, "seed": 3, "ci_method": ci_method}
    found = compute_with_intervals(truth, p, **options)
    values = compute(truth, p, kind="binary", thresholds=0.4)
    assert {name: row["value"] for name, row in found.items()} == pytest.approx(values)
    for row in found.values():
        assert row["low"] < row["value"] < row["high"]
    samples = np.random.default_rng(0).integers(150, size=(300, 150))
    width = 2 * 1.96 * np.std([roc_auc_score(truth[sample], p[sample]) for sample in samples])
    assert found["auroc"]["high"] - found["auroc"]["low"] == pytest.approx(width, rel=0.2)
    assert found == compute_with_intervals(truth, p, **options)


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidValueError, match="Expected 'percentile' or 'bca'"):
        compute_with_intervals(*two_labels(10), kind="binary", n_bootstrap=5, ci_method="normal")
    with pytest.raises(
        InvalidValueError, match=r"shape of probabilities \(10, 3\). Expected \(10, 2\) for a binary task"
    ):
        compute(*three_labels(10), kind="binary")
    with pytest.raises(UnknownNameError, match="Unknown kind of task 'ordered'"):
        compute(*three_labels(10), kind="ordered")


def test_a_thousand_samples_take_seconds():
    start = time.perf_counter()
    compute_with_intervals(*two_labels(400), kind="binary", ci_method="bca")
    compute_with_intervals(*three_labels(400), kind="ordinal")
    assert time.perf_counter() - start < 10


def test_percentile_intervals_reach_their_coverage():
    """The accuracy of 60 patients, whose true value is 0.8."""
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        right = random.random(60) < 0.8
        found = compute_with_intervals(right.astype(int), np.full(60, 0.9), kind="binary", n_bootstrap=200, seed=seed)
        hits += found["accuracy"]["low"] <= 0.8 <= found["accuracy"]["high"]
    assert 0.89 <= hits / 200 <= 0.98


def test_metrics_have_labels_with_their_cuts_and_suffixes():
    assert label_of("auroc") == "AUROC"
    assert label_of("auroc_12") == "AUROC 12"
    assert label_of("ppv_at_half") == "PPV at half"
    assert label_of("brier_recalibrated") == "Brier score recalibrated"
    assert label_of("auroc_low") is None


def test_a_metric_is_registered_once_and_can_be_removed():
    truth, p = two_labels(20)

    @metric("error rate", kinds=["binary"], higher_is_better=False, at_threshold=True)
    def error_rate(predictions):
        """Return the share of wrong decisions."""
        return predictions.mean(predictions.decisions != predictions.truth)

    try:
        found = compute(truth, p, kind="binary", thresholds=0.7)
        assert found["error_rate"] == pytest.approx(1 - found["accuracy"])
        assert found["error_rate_at_half"] == pytest.approx(1 - found["accuracy_at_half"])
        assert "error_rate" not in compute(*three_labels(20), kind="nominal")
        with pytest.raises(InvalidValueError, match="metric name 'error_rate'"):
            metric("error rate")(error_rate)
    finally:
        unregister("error_rate")
    assert "error_rate" not in [each.name for each in registered("binary")]
    with pytest.raises(UnknownNameError, match="Unknown metric 'error_rate'"):
        unregister("error_rate")
