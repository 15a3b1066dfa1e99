"""How a model leaves the house."""

import json
import sys
from pathlib import Path

import click

import ichprog
from ichprog.cli.options import as_json, print_json


@click.command()
@click.argument("name")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where it goes.")
@click.option("--format", "form", default="onnx", show_default=True, metavar="onnx|openvino", help="What is written.")
@click.option("--fold", type=int, help="One fold instead of the mean over all there are.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where weights are kept.")
@click.option("--offline", is_flag=True, help="Leave the network alone.")
@as_json
def export(
    name: str, output: Path, form: str, fold: int | None, cache_dir: Path | None, offline: bool, as_json: bool
) -> None:
    """Write the model NAME as one file that other runtimes read, a grid to label probabilities."""
    from ichprog import export

    export.refuse_unless_possible(form)
    model = ichprog.load_model(name, fold=fold, device="cpu", cache_dir=cache_dir, offline=offline)
    path = export.export(model, output, format=form)
    folds = [file.fold for file in model.weights]
    described = {"path": str(path), "config": str(path.with_name("config.json")), "folds": folds}
    click.echo(json.dumps(described) if as_json else str(path))
    click.echo(model.spec.notice, err=True)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, where it is made.")
@click.option("--message", help="Message of the commit.")
@click.option("--dry-run", is_flag=True, help="Check everything and show what would be sent; send nothing.")
@as_json
def publish(run: Path, repo: str, private: bool, message: str | None, dry_run: bool, as_json: bool) -> None:
    """Put the folder RUN on the Hugging Face Hub: weights, description and a model card, nothing else.

    A run's record and tables name patients and stay where they are.
    """
    from ichprog import export

    if dry_run:
        parcel = export.pack(run, repo)
        if as_json:
            print_json({"repo": repo, "files": parcel.sizes(), "card": parcel.card})
            return
        for file, size in parcel.sizes().items():
            click.echo(f"{size:>12,}  {file}")
        click.echo(f"\n{parcel.card}", nl=False)
        return
    name = export.publish(run, repo, private=private, message=message, progress=sys.stderr.isatty())
    click.echo(json.dumps({"model": name}) if as_json else name)
