"""Who may be scored by what: no patient by a network that has seen them, as far as anybody can know.

A run of `train` knows its patients by name. Of some released weights it is known on which cohort and in which folds
they were trained (`released.toml`). Of other weights nothing is known, and that is said.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ichprog.cohort import Cohort
from ichprog.errors import RunError
from ichprog.hub import WeightFile
from ichprog.spec import ModelSpec


@dataclass(frozen=True)
class LeakageReport:
    """The folds that may answer for each patient of a cohort.

    Attributes:
        by: What it goes by: the model's "run", its "released" folds, or "nothing".
        folds: For each of `N` patients the folds whose mean answers; none where every fold here may have seen them.
        sentence: What is known and what is not, for whoever reads the figures.
    """

    by: Literal["run", "released", "nothing"]
    folds: tuple[tuple[int, ...], ...]
    sentence: str


def guard(name: str, spec: ModelSpec, weights: Sequence[WeightFile], cohort: Cohort) -> LeakageReport:
    """Finds out which of a model's folds have not seen which patients.

    A patient is a run's where the names are alike, or are but for a table's name that `Cohort.join` has put before one
    of them. Such a patient is scored by the fold that has tested that name and by no other, so whether the names mean
    one person or two, nothing leaks. Patients of the run whom none of these folds has tested are scored by none. Who is
    in the run under another name altogether is not found.

    Args:
        name: The name that the model was asked for by.
        spec: What the model is.
        weights: Its folds.
        cohort: The patients.

    Raises:
        RunError: The model's run.json cannot be read, or tells of other weights.
        IchprogError: The folds of released weights are needed, and scikit-learn is not installed.
    """
    here = tuple(file.fold for file in weights)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if name.startswith("local-dir:") and (folder / "run.json").is_file():
        return _by_run(_record(folder / "run.json", weights), spec, here, cohort)
    released = [each for each in _released() if spec.weights.repo in each["repositories"]]
    for each in released:
        if _recognised(each, cohort):
            return _by_release(each, here, cohort)
    learnt = "".join(f" These weights were trained on {each['cohort']}." for each in released)
    if released:
        learnt += " This table is not recognised as it, and one with some of its patients would not be."
    return LeakageReport(
        "nothing",
        (here,) * len(cohort),
        f"ichprog cannot know whether the model has seen these patients.{learnt} If it has seen any, the figures are "
        "too good.",
    )


def _by_run(run: Mapping[str, Any], spec: ModelSpec, here: tuple[int, ...], cohort: Cohort) -> LeakageReport:
    tested: dict[str, set[int]] = {}
    for fold, parts in run["membership"].items():
        for part, patients in parts.items():
            for patient in patients:
                tested.setdefault(patient, set()).update([int(fold)] if part == "test" else [])
    folds, found = [], 0
    for alike in _alike([patient.name for patient in cohort.patients], tested):
        found += bool(alike)
        unseen = set(here).intersection(*(tested[name] for name in alike))
        folds.append(tuple(fold for fold in here if fold in unseen))
    n, mean = len(cohort), f"fold {here[0]}" if len(here) == 1 else f"the mean of its {len(here)} folds"
    cannot = "ichprog cannot know whether the run has seen any of them under another name."
    if _same(run, spec, cohort):
        said = ["The model was trained on this very table, by its names and labels."]
    elif found:
        said = [
            f"{found} of {n} patients have names that the model's run knows, though its table was another: by name "
            "alone they are taken for its patients."
        ]
    else:
        said = [f"None of the {n} patients has a name that the model's run knows. They are scored by {mean}. {cannot}"]
    if found:
        said.append("Each is scored by the one fold that has tested them and never saw them before.")
    if out := folds.count(()):
        said.append(f"{out} are left out, since no fold here has tested them.")
    if 0 < found < n:
        said.append(f"The {n - found} others are scored by {mean}. {cannot}")
    return LeakageReport("run", tuple(folds), " ".join(said))


def _by_release(released: Mapping[str, Any], here: tuple[int, ...], cohort: Cohort) -> LeakageReport:
    import numpy as np

    from ichprog.train import folds as folds_module

    labels = cohort.numbers(released["column"]).astype(np.int64)
    parts = folds_module.split(labels, released["folds"], seed=released["seed"])
    tested = {int(place): fold for fold, part in enumerate(parts) for place in part.test}
    folds = tuple((tested[place],) if tested[place] in here else () for place in range(len(cohort)))
    counts = " and ".join(f"{count} of {value}" for value, count in released["counts"].items())
    return LeakageReport(
        "released",
        folds,
        f"This table is taken for {released['cohort']}, in the order of its clinical table, since it has {len(cohort)} "
        f"patients, {counts} in column {released['column']}. Each is scored by the one released fold that has tested "
        f"them and never saw them before. {folds.count(())} are left out, since no fold here has tested them.",
    )


def _record(path: Path, weights: Sequence[WeightFile]) -> Mapping[str, Any]:
    """A run's record, which must be of these weights."""
    hint = "It tells whom the model has seen. Bring the folder back to what the run left there."
    try:
        run: dict[str, Any] = json.loads(path.read_text("utf-8"))
        sums = {int(fold): result["sha256"] for fold, result in run["results"].items()}
        whole = all(isinstance(run[key], dict) for key in ("membership", "cohort"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read as the record of a run ({error}). {hint}") from error
    others = [file.fold for file in weights if sums.get(file.fold) != file.sha256]
    if others or not whole:
        which = f"the weights of fold {others[0]} are not those it tells of" if others else "it is not whole"
        raise RunError(f"{path}: {which}. {hint}")
    return run


def _same(run: Mapping[str, Any], spec: ModelSpec, cohort: Cohort) -> bool:
    """Whether the cohort is the run's, by its names and labels in their order."""
    from ichprog.train.run_dir import digest

    if any(task.target.column not in cohort.patients[0].columns for task in spec.tasks):
        return False
    labels = {task.name: cohort.labels(task).tolist() for task in spec.tasks}
    return bool(digest([[p.name for p in cohort.patients], labels]) == run["cohort"].get("sha256"))


def _alike(names: Sequence[str], members: Collection[str]) -> Iterator[tuple[str, ...]]:
    """For each name the members it may stand for: itself, or those that differ by what is put before one of them."""
    by_tail: dict[str, list[str]] = {}
    for member in members:
        for tail in _tails(member):
            by_tail.setdefault(tail, []).append(member)
    for name in names:
        longer = by_tail.get(name, [])
        yield (name,) if name in members else (*longer, *(tail for tail in _tails(name) if tail in members))


def _tails(name: str) -> list[str]:
    """What stands after each underscore of a name."""
    parts = name.split("_")
    return ["_".join(parts[place:]) for place in range(1, len(parts))]


def _released() -> list[dict[str, Any]]:
    text = files("ichprog.evaluation").joinpath("released.toml").read_text("utf-8")
    found: list[dict[str, Any]] = tomllib.loads(text)["released"]
    return found


def _recognised(released: Mapping[str, Any], cohort: Cohort) -> bool:
    """Whether a cohort has as many patients of each number as the one that released weights were trained on."""
    column = released["column"]
    if column not in cohort.patients[0].columns:
        return False
    return Counter(f"{value:g}" for value in cohort.numbers(column)) == Counter(released["counts"])
