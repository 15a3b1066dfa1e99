"""Calibration: how well probabilities agree with observed shares, and recalibration on validation patients."""

import numpy as np
from numpy.typing import ArrayLike

from ichprog.metrics.bootstrap import wilson_interval
from ichprog.metrics.metric import WeightedPredictions, metric

_MIN_PROBABILITY = 1e-6  # log-odds are taken of probabilities at least this far from 0 and 1


@metric("Brier score", kinds=["binary"], higher_is_better=False, compared=True, in_subgroups=True, recalibrated=True)
def brier(predictions: WeightedPredictions) -> np.ndarray:
    """Return the mean squared difference between probability and outcome.

    Source: Brier, Mon Weather Rev 1950;78:1-3.

    Args:
        predictions: The predictions.
    """
    return predictions.mean((predictions.probabilities[:, 1] - (predictions.truth == 1)) ** 2)


@metric("log loss", kinds=["binary", "nominal"], higher_is_better=False, in_report=False, recalibrated=True)
def log_loss(predictions: WeightedPredictions) -> np.ndarray:
    """Return the mean negative logarithm of the true label's probability.

    Args:
        predictions: The predictions.
    """
    p = predictions.probabilities
    if predictions.kind == "binary":
        of_truth = np.where(predictions.truth == 1, p[:, 1], 1 - p[:, 1])
    else:
        of_truth = np.take_along_axis(p, predictions.truth[:, None], axis=1)[:, 0]
    return predictions.mean(-np.log(np.clip(of_truth, np.finfo(np.float64).eps, 1)))


@metric("calibration slope", kinds=["binary"], higher_is_better=None, in_report=False, recalibrated=True)
def calibration_slope(predictions: WeightedPredictions) -> np.ndarray:
    """Return the slope of a logistic regression of the outcome on the probabilities' log-odds; 1 is best.

    NaN if one outcome is missing. NaN also if the probabilities separate the outcomes, as the slope would be infinite.
    Source: Cox, Biometrika 1958;45:562-565.

    Args:
        predictions: The predictions.
    """
    truth, x, weights = predictions.truth == 1, log_odds(predictions.probabilities[:, 1]), predictions.weights
    counted = weights > 0
    highest = [np.where(counted & (truth == k), x, -np.inf).max(axis=1, initial=-np.inf) for k in (0, 1)]
    lowest = [np.where(counted & (truth == k), x, np.inf).min(axis=1, initial=np.inf) for k in (0, 1)]
    overlap = (highest[0] > lowest[1]) & (highest[1] > lowest[0])
    slope = np.full(len(weights), np.nan)
    if overlap.any():
        slope[overlap] = _logistic_fits(x, truth, weights[overlap])[:, 1]
    return slope


@metric("calibration intercept", kinds=["binary"], higher_is_better=None, in_report=False, recalibrated=True)
def calibration_intercept(predictions: WeightedPredictions) -> np.ndarray:
    """Return the intercept of a logistic regression on the log-odds with a slope of 1; 0 is best.

    The intercept is also called calibration in the large. NaN if one outcome is missing.

    Args:
        predictions: The predictions.
    """
    truth, x, weights = predictions.truth == 1, log_odds(predictions.probabilities[:, 1]), predictions.weights
    low, high = np.full(len(weights), -40.0), np.full(len(weights), 40.0)  # beyond any intercept of clipped log-odds
    positive = weights @ truth
    for _ in range(40):
        middle = (low + high) / 2
        too_low = (weights * _expit(x + middle[:, None])).sum(axis=1) < positive
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    both = (positive > 0) & (positive < weights.sum(axis=1))
    return np.where(both, (low + high) / 2, np.nan)


def _logistic_fits(x: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return intercepts and slopes `(D, 2)` of logistic regressions by Newton's method with clipped steps.

    Both are NaN without convergence.
    """
    scale = float(x.std())
    z = (x - x.mean()) / scale
    fit, active = np.zeros((len(weights), 2)), np.arange(len(weights))
    for _ in range(50):
        p = _expit(fit[active, :1] + fit[active, 1:] * z)
        residual, curvature = weights[active] * (truth - p), weights[active] * p * (1 - p)
        a, b, c = curvature.sum(axis=1), curvature @ z, curvature @ z**2
        first, second = residual.sum(axis=1), residual @ z
        step = np.stack([c * first - b * second, a * second - b * first], axis=1)
        step = np.clip(step / np.maximum(a * c - b * b, 1e-300)[:, None], -2, 2)
        fit[active] += step
        active = active[np.abs(step).max(axis=1) > 1e-9]
        if not len(active):
            break
    fit[active] = np.nan
    slopes = fit[:, 1] / scale
    return np.stack([fit[:, 0] - slopes * x.mean(), slopes], axis=1)


def calibration_estimates(truth: ArrayLike, p: ArrayLike) -> dict[str, tuple[float, float]]:
    """Return the calibration slope and intercept with their standard errors.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.

    Returns:
        `slope`, and `intercept` with a slope of 1, each with its standard error. NaN as in `calibration_slope` and
        `calibration_intercept`.

    Examples:
        >>> slope, error = calibration_estimates([0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8])["slope"]
        >>> round(slope, 3), error > 0
        (0.675, True)
    """
    y, x = np.asarray(truth) == 1, log_odds(p)
    predictions = WeightedPredictions(
        "binary", y.astype(np.int64), np.stack([1 - np.asarray(p), np.asarray(p)], axis=1), np.full(len(y), 0.5),
        np.ones((1, len(y))),
    )  # fmt: skip
    slope, intercept = float(calibration_slope(predictions)[0]), float(calibration_intercept(predictions)[0])
    q = _expit(x + intercept)
    found = {"slope": (slope, np.nan), "intercept": (intercept, float((q * (1 - q)).sum() ** -0.5))}
    if np.isfinite(slope):
        alpha = float(_logistic_fits(x, y, np.ones((1, len(y))))[0, 0])
        q = _expit(slope * x + alpha)
        design = np.stack([np.ones(len(x)), x], axis=1)
        found["slope"] = slope, float(np.sqrt(np.linalg.inv(design.T @ (design * (q * (1 - q))[:, None]))[1, 1]))
    return found


def log_odds(p: ArrayLike) -> np.ndarray:
    """Return log(p / (1 - p)) of probabilities clipped to 1e-6 from 0 and 1.

    Args:
        p: Probabilities of any shape.

    Examples:
        >>> float(log_odds(0.5))
        0.0
    """
    clipped = np.clip(np.asarray(p, np.float64), _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    odds: np.ndarray = np.log(clipped) - np.log1p(-clipped)
    return odds


def _expit(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    p: np.ndarray = expit(x)
    return p


def fit_recalibration(truth: ArrayLike, p: ArrayLike, *, intercept_only: bool = False) -> tuple[float, float]:
    """Fit a logistic recalibration on validation patients: log-odds become slope * log-odds + intercept.

    A weak prior keeps the fit near no change if patients are few. The prior also keeps the slope positive, so that the
    ranks of patients stay. The slope's logarithm is normal with mean 0 and standard deviation 1, the intercept normal
    with mean 0 and standard deviation 2. Source: Cox, Biometrika 1958;45:562-565; the prior is this project's.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        intercept_only: Whether the slope stays 1.

    Returns:
        Slope and intercept, for `recalibrate`. Without patients 1 and 0.

    Examples:
        >>> fit_recalibration([], [])
        (1.0, 0.0)
    """
    from scipy.optimize import minimize

    x, sign = log_odds(p), np.where(np.asarray(truth) == 1, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_slope, intercept = parameters
        slope = np.exp(log_slope)
        margin = sign * (slope * x + intercept)
        gradient = -sign * _expit(-margin)
        value = np.logaddexp(0, -margin).sum() + log_slope**2 / 2 + intercept**2 / 8
        return float(value), np.array([(gradient * slope * x).sum() + log_slope, gradient.sum() + intercept / 4])

    slopes = (0, 0) if intercept_only else (-4, 4)
    fit = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[slopes, (-40, 40)], tol=1e-12).x
    return float(np.exp(fit[0])), float(fit[1])


def fit_recalibrations(
    truth: ArrayLike, p: ArrayLike, *, intercept_only: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Fit `fit_recalibration` to D groups of patients at once, by Fisher scoring with clipped steps.

    Args:
        truth: Outcomes `(D, N)`, 0 or 1.
        p: Probabilities of outcome 1 `(D, N)`.
        intercept_only: Whether the slope stays 1.

    Returns:
        Slopes `(D,)` and intercepts `(D,)`.

    Examples:
        >>> slopes, intercepts = fit_recalibrations([[0, 1, 1]], [[0.2, 0.6, 0.7]], intercept_only=True)
        >>> slopes, bool(intercepts[0] > 0)
        (array([1.]), True)
    """
    y, x = np.asarray(truth, np.float64), log_odds(p)
    fit = np.zeros((len(y), 2))  # logarithm of the slope, and intercept
    for _ in range(100):
        scaled = np.exp(fit[:, :1]) * x  # the derivative of the log-odds by the slope's logarithm
        q = _expit(scaled + fit[:, 1:])
        weights = q * (1 - q)
        a, b, c = (weights * scaled**2).sum(axis=1) + 1, (weights * scaled).sum(axis=1), weights.sum(axis=1) + 0.25
        first = ((y - q) * scaled).sum(axis=1) - fit[:, 0]
        second = (y - q).sum(axis=1) - fit[:, 1] / 4
        if intercept_only:
            step = np.stack([np.zeros(len(y)), second / c], axis=1)
        else:
            step = np.stack([c * first - b * second, a * second - b * first], axis=1) / (a * c - b * b)[:, None]
        fit += np.clip(step, -1, 1)
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return np.exp(fit[:, 0]), fit[:, 1]


def recalibrate(p: ArrayLike, slope: ArrayLike, intercept: ArrayLike) -> np.ndarray:
    """Apply a logistic recalibration to probabilities.

    Args:
        p: Probabilities `(N,)`.
        slope: Slope of the log-odds.
        intercept: Intercept of the log-odds.

    Examples:
        >>> recalibrate([0.5], slope=1.0, intercept=0.0)
        array([0.5])
    """
    return _expit(np.asarray(slope) * log_odds(p) + np.asarray(intercept))


def calibration_curve(
    truth: ArrayLike, p: ArrayLike, *, bins: int = 10, quantile: bool = True, coverage: float = 0.95
) -> dict[str, np.ndarray]:
    """Compute the observed share of outcome 1 in bins of predicted probability.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        bins: Largest number of bins; empty bins are dropped.
        quantile: Whether bins hold equally many patients; otherwise bins have equal widths.
        coverage: Coverage of Wilson's interval.

    Returns:
        For each bin the mean `predicted` probability, the `observed` share, the `count` of patients, `low` and `high`.

    Examples:
        >>> curve = calibration_curve([0, 1, 1, 1], [0.2, 0.2, 0.8, 0.8], bins=2)
        >>> curve["predicted"], curve["observed"]
        (array([0.2, 0.8]), array([0.5, 1. ]))
    """
    y, values = np.asarray(truth, np.float64), np.asarray(p, np.float64)
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    if quantile and len(values):
        edges = np.unique(np.quantile(values, edges))
    members = np.arange(bins)[:, None] == np.searchsorted(edges, values)  # (bins, N)
    members = members[members.any(axis=1)]
    count, positive = members.sum(axis=1), members @ y
    low, high = wilson_interval(positive, count, coverage=coverage)
    return {
        "predicted": members @ values / count,
        "observed": positive / count,
        "count": count,
        "low": low,
        "high": high,
    }


def probability_histogram(truth: ArrayLike, p: ArrayLike, *, bins: int = 20) -> dict[str, np.ndarray]:
    """Count patients by outcome in bins of predicted probability.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        bins: Number of bins.

    Returns:
        `edges` `(bins + 1,)` from 0 to 1, and `counts` `(2, bins)` by outcome.

    Examples:
        >>> probability_histogram([0, 1], [0.1, 0.9], bins=2)["counts"]
        array([[1, 0],
               [0, 1]])
    """
    edges = np.linspace(0, 1, bins + 1)
    y, values = np.asarray(truth), np.asarray(p, np.float64)
    return {"edges": edges, "counts": np.stack([np.histogram(values[y == k], edges)[0] for k in (0, 1)])}
