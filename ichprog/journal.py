"""A journal: entries of a long run, each on the disk as soon as it is added, from which a killed run continues."""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from ichprog.errors import RunError
from ichprog.io import atomic_write

Entry = dict[str, Any]


class Journal:
    """A file of one JSON object for each entry, after one that says what determines the entries.

    Entries are read from the disk when they are needed, so that a run of any length needs little memory.

    Args:
        path: Path of the file.
        run: What determines the entries, as plain data. Entries of another run are not continued.

    Examples:
        >>> from tempfile import mkdtemp
        >>> journal = Journal(Path(mkdtemp(), "journal"), {"model": "a"})
        >>> journal.begin([])
        []
        >>> position = journal.add({"scan": "1.nii.gz"})
        >>> journal.at(position)
        {'scan': '1.nii.gz'}
        >>> list(journal.read())
        [{'scan': '1.nii.gz'}]
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path, self.run = path, json.loads(json.dumps(run))
        self._file: BinaryIO | None = None

    def read(self) -> Iterator[Entry]:
        """Yield the entries of an interrupted run. An entry that was cut by the interruption is left out.

        Raises:
            RunError: The file is no journal, or that of another run.
        """
        with self.path.open("rb") as file:
            try:
                run = json.loads(file.readline())["run"]
            except (ValueError, LookupError, TypeError) as error:
                raise _unreadable(self.path, error) from error
            check_run(self.path, self.run, run)
            for line in file:
                if line.endswith(b"\n"):
                    try:
                        entry = json.loads(line)
                    except ValueError as error:
                        raise _unreadable(self.path, error) from error
                    yield entry

    def begin(self, entries: Iterable[Entry]) -> list[int]:
        """Write the journal with its first entries, and open it for more.

        Args:
            entries: Entries to keep; they may come from `read`.

        Returns:
            The position of each entry, for `at`.
        """
        positions = []
        with atomic_write(self.path) as partial, partial.open("wb") as file:
            file.write(_line({"run": self.run}))
            for entry in entries:
                positions.append(file.tell())
                file.write(_line(entry))
            file.flush()
        self._file = cast("BinaryIO", self.path.open("a+b", buffering=0))
        return positions

    def add(self, entry: Entry) -> int:
        """Append an entry. It is on the disk when this function returns.

        Args:
            entry: Plain data.

        Returns:
            Its position, for `at`.

        Raises:
            OSError: The disk is full, or the file cannot be written. The entry is not in the journal then.
        """
        file = self._opened()
        position, line = file.seek(0, os.SEEK_END), _line(entry)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(position)
            raise
        return position

    def at(self, position: int) -> Entry:
        """Return the entry at a position.

        Args:
            position: Result of `add`, or one of `begin`.
        """
        with self.path.open("rb") as file:
            file.seek(position)
            entry: Entry = json.loads(file.readline())
            return entry

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise ValueError("The journal is closed.")
        return self._file

    def close(self) -> None:
        """Close the file, and keep it for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close the file and remove it."""
        self.close()
        self.path.unlink(missing_ok=True)


def _line(data: Entry) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} cannot be read as results ({type(error).__name__}). Choose another file, or replace it with "
        "--overwrite."
    )


_CHOOSE_ANOTHER_FILE = "Choose another file, or replace its results with --overwrite."


def check_run(
    path: Path, run: Mapping[str, Any], existing: Mapping[str, Any], hint: str = _CHOOSE_ANOTHER_FILE
) -> None:
    """Refuse the entries of another run.

    Args:
        path: The file, for the message.
        run: What determines the entries of this run.
        existing: What determines those of the file; further keys do not matter.
        hint: What to do if they differ.

    Raises:
        RunError: A value differs.
    """
    for key, value in run.items():
        if existing.get(key) != value:
            raise RunError(f"{path} belongs to another run: {key} was {existing.get(key)}, is {value}. {hint}")
