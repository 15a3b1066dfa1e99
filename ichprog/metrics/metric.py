"""The metric registry: one decorated function adds a metric to every table, comparison and report.

A metric is a function of how often each patient counts. Weights of one give the metric itself, a bootstrap sample
counts a patient as often as it was drawn, and the jackknife leaves one patient out. One call evaluates all samples.

A metric that is undefined, such as an AUROC of patients with one outcome, is NaN.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from ichprog.errors import InvalidValueError, UnknownNameError
from ichprog.metrics.bootstrap import bca_interval, finite, percentile_interval, resample_counts

Kind = Literal["binary", "ordinal", "nominal"]
Interval = dict[str, float | None]

KINDS: tuple[Kind, ...] = get_args(Kind)
PRIMARY = "auroc"  # the metric that figures show and that orders variants
AT_HALF = "_at_half"  # suffix of a metric at a threshold of 0.5
RECALIBRATED = "_recalibrated"  # suffix of a metric after recalibration
_CUT = "{cut}"  # stands in a name for the number of a cut between ordered labels


@dataclass(frozen=True, eq=False)
class WeightedPredictions:
    """The predictions of one task, with D ways to count the N patients.

    Attributes:
        kind: Kind of the task: two labels, ordered labels or labels without order.
        truth: Label indices `(N,)` int64.
        probabilities: Probabilities of the K labels `(N, K)` float64.
        thresholds: Decision threshold of each patient `(N,)`. Nominal tasks ignore the thresholds.
        weights: How often each patient counts `(D, N)`.
    """

    kind: Kind
    truth: np.ndarray
    probabilities: np.ndarray
    thresholds: np.ndarray
    weights: np.ndarray

    @cached_property
    def cumulative(self) -> np.ndarray:
        """Return the probabilities of label k or a later label, for k from 1, `(N, K - 1)`."""
        if self.probabilities.shape[1] == 2:
            return self.probabilities[:, 1:]
        return np.cumsum(np.insert(-self.probabilities[:, :-1], 0, 1, axis=1), axis=1)[:, 1:]

    @cached_property
    def decisions(self) -> np.ndarray:
        """Return the decided label indices `(N,)`."""
        if self.kind == "nominal":
            decided: np.ndarray = self.probabilities.argmax(axis=1)
            return decided
        exceeds = self.cumulative > self.thresholds[:, None]
        last: np.ndarray = (exceeds * np.arange(1, self.probabilities.shape[1])).max(axis=1)
        return last

    @cached_property
    def confusion(self) -> np.ndarray:
        """Return the confusion matrices `(D, K, K)`, a row for each true and a column for each decided label."""
        labels = self.probabilities.shape[1]
        counts: np.ndarray = self.weights @ np.eye(labels * labels)[self.truth * labels + self.decisions]
        return counts.reshape(-1, labels, labels)

    @cached_property
    def rankings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the area under the ROC curve and the average precision `(D,)` of each event.

        An event is label k or a later label for ordered labels, and label k alone for labels without order.
        """
        if self.kind == "nominal":
            events = [(self.truth == k, self.probabilities[:, k]) for k in range(self.probabilities.shape[1])]
        else:
            events = [(self.truth > k, self.cumulative[:, k]) for k in range(self.cumulative.shape[1])]
        return [_rank(event, p, self.weights) for event, p in events]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Return the weighted means `(D,)` of values `(N,)`.

        Args:
            values: One value for each patient.
        """
        return ratio(self.weights @ values, self.weights.sum(axis=1))


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        name: Name in `metrics.json` and in CSV columns.
        label: Name in tables and figures for readers.
        function: Function from `WeightedPredictions` to values `(D,)`. A name with "{cut}" takes values `(D, K - 1)`.
        kinds: Kinds of task that the metric applies to.
        higher_is_better: Whether higher values are better; None if the best value lies in between.
        compared: Whether a study compares variants by this metric.
        in_subgroups: Whether the metric is reported for subgroups.
        in_report: Whether the metric is a column of a report's tables of results.
        at_threshold: Whether the metric depends on the threshold. Binary tasks report such a metric at 0.5 too.
        recalibrated: Whether the metric is reported before and after recalibration.
    """

    name: str
    label: str
    function: Callable[[WeightedPredictions], np.ndarray]
    kinds: tuple[Kind, ...] = KINDS
    higher_is_better: bool | None = True
    compared: bool = False
    in_subgroups: bool = False
    in_report: bool = True
    at_threshold: bool = False
    recalibrated: bool = False


_metrics: dict[str, Metric] = {}


def metric(
    label: str,
    *,
    name: str | None = None,
    kinds: Iterable[Kind] = KINDS,
    higher_is_better: bool | None = True,
    compared: bool = False,
    in_subgroups: bool = False,
    in_report: bool = True,
    at_threshold: bool = False,
    recalibrated: bool = False,
) -> Callable[[Callable[[WeightedPredictions], np.ndarray]], Callable[[WeightedPredictions], np.ndarray]]:
    """Register the decorated function as a metric.

    Args:
        label: Name for readers.
        name: Name in files; by default the function's name.
        kinds: As in `Metric`.
        higher_is_better: As in `Metric`.
        compared: As in `Metric`.
        in_subgroups: As in `Metric`.
        in_report: As in `Metric`.
        at_threshold: As in `Metric`.
        recalibrated: As in `Metric`.

    Raises:
        InvalidValueError: The name is registered already.

    Examples:
        >>> @metric("error rate", higher_is_better=False)
        ... def error_rate(predictions):
        ...     return predictions.mean(predictions.decisions != predictions.truth)
        >>> compute([0, 1, 1], [0.2, 0.9, 0.4], kind="binary")["error_rate"]
        0.3333333333333333
        >>> unregister("error_rate")
    """

    def register(function: Callable[[WeightedPredictions], np.ndarray]) -> Callable[[WeightedPredictions], np.ndarray]:
        new = Metric(
            name or function.__name__, label, function, tuple(kinds), higher_is_better, compared, in_subgroups,
            in_report, at_threshold, recalibrated,
        )  # fmt: skip
        if new.name in _metrics:
            raise InvalidValueError("metric name", new.name, "a name that is not registered yet")
        _metrics[new.name] = new
        return function

    return register


def unregister(name: str) -> None:
    """Remove a metric from the registry.

    Args:
        name: Name of the metric.

    Raises:
        UnknownNameError: No metric has this name.
    """
    if name not in _metrics:
        raise UnknownNameError("metric", name, _metrics)
    del _metrics[name]


def registered(kind: Kind) -> list[Metric]:
    """Return the metrics of a kind of task, in the order of registration.

    Args:
        kind: Kind of task.

    Examples:
        >>> [each.name for each in registered("nominal")]
        ['auroc', 'balanced_accuracy', 'accuracy', 'log_loss']
    """
    return [each for each in _metrics.values() if kind in each.kinds]


def label_of(name: str) -> str | None:
    """Return the label of a metric for readers, or None if no metric has this name.

    Args:
        name: Name of a metric, with the number of its cut or a suffix.

    Examples:
        >>> label_of("auroc_2"), label_of("ppv_at_half"), label_of("size")
        ('AUROC 2', 'PPV at half', None)
    """
    for suffix in (AT_HALF, RECALIBRATED):
        if name.endswith(suffix) and (label := label_of(name.removesuffix(suffix))):
            return label + suffix.replace("_", " ")
    for each in _metrics.values():
        if match := re.fullmatch(re.escape(each.name).replace(re.escape(_CUT), r"(\d+)"), name):
            return each.label.replace(_CUT, match.group(match.lastindex or 0))
    return None


def compute(truth: ArrayLike, probabilities: ArrayLike, *, kind: Kind, thresholds: ArrayLike = 0.5) -> dict[str, float]:
    """Compute every registered metric of a task's predictions.

    Args:
        truth: Label indices `(N,)`.
        probabilities: Probabilities of the K labels `(N, K)`; of two labels also of the last label alone `(N,)`.
        kind: Kind of task.
        thresholds: Decision threshold of each patient `(N,)`, or one for all.

    Returns:
        Value by metric name. Threshold metrics of binary tasks appear a second time with the suffix `_at_half`.

    Raises:
        InvalidValueError: The arrays do not fit the kind of task.
        UnknownNameError: No kind has this name.

    Examples:
        >>> values = compute([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], kind="binary")
        >>> values["auroc"], values["accuracy"]
        (0.75, 0.5)
    """
    once = np.ones((1, len(np.asarray(truth))))
    values = compute_weighted(truth, probabilities, once, kind=kind, thresholds=thresholds)
    return {name: float(value[0]) for name, value in values.items()}


def compute_weighted(
    truth: ArrayLike, probabilities: ArrayLike, weights: np.ndarray, *, kind: Kind, thresholds: ArrayLike = 0.5
) -> dict[str, np.ndarray]:
    """Compute every registered metric for D ways to count the patients.

    Args:
        truth: As in `compute`.
        probabilities: As in `compute`.
        weights: How often each patient counts `(D, N)`.
        kind: As in `compute`.
        thresholds: As in `compute`.

    Returns:
        Values `(D,)` by metric name.

    Raises:
        InvalidValueError: The arrays do not fit the kind of task.
        UnknownNameError: No kind has this name.
    """
    predictions = _weighted_predictions(truth, probabilities, weights, kind, thresholds)
    values: dict[str, np.ndarray] = {}
    for each in registered(kind):
        result = each.function(predictions)
        if _CUT in each.name:
            values |= {each.name.replace(_CUT, str(cut)): value for cut, value in enumerate(result.T, start=1)}
        else:
            values[each.name] = result
    if kind == "binary":
        at_half = dataclasses.replace(predictions, thresholds=np.full(len(predictions.truth), 0.5))
        values |= {each.name + AT_HALF: each.function(at_half) for each in registered(kind) if each.at_threshold}
    return values


def compute_with_intervals(
    truth: ArrayLike,
    probabilities: ArrayLike,
    *,
    kind: Kind,
    thresholds: ArrayLike = 0.5,
    n_bootstrap: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
    ci_method: str = "percentile",
) -> dict[str, Interval]:
    """Compute every registered metric with a bootstrap interval over patients.

    Args:
        truth: As in `compute`; each patient once.
        probabilities: As in `compute`.
        kind: As in `compute`.
        thresholds: As in `compute`. The thresholds stay the same in every bootstrap sample.
        n_bootstrap: Number of bootstrap samples.
        seed: Random seed.
        coverage: Coverage of the intervals.
        ci_method: "percentile" or "bca".

    Returns:
        By metric name the `value`, `low` and `high`; None if undefined. An interval needs a metric that is defined in
        at least half of the samples.

    Raises:
        InvalidValueError: The arrays do not fit the kind of task, or `ci_method` is neither of the two.
        UnknownNameError: No kind has this name.
    """
    if ci_method not in ("percentile", "bca"):
        raise InvalidValueError("ci_method", ci_method, "'percentile' or 'bca'")
    n = len(np.asarray(truth))

    def weighted(weights: np.ndarray) -> dict[str, np.ndarray]:
        return compute_weighted(truth, probabilities, weights, kind=kind, thresholds=thresholds)

    samples = weighted(resample_counts(n, n_bootstrap=n_bootstrap, seed=seed))
    jackknife = weighted(1 - np.eye(n)) if ci_method == "bca" else {}
    intervals: dict[str, Interval] = {}
    for name, value in compute(truth, probabilities, kind=kind, thresholds=thresholds).items():
        low, high = np.nan, np.nan
        if not np.isnan(value) and np.isfinite(samples[name]).mean() >= 0.5:
            if jackknife:
                low, high = bca_interval(samples[name], value, jackknife[name], coverage=coverage)
            else:
                low, high = percentile_interval(samples[name], coverage=coverage)
        intervals[name] = {"value": finite(value), "low": finite(low), "high": finite(high)}
    return intervals


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient of two arrays, NaN if the denominator is 0.

    Args:
        numerator: Any shape.
        denominator: A shape that broadcasts with the numerator's.
    """
    nan = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    quotient: np.ndarray = np.divide(numerator, denominator, out=nan, where=denominator != 0)
    return quotient


def _weighted_predictions(
    truth: ArrayLike, probabilities: ArrayLike, weights: np.ndarray, kind: Kind, thresholds: ArrayLike
) -> WeightedPredictions:
    if kind not in KINDS:
        raise UnknownNameError("kind of task", kind, KINDS)
    y, p = np.asarray(truth, np.int64), np.asarray(probabilities, np.float64)
    if p.ndim == 1:
        p = np.stack([1 - p, p], axis=1)
    if len(p) != len(y) or (kind == "binary" and p.shape[1] != 2):
        labels = 2 if kind == "binary" else "K"
        raise InvalidValueError("shape of probabilities", p.shape, f"({len(y)}, {labels}) for a {kind} task")
    if np.isnan(p).any():  # no metric is defined: let no patient count
        p, weights = np.nan_to_num(p), np.zeros_like(weights)
    limits = np.broadcast_to(np.asarray(thresholds, np.float64), (len(y),))
    return WeightedPredictions(kind, y, p, limits, weights)


def _rank(truth: np.ndarray, p: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the area under the ROC curve, ties counted half, and the average precision."""
    order = np.argsort(p, kind="stable")
    starts = np.flatnonzero(np.diff(p[order], prepend=-np.inf))
    counts = weights[:, order]
    positive = np.add.reduceat(counts * truth[order], starts, axis=1)
    negative = np.add.reduceat(counts * ~truth[order], starts, axis=1)
    ranked_below = np.cumsum(negative, axis=1) - negative / 2
    area = ratio((positive * ranked_below).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))
    hits, called = (np.cumsum(each[:, ::-1], axis=1)[:, ::-1] for each in (positive, positive + negative))
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    average = ratio((positive * precision).sum(axis=1), positive.sum(axis=1))
    return area, np.where(np.isnan(area), np.nan, average)
