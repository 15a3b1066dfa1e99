"""The results: a `Prediction` of a scan, its `Segmentation`, and a `Saliency` of a scan, a task and a method."""

import csv
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ichprog.errors import InvalidValueError, ScanError, ScanWarning, UnknownNameError, missing_extra
from ichprog.io import atomic_write
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    import nibabel as nib
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The regions that a task finds in a scan.

    A voxel lies in the most probable region if the probability of all regions together exceeds one half.

    Attributes:
        regions: Names of the regions; voxels of the mask have the values 1, 2, ... in this order.
        probabilities: `(R + 1, d, h, w)` probability of no region, then of each region, the mean over folds. The grid
            is that of the network, at its resolution or a lower one.
        slice_probabilities: Probability that a slice holds a region, for each slice in the order of the scan file.
        region_probabilities: Probability that the scan holds each region, the mean over folds.
        to_image: Resamples the probabilities to the voxels of the scan and returns the mask.
    """

    regions: tuple[str, ...]
    probabilities: np.ndarray = field(repr=False)
    slice_probabilities: tuple[float, ...] = field(repr=False)
    region_probabilities: Mapping[str, float]
    to_image: Callable[[np.ndarray], "nib.Nifti1Image"] = field(repr=False)

    @functools.cached_property
    def mask(self) -> "nib.Nifti1Image":
        """Return the mask in the space of the scan. It is computed on first use."""
        return self.to_image(self.probabilities)

    @functools.cached_property
    def volume_ml(self) -> dict[str, float]:
        """Return the volume of all regions together, `"total"`, and of each region, in mL."""
        counts = np.bincount(np.asarray(self.mask.dataobj).ravel(), minlength=len(self.regions) + 1)[1:]
        voxel_ml = abs(np.linalg.det(self.mask.affine[:3, :3])) / 1000
        volumes = {name: float(count * voxel_ml) for name, count in zip(self.regions, counts, strict=True)}
        return {"total": sum(volumes.values()), **volumes}

    def to_dict(self) -> dict[str, Any]:
        """Return volumes and probabilities of slices and regions as plain data, ready for JSON."""
        return {
            "volume_ml": dict(self.volume_ml),
            "slice_probabilities": list(self.slice_probabilities),
            "region_probabilities": dict(self.region_probabilities),
        }


@dataclass(frozen=True)
class TaskPrediction:
    """The prediction of one task.

    Attributes:
        label: The predicted label, by the threshold of the spec.
        probabilities: Probability of each label, the mean over folds. They sum to one.
        logits: Logits of the head, the mean over folds.
        std: Standard deviation of each probability between folds; None with one fold.
        segmentation: The regions in the scan if the task is also answered voxel by voxel; otherwise None.
    """

    label: str
    probabilities: Mapping[str, float]
    logits: tuple[float, ...]
    std: Mapping[str, float] | None
    segmentation: Segmentation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain data, ready for JSON."""
        return {
            "label": self.label,
            "probabilities": dict(self.probabilities),
            "logits": list(self.logits),
            "std": None if self.std is None else dict(self.std),
            **({} if self.segmentation is None else self.segmentation.to_dict()),
        }


@dataclass(frozen=True)
class Prediction(Mapping[str, TaskPrediction]):
    """The prediction of a model for one scan: a mapping from task names to `TaskPrediction`.

    Attributes:
        scan: Name of the scan.
        model: Name of the model.
        tasks: Prediction of each task; empty if the scan has an error.
        warnings: Warnings about the scan.
        provenance: Everything that determines the prediction, as plain data.
        error: The error of the scan, with `code` and `message`; None if there is a prediction.
        patient: Name of the patient in the cohort; None if the scan does not come from a cohort.

    Example:
        ```python
        prediction = ichprog.predict("perez2023.prognosis", "scan.nii.gz")
        for task, result in prediction.items():
            print(task, result.label, result.probabilities)
        ```
    """

    scan: str
    model: str
    tasks: Mapping[str, TaskPrediction]
    warnings: tuple[ScanWarning, ...]
    provenance: Mapping[str, Any]
    error: Mapping[str, Any] | None = None
    patient: str | None = None

    def __getitem__(self, task: str) -> TaskPrediction:
        """Return the prediction of one task.

        Raises:
            ScanError: The scan has an error and therefore no prediction.
            UnknownNameError: The model has no such task.
        """
        if self.error is not None:
            raise ScanError(f"{self.scan} has no prediction: {self.error['message']}", code=self.error["code"])
        if task not in self.tasks:
            raise UnknownNameError(f"task of {self.model}", task, self.tasks)
        return self.tasks[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __contains__(self, task: object) -> bool:
        return task in self.tasks

    def __bool__(self) -> bool:
        """Return True, also for a prediction with an error; `error` tells the two apart."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain data, ready for JSON."""
        return {
            **({} if self.patient is None else {"patient": self.patient}),
            "scan": self.scan,
            "model": self.model,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "warnings": [warning.to_dict() for warning in self.warnings],
            "provenance": dict(self.provenance),
            **({} if self.error is None else {"error": dict(self.error)}),
        }


@dataclass(frozen=True, eq=False)
class Saliency:
    """A saliency map: how much each cell of a scan raises the log-odds of one label of one task.

    Attributes:
        scan: Name of the scan.
        model: Name of the model.
        task: The task.
        label: The label whose log-odds are explained.
        method: The saliency method.
        grid_map: The map as the method computed it, signed and unscaled, `(d, h, w)`: slices, rows, columns. Its shape
            is the true resolution of the map.
        empty: Whether the map is zero everywhere.
        warnings: Warnings about the scan.
        provenance: Everything that determines the map, as plain data.
        to_image: Resamples a map from the grid to the voxels of the scan.
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
    to_image: Callable[[np.ndarray], "nib.Nifti1Image"] = field(repr=False)

    @functools.cached_property
    def image(self) -> "nib.Nifti1Image":
        """Return the map as an image with the shape and affine of the scan. It is computed on first use."""
        return self.to_image(self.grid_map)

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the map itself as plain data, ready for JSON."""
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
        """Write the image as NIfTI, atomically.

        Args:
            path: A file name that ends in .nii or .nii.gz.

        Returns:
            The path.

        Raises:
            InvalidValueError: The name has another ending.
        """
        target = Path(path)
        if not target.name.endswith((".nii", ".nii.gz")):
            raise InvalidValueError("file name of a map", str(path), "a name that ends in .nii or .nii.gz")
        import nibabel as nib

        with atomic_write(target) as partial:
            nib.save(self.image, partial)
        return target


@contextmanager
def results_file(
    target: Path, spec: ModelSpec, *, with_patients: bool = False
) -> Iterator[Callable[[Prediction], None]]:
    """Open a file of predictions, which appears whole when the block ends without an error.

    Args:
        target: A path that ends in .csv (one row per scan), .json (one list) or .jsonl (one line per scan). Its folder
            is created if missing.
        spec: The model that predicts.
        with_patients: Whether a .csv has the column `patient`, for scans of a cohort.

    Yields:
        A function that adds one prediction.

    Raises:
        UnknownNameError: The path has another suffix.
        OSError: The file cannot be written.
    """
    if target.suffix not in _WRITERS:
        raise UnknownNameError("format of results", target.suffix or target.name, _WRITERS)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        with _WRITERS[target.suffix](file, spec, with_patients) as add:
            yield add
        file.flush()


def to_frame(predictions: "Prediction | Iterable[Prediction]") -> "pd.DataFrame":
    """Return predictions as a pandas table with one row per scan. This function needs pandas.

    The columns are those of a results file: `scan`, `model`, `status`, then for each task the predicted label, the
    probability of each label and the standard deviation of the predicted label's probability between folds.

    Args:
        predictions: One prediction or several.

    Raises:
        IchprogError: pandas is not installed.

    Example:
        ```python
        table = ichprog.to_frame(ichprog.predict("perez2023.prognosis", "scans"))
        print(table[["scan", "prognosis_poor"]])
        ```
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise missing_extra("pandas", "pandas", "A table of predictions") from error
    several = [predictions] if isinstance(predictions, Prediction) else predictions
    return pd.DataFrame([_row(prediction) for prediction in several])


def _row(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as one row of a table."""
    row: dict[str, Any] = {} if prediction.patient is None else {"patient": prediction.patient}
    row |= {"scan": prediction.scan, "model": prediction.model}
    row["status"] = "ok" if prediction.error is None else "failed"
    for name, task in prediction.tasks.items():
        row[f"{name}_label"] = task.label
        row |= {f"{name}_{label}": value for label, value in task.probabilities.items()}
        row[f"{name}_std"] = None if task.std is None else task.std[task.label]
        if task.segmentation is not None:
            row |= {f"{name}_{part}_ml": value for part, value in task.segmentation.volume_ml.items()}
    row["warnings"] = " | ".join(f"{warning.code}: {warning.message}" for warning in prediction.warnings)
    if prediction.error is not None:
        row |= {"error_code": prediction.error["code"], "error_message": prediction.error["message"]}
    return row


@contextmanager
def _csv(file: TextIO, spec: ModelSpec, with_patients: bool) -> Iterator[Callable[[Prediction], None]]:
    columns = [*(["patient"] if with_patients else []), "scan", "model", "status"]
    for task in spec.tasks:
        columns += [f"{task.name}_label", *(f"{task.name}_{label}" for label in task.labels), f"{task.name}_std"]
        if task.mask is not None:
            columns += [f"{task.name}_{part}_ml" for part in ("total", *task.mask.regions)]
    columns += ["warnings", "error_code", "error_message", "notice"]
    table = csv.DictWriter(file, columns, extrasaction="ignore")
    table.writeheader()
    notice = spec.notice

    def add(prediction: Prediction) -> None:
        nonlocal notice
        row = _row(prediction) | {"notice": notice}
        table.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})
        notice = ""  # the first row states the notice for the whole table

    yield add


@contextmanager
def _json(file: TextIO, *_: Any) -> Iterator[Callable[[Prediction], None]]:
    between = "[\n"

    def add(prediction: Prediction) -> None:
        nonlocal between
        file.write(between + json.dumps(prediction.to_dict(), ensure_ascii=False))
        between = ",\n"

    yield add
    file.write("\n]\n" if between != "[\n" else "[]\n")


@contextmanager
def _jsonl(file: TextIO, *_: Any) -> Iterator[Callable[[Prediction], None]]:
    yield lambda prediction: print(json.dumps(prediction.to_dict(), ensure_ascii=False), file=file)


_WRITERS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl}
