"""Compute a single scan at once in PyTorch, and compile its models for later runs in a background process.

Compiling a large network takes a minute, one scan in PyTorch some seconds. A run of several scans compiles first, so
that one runtime computes all of them, also after an interruption. The background process ends by itself. It may be
killed at any time, because compiled graphs are written atomically.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog import hub
from ichprog.cli.scan_runs import load_model
from ichprog.cli.workers import Workers
from ichprog.errors import IchprogError
from ichprog.io import file_lock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichprog.model import Model
    from ichprog.sources import ScanSource

SWITCH = "ICHPROG_BACKGROUND_COMPILE"  # environment variable; 0 compiles before the first scan and starts no process
_LONGEST_S = 3600


class ModelLoader:
    """Load the models of a command.

    Args:
        sources: All scans of the command.
        pool: Where the command works.
        shard: Value of --shard, whose scans are part of a larger run.
    """

    def __init__(self, sources: "Sequence[ScanSource]", pool: Workers, shard: str | None = None) -> None:
        self._is_single = len(sources) == 1 and pool == Workers() and shard is None and os.environ.get(SWITCH) != "0"
        self._uncompiled: list[dict[str, Any]] = []

    def load(self, name: str, brain: str, loading: dict[str, Any], *, explain: bool = False) -> "Model":
        """Load a model, and say so if PyTorch computes the scan only because nothing is compiled yet.

        Args:
            name: Name of the model.
            brain: Value of the brain option.
            loading: Other arguments of `ichprog.load_model`.
            explain: Whether the command explains.
        """
        if not self._is_single or loading["runtime"] != "auto":
            return load_model(name, brain, loading)
        model = load_model(name, brain, {**loading, "runtime": "cached"})
        if not model.is_compiled(explain=explain):
            later = ""
            if _is_writable(loading["cache_dir"]):
                later = " A background process then compiles the model for later runs."
                self._uncompiled.append({**loading, "name": name})
            click.echo(f"{name} is not compiled for this CPU yet, so PyTorch computes this scan.{later}", err=True)
        return model

    def compile_in_background(self) -> None:
        """Start one process that compiles the models that are not compiled yet, unless one is running.

        Call this function after the result is printed, because both need the processors.
        """
        if not self._uncompiled:
            return
        jobs = [{**job, "cache_dir": str(hub.cache_folder(job["cache_dir"]).absolute())} for job in self._uncompiled]
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", "from ichprog.cli import compilation; compilation.main()", json.dumps(jobs)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, creationflags=getattr(subprocess, "DETACHED_PROCESS", 0),
        )  # fmt: skip


def compile_models(jobs: "Sequence[dict[str, Any]]") -> None:
    """Compile models into the cache, one after the other, unless another process does so in the background.

    Args:
        jobs: Arguments of `ichprog.load_model` for each model.
    """
    from ichprog.model import load_model

    try:
        with file_lock(_lock_of(jobs[0]["cache_dir"]), timeout_s=0):
            for job in jobs:
                load_model(**{**job, "offline": True}).compile()
    except (IchprogError, OSError):
        return  # the next run computes in PyTorch again, or reports the error


def main() -> None:
    """Compile the models of the argument, as the background process."""
    if hasattr(signal, "alarm"):
        signal.alarm(_LONGEST_S)  # ends a process that waits for a lock of a broken file system
        os.nice(10)
    compile_models(json.loads(sys.argv[1]))


def _lock_of(cache_dir: str | Path | None) -> Path:
    return hub.cache_folder(cache_dir) / "compiled" / "background.lock"


def _is_writable(cache_dir: str | Path | None) -> bool:
    """Return whether compiled graphs can be cached."""
    try:
        with file_lock(_lock_of(cache_dir), timeout_s=0):
            return True
    except TimeoutError:
        return True  # another process compiles
    except OSError:
        return False
