"""Read plain data into dataclasses, strictly, and describe these dataclasses as JSON Schemas.

Model specs, training protocols and study files share this reader. A field without a default must be present, an
unknown field is an error with the nearest known name, and a value of another type is an error with the allowed values.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

from ichprog.errors import InvalidValueError, SpecError, UnknownNameError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Bounds:
    """The range of a number, as in `Annotated[float, Bounds(0, 1)]`.

    Attributes:
        low: Smallest allowed value.
        high: Largest allowed value.
    """

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        """Return whether a number lies in the range."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}" if self.high < math.inf else f"of {self.low:g} or more"


_TYPES = {str: ("string", "a string"), int: ("integer", "a whole number"), float: ("number", "a finite number"),
          bool: ("boolean", "true or false")}  # fmt: skip


def read(kind: type[_T], data: Any, path: str = "") -> _T:
    """Convert plain data to a dataclass or another supported type.

    Args:
        kind: Dataclass, `str`, `int`, `float`, `bool`, or a `Literal`, optional, `tuple` or `Mapping` of these. A
            number may be `Annotated` with `Bounds`.
        data: Data as JSON or TOML gives it.
        path: Path of the data in its file, for messages.

    Raises:
        SpecError: A field is missing or unknown, or a value has another type or is out of bounds.

    Examples:
        >>> read(tuple[float, ...], [1, 2.5])
        (1.0, 2.5)
        >>> read(Literal["high", "low"], "hi", "severity")
        Traceback (most recent call last):
        ichprog.errors.SpecError: Invalid severity 'hi'. Expected 'high' or 'low'.
    """
    return cast("_T", _convert(kind, data, path))


def describe_type(kind: Any) -> str:
    """Return the values that a scalar type or a `Literal` allows, as a phrase for messages.

    Args:
        kind: `str`, `int`, `float`, `bool`, a `Literal`, or a number with `Bounds`.

    Examples:
        >>> describe_type(Literal["auto", "float32", "bfloat16"])
        "'auto', 'float32' or 'bfloat16'"
    """
    if typing.get_origin(kind) is Annotated:
        number, bounds = typing.get_args(kind)
        return f"{_TYPES[number][1]} {bounds}"
    if typing.get_origin(kind) is not Literal:
        return _TYPES[kind][1]
    *first, last = map(repr, typing.get_args(kind))
    return " or ".join(filter(None, [", ".join(first), last]))


def invalid_value(path: str, value: object, expected: str) -> SpecError:
    """Return the error for a value that a file gives and that is not allowed.

    Args:
        path: Path of the value in its file.
        value: The value.
        expected: What is allowed.

    Examples:
        >>> str(invalid_value("folds", 1, "2 or more"))
        'Invalid folds 1. Expected 2 or more.'
    """
    return SpecError(str(InvalidValueError(path or "value", value, expected)))


def check_name(path: str, kind: str, name: object, known: Iterable[str]) -> None:
    """Check that a file names something known.

    Args:
        path: Path of the name in its file.
        kind: What is named, for the message.
        name: The name.
        known: All known names.

    Raises:
        SpecError: The name is unknown. The message has the nearest known name.
    """
    if name not in (names := list(dict.fromkeys(known))):
        raise SpecError(f"{path}: {UnknownNameError(kind, name, names)}")


def to_plain(value: Any) -> Any:
    """Convert a dataclass to plain data, the inverse of `read`.

    A field is left out if its value is its default, so that a new optional field changes no existing file.

    Args:
        value: Dataclass, mapping, list, tuple or plain value; nested as needed.
    """
    if dataclasses.is_dataclass(value):
        fields = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {field.name: to_plain(own) for field, own in fields.items() if own != field.default}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(entry) for entry in value]
    return value


def json_schema(kind: type[Any], title: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a dataclass, with its docstrings as descriptions.

    Args:
        kind: Dataclass that `read` supports.
        title: Title of the schema.

    Examples:
        >>> from ichprog.spec import Window
        >>> json_schema(Window, "window")["properties"]["above"]["enum"]
        ['zero', 'one']
    """
    definitions: dict[str, Any] = {}
    schema = _describe_fields(kind, definitions)
    header = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return header | schema | ({"$defs": dict(sorted(definitions.items()))} if definitions else {})


@functools.cache
def _fields(kind: type[Any]) -> dict[str, tuple[Any, bool]]:
    """Return the type of each field of a dataclass and whether the field is required."""
    hints = typing.get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    }


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(_without_none(args), value, path)
    if origin is tuple:
        return _convert_list(args, value, path)
    if dataclasses.is_dataclass(kind):
        return _convert_object(cast("type[Any]", kind), value, path)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise invalid_value(path, value, "an object (a table in TOML)")
        return {str(key): _convert(args[1], entry, f"{path}.{key}") for key, entry in value.items()}
    return _convert_scalar(kind, value, path)


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in args and type(value) in map(type, args):
        return value
    if origin is Annotated and type(value) in (int, args[0]) and value in args[1]:
        return _convert_scalar(args[0], value, path)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    raise invalid_value(path, value, describe_type(kind))


def _convert_list(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise invalid_value(path, value, "a list")
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(value):
        raise invalid_value(path, list(value), f"a list of {len(kinds)} entries")
    return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _convert_object(kind: type[Any], value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise invalid_value(path, value, "an object (a table in TOML)")
    fields = _fields(cast("Any", kind))
    for name in value:
        if name not in fields:
            raise SpecError(str(UnknownNameError(f"key of {path}" if path else "key", name, fields)))
    values = {}
    for name, (hint, is_required) in fields.items():
        inner = f"{path}.{name}".lstrip(".")
        if name in value:
            values[name] = _convert(hint, value[name], inner)
        elif is_required:
            raise SpecError(
                f"Missing key {inner!r}. Expected all of: {', '.join(n for n, f in fields.items() if f[1])}."
            )
    return kind(**values)


def _without_none(args: tuple[Any, ...]) -> Any:
    return next(kind for kind in args if kind is not type(None))


def _describe(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_describe(_without_none(args), definitions), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is Annotated:
        limits = {"minimum": args[1].low, "maximum": args[1].high}
        return _describe(args[0], definitions) | {key: limit for key, limit in limits.items() if math.isfinite(limit)}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _describe(args[0], definitions)}
    if origin is tuple:
        entries = [_describe(arg, definitions) for arg in args]
        return {"type": "array", "prefixItems": entries, "minItems": len(args), "maxItems": len(args)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _describe(args[1], definitions)}
    if dataclasses.is_dataclass(kind):
        name = cast("type[Any]", kind).__name__.lstrip("_")
        if name not in definitions:
            definitions[name] = {}  # reserves the name for a dataclass that contains itself
            definitions[name] = _describe_fields(cast("type[Any]", kind), definitions)
        return {"$ref": f"#/$defs/{name}"}
    return {"type": _TYPES[kind][0]}


def _describe_fields(kind: type[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    fields, (summary, descriptions) = _fields(cast("Any", kind)), _read_docstring(kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    properties = {}
    for name, (hint, is_required) in fields.items():
        description = {"description": descriptions[name]} if name in descriptions else {}
        default = {} if is_required or defaults[name] is dataclasses.MISSING else {"default": to_plain(defaults[name])}
        properties[name] = _describe(hint, definitions) | description | default
    return {
        "type": "object",
        "description": summary,
        "properties": properties,
        "required": [name for name, (_, is_required) in fields.items() if is_required],
        "additionalProperties": False,
    }


def _read_docstring(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """Return the first line of a docstring and the descriptions in its "Attributes:" section."""
    text = inspect.getdoc(kind) or ""
    _, _, section = text.partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return text.split("\n")[0], {name: " ".join(entry.split()) for name, entry in entries}
