"""Clinical values of a patient: check them, and encode them for a network.

Missing values are normal and are never replaced. A network gets each value in units of the spec, and whether the value
is known.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ichprog.calibration import adjust
from ichprog.errors import InvalidValueError, UnknownNameError
from ichprog.spec import ClinicalValue, ModelSpec, Task


def read_values(spec: ModelSpec, given: Mapping[str, Any], *, patient: str = "") -> dict[str, float]:
    """Return the known clinical values of a patient, in the order of the spec.

    Args:
        spec: The model.
        given: Values by column. None, NaN and an empty text are missing values.
        patient: Name of the patient, for messages.

    Raises:
        UnknownNameError: The model does not use a column.
        InvalidValueError: A value is not a number, or outside the range of the spec.

    Examples:
        >>> from ichprog import zoo
        >>> read_values(zoo.find("perez2023.prognosis"), {})
        {}
    """
    columns = {value.column: value for value in spec.clinical}
    for name in given:
        if name not in columns:
            hint = "" if columns else "The model uses the image alone."
            raise UnknownNameError(f"clinical value of {spec.name}", name, columns, hint)
    of_patient = f" of patient {patient}" if patient else ""
    read = {name: _read_value(columns[name], given[name], of_patient) for name in columns if name in given}
    return {name: number for name, number in read.items() if number is not None}


def _read_value(value: ClinicalValue, given: Any, of_patient: str) -> float | None:
    """Return a number, or None for a missing value."""
    expected = f"a number from {value.lowest:g} to {value.highest:g} {value.unit}".rstrip()
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise InvalidValueError(value.column + of_patient, given, expected) from None
    if math.isnan(number):
        return None
    if not value.lowest <= number <= value.highest:
        raise InvalidValueError(value.column + of_patient, given, expected)
    return number


def encode(spec: ModelSpec, known: Mapping[str, float]) -> np.ndarray:
    """Encode clinical values for a network.

    Args:
        spec: The model, with V clinical values.
        known: Known values, from `read_values`.

    Returns:
        `(2 V,)` float32: the values in units of the spec, 0 if missing; then 1 for each known value, otherwise 0.
    """
    numbers = [(known[v.column] - v.centre) / v.scale if v.column in known else 0.0 for v in spec.clinical]
    return np.array([*numbers, *(float(v.column in known) for v in spec.clinical)], np.float32)


def leave_one_out(spec: ModelSpec, known: Mapping[str, float]) -> np.ndarray:
    """Encode all known values, and all but one of them.

    Args:
        spec: The model, with V clinical values.
        known: Known values, from `read_values`.

    Returns:
        `(1 + K, 2 V)` float32: all K known values, then all but each of them in their order.
    """
    rows = [known, *({name: known[name] for name in known if name != left_out} for left_out in known)]
    return np.stack([encode(spec, row) for row in rows])


def combine(spec: ModelSpec, task: Task, probabilities: np.ndarray, known: Mapping[str, float]) -> np.ndarray:
    """Combine probabilities from the image with the known clinical values of a patient.

    Args:
        spec: The model.
        task: A task with combinations.
        probabilities: `(N, K)` of the image.
        known: Known values of the patient, from `read_values`.

    Returns:
        Probabilities `(N, K)`.
    """
    chosen = next(each for each in task.combinations if set(each.known) == set(known))
    values = {v.column: np.array((known[v.column] - v.centre) / v.scale) for v in spec.clinical if v.column in known}
    return adjust(task, probabilities, chosen.adjustments, values)
