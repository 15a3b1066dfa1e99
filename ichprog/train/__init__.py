"""Training: a cohort and a model's description become weights, fold by fold, in a folder that is a model.

`protocol` says how, `folds` who, `grids` keeps prepared scans, `augment` alters them, `objective` is what is minimised,
`rounding` is its precision, `loop` trains one fold, `team` is the processes that do so together, `run` the folder.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ichprog.errors import RunError, UnknownNameError
from ichprog.train.protocol import PRESETS, QUIRKS, Protocol

if TYPE_CHECKING:
    from ichprog.cohort import Cohort
    from ichprog.scan import BrainMode
    from ichprog.spec import ModelSpec
    from ichprog.train.folds import Fold

__all__ = ["PRESETS", "QUIRKS", "Protocol", "spec_of", "train"]


def train(
    cohort: "Cohort | str | Path",
    model: "ModelSpec | str | Path",
    out: str | Path,
    *,
    folds: "int | Sequence[Fold]" = 10,
    only: Collection[int] | None = None,
    protocol: Protocol = PRESETS["default"],
    resume: bool = False,
    name: str | None = None,
    brain: "BrainMode" = "auto",
    device: str = "auto",
    cache_dir: str | Path | None = None,
    workers: int = 1,
    progress: bool = False,
    tensorboard: bool = False,
) -> Path:
    """Trains a model by cross-validation.

    Args:
        cohort: The patients; several tables as one by `Cohort.join`.
        model: What is trained: a description, a name of the zoo, "local-dir:PATH", or a path to a JSON file. Weights
            that belong to it are not read.
        out: The folder of the run. Afterwards it is a model, `local-dir:OUT`.
        folds: The number of folds, which are then split by the first task's label; or each fold's patients.
        only: The folds that are trained now, where it is not all.
        protocol: How.
        resume: Whether `out` may hold this run already; then it goes on after the last whole pass.
        name: What the new model is called; as the description is, where not given.
        brain: "auto" extracts the brain where a skull is seen, "extract" always, "given" never.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        cache_dir: Where prepared grids are kept; `~/.cache/ichprog` or `$ICHPROG_CACHE` where not given.
        workers: Processes that prepare grids side by side.
        progress: Whether bars are shown on standard error.
        tensorboard: Whether events for TensorBoard are written to `out/tensorboard`.

    Returns:
        `out`.

    Raises:
        CohortError: The patients are too few or of one label, or scans cannot be used.
        RunError: The folder is of another run, the disk is full, a loss is no number, or bfloat16 was asked for where
            it does not serve.
        SpecError: The description is not valid.
        UnknownNameError: There is no such model, plugin, fold or device.
        PluginError: A plugin of the model cannot be loaded or breaks its contract.
    """
    import torch

    from ichprog import hub, networks
    from ichprog.cohort import Cohort
    from ichprog.train import folds as folds_module
    from ichprog.train import grid_cache, mixed_precision, trainer
    from ichprog.train.callbacks import Onlooker
    from ichprog.train.distributed import Team
    from ichprog.train.run_dir import Run, bytes_needed, identity, own_spec, surroundings

    if not isinstance(cohort, Cohort):
        cohort = Cohort.read(cohort)
    spec = own_spec(spec_of(model), name, len(cohort))
    labels = {task.name: cohort.labels(task) for task in spec.tasks}
    if isinstance(folds, int):
        folds_module.refuse_unless_enough(spec, labels, folds, protocol.validation)
        first = labels[spec.tasks[0].name]
        parts = folds_module.split(first, folds, seed=protocol.split_seed, validation=protocol.validation)
    else:
        parts = list(folds)
        folds_module.refuse_unless_usable(spec, labels, parts)
    for fold in only or ():
        if fold not in range(len(parts)):
            raise UnknownNameError("fold of this run", fold, range(len(parts)))
    names = [patient.name for patient in cohort.patients]
    with torch.random.fork_rng(devices=[]):
        needed = bytes_needed(networks.build(spec), protocol, len(only or parts))

    team = Team(device)
    if protocol.batch < 2 * team.size:
        raise RunError(
            f"{protocol.batch} patients a batch are too few for {team.size} processes: each needs 2 or more. Raise the "
            f"protocol's `batch` to {2 * team.size} at least."
        )
    if protocol.precision == "bfloat16" and team.device.type == "cpu" and (why := mixed_precision.lack(team.device)):
        raise RunError(f"precision 'bfloat16': {why}. Choose 'auto' or 'float32'.")
    membership = {
        str(fold): {kind: [names[int(p)] for p in part] for kind, part in fold_parts._asdict().items()}
        for fold, fold_parts in enumerate(parts)
    }
    about = {"source": cohort.source, "quirks": protocol.quirks(), **surroundings(), "membership": membership}
    given = None if isinstance(folds, int) else membership
    run = Run(Path(out), identity(spec, protocol, cohort, labels, len(parts), brain, given), about)
    watch = Onlooker(run, leads=team.leads, progress=progress, tensorboard=tensorboard)
    team.agree(lambda: run.refuse(resume=resume, needed=needed))
    chosen = [fold for fold in range(len(parts)) if only is None or fold in only]
    left = team.agree(lambda: [fold for fold in chosen if not run.done(fold)])
    scans = [patient.scan for patient in cohort.patients] if left else []
    files = grid_cache.prepare(
        scans,
        spec.input,
        brain=brain,
        folder=hub.cache_folder(cache_dir) / "grids",
        workers=workers,
        progress=progress and team.leads,
    )
    team.agree(run.begin)
    for fold in left:
        checkpoint = run.folder(fold) / "checkpoint.pt"
        job = trainer.Job(spec, protocol, fold, parts[fold], names, files, labels, checkpoint)
        with watch.over(fold), run.room():
            outcome = trainer.fit(job, team, watch)
            if team.leads:
                run.finish(spec, job, outcome)
    with run.room():
        team.agree(lambda: run.join(spec, names, len(parts)))
    return run.path


def spec_of(model: "ModelSpec | str | Path") -> "ModelSpec":
    """A description by any of its names, without its weights.

    Args:
        model: A description, a name of the zoo, "local-dir:PATH", "hf-hub:REPO@REVISION", or a path to a JSON file.

    Raises:
        SpecError: The description is not valid.
        UnknownNameError: There is no such model.
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
