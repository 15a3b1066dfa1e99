"""Find plugins by name through entry points.

Listing reads metadata only, a plugin is imported on first use, and each name has one owner. The built-in backbones,
heads, fusions, saliency methods, brain extractors and models use the entry points of this project's own
`pyproject.toml`.

A name that ends in `/*` is a family: it matches every name with that prefix, and its plugin receives the rest of the
name as its first argument.
"""

import functools
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints, entry_points, version
from pathlib import Path
from typing import Any, cast

from ichprog.errors import PluginError, UnknownNameError

SESSION = "this session"  # owner of what `register` added


@dataclass(frozen=True)
class Entry:
    """A plugin or model under a name.

    Attributes:
        kind: Kind of plugin, such as "backbone".
        name: Name, or family of names.
        distribution: Name of the distribution that provides it, or `SESSION` if it was registered in this process.
        version: Version of the distribution.
        target: The entry point, or the object itself if it was registered in this process.
    """

    kind: str
    name: str
    distribution: str
    version: str
    target: Any

    @property
    def owner(self) -> str:
        """Return the distribution and its version, for messages."""
        return f"{self.distribution} {self.version}".rstrip()

    @property
    def is_installed(self) -> bool:
        """Return whether a distribution provides it. A registered object may differ in the next process."""
        return self.distribution != SESSION  # the type of `target` differs with packages that replace entry points

    def matches(self, name: str) -> bool:
        """Return whether the name is this entry's name or belongs to its family.

        Args:
            name: Name of a plugin.
        """
        if not self.name.endswith("/*"):
            return name == self.name
        return name.startswith(self.name[:-1]) and len(name) >= len(self.name)

    def load(self) -> Any:
        """Return the plugin itself, imported if necessary.

        Raises:
            PluginError: The plugin requires another version of this library, or its import fails.
        """
        if not self.is_installed:
            return self.target
        if (required := _incompatible_requirement(self.target)) is not None:
            raise PluginError(
                f"{self.kind} {self.name!r} of {self.owner} requires {required}, but ichprog {version('ichprog')} is "
                "installed. Install matching versions of the two; other plugins are not affected."
            )
        try:
            return self.target.load()
        except Exception as error:  # a plugin may fail in any way; only its own name is affected
            raise PluginError(
                f"{self.kind} {self.name!r} of {self.owner} cannot be loaded from {self.target.value}: "
                f"{type(error).__name__}: {error}. Repair or uninstall that distribution; others are not affected."
            ) from error


class Registry:
    """The plugins of one kind.

    Args:
        kind: Kind of plugin in the singular, for messages.
        group: Entry-point group.

    Examples:
        >>> backbones.names()[:2]
        ['compact', 'densenet121']
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._registered: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def entries(self) -> list[Entry]:
        """Return all entries sorted by name, from metadata only; nothing is imported."""
        folders = tuple((path, _modified_ns(path)) for path in sys.path)
        installed = _installed_entries(self.kind, self.group, folders)
        return sorted([*installed, *self._registered.values()], key=lambda entry: (entry.name, entry.owner))

    def names(self) -> list[str]:
        """Return all names."""
        return sorted({entry.name for entry in self.entries()})

    def load(self, name: str) -> Any:
        """Return the plugin of a name.

        Args:
            name: Name of the plugin.

        Raises:
            UnknownNameError: There is no such plugin.
            PluginError: Two distributions claim the name, the plugin requires another version of this library, or its
                import fails.
        """
        entry = self.entry(name)
        plugin = entry.load()
        return functools.partial(plugin, name.removeprefix(entry.name[:-1])) if entry.name != name else plugin

    def entry(self, name: str) -> Entry:
        """Return the entry of a name.

        Args:
            name: Name of the plugin.

        Raises:
            UnknownNameError: There is no such plugin.
            PluginError: Two distributions claim the name.
        """
        matches = [entry for entry in self.entries() if entry.matches(name)]
        if not matches:
            raise UnknownNameError(self.kind, name, self.names(), hint="Run `ichprog plugins` for a list.")
        return single_entry(matches)

    def register(self, name: str, plugin: Any) -> None:
        """Add a plugin for this process only. An installed distribution adds plugins with an entry point.

        Args:
            name: Name of the plugin.
            plugin: The plugin, as its contract describes it.

        Raises:
            PluginError: The name is in use.
        """
        with self._lock:
            entry = Entry(self.kind, name, SESSION, "", plugin)
            single_entry([*(e for e in self.entries() if e.matches(name)), entry])
            self._registered[name] = entry

    def unregister(self, name: str) -> None:
        """Remove a plugin that `register` added. Other names are ignored.

        Args:
            name: Name of the plugin.
        """
        self._registered.pop(name, None)


def single_entry(entries: Iterable[Entry]) -> Entry:
    """Return the only entry.

    Args:
        entries: All entries of one name.

    Raises:
        PluginError: There are several; the message names their owners.
    """
    first, *others = entries
    if others:
        owners = " and ".join(entry.owner for entry in (first, *others))
        raise PluginError(
            f"{first.kind} {first.name!r} is claimed by {owners}. Uninstall one of them, or rename one plugin."
        )
    return first


def _incompatible_requirement(point: EntryPoint) -> str | None:
    """Return the version of this library that a plugin's distribution requires, if this version does not meet it."""
    if point.dist is None or point.dist.name == "ichprog":
        return None
    from packaging.requirements import InvalidRequirement, Requirement

    for line in point.dist.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # only the installer needs to understand it
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name != "ichprog" or not applies:
            continue
        if not requirement.specifier.contains(version("ichprog"), prereleases=True):
            return f"ichprog {requirement.specifier}"
    return None


@functools.lru_cache(maxsize=16)
def _installed_entries(kind: str, group: str, folders: tuple[tuple[str, int], ...]) -> tuple[Entry, ...]:
    """Return the entries of distributions, read again only if a folder of `sys.path` has changed."""
    entries, owners = [], {}
    for point in _all_entry_points(folders).select(group=group):
        if id(point.dist) not in owners:
            metadata = point.dist.metadata if point.dist else {"Name": "an unknown distribution", "Version": ""}
            owners[id(point.dist)] = metadata["Name"], metadata["Version"]
        entries.append(Entry(kind, point.name, *owners[id(point.dist)], point))
    return tuple(entries)


@functools.lru_cache(maxsize=1)
def _all_entry_points(_folders: tuple[tuple[str, int], ...]) -> EntryPoints:
    return cast("EntryPoints", entry_points())  # Python 3.11 returns a subclass with the same `select`


def _modified_ns(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns  # "" is the working directory, for `sys.path` and for Path
    except OSError:
        return 0


backbones = Registry("backbone", "ichprog.backbones")
heads = Registry("head", "ichprog.heads")
fusions = Registry("fusion", "ichprog.fusions")
saliency = Registry("saliency method", "ichprog.saliency")
brain_extractors = Registry("brain extractor", "ichprog.brain_extractors")
models = Registry("package of models", "ichprog.models")

register_backbone = backbones.register
register_head = heads.register
register_fusion = fusions.register
register_saliency = saliency.register
register_brain_extractor = brain_extractors.register
