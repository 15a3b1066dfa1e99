"""Training: a cohort and a model description become weights, fold by fold, in a directory that is a model.

`protocol` holds the settings, `folds` splits the cohort, `grid_cache` prepares scans, `augmentation` alters them,
`losses` and `mixed_precision` define what is minimised and in which precision. `trainer` trains one fold (`fold_job`),
`cross_validation` trains all, `distributed` coordinates processes, `callbacks` report, `run_dir` writes the results.
`description` generates the texts of the trained model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ichprog.train.protocol import PRESETS, QUIRKS, Protocol

if TYPE_CHECKING:
    from ichprog.cohort import Cohort
    from ichprog.scan.brain import Brain
    from ichprog.spec import ModelSpec
    from ichprog.train.folds import Fold

__all__ = ["PRESETS", "QUIRKS", "Protocol", "TrainOptions", "resolve_spec", "train"]


@dataclass(frozen=True)
class TrainOptions:
    """Choose the hardware, the cache and the reports of a training.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        brain: "auto" extracts the brain if a skull is detected, "extract" always, "given" never; or the name of a
            brain-extractor plugin; or a mask that fits every scan.
        cache_dir: Folder of prepared grids; `~/.cache/ichprog` or `$ICHPROG_CACHE` by default.
        workers: Number of processes that prepare grids.
        progress: Whether progress is shown on standard error: bars on a terminal, otherwise one line per epoch.
        trackers: Names of experiment trackers of Accelerate, such as "tensorboard", "mlflow" or "trackio".
    """

    device: str = "auto"
    brain: "Brain" = "auto"
    cache_dir: str | Path | None = None
    workers: int = 1
    progress: bool = False
    trackers: Sequence[str] = ()


def train(
    cohort: "Cohort | str | Path",
    model: "ModelSpec | str | Path",
    output: str | Path,
    *,
    folds: "int | Sequence[Fold]" = 10,
    only_folds: Collection[int] | None = None,
    protocol: Protocol = PRESETS["default"],
    name: str | None = None,
    start_from: str | Path | None = None,
    resume: bool = False,
    options: TrainOptions = TrainOptions(),
) -> Path:
    """Train a model by cross-validation.

    Args:
        cohort: The patients, as a cohort or the path of a table. `Cohort.join` combines several.
        model: A model description, a zoo name, "local-dir:PATH", "hf-hub:REPO@REVISION" or a JSON file. Existing
            weights of the model are not used, and its texts are not inherited.
        output: Directory of the run. Afterwards it is a model, "local-dir:OUTPUT".
        folds: Number of folds, stratified by the first task's label; or the folds themselves.
        only_folds: Folds to train now; all by default.
        protocol: The protocol.
        name: Name of the new model; the description's own by default.
        start_from: Folder of a run with the same folds, backbone and input. Each fold starts from the backbone of the
            same fold of that run, and its heads start anew.
        resume: Whether `output` may hold this run already. The run then continues after its last complete epoch.
        options: Device, cache, workers, progress and trackers.

    Returns:
        `output`.

    Raises:
        CohortError: The patients are too few or have only one label, or scans cannot be used.
        InvalidValueError: The batch size or the device does not suit the number of processes, or the protocol freezes
            the backbone and there is no run to start from.
        RunError: The directory holds another run, the run to start from cannot be used, the disk is full, a loss is not
            finite, bfloat16 is requested but not supported, or a tracker is not installed.
        SpecError: The model description is invalid.
        UnknownNameError: The model, a plugin, fold, device or tracker does not exist.
        PluginError: A plugin of the model cannot be loaded or breaks its contract.

    Examples:
        ```python
        train("cohort.csv", "densenet121.prognosis", "run", folds=5, options=TrainOptions(device="cuda"))
        ```
    """
    from ichprog.cohort import Cohort
    from ichprog.train.cross_validation import CrossValidation
    from ichprog.train.description import describe_training

    if not isinstance(cohort, Cohort):
        cohort = Cohort.read(cohort)
    parent = resolve_spec(model)
    count = folds if isinstance(folds, int) else len(folds)
    spec = describe_training(parent, name, cohort.origin, count, protocol)
    validation = CrossValidation(cohort, spec, folds, protocol, options, description=parent.name, start_from=start_from)
    validation.train(Path(output), only_folds, resume=resume)
    return Path(output)


def resolve_spec(model: "ModelSpec | str | Path") -> "ModelSpec":
    """Return a model description without loading weights.

    Args:
        model: A model description, a zoo name, "local-dir:PATH", "hf-hub:REPO@REVISION" or a JSON file.

    Raises:
        SpecError: The description is invalid.
        UnknownNameError: The model does not exist.

    Examples:
        >>> resolve_spec("perez2023.prognosis").name
        'perez2023.prognosis'
    """
    from ichprog import hub, zoo
    from ichprog.spec import ModelSpec

    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, Path) or model.endswith(".json"):
        return ModelSpec.read(Path(model).expanduser())
    if model.startswith(("local-dir:", "hf-hub:")):
        return hub.resolve(model)[0]
    return zoo.find(model)
