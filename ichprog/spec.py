"""What a model is, as data.

A `ModelSpec` says everything about a model: backbone, tasks and heads, input contract, weights, licence. The JSON
files of the zoo are specs, and so is the `config.json` beside weights on the Hub. Reading is strict: a missing or
unknown field is an error, never a default.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, Literal

from ichprog.errors import SpecError, UnknownNameError


@dataclass(frozen=True)
class PluginRef:
    """A plugin by name, with the options it is built with.

    Attributes:
        name: The name it is registered under.
        options: Keyword arguments of its `build`.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """Where a task's true label comes from: a number that is known of each patient, cut into labels.

    Attributes:
        column: The column of a cohort that holds the number.
        bin_edges: Numbers at which one label ends and the next begins, from the first label on: one fewer than
            labels. A number that equals an edge belongs to the higher side.
        severity: Whether "high" or "low" numbers stand for the later labels.
    """

    column: str
    bin_edges: tuple[float, ...]
    severity: Literal["high", "low"]

    def index(self, value: float) -> int:
        """The index of the label that a number stands for."""
        return sum(value >= cut if self.severity == "high" else value < cut for cut in self.bin_edges)


@dataclass(frozen=True)
class Task:
    """One thing a model predicts.

    Attributes:
        name: The task's name, the key of its result.
        meaning: What is predicted, in words, with what is not known about it.
        labels: The labels in order; where the order means severity, the most severe last.
        target: Where the true label comes from, for training and scoring.
        head: The head that turns features into this task's logits.
        threshold: The label is the last one for which P(this label or a later one) exceeds the threshold;
            null takes the most probable label, for labels that have no order.
        loss_weight: The weight of this task's loss in training.
    """

    name: str
    meaning: str
    labels: tuple[str, ...]
    target: Target
    head: PluginRef
    threshold: float | None
    loss_weight: float

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
        """The label that these label probabilities stand for, by the task's `threshold`."""
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
        low: HU that becomes 0; what is lower becomes 0 too.
        high: HU that becomes 1.
        above: What happens at `high` and above: "zero" or "one".
    """

    low: float
    high: float
    above: Literal["zero", "one"]


ExpectedRanges = Mapping[str, tuple[float | None, float | None]]
"""Ranges that override the default ranges of scan checks, by check code: (lowest, highest), None for no bound.

`ichprog.scan.resolve_ranges` fills in the defaults and refuses unknown codes.
"""


@dataclass(frozen=True)
class InputSpec:
    """From a scan to the grid the network sees.

    Attributes:
        orientation: Voxel axes the scan is brought to first; each letter names the side an axis runs towards.
        brain_only: Whether everything but the brain is 0.
        window: The intensity window.
        shape: Grid shape (D, H, W): slices, rows, columns.
        pad_slices: Whether fewer slices than D are zero-padded symmetrically before resizing.
        resize: How other shapes become `shape`: "area" is averaging over each cell.
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
    """Where a model's weights are and how they are read.

    Attributes:
        repo: Repository on the Hub, "org/name"; null for weights that lie beside the spec.
        revision: The commit, 40 hex digits; null where `repo` is.
        folder: Folder in the repository or beside the spec; "" for the top.
        format: "pickle" for a published PyTorch state dict, "safetensors" for this project's own files.
        keys: Key prefixes of the file and what they become in this project's network. Every key must begin with
            exactly one of them and every prefix must be met; empty keeps the keys as they are.
        sha256: Checksums of the files in the repository, by file name, where they are known.
    """

    repo: str | None
    revision: str | None
    folder: str
    format: Literal["pickle", "safetensors"]
    keys: Mapping[str, str]
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Licence:
    """What may be done with a model.

    Attributes:
        code: Licence of the published code.
        weights: Licence of the weights, or that none is stated.
        data: On what terms the training data are had.
    """

    code: str
    weights: str
    data: str


@dataclass(frozen=True)
class Citation:
    """The work to cite.

    Attributes:
        text: The reference as one line.
        doi: Its digital object identifier.
        url: Where it can be read.
    """

    text: str
    doi: str
    url: str


@dataclass(frozen=True)
class GoldenOutput:
    """A golden input and the logits it must give, to tell weights that load from weights that compute.

    Attributes:
        seed: Seed of `numpy.random.default_rng`, whose uniform numbers fill the grid.
        shape: Grid shape (D, H, W).
        logits: For each fold and task, the logits.
    """

    seed: int
    shape: tuple[int, int, int]
    logits: Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(frozen=True)
class ModelSpec:
    """Everything about one model.

    Attributes:
        name: `<backbone>.<tasks joined by _>` in the zoo.
        summary: One line for lists.
        backbone: The network that turns a grid into features.
        tasks: What is predicted, the main task first.
        input: How a scan becomes a grid.
        weights: Where the weights are.
        licence: What may be done with code, weights and data.
        citation: The work to cite.
        intended_use: Who may use it for what.
        limits: What a reader of its results must know.
        notice: The sentence that goes with every output.
        golden_output: A golden input with its outputs, or null.
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

    def __post_init__(self) -> None:
        _check(self)

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UnknownNameError: The model has no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise UnknownNameError(f"task of {self.name}", name, [task.name for task in self.tasks])

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data; `from_dict` of it gives an equal spec."""
        return typing.cast("dict[str, Any]", _plain(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "model spec") -> "ModelSpec":
        """Reads a spec strictly.

        Args:
            data: The fields, as JSON gives them.
            source: Where they came from, for messages.

        Raises:
            SpecError: A field is missing, unknown, of the wrong type or against the rules.
        """
        try:
            return typing.cast("ModelSpec", parse(cls, data, ""))
        except SpecError as error:
            raise SpecError(f"{source}: {error}") from None

    @classmethod
    def read(cls, path: Traversable) -> "ModelSpec":
        """Reads a spec from a JSON file, on disk or inside a package.

        Raises:
            SpecError: The file cannot be read, is no JSON, or is no spec.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"{path}: cannot be read as JSON: {error}") from error
        return cls.from_dict(data, source=str(path))


def _check(spec: ModelSpec) -> None:
    """The rules that types alone do not say."""
    names = [task.name for task in spec.tasks]
    if not names or len(set(names)) != len(names):
        raise SpecError(f"tasks: needs at least one task and each name once, has {names}")
    for task in spec.tasks:
        if len(task.labels) < 2 or len(set(task.labels)) != len(task.labels):
            raise SpecError(f"tasks.{task.name}.labels: needs two or more different labels, has {list(task.labels)}")
        cuts = sorted(task.target.bin_edges, reverse=task.target.severity == "low")
        if len(cuts) != len(task.labels) - 1 or len(set(cuts)) != len(cuts) or list(task.target.bin_edges) != cuts:
            order = "rising" if task.target.severity == "high" else "falling"
            raise SpecError(
                f"tasks.{task.name}.target.bin_edges: {len(task.labels)} labels need {len(task.labels) - 1} "
                f"{order} numbers, has {list(task.target.bin_edges)}"
            )
        if task.threshold is not None and not 0 < task.threshold < 1:
            raise SpecError(f"tasks.{task.name}.threshold: must lie between 0 and 1, is {task.threshold}")
        if not task.loss_weight > 0:
            raise SpecError(f"tasks.{task.name}.loss_weight: must be positive, is {task.loss_weight}")
    if not spec.input.window.low < spec.input.window.high:
        raise SpecError(
            f"input.window: low must be below high, is {spec.input.window.low} and {spec.input.window.high}"
        )
    if min(spec.input.shape) < 1:
        raise SpecError(f"input.shape: sizes must be positive, are {list(spec.input.shape)}")
    for code, (lowest, highest) in spec.input.expected_ranges.items():
        if lowest is not None and highest is not None and lowest > highest:
            raise SpecError(
                f"input.expected_ranges.{code}: Expected [lowest, highest], got {[lowest, highest]}. Swap the two."
            )
    revision = spec.weights.revision
    if (spec.weights.repo is None) != (revision is None):
        raise SpecError("weights: repo and revision are given both or neither")
    if revision is not None and (len(revision) != 40 or set(revision) - set("0123456789abcdef")):
        raise SpecError(f"weights.revision: a commit of 40 hex digits is needed, is {revision!r}")


def parse(kind: Any, value: Any, where: str) -> Any:
    """Plain data as what it must be, strictly.

    Args:
        kind: A dataclass, a plain type or one of the generic types that specs use.
        value: The data.
        where: What it is called in messages.

    Raises:
        SpecError: It is of another kind, or a field is missing or unknown.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:
        return None if value is None else parse(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise SpecError(f"{where}: must be one of {list(args)}, is {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SpecError(f"{where}: must be a list, is {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise SpecError(f"{where}: must have {len(kinds)} entries, has {len(value)}")
        return tuple(parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if not isinstance(value, Mapping) and (dataclasses.is_dataclass(kind) or origin is Mapping):
        raise SpecError(f"{where or 'spec'}: must be an object, is {value!r}")
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for problem, names in (("missing", hints.keys() - value.keys()), ("unknown", value.keys() - hints.keys())):
            if names:
                raise SpecError(f"{problem} field {', '.join(f'{where}.{n}'.lstrip('.') for n in sorted(names))}")
        make = typing.cast("type[Any]", kind)
        return make(**{n: parse(h, value[n], f"{where}.{n}".lstrip(".")) for n, h in hints.items()})
    if origin is Mapping:
        return {str(k): parse(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    raise SpecError(f"{where}: must be a {kind.__name__}, is {value!r}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value
