"""A job for processes that are to die; it imports nothing, so that they begin at once."""

import os
import signal


def work(item):
    """Kills its process where it is asked to do 2, and fails at 3."""
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return "wrong" if item == 3 else None
