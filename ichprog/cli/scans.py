"""List what folders of scans hold."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog.cli import progress
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, print_json
from ichprog.errors import ScanError

if TYPE_CHECKING:
    from ichprog.sources import ScanSource


@click.command(
    cls=Command, epilog=examples("scans export.zip", "scans export/ --volumes volumes --mapping identifiers.csv")
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option(
    "--volumes", type=click.Path(path_type=Path), metavar="DIR",
    help="Write each scan as NIfTI, aligned and evenly spaced, so that maps can be laid over it.",
)  # fmt: skip
@click.option(
    "--mapping", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write a table of pseudonyms and the identifiers behind them, which only you can read.",
)  # fmt: skip
@as_json
@click.pass_context
def scans(
    ctx: click.Context, paths: tuple[Path, ...], volumes: Path | None, mapping: Path | None, as_json: bool
) -> None:
    """List the scans in PATH: for DICOM, the patients, studies and series, and which series would be read.

    Patients and studies have pseudonyms. The names of scans are those in the results of `ichprog predict`.
    """
    from ichprog.cli.scan_runs import find_scans, save_image, stems
    from ichprog.scan import read, write_mapping
    from ichprog.scan.studies import study_of

    sources = find_scans(paths)
    described = [_describe(source) for source in sources]
    has_failed = any(each["problem"] for each in described)
    if as_json:
        print_json(described)
    else:
        click.echo("\n".join(_format(each) for each in described))
    if mapping is not None:
        write_mapping(filter(None, map(study_of, sources)), mapping)
        click.echo(f"{mapping} identifies patients. Keep it apart from the results.", err=True)
    if volumes:
        with progress.bar(len(sources), "scan") as bar:
            for source, stem, each in zip(sources, stems(sources), described, strict=True):
                if each["problem"] is None:
                    scan = read(source)
                    save_image(scan.image(scan.hu), volumes / f"{stem}.nii.gz")
                bar.update()
    ctx.exit(1 if has_failed else 0)


def _describe(source: "ScanSource") -> dict[str, Any]:
    """Describe a scan; for DICOM with all series of the study."""
    from ichprog.scan.studies import describe_study, study_of
    from ichprog.sources import name_of

    try:
        study = study_of(source)
        if study is not None:
            return describe_study(study).to_dict() | {"scan": name_of(source)}
    except ScanError as error:
        return {"scan": name_of(source), "series": [], "problem": str(error)}
    return {"scan": name_of(source), "series": [], "problem": None}


def _format(described: dict[str, Any]) -> str:
    """Return one line for a scan, and one for each of its series."""
    lines = [described["scan"]]
    if "patient" in described:
        lines[0] += f"  patient {described['patient']}, study {described['study']}"
    for series in described["series"]:
        mark = "read" if series["taken"] else "    "
        about = f"series {series['number'] or '?'} {series['description']!r}, {series['slices']} slices"
        about += f" every {series['spacing_mm']:g} mm over {series['coverage_mm']:g} mm"
        lines.append(f"  {mark}  {about}: {series['reason'] or 'suitable'}")
    if described["problem"]:
        lines.append(f"  cannot be read: {described['problem']}")
    return "\n".join(lines)
