"""A job that kills its process. It imports no library, so that worker processes start quickly."""

import os
import signal


def work(item):
    """Kill the process for item 2, and return a wrong result for item 3."""
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return "wrong" if item == 3 else None


def fail(item):
    """Raise an error with attributes."""
    from ichprog.errors import UnknownNameError

    raise UnknownNameError("device", "gpu", ["cpu", "cuda"])
