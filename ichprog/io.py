"""Write files atomically, as JSON and CSV, and lock them between processes."""

import csv
import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Text that a spreadsheet takes for a formula; the last four signs are wide forms of the first.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
# The temporary names of `atomic_write`.
_PARTIAL = re.compile(r"\.(partial|[0-9a-f]{32})-(.+)")


@contextmanager
def atomic_write(target: Path, *, sole_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary path and rename it to the target when the block ends without an error.

    By default, the temporary name is unique, so that threads and processes may write one target at the same time: the
    last one wins. The file is flushed to the disk before it gets its name.

    Args:
        target: Path of the final file.
        sole_writer: Whether nobody else writes the target meanwhile. The temporary name is then always the same, so
            that the file that a killed process leaves is overwritten by the next attempt.

    Yields:
        The path to write to, in the same folder and with the same suffixes.
    """
    partial = target.with_name(f".{'partial' if sole_writer else uuid.uuid4().hex}-{target.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path, names: Collection[str] = ()) -> None:
    """Remove the temporary files of `atomic_write` that killed processes left. No other process may write them now.

    Args:
        folder: Folder. It may be missing.
        names: Names of the final files. By default, every file of the folder is meant.
    """
    for path in folder.glob(".*-*"):
        found = _PARTIAL.fullmatch(path.name)
        if found and (not names or found[2] in names):
            path.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, *, timeout_s: float = -1) -> Iterator[None]:
    """Hold an inter-process lock while the block runs.

    Args:
        path: Lock file. Missing folders are created.
        timeout_s: Longest wait in seconds. 0 does not wait, a negative number waits without a limit.

    Raises:
        TimeoutError: Another process holds the lock.
        OSError: The lock file cannot be written.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, timeout=timeout_s):
        yield


def write_text(target: Path, text: str, *, sole_writer: bool = False) -> None:
    """Write a text in UTF-8 with its own line ends, whole or not at all.

    Args:
        target: Path of the file.
        text: The text.
        sole_writer: As for `atomic_write`.
    """
    with atomic_write(target, sole_writer=sole_writer) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(target: Path, data: Any) -> None:
    """Write data as indented JSON, whole or not at all.

    Args:
        target: Path of the file.
        data: Plain data.
    """
    write_text(target, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_csv(
    target: Path,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any] | Sequence[Any]],
    *,
    is_private: bool = False,
) -> None:
    """Write a table as CSV in UTF-8, whole or not at all. No spreadsheet takes a cell for a formula.

    Args:
        target: Path of the file.
        columns: Names of the columns, written as the first row.
        rows: Rows, as mappings from column to value or as sequences in the order of the columns.
        is_private: Whether only this user may read the file.
    """
    with atomic_write(target) as partial:
        partial.touch(mode=0o600 if is_private else 0o666)
        with partial.open("w", encoding="utf-8", newline="") as file:
            write_rows(file, columns, rows)


def write_rows(
    file: IO[str],
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any] | Sequence[Any]],
    *,
    line_end: str = "\r\n",
) -> None:
    """Write the rows of `write_csv` to an open file.

    Args:
        file: The file, opened with `newline=""`.
        columns: As in `write_csv`.
        rows: As in `write_csv`.
        line_end: End of each line.
    """
    writer = csv.writer(file, lineterminator=line_end)
    writer.writerow(map(escape_cell, columns))
    for row in rows:
        cells = [row.get(column, "") for column in columns] if isinstance(row, Mapping) else row
        writer.writerow(map(escape_cell, cells))


def read_csv(path: Path, *, encoding: str = "utf-8") -> list[dict[str, str]]:
    """Read a table that `write_csv` wrote, by column names.

    Args:
        path: Path of the file.
        encoding: Encoding of the file.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: The file is no text.
    """
    with path.open(encoding=encoding, newline="") as file:
        return [{unescape_cell(k): unescape_cell(v) for k, v in row.items()} for row in csv.DictReader(file)]


def escape_cell(value: Any) -> Any:
    """Return a value for a cell: text that a spreadsheet would take for a formula gets an apostrophe.

    Args:
        value: The value. Numbers, as text or not, stay as they are.

    Examples:
        >>> [escape_cell(value) for value in ("=1+1", "-0.5", "Jones", -2)]
        ["'=1+1", '-0.5', 'Jones', -2]
    """
    if not isinstance(value, str) or not _FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def unescape_cell(cell: Any) -> Any:
    """Return the text of a cell without the apostrophe of `escape_cell`.

    Args:
        cell: The cell as it was read. What is no text stays as it is.

    Examples:
        >>> unescape_cell("'=1+1"), unescape_cell("'quoted'")
        ('=1+1', "'quoted'")
    """
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and _FORMULA.match(cell) else cell
