"""Paired comparisons on the same patients: two variants, and columns with an outcome.

Every test is two-sided and takes patients as independent of each other. Out-of-fold predictions come from several
networks that share most of their training patients; no test here includes that source of variation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ichprog.errors import InvalidValueError
from ichprog.metrics.bootstrap import bootstrap, finite, percentile_interval, resample_counts
from ichprog.metrics.metric import Kind, compute, compute_weighted

Row = dict[str, Any]
_TOLERANCE = 1e-12  # smaller differences count as none


def compare(
    truth: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    kind: Kind,
    thresholds: tuple[ArrayLike, ArrayLike] = (0.5, 0.5),
    n_bootstrap: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
) -> dict[str, Row]:
    """Compare every metric of two sets of predictions of the same patients.

    Args:
        truth: Label indices `(N,)`.
        first: Probabilities `(N, K)` of the first.
        second: Probabilities `(N, K)` of the second.
        kind: Kind of task.
        thresholds: Decision thresholds of both, each `(N,)` or one for all.
        n_bootstrap: Number of bootstrap samples, which both share.
        seed: Random seed.
        coverage: Coverage of the intervals.

    Returns:
        By metric name `first`, `second`, `difference`, `low`, `high`, `p`, `n` and `method`; None if undefined. The
        method is "delong" for the AUROC of two labels and "bootstrap" for all other metrics.

    Raises:
        InvalidValueError: The arrays do not fit the kind of task.

    Examples:
        >>> truth, first, second = [0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [0.1, 0.8, 0.2, 0.9]
        >>> compare(truth, first, second, kind="binary", n_bootstrap=50)["auroc"]["difference"]
        0.25
    """
    y, sides = np.asarray(truth, np.int64), list(zip((first, second), thresholds, strict=True))
    values = [compute(y, p, kind=kind, thresholds=limits) for p, limits in sides]
    weights = resample_counts(len(y), n_bootstrap=n_bootstrap, seed=seed)
    samples = [compute_weighted(y, p, weights, kind=kind, thresholds=limits) for p, limits in sides]
    rows: dict[str, Row] = {}
    for name in values[0]:
        row = {"first": values[0][name], "second": values[1][name]}
        row |= difference_row(row["first"] - row["second"], samples[0][name] - samples[1][name], coverage)
        method = "bootstrap"
        if name == "auroc" and kind == "binary":
            method, scores = "delong", [_of_last_label(p) for p, _ in sides]
            difference, error, row["p"] = delong(y == 1, *scores)
            row["low"], row["high"] = _wald_interval(difference, error, coverage)
        rows[name] = {key: finite(number) for key, number in row.items()} | {"n": len(y), "method": method}
    return rows


def _of_last_label(probabilities: ArrayLike) -> np.ndarray:
    p = np.asarray(probabilities, np.float64)
    return p if p.ndim == 1 else p[:, -1]


def paired_bootstrap(
    first: Callable[[np.ndarray], float],
    second: Callable[[np.ndarray], float],
    n: int,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    strata: ArrayLike | None = None,
    coverage: float = 0.95,
) -> Row:
    """Compare two statistics of the same patients, with the same bootstrap samples for both.

    Args:
        first: Function from the patient indices `(n,)` of a sample to a number.
        second: The other function.
        n: Number of patients.
        n_bootstrap: Number of bootstrap samples.
        seed: Random seed.
        strata: Groups `(n,)` whose sizes stay the same in every sample.
        coverage: Coverage of the interval.

    Returns:
        `difference`, `low`, `high` and `p`; None if undefined.

    Examples:
        >>> a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0])
        >>> paired_bootstrap(lambda s: a[s].mean(), lambda s: b[s].mean(), 3)["difference"]
        1.0
    """

    def difference(sample: np.ndarray) -> float:
        return first(sample) - second(sample)

    samples = bootstrap(difference, n, n_bootstrap=n_bootstrap, seed=seed, strata=strata)
    row = difference_row(difference(np.arange(n)), samples, coverage)
    return {key: finite(number) for key, number in row.items()}


def difference_row(difference: float, samples: np.ndarray, coverage: float) -> dict[str, float]:
    """Return a difference with its percentile interval and p value.

    The p value is twice the share of samples on the rarer side of 0, with one added to both counts. A difference that
    is undefined in more than half of the samples has neither.

    Args:
        difference: The difference.
        samples: The difference in each bootstrap sample `(D,)`.
        coverage: Coverage of the interval.
    """
    row = {"difference": difference, "low": np.nan, "high": np.nan, "p": np.nan}
    drawn = samples[np.isfinite(samples)]
    if np.isnan(difference) or 2 * len(drawn) < len(samples):
        return row
    rarer = min((drawn <= _TOLERANCE).sum(), (drawn >= -_TOLERANCE).sum())
    row["low"], row["high"] = percentile_interval(drawn, coverage=coverage)
    return row | {"p": min(1.0, 2 * (rarer + 1) / (len(drawn) + 1))}


def delong(truth: ArrayLike, first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """Test the difference of two AUROCs on the same patients.

    Sources: DeLong et al., Biometrics 1988;44:837-845; by ranks as in Sun and Xu, IEEE Signal Process Lett
    2014;21:1389-1393.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        first: Scores `(N,)` of the first.
        second: Scores `(N,)` of the second.

    Returns:
        The difference, its standard error and p. NaN if an outcome has fewer than two patients, or if two different
        areas have no variance. p is 1 if the areas cannot differ.

    Examples:
        >>> delong([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [0.1, 0.2, 0.8, 0.9])
        (0.0, 0.0, 1.0)
    """
    areas, covariance = _areas(truth, first, second)
    difference = float(areas[0] - areas[1])
    error = float(np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0)))
    if error < _TOLERANCE:
        return difference, error, 1.0 if abs(difference) < _TOLERANCE else np.nan
    return difference, error, _two_sided_p(difference / error)


def delong_interval(truth: ArrayLike, p: ArrayLike, *, coverage: float = 0.95) -> tuple[float, float, float]:
    """Compute an AUROC and its interval by the variance of DeLong et al. 1988, clipped to 0 and 1.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Scores `(N,)`.
        coverage: Coverage of the interval.

    Returns:
        The area, its lower and its upper limit.

    Examples:
        >>> delong_interval([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
        (1.0, 1.0, 1.0)
    """
    areas, covariance = _areas(truth, p)
    low, high = np.clip(_wald_interval(areas[0], np.sqrt(covariance[0, 0]), coverage), 0, 1)
    return float(areas[0]), float(low), float(high)


def _areas(truth: ArrayLike, *scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the AUROCs of S scores and their covariance `(S, S)`."""
    from scipy.stats import rankdata

    y = np.asarray(truth) == 1
    positive, negative = int(y.sum()), int((~y).sum())
    if min(positive, negative) < 2:
        return np.full(len(scores), np.nan), np.full((len(scores), len(scores)), np.nan)
    of_positive, of_negative = np.empty((len(scores), positive)), np.empty((len(scores), negative))
    for row, score in enumerate(scores):
        values = np.asarray(score, np.float64)
        ranks = rankdata(values)
        # share of the other outcome's patients on the right side of each patient
        of_positive[row] = (ranks[y] - rankdata(values[y])) / negative
        of_negative[row] = 1 - (ranks[~y] - rankdata(values[~y])) / positive
    covariance = np.cov(of_positive) / positive + np.cov(of_negative) / negative
    return of_positive.mean(axis=1), np.atleast_2d(covariance)


def _wald_interval(value: float, error: float, coverage: float) -> tuple[float, float]:
    from scipy.special import ndtri

    half = float(ndtri((1 + coverage) / 2)) * error
    return value - half, value + half


def _two_sided_p(z: float) -> float:
    from scipy.special import ndtr

    return float(2 * ndtr(-abs(z)))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Adjust a family of p values by Holm's method; NaN is not part of the family.

    Source: Holm, Scand J Stat 1979;6:65-70.

    Args:
        p_values: p values `(M,)`.

    Examples:
        >>> holm([0.01, 0.04])
        array([0.02, 0.04])
    """
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    family = np.flatnonzero(np.isfinite(p))
    order = family[np.argsort(p[family], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def mcnemar(first: ArrayLike, second: ArrayLike) -> tuple[int, int, float]:
    """Test two yes-no columns of the same patients by McNemar's exact test.

    Source: McNemar, Psychometrika 1947;12:153-157.

    Args:
        first: `(N,)` bool.
        second: `(N,)` bool.

    Returns:
        Number of patients with yes in the first column only, number with yes in the second only, and p. p is 1 if the
        columns are equal.

    Examples:
        >>> mcnemar([True, True, False], [True, False, False])
        (1, 0, 1.0)
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def correlations(columns: Mapping[str, ArrayLike], outcome: ArrayLike, *, coverage: float = 0.95) -> list[Row]:
    """Compute Spearman's correlation of each column with the outcome.

    Intervals use Fisher's z with the variance (1 + rho^2 / 2) / (n - 3). Source: Bonett and Wright, Psychometrika
    2000;65:23-28.

    Args:
        columns: Numbers `(N,)` by name of the column, NaN if blank.
        outcome: Numbers `(N,)`, NaN if unknown.
        coverage: Coverage of the intervals.

    Returns:
        A row for each column: `name`, `n` patients with both numbers, `rho`, `low`, `high`, `p`, and `p_holm` over all
        columns. None if undefined. A correlation needs three patients and unequal values, its interval four patients.

    Raises:
        InvalidValueError: A column has another length than the outcome.

    Examples:
        >>> correlations({"age": [60, 70, 80, 90]}, [0, 1, 2, 3])[0]["rho"]
        1.0
    """
    from scipy.stats import spearmanr

    rows: list[Row] = []
    y = np.asarray(outcome, np.float64)
    for name, column in columns.items():
        values = np.asarray(column, np.float64)
        if values.shape != y.shape:
            raise InvalidValueError(f"shape of column {name}", values.shape, f"{y.shape}, that of the outcome")
        both = np.isfinite(values) & np.isfinite(y)
        a, b = values[both], y[both]
        n, rho, p, low, high = len(a), np.nan, np.nan, np.nan, np.nan
        if n >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0:
            rho, p = map(float, spearmanr(a, b))
            if n >= 4:
                z = np.arctanh(np.clip(rho, -1 + 1e-15, 1 - 1e-15))
                low, high = np.tanh(_wald_interval(z, np.sqrt((1 + rho**2 / 2) / (n - 3)), coverage))
        rows.append({"name": name, "n": n, "rho": rho, "low": low, "high": high, "p": p})
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
        row |= {key: finite(row[key]) for key in ("rho", "low", "high", "p", "p_holm")}
    return rows
