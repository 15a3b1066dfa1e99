"""A study: variants compared on the same folds of one cohort."""

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog.cli.options import as_json, parsed, print_json
from ichprog.errors import RunError, UnknownNameError

if TYPE_CHECKING:
    from ichprog.study.jobs import Status

_file = click.argument("study", type=click.Path(path_type=Path), metavar="STUDY.toml")
_out = click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="The study's folder; its name if absent."
)
_cache = click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="Where prepared grids and compiled networks are kept."
)
_maps_of = click.option(
    "--saliency-patients", "maps_of", default=0, show_default=True, metavar="N",
    help="Measure maps of the first N patients with a lesion mask.",
)  # fmt: skip


@click.group()
def study() -> None:
    """Compare variants of a model, and what needs no image, on the same folds of one cohort."""


@study.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="STUDY.toml")
@click.option(
    "--preset", default="default", show_default=True, metavar="default|paper|smoke", help="What to begin with."
)
def new(path: Path, preset: str) -> None:
    """Write a commented study to begin with."""
    from ichprog.study.config import template

    text = template(preset)
    if path.exists():
        raise click.UsageError(f"{path} is there already. Take another name.")
    path.write_text(text, encoding="utf-8")
    click.echo(f"{path}: next, look it over and `ichprog study run {path}`.")


@study.command()
@_file
@_out
@click.option("--workers", default=1, show_default=True, help="Processes side by side, or jobs of Slurm.")
@click.option("--scheduler", metavar="ADDRESS", help="Work on the cluster of this dask scheduler.")
@click.option(
    "--slurm",
    multiple=True,
    metavar="NAME=VALUE",
    help="Work on Slurm, with this option of a job; repeatable: queue=gpu.",
)
@_cache
@_maps_of
def run(
    study: Path,
    out: Path | None,
    workers: int,
    scheduler: str | None,
    slurm: tuple[str, ...],
    cache_dir: Path | None,
    maps_of: int,
) -> None:
    """Do what of a study is missing, judge it, and write tables, figures and report.html."""
    from ichprog.parallel import cluster
    from ichprog.study import jobs
    from ichprog.study.config import Study
    from ichprog.study.report import present

    if scheduler and slurm:
        raise click.UsageError("--scheduler and --slurm are two ways to one end: give one of them.")
    options = parsed("--slurm", slurm, "queue=gpu")
    asked, folder = Study.read(study), out or study.with_suffix("")
    with ExitStack() as stack:
        executor = None
        if scheduler or slurm:
            executor = stack.enter_context(cluster(scheduler=scheduler, slurm=options or None, workers=workers))
        here = 1 if executor else workers  # processes of this machine, which may be one for logging in only
        found = jobs.run(asked, folder, executor=executor, workers=here, cache_dir=cache_dir, progress=_tell)
    failed = [each for each in found if each.state != "done"]
    whole = {each.cell.run for each in found} - {each.cell.run for each in failed}
    if not whole:
        raise RunError(f"{folder}: no variant is done in every fold, so there is nothing to report.")
    click.echo(present(asked, folder, maps_of=maps_of, cache_dir=cache_dir))
    _notice(folder)
    if failed:
        click.echo(f"{len(failed)} of {len(found)} cells are not done; run it again for these.", err=True)
        click.get_current_context().exit(1)


@study.command()
@_file
@_out
@as_json
def status(study: Path, out: Path | None, as_json: bool) -> None:
    """Say how far every cell of a study is."""
    from ichprog.study import jobs
    from ichprog.study.config import Study

    found = jobs.status(Study.read(study), out or study.with_suffix(""))
    if as_json:
        print_json([{"cell": each.cell.name, "state": each.state, "said": each.said} for each in found])
        return
    for each in found:
        click.echo(f"{each.state:8} {each.cell.name}{f'  {each.said.splitlines()[-1]}' if each.said else ''}")
    counts = Counter(each.state for each in found)
    click.echo(", ".join(f"{count} {state}" for state, count in sorted(counts.items())), err=True)


@study.command()
@_file
@_out
@_cache
@_maps_of
def report(study: Path, out: Path | None, cache_dir: Path | None, maps_of: int) -> None:
    """Judge what is there anew, and write tables, figures and report.html again; nothing is trained."""
    from ichprog.study.config import Study
    from ichprog.study.report import present

    folder = out or study.with_suffix("")
    click.echo(present(Study.read(study), folder, maps_of=maps_of, cache_dir=cache_dir))
    _notice(folder)


@study.command()
@click.argument("what", type=click.Choice(["saliency"]))
@_file
@_out
@click.option(
    "--patient", "patients", multiple=True, metavar="NAME[:SLICE]", help="Which, and of it which slice; repeatable."
)
@click.option("--task", help="Task to explain; the one folds are split by if absent.")
@click.option("--method", default="guided_backprop", show_default=True, help="Saliency method.")
@_cache
@click.option(
    "--figure", "target", type=click.Path(path_type=Path), help="The picture; STUDY/figures/WHAT.png if absent."
)
def figure(
    what: str,
    study: Path,
    out: Path | None,
    patients: tuple[str, ...],
    task: str | None,
    method: str,
    cache_dir: Path | None,
    target: Path | None,
) -> None:
    """Draw slices in rows and variants in columns, each with its map and its probability above."""
    from ichprog.evaluation import localization
    from ichprog.study import saliency_results
    from ichprog.study.config import Study
    from ichprog.study.manifest import cohort_of

    asked, folder = Study.read(study), out or study.with_suffix("")
    cohort, folds = cohort_of(asked, folder), saliency_results.tested(folder)
    chosen: list[tuple[str, int | None]] = [_slice(patient) for patient in patients]
    if not chosen:
        masked = [name for name in localization.masks(cohort) if name in folds] or list(folds)
        chosen = [(name, None) for name in masked[:3]]
    task = task or asked.split_by
    models = saliency_results.with_task(asked, saliency_results.members(asked, folder, cache_dir), task)
    drawn: Any = localization.figure(models, cohort, chosen, folds=folds, task=task, method=method, brain=asked.brain)
    target = target or folder / "figures" / f"{what}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(target)
    click.echo(target)
    _notice(folder)


def _slice(said: str) -> tuple[str, int | None]:
    name, colon, number = said.rpartition(":")
    if not colon:
        return said, None
    if not number.isdigit():
        raise UnknownNameError("slice", number, [], hint="--patient takes NAME or NAME:SLICE, slices counted from 1.")
    return name, int(number)


def _tell(each: "Status") -> None:
    said = f"  {each.said.splitlines()[-1]}" if each.said else ""
    click.echo(f"{each.state:8} {each.cell.name}{said}", err=True)


def _notice(folder: Path) -> None:
    about = json.loads((folder / "study.json").read_text("utf-8"))
    simulated = "These patients are simulated. " if about["cohort"]["simulated"] else ""
    click.echo(f"{simulated}For research only, not for patient care.", err=True)
    sys.stderr.flush()
