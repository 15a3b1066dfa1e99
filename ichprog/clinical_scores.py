"""The ICH and FUNC scores of intracerebral haemorrhage, and the published outcome at each score.

`ich_score` and `func_score` compute a score from its variables. `from_haemorrhage` takes volume, ventricles, tentorium
and location from a CT, and the rest as given, and returns a range if a variable is unknown or uncertain.

Both scores were developed on patients with a spontaneous haemorrhage in the brain; for other patients their outcomes
are not established. The functions need only numpy and take one patient or many:

    >>> from ichprog import clinical_scores
    >>> score = clinical_scores.ich_score(gcs=7, age=71, volume_ml=42.0, intraventricular=True, infratentorial=False)
    >>> score, clinical_scores.ICH_MORTALITY[score]
    (3, 0.72)

Sources. ICH score: Hemphill et al., Stroke 2001;32:891-897 (doi 10.1161/01.STR.32.4.891), 152 patients. FUNC score:
Rost et al., Stroke 2008;39:2304-2309 (doi 10.1161/STROKEAHA.107.512202), 629 patients.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ichprog.errors import InvalidValueError, UnknownNameError
from ichprog.results import Haemorrhage

ICH_MORTALITY = (0.0, 0.13, 0.26, 0.72, 0.97, 1.0, 1.0)
"""Share of patients who died within 30 days at ICH score 0 to 6 (Hemphill et al. 2001). No patient had a score of 6,
which has the share of score 5."""

FUNC_INDEPENDENCE = (*[0.0] * 5, *[0.13] * 3, 0.42, *[0.66] * 2, 0.82)
"""Share of all patients with a Glasgow Outcome Score of 4 or 5 at 90 days at FUNC score 0 to 11 (Rost et al. 2008)."""

FUNC_INDEPENDENCE_OF_SURVIVORS = (*[0.0] * 5, *[0.29] * 3, 0.48, *[0.75] * 2, 0.95)
"""The same share of patients alive at 90 days. Both are published for scores of 0-4, 5-7, 8, 9-10 and 11."""

FUNC_LOCATIONS = {"lobar": 2, "deep": 1, "infratentorial": 0}
"""Points of the FUNC score by location of the haemorrhage."""

CLINICAL_COLUMNS = {"age": "age", "gcs": "gcs", "cognitive_impairment": "impaired_before"}
"""Columns of a cohort with clinical values that no CT shows, and the names of these values."""

SCORE_COLUMNS = tuple(
    f"{quantity}_{end}"
    for quantity in ("ich_score", "ich_mortality", "func_score", "func_independence")
    for end in ("low", "high")
)
"""Columns of `ClinicalScores.to_row`."""

_UNKNOWN = "Use None for an unknown value."
_CERTAIN = 0.9  # probability from which a finding of the CT is taken as true; up to its complement, as false
_PARENCHYMAL = "parenchymal"  # the kind of haemorrhage whose volume the scores use
_MOST_ML = 2000.0
_YES_NO = {"true": True, "yes": True, "false": False, "no": False}


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

    Examples:
        >>> ich_score(gcs=15, age=50, volume_ml=5.0, intraventricular=False, infratentorial=False)
        0
    """
    coma, years, volume = _gcs(gcs), _amount("age", age, 130, "years"), _amount("volume_ml", volume_ml, _MOST_ML, "mL")
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

    Examples:
        >>> func_score(volume_ml=5.0, age=50, location="lobar", gcs=15, impaired_before=False)
        11
    """
    coma, years, volume = _gcs(gcs), _amount("age", age, 130, "years"), _amount("volume_ml", volume_ml, _MOST_ML, "mL")
    site, impaired = _location(location), _flag("impaired_before", impaired_before)
    by_volume = np.where(volume < 30, 4, np.where(volume <= 60, 2, 0))
    by_age = np.where(years < 70, 2, np.where(years < 80, 1, 0))
    points = by_volume + by_age + np.where(coma >= 9, 2, 0) + (impaired == 0)
    return _score(points + np.nan_to_num(site).astype(np.int64), coma, years, volume, site, impaired)


def score_range(score: Callable[..., Any], **values: Any) -> tuple[int, int]:
    """Return the lowest and the highest score of one patient if variables are unknown or uncertain.

    Args:
        score: `ich_score` or `func_score`.
        **values: The arguments of the score: a value, None if unknown, (lowest, highest) for an age or a volume that
            is known as an interval, or a tuple of possible locations.

    Raises:
        InvalidValueError: A value is impossible.
        UnknownNameError: No location has this name.

    Examples:
        >>> score_range(ich_score, gcs=9, age=71, volume_ml=(25, 40), intraventricular=None, infratentorial=False)
        (1, 3)
    """
    choices = [[(name, choice) for choice in _possible(name, value)] for name, value in values.items()]
    scores = [score(**dict(chosen)) for chosen in product(*choices)]
    return min(scores), max(scores)


@dataclass(frozen=True)
class ScoreVariable:
    """One variable of a score, with its source.

    Attributes:
        name: Name of the variable.
        value: The value; None if it is unknown or uncertain.
        source: "CT", "given" or "unknown".
        interval: Interval of the value that the score takes into account, or None.
        probability: Probability of a finding of the CT, or None.
        choices: Values that are possible if the value is uncertain and not all values are.
    """

    name: str
    value: Any
    source: Literal["CT", "given", "unknown"]
    interval: tuple[float, float] | None = None
    probability: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def possible(self) -> Any:
        """Return what `score_range` takes for this variable."""
        return self.interval or self.choices or self.value


@dataclass(frozen=True)
class ScoreRange:
    """A score as a range, with the published outcome at both ends.

    Attributes:
        name: "ICH" or "FUNC".
        low: Lowest possible score.
        high: Highest possible score, equal to the lowest if every variable is known.
        outcome: What the published share counts.
        share_low: Published share of patients with this outcome at the lowest score.
        share_high: The same share at the highest score.
        source: Publication.
        variables: The variables, each with its source.
    """

    name: str
    low: int
    high: int
    outcome: str
    share_low: float
    share_high: float
    source: str
    variables: tuple[ScoreVariable, ...]


@dataclass(frozen=True)
class ClinicalScores:
    """The ICH and FUNC scores of one patient.

    Attributes:
        ich: The ICH score; None if the scores do not apply to the patient.
        func: The FUNC score; None if the scores do not apply to the patient.
        notes: Why the scores do not apply, or what limits them.
    """

    ich: ScoreRange | None
    func: ScoreRange | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data, ready for JSON."""
        return asdict(self)

    def to_row(self) -> dict[str, Any]:
        """Return the scores and the published outcomes as one row with the columns `SCORE_COLUMNS`."""
        values = [
            number
            for score in (self.ich, self.func)
            for number in ([None] * 4 if score is None else [score.low, score.high, score.share_low, score.share_high])
        ]
        return dict(zip(SCORE_COLUMNS, values, strict=True))


def check_clinical(clinical: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known clinical values of one patient, checked and as numbers.

    Args:
        clinical: Values by name: age, gcs, impaired_before, volume_ml, intraventricular, infratentorial, location. A
            value may be text. None, NaN and "" are unknown.

    Raises:
        UnknownNameError: There is no such clinical value, or no such location.
        InvalidValueError: A value is impossible, or infratentorial and location contradict each other.

    Examples:
        >>> check_clinical({"age": "71", "gcs": 9, "impaired_before": "no", "volume_ml": ""})
        {'age': 71.0, 'gcs': 9.0, 'impaired_before': False}
    """
    known = {}
    for name, value in clinical.items():
        if name not in _READERS:
            raise UnknownNameError("clinical value", name, _READERS)
        text = value.strip().casefold() if isinstance(value, str) else value
        if text is None or text == "" or text != text:  # NaN differs from itself
            continue
        if name in _FLAGS and isinstance(text, str):
            text = _YES_NO.get(text, text)
        number = _READERS[name](text)
        known[name] = text if name == "location" else bool(number) if name in _FLAGS else float(number)
    below = known.get("infratentorial")
    if "location" in known and below is not None and below != (known["location"] == "infratentorial"):
        raise InvalidValueError("infratentorial", below, f"a value that agrees with location {known['location']!r}")
    return known


def from_haemorrhage(haemorrhage: Haemorrhage, clinical: Mapping[str, Any] | None = None) -> ClinicalScores:
    """Compute the ICH and FUNC scores of one patient from a CT and clinical values.

    Volume, blood in the ventricles, tentorium and location come from the CT unless they are given. The volume is that
    of blood in the brain tissue, with its interval. A finding is uncertain if its probability lies between 0.1 and 0.9.
    An unknown or uncertain variable gives a range of scores.

    Args:
        haemorrhage: The haemorrhage of the patient.
        clinical: Clinical values as in `check_clinical`.

    Raises:
        ScanError: The scan has an error and therefore no haemorrhage.
        UnknownNameError: As in `check_clinical`.
        InvalidValueError: As in `check_clinical`.

    Examples:
        ```python
        blood = ichprog.haemorrhage("scan.nii.gz")
        scores = clinical_scores.from_haemorrhage(blood, {"age": 71, "gcs": 9})
        print(scores.ich.low, scores.ich.high, scores.ich.share_low, scores.ich.share_high)
        ```
    """
    given = check_clinical(clinical or {})
    reason = _why_not(haemorrhage, given)
    if reason is not None:
        return ClinicalScores(None, None, (reason,))
    named = {name: ScoreVariable(name, given.get(name), "given" if name in given else "unknown") for name in _READERS}
    named |= {name: seen for name, seen in _read_ct(haemorrhage, given).items() if name not in given}
    notes = ["Both scores were developed on patients with a spontaneous haemorrhage in the brain."]
    if named["volume_ml"].source == "CT" and named["volume_ml"].interval is None:
        notes.append("The model states no interval of the volume, so the scores take the volume as exact.")
    ich = _range_of(ich_score, named, ICH_MORTALITY, "death within 30 days", "Hemphill et al. 2001")
    func = _range_of(func_score, named, FUNC_INDEPENDENCE, "independence at 90 days", "Rost et al. 2008")
    return ClinicalScores(ich, func, tuple(notes))


def _why_not(haemorrhage: Haemorrhage, given: Mapping[str, Any]) -> str | None:
    """Return why the scores do not apply to a patient, or None if they do."""
    if not haemorrhage.is_present:
        return f"No scores: no haemorrhage was found, at a probability of {haemorrhage.probability:.3f}."
    place = haemorrhage.location
    if place is not None and place not in FUNC_LOCATIONS and "location" not in given:
        return (
            f"No scores: most blood lies outside the brain tissue ({place}), and both scores were developed on "
            "patients with a haemorrhage in the brain."
        )
    return None


def _read_ct(haemorrhage: Haemorrhage, given: Mapping[str, Any]) -> dict[str, ScoreVariable]:
    """Return the variables that a CT shows."""
    part = _PARENCHYMAL if _PARENCHYMAL in haemorrhage.volume_ml else "total"
    interval = haemorrhage.intervals_ml[part]
    if interval is not None:
        interval = interval[0], min(interval[1], _MOST_ML)
    place = given.get("location")
    below = _finding("infratentorial", haemorrhage.infratentorial)
    if "infratentorial" in given or place is not None:
        is_below = given.get("infratentorial", place == "infratentorial")
        below = ScoreVariable("infratentorial", is_below, "given")
    return {
        "volume_ml": ScoreVariable("volume_ml", min(haemorrhage.volume_ml[part], _MOST_ML), "CT", interval),
        "intraventricular": _finding("intraventricular", haemorrhage.intraventricular),
        "infratentorial": below,
        "location": _location_of(haemorrhage.location, below),
    }


def _finding(name: str, probability: float | None) -> ScoreVariable:
    """Return a finding of the CT with the value that its probability supports."""
    if probability is None:
        return ScoreVariable(name, None, "unknown")
    value = None if 1 - _CERTAIN < probability < _CERTAIN else probability >= _CERTAIN
    return ScoreVariable(name, value, "CT", probability=probability)


def _location_of(place: str | None, below: ScoreVariable) -> ScoreVariable:
    """Return the location that agrees with what is known of the tentorium.

    Args:
        place: Location by the CT, or None.
        below: Whether the haemorrhage is infratentorial.
    """
    if below.value:
        return ScoreVariable("location", "infratentorial", below.source)
    if place is None:
        return ScoreVariable("location", None, "unknown")
    choices = [place] if place != "infratentorial" else [name for name in FUNC_LOCATIONS if name != place]
    if below.value is None:
        choices.append("infratentorial")
    return ScoreVariable("location", choices[0] if len(choices) == 1 else None, "CT", choices=tuple(choices))


def _range_of(
    score: Callable[..., Any],
    named: Mapping[str, ScoreVariable],
    shares: Sequence[float],
    outcome: str,
    source: str,
) -> ScoreRange:
    names = ("gcs", "age", "volume_ml", "intraventricular", "infratentorial")
    if score is func_score:
        names = ("volume_ml", "age", "location", "gcs", "impaired_before")
    variables = tuple(named[name] for name in names)
    low, high = score_range(score, **{variable.name: variable.possible for variable in variables})
    name = "FUNC" if score is func_score else "ICH"
    return ScoreRange(name, low, high, outcome, shares[low], shares[high], source, variables)


def _possible(name: str, value: Any) -> Sequence[Any]:
    """Return values of a variable that reach every number of points that is possible."""
    steps = {"age": (0.0, 70.0, 80.0), "volume_ml": (0.0, 30.0, 60.0, 61.0), "gcs": range(3, 16)}
    if name == "location" and isinstance(value, tuple):
        return value
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


_FLAGS = ("impaired_before", "intraventricular", "infratentorial")
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "age": lambda value: _amount("age", value, 130, "years"),
    "gcs": _gcs,
    **{name: partial(_flag, name) for name in _FLAGS},
    "volume_ml": lambda value: _amount("volume_ml", value, _MOST_ML, "mL"),
    "location": _location,
}
