"""Resolve the name of a model to its spec and to verified weight files on this machine.

Weights come from the Hugging Face Hub at a pinned commit (`client`) or from a folder, through the cache (`cache`).
Every file is compared with the checksum that the Hub states and with the one that the spec pins. A commit never
changes, so a filled cache needs no network.
"""

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from ichprog import zoo
from ichprog.errors import SpecError, UnknownNameError, WeightsError
from ichprog.hub.cache import CacheDir, Entry, WeightFile, check_pin, conversion_key, remap_keys, sha256_of
from ichprog.hub.client import HubUnreachableError, Repository
from ichprog.io import atomic_write
from ichprog.spec import ModelSpec, Weights

__all__ = [
    "CachedFile",
    "WeightFile",
    "cache_folder",
    "cached_files",
    "fetch",
    "missing_bytes",
    "remap_keys",
    "resolve",
    "weights",
]

_progress = logging.getLogger("ichprog.progress")
_FILES = {  # the names of files in words, and as an expression whose group is the number of the fold (empty means 0)
    "pickle": ("*_fold<K>.pth", r"_fold(\d+)\.pth$"),
    "safetensors": (
        "*fold<K>.safetensors or model.safetensors",
        r"(?:^|_)fold(\d+)\.safetensors$|^model\.safetensors$",
    ),
    "config": ("config.json", r"^config\.json$()"),
}
_HUB_NAME = re.compile(r"hf-hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>.*?))?/?@(?P<revision>[^@\s]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CachedFile:
    """A file in the cache.

    Attributes:
        path: The file: weights, or a manifest that cannot be read.
        source: Origin of the weights; the folder of a manifest.
        is_valid: Whether the file has not changed since it was stored.
    """

    path: Path
    source: str
    is_valid: bool


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder.

    Args:
        cache_dir: Folder to use. By default it is `ICHPROG_CACHE`, `ichprog` in `XDG_CACHE_HOME`, or
            `~/.cache/ichprog`, in this order.

    Examples:
        >>> cache_folder("/data/cache").as_posix()
        '/data/cache'
    """
    if cache_dir:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("ICHPROG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ichprog"


def fetch(
    name: str, *, fold: int | None = None, cache_dir: str | Path | None = None, offline: bool = False
) -> tuple[ModelSpec, list[WeightFile]]:
    """Return the spec of a model and its verified weights, downloaded if necessary.

    Args:
        name: Name in the zoo, "hf-hub:org/repo[/folder]@revision", or "local-dir:PATH".
        fold: Number of one fold; None returns all folds.
        cache_dir: Cache folder, as for `cache_folder`.
        offline: Forbid the network. `HF_HUB_OFFLINE=1` has the same effect.

    Raises:
        UnknownNameError: There is no such model or fold.
        SpecError: The spec cannot be read.
        WeightsError: The weights cannot be obtained, fail verification, contain more than tensors or have other keys.
        PluginError: Two distributions claim the name.

    Examples:
        >>> spec, files = fetch("compact.prognosis_gcs3_age", fold=0)
        >>> files[0].path.name
        'fold0.safetensors'
    """
    directory: Path | None
    if name.startswith(("hf-hub:", "local-dir:")):
        spec, directory = resolve(name, cache_dir=cache_dir, offline=offline)
    else:
        try:
            entry = zoo.find_entry(name)
        except UnknownNameError as error:
            if not re.search(r"^[~.]|[/\\]", name) and not os.path.lexists(name):
                raise
            hint = "Write a folder as `local-dir:PATH` and a model on the Hub as `hf-hub:org/repo[/folder]@revision`."
            raise UnknownNameError("model", name, error.known, hint) from None
        spec = zoo.read_entry(entry)
        directory = entry.target.parent if isinstance(entry.target, Path) else None
    return spec, weights(spec, fold, name=name, directory=directory, cache_dir=cache_dir, offline=offline)


def missing_bytes(name: str, *, cache_dir: str | Path | None = None) -> int:
    """Return how many bytes `fetch` would download for a model of the zoo, without downloading them.

    The list of published files is fetched from the Hub if it is not in the cache.

    Args:
        name: Name in the zoo.
        cache_dir: Cache folder, as for `cache_folder`.

    Raises:
        UnknownNameError: There is no such model.
        WeightsError: The files cannot be listed.
    """
    published = zoo.find(name).weights
    if published.repo is None or published.revision is None:
        return 0
    repository = Repository(published.repo, published.revision, published.folder, name, offline=False)
    cache = _open_cache(repository, cache_folder(cache_dir))
    conversion = conversion_key(published)
    if not cache.entries:
        repository.refuse_offline(_describe_missing(cache, None, conversion, repository.label))
        with cache.lock():
            _list_files(cache, repository)
    keys = _match_folds(published.format, cache.entries, None, repository.label).values()
    return sum(cache.entries[key].size for key in keys if not cache.is_valid(key, conversion))


def resolve(name: str, *, cache_dir: str | Path | None = None, offline: bool = False) -> tuple[ModelSpec, Path | None]:
    """Read the spec that is stored together with weights.

    Args:
        name: "hf-hub:org/repo[/folder]@revision" or "local-dir:PATH". A branch or tag is resolved to its current
            commit; without a network, to the commit seen last.
        cache_dir: Cache folder, as for `cache_folder`.
        offline: Forbid the network. `HF_HUB_OFFLINE=1` has the same effect.

    Returns:
        The spec, whose `weights` hold the actual location, and the local folder; None for the Hub.

    Raises:
        UnknownNameError: The name has another form.
        SpecError: The `config.json` is missing from the folder or is invalid.
        WeightsError: The `config.json` cannot be obtained from the Hub.
    """
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:")).expanduser()
        if not (config := directory / "config.json").is_file():
            problem = "has no `config.json`" if directory.is_dir() else "is not a folder"
            raise SpecError(
                f"{name}: {directory.absolute()} {problem}. Expected a folder with the model's spec, `config.json`, "
                f"and its weights, {_FILES['safetensors'][0]}, or {_FILES['pickle'][0]} as published."
            )
        return _with_location(ModelSpec.read(config), None, None, ""), directory
    if not (parts := _HUB_NAME.fullmatch(name)):
        hint = "A revision is required: a commit of 40 hex digits, a tag or a branch."
        raise UnknownNameError("model", name, ["hf-hub:org/repo[/folder]@revision", "local-dir:PATH"], hint)
    repository = Repository(parts["repo"], parts["revision"], parts["folder"] or "", name, offline)
    root = cache_folder(cache_dir)
    _resolve_commit(repository, root)
    cache, _ = _fill_cache(repository, root)
    spec = ModelSpec.read(cache.path / "config.json")
    return _with_location(spec, repository.repo, repository.revision, repository.folder), None


def weights(
    spec: ModelSpec,
    fold: int | None = None,
    *,
    name: str | None = None,
    directory: str | Path | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> list[WeightFile]:
    """Return the weight files of a model, downloaded if necessary and verified every time.

    Args:
        spec: The model.
        fold: Number of one fold; None returns all folds.
        name: Name of the model as the user wrote it, for the command in messages; by default the spec's name.
        directory: Folder of the spec, if its weights are stored with it.
        cache_dir: Cache folder, as for `cache_folder`.
        offline: Forbid the network. `HF_HUB_OFFLINE=1` has the same effect.

    Returns:
        One file for each fold, in order.

    Raises:
        UnknownNameError: There is no such fold.
        WeightsError: The weights cannot be obtained, fail verification, contain more than tensors or have other keys.
    """
    published, root = spec.weights, cache_folder(cache_dir)
    if published.repo is None or published.revision is None:
        if directory is None:
            raise WeightsError(f"{spec.name}: the weights are stored with the spec. Give its folder as `directory`.")
        return _local_weights(published, fold, Path(directory) / published.folder, root)
    repository = Repository(published.repo, published.revision, published.folder, name or spec.name, offline)
    cache, chosen = _fill_cache(repository, root, published, fold)
    return [cache.weight_file(k, key) for k, key in chosen.items()]


def cached_files(cache_dir: str | Path | None = None) -> list[CachedFile]:
    """Return every weight file in the cache, and every manifest that cannot be read, with its validity.

    Args:
        cache_dir: Cache folder, as for `cache_folder`.
    """
    files = []
    for manifest in sorted((cache_folder(cache_dir) / "weights").rglob("manifest.json")):
        cache = CacheDir(manifest.parent)
        if cache.has_damaged_manifest:
            files.append(CachedFile(manifest, str(manifest.parent), is_valid=False))
        for key, entry in cache.entries.items():
            if re.search(_FILES["safetensors"][1], entry.file or ""):
                path = cache.path / str(entry.file)
                files.append(CachedFile(path, entry.source, cache.is_valid(key, entry.conversion)))
    return files


def _fill_cache(
    repository: Repository, root: Path, published: Weights | None = None, fold: int | None = None
) -> tuple[CacheDir, dict[int, str]]:
    """Download and convert the missing files of a repository folder.

    Args:
        repository: The folder on the Hub.
        root: The cache folder.
        published: The weights to fetch; None fetches `config.json`.
        fold: Number of one fold; None fetches all folds.

    Returns:
        The folder in the cache and the published file names by fold.
    """
    cache = _open_cache(repository, root)
    conversion = conversion_key(published)

    def chosen() -> dict[int, str]:
        return _match_folds(published.format if published else "config", cache.entries, fold, repository.label)

    def invalid() -> dict[int, str]:
        for key in chosen().values():
            check_pin(key, cache.entries[key].source_sha256, published)
        return {k: key for k, key in chosen().items() if not cache.is_valid(key, conversion)}

    # Reading needs no lock, because files are replaced atomically. A shared cache may be read-only.
    missing = invalid() if cache.entries else None
    if missing is None or missing:
        repository.refuse_offline(_describe_missing(cache, missing, conversion, repository.label))
        with cache.lock():
            _list_files(cache, repository)
            files = invalid()
            if published and files:
                size = sum(cache.entries[key].size for key in files.values()) / 1e6
                count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
                _progress.info("Downloading the weights of %s: %s, %.0f MB.", repository.name, count, size)
            for k, key in files.items():
                cache.store(key, f"fold{k}.safetensors" if published else key, repository.download, published)
    return cache, chosen()


def _open_cache(repository: Repository, root: Path) -> CacheDir:
    path = _repository_folder(repository, root) / repository.revision / (repository.folder or "_")
    return CacheDir(path, repo=repository.repo, revision=repository.revision, folder=repository.folder)


def _list_files(cache: CacheDir, repository: Repository) -> None:
    """Fetch the list of published files, unless another process has filled the folder in the meantime."""
    cache.read()
    if not cache.entries:
        cache.entries = repository.listing()
        cache.write()


def _describe_missing(cache: CacheDir, missing: dict[int, str] | None, conversion: str, label: str) -> str:
    """Return a clause that says whether files are absent from the cache or damaged."""
    if cache.has_damaged_manifest:
        return f"the cache is damaged: {cache.manifest} cannot be read"
    names = list(missing.values()) if missing else []
    damaged = [key for key in names if cache.entries[key].conversion == conversion]
    if damaged:
        files = ", ".join(str(cache.path / str(cache.entries[key].file)) for key in damaged)
        return f"the cache is damaged: {files} changed since it was stored"
    return f"not in the cache: {', '.join(names) or 'the files'} of {label}, expected in {cache.path}"


def _resolve_commit(repository: Repository, root: Path) -> None:
    """Replace a branch or tag by its current commit or, without a network, by the commit seen last."""
    if _COMMIT.fullmatch(repository.revision):
        return
    ref = _repository_folder(repository, root) / "refs" / f"{quote(repository.revision, safe='')}.txt"
    last = ref.read_text("ascii") if ref.is_file() else None
    try:
        repository.refuse_offline(f"not in the cache: the commit of {repository.label}, expected in {ref}")
        commit = repository.commit()
    except HubUnreachableError:
        if last is None:
            raise
        commit = last
    if commit != last:
        with CacheDir(ref.parent).lock(), atomic_write(ref) as partial:
            partial.write_text(commit, encoding="ascii")
    repository.revision = commit


def _repository_folder(repository: Repository, root: Path) -> Path:
    return root / "weights" / repository.repo.replace("/", "--")


def _local_weights(published: Weights, fold: int | None, folder: Path, root: Path) -> list[WeightFile]:
    """Return the weights of a folder, converted in the cache if necessary."""
    try:
        names = [path.name for path in folder.iterdir()]
        chosen = _match_folds(published.format, names, fold, str(folder))
        for name in chosen.values():
            if not (folder / name).is_file():  # reading a pipe would wait for ever
                raise WeightsError(f"{folder / name}: is no regular file.")
        hashes = {k: (folder / name, sha256_of(folder / name)) for k, name in chosen.items()}
    except OSError as error:
        raise WeightsError(f"The folder of weights {folder} cannot be read: {error}.") from error
    files = []
    for k, (path, sha256) in hashes.items():
        check_pin(path.name, sha256, published)
        file = WeightFile(k, path, sha256, str(path), sha256)
        if published.format == "pickle" or published.keys:
            cache = CacheDir(root / "weights" / "local" / sha256)
            if not cache.entries or not cache.is_valid(sha256, conversion_key(published)):
                with cache.lock():
                    cache.entries = {sha256: Entry(str(path), path.stat().st_size, None, sha256)}
                    unpinned = replace(published, sha256={})
                    cache.store(sha256, f"fold{k}.safetensors", lambda *_, path=path: path, unpinned)
            file = replace(cache.weight_file(k, sha256), source=str(path))
        files.append(file)
    return files


def _with_location(spec: ModelSpec, repo: str | None, revision: str | None, folder: str) -> ModelSpec:
    """Return the spec with the location where it was found as the location of its weights."""
    subfolder = spec.weights.folder if spec.weights.repo is None else ""
    folder = "/".join(part for part in (folder, subfolder) if part)
    return replace(spec, weights=replace(spec.weights, repo=repo, revision=revision, folder=folder))


def _match_folds(file_format: str, names: Collection[str], fold: int | None, location: str) -> dict[int, str]:
    """Return the file names of all folds, or of one fold, by the number of the fold."""
    files: dict[int, str] = {}
    expected, pattern = _FILES[file_format]
    for name in sorted(names):
        if match := re.search(pattern, name):
            k = int(match[1] or 0)
            if k in files:
                raise WeightsError(f"{location}: two files hold fold {k}, {files[k]!r} and {name!r}. Remove one.")
            files[k] = name
    if not files:
        raise WeightsError(f"{location}: no file matches {expected}. The folder contains: {sorted(names)}.")
    if fold is not None and fold not in files:
        raise UnknownNameError(f"fold of {location}", fold, sorted(files))
    return {k: name for k, name in sorted(files.items()) if fold in (None, k)}
