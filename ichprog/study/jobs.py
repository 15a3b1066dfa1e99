"""The cells of a study: what is trained and fitted, piece by piece, each on its own and each at most once.

    STUDY/study.json              what is compared: cohort, folds and who is in them, variants, baselines, versions
         /patients/               patients that were simulated for it
         /runs/<variant>[@<size>]/ a run of `ichprog.train`, each fold a cell
         /baselines/<name>.csv    what a baseline says, all folds one cell
         /cells/<cell>.error      why a cell failed
         /predictions.csv         of all that is whole

A cell is done by whoever comes first: this process, several of this machine, or workers of a cluster that share the
folder. One that fails or is killed leaves the others alone, and the next `run` does what is missing.
"""

import csv
import json
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ichprog.cohort import Cohort
from ichprog.errors import CohortError, IchprogError, RunError
from ichprog.evaluation.predictions import SPLITS, Predictions, TaskPredictions
from ichprog.io import atomic_write
from ichprog.parallel import run_jobs
from ichprog.study.config import Study, Variant
from ichprog.study.manifest import begin, cohort_of, left_out, parts_of, record, refuse_something_else

State = Literal["done", "missing", "running", "failed"]

_FILES = {"validation": "validation.csv", "test": "predictions.csv"}  # of a fold, by split
_alone = threading.Lock()  # torch's generator is one for all threads of a process


@dataclass(frozen=True)
class Cell:
    """One piece of a study.

    Attributes:
        of: The variant or baseline.
        fold: The fold; None for a baseline, which is fitted in all of them.
        size: The number of patients it is trained on, where it is not all.
    """

    of: str
    fold: int | None = None
    size: int | None = None

    @property
    def run(self) -> str:
        """What its answers are called: the variant, with the size where there is one."""
        return self.of if self.size is None else f"{self.of}@{self.size}"

    @property
    def name(self) -> str:
        """The cell's name."""
        return self.run if self.fold is None else f"{self.run}-{self.fold}"


@dataclass(frozen=True)
class Status:
    """How far a cell is.

    Attributes:
        cell: The cell.
        state: "done", "missing", "running" or "failed"; a killed one is missing.
        said: Why it failed.
    """

    cell: Cell
    state: State
    said: str = ""


def run(
    study: Study,
    out: str | Path,
    *,
    executor: Executor | None = None,
    workers: int = 1,
    cache_dir: str | Path | None = None,
    progress: Callable[[Status], Any] | None = None,
) -> list[Status]:
    """Does what of a study is missing, and gathers its predictions.

    Args:
        study: The study.
        out: Its folder.
        executor: Who does the cells, such as that of `cluster`; its workers see the same files.
        workers: Without an executor, the number of processes; 1 is this one.
        cache_dir: Where prepared grids are kept; `~/.cache/ichprog` or `$ICHPROG_CACHE` where not given.
        progress: Called whenever a cell ends, and once for each that was done before.

    Returns:
        The state of every cell in the end; those that failed say why.

    Raises:
        RunError: The folder holds another study or something else.
        CohortError: The patients are too few for the folds or a variant, lack a column, or scans cannot be used.
        SpecError, UnknownNameError, PluginError: A variant cannot be built.
    """
    from ichprog import hub

    out, cache = Path(out).absolute(), hub.cache_folder(cache_dir).absolute()
    refuse_something_else(out)
    if study.simulated is not None:
        from ichprog.simulate import simulate

        asked = study.simulated
        simulate(out / "patients", patients=asked.patients, seed=asked.seed, workers=workers)
    cohort = cohort_of(study, out)
    begin(out, record(study, cohort))

    tell = progress or (lambda _: None)
    left = []
    for each in status(study, out):
        if each.state == "done":
            tell(each)
        else:
            left.append(each.cell)
    _prepare(study, cohort, cache, left, workers)
    job = partial(work, study, out, cache)
    fusing = {baseline.name for baseline in study.baselines if baseline.variant}
    for wave in ([c for c in left if c.of not in fusing], [c for c in left if c.of in fusing]):
        run_jobs(wave, job, lambda cell, error: _ended(out, cell, error, tell), executor=executor, workers=workers)
    found = status(study, out)
    whole = {each.cell.run for each in found} - {each.cell.run for each in found if each.state != "done"}
    collect(study, out, whole).write(out / "predictions.csv")
    return found


def status(study: Study, out: str | Path) -> list[Status]:
    """How far every cell of a study is; nothing is changed.

    Args:
        study: The study.
        out: Its folder; it may not be there yet.
    """
    out = Path(out)
    absent = left_out(out)
    return [_status(out, cell) for cell in _cells(study) if cell.of not in absent]


def collect(study: Study, out: Path, runs: set[str]) -> Predictions:
    """What variants and baselines say, in the study's order.

    Args:
        study: The study.
        out: Its folder.
        runs: Those that are done in all folds.
    """
    found: dict[tuple[str, str, str], TaskPredictions] = {}
    for cell in _cells(study):
        if cell.run not in runs or cell.fold:
            continue
        if cell.fold is None:
            found |= Predictions.read(out / "baselines" / f"{cell.run}.csv").entries
        else:
            found |= _said(study.variant(cell.of), cell.run, study.folds, out)
    return Predictions(found)


def work(study: Study, out: Path, cache: Path, cell: Cell) -> str | None:
    """Does one cell, unless it is done or another process does it.

    Args:
        study: The study.
        out: Its folder.
        cache: Where prepared grids are.
        cell: The cell.

    Returns:
        What went wrong, or None.
    """
    from filelock import FileLock, Timeout

    try:
        with _alone, FileLock(_lock(out, cell), timeout=1):  # `status` may hold it for a moment
            if not _done(out, cell):
                _error(out, cell).unlink(missing_ok=True)
                if cell.fold is None:
                    _fit(study, out, cell)
                else:
                    _train(study, out, cache, cell)
    except Timeout:
        return None
    except IchprogError as error:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return traceback.format_exc()
    return None


def _train(study: Study, out: Path, cache: Path, cell: Cell) -> None:
    from ichprog.train import train

    variant, cohort = study.variant(cell.of), cohort_of(study, out)
    train(
        cohort,
        variant.spec,
        out / "runs" / cell.run,
        folds=parts_of(study, cohort, cell.size),
        only=[cell.fold or 0],
        protocol=variant.protocol,
        resume=True,
        name=cell.run,
        brain=study.brain,
        device=study.device,
        cache_dir=cache,
    )


def _fit(study: Study, out: Path, cell: Cell) -> None:
    from ichprog.study import baselines

    baseline = next(each for each in study.baselines if each.name == cell.of)
    cohort, image = cohort_of(study, out), None
    if baseline.variant:
        if not all(_done(out, Cell(baseline.variant, fold)) for fold in range(study.folds)):
            raise RunError(f"variant {baseline.variant} is not done in every fold; this comes after it.")
        image = {
            split: answers
            for (_, task, split), answers in collect(study, out, {baseline.variant}).entries.items()
            if task == baseline.task
        }
    said = baselines.predict(
        baseline, cohort, study.task(baseline.task), parts_of(study, cohort), seed=study.protocol.seed, image=image
    )
    answers = {(baseline.name, baseline.task, split): said[split] for split in SPLITS}
    Predictions(answers).write(out / "baselines" / f"{cell.run}.csv")


def _ended(out: Path, cell: Cell, error: str | None, tell: Callable[[Status], Any]) -> None:
    """Records how a cell ended, and tells it."""
    if error is not None and not _done(out, cell):
        with atomic_write(_error(out, cell)) as part:
            part.write_text(error.rstrip() + "\n", encoding="utf-8")
    tell(_status(out, cell))


def _prepare(study: Study, cohort: Cohort, cache: Path, left: Sequence[Cell], workers: int) -> None:
    """Refuses variants that cannot be trained, and prepares every scan once before cells ask for it side by side."""
    asked = {cell.run: cell.size for cell in left if cell.fold is not None}
    if not asked:
        return
    import torch

    from ichprog import networks
    from ichprog.train import folds, grid_cache

    inputs = []
    for name, size in asked.items():
        spec = study.runs[name][0].spec
        labels = {task.name: cohort.labels(task) for task in spec.tasks}
        try:
            folds.refuse_unless_usable(spec, labels, parts_of(study, cohort, size))
        except CohortError as error:
            raise CohortError(f"variant {name}: {error}") from None
        with torch.random.fork_rng(devices=[]):
            networks.build(spec)
        if spec.input not in inputs:
            inputs.append(spec.input)
    scans = [patient.scan for patient in cohort.patients]
    for contract in inputs:
        grid_cache.prepare(scans, contract, brain=study.brain, folder=cache / "grids", workers=workers)


def _cells(study: Study) -> list[Cell]:
    trained = [Cell(v.name, fold, size) for v, size in study.runs.values() for fold in range(study.folds)]
    return [*trained, *(Cell(baseline.name) for baseline in study.baselines)]


def _done(out: Path, cell: Cell) -> bool:
    if cell.fold is None:
        return (out / "baselines" / f"{cell.run}.csv").is_file()
    config = out / "runs" / cell.run / "config.json"  # the model of all folds that are done, the last to be written
    if not config.is_file():
        return False
    return f"fold{cell.fold}.safetensors" in json.loads(config.read_text("utf-8"))["weights"]["sha256"]


def _status(out: Path, cell: Cell) -> Status:
    from filelock import FileLock, Timeout

    if _done(out, cell):
        return Status(cell, "done")
    if _lock(out, cell).is_file():
        try:
            with FileLock(_lock(out, cell), blocking=False):
                pass
        except Timeout:
            return Status(cell, "running")
    if _error(out, cell).is_file():
        return Status(cell, "failed", _error(out, cell).read_text("utf-8").rstrip())
    return Status(cell, "missing")


def _lock(out: Path, cell: Cell) -> Path:
    return out / "cells" / f".{cell.name}.lock"


def _error(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.error"


def _said(variant: Variant, run: str, folds: int, out: Path) -> dict[tuple[str, str, str], TaskPredictions]:
    """What the networks of a run say of the patients they were not trained on."""
    found = {}
    for split, file in _FILES.items():
        rows = []
        for fold in range(folds):
            with (out / "runs" / run / "folds" / str(fold) / file).open(encoding="utf-8", newline="") as opened:
                rows += list(csv.DictReader(opened))
        patients = tuple(row["patient"] for row in rows)
        fold_of = np.array([int(row["fold"]) for row in rows], np.int64)
        for task in variant.spec.tasks:
            true = [row[f"{task.name}_true"] for row in rows]
            truth = np.array([task.labels.index(label) if label else -1 for label in true], np.int64)
            said = [[float(row[f"{task.name}_{label}"]) for label in task.labels] for row in rows]
            found[run, task.name, split] = TaskPredictions(patients, fold_of, truth, np.array(said, np.float64))
    return found
