"""What can go wrong, by kind: every error says what was given, what is allowed and what to do next."""

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_FEW = 12  # names that are shown all


class IchprogError(Exception):
    """Any error this library raises on purpose."""


class UnknownNameError(IchprogError):
    """A name that is not among the known ones.

    Args:
        kind: What was looked for, such as "model" or "fold".
        name: What was given.
        known: The names that exist.
        hint: What to do next, where there is more to say than the nearest names.
    """

    def __init__(self, kind: str, name: object, known: Iterable[object], hint: str = "") -> None:
        self.kind, self.name = kind, name
        self.known = tuple(str(k) for k in known)
        near = difflib.get_close_matches(str(name), self.known, n=3, cutoff=0.5)
        message = f"there is no {kind} {str(name)!r}."
        if near:
            message += f" The nearest: {', '.join(near)}."
        if self.known and (not near or len(self.known) <= _FEW):
            message += f" There is: {', '.join(self.known)}."
        super().__init__(f"{message} {hint}".rstrip())


class SpecError(IchprogError):
    """A model's description is incomplete, contradicts itself or holds something unknown."""


class WeightsError(IchprogError):
    """A model's weights cannot be had, are not the ones promised, or do not fit its network."""


class PluginError(IchprogError):
    """A plugin cannot be imported, is claimed twice, or breaks its contract."""


class CohortError(IchprogError):
    """A table of patients that cannot be used as it is; every row that is wrong is named."""


class RunError(IchprogError):
    """A run of many steps, a training or a simulation, that cannot begin, cannot be resumed or had to stop."""


class ScanError(IchprogError):
    """A scan that cannot be read, or that no model of this library can be asked about.

    Args:
        message: What was found, what is allowed, what to do next.
        code: A short stable name of the problem, such as "not-3d".
        measured: What the scan has.
        expected: What it should have.
        unit: The unit of both.
    """

    def __init__(
        self, message: str, *, code: str, measured: Any = None, expected: Any = None, unit: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.measured, self.expected, self.unit = code, measured, expected, unit


@dataclass(frozen=True)
class ScanWarning:
    """A doubt about a scan that was read and answered all the same.

    Attributes:
        code: A short stable name of the doubt, such as "spacing".
        message: The doubt in a sentence.
        measured: What the scan has.
        expected: What it should have.
        unit: The unit of both, where they have one.
    """

    code: str
    message: str
    measured: Any = None
    expected: Any = None
    unit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The warning as plain data, ready for JSON."""
        return asdict(self)
