"""Write reports of predictions that people open, while predicting or from a file of results."""

import dataclasses
import glob
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, find_spec, print_path
from ichprog.cli.scan_runs import key_of, stems
from ichprog.errors import ScanError, missing_extra

if TYPE_CHECKING:
    import numpy as np

    from ichprog.clinical_scores import ClinicalScores
    from ichprog.reporting.volumes import Layer, Volumes
    from ichprog.result_files import Key
    from ichprog.results import Prediction, Saliency
    from ichprog.scan import Scan
    from ichprog.sources import ScanSource
    from ichprog.spec import ModelSpec

_LONGEST_STEM = 120
_AFFINE_MM = 0.1
_NOT_FOUND = (
    "The file of the scan was not found at the path in the results, so that there are no pictures. Run the command in "
    "the folder in which the predictions were made."
)

identifiers = click.option(
    "--identifiers", is_flag=True, help="Show in reports the paths of scans and what DICOM headers say of the series."
)
pdf = click.option("--pdf", is_flag=True, help="Also write each report as a PDF of one page. Needs Chromium.")
report_options = [
    click.option(
        "--report", "report", type=click.Path(path_type=Path), metavar="DIR",
        help="Folder for reports: one HTML file with a viewer for each scan, and an index.",
    ),
    identifiers,
    pdf,
]  # fmt: skip


class ReportFolder:
    """A folder of reports that is being filled. The index is written when the block ends, even after an interruption.

    Args:
        folder: The folder, or None for no reports; then every method does nothing.
        keys: Patient and scan of every result, as in a file of results. They determine the names of the reports.
        has_pdf: Whether to write each report as a PDF, too.
        has_identifiers: Whether reports show paths and what DICOM headers say.

    Raises:
        IchprogError: A package or program that reports need is not installed.
        click.UsageError: Two reports would have the same name, or an option needs a folder.
    """

    def __init__(
        self,
        folder: Path | None,
        keys: "Sequence[Key]",
        *,
        has_pdf: bool = False,
        has_identifiers: bool = False,
    ) -> None:
        if folder is None and (has_pdf or has_identifiers):
            raise click.UsageError("--pdf and --identifiers need --report: a folder for the reports.")
        self.folder, self._has_pdf, self._has_identifiers = folder, has_pdf, has_identifiers
        self.written: list[Path] = []
        if folder is None:
            return
        _require_packages()
        if has_pdf:
            from ichprog.reporting.pdf import find_chromium

            find_chromium()
        self._name_of = dict(zip(keys, _names(keys), strict=True))

    def __enter__(self) -> Self:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            from ichprog.reporting.report_index import write_index

            write_index(self.folder)

    def add_prediction(
        self,
        source: "ScanSource",
        prediction: "Prediction",
        scores: "ClinicalScores | None",
        spec: "ModelSpec",
        examined: "Scan | ScanError",
        maps: "Mapping[Any, Saliency]",
    ) -> None:
        """Write the report of a prediction.

        Args:
            source: The scan.
            prediction: The prediction.
            scores: Clinical scores of the patient, or None.
            spec: Description of the model.
            examined: The checked scan, or its error.
            maps: Saliency maps.
        """
        if self.folder is None:
            return
        from ichprog.reporting.prediction_report import layers_of
        from ichprog.reporting.volumes import prepare_volumes
        from ichprog.results import with_scores
        from ichprog.scan import read
        from ichprog.sources import scan_of

        volumes = None
        if not isinstance(examined, ScanError):  # its HU are 0 outside the brain; a report shows the whole head
            layers = layers_of(prediction, examined.brain, list(maps.values()))
            volumes = prepare_volumes(read(scan_of(source)), layers)
        self.add(key_of(source), with_scores(prediction, scores), spec, volumes)

    def add(
        self,
        key: "Key",
        record: Mapping[str, Any],
        spec: "ModelSpec | None",
        volumes: "Volumes | None",
        no_viewer: str = "",
    ) -> None:
        """Write the report of a result.

        Args:
            key: Patient and scan by which a file of results knows the result.
            record: The result as plain data.
            spec: Description of the model, or None.
            volumes: Scan and layers for the viewer, or None.
            no_viewer: Why there is no viewer.
        """
        if self.folder is None:
            return
        from ichprog.cohort import is_simulated
        from ichprog.io import write_text
        from ichprog.reporting.pdf import write_pdf
        from ichprog.reporting.prediction_report import render

        name = self._name_of[key]
        about: dict[str, Any] = {
            "name": name, "volumes": volumes, "no_viewer": no_viewer, "spec": spec,
            "is_simulated": is_simulated(Path(key[1])), "identifiers": self._has_identifiers,
        }  # fmt: skip
        path = self.folder / f"{name}.html"
        write_text(path, render(record, **about), sole_writer=True)
        self.written.append(path)
        if self._has_pdf:
            write_pdf(render(record, **about, with_scripts=False), path.with_suffix(".pdf"))

    def print_path(self) -> None:
        """Print to standard error where the reports are."""
        if self.folder is not None and (reports := sorted(self.folder.glob("*.html"))):
            index = self.folder / "index.html"
            click.echo(f"Reports: {index if index in reports else reports[0]}", err=True)


@click.command(
    cls=Command,
    interrupted="Finished reports are kept. Repeat the command.",
    epilog=examples("report results.json -o reports --maps maps --masks masks"),
)
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS")
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path), required=True, help="Folder for the reports."
)
@click.option("--maps", type=click.Path(path_type=Path), metavar="DIR", help="Folder of maps of `ichprog predict`.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Folder of masks of `ichprog predict`.")
@click.option(
    "-m", "--model", "model", shell_complete=completion.models,
    help="Model of the results, for the meaning of its tasks. By default, that of the zoo, if the model is there.",
)  # fmt: skip
@identifiers
@pdf
@as_json
def report(
    results: Path,
    folder: Path,
    maps: Path | None,
    masks: Path | None,
    model: str | None,
    identifiers: bool,
    pdf: bool,
    as_json: bool,
) -> None:
    """Write reports from RESULTS: a .json or .jsonl file of `ichprog predict` or `ichprog haemorrhage`.

    The scans are read at the paths in the results.
    """
    from ichprog.reporting import prediction_report
    from ichprog.result_files import read_records

    records = read_records(results)
    keys = [(str(record.get("patient") or ""), record["scan"]) for record in records]
    given = None if model is None else find_spec(model)
    stem_of = dict(zip(keys, stems([Path(scan) for _, scan in keys]), strict=True))
    with ReportFolder(folder, keys, has_pdf=pdf, has_identifiers=identifiers) as reports:
        for key, record in zip(keys, records, strict=True):
            spec = given or prediction_report.find_spec(str(record["model"]))
            volumes, problem = _find_volumes(record, stem_of[key], maps, masks)
            reports.add(key, record, spec, volumes, problem)
            if as_json:
                click.echo(json.dumps({"scan": key[1], "report": str(reports.written[-1])}))
            else:
                print_path(reports.written[-1], as_json=False)
    reports.print_path()
    click.echo(prediction_report.NOTICE, err=True)


def _find_volumes(
    record: Mapping[str, Any], stem: str, maps: Path | None, masks: Path | None
) -> "tuple[Volumes | None, str]":
    """Return the scan of a result with its maps and masks, or why there is none."""
    from ichprog.reporting.volumes import prepare_volumes
    from ichprog.scan import read

    if record.get("error") is not None:
        return None, ""
    source = _find_scan(record)
    if source is None:
        return None, _NOT_FOUND
    try:
        scan = read(source)
    except ScanError as error:
        return None, f"The scan cannot be read any more ({error.code}), so that there are no pictures."
    return prepare_volumes(scan, list(_find_layers(record, scan, stem, maps, masks))), ""


def _find_scan(record: Mapping[str, Any]) -> "ScanSource | None":
    """Return the scan of a result, with the DICOM series that was read, or None if it is not there."""
    from ichprog.scan.studies import DicomStudy, find_studies, study_of

    path = Path(record["scan"])
    series = ((record.get("provenance") or {}).get("scan") or {}).get("series") or {}
    study: DicomStudy | None = None
    if path.exists():
        if not series:
            return path
        study = study_of(path)
    else:
        folder = next((each for each in path.parents if each.exists()), None)  # of a study with a pseudonym
        if folder is not None and len(path.relative_to(folder).parts) == 2 and path.name.startswith("study-"):
            study = next((each for each in find_studies(folder) if str(each) == str(path)), None)
    return None if study is None else dataclasses.replace(study, series=series.get("pseudonym"))


def _find_layers(
    record: Mapping[str, Any], scan: "Scan", stem: str, maps: Path | None, masks: Path | None
) -> "Iterator[Layer]":
    """Yield the masks and maps of a result, from the folders of `ichprog predict`."""
    from ichprog.reporting.volumes import Layer
    from ichprog.scan import load_regions

    blood = record.get("haemorrhage") or record
    for kind, regions in (("brain", ()), ("haemorrhage", tuple(blood.get("regions") or ()))):
        path = None if masks is None else masks / f"{stem}_{kind}.nii.gz"
        if path is not None and path.is_file():
            yield Layer(kind.capitalize(), kind, load_regions(path, scan), regions)  # type: ignore[arg-type]
    for task in record.get("tasks") or () if maps is not None else ():
        for path in sorted(Path(str(maps)).glob(f"{glob.escape(f'{stem}_{task}_')}*.nii.gz")):
            yield Layer(_map_name(path, stem, task), "map", _read_map(path, scan))


def _read_map(path: Path, scan: "Scan") -> "np.ndarray":
    """Return a map in the voxels of its scan."""
    from ichprog.scan import read

    image = read(path)
    if image.hu.shape != scan.hu.shape or abs(image.affine - scan.affine).max() > _AFFINE_MM:
        message = f"{path}: the map does not have the voxels of the scan {scan.name}. Give the maps of these results."
        raise ScanError(message, code="other-scan")
    return image.hu


def _map_name(path: Path, stem: str, task: str) -> str:
    """Return what a map shows, by its name and by what `Saliency.save` writes into its header."""
    import nibabel as nib

    method = path.name.removesuffix(".nii.gz").removeprefix(f"{stem}_{task}_")
    header: Any = nib.load(path).header
    described = bytes(header["descrip"]).decode("ascii", "replace").rstrip("\0")
    label = re.match(rf"{re.escape(method)} of {re.escape(task)} (.*), ", described)
    return f"Map of {task}: {label[1]}, {method}" if label else f"Map of {task}, {method}"


def _names(keys: "Sequence[Key]") -> list[str]:
    """Return a name for each report: that of the file of its scan, or a pseudonym for DICOM."""
    from ichprog.pseudonyms import pseudonym
    from ichprog.reporting.privacy import is_dicom, public_name

    short = stems([Path(scan) for _, scan in keys])
    names = [public_name(scan) if is_dicom(scan) else stem for (_, scan), stem in zip(keys, short, strict=True)]
    return [name if len(name) <= _LONGEST_STEM else f"{name[:_LONGEST_STEM]}-{pseudonym(name)}" for name in names]


def _require_packages() -> None:
    """Raise an error if a package that reports need is not installed."""
    for package, module in (("jinja2", "jinja2"), ("pillow", "PIL")):
        if importlib.util.find_spec(module) is None:
            raise missing_extra("report", package, "A report of a prediction")
