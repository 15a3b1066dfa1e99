"""List models, fetch their weights and check the installation."""

import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

import ichprog
from ichprog.cli import completion, plugins
from ichprog.cli.command import Command, examples
from ichprog.cli.options import WRONG_USE, as_json, cache_dir, print_json
from ichprog.errors import IchprogError, UnknownNameError


@click.command(cls=Command, epilog=examples("models", "models 'densenet121.*' --json"))
@click.argument("pattern", default="*", shell_complete=completion.models)
@as_json
def models(pattern: str, as_json: bool) -> None:
    """List the models whose names match the shell pattern PATTERN."""
    specs = ichprog.list_models(pattern)
    if not specs:
        raise UnknownNameError("model or pattern", pattern, [spec.name for spec in ichprog.list_models()])
    if as_json:
        print_json([spec.to_dict() for spec in specs])
        return
    width = max(len(spec.name) for spec in specs)
    for spec in specs:
        click.echo(f"{spec.name:{width}}  {spec.summary}")


@click.command(
    cls=Command,
    interrupted="Finished files are kept. Repeat the command.",
    epilog=examples("fetch MODEL", "fetch --all"),
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completion.models)
@click.option("--all", "is_all", is_flag=True, help="Fetch every model of the zoo.")
@cache_dir
@as_json
@click.pass_context
def fetch(ctx: click.Context, names: tuple[str, ...], is_all: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Download the weights of models into the cache, so that the models load without a network."""
    from ichprog import hub

    if is_all == bool(names):
        raise click.UsageError("Give names of models, or --all.")
    has_failed, chosen = False, names or [spec.name for spec in ichprog.list_models()]
    _announce_size(chosen, cache_dir)
    for name in chosen:
        try:
            _, files = hub.fetch(name, cache_dir=cache_dir)
        except IchprogError as error:
            if isinstance(error, WRONG_USE):
                raise
            has_failed = True
            click.echo(f"{name}: {error}", err=True)
            continue
        for file in files:
            row = {"model": name, "fold": file.fold, "path": str(file.path), "sha256": file.sha256}
            click.echo(json.dumps(row) if as_json else f"{name}  fold {file.fold}  {file.path}")
    ctx.exit(1 if has_failed else 0)


def _announce_size(names: Sequence[str], cache_dir: Path | None) -> None:
    """Print how much is downloaded for several models. Errors are left to the download itself."""
    from ichprog import hub

    if len(names) == 1:
        return  # its download is announced with its size
    try:
        size = sum(
            hub.missing_bytes(name, cache_dir=cache_dir)
            for name in names
            if not name.startswith(("hf-hub:", "local-dir:"))
        )
    except IchprogError:
        return
    click.echo(f"{len(names)} models, {size / 1e6:.0f} MB to download.", err=True)


@click.command(cls=Command, epilog=examples("doctor MODEL"))
@click.argument("name", required=False, shell_complete=completion.models)
@cache_dir
@as_json
@click.pass_context
def doctor(ctx: click.Context, name: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """Check the installed versions, the plugins and the cached weights.

    With NAME, load that model too and compare its output with the golden output of its description.
    """
    report = _check(name, cache_dir)
    if as_json:
        print_json(report)
    else:
        for line in _format_report(report):
            click.echo(line)
    model = report["model"]
    is_broken = any(plugin["problem"] for plugin in report["plugins"])
    is_broken |= not all(file["is_valid"] for file in report["cache"]["files"])
    is_broken |= model is not None and model["golden_output"]["state"] == "differs"
    ctx.exit(1 if is_broken else 0)


def _check(name: str | None, cache_dir: Path | None) -> dict[str, Any]:
    from ichprog import hub
    from ichprog.model import DEPENDENCIES

    model = None if name is None else ichprog.load_model(name, cache_dir=cache_dir)
    files = hub.cached_files(cache_dir)
    return {
        "installed": {"python": sys.version.split()[0], **{package: version(package) for package in DEPENDENCIES}},
        "plugins": plugins.check_all(),
        "cache": {
            "folder": str(hub.cache_folder(cache_dir)),
            "files": [{"source": each.source, "path": str(each.path), "is_valid": each.is_valid} for each in files],
        },
        "model": None
        if model is None
        else {
            "name": name,
            "weights": model.provenance()["weights"],
            "golden_output": model.check_golden_output(),
        },
    }


def _format_report(report: dict[str, Any]) -> Iterator[str]:
    yield "installed  " + ", ".join(f"{name} {number}" for name, number in report["installed"].items())
    problems = [plugin["problem"] for plugin in report["plugins"] if plugin["problem"]]
    yield f"plugins    {len(report['plugins']) - len(problems)} load, {len(problems)} do not"
    yield from (f"           {problem}" for problem in problems)
    files = report["cache"]["files"]
    yield f"cache      {report['cache']['folder']}: {len(files)} weight files"
    yield from (f"           {'valid  ' if file['is_valid'] else 'DAMAGED'}  {file['source']}" for file in files)
    if model := report["model"]:
        golden = model["golden_output"]
        difference = "" if golden["difference"] is None else f", largest difference {golden['difference']:.2g}"
        yield f"model      {model['name']} loads; golden output: {golden['state']}{difference}"
