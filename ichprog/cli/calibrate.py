"""Calibrate a model on a cohort, or combine it with clinical values."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, brain, loading, print_json, with_options

if TYPE_CHECKING:
    from ichprog.spec import Calibration

_cohorts = click.argument("cohorts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="COHORT...")
_output = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="RUN",
    help="Folder of the new model, which must be empty or missing.",
)  # fmt: skip


@click.command(cls=Command, epilog=examples("calibrate local-dir:run patients/cohort.csv -o calibrated"))
@click.argument("name", metavar="NAME", shell_complete=completion.models)
@_cohorts
@_output
@with_options(loading)
@brain
@as_json
def calibrate(
    name: str, cohorts: tuple[Path, ...], output: Path, brain: Any, as_json: bool, **loading_options: Any
) -> None:
    """Calibrate the model NAME on the patients of COHORT, and write it with its weights into RUN.

    `ichprog predict -m local-dir:RUN` then prints calibrated probabilities and conformal sets, and abstains from scans
    that are unlike those of COHORT. Only folds that were not trained on a patient predict the patient.
    """
    from ichprog.cohort import Cohort
    from ichprog.evaluation import calibrate as calibrate_model
    from ichprog.model import load_model

    cohort = Cohort.join([Cohort.read(path, scans=False) for path in cohorts])
    model = load_model(name, **loading_options)
    fitted = calibrate_model(model, cohort, output, brain=brain, progress=sys.stderr.isatty())
    if as_json:
        print_json({"path": str(output), "calibration": _described(fitted)})
        return
    click.echo(f"{model.spec.name} on {fitted.patients}")
    for task, each in _described(fitted)["tasks"].items():
        low, high = each["coverage_interval"]
        changes = ", ".join(f"slope {a['slope']:.2f} and intercept {a['intercept']:+.2f}" for a in each["adjustments"])
        click.echo(f"{task}: {each['patients']} patients; log-odds change by {changes}")
        click.echo(f"  sets for 90 % hold the label of {low:.0%} to {high:.0%} of such patients (95 % interval)")
    click.echo(f"Model: local-dir:{output}")
    click.echo(model.spec.notice, err=True)


def _described(fitted: "Calibration") -> dict[str, Any]:
    """Return a calibration as plain data, with the interval of the coverage of each task."""
    from ichprog.calibration import COVERAGE
    from ichprog.schema import to_plain
    from ichprog.train.calibration import coverage_interval

    described: dict[str, Any] = to_plain(fitted)
    for task in described["tasks"].values():
        task["coverage_interval"] = list(coverage_interval(task["patients"], COVERAGE))
    return described


@click.command(
    cls=Command, epilog=examples("fuse local-dir:run patients/cohort.csv --columns nihss,glucose -o combined")
)
@click.argument("name", metavar="NAME", shell_complete=completion.models)
@_cohorts
@click.option("--columns", required=True, metavar="COLUMN,...", help="At most four columns of clinical values.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="Task to combine; repeatable. By default, all whose own column is not among the values.",
    shell_complete=completion.tasks,
)
@_output
@with_options(loading)
@brain
@as_json
def fuse(
    name: str,
    cohorts: tuple[Path, ...],
    columns: str,
    tasks: tuple[str, ...],
    output: Path,
    brain: Any,
    as_json: bool,
    **loading_options: Any,
) -> None:
    """Combine the model NAME with clinical values of the patients of COHORT, and write it into RUN.

    The networks stay; a small regression combines their answers with the values. Any value may be missing, and only
    folds that were not trained on a patient predict the patient. Use the model with
    `ichprog predict -m local-dir:RUN SCAN --clinical COLUMN=VALUE`.
    """
    from ichprog.cohort import Cohort
    from ichprog.evaluation import fuse as fuse_model
    from ichprog.model import load_model

    cohort = Cohort.join([Cohort.read(path, scans=False) for path in cohorts])
    model = load_model(name, **loading_options)
    chosen = [column.strip() for column in columns.split(",") if column.strip()]
    fused = fuse_model(model, cohort, chosen, output, tasks=tasks or None, brain=brain, progress=sys.stderr.isatty())
    if as_json:
        tables = [each.to_dict() for each in fused.tasks]
        print_json({"path": str(output), "leakage": fused.leakage, "tasks": tables})
        return
    click.echo(f"{model.spec.name} on {cohort.source}. {cohort.origin.sentence}".rstrip())
    click.echo(fused.leakage)
    for each in fused.tasks:
        figures = ", ".join(f"{key} {a:.3f} ({low:.3f} to {high:.3f})" for key, (a, low, high) in each.auroc.items())
        gain, low, high = each.gain
        click.echo(f"{each.task.name}: AUROC on {each.patients} patients, each by a fit to others: {figures}")
        click.echo(f"  both less the better one alone: {gain:+.3f} ({low:+.3f} to {high:+.3f})")
    click.echo(f"Model: local-dir:{output}")
    click.echo(model.spec.notice, err=True)
