"""Work in several processes, on this machine or on a cluster: pools, executors and locks."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

from ichprog.errors import RunError, missing_extra

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE = 10  # seconds until a scheduler has to answer
_AGAIN = 10  # seconds until jobs that ended are submitted again
_LISTS = {"job_extra_directives", "job_directives_skip", "job_script_prologue", "worker_extra_args"}  # of dask-jobqueue
_TRIES = 3  # pools that break before anything is done; after that each item gets its own


def parallel_map(work: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 1) -> Iterator[Result]:
    """Does the same for every patient, in their order, in this process or in several that end with it.

    Args:
        work: What is done; several processes need a function that can be pickled.
        items: What it is done to.
        workers: The number of processes.
    """
    if workers <= 1 or len(items) < 2:
        yield from map(work, items)
        return
    from multiprocessing import get_context

    spawn = get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=spawn, initializer=exit_with_parent) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            for job in jobs:
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def exit_with_parent() -> None:
    """A worker whose parent is killed would wait for ever; this one goes too."""
    import threading
    from multiprocessing import parent_process

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_jobs(
    items: Sequence[Item],
    job: Callable[[Item], str | None],
    ended: Callable[[Item, str | None], None],
    *,
    executor: Executor | None = None,
    workers: int = 1,
) -> None:
    """Has a job done for each item. A worker that dies takes nothing with it but what it did, and that is tried again.

    Args:
        items: What it is done for.
        job: The job, which tells what went wrong, or None; other processes need one that can be pickled.
        ended: Called in this process with each item and what went wrong with it, or None.
        executor: Who does it.
        workers: Without one, the number of processes; 1 is this one.
    """
    if executor is not None:
        for lost in _round(items, job, executor, ended):
            ended(lost, "its worker died")
        return
    if workers <= 1:
        for item in items:
            ended(item, job(item))
        return
    left, tries = list(items), _TRIES
    while left and tries:
        with _pool(min(workers, len(left))) as pool:
            again = _round(left, job, pool, ended)
        tries = tries - 1 if len(again) == len(left) else _TRIES
        left = again
    for item in left:  # one of them kills its process; alone it takes no other with it
        with _pool(1) as pool:
            for dead in _round([item], job, pool, ended):
                ended(dead, "its process died each time; it may need more memory than there is")


def _round(
    items: Sequence[Item],
    job: Callable[[Item], str | None],
    executor: Executor,
    ended: Callable[[Item, str | None], None],
) -> list[Item]:
    """Has an executor do it; tells the items that were lost because it broke."""
    lost: list[Item] = []
    futures: dict[Future[str | None], Item] = {}
    for item in items:
        try:
            futures[executor.submit(job, item)] = item
        except BrokenExecutor:
            lost.append(item)
    try:
        for future in as_completed(futures):
            item = futures[future]
            try:
                ended(item, future.result())
            except BrokenExecutor:
                lost.append(item)
            except Exception as error:  # such as dask's, of a worker that was killed again and again
                ended(item, f"{type(error).__name__}: {error}")
    finally:
        for future in futures:
            future.cancel()
    return lost


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Processes of this machine that end with this one, and share its processors."""
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(workers,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(workers: int) -> None:
    exit_with_parent()
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // workers))  # of this worker alone; torch is not there yet


@contextmanager
def cluster(
    *, scheduler: str | None = None, slurm: Mapping[str, Any] | None = None, workers: int = 1
) -> Iterator[Executor]:
    """The workers of a cluster, by dask.distributed. Workers of one thread each are used best.

    Args:
        scheduler: Address of a scheduler that is there, such as "tcp://host:8786".
        slurm: Without one, options of dask-jobqueue's `SLURMCluster`, whose jobs are then submitted. Each holds
            `processes` workers (1), which share its `cores` processors (1) and its `memory` ("8GB"). All may be text,
            and a list of one entry that entry.
        workers: The number of those jobs; one that ends, as at the end of its `walltime`, is submitted again.

    Raises:
        RunError: There is no scheduler at the address, or Slurm refuses the jobs.
        IchprogError: dask is not installed.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise missing_extra("distributed", "distributed", "Running on a cluster") from error
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_PATIENCE)
        except (OSError, ValueError) as error:
            raise RunError(f"there is no scheduler at {scheduler}: {error}. Start one, or give its address.") from error
        with client:
            yield client.get_executor(pure=False)
        return
    with _slurm(dict(slurm or {}), workers) as jobs, Client(jobs) as client:
        yield client.get_executor(pure=False)


@contextmanager
def _slurm(options: dict[str, Any], count: int) -> Iterator[Any]:
    """So many jobs of Slurm, from now to the end of the block, and the scheduler they ask for work."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise missing_extra("distributed", "dask-jobqueue", "Running on Slurm") from error
    from distributed import Status
    from tornado.ioloop import PeriodicCallback

    async def submit() -> None:
        await jobs  # submits those that are asked for and are not there

    for name in _LISTS & set(options):
        options[name] = [options[name]] if isinstance(options[name], str) else list(options[name])
    usual = {"memory": "8GB", "scheduler_options": {"dashboard": False, "dashboard_address": ":0"}}  # 8787 may be taken
    try:
        processes, cores = (int(options.pop(name, 1)) for name in ("processes", "cores"))
        threads = f"export OMP_NUM_THREADS={max(1, cores // processes)}"  # else dask has torch use one
        options["job_script_prologue"] = [threads, *options.get("job_script_prologue", [])]
        cluster = SLURMCluster(**usual | {"job_cpu": cores} | options, cores=processes, processes=processes)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"these options of Slurm cannot be used: {error}. Change them.") from error
    with cluster as jobs:
        for _ in range(count):
            jobs.worker_spec.update(jobs.new_worker_spec())
        try:
            jobs.sync(submit)
        except (OSError, RuntimeError) as error:
            for job in jobs.workers.values():
                job.status = Status.failed  # a cluster is not closed while any was never submitted
            raise RunError(f"Slurm takes no such jobs: {error}. Change the options, or start where it does.") from error
        again = PeriodicCallback(submit, 1000 * _AGAIN)
        jobs.loop.add_callback(again.start)
        try:
            yield jobs
        finally:
            jobs.loop.add_callback(again.stop)
