"""From a spec to weight files on this machine that are what they should be.

Weights come from the Hugging Face Hub at a pinned commit, or from a folder. Nothing is trusted by its name: a file is
compared with the checksum the Hub states for it and with the one the spec pins, a pickle is read by PyTorch's
weights-only reader, once, and from then on there is a safetensors file in the cache, hashed again whenever it is used:

    <cache>/weights/<org>--<repo>/<commit>/<folder>/manifest.json       what was published, what is kept of it
                                                   /fold<K>.safetensors  with the keys of this project's network

A commit never changes, so with the cache filled no question is asked of the network at all.
"""

import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import quote

from ichprog.errors import UnknownName, WeightsError
from ichprog.spec import ModelSpec, Weights

_FILES = {  # what is looked for in a folder, in words and as an expression whose group is the fold, 0 where it is empty
    "pickle": ("*_fold<K>.pth", r"_fold(\d+)\.pth$"),
    "safetensors": (
        "*fold<K>.safetensors or model.safetensors",
        r"(?:^|_)fold(\d+)\.safetensors$|^model\.safetensors$",
    ),
    "config": ("config.json", r"^config\.json$()"),
}
_HUB_NAME = re.compile(r"hf-hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>.*?))?/?@(?P<revision>[^@\s]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KNOCK = 3.0  # seconds in which an endpoint shows that it is alive
_PATIENCE = 10.0  # seconds in which it answers a question
_AGAIN = "Nothing of it was kept. Try again; if it stays so, a proxy or mirror on the way alters files."
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


def default_cache() -> Path:
    """The cache folder: `ICHPROG_CACHE`, else `ichprog` in `XDG_CACHE_HOME`, else `~/.cache/ichprog`."""
    if own := os.environ.get("ICHPROG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ichprog"


def resolve(name: str, *, cache_dir: str | Path | None = None, offline: bool = False) -> tuple[ModelSpec, Path | None]:
    """Reads the spec that lies beside weights.

    Args:
        name: "hf-hub:org/repo[/folder]@revision" or "local-dir:PATH". A branch or tag stands for the commit it is at
            now; without a network, for the one it was last seen at.
        cache_dir: The cache folder, where it is not `default_cache`.
        offline: Never touch the network.

    Returns:
        The spec, whose `weights` say where they really are, and the folder they lie in: null for the Hub.

    Raises:
        UnknownName: The name has another form.
        SpecError: The `config.json` there is no spec.
        WeightsError: It cannot be had.
    """
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:")).expanduser()
        return _placed(ModelSpec.read(directory / "config.json"), None, None, ""), directory
    if not (parts := _HUB_NAME.fullmatch(name)):
        hint = "The revision is needed: a commit of 40 hex digits at best, or a tag or branch."
        raise UnknownName("model", name, ["hf-hub:org/repo[/folder]@revision", "local-dir:PATH"], hint)
    hub = _Hub(parts["repo"], parts["revision"], parts["folder"] or "", name, _root(cache_dir), offline)
    hub.pin()
    shelf, _ = hub.supply()
    return _placed(ModelSpec.read(shelf.path / "config.json"), hub.repo, hub.revision, hub.folder), None


def weights(
    spec: ModelSpec,
    fold: int | None = None,
    *,
    name: str | None = None,
    directory: str | Path | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> list[WeightFile]:
    """Weight files of a model, fetched where they are not here yet, and verified every time.

    Args:
        spec: The model.
        fold: One fold; all there are where it is not given.
        name: What the user calls the model, for the command in messages; else the spec's name.
        directory: The folder the spec lies in, where its weights lie beside it.
        cache_dir: The cache folder, where it is not `default_cache`.
        offline: Never touch the network. `HF_HUB_OFFLINE=1` says the same.

    Returns:
        One for each fold, in order.

    Raises:
        UnknownName: There is no such fold.
        WeightsError: They cannot be had, are not the ones promised, hold more than tensors, or have other keys.
    """
    published, root = spec.weights, _root(cache_dir)
    if published.repo is None or published.revision is None:
        if directory is None:
            raise WeightsError(f"{spec.name}: its weights lie beside its spec; say in which folder that is.")
        return _local(published, fold, Path(directory) / published.folder, root)
    hub = _Hub(published.repo, published.revision, published.folder, name or spec.name, root, offline)
    shelf, chosen = hub.supply(published, fold)
    return [shelf.weight_file(k, key) for k, key in chosen.items()]


def cached(cache_dir: str | Path | None = None) -> list[tuple[WeightFile, bool]]:
    """Every weight file in the cache, and whether it still is what it was when it was made.

    Args:
        cache_dir: The cache folder, where it is not `default_cache`.
    """
    found = []
    for manifest in sorted((_root(cache_dir) / "weights").rglob("manifest.json")):
        shelf = _Shelf(manifest.parent)
        for key, entry in shelf.entries.items():
            if match := re.search(_FILES["safetensors"][1], entry.file or ""):
                found.append((shelf.weight_file(int(match[1]), key), shelf.keeps(key, entry.recipe)))
    return found


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


@dataclass(frozen=True)
class _Entry:
    """A published file and, once it was fetched, what the cache keeps of it and by which recipe it was made."""

    source: str
    size: int
    blob: str | None  # git's id of the content: the checksum of what the Hub keeps outside of LFS
    source_sha256: str | None
    file: str | None = None
    sha256: str | None = None
    recipe: str | None = None


class _Shelf:
    """A folder of the cache with its manifest."""

    def __init__(self, path: Path, **about: str | None) -> None:
        self.path, self.about = path, about
        self.entries: dict[str, _Entry] = {}
        self.read()

    def read(self) -> None:
        try:
            files = json.loads((self.path / "manifest.json").read_bytes())["files"]
            self.entries = {key: _Entry(**entry) for key, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.entries = {}  # without a manifest nothing here can be believed: it is fetched again

    def write(self) -> None:
        files = {key: asdict(entry) for key, entry in self.entries.items()}
        _save(self.path / "manifest.json", json.dumps({**self.about, "files": files}, indent=1))

    def keeps(self, key: str, recipe: str | None) -> bool:
        """Whether the file is here, made by this recipe and unchanged since."""
        entry = self.entries[key]
        path = self.path / (entry.file or "")
        return entry.recipe == recipe and path.is_file() and _sha256(path) == entry.sha256

    def put(self, key: str, file: str, fetch: Callable[[str, Path], Path], published: Weights | None) -> None:
        """Fetches, verifies and converts one file; it appears whole or not at all."""
        with TemporaryDirectory(prefix=".fetch-", dir=self.path) as scratch:
            made = fetch(key, Path(scratch))
            entry = replace(self.entries[key], source_sha256=_verified(made, self.entries[key]))
            _check_pin(key, entry.source_sha256, published)
            if published:
                made = _converted(made, published, entry.source, Path(scratch) / file)
            self.entries[key] = replace(entry, file=file, sha256=_sha256(made), recipe=_recipe(published))
            made.replace(self.path / file)
        self.write()

    def weight_file(self, fold: int, key: str) -> WeightFile:
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


class _NoNetworkError(WeightsError):
    """There is no network, or there shall be none: what is in the cache must do."""


@dataclass
class _Hub:
    """A folder of a repository on the Hub. The first use of `client` is the first touch of the network."""

    repo: str
    revision: str
    folder: str
    name: str  # what the user calls the model
    root: Path
    offline: bool

    def __post_init__(self) -> None:
        self.folder = self.folder.strip("/")
        parts = {*self.repo.split("/"), *self.folder.split("/")}
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) or parts & {".", ".."}:
            raise WeightsError(
                f"{self.place}: is no place on the Hub; those look like hf-hub:org/repo/folder@revision."
            )

    @property
    def place(self) -> str:
        return f"hf-hub:{PurePosixPath(self.repo, self.folder)}@{self.revision}"

    @property
    def home(self) -> Path:
        return self.root / "weights" / self.repo.replace("/", "--")

    @property
    def endpoint(self) -> str:
        from huggingface_hub import constants

        return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT

    def supply(self, published: Weights | None = None, fold: int | None = None) -> tuple[_Shelf, dict[int, str]]:
        """Has weights on the shelf, converted, or else the config as it is; tells the published names by fold."""
        path = self.home / self.revision / (self.folder or "_")
        shelf = _Shelf(path, repo=self.repo, revision=self.revision, folder=self.folder)

        def choose() -> dict[int, str]:
            return _folds(published.format if published else "config", shelf.entries, fold, self.place)

        def missing() -> dict[int, str]:
            for key in choose().values():
                _check_pin(key, shelf.entries[key].source_sha256, published)
            return {k: key for k, key in choose().items() if not shelf.keeps(key, _recipe(published))}

        # Looking takes no lock: files appear whole, and a cache that many share may be read-only.
        lacking = missing() if shelf.entries else None
        if lacking is None or lacking:
            what = ", ".join(lacking.values()) if lacking else "the files"
            self.refuse_offline(f"{what} of {self.place}, expected in {shelf.path}")
            with shelf.alone():
                shelf.read()  # another process may have been here meanwhile
                if not shelf.entries:
                    shelf.entries = self.listing()
                    shelf.write()
                for k, key in missing().items():
                    shelf.put(key, f"fold{k}.safetensors" if published else key, self.fetch, published)
        return shelf, choose()

    def pin(self) -> None:
        """Turns a branch or tag into the commit it is at, or was at when there last was a network."""
        if _COMMIT.fullmatch(self.revision):
            return
        ref = self.home / "refs" / f"{quote(self.revision, safe='')}.txt"
        seen = ref.read_text("ascii") if ref.is_file() else None
        try:
            self.refuse_offline(f"the commit of {self.place}, expected in {ref}")
            commit = str(self.info().sha)
        except _NoNetworkError:
            if seen is None:
                raise
            commit = seen
        if commit != seen:
            with _Shelf(ref.parent).alone():
                _save(ref, commit)
        self.revision = commit

    def refuse_offline(self, missing: str) -> None:
        from huggingface_hub import constants

        said = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "TRUE", "YES"} or constants.HF_HUB_OFFLINE
        if self.offline or said:
            raise _NoNetworkError(
                f"{self.name}: not in the cache: {missing}; and nothing is downloaded, as "
                f"{'HF_HUB_OFFLINE is set' if said else 'offline=True was given'}. Where there is a network, run "
                f"`ichprog fetch {self.name}`."
            )

    @cached_property
    def client(self) -> Any:
        """The Hub's own client, after a knock at its endpoint.

        The client retries for half a minute where nobody answers, and a resolver or a firewall that swallows packets
        keeps to no time limit of a socket: so the knock is in a thread that is given up on.
        """
        from huggingface_hub import HfApi, get_session

        answer = Future[Any]()

        def knock() -> None:
            try:
                answer.set_result(get_session().head(self.endpoint, timeout=_KNOCK, follow_redirects=False))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=knock, daemon=True).start()
        answer.result(_KNOCK)
        return HfApi(endpoint=self.endpoint)

    def info(self) -> Any:
        with self.asking(self.place):
            # Of the client's ways to list files the one that has a time limit and does not ask again and again.
            return self.client.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=_PATIENCE)

    def listing(self) -> dict[str, _Entry]:
        files, inside, folder = self.info().siblings or [], {}, PurePosixPath(self.folder)
        if any(file.size is None for file in files):  # some mirrors leave sizes and checksums out of that answer
            with self.asking(self.place):
                tree = self.client.list_repo_tree(self.repo, self.folder or None, revision=self.revision)
                files = [file for file in tree if hasattr(file, "size")]
        for file in files:
            if (path := PurePosixPath(file.rfilename)).parent == folder:
                source = f"hf-hub:{self.repo}/{path}@{self.revision}"
                inside[path.name] = _Entry(source, file.size, file.blob_id, file.lfs.sha256 if file.lfs else None)
        if not inside:
            folders = sorted({str(PurePosixPath(file.rfilename).parent) for file in files})
            raise WeightsError(f"{self.place}: the repository has no such folder. It has: {folders}.")
        return inside

    def fetch(self, key: str, scratch: Path) -> Path:
        from huggingface_hub.utils.tqdm import silent_tqdm

        with self.asking(f"{self.place}: {key}"):
            got = self.client.hf_hub_download(
                self.repo,
                str(PurePosixPath(self.folder, key)),
                revision=self.revision,
                local_dir=scratch,
                force_download=True,  # else a file's metadata are asked for again and again
                etag_timeout=_PATIENCE,
                tqdm_class=silent_tqdm,
            )
        return Path(got)

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Tells what kind of trouble there was."""
        try:
            yield
        except Exception as error:
            # Where the client wraps what really happened, it says no more than "see above".
            cause = error.__cause__ if isinstance(error, ValueError | FileNotFoundError) else None
            cause = cause or error
            kind, said = type(cause).__name__, " ".join(str(cause).split())
            if (response := getattr(cause, "response", None)) is not None:
                status, code = response.status_code, response.headers.get("X-Error-Code", "")
                trouble = f"HTTP {status} from {self.endpoint}: {_refusal(status, code)}"
            elif isinstance(cause, OSError) and cause.errno is not None:
                raise  # the disk's trouble, not the Hub's
            elif kind == "FileMetadataError" or isinstance(cause, ValueError | TypeError | LookupError):
                trouble = (
                    f"{self.endpoint} does not answer like a Hub ({kind}: {said}). Check HF_ENDPOINT, and whether "
                )
                trouble += "a proxy or a login page of the network answers in its place."
            elif isinstance(cause, OSError) and not isinstance(cause, TimeoutError):
                trouble = f"what arrived has another size than what was published ({said}). {_AGAIN}"
            else:
                how = "did not answer in time" if "Timeout" in kind else "broke off"
                how = "cannot be reached" if kind.startswith("Connect") else how
                raise _NoNetworkError(
                    f"{what}: {self.endpoint} {how} ({kind}: {said}). Check the network, its proxy and HF_ENDPOINT. "
                    f"After `ichprog fetch {self.name}` with a network, none is needed."
                ) from error
            raise WeightsError(f"{what}: {trouble}") from error


def _refusal(status: int, code: str) -> str:
    """What an HTTP status of the Hub means, and what to do."""
    if status in (401, 403):
        return (
            "the repository is gated or private, does not exist, or the token is wrong. Check the name, ask for access "
            "on the repository's page, then run `hf auth login` or set HF_TOKEN."
        )
    if status == 404:
        lost = {"RepoNotFound": "repository", "RevisionNotFound": "revision", "EntryNotFound": "file"}
        return f"there is no such {lost.get(code, 'repository, revision or file')}. Check the name."
    if status == 429:
        return "too many requests. Wait some minutes, or log in with `hf auth login`."
    return "the Hub is in trouble. Try again later." if status >= 500 else "refused. Check HF_ENDPOINT."


def _local(published: Weights, fold: int | None, folder: Path, root: Path) -> list[WeightFile]:
    """Weights in a folder: used where they are, unless they must be converted."""
    try:
        names = [path.name for path in folder.iterdir()]
        chosen = _folds(published.format, names, fold, str(folder))
        found = {k: (folder / name, _sha256(folder / name)) for k, name in chosen.items()}
    except OSError as error:
        raise WeightsError(f"the folder of weights {folder} cannot be read: {error}.") from error
    files = []
    for k, (path, sha256) in found.items():
        _check_pin(path.name, sha256, published)
        file = WeightFile(k, path, sha256, str(path), sha256)
        if published.format == "pickle" or published.keys:
            shelf = _Shelf(root / "weights" / "local" / sha256)
            if not shelf.entries or not shelf.keeps(sha256, _recipe(published)):
                with shelf.alone():
                    shelf.entries = {sha256: _Entry(str(path), path.stat().st_size, None, sha256)}
                    shelf.put(sha256, f"fold{k}.safetensors", lambda *_, path=path: path, replace(published, sha256={}))
            file = replace(shelf.weight_file(k, sha256), source=str(path))
        files.append(file)
    return files


def _placed(spec: ModelSpec, repo: str | None, revision: str | None, folder: str) -> ModelSpec:
    """The spec, saying that its weights are where it was found itself."""
    beside = spec.weights.folder if spec.weights.repo is None else ""
    folder = "/".join(part for part in (folder, beside) if part)
    return replace(spec, weights=replace(spec.weights, repo=repo, revision=revision, folder=folder))


def _folds(form: str, names: Collection[str], fold: int | None, where: str) -> dict[int, str]:
    """File names by fold: of all folds, or of one."""
    found: dict[int, str] = {}
    like, pattern = _FILES[form]
    for name in sorted(names):
        if match := re.search(pattern, name):
            k = int(match[1] or 0)
            if k in found:
                raise WeightsError(f"{where}: fold {k} is in two files, {found[k]!r} and {name!r}; one is allowed.")
            found[k] = name
    if not found:
        raise WeightsError(f"{where}: holds no file like {like}. There is: {sorted(names)}.")
    if fold is not None and fold not in found:
        raise UnknownName(f"fold of {where}", fold, sorted(found))
    return {k: name for k, name in sorted(found.items()) if fold in (None, k)}


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


def _verified(path: Path, entry: _Entry) -> str:
    """The SHA-256 of a fetched file that is the one that was published."""
    size, sha256 = path.stat().st_size, _sha256(path)
    if size != entry.size:
        raise WeightsError(f"{entry.source}: {size} bytes arrived, {entry.size} were published. {_AGAIN}")
    found, stated = sha256, entry.source_sha256
    if stated is None:
        blob = b"blob %d\0" % size + path.read_bytes()
        found, stated = hashlib.sha1(blob, usedforsecurity=False).hexdigest(), entry.blob
    if found != stated:
        raise WeightsError(f"{entry.source}: arrived with checksum {found}, was published with {stated}. {_AGAIN}")
    return sha256


def _check_pin(name: str, sha256: str | None, published: Weights | None) -> None:
    pin = published.sha256.get(name) if published else None
    if pin and sha256 and pin != sha256:
        raise WeightsError(
            f"{name}: has SHA-256 {sha256}, but the model's `weights.sha256` names {pin}: it is not the file that the "
            "model was described with. Correct the spec's revision or checksum, or put the right file there."
        )


def _recipe(published: Weights | None) -> str:
    """What tells one conversion of a file from another."""
    if published is None:
        return "as it is"
    return hashlib.sha256(json.dumps([published.format, sorted(published.keys.items())]).encode()).hexdigest()[:12]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _root(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir).expanduser() if cache_dir else default_cache()
