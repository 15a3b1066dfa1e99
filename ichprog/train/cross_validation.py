"""Cross-validation: check a cohort, a model and a protocol together, then train the folds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ichprog import hub, networks
from ichprog.clinical import encode, read_values
from ichprog.cohort import Cohort, find_masks
from ichprog.errors import CohortError, InvalidValueError, RunError, UnknownNameError
from ichprog.model import resolve_brain
from ichprog.scan import brain_key
from ichprog.spec import ModelSpec, Task
from ichprog.train import TrainOptions, grid_cache, mixed_precision, trainer
from ichprog.train import folds as folds_module
from ichprog.train.callbacks import Callback, CallbackList, LogCallback, ProgressCallback, TrackerCallback
from ichprog.train.distributed import DistributedContext
from ichprog.train.fold_job import FoldJob
from ichprog.train.folds import Fold
from ichprog.train.grid_cache import RegionSource
from ichprog.train.protocol import Protocol
from ichprog.train.run_dir import RunDir, environment, required_bytes, run_identity
from ichprog.train.transfer import find_backbones


class CrossValidation:
    """Train one model on the folds of a cohort.

    Args:
        cohort: The patients.
        spec: The model.
        folds: Number of folds, stratified by the first task's label; or the folds themselves.
        protocol: The protocol.
        options: Device, cache, workers, progress and trackers.
        description: Name of the description by which the model is trained, for the record.
        start_from: Folder of a run from whose backbones the folds start.

    Attributes:
        folds: The folds.
        labels: `(N,)` label indices for each task, -1 if unknown.
        region_sources: The source of the true regions of each patient, for each dense task.
        membership: Names of the patients of each part, by fold.
        backbones: Weights that each fold starts from.
        clinical: `(N, 2 V)` clinical values of the patients; None for a model of the image alone.

    Raises:
        CohortError: The patients, their masks or the folds cannot be trained on.
        UnknownNameError: The cohort has no column of a task.
        InvalidValueError: The protocol freezes the backbone, and there is no run to start from.
        RunError: The run to start from cannot be used.
    """

    def __init__(
        self,
        cohort: Cohort,
        spec: ModelSpec,
        folds: int | Sequence[Fold],
        protocol: Protocol,
        options: TrainOptions,
        *,
        description: str | None = None,
        start_from: str | Path | None = None,
    ) -> None:
        self.cohort, self.spec, self.protocol, self.options = cohort, spec, protocol, options
        self.description = description or spec.name
        networks.feature_shape(spec)  # refuses a grid that is too small for the backbone
        self.names = [patient.name for patient in cohort.patients]
        self.labels = {task.name: cohort.labels(task) for task in spec.tasks}
        self.region_sources = {task.name: self._find_regions(task) for task in spec.tasks if task.mask}
        self.clinical = _encode_clinical(spec, cohort)
        self.has_given_folds = not isinstance(folds, int)
        fraction = protocol.validation_fraction
        if isinstance(folds, int):
            folds_module.validate_labels(spec, self.labels, folds, fraction)
            first = self.labels[spec.tasks[0].name]
            self.folds = folds_module.split(first, folds, seed=protocol.split_seed, validation_fraction=fraction)
        else:
            folds_module.validate_folds(spec, self.labels, folds)
            self.folds = list(folds)
        if protocol.freeze_backbone and start_from is None:
            raise InvalidValueError(
                "protocol freeze_backbone", True, "False without a run to start from", "Give one with `start_from`."
            )
        self.membership = {
            str(number): {kind: [self.names[int(p)] for p in part] for kind, part in fold._asdict().items()}
            for number, fold in enumerate(self.folds)
        }
        self.backbones = {} if start_from is None else find_backbones(start_from, spec, self.membership)

    def train(self, output: Path, only_folds: Collection[int] | None, *, resume: bool) -> None:
        """Train folds that are not done yet and merge all that are.

        Args:
            output: Directory of the run.
            only_folds: Folds to train now; all by default.
            resume: Whether `output` may hold this run already.

        Raises:
            CohortError: Scans cannot be used.
            InvalidValueError: The batch size or the device does not suit the number of processes.
            RunError: The directory cannot be used, a loss is not finite, or the precision is not supported.
            UnknownNameError: A fold, the device or a tracker does not exist.
        """
        for fold in only_folds or ():
            if fold not in range(len(self.folds)):
                raise UnknownNameError("fold", fold, range(len(self.folds)))
        selected = [fold for fold in range(len(self.folds)) if only_folds is None or fold in only_folds]
        with torch.random.fork_rng(devices=[]):
            needed = required_bytes(networks.build(self.spec), self.protocol, len(selected))
        context = DistributedContext(self.options.device)
        self._validate_hardware(context)
        run_dir = self._run_dir(output)
        callbacks = self._callbacks(run_dir) if context.is_main_process else []
        context.run_on_main(lambda: run_dir.validate(resume=resume, required_bytes=needed))
        remaining = context.run_on_main(lambda: [fold for fold in selected if not run_dir.is_done(fold)])
        grids = self._prepare_grids(show_progress=context.is_main_process) if remaining else []
        regions = self._prepare_regions() if remaining else {}
        context.run_on_main(run_dir.create)
        try:
            for fold in remaining:
                self._train_fold(fold, grids, regions, context, run_dir, CallbackList(callbacks))
        finally:
            for callback in callbacks:
                callback.close()
        with run_dir.explain_os_errors():
            context.run_on_main(lambda: run_dir.merge_folds(self.spec, self.names, len(self.folds)))

    def _train_fold(
        self,
        fold: int,
        grids: Sequence[Path],
        regions: Mapping[str, Sequence[Path]],
        context: DistributedContext,
        run_dir: RunDir,
        callback: Callback,
    ) -> None:
        checkpoint = run_dir.fold_dir(fold) / "checkpoint.pt"
        job = FoldJob(
            self.spec,
            self.protocol,
            fold,
            self.folds[fold],
            self.names,
            grids,
            self.labels,
            checkpoint,
            regions,
            self.backbones.get(fold),
            self.clinical,
        )
        if not context.is_main_process:
            trainer.train_fold(job, context, callback)
            return
        with run_dir.lock_fold(fold), run_dir.explain_os_errors():
            run_dir.write_result(self.spec, job, trainer.train_fold(job, context, callback))

    def _validate_hardware(self, context: DistributedContext) -> None:
        protocol, least = self.protocol, 2 * context.num_processes
        if protocol.batch_size < least:
            raise InvalidValueError(
                "protocol batch_size",
                protocol.batch_size,
                f"{least} or more, 2 patients for each of {context.num_processes} processes",
            )
        if protocol.precision == "bfloat16" and context.device.type == "cpu":
            reason = mixed_precision.unsupported_reason(context.device)
            if reason is not None:
                raise RunError(f"precision 'bfloat16': {reason}. Choose 'auto' or 'float32'.")

    def _run_dir(self, output: Path) -> RunDir:
        identity = run_identity(
            self.spec,
            self.protocol,
            self.cohort,
            self.labels,
            len(self.folds),
            brain_key(resolve_brain(self.options.brain)),
            self.membership if self.has_given_folds else None,
            self.region_sources,
            self.backbones,
            self.clinical,
        )
        details = {
            "description": self.description,
            "source": self.cohort.source,
            "origin": asdict(self.cohort.origin),
            "quirks": self.protocol.quirks(),
            **environment(),
            "membership": self.membership,
        }
        return RunDir(output, identity, details)

    def _callbacks(self, run_dir: RunDir) -> list[Callback]:
        callbacks: list[Callback] = [LogCallback(run_dir)]
        if self.options.progress:
            callbacks.append(ProgressCallback())
        if self.options.trackers:
            callbacks.append(TrackerCallback(self.options.trackers, run_dir))
        return callbacks

    def _prepare_grids(self, *, show_progress: bool) -> list[Path]:
        return grid_cache.prepare(
            [patient.scan for patient in self.cohort.patients],
            self.spec.input,
            brain=resolve_brain(self.options.brain),
            folder=hub.cache_folder(self.options.cache_dir) / "grids",
            workers=self.options.workers,
            progress=self.options.progress and show_progress,
        )

    def _prepare_regions(self) -> dict[str, list[Path]]:
        """Return the regions of every patient for each dense task."""
        return {
            task.name: grid_cache.prepare_regions(
                self.region_sources[task.name],
                self.spec.input,
                len(task.mask.regions),
                folder=hub.cache_folder(self.options.cache_dir) / "grids",
                workers=self.options.workers,
            )
            for task in self.spec.tasks
            if task.mask
        }

    def _find_regions(self, task: Task) -> list[RegionSource]:
        """Return where the regions of each patient come from: the mask, the slice numbers, or the label alone."""
        assert task.mask is not None  # noqa: S101
        masks = find_masks(self.cohort, task.mask.column)
        slices = self.cohort.slices(task.mask.slices) if task.mask.slices else [None] * len(self.cohort)
        return [
            RegionSource(patient.scan, masks.get(patient.name), () if label == 0 else listed)
            for patient, label, listed in zip(self.cohort.patients, self.labels[task.name], slices, strict=True)
        ]


def _encode_clinical(spec: ModelSpec, cohort: Cohort) -> np.ndarray | None:
    """Return the clinical values of all patients `(N, 2 V)`, or None for a model of the image alone."""
    if spec.fusion is None:
        return None
    columns = {value.column: cohort.numbers(value.column) for value in spec.clinical}
    rows = []
    for index, patient in enumerate(cohort.patients):
        given = {name: numbers[index] for name, numbers in columns.items()}
        try:
            rows.append(encode(spec, read_values(spec, given, patient=patient.name)))
        except InvalidValueError as error:
            raise CohortError(f"{cohort.source}: {error}") from None
    return np.stack(rows)
