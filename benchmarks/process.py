"""What is measured from outside: a command from start to end, and a contestant that is kept ready and weighed."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import psutil

WORKLOADS = Path(__file__).with_name("workloads.py")


def run(*command: str | Path) -> None:
    """Runs a command to its end.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr}")


class Contestant:
    """A process that has loaded what it needs; called, it does one piece of work and gives its answer.

    A process of its own has only its own memory and none of its peer's threads. It is a context manager.

    Args:
        name: A function of `workloads.py`.
        **options: Its arguments, as JSON can hold them.

    Attributes:
        peak: The most memory in bytes that the process and those it started held together, once it has ended. Pages
            that several of them share count once. While there are several, they are looked at twice a second, since
            more would slow down what is timed; of the process itself the kernel keeps the highest mark.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.command = [sys.executable, str(WORKLOADS), name, json.dumps(options, default=str)]
        self.peak = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._weigh, args=(psutil.Process(self._process.pid),))
        self._watch.start()
        self._answer()  # its first line says that it is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()
        self._process.communicate()  # closes what it waits for, so that it ends

    def __call__(self) -> Any:
        """The answer to one piece of work."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def seconds(self) -> float:
        """What one piece of work takes."""
        started = time.perf_counter()
        self()
        return time.perf_counter() - started

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise RuntimeError(f"{' '.join(self.command)} ended with {self._process.returncode}")
        return json.loads(line)

    def _weigh(self, process: psutil.Process) -> None:
        over = False
        while not over:
            over = self._over.wait(0.5)
            try:
                started = process.children(recursive=True)
                self.peak = max(self.peak, _highest(process), sum(map(_memory, [process, *started])) if started else 0)
            except (psutil.Error, OSError):  # one of them ended while it was looked at
                continue


def _memory(process: psutil.Process) -> int:
    """Bytes that a process holds, its share of what it holds with others."""
    held = process.memory_full_info()
    return int(getattr(held, "pss", held.rss))


def _highest(process: psutil.Process) -> int:
    """The most bytes that a process has ever held, or where the system does not tell, what it holds now."""
    status = Path(f"/proc/{process.pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    marks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return marks[0] if marks else int(process.memory_info().rss)
