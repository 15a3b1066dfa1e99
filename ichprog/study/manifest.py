"""Describe a study in its folder: its patients, its folds and `study.json`, which identifies the folder."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.cohort import Cohort
from ichprog.errors import CohortError, RunError, UnknownNameError
from ichprog.io import file_lock, remove_partial_files, write_json
from ichprog.study.config import Baseline, Run, Study
from ichprog.train import Protocol

if TYPE_CHECKING:
    from ichprog.train.folds import Fold

_progress = logging.getLogger("ichprog.progress")
FILE = "study.json"
_FORMAT = 1
_PATIENTS = "patients"  # folder of simulated patients


def load_cohort(study: Study, out: str | Path) -> Cohort:
    """Load the patients of a study.

    Args:
        study: Study.
        out: Folder of the study, which holds the simulated patients if there are any.

    Raises:
        CohortError: A table cannot be used.
    """
    if study.simulated is not None:
        return Cohort.read(Path(out) / _PATIENTS / "cohort.csv")
    cohorts = [Cohort.read(table) for table in study.cohort]
    return cohorts[0] if len(cohorts) == 1 else Cohort.join(cohorts)


def simulate_patients(study: Study, out: Path, workers: int) -> None:
    """Simulate the patients of a study into its folder, unless the study has tables of patients.

    Args:
        study: Study.
        out: Folder of the study.
        workers: Number of processes.
    """
    if study.simulated is None:
        return
    from ichprog.simulate import simulate

    chosen = study.simulated
    _progress.info("Simulating %d patients, unless they are there.", chosen.patients)
    simulate(
        out / _PATIENTS, patients=chosen.patients, seed=chosen.seed, preset=chosen.realism, matrix=chosen.matrix,
        workers=workers,
    )  # fmt: skip


def split_folds(study: Study, cohort: Cohort, run: Run | None = None) -> "list[Fold]":
    """Split the patients of a study into folds, the same for all variants.

    Args:
        study: Study.
        cohort: Patients of the study.
        run: Run whose training parts are returned. A learning-curve run keeps some patients of each training part, so
            that a larger number includes a smaller one of the same draw. None keeps all.

    Raises:
        CohortError: There are too few patients.
    """
    from ichprog.train import folds

    task, protocol = study.main_task, study.protocol
    labels = cohort.labels(task)
    main_only = replace(study.variants[0].spec, tasks=(task,))
    folds.validate_labels(main_only, {task.name: labels}, study.folds, protocol.validation_fraction)
    parts = folds.split(labels, study.folds, seed=protocol.split_seed, validation_fraction=protocol.validation_fraction)
    if run is None or run.size is None:
        return parts
    if run.size >= (fewest := min(len(fold.train) for fold in parts)):
        raise CohortError(
            f"learning_curve.sizes: Invalid value {run.size}. Expected less than {fewest}, the patients of a training "
            "part."
        )
    if run.draw:
        random = np.random.default_rng([protocol.split_seed, run.draw])
        parts = [fold._replace(train=random.permutation(fold.train)) for fold in parts]
    return [fold._replace(train=fold.train[: run.size]) for fold in parts]


def run_protocol(study: Study, run: Run, parts: "Sequence[Fold]") -> Protocol:
    """Return the protocol of a run: that of its variant with the run's seed and number of epochs.

    Args:
        study: Study.
        run: Run.
        parts: Folds with whole training parts.
    """
    from ichprog.train.trainer import plan_steps

    protocol = run.variant.protocol.replace(seed=study.seed_of(run))
    if run.size is None or run.budget == "epochs":
        return protocol
    whole, part = (len(plan_steps(size, protocol)) for size in (min(len(fold.train) for fold in parts), run.size))
    fields = ("epochs", "warmup_epochs", "patience")
    return protocol.replace(**{name: round(getattr(protocol, name) * whole / part) for name in fields})


def build_manifest(study: Study, cohort: Cohort) -> dict[str, Any]:
    """Describe a study as plain data, the content of `study.json`.

    Args:
        study: Study.
        cohort: Patients of the study.

    Raises:
        UnknownNameError: The cohort lacks a column that the study needs.
        CohortError: There are too few patients for the folds.
    """
    from ichprog.model import resolve_brain
    from ichprog.scan import brain_key
    from ichprog.train.run_dir import digest, environment

    if missing := _missing_columns([*study.subgroups, *study.correlations], cohort):
        raise UnknownNameError(f"column of {cohort.source}", missing[0], _columns(cohort))
    left_out = {baseline.name: reason for baseline in study.baselines if (reason := _skip_reason(baseline, cohort))}
    names = [patient.name for patient in cohort.patients]
    parts = split_folds(study, cohort)
    variants = _describe_variants(study, cohort, parts)
    return {
        "format": _FORMAT,
        "name": study.name,
        "compared": {
            "patients": len(cohort),
            "sha256": digest([names, cohort.labels(study.main_task).tolist()]),
            "folds": study.folds,
            "stratify_by": study.stratify_by,
            "split_seed": study.protocol.split_seed,
            "validation": study.protocol.validation_fraction,
            "brain": brain_key(resolve_brain(study.brain)),
        },
        "cohort": {"source": cohort.source, "simulated": cohort.origin.simulated, "columns": _columns(cohort)},
        "variants": variants,
        "baselines": {
            baseline.name: _describe_baseline(baseline, study, cohort, variants)
            for baseline in study.baselines
            if baseline.name not in left_out
        },
        "left_out": left_out,
        "membership": {
            str(number): {part: [names[index] for index in indices] for part, indices in fold._asdict().items()}
            for number, fold in enumerate(parts)
        },
        **environment(),
    }


def refuse_foreign_folder(out: Path) -> None:
    """Refuse a folder that holds other files than a study or its patients.

    Args:
        out: Folder.

    Raises:
        RunError: The folder holds other files.
    """
    if not out.exists() or (out / FILE).is_file():
        return
    if not out.is_dir() or any(path.name != _PATIENTS and path.name[0] != "." for path in out.iterdir()):
        raise RunError(f"{out} exists and holds no study. Choose another folder.")


def open_folder(out: Path, manifest: Mapping[str, Any]) -> None:
    """Create a study's folder, or continue in an existing one and remove the baselines that have changed.

    Args:
        out: Folder.
        manifest: Result of `build_manifest`.

    Raises:
        RunError: The folder holds other patients or folds, or a trained variant has changed.
    """
    path = out / FILE
    previous = read_manifest(out) if path.is_file() else None
    if previous is not None:
        _refuse_changes(out, previous, manifest)
    for folder in ("jobs", "baselines", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, baseline in manifest["baselines"].items():
        if previous is None or previous["baselines"].get(name) != baseline:
            (out / "baselines" / f"{name}.csv").unlink(missing_ok=True)
    write_json(path, manifest)


@contextmanager
def lock_results(out: Path) -> Iterator[None]:
    """Lock the results of a study within a context, and remove temporary files that killed processes left there.

    Args:
        out: Folder of the study.
    """
    with file_lock(out / ".results.lock"):
        remove_partial_files(out, ("predictions.csv", "metrics.json", "saliency.csv", "report.html"))
        remove_partial_files(out / "tables")
        remove_partial_files(out / "figures")
        yield


def read_manifest(out: Path) -> dict[str, Any]:
    """Read the `study.json` of a folder.

    Args:
        out: Folder of a study.

    Raises:
        RunError: The file cannot be read, or another version of ichprog wrote it.
    """
    path = out / FILE
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}. Choose another folder.") from error
    if data.get("format") != _FORMAT:
        raise RunError(f"{path}: written by another version of ichprog. Choose another folder.")
    return data


def fold_of_patient(out: Path) -> dict[str, int]:
    """Return the fold whose test part contains each patient, by patient.

    Args:
        out: Folder of a study.
    """
    parts = read_manifest(out)["membership"]
    return {patient: int(fold) for fold, part in parts.items() for patient in part["test"]}


def research_notice(study: Study, out: str | Path) -> str:
    """Return the sentences that accompany every output of a study.

    Args:
        study: Study.
        out: Folder of the study.
    """
    return f"{load_cohort(study, out).origin.sentence} For research only, not for patient care.".lstrip()


def _describe_variants(study: Study, cohort: Cohort, parts: "Sequence[Fold]") -> dict[str, Any]:
    from ichprog.train.description import describe_training
    from ichprog.train.run_dir import digest

    origin, described = cohort.origin, {}
    for name, run in study.runs.items():
        spec, protocol = run.variant.spec, run_protocol(study, run, parts)
        described[name] = {
            "model": describe_training(spec, name, origin, study.folds, protocol).to_dict(),
            "protocol": protocol.to_dict(),
            "labels": digest([cohort.labels(task).tolist() for task in spec.tasks]),
            "size": run.size,
            "start_from": study.start_of(run),
        }
    return described


def _describe_baseline(baseline: Baseline, study: Study, cohort: Cohort, variants: Mapping[str, Any]) -> dict[str, Any]:
    from ichprog.train.run_dir import digest

    values = [[patient.columns[column] for column in baseline.columns] for patient in cohort.patients]
    labels = cohort.labels(study.task(baseline.task)).tolist()
    variant = variants[baseline.variant] if baseline.variant else None
    return {
        "kind": baseline.kind,
        "columns": list(baseline.columns),
        "variant": baseline.variant,
        "task": baseline.task,
        "sha256": digest([*values, labels, study.protocol.seed, variant]),
    }


def _skip_reason(baseline: Baseline, cohort: Cohort) -> str:
    """Return why an optional baseline is left out, or an empty string."""
    missing = _missing_columns(baseline.columns, cohort)
    if missing and not baseline.optional:
        raise UnknownNameError(
            f"column of {cohort.source}", missing[0], _columns(cohort), f"Baseline {baseline.name} needs it."
        )
    return f"the cohort has no column {', '.join(missing)}" if missing else ""


def _missing_columns(columns: Sequence[str], cohort: Cohort) -> list[str]:
    return [column for column in columns if column not in _columns(cohort)]


def _columns(cohort: Cohort) -> list[str]:
    return list(dict.fromkeys(column for patient in cohort.patients for column in patient.columns))


def _refuse_changes(out: Path, previous: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    from ichprog.train.run_dir import differences, without_texts

    found = [
        text
        for key, value in manifest["compared"].items()
        for text in differences(key, previous["compared"][key], value)
    ]
    for name, variant in manifest["variants"].items():
        if name in previous["variants"] and (out / "runs" / name / "run.json").is_file():
            before = previous["variants"][name]
            changes = (
                text
                for key in variant
                for text in differences(key, without_texts(before.get(key)), without_texts(variant[key]))
            )
            found += [f"variant {name}: {text}" for text in changes]
    if found:
        raise RunError(
            f"{out} holds another study: {'; '.join(found)}. Choose another folder, undo the change, or give a changed "
            "variant another name."
        )
