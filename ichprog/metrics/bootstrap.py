"""How sure a figure is: bootstrap samples of patients, and intervals from them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def resamples(n: int, *, draws: int = 1000, seed: int = 0, strata: ArrayLike | None = None) -> np.ndarray:
    """How often each of `n` patients is in each bootstrap sample of `n`.

    Args:
        n: Patients.
        draws: Samples.
        seed: Where chance comes from.
        strata: `(n,)` groups whose sizes every sample keeps.

    Returns:
        `(draws, n)`, each row adding to `n`.
    """
    places = _places(n, draws, seed, strata)
    rows = np.arange(draws)[:, None] * n
    return np.bincount((places + rows).ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)


def bootstrap(
    statistic: Callable[[np.ndarray], ArrayLike],
    n: int,
    *,
    draws: int = 1000,
    seed: int = 0,
    strata: ArrayLike | None = None,
) -> np.ndarray:
    """A statistic of each bootstrap sample; the samples are those of `resamples`.

    Args:
        statistic: From the places `(n,)` of a sample's patients to a number, or to `(M,)` numbers.
        n: Patients.
        draws: Samples.
        seed: Where chance comes from.
        strata: `(n,)` groups whose sizes every sample keeps.

    Returns:
        `(draws,)`, or `(draws, M)`.
    """
    return np.array([statistic(sample) for sample in _places(n, draws, seed, strata)], np.float64)


def _places(n: int, draws: int, seed: int, strata: ArrayLike | None) -> np.ndarray:
    random = np.random.default_rng(seed)
    places = np.empty((draws, n), np.int64)
    groups = np.zeros(n) if strata is None else np.asarray(strata)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        places[:, members] = members[random.integers(len(members), size=(draws, len(members)))]
    return places


def interval(draws: np.ndarray, *, coverage: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap draws `(D,)`; those that are not defined are left out."""
    return _quantiles(draws, (1 - coverage) / 2, (1 + coverage) / 2)


def bca(draws: np.ndarray, value: float, left_out: np.ndarray, *, coverage: float = 0.95) -> tuple[float, float]:
    """The bias-corrected and accelerated interval (Efron, J Am Stat Assoc 1987;82:171-185).

    Args:
        draws: `(D,)` bootstrap draws; those that are not defined are left out.
        value: The figure itself.
        left_out: `(N,)`, the figure with each patient left out (the jackknife).
        coverage: Of the interval.
    """
    from scipy.special import ndtr, ndtri

    known, jack = draws[np.isfinite(draws)], left_out[np.isfinite(left_out)]
    if not len(known) or not len(jack):
        return np.nan, np.nan
    below = ((known < value).mean() + (known <= value).mean()) / 2
    if below in (0, 1):  # no draw on one side: there is nothing to correct the bias by
        return interval(draws, coverage=coverage)
    bias, away = ndtri(below), jack.mean() - jack
    spread = float((away**2).sum())
    acceleration = float((away**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + ndtri(np.array([(1 - coverage) / 2, (1 + coverage) / 2]))
    low, high = ndtr(bias + z / (1 - acceleration * z))
    return _quantiles(draws, low, high)


def _quantiles(draws: np.ndarray, low: float, high: float) -> tuple[float, float]:
    known = draws[np.isfinite(draws)]
    if not len(known):
        return np.nan, np.nan
    first, last = np.quantile(known, [low, high])
    return float(first), float(last)


def wilson(positive: ArrayLike, of: ArrayLike, *, coverage: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share (J Am Stat Assoc 1927;22:209-212), NaN of none."""
    from scipy.special import ndtri

    z2 = float(ndtri((1 + coverage) / 2)) ** 2
    k, n = np.asarray(positive, np.float64), np.asarray(of, np.float64)
    k, n = k.copy(), np.where(n > 0, n, np.nan)
    middle, half = (k + z2 / 2) / (n + z2), np.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def finite(number: float) -> float | None:
    """A number for a table, None where it is not defined."""
    return float(number) if np.isfinite(number) else None
