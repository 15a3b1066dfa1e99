"""Fetch weights from a loopback Hub with the real client and from folders, with every kind of fault."""

import errno
import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ichprog import hub, zoo
from ichprog.errors import SpecError, UnknownNameError, WeightsError
from ichprog.hub import client
from ichprog.registry import Entry
from ichprog.spec import ModelSpec

from support.hub_server import COMMIT, HubServer

REPO, FOLDER, FILE = "org/repo", "Proposed", "Net_fold0.pth"
KEYS = {"trunk.": "backbone.", "head.3.": "heads.outcome."}
STATE = {
    "trunk.conv.weight": torch.arange(6.0).reshape(2, 3),
    "trunk.norm.steps": torch.tensor(7),
    "head.3.bias": torch.ones(1),
}


def make_spec(**weights: Any) -> ModelSpec:
    published = {"repo": REPO, "revision": COMMIT, "folder": FOLDER, "format": "pickle", "keys": KEYS, "sha256": {}}
    task = {
        "name": "outcome", "meaning": "example", "labels": ["good", "poor"], "threshold": 0.5, "loss_weight": 1.0,
        "target": {"column": "outcome", "bin_edges": [1], "severity": "high"},
        "head": {"name": "ordinal", "options": {}},
    }  # fmt: skip
    return ModelSpec.from_dict(
        {
            "name": "tiny.outcome",
            "summary": "example",
            "backbone": {"name": "tiny", "options": {}},
            "tasks": [task],
            "input": {
                "orientation": "LPS", "brain_only": True, "window": {"low": 0, "high": 1, "above": "zero"},
                "shape": [2, 2, 2], "pad_slices": True, "resize": "area", "expected_ranges": {},
            },
            "weights": published | weights,
            "licence": {"code": "MIT", "weights": "MIT", "data": "none"},
            "citation": {"text": "none", "doi": "none", "url": "none"},
            "intended_use": "tests",
            "limits": [],
            "notice": "example",
            "golden_output": None,
        }
    )  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "published" / REPO / FOLDER
    folder.mkdir(parents=True)
    torch.save(STATE, folder / FILE)
    (folder / "README.md").write_text("# example\n")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer(tmp_path / "published") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def published(server: HubServer, name: str = FILE) -> Path:
    return server.root / REPO / FOLDER / name


def dead_url() -> str:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{port.getsockname()[1]}"


# --- from the Hub


def test_a_published_pickle_becomes_a_verified_safetensors_file(server: HubServer, cache: Path) -> None:
    [file] = hub.weights(make_spec())
    place = cache / "weights" / "org--repo" / COMMIT / FOLDER
    assert file == hub.WeightFile(
        fold=0,
        path=place / "fold0.safetensors",
        sha256=sha256(place / "fold0.safetensors"),
        source=f"hf-hub:{REPO}/{FOLDER}/{FILE}@{COMMIT}",
        source_sha256=sha256(published(server)),
    )
    state = safetensors.torch.load_file(file.path)
    assert set(state) == {"backbone.conv.weight", "backbone.norm.steps", "heads.outcome.bias"}
    assert torch.equal(state["backbone.conv.weight"], STATE["trunk.conv.weight"])
    assert state["backbone.norm.steps"].dtype == torch.int64
    manifest = json.loads((place / "manifest.json").read_text())
    assert (manifest["repo"], manifest["revision"], manifest["folder"]) == (REPO, COMMIT, FOLDER)
    assert manifest["files"][FILE]["source_sha256"] == file.source_sha256
    assert sorted(p.name for p in place.iterdir() if p.name != ".lock") == ["fold0.safetensors", "manifest.json"]


def test_a_filled_cache_sends_no_request(server: HubServer) -> None:
    torch.save(STATE, published(server, "Net_fold3.pth"))
    first = hub.weights(make_spec())
    server.requests.clear()
    assert hub.weights(make_spec()) == first
    assert hub.weights(make_spec(), 3) == first[1:]
    assert hub.weights(make_spec(), offline=True) == first
    assert [file.fold for file in first] == [0, 3]
    assert server.requests == []


def test_one_fold_fetches_one_file(server: HubServer) -> None:
    torch.save(STATE, published(server, "Net_fold3.pth"))
    [file] = hub.weights(make_spec(), 3)
    assert file.fold == 3
    assert len(server.requests_with("GET /org/repo/resolve")) == 1
    manifest = json.loads((file.path.parent / "manifest.json").read_text())
    assert manifest["files"][FILE]["file"] is None
    with pytest.raises(UnknownNameError, match=r"fold .* '1'.*0, 3"):
        hub.weights(make_spec(), 1)


def test_concurrent_processes_download_once(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(make_spec().to_dict()))
    server.faults["GET /org/repo/resolve"] = "slow"
    code = (
        "import sys; from pathlib import Path; from ichprog import hub; from ichprog.spec import ModelSpec;"
        "print(hub.weights(ModelSpec.read(Path(sys.argv[1])))[0].sha256)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "spec.json")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(answers) == 1
    assert len(server.requests_with("GET /org/repo/resolve")) == 1


@pytest.mark.usefixtures("server")
def test_another_key_mapping_is_another_conversion() -> None:
    [first] = hub.weights(make_spec())
    [second] = hub.weights(make_spec(keys={}))
    assert set(safetensors.torch.load_file(second.path)) == set(STATE)
    assert second.sha256 != first.sha256
    with pytest.raises(WeightsError, match=FILE):
        hub.weights(make_spec(), offline=True)


@pytest.mark.parametrize("name", ["model.safetensors", "fold0.safetensors", "Net_fold0.safetensors"])
def test_safetensors_need_no_conversion(server: HubServer, name: str) -> None:
    safetensors.torch.save_file(STATE, published(server, name))
    [file] = hub.weights(make_spec(format="safetensors", keys={}))
    assert file.sha256 == file.source_sha256 == sha256(published(server, name))
    [renamed] = hub.weights(make_spec(format="safetensors"))
    assert "heads.outcome.bias" in safetensors.torch.load_file(renamed.path)


def test_files_outside_lfs_are_verified_by_the_checksum_of_git(server: HubServer) -> None:
    server.lfs = ()
    assert hub.weights(make_spec())[0].source_sha256 == sha256(published(server))
    server.faults["GET /org/repo/resolve"] = "flip"
    with pytest.raises(WeightsError, match="checksum"):
        hub.weights(make_spec(keys={}))


@pytest.mark.usefixtures("server")
def test_a_damaged_file_is_reported_and_fetched_again() -> None:
    [file] = hub.weights(make_spec())
    file.path.write_bytes(b"changed")
    assert [cached.is_valid for cached in hub.cached_files()] == [False]
    with pytest.raises(WeightsError, match=rf"the cache is damaged: {file.path} changed.*`ichprog fetch"):
        hub.weights(make_spec(), offline=True)
    assert hub.weights(make_spec()) == [file]
    assert hub.cached_files() == [hub.CachedFile(file.path, file.source, is_valid=True)]


def test_the_tree_is_listed_if_a_mirror_states_no_checksums(server: HubServer) -> None:
    server.lists_checksums = False
    [file] = hub.weights(make_spec())
    assert file.source_sha256 == sha256(published(server))
    assert len(server.requests_with("/tree/")) == 1


@pytest.mark.usefixtures("server")
def test_a_damaged_manifest_is_reported_and_replaced() -> None:
    [file] = hub.weights(make_spec())
    manifest = file.path.parent / "manifest.json"
    manifest.write_text('{"files": [')
    assert hub.cached_files() == [hub.CachedFile(manifest, str(manifest.parent), is_valid=False)]
    with pytest.raises(WeightsError, match=rf"the cache is damaged: {manifest} cannot be read.*`ichprog fetch"):
        hub.weights(make_spec(), offline=True)
    assert hub.weights(make_spec()) == [file]


# --- wrong files


def test_a_pinned_checksum_must_match(server: HubServer) -> None:
    right, wrong = sha256(published(server)), "0" * 64
    with pytest.raises(WeightsError, match=f"{FILE}.*{right}.*{wrong}"):
        hub.weights(make_spec(sha256={FILE: wrong}))
    assert server.requests_with("resolve") == []
    [file] = hub.weights(make_spec(sha256={FILE: right}))
    assert hub.weights(make_spec()) == [file]
    with pytest.raises(WeightsError, match=wrong):
        hub.weights(make_spec(sha256={FILE: wrong}))


def test_a_fold_without_a_file_or_with_two_is_refused(server: HubServer) -> None:
    torch.save(STATE, published(server, "Other_fold0.pth"))
    with pytest.raises(WeightsError, match=r"fold 0, .*Net_fold0.pth.*Other_fold0.pth"):
        hub.weights(make_spec())
    with pytest.raises(WeightsError, match=r"model.safetensors.*README.md"):
        hub.weights(make_spec(format="safetensors"))
    with pytest.raises(WeightsError, match=r"no such folder.*Proposed"):
        hub.weights(make_spec(folder="Elsewhere"))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_execute_code_is_refused(server: HubServer, tmp_path: Path) -> None:
    torch.save({**STATE, "evil": Evil(tmp_path / "marker")}, published(server))
    with pytest.raises(WeightsError, match=r"refused.*would call .*system.*Nothing in the file was executed"):
        hub.weights(make_spec())
    published(server).write_bytes(pickle.dumps(Evil(tmp_path / "marker"), protocol=2))
    with pytest.raises(WeightsError):
        hub.weights(make_spec(revision=COMMIT), cache_dir=tmp_path / "other")
    assert not (tmp_path / "marker").exists()
    assert hub.cached_files() == []


@pytest.mark.parametrize("content", [[1, 2], {"state": {"a": torch.ones(1)}}, {3: torch.ones(1)}])
def test_only_a_flat_state_dict_is_accepted(server: HubServer, content: Any) -> None:
    torch.save(content, published(server))
    with pytest.raises(WeightsError, match="flat"):
        hub.weights(make_spec())


@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_an_unreadable_weight_file_is_refused(server: HubServer, form: str) -> None:
    for name in (FILE, "model.safetensors"):
        published(server, name).write_bytes(b"\x80no weights at all" * 9)
    with pytest.raises(WeightsError, match=f"cannot be read as {form}"):
        hub.weights(make_spec(format=form))


def test_keys_are_remapped_strictly() -> None:
    state = {"a.x": 1, "b.y": 2}
    assert hub.remap_keys(state, {"a.": "", "b.": "c."}, "here") == {"x": 1, "c.y": 2}
    assert hub.remap_keys(state, {}, "here") == state
    for keys, message in [
        ({"a.": ""}, "'b.y' begins with none"),
        ({"a.": "", "b.": "", "b.y": ""}, "'b.y' begins with several"),
        ({"a.": "", "b.": "", "c.": ""}, r"no key begins with \['c.'\]"),
        ({"a.x": "z", "b.y": "z"}, "rename 'b.y' and another key to 'z'"),
    ]:
        with pytest.raises(WeightsError, match=f"here: .*{message}"):
            hub.remap_keys(state, keys, "here")


# --- network faults


@pytest.mark.parametrize(
    ("part", "fault", "message"),
    [
        ("/api/models", 401, "401.*private.*token"),
        ("/api/models", "403:GatedRepo", "403.*gated.*access"),
        ("/api/models", "404:RepoNotFound", "no such repository"),
        ("/api/models", 429, "too many requests"),
        ("/api/models", 500, "500.*internal error"),
        ("/api/models", "wrong", "does not answer like a Hub"),
        ("/api/models", "half", "closed the connection"),
        ("HEAD /org/repo/resolve", "403:GatedRepo", "403.*gated"),
        ("HEAD /org/repo/resolve", 500, "500.*internal error"),
        ("HEAD /org/repo/resolve", "404:EntryNotFound", "no such file"),
        ("GET /org/repo/resolve", 500, "500.*internal error"),
        ("GET /org/repo/resolve", 404, "404"),
        ("GET /org/repo/resolve", "flip", "checksum"),
        ("GET /org/repo/resolve", "wrong", "another size"),
    ],
)
def test_each_fault_has_its_message_within_five_seconds(
    server: HubServer, cache: Path, part: str, fault: str | int, message: str
) -> None:
    server.faults[part] = fault
    began = time.monotonic()
    with pytest.raises(WeightsError, match=message):
        hub.weights(make_spec())
    assert time.monotonic() - began < 5
    assert not list(cache.rglob("*.safetensors"))
    assert not list(cache.rglob(".fetch-*"))
    server.faults.clear()
    assert len(hub.weights(make_spec())) == 1


def test_an_interrupted_download_leaves_no_file(server: HubServer, cache: Path) -> None:
    server.faults["GET /org/repo/resolve"] = "half"
    with pytest.raises(WeightsError, match="closed the connection"):
        hub.weights(make_spec())
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.usefixtures("server")
def test_a_missing_repository_revision_or_folder_is_named() -> None:
    with pytest.raises(WeightsError, match="no such repository"):
        hub.weights(make_spec(repo="org/other"))
    with pytest.raises(WeightsError, match="no such revision"):
        hub.weights(make_spec(revision="f" * 40))
    with pytest.raises(WeightsError, match="no such folder"):
        hub.weights(make_spec(folder="elsewhere"))


def test_an_unreachable_endpoint_is_reported_within_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (dead_url(), "http://no-such-host.invalid"):
        monkeypatch.setenv("HF_ENDPOINT", url)
        began = time.monotonic()
        with pytest.raises(WeightsError, match=f"{url} cannot be reached.*ichprog fetch tiny.outcome"):
            hub.weights(make_spec())
        assert time.monotonic() - began < 5


def test_an_endpoint_that_hangs_times_out(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROBE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(client, "REQUEST_TIMEOUT_S", 0.3)
    for part in ("HEAD /", "GET /api"):
        server.faults = {part: "hang"}
        with pytest.raises(WeightsError, match="did not answer in time"):
            hub.weights(make_spec())


def test_a_name_server_that_hangs_times_out(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROBE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: server.closing.wait(60) and [])
    with pytest.raises(WeightsError, match="did not answer in time"):
        hub.weights(make_spec())


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_names_the_command_to_run(server: HubServer, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError) as caught:
        hub.weights(make_spec(), name="hf-hub:org/repo@main", offline=by == "argument")
    for part in (REPO, FOLDER, COMMIT, str(hub.cache_folder()), "`ichprog fetch hf-hub:org/repo@main`"):
        assert part in str(caught.value)
    assert server.requests == []


@pytest.mark.usefixtures("server")
def test_a_cache_without_write_access_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"file/weights.*cannot be used.*cache_dir.*ICHPROG_CACHE"):
        hub.weights(make_spec(), cache_dir=tmp_path / "file")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("write_bytes", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, where, full)
            with pytest.raises(WeightsError, match=r"No space left.*ICHPROG_CACHE"):
                hub.weights(make_spec())


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    assert hub.cache_folder() == cache
    monkeypatch.delenv("ICHPROG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "ichprog"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder() == Path.home() / ".cache" / "ichprog"


# --- names that include a spec


def write_config(folder: Path, /, **weights: Any) -> None:
    (folder / "config.json").write_text(json.dumps(make_spec(**weights).to_dict()))


def test_a_branch_resolves_to_its_commit(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(published(server).parent, repo=None, revision=None, folder="")
    name = f"hf-hub:{REPO}/{FOLDER}@main"
    spec, directory = hub.resolve(name)
    assert directory is None
    assert (spec.weights.repo, spec.weights.revision, spec.weights.folder) == (REPO, COMMIT, FOLDER)
    assert replace(spec, weights=make_spec().weights) == make_spec()
    files = hub.weights(spec)
    server.requests.clear()
    assert hub.resolve(name, offline=True)[0] == spec
    assert hub.resolve(f"hf-hub:{REPO}/{FOLDER}@{COMMIT}")[0] == spec
    assert hub.weights(spec) == files
    assert server.requests == []
    monkeypatch.setenv("HF_ENDPOINT", dead_url())
    assert hub.resolve(name)[0] == spec


def test_a_branch_that_moves_resolves_to_the_new_commit(server: HubServer) -> None:
    write_config(published(server).parent)
    name = f"hf-hub:{REPO}/{FOLDER}@main"
    assert hub.resolve(name)[0].weights.revision == COMMIT
    server.refs["main"] = "1" * 40
    assert hub.resolve(name)[0].weights.revision == "1" * 40
    assert hub.resolve(name, offline=True)[0].weights.revision == "1" * 40


def test_an_invalid_hub_name_is_refused(server: HubServer) -> None:
    with pytest.raises(WeightsError, match=r"no file matches config.json.*Net_fold0.pth"):
        hub.resolve(f"hf-hub:{REPO}/{FOLDER}@main")
    with pytest.raises(WeightsError, match="no such revision"):
        hub.resolve(f"hf-hub:{REPO}@other")
    with pytest.raises(WeightsError, match="ichprog fetch hf-hub:org/repo@v1"):
        hub.resolve("hf-hub:org/repo@v1", offline=True)
    for name in (f"hf-hub:{REPO}", "hf-hub:repo@main", "hf-hub:", "somewhere/else", f"hf-hub:{REPO}@"):
        with pytest.raises(UnknownNameError, match=r"hf-hub:org/repo\[/folder\]@revision"):
            hub.resolve(name)
    (published(server).parent / "config.json").write_text('{"name": "half a spec"}')
    server.refs["main"] = "1" * 40  # a commit's files never change
    with pytest.raises(SpecError, match="Missing key"):
        hub.resolve(f"hf-hub:{REPO}/{FOLDER}@main")


def test_safetensors_in_a_folder_are_not_copied(tmp_path: Path, cache: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    write_config(tmp_path, format="safetensors", keys={})
    spec, directory = hub.resolve(f"local-dir:{tmp_path}")
    assert (spec.weights.repo, spec.weights.revision, spec.weights.folder) == (None, None, "")
    digest = sha256(tmp_path / "model.safetensors")
    file = hub.WeightFile(0, tmp_path / "model.safetensors", digest, str(tmp_path / "model.safetensors"), digest)
    assert hub.weights(spec, directory=directory) == [file]
    assert not cache.exists()
    pinned = replace(spec, weights=replace(spec.weights, sha256={"model.safetensors": "0" * 64}))
    with pytest.raises(WeightsError, match=digest):
        hub.weights(pinned, directory=directory)


def test_pickles_in_a_folder_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    for fold in (0, 1):
        torch.save({**STATE, "head.3.bias": torch.full((1,), fold)}, tmp_path / f"Net_fold{fold}.pth")
    spec, directory = hub.resolve(f"local-dir:{tmp_path}")
    first, second = hub.weights(spec, directory=directory)
    assert first.source == str(tmp_path / "Net_fold0.pth")
    assert first.source_sha256 == sha256(tmp_path / "Net_fold0.pth")
    assert int(safetensors.torch.load_file(second.path)["heads.outcome.bias"]) == 1
    monkeypatch.setattr(torch, "load", None)
    assert hub.weights(spec, 1, directory=directory) == [second]
    assert [cached.is_valid for cached in hub.cached_files()] == [True, True]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rf"{tmp_path} has no `config\.json`.*model\.safetensors.*fold<K>\.pth"):
        hub.resolve(f"local-dir:{tmp_path}")
    with pytest.raises(SpecError, match=rf"{tmp_path}/nowhere is not a folder.*`config\.json`.*model\.safetensors"):
        hub.resolve(f"local-dir:{tmp_path}/nowhere")
    spec = make_spec(repo=None, revision=None, folder="")
    with pytest.raises(WeightsError, match="Give its folder"):
        hub.weights(spec)
    with pytest.raises(WeightsError, match=r"fold<K>\.pth"):
        hub.weights(spec, directory=tmp_path)
    with pytest.raises(WeightsError, match="cannot be read"):
        hub.weights(spec, directory=tmp_path / "nowhere")


# --- a model by its name


@pytest.fixture
def registered() -> Iterator[ModelSpec]:
    spec = make_spec()
    zoo.register_model(spec)
    yield spec
    zoo.unregister_model(spec.name)


def test_a_zoo_model_is_fetched_by_its_name(server: HubServer, registered: ModelSpec, tmp_path: Path) -> None:
    torch.save(STATE, published(server, "Net_fold3.pth"))
    spec, files = hub.fetch(registered.name)
    assert spec == registered
    assert files == hub.weights(registered)
    server.requests.clear()
    assert hub.fetch(registered.name, fold=3, offline=True) == (registered, files[1:])
    assert server.requests == []
    with pytest.raises(WeightsError, match=r"`ichprog fetch tiny\.outcome`"):
        hub.fetch(registered.name, cache_dir=tmp_path / "other", offline=True)
    with pytest.raises(UnknownNameError, match=r"fold .* '1'.*0, 3"):
        hub.fetch(registered.name, fold=1)
    with pytest.raises(UnknownNameError, match=r"Did you mean tiny\.outcome.*`ichprog models`"):
        hub.fetch("tiny.outcomes")


def test_weights_of_a_zoo_model_may_be_stored_with_its_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(repo=None, revision=None, folder="tiny", format="safetensors", keys={})
    (tmp_path / "tiny.outcome.json").write_text(json.dumps(spec.to_dict()))
    (tmp_path / "tiny").mkdir()
    safetensors.torch.save_file(STATE, tmp_path / "tiny" / "fold0.safetensors")
    entry = Entry("model", spec.name, "example", "1", tmp_path / "tiny.outcome.json")
    monkeypatch.setattr(zoo, "entries", lambda: [entry])
    found, [file] = hub.fetch(spec.name)
    assert found == spec
    assert file.path == tmp_path / "tiny" / "fold0.safetensors"


@pytest.mark.parametrize(
    "name", ["weights/model", "./weights", "~/weights", "..", r"C:\weights", "here", "org/repo@main"]
)
def test_a_bare_path_is_refused_with_both_spellings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UnknownNameError, match=r"local-dir:PATH.*hf-hub:org/repo\[/folder\]@revision"):
        hub.fetch(name)
    with pytest.raises(UnknownNameError, match="`ichprog models`"):
        hub.fetch("nowhere")


@pytest.mark.usefixtures("server")
def test_a_zoo_name_wins_over_a_folder_of_that_name(
    registered: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / registered.name).mkdir()
    assert hub.fetch(registered.name)[0] == registered


def test_a_hub_name_is_fetched_with_its_spec(server: HubServer) -> None:
    write_config(published(server).parent, repo=None, revision=None, folder="")
    spec, [file] = hub.fetch(f"hf-hub:{REPO}/{FOLDER}@main")
    assert (spec.weights.repo, spec.weights.revision, spec.weights.folder) == (REPO, COMMIT, FOLDER)
    assert file.source == f"hf-hub:{REPO}/{FOLDER}/{FILE}@{COMMIT}"
    server.requests.clear()
    assert hub.fetch(f"hf-hub:{REPO}/{FOLDER}@main", offline=True) == (spec, [file])
    assert server.requests == []
    with pytest.raises(UnknownNameError, match="revision is required"):
        hub.fetch(f"hf-hub:{REPO}/{FOLDER}")


def test_a_folder_is_used_in_place(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    write_config(tmp_path, format="safetensors", keys={})
    spec, [file] = hub.fetch(f"local-dir:{tmp_path}", offline=True)
    assert spec.weights.repo is None
    assert file.path == tmp_path / "model.safetensors"
    with pytest.raises(SpecError, match="is not a folder"):
        hub.fetch(f"local-dir:{tmp_path}/nowhere")


def test_importing_the_hub_imports_no_heavy_package() -> None:
    code = "import sys, ichprog.hub; print({'torch', 'huggingface_hub', 'safetensors', 'filelock'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.usefixtures("server")
def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    hub.weights(make_spec())
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.usefixtures("server")
def test_fetching_and_converting_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ichprog"):
        hub.weights(make_spec())
    assert [record.getMessage().split()[0] for record in caplog.records] == ["Downloading", "Fetching", "Converted"]
