"""Write a model whose description changed and whose weights stay, as a folder like that of a run."""

import shutil
from dataclasses import replace
from pathlib import Path

from ichprog.errors import RunError
from ichprog.io import atomic_write, write_json
from ichprog.model import Model
from ichprog.spec import ModelSpec, Weights


def check_folder(folder: Path) -> None:
    """Check that a folder can be written.

    Args:
        folder: The folder.

    Raises:
        RunError: The folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is not an empty folder. Choose another folder.")


def write_model(model: Model, spec: ModelSpec, folder: Path) -> Path:
    """Write a folder that `load_model("local-dir:FOLDER")` loads.

    The record of a run is copied with its weights, so that leakage control still knows its patients. The description
    is written last, so that an interrupted folder is not taken for a model.

    Args:
        model: The model with the weights.
        spec: The description.
        folder: The folder, created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for file in model.weights:
        name = f"fold{file.fold}.safetensors"
        with atomic_write(folder / name) as part:
            shutil.copyfile(file.path, part)
        checksums[name] = file.sha256
    record = model.weights[0].path.with_name("run.json")
    if record.is_file():
        with atomic_write(folder / "run.json") as part:
            shutil.copyfile(record, part)
    written = replace(spec, weights=Weights(None, None, "", "safetensors", {}, checksums))
    write_json(folder / "config.json", written.to_dict())
    return folder
