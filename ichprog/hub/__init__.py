"""From a model's name to its spec and weight files on this machine that are what they should be.

Weights come from the Hugging Face Hub at a pinned commit (`remote`), or from a folder, by way of the cache (`shelf`).
Nothing is trusted by its name: a file is compared with the checksum the Hub states for it and with the one the spec
pins. A commit never changes, so with the cache filled no question is asked of the network at all.
"""

import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from ichprog import zoo
from ichprog.errors import SpecError, UnknownNameError, WeightsError
from ichprog.hub.cache import Entry, Shelf, WeightFile, check_pin, recipe_of, save, sha256_of, translate
from ichprog.hub.client import HubUnreachableError, Repository
from ichprog.spec import ModelSpec, Weights

__all__ = ["WeightFile", "cache_folder", "cached", "fetch", "resolve", "translate", "weights"]

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


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The cache folder: the one given, else `ICHPROG_CACHE`, `ichprog` in `XDG_CACHE_HOME`, or `~/.cache/ichprog`.

    Args:
        cache_dir: A folder that is asked for by name.
    """
    if cache_dir:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("ICHPROG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ichprog"


def fetch(
    name: str, *, fold: int | None = None, cache_dir: str | Path | None = None, offline: bool = False
) -> tuple[ModelSpec, list[WeightFile]]:
    """A model by any of its names, with its weights on this machine.

    Args:
        name: A name of the zoo, "hf-hub:org/repo[/folder]@revision", or "local-dir:PATH".
        fold: One fold; all there are where it is not given.
        cache_dir: The cache folder, where it is not the one of `cache_folder`.
        offline: Never touch the network. `HF_HUB_OFFLINE=1` says the same.

    Raises:
        UnknownNameError: There is no such model or fold.
        SpecError: Its description cannot be read.
        WeightsError: Its weights cannot be had, are not the ones promised, hold more than tensors, or have other keys.
        PluginError: Two distributions claim the name.
    """
    directory: Path | None
    if name.startswith(("hf-hub:", "local-dir:")):
        spec, directory = resolve(name, cache_dir=cache_dir, offline=offline)
    else:
        try:
            entry = zoo.claim(name)
        except UnknownNameError as error:
            if not re.search(r"^[~.]|[/\\]", name) and not os.path.lexists(name):
                raise
            hint = "A folder is spelled `local-dir:PATH`, a place on the Hub `hf-hub:org/repo[/folder]@revision`."
            raise UnknownNameError("model", name, error.known, hint) from None
        spec = zoo.spec_of(entry)
        directory = entry.target.parent if isinstance(entry.target, Path) else None
    return spec, weights(spec, fold, name=name, directory=directory, cache_dir=cache_dir, offline=offline)


def resolve(name: str, *, cache_dir: str | Path | None = None, offline: bool = False) -> tuple[ModelSpec, Path | None]:
    """Reads the spec that lies beside weights.

    Args:
        name: "hf-hub:org/repo[/folder]@revision" or "local-dir:PATH". A branch or tag stands for the commit it is at
            now; without a network, for the one it was last seen at.
        cache_dir: The cache folder, where it is not the one of `cache_folder`.
        offline: Never touch the network. `HF_HUB_OFFLINE=1` says the same.

    Returns:
        The spec, whose `weights` say where they really are, and the folder they lie in: null for the Hub.

    Raises:
        UnknownNameError: The name has another form.
        SpecError: The `config.json` there is no spec, or a folder has none.
        WeightsError: It cannot be had from the Hub.
    """
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:")).expanduser()
        if not (config := directory / "config.json").is_file():
            missing = "has no `config.json`" if directory.is_dir() else "is no folder"
            raise SpecError(
                f"{name}: {directory.absolute()} {missing}. Expected is a folder with the model's spec, `config.json`, "
                f"and beside it the weights, {_FILES['safetensors'][0]}, or {_FILES['pickle'][0]} as published."
            )
        return _placed(ModelSpec.read(config), None, None, ""), directory
    if not (parts := _HUB_NAME.fullmatch(name)):
        hint = "The revision is needed: a commit of 40 hex digits at best, or a tag or branch."
        raise UnknownNameError("model", name, ["hf-hub:org/repo[/folder]@revision", "local-dir:PATH"], hint)
    place, root = (
        Repository(parts["repo"], parts["revision"], parts["folder"] or "", name, offline),
        cache_folder(cache_dir),
    )
    _pin(place, root)
    shelf, _ = _supply(place, root)
    return _placed(ModelSpec.read(shelf.path / "config.json"), place.repo, place.revision, place.folder), None


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
        cache_dir: The cache folder, where it is not the one of `cache_folder`.
        offline: Never touch the network. `HF_HUB_OFFLINE=1` says the same.

    Returns:
        One for each fold, in order.

    Raises:
        UnknownNameError: There is no such fold.
        WeightsError: They cannot be had, are not the ones promised, hold more than tensors, or have other keys.
    """
    published, root = spec.weights, cache_folder(cache_dir)
    if published.repo is None or published.revision is None:
        if directory is None:
            raise WeightsError(f"{spec.name}: its weights lie beside its spec; say in which folder that is.")
        return _local(published, fold, Path(directory) / published.folder, root)
    place = Repository(published.repo, published.revision, published.folder, name or spec.name, offline)
    shelf, chosen = _supply(place, root, published, fold)
    return [shelf.weight_file(k, key) for k, key in chosen.items()]


def cached(cache_dir: str | Path | None = None) -> list[tuple[WeightFile, bool]]:
    """Every weight file in the cache, and whether it still is what it was when it was made.

    Args:
        cache_dir: The cache folder, where it is not the one of `cache_folder`.
    """
    found = []
    for manifest in sorted((cache_folder(cache_dir) / "weights").rglob("manifest.json")):
        shelf = Shelf(manifest.parent)
        for key, entry in shelf.entries.items():
            if match := re.search(_FILES["safetensors"][1], entry.file or ""):
                found.append((shelf.weight_file(int(match[1]), key), shelf.keeps(key, entry.recipe)))
    return found


def _supply(
    place: Repository, root: Path, published: Weights | None = None, fold: int | None = None
) -> tuple[Shelf, dict[int, str]]:
    """Has weights on the shelf, converted, or else the config as it is; tells the published names by fold."""
    path = _home(place, root) / place.revision / (place.folder or "_")
    shelf = Shelf(path, repo=place.repo, revision=place.revision, folder=place.folder)

    def choose() -> dict[int, str]:
        return _folds(published.format if published else "config", shelf.entries, fold, place.label)

    def missing() -> dict[int, str]:
        for key in choose().values():
            check_pin(key, shelf.entries[key].source_sha256, published)
        return {k: key for k, key in choose().items() if not shelf.keeps(key, recipe_of(published))}

    # Looking takes no lock: files appear whole, and a cache that many share may be read-only.
    lacking = missing() if shelf.entries else None
    if lacking is None or lacking:
        what = ", ".join(lacking.values()) if lacking else "the files"
        place.refuse_offline(f"{what} of {place.label}, expected in {shelf.path}")
        with shelf.alone():
            shelf.read()  # another process may have been here meanwhile
            if not shelf.entries:
                shelf.entries = place.listing()
                shelf.write()
            for k, key in missing().items():
                shelf.put(key, f"fold{k}.safetensors" if published else key, place.download, published)
    return shelf, choose()


def _pin(place: Repository, root: Path) -> None:
    """Turns a branch or tag into the commit it is at, or was at when there last was a network."""
    if _COMMIT.fullmatch(place.revision):
        return
    ref = _home(place, root) / "refs" / f"{quote(place.revision, safe='')}.txt"
    seen = ref.read_text("ascii") if ref.is_file() else None
    try:
        place.refuse_offline(f"the commit of {place.label}, expected in {ref}")
        commit = place.commit()
    except HubUnreachableError:
        if seen is None:
            raise
        commit = seen
    if commit != seen:
        with Shelf(ref.parent).alone():
            save(ref, commit)
    place.revision = commit


def _home(place: Repository, root: Path) -> Path:
    return root / "weights" / place.repo.replace("/", "--")


def _local(published: Weights, fold: int | None, folder: Path, root: Path) -> list[WeightFile]:
    """Weights in a folder: used where they are, unless they must be converted."""
    try:
        names = [path.name for path in folder.iterdir()]
        chosen = _folds(published.format, names, fold, str(folder))
        found = {k: (folder / name, sha256_of(folder / name)) for k, name in chosen.items()}
    except OSError as error:
        raise WeightsError(f"the folder of weights {folder} cannot be read: {error}.") from error
    files = []
    for k, (path, sha256) in found.items():
        check_pin(path.name, sha256, published)
        file = WeightFile(k, path, sha256, str(path), sha256)
        if published.format == "pickle" or published.keys:
            shelf = Shelf(root / "weights" / "local" / sha256)
            if not shelf.entries or not shelf.keeps(sha256, recipe_of(published)):
                with shelf.alone():
                    shelf.entries = {sha256: Entry(str(path), path.stat().st_size, None, sha256)}
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
        raise UnknownNameError(f"fold of {where}", fold, sorted(found))
    return {k: name for k, name in sorted(found.items()) if fold in (None, k)}
