"""Name -> plugin, from entry points: listed from metadata alone, imported on first use, one owner a name.

The built-in backbones, heads, saliency methods and models come through the same door as anybody's, by the entry
points of this project's own `pyproject.toml`.

A name that ends in `/*` is a family: it claims every name that begins so, and its plugin takes the rest of the name as
its first argument.
"""

import functools
import gc
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints, entry_points, version
from pathlib import Path
from typing import Any, cast

from ichprog.errors import PluginError, UnknownNameError

_HERE = "this session"


@dataclass(frozen=True)
class Entry:
    """One claim to a name.

    Attributes:
        kind: What it is, such as "backbone".
        name: The name it claims.
        distribution: The distribution that brings it, or "this session" where it was registered by hand.
        version: The distribution's version.
        target: The entry point, or the object itself where it was registered by hand.
    """

    kind: str
    name: str
    distribution: str
    version: str
    target: Any

    @property
    def owner(self) -> str:
        """Who claims the name, for messages."""
        return f"{self.distribution} {self.version}".rstrip()

    @property
    def installed(self) -> bool:
        """Whether a distribution brings it; what was registered by hand may be another thing tomorrow."""
        return self.distribution != _HERE  # the type of `target` does not tell: some packages put another in its place

    def claims(self, name: str) -> bool:
        """Whether it is called so, or is the family of one that is."""
        if not self.name.endswith("/*"):
            return name == self.name
        return name.startswith(self.name[:-1]) and len(name) >= len(self.name)

    def load(self) -> Any:
        """The plugin itself, imported where it was not yet.

        Raises:
            PluginError: It was made for another version of this library, or its import fails, for whatever reason.
        """
        if not self.installed:
            return self.target
        if (wanted := _made_for(self.target)) is not None:
            raise PluginError(
                f"{self.kind} {self.name!r} of {self.owner} was made for {wanted}, and this is ichprog "
                f"{version('ichprog')}. Install a version of either that goes with the other; other plugins go on "
                "working."
            )
        try:
            with _uncollected():
                return self.target.load()
        except Exception as error:  # a plugin may fail in any way; it spoils its own name only
            raise PluginError(
                f"{self.kind} {self.name!r} of {self.owner} cannot be loaded from {self.target.value}: "
                f"{type(error).__name__}: {error}. Repair or uninstall that distribution; others go on working."
            ) from error


class Registry:
    """The plugins of one kind.

    Args:
        kind: What they are, in the singular, for messages.
        group: Their entry-point group.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._registered: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def entries(self) -> list[Entry]:
        """Every claim to a name, by name, from metadata only: nothing is imported."""
        folders = tuple((path, _changed(path)) for path in sys.path)
        found = _installed(self.kind, self.group, folders)
        return sorted([*found, *self._registered.values()], key=lambda entry: (entry.name, entry.owner))

    def names(self) -> list[str]:
        """The names there are."""
        return sorted({entry.name for entry in self.entries()})

    def load(self, name: str) -> Any:
        """The plugin of that name.

        Raises:
            UnknownNameError: There is none.
            PluginError: Two distributions claim the name, it was made for another version, or its import fails.
        """
        entry = self.entry(name)
        plugin = entry.load()
        return functools.partial(plugin, name.removeprefix(entry.name[:-1])) if entry.name != name else plugin

    def entry(self, name: str) -> Entry:
        """The one claim to a name.

        Raises:
            UnknownNameError: There is none.
            PluginError: There are several; all owners are named.
        """
        claims = [entry for entry in self.entries() if entry.claims(name)]
        if not claims:
            raise UnknownNameError(self.kind, name, self.names(), hint="`ichprog plugins` lists all.")
        return sole(claims)

    def register(self, name: str, plugin: Any) -> None:
        """Adds a plugin for this process only; what a distribution installs needs an entry point instead.

        Raises:
            PluginError: The name is taken.
        """
        with self._lock:
            entry = Entry(self.kind, name, _HERE, "", plugin)
            sole([*(e for e in self.entries() if e.claims(name)), entry])
            self._registered[name] = entry

    def unregister(self, name: str) -> None:
        """Takes back what `register` added; a name that was not registered is left alone."""
        self._registered.pop(name, None)


def sole(claims: Iterable[Entry]) -> Entry:
    """The one claim to a name.

    Raises:
        PluginError: There are several; all owners are named.
    """
    first, *others = claims
    if others:
        owners = " and ".join(entry.owner for entry in (first, *others))
        raise PluginError(
            f"{first.kind} {first.name!r} is claimed by {owners}. Uninstall one of them, or have it take another name."
        )
    return first


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: nearly all that is imported stays, and searching makes it an eighth longer."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _made_for(point: EntryPoint) -> str | None:
    """What version of this library a plugin's distribution asks for, where that is not the one here."""
    if point.dist is None or point.dist.name == "ichprog":
        return None
    from packaging.requirements import InvalidRequirement, Requirement

    for line in point.dist.requires or ():
        try:
            wanted = Requirement(line)
        except InvalidRequirement:  # not for this library to judge
            continue
        here = wanted.name == "ichprog" and (wanted.marker is None or wanted.marker.evaluate({"extra": ""}))
        if here and not wanted.specifier.contains(version("ichprog"), prereleases=True):
            return f"ichprog {wanted.specifier}"
    return None


@functools.lru_cache(maxsize=16)
def _installed(kind: str, group: str, folders: tuple[tuple[str, int], ...]) -> tuple[Entry, ...]:
    """What distributions bring; read anew only where a folder that may hold one has changed."""
    found, owners = [], {}
    for point in _points(folders).select(group=group):
        if id(point.dist) not in owners:
            about = point.dist.metadata if point.dist else {"Name": "an unknown distribution", "Version": ""}
            owners[id(point.dist)] = about["Name"], about["Version"]
        found.append(Entry(kind, point.name, *owners[id(point.dist)], point))
    return tuple(found)


@functools.lru_cache(maxsize=1)
def _points(_folders: tuple[tuple[str, int], ...]) -> EntryPoints:
    return cast("EntryPoints", entry_points())  # in Python 3.11 a kind of its own, which selects as they do


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns  # "" is the folder where the process runs, as for Path
    except OSError:
        return 0


backbones = Registry("backbone", "ichprog.backbones")
heads = Registry("head", "ichprog.heads")
saliency = Registry("saliency method", "ichprog.saliency")
models = Registry("package of models", "ichprog.models")

register_backbone = backbones.register
register_head = heads.register
register_saliency = saliency.register
