"""Find and measure haemorrhages."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog import zoo
from ichprog.cli.options import as_json, brain, loading, with_options
from ichprog.cli.scans import (
    ScoreComputer,
    check_resume,
    dicom_options,
    find_scans,
    format_haemorrhage,
    format_scores,
    key_of,
    load_model,
    open_results,
    output,
    print_limits,
    print_line,
    print_notice,
    print_warnings,
    read_clinical,
    resume_options,
    save_image,
    scans_argument,
    score_options,
    take_shard,
    with_progress,
)
from ichprog.errors import ScanError

if TYPE_CHECKING:
    from ichprog.model import Model
    from ichprog.result_files import ResultsFile
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
@with_options(dicom_options)
@output
@with_options(resume_options)
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
    study: str | None,
    series: str | None,
    output: Path | None,
    resume: bool,
    retry_failed: bool,
    overwrite: bool,
    shard: str | None,
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

    check_resume(output, resume=resume, retry_failed=retry_failed, overwrite=overwrite)
    sources = take_shard(find_scans(scans, study=study, series=series), shard)
    if clinical and not scores:
        raise click.UsageError("--clinical needs --scores.")
    given = read_clinical(clinical, sources)
    computer = ScoreComputer(sources, given, is_requested=scores)
    model = load_model(name, brain, loading)
    has_failed, has_files = False, any((output, masks))
    settings = {
        "weights": [file.sha256 for file in model.weights], "precision": model.precision, "brain": str(brain),
        "scores": given if scores else None,
    }  # fmt: skip
    choices = {"resume": resume, "retry_failed": retry_failed, "overwrite": overwrite}
    opened = None if output is None else _results_file(output, model, sources, settings, choices, with_scores=scores)
    with open_results(opened, sources) as (file, todo):
        results = model.haemorrhage_iter(todo, brain=brain)
        for source, stem, (found, examined) in with_progress(sources, results, todo):
            computed = computer.scores(source, found)
            if as_json:
                print_line(json.dumps(with_scores(found, computed)), has_files=has_files)
            else:
                lines = [_format(found)] if computed is None else [_format(found), format_scores(computed)]
                print_line("\n".join(lines), has_files=has_files)
                print_warnings(found.scan, found.warnings)
            if isinstance(examined, ScanError):
                has_failed = True
            elif masks:
                save_image(found.mask, masks / f"{stem}_haemorrhage.nii.gz")
            if file is not None:  # last, so that a scan with a result has its mask
                file.add(found, computed)
        has_failed |= file is not None and "failed" in file.done.values()
    if not as_json:
        print_limits(model)
    print_notice(model)
    ctx.exit(1 if has_failed else 0)


def _results_file(
    output: Path,
    model: "Model",
    sources: "list[ScanSource]",
    settings: dict[str, Any],
    choices: dict[str, bool],
    *,
    with_scores: bool,
) -> "AbstractContextManager[ResultsFile]":
    """Return the file of results, which a context opens."""
    from ichprog.clinical_scores import SCORE_COLUMNS
    from ichprog.result_files import haemorrhage_file
    from ichprog.sources import patient_of

    return haemorrhage_file(
        output,
        model.spec,
        with_patients=any(patient_of(source) is not None for source in sources),
        score_columns=SCORE_COLUMNS if with_scores else (),
        order=[key_of(source) for source in sources],
        settings=settings,
        **choices,
    )


def _format(found: "Haemorrhage") -> str:
    """Return one line: the patient, the scan, and the haemorrhage or the error."""
    name = found.scan if found.patient is None else f"{found.patient}  {found.scan}"
    if found.error is not None:
        return f"{name}  FAILED  {found.error['message']}"
    return f"{name}  {format_haemorrhage(found)}"
