"""A folder of a repository on the Hub, through the Hub's own client, telling what kind of trouble there was."""

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ichprog.errors import WeightsError
from ichprog.hub.cache import AGAIN, Entry

_KNOCK = 3.0  # seconds in which an endpoint shows that it is alive
_PATIENCE = 10.0  # seconds in which it answers a question


class HubUnreachableError(WeightsError):
    """There is no network, or there shall be none: what is in the cache must do."""


@dataclass
class Repository:
    """A folder of a repository on the Hub. The first use of `client` is the first touch of the network."""

    repo: str
    revision: str
    folder: str
    name: str  # what the user calls the model
    offline: bool

    def __post_init__(self) -> None:
        self.folder = self.folder.strip("/")
        parts = {*self.repo.split("/"), *self.folder.split("/")}
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) or parts & {".", ".."}:
            raise WeightsError(
                f"{self.label}: is no place on the Hub; those look like hf-hub:org/repo/folder@revision."
            )

    @property
    def label(self) -> str:
        """The folder as a name of a model."""
        return f"hf-hub:{PurePosixPath(self.repo, self.folder)}@{self.revision}"

    @property
    def endpoint(self) -> str:
        """The Hub, or the mirror of it that HF_ENDPOINT names."""
        from huggingface_hub import constants

        return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT

    def refuse_offline(self, missing: str) -> None:
        """Says no where the network shall not be touched.

        Args:
            missing: What it would be needed for.

        Raises:
            HubUnreachableError: The network shall not be touched.
        """
        from huggingface_hub import constants

        said = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "TRUE", "YES"} or constants.HF_HUB_OFFLINE
        if self.offline or said:
            raise HubUnreachableError(
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

    def commit(self) -> str:
        """The commit that the revision is at now."""
        return str(self.info().sha)

    def info(self) -> Any:
        """What the client says of the repository, its files included."""
        with self.asking(self.label):
            # Of the client's ways to list files the one that has a time limit and does not ask again and again.
            return self.client.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=_PATIENCE)

    def listing(self) -> dict[str, Entry]:
        """The published files of the folder, by name."""
        files, inside, folder = self.info().siblings or [], {}, PurePosixPath(self.folder)
        if any(file.size is None for file in files):  # some mirrors leave sizes and checksums out of that answer
            with self.asking(self.label):
                tree = self.client.list_repo_tree(self.repo, self.folder or None, revision=self.revision)
                files = [file for file in tree if hasattr(file, "size")]
        for file in files:
            if (path := PurePosixPath(file.rfilename)).parent == folder:
                source = f"hf-hub:{self.repo}/{path}@{self.revision}"
                inside[path.name] = Entry(source, file.size, file.blob_id, file.lfs.sha256 if file.lfs else None)
        if not inside:
            folders = sorted({str(PurePosixPath(file.rfilename).parent) for file in files})
            raise WeightsError(f"{self.label}: the repository has no such folder. It has: {folders}.")
        return inside

    def download(self, key: str, scratch: Path) -> Path:
        """Brings one file of the folder into `scratch`."""
        from huggingface_hub.utils.tqdm import silent_tqdm

        with self.asking(f"{self.label}: {key}"):
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
                    "a proxy or a login page of the network answers in its place."
                )
            elif isinstance(cause, OSError) and not isinstance(cause, TimeoutError):
                trouble = f"what arrived has another size than what was published ({said}). {AGAIN}"
            else:
                how = "did not answer in time" if "Timeout" in kind else "broke off"
                how = "cannot be reached" if kind.startswith("Connect") else how
                raise HubUnreachableError(
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
