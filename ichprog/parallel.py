"""Run work in several processes, on this machine or on a cluster.

`parallel_map` applies a function to items in order. `map_unordered` yields each result as soon as a worker has it, and
survives workers that die. Executors are those of `concurrent.futures`: a pool of processes on this machine, or the
executor that `cluster` yields for the workers of dask or Slurm.
"""

import functools
import itertools
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ichprog import pseudonyms
from ichprog.errors import RunError, missing_extra

__all__ = ["ClusterExecutor", "WorkerDiedError", "cluster", "exit_with_parent", "map_unordered", "parallel_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEDULER_TIMEOUT_S = 10  # longest wait for the answer of a dask scheduler
_RESUBMIT_INTERVAL_S = 10  # between two checks for Slurm jobs that have ended
_COUNT_INTERVAL_S = 5  # between two questions for the number of dask workers
_MAX_DEATHS = 3  # of the workers of one item, before it gets a pool of its own
_PER_WORKER = 2  # items that are sent to each worker: one that runs, and one that waits
_MIN_IN_FLIGHT = 16  # items that are sent to a cluster, whose workers may start later
_LIST_OPTIONS = {"job_extra_directives", "job_directives_skip", "job_script_prologue", "worker_extra_args"}

_worker_lock = threading.Lock()  # a worker process applies its function to one item at a time


class WorkerDiedError(RunError):
    """An item whose worker process died each time that the item was tried."""


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 1) -> Iterator[Result]:
    """Apply a function to every item and yield the results in the order of the items.

    Args:
        function: Function of one item. With several workers it must be picklable.
        items: Items.
        workers: Number of processes. 1 runs in this process.

    Yields:
        The results.

    Raises:
        WorkerDiedError: The worker processes of an item died each time.

    Examples:
        >>> list(parallel_map(abs, [-1, 2]))
        [1, 2]
    """
    if workers <= 1 or len(items) < 2:
        yield from map(function, items)
        return
    early: dict[int, Result] = {}
    position = 0
    numbered = functools.partial(_apply_to_second, function)
    for (number, _), result in map_unordered(numbered, enumerate(items), workers=min(workers, len(items))):
        if isinstance(result, WorkerDiedError):
            raise result
        early[number] = result
        while position in early:
            yield early.pop(position)
            position += 1


def _apply_to_second(function: Callable[[Item], Result], pair: tuple[int, Item]) -> Result:
    return function(pair[1])


def map_unordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    executor: Executor | None = None,
    workers: int = 1,
) -> Iterator[tuple[Item, Result | WorkerDiedError]]:
    """Apply a function to every item and yield each result when it is there, with its item.

    The function is sent once and kept by each worker process, with everything that it holds, such as a loaded model.
    Few items are sent at a time, so that an iterator of any length needs little memory and no worker waits while
    another has a queue. If a worker dies, its item is tried again. A worker computes in the current folder of this
    process, and with its key of pseudonyms.

    Args:
        function: Function of one item. With other processes it must be picklable.
        items: Items.
        executor: Executor that applies the function. By default, processes of this machine.
        workers: Number of processes if there is no executor. 1 runs in this process.

    Yields:
        An item and its result; with one process in the order of the items. If the worker of an item died each time,
        the result is the error.

    Raises:
        RunError: No worker process can start, a worker does not see the current folder, or the key of pseudonyms of an
            executor cannot be read.
        Exception: What the function raises.

    Examples:
        >>> list(map_unordered(abs, [-1, 2]))
        [(-1, 1), (2, 2)]
    """
    if executor is None and workers <= 1:
        for item in items:
            yield item, function(item)
        return
    secret = None if executor is None else pseudonyms.key()  # processes of this machine read the same file
    call = functools.partial(_call, pickle.dumps((str(Path.cwd()), secret, function)))
    tasks = map(_Task, items)
    if executor is None:
        yield from _map_in_pools(call, tasks, workers)
        return
    for task, result in itertools.chain(_map_on(executor, call, tasks), ((task, _DIED) for task in tasks)):
        yield task.item, WorkerDiedError("its worker died each time") if isinstance(result, _Died) else result


@dataclass(eq=False)
class _Task(Generic[Item]):
    """An item, and how many workers died while they had it."""

    item: Item
    deaths: int = 0


class _Died:
    """The result of an item whose worker died."""


_DIED = _Died()
_Call = Callable[[Item], "tuple[Result | None, Exception | None]"]


def _map_in_pools(
    call: "_Call[Item, Result]", tasks: Iterator[_Task[Item]], workers: int
) -> Iterator[tuple[Item, Result | WorkerDiedError]]:
    """Apply the function in pools of processes, with a new pool after each death of a worker."""
    lone_deaths = 0  # since the last result
    again: list[_Task[Item]] = []
    while True:
        alone = [task for task in again if task.deaths >= _MAX_DEATHS]
        tasks = itertools.chain([task for task in again if task.deaths < _MAX_DEATHS], tasks)
        again = []
        for task in alone:  # an item that kills its process must not take the others with it
            with _process_pool(1) as pool:
                ((_, result),) = _map_on(pool, call, iter([task]))
            lone_deaths = lone_deaths + 1 if isinstance(result, _Died) else 0
            if lone_deaths > _MAX_DEATHS:
                raise RunError(
                    "Every worker process dies. It may need more memory than there is. Or the main program is not a "
                    "file that a new process can import: run it as a script with `if __name__ == '__main__':`."
                )
            died = "its process died each time; it may need more memory than there is"
            yield task.item, WorkerDiedError(died) if isinstance(result, _Died) else result
        with _process_pool(workers) as pool:
            for task, result in _map_on(pool, call, tasks):
                if isinstance(result, _Died):
                    task.deaths += 1
                    again.append(task)
                else:
                    lone_deaths = 0
                    yield task.item, result
        if not again:
            return


def _map_on(
    executor: Executor, call: "_Call[Item, Result]", tasks: Iterator[_Task[Item]]
) -> Iterator[tuple[_Task[Item], Result | _Died]]:
    """Apply the function on an executor until no task is left or the executor is broken."""
    running: dict[Future[tuple[Result | None, Exception | None]], _Task[Item]] = {}
    is_broken = False
    try:
        while True:
            for task in () if is_broken else itertools.islice(tasks, max(0, _most_in_flight(executor) - len(running))):
                try:
                    running[executor.submit(call, task.item)] = task
                except BrokenExecutor:
                    is_broken = True
                    yield task, _DIED
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    result, error = future.result()
                except Exception as died:  # of the pool, or dask's if a worker was killed several times
                    is_broken |= isinstance(died, BrokenExecutor)
                    yield task, _DIED
                    continue
                if error is not None:
                    raise error
                yield task, result  # type: ignore[misc]  # a result may be None
    finally:
        for future in running:
            future.cancel()


def _most_in_flight(executor: Executor) -> int:
    """Return how many items an executor has at a time."""
    if isinstance(executor, _ProcessPool):
        return _PER_WORKER * executor.workers
    workers = executor.count_workers() if isinstance(executor, ClusterExecutor) else os.cpu_count() or 1
    return max(_MIN_IN_FLIGHT, _PER_WORKER * workers)


def _call(payload: bytes, item: Any) -> tuple[Any, Exception | None]:
    """Apply the function in a worker process. An error of the function is a result, unlike the death of a worker."""
    with _worker_lock:
        try:
            folder, secret, function = _unpickle(payload)
            if not Path(folder).is_dir():
                raise RunError(
                    f"The worker on {socket.gethostname()} has no folder {folder}. Workers need the same files under "
                    "the same paths."
                )
            with chdir(folder), pseudonyms.use_key(secret):
                return function(item), None
        except Exception as error:
            return None, _portable(error)


@functools.lru_cache(maxsize=1)
def _unpickle(payload: bytes) -> tuple[str, bytes | None, Callable[[Any], Any]]:
    """Return folder, key of pseudonyms and function; a worker keeps the last function with its model."""
    folder, secret, function = pickle.loads(payload)  # noqa: S301  # written by `map_unordered`
    return folder, secret, function


def _portable(error: Exception) -> Exception:
    """Return an error that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")
    return error


def exit_with_parent() -> None:
    """End this worker process when its parent process ends, even if the parent is killed."""
    from multiprocessing import parent_process

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def cluster(
    *, scheduler: str | None = None, slurm: Mapping[str, Any] | None = None, workers: int = 1
) -> "Iterator[ClusterExecutor]":
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

    Examples:
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
            yield ClusterExecutor(client)
        return
    with _slurm_cluster(dict(slurm or {}), workers) as slurm_jobs, Client(slurm_jobs) as client:
        yield ClusterExecutor(client)


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


class ClusterExecutor(Executor):
    """The workers of a dask cluster as an executor, which knows how many workers there are.

    Args:
        client: A `distributed.Client`.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._executor = client, client.get_executor(pure=False)
        self._count, self._counted_at = 0, -float("inf")

    def submit(self, function: Callable[..., Result], /, *arguments: Any, **options: Any) -> Future[Result]:
        """Send a call to the cluster."""
        future: Future[Result] = self._executor.submit(function, *arguments, **options)
        return future

    def count_workers(self) -> int:
        """Return the number of threads of all workers, not older than a few seconds."""
        if time.monotonic() - self._counted_at > _COUNT_INTERVAL_S:
            self._count, self._counted_at = sum(self._client.nthreads().values()), time.monotonic()
        return self._count


class _ProcessPool(ProcessPoolExecutor):
    """A pool that knows how many processes it has."""

    def __init__(self, workers: int) -> None:
        from multiprocessing import get_context

        spawn = get_context("spawn")
        super().__init__(workers, mp_context=spawn, initializer=_start_worker, initargs=(workers,))
        self.workers = workers


@contextmanager
def _process_pool(workers: int) -> Iterator[Executor]:
    """Yield a pool of processes that end with this process and share its processors."""
    pool = _ProcessPool(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(workers: int) -> None:
    """Set up a worker process before it imports torch."""
    import signal

    from threadpoolctl import threadpool_limits

    exit_with_parent()
    signal.signal(signal.SIGINT, _exit)  # Ctrl-C reaches all processes, and the parent reports it
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threadpool_limits(threads)  # of libraries that the main program has imported already, such as NumPy


def _exit(*_: object) -> None:
    raise SystemExit(1)
