"""The folder of a run: what was asked for, what each fold has given, and the model that they are together.

    RUN/run.json                  what was run: model, protocol, cohort, folds, command, versions; then the results
        folds/<K>/checkpoint.pt   while a fold is trained
                 /log.csv         a row a pass
                 /predictions.csv, validation.csv
                                  its test part and its validation part, as its network says in the end
                 /result.json     the last to appear: the fold is done
        fold<K>.safetensors       a fold's weights
        config.json  out_of_fold.csv  log.csv       of all the folds that are done

Every file appears whole or not at all, and each fold's are written by whoever trains it, so that folds may be spread
over machines that share the folder.
"""

import csv
import errno
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ichprog.cohort import Cohort
from ichprog.errors import RunError
from ichprog.io import atomic_write, write_json
from ichprog.model import DEPENDENCIES
from ichprog.networks import Network
from ichprog.spec import GoldenOutput, ModelSpec, Weights
from ichprog.train.folds import Fold
from ichprog.train.protocol import Protocol
from ichprog.train.trainer import Job, Outcome, Row

_FORMAT = 1


def identity(
    spec: ModelSpec,
    protocol: Protocol,
    cohort: Cohort,
    labels: Mapping[str, np.ndarray],
    folds: int,
    brain: str,
    given: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a run is: two that agree in this give the same result.

    Args:
        spec: The model.
        protocol: The protocol.
        cohort: The patients.
        labels: For each task `(N,)` label indices, -1 where not known.
        folds: The number of folds.
        brain: How the brain is found.
        given: Who is in which part of each fold, where that does not follow from the rest.
    """
    known = [[p.name for p in cohort.patients], {task: values.tolist() for task, values in labels.items()}]
    return {
        "model": spec.to_dict(),
        "protocol": protocol.to_dict(),
        "cohort": {"patients": len(cohort), "sha256": digest(known)},
        "folds": folds,
        "brain": brain,
        "parts": None if given is None else digest(given),
    }


def digest(data: Any) -> str:
    """The SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


class Run:
    """A run's folder.

    Args:
        path: The folder.
        asked: The run's `identity`.
        about: What else is recorded of it.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.path, self.asked, self.about = path, dict(asked), dict(about)

    def refuse(self, *, resume: bool, needed: int) -> None:
        """Refuses a folder that the run cannot have, and changes nothing.

        Args:
            resume: Whether the run may have been begun there already.
            needed: Bytes that will be written.

        Raises:
            RunError: The folder is there and `resume` is false, is of another run or of none, or the disk has no room.
        """
        record = self.path / "run.json"
        if record.is_file():
            self._refuse_another(record)
            if not resume:
                raise RunError(
                    f"{self.path} holds this run already, begun or done. Go on with it by `resume=True`, on the command"
                    " line `--resume`, or choose another folder."
                )
        elif self.path.exists() and not (self.path.is_dir() and all(p.name[0] == "." for p in self.path.iterdir())):
            # hidden files may be another process's that begins the same run just now
            raise RunError(f"{self.path} is there and holds no run. Choose another folder.")
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise RunError(
                f"{self.path}: the run needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. Make room there, or "
                "choose another folder."
            )

    def begin(self) -> None:
        """Makes the folder with its record, where it is not there yet."""
        with self.room():
            self.path.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if not (self.path / "run.json").is_file():
                    write_json(self.path / "run.json", {"format": _FORMAT, **self.about, **self.asked, "results": {}})

    def folder(self, fold: int) -> Path:
        """A fold's own folder."""
        return self.path / "folds" / str(fold)

    def done(self, fold: int) -> bool:
        """Whether a fold has been trained to its end."""
        return (self.folder(fold) / "result.json").is_file()

    @contextmanager
    def claim(self, fold: int) -> Iterator[None]:
        """Keeps every other process off a fold.

        Raises:
            RunError: Another one trains it.
        """
        from filelock import FileLock, Timeout

        folder = self.folder(fold)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", blocking=False):
                # what a process wrote by half before it was killed
                for left in [*folder.glob(".*-*"), *self.path.glob(f".*-fold{fold}.safetensors")]:
                    left.unlink()
                yield
        except Timeout:
            raise RunError(
                f"fold {fold} of {self.path} is being trained by another process; leave it to that."
            ) from None

    @contextmanager
    def room(self) -> Iterator[None]:
        """Says what to do where the disk is full or the folder cannot be written to."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RunError(
                    f"the disk of {self.path} is full. Make room and go on by `--resume`: all epochs but the last are "
                    "kept."
                ) from error
            raise RunError(f"{self.path} cannot be used: {error}. Repair that, or choose another folder.") from error

    def log(self, fold: int, history: Sequence[Row]) -> None:
        """Writes a fold's log."""
        _write_csv(self.folder(fold) / "log.csv", list(history[0]), map(_without_nan, history))

    def finish(self, spec: ModelSpec, job: Job, outcome: Outcome) -> None:
        """Writes what a fold has given; `result.json` comes last."""
        from safetensors.torch import save

        folder, fold = self.folder(job.fold), job.fold
        state = {key: value.detach().contiguous().clone() for key, value in outcome.network.state_dict().items()}
        packed = save(state)
        with atomic_write(self.path / f"fold{fold}.safetensors") as part:
            part.write_bytes(packed)
        self.log(fold, outcome.history)
        for name, patients, logits in (
            ("predictions.csv", job.parts.test, outcome.logits),
            ("validation.csv", job.parts.validation, outcome.validation),
        ):
            _write_csv(folder / name, _columns(spec), _predictions(spec, job, patients, outcome.network, logits))
        write_json(
            folder / "result.json",
            {
                "best": _without_nan(outcome.best),
                "epochs": len(outcome.history),
                "precision": outcome.precision,
                "calibration": {
                    task: found and {"scale": found[0], "shift": found[1]}
                    for task, found in outcome.calibration.items()
                },
                "patients": {part: len(getattr(job.parts, part)) for part in Fold._fields},
                "sha256": hashlib.sha256(packed).hexdigest(),
                "probe": _probe(spec, outcome.network),
                **surroundings(),
            },
        )
        job.checkpoint.unlink(missing_ok=True)

    def join(self, spec: ModelSpec, names: Sequence[str], folds: int) -> None:
        """Makes one model of all the folds that are done, with the predictions out of fold."""
        joined = ("out_of_fold.csv", "log.csv", "run.json", "config.json")
        with self._alone():
            for left in (half for name in joined for half in self.path.glob(f".*-{name}")):
                left.unlink()
            results = {
                fold: json.loads((self.folder(fold) / "result.json").read_text("utf-8"))
                for fold in range(folds)
                if self.done(fold)
            }
            for fold in results:
                (self.folder(fold) / "checkpoint.pt").unlink(missing_ok=True)
            rows = {row["patient"]: row for fold in results for row in _read_csv(self.folder(fold) / "predictions.csv")}
            _write_csv(self.path / "out_of_fold.csv", _columns(spec), [rows[name] for name in names if name in rows])
            logged = [row for fold in results for row in _read_csv(self.folder(fold) / "log.csv")]
            _write_csv(self.path / "log.csv", list(logged[0]), logged)
            sums = {f"fold{fold}.safetensors": result["sha256"] for fold, result in results.items()}
            logits = {str(fold): result["probe"] for fold, result in results.items()}
            made = replace(
                spec,
                weights=replace(spec.weights, sha256=sums),
                golden_output=GoldenOutput(seed=0, shape=spec.input.shape, logits=logits),
            )
            begun = json.loads((self.path / "run.json").read_text("utf-8"))
            write_json(self.path / "run.json", begun | {"results": {str(fold): r for fold, r in results.items()}})
            write_json(self.path / "config.json", made.to_dict())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        from filelock import FileLock

        with FileLock(self.path / ".lock"):
            yield

    def _refuse_another(self, record: Path) -> None:
        try:
            held = json.loads(record.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{record}: cannot be read: {error}. Choose another folder.") from error
        if held.get("format") != _FORMAT:
            raise RunError(f"{record}: is of another version of ichprog. Choose another folder.")
        differing = [said for key, mine in self.asked.items() for said in differences(key, held.get(key), mine)]
        if differing:
            raise RunError(
                f"{self.path} holds another run: {'; '.join(differing)}. Choose another folder, or ask for the same."
            )


def own_spec(spec: ModelSpec, name: str | None, patients: int) -> ModelSpec:
    """A model's description for weights that are trained anew.

    Args:
        spec: The description they are trained by.
        name: What the new model is called; as the description is, where not given.
        patients: The number of patients.
    """
    limits, licence = spec.limits, spec.licence
    if spec.weights.repo is not None or spec.weights.sha256:  # what is said of other weights is not true of these
        said = (
            f"These weights were trained anew, on {patients} patients. What is said here of patients and results of "
            f"training is said of the weights of {spec.name}, whose description these were trained by."
        )
        limits, licence = (said, *limits), replace(licence, weights="not stated; whoever trained them may state it")
    blank = Weights(None, None, "", "safetensors", {}, {})
    return replace(spec, name=name or spec.name, weights=blank, limits=limits, licence=licence, golden_output=None)


def surroundings() -> dict[str, Any]:
    """The command and the versions of what runs."""
    return {
        "command": sys.argv,
        "versions": {"python": python_version(), **{name: version(name) for name in DEPENDENCIES}},
    }


def bytes_needed(network: Network, protocol: Protocol, folds: int) -> int:
    """What a run writes at most: weights of every fold, and two checkpoints at once."""
    size: int = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    return size * (folds + 2 * (5 if protocol.amsgrad else 4))


def _probe(spec: ModelSpec, network: Network) -> dict[str, list[float]]:
    """The logits of the golden input, on the CPU."""
    seeded = np.random.default_rng(0).random((1, *spec.input.shape), np.float32)
    with torch.no_grad():
        return {task: values[0].tolist() for task, values in network.eval()(torch.from_numpy(seeded)[None]).items()}


def _columns(spec: ModelSpec) -> list[str]:
    columns = ["patient", "fold"]
    for task in spec.tasks:
        columns += [f"{task.name}_true", f"{task.name}_label", *(f"{task.name}_{label}" for label in task.labels)]
    return columns


def _predictions(
    spec: ModelSpec, job: Job, part: np.ndarray, network: Network, logits: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        found = network.probabilities(logits)
    for place, patient in enumerate(part):
        row: dict[str, Any] = {"patient": job.names[patient], "fold": job.fold}
        for task in spec.tasks:
            true = int(job.labels[task.name][patient])
            probabilities = dict(zip(task.labels, found[task.name][place].double().tolist(), strict=True))
            row[f"{task.name}_true"] = task.labels[true] if true >= 0 else ""
            row[f"{task.name}_label"] = task.decide(probabilities)
            row |= {f"{task.name}_{label}": value for label, value in probabilities.items()}
        yield row


def differences(key: str, held: Any, asked: Any) -> Iterator[str]:
    """What differs, in words, down to the fields of an object."""
    if held == asked:
        return
    if isinstance(held, dict) and isinstance(asked, dict):
        for name in sorted(held.keys() | asked.keys()):
            if held.get(name) != asked.get(name):
                plain = all(not isinstance(value, dict | list) for value in (held.get(name), asked.get(name)))
                yield (
                    f"{key}.{name} was {held.get(name)!r}, is {asked.get(name)!r}" if plain else f"{key}.{name} differs"
                )
        return
    yield f"{key} was {held!r}, is {asked!r}"


def _without_nan(row: Row) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in row.items()}


def _write_csv(path: Path, columns: Sequence[str], rows: Any) -> None:
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
