"""Describe a model as data.

A `ModelSpec` says everything about a model: backbone, tasks and heads, input contract, weights, licence. The JSON files
of the zoo are specs, and so is the `config.json` stored with weights on the Hub. Reading is strict: a missing or
unknown field is an error.

A spec carries the `schema_version` of its format. `ModelSpec.from_dict` upgrades older versions and refuses newer ones.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import Any, Literal

from ichprog import schema
from ichprog.errors import SpecError, UnknownNameError
from ichprog.limits import MAX_DESCRIPTION_BYTES, MAX_GRID_CELLS
from ichprog.notebook import card

SCHEMA_VERSION = 1
"""Version of the format that `ModelSpec.to_dict` writes."""

REQUIRES = "ichprog>=0.1"
"""The oldest version of this library that reads the format; written into each spec for the message of older ones."""


_NAME = re.compile(r"[A-Za-z0-9][\w.+@-]{0,199}", re.ASCII)

TO_BE_WRITTEN = "To be written"
"""Mark of a text that the authors of a model still have to write."""


@dataclass(frozen=True)
class PluginRef:
    """The name of a plugin and the options to build it with.

    Attributes:
        name: Name of the plugin.
        options: Keyword arguments of its `build`.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """The source of a task's true label: a column of the cohort, divided into bins.

    Attributes:
        column: Column of the cohort, a number for each patient.
        bin_edges: Boundaries between neighbouring labels, in the order of the labels; one fewer than labels. A number
            equal to an edge belongs to the bin above the edge.
        severity: Whether "high" or "low" numbers belong to the later labels.
    """

    column: str
    bin_edges: tuple[float, ...]
    severity: Literal["high", "low"]

    def index(self, value: float) -> int:
        """Return the index of the label of a number.

        Args:
            value: Value of the column.

        Examples:
            >>> Target("gcs", (13, 9), "low").index(10)
            1
        """
        return sum(value >= edge if self.severity == "high" else value < edge for edge in self.bin_edges)


@dataclass(frozen=True)
class VolumeInterval:
    """The interval of true volumes for a range of measured volumes.

    Attributes:
        from_ml: Lowest measured volume of the range in mL. The range ends where the next one begins.
        low: Lowest ratio (true + 1 mL) / (measured + 1 mL).
        high: Highest ratio.
    """

    from_ml: float
    low: float
    high: float


@dataclass(frozen=True)
class MaskTarget:
    """The source of the true regions of a task that is also answered voxel by voxel.

    A patient with the first label of the task has no region. Another patient is trained on the mask, or on the slice
    numbers if there is no mask; without both, only on the label.

    Attributes:
        column: Column of the cohort with the path of a mask in the space of the scan. Voxel value k is region k, and 0
            lies outside all regions.
        regions: Names of the regions, of voxel values 1, 2, ...
        slices: Column of the cohort with the numbers of the slices that hold a region, separated by spaces. They count
            from 0 in the order of the scan file. null for no such column.
        loss_weight: Weight of the loss over voxels and slices relative to the loss of the label.
        volume_intervals: Intervals of true volumes, for "total" and for regions. Each has one entry or more, for
            increasing measured volumes from 0 mL. They hold in 90 % of patients outside the training data.

    Examples:
        >>> intervals = (VolumeInterval(0.0, 0.5, 4.0), VolumeInterval(5.0, 0.8, 1.25))
        >>> mask = MaskTarget("mask", ("parenchymal",), None, 1.0, {"total": intervals})
        >>> mask.volume_interval_ml("total", 3.0)
        (1.0, 15.0)
        >>> mask.volume_interval_ml("total", 19.0)
        (15.0, 24.0)
    """

    column: str
    regions: tuple[str, ...]
    slices: str | None
    loss_weight: float
    volume_intervals: Mapping[str, tuple[VolumeInterval, ...]] = field(default_factory=dict)

    def volume_interval_ml(self, part: str, measured_ml: float) -> tuple[float, float] | None:
        """Return the interval of the true volume in mL, which covers 90 % of patients; None if it is not known.

        Args:
            part: "total" or the name of a region.
            measured_ml: The measured volume in mL.
        """
        if part not in self.volume_intervals:
            return None
        interval = [each for each in self.volume_intervals[part] if each.from_ml <= measured_ml][-1]
        return max(0.0, (measured_ml + 1) * interval.low - 1), max(0.0, (measured_ml + 1) * interval.high - 1)


@dataclass(frozen=True)
class ClinicalValue:
    """A number that is known of a patient in addition to the scan.

    Attributes:
        column: Column of the cohort, and name of the value in `predict`.
        unit: Unit in words, such as "years".
        lowest: Lowest allowed value.
        highest: Highest allowed value.
        centre: Value that the network gets as 0.
        scale: Difference from the centre that the network gets as 1.
    """

    column: str
    unit: str
    lowest: float
    highest: float
    centre: float
    scale: float


@dataclass(frozen=True)
class Adjustment:
    """A linear change of log-odds: slope * log-odds + intercept + the sum of coefficient * clinical value.

    Attributes:
        slope: Factor of the log-odds, above 0.
        intercept: Number that is added.
        coefficients: Factor of each clinical value, by column. The values are in units of the spec: less the centre,
            divided by the scale.
    """

    slope: float
    intercept: float
    coefficients: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Combination:
    """A combination of a task's answer from the image with clinical values, for one set of known values.

    Attributes:
        known: Columns of the known values.
        adjustments: For each label but the first, the change of the log-odds of this label or a later one.
    """

    known: tuple[str, ...]
    adjustments: tuple[Adjustment, ...]


@dataclass(frozen=True)
class Task:
    """One task of a model.

    Attributes:
        name: Name of the task, the key of its result.
        meaning: The predicted quantity in words, with its uncertainties.
        labels: Labels in order; if they are ordered by severity, the most severe last.
        target: Source of the true label, for training and evaluation.
        head: Head that turns features into the logits of this task.
        threshold: The predicted label is the last one for which P(this label or a later one) exceeds the threshold.
            null predicts the most probable label, for unordered labels.
        loss_weight: Weight of the task's loss in training.
        mask: Source of the true regions if the task is also answered voxel by voxel, by a dense head; otherwise null.
        uses_clinical: Whether the head gets the features after the fusion with clinical values, instead of those of the
            image alone.
        combinations: Combinations of the answer from the image with clinical values, one for each set of known values;
            empty if there are none.
    """

    name: str
    meaning: str
    labels: tuple[str, ...]
    target: Target
    head: PluginRef
    threshold: float | None
    loss_weight: float
    mask: MaskTarget | None = None
    uses_clinical: bool = False
    combinations: tuple[Combination, ...] = ()

    @property
    def kind(self) -> Literal["binary", "ordinal", "nominal"]:
        """Return the kind of task: two labels, ordered labels, or labels without order."""
        if len(self.labels) == 2:
            return "binary"
        return "nominal" if self.threshold is None else "ordinal"

    @property
    def decision_threshold(self) -> float:
        """Return the threshold, 0.5 if the task has none."""
        return 0.5 if self.threshold is None else self.threshold

    def decide(self, probabilities: Mapping[str, float]) -> str:
        """Return the predicted label by the task's `threshold`.

        Args:
            probabilities: Probability of each label.
        """
        if self.threshold is None:
            return max(self.labels, key=lambda label: probabilities[label])
        tail, chosen = 1.0, self.labels[0]
        for before, label in zip(self.labels, self.labels[1:], strict=False):
            tail -= probabilities[before]
            if tail > self.threshold:
                chosen = label
        return chosen


@dataclass(frozen=True)
class Window:
    """The intensity window of the input.

    Attributes:
        low: Intensity in HU that becomes 0; lower intensities become 0 as well.
        high: Intensity in HU that becomes 1.
        above: Value of intensities at `high` and above: "zero" or "one".
    """

    low: float
    high: float
    above: Literal["zero", "one"]


ExpectedRanges = Mapping[str, tuple[float | None, float | None]]
"""Ranges that override the default ranges of scan checks, by check code: (lowest, highest), None for no bound.

`ichprog.scan.resolve_ranges` adds the defaults and refuses unknown codes.
"""


@dataclass(frozen=True)
class InputSpec:
    """The preprocessing from a scan to the grid of the network.

    Attributes:
        orientation: Orientation of the voxel axes; each letter names the side towards which an axis increases.
        brain_only: Whether everything outside the brain is set to 0.
        window: Intensity window.
        shape: Grid shape (D, H, W): slices, rows, columns.
        pad_slices: Whether a scan with fewer slices than D is zero-padded symmetrically before resizing.
        resize: Resampling to `shape`; "area" averages over each cell of the grid.
        expected_ranges: Ranges of scan checks that differ from their defaults, by check code.
    """

    orientation: Literal["LPS"]
    brain_only: bool
    window: Window
    shape: tuple[int, int, int]
    pad_slices: bool
    resize: Literal["area"]
    expected_ranges: ExpectedRanges


@dataclass(frozen=True)
class Weights:
    """The location and format of a model's weights.

    Attributes:
        repo: Repository on the Hub, "org/name"; null for weights that are stored with the spec.
        revision: Commit, 40 hex digits; null if `repo` is null.
        folder: Folder in the repository or next to the spec; "" for the top.
        format: "pickle" for a published PyTorch state dict, "safetensors" for files of this project.
        keys: New key prefix for each key prefix of the file. Each key must begin with exactly one prefix, and each
            prefix must occur. An empty mapping leaves the keys unchanged.
        sha256: Known checksums of the files in the repository, by file name.
    """

    repo: str | None
    revision: str | None
    folder: str
    format: Literal["pickle", "safetensors"]
    keys: Mapping[str, str]
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Licence:
    """The terms of use of a model.

    Attributes:
        code: Licence of the published code.
        weights: Licence of the weights, or a note that none is stated.
        data: Terms of access to the training data.
    """

    code: str
    weights: str
    data: str


@dataclass(frozen=True)
class Citation:
    """The publication to cite.

    Attributes:
        text: Reference as one line.
        doi: Digital object identifier.
        url: Address of the text.
    """

    text: str
    doi: str
    url: str


@dataclass(frozen=True)
class GoldenOutput:
    """A reproducible input with its logits, to verify that loaded weights compute correctly.

    Attributes:
        seed: Seed of `numpy.random.default_rng`, whose uniform numbers fill the grid.
        shape: Grid shape (D, H, W).
        logits: Logits by fold and task.
    """

    seed: int
    shape: tuple[int, int, int]
    logits: Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(frozen=True)
class TaskCalibration:
    """What patients outside the training tell about the probabilities of a task.

    Attributes:
        patients: Number of patients with a label.
        adjustments: For each label but the first, the change of the log-odds of this label or a later one that makes
            them agree with the labels. For unordered labels, one change for each label.
        set_limits: Lowest calibrated probability of a label in a conformal set, by coverage in percent, such as "90". A
            coverage that so few patients cannot give is left out.
    """

    patients: int
    adjustments: tuple[Adjustment, ...]
    set_limits: Mapping[str, float]


@dataclass(frozen=True)
class InputDistribution:
    """The distribution of statistics of the grid, over patients like those of the training.

    Attributes:
        mean: Mean of each statistic, by name.
        scale: Standard deviation of each statistic, by name.
        precision: Inverse of the correlation matrix of the statistics, in their order, with shrinkage.
        threshold: Mahalanobis distance beyond which a scan is unlike these patients.
    """

    mean: Mapping[str, float]
    scale: Mapping[str, float]
    precision: tuple[tuple[float, ...], ...]
    threshold: float


@dataclass(frozen=True)
class Calibration:
    """What a model knows about its own reliability, from patients on whom its networks were not trained.

    Attributes:
        patients: The patients, in words.
        tasks: Calibration of each task with enough labels, by name.
        inputs: Distribution of the inputs.
    """

    patients: str
    tasks: Mapping[str, TaskCalibration]
    inputs: InputDistribution


@dataclass(frozen=True)
class ModelSpec:
    """A complete description of one model.

    Attributes:
        name: Name; `<backbone>.<tasks joined by _>` in the zoo.
        summary: One line for lists.
        backbone: Network that turns a grid into features.
        tasks: Tasks, the main task first.
        input: Preprocessing from a scan to a grid.
        weights: Location and format of the weights.
        licence: Terms of use of code, weights and data.
        citation: Publication to cite.
        intended_use: Intended users and uses.
        limits: Known limits of the model.
        notice: Sentence that accompanies every output.
        golden_output: Reproducible input with its logits, or null.
        clinical: Values of a patient that the model can use in addition to the scan. Any of them may be missing.
        fusion: Combination of the features of the image with the clinical values; null if there is none.
        calibration: Recalibration, conformal sets and the distribution of inputs; null if they are not known.

    Examples:
        >>> from ichprog import zoo
        >>> spec = zoo.find("perez2023.prognosis")
        >>> ModelSpec.from_dict(spec.to_dict()) == spec
        True
    """

    name: str
    summary: str
    backbone: PluginRef
    tasks: tuple[Task, ...]
    input: InputSpec
    weights: Weights
    licence: Licence
    citation: Citation
    intended_use: str
    limits: tuple[str, ...]
    notice: str
    golden_output: GoldenOutput | None
    clinical: tuple[ClinicalValue, ...] = ()
    fusion: PluginRef | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        _check(self)

    def _repr_html_(self) -> str:
        """Show the tasks as a table in a notebook."""
        rows = [[task.name, ", ".join(task.labels), task.head.name, task.meaning] for task in self.tasks]
        return card(self.name, ["task", "labels", "head", "meaning"], rows, [self.summary, self.notice])

    def task(self, name: str) -> Task:
        """Return the task of a name.

        Args:
            name: Name of the task.

        Raises:
            UnknownNameError: The model has no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise UnknownNameError(f"task of {self.name}", name, [task.name for task in self.tasks])

    @property
    def dense_task(self) -> Task | None:
        """Return the first task that is answered voxel by voxel, or None if there is none."""
        return next((task for task in self.tasks if task.mask is not None), None)

    @property
    def unwritten(self) -> tuple[str, ...]:
        """Return the fields of the JSON file whose texts are still to be written, such as "licence.data"."""
        return tuple(_find_unwritten(self.to_dict(), ""))

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain data with its schema version; `from_dict` reads it."""
        return {"schema_version": SCHEMA_VERSION, "requires": REQUIRES, **schema.to_plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "model spec") -> "ModelSpec":
        """Read a spec strictly, after an upgrade if its schema version is older.

        Args:
            data: Fields as in JSON. A spec without `schema_version` has version 0.
            source: Origin of the data, for messages.

        Raises:
            SpecError: A field is missing, unknown or invalid, or the schema version is newer than `SCHEMA_VERSION`.
        """
        try:
            return schema.read(cls, upgrade(data))
        except SpecError as error:
            raise SpecError(f"{source}: {error}") from None

    @classmethod
    def read(cls, path: Traversable) -> "ModelSpec":
        """Read a spec from a JSON file on disk or in a package.

        Args:
            path: The file.

        Raises:
            SpecError: The file cannot be read, is not JSON or is not a valid spec.
        """
        try:
            with path.open("rb") as file:
                text = file.read(MAX_DESCRIPTION_BYTES + 1)
            if len(text) > MAX_DESCRIPTION_BYTES:
                raise SpecError(f"{path}: is larger than {MAX_DESCRIPTION_BYTES} bytes, so it is no model description.")
            data = json.loads(text.decode("utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"{path}: cannot be read as JSON: {error}") from error
        except RecursionError:
            raise SpecError(f"{path}: cannot be read as JSON: it is nested too deeply.") from None
        return cls.from_dict(data, source=str(path))


def model_schema() -> dict[str, Any]:
    """Return the JSON Schema of a spec, for editors."""
    described = schema.json_schema(ModelSpec, "ichprog model spec")
    own = {
        "$schema": {"type": "string", "description": "JSON Schema of this file, for editors."},
        "schema_version": {"const": SCHEMA_VERSION, "description": "Version of the format of this file."},
        "requires": {"type": "string", "description": "Oldest version of ichprog that reads this file."},
    }
    required = ["schema_version", *described["required"]]
    return described | {"properties": own | described["properties"], "required": required}


def upgrade(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a spec in the current schema version.

    Args:
        data: Fields in any version, as in JSON.

    Raises:
        SpecError: The version is newer than `SCHEMA_VERSION` or is not a whole number.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"Invalid spec {data!r}. Expected an object.")
    fields = {key: value for key, value in data.items() if key not in ("$schema", "schema_version", "requires")}
    version = data.get("schema_version", 0)
    if type(version) is not int or version < 0:
        raise SpecError(f"Invalid schema_version {version!r}. Expected a whole number up to {SCHEMA_VERSION}.")
    if version > SCHEMA_VERSION:
        needed = str(data.get("requires") or "a newer ichprog")
        raise SpecError(
            f"Unsupported schema_version {version}. This ichprog reads versions up to {SCHEMA_VERSION}; the file needs "
            f"{needed}. Run: pip install --upgrade {repr(needed) if 'requires' in data else 'ichprog'}"
        )
    for step in _UPGRADES[version:]:
        fields = step(fields)
    return fields


def _upgrade_0(fields: dict[str, Any]) -> dict[str, Any]:
    """Rename the fields of version 0 and turn its plausible values into expected ranges by check code."""
    fields = _renamed(fields, {"probe": "golden_output"})
    if isinstance(fields.get("tasks"), list | tuple):
        names = {"cuts": "bin_edges", "severe": "severity"}
        fields["tasks"] = [
            task | {"target": _renamed(task["target"], names)} if isinstance(task, dict) and "target" in task else task
            for task in fields["tasks"]
        ]
    if isinstance(fields.get("input"), dict) and isinstance(plausible := fields["input"].get("plausible"), dict):
        codes = {
            "in_plane_spacing_mm": "in-plane-spacing", "slice_spacing_mm": "slice-spacing", "coverage_mm": "coverage",
            "field_of_view_mm": "field-of-view", "brain_ml": "brain-volume", "blood_dense_ml": "no-blood",
            "obliquity_deg": "obliquity",
        }  # fmt: skip
        ranges = _renamed(plausible, codes)
        if "no-blood" in ranges:
            ranges["no-blood"] = [ranges["no-blood"], None]
        if "obliquity" in ranges:
            ranges["obliquity"] = [0, ranges["obliquity"]]
        fields["input"] = _renamed(fields["input"], {"plausible": "expected_ranges"}) | {"expected_ranges": ranges}
    return fields


def _find_unwritten(value: Any, path: str) -> Iterator[str]:
    """Yield the path of each text with the mark `TO_BE_WRITTEN`."""
    if isinstance(value, str):
        if TO_BE_WRITTEN.casefold() in value.casefold():
            yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _find_unwritten(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _find_unwritten(item, f"{path}[{index}]")


def _renamed(fields: Any, names: Mapping[str, str]) -> Any:
    return {names.get(key, key): value for key, value in fields.items()} if isinstance(fields, dict) else fields


_UPGRADES: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_upgrade_0,)  # step k upgrades version k to k + 1


def _check(spec: ModelSpec) -> None:
    """Check the rules that types do not express."""
    names = [task.name for task in spec.tasks]
    if not names or len(set(names)) != len(names):
        raise SpecError(f"Invalid tasks {names}. Expected one or more tasks with different names.")
    for task in spec.tasks:
        _check_task(task)
    _check_clinical(spec)
    if spec.calibration is not None:
        _check_calibration(spec, spec.calibration)
    window, ranges = spec.input.window, spec.input.expected_ranges
    if not window.low < window.high:
        raise SpecError(f"Invalid input.window {[window.low, window.high]}. Expected low < high.")
    if min(spec.input.shape) < 1 or math.prod(spec.input.shape) > MAX_GRID_CELLS:
        expected = f"positive numbers with a product of at most {MAX_GRID_CELLS}"
        raise SpecError(f"Invalid input.shape {list(spec.input.shape)}. Expected {expected}.")
    if not _NAME.fullmatch(spec.name):
        raise SpecError(f"Invalid name {spec.name!r}. Expected letters, digits and any of . - _ + @.")
    parts = PurePosixPath(spec.weights.folder).parts
    if "\\" in spec.weights.folder or ".." in parts or spec.weights.folder.startswith("/"):
        raise SpecError(f"Invalid weights.folder {spec.weights.folder!r}. Expected a folder below that of the model.")
    for code, (low, high) in ranges.items():
        if low is not None and high is not None and low > high:
            raise SpecError(f"Invalid input.expected_ranges.{code} {[low, high]}. Expected [lowest, highest].")
    revision = spec.weights.revision
    if (spec.weights.repo is None) != (revision is None):
        raise SpecError("Invalid weights. Expected both repo and revision, or null for both.")
    if revision is not None and (len(revision) != 40 or set(revision) - set("0123456789abcdef")):
        raise SpecError(f"Invalid weights.revision {revision!r}. Expected a commit of 40 hex digits.")


def _check_clinical(spec: ModelSpec) -> None:
    columns = [value.column for value in spec.clinical]
    if len(set(columns)) != len(columns):
        raise SpecError(f"Invalid clinical: the columns are {columns}. Expected different ones.")
    fused = [task for task in spec.tasks if task.uses_clinical]
    combined = [task for task in spec.tasks if task.combinations]
    if (spec.fusion is not None) != bool(fused) or bool(columns) != bool(fused or combined) or (fused and combined):
        raise SpecError(
            f"Invalid clinical: {len(columns)} values, {'a' if spec.fusion else 'no'} fusion, {len(fused)} tasks with "
            f"uses_clinical, and {len(combined)} with combinations. Expected values with a fusion and uses_clinical, "
            "values with combinations, or none of these."
        )
    for value in spec.clinical:
        if not value.lowest < value.highest or not value.scale > 0:
            raise SpecError(
                f"Invalid clinical.{value.column}: lowest {value.lowest:g}, highest {value.highest:g}, scale "
                f"{value.scale:g}. Expected lowest < highest, and scale > 0."
            )
    for task in (*fused, *combined):
        if task.target.column in columns:
            raise SpecError(
                f"Invalid tasks.{task.name}: the clinical value {task.target.column!r} would predict itself. Set "
                "uses_clinical to false and leave out combinations, or remove the column from clinical."
            )
    for task in combined:
        _check_combinations(task, columns)


def _check_combinations(task: Task, columns: list[str]) -> None:
    path = f"tasks.{task.name}.combinations"
    expected = {frozenset(known) for n in range(len(columns) + 1) for known in itertools.combinations(columns, n)}
    given = [frozenset(each.known) for each in task.combinations]
    if set(given) != expected or len(given) != len(expected):
        shown = [sorted(known) for known in given]
        raise SpecError(f"Invalid {path}: known is {shown}. Expected every subset of {columns} once.")
    if task.kind == "nominal":
        raise SpecError(f"Invalid {path}. Expected none, because the labels have no order.")
    for each in task.combinations:
        _check_adjustments(task, each.adjustments, each.known, path)


def _check_adjustments(task: Task, adjustments: Sequence[Adjustment], known: Sequence[str], path: str) -> None:
    number = len(task.labels) - (task.kind != "nominal")
    if len(adjustments) != number:
        raise SpecError(f"Invalid {path}: {len(adjustments)} adjustments. Expected {number}.")
    for each in adjustments:
        if not each.slope > 0:
            raise SpecError(f"Invalid {path}: slope {each.slope:g}. Expected a number above 0.")
        if set(each.coefficients) != set(known):
            raise SpecError(f"Invalid {path}: coefficients of {sorted(each.coefficients)}. Expected {sorted(known)}.")


def _check_calibration(spec: ModelSpec, calibration: Calibration) -> None:
    for name, each in calibration.tasks.items():
        schema.check_name("calibration.tasks", f"task of {spec.name}", name, [task.name for task in spec.tasks])
        _check_adjustments(spec.task(name), each.adjustments, (), f"calibration.tasks.{name}")
    inputs = calibration.inputs
    number = len(inputs.mean)
    shape = {len(inputs.precision), *map(len, inputs.precision)}
    if list(inputs.scale) != list(inputs.mean) or shape != {number} or not all(v > 0 for v in inputs.scale.values()):
        raise SpecError(
            f"Invalid calibration.inputs: {number} means, {len(inputs.scale)} scales, and a precision with rows and "
            f"columns {sorted(shape)}. Expected the same statistics in all of them, and scales above 0."
        )


def _check_task(task: Task) -> None:
    path, edges = f"tasks.{task.name}", list(task.target.bin_edges)
    if len(task.labels) < 2 or len(set(task.labels)) != len(task.labels):
        raise SpecError(f"Invalid {path}.labels {list(task.labels)}. Expected two or more different labels.")
    ordered = sorted(set(edges), reverse=task.target.severity == "low")
    if len(edges) != len(task.labels) - 1 or edges != ordered:
        order = "increasing" if task.target.severity == "high" else "decreasing"
        expected = f"{len(task.labels) - 1} {order} numbers for {len(task.labels)} labels"
        raise SpecError(f"Invalid {path}.target.bin_edges {edges}. Expected {expected}.")
    if task.threshold is not None and not 0 < task.threshold < 1:
        raise SpecError(f"Invalid {path}.threshold {task.threshold}. Expected a number between 0 and 1.")
    if not task.loss_weight > 0:
        raise SpecError(f"Invalid {path}.loss_weight {task.loss_weight}. Expected a positive number.")
    if task.mask is None:
        return
    regions = list(task.mask.regions)
    if not regions or len(set(regions)) != len(regions):
        raise SpecError(f"Invalid {path}.mask.regions {regions}. Expected one or more different names.")
    if "total" in regions:
        raise SpecError(f"Invalid {path}.mask.regions {regions}. 'total' is the name of all regions together.")
    if not task.mask.loss_weight > 0:
        raise SpecError(f"Invalid {path}.mask.loss_weight {task.mask.loss_weight}. Expected a positive number.")
    _check_volume_intervals(task.mask, f"{path}.mask.volume_intervals")


def _check_volume_intervals(mask: MaskTarget, path: str) -> None:
    for part, intervals in mask.volume_intervals.items():
        if part not in ("total", *mask.regions):
            raise SpecError(f"{path}: {UnknownNameError('part', part, ['total', *mask.regions])}")
        starts = [interval.from_ml for interval in intervals]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise SpecError(f"Invalid {path}.{part}: from_ml is {starts}. Expected increasing numbers from 0.")
        for interval in intervals:
            if not 0 < interval.low <= interval.high:
                given = f"low {interval.low:g} and high {interval.high:g}"
                raise SpecError(f"Invalid {path}.{part}: {given}. Expected two numbers above 0, low at most high.")
