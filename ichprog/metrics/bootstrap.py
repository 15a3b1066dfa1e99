"""Bootstrap samples of patients, and intervals from bootstrap samples or counts."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def resample_counts(n: int, *, n_bootstrap: int = 1000, seed: int = 0, strata: ArrayLike | None = None) -> np.ndarray:
    """Count how often each patient is in each bootstrap sample.

    Args:
        n: Number of patients, and the size of each sample.
        n_bootstrap: Number of samples.
        seed: Random seed.
        strata: Groups `(n,)` whose sizes stay the same in every sample.

    Returns:
        Counts `(n_bootstrap, n)`; each row sums to `n`.

    Examples:
        >>> resample_counts(5, n_bootstrap=2).sum(axis=1)
        array([5., 5.])
    """
    indices = _resample(n, n_bootstrap, seed, strata)
    offsets = np.arange(n_bootstrap)[:, None] * n
    counts = np.bincount((indices + offsets).ravel(), minlength=n_bootstrap * n)
    return counts.reshape(n_bootstrap, n).astype(np.float64)


def bootstrap(
    statistic: Callable[[np.ndarray], ArrayLike],
    n: int,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    strata: ArrayLike | None = None,
) -> np.ndarray:
    """Compute a statistic of each bootstrap sample; the samples are the same as in `resample_counts`.

    Args:
        statistic: Function from the patient indices `(n,)` of a sample to a number, or to `(M,)` numbers.
        n: Number of patients.
        n_bootstrap: Number of samples.
        seed: Random seed.
        strata: Groups `(n,)` whose sizes stay the same in every sample.

    Returns:
        `(n_bootstrap,)`, or `(n_bootstrap, M)`.

    Examples:
        >>> ages = np.array([61.0, 70.0, 82.0])
        >>> bootstrap(lambda sample: ages[sample].mean(), 3, n_bootstrap=100).shape
        (100,)
    """
    return np.array([statistic(sample) for sample in _resample(n, n_bootstrap, seed, strata)], np.float64)


def _resample(n: int, n_bootstrap: int, seed: int, strata: ArrayLike | None) -> np.ndarray:
    random = np.random.default_rng(seed)
    indices = np.empty((n_bootstrap, n), np.int64)
    groups = np.zeros(n) if strata is None else np.asarray(strata)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        indices[:, members] = members[random.integers(len(members), size=(n_bootstrap, len(members)))]
    return indices


def percentile_interval(samples: np.ndarray, *, coverage: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of a bootstrapped statistic; undefined values are ignored.

    Args:
        samples: Value of the statistic in each bootstrap sample `(D,)`.
        coverage: Coverage of the interval.

    Examples:
        >>> percentile_interval(np.array([1.0, 2.0, 3.0]), coverage=0.5)
        (1.5, 2.5)
    """
    return _quantiles(samples, (1 - coverage) / 2, (1 + coverage) / 2)


def bca_interval(
    samples: np.ndarray, value: float, jackknife: np.ndarray, *, coverage: float = 0.95
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated interval of a bootstrapped statistic.

    Source: Efron, J Am Stat Assoc 1987;82:171-185.

    Args:
        samples: Value of the statistic in each bootstrap sample `(D,)`; undefined values are ignored.
        value: Value of the statistic for all patients.
        jackknife: Value of the statistic with each patient left out `(N,)`.
        coverage: Coverage of the interval.
    """
    from scipy.special import ndtr, ndtri

    drawn, left_out = samples[np.isfinite(samples)], jackknife[np.isfinite(jackknife)]
    if not len(drawn) or not len(left_out):
        return np.nan, np.nan
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    if below in (0, 1):  # every sample is on one side, so that the bias correction would be infinite
        return percentile_interval(samples, coverage=coverage)
    bias, deviations = ndtri(below), left_out.mean() - left_out
    squares = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    z = bias + ndtri(np.array([(1 - coverage) / 2, (1 + coverage) / 2]))
    low, high = ndtr(bias + z / (1 - acceleration * z))
    return _quantiles(samples, low, high)


def _quantiles(samples: np.ndarray, low: float, high: float) -> tuple[float, float]:
    drawn = samples[np.isfinite(samples)]
    if not len(drawn):
        return np.nan, np.nan
    first, last = np.quantile(drawn, [low, high])
    return float(first), float(last)


def wilson_interval(hits: ArrayLike, n: ArrayLike, *, coverage: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of a share, NaN if `n` is 0.

    Source: Wilson, J Am Stat Assoc 1927;22:209-212.

    Args:
        hits: Number of hits.
        n: Number of patients.
        coverage: Coverage of the interval.

    Examples:
        >>> low, high = wilson_interval(8, 10)
        >>> round(float(low), 3), round(float(high), 3)
        (0.49, 0.943)
    """
    from scipy.special import ndtri

    z2 = float(ndtri((1 + coverage) / 2)) ** 2
    k, total = np.asarray(hits, np.float64), np.asarray(n, np.float64)
    total = np.where(total > 0, total, np.nan)
    half = np.sqrt(z2 * (k * (total - k) / total + z2 / 4)) / (total + z2)
    middle = (k + z2 / 2) / (total + z2)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def finite(number: float) -> float | None:
    """Return a number for JSON and tables, or None if the number is NaN or infinite.

    Args:
        number: Any number.

    Examples:
        >>> finite(0.5), finite(float("nan"))
        (0.5, None)
    """
    return float(number) if np.isfinite(number) else None
