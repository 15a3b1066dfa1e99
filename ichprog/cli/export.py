"""Export a model to a file, or publish it on the Hugging Face Hub."""

import json
import sys
from pathlib import Path

import click

import ichprog
from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, cache_dir, fold, offline, print_json


@click.command(cls=Command, epilog=examples("export MODEL --format openvino -o exported"))
@click.argument("name", shell_complete=completion.models)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Output folder.")
@click.option(
    "--format", "form", default="onnx", show_default=True, help="File format.", **completion.one_of("onnx", "openvino")
)
@fold
@cache_dir
@offline
@as_json
def export(
    name: str, output: Path, form: str, fold: int | None, cache_dir: Path | None, offline: bool, as_json: bool
) -> None:
    """Export the model NAME, from a grid to label probabilities, as one file for other runtimes."""
    from ichprog import export

    export.check_format(form)
    # Only the description and the weights are used, so that nothing has to be compiled.
    model = ichprog.load_model(name, fold=fold, device="cpu", runtime="cached", cache_dir=cache_dir, offline=offline)
    path = export.export(model, output, format=form)
    folds = [file.fold for file in model.weights]
    written = {"path": str(path), "config": str(path.with_name("config.json")), "folds": folds}
    click.echo(json.dumps(written) if as_json else str(path))
    click.echo(model.spec.notice, err=True)


@click.command(cls=Command, epilog=examples("publish run my-group/my-model --dry-run"))
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is created.")
@click.option("--message", help="Commit message.")
@click.option("--dry-run", is_flag=True, help="Check everything and show what would be uploaded, but upload nothing.")
@as_json
def publish(run: Path, repo: str, private: bool, message: str | None, dry_run: bool, as_json: bool) -> None:
    """Upload the model in the folder RUN to the Hugging Face Hub: weights, description and model card.

    Records and tables of a run name patients and are not uploaded.
    """
    from ichprog import export

    if dry_run:
        upload = export.prepare_upload(run, repo)
        if as_json:
            unwritten = list(upload.spec.unwritten)
            print_json({"repo": repo, "files": upload.sizes(), "unwritten": unwritten, "card": upload.card})
        else:
            for file, size in upload.sizes().items():
                click.echo(f"{size:>12,}  {file}")
            click.echo(f"\n{upload.card}", nl=False)
        upload.require_written()
        return
    name = export.publish(run, repo, private=private, message=message, progress=sys.stderr.isatty())
    click.echo(json.dumps({"model": name}) if as_json else name)
