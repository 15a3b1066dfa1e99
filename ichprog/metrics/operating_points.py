"""Operating points: the threshold for a stated sensitivity or specificity, and the rates at this threshold.

A threshold that is chosen on patients looks too good on the same patients. Each operating point therefore has
cross-fitted rates as well: a patient is decided by a threshold that was chosen on other patients.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ichprog.errors import InvalidValueError
from ichprog.metrics.bootstrap import finite, wilson_interval

Rate = Literal["sensitivity", "specificity"]
RATES = ("sensitivity", "specificity", "ppv", "npv")
_TOLERANCE = 1e-9  # of a required number of patients, against rounding of its product


def validate_rates(name: str, rates: Sequence[float]) -> tuple[float, ...]:
    """Return required rates after a check that each is above 0 and at most 1.

    Args:
        name: Name of the argument, for the message.
        rates: Required rates.

    Raises:
        InvalidValueError: A rate is not above 0 and at most 1.

    Examples:
        >>> validate_rates("at_sensitivity", [0.9, 0.95])
        (0.9, 0.95)
    """
    for rate in rates:
        if not 0 < rate <= 1:
            raise InvalidValueError(name, rate, "a number above 0 and at most 1, such as 0.95")
    return tuple(float(rate) for rate in rates)


def threshold_at(truth: ArrayLike, p: ArrayLike, rate: Rate, required: float) -> float:
    """Return the threshold that reaches a required sensitivity or specificity at the least cost to the other.

    A patient is called positive if the probability exceeds the threshold.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        rate: The required rate.
        required: Its smallest allowed value, above 0 and at most 1.

    Returns:
        A number midway between two neighbouring probabilities. NaN without patients of the outcome.

    Raises:
        InvalidValueError: The required value is not above 0 and at most 1.

    Examples:
        >>> round(threshold_at([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8], "sensitivity", 1.0), 3)
        0.25
        >>> round(threshold_at([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8], "specificity", 1.0), 3)
        0.7
    """
    validate_rates(f"required {rate}", [required])
    y, values = np.asarray(truth) == 1, np.asarray(p, np.float64)
    own = np.sort(values[y if rate == "sensitivity" else ~y])
    if not len(own):
        return math.nan
    needed = max(math.ceil(required * len(own) - _TOLERANCE), 1)
    levels = np.unique(values)
    if rate == "sensitivity":
        lowest_positive = own[len(own) - needed]
        below = levels[levels < lowest_positive]
        low, high = (float(below[-1]) if len(below) else 0.0), float(lowest_positive)
        if low >= high:
            return math.nextafter(high, -math.inf)
    else:
        highest_negative = own[needed - 1]
        above = levels[levels > highest_negative]
        low, high = float(highest_negative), (float(above[0]) if len(above) else 1.0)
    middle = (low + high) / 2
    return middle if middle < high else low


def rates_at(truth: ArrayLike, positive: ArrayLike, *, coverage: float = 0.95) -> dict[str, Any]:
    """Return the rates of calls, with Wilson's intervals.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        positive: Whether each patient is called positive `(N,)`.
        coverage: Coverage of the intervals.

    Returns:
        `called_positive`, the number of positive calls; and `sensitivity`, `specificity`, `ppv` and `npv`, each with
        `value`, `low` and `high`, None if undefined.

    Examples:
        >>> rates_at([0, 0, 1, 1], [False, True, True, True])["specificity"]["value"]
        0.5
    """
    y, called = np.asarray(truth) == 1, np.asarray(positive, bool)
    shares = {"sensitivity": (called, y), "specificity": (~called, ~y), "ppv": (y, called), "npv": (~y, ~called)}
    row: dict[str, Any] = {"called_positive": int(called.sum())}
    for name, (hit, members) in shares.items():
        hits, n = int((hit & members).sum()), int(members.sum())
        low, high = wilson_interval(hits, n, coverage=coverage)
        value = hits / n if n else math.nan
        row[name] = {"value": finite(value), "low": finite(float(low)), "high": finite(float(high))}
    return row


def operating_point(
    truth: ArrayLike, p: ArrayLike, rate: Rate, required: float, *, folds: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Choose the threshold for a required rate, and return all rates on the same and on other patients.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        rate: The required rate.
        required: Its smallest allowed value.
        folds: Number of parts for cross-fitting, at most the number of patients with the rarer outcome.
        seed: Random seed of the parts.

    Returns:
        - `rate`, `required` and the `threshold` chosen on all patients.
        - `same_patients`: `rates_at` this threshold on the patients on whom it was chosen.
        - `cross_fitted`: `rates_at` thresholds that were chosen on other patients, with the lowest and highest of these
          thresholds as `threshold_low` and `threshold_high`. None with fewer than two patients of an outcome.

    Raises:
        InvalidValueError: The required value is not above 0 and at most 1.

    Examples:
        >>> point = operating_point([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8], "sensitivity", 1.0)
        >>> point["same_patients"]["sensitivity"]["value"], point["same_patients"]["specificity"]["value"]
        (1.0, 0.5)
    """
    y, values = np.asarray(truth) == 1, np.asarray(p, np.float64)
    threshold = threshold_at(y, values, rate, required)
    row: dict[str, Any] = {"rate": rate, "required": required, "threshold": finite(threshold)}
    row["same_patients"] = rates_at(y, values > threshold)
    row["cross_fitted"] = None
    part = stratified_parts(y, folds, seed=seed)
    if part is not None:
        chosen = [threshold_at(y[part != k], values[part != k], rate, required) for k in range(part.max() + 1)]
        row["cross_fitted"] = rates_at(y, values > np.array(chosen)[part])
        row["cross_fitted"] |= {"threshold_low": min(chosen), "threshold_high": max(chosen)}
    return row


def stratified_parts(truth: ArrayLike, parts: int, *, seed: int = 0) -> np.ndarray | None:
    """Divide patients at random into parts with nearly equal shares of the outcome.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        parts: Number of parts, at most the number of patients with the rarer outcome.
        seed: Random seed.

    Returns:
        The part of each patient `(N,)`, from 0; None with fewer than two patients of an outcome.

    Examples:
        >>> parts = stratified_parts([0, 0, 0, 1, 1, 1], 3)
        >>> np.bincount(parts)
        array([2, 2, 2])
    """
    y = np.asarray(truth) == 1
    count = min(parts, int(y.sum()), int((~y).sum()))
    if count < 2:
        return None
    random = np.random.default_rng(seed)
    part = np.empty(len(y), np.int64)
    for members in (np.flatnonzero(y), np.flatnonzero(~y)):
        part[random.permutation(members)] = np.arange(len(members)) % count
    return part
