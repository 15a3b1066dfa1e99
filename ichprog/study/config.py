"""What a study compares, as data: `study.toml` becomes a frozen `Study`.

Reading is strict: what is unknown, missing or of the wrong kind is an error that names file and key. Paths are meant
from where the file is. A template of each kind is a data file of this package, in `presets`.
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ichprog.errors import RunError, SpecError, UnknownNameError
from ichprog.spec import ModelSpec, PluginRef, Task, parse
from ichprog.train import PRESETS, Protocol, spec_of

BrainMode = Literal["auto", "extract", "given"]
Kind = Literal["majority", "logistic", "tree", "forest", "network", "fusion"]

_NEEDED = object()
_Shape = Mapping[str, tuple[Any, Any]]  # of a table: for each key its type, and its value where it is not written
_NAME = re.compile(r"\w[\w.+-]*")
_SHARED = ("split_seed", "validation")  # fields of the protocol that make the folds

_STUDY: _Shape = {
    "name": (str, _NEEDED),
    "cohort": (tuple[str, ...], ()),
    "simulated": (Mapping[str, int], None),
    "folds": (int, _NEEDED),
    "split_by": (str, None),
    "brain": (BrainMode, "auto"),
    "device": (str, "auto"),
    "protocol": (Mapping[str, Any], {}),
    "variant": (tuple[Mapping[str, Any], ...], _NEEDED),
    "baseline": (tuple[Mapping[str, Any], ...], None),
    "learning_curve": (Mapping[str, Any], None),
    "bootstrap": (Mapping[str, Any], {}),
    "coverage": (float, 0.9),
    "subgroups": (Mapping[str, tuple[float, ...]], {}),
    "correlations": (tuple[str, ...], ()),
    "readers": (str, None),
    "saliency": (tuple[str, ...], ()),
}
_SIMULATED: _Shape = {"patients": (int, _NEEDED), "seed": (int, 0)}
_VARIANT: _Shape = {
    "name": (str, _NEEDED),
    "model": (str, _NEEDED),
    "tasks": (tuple[str, ...], None),
    "backbone": (PluginRef, None),
    "head": (PluginRef, None),
    "loss_weights": (Mapping[str, float], {}),
    "shape": (tuple[int, int, int], None),
    "protocol": (Mapping[str, Any], {}),
    "saliency": (tuple[str, ...], None),
}
_BASELINE: _Shape = {
    "name": (str, _NEEDED),
    "kind": (Kind, _NEEDED),
    "columns": (tuple[str, ...], ()),
    "variant": (str, None),
    "task": (str, None),
    "where_known": (bool, False),
}
_CURVE: _Shape = {"sizes": (tuple[int, ...], _NEEDED), "variants": (tuple[str, ...], None)}
_BOOTSTRAP: _Shape = {"draws": (int, 1000), "seed": (int, 0)}


@dataclass(frozen=True)
class Variant:
    """A model that is trained, with what is its own.

    Attributes:
        name: Its name in tables and of its folder.
        spec: What is trained.
        protocol: How; folds are made alike for all variants.
        saliency: The methods whose maps are measured.
    """

    name: str
    spec: ModelSpec
    protocol: Protocol
    saliency: tuple[str, ...]


@dataclass(frozen=True)
class Baseline:
    """What stands beside the variants and needs no image of its own.

    Attributes:
        name: Its name in tables.
        kind: "majority" says the share of each label; "logistic", "tree", "forest" and "network" are fitted to columns;
            "fusion" to columns and a variant's answer.
        columns: Columns of the cohort that hold numbers.
        variant: The variant of "fusion".
        task: What is predicted, a task of two labels.
        where_known: Whether it is left out where the cohort has not all the columns; else that is an error.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    variant: str | None
    task: str
    where_known: bool


@dataclass(frozen=True)
class Simulated:
    """Patients that are simulated for the study, by `ichprog.simulate`.

    Attributes:
        patients: How many.
        seed: Which ones.
    """

    patients: int
    seed: int


@dataclass(frozen=True)
class Study:
    """All that is compared, and how.

    Attributes:
        name: What the study is called.
        source: The file it was read from.
        cohort: Tables of patients, taken together; none where patients are simulated.
        simulated: The patients that are simulated instead.
        folds: The number of folds, the same for all variants.
        split_by: The task whose label the folds are stratified by; patients without it only train.
        brain: How the brain is found.
        device: Where variants are trained.
        variants: The models.
        baselines: What stands beside them.
        sizes: Numbers of patients of each fold's training part that variants are trained on too, for a learning curve.
        sized: The variants for which that is done.
        draws: Draws of the bootstrap.
        seed: Its seed.
        coverage: The share of patients whose label a conformal set is to hold.
        subgroups: Columns whose groups are judged apart, each with the numbers where a group ends and the next begins;
            without any, each value is a group.
        correlations: Columns whose correlation with the outcome is told.
        readers: A table of readers' calls.
        saliency: Methods whose maps are measured, for variants that name none of their own.
    """

    name: str
    source: Path = field(compare=False)
    cohort: tuple[Path, ...]
    simulated: Simulated | None
    folds: int
    split_by: str
    brain: BrainMode
    device: str
    variants: tuple[Variant, ...]
    baselines: tuple[Baseline, ...]
    sizes: tuple[int, ...]
    sized: tuple[str, ...]
    draws: int
    seed: int
    coverage: float
    subgroups: Mapping[str, tuple[float, ...]]
    correlations: tuple[str, ...]
    readers: Path | None
    saliency: tuple[str, ...]

    @property
    def protocol(self) -> Protocol:
        """That of the first variant; in what makes the folds, that of all."""
        return self.variants[0].protocol

    @property
    def runs(self) -> dict[str, tuple[Variant, int | None]]:
        """All that is trained: the variants by name, and as NAME@SIZE on so many patients."""
        whole: dict[str, tuple[Variant, int | None]] = {variant.name: (variant, None) for variant in self.variants}
        return whole | {f"{name}@{size}": (self.variant(name), size) for name in self.sized for size in self.sizes}

    def variant(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            UnknownNameError: There is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise UnknownNameError(f"variant of {self.name}", name, [variant.name for variant in self.variants])

    def task(self, name: str) -> Task:
        """A task as the first variant that has it describes it.

        Raises:
            UnknownNameError: No variant has it.
        """
        tasks = {task.name: task for variant in reversed(self.variants) for task in variant.spec.tasks}
        if name not in tasks:
            raise UnknownNameError(f"task of {self.name}", name, tasks)
        return tasks[name]

    @classmethod
    def read(cls, path: str | Path) -> "Study":
        """Reads a study.

        Args:
            path: The .toml.

        Raises:
            SpecError: It cannot be read, or something in it is unknown, missing, of the wrong kind or against the
                rules; it names the key.
            UnknownNameError: There is no such model.
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"{path}: cannot be read as TOML: {error}") from error
        try:
            return _study(data, path)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from None


def presets() -> list[str]:
    """The names of the templates there are."""
    found = (item.name for item in (files(__package__) / "presets").iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def template(preset: str = "default") -> str:
    """A study to begin with, as commented TOML.

    Args:
        preset: A name of `presets`.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if preset not in presets():
        raise UnknownNameError("preset of a study", preset, presets())
    return (files(__package__) / "presets" / f"{preset}.toml").read_text(encoding="utf-8")


def _study(data: Mapping[str, Any], path: Path) -> Study:
    found = _table(data, _STUDY, "")
    if bool(found["cohort"]) == bool(found["simulated"]):
        raise SpecError("either cohort, a list of tables, or [simulated] says who the patients are; give one of them")
    if found["folds"] < 2:
        raise SpecError(f"folds: at least 2 are needed, one to test on and others to train on; is {found['folds']}")
    if not 0 < found["coverage"] < 1:
        raise SpecError(f"coverage: must lie between 0 and 1, is {found['coverage']:g}")
    simulated = found["simulated"] and Simulated(**_table(found["simulated"], _SIMULATED, "simulated"))
    protocol = _protocol(found["protocol"])
    if not found["variant"]:
        raise SpecError("variant: at least one is needed, as a table [[variant]]")
    variants = tuple(
        _variant(one, f"variant[{place}]", path.parent, protocol, found["saliency"])
        for place, one in enumerate(found["variant"])
    )
    bootstrap = _table(found["bootstrap"], _BOOTSTRAP, "bootstrap")
    if bootstrap["draws"] < 1 or bootstrap["seed"] < 0:
        raise SpecError("bootstrap: takes 1 draw or more and a seed of 0 or more")
    study = Study(
        name=found["name"],
        source=path,
        cohort=tuple(path.parent / table for table in found["cohort"]),
        simulated=simulated,
        folds=found["folds"],
        split_by=found["split_by"] or variants[0].spec.tasks[0].name,
        brain=found["brain"],
        device=found["device"],
        variants=variants,
        baselines=(),
        sizes=(),
        sized=(),
        draws=bootstrap["draws"],
        seed=bootstrap["seed"],
        coverage=found["coverage"],
        subgroups=found["subgroups"],
        correlations=found["correlations"],
        readers=path.parent / found["readers"] if found["readers"] else None,
        saliency=found["saliency"],
    )
    _one_of("split_by", study.split_by, [task.name for variant in variants for task in variant.spec.tasks])
    study = _with_curve(study, found["learning_curve"])
    written = found["baseline"]
    if written is None:  # those that are always there, where the cohort has what they need
        usual = tomllib.loads(template())["baseline"]
        written = [one | {"where_known": True} for one in usual if "variant" not in one]
    made = tuple(_baseline(one, f"baseline[{place}]", study) for place, one in enumerate(written))
    names = [*(variant.name for variant in variants), *(baseline.name for baseline in made)]
    for name in names:
        if not _NAME.fullmatch(name):
            raise SpecError(f"name {name!r}: letters, digits and . _ + - are allowed, the first a letter or digit")
        if names.count(name) > 1:
            raise SpecError(f"name {name!r}: {names.count(name)} variants and baselines have it; each needs its own")
    return replace(study, baselines=made)


def _variant(
    data: Mapping[str, Any], where: str, folder: Path, protocol: Protocol, saliency: tuple[str, ...]
) -> Variant:
    found = _table(data, _VARIANT, where)
    model = found["model"]
    if model.endswith(".json"):
        spec = spec_of(folder / Path(model).expanduser())
    elif model.startswith("local-dir:"):
        spec = spec_of(f"local-dir:{folder / Path(model.removeprefix('local-dir:')).expanduser()}")
    else:
        spec = spec_of(model)
    known = [task.name for task in spec.tasks]
    for key in ("tasks", "loss_weights"):
        for name in found[key] or ():
            _one_of(f"{where}.{key}", name, known)
    tasks = spec.tasks if found["tasks"] is None else tuple(spec.task(name) for name in found["tasks"])
    changed = replace(
        spec,
        tasks=tuple(
            replace(
                task,
                head=found["head"] or task.head,
                loss_weight=found["loss_weights"].get(task.name, task.loss_weight),
            )
            for task in tasks
        ),
        backbone=found["backbone"] or spec.backbone,
        input=replace(spec.input, shape=found["shape"] or spec.input.shape),
    )
    own = _protocol(found["protocol"], protocol, f"{where}.protocol")
    for name in _SHARED:
        if getattr(own, name) != getattr(protocol, name):
            raise SpecError(f"{where}.protocol.{name}: makes the folds, which all variants share; set it in [protocol]")
    return Variant(found["name"], changed, own, saliency if found["saliency"] is None else found["saliency"])


def _baseline(data: Mapping[str, Any], where: str, study: Study) -> Baseline:
    found = _table(data, _BASELINE, where)
    kind, columns, variant = found["kind"], found["columns"], found["variant"]
    task = found["task"] or study.split_by
    _one_of(f"{where}.task", task, [each.name for one in study.variants for each in one.spec.tasks])
    if len(study.task(task).labels) != 2:
        raise SpecError(f"{where}.task: baselines predict two labels, {task} has {len(study.task(task).labels)}")
    if kind == "majority" and (columns or variant):
        raise SpecError(f"{where}: majority takes neither columns nor a variant; leave them out")
    if kind not in ("majority", "fusion") and (not columns or variant):
        raise SpecError(f"{where}: {kind} takes one column or more and no variant")
    if kind == "fusion":
        if not variant or not columns:
            raise SpecError(f"{where}: fusion takes a variant and one column or more")
        _one_of(f"{where}.variant", variant, [one.name for one in study.variants])
        _one_of(f"{where}.task", task, [each.name for each in study.variant(variant).spec.tasks])
    return Baseline(found["name"], kind, columns, variant, task, found["where_known"])


def _with_curve(study: Study, data: Mapping[str, Any] | None) -> Study:
    if data is None:
        return study
    found = _table(data, _CURVE, "learning_curve")
    names = [variant.name for variant in study.variants]
    chosen = names if found["variants"] is None else found["variants"]
    for name in chosen:
        _one_of("learning_curve.variants", name, names)
    if not found["sizes"] or min(found["sizes"]) < 2 or len(set(found["sizes"])) < len(found["sizes"]):
        raise SpecError(f"learning_curve.sizes: different numbers of 2 patients or more, are {list(found['sizes'])}")
    return replace(study, sizes=tuple(sorted(found["sizes"])), sized=tuple(chosen))


def _protocol(data: Mapping[str, Any], base: Protocol | None = None, where: str = "protocol") -> Protocol:
    """A preset with changes, or `base` with changes; probabilities are set right by the study, not by the training."""
    changes = dict(data)
    if base is None:
        preset = changes.pop("preset", "default")
        _one_of(f"{where}.preset", preset, PRESETS)
        base = PRESETS[preset].replace(recalibrate=False)
    for name in changes:
        _one_of(where, name, [each.name for each in dataclasses.fields(Protocol)])
    try:
        return base.replace(**changes)
    except RunError as error:
        raise SpecError(f"{where}: {str(error).removeprefix('protocol: ')}") from error


def _table(data: Mapping[str, Any], shape: _Shape, where: str) -> dict[str, Any]:
    """A table of the file with all its keys, each of its type."""
    inside = f"{where}." if where else ""
    for key in data:
        _one_of(f"{inside}{key}", key, shape, "key")
    found = {}
    for key, (kind, otherwise) in shape.items():
        if key not in data and otherwise is _NEEDED:
            raise SpecError(f"{inside}{key}: is missing. Keys here: {', '.join(shape)}")
        found[key] = parse(kind, data[key], inside + key) if key in data else otherwise
    return found


def _one_of(where: str, name: object, known: Mapping[str, Any] | Sequence[str], what: str = "name") -> None:
    """Refuses a name that is not among those known, with the nearest."""
    if name in (names := list(dict.fromkeys(known))):
        return
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    raise SpecError(
        f"{where}: there is no {what} {name!r} here. "
        + (f"The nearest: {near[0]}. " if near else "")
        + f"Allowed: {', '.join(names)}."
    )
