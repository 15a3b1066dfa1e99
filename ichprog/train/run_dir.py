"""The directory of a training run: its record, the results of each fold, and the model that all folds form.

    RUN/run.json                  the record: model, protocol, cohort, folds, command, versions, results
        folds/<K>/checkpoint.pt   while a fold is trained
                 /log.csv         one row per epoch
                 /predictions.csv, validation.csv
                                  predictions of the test part and of the validation part
                 /validation_inputs.csv
                                  statistics of the grids of the validation part, for the calibration
                 /result.json     written last: the fold is done
        fold<K>.safetensors       the weights of a fold
        config.json  out_of_fold.csv  log.csv       of all folds that are done

Every file is written atomically. Each fold's files are written by the process that trains it, so folds may be trained
on several machines that share the directory.
"""

import errno
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ichprog.calibration import input_statistics
from ichprog.cohort import Cohort
from ichprog.errors import RunError
from ichprog.io import atomic_write, file_lock, read_csv, remove_partial_files, write_csv, write_json
from ichprog.model import DEPENDENCIES
from ichprog.networks import Network
from ichprog.spec import Calibration, GoldenOutput, ModelSpec
from ichprog.train.calibration import fit_calibration
from ichprog.train.description import add_results, keep_written
from ichprog.train.fold_job import FoldJob, FoldResult
from ichprog.train.folds import Fold
from ichprog.train.grid_cache import RegionSource
from ichprog.train.protocol import Protocol
from ichprog.train.summary import compute_aucs

_FORMAT = 1


def run_identity(
    spec: ModelSpec,
    protocol: Protocol,
    cohort: Cohort,
    labels: Mapping[str, np.ndarray],
    folds: int,
    brain: str,
    membership: Mapping[str, Any] | None,
    regions: Mapping[str, Sequence[RegionSource]],
    start_from: Mapping[int, Path],
    clinical: np.ndarray | None,
) -> dict[str, Any]:
    """Return what identifies a run: two runs with the same identity give the same result.

    Args:
        spec: The model.
        protocol: The protocol.
        cohort: The patients.
        labels: `(N,)` label indices for each task, -1 if unknown.
        folds: Number of folds.
        brain: Brain extraction mode.
        membership: Patients of each part of each fold, or None if the other arguments determine them.
        regions: The source of the true regions of each patient, for each dense task.
        start_from: Weights that each fold starts from.
        clinical: Clinical values of all patients, or None.

    Raises:
        RunError: A mask or weights cannot be read.
    """
    patients = [[p.name for p in cohort.patients], {task: values.tolist() for task, values in labels.items()}]
    return {
        "model": spec.to_dict(),
        "protocol": protocol.to_dict(),
        "cohort": {"patients": len(cohort), "sha256": digest(patients)},
        "folds": folds,
        "brain": brain,
        "parts": None if membership is None else digest(membership),
        "regions": {task: digest(list(map(_region_identity, sources))) for task, sources in regions.items()} or None,
        "start_from": {str(fold): _file_digest(path) for fold, path in start_from.items()} or None,
        "clinical": None if clinical is None else digest(clinical.tolist()),
    }


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}. Train the run that it belongs to again.") from error


def digest(data: Any) -> str:
    """Return the SHA-256 of plain data.

    Examples:
        >>> digest([1, 2])[:8]
        '49a64f47'
    """
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


class RunDir:
    """Manage the directory of a run.

    Args:
        path: The directory.
        identity: The run's `run_identity`.
        details: Further entries of the record.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        self.path, self.identity, self.details = path, dict(identity), dict(details)

    def validate(self, *, resume: bool, required_bytes: int) -> None:
        """Check that the run can use the directory, without changing it.

        Args:
            resume: Whether the directory may hold this run already.
            required_bytes: Bytes that will be written.

        Raises:
            RunError: The directory exists and `resume` is false, holds another run or other files, or the disk is full.
        """
        record = self.path / "run.json"
        if record.is_file():
            self._validate_same_run(record)
            if not resume:
                raise RunError(
                    f"{self.path} holds this run already. Resume it with `resume=True`, on the command line "
                    "`--resume`, or choose another folder."
                )
        elif self.path.exists() and not (self.path.is_dir() and all(p.name[0] == "." for p in self.path.iterdir())):
            # hidden files may belong to another process that starts the same run
            raise RunError(f"{self.path} exists and is not a run. Choose another folder.")
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if required_bytes > free:
            raise RunError(
                f"{self.path}: the run needs {required_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. Free some "
                "space, or choose another folder."
            )

    def create(self) -> None:
        """Create the directory with its record, if it does not exist."""
        with self.explain_os_errors(), file_lock(self.path / ".lock"):
            if not (self.path / "run.json").is_file():
                record = {"format": _FORMAT, **self.details, **self.identity, "results": {}}
                write_json(self.path / "run.json", record)

    def fold_dir(self, fold: int) -> Path:
        """Return the directory of a fold."""
        return self.path / "folds" / str(fold)

    def is_done(self, fold: int) -> bool:
        """Return whether a fold has been trained to its end."""
        return (self.fold_dir(fold) / "result.json").is_file()

    @contextmanager
    def lock_fold(self, fold: int) -> Iterator[None]:
        """Lock a fold against other processes within a context.

        Raises:
            RunError: Another process trains the fold.
        """
        folder = self.fold_dir(fold)
        try:
            with file_lock(folder / ".lock", timeout_s=0):
                remove_partial_files(folder)
                remove_partial_files(self.path, [f"fold{fold}.safetensors"])
                yield
        except TimeoutError:
            raise RunError(
                f"fold {fold} of {self.path} is being trained by another process. Wait for it, or train other folds "
                "with --only-fold."
            ) from None

    @contextmanager
    def explain_os_errors(self) -> Iterator[None]:
        """Convert errors of the file system within a context to a RunError that says what to do."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RunError(
                    f"The disk of {self.path} is full. Free some space and resume with `--resume`: all epochs but the "
                    "last are saved."
                ) from error
            raise RunError(f"{self.path} cannot be used: {error}. Repair it, or choose another folder.") from error

    def write_log(self, fold: int, history: Sequence[Mapping[str, float]]) -> None:
        """Write a fold's log."""
        write_csv(self.fold_dir(fold) / "log.csv", list(history[0]), map(_without_nan, history))

    def write_result(self, spec: ModelSpec, job: FoldJob, result: FoldResult) -> None:
        """Write a fold's weights, log, predictions and, last, its `result.json`."""
        from safetensors.torch import save

        folder, fold = self.fold_dir(job.fold), job.fold
        state = {key: value.detach().contiguous().clone() for key, value in result.network.state_dict().items()}
        packed = save(state)
        with atomic_write(self.path / f"fold{fold}.safetensors") as part:
            part.write_bytes(packed)
        self.write_log(fold, result.history)
        for name, patients, logits in (
            ("predictions.csv", job.parts.test, result.logits),
            ("validation.csv", job.parts.validation, result.validation),
        ):
            write_csv(folder / name, _columns(spec), _prediction_rows(spec, job, patients, result.network, logits))
        statistics = [
            {"patient": job.names[patient], **input_statistics(np.load(job.grids[patient]))}
            for patient in job.parts.validation
        ]
        write_csv(folder / "validation_inputs.csv", list(statistics[0]), statistics)
        write_json(
            folder / "result.json",
            {
                "best": _without_nan(result.best),
                "epochs": len(result.history),
                "precision": result.precision,
                "learning_rate": result.learning_rate,
                "calibration": {
                    task: fitted and {"scale": fitted[0], "shift": fitted[1]}
                    for task, fitted in result.calibration.items()
                },
                "patients": {part: len(getattr(job.parts, part)) for part in Fold._fields},
                "sha256": hashlib.sha256(packed).hexdigest(),
                "golden_output": _golden_logits(spec, result.network),
                **environment(),
            },
        )
        self._remove_checkpoints(job.fold)

    def _remove_checkpoints(self, fold: int) -> None:
        for checkpoint in self.fold_dir(fold).glob("checkpoint*.pt"):
            checkpoint.unlink(missing_ok=True)

    def merge_folds(self, spec: ModelSpec, names: Sequence[str], folds: int) -> None:
        """Form one model of all folds that are done, with their out-of-fold predictions.

        Args:
            spec: The model.
            names: Names of all patients, in the cohort's order.
            folds: Number of folds of the run.
        """
        with file_lock(self.path / ".lock"):
            remove_partial_files(self.path, ("out_of_fold.csv", "log.csv", "run.json", "config.json"))
            results = {
                fold: json.loads((self.fold_dir(fold) / "result.json").read_text("utf-8"))
                for fold in range(folds)
                if self.is_done(fold)
            }
            for fold in results:
                self._remove_checkpoints(fold)
            rows = {
                row["patient"]: row for fold in results for row in read_csv(self.fold_dir(fold) / "predictions.csv")
            }
            tested = [rows[name] for name in names if name in rows]
            write_csv(self.path / "out_of_fold.csv", _columns(spec), tested)
            logged = [row for fold in results for row in read_csv(self.fold_dir(fold) / "log.csv")]
            write_csv(self.path / "log.csv", list(logged[0]), logged)
            checksums = {f"fold{fold}.safetensors": result["sha256"] for fold, result in results.items()}
            logits = {str(fold): result["golden_output"] for fold, result in results.items()}
            record = json.loads((self.path / "run.json").read_text("utf-8"))
            aucs = list(compute_aucs(spec, tested))
            merged = replace(
                self._with_written_texts(add_results(spec, aucs, folds), record),
                calibration=self._fit_calibration(spec, list(results)),
                weights=replace(spec.weights, sha256=checksums),
                golden_output=GoldenOutput(seed=0, shape=spec.input.shape, logits=logits),
            )
            record |= {"results": {str(fold): result for fold, result in results.items()}}
            write_json(self.path / "run.json", record | {"out_of_fold": [asdict(auc) for auc in aucs]})
            write_json(self.path / "config.json", merged.to_dict())

    def _fit_calibration(self, spec: ModelSpec, folds: Sequence[int]) -> Calibration | None:
        """Fit the calibration to the validation parts of the folds; None if they are too few."""
        rows = [row for fold in folds for row in read_csv(self.fold_dir(fold) / "validation.csv")]
        tables = [self.fold_dir(fold) / "validation_inputs.csv" for fold in folds]
        inputs = [
            {name: float(value) for name, value in row.items() if name != "patient"}
            for table in tables
            if table.is_file()  # folds that an older version trained have none
            for row in read_csv(table)
        ]
        predictions = {}
        for task in spec.tasks:
            truth = [task.labels.index(row[f"{task.name}_true"]) if row[f"{task.name}_true"] else -1 for row in rows]
            p = [[float(row[f"{task.name}_{label}"]) for label in task.labels] for row in rows]
            predictions[task.name] = np.array(truth), np.array(p)
        number = len({row["patient"] for row in rows})
        return fit_calibration(spec, predictions, inputs, f"{number} patients, the validation parts of the training.")

    def _with_written_texts(self, spec: ModelSpec, record: Mapping[str, Any]) -> ModelSpec:
        """Return a description with the texts that the authors have written into `config.json`."""
        path = self.path / "config.json"
        if not path.is_file() or not ModelSpec.from_dict(record["model"]).unwritten:
            return spec  # without marks, an earlier version has copied the texts of another model
        return keep_written(spec, ModelSpec.read(path))

    def _validate_same_run(self, record: Path) -> None:
        try:
            existing = json.loads(record.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{record} cannot be read: {error}. Choose another folder.") from error
        if existing.get("format") != _FORMAT:
            raise RunError(f"{record} was written by another version of ichprog. Choose another folder.")
        differing = [
            text
            for key, value in self.identity.items()
            for text in differences(key, without_texts(existing.get(key)), without_texts(value))
        ]
        if differing:
            raise RunError(
                f"{self.path} holds another run: {'; '.join(differing)}. Choose another folder, or repeat the "
                "settings of that run."
            )


def environment() -> dict[str, Any]:
    """Return the command and the versions of Python and of the dependencies."""
    return {
        "command": sys.argv,
        "versions": {"python": python_version(), **{name: version(name) for name in DEPENDENCIES}},
    }


def required_bytes(network: Network, protocol: Protocol, folds: int) -> int:
    """Return the most bytes that a run writes: weights of every fold, and two checkpoints at once."""
    size: int = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    return size * (folds + 2 * (5 if protocol.amsgrad else 4))


def differences(key: str, existing: Any, requested: Any) -> Iterator[str]:
    """Describe how a requested value differs from an existing one, down to the fields of an object.

    Examples:
        >>> list(differences("protocol", {"seed": 1, "epochs": 2}, {"seed": 1, "epochs": 3}))
        ['protocol.epochs was 2, is 3']
    """
    if existing == requested:
        return
    if isinstance(existing, dict) and isinstance(requested, dict):
        for name in sorted(existing.keys() | requested.keys()):
            before, now = existing.get(name), requested.get(name)
            if before != now:
                is_plain = not isinstance(before, dict | list) and not isinstance(now, dict | list)
                yield f"{key}.{name} was {before!r}, is {now!r}" if is_plain else f"{key}.{name} differs"
        return
    yield f"{key} was {existing!r}, is {requested!r}"


def without_texts(model: Any) -> Any:
    """Return the plain data of a model description without its texts, which do not change the training.

    Args:
        model: Plain data of a `ModelSpec`; other data is returned unchanged.
    """
    if not isinstance(model, dict) or "tasks" not in model:
        return model
    texts = ("summary", "licence", "citation", "intended_use", "limits", "notice")
    tasks = [{key: value for key, value in task.items() if key != "meaning"} for task in model["tasks"]]
    return {key: value for key, value in model.items() if key not in texts} | {"tasks": tasks}


def _region_identity(source: RegionSource) -> list[Any]:
    """Return what identifies the regions of a patient: the content of the mask, and the slice numbers."""
    content = None
    if source.mask is not None:
        try:
            with source.mask.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise RunError(f"{source.mask} cannot be read: {error}. Repair it, or leave its cell blank.") from error
    return [content, source.slices]


def _golden_logits(spec: ModelSpec, network: Network) -> dict[str, list[float]]:
    """Return the logits of the golden input, on the CPU."""
    seeded = np.random.default_rng(0).random((1, *spec.input.shape), np.float32)
    with torch.no_grad():
        return {task: values[0].tolist() for task, values in network.eval()(torch.from_numpy(seeded)[None]).items()}


def _columns(spec: ModelSpec) -> list[str]:
    columns = ["patient", "fold"]
    for task in spec.tasks:
        columns += [f"{task.name}_true", f"{task.name}_label", *(f"{task.name}_{label}" for label in task.labels)]
    return columns


def _prediction_rows(
    spec: ModelSpec, job: FoldJob, part: np.ndarray, network: Network, logits: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        predicted = network.probabilities(logits)
    for position, patient in enumerate(part):
        row: dict[str, Any] = {"patient": job.names[patient], "fold": job.fold}
        for task in spec.tasks:
            true = int(job.labels[task.name][patient])
            probabilities = dict(zip(task.labels, predicted[task.name][position].double().tolist(), strict=True))
            row[f"{task.name}_true"] = task.labels[true] if true >= 0 else ""
            row[f"{task.name}_label"] = task.decide(probabilities)
            row |= {f"{task.name}_{label}": value for label, value in probabilities.items()}
        yield row


def _without_nan(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in row.items()}
