"""Run commands, and workloads in processes of their own whose time and memory are measured."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import psutil

WORKLOADS = Path(__file__).with_name("workloads.py")


def run_command(*command: str | Path) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: The command failed. The message has its standard error.
    """
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}: {process.stderr}")


class WorkloadProcess:
    """Run a workload in a process of its own; each call does one unit of work and returns its result.

    The process shares no memory and no threads with the peer. Use it as a context manager.

    Args:
        name: Name of a function in `workloads.py`.
        **options: Arguments of the function, as JSON values.

    Attributes:
        peak: Peak memory in bytes of the process and its children, valid after the process has ended. Shared pages
            count once. Children are sampled twice a second, because sampling slows down the timed work. The peak of
            the process itself comes from the kernel.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.command = [sys.executable, str(WORKLOADS), name, json.dumps(options, default=str)]
        self.peak = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample_memory, args=(psutil.Process(self._process.pid),))
        self._sampler.start()
        self._read_result()  # the first line reports that the workload is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()
        self._process.communicate()  # closes standard input, which ends the process

    def __call__(self) -> Any:
        """Do one unit of work and return its result."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read_result()

    def seconds(self) -> float:
        """Return the seconds of one unit of work."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def _read_result(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise RuntimeError(f"{' '.join(self.command)} ended with {self._process.returncode}")
        return json.loads(line)

    def _sample_memory(self, process: psutil.Process) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(0.5)
            try:
                children = process.children(recursive=True)
                total = sum(map(_memory, [process, *children])) if children else 0
                self.peak = max(self.peak, _peak_memory(process), total)
            except (psutil.Error, OSError):  # a process ended during the sample
                continue


def _memory(process: psutil.Process) -> int:
    """Return the memory of a process in bytes, with its share of pages that other processes use too."""
    info = process.memory_full_info()
    return int(getattr(info, "pss", info.rss))


def _peak_memory(process: psutil.Process) -> int:
    """Return the peak memory of a process in bytes, or its present memory on systems without that figure."""
    status = Path(f"/proc/{process.pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else int(process.memory_info().rss)
