"""What there is: models, weights, and whether all of it is whole."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

import ichprog
from ichprog.cli import plugins
from ichprog.cli.options import WRONG_USE, as_json, print_json
from ichprog.errors import IchprogError


@click.command()
@click.argument("pattern", default="*")
@as_json
def models(pattern: str, as_json: bool) -> None:
    """List the models whose names match PATTERN."""
    found = ichprog.list_models(pattern)
    if as_json:
        print_json([spec.to_dict() for spec in found])
        return
    width = max((len(spec.name) for spec in found), default=0)
    for spec in found:
        click.echo(f"{spec.name:{width}}  {spec.summary}")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Every model of the zoo.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where weights are kept.")
@as_json
@click.pass_context
def fetch(ctx: click.Context, names: tuple[str, ...], everything: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Bring models' weights into the cache, so that they load without a network."""
    from ichprog import hub

    if everything == bool(names):
        raise click.UsageError("Give names of models, or --all.")
    failed = False
    for name in names or [spec.name for spec in ichprog.list_models()]:
        try:
            _, files = hub.fetch(name, cache_dir=cache_dir)
        except IchprogError as error:
            if isinstance(error, WRONG_USE):
                raise
            failed = True
            click.echo(f"{name}: {error}", err=True)
            continue
        for file in files:
            described = {"model": name, "fold": file.fold, "path": str(file.path), "sha256": file.sha256}
            click.echo(json.dumps(described) if as_json else f"{name}  fold {file.fold}  {file.path}")
    ctx.exit(1 if failed else 0)


@click.command()
@click.argument("name", required=False)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where weights are kept.")
@as_json
@click.pass_context
def doctor(ctx: click.Context, name: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """Say what is installed, which plugins load, what is cached and whether it is whole.

    With NAME, load that model too and run its golden probe.
    """
    from ichprog import hub
    from ichprog.model import DEPENDENCIES

    model = None if name is None else ichprog.load_model(name, cache_dir=cache_dir)
    report: dict[str, Any] = {
        "installed": {"python": sys.version.split()[0], **{d: version(d) for d in DEPENDENCIES}},
        "plugins": plugins.states(),
        "cache": {
            "folder": str(hub.cache_folder(cache_dir)),
            "files": [
                {"source": f.source, "path": str(f.path), "is_valid": f.is_valid} for f in hub.cached_files(cache_dir)
            ],
        },
        "model": model
        and {"name": name, "weights": model.provenance()["weights"], "probe": model.check_golden_output()},
    }
    broken = any(p["problem"] for p in report["plugins"]) or any(not f["is_valid"] for f in report["cache"]["files"])
    broken |= model is not None and report["model"]["probe"]["state"] == "differs"
    if as_json:
        print_json(report)
    else:
        for line in _doctor_lines(report):
            click.echo(line)
    ctx.exit(1 if broken else 0)


def _doctor_lines(report: dict[str, Any]) -> Iterator[str]:
    yield "installed  " + ", ".join(f"{name} {number}" for name, number in report["installed"].items())
    problems = [p for p in report["plugins"] if p["problem"]]
    yield f"plugins    {len(report['plugins']) - len(problems)} load, {len(problems)} do not"
    yield from (f"           {p['problem']}" for p in problems)
    yield f"cache      {report['cache']['folder']}: {len(report['cache']['files'])} files of weights"
    for file in report["cache"]["files"]:
        yield f"           {'valid  ' if file['is_valid'] else 'DAMAGED'}  {file['source']}"
    if report["model"]:
        probe = report["model"]["probe"]
        difference = "" if probe["difference"] is None else f", largest difference {probe['difference']:.2g}"
        yield f"model      {report['model']['name']} loads; golden probe: {probe['state']}{difference}"
