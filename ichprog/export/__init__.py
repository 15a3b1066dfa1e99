"""Export a model to ONNX or OpenVINO, publish it on the Hugging Face Hub, or write predictions as DICOM objects.

`onnx` and `openvino` write files for other runtimes, `upload` sends a model to the Hub, `model_card` describes a
model in Markdown, and `dicom` writes the results of a scan for a hospital's own viewer.
"""

import importlib.util
import logging
import tempfile
from importlib import import_module
from pathlib import Path

from ichprog import hub
from ichprog.errors import SpecError, UnknownNameError, missing_extra
from ichprog.export.model_card import CAUTION, build_card, card_sections, config_json, markdown_table
from ichprog.export.upload import HubUpload, prepare_upload, publish
from ichprog.model import Model

_progress = logging.getLogger("ichprog.progress")
__all__ = [
    "CAUTION", "FORMATS", "HubUpload", "build_card", "card_sections", "check_format", "config_json", "export",
    "markdown_table", "prepare_upload", "publish",
]  # fmt: skip

FORMATS = ("onnx", "openvino")
"""Formats of `export`, each a module of this package with a function `save`."""

_REQUIRED_PACKAGES = ("onnx", "onnxscript")


def export(model: Model | str, out: str | Path, *, format: str = "onnx") -> Path:  # noqa: A002  # the usual word
    """Export a model as one network from a grid `(B, 1, D, H, W)` to label probabilities, averaged over its folds.

    The input is named "grid". A model with V clinical values has a second input "clinical" `(B, 2 V)`, as
    `ichprog.clinical.encode` returns it. Each output has the name of its task. A task that is answered voxel by voxel
    has three more outputs: `<task>_voxels` `(B, R + 1, d, h, w)`, `<task>_slices` `(B, d)` and `<task>_regions`
    `(B, R)`. The file `config.json` in the same folder describes the preprocessing and the order of the labels and
    regions. The files appear when all are complete.

    Args:
        model: A model, or a name that `load_model` takes.
        out: Folder for the files.
        format: "onnx" or "openvino".

    Returns:
        Path of the network: `model.onnx`, or `model.xml`.

    Raises:
        UnknownNameError: There is no such format or model.
        WeightsError: The weights cannot be obtained or do not fit.
        SpecError: The model combines answers from the image with clinical values, which is no part of its network.
        PluginError: A plugin uses an operation that ONNX lacks, or supports only one batch size.
        IchprogError: A package that the format needs is not installed.

    Examples:
        ```python
        from ichprog.export import export

        path = export("compact.prognosis_gcs3_age", "exported", format="openvino")
        ```
    """
    check_format(format)
    spec, files = hub.fetch(model) if isinstance(model, str) else (model.spec, model.weights)
    if any(task.combinations for task in spec.tasks):
        raise SpecError(
            f"{spec.name} cannot be exported: its combination with clinical values is no part of the network. Export "
            "the image model, and use the combination in config.json, or a model with a fusion."
        )
    folder = Path(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _progress.info("Converting %s, and comparing the result with PyTorch.", spec.name)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        path: Path = import_module(f"ichprog.export.{format}").save(spec, files, Path(scratch))
        path.with_name("config.json").write_text(config_json(spec), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in sorted(path.parent.iterdir(), key=lambda file: file.name == path.name):  # the network comes last
            file.replace(folder / file.name)
    return folder / path.name


def check_format(name: str) -> None:
    """Check that an export format exists and that its packages are installed.

    Args:
        name: Name of the format.

    Raises:
        UnknownNameError: There is no such format.
        IchprogError: A package that the format needs is not installed.
    """
    if name not in FORMATS:
        raise UnknownNameError("export format", name, FORMATS)
    if missing := [package for package in _REQUIRED_PACKAGES if not _is_installed(package)]:
        raise missing_extra("export", " and ".join(missing), f"Exporting to {name}")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module whose import is blocked
        return False
