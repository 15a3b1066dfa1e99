"""Find and measure haemorrhages."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog import zoo
from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.compilation import ModelLoader
from ichprog.cli.options import as_json, brain, loading, with_options
from ichprog.cli.scan_runs import (
    ResultsOptions,
    ScoreComputer,
    dicom_options,
    find_scans,
    format_haemorrhage,
    format_scores,
    format_warnings,
    has_patients,
    output,
    print_limits,
    print_notice,
    print_outputs,
    read_clinical,
    resume_options,
    save_image,
    scans_argument,
    score_options,
    take_shard,
)
from ichprog.cli.workers import ScanOutput, Workers, with_workers
from ichprog.errors import ScanError
from ichprog.result_files import haemorrhage_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ichprog.model import Model
    from ichprog.result_files import ResultsTable
    from ichprog.results import Haemorrhage
    from ichprog.scan import Scan
    from ichprog.sources import ScanSource


@click.command(
    cls=Command,
    interrupted="Nothing is kept without -o. Repeat the command with -o FILE, which --resume continues.",
    epilog=examples("haemorrhage scan.nii.gz --masks masks", "haemorrhage cohort.csv --scores -o results.csv"),
)
@scans_argument
@click.option(
    "-m", "--model", "name", default=zoo.DETECTOR, show_default=True, shell_complete=completion.models,
    help="A model with a task that has a mask, by a name as in `ichprog predict`.",
)  # fmt: skip
@with_options(loading)
@brain
@with_options(dicom_options)
@output
@with_options(resume_options)
@with_options(score_options)
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the masks of haemorrhages.")
@with_workers
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
    pool: Workers,
    as_json: bool,
    **loading: Any,
) -> None:
    """Find the haemorrhage in every SCAN: probability, volumes with intervals, kind and place.

    SCAN is a NIfTI file, a DICOM folder or a .zip of one, a folder of scans, or a table of patients (.csv).
    """
    results = ResultsOptions(output, resume, retry_failed, overwrite)
    sources = take_shard(find_scans(scans, study=study, series=series), shard)
    if clinical and not scores:
        raise click.UsageError("--clinical needs --scores.")
    given = read_clinical(clinical, sources)
    computer = ScoreComputer(sources, given, is_requested=scores)
    loader = ModelLoader(sources, pool, shard)
    model = loader.load(name, brain, loading)
    table = haemorrhage_table(model.spec, with_patients=has_patients(sources), score_columns=computer.columns)
    work = _FindHaemorrhage(model, brain, computer, table, results.suffix, masks, as_json)
    run = {
        "model": model.spec.name, "weights": [file.sha256 for file in model.weights], "precision": model.precision,
        "brain": str(brain), "scores": given if scores else None,
    }  # fmt: skip
    with results.open(table, run, sources) as (file, todo):
        has_failed = print_outputs(work, sources, todo, pool, file=file, has_files=any((output, masks)))
    if not as_json:
        print_limits(model)
    print_notice(model)
    loader.compile_in_background()
    ctx.exit(1 if has_failed else 0)


@dataclass(frozen=True)
class _FindHaemorrhage:
    """What `ichprog haemorrhage` does with each scan."""

    model: "Model"
    brain: Any
    computer: ScoreComputer
    table: "ResultsTable"
    suffix: str | None
    masks: Path | None
    as_json: bool

    def results(self, sources: "list[ScanSource]") -> "Iterator[tuple[Haemorrhage, Scan | ScanError]]":
        """Yield the haemorrhage of each scan."""
        return self.model.haemorrhage_iter(sources, brain=self.brain)

    def error_result(self, source: "ScanSource", error: ScanError) -> "Haemorrhage":
        """Return the haemorrhage of a scan with an error."""
        return self.model.error_haemorrhage(source, error)

    def finish(self, source: "ScanSource", stem: str, found: "Haemorrhage", examined: "Scan | ScanError") -> ScanOutput:
        """Write the mask of a scan, and return its haemorrhage as text and entry."""
        from ichprog.results import with_scores

        computed, messages = self.computer.scores(source, found), ""
        if self.masks and not isinstance(examined, ScanError):
            save_image(found.mask, self.masks / f"{stem}_haemorrhage.nii.gz")
        if self.as_json:
            text = json.dumps(with_scores(found, computed))
        else:
            text = "\n".join([_format(found)] if computed is None else [_format(found), format_scores(computed)])
            messages = "\n".join(format_warnings(found.scan, found.warnings))
        entry = None if self.suffix is None else self.table.entry(found, computed, self.suffix)
        return ScanOutput(text, messages, entry, isinstance(examined, ScanError))


def _format(found: "Haemorrhage") -> str:
    """Return one line: the patient, the scan, and the haemorrhage or the error."""
    name = found.scan if found.patient is None else f"{found.patient}  {found.scan}"
    if found.error is not None:
        return f"{name}  FAILED  {found.error['message']}"
    return f"{name}  {format_haemorrhage(found)}"
