"""The command `ichprog simulate`."""

from dataclasses import replace
from pathlib import Path

import click

from ichprog.cli import completion, progress
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, find_spec, print_path


@click.command(
    cls=Command,
    interrupted="Finished patients are kept. Repeat the command to continue.",
    epilog=examples("simulate patients --patients 60 --seed 1 --workers 2"),
)
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--patients", default=200, show_default=True, help="Number of patients.")
@click.option("--seed", default=0, show_default=True, help="Random seed; a seed gives the same patients everywhere.")
@click.option(
    "--preset",
    type=click.Choice(["realistic", "plain"]),
    default="realistic",
    show_default=True,
    help="Show what is taken for blood on real heads, or a simpler simulation in which every patient bleeds.",
)
@click.option(
    "--shared-causes",
    default=1.0,
    show_default=True,
    help="How strongly labels of auxiliary tasks depend on what the image shows; 0 not at all.",
)
@click.option(
    "--label-noise", default=0.0, show_default=True, help="Share of outcomes that are drawn at random, 0 to 1."
)
@click.option("--skull", is_flag=True, help="Show whole heads instead of the brain alone.")
@click.option("--dicom", is_flag=True, help="Write DICOM series instead of NIfTI files.")
@click.option(
    "--grid",
    "grid_of",
    metavar="MODEL",
    shell_complete=completion.models,
    help="Write scans with as many pixels as the grid of this model: several times faster.",
)
@click.option("--workers", default=1, show_default=True, help="Number of processes.")
@as_json
def simulate(
    output: Path,
    patients: int,
    seed: int,
    preset: str,
    shared_causes: float,
    label_noise: float,
    skull: bool,
    dicom: bool,
    grid_of: str | None,
    workers: int,
    as_json: bool,
) -> None:
    """Simulate a cohort into the folder OUTPUT: scans, masks of the blood, labels and true probabilities.

    An interrupted simulation is resumed by repeating the command.
    """
    from ichprog.simulate import MATRIX, find_realism
    from ichprog.simulate import simulate as run

    realism = replace(find_realism(preset), shared_causes=shared_causes, label_noise=label_noise)
    matrix = find_spec(grid_of).input.shape[2] if grid_of else MATRIX
    with progress.bar(patients, "patient") as bar:
        table = run(
            output, patients=patients, seed=seed, preset=realism, skull=skull, dicom=dicom, matrix=matrix,
            workers=workers, progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    print_path(table, as_json=as_json)
    click.echo("These patients are simulated. For research only, not for patient care.", err=True)
