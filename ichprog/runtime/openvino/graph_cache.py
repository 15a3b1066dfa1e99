"""The cache of compiled graphs.

Each graph of a fold has its own file:

    <cache>/compiled/<SHA-256 of the weights>/<graph>-<precision>-<D>x<H>x<W>.blob

A file holds a CRC-32, one line of JSON with the fingerprint and metadata of the graph, and the exported graph. Files
are written atomically. A file with a wrong checksum or another fingerprint is ignored and built again. A cryptographic
checksum would be fifteen times as slow and no safer, because an attacker who can write the file can write the checksum.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from ichprog import registry
from ichprog.hub import WeightFile
from ichprog.io import atomic_write, file_lock
from ichprog.registry import Registry
from ichprog.spec import ModelSpec

CACHE_VERSION = 7  # increase when the same network compiles to another graph or the metadata change
_CHECKSUM_BYTES = 8

_logger = logging.getLogger(__name__)


class GraphCache:
    """The cached graphs of one fold. Networks of plugins that are registered by hand are not cached.

    Args:
        spec: The specification of the model.
        file: Weight file of the fold.
        cache: The cache folder.
        processor: Name of the CPU that the graphs are compiled for.
        precision: Precision of the graphs.
    """

    def __init__(self, spec: ModelSpec, file: WeightFile, cache: Path, processor: str, precision: str) -> None:
        self._folder = _folder_of(file, cache)
        self._precision = precision
        owners = [_owner(registry.backbones, spec.backbone.name)]
        owners += [_owner(registry.heads, name) for name in sorted({task.head.name for task in spec.tasks})]
        self._is_enabled = None not in owners  # code that is registered by hand may change between processes
        self.fingerprint: dict[str, Any] = {
            "cache_version": CACHE_VERSION,
            "weights": file.sha256,
            "backbone": [spec.backbone.name, dict(spec.backbone.options)],
            "tasks": [
                [task.name, list(task.labels), task.head.name, dict(task.head.options)]
                + ([list(task.mask.regions)] if task.mask else [])
                for task in spec.tasks
            ],
            "plugins": owners,
            "openvino": version("openvino"),
            "processor": processor,
            "precision": precision,
        }

    @staticmethod
    def has_graphs(file: WeightFile, cache: Path) -> bool:
        """Return whether the cache may hold a graph of a fold.

        Args:
            file: Weight file of the fold.
            cache: The cache folder.
        """
        return any(_folder_of(file, cache).glob("*.blob"))

    def load(self, graph: str, shape: Sequence[int]) -> tuple[np.ndarray, dict[str, Any]] | None:
        """Load an exported graph and its metadata, or return None if there is no valid file.

        Args:
            graph: Name of the graph.
            shape: D, H and W of the grid.
        """
        if not self._is_enabled:
            return None
        path = self._path(graph, shape)
        try:
            content = np.memmap(path, mode="c")  # safe: files are replaced, never changed
        except (OSError, ValueError):  # an empty file cannot be mapped
            return None
        if _checksum(content[_CHECKSUM_BYTES:].data) != content[:_CHECKSUM_BYTES].tobytes():
            _logger.info("Ignoring the damaged compiled graph %s.", path)
            return None
        end = int(np.argmax(content == ord("\n"))) + 1
        metadata = self._parse(content[:end].tobytes())
        return None if metadata is None else (content[end:], metadata)

    def read_metadata(self, graph: str, shape: Sequence[int]) -> dict[str, Any] | None:
        """Read the metadata of a graph without its checksum; `load` may still find the file damaged.

        Args:
            graph: Name of the graph.
            shape: D, H and W of the grid.
        """
        if not self._is_enabled:
            return None
        try:
            with self._path(graph, shape).open("rb") as file:
                return self._parse(file.readline())
        except OSError:
            return None

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """Return the metadata of a file's first line, or None if the fingerprint differs."""
        try:
            metadata: dict[str, Any] = json.loads(line[_CHECKSUM_BYTES:])
            return metadata if metadata.pop("fingerprint") == self.fingerprint else None
        except (ValueError, KeyError, AttributeError):
            return None

    def save(self, graph: str, shape: Sequence[int], exported: bytes, metadata: dict[str, Any]) -> None:
        """Save a compiled graph. If the cache is not writable, the next process compiles the graph again.

        Args:
            graph: Name of the graph.
            shape: D, H and W of the grid.
            exported: The graph as OpenVINO exported it.
            metadata: Plain data about the graph.
        """
        if not self._is_enabled:
            return
        content = json.dumps({"fingerprint": self.fingerprint, **metadata}).encode() + b"\n" + exported
        path = self._path(graph, shape)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as part, part.open("wb") as file:
                file.write(_checksum(content))
                file.write(content)
        except OSError as error:
            _logger.info("Cannot cache the compiled graph %s: %s.", path, error)

    def build_locked(self, graph: str, shape: Sequence[int], build: Callable[[], Any]) -> Any:
        """Build the graph under an inter-process lock, if the cache is writable.

        Args:
            graph: Name of the graph.
            shape: D, H and W of the grid.
            build: Builds the graph, or loads it if another process has saved it meanwhile.
        """
        if not self._is_enabled:
            return build()
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self._path(graph, shape).with_suffix(".lock")))
            except OSError as error:
                _logger.info("Compiling without a lock, because the cache is not writable: %s.", error)
            return build()

    def _path(self, graph: str, shape: Sequence[int]) -> Path:
        return self._folder / f"{graph}-{self._precision}-{'x'.join(map(str, shape))}.blob"


def _folder_of(file: WeightFile, cache: Path) -> Path:
    return cache / "compiled" / file.sha256[:32]


def _checksum(content: bytes | memoryview) -> bytes:
    return b"%08x" % isal_zlib.crc32(content)


def _owner(plugins: Registry, name: str) -> str | None:
    """Return the distribution and version of a plugin, or None for a plugin that is registered by hand."""
    entry = next((entry for entry in plugins.entries() if entry.matches(name)), None)
    return entry.owner if entry and entry.is_installed else None
