"""Predict the head CTs of a picture archive (PACS), and send results to it."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog import zoo
from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, brain, loading, model_option, parse_assignments, print_json, with_options
from ichprog.cli.scan_runs import load_model

if TYPE_CHECKING:
    from ichprog.model import Model
    from ichprog.pacs import Archive

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_archive = [
    click.argument("address", metavar="ARCHIVE"),
    click.option("--aet", default="ICHPROG", show_default=True, help="Application entity title of this client."),
    click.option("--retrieve", type=click.Choice(["get", "move"]), default="get", show_default=True,
                 help="Fetch by C-GET or C-MOVE. For C-MOVE, the archive must know this client."),
    click.option("--receive-port", type=int, default=11112, show_default=True, help="Port at which C-MOVE receives."),
    click.option("--tls-ca", type=_FILE,
                 help="Certificates that may sign that of the archive, in PEM format. The system's by default."),
    click.option("--tls-cert", type=_FILE, help="Certificate of this client, in PEM format."),
    click.option("--tls-key", type=_FILE, help="Private key of the certificate."),
]  # fmt: skip
_match = click.option(
    "--match", multiple=True, metavar="KEYWORD=VALUE",
    help="Attribute that studies must match; repeatable. Example: StudyDate=20240101-.",
)  # fmt: skip
_models = [
    model_option,
    *loading,
    brain,
    click.option("--haemorrhage", is_flag=True, help="Find the haemorrhage of each scan as well."),
    click.option(
        "--explain",
        "methods",
        multiple=True,
        metavar="METHOD",
        help="Saliency method; repeatable. Maps of the model's first task are stored as well.",
        shell_complete=completion.plugins("saliency"),
    ),
]


@click.group(epilog=examples("pacs find dicom://PACS@pacs.example.org:11112"))
def pacs() -> None:
    """Predict the head CTs of a picture archive (PACS). ARCHIVE is dicom://AET@HOST:PORT or an address of DICOMweb."""


def _with_archive(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of an archive, and pass it the client."""
    import functools

    @functools.wraps(command)
    def wrapped(
        address: str,
        aet: str,
        retrieve: str,
        receive_port: int,
        tls_ca: Path,
        tls_cert: Path,
        tls_key: Path,
        **others: Any,
    ) -> Any:
        from ichprog.pacs import TlsFiles, open_archive

        tls = TlsFiles(tls_ca, tls_cert, tls_key)
        archive = open_archive(address, aet=aet, retrieve=retrieve, receive_port=receive_port, tls=tls)
        return command(archive=archive, **others)

    return with_options(_archive)(wrapped)


@pacs.command(cls=Command, epilog=examples("pacs find dicom://PACS@pacs.example.org:11112 --match StudyDate=20240101-"))
@_with_archive
@_match
@as_json
def find(archive: "Archive", match: tuple[str, ...], as_json: bool) -> None:
    """List the studies with a CT in ARCHIVE, with their identifiers."""
    import dataclasses

    found = archive.find(_attributes(match))
    if as_json:
        print_json([dataclasses.asdict(study) for study in found])
        return
    for study in found:
        click.echo(f"{study.uid}  {study.date}  {study.instances} images  {study.description}")


@pacs.command(cls=Command, epilog=examples("pacs fetch https://pacs.example.org/dicom-web 1.2.3 -o images"))
@_with_archive
@click.argument("study")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the images.")
@as_json
def fetch(archive: "Archive", study: str, output: Path, as_json: bool) -> None:
    """Fetch the CT images of the STUDY with this identifier."""
    images = archive.fetch(study, output)
    if as_json:
        print_json({"images": images, "folder": str(output)})
    else:
        click.echo(f"{images} images in {output}")


@pacs.command(cls=Command, epilog=examples("pacs send dicom://PACS@pacs.example.org:11112 objects/report.dcm"))
@_with_archive
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE...")
@as_json
def send(archive: "Archive", files: tuple[Path, ...], as_json: bool) -> None:
    """Send DICOM files, such as those of `ichprog predict --dicom-out`, to ARCHIVE."""
    from pydicom import dcmread

    archive.store(map(dcmread, files))
    if as_json:
        print_json({"stored": len(files)})
    else:
        click.echo(f"{len(files)} objects stored.")


@pacs.command(
    cls=Command,
    interrupted="Stored results stay in the archive. Repeat the command with the remaining studies.",
    epilog=examples("pacs predict dicom://PACS@pacs.example.org:11112 1.2.3 --haemorrhage"),
)
@_with_archive
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@with_options(_models)
@as_json
@click.pass_context
def predict(ctx: click.Context, /, archive: "Archive", studies: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Fetch each STUDY, predict its head CT, and store the results in ARCHIVE."""
    from ichprog.errors import ScanError
    from ichprog.pseudonyms import pseudonym

    answer, model = _answerer(archive, **options)
    has_failed = False
    for study in studies:
        try:
            prediction = answer(study)
        except ScanError as error:
            has_failed = True
            click.echo(f"study {pseudonym(study)}  FAILED  {error}", err=True)
            continue
        if as_json:
            click.echo(json.dumps(prediction.to_dict()))
            continue
        labels = "  ".join(
            f"{name} {task.label} {task.probabilities[task.label]:.3f}" for name, task in prediction.items()
        )
        click.echo(f"study {pseudonym(study)}  {labels}  stored")
    click.echo(model.spec.notice, err=True)
    ctx.exit(1 if has_failed else 0)


@pacs.command(
    cls=Command, epilog=examples("pacs watch dicom://PACS@pacs.example.org:11112 --journal answered.jsonl --port 8080")
)
@_with_archive
@_match
@click.option(
    "--journal", type=click.Path(path_type=Path), required=True, help="SQLite file that remembers answered studies."
)
@click.option("--interval", type=float, default=30.0, show_default=True, help="Seconds between two queries.")
@click.option(
    "--settle",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds without a new image after which a study is complete.",
)
@click.option(
    "--queue", type=click.IntRange(1), default=32, show_default=True, help="Largest number of waiting studies."
)
@click.option("--port", type=int, help="Port on the loopback for /health and /metrics; none by default.")
@click.option("--retry-failed", is_flag=True, help="Try the failed studies of the journal again.")
@with_options(_models)
@as_json
def watch(
    archive: "Archive", match: tuple[str, ...], journal: Path, interval: float, settle: float, queue: int,
    port: int | None, retry_failed: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer every new head CT in ARCHIVE until the command is stopped. It continues when it is repeated."""
    from contextlib import nullcontext

    from ichprog.pacs import Watch, open_journal
    from ichprog.pacs.endpoint import serve

    attributes = _attributes(match)
    stop = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stop.set())
    with open_journal(journal) as opened:
        if retry_failed:
            opened.retry_failed()
        answer, model = _answerer(archive, **options)
        running = Watch(archive, answer, opened, attributes, queue_size=queue, settle_s=settle)
        with nullcontext(None) if port is None else serve(running, port) as bound:
            address = None if bound is None else f"http://127.0.0.1:{bound}"
            if as_json:
                print_json({"journal": str(journal), "health_and_metrics": address})
            at = "" if address is None else f" Health and metrics: {address}."
            click.echo(f"Watching.{at} {model.spec.notice}", err=True)
            running.run(stop, interval_s=interval)


def _attributes(match: tuple[str, ...]) -> dict[str, str]:
    return {key: str(value) for key, value in parse_assignments("--match", match, "StudyDate=20240101-").items()}


def _answerer(
    archive: "Archive", name: str, brain: str, haemorrhage: bool, methods: tuple[str, ...], **loading: Any
) -> "tuple[Callable[[str], Any], Model]":
    """Return a function that answers a study, and the model."""
    import functools

    from ichprog.pacs import answer_study

    model = load_model(name, brain, loading)
    detector = load_model(zoo.DETECTOR, brain, {**loading, "fold": None}) if haemorrhage else False
    answer = functools.partial(answer_study, archive, model=model, haemorrhage=detector, methods=methods, brain=brain)
    return answer, model
