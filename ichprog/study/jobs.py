"""Run the jobs of a study, each independently and at most once.

    STUDY/study.json               cohort, folds and their patients, variants, baselines, versions
         /patients/                simulated patients
         /runs/<run>/              a run folder of `ichprog.train`; each fold is a job. A run is <variant>, or
                                   <variant>@seed<seed> with another seed, or <variant>@<size> on fewer patients
         /baselines/<name>.csv     predictions of a baseline; all folds are one job
         /jobs/<job>.error         why a job failed
         /predictions.csv          predictions of all finished runs and baselines

A job runs in this process, in several processes of this machine, or on the workers of a cluster that share the folder.
A file lock prevents two workers from running the same job. A job that fails or is killed does not affect the others.
The next `run` runs the jobs that are missing.
"""

import json
import logging
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
from ichprog.errors import CohortError, IchprogError, RunError, SpecError, UnknownNameError
from ichprog.evaluation.predictions import SPLITS, Predictions, TaskPredictions
from ichprog.io import atomic_write, file_lock, read_csv
from ichprog.parallel import WorkerDiedError, map_unordered
from ichprog.spec import Task
from ichprog.study import manifest
from ichprog.study.config import Study
from ichprog.study.variants import Variant

_progress = logging.getLogger("ichprog.progress")
State = Literal["done", "missing", "running", "failed"]

_FILES = {"validation": "validation.csv", "test": "predictions.csv"}  # files of a fold, by split
_train_lock = threading.Lock()  # all threads of a process share torch's random generator


@dataclass(frozen=True)
class Job:
    """One unit of a study: a fold of a run, or a baseline.

    Attributes:
        run: Name of the run or baseline in tables, such as "prognosis" or "prognosis@40".
        fold: Fold of the run, or None for a baseline, which is fitted in all folds.
    """

    run: str
    fold: int | None = None

    @property
    def name(self) -> str:
        """Return the name of the job, such as "prognosis-0"."""
        return self.run if self.fold is None else f"{self.run}-{self.fold}"


@dataclass(frozen=True)
class JobStatus:
    """State of a job.

    Attributes:
        job: Job.
        state: "done", "missing", "running" or "failed". A job that was killed is missing.
        error: Why the job failed, or an empty string.
    """

    job: Job
    state: State
    error: str = ""


def run(
    study: Study,
    out: str | Path,
    *,
    executor: Executor | None = None,
    workers: int = 1,
    cache_dir: str | Path | None = None,
    progress: Callable[[JobStatus], Any] | None = None,
    bars: bool = False,
    only: Sequence[str] | None = None,
) -> list[JobStatus]:
    """Run the missing jobs of a study and collect the predictions.

    Several processes may run the same study at the same time: each job is run by one of them.

    Args:
        study: Study.
        out: Folder of the study.
        executor: Executor that runs the jobs, such as the one of `parallel.cluster`. Its workers must see the same
            files. By default, jobs run on this machine.
        workers: Number of processes if there is no executor. 1 runs in this process.
        cache_dir: Folder of prepared grids. By default `$ICHPROG_CACHE` or `~/.cache/ichprog`.
        progress: Called with the status of every job before the first one starts, and again of each job that ends.
        bars: Whether to show progress bars of scans and epochs on standard error, for what this process computes.
        only: Names of the jobs to run. By default all. The predictions are collected by a later call without `only`.

    Returns:
        The final status of every job that was to be run.

    Raises:
        RunError: The folder holds another study or other files.
        CohortError: There are too few patients, a column is missing, or a scan cannot be used.
        SpecError: A variant cannot be built.
        UnknownNameError: A plugin, a column or a job does not exist.
        PluginError: A plugin of a variant fails.

    Examples:
        ```python
        study = ichprog.study.Study.read("study.toml")
        statuses = ichprog.study.run(study, "out", workers=2)
        print([status.job.name for status in statuses if status.state == "failed"])
        ```
    """
    from ichprog import hub

    out, cache = Path(out).absolute(), hub.cache_folder(cache_dir).absolute()
    manifest.refuse_foreign_folder(out)
    chosen = _choose_jobs(study, only)
    _check_networks(study, [job for job in chosen if not _is_done(out, job)])
    with file_lock(out / ".prepare.lock"):  # another process may prepare the same study
        manifest.simulate_patients(study, out, workers)
        cohort = manifest.load_cohort(study, out)
        manifest.open_folder(out, manifest.build_manifest(study, cohort))
        before = [each for each in status(study, out) if each.job in chosen]
        remaining = [each.job for each in before if each.state != "done"]
        _prepare_grids(study, cohort, cache, remaining, workers, bars=bars)

    report = progress or (lambda _: None)
    for each in before:
        report(each)
    if remaining:
        _progress.info("Running %d jobs, %d more are done.", len(remaining), len(before) - len(remaining))
    function = partial(run_job, study, out, cache, bars=bars and executor is None and workers == 1)
    for jobs in _order(study, remaining):
        for job, result in map_unordered(function, jobs, executor=executor, workers=workers):
            _finish_job(out, job, str(result) if isinstance(result, WorkerDiedError) else result, report)
    statuses = status(study, out)
    if only is None:
        with manifest.lock_results(out):
            collect(study, out, complete_runs(statuses)).write(out / "predictions.csv")
    return [each for each in statuses if each.job in chosen]


def _choose_jobs(study: Study, names: Sequence[str] | None) -> list[Job]:
    """Return the jobs with these names, by default all."""
    jobs = {job.name: job for job in _list_jobs(study)}
    for name in names or ():
        if name not in jobs:
            raise UnknownNameError("job of the study", name, jobs)
    return [job for name, job in jobs.items() if names is None or name in names]


def status(study: Study, out: str | Path) -> list[JobStatus]:
    """Return the status of every job of a study. Nothing is changed.

    Args:
        study: Study.
        out: Folder of the study, which need not exist.

    Examples:
        ```python
        study = ichprog.study.Study.read("study.toml")
        print([(each.job.name, each.state) for each in ichprog.study.status(study, "out")])
        ```
    """
    out = Path(out)
    left_out = manifest.read_manifest(out)["left_out"] if (out / manifest.FILE).is_file() else {}
    return [_status_of(out, job) for job in _list_jobs(study) if job.run not in left_out]


def complete_runs(statuses: Sequence[JobStatus]) -> set[str]:
    """Return the names of the runs and baselines of which every job is done.

    Args:
        statuses: Result of `status`.
    """
    return {each.job.run for each in statuses} - {each.job.run for each in statuses if each.state != "done"}


def collect(study: Study, out: Path, runs: set[str]) -> Predictions:
    """Collect the predictions of runs and baselines, in the order of the study.

    Args:
        study: Study.
        out: Folder of the study.
        runs: Names of runs and baselines that are done in all folds.
    """
    collected: dict[tuple[str, str, str], TaskPredictions] = {}
    for name, run in study.runs.items():
        if name in runs:
            collected |= _read_run(run.variant, name, study.folds, out)
    for baseline in study.baselines:
        if baseline.name in runs:
            collected |= Predictions.read(out / "baselines" / f"{baseline.name}.csv").entries
    return Predictions(collected)


def run_job(study: Study, out: Path, cache: Path, job: Job, *, bars: bool = False) -> str | None:
    """Run one job, unless it is done or another process runs it.

    Args:
        study: Study.
        out: Folder of the study.
        cache: Folder of prepared grids and compiled networks.
        job: Job.
        bars: Whether to show progress bars on standard error.

    Returns:
        The error message if the job failed, or None.
    """
    try:
        with _train_lock, file_lock(_lock_path(out, job), timeout_s=1):  # `status` holds the lock for a moment
            if not _is_done(out, job):
                _error_path(out, job).unlink(missing_ok=True)
                if job.fold is None:
                    _fit_baseline(study, out, job)
                else:
                    _train_fold(study, out, cache, job, job.fold, bars)
    except TimeoutError:
        return None
    except IchprogError as error:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return traceback.format_exc()
    return None


def _train_fold(study: Study, out: Path, cache: Path, job: Job, fold: int, bars: bool) -> None:
    from ichprog.train import TrainOptions, train

    run, cohort = study.runs[job.run], manifest.load_cohort(study, out)
    start = study.start_of(run)
    if start is not None and not all(_is_done(out, Job(start, number)) for number in range(study.folds)):
        raise RunError(f"Variant {start}, from which {job.run} starts, is not done in every fold. Run the study again.")
    train(
        cohort,
        run.variant.spec,
        out / "runs" / job.run,
        folds=manifest.split_folds(study, cohort, run),
        only_folds=[fold],
        protocol=manifest.run_protocol(study, run, manifest.split_folds(study, cohort)),
        start_from=None if start is None else out / "runs" / start,
        resume=True,
        name=job.run,
        options=TrainOptions(brain=study.brain, device=study.device, cache_dir=cache, progress=bars),
    )


def _fit_baseline(study: Study, out: Path, job: Job) -> None:
    from ichprog.study import baselines

    baseline = next(each for each in study.baselines if each.name == job.run)
    cohort, image = manifest.load_cohort(study, out), None
    if baseline.variant:
        if not all(_is_done(out, Job(baseline.variant, fold)) for fold in range(study.folds)):
            raise RunError(f"Variant {baseline.variant} is not done in every fold. Run the study again.")
        image = {
            split: predictions
            for (_, task, split), predictions in collect(study, out, {baseline.variant}).entries.items()
            if task == baseline.task
        }
    predictions = baselines.predict(
        baseline,
        cohort,
        study.task(baseline.task),
        manifest.split_folds(study, cohort),
        seed=study.protocol.seed,
        image=image,
    )
    table = Predictions({(baseline.name, baseline.task, split): predictions[split] for split in SPLITS})
    table.write(out / "baselines" / f"{job.run}.csv")


def _finish_job(out: Path, job: Job, error: str | None, report: Callable[[JobStatus], Any]) -> None:
    """Record why a job failed, and report its status."""
    if error is not None and not _is_done(out, job):
        with atomic_write(_error_path(out, job)) as path:
            path.write_text(error.rstrip() + "\n", encoding="utf-8")
    report(_status_of(out, job))


def _check_networks(study: Study, jobs: Sequence[Job]) -> None:
    """Refuse variants whose network cannot be built or cannot read its grids, before anything is computed."""
    from ichprog import networks

    variants = {
        variant.name: variant for variant in (study.runs[job.run].variant for job in jobs if job.fold is not None)
    }
    for name, variant in variants.items():
        try:
            networks.feature_shape(variant.spec)
        except SpecError as error:
            raise SpecError(f"variant {name!r}: {error}") from error


def _prepare_grids(study: Study, cohort: Cohort, cache: Path, jobs: Sequence[Job], workers: int, *, bars: bool) -> None:
    """Refuse variants without enough patients, and prepare every scan once before the jobs start."""
    names = dict.fromkeys(job.run for job in jobs if job.fold is not None)
    if not names:
        return
    from ichprog.model import resolve_brain
    from ichprog.train import folds, grid_cache

    inputs = []
    for name in names:
        run = study.runs[name]
        spec = run.variant.spec
        labels = {task.name: cohort.labels(task) for task in spec.tasks}
        try:
            folds.validate_folds(spec, labels, manifest.split_folds(study, cohort, run))
        except CohortError as error:
            raise CohortError(f"variant {name}: {error}") from None
        if spec.input not in inputs:
            inputs.append(spec.input)
    scans = [patient.scan for patient in cohort.patients]
    brain = resolve_brain(study.brain)
    _progress.info("Preparing the scans of %d patients.", len(scans))
    for contract in inputs:
        grid_cache.prepare(scans, contract, brain=brain, folder=cache / "grids", workers=workers, progress=bars)


def stages(study: Study) -> dict[str, int]:
    """Return the stage of each run and baseline by name. A job needs results of jobs of earlier stages only.

    Args:
        study: Study.
    """
    found: dict[str, int] = {}
    for name, run in study.runs.items():
        start = study.start_of(run)
        found[name] = 0 if start is None else found[start] + 1
    for baseline in study.baselines:
        found[baseline.name] = found[baseline.variant] + 1 if baseline.variant else 0
    return found


def _order(study: Study, jobs: Sequence[Job]) -> list[list[Job]]:
    """Return jobs in stages."""
    stage_of = stages(study)
    return [[job for job in jobs if stage_of[job.run] == stage] for stage in range(max(stage_of.values()) + 1)]


def _list_jobs(study: Study) -> list[Job]:
    runs = [Job(name, fold) for name in study.runs for fold in range(study.folds)]
    return [*runs, *(Job(baseline.name) for baseline in study.baselines)]


def _is_done(out: Path, job: Job) -> bool:
    if job.fold is None:
        return (out / "baselines" / f"{job.run}.csv").is_file()
    config = out / "runs" / job.run / "config.json"  # lists the finished folds, and is written last
    if not config.is_file():
        return False
    return f"fold{job.fold}.safetensors" in json.loads(config.read_text("utf-8"))["weights"]["sha256"]


def _status_of(out: Path, job: Job) -> JobStatus:
    if _is_done(out, job):
        return JobStatus(job, "done")
    if _lock_path(out, job).is_file():
        try:
            with file_lock(_lock_path(out, job), timeout_s=0):
                pass
        except TimeoutError:
            return JobStatus(job, "running")
    if _error_path(out, job).is_file():
        return JobStatus(job, "failed", _error_path(out, job).read_text("utf-8").rstrip())
    return JobStatus(job, "missing")


def _lock_path(out: Path, job: Job) -> Path:
    return out / "jobs" / f".{job.name}.lock"


def _error_path(out: Path, job: Job) -> Path:
    return out / "jobs" / f"{job.name}.error"


def _read_run(variant: Variant, run: str, folds: int, out: Path) -> dict[tuple[str, str, str], TaskPredictions]:
    """Read the predictions of a run for the patients that each fold was not trained on."""
    predictions = {}
    for split, name in _FILES.items():
        rows = []
        for fold in range(folds):
            rows += read_csv(out / "runs" / run / "folds" / str(fold) / name)
        for task in variant.spec.tasks:
            predictions[run, task.name, split] = _task_predictions(rows, task)
    return predictions


def _task_predictions(rows: Sequence[dict[str, str]], task: Task) -> TaskPredictions:
    patients = tuple(row["patient"] for row in rows)
    folds = np.array([int(row["fold"]) for row in rows], np.int64)
    labels = [row[f"{task.name}_true"] for row in rows]
    truth = np.array([task.labels.index(label) if label else -1 for label in labels], np.int64)
    probabilities = [[float(row[f"{task.name}_{label}"]) for label in task.labels] for row in rows]
    return TaskPredictions(patients, folds, truth, np.array(probabilities, np.float64))
