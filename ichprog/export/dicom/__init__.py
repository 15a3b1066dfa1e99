"""DICOM objects of a prediction, for a hospital's own viewer: masks, maps, a structured report and a page.

`images` builds segmentations, parametric maps and the page, `report` the structured report, and `identity` holds what
they share. The objects refer to the series that was read, and their pixels are those of its slices.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichprog.errors import ScanError, missing_extra
from ichprog.io import atomic_write
from ichprog.results import Prediction, Saliency
from ichprog.scan import Scan
from ichprog.scan.source_series import read_source_series

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["build_objects", "save_objects"]


def build_objects(
    prediction: Prediction, scan: Scan, source: Any, *, maps: Sequence[Saliency] = ()
) -> "dict[str, Dataset]":
    """Build the DICOM objects of a prediction.

    The objects carry the identity of the patient and of the study, as an archive needs. Their identifiers are hashes of
    the source, the models and the weights, and their dates are those of the series. So the same prediction gives the
    same objects, and an archive that has them already keeps one copy.

    Args:
        prediction: The prediction of the scan.
        scan: The checked scan, from `Model.load_scan`.
        source: The DICOM source of the scan: a folder, a .zip, a file, or a study that `find_scans` returns.
        maps: Saliency maps of the scan.

    Returns:
        The objects by name: "haemorrhage" and "brain" unless the mask is empty, "report", "page", and one for each map.

    Raises:
        ScanError: The source is no DICOM, or its header does not suit the objects (code "dicom-objects"); or the
            prediction has an error.
        IchprogError: highdicom or matplotlib is not installed.

    Examples:
        ```python
        from ichprog.export.dicom import build_objects, save_objects

        model = ichprog.load_model("compact.prognosis_gcs3_age")
        scan = model.load_scan("series")
        prediction = ichprog.predict(model, scan, haemorrhage=True)
        save_objects(build_objects(prediction, scan, "series"), "objects")
        ```
    """
    try:
        import highdicom
        import matplotlib
    except ImportError as error:
        raise missing_extra("dicom", "highdicom and matplotlib", "Writing DICOM objects") from error
    del highdicom, matplotlib
    if prediction.error is not None:
        raise ScanError(f"{prediction.scan} has no prediction: {prediction.error['message']}", code="dicom-objects")
    series = read_source_series(source)
    try:
        return _build(prediction, scan, series, maps)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        message = (
            f"{source}: no DICOM objects can be made of this series: {type(error).__name__}: {error}. Export it again, "
            "with the attributes of patient and study."
        )
        raise ScanError(message, code="dicom-objects") from error


def _build(prediction: Prediction, scan: Scan, series: Any, maps: Sequence[Saliency]) -> "dict[str, Dataset]":
    from ichprog.export.dicom import images
    from ichprog.export.dicom.identity import build_context
    from ichprog.export.dicom.report import structured_report

    context = build_context(prediction, series)
    blood = prediction.haemorrhage
    built = {
        "haemorrhage": None if blood is None else images.segment_haemorrhage(context, blood),
        "brain": images.segment_brain(context, scan),
    }
    masks = {name: mask for name, mask in built.items() if mask is not None}
    objects: dict[str, Dataset] = {
        **masks,
        "report": structured_report(context, masks),
        "page": images.capture_page(context, scan, maps),
    }
    for number, saliency in enumerate(maps, start=1):
        objects[f"map_{saliency.task}_{saliency.method}"] = images.parametric_map(context, saliency, number)
    return objects


def save_objects(objects: "Mapping[str, Dataset]", folder: str | Path) -> list[Path]:
    """Write DICOM objects as files, each whole or not at all.

    Args:
        objects: Objects by name, from `build_objects`.
        folder: Folder of the files. It is created if missing.

    Returns:
        The paths.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, data in objects.items():
        paths.append(target / f"{name}.dcm")
        with atomic_write(paths[-1], sole_writer=True) as partial:
            data.save_as(partial, enforce_file_format=True)
    return paths
