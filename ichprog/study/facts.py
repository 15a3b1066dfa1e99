"""Describe a study for its report: what is compared, who the patients are, and facts for the TRIPOD+AI checklist."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.cohort import Origin
from ichprog.metrics import PRIMARY
from ichprog.reporting.html import Table
from ichprog.reporting.tables import format_value, readable_name
from ichprog.spec import ModelSpec, Task
from ichprog.study.config import Study
from ichprog.train.description import describe_labels

_BRAIN = {
    "auto": "extracted if a skull is present",
    "extract": "extracted from every scan",
    "given": "the region that the scan contains",
}


def comparison_table(study: Study) -> Table:
    """Return a table with a row for every variant and baseline of a study.

    Args:
        study: Study.
    """
    rows = [
        {
            "name": variant.name,
            "model": _format_backbone(variant.spec),
            "input": ", ".join(["image", _format_shape(variant.spec), *(v.column for v in variant.spec.clinical)]),
            "tasks": ", ".join(task.name for task in variant.spec.tasks),
        }
        for variant in study.variants
    ]
    for baseline in study.baselines:
        inputs = [*([f"predictions of {baseline.variant}"] if baseline.variant else []), *baseline.columns]
        row = {"name": baseline.name, "model": baseline.kind, "input": ", ".join(inputs) or "none"}
        rows.append(row | {"tasks": baseline.task})
    columns = {"name": "variant", "model": "model", "input": "input", "tasks": "tasks"}
    return Table(rows, columns, f"Variants and baselines, on the same {study.folds} folds.")


def patients_table(study: Study, truth: Mapping[str, np.ndarray]) -> Table:
    """Return a table with the numbers of patients with each label, one row for each task.

    Args:
        study: Study.
        truth: By task, indices of the true labels of all patients `(N,)`, -1 if unknown.
    """
    rows = [
        {
            "task": name,
            "patients": len(labels),
            "missing": int((labels < 0).sum()),
            "labels": _format_counts(study.task(name), labels),
        }
        for name, labels in truth.items()
    ]
    columns = {"task": "task", "patients": "patients", "missing": "label missing", "labels": "labels"}
    return Table(rows, columns, "Patients and labels, by task.")


def tripod_facts(
    study: Study,
    truth: Mapping[str, np.ndarray],
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    origin: Origin,
    metric: str = PRIMARY,
) -> dict[str, object]:
    """Return the facts that fill the TRIPOD+AI checklist.

    Args:
        study: Study.
        truth: By task, indices of the true labels of all patients `(N,)`, -1 if unknown.
        metrics: Intervals by variant, task and metric, as in `metrics.json`.
        origin: How many patients are simulated.
        metric: Metric that is reported for every variant, for the task by which the folds are stratified.
    """
    main = study.stratify_by
    specs = [variant.spec for variant in study.variants]
    performances = [
        f"{name} {format_value(tasks[main][metric])}"
        for name, tasks in metrics.items()
        if tasks.get(main, {}).get(metric) is not None
    ]
    columns = sorted({column for baseline in study.baselines for column in baseline.columns})
    counts = {name: _format_counts(study.task(name), labels) for name, labels in truth.items()}
    return {
        "source": _format_source(study, origin),
        "patients": max((len(labels) for labels in truth.values()), default=None),
        "labels": "; ".join(f"{name} ({text})" for name, text in counts.items()) or None,
        "missing": ", ".join(f"{name} {int((labels < 0).sum())}" for name, labels in truth.items()) or None,
        "outcome": " ".join(_format_outcome(study.task(name), origin) for name in truth) or None,
        "variants": ", ".join(variant.name for variant in study.variants),
        "baselines": ", ".join(baseline.name for baseline in study.baselines) or "no baselines",
        "columns": ", ".join(columns) or "no columns",
        "models": "; ".join(f"{variant.name}: {_format_backbone(variant.spec)}" for variant in study.variants) + ".",
        "preparation": " ".join(dict.fromkeys(_format_input(spec) for spec in specs)),
        "brain": _format_brain(study.brain),
        "folds": study.folds,
        "stratify_by": main,
        "validation": f"{100 * study.protocol.validation_fraction:g} %",
        "balance": ", ".join(dict.fromkeys(variant.protocol.balance.replace("_", " ") for variant in study.variants)),
        "n_bootstrap": f"{study.n_bootstrap:,}",
        "subgroups": ", ".join(study.subgroups) or "none",
        "performance": f"{readable_name(metric)} of {main}: {'; '.join(performances)}" if performances else None,
        "version": version("ichprog"),
    }


def _format_source(study: Study, origin: Origin) -> str:
    if origin.kind == "simulated":
        return "Patients simulated by ichprog"
    tables = ", ".join(path.name for path in study.cohort)
    return f"{tables}. {origin.simulated} of {origin.patients} patients are simulated" if origin.simulated else tables


def _format_brain(brain: str | Path) -> str:
    if isinstance(brain, Path):
        return f"the mask {brain.name}, for every scan"
    return _BRAIN.get(brain, f"extracted from every scan by {brain}")


def _format_counts(task: Task, labels: np.ndarray) -> str:
    return ", ".join(f"{label}: {int((labels == index).sum())}" for index, label in enumerate(task.labels))


def _format_outcome(task: Task, origin: Origin) -> str:
    return f"{task.name}: {describe_labels(task, origin)}"


def _format_backbone(spec: ModelSpec) -> str:
    options = ", ".join(f"{key} {value}" for key, value in spec.backbone.options.items())
    return f"{spec.backbone.name} ({options})" if options else spec.backbone.name


def _format_shape(spec: ModelSpec) -> str:
    return " x ".join(map(str, spec.input.shape))


def _format_input(spec: ModelSpec) -> str:
    window = spec.input.window
    region = "The brain only" if spec.input.brain_only else "The head"
    shape = _format_shape(spec)
    return f"{region}, {window.low:g} to {window.high:g} HU, averaged to a grid of {shape} (slices, rows, columns)."
