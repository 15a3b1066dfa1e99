"""The cache on disk: what was published, verified, converted once, and hashed again whenever it is used.

A folder of a repository at a commit has a shelf of its own:

    <cache>/weights/<org>--<repo>/<commit>/<folder>/manifest.json       what was published, what is kept of it
                                                   /fold<K>.safetensors  with the keys of this project's network

A pickle is read by PyTorch's weights-only reader, once, and from then on there is a safetensors file. Files appear
whole or not at all.
"""

import hashlib
import json
import mmap
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from ichprog.errors import WeightsError
from ichprog.spec import Weights

AGAIN = "Nothing of it was kept. Try again; if it stays so, a proxy or mirror on the way alters files."
_T = TypeVar("_T")


@dataclass(frozen=True)
class WeightFile:
    """One fold's weights on this machine, checked.

    Attributes:
        fold: The fold.
        path: A safetensors file, with the keys of this project's network.
        sha256: Checksum of the file at `path`.
        source: Where it was published: "hf-hub:org/repo/folder/name@commit", or a local path.
        source_sha256: Checksum of the file as published.
    """

    fold: int
    path: Path
    sha256: str
    source: str
    source_sha256: str


@dataclass(frozen=True)
class Entry:
    """A published file and, once it was fetched, what the cache keeps of it and by which recipe it was made."""

    source: str
    size: int
    blob: str | None  # git's id of the content: the checksum of what the Hub keeps outside of LFS
    source_sha256: str | None
    file: str | None = None
    sha256: str | None = None
    recipe: str | None = None


class Shelf:
    """A folder of the cache with its manifest."""

    def __init__(self, path: Path, **about: str | None) -> None:
        self.path, self.about = path, about
        self.entries: dict[str, Entry] = {}
        self.read()

    def read(self) -> None:
        """Takes the entries from the manifest, none where it is missing or broken."""
        try:
            files = json.loads((self.path / "manifest.json").read_bytes())["files"]
            self.entries = {key: Entry(**entry) for key, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.entries = {}  # without a manifest nothing here can be believed: it is fetched again

    def write(self) -> None:
        """Puts the entries into the manifest."""
        files = {key: asdict(entry) for key, entry in self.entries.items()}
        save(self.path / "manifest.json", json.dumps({**self.about, "files": files}, indent=1))

    def keeps(self, key: str, recipe: str | None) -> bool:
        """Whether the file is here, made by this recipe and unchanged since."""
        entry = self.entries[key]
        path = self.path / (entry.file or "")
        return entry.recipe == recipe and path.is_file() and sha256_of(path) == entry.sha256

    def put(self, key: str, file: str, fetch: Callable[[str, Path], Path], published: Weights | None) -> None:
        """Fetches, verifies and converts one file; it appears whole or not at all."""
        with TemporaryDirectory(prefix=".fetch-", dir=self.path) as scratch:
            made = fetch(key, Path(scratch))
            entry = replace(self.entries[key], source_sha256=_verified(made, self.entries[key]))
            check_pin(key, entry.source_sha256, published)
            if published:
                made = _converted(made, published, entry.source, Path(scratch) / file)
            self.entries[key] = replace(entry, file=file, sha256=sha256_of(made), recipe=recipe_of(published))
            made.replace(self.path / file)
        self.write()

    def weight_file(self, fold: int, key: str) -> WeightFile:
        """What is kept of a published file, which holds that fold."""
        entry = self.entries[key]
        return WeightFile(fold, self.path / str(entry.file), str(entry.sha256), entry.source, str(entry.source_sha256))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lets one process at a time write here, and says what to do where none can."""
        from filelock import FileLock

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / ".lock"):
                yield
        except OSError as error:
            raise WeightsError(
                f"the cache folder {self.path} cannot be used: {error}. Make room or give the right to write there, "
                "or choose another folder by `cache_dir` or the environment variable ICHPROG_CACHE."
            ) from error


def translate(state: Mapping[str, _T], keys: Mapping[str, str], source: str) -> dict[str, _T]:
    """A state with its key prefixes renamed, strictly.

    Args:
        state: Values by key.
        keys: Prefixes and what they become; empty keeps the keys as they are.
        source: Where the state came from, for messages.

    Raises:
        WeightsError: A key begins with none of the prefixes or with several, a prefix is never met, or two keys
            become one.
    """
    if not keys:
        return dict(state)
    renamed: dict[str, _T] = {}
    unmet = set(keys)
    for key, value in state.items():
        prefixes = [prefix for prefix in keys if key.startswith(prefix)]
        if len(prefixes) != 1:
            said = f"with several of them, {prefixes}" if prefixes else "with none of them"
            raise WeightsError(
                f"{source}: every key must begin with exactly one of the prefixes {list(keys)} of the model's "
                f"`weights.keys`; {key!r} begins {said}."
            )
        new = keys[prefixes[0]] + key.removeprefix(prefixes[0])
        if new in renamed:
            raise WeightsError(f"{source}: by the model's `weights.keys`, {key!r} and another key both become {new!r}.")
        unmet.discard(prefixes[0])
        renamed[new] = value
    if unmet:
        raise WeightsError(f"{source}: no key begins with {sorted(unmet)}, named in the model's `weights.keys`.")
    return renamed


def _converted(path: Path, published: Weights, source: str, target: Path) -> Path:
    """The file as safetensors with this project's keys: as it is, or made anew at `target`."""
    import pickle

    import safetensors.torch
    import torch

    try:
        if published.format == "pickle":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = safetensors.torch.load(path.read_bytes())
    except Exception as error:
        if named := isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{source}: refused, and nothing in it was run: reading it would call {named[1]}. Weights hold tensors "
                "only; get them from another place."
            ) from error
        kind = type(error).__name__  # not its words: PyTorch's advise to read the file unsafely
        raise WeightsError(f"{source}: cannot be read as {published.format} weights ({kind}).") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise WeightsError(f"{source}: must hold a flat state dict, names to tensors; holds a {type(state).__name__}.")
    if published.format == "pickle" or published.keys:
        # Tensors of a pickle may share memory; in safetensors each has its own.
        own = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
        target.write_bytes(safetensors.torch.save(translate(own, published.keys, source)))
        return target
    return path


def _verified(path: Path, entry: Entry) -> str:
    """The SHA-256 of a fetched file that is the one that was published."""
    size, sha256 = path.stat().st_size, sha256_of(path)
    if size != entry.size:
        raise WeightsError(f"{entry.source}: {size} bytes arrived, {entry.size} were published. {AGAIN}")
    found, stated = sha256, entry.source_sha256
    if stated is None:
        blob = b"blob %d\0" % size + path.read_bytes()
        found, stated = hashlib.sha1(blob, usedforsecurity=False).hexdigest(), entry.blob
    if found != stated:
        raise WeightsError(f"{entry.source}: arrived with checksum {found}, was published with {stated}. {AGAIN}")
    return sha256


def check_pin(name: str, sha256: str | None, published: Weights | None) -> None:
    """Holds a published file against the checksum that the spec pins for it, where both are known.

    Raises:
        WeightsError: They differ.
    """
    pin = published.sha256.get(name) if published else None
    if pin and sha256 and pin != sha256:
        raise WeightsError(
            f"{name}: has SHA-256 {sha256}, but the model's `weights.sha256` names {pin}: it is not the file that the "
            "model was described with. Correct the spec's revision or checksum, or put the right file there."
        )


def recipe_of(published: Weights | None) -> str:
    """What tells one conversion of a file from another."""
    if published is None:
        return "as it is"
    return hashlib.sha256(json.dumps([published.format, sorted(published.keys.items())]).encode()).hexdigest()[:12]


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        if not path.stat().st_size:  # an empty one cannot be mapped
            return hashlib.sha256().hexdigest()
        # At one go: between pieces it would wait for whatever else is imported meanwhile.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            return hashlib.sha256(held).hexdigest()


def save(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
