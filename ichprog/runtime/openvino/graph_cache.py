"""Compiled networks in the cache: made once, whole or not at all, and made anew where anything about them changed.

A file of its own for each graph of a fold:

    <cache>/compiled/<the weights' checksum>/<graph>-<precision>-<D>x<H>x<W>.blob

It is a checksum, a line of JSON that says what it was made from and with, and what OpenVINO exported. A damaged one
could crash the reader or give a wrong number, so each is held against its checksum before it is used. That is a CRC-32:
who may write here could write the checksum too, so a cryptographic one would tell no more and take fifteen times as
long.
"""

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from ichprog import registry
from ichprog.hub import WeightFile
from ichprog.io import atomic_write
from ichprog.registry import Registry
from ichprog.spec import ModelSpec

_RECIPE = 4  # raised when the same network would be made into another graph
_HEX = 8


class Kept:
    """The compiled graphs of one fold.

    Args:
        spec: The model.
        file: The fold's weights.
        cache: The cache folder.
        processor: What the graphs are compiled for.
        precision: What they compute in.
    """

    def __init__(self, spec: ModelSpec, file: WeightFile, cache: Path, processor: str, precision: str) -> None:
        self._folder = cache / "compiled" / file.sha256[:32]
        self._precision = precision
        owners = [_owner(registry.backbones, spec.backbone.name)]
        owners += [_owner(registry.heads, name) for name in sorted({task.head.name for task in spec.tasks})]
        self._lasting = None not in owners  # what was registered by hand may be another thing tomorrow
        self._stamp: dict[str, Any] = {
            "recipe": _RECIPE,
            "weights": file.sha256,
            "backbone": [spec.backbone.name, dict(spec.backbone.options)],
            "tasks": [[task.name, list(task.labels), task.head.name, dict(task.head.options)] for task in spec.tasks],
            "plugins": owners,
            "openvino": version("openvino"),
            "processor": processor,
            "precision": precision,
        }

    def find(self, graph: str, shape: Sequence[int]) -> tuple[np.ndarray, dict[str, Any]] | None:
        """What OpenVINO exported, byte by byte, and what was noted of it; None where it is not here as it must be.

        Args:
            graph: Which of the fold's graphs.
            shape: D, H and W of the grid.
        """
        if not self._lasting:
            return None
        try:
            held = np.memmap(self._path(graph, shape), mode="c")  # a file here is replaced whole, never changed
        except (OSError, ValueError):  # an empty one cannot be mapped
            return None
        if _checksum(held[_HEX:].data) != held[:_HEX].tobytes():
            return None
        end = int(np.argmax(held == ord("\n"))) + 1
        noted = self._noted(held[:end].tobytes())
        return None if noted is None else (held[end:], noted)

    def note(self, graph: str, shape: Sequence[int]) -> dict[str, Any] | None:
        """What was noted of a graph that is here; `find` may still say no, as it reads all of it.

        Args:
            graph: Which of the fold's graphs.
            shape: D, H and W of the grid.
        """
        if not self._lasting:
            return None
        try:
            with self._path(graph, shape).open("rb") as file:
                return self._noted(file.readline())
        except OSError:
            return None

    def _noted(self, line: bytes) -> dict[str, Any] | None:
        """What a file's first line notes, where it was made from and with what is here now."""
        try:
            said: dict[str, Any] = json.loads(line[_HEX:])
            return said if said.pop("stamp") == self._stamp else None
        except (ValueError, KeyError, AttributeError):
            return None

    def put(self, graph: str, shape: Sequence[int], exported: bytes, about: dict[str, Any]) -> None:
        """Keeps a compiled graph, where the disk lets it; the next process makes it anew where not.

        Args:
            graph: Which of the fold's graphs.
            shape: D, H and W of the grid.
            exported: What OpenVINO exported.
            about: What is to be known of it, as plain data.
        """
        if not self._lasting:
            return
        content = json.dumps({"stamp": self._stamp, **about}).encode() + b"\n" + exported
        path = self._path(graph, shape)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as part, part.open("wb") as file:
                file.write(_checksum(content))
                file.write(content)
        except OSError:
            return

    def once(self, graph: str, shape: Sequence[int], make: Callable[[], Any]) -> Any:
        """Has one process at a time make a graph, as far as the disk allows that.

        Args:
            graph: Which of the fold's graphs.
            shape: D, H and W of the grid.
            make: Makes it, or finds that another has.
        """
        from filelock import FileLock

        if not self._lasting:
            return make()
        lock = FileLock(self._path(graph, shape).with_suffix(".lock"))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError:
            return make()
        try:
            return make()
        finally:
            lock.release()

    def _path(self, graph: str, shape: Sequence[int]) -> Path:
        return self._folder / f"{graph}-{self._precision}-{'x'.join(map(str, shape))}.blob"


def _checksum(content: bytes | memoryview) -> bytes:
    return b"%08x" % isal_zlib.crc32(content)


def _owner(plugins: Registry, name: str) -> str | None:
    """The distribution a plugin comes from, with its version; None for one that is here for this session only."""
    entry = next((entry for entry in plugins.entries() if entry.matches(name)), None)
    return entry.owner if entry and entry.is_installed else None
