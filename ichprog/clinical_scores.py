"""The two classic scores of intracerebral haemorrhage, as published, and the outcome that was seen at each.

Both were made from patients with a haemorrhage inside the brain that no injury caused; elsewhere their figures are not
known to hold. They need numpy alone and take one patient or many:

    >>> from ichprog import clinical_scores
    >>> score = clinical_scores.ich_score(gcs=7, age=71, volume_ml=42.0, intraventricular=True, infratentorial=False)
    >>> score, clinical_scores.ICH_MORTALITY[score]
    (3, 0.72)

Sources. ICH score: Hemphill et al., Stroke 2001;32:891-897 (doi 10.1161/01.STR.32.4.891), 152 patients. FUNC score:
Rost et al., Stroke 2008;39:2304-2309 (doi 10.1161/STROKEAHA.107.512202), 629 patients.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

ICH_MORTALITY = (0.0, 0.13, 0.26, 0.72, 0.97, 1.0, 1.0)
"""Share dead within 30 days at ICH score 0 to 6 (Hemphill et al. 2001); nobody had a 6, which is taken for a 5."""

FUNC_INDEPENDENCE = (*[0.0] * 5, *[0.13] * 3, 0.42, *[0.66] * 2, 0.82)
"""Share with a Glasgow Outcome Score of 4 or 5 at 90 days at FUNC score 0 to 11, of all patients (Rost et al. 2008)."""

FUNC_INDEPENDENCE_OF_SURVIVORS = (*[0.0] * 5, *[0.29] * 3, 0.48, *[0.75] * 2, 0.95)
"""The same of those who were alive at 90 days. Both are published for scores of 0-4, 5-7, 8, 9-10 and 11."""

FUNC_LOCATIONS = {"lobar": 2, "deep": 1, "infratentorial": 0}
"""Where a haemorrhage is, and the points of the FUNC score for it."""


def ich_score(
    *,
    gcs: ArrayLike,
    age: ArrayLike,
    volume_ml: ArrayLike,
    intraventricular: ArrayLike,
    infratentorial: ArrayLike,
) -> Any:
    """The ICH score, 0 to 6, higher for worse (Hemphill et al. 2001).

    A GCS of 3-4 gives 2 points and of 5-12 1; an age of 80 years or more, a volume of 30 mL or more, blood in the
    ventricles and an infratentorial origin give 1 each.

    Args:
        gcs: Glasgow Coma Scale at admission, whole numbers from 3 to 15.
        age: Years.
        volume_ml: Volume of the haemorrhage, in mL.
        intraventricular: Whether there is blood in the ventricles: true or false, 1 or 0.
        infratentorial: Whether the haemorrhage began below the tentorium: true or false, 1 or 0.

    Returns:
        An int for one patient, an integer array for many (the arguments are broadcast). Where anything is NaN or None
        the score is NaN, and an array is then of floats.

    Raises:
        ValueError: A value is impossible.
    """
    coma, years, volume = _coma(gcs), _amount("age", age, 130, "years"), _amount("volume_ml", volume_ml, 2000, "mL")
    blood, below = _yes("intraventricular", intraventricular), _yes("infratentorial", infratentorial)
    points = np.where(coma <= 4, 2, np.where(coma <= 12, 1, 0)) + (years >= 80) + (volume >= 30) + (blood == 1)
    return _answer(points + (below == 1), coma, years, volume, blood, below)


def func_score(
    *,
    volume_ml: ArrayLike,
    age: ArrayLike,
    location: ArrayLike,
    gcs: ArrayLike,
    impaired_before: ArrayLike,
) -> Any:
    """The FUNC score, 0 to 11, higher for better (Rost et al. 2008).

    A volume under 30 mL gives 4 points and one of 30-60 mL 2; an age under 70 years gives 2 and one of 70-79 1; a lobar
    haemorrhage gives 2 and a deep one 1; a GCS of 9 or more gives 2; no cognitive impairment before gives 1.

    Args:
        volume_ml: Volume of the haemorrhage, in mL.
        age: Years.
        location: "lobar", "deep" or "infratentorial"; None or "" where it is not known.
        gcs: Glasgow Coma Scale at admission, whole numbers from 3 to 15.
        impaired_before: Whether cognition was impaired before: true or false, 1 or 0.

    Returns:
        As of `ich_score`.

    Raises:
        ValueError: A value is impossible.
    """
    coma, years, volume = _coma(gcs), _amount("age", age, 130, "years"), _amount("volume_ml", volume_ml, 2000, "mL")
    site, before = _site(location), _yes("impaired_before", impaired_before)
    points = np.where(volume < 30, 4, np.where(volume <= 60, 2, 0)) + np.where(
        years < 70, 2, np.where(years < 80, 1, 0)
    )
    points = points + np.where(coma >= 9, 2, 0) + (before == 0)
    return _answer(points + np.nan_to_num(site).astype(np.int64), coma, years, volume, site, before)


def _answer(points: np.ndarray, *known: np.ndarray) -> Any:
    """The points, NaN where anything they come from is."""
    blank = np.isnan(sum(known))
    found = np.where(blank, np.nan, points) if blank.any() else points
    return found if found.ndim else found.item()


def _coma(given: ArrayLike) -> np.ndarray:
    return _numbers("gcs", given, lambda value: np.isin(value, np.arange(3, 16)), "whole numbers from 3 to 15")


def _amount(name: str, given: ArrayLike, most: float, unit: str) -> np.ndarray:
    return _numbers(name, given, lambda value: (value >= 0) & (value <= most), f"numbers from 0 to {most:g} {unit}")


def _yes(name: str, given: ArrayLike) -> np.ndarray:
    return _numbers(name, given, lambda value: (value == 0) | (value == 1), "true and false, or 1 and 0")


def _site(given: ArrayLike) -> np.ndarray:
    names = np.asarray(given, dtype=object)
    known = {*FUNC_LOCATIONS, "", None}
    unknown = {name for name in names.ravel() if name not in known and name == name}  # NaN is unlike itself
    if unknown:
        listed = ", ".join(sorted(map(repr, unknown)))
        raise ValueError(
            f"location is {listed}; {', '.join(FUNC_LOCATIONS)} are allowed, or None where it is not known"
        )
    points = [FUNC_LOCATIONS.get(name, np.nan) for name in names.ravel()]
    return np.array(points, dtype=np.float64).reshape(names.shape)


def _numbers(name: str, given: ArrayLike, allows: Callable[[np.ndarray], np.ndarray], allowed: str) -> np.ndarray:
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {given!r}; {allowed} are allowed, or None where it is not known") from None
    wrong = values[~(allows(values) | np.isnan(values))]
    if wrong.size:
        raise ValueError(f"{name} is {wrong.flat[0]:g}; {allowed} are allowed, or None where it is not known")
    return values
