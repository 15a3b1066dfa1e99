"""What comes back: a `Prediction` for a scan, a `Saliency` for a scan, a task and a method."""

import csv
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ichprog.errors import ScanError, ScanWarning, UnknownNameError
from ichprog.io import atomic_write
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    import nibabel as nib


@dataclass(frozen=True)
class TaskPrediction:
    """The answer to one task.

    Attributes:
        label: The label the model decides for, by its spec's threshold.
        probabilities: Each label's probability, the mean over folds; they add to one.
        logits: The head's numbers, the mean over folds.
        std: Each probability's standard deviation between folds; None where only one fold answered.
    """

    label: str
    probabilities: Mapping[str, float]
    logits: tuple[float, ...]
    std: Mapping[str, float] | None


@dataclass(frozen=True)
class Prediction:
    """A model's answer about one scan; `prediction["prognosis"]` is the answer to a task.

    Attributes:
        scan: The scan, as it was named.
        model: The model's name.
        tasks: Each task's answer; empty where the scan could not be read.
        warnings: Doubts about the scan.
        provenance: Everything that went into the answer, as plain data.
        error: What was wrong with the scan, with `code` and `message`; None if the scan was predicted.
        patient: Name of the patient in the cohort; None if the scan does not come from a cohort.
    """

    scan: str
    model: str
    tasks: Mapping[str, TaskPrediction]
    warnings: tuple[ScanWarning, ...]
    provenance: Mapping[str, Any]
    error: Mapping[str, Any] | None = None
    patient: str | None = None

    def __getitem__(self, task: str) -> TaskPrediction:
        """The answer to one task.

        Raises:
            ScanError: The scan could not be read and there is no answer.
            UnknownNameError: The model has no such task.
        """
        if self.error is not None:
            raise ScanError(f"there is no answer for {self.scan}: {self.error['message']}", code=self.error["code"])
        if task not in self.tasks:
            raise UnknownNameError(f"task of {self.model}", task, self.tasks)
        return self.tasks[task]

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain data, ready for JSON."""
        return {
            **({} if self.patient is None else {"patient": self.patient}),
            "scan": self.scan,
            "model": self.model,
            "tasks": {
                name: {
                    "label": task.label,
                    "probabilities": dict(task.probabilities),
                    "logits": list(task.logits),
                    "std": None if task.std is None else dict(task.std),
                }
                for name, task in self.tasks.items()
            },
            "warnings": [warning.to_dict() for warning in self.warnings],
            "provenance": dict(self.provenance),
            **({} if self.error is None else {"error": dict(self.error)}),
        }


@dataclass(frozen=True, eq=False)
class Saliency:
    """What in a scan speaks for one label of one task; the higher, the more.

    Attributes:
        scan: The scan, as it was named.
        model: The model's name.
        task: The task.
        label: The label whose log-odds are explained.
        method: The saliency method.
        grid_map: The map as the method gave it, signed and unscaled, `(d, h, w)`: slices, rows, columns. Its shape is
            the map's true resolution.
        empty: Whether the map is zero everywhere, so that there is nothing to draw.
        warnings: Doubts about the scan.
        provenance: Everything that went into the map, as plain data.
        over_scan: What lays a map of the grid over the scan.
    """

    scan: str
    model: str
    task: str
    label: str
    method: str
    grid_map: np.ndarray = field(repr=False)
    empty: bool
    warnings: tuple[ScanWarning, ...]
    provenance: Mapping[str, Any] = field(repr=False)
    over_scan: Callable[[np.ndarray], "nib.Nifti1Image"] = field(repr=False)

    @functools.cached_property
    def image(self) -> "nib.Nifti1Image":
        """The map over the scan's own voxels, in its own shape and affine; made when it is first asked for."""
        return self.over_scan(self.grid_map)

    def to_dict(self) -> dict[str, Any]:
        """All but the map itself as plain data, ready for JSON."""
        return {
            "scan": self.scan,
            "model": self.model,
            "task": self.task,
            "label": self.label,
            "method": self.method,
            "empty": self.empty,
            "grid_shape": list(self.grid_map.shape),
            "warnings": [warning.to_dict() for warning in self.warnings],
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | Path) -> Path:
        """Writes the image as NIfTI, whole or not at all.

        Args:
            path: A file name that ends in .nii or .nii.gz.

        Returns:
            The path.
        """
        import nibabel as nib

        target = Path(path)
        if not target.name.endswith((".nii", ".nii.gz")):
            raise ValueError(f"{target}: a map is written as NIfTI; end its name in .nii or .nii.gz")
        with atomic_write(target) as partial:
            nib.save(self.image, partial)
        return target


@contextmanager
def results_file(target: Path, spec: ModelSpec) -> Iterator[Callable[[Prediction], None]]:
    """A file of predictions, written one by one and there when all are.

    Args:
        target: A name that ends in .csv (a row a scan), .json (one list) or .jsonl (a line a scan).
        spec: The model that predicts.

    Returns:
        The function that adds a prediction.

    Raises:
        UnknownNameError: The name ends in something else.
        OSError: The file cannot be written.
    """
    if target.suffix not in _WRITERS:
        raise UnknownNameError("format of results", target.suffix or target.name, _WRITERS)
    with atomic_write(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        with _WRITERS[target.suffix](file, spec) as add:
            yield add
        file.flush()


@contextmanager
def _csv(file: TextIO, spec: ModelSpec) -> Iterator[Callable[[Prediction], None]]:
    columns = ["scan", "model"]
    for task in spec.tasks:
        columns += [f"{task.name}_label", *(f"{task.name}_{label}" for label in task.labels)]
    table = csv.DictWriter(file, [*columns, "warnings"])
    table.writeheader()

    def add(prediction: Prediction) -> None:
        row: dict[str, Any] = {"scan": prediction.scan, "model": prediction.model}
        for name, task in prediction.tasks.items():
            row[f"{name}_label"] = task.label
            row |= {f"{name}_{label}": value for label, value in task.probabilities.items()}
        said = [f"{warning.code}: {warning.message}" for warning in prediction.warnings]
        if prediction.error is not None:
            said.append(f"error {prediction.error['code']}: {prediction.error['message']}")
        table.writerow(row | {"warnings": " | ".join([*said, spec.notice])})

    yield add


@contextmanager
def _json(file: TextIO, spec: ModelSpec) -> Iterator[Callable[[Prediction], None]]:  # noqa: ARG001
    between = "[\n"

    def add(prediction: Prediction) -> None:
        nonlocal between
        file.write(between + json.dumps(prediction.to_dict(), ensure_ascii=False))
        between = ",\n"

    yield add
    file.write("\n]\n" if between != "[\n" else "[]\n")


@contextmanager
def _jsonl(file: TextIO, spec: ModelSpec) -> Iterator[Callable[[Prediction], None]]:  # noqa: ARG001
    yield lambda prediction: print(json.dumps(prediction.to_dict(), ensure_ascii=False), file=file)


_WRITERS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl}
