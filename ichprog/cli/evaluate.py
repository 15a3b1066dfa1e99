"""Evaluate a model on a cohort."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, brain, loading, print_json, with_options
from ichprog.cli.workers import Workers, with_workers
from ichprog.io import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ichprog.evaluation import Evaluation, PooledEvaluation
    from ichprog.evaluation.validation import EventValidation, ModelComparison


@click.command(
    cls=Command,
    interrupted="With -o, finished scans are kept: continue with --resume. Without -o, repeat the command.",
    epilog=examples(
        "evaluate MODEL patients/cohort.csv -o results",
        "evaluate MODEL cohort.csv --summary site.json",
        "evaluate --pool first.json second.json -o pooled",
    ),
)
@click.argument("name", metavar="NAME", shell_complete=completion.models)
@click.argument("cohorts", nargs=-1, type=click.Path(path_type=Path), metavar="COHORT...")
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
@click.option(
    "--at-sensitivity", multiple=True, type=float, metavar="RATE",
    help="Report the operating point with this sensitivity, such as 0.95. Repeatable.",
)  # fmt: skip
@click.option(
    "--at-specificity", multiple=True, type=float, metavar="RATE",
    help="Report the operating point with this specificity, such as 0.9. Repeatable.",
)  # fmt: skip
@click.option(
    "--subgroup", "subgroups", multiple=True, metavar="COLUMN",
    help="Report metrics by the values of a column of COHORT. Repeatable.",
)  # fmt: skip
@click.option(
    "--compare",
    metavar="NAME",
    help="Compare with another model on the patients that both may predict.",
    shell_complete=completion.models,
)
@click.option(
    "--summary", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write counts and sums without any row of a patient, for --pool.",
)  # fmt: skip
@click.option(
    "--min-count", default=5, show_default=True, type=click.IntRange(min=3),
    help="Smallest number of patients behind any number of --summary.",
)  # fmt: skip
@click.option(
    "--pool",
    "pool_summaries",
    is_flag=True,
    help="Pool the summaries of several sites, which stand in place of NAME and COHORT.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of predictions, tables, figures and the report."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run: predict only scans without a result.")
@with_workers
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
    at_sensitivity: tuple[float, ...],
    at_specificity: tuple[float, ...],
    subgroups: tuple[str, ...],
    compare: str | None,
    summary: Path | None,
    min_count: int,
    pool_summaries: bool,
    resume: bool,
    pool: Workers,
    **loading_options: Any,
) -> None:
    """Score the model NAME on the patients of COHORT, and exclude folds that were trained on a patient.

    With --pool, the arguments are summaries of several sites instead, and nothing is predicted.

    NAME is a name from `ichprog models`, hf-hub:org/repo[/folder]@revision, or local-dir:PATH. COHORT is a table of
    patients; several tables are joined. The output says so if it is unknown whether the model was trained on them.
    """
    if pool_summaries:
        _pool([Path(name), *cohorts], output, as_json=as_json)
        return
    if not cohorts:
        raise click.UsageError("Missing argument 'COHORT...'. Give the table of patients.")
    if resume and output is None:
        raise click.UsageError("--resume needs -o: the folder of all results.")
    from ichprog.cohort import Cohort
    from ichprog.evaluation import evaluate as evaluate_model
    from ichprog.model import load_model

    tables = [Cohort.read(path, scans=False) for path in cohorts]
    cohort = tables[0] if len(tables) == 1 else Cohort.join(tables)
    for folder in (output, summary and summary.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)  # fails before the scans are predicted, not after
    journal = None if output is None else output / "predictions.journal"
    with pool.start() as where:
        evaluation = evaluate_model(
            load_model(name, **loading_options), cohort, brain=brain, n_bootstrap=n_bootstrap, seed=seed,
            ci_method=ci_method, subgroups=subgroups, at_sensitivity=at_sensitivity, at_specificity=at_specificity,
            compare=load_model(compare, **{**loading_options, "fold": None}) if compare else None,
            progress=sys.stderr.isatty(), journal=journal, resume=resume, **where,
        )  # fmt: skip
    if output:
        evaluation.write(output)
    if journal:
        journal.unlink(missing_ok=True)
    if summary:
        write_json(summary, evaluation.summary(min_count=min_count))
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
        missing = evaluation.missing_labels[task]
        truth += f", {missing} without a label" if missing else ""
        threshold = described["thresholds"][task]
        click.echo(f"\n{task}: {truth}" + ("" if threshold is None else f"; threshold {threshold:g}"))
        for metric, interval in metrics.items():
            if threshold == 0.5 and metric.endswith(AT_HALF):
                continue  # equals the metric at the task's threshold
            click.echo(f"  {readable_name(metric):30}  {format_value(interval)}")
        for line in _event_lines(task, evaluation.events[task]):
            click.echo(f"  {line}")
    _print_subgroups(evaluation)
    if evaluation.comparison:
        _print_comparison(evaluation.comparison)
    click.echo(f"\n{described['intervals']}.")
    for task, column in evaluation.unscored.items():
        click.echo(f"{task} is not scored: column {column} is blank for every patient.")
    for scan in evaluation.failed:
        click.echo(f"patient {scan['patient']}: {scan['scan']}  FAILED  {scan['message']}", err=True)
    for patient, warnings in evaluation.warnings.items():
        for warning in warnings:
            click.echo(f"patient {patient}: {warning['code']}: {warning['message']}", err=True)


def _event_lines(task: str, events: "Sequence[EventValidation]") -> "Iterator[str]":
    """Yield a line for each recalibration, decision curve and operating point."""
    from ichprog.evaluation.validation_tables import decision_sentence, operating_rows, recalibration_rows
    from ichprog.reporting.tables import format_value

    for event in events:
        if not event.recalibrations:
            yield f"{event.event}: too few patients with or without it for recalibration and operating points"
            continue
        for row in recalibration_rows(task, [event]):
            needed = f"; patients needed: {row['needed']}" if row["needed"] else ""
            yield (
                f"{event.event}, {row['probabilities']}: slope {format_value(row['calibration_slope'])}, intercept "
                f"{format_value(row['calibration_intercept'])}{needed}"
            )
        yield f"{event.event}: {decision_sentence(event)}"
        for row in operating_rows(task, [event]):
            yield (
                f"{event.event} at {row['required']}, {row['patients']}: threshold {row['threshold']}, sensitivity "
                f"{format_value(row['sensitivity'])}, specificity {format_value(row['specificity'])}"
            )


def _print_subgroups(evaluation: "Evaluation") -> None:
    from ichprog.metrics import PRIMARY
    from ichprog.reporting.tables import format_value, readable_name

    if evaluation.subgroups:
        click.echo("\nsubgroups:")
    for row in evaluation.subgroups:
        last = evaluation.model.task(row["task"]).labels[-1]
        click.echo(
            f"  {row['task']}, {row['column']} {row['group']}: {row['patients']} patients, {row['with_last_label']} "
            f"are {last}; {readable_name(PRIMARY)} {format_value(row[PRIMARY])}"
        )


def _print_comparison(comparison: "ModelComparison") -> None:
    from ichprog.evaluation.validation import comparison_rows
    from ichprog.reporting.tables import format_value, readable_name

    click.echo(f"\ncompared with {comparison.name}, on the same patients. {comparison.leakage}")
    for row in comparison_rows(comparison.rows):
        click.echo(
            f"  {row['task']}, {readable_name(row['metric'])}: {format_value(row['first'])} and "
            f"{format_value(row['second'])}, difference {format_value(row['difference'])}, p {format_value(row['p'])}, "
            f"{row['n']} patients"
        )


def _pool(files: "Sequence[Path]", output: Path | None, *, as_json: bool) -> None:
    """Pool summaries, and print or write the result."""
    from ichprog.evaluation import pool_summaries

    pooled = pool_summaries(files)
    if output:
        pooled.write(output)
    if as_json:
        print_json(pooled.to_dict())
    else:
        _print_pooled(pooled)
    click.echo(pooled.notice, err=True)


def _print_pooled(pooled: "PooledEvaluation") -> None:
    from ichprog.evaluation.pooling import measure_rows
    from ichprog.reporting.tables import format_value

    simulated = " Patients of a site are simulated." if pooled.is_simulated else ""
    click.echo(f"{pooled.model} at {len(pooled.sites)} sites: {', '.join(pooled.sites)}.{simulated}")
    for task in pooled.tasks:
        click.echo(f"\n{task.task}, {task.event}:")
        for row in task.sites:
            click.echo(
                f"  {row['site']}: {row['patients']} patients, {row['events']} with the event; AUROC "
                f"{format_value(row['auroc'])}, Brier score {format_value(row['brier'])}, observed / expected "
                f"{format_value(row['observed_expected'])}, slope {format_value(row['calibration_slope'])}"
            )
        for site in task.withheld:
            click.echo(f"  {site}: withheld, as there are too few patients")
        both = task.together
        click.echo(
            f"  together: {both['patients']} patients; AUROC {format_value(both['auroc'])} within "
            f"{both['auroc_bound']:.3f}, Brier score {format_value(both['brier'])}, observed / expected "
            f"{format_value(both['observed_expected'])}"
        )
        for row in measure_rows(task):
            i2 = "-" if row["i2"] is None else f"{100 * row['i2']:.0f} %"
            span = row["new_site"]
            limits = f"{format_value(span['low'])} to {format_value(span['high'])}" if span else "needs three sites"
            click.echo(f"  {row['measure']}: {format_value(row['pooled'])}, I2 {i2}, prediction interval {limits}")
