"""What a study file may contain: its tables and keys as dataclasses, their JSON Schema, and the templates.

The dataclasses hold the content as it was written. `config` turns it into a `Study`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from ichprog import schema
from ichprog.errors import UnknownNameError
from ichprog.spec import PluginRef
from ichprog.train import PRESETS, Protocol

if TYPE_CHECKING:
    from ichprog.simulate import Realism

Budget = Literal["epochs", "steps"]
BaselineKind = Literal["majority", "logistic", "tree", "forest", "network", "fusion"]


@dataclass(frozen=True)
class Simulated:
    """Patients that `ichprog.simulate` makes for the study.

    Attributes:
        patients: Number of patients.
        seed: Random seed.
        preset: Preset of the simulation, "realistic" or "plain".
        shared_causes: How strongly GCS and age depend on what the image shows: 1 as in the population, 0 not at all.
        label_noise: Share of patients whose recorded outcome is drawn at random, 0 to 1.
        matrix: Number of pixels along an edge of a slice. The width of the grid makes simulation several times faster.
    """

    patients: int
    seed: int = 0
    preset: str = "realistic"
    shared_causes: float = 1.0
    label_noise: float = 0.0
    matrix: int = 512

    @property
    def realism(self) -> "Realism":
        """Return the options of the simulation.

        Raises:
            InvalidValueError: An option is out of its range.
            UnknownNameError: There is no such preset.
        """
        from ichprog.simulate import find_realism

        return replace(find_realism(self.preset), shared_causes=self.shared_causes, label_noise=self.label_noise)


@dataclass(frozen=True)
class VariantFile:
    """A model that the study trains, and changes to the model.

    Attributes:
        name: Name in tables, and name of the variant's folder.
        model: Name of a model, "local-dir:PATH", or a path to a JSON file.
        tasks: Tasks of the model that are trained. By default all of them.
        backbone: Backbone instead of the model's own.
        head: Head of all tasks instead of the model's own heads.
        loss_weights: Loss weights of tasks, by task.
        clinical: Columns of clinical values that a model of the zoo uses, such as "age". The tasks whose own column is
            not among them use the values.
        fusion: Fusion of these values with the features of the image; "film" by default.
        shape: Shape of the grid: slices, rows, columns.
        protocol: Protocol fields that differ from the `[protocol]` table.
        start_from: Earlier variant whose backbone each fold starts from. With `freeze_backbone` in `protocol`, only the
            heads are trained.
        saliency: Saliency methods whose maps are measured instead of the study's own.
    """

    name: str
    model: str
    tasks: tuple[str, ...] | None = None
    backbone: PluginRef | None = None
    head: PluginRef | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    clinical: tuple[str, ...] = ()
    fusion: PluginRef | None = None
    shape: tuple[int, int, int] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    saliency: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BaselineFile:
    """A comparison model that needs no image of its own.

    Attributes:
        name: Name in tables.
        kind: Kind of model.
        columns: Numeric columns of the cohort.
        variant: Variant whose predictions "fusion" uses.
        task: Task that is predicted. By default the task by which the folds are stratified.
        optional: Whether the baseline is left out if the cohort lacks one of the columns.
    """

    name: str
    kind: BaselineKind
    columns: tuple[str, ...] = ()
    variant: str | None = None
    task: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class LearningCurveFile:
    """Smaller training parts on which variants are trained as well.

    Attributes:
        sizes: Numbers of training patients.
        variants: Variants with a learning curve. By default all of them.
        equal: What is equal at all sizes: the number of "epochs", with which fewer patients get fewer optimiser steps;
            the number of optimiser "steps"; or both, one curve for each.
        draws: How often the training patients of each size are drawn.
    """

    sizes: tuple[int, ...]
    variants: tuple[str, ...] | None = None
    equal: tuple[Budget, ...] = ("epochs",)
    draws: int = 1


@dataclass(frozen=True)
class StudyFile:
    """A comparison of variants and baselines on the same folds of one cohort.

    Attributes:
        name: Name of the study.
        folds: Number of folds.
        variant: Models that are trained.
        cohort: Tables of patients, used together.
        simulated: Simulated patients instead of a cohort.
        stratify_by: Task by whose label the folds are stratified. By default the first task of the first variant.
        brain: "auto" extracts the brain if a skull is visible, "extract" always, "given" never; or the name of a
            brain-extractor plugin; or the path of a mask that fits every scan.
        device: Device that trains the variants.
        protocol: Training protocol: a preset and changes to its fields.
        seeds: Random seeds with each of which every variant is trained. By default the seed of the protocol alone.
        baseline: Comparison models without an image.
        learning_curve: Smaller training parts on which variants are trained as well.
        n_bootstrap: Number of bootstrap resamples.
        bootstrap_seed: Random seed of the bootstrap.
        coverage: Share of patients whose label a conformal set must contain.
        subgroups: Columns by which results are also reported for groups, each with the bounds between its groups.
        correlations: Columns whose correlation with the outcome is reported.
        readers: Table of readers' calls.
        saliency: Saliency methods whose maps are measured.
    """

    name: str
    folds: int
    variant: tuple[VariantFile, ...]
    cohort: tuple[str, ...] = ()
    simulated: Simulated | None = None
    stratify_by: str | None = None
    brain: str = "auto"
    device: str = "auto"
    protocol: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    baseline: tuple[BaselineFile, ...] | None = None
    learning_curve: LearningCurveFile | None = None
    n_bootstrap: int = 1000
    bootstrap_seed: int = 0
    coverage: float = 0.9
    subgroups: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    correlations: tuple[str, ...] = ()
    readers: str | None = None
    saliency: tuple[str, ...] = ()


def study_schema() -> dict[str, Any]:
    """Return the JSON Schema of a study file, for editors."""
    described = schema.json_schema(StudyFile, "ichprog study")
    protocol = {name: part for name, part in schema.json_schema(Protocol, "protocol").items() if name[0] != "$"}
    preset = {"enum": list(PRESETS), "description": "Preset that the other fields change."}
    described["properties"]["protocol"] = protocol | {"properties": {"preset": preset} | protocol["properties"]}
    described["$defs"]["VariantFile"]["properties"]["protocol"] = protocol
    return described


def presets() -> list[str]:
    """Return the names of the study templates.

    Examples:
        >>> presets()
        ['default', 'paper', 'smoke']
    """
    names = (item.name for item in (files(__package__) / "presets").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def template(preset: str = "default") -> str:
    """Return a commented study file to start from, as TOML.

    Args:
        preset: A name from `presets`.

    Raises:
        UnknownNameError: There is no preset of this name.

    Examples:
        >>> template("smoke").splitlines()[0].startswith("#")
        True
    """
    if preset not in presets():
        raise UnknownNameError("study preset", preset, presets())
    return (files(__package__) / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
