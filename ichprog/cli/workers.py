"""Distribute the scans of a command to processes of this machine or to the workers of a cluster.

A command describes what it does with one scan as a `ScanWork`. The same object works in this process, where the next
scan is read while the network runs, and in other processes, where it is sent once and loads its models once. Every
process writes the files of its scans itself, and returns only what the command prints and records.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from ichprog.cli.options import parse_assignments
from ichprog.parallel import WorkerDiedError, cluster, map_unordered

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ichprog.errors import ScanError
    from ichprog.result_files import Entry
    from ichprog.scan import Scan
    from ichprog.sources import ScanSource

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = [
    click.option(
        "--workers", default=1, show_default=True, type=click.IntRange(min=1),
        help="Number of processes, or of Slurm jobs.",
    ),
    click.option("--scheduler", metavar="ADDRESS", help="Run on the workers of this dask scheduler."),
    click.option(
        "--slurm", multiple=True, metavar="NAME=VALUE",
        help="Run on Slurm with this option of a Slurm job, such as queue=gpu. Repeatable.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Workers:
    """Where a command works: the values of --workers, --scheduler and --slurm.

    Attributes:
        count: Number of processes, or of Slurm jobs.
        scheduler: Address of a dask scheduler, or None.
        slurm: Options of a Slurm job, as NAME=VALUE.
    """

    count: int = 1
    scheduler: str | None = None
    slurm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the options suit each other.

        Raises:
            click.UsageError: Both a scheduler and options of Slurm are given.
        """
        if self.scheduler and self.slurm:
            raise click.UsageError("--scheduler and --slurm exclude each other. Give one of them.")

    @contextmanager
    def start(self) -> "Iterator[dict[str, Any]]":
        """Yield the arguments `executor` and `workers` of functions that distribute work.

        Raises:
            IchprogError: The cluster cannot be used.
        """
        if not (self.scheduler or self.slurm):
            yield {"executor": None, "workers": self.count}
            return
        options = parse_assignments("--slurm", self.slurm, "queue=gpu")
        with cluster(scheduler=self.scheduler, slurm=options or None, workers=self.count) as executor:
            yield {"executor": executor, "workers": 1}  # this machine may be a login node


def with_workers(command: _Command) -> _Command:
    """Add the options --workers, --scheduler and --slurm to a command, which takes them as its argument `pool`."""

    @functools.wraps(command)
    def run(*arguments: Any, workers: int, scheduler: str | None, slurm: tuple[str, ...], **options: Any) -> Any:
        return command(*arguments, pool=Workers(workers, scheduler, slurm), **options)

    for option in reversed(_OPTIONS):
        run = option(run)
    return run  # type: ignore[return-value]  # wraps the command


@dataclass(frozen=True)
class ScanOutput:
    """What the work on one scan leaves for the process that runs the command.

    Attributes:
        text: For standard output.
        messages: For standard error.
        entry: The entry of the file of results, or None.
        has_failed: Whether the scan has an error.
    """

    text: str = ""
    messages: str = ""
    entry: "Entry | None" = None
    has_failed: bool = False


class ScanWork(Protocol):
    """What a command does with each scan. With several processes it must be picklable."""

    def results(self, sources: "list[ScanSource]") -> "Iterator[tuple[Any, Scan | ScanError]]":
        """Yield the result of each scan, with the checked scan or the error of the scan."""

    def error_result(self, source: "ScanSource", error: "ScanError") -> Any:
        """Return the result of a scan with an error."""

    def finish(self, source: "ScanSource", stem: str, result: Any, scan: "Scan | ScanError") -> ScanOutput:
        """Write the files of a scan, and return what is left to print and record.

        Args:
            source: The scan.
            stem: Stem of the names of its files.
            result: Its result.
            scan: The checked scan, or its error.
        """


def work_on_scans(
    work: ScanWork,
    todo: "Iterable[tuple[ScanSource, str]]",
    *,
    executor: "Executor | None" = None,
    workers: int = 1,
) -> "Iterator[ScanOutput]":
    """Work on scans, and yield what is left of each: in their order with one process, otherwise as they end.

    Args:
        work: What is done with each scan.
        todo: Scans, each with a stem for the names of its files.
        executor: Executor whose workers do it. By default, processes of this machine.
        workers: Number of processes if there is no executor. 1 works in this process.
    """
    if executor is None and workers == 1:
        todo = list(todo)
        results = work.results([source for source, _ in todo])
        for (source, stem), (result, scan) in zip(todo, results, strict=True):
            yield work.finish(source, stem, result, scan)
        return
    function = functools.partial(_work_on_scan, work)
    for (source, stem), output in map_unordered(function, todo, executor=executor, workers=workers):
        if isinstance(output, WorkerDiedError):
            from ichprog.scan import worker_died_error
            from ichprog.sources import name_of

            error = worker_died_error(name_of(source), output)
            yield work.finish(source, stem, work.error_result(source, error), error)
        else:
            yield output


def _work_on_scan(work: ScanWork, item: "tuple[ScanSource, str]") -> ScanOutput:
    """Work on one scan in a worker process."""
    source, stem = item
    ((result, scan),) = work.results([source])
    return work.finish(source, stem, result, scan)
