"""The command `ichprog cohort`."""

import json
from pathlib import Path

import click

from ichprog.cli.options import as_json


@click.group()
def cohort() -> None:
    """Create cohorts: tables of patients with scans and labels."""


@cohort.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Path of the table; DIR/cohort.csv by default.")
@as_json
def csic(folder: Path, output: Path | None, as_json: bool) -> None:
    """Create the table of the published data set in the folder DIR."""
    from ichprog.cohort import CSIC_LEFT_OUT, from_csic

    published = from_csic(folder)
    path = published.write(output or folder / "cohort.csv")
    summary = {"path": str(path), "patients": len(published), "left_out": [CSIC_LEFT_OUT]}
    click.echo(json.dumps(summary) if as_json else f"{path}  {len(published)} patients")
    click.echo(f"Patient {CSIC_LEFT_OUT} is left out, as in the published protocol.", err=True)
