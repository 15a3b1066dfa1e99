"""Simulated patients, by the folder."""

import sys
from pathlib import Path

import click

from ichprog.cli.options import as_json, print_path


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--patients", default=200, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Which ones; one seed gives the same patients anywhere.")
@click.option("--skull", is_flag=True, help="Whole heads instead of the brain alone.")
@click.option("--dicom", is_flag=True, help="A DICOM series each instead of a NIfTI file.")
@click.option("--workers", default=1, show_default=True, help="Processes that share the work.")
@as_json
def simulate(out: Path, patients: int, seed: int, skull: bool, dicom: bool, workers: int, as_json: bool) -> None:
    """Simulate a cohort into the folder OUT: scans, masks of the blood, labels and the truth behind them.

    A run that was interrupted goes on where it was.
    """
    from tqdm import tqdm

    from ichprog.simulate import simulate as run

    with tqdm(total=patients, unit="patient", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        path = run(
            out, patients=patients, seed=seed, skull=skull, dicom=dicom, workers=workers,
            progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    print_path(path, as_json=as_json)
    click.echo("These patients are simulated. For research only, not for patient care.", err=True)
