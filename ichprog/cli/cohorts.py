"""Tables of patients."""

import json
from pathlib import Path

import click

from ichprog.cli.options import as_json


@click.group()
def cohort() -> None:
    """Make a cohort: a table of patients, their scans and what is known of them."""


@cohort.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The table; DIR/cohort.csv if absent.")
@as_json
def csic(folder: Path, output: Path | None, as_json: bool) -> None:
    """Make one from the published data set, as it lies in DIR."""
    from ichprog.cohort import CSIC_LEFT_OUT, from_csic

    made = from_csic(folder)
    path = made.write(output or folder / "cohort.csv")
    described = {"path": str(path), "patients": len(made), "left_out": [CSIC_LEFT_OUT]}
    click.echo(json.dumps(described) if as_json else f"{path}  {len(made)} patients")
    click.echo(f"Patient {CSIC_LEFT_OUT} is left out, as in the published protocol.", err=True)
