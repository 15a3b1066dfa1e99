"""The ICH and FUNC scores of intracerebral haemorrhage, and the published outcome at each score.

Both scores were developed on patients with a spontaneous haemorrhage in the brain; for other patients their outcomes
are not established. The functions need only numpy and take one patient or many:

    >>> from ichprog import clinical_scores
    >>> score = clinical_scores.ich_score(gcs=7, age=71, volume_ml=42.0, intraventricular=True, infratentorial=False)
    >>> score, clinical_scores.ICH_MORTALITY[score]
    (3, 0.72)

Sources. ICH score: Hemphill et al., Stroke 2001;32:891-897 (doi 10.1161/01.STR.32.4.891), 152 patients. FUNC score:
Rost et al., Stroke 2008;39:2304-2309 (doi 10.1161/STROKEAHA.107.512202), 629 patients.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ichprog.errors import InvalidValueError, UnknownNameError

ICH_MORTALITY = (0.0, 0.13, 0.26, 0.72, 0.97, 1.0, 1.0)
"""Share of patients who died within 30 days at ICH score 0 to 6 (Hemphill et al. 2001). No patient had a score of 6,
which has the share of score 5."""

FUNC_INDEPENDENCE = (*[0.0] * 5, *[0.13] * 3, 0.42, *[0.66] * 2, 0.82)
"""Share of all patients with a Glasgow Outcome Score of 4 or 5 at 90 days at FUNC score 0 to 11 (Rost et al. 2008)."""

FUNC_INDEPENDENCE_OF_SURVIVORS = (*[0.0] * 5, *[0.29] * 3, 0.48, *[0.75] * 2, 0.95)
"""The same share of patients alive at 90 days. Both are published for scores of 0-4, 5-7, 8, 9-10 and 11."""

FUNC_LOCATIONS = {"lobar": 2, "deep": 1, "infratentorial": 0}
"""Points of the FUNC score by location of the haemorrhage."""

_UNKNOWN = "Use None for an unknown value."


def ich_score(
    *,
    gcs: ArrayLike,
    age: ArrayLike,
    volume_ml: ArrayLike,
    intraventricular: ArrayLike,
    infratentorial: ArrayLike,
) -> Any:
    """Compute the ICH score, 0 to 6, higher is worse (Hemphill et al. 2001).

    A GCS of 3-4 gives 2 points and of 5-12 1 point. An age of 80 years or more, a volume of 30 mL or more, blood in the
    ventricles and an infratentorial origin give 1 point each.

    Args:
        gcs: Glasgow Coma Scale at admission, whole numbers from 3 to 15.
        age: Age in years.
        volume_ml: Volume of the haemorrhage in mL.
        intraventricular: Whether there is blood in the ventricles: true or false, 1 or 0.
        infratentorial: Whether the haemorrhage began below the tentorium: true or false, 1 or 0.

    Returns:
        An int for one patient, an integer array for many. Arguments are broadcast. The score is NaN if an argument is
        NaN or None; an array is then of floats.

    Raises:
        InvalidValueError: A value is impossible.

    Example:
        >>> ich_score(gcs=15, age=50, volume_ml=5.0, intraventricular=False, infratentorial=False)
        0
    """
    coma, years, volume = _gcs(gcs), _amount("age", age, 130, "years"), _amount("volume_ml", volume_ml, 2000, "mL")
    ventricles, below = _flag("intraventricular", intraventricular), _flag("infratentorial", infratentorial)
    points = np.where(coma <= 4, 2, np.where(coma <= 12, 1, 0)) + (years >= 80) + (volume >= 30) + (ventricles == 1)
    return _score(points + (below == 1), coma, years, volume, ventricles, below)


def func_score(
    *,
    volume_ml: ArrayLike,
    age: ArrayLike,
    location: ArrayLike,
    gcs: ArrayLike,
    impaired_before: ArrayLike,
) -> Any:
    """Compute the FUNC score, 0 to 11, higher is better (Rost et al. 2008).

    A volume under 30 mL gives 4 points and of 30-60 mL 2. An age under 70 years gives 2 points and of 70-79 1. A lobar
    haemorrhage gives 2 points and a deep one 1. A GCS of 9 or more gives 2 points. No cognitive impairment before the
    haemorrhage gives 1 point.

    Args:
        volume_ml: Volume of the haemorrhage in mL.
        age: Age in years.
        location: "lobar", "deep" or "infratentorial"; None or "" if unknown.
        gcs: Glasgow Coma Scale at admission, whole numbers from 3 to 15.
        impaired_before: Whether cognition was impaired before the haemorrhage: true or false, 1 or 0.

    Returns:
        As in `ich_score`.

    Raises:
        InvalidValueError: A value is impossible.
        UnknownNameError: No location has this name.

    Example:
        >>> func_score(volume_ml=5.0, age=50, location="lobar", gcs=15, impaired_before=False)
        11
    """
    coma, years, volume = _gcs(gcs), _amount("age", age, 130, "years"), _amount("volume_ml", volume_ml, 2000, "mL")
    site, impaired = _location(location), _flag("impaired_before", impaired_before)
    by_volume = np.where(volume < 30, 4, np.where(volume <= 60, 2, 0))
    by_age = np.where(years < 70, 2, np.where(years < 80, 1, 0))
    points = by_volume + by_age + np.where(coma >= 9, 2, 0) + (impaired == 0)
    return _score(points + np.nan_to_num(site).astype(np.int64), coma, years, volume, site, impaired)


def score_range(score: Callable[..., Any], **values: Any) -> tuple[int, int]:
    """Return the lowest and the highest score of one patient if variables are unknown or uncertain.

    Args:
        score: `ich_score` or `func_score`.
        **values: The arguments of the score: a value, None if unknown, or (lowest, highest) for an age or a volume that
            is known as an interval.

    Raises:
        InvalidValueError: A value is impossible.
        UnknownNameError: No location has this name.

    Example:
        >>> score_range(ich_score, gcs=9, age=71, volume_ml=(25, 40), intraventricular=None, infratentorial=False)
        (1, 3)
    """
    choices = [[(name, choice) for choice in _possible(name, value)] for name, value in values.items()]
    scores = [score(**dict(chosen)) for chosen in product(*choices)]
    return min(scores), max(scores)


def _possible(name: str, value: Any) -> Sequence[Any]:
    """Return values of a variable that reach every number of points that is possible."""
    steps = {"age": (0.0, 70.0, 80.0), "volume_ml": (0.0, 30.0, 60.0, 61.0), "gcs": range(3, 16)}
    if isinstance(value, tuple):
        low, high = value
        return [low, high, *(step for step in steps.get(name, ()) if low < step < high)]
    if value is None or value == "" or value != value:  # NaN differs from itself
        return list(FUNC_LOCATIONS) if name == "location" else steps.get(name, (0, 1))
    return [value]


def _score(points: np.ndarray, *inputs: np.ndarray) -> Any:
    """Return the points, NaN if an input is NaN."""
    is_unknown = np.isnan(sum(inputs))
    score = np.where(is_unknown, np.nan, points) if is_unknown.any() else points
    return score if score.ndim else score.item()


def _gcs(values: ArrayLike) -> np.ndarray:
    return _numbers("gcs", values, lambda value: np.isin(value, np.arange(3, 16)), "whole numbers from 3 to 15")


def _amount(name: str, values: ArrayLike, most: float, unit: str) -> np.ndarray:
    return _numbers(name, values, lambda value: (value >= 0) & (value <= most), f"numbers from 0 to {most:g} {unit}")


def _flag(name: str, values: ArrayLike) -> np.ndarray:
    return _numbers(name, values, lambda value: (value == 0) | (value == 1), "true or false, or 1 or 0")


def _location(values: ArrayLike) -> np.ndarray:
    names = np.asarray(values, dtype=object)
    blank_or_known = {*FUNC_LOCATIONS, "", None}
    for name in names.ravel():
        if name not in blank_or_known and name == name:  # NaN differs from itself
            raise UnknownNameError("location", name, FUNC_LOCATIONS, _UNKNOWN)
    points = [FUNC_LOCATIONS.get(name, np.nan) for name in names.ravel()]
    return np.array(points, dtype=np.float64).reshape(names.shape)


def _numbers(name: str, values: ArrayLike, is_allowed: Callable[[np.ndarray], np.ndarray], expected: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidValueError(name, values, expected, _UNKNOWN) from None
    wrong = numbers[~(is_allowed(numbers) | np.isnan(numbers))]
    if wrong.size:
        raise InvalidValueError(name, float(wrong.flat[0]), expected, _UNKNOWN)
    return numbers
