"""Show progress on standard error: a line for each slow step, and a bar with the time left for many items.

The library announces slow steps by the logger "ichprog.progress". The command line prints these messages.
"""

import logging
import sys
from typing import Any

import click


class LineHandler(logging.Handler):
    """Print each message as a line on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is not None:
            tqdm.write(self.format(record), file=sys.stderr)
        else:
            click.echo(self.format(record), err=True)


def bar(total: int, unit: str, *, done: int = 0) -> Any:
    """Return a tqdm bar on standard error, which is hidden if standard error is no terminal.

    Args:
        total: Number of items.
        unit: Name of an item.
        done: Number of items that were there before.
    """
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=unit, mininterval=0, file=sys.stderr, disable=not sys.stderr.isatty())
