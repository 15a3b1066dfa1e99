"""The memory of a training on a processor, kept from step to step.

PyTorch asks the C library for every tensor, and glibc asks the system for every large one and gives it back when the
tensor goes. So in each step the system clears the same pages anew, several times what the step holds at once. glibc
can keep them instead. What is kept lies in pieces between what is in use, so that a process takes more: a fifth was
seen. It is kept only where there is half as much again.
"""

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt, in glibc's malloc.h
_NEVER = 2**31 - 1
_MORE = 1.5  # of the most that was taken
_CGROUP = Path("/sys/fs/cgroup")


@contextmanager
def kept(device: torch.device) -> Iterator[Callable[[], None]]:
    """A context in which memory may be kept; the system has it back at its end.

    Args:
        device: Where the training runs.

    Yields:
        A function to call once some steps have shown how much they take: from then on memory is kept, where there is
        enough of it. It does nothing on other devices and with other C libraries.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield lambda: None
        return
    import resource  # not on Windows

    libc = ctypes.CDLL(None)

    def keep() -> None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if _room(resource.getpagesize()) >= _MORE * most:
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, _NEVER)

    try:
        yield keep
    finally:
        # What glibc comes to by itself in a process with large tensors.
        libc.mallopt(_MMAP_MAX, 2**16)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)


def _room(page: int) -> int:
    """Bytes that this process holds or could have, where a page of memory has so many."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    rooms = [int(lines["MemAvailable"].split()[0]) * 1024]
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = ((_CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        rooms.append(int(limit) - int(used))
    return min(rooms) + page * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
