"""Training a model."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from ichprog.cli.options import brain, parsed
from ichprog.errors import RunError, UnknownNameError
from ichprog.zoo import DEFAULT


@click.command()
@click.argument("cohorts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="COHORT...")
@click.option(
    "-m", "--model", default=DEFAULT, show_default=True,
    help="What is trained: a name of `ichprog models`, a description as JSON, or local-dir:PATH.",
)  # fmt: skip
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--folds", default=10, show_default=True, help="Number of folds.")
@click.option("--only-fold", "only", multiple=True, type=int, help="Train this fold now, repeatable; all if absent.")
@click.option("--preset", default="default", show_default=True, metavar="default|paper", help="How it is trained.")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a field of the preset, repeatable: lr=0.0005."
)
@click.option("--epochs", type=int, help="Short for --set epochs=.")
@click.option("--seed", type=int, help="Short for --set seed=.")
@click.option("--loss-weighting", metavar="fixed|uncertainty", help="Short for --set loss_weighting=.")
@click.option("--resume", is_flag=True, help="Go on with a run that was begun in this folder.")
@click.option("--name", help="What the new model is called; as the one it is trained by if absent.")
@brain
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where prepared grids are kept.")
@click.option("--workers", default=1, show_default=True, help="Processes that prepare grids side by side.")
@click.option("--tensorboard", is_flag=True, help="Write events for TensorBoard too.")
def train(
    cohorts: tuple[Path, ...],
    model: str,
    out: Path,
    preset: str,
    changes: tuple[str, ...],
    only: tuple[int, ...],
    **options: Any,
) -> None:
    """Train a model on the patients of COHORT, by cross-validation.

    COHORT is a table of patients; several are taken together. The folder of the run is a model afterwards,
    local-dir:OUTPUT.
    """
    from ichprog.train import PRESETS
    from ichprog.train import train as train_model

    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    short = {name: options.pop(name) for name in ("epochs", "seed", "loss_weighting")}
    fields = parsed("--set", changes, "lr=0.0005") | {name: value for name, value in short.items() if value is not None}
    try:
        protocol = PRESETS[preset].replace(**fields)
    except RunError as error:
        raise click.UsageError(str(error)) from error
    speaks = os.environ.get("RANK", "0") == "0"  # one of several processes does
    for sentence in protocol.quirks() if speaks else ():
        click.echo(f"as published: {sentence}", err=True)

    from ichprog.cohort import Cohort

    read = [Cohort.read(path) for path in cohorts]
    cohort = read[0] if len(read) == 1 else Cohort.join(read)
    try:
        run = train_model(
            cohort, model, out, protocol=protocol, only=only or None, progress=sys.stderr.isatty(), **options
        )
        if speaks:
            _say(run)
    finally:
        _leave()


def _say(run: Path) -> None:
    """Where the model is, and how each fold was at its best."""
    for fold, result in json.loads((run / "run.json").read_text("utf-8"))["results"].items():
        best = result["best"]
        said = [f"fold {fold}  epoch {best['epoch']} of {result['epochs']}  validation AUC"]
        for column, value in best.items():
            if column.startswith("val_auc_"):
                shown = "unknown" if value is None else f"{value:.3f}"
                said.append(f"{column.removeprefix('val_auc_')} {shown}")
        click.echo("  ".join(said))
    click.echo(f"local-dir:{run}")


def _leave() -> None:
    """Takes leave of the other processes, where there are any."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
