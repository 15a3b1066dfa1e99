"""Publish a model folder on the Hugging Face Hub."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ichprog
from ichprog import hub, networks
from ichprog.errors import SpecError, UnknownNameError, WeightsError
from ichprog.export.model_card import build_card, config_json, read_run_summary
from ichprog.hub import WeightFile
from ichprog.hub.client import HubUnreachableError, Repository
from ichprog.spec import ModelSpec

_LOG_IN = "Run `hf auth login` with a token that has write access, or set HF_TOKEN to one."
_REFUSALS: dict[int | None, str] = {  # statuses that mean something else for an upload than for a download
    401: f"the Hub does not know the token. {_LOG_IN}",
    403: f"the token has no write access. {_LOG_IN}",
    409: "another upload to the repository is running. Check the repository and try again.",
    412: "the repository changed during the upload. Check the repository and try again.",
}


@dataclass(frozen=True)
class HubUpload:
    """Everything that is published of a run, verified.

    Attributes:
        repo: Repository, "org/name".
        spec: The model, with the checksum of every weight file.
        weights: Weight files.
        card: Model card in Markdown.
        folder: Folder of the run.
    """

    repo: str
    spec: ModelSpec
    weights: tuple[WeightFile, ...]
    card: str
    folder: Path

    @property
    def files(self) -> dict[str, bytes | Path]:
        """Return the content or path of each published file by its name on the Hub."""
        return {
            "README.md": self.card.encode(),
            "config.json": config_json(self.spec).encode(),
            **{file.path.name: file.path for file in self.weights},
        }

    def require_written(self) -> None:
        """Check that the authors have written every text that only they can write.

        Raises:
            SpecError: A text is still to be written; the message names the file and the fields.
        """
        fields = self.spec.unwritten
        if fields:
            raise SpecError(
                f"{self.folder}: nothing was published, because {len(fields)} texts of the model are to be written: "
                f"{', '.join(fields)}. Open {self.folder / 'config.json'} and replace the text of each of these keys. "
                "The card is built from them; `ichprog publish --dry-run` shows it."
            )

    def sizes(self) -> dict[str, int]:
        """Return the size of each published file in bytes."""
        return {n: c.stat().st_size if isinstance(c, Path) else len(c) for n, c in self.files.items()}


def prepare_upload(run: str | Path, repo: str) -> HubUpload:
    """Verify what would be published of a run and write its model card, without sending anything.

    The upload consists of the spec, the weights and the model card. Other files of the folder are never published,
    because the record and the tables of a run name patients.

    Args:
        run: Folder of a run, or any folder that can be loaded with `local-dir:PATH`.
        repo: Repository, "org/name".

    Raises:
        UnknownNameError: The repository name is invalid.
        SpecError: The folder contains no model.
        WeightsError: Weights are missing, differ from the checksums in the spec, or do not fit the network.
        PluginError: A plugin of the model cannot be loaded.

    Examples:
        ```python
        from ichprog.export import prepare_upload

        print(prepare_upload("runs/mine", "org/name").sizes())
        ```
    """
    _check_repository_name(repo)
    folder = Path(str(run).removeprefix("local-dir:")).expanduser()
    spec, weights = hub.fetch(f"local-dir:{folder}")
    if spec.weights.format != "safetensors" or spec.weights.keys:
        raise WeightsError(
            f"{folder}: the weights have the format of another project. Expected safetensors files with the keys of "
            "this project's network, as training writes them."
        )
    checksums = {file.path.name: file.sha256 for file in weights}
    if missing := sorted(spec.weights.sha256.keys() - checksums.keys()):
        raise WeightsError(
            f"{folder}: the model's `weights.sha256` lists {', '.join(missing)}, but the folder has only "
            f"{', '.join(checksums)}. Restore the missing files, or remove them from the spec."
        )
    for file in weights:
        networks.load(spec, file.path)
    spec = replace(spec, weights=replace(spec.weights, folder="", sha256=checksums))
    return HubUpload(repo, spec, tuple(weights), build_card(spec, repo, read_run_summary(folder, weights)), folder)


def publish(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
    progress: bool = False,
) -> str:
    """Publish a run on the Hub in one commit, with a model card. Earlier commits stay unchanged.

    Args:
        run: Folder of a run, or any folder that can be loaded with `local-dir:PATH`.
        repo: Repository, "org/name". It is created if it does not exist.
        private: Whether a new repository is private. Otherwise the default of its organisation applies.
        message: Message of the commit.
        token: Token with write access. By default the token of `hf auth login` or HF_TOKEN.
        progress: Whether to show progress bars on standard error.

    Returns:
        The name of the published model, `hf-hub:org/name@commit`.

    Raises:
        UnknownNameError: The repository name is invalid.
        SpecError: The folder contains no model, or a text of the model is still to be written.
        WeightsError: The weights are invalid, or the Hub refuses them.
        PluginError: A plugin of the model cannot be loaded.

    Examples:
        ```python
        from ichprog.export import publish

        name = publish("runs/mine", "org/name", private=True)
        ```
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    upload, repository = prepare_upload(run, repo), Repository(repo, "main", "", repo, offline=False)
    upload.require_written()
    try:
        repository.refuse_offline("publishing needs the network")
    except HubUnreachableError:
        raise WeightsError(f"{repo}: nothing was published, because HF_HUB_OFFLINE is set. Unset it first.") from None
    if not (token := token or get_token()):
        raise WeightsError(f"{repo}: nothing was published, because there is no token. {_LOG_IN}")
    message = message or f"{upload.spec.name}, {len(upload.weights)} folds, by ichprog {ichprog.__version__}"
    with _map_upload_errors(repository), _progress_bars(progress), _errors_only("huggingface_hub"):
        if not repository.client.repo_exists(repo, token=token):
            repository.client.create_repo(repo, private=private or None, exist_ok=True, token=token)
        current = repository.client.model_info(repo, token=token)
        names = [file.rfilename for file in current.siblings or []]
        # Weights of folds that this run does not have would be loaded together with its own.
        stale = [n for n in names if re.fullmatch(r"[^/]+\.(safetensors|pth)", n) and n not in upload.files]
        commit = repository.client.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, content) for name, content in upload.files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=message,
            parent_commit=current.sha,
            token=token,
        )
    return f"hf-hub:{repo}@{commit.oid}"


def _check_repository_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its documented place

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UnknownNameError("repository", repo, ["org/name"], f"{error}") from None
    if "/" not in repo:
        raise UnknownNameError("repository", repo, ["org/name"], "Begin with the name of a user or organisation.")


@contextmanager
def _map_upload_errors(repository: Repository) -> Iterator[None]:
    """Turn the exceptions of an upload into `WeightsError` with a cause and a remedy."""
    subject = f"{repository.repo}: nothing was published"
    try:
        yield
    except Exception as error:
        # The client wraps errors of an upload in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if refusal := _REFUSALS.get(status):
            raise WeightsError(f"{subject}: HTTP {status} from {repository.endpoint}: {refusal}") from error
        try:
            with repository.map_exceptions(subject):
                raise cause
        except HubUnreachableError:
            raise WeightsError(
                f"{subject}: {repository.endpoint} cannot be reached or closed the connection "
                f"({type(cause).__name__}: {cause}). Check the network, its proxy and HF_ENDPOINT, then try again."
            ) from error


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of the Hub's client, and restore its setting afterwards."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # their documented place
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    by_environment = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    with ExitStack() as stack:
        if not shown and not by_environment and not are_progress_bars_disabled():
            disable_progress_bars()
            stack.callback(enable_progress_bars)
        yield


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Raise the level of a logger to ERROR, and restore it afterwards."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
