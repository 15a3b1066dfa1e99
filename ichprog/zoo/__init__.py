"""List and find models: one JSON file each, in this package and in the packages of plugins.

An entry point of the group `ichprog.models` names a package. Each `.json` file in the package is the spec of one
model, and the name of the file without its suffix is the name of the model.
"""

import fnmatch
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ichprog import registry
from ichprog.errors import IchprogError, PluginError, SpecError, UnknownNameError
from ichprog.registry import SESSION, Entry
from ichprog.spec import ClinicalValue, ModelSpec

DEFAULT = "densenet121.prognosis_gcs3_age"
DETECTOR = "compact.haemorrhage"  # finds haemorrhages by default

_registered: dict[str, Entry] = {}


def list_models(pattern: str = "*") -> list[ModelSpec]:
    """Return the specs of the models whose names match, sorted by name.

    The list leaves out models that cannot be read or that two distributions claim; `entries` includes them. Neither
    weights nor a network are needed.

    Args:
        pattern: Shell pattern.

    Examples:
        >>> [spec.name for spec in list_models("perez2023.*")]
        ['perez2023.prognosis']
    """
    specs = []
    for name in sorted({entry.name for entry in entries() if fnmatch.fnmatchcase(entry.name, pattern)}):
        try:
            specs.append(find(name))
        except IchprogError:  # affects only this name, and `find` raises the error
            continue
    return specs


def find(name: str) -> ModelSpec:
    """Return the spec of a model.

    Args:
        name: Name in the zoo.

    Raises:
        UnknownNameError: There is no such model.
        PluginError: Two distributions claim the name.
        SpecError: The JSON file is invalid.

    Examples:
        >>> [task.name for task in find("densenet121.prognosis_gcs3").tasks]
        ['prognosis', 'gcs']
    """
    return read_entry(find_entry(name))


def find_entry(name: str) -> Entry:
    """Return the registry entry of a model.

    Args:
        name: Name in the zoo.

    Raises:
        UnknownNameError: There is no such model.
        PluginError: Two distributions claim the name.
    """
    available = entries()
    matches = [entry for entry in available if entry.name == name]
    if not matches:
        names = sorted({entry.name for entry in available})
        raise UnknownNameError("model", name, names, hint="Run `ichprog models` for a list.")
    return registry.single_entry(matches)


def clinical_values() -> dict[str, ClinicalValue]:
    """Return every clinical value that a model of the zoo uses, by column, with its unit, range and scale.

    Examples:
        >>> clinical_values()["age"].unit
        'years'
    """
    return {value.column: value for spec in list_models() for value in spec.clinical}


def register_model(spec: ModelSpec | Mapping[str, Any]) -> None:
    """Add a model for this process only. An installed distribution adds models with an entry point.

    Args:
        spec: Spec of the model, or its fields as in JSON.

    Raises:
        SpecError: The fields are not a valid spec.
        PluginError: The name is in use.

    Examples:
        >>> fields = find("perez2023.prognosis").to_dict()
        >>> register_model(fields | {"name": "mine.prognosis"})
        >>> find("mine.prognosis").backbone.name
        'perez2023'
        >>> unregister_model("mine.prognosis")
    """
    if not isinstance(spec, ModelSpec):
        spec = ModelSpec.from_dict(spec)
    entry = Entry("model", spec.name, SESSION, "", spec)
    registry.single_entry([*(e for e in entries() if e.name == spec.name), entry])
    _registered[spec.name] = entry


def unregister_model(name: str) -> None:
    """Remove a model that `register_model` added. Other names are ignored.

    Args:
        name: Name of the model.
    """
    _registered.pop(name, None)


def entries() -> list[Entry]:
    """Return the registry entry of every model. A package that cannot be imported contributes none."""
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


def read_entry(entry: Entry) -> ModelSpec:
    """Return the spec of a registry entry.

    Args:
        entry: One of `entries`.

    Raises:
        SpecError: The JSON file is invalid, or its name differs from the name in the spec.
    """
    if isinstance(entry.target, ModelSpec):
        return entry.target
    spec = ModelSpec.read(entry.target)
    if spec.name != entry.name:
        raise SpecError(f"{entry.target}: name: {spec.name!r} differs from the file name. Expected {entry.name!r}.")
    return spec
