"""The models there are: one JSON each, in this package and in packages that plugins bring.

An entry point of the group `ichprog.models` names a package; every `.json` file in it is the spec of one model, and
the file's name without the suffix is the model's.
"""

import fnmatch
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ichprog import registry
from ichprog.errors import IchprogError, PluginError, SpecError, UnknownNameError
from ichprog.registry import Entry
from ichprog.spec import ModelSpec

DEFAULT = "densenet121.prognosis_gcs3_age"

_registered: dict[str, Entry] = {}


def list_models(pattern: str = "*") -> list[ModelSpec]:
    """The models whose names match, in the order of their names; no weights and no network are needed.

    Models that cannot be read or that two distributions claim are left out; `entries` has them all.

    Args:
        pattern: A shell pattern, such as "densenet121.*".
    """
    specs = []
    for name in sorted({entry.name for entry in entries() if fnmatch.fnmatchcase(entry.name, pattern)}):
        try:
            specs.append(find(name))
        except IchprogError:  # spoils its own name only, and says so when it is asked for
            continue
    return specs


def find(name: str) -> ModelSpec:
    """The spec of a model of the zoo.

    Raises:
        UnknownNameError: There is no such model.
        PluginError: Two distributions claim the name.
        SpecError: Its JSON is no spec.
    """
    return spec_of(claim(name))


def claim(name: str) -> Entry:
    """The one claim to a model's name.

    Raises:
        UnknownNameError: There is no such model.
        PluginError: Two distributions claim the name.
    """
    there = entries()
    claims = [entry for entry in there if entry.name == name]
    if not claims:
        raise UnknownNameError(
            "model", name, sorted({entry.name for entry in there}), hint="`ichprog models` lists all."
        )
    return registry.sole(claims)


def register_model(spec: ModelSpec | Mapping[str, Any]) -> None:
    """Adds a model for this process only; a distribution brings models by an entry point.

    Args:
        spec: The model's spec, or its fields as JSON gives them.

    Raises:
        SpecError: The fields make no spec.
        PluginError: The name is taken.
    """
    if not isinstance(spec, ModelSpec):
        spec = ModelSpec.from_dict(spec)
    entry = Entry("model", spec.name, "this session", "", spec)
    registry.sole([*(e for e in entries() if e.name == spec.name), entry])
    _registered[spec.name] = entry


def entries() -> list[Entry]:
    """Every claim to a model's name; a package that cannot be imported brings none."""
    found = list(_registered.values())
    for package in registry.models.entries():
        try:
            contents = files(package.load())
        except (PluginError, TypeError):
            continue
        found += [
            Entry("model", item.name.removesuffix(".json"), package.distribution, package.version, item)
            for item in contents.iterdir()
            if item.name.endswith(".json")
        ]
    return sorted(found, key=lambda entry: (entry.name, entry.owner))


def spec_of(entry: Entry) -> ModelSpec:
    """The spec behind one claim.

    Raises:
        SpecError: It cannot be read, or names itself differently from its file.
    """
    if isinstance(entry.target, ModelSpec):
        return entry.target
    spec = ModelSpec.read(entry.target)
    if spec.name != entry.name:
        raise SpecError(f"{entry.target}: name: must be {entry.name!r} as the file is called, is {spec.name!r}")
    return spec
