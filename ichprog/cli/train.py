"""The command `ichprog train`."""

import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, brain, device, parse_assignments, print_json
from ichprog.errors import InvalidValueError, UnknownNameError
from ichprog.zoo import DEFAULT

if TYPE_CHECKING:
    from ichprog.spec import ModelSpec


@click.command(
    cls=Command,
    interrupted="Finished epochs and prepared scans are kept. Continue with --resume.",
    epilog=examples(
        "train patients/cohort.csv -m MODEL -o run --folds 5 --epochs 20",
        "train patients/cohort.csv -m MODEL -o run --folds 5 --epochs 20 --resume",
    ),
)
@click.argument("cohorts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="COHORT...")
@click.option(
    "-m", "--model", default=DEFAULT, show_default=True, shell_complete=completion.models,
    help="Model to train: a name of `ichprog models`, a JSON description, or local-dir:PATH.",
)  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--folds", default=10, show_default=True, help="Number of folds.")
@click.option("--only-fold", "only_folds", multiple=True, type=int, help="Train this fold only, repeatable.")
@click.option(
    "--preset", default="default", show_default=True, help="Training protocol.", **completion.one_of("default", "paper")
)
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE",
    help="Change a field of the protocol, repeatable, such as learning_rate=0.0005.",
)  # fmt: skip
@click.option("--epochs", type=int, help="Same as --set epochs=N.")
@click.option("--seed", type=int, help="Same as --set seed=N.")
@click.option(
    "--loss-weighting", help="Same as --set loss_weighting=NAME.", **completion.one_of("fixed", "uncertainty")
)
@click.option("--head", "heads", multiple=True, metavar="TASK=HEAD", help="Replace a task's head, repeatable.")
@click.option("--drop-task", "dropped", multiple=True, metavar="TASK", help="Remove a task, repeatable.")
@click.option("--loss-weight", "loss_weights", multiple=True, metavar="TASK=W", help="Set a task's weight, repeatable.")
@click.option(
    "--start-from", type=click.Path(path_type=Path), metavar="RUN",
    help="Start each fold from the backbone of the same fold of this run.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Resume the run of this folder.")
@click.option("--name", help="Name of the new model; the name of --model by default.")
@brain
@device
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Folder of prepared grids.")
@click.option("--workers", default=1, show_default=True, help="Number of processes that prepare grids.")
@click.option(
    "--track", "trackers", multiple=True, metavar="NAME",
    shell_complete=completion.choices("tensorboard", "mlflow", "trackio", "wandb"),
    help="Log to an experiment tracker, repeatable: tensorboard, mlflow, trackio, wandb.",
)  # fmt: skip
@as_json
def train(
    cohorts: tuple[Path, ...],
    model: str,
    output: Path,
    preset: str,
    changes: tuple[str, ...],
    heads: tuple[str, ...],
    dropped: tuple[str, ...],
    loss_weights: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Train a model on the patients of COHORT, by cross-validation.

    COHORT is a table of patients; several are combined. Afterwards the folder of the run is a model, local-dir:OUTPUT.
    """
    from ichprog.train import PRESETS, Protocol, TrainOptions, resolve_spec
    from ichprog.train import train as train_model

    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    shortcuts = {name: options.pop(name) for name in ("epochs", "seed", "loss_weighting")}
    fields = parse_assignments("--set", changes, "learning_rate=0.0005")
    fields |= {name: value for name, value in shortcuts.items() if value is not None}
    protocol = Protocol.read(fields, PRESETS[preset])
    weights = parse_assignments("--loss-weight", loss_weights, "TASK=0.5")
    spec = edit_tasks(resolve_spec(model), parse_assignments("--head", heads, "TASK=softmax"), dropped, weights)
    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        for sentence in protocol.quirks():
            click.echo(f"as published: {sentence}", err=True)

    from ichprog.cohort import Cohort

    tables = [Cohort.read(path) for path in cohorts]
    cohort = tables[0] if len(tables) == 1 else Cohort.join(tables)
    run_options = {name: options.pop(name) for name in ("brain", "device", "cache_dir", "workers", "trackers")}
    try:
        run = train_model(
            cohort,
            spec,
            output,
            protocol=protocol,
            only_folds=options.pop("only_folds") or None,
            options=TrainOptions(progress=True, **run_options),
            **options,
        )
        if is_main_process:
            _print_summary(run, as_json=as_json)
    finally:
        _leave_process_group()


def edit_tasks(
    spec: "ModelSpec", heads: dict[str, str], dropped: Iterable[str], loss_weights: dict[str, float]
) -> "ModelSpec":
    """Return a model description with other heads, fewer tasks or other loss weights.

    Args:
        spec: The description.
        heads: Names of heads by task.
        dropped: Tasks to remove.
        loss_weights: Loss weights by task.

    Raises:
        UnknownNameError: The model has no such task.
        InvalidValueError: A weight is not a number of 0 or more, or no task is left.
    """
    from ichprog.spec import PluginRef

    tasks = {task.name: task for task in spec.tasks}
    for name in (*heads, *dropped, *loss_weights):
        spec.task(name)
    for name, head in heads.items():
        tasks[name] = replace(tasks[name], head=PluginRef(str(head), {}))
    for name, weight in loss_weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            raise InvalidValueError(f"--loss-weight {name}", weight, "a number of 0 or more")
        tasks[name] = replace(tasks[name], loss_weight=float(weight))
    for name in dropped:
        tasks.pop(name, None)
    if not tasks:
        raise InvalidValueError("--drop-task", ", ".join(dropped), "at least one task to be left")
    return replace(spec, tasks=tuple(tasks.values()))


def _print_summary(run: Path, *, as_json: bool) -> None:
    """Print the out-of-fold AUC of each task and the name of the model."""
    from ichprog.train.summary import out_of_fold_aucs

    name, aucs = f"local-dir:{run}", out_of_fold_aucs(run)
    if as_json:
        print_json({"model": name, "out_of_fold_auc": [asdict(auc) for auc in aucs]})
        return
    for auc in aucs:
        click.echo(auc)
    click.echo(name)


def _leave_process_group() -> None:
    """Leave the group of distributed processes, if there is one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
