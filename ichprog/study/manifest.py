"""What a study is in its folder: its patients, its folds, and `study.json`, by which the folder is known again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichprog.cohort import Cohort
from ichprog.errors import CohortError, RunError, UnknownNameError
from ichprog.io import write_json
from ichprog.study.config import Baseline, Study

if TYPE_CHECKING:
    from ichprog.train.folds import Fold

_FORMAT = 1


def cohort_of(study: Study, out: str | Path) -> Cohort:
    """The patients of a study; those that are simulated for it are in its folder once it was begun.

    Args:
        study: The study.
        out: Its folder.

    Raises:
        CohortError: A table cannot be used.
    """
    if study.simulated is not None:
        return Cohort.read(Path(out) / "patients" / "cohort.csv")
    cohorts = [Cohort.read(table) for table in study.cohort]
    return cohorts[0] if len(cohorts) == 1 else Cohort.join(cohorts)


def parts_of(study: Study, cohort: Cohort, size: int | None = None) -> "list[Fold]":
    """The folds of a study, the same for all variants.

    Args:
        study: The study.
        cohort: Its patients.
        size: Train on so many patients only, the first ones of each training part; a larger number holds a smaller.

    Raises:
        CohortError: The patients are too few.
    """
    from ichprog.train import folds

    task, protocol = study.task(study.split_by), study.protocol
    labels = cohort.labels(task)
    alone = replace(study.variants[0].spec, tasks=(task,))
    folds.refuse_unless_enough(alone, {task.name: labels}, study.folds, protocol.validation)
    parts = folds.split(labels, study.folds, seed=protocol.split_seed, validation=protocol.validation)
    if size is None:
        return parts
    if size >= (fewest := min(len(fold.train) for fold in parts)):
        raise CohortError(
            f"learning_curve.sizes: {size} patients are asked for, and a fold has {fewest} to train on. Take fewer."
        )
    return [fold._replace(train=fold.train[:size]) for fold in parts]


def record(study: Study, cohort: Cohort) -> dict[str, Any]:
    """What a study is, as plain data: what goes into `study.json`.

    Args:
        study: The study.
        cohort: Its patients.

    Raises:
        UnknownNameError: The cohort has not a column that is asked for.
        CohortError: The patients are too few for the folds.
    """
    from ichprog.train.run_dir import digest, own_spec, surroundings

    names = [patient.name for patient in cohort.patients]
    first = cohort.labels(study.task(study.split_by)).tolist()
    variants = {
        run: {
            "model": own_spec(variant.spec, run, len(cohort)).to_dict(),
            "protocol": variant.protocol.to_dict(),
            "labels": digest([cohort.labels(task).tolist() for task in variant.spec.tasks]),
            "size": size,
        }
        for run, (variant, size) in study.runs.items()
    }
    lacking = {baseline.name: _lacking(baseline, cohort) for baseline in study.baselines}
    if wanted := _absent([*study.subgroups, *study.correlations], cohort):
        raise UnknownNameError(f"column of {cohort.source}", wanted[0], _columns(cohort))
    made = [baseline for baseline in study.baselines if not lacking[baseline.name]]
    parts = parts_of(study, cohort)
    return {
        "format": _FORMAT,
        "name": study.name,
        "compared": {
            "patients": len(cohort),
            "sha256": digest([names, first]),
            "folds": study.folds,
            "split_by": study.split_by,
            "split_seed": study.protocol.split_seed,
            "validation": study.protocol.validation,
            "brain": study.brain,
        },
        "cohort": {"source": cohort.source, "simulated": _simulated(study), "columns": _columns(cohort)},
        "variants": variants,
        "baselines": {
            baseline.name: {
                "kind": baseline.kind,
                "columns": list(baseline.columns),
                "variant": baseline.variant,
                "task": baseline.task,
                "sha256": digest(
                    [[p.columns[c] for c in baseline.columns] for p in cohort.patients]
                    + [cohort.labels(study.task(baseline.task)).tolist(), study.protocol.seed]
                    + [variants[baseline.variant] if baseline.variant else None]
                ),
            }
            for baseline in made
        },
        "left_out": {name: said for name, said in lacking.items() if said},
        "membership": {
            str(number): {part: [names[place] for place in places] for part, places in fold._asdict().items()}
            for number, fold in enumerate(parts)
        },
        **surroundings(),
    }


def refuse_something_else(out: Path) -> None:
    """Refuses a folder that holds something else than a study or its patients.

    Raises:
        RunError: It does.
    """
    if not out.exists() or (out / "study.json").is_file():
        return
    if not out.is_dir() or any(path.name != "patients" and path.name[0] != "." for path in out.iterdir()):
        raise RunError(f"{out} is there and holds no study. Choose another folder.")


def begin(out: Path, mine: Mapping[str, Any]) -> None:
    """Makes a study's folder with its record, or goes on with it; baselines that are not what they were are dropped.

    Args:
        out: The folder.
        mine: The study's `record`.

    Raises:
        RunError: Other patients or folds are worked on there, or a variant was another when it was trained.
    """
    path = out / "study.json"
    held = _read(path) if path.is_file() else None
    if held is not None:
        _refuse_another(out, held, mine)
    for folder in ("cells", "baselines", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, baseline in mine["baselines"].items():
        if held is None or held["baselines"].get(name) != baseline:
            (out / "baselines" / f"{name}.csv").unlink(missing_ok=True)
    write_json(path, mine)


def left_out(out: Path) -> Mapping[str, str]:
    """The baselines that are left out of a study that was begun, and why."""
    path = out / "study.json"
    found: dict[str, str] = _read(path)["left_out"] if path.is_file() else {}
    return found


def _lacking(baseline: Baseline, cohort: Cohort) -> str:
    """Why a baseline is left out, or nothing."""
    absent = _absent(baseline.columns, cohort)
    if absent and not baseline.where_known:
        raise UnknownNameError(
            f"column of {cohort.source}", absent[0], _columns(cohort), hint=f"Baseline {baseline.name} needs it."
        )
    return f"the cohort has no column {', '.join(absent)}" if absent else ""


def _absent(columns: Sequence[str], cohort: Cohort) -> list[str]:
    return [column for column in columns if column not in _columns(cohort)]


def _columns(cohort: Cohort) -> list[str]:
    return list(dict.fromkeys(column for patient in cohort.patients for column in patient.columns))


def _simulated(study: Study) -> bool:
    """Whether any patient is a simulated one: of a table that `ichprog simulate` wrote."""
    tables = (table.parent / "simulation.json" for table in study.cohort)
    return study.simulated is not None or any(table.is_file() for table in tables)


def _refuse_another(out: Path, held: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    from ichprog.train.run_dir import differences

    said = [words for key, now in mine["compared"].items() for words in differences(key, held["compared"][key], now)]
    for name, variant in mine["variants"].items():
        if name in held["variants"] and (out / "runs" / name / "run.json").is_file():
            before = held["variants"][name]
            said += [f"variant {name}: {w}" for key in variant for w in differences(key, before[key], variant[key])]
    if said:
        raise RunError(
            f"{out} holds another study: {'; '.join(said)}. Choose another folder, ask for the same, or give a changed "
            "variant another name."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}. Choose another folder.") from error
    if data.get("format") != _FORMAT:
        raise RunError(f"{path}: is of another version of ichprog. Choose another folder.")
    return data
