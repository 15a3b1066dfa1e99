"""The results: a `Prediction` of a scan, its `Segmentation`, a `Haemorrhage`, and a `Saliency`."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from ichprog.errors import InvalidValueError, ScanError, ScanWarning, UnknownNameError, missing_extra
from ichprog.io import atomic_write
from ichprog.notebook import card, view
from ichprog.spec import MaskTarget, Task

if TYPE_CHECKING:
    import nibabel as nib
    import pandas as pd


class Scores(Protocol):
    """The clinical scores of a patient, as `clinical_scores.ClinicalScores` has them."""

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data."""

    def to_row(self) -> dict[str, Any]:
        """Return the scores as one row of a table."""


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
        calibrated: Calibrated probability of each label; None if the model has no calibration of the task.
        label_set: The labels of a conformal set, which holds the true label with the coverage of the prediction; None
            without calibration.
    """

    label: str
    probabilities: Mapping[str, float]
    logits: tuple[float, ...]
    std: Mapping[str, float] | None
    segmentation: Segmentation | None = None
    calibrated: Mapping[str, float] | None = None
    label_set: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain data, ready for JSON."""
        return {
            "label": self.label,
            "probabilities": dict(self.probabilities),
            "logits": list(self.logits),
            "std": None if self.std is None else dict(self.std),
            **({} if self.calibrated is None else {"calibrated": dict(self.calibrated)}),
            **({} if self.label_set is None else {"label_set": list(self.label_set)}),
            **({} if self.segmentation is None else self.segmentation.to_dict()),
        }


@dataclass(frozen=True)
class ClinicalUse:
    """The clinical values of a prediction.

    Attributes:
        used: Known values, by column.
        missing: Columns of values that were not known.
        contributions: For each task that uses clinical values, by how much each known value changed the log-odds of the
            last label: the log-odds with all known values minus those without this one.
    """

    used: Mapping[str, float]
    missing: tuple[str, ...]
    contributions: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain data, ready for JSON."""
        return {
            "used": dict(self.used),
            "missing": list(self.missing),
            "contributions": {task: dict(changes) for task, changes in self.contributions.items()},
        }


@dataclass(frozen=True)
class InputDistance:
    """How far the grid of a scan is from those of the patients of a model's calibration.

    Attributes:
        distance: Mahalanobis distance of the statistics of the grid.
        threshold: Distance beyond which the scan is unlike these patients.
        statistic: The statistic that differs most from its mean, in standard deviations.
        value: Value of this statistic.
        usual: Range of this statistic: its mean less and plus three standard deviations.
    """

    distance: float
    threshold: float
    statistic: str
    value: float
    usual: tuple[float, float]

    @property
    def is_unusual(self) -> bool:
        """Return whether the scan is unlike the patients of the calibration."""
        return self.distance > self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return the distance as plain data, ready for JSON."""
        return {
            "distance": self.distance,
            "threshold": self.threshold,
            "is_unusual": self.is_unusual,
            "statistic": self.statistic,
            "value": self.value,
            "usual": list(self.usual),
        }


@dataclass(frozen=True, repr=False)
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
        haemorrhage: The haemorrhage in the scan, found by another model; None if it was not requested.
        clinical: The clinical values that were used, and what each changed; None if the model uses the image alone.
        coverage: Probability with which the `label_set` of a task holds the true label; None without calibration.
        input_distance: Whether the scan is like those of the calibration; None without calibration.

    Examples:
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
    haemorrhage: "Haemorrhage | None" = None
    clinical: ClinicalUse | None = None
    coverage: float | None = None
    input_distance: InputDistance | None = None

    def __repr__(self) -> str:
        if self.error is not None:
            return f"<Prediction {self.scan}: no result, {self.error['code']}>"
        answers = [f"{name} {task.label} {task.probabilities[task.label]:.3f}" for name, task in self.tasks.items()]
        return f"<Prediction {self.scan}: {', '.join(answers)}>"

    def _repr_html_(self) -> str:
        """Show the probabilities as a table in a notebook."""
        if self.error is not None:
            return card(self.scan, ["error", "message"], [[self.error["code"], self.error["message"]]])
        head, rows = ["task", "label", "probability", "between folds"], []
        is_calibrated = any(task.calibrated is not None for task in self.tasks.values())
        head += ["calibrated", f"set for {self.coverage:.0%}"] if is_calibrated and self.coverage else []
        for name, task in self.tasks.items():
            for label, p in task.probabilities.items():
                spread = "" if task.std is None else f"± {task.std[label]:.3f}"
                row = [name, f"{label} (predicted)" if label == task.label else label, f"{p:.3f}", spread]
                if is_calibrated:
                    known, labels = task.calibrated or {}, task.label_set or ()
                    row += [f"{known[label]:.3f}" if label in known else "", "yes" if label in labels else ""]
                rows.append(row)
        notes = [f"Abstains from {name}: {reason}." for name, reason in self.abstained.items()]
        if self.clinical is not None:
            used = ", ".join(f"{name} {value:g}" for name, value in self.clinical.used.items()) or "none"
            notes.append(f"Clinical values: {used}; missing: {', '.join(self.clinical.missing) or 'none'}.")
        notes += [f"{warning.code}: {warning.message}" for warning in self.warnings]
        notes.append(str(self.provenance.get("notice", "")))
        return card(f"{self.model}: {self.scan}", head, rows, notes)

    @property
    def abstained(self) -> dict[str, str]:
        """Return why there is no reliable answer, for each such task by name; empty if every answer can be used.

        A task abstains if its conformal set holds every label, or if the scan is unlike those of the calibration. Its
        probabilities are reported all the same.
        """
        found = self.input_distance
        if found is not None and found.is_unusual:
            reason = (
                f"the scan is unlike those of the calibration: distance {found.distance:.1f}, threshold "
                f"{found.threshold:.1f}; {found.statistic} is {found.value:.3g}, usually {found.usual[0]:.3g} to "
                f"{found.usual[1]:.3g}"
            )
            return dict.fromkeys(self.tasks, reason)
        return {
            name: f"every label is possible at a coverage of {self.coverage:.0%}"
            for name, task in self.tasks.items()
            if task.label_set is not None and len(task.label_set) == len(task.probabilities)
        }

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
            **({} if self.clinical is None else {"clinical": self.clinical.to_dict()}),
            **({} if self.coverage is None else {"coverage": self.coverage, "abstained": self.abstained}),
            **({} if self.input_distance is None else {"input_distance": self.input_distance.to_dict()}),
            **({} if self.haemorrhage is None else {"haemorrhage": self.haemorrhage.to_dict()}),
            **({} if self.error is None else {"error": dict(self.error)}),
        }


@dataclass(frozen=True, eq=False, repr=False)
class Haemorrhage:
    """The haemorrhage in a scan: whether there is one, its mask, volumes and place.

    Every attribute that depends on the scan raises the ScanError of a scan that has an error. Volumes come with
    `limits`, which state how far they can be relied on.

    Attributes:
        prediction: The prediction of the model that finds haemorrhages.
        task: The task of the model that is answered voxel by voxel.
        limits: Known limits of the model.
        intraventricular: Probability that there is blood in the ventricles; None if the model does not tell.
        infratentorial: Probability that the haemorrhage lies below the tentorium; None without a haemorrhage.
        side: "left", "right", "both" or "midline"; None without a haemorrhage.
        location: "lobar", "deep" or "infratentorial", or the kind of a haemorrhage outside the brain tissue; None
            without a haemorrhage.
        shares: Share of all blood in each region of the atlas; empty if the model finds other regions.
        midline_shift_mm: Displacement of the midline in mm; None if it cannot be measured.
        midline_shift_interval_mm: Interval of the displacement in mm; None if it is not known.
        midline_shift_reason: Why the displacement was not measured; None if it was, or if the model finds no kinds
            of haemorrhage that have a place.

    Examples:
        ```python
        blood = ichprog.haemorrhage("scan.nii.gz")
        print(blood.is_present, blood.probability, blood.volume_ml, blood.intervals_ml)
        blood.mask.to_filename("blood.nii.gz")
        ```
    """

    prediction: Prediction
    task: Task
    limits: tuple[str, ...]
    intraventricular: float | None = None
    infratentorial: float | None = None
    side: str | None = None
    location: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    midline_shift_mm: float | None = None
    midline_shift_interval_mm: tuple[float, float] | None = None
    midline_shift_reason: str | None = None

    def __repr__(self) -> str:
        if self.error is not None:
            return f"<Haemorrhage {self.scan}: no result, {self.error['code']}>"
        found = "present" if self.is_present else "absent"
        return f"<Haemorrhage {self.scan}: {found}, probability {self.probability:.3f}>"

    @property
    def scan(self) -> str:
        """Return the name of the scan."""
        return self.prediction.scan

    @property
    def model(self) -> str:
        """Return the name of the model."""
        return self.prediction.model

    @property
    def patient(self) -> str | None:
        """Return the name of the patient in the cohort; None if the scan does not come from a cohort."""
        return self.prediction.patient

    @property
    def error(self) -> Mapping[str, Any] | None:
        """Return the error of the scan, with `code` and `message`; None if there is a result."""
        return self.prediction.error

    @property
    def warnings(self) -> tuple[ScanWarning, ...]:
        """Return the warnings about the scan."""
        return self.prediction.warnings

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Return everything that determines the result, as plain data."""
        return self.prediction.provenance

    @property
    def probability(self) -> float:
        """Return the probability that the scan holds any haemorrhage."""
        return 1 - self._answer.probabilities[self.task.labels[0]]

    @property
    def threshold(self) -> float:
        """Return the probability above which a haemorrhage is called present."""
        return self.task.decision_threshold

    @property
    def is_present(self) -> bool:
        """Return whether the model finds a haemorrhage: whether the probability exceeds the threshold."""
        return self.probability > self.threshold

    @property
    def regions(self) -> dict[str, int]:
        """Return the kinds of haemorrhage with their voxel values in the mask."""
        return {name: value for value, name in enumerate(self._segmentation.regions, start=1)}

    @property
    def mask(self) -> "nib.Nifti1Image":
        """Return the mask in the space of the scan: 0 outside a haemorrhage, otherwise a value of `regions`."""
        return self._segmentation.mask

    @property
    def slice_probabilities(self) -> tuple[float, ...]:
        """Return the probability that a slice holds a haemorrhage, for each slice in the order of the scan file."""
        return self._segmentation.slice_probabilities

    @property
    def volume_ml(self) -> dict[str, float]:
        """Return the volume of the mask, `"total"`, and of each kind in it, in mL."""
        return self._segmentation.volume_ml

    @property
    def intervals_ml(self) -> dict[str, tuple[float, float] | None]:
        """Return the interval of each volume in mL, which holds 90 % of true volumes; None if it is not known."""
        mask = cast("MaskTarget", self.task.mask)
        return {part: mask.volume_interval_ml(part, volume) for part, volume in self.volume_ml.items()}

    @property
    def _answer(self) -> TaskPrediction:
        return self.prediction[self.task.name]

    @property
    def _segmentation(self) -> Segmentation:
        return cast("Segmentation", self._answer.segmentation)  # the task has a mask

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the mask itself as plain data, ready for JSON."""
        own = {} if self.patient is None else {"patient": self.patient}
        own |= {"scan": self.scan, "model": self.model}
        if self.error is not None:
            return own | {"limits": list(self.limits), "provenance": dict(self.provenance), "error": dict(self.error)}
        intervals, shift = self.intervals_ml, self.midline_shift_interval_mm
        return {
            **own,
            "probability": self.probability,
            "threshold": self.threshold,
            "is_present": self.is_present,
            "regions": self.regions,
            "volume_ml": dict(self.volume_ml),
            "intervals_ml": {part: interval and list(interval) for part, interval in intervals.items()},
            "slice_probabilities": list(self.slice_probabilities),
            "intraventricular": self.intraventricular,
            "infratentorial": self.infratentorial,
            "side": self.side,
            "location": self.location,
            "shares": dict(self.shares),
            "midline_shift_mm": self.midline_shift_mm,
            "midline_shift_interval_mm": shift and list(shift),
            "midline_shift_reason": self.midline_shift_reason,
            "limits": list(self.limits),
            "warnings": [warning.to_dict() for warning in self.warnings],
            "provenance": dict(self.provenance),
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
        read_scan: Reads the scan again as an image, or None if it was given as a checked `Scan`.
        find_brain: Returns the brain mask in the voxels of `image`, or None for a model that sees the whole head.
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
    read_scan: "Callable[[], nib.Nifti1Image] | None" = field(default=None, repr=False)
    find_brain: Callable[[], np.ndarray] | None = field(default=None, repr=False)

    @functools.cached_property
    def image(self) -> "nib.Nifti1Image":
        """Return the map as an image with the shape and affine of the scan. It is computed on first use."""
        return self.to_image(self.grid_map)

    def _repr_html_(self) -> str:
        """Show what the map is in a notebook."""
        shape = " x ".join(map(str, self.grid_map.shape))
        rows = [["task", f"{self.task}: {self.label}"], ["method", self.method], ["resolution", shape]]
        rows.append(["empty", "yes" if self.empty else "no"])
        notes = [
            "saliency.view() opens a viewer, and ichprog.plot(saliency, scan) draws the map.",
            str(self.provenance.get("notice", "")),
        ]
        return card(f"{self.model}: {self.scan}", ["", ""], rows, notes)

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

    def labels(self, percent: float) -> "nib.Nifti1Image":
        """Return where the map is strongest, as a label map with the shape and affine of the scan.

        The strongest voxels are those with the largest absolute values among the voxels of the brain, or of the scan
        for a model that sees the whole head. Equal values at the threshold are included, zeros never.

        Args:
            percent: Percentage of voxels, above 0 and at most 100.

        Returns:
            An image of uint8: 1 where the map raises the log-odds of the label, 2 where it lowers them, 0 elsewhere.
            Its header says so.

        Raises:
            InvalidValueError: The percentage is outside the range.

        Examples:
            ```python
            saliency = ichprog.explain("perez2023.prognosis", "scan.nii.gz", method="grad_cam")
            saliency.labels(5).to_filename("strongest.nii.gz")
            ```
        """
        if not 0 < percent <= 100:
            raise InvalidValueError("percentage of voxels", percent, "a number above 0 and at most 100")
        import nibabel as nib

        values = np.asarray(self.image.dataobj, np.float32)
        inside = np.ones(values.shape, bool) if self.find_brain is None else self.find_brain()
        strength = np.sort(np.abs(values[inside]))
        threshold = strength[-math.ceil(percent / 100 * strength.size)] if strength.size else 0.0
        strongest = inside & (values != 0) & (np.abs(values) >= threshold)
        labels = np.where(strongest, np.where(values > 0, 1, 2), 0).astype(np.uint8)
        image = nib.Nifti1Image(labels, self.image.affine)
        image.header.set_intent("label", name="1 up, 2 down")
        _describe(image, f"{percent:g}% strongest, 1 raises 2 lowers: {self._description}")
        return image

    @property
    def _description(self) -> str:
        return f"{self.method} of {self.task} {self.label}, {self.model}"

    def view(self, scan: Any = None, *, masks: "Mapping[str, Any] | None" = None) -> Any:
        """Open a viewer in a notebook, with the scan, the map and masks as layers.

        The map is shown up to its 99.5th percentile in the brain. Red increases the log-odds of the label, blue
        decreases them.

        Args:
            scan: The scan: a NIfTI path, a nibabel image, or a `Scan`. By default the explained scan is read again.
            masks: Masks in the space of the scan by name, as nibabel images or NIfTI paths.

        Returns:
            An `ipyniivue.NiiVue`, which a notebook shows.

        Raises:
            IchprogError: ipyniivue is not installed.
            InvalidValueError: The explained scan cannot be read again, so that `scan` is needed.

        Examples:
            ```python
            saliency = ichprog.explain(model, "scan.nii.gz")
            saliency.view(masks={"haemorrhage": ichprog.haemorrhage("scan.nii.gz").mask})
            ```
        """
        if scan is None and self.read_scan is None:
            raise InvalidValueError("scan to view", None, "the scan, because the map was computed from a checked Scan")
        under = scan
        if scan is None and self.read_scan is not None:
            under = self.read_scan()
        elif hasattr(scan, "hu"):
            under = scan.image(scan.hu)
        values = np.asarray(self.image.dataobj, np.float32)
        inside = values if self.find_brain is None else values[self.find_brain()]
        top = float(np.percentile(np.abs(inside), 99.5)) if inside.size else 0.0
        return view(under, {self._description: (self.image, top or 1.0)}, masks or {})

    def save(self, path: str | Path) -> Path:
        """Write the image as NIfTI, atomically.

        The values are stored with 16 bits and a scale, which makes the file several times smaller. They differ from
        those of `image` by at most 1/65,534 of the range of the map. The header says what the map is.

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

        image = nib.Nifti1Image(np.asarray(self.image.dataobj, np.float32), self.image.affine)
        image.set_data_dtype(np.int16)  # nibabel chooses the scale
        _describe(image, self._description)
        with atomic_write(target, sole_writer=True) as partial:
            nib.save(image, partial)
        return target


def _describe(image: "nib.Nifti1Image", text: str) -> None:
    """Write a description into the header of an image, which holds 79 characters."""
    image.header["descrip"] = text.encode("ascii", "replace")[:79]


def to_frame(results: "Prediction | Haemorrhage | Iterable[Prediction | Haemorrhage]") -> "pd.DataFrame":
    """Return predictions or haemorrhages as a pandas table with one row per scan. This function needs pandas.

    The columns are those of a results file: `scan`, `model`, `status`, then for each task the predicted label, the
    probability of each label and the standard deviation of the predicted label's probability between folds. A
    haemorrhage has its volumes in mL with their intervals, and its place.

    Args:
        results: One result or several.

    Raises:
        IchprogError: pandas is not installed.

    Examples:
        ```python
        table = ichprog.to_frame(ichprog.predict("perez2023.prognosis", "scans"))
        print(table[["scan", "prognosis_poor"]])
        ```
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise missing_extra("pandas", "pandas", "A table of predictions") from error
    several = [results] if isinstance(results, Prediction | Haemorrhage) else results
    rows = [prediction_row(each) if isinstance(each, Prediction) else haemorrhage_row(each) for each in several]
    return pd.DataFrame(rows)


CLINICAL = "clinical_"  # of the columns of clinical values
BLOOD = "blood_"  # of the columns of a haemorrhage among the columns of tasks


def _calibration_values(prediction: Prediction) -> dict[str, Any]:
    """Return calibrated probabilities, conformal sets and the distance of a scan by column."""
    values: dict[str, Any] = {}
    for name, task in prediction.tasks.items():
        if task.calibrated is not None and task.label_set is not None:
            values |= {f"{name}_calibrated_{label}": value for label, value in task.calibrated.items()}
            values[f"{name}_set"] = " | ".join(task.label_set)
    if prediction.coverage is not None:
        values["coverage"] = prediction.coverage
        values |= {f"{name}_abstained": reason for name, reason in prediction.abstained.items()}
    if prediction.input_distance is not None:
        values["input_distance"] = prediction.input_distance.distance
        values["input_distance_threshold"] = prediction.input_distance.threshold
    return values


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as one row of a table.

    Args:
        prediction: The prediction.
    """
    columns: dict[str, Any] = {}
    for name, task in prediction.tasks.items():
        columns[f"{name}_label"] = task.label
        columns |= {f"{name}_{label}": value for label, value in task.probabilities.items()}
        columns[f"{name}_std"] = None if task.std is None else task.std[task.label]
        if task.segmentation is not None:
            columns |= {f"{name}_{part}_ml": value for part, value in task.segmentation.volume_ml.items()}
    if prediction.clinical is not None:
        use = prediction.clinical
        columns |= {f"{CLINICAL}{name}": use.used.get(name) for name in (*use.used, *use.missing)}
        for name, changes in use.contributions.items():
            columns |= {f"{name}_change_{column}": change for column, change in changes.items()}
    columns |= _calibration_values(prediction)
    if prediction.haemorrhage is not None:
        found = _haemorrhage_values(prediction.haemorrhage)
        columns |= {f"{BLOOD}{column}": value for column, value in found.items()}
    return _row_of(prediction, columns)


def haemorrhage_row(haemorrhage: Haemorrhage) -> dict[str, Any]:
    """Return a haemorrhage as one row of a table.

    Args:
        haemorrhage: The haemorrhage.
    """
    values = {} if haemorrhage.error is not None else _haemorrhage_values(haemorrhage)
    return _row_of(haemorrhage.prediction, values)


def _row_of(prediction: Prediction, columns: dict[str, Any]) -> dict[str, Any]:
    """Return one row with the columns of a result between those of its scan."""
    row: dict[str, Any] = {} if prediction.patient is None else {"patient": prediction.patient}
    row |= {"scan": prediction.scan, "model": prediction.model}
    row["status"] = "ok" if prediction.error is None else "failed"
    row |= columns
    row["warnings"] = " | ".join(f"{warning.code}: {warning.message}" for warning in prediction.warnings)
    if prediction.error is not None:
        row |= {"error_code": prediction.error["code"], "error_message": prediction.error["message"]}
    return row


def _haemorrhage_values(haemorrhage: Haemorrhage) -> dict[str, Any]:
    """Return the values of a haemorrhage by column; a volume is followed by its interval."""
    values: dict[str, Any] = {"present": "yes" if haemorrhage.is_present else "no"}
    values |= {"probability": haemorrhage.probability, "threshold": haemorrhage.threshold}
    for part, interval in haemorrhage.intervals_ml.items():
        low, high = interval or (None, None)
        values |= {f"{part}_ml": haemorrhage.volume_ml[part], f"{part}_low_ml": low, f"{part}_high_ml": high}
    low, high = haemorrhage.midline_shift_interval_mm or (None, None)
    return values | {
        "intraventricular": haemorrhage.intraventricular,
        "infratentorial": haemorrhage.infratentorial,
        "side": haemorrhage.side,
        "location": haemorrhage.location,
        "midline_shift_mm": haemorrhage.midline_shift_mm,
        "midline_shift_low_mm": low,
        "midline_shift_high_mm": high,
    }


def with_scores(result: Prediction | Haemorrhage, scores: Scores | None) -> dict[str, Any]:
    """Return a result with its clinical scores as plain data, ready for JSON.

    Args:
        result: The result of a scan.
        scores: The scores of the patient, or None.
    """
    return result.to_dict() | ({} if scores is None else {"scores": scores.to_dict()})
