"""Write files atomically, as JSON and CSV, and lock them between processes."""

import csv
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to the target when the block ends without an error.

    The temporary name is unique, so that threads and processes may write one target at the same time: the last one
    wins. The file is flushed to the disk before it gets its name.

    Args:
        target: Path of the final file.

    Yields:
        The path to write to, in the same folder and with the same suffixes.
    """
    partial = target.with_name(f".{uuid.uuid4().hex}-{target.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


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


def write_json(target: Path, data: Any) -> None:
    """Write data as indented JSON, whole or not at all.

    Args:
        target: Path of the file.
        data: Plain data.
    """
    with atomic_write(target) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(target: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any] | Sequence[Any]]) -> None:
    """Write a table as CSV in UTF-8, whole or not at all.

    Args:
        target: Path of the file.
        columns: Names of the columns, written as the first row.
        rows: Rows, as mappings from column to value or as sequences in the order of the columns.
    """
    with atomic_write(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([row.get(column, "") for column in columns] if isinstance(row, Mapping) else row)
