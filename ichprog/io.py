"""Files that appear whole or not at all: atomic writes, JSON and CSV."""

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
