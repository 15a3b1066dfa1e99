"""Convert the folds of a model to one OpenVINO network."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ichprog.export import onnx
from ichprog.hub import WeightFile
from ichprog.runtime.openvino.backend import openvino
from ichprog.spec import ModelSpec


def save(spec: ModelSpec, files: Sequence[WeightFile], folder: Path) -> Path:
    """Write a model as `model.xml` and `model.bin`, without compression to half precision.

    Args:
        spec: The model.
        files: Weights of its folds.
        folder: Existing folder for the files.

    Returns:
        Path of `model.xml`.

    Raises:
        PluginError: A plugin uses an operation that ONNX lacks, or supports only one batch size.
    """
    path = folder / "model.xml"
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
        source = onnx.save(spec, files, Path(scratch))
        openvino().save_model(openvino().Core().read_model(source), path, compress_to_fp16=False)
    return path
