"""Describe a trained model by its run: no statement about the weights of another model is inherited.

A training takes the network, the tasks and the preprocessing from a description. Summary, limits, notice and the
meaning of labels are generated from the patients, the protocol and the results of the run. A text that only the authors
can write has the mark `TO_BE_WRITTEN` in `config.json` until they write it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ichprog.cohort import Origin
from ichprog.spec import TO_BE_WRITTEN, Citation, Licence, ModelSpec, Task, Weights
from ichprog.train.protocol import Protocol
from ichprog.train.summary import OutOfFoldAuc

_FIGURE = "Out-of-fold AUC of"
_OPEN_LIMIT = f"{TO_BE_WRITTEN}: patients, scanners and uses for which the model does not suit."


def describe_training(spec: ModelSpec, name: str | None, origin: Origin, folds: int, protocol: Protocol) -> ModelSpec:
    """Return the description of a model that is trained from another description.

    Network, tasks and preprocessing stay. Of weights of the other description nothing stays: no weight files, golden
    output, measured intervals of volumes, calibration, combinations with clinical values, or thresholds, which become
    0.5. A description without weights keeps its thresholds.

    Args:
        spec: The description to train by.
        name: Name of the new model; the description's own by default.
        origin: The patients.
        folds: Number of folds.
        protocol: The protocol.
    """
    has_weights = spec.weights.repo is not None or bool(spec.weights.sha256)
    names = [task.name for task in spec.tasks]
    return replace(
        spec,
        name=name or spec.name,
        summary=f"{_join(names)} from one head CT{_clinical_inputs(spec)}. Trained on {_format_patients(origin)}.",
        tasks=tuple(_describe_task(task, origin, keep_threshold=not has_weights) for task in spec.tasks),
        weights=Weights(None, None, "", "safetensors", {}, {}),
        licence=Licence(
            code="MIT, the library ichprog",
            weights=f"{TO_BE_WRITTEN}: terms of use of the weights.",
            data=_data_terms(origin),
        ),
        citation=Citation(f"{TO_BE_WRITTEN}: reference to the model and its authors.", "", ""),
        intended_use=f"{TO_BE_WRITTEN}: intended users and uses, and uses that are ruled out.",
        limits=(*_training_limits(origin, folds, protocol), _OPEN_LIMIT),
        notice=_notice(origin),
        golden_output=None,
        clinical=() if spec.fusion is None else spec.clinical,
        calibration=None,
    )


def _clinical_inputs(spec: ModelSpec) -> str:
    columns = [value.column for value in spec.clinical] if spec.fusion is not None else []
    return f" and, if known, {_join(columns)}" if columns else ""


def add_results(spec: ModelSpec, aucs: Iterable[OutOfFoldAuc], folds: int) -> ModelSpec:
    """Return a description with the out-of-fold results among its limits.

    Args:
        spec: Result of `describe_training`.
        aucs: Out-of-fold AUC of each task.
        folds: Number of folds of the run.
    """
    figures = tuple(_format_auc(auc, folds) for auc in aucs)
    return replace(spec, limits=(*spec.limits[:-1], *figures, spec.limits[-1]))


def keep_written(spec: ModelSpec, written: ModelSpec) -> ModelSpec:
    """Return a generated description with the texts that the authors have written into an earlier one.

    Args:
        spec: Result of `add_results`.
        written: Description of the same run, in which texts may have been written.
    """
    tasks = {task.name: task for task in written.tasks}
    own_limits = [
        limit
        for limit in written.limits
        if limit not in spec.limits and not limit.startswith(_FIGURE) and not is_unwritten(limit)
    ]
    limits = spec.limits
    if own_limits:
        is_open = any(map(is_unwritten, written.limits))
        limits = (*spec.limits[:-1], *own_limits, *(spec.limits[-1:] if is_open else ()))
    return replace(
        spec,
        name=written.name,
        summary=written.summary,
        tasks=tuple(
            replace(task, meaning=_choose(task.meaning, tasks[task.name].meaning)) if task.name in tasks else task
            for task in spec.tasks
        ),
        licence=Licence(
            code=written.licence.code,
            weights=_choose(spec.licence.weights, written.licence.weights),
            data=_choose(spec.licence.data, written.licence.data),
        ),
        citation=spec.citation if is_unwritten(written.citation.text) else written.citation,
        intended_use=_choose(spec.intended_use, written.intended_use),
        limits=limits,
    )


def is_unwritten(text: str) -> bool:
    """Return whether the authors still have to write a text.

    Examples:
        >>> is_unwritten("To be written: terms of use of the weights.")
        True
    """
    return TO_BE_WRITTEN.casefold() in text.casefold()


def _choose(generated: str, written: str) -> str:
    return generated if is_unwritten(written) else written


def describe_labels(task: Task, origin: Origin) -> str:
    """Return the meaning of a task's labels by the cohort of a training.

    Args:
        task: The task.
        origin: The patients.
    """
    word = "from" if task.target.severity == "high" else "below"
    bounds = zip(task.labels[1:], task.target.bin_edges, strict=True)
    rule = ", ".join(f"{label} {word} {edge:g}" for label, edge in bounds)
    about = "The values are simulated."
    if origin.kind != "simulated":
        about = f"{TO_BE_WRITTEN}: the meaning of the column, and how it was measured."
    return f"Column {task.target.column} of the training patients: {rule}, otherwise {task.labels[0]}. {about}"


def _describe_task(task: Task, origin: Origin, *, keep_threshold: bool) -> Task:
    threshold = task.threshold if task.threshold is None or keep_threshold else 0.5
    mask = task.mask and replace(task.mask, volume_intervals={})
    return replace(task, meaning=describe_labels(task, origin), threshold=threshold, mask=mask, combinations=())


def _data_terms(origin: Origin) -> str:
    if origin.kind == "simulated":
        return "simulated by ichprog, without any patient data"
    if origin.kind == "mixed":
        return f"{origin.sentence} {TO_BE_WRITTEN}: terms of access to the data of the other patients."
    return f"{TO_BE_WRITTEN}: terms of access to the training data."


def _training_limits(origin: Origin, folds: int, protocol: Protocol) -> list[str]:
    trained = f"Trained on {_format_patients(origin)}"
    if origin.kind == "simulated":
        trained += " only, and on no real patient. No result says anything about real patients."
    else:
        trained += ". Not tested on patients of another cohort."
    steps = f"{protocol.epochs} epochs at most, learning rate {protocol.learning_rate:g}, seed {protocol.seed}"
    return [trained, f"Trained by cross-validation in {folds} folds: {steps}."]


def _notice(origin: Origin) -> str:
    trained = {
        "simulated": "Trained on simulated patients only. ",
        "mixed": "Trained in part on simulated patients. ",
        "not simulated": "",
    }[origin.kind]
    return f"{trained}For research only, not for patient care."


def _format_patients(origin: Origin) -> str:
    """Return the number of patients, and how many of them are simulated.

    Examples:
        >>> _format_patients(Origin(40, 40, ({"seed": 1, "preset": "plain"},)))
        '40 simulated patients (seed 1, preset plain)'
    """
    if origin.kind == "mixed":
        return f"{origin.patients} patients, {origin.simulated} of them simulated"
    if origin.kind == "not simulated":
        return f"{origin.patients} patients"
    settings = [
        ", ".join(f"{key} {record[key]}" for key in ("seed", "preset") if isinstance(record.get(key), int | str))
        for record in origin.records
    ]
    about = f" ({'; '.join(filter(None, settings))})" if any(settings) else ""
    return f"{origin.patients} simulated patients{about}"


def _format_auc(auc: OutOfFoldAuc, folds: int) -> str:
    about = f"{auc.patients} patients, {auc.folds} of {folds} folds"
    if auc.auc is None:
        return f"{_FIGURE} {auc.task}: undefined, because all labels are equal ({about})."
    interval = "" if auc.low is None else f" (95 % interval {auc.low:.3f} to {auc.high:.3f})"
    return (
        f"{_FIGURE} {auc.task}: {auc.auc:.3f}{interval}, {about}. Each patient is predicted by the fold that was not "
        "trained on this patient."
    )


def _join(names: Sequence[str]) -> str:
    """Join names.

    Examples:
        >>> _join(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
