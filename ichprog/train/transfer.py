"""Start the folds of a run from the backbones of another run, without training on a patient that is tested."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ichprog.errors import RunError
from ichprog.spec import ModelSpec


def find_backbones(
    start_from: str | Path, spec: ModelSpec, membership: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[int, Path]:
    """Return the weights that each fold starts from.

    Args:
        start_from: Folder of a run with the same backbone, input and number of folds.
        spec: The model that is trained.
        membership: Names of the patients of each part, "train", "validation" and "test", by fold.

    Returns:
        A safetensors file by fold.

    Raises:
        RunError: The folder holds no run, a fold of the run is not done, the networks differ, or a fold of the run was
            trained or validated with a patient that the same fold of this run validates or tests.
    """
    folder = Path(start_from)
    record, model = _read(folder / "run.json"), _read(folder / "config.json")
    other = ModelSpec.from_dict(model)
    if (other.backbone, other.input) != (spec.backbone, spec.input):
        raise RunError(
            f"start_from: {folder} has another backbone or input than {spec.name}. Choose a run with the same ones."
        )
    found = {}
    for fold, parts in membership.items():
        weights = folder / f"fold{fold}.safetensors"
        if weights.name not in other.weights.sha256:
            raise RunError(f"start_from: fold {fold} of {folder} is not done. Train it first.")
        before = record["membership"].get(fold, {})
        seen = {*before.get("train", ()), *before.get("validation", ())}
        if leaked := sorted(seen & {*parts["test"]}) or sorted(set(before.get("train", ())) & {*parts["validation"]}):
            raise RunError(
                f"start_from: fold {fold} of {folder} was trained with patient {leaked[0]}, who is held out in fold "
                f"{fold} of this run. Use the same folds for both runs."
            )
        found[int(fold)] = weights
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"start_from: {path} cannot be read: {error}. Choose the folder of a run.") from error
    return content
