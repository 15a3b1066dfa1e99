"""Evaluate a model on a cohort."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ichprog.cli.options import as_json, brain, loading, print_json, with_options

if TYPE_CHECKING:
    from ichprog.evaluation import Evaluation


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("cohorts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="COHORT...")
@with_options(loading)
@brain
@click.option(
    "--n-bootstrap", default=1000, show_default=True, type=click.IntRange(min=1),
    help="Number of bootstrap samples for the confidence intervals.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Random seed of the bootstrap.")
@click.option(
    "--ci-method", default="percentile", show_default=True, type=click.Choice(["percentile", "bca"]),
    metavar="percentile|bca", help="Method of the confidence intervals.",
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
    brain: Any,
    n_bootstrap: int,
    seed: int,
    ci_method: Literal["percentile", "bca"],
    **loading_options: Any,
) -> None:
    """Score the model NAME on the patients of COHORT, and exclude folds that were trained on a patient.

    NAME is a name from `ichprog models`, hf-hub:org/repo[/folder]@revision, or local-dir:PATH. COHORT is a table of
    patients; several tables are joined. The output says so if it is unknown whether the model was trained on them.
    """
    from ichprog.cohort import Cohort
    from ichprog.evaluation import evaluate as evaluate_model
    from ichprog.model import load_model

    tables = [Cohort.read(path, scans=False) for path in cohorts]
    cohort = tables[0] if len(tables) == 1 else Cohort.join(tables)
    if output:
        output.mkdir(parents=True, exist_ok=True)  # fails before the scans are predicted, not after
    evaluation = evaluate_model(
        load_model(name, **loading_options), cohort, brain=brain, n_bootstrap=n_bootstrap, seed=seed,
        ci_method=ci_method, progress=sys.stderr.isatty(),
    )  # fmt: skip
    if output:
        evaluation.write(output)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        _print_evaluation(evaluation)
    if reason := evaluation.provenance["fallback_reason"]:
        click.echo(f"{reason}.", err=True)
    click.echo(evaluation.model.notice, err=True)
    ctx.exit(1 if evaluation.failed else 0)


def _print_evaluation(evaluation: "Evaluation") -> None:
    """Print the number of patients, the leakage report, the metrics, failed scans and warnings."""
    from ichprog.metrics import AT_HALF
    from ichprog.reporting.tables import format_value, readable_name

    described = evaluation.to_dict()
    counts = evaluation.counts
    excluded = ("left_out", "unlabelled", "failed")
    parts = [f"{counts['scored']} of {counts['patients']} patients scored"]
    parts += [f"{counts[key]} {key.replace('_', ' ')}" for key in excluded if counts[key]]
    line = f"{evaluation.model.name} on {evaluation.cohort}: {', '.join(parts)}. {evaluation.origin.sentence}"
    click.echo(line.rstrip())
    click.echo(evaluation.leakage.sentence)
    for task, metrics in evaluation.metrics.items():
        truth = ", ".join(f"{count} are {label}" for label, count in described["label_counts"][task].items())
        threshold = described["thresholds"][task]
        click.echo(f"\n{task}: {truth}" + ("" if threshold is None else f"; threshold {threshold:g}"))
        for metric, interval in metrics.items():
            if threshold == 0.5 and metric.endswith(AT_HALF):
                continue  # equals the metric at the task's threshold
            click.echo(f"  {readable_name(metric):30}  {format_value(interval)}")
    click.echo(f"\n{described['intervals']}.")
    for task, column in evaluation.unscored.items():
        click.echo(f"{task} is not scored: column {column} is blank for every patient.")
    for scan in evaluation.failed:
        click.echo(f"patient {scan['patient']}: {scan['scan']}  FAILED  {scan['message']}", err=True)
    for patient, warnings in evaluation.warnings.items():
        for warning in warnings:
            click.echo(f"patient {patient}: {warning['code']}: {warning['message']}", err=True)
