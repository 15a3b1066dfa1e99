"""How good a model is on a cohort."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog.cli.options import as_json, brain, loading, with_options

if TYPE_CHECKING:
    from ichprog.evaluation.evaluate import Evaluation


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("cohorts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="COHORT...")
@with_options(loading)
@brain
@click.option(
    "--n-bootstrap",
    "draws",
    default=1000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Bootstrap samples for the intervals.",
)
@click.option("--seed", default=0, show_default=True, help="Where their chance comes from.")
@click.option(
    "--ci-method", "method", default="percentile", show_default=True, type=click.Choice(["percentile", "bca"]),
    metavar="percentile|bca", help="What kind of intervals.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for predictions, figures and tables.")
@as_json
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    name: str,
    cohorts: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score the model NAME on the patients of COHORT, none by a network that has seen them.

    NAME is a name of `ichprog models`, hf-hub:org/repo[/folder]@revision, or local-dir:PATH. COHORT is a table of
    patients; several are taken together. Where it cannot be known whether the model has seen them, the output says so.
    """
    from ichprog.cohort import Cohort
    from ichprog.evaluation.evaluate import evaluate as evaluate_model

    read = [Cohort.read(path, scans=False) for path in cohorts]
    cohort = read[0] if len(read) == 1 else Cohort.join(read)
    if output:
        output.mkdir(parents=True, exist_ok=True)  # rather now than after hours
    found = evaluate_model(name, cohort, progress=sys.stderr.isatty(), **options)
    if output:
        found.write(output)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _say(found)
    if note := found.about["provenance"]["fallback_reason"]:
        click.echo(f"{note}.", err=True)
    click.echo(found.model.notice, err=True)
    ctx.exit(1 if found.failed else 0)


def _say(found: "Evaluation") -> None:
    """The figures as text, with what a reader must know first."""
    from ichprog.reporting.tables import shown, words

    described = found.to_dict()
    counts = found.counts
    lost = [f"{counts[key]} {key.replace('_', ' ')}" for key in ("left_out", "unlabelled", "failed") if counts[key]]
    said = f"{counts['scored']} of {counts['patients']} patients scored" + "".join(f", {each}" for each in lost)
    simulated = " These patients are simulated." if described["simulated"] else ""
    click.echo(f"{found.model.name} on {found.cohort}: {said}.{simulated}\n{found.guard.sentence}")
    for task, figures in found.metrics.items():
        truth = ", ".join(f"{count} are {label}" for label, count in described["truth"][task].items())
        threshold = described["thresholds"][task]
        click.echo(f"\n{task}: {truth}" + ("" if threshold is None else f"; threshold {threshold:g}"))
        for metric, interval in figures.items():
            if threshold == 0.5 and metric.endswith("_at_half"):
                continue  # is said already
            click.echo(f"  {words(metric):30}  {shown(interval)}")
    click.echo(f"\n{described['intervals']}.")
    for task, column in found.unscored.items():
        click.echo(f"{task} is not scored: nobody is known of, by column {column}.")
    for each in found.failed:
        click.echo(f"patient {each['patient']}: {each['scan']}  FAILED  {each['message']}", err=True)
    for patient, doubts in found.warnings.items():
        for doubt in doubts:
            click.echo(f"patient {patient}: {doubt['code']}: {doubt['message']}", err=True)
