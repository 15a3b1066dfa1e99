"""Show progress on standard error: a line for each slow step, and a bar with the time left for many items.

The library announces slow steps by the logger "ichprog.progress". The command line prints these messages.
"""

import functools
import logging
import sys
import warnings
from typing import Any

import click


class LineHandler(logging.Handler):
    """Print each message as a line on standard error, above a progress bar if there is one.

    The messages of a download have the bytes as attributes, and become a bar on a terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._download: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        if (size := getattr(record, "size", None)) is not None:
            self._show_download(record.getMessage(), record.__dict__["received"], size)
            return
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is not None:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()  # tqdm does not, and the line would come after later output of the command
        else:
            click.echo(self.format(record), err=True)

    def _show_download(self, name: str, received: int, size: int) -> None:
        if self._download is not None and received < self._download.n:  # the last one failed
            self._download.close()
            self._download = None
        if self._download is None:
            from tqdm import tqdm

            self._download = tqdm(
                total=size, desc=name, unit="B", unit_scale=True, file=sys.stderr,
                disable=not sys.stderr.isatty(),
            )  # fmt: skip
        self._download.update(received - self._download.n)
        if received >= size:
            self._download.close()
            self._download = None


def silence_libraries(ctx: click.Context) -> None:
    """Hide until the command ends what other libraries print about headers. The checks of a scan report what matters.

    Args:
        ctx: The context of the command.
    """
    logger = logging.getLogger("nibabel.global")  # prints each header field that it repairs
    ctx.call_on_close(functools.partial(logger.setLevel, logger.level))
    logger.setLevel(logging.CRITICAL)
    caught = warnings.catch_warnings()
    ctx.with_resource(caught)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom\.")


def format_time(seconds: float) -> str:
    """Return a duration in the unit that suits it.

    Args:
        seconds: The duration.

    Examples:
        >>> format_time(40), format_time(200), format_time(9000)
        ('40 s', '3 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def bar(total: int, unit: str, *, done: int = 0) -> Any:
    """Return a tqdm bar on standard error, which is hidden if standard error is no terminal.

    Args:
        total: Number of items.
        unit: Name of an item.
        done: Number of items that were there before.
    """
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=unit, mininterval=0, file=sys.stderr, disable=not sys.stderr.isatty())
