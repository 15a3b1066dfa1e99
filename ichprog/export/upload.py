"""A run as a folder on the Hub."""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ichprog
from ichprog import hub, networks
from ichprog.errors import UnknownNameError, WeightsError
from ichprog.export.model_card import card, config, record
from ichprog.hub import WeightFile
from ichprog.hub.client import HubUnreachableError, Repository
from ichprog.spec import ModelSpec

_LOG_IN = "Run `hf auth login` with a token that may write there, or set HF_TOKEN to one."
_REFUSALS: dict[int | None, str] = {  # where they mean something else than while something is fetched
    401: f"the token is not known there. {_LOG_IN}",
    403: f"the token may not write there. {_LOG_IN}",
    409: "somebody else publishes there at this moment. Look there and try again.",
    412: "somebody else published there meanwhile. Look there and try again.",
}


@dataclass(frozen=True)
class Parcel:
    """All that is published of a run, checked.

    Attributes:
        repo: Where it goes.
        spec: The model, with the checksum of every file of weights.
        weights: The files of weights.
        card: The model card.
    """

    repo: str
    spec: ModelSpec
    weights: tuple[WeightFile, ...]
    card: str

    @property
    def files(self) -> dict[str, bytes | Path]:
        """What is sent, by its name on the Hub."""
        return {
            "README.md": self.card.encode(),
            "config.json": config(self.spec).encode(),
            **{file.path.name: file.path for file in self.weights},
        }

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is sent."""
        return {n: c.stat().st_size if isinstance(c, Path) else len(c) for n, c in self.files.items()}


def pack(run: str | Path, repo: str) -> Parcel:
    """Checks what would be published of a run, and writes its model card; nothing is sent.

    It is the model's description, its weights and the card. What else lies in the folder stays there: a run's record
    and its tables name patients.

    Args:
        run: The folder of a run, or any that is a model by `local-dir:PATH`.
        repo: The repository, "org/name".

    Raises:
        UnknownNameError: That is no name of a repository.
        SpecError: The folder holds no model.
        WeightsError: Weights are missing, are not those that were described, or do not fit.
        PluginError: A plugin of the model cannot be loaded.
    """
    _refuse_unless_repository(repo)
    folder = Path(str(run).removeprefix("local-dir:")).expanduser()
    spec, weights = hub.fetch(f"local-dir:{folder}")
    if spec.weights.format != "safetensors" or spec.weights.keys:
        raise WeightsError(
            f"{folder}: its weights are in another project's form. Published are safetensors files with the keys of "
            "the network that the description builds, as a run leaves them."
        )
    sums = {file.path.name: file.sha256 for file in weights}
    if gone := sorted(spec.weights.sha256.keys() - sums.keys()):
        raise WeightsError(
            f"{folder}: the model's `weights.sha256` names {', '.join(gone)}, and the folder has {', '.join(sums)}. "
            "Put the missing files there, or take them off the description."
        )
    for file in weights:
        networks.load(spec, file.path)
    spec = replace(spec, weights=replace(spec.weights, folder="", sha256=sums))
    return Parcel(repo, spec, tuple(weights), card(spec, repo, record(folder, weights)))


def publish(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
    progress: bool = False,
) -> str:
    """Puts a run on the Hub, in one commit, with a model card. What is there stays what it was at earlier commits.

    Args:
        run: The folder of a run, or any that is a model by `local-dir:PATH`; of it goes what `pack` says.
        repo: The repository, "org/name"; made where there is none.
        private: Whether a repository that is made is private. Where not, it is as its organisation has them.
        message: The commit's message.
        token: A token with the right to write; the one of `hf auth login` or HF_TOKEN where not given.
        progress: Whether bars are shown on standard error.

    Returns:
        The model's name from now on, `hf-hub:org/name@commit`.

    Raises:
        UnknownNameError: That is no name of a repository.
        SpecError: The folder holds no model.
        WeightsError: Its weights are not as they should be, or the Hub does not take them.
        PluginError: A plugin of the model cannot be loaded.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    parcel, place = pack(run, repo), Repository(repo, "main", "", repo, offline=False)
    try:
        place.refuse_offline("offline")
    except HubUnreachableError:
        raise WeightsError(f"{repo}: HF_HUB_OFFLINE is set, so nothing is published. Unset it first.") from None
    if not (token := token or get_token()):
        raise WeightsError(f"{repo}: the Hub takes nothing without a token. {_LOG_IN}")
    said = message or f"{parcel.spec.name}, {len(parcel.weights)} folds, by ichprog {ichprog.__version__}"
    with _sending(place, repo), _bars(progress), _quiet("huggingface_hub"):
        if not place.client.repo_exists(repo, token=token):
            place.client.create_repo(repo, private=private or None, exist_ok=True, token=token)
        there = place.client.model_info(repo, token=token)
        names = [file.rfilename for file in there.siblings or []]
        # A fold that this run has not would answer together with those it has.
        stale = [n for n in names if re.fullmatch(r"[^/]+\.(safetensors|pth)", n) and n not in parcel.files]
        commit = place.client.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, content) for name, content in parcel.files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=said,
            parent_commit=there.sha,
            token=token,
        )
    return f"hf-hub:{repo}@{commit.oid}"


def _refuse_unless_repository(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its documented place

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UnknownNameError("repository", repo, ["org/name"], f"{error}") from None
    if "/" not in repo:
        raise UnknownNameError("repository", repo, ["org/name"], "A user's or an organisation's name comes first.")


@contextmanager
def _sending(place: Repository, repo: str) -> Iterator[None]:
    """Tells what kind of trouble there was while something was sent."""
    what = f"{repo}: nothing was published"
    try:
        yield
    except Exception as error:
        # The client wraps what befell an upload.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if said := _REFUSALS.get(status):
            raise WeightsError(f"{what}: HTTP {status} from {place.endpoint}: {said}") from error
        try:
            with place.map_exceptions(what):
                raise cause
        except HubUnreachableError:
            raise WeightsError(
                f"{what}: {place.endpoint} cannot be reached or broke off ({type(cause).__name__}: {cause}). Check the "
                "network, its proxy and HF_ENDPOINT, then try again."
            ) from error


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Has the Hub's client show bars or not, and be as it was afterwards."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not shown and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    with ExitStack() as after:
        if hide:
            disable_progress_bars()
            after.callback(enable_progress_bars)
        yield


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Has a library's logger say errors alone."""
    its = logging.getLogger(logger)
    level = its.level
    its.setLevel(logging.ERROR)
    try:
        yield
    finally:
        its.setLevel(level)
