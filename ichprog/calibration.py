"""Apply what a model knows about its own reliability: recalibration, conformal sets, and whether a scan is unusual.

The numbers come from patients on whom the networks were not trained; `ichprog.evaluation.calibrate` computes them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ichprog.results import InputDistance
from ichprog.spec import Adjustment, InputDistribution, Task, TaskCalibration

COVERAGE = 0.9
"""Default coverage of conformal sets."""

_MIN_PROBABILITY = 1e-6


def adjust(
    task: Task,
    probabilities: np.ndarray,
    adjustments: Sequence[Adjustment],
    values: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Change the probabilities of a task by linear changes of log-odds.

    For ordered labels, the log-odds of each label or a later one change; their probabilities stay in order by a running
    minimum. For unordered labels, the log-odds of each label change, and the probabilities are divided by their sum.

    Args:
        task: The task, with K labels.
        probabilities: `(N, K)`.
        adjustments: K - 1 changes, K for unordered labels.
        values: Clinical values `(N,)` by column, in units of the spec.

    Returns:
        Probabilities `(N, K)` that sum to one.

    Examples:
        >>> from ichprog import zoo
        >>> task = zoo.find("perez2023.prognosis").tasks[0]
        >>> adjust(task, np.array([[0.5, 0.5]]), [Adjustment(1.0, np.log(3))]).round(2)
        array([[0.25, 0.75]])
    """
    p = np.asarray(probabilities, np.float64)
    events = event_probabilities(task, p)
    changed = np.column_stack(
        [_expit(_change(each, log_odds(events[:, k]), values or {})) for k, each in enumerate(adjustments)]
    )
    if task.kind == "nominal":
        nominal: np.ndarray = changed / changed.sum(axis=1, keepdims=True)
        return nominal
    changed = np.minimum.accumulate(changed, axis=1)
    ends = np.ones(len(p)), np.zeros(len(p))
    ordered: np.ndarray = -np.diff(np.column_stack([ends[0], changed, ends[1]]), axis=1)
    return ordered


def event_probabilities(task: Task, probabilities: np.ndarray) -> np.ndarray:
    """Return the probability of each label but the first or a later one, `(N, K - 1)`; of each label if unordered.

    Args:
        task: The task, with K labels.
        probabilities: `(N, K)`.
    """
    if task.kind == "nominal":
        return probabilities
    later: np.ndarray = probabilities[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    return later


def conformal_set(
    task: Task, calibration: TaskCalibration, probabilities: np.ndarray, coverage: float
) -> tuple[str, ...]:
    """Return the labels that a conformal set of one patient holds, the most probable label among them.

    Args:
        task: The task.
        calibration: Its calibration.
        probabilities: Calibrated probabilities `(K,)`.
        coverage: Probability with which the set holds the true label, rounded up to a whole percent of 50 or more.

    Examples:
        >>> from ichprog import zoo
        >>> task = zoo.find("perez2023.prognosis").tasks[0]
        >>> calibration = TaskCalibration(100, (Adjustment(1.0, 0.0),), {"90": 0.3})
        >>> conformal_set(task, calibration, np.array([0.8, 0.2]), 0.9)
        ('good',)
    """
    percent = max(50, int(np.ceil(round(coverage * 100, 6))))  # a calibration holds no limits below 50
    limit = calibration.set_limits.get(str(percent), -np.inf)
    chosen = probabilities >= min(limit, probabilities.max())
    return tuple(label for label, is_in in zip(task.labels, chosen, strict=True) if is_in)


def input_statistics(grid: np.ndarray) -> dict[str, float]:
    """Describe a grid by statistics that tell how it was acquired: extent, intensities, noise and sharpness.

    Args:
        grid: `(D, H, W)` from `preprocessing.prepare`.

    Returns:
        Each statistic by name. Intensities are in units of the grid, from 0 to 1.

    Examples:
        >>> input_statistics(np.ones((4, 8, 8), np.float32))["filled"]
        1.0
    """
    x = np.asarray(grid, np.float32)
    inside = x > 0
    values, profile = x[inside], inside.mean((1, 2))
    filled = float(profile.mean())
    lower, middle, _ = (float(part.mean()) / max(filled, 1e-6) for part in np.array_split(profile, 3))
    quantiles = np.quantile(values, _QUANTILES) if len(values) else np.zeros(len(_QUANTILES))
    row = x[:, :, :-2] - 2 * x[:, :, 1:-1] + x[:, :, 2:]
    in_row = inside[:, :, :-2] & inside[:, :, 1:-1] & inside[:, :, 2:]
    return {
        "filled": filled,
        "filled_slices": float((profile > 0).mean()),
        "filled_lower_third": lower,
        "filled_middle_third": middle,
        **{f"quantile_{q:g}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
        "noise": _mean(np.abs(row), in_row),
        "difference_of_slices": _difference(x, inside, 0),
        "difference_of_rows": _difference(x, inside, 1),
        "difference_of_columns": _difference(x, inside, 2),
        "difference_of_sides": _mean(np.abs(x - x[:, :, ::-1]), inside & inside[:, :, ::-1]),
    }


def measure_distance(distribution: InputDistribution, statistics: Mapping[str, float]) -> InputDistance:
    """Return how far a scan is from the patients of a distribution, and what is most unusual about it.

    Args:
        distribution: The distribution.
        statistics: Result of `input_statistics`.
    """
    mean, scale = (np.array(list(each.values())) for each in (distribution.mean, distribution.scale))
    z = (np.array([statistics[name] for name in distribution.mean]) - mean) / scale
    distance = float(np.sqrt(max(0.0, z @ np.array(distribution.precision) @ z)))
    most = int(np.abs(z).argmax())
    name, low, high = list(distribution.mean)[most], mean[most] - 3 * scale[most], mean[most] + 3 * scale[most]
    return InputDistance(distance, distribution.threshold, name, float(statistics[name]), (float(low), float(high)))


def log_odds(p: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of probabilities, clipped to 1e-6 from 0 and 1."""
    clipped = np.clip(np.asarray(p, np.float64), _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    odds: np.ndarray = np.log(clipped) - np.log1p(-clipped)
    return odds


_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)


def _change(adjustment: Adjustment, odds: np.ndarray, values: Mapping[str, np.ndarray]) -> np.ndarray:
    changed: np.ndarray = adjustment.slope * odds + adjustment.intercept
    for column, coefficient in adjustment.coefficients.items():
        changed = changed + coefficient * values[column]
    return changed


def _expit(x: np.ndarray) -> np.ndarray:
    p: np.ndarray = 1 / (1 + np.exp(-x))
    return p


def _difference(x: np.ndarray, inside: np.ndarray, axis: int) -> float:
    """Return the mean absolute difference of neighbouring cells along an axis, where both are inside."""
    first, second = (np.moveaxis(each, axis, 0) for each in (x, inside))
    return _mean(np.abs(np.diff(first, axis=0)), second[1:] & second[:-1])


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values.mean(where=where)) if where.any() else 0.0
