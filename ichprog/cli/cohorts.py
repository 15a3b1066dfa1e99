"""The command `ichprog cohort`."""

import json
from pathlib import Path

import click

from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json


@click.group(epilog=examples("cohort csic downloads/csic"))
def cohort() -> None:
    """Create cohorts: tables of patients with scans and labels."""


@cohort.command(cls=Command, epilog=examples("cohort csic downloads/csic -o cohort.csv"))
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


@cohort.command("ct-ich", cls=Command, epilog=examples("cohort ct-ich downloads/ct-ich -o cohort.csv"))
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Path of the table; DIR/cohort.csv by default.")
@as_json
def ct_ich(folder: Path, output: Path | None, as_json: bool) -> None:
    """Create the table of the PhysioNet data set ct-ich in the folder DIR."""
    from ichprog.cohort import from_ct_ich

    published = from_ct_ich(folder)
    path = published.write(output or folder / "cohort.csv")
    bleeding = int(published.numbers("haemorrhage").sum())
    summary = {"path": str(path), "patients": len(published), "with_haemorrhage": bleeding}
    text = f"{path}  {len(published)} patients, {bleeding} with a haemorrhage"
    click.echo(json.dumps(summary) if as_json else text)
