"""Random-effects meta-analysis: one estimate from each hospital, and how much the hospitals differ."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ichprog.metrics.bootstrap import finite


@dataclass(frozen=True)
class PooledEstimate:
    """A pooled estimate.

    Attributes:
        sites: Number of sites.
        value: Pooled estimate.
        low: Lower limit of its interval.
        high: Upper limit of its interval.
        prediction_low: Lower limit of the prediction interval for a new site; None with fewer than three sites.
        prediction_high: Upper limit of the prediction interval for a new site; None with fewer than three sites.
        tau2: Variance between sites.
        i2: Share of the variation of estimates that is between sites, from 0 to 1.
        q: Cochran's Q.
        p: P value of Q; small if sites differ more than by chance.
    """

    sites: int
    value: float | None
    low: float | None
    high: float | None
    prediction_low: float | None
    prediction_high: float | None
    tau2: float | None
    i2: float | None
    q: float | None
    p: float | None


def random_effects(
    estimates: Sequence[float],
    errors: Sequence[float],
    *,
    coverage: float = 0.95,
    back: Callable[[float], float] = float,
) -> PooledEstimate:
    """Pool estimates of several sites by the method of DerSimonian and Laird.

    Sources: DerSimonian and Laird, Control Clin Trials 1986;7:177-188; I2 of Higgins and Thompson, Stat Med
    2002;21:1539-1558; prediction interval of Higgins et al., J R Stat Soc A 2009;172:137-159, with t of S - 2 degrees
    of freedom for S sites.

    Args:
        estimates: Estimate of each site. A site is left out if its estimate or error is not finite, or its error is 0.
        errors: Standard error of each estimate.
        coverage: Coverage of both intervals.
        back: Function that turns a pooled estimate into the scale of the result, such as the inverse logit.

    Examples:
        >>> pooled = random_effects([0.4, 0.4, 0.4], [0.1, 0.1, 0.1])
        >>> round(pooled.value, 3), pooled.i2, pooled.tau2
        (0.4, 0.0, 0.0)
    """
    from scipy.special import chdtrc, ndtri, stdtrit

    y, se = np.asarray(estimates, np.float64), np.asarray(errors, np.float64)
    kept = np.isfinite(y) & np.isfinite(se) & (se > 0)
    y, variance = y[kept], se[kept] ** 2
    n = len(y)
    if not n:
        return PooledEstimate(0, None, None, None, None, None, None, None, None, None)
    fixed = 1 / variance
    q = float((fixed * (y - (fixed @ y) / fixed.sum()) ** 2).sum())
    scale = fixed.sum() - (fixed**2).sum() / fixed.sum()
    tau2 = max((q - (n - 1)) / float(scale), 0.0) if n > 1 else 0.0
    weights = 1 / (variance + tau2)
    value, error = float(weights @ y / weights.sum()), float(1 / np.sqrt(weights.sum()))
    half = float(ndtri((1 + coverage) / 2)) * error
    spread = float(stdtrit(n - 2, (1 + coverage) / 2)) * math.sqrt(tau2 + error**2) if n > 2 else math.nan
    several, limited = n > 1, not math.isnan(spread)
    return PooledEstimate(
        n,
        value=finite(back(value)),
        low=finite(back(value - half)),
        high=finite(back(value + half)),
        prediction_low=finite(back(value - spread)) if limited else None,
        prediction_high=finite(back(value + spread)) if limited else None,
        tau2=tau2 if several else None,
        i2=(max((q - (n - 1)) / q, 0.0) if q > 0 else 0.0) if several else None,
        q=q if several else None,
        p=float(chdtrc(n - 1, q)) if several else None,
    )
