"""Metrics: arrays in, numbers out.

The package knows no models, studies or files. `metric` registers a metric, which then appears in `metrics.json`,
tables, comparisons and reports. The order of registration is the order of columns. `compute`, `compute_with_intervals`
and `compare` evaluate every registered metric. The modules hold further methods: bootstrap intervals, thresholds,
recalibration, conformal sets, tests and agreement.
"""

# isort: off
from ichprog.metrics.metric import (
    AT_HALF,
    KINDS,
    PRIMARY,
    RECALIBRATED,
    Interval,
    Kind,
    Metric,
    WeightedPredictions,
    compute,
    compute_weighted,
    compute_with_intervals,
    label_of,
    metric,
    ratio,
    registered,
    unregister,
)
from ichprog.metrics import discrimination, ordinal, calibration  # the order of columns

# isort: on
from ichprog.metrics import (
    agreement,
    binned,
    bootstrap,
    comparisons,
    conformal,
    local_recalibration,
    meta_analysis,
    operating_points,
    seeds,
    subgroups,
)
from ichprog.metrics.comparisons import compare

__all__ = [
    "AT_HALF",
    "KINDS",
    "PRIMARY",
    "RECALIBRATED",
    "Interval",
    "Kind",
    "Metric",
    "WeightedPredictions",
    "agreement",
    "binned",
    "bootstrap",
    "calibration",
    "compare",
    "comparisons",
    "compute",
    "compute_weighted",
    "compute_with_intervals",
    "conformal",
    "discrimination",
    "label_of",
    "local_recalibration",
    "meta_analysis",
    "metric",
    "operating_points",
    "ordinal",
    "ratio",
    "registered",
    "seeds",
    "subgroups",
    "unregister",
]
