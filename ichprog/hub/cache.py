"""The weight cache on disk: published files, verified and converted once, and checked by hash on every use.

Each folder of a repository at a commit has its own cache folder:

    <cache>/weights/<org>--<repo>/<commit>/<folder>/manifest.json        published files and their cached versions
                                                   /fold<K>.safetensors  with the keys of this project's network

PyTorch's weights-only reader reads a pickle once; the cache then holds a safetensors file. All writes are atomic.
"""

import hashlib
import json
import logging
import mmap
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from ichprog.errors import WeightsError
from ichprog.io import file_lock, write_json
from ichprog.limits import MAX_WEIGHT_BYTES
from ichprog.spec import Weights

if TYPE_CHECKING:
    import torch

RETRY_HINT = "Nothing was stored. Try again; if the error stays, a proxy or mirror changes files on the way."

_SCRATCH = ".fetch-"  # prefix of the folders of downloads
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class WeightFile:
    """The verified weights of one fold on this machine.

    Attributes:
        fold: Number of the fold.
        path: Safetensors file with the keys of this project's network.
        sha256: Checksum of the file at `path`.
        source: Origin: "hf-hub:org/repo/folder/name@commit" or a local path.
        source_sha256: Checksum of the published file.
    """

    fold: int
    path: Path
    sha256: str
    source: str
    source_sha256: str


@dataclass(frozen=True)
class Entry:
    """A published file and, once it has been fetched, its cached version.

    Attributes:
        source: Origin, as in `WeightFile`.
        size: Published size in bytes.
        blob: Git's object id, the checksum of files that the Hub stores outside LFS.
        source_sha256: Checksum of the published file, if known.
        file: Name of the cached file; None before the first download.
        sha256: Checksum of the cached file.
        conversion: The `conversion_key` that the cached file was made with.
    """

    source: str
    size: int
    blob: str | None
    source_sha256: str | None
    file: str | None = None
    sha256: str | None = None
    conversion: str | None = None


class CacheDir:
    """A folder of the cache with its manifest.

    Args:
        path: The folder.
        origin: Repository, revision and folder, written into the manifest for people who read it.
    """

    def __init__(self, path: Path, **origin: str | None) -> None:
        self.path, self.origin = path, origin
        self.manifest = path / "manifest.json"
        self.entries: dict[str, Entry] = {}
        self.has_damaged_manifest = False
        self.read()

    def read(self) -> None:
        """Read the manifest; without a readable manifest there are no entries."""
        self.entries, self.has_damaged_manifest = {}, False
        try:
            files = json.loads(self.manifest.read_bytes())["files"]
            self.entries = {key: Entry(**entry) for key, entry in files.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.has_damaged_manifest = True  # no cached file can be trusted: all are fetched again

    def write(self) -> None:
        """Write the manifest."""
        files = {key: asdict(entry) for key, entry in self.entries.items()}
        write_json(self.manifest, {**self.origin, "files": files})

    def is_valid(self, key: str, conversion: str | None) -> bool:
        """Return whether the cached file exists, has this conversion and has not changed."""
        entry = self.entries[key]
        path = self.path / (entry.file or "")
        return entry.conversion == conversion and path.is_file() and sha256_of(path) == entry.sha256

    def store(self, key: str, file: str, download: Callable[[str, Path, int], Path], published: Weights | None) -> None:
        """Download, verify and convert one file, then add it to the cache.

        Args:
            key: Name of the published file.
            file: Name of the cached file.
            download: Downloads the file of a name and size into a folder and returns its path.
            published: The weights that the spec describes; None stores the file unchanged.

        Raises:
            WeightsError: The file cannot be downloaded, verified or converted.
        """
        for killed in self.path.glob(f"{_SCRATCH}*"):  # the lock is held, so that no process uses it
            shutil.rmtree(killed, ignore_errors=True)
        with TemporaryDirectory(prefix=_SCRATCH, dir=self.path) as scratch:
            path = download(key, Path(scratch), self.entries[key].size)
            entry = replace(self.entries[key], source_sha256=_verified_sha256(path, self.entries[key]))
            check_pin(key, entry.source_sha256, published)
            if published:
                path = _convert(path, published, entry.source, Path(scratch) / file)
            self.entries[key] = replace(entry, file=file, sha256=sha256_of(path), conversion=conversion_key(published))
            path.replace(self.path / file)
        self.write()
        _log.debug("Stored %s in %s", entry.source, self.path / file)

    def weight_file(self, fold: int, key: str) -> WeightFile:
        """Return the cached version of a published file as the weights of a fold."""
        entry = self.entries[key]
        return WeightFile(fold, self.path / str(entry.file), str(entry.sha256), entry.source, str(entry.source_sha256))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time write to this folder.

        Raises:
            WeightsError: The folder cannot be written.
        """
        try:
            with file_lock(self.path / ".lock"):
                yield
        except OSError as error:
            raise WeightsError(
                f"The cache folder {self.path} cannot be used: {error}. Free disk space or grant write access, or "
                "choose another folder with `cache_dir` or the environment variable ICHPROG_CACHE."
            ) from error


def remap_keys(state: Mapping[str, _T], keys: Mapping[str, str], source: str) -> dict[str, _T]:
    """Rename the key prefixes of a state dict, strictly.

    Args:
        state: Values by key.
        keys: New prefix for each old prefix; an empty mapping leaves the keys unchanged.
        source: Origin of the state dict, for messages.

    Raises:
        WeightsError: A key begins with no prefix or with several, a prefix matches no key, or two keys get the same
            name.

    Examples:
        >>> remap_keys({"trunk.weight": 1, "head.bias": 2}, {"trunk.": "backbone.", "head.": "heads.gcs."}, "example")
        {'backbone.weight': 1, 'heads.gcs.bias': 2}
    """
    if not keys:
        return dict(state)
    renamed: dict[str, _T] = {}
    unused = set(keys)
    for key, value in state.items():
        prefixes = [prefix for prefix in keys if key.startswith(prefix)]
        if len(prefixes) != 1:
            matches = f"several, {prefixes}" if prefixes else "none"
            raise WeightsError(
                f"{source}: each key must begin with exactly one of the prefixes {list(keys)} of the model's "
                f"`weights.keys`; {key!r} begins with {matches}."
            )
        new = keys[prefixes[0]] + key.removeprefix(prefixes[0])
        if new in renamed:
            raise WeightsError(f"{source}: the model's `weights.keys` rename {key!r} and another key to {new!r}.")
        unused.discard(prefixes[0])
        renamed[new] = value
    if unused:
        raise WeightsError(f"{source}: no key begins with {sorted(unused)} of the model's `weights.keys`.")
    return renamed


def check_pin(name: str, sha256: str | None, published: Weights | None) -> None:
    """Compare a published file with the checksum that the spec pins, if both are known.

    Args:
        name: Name of the published file.
        sha256: Its checksum.
        published: The weights that the spec describes.

    Raises:
        WeightsError: The checksums differ.
    """
    pin = published.sha256.get(name) if published else None
    if pin and sha256 and pin != sha256:
        raise WeightsError(
            f"{name}: has SHA-256 {sha256}, but the model's `weights.sha256` expects {pin}. Correct the revision or "
            "checksum in the spec, or restore the original file."
        )


def conversion_key(published: Weights | None) -> str:
    """Return a key that changes whenever a published file would be converted differently."""
    if published is None:
        return "unchanged"
    return hashlib.sha256(json.dumps([published.format, sorted(published.keys.items())]).encode()).hexdigest()[:12]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        if not path.stat().st_size:  # an empty file cannot be mapped
            return hashlib.sha256().hexdigest()
        # One call releases the interpreter lock once. Hashing in pieces would wait for imports in other threads.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def _check_size(path: Path, source: str) -> None:
    """Refuse a file that is larger than any weights, packed or unpacked."""
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{source}: cannot be read ({type(error).__name__}). Download it again.") from error
    if size > MAX_WEIGHT_BYTES:
        raise WeightsError(f"{source}: refused, because it has {size} bytes. At most {MAX_WEIGHT_BYTES} are read.")


def _check_tensors(state: "Mapping[str, torch.Tensor]", source: str) -> None:
    """Refuse tensors that are no weights: of another kind or type, or not finite."""
    import torch

    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # a counter of batches is int64
    size = 0
    for key, values in state.items():
        if values.layout != torch.strided or values.is_quantized or values.dtype not in kinds:
            kind = f"{values.dtype}, {values.layout}".replace("torch.", "")
            raise WeightsError(f"{source}: {key} is a tensor of {kind}. Expected dense floating-point numbers.")
        size += values.numel() * values.element_size()
        if size > MAX_WEIGHT_BYTES:
            raise WeightsError(f"{source}: its tensors have more than {MAX_WEIGHT_BYTES} bytes, so that none is read.")
    for key, values in state.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise WeightsError(f"{source}: {key} holds numbers that are not finite. The file is damaged.")


def _convert(path: Path, published: Weights, source: str, target: Path) -> Path:
    """Return the file as safetensors with this project's keys: `path` if it is already, else a new file at `target`."""
    import pickle

    import safetensors.torch
    import torch

    _check_size(path, source)
    try:
        if published.format == "pickle":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = safetensors.torch.load(path.read_bytes())
    except Exception as error:
        if match := isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{source}: refused, because reading the file would call {match[1]}. Nothing in the file was executed. "
                "Weights may contain tensors only; download them from a trusted source."
            ) from error
        # The message of PyTorch is left out: it recommends an unsafe way to read the file.
        raise WeightsError(
            f"{source}: cannot be read as {published.format} weights ({type(error).__name__})."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise WeightsError(f"{source}: must be a flat state dict (names to tensors), is a {type(state).__name__}.")
    _check_tensors(state, source)
    if published.format != "pickle" and not published.keys:
        return path
    # Tensors of a pickle may share memory; safetensors needs one copy of each.
    copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    target.write_bytes(safetensors.torch.save(remap_keys(copies, published.keys, source)))
    _log.info("Converted %s to safetensors", source)
    return target


def _verified_sha256(path: Path, entry: Entry) -> str:
    """Return the SHA-256 of a downloaded file after comparing the file with its published size and checksum."""
    size, sha256 = path.stat().st_size, sha256_of(path)
    if size != entry.size:
        raise WeightsError(f"{entry.source}: downloaded {size} bytes, published are {entry.size}. {RETRY_HINT}")
    actual, expected = sha256, entry.source_sha256
    if expected is None:
        blob = b"blob %d\0" % size + path.read_bytes()
        actual, expected = hashlib.sha1(blob, usedforsecurity=False).hexdigest(), entry.blob
    if actual != expected:
        raise WeightsError(f"{entry.source}: downloaded checksum {actual}, published is {expected}. {RETRY_HINT}")
    return sha256
