"""Compare variants of a model on the same folds of one cohort: `ichprog study`."""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ichprog.cli import completion, progress
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, print_json, print_path
from ichprog.cli.workers import Workers, with_workers
from ichprog.errors import InvalidValueError

if TYPE_CHECKING:
    from ichprog.study import JobStatus

_study = click.argument("study", type=click.Path(path_type=Path), metavar="STUDY.toml")
_output = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the study. By default, the name of the study file without .toml.",
)
_cache_dir = click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="Cache of prepared grids and compiled networks."
)
_saliency_patients = click.option(
    "--saliency-patients", default=0, show_default=True, metavar="N",
    help="Measure the saliency maps of the first N patients with a lesion mask.",
)  # fmt: skip


@click.group(epilog=examples("study new study.toml", "study run study.toml"))
def study() -> None:
    """Compare variants of a model, and baselines without an image, on the same folds of one cohort."""


@study.command(cls=Command, epilog=examples("study new study.toml --preset smoke"))
@click.argument("path", type=click.Path(path_type=Path), metavar="STUDY.toml")
@click.option(
    "--preset", default="default", show_default=True, help="Template.", **completion.one_of("default", "paper", "smoke")
)
@as_json
def new(path: Path, preset: str, as_json: bool) -> None:
    """Write a commented study file to start from."""
    from ichprog.study import template

    text = template(preset)
    if path.exists():
        raise click.UsageError(f"{path} exists already. Choose another name.")
    path.write_text(text, encoding="utf-8")
    if as_json:
        print_path(path, as_json=True)
    else:
        click.echo(f"Wrote {path}. Next, edit it and run: ichprog study run {path}")


@study.command(cls=Command, epilog=examples("study power --difference 0.03 --patients 300 --patients 600"))
@click.option("--difference", default=0.02, show_default=True, help="Difference of the AUROCs of two models.")
@click.option("--auroc", default=0.75, show_default=True, help="AUROC of the weaker model.")
@click.option("--positive", default=0.5, show_default=True, help="Share of patients with the event.")
@click.option("--correlation", default=0.8, show_default=True, help="Correlation of the scores of both models.")
@click.option("--seed-sd", default=0.012, show_default=True, help="Standard deviation of an AUROC between seeds.")
@click.option("--patients", multiple=True, type=int, help="Number of patients. Repeatable. By default, 200 to 6,400.")
@click.option(
    "--seeds",
    multiple=True,
    type=int,
    default=(1, 5, 10),
    show_default=True,
    help="Number of training seeds. Repeatable.",
)
@click.option("--folds", default=5, show_default=True, help="Number of folds.")
@click.option("--studies", default=500, show_default=True, help="Number of simulated studies.")
@as_json
def power(
    patients: tuple[int, ...], seeds: tuple[int, ...], folds: int, studies: int, as_json: bool, **assumed: float
) -> None:
    """Print how often a study of each size would find a difference of two AUROCs, by simulation."""
    from dataclasses import asdict

    from ichprog.study.power import SIZES, Assumptions, compute_power

    assumptions = Assumptions(**assumed)
    rows = compute_power(assumptions, patients=patients or SIZES, seeds=seeds, folds=folds, studies=studies)
    if as_json:
        print_json({"assumptions": asdict(assumptions), "power": [asdict(row) for row in rows]})
        return
    click.echo("patients  " + "  ".join(f"{number:>2} seeds" if number > 1 else " 1 seed " for number in seeds))
    for first in range(0, len(rows), len(seeds)):
        shares = "  ".join(f"{row.power:8.2f}" for row in rows[first : first + len(seeds)])
        click.echo(f"{rows[first].patients:8d}  {shares}")


@study.command(
    cls=Command,
    interrupted="Finished jobs, epochs and prepared scans are kept. Repeat the command to continue.",
    epilog=examples("study run study.toml --workers 2", "study run study.toml --slurm queue=gpu --workers 8"),
)
@_study
@_output
@click.option(
    "--job", "jobs", multiple=True, metavar="NAME",
    help="Run only this job, and write no report. Repeatable. `ichprog study jobs` lists the jobs.",
)  # fmt: skip
@with_workers
@_cache_dir
@_saliency_patients
@as_json
def run(
    study: Path,
    output: Path | None,
    jobs: tuple[str, ...],
    pool: Workers,
    cache_dir: Path | None,
    saliency_patients: int,
    as_json: bool,
) -> None:
    """Run the missing jobs of a study, and write tables, figures and report.html."""
    import ichprog.study

    ichprog.study.require_packages()
    plan, folder = ichprog.study.Study.read(study), output or study.with_suffix("")
    with pool.start() as where:
        statuses = ichprog.study.run(
            plan,
            folder,
            cache_dir=cache_dir,
            progress=_StatusPrinter(),
            bars=sys.stderr.isatty(),
            only=jobs or None,
            **where,
        )
    if jobs:
        print_path(folder, as_json=as_json)
    else:
        path = ichprog.study.report(plan, folder, saliency_patients=saliency_patients, cache_dir=cache_dir)
        print_path(path, as_json=as_json)
    click.echo(ichprog.study.research_notice(plan, folder), err=True)
    unfinished = sum(each.state != "done" for each in statuses)
    if unfinished:
        click.echo(f"{unfinished} of {len(statuses)} jobs are not done. Run the command again to run them.", err=True)
        click.get_current_context().exit(1)


@study.command(cls=Command, epilog=examples("study jobs study.toml --stage 0"))
@_study
@_output
@click.option("--stage", type=int, help="List only the jobs of this stage, from 0; they can run at the same time.")
@as_json
def jobs(study: Path, output: Path | None, stage: int | None, as_json: bool) -> None:
    """Print the names of the jobs that are not done, for `ichprog study run --job`.

    The jobs of a stage need those of earlier stages, and can run at the same time.
    """
    import ichprog.study

    plan = ichprog.study.Study.read(study)
    stages = ichprog.study.stages(plan)
    statuses = ichprog.study.status(plan, output or study.with_suffix(""))
    listed = sorted((each for each in statuses if each.state != "done"), key=lambda each: stages[each.job.run])
    listed = [each for each in listed if stage in (None, stages[each.job.run])]
    if as_json:
        found = [{"job": each.job.name, "stage": stages[each.job.run], "state": each.state} for each in listed]
        print_json(found)
    else:
        for each in listed:
            click.echo(each.job.name)


@study.command(cls=Command, epilog=examples("study status study.toml"))
@_study
@_output
@as_json
def status(study: Path, output: Path | None, as_json: bool) -> None:
    """Print the state of every job of a study."""
    import ichprog.study

    statuses = ichprog.study.status(ichprog.study.Study.read(study), output or study.with_suffix(""))
    if as_json:
        print_json([{"job": each.job.name, "state": each.state, "error": each.error} for each in statuses])
        return
    for each in statuses:
        click.echo(_format_status(each))
    counts = Counter(each.state for each in statuses)
    click.echo(", ".join(f"{count} {state}" for state, count in sorted(counts.items())), err=True)


@study.command(
    cls=Command,
    interrupted="The results of all jobs are kept. Repeat the command.",
    epilog=examples("study report study.toml --saliency-patients 20"),
)
@_study
@_output
@_cache_dir
@_saliency_patients
@as_json
def report(study: Path, output: Path | None, cache_dir: Path | None, saliency_patients: int, as_json: bool) -> None:
    """Write tables, figures and report.html again, without training."""
    import ichprog.study

    folder = output or study.with_suffix("")
    plan = ichprog.study.Study.read(study)
    path = ichprog.study.report(plan, folder, saliency_patients=saliency_patients, cache_dir=cache_dir)
    print_path(path, as_json=as_json)
    click.echo(ichprog.study.research_notice(plan, folder), err=True)


@study.command(cls=Command, epilog=examples("study figure saliency study.toml --patient P01:12 --method grad_cam"))
@click.argument("what", type=click.Choice(["saliency"]))
@_study
@_output
@click.option(
    "--patient",
    "patients",
    multiple=True,
    metavar="NAME[:SLICE]",
    help="Patient, and optionally a slice, counted from 1 at the lowest; repeatable. By default, three with a mask.",
)
@click.option("--task", help="Task to explain. Default: the task by which the folds are stratified.")
@click.option(
    "--method",
    default="guided_backprop",
    show_default=True,
    help="Saliency method.",
    shell_complete=completion.plugins("saliency"),
)
@_cache_dir
@click.option(
    "--figure",
    "target",
    type=click.Path(path_type=Path),
    help="File of the picture. By default, figures/WHAT.png in the folder of the study.",
)
@as_json
def figure(
    what: str,
    study: Path,
    output: Path | None,
    patients: tuple[str, ...],
    task: str | None,
    method: str,
    cache_dir: Path | None,
    target: Path | None,
    as_json: bool,
) -> None:
    """Draw slices in rows and variants in columns, each with its map and its probability."""
    import ichprog.study

    folder = output or study.with_suffix("")
    target = target or folder / "figures" / f"{what}.png"
    plan = ichprog.study.Study.read(study)
    drawn = ichprog.study.saliency_figure(
        plan,
        folder,
        [_parse_slice(patient) for patient in patients],
        task=task,
        method=method,
        cache_dir=cache_dir,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(target)
    print_path(target, as_json=as_json)
    click.echo(ichprog.study.research_notice(plan, folder), err=True)


def _parse_slice(text: str) -> tuple[str, int | None]:
    """Parse NAME or NAME:SLICE."""
    name, colon, number = text.rpartition(":")
    if not colon:
        return text, None
    if not number.isdigit():
        raise InvalidValueError("--patient", text, "NAME or NAME:SLICE, with slices counted from 1")
    return name, int(number)


def _format_status(status: "JobStatus") -> str:
    reason = f"  {status.error.splitlines()[-1]}" if status.error else ""
    return f"{status.state:8} {status.job.name}{reason}"


class _StatusPrinter:
    """Print the status of each job that is done, with the number of jobs and the time left.

    The first status of a job is that before the run, so the time is counted from the start of the first job.
    """

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._ended, self._start = 0, 0.0

    def __call__(self, status: "JobStatus") -> None:
        """Print the status of a job that was done already or that ends now."""
        if status.job.name not in self._states:
            self._states[status.job.name], self._start = status.state, time.monotonic()
            if status.state == "done":
                click.echo(_format_status(status), err=True)
            return
        self._ended += 1
        number, total = self._ended + list(self._states.values()).count("done"), len(self._states)
        about = f"  ({number} of {total} jobs"
        if number < total:
            seconds = (time.monotonic() - self._start) / self._ended * (total - number)
            about += f", about {progress.format_time(seconds)} left"
        click.echo(f"{_format_status(status)}{about})", err=True)
