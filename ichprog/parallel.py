"""Run work in several processes, on this machine or on a cluster.

`parallel_map` applies a function to items in order. `run_jobs` runs independent jobs and survives workers that die.
Executors are those of `concurrent.futures`: a pool of processes on this machine, or the executor that `cluster` yields
for the workers of dask or Slurm.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

from ichprog.errors import RunError, missing_extra

__all__ = ["cluster", "exit_with_parent", "parallel_map", "run_jobs"]

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEDULER_TIMEOUT_S = 10  # longest wait for the answer of a dask scheduler
_RESUBMIT_INTERVAL_S = 10  # between two checks for Slurm jobs that have ended
_MAX_ATTEMPTS = 3  # pools that may break in a row without finishing a job
_LIST_OPTIONS = {"job_extra_directives", "job_directives_skip", "job_script_prologue", "worker_extra_args"}


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 1) -> Iterator[Result]:
    """Apply a function to every item and yield the results in the order of the items.

    Args:
        function: Function of one item. With several workers it must be picklable.
        items: Items.
        workers: Number of processes. 1 runs in this process.

    Yields:
        The results.

    Example:
        >>> list(parallel_map(abs, [-1, 2]))
        [1, 2]
    """
    if workers <= 1 or len(items) < 2:
        yield from map(function, items)
        return
    with _process_pool(min(workers, len(items))) as pool:
        for future in [pool.submit(function, item) for item in items]:
            yield future.result()


def run_jobs(
    jobs: Sequence[Item],
    function: Callable[[Item], str | None],
    on_done: Callable[[Item, str | None], None],
    *,
    executor: Executor | None = None,
    workers: int = 1,
) -> None:
    """Run independent jobs, and run the jobs of a worker that died again.

    Args:
        jobs: Jobs.
        function: Function of one job. It returns an error message, or None. With other processes it must be picklable.
        on_done: Called in this process with each job and its error message, or None.
        executor: Executor that runs the jobs. By default, processes of this machine.
        workers: Number of processes if there is no executor. 1 runs in this process.

    Example:
        >>> run_jobs(["a", "b"], lambda job: None, print)
        a None
        b None
    """
    if executor is not None:
        for job in _submit_all(jobs, function, executor, on_done):
            on_done(job, "its worker died")
        return
    if workers <= 1:
        for job in jobs:
            on_done(job, function(job))
        return
    remaining, attempts = list(jobs), _MAX_ATTEMPTS
    while remaining and attempts:
        with _process_pool(min(workers, len(remaining))) as pool:
            lost = _submit_all(remaining, function, pool, on_done)
        attempts = attempts - 1 if len(lost) == len(remaining) else _MAX_ATTEMPTS
        remaining = lost
    for job in remaining:  # a job that kills its process gets a pool of its own
        with _process_pool(1) as pool:
            for _ in _submit_all([job], function, pool, on_done):
                on_done(job, "its process died each time; it may need more memory than there is")


def exit_with_parent() -> None:
    """End this worker process when its parent process ends, even if the parent is killed."""
    import threading
    from multiprocessing import parent_process

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def cluster(
    *, scheduler: str | None = None, slurm: Mapping[str, Any] | None = None, workers: int = 1
) -> Iterator[Executor]:
    """Yield an executor for the workers of a dask or Slurm cluster.

    Give each dask worker one thread: an ichprog job uses one dask thread and its own computing threads.

    Args:
        scheduler: Address of a running dask scheduler, such as "tcp://host:8786".
        slurm: Options of `dask_jobqueue.SLURMCluster`, used if there is no scheduler. Slurm jobs are submitted with
            `processes` workers each (default 1), which share `cores` processors (default 1) and `memory` (default
            "8GB"). Every value may be text. A list of one entry may be that entry.
        workers: Number of Slurm jobs. A job that ends, for example at its `walltime`, is submitted again.

    Yields:
        The executor.

    Raises:
        RunError: No scheduler answers at the address, or Slurm refuses the jobs.
        IchprogError: dask is not installed.

    Example:
        ```python
        with cluster(slurm={"queue": "gpu", "cores": 4}, workers=8) as executor:
            ichprog.study.run(study, "out", executor=executor)
        ```
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise missing_extra("distributed", "distributed", "Running on a cluster") from error
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=SCHEDULER_TIMEOUT_S)
        except (OSError, ValueError) as error:
            raise RunError(
                f"No dask scheduler answers at {scheduler}: {error}. Start it with `dask scheduler`, or correct the "
                "address."
            ) from error
        with client:
            yield client.get_executor(pure=False)
        return
    with _slurm_cluster(dict(slurm or {}), workers) as slurm_jobs, Client(slurm_jobs) as client:
        yield client.get_executor(pure=False)


@contextmanager
def _slurm_cluster(options: dict[str, Any], count: int) -> Iterator[Any]:
    """Run Slurm jobs whose workers are connected to a scheduler in this process, and resubmit jobs that end."""
    from distributed import Status
    from tornado.ioloop import PeriodicCallback

    async def submit_missing() -> None:
        await jobs

    with _build_slurm_cluster(options) as jobs:
        for _ in range(count):
            jobs.worker_spec.update(jobs.new_worker_spec())
        try:
            jobs.sync(submit_missing)
        except (OSError, RuntimeError) as error:
            for job in jobs.workers.values():
                job.status = Status.failed  # closing the cluster waits for jobs that were never submitted otherwise
            raise RunError(
                f"Slurm refuses the jobs: {error}. Change the options, or run the command on a machine that has sbatch."
            ) from error
        resubmit = PeriodicCallback(submit_missing, 1000 * _RESUBMIT_INTERVAL_S)
        jobs.loop.add_callback(resubmit.start)
        try:
            yield jobs
        finally:
            jobs.loop.add_callback(resubmit.stop)


def _build_slurm_cluster(options: dict[str, Any]) -> Any:
    """Build a `SLURMCluster` without jobs from options that may be text."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise missing_extra("distributed", "dask-jobqueue", "Running on Slurm") from error

    for name in _LIST_OPTIONS & set(options):
        options[name] = [options[name]] if isinstance(options[name], str) else list(options[name])
    no_dashboard = {"dashboard": False, "dashboard_address": ":0"}  # the default port 8787 may be in use
    defaults = {"memory": "8GB", "scheduler_options": no_dashboard}
    try:
        processes, cores = (int(options.pop(name, 1)) for name in ("processes", "cores"))
        threads = f"export OMP_NUM_THREADS={max(1, cores // processes)}"  # dask sets it to 1 otherwise
        options["job_script_prologue"] = [threads, *options.get("job_script_prologue", [])]
        return SLURMCluster(**defaults | {"job_cpu": cores} | options, cores=processes, processes=processes)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"Invalid Slurm options: {error}. Expected options of dask_jobqueue.SLURMCluster, such as queue=gpu."
        ) from error


def _submit_all(
    jobs: Sequence[Item],
    function: Callable[[Item], str | None],
    executor: Executor,
    on_done: Callable[[Item, str | None], None],
) -> list[Item]:
    """Run the jobs on an executor and return the jobs that were lost because the executor broke."""
    lost: list[Item] = []
    futures: dict[Future[str | None], Item] = {}
    for job in jobs:
        try:
            futures[executor.submit(function, job)] = job
        except BrokenExecutor:
            lost.append(job)
    try:
        for future in as_completed(futures):
            job = futures[future]
            try:
                on_done(job, future.result())
            except BrokenExecutor:
                lost.append(job)
            except Exception as error:  # for example dask's, if a job's worker was killed several times
                on_done(job, f"{type(error).__name__}: {error}")
    finally:
        for future in futures:
            future.cancel()
    return lost


@contextmanager
def _process_pool(workers: int) -> Iterator[Executor]:
    """Yield a pool of processes that end with this process and share its processors."""
    from multiprocessing import get_context

    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(workers,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(workers: int) -> None:
    """Set up a worker process before it imports torch."""
    exit_with_parent()
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // workers))
