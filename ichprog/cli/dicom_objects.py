"""The option --dicom-out of `ichprog predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ichprog.errors import ScanError

if TYPE_CHECKING:
    from ichprog.results import Prediction, Saliency
    from ichprog.scan import Scan
    from ichprog.sources import ScanSource

dicom_out = click.option(
    "--dicom-out", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder for DICOM objects of each scan: masks, maps, a structured report, and a page as a picture.",
)  # fmt: skip


def check_sources(sources: "list[ScanSource]", folder: Path | None) -> None:
    """Check before a scan is read that no scan is NIfTI, because DICOM objects refer to a DICOM series.

    Args:
        sources: The scans.
        folder: Folder of the objects; None if none are requested.

    Raises:
        click.UsageError: A scan is NIfTI.
    """
    from ichprog.sources import name_of

    for name in map(name_of, sources if folder else ()):
        if name.endswith((".nii", ".nii.gz")):
            raise click.UsageError(f"--dicom-out needs DICOM series, to which its objects refer. {name} is NIfTI.")


def write_objects(
    prediction: "Prediction", scan: "Scan", source: "ScanSource", maps: "Sequence[Saliency]", folder: Path
) -> str:
    """Write the DICOM objects of one scan, and return why they could not be made, or an empty text.

    Args:
        prediction: The prediction.
        scan: The checked scan.
        source: The source of the scan.
        maps: Saliency maps.
        folder: Folder of the files of this scan.
    """
    from ichprog.export.dicom import build_objects, save_objects
    from ichprog.sources import scan_of

    try:
        save_objects(build_objects(prediction, scan, scan_of(source), maps=maps), folder)
    except ScanError as error:
        return f"{prediction.scan}: no DICOM objects: {error}"
    return ""
