"""Local recalibration: fit a model's probabilities to a new hospital, and find how many patients that needs.

No figure here is computed on the patients to whom the recalibration was fitted. `cross_fitted` recalibrates each
patient with other patients. `learning_curve` fits to few patients and tests on all others.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ichprog.metrics.calibration import fit_recalibration, fit_recalibrations, recalibrate
from ichprog.metrics.operating_points import stratified_parts

Method = Literal["intercept", "intercept_and_slope"]
METHODS: tuple[Method, ...] = ("intercept", "intercept_and_slope")
SIZES = (20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2000)
RELIABLE_SHARE = 0.9  # a size is enough if recalibration helps in at least this share of draws
_SMALLEST = np.finfo(np.float64).eps


def cross_fitted(
    truth: ArrayLike, p: ArrayLike, method: Method, *, folds: int = 10, seed: int = 0
) -> np.ndarray | None:
    """Recalibrate each patient's probability with a fit to other patients.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        method: Whether the intercept alone is fitted, or the slope as well.
        folds: Number of parts; each part is recalibrated by a fit to the others.
        seed: Random seed of the parts.

    Returns:
        Recalibrated probabilities `(N,)`; None with fewer than two patients of an outcome.

    Examples:
        >>> truth, p = [0, 0, 0, 1, 0, 0, 0, 1], [0.6, 0.7, 0.6, 0.8, 0.5, 0.6, 0.7, 0.9]
        >>> bool(cross_fitted(truth, p, "intercept").mean() < np.mean(p))
        True
    """
    y, values = np.asarray(truth) == 1, np.asarray(p, np.float64)
    part = stratified_parts(y, folds, seed=seed)
    if part is None:
        return None
    recalibrated = np.empty(len(y))
    for k in range(part.max() + 1):
        own = part == k
        slope, intercept = fit_recalibration(y[~own], values[~own], intercept_only=method == "intercept")
        recalibrated[own] = recalibrate(values[own], slope, intercept)
    return recalibrated


def learning_curve(
    truth: ArrayLike, p: ArrayLike, method: Method, *, n_draws: int = 100, seed: int = 0
) -> list[dict[str, Any]]:
    """Recalibrate with few patients and test on all others, for growing numbers of patients.

    Each size is drawn many times at random. The draws overlap, so that the share of draws describes these patients and
    is no p value.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        method: Whether the intercept alone is fitted, or the slope as well.
        n_draws: Number of draws of each size.
        seed: Random seed.

    Returns:
        For each size up to half of the patients: `patients`; `gain`, the mean decrease of the log loss of the other
        patients; and `share_improved`, the share of draws in which the log loss decreased.
    """
    y, values = np.asarray(truth) == 1, np.asarray(p, np.float64)
    random = np.random.default_rng(seed)
    before = _log_losses(y, values)
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        if 2 * size > len(y):
            break
        order = np.stack([random.permutation(len(y)) for _ in range(n_draws)])
        few, others = order[:, :size], order[:, size:]
        slopes, intercepts = fit_recalibrations(y[few], values[few], intercept_only=method == "intercept")
        after = recalibrate(values[others], slopes[:, None], intercepts[:, None])
        gains = (before[others] - _log_losses(y[others], after)).mean(axis=1)
        rows.append({"patients": size, "gain": float(gains.mean()), "share_improved": float((gains > 0).mean())})
    return rows


def patients_needed(curve: list[dict[str, Any]]) -> int | None:
    """Return how many patients local recalibration needs.

    Args:
        curve: Result of `learning_curve`.

    Returns:
        The smallest size from which on recalibration improves the log loss of other patients in at least 90 % of the
        draws. None if no size of the curve does.

    Examples:
        >>> patients_needed([{"patients": 20, "share_improved": 0.7}, {"patients": 50, "share_improved": 0.95}])
        50
    """
    needed = None
    for row in reversed(curve):
        if row["share_improved"] < RELIABLE_SHARE:
            break
        needed = int(row["patients"])
    return needed


def _log_losses(truth: np.ndarray, p: np.ndarray) -> np.ndarray:
    of_truth = np.where(truth, p, 1 - p)
    losses: np.ndarray = -np.log(np.clip(of_truth, _SMALLEST, 1))
    return losses
