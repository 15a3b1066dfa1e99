"""The errors of this library: each message says what was given, what is allowed and what to do next."""

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_MAX_NAMES = 12  # names listed in one message


class IchprogError(Exception):
    """Base class of every error that this library raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and the attributes, whatever arguments the class takes."""
        return _restore_error, (type(self), self.args, self.__dict__)


def _restore_error(kind: type[IchprogError], args: tuple[Any, ...], attributes: dict[str, Any]) -> IchprogError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class UnknownNameError(IchprogError):
    """A name that is not in the list of known names.

    Args:
        kind: What the name should name, such as "model" or "fold".
        name: The name that was given.
        known: The names that exist.
        hint: What to do next, as a sentence.

    Examples:
        >>> print(UnknownNameError("device", "cuda0", ["auto", "cpu", "cuda"], "Use --device cuda."))
        Unknown device 'cuda0'. Did you mean cuda? Expected one of: auto, cpu, cuda. Use --device cuda.
    """

    def __init__(self, kind: str, name: object, known: Iterable[object], hint: str = "") -> None:
        self.kind, self.name = kind, name
        self.known = tuple(str(k) for k in known)
        near = difflib.get_close_matches(str(name), self.known, n=3, cutoff=0.5)
        parts = [f"Unknown {kind} {str(name)!r}."]
        if near:
            parts.append(f"Did you mean {' or '.join(near)}?")
        if self.known and (not near or len(self.known) <= _MAX_NAMES):
            listed = ", ".join(self.known[:_MAX_NAMES])
            more = f" and {len(self.known) - _MAX_NAMES} more" if len(self.known) > _MAX_NAMES else ""
            parts.append(f"Expected {'one of: ' if len(self.known) > 1 else ''}{listed}{more}.")
        super().__init__(" ".join([*parts, hint]).rstrip())


class InvalidValueError(IchprogError, ValueError):
    """A value that an argument does not allow.

    Args:
        name: Name of the argument, field or option.
        value: The value that was given.
        expected: The allowed values as a phrase, such as "'raise' or 'record'" or "a positive number".
        hint: What to do next, as a sentence.

    Examples:
        >>> print(InvalidValueError("on_error", "foo", "'raise' or 'record'"))
        Invalid on_error 'foo'. Expected 'raise' or 'record'.
    """

    def __init__(self, name: str, value: object, expected: str, hint: str = "") -> None:
        self.name, self.value, self.expected = name, value, expected
        super().__init__(f"Invalid {name} {value!r}. Expected {expected}. {hint}".rstrip())


class SpecError(IchprogError):
    """A model, protocol or study file that cannot be read, is incomplete or contradicts itself."""


class WeightsError(IchprogError):
    """Weights that cannot be obtained, fail verification or do not fit the network."""


class PluginError(IchprogError):
    """A plugin that cannot be imported, has two owners or breaks its contract."""


class CohortError(IchprogError):
    """A table of patients that cannot be used; the message names every wrong row."""


class RunError(IchprogError):
    """A training, simulation or study that cannot start, cannot be resumed or had to stop."""


def missing_extra(extra: str, package: str, what: str) -> IchprogError:
    """Build the error of an optional dependency that is not installed.

    Args:
        extra: Extra of ichprog that installs the package, such as "train".
        package: Package that cannot be imported, such as "accelerate"; several are separated by " and ".
        what: What needs the package, as the subject of a sentence in the singular, such as "Training".

    Returns:
        The error to raise, such as "Training needs accelerate. Install it with: pip install 'ichprog[train]'."
    """
    it = "them" if " and " in package else "it"
    return IchprogError(f"{what} needs {package}. Install {it} with: pip install 'ichprog[{extra}]'.")


class ScanError(IchprogError):
    """A scan that cannot be read or that no model can process.

    Args:
        message: What the scan has, what is allowed, what to do next.
        code: A short stable name of the problem, such as "not-3d".
        measured: Measured value.
        expected: Expected value or range.
        unit: Unit of both values.
    """

    def __init__(
        self, message: str, *, code: str, measured: Any = None, expected: Any = None, unit: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.measured, self.expected, self.unit = code, measured, expected, unit


@dataclass(frozen=True)
class ScanWarning:
    """A warning about an unusual scan for which a prediction was made.

    Attributes:
        code: A short stable name of the problem, such as "spacing".
        message: The problem in one sentence.
        measured: Measured value.
        expected: Expected value or range.
        unit: Unit of both values, or None.
    """

    code: str
    message: str
    measured: Any = None
    expected: Any = None
    unit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the warning as plain data, ready for JSON."""
        return asdict(self)
