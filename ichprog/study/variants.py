"""Build the variants of a study: each is a model with changes to its tasks, plugins, grid and training protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ichprog import zoo
from ichprog.errors import SpecError
from ichprog.schema import check_name
from ichprog.spec import ModelSpec, PluginRef
from ichprog.study.study_file import VariantFile
from ichprog.train import PRESETS, Protocol, resolve_spec

_FOLD_FIELDS = ("split_seed", "validation_fraction")  # protocol fields that define the folds


@dataclass(frozen=True)
class Variant:
    """A model that the study trains.

    Attributes:
        name: Name in tables, and name of the variant's folder.
        spec: Model that is trained.
        protocol: Training protocol. The fields that define the folds are the same for all variants.
        saliency: Saliency methods whose maps are measured.
        start_from: Variant whose backbone each fold starts from, or None.
    """

    name: str
    spec: ModelSpec
    protocol: Protocol
    saliency: tuple[str, ...]
    start_from: str | None = None


def build_variant(
    table: VariantFile, where: str, folder: Path, protocol: Protocol, saliency: tuple[str, ...]
) -> Variant:
    """Build a variant from its table.

    Args:
        table: The table as written.
        where: Path of the table in the study file, for messages.
        folder: Folder at which relative paths start.
        protocol: Protocol of the study.
        saliency: Saliency methods of the study.

    Raises:
        SpecError: A task or protocol field is unknown, or a protocol field that defines the folds differs.
        UnknownNameError: The zoo has no such model.
    """
    spec = _load_spec(table.model, folder)
    names = [task.name for task in spec.tasks]
    for key, given in (("tasks", table.tasks or ()), ("loss_weights", table.loss_weights)):
        for name in given:
            check_name(f"{where}.{key}", "task", name, names)
    tasks = spec.tasks if table.tasks is None else tuple(spec.task(name) for name in table.tasks)
    changed = replace(
        spec,
        tasks=tuple(
            replace(
                task,
                head=table.head or task.head,
                loss_weight=table.loss_weights.get(task.name, task.loss_weight),
            )
            for task in tasks
        ),
        backbone=table.backbone or spec.backbone,
        input=replace(spec.input, shape=table.shape or spec.input.shape),
    )
    if table.clinical or table.fusion:
        changed = _with_clinical(changed, table, where)
    own = build_protocol(table.protocol, protocol, f"{where}.protocol")
    for name in _FOLD_FIELDS:
        if getattr(own, name) != getattr(protocol, name):
            raise SpecError(
                f"{where}.protocol.{name}: defines the folds, which all variants share. Set it in [protocol] instead."
            )
    return Variant(table.name, changed, own, saliency if table.saliency is None else table.saliency, table.start_from)


def _with_clinical(spec: ModelSpec, table: VariantFile, where: str) -> ModelSpec:
    """Return a model whose tasks use clinical values, except those whose own column is among the values."""
    if not table.clinical:
        raise SpecError(f"{where}.fusion: needs `clinical`, the columns of the clinical values.")
    known = zoo.clinical_values()
    for column in table.clinical:
        check_name(f"{where}.clinical", "clinical value", column, known)
    tasks = tuple(replace(task, uses_clinical=task.target.column not in table.clinical) for task in spec.tasks)
    if not any(task.uses_clinical for task in tasks):
        raise SpecError(f"{where}.clinical: every task of the variant would predict itself. Leave a column out.")
    values = tuple(known[column] for column in dict.fromkeys(table.clinical))
    return replace(spec, tasks=tasks, clinical=values, fusion=table.fusion or PluginRef("film", {}))


def _load_spec(model: str, folder: Path) -> ModelSpec:
    """Load a model by its name, by "local-dir:PATH", or from a JSON file."""
    if model.endswith(".json"):
        return resolve_spec(folder / Path(model).expanduser())
    if model.startswith("local-dir:"):
        return resolve_spec(f"local-dir:{folder / Path(model.removeprefix('local-dir:')).expanduser()}")
    return resolve_spec(model)


def build_protocol(data: Mapping[str, Any], base: Protocol | None = None, where: str = "protocol") -> Protocol:
    """Apply changes to `base`, or to a preset without recalibration, because the study recalibrates by itself.

    Args:
        data: Protocol fields that change, and without `base` the name of the preset.
        base: Protocol that is changed.
        where: Path of the data in the study file, for messages.

    Raises:
        SpecError: A field or the preset is unknown, or a value is not allowed.
    """
    changes = dict(data)
    if base is None:
        preset = changes.pop("preset", "default")
        check_name(f"{where}.preset", "preset", preset, PRESETS)
        base = PRESETS[preset].replace(recalibrate=False)
    return Protocol.read(changes, base, where)
