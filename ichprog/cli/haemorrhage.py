"""Find and measure haemorrhages."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog import zoo
from ichprog.cli.options import as_json, brain, loading, with_options
from ichprog.cli.scans import (
    ScoreComputer,
    find_scans,
    format_haemorrhage,
    format_scores,
    load_model,
    output,
    print_limits,
    print_notice,
    print_warnings,
    read_clinical,
    save_image,
    scans_argument,
    score_options,
    with_progress,
)
from ichprog.errors import ScanError

if TYPE_CHECKING:
    from ichprog.model import Model
    from ichprog.results import Haemorrhage
    from ichprog.sources import ScanSource


@click.command()
@scans_argument
@click.option(
    "-m", "--model", "name", default=zoo.DETECTOR, show_default=True,
    help="A model with a task that has a mask, by a name as in `ichprog predict`.",
)  # fmt: skip
@with_options(loading)
@brain
@output
@with_options(score_options)
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the masks of haemorrhages.")
@as_json
@click.pass_context
def haemorrhage(
    ctx: click.Context,
    /,
    scans: tuple[Path, ...],
    name: str,
    brain: Any,
    output: Path | None,
    scores: bool,
    clinical: tuple[str, ...],
    masks: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Find the haemorrhage in every SCAN: probability, volumes with intervals, kind and place.

    SCAN is a NIfTI file, a DICOM folder or a .zip of one, a folder of scans, or a table of patients (.csv).
    """
    from ichprog.results import with_scores

    sources = find_scans(scans)
    if clinical and not scores:
        raise click.UsageError("--clinical needs --scores.")
    computer = ScoreComputer(sources, read_clinical(clinical, sources), is_requested=scores)
    model = load_model(name, brain, loading)
    has_failed = False
    with ExitStack() as stack:
        add = stack.enter_context(_results_file(output, model, sources, with_scores=scores))
        for source, stem, (found, examined) in with_progress(sources, model.haemorrhage_iter(sources, brain=brain)):
            computed = computer.scores(source, found)
            add(found, computed)
            if as_json:
                click.echo(json.dumps(with_scores(found, computed)))
            else:
                click.echo(_format(found))
                if computed is not None:
                    click.echo(format_scores(computed))
                print_warnings(found.scan, found.warnings)
            if isinstance(examined, ScanError):
                has_failed = True
            elif masks:
                save_image(found.mask, masks / f"{stem}_haemorrhage.nii.gz")
    if not as_json:
        print_limits(model)
    print_notice(model)
    ctx.exit(1 if has_failed else 0)


def _results_file(
    output: Path | None, model: "Model", sources: "list[ScanSource]", *, with_scores: bool
) -> "AbstractContextManager[Callable[..., None]]":
    """Open the file of results; without a path, return a function that adds nothing."""
    from ichprog.clinical_scores import SCORE_COLUMNS
    from ichprog.results import haemorrhage_file
    from ichprog.sources import patient_of

    if output is None:
        return nullcontext(lambda *_: None)
    has_patients = any(patient_of(source) is not None for source in sources)
    columns = SCORE_COLUMNS if with_scores else ()
    return haemorrhage_file(output, model.spec, with_patients=has_patients, score_columns=columns)


def _format(found: "Haemorrhage") -> str:
    """Return one line: the patient, the scan, and the haemorrhage or the error."""
    name = found.scan if found.patient is None else f"{found.patient}  {found.scan}"
    if found.error is not None:
        return f"{name}  FAILED  {found.error['message']}"
    return f"{name}  {format_haemorrhage(found)}"
