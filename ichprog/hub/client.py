"""Read a folder of a repository on the Hugging Face Hub through its client, with clear errors."""

import logging
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
from ichprog.hub.cache import RETRY_HINT, Entry
from ichprog.limits import MAX_WEIGHT_BYTES

PROBE_TIMEOUT_S = 3.0  # for the first answer of an endpoint
REQUEST_TIMEOUT_S = 10.0  # for each request
_MOST_REPEATED = 2  # times that a download may receive its file, as the client continues an interrupted one
_MOST_EXTRA_BYTES = 1 << 20

_log = logging.getLogger(__name__)
_progress = logging.getLogger("ichprog.progress")  # also of the bytes of a file, as attributes of a message


class HubUnreachableError(WeightsError):
    """The network is unavailable or forbidden, so that only the cache can be used."""


@dataclass
class Repository:
    """A folder of a repository on the Hub. The network is not used before the first access to `client`.

    Attributes:
        repo: Repository, "org/name".
        revision: Commit, tag or branch.
        folder: Folder in the repository; "" for the top.
        name: Name of the model as the user wrote it, for the commands in messages.
        offline: Whether the network is forbidden.
    """

    repo: str
    revision: str
    folder: str
    name: str
    offline: bool

    def __post_init__(self) -> None:
        self.folder = self.folder.strip("/")
        parts = {*self.repo.split("/"), *self.folder.split("/")}
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) or parts & {".", ".."}:
            raise WeightsError(f"Invalid location {self.label!r}. Expected the form hf-hub:org/repo/folder@revision.")

    @property
    def label(self) -> str:
        """Return the folder as the name of a model."""
        return f"hf-hub:{PurePosixPath(self.repo, self.folder)}@{self.revision}"

    @property
    def endpoint(self) -> str:
        """Return the URL of the Hub or of the mirror in HF_ENDPOINT."""
        from huggingface_hub import HfApi

        return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(HfApi().endpoint)

    def refuse_offline(self, problem: str) -> None:
        """Raise an error if the network is forbidden.

        Args:
            problem: Why the network would be needed, as the beginning of a sentence.

        Raises:
            HubUnreachableError: The network is forbidden by `offline` or HF_HUB_OFFLINE.
        """
        from huggingface_hub import is_offline_mode

        by_environment = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "TRUE", "YES"} or is_offline_mode()
        if self.offline or by_environment:
            raise HubUnreachableError(
                f"{self.name}: {problem}. Nothing was downloaded, because "
                f"{'HF_HUB_OFFLINE is set' if by_environment else 'offline=True was given'}. With a network, run "
                f"`ichprog fetch {self.name}`."
            )

    @cached_property
    def client(self) -> Any:
        """Return the client of the Hub, after a short probe of its endpoint.

        The client itself retries for half a minute if nothing answers. A name server or firewall that drops packets
        ignores the time limit of a socket. The probe therefore runs in a thread that is abandoned after
        `PROBE_TIMEOUT_S`.
        """
        from huggingface_hub import HfApi, get_session

        response = Future[Any]()

        def probe() -> None:
            try:
                response.set_result(get_session().head(self.endpoint, timeout=PROBE_TIMEOUT_S, follow_redirects=False))
            except Exception as error:
                response.set_exception(error)

        threading.Thread(target=probe, daemon=True).start()
        response.result(PROBE_TIMEOUT_S)
        return HfApi(endpoint=self.endpoint)

    def commit(self) -> str:
        """Return the current commit of the revision."""
        return str(self.info().sha)

    def info(self) -> Any:
        """Return the client's description of the repository, including its files."""
        with self.map_exceptions(self.label):
            # Of the client's functions that list files, `model_info` alone has a time limit and does not retry.
            return self.client.model_info(
                self.repo, revision=self.revision, files_metadata=True, timeout=REQUEST_TIMEOUT_S
            )

    def listing(self) -> dict[str, Entry]:
        """Return the published files of the folder by name.

        Raises:
            WeightsError: The repository has no such folder or cannot be listed.
        """
        files, entries, folder = self.info().siblings or [], {}, PurePosixPath(self.folder)
        if any(file.size is None for file in files):  # some mirrors omit sizes and checksums here
            with self.map_exceptions(self.label):
                tree = self.client.list_repo_tree(self.repo, self.folder or None, revision=self.revision)
                files = [file for file in tree if hasattr(file, "size")]
        for file in files:
            if (path := PurePosixPath(file.rfilename)).parent == folder:
                source = f"hf-hub:{self.repo}/{path}@{self.revision}"
                entries[path.name] = Entry(source, file.size, file.blob_id, file.lfs.sha256 if file.lfs else None)
        if not entries:
            folders = sorted({str(PurePosixPath(file.rfilename).parent) for file in files})
            raise WeightsError(f"{self.label}: the repository has no such folder. Expected one of: {folders}.")
        return entries

    def download(self, key: str, scratch: Path, size: int) -> Path:
        """Download one file of the folder.

        Args:
            key: Name of the file.
            scratch: Folder to download into.
            size: Published size in bytes. A longer download is stopped, so that it does not fill the disk.

        Returns:
            Path of the downloaded file.

        Raises:
            WeightsError: The download failed, or the file is larger than published or than any weights.
        """
        from tqdm import tqdm

        if size > MAX_WEIGHT_BYTES:
            raise WeightsError(f"{self.label}: {key} has {size} bytes. At most {MAX_WEIGHT_BYTES} are downloaded.")
        received = 0

        class CountingTqdm(tqdm):  # type: ignore[misc]  # tqdm has no types
            def __init__(self, *args: Any, **options: Any) -> None:
                options.pop("name", None)  # an argument that only the client's own progress bars take
                super().__init__(*args, **{**options, "disable": True})

            def update(self, n: float | None = 1) -> None:
                nonlocal received
                received += int(n or 0)
                _progress.debug("Downloading %s", key, extra={"received": received, "size": size})
                if received > _MOST_REPEATED * size + _MOST_EXTRA_BYTES:
                    raise WeightsError(f"the download is longer than the published {size} bytes. {RETRY_HINT}")

        _log.info("Fetching %s of %s", key, self.label)
        with self.map_exceptions(f"{self.label}: {key}"):
            path = self.client.hf_hub_download(
                self.repo,
                str(PurePosixPath(self.folder, key)),
                revision=self.revision,
                local_dir=scratch,
                force_download=True,  # otherwise the client requests the metadata of a file repeatedly
                etag_timeout=REQUEST_TIMEOUT_S,
                tqdm_class=CountingTqdm,
            )
        return Path(path)

    @contextmanager
    def map_exceptions(self, subject: str) -> Iterator[None]:
        """Turn the exceptions of the client into `WeightsError` with a cause and a remedy.

        Args:
            subject: The file or folder that is requested, for messages.

        Raises:
            HubUnreachableError: The endpoint does not answer.
            WeightsError: The endpoint refuses the request or answers with wrong data.
        """
        from huggingface_hub.errors import FileMetadataError

        try:
            yield
        except WeightsError as error:
            raise type(error)(f"{subject}: {error}") from error
        except Exception as error:
            # The client wraps some errors in one whose message says only "see above".
            cause = error.__cause__ if isinstance(error, ValueError | FileNotFoundError) else None
            cause = cause or error
            kind, detail = type(cause).__name__, " ".join(str(cause).split())
            if (response := getattr(cause, "response", None)) is not None:
                status, code = response.status_code, response.headers.get("X-Error-Code", "")
                problem = f"HTTP {status} from {self.endpoint}: {_explain_status(status, code)}"
            elif isinstance(cause, OSError) and cause.errno is not None:
                raise  # an error of the disk, not of the Hub
            elif isinstance(cause, FileMetadataError | ValueError | TypeError | LookupError) or "Redirects" in kind:
                problem = (
                    f"{self.endpoint} does not answer like a Hub ({kind}: {detail}). Check HF_ENDPOINT, and whether "
                    "a proxy or a login page of the network answers instead."
                )
            elif isinstance(cause, OSError) and not isinstance(cause, TimeoutError):
                problem = f"the downloaded file has another size than the published one ({detail}). {RETRY_HINT}"
            else:
                how = "did not answer in time" if "Timeout" in kind else "closed the connection"
                how = "cannot be reached" if kind.startswith("Connect") else how
                raise HubUnreachableError(
                    f"{subject}: {self.endpoint} {how} ({kind}: {detail}). Check the network, its proxy and "
                    f"HF_ENDPOINT. After `ichprog fetch {self.name}` with a network, none is needed."
                ) from error
            raise WeightsError(f"{subject}: {problem}") from error


def _explain_status(status: int, code: str) -> str:
    """Return the meaning of an HTTP status of the Hub and a remedy."""
    if status in (401, 403):
        return (
            "the repository is gated or private, does not exist, or the token is wrong. Check the name, request access "
            "on the repository's page, then run `hf auth login` or set HF_TOKEN."
        )
    if status == 404:
        kinds = {"RepoNotFound": "repository", "RevisionNotFound": "revision", "EntryNotFound": "file"}
        return f"no such {kinds.get(code, 'repository, revision or file')}. Check the name."
    if status == 429:
        return "too many requests. Wait some minutes, or log in with `hf auth login`."
    return "the Hub reports an internal error. Try again later." if status >= 500 else "refused. Check HF_ENDPOINT."
