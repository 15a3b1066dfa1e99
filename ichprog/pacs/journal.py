"""The journal of the studies of an archive: which wait, which are answered, and which failed. It survives kills."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ichprog.errors import RunError
from ichprog.io import file_lock

STATES = ("waiting", "answered", "failed")


class StudyJournal:
    """States of studies by their Study Instance UID, in an SQLite file. `open_journal` opens one.

    Every change is on the disk when its method returns. The file holds identifiers of studies, and none of patients.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._execute("PRAGMA synchronous=FULL")
            self._execute(
                "CREATE TABLE IF NOT EXISTS studies (uid TEXT PRIMARY KEY, state TEXT NOT NULL, "
                "attempts INTEGER NOT NULL, reason TEXT NOT NULL)"
            )
        except sqlite3.DatabaseError:
            self.close()
            raise

    def _execute(self, command: str, *values: object) -> list[tuple[object, ...]]:
        with self._lock:  # the endpoint with the metrics reads in another thread
            return self._base.execute(command, values).fetchall()

    def add(self, uid: str) -> bool:
        """Add a study that waits, and return whether it was unknown.

        Args:
            uid: Study Instance UID.
        """
        command = "INSERT OR IGNORE INTO studies VALUES (?, 'waiting', 0, '') RETURNING uid"
        return bool(self._execute(command, uid))

    def is_known(self, uid: str) -> bool:
        """Return whether a study is in the journal.

        Args:
            uid: Study Instance UID.
        """
        return bool(self._execute("SELECT 1 FROM studies WHERE uid = ?", uid))

    def waiting(self) -> list[str]:
        """Return the studies that wait, those with the fewest attempts first."""
        rows = self._execute("SELECT uid FROM studies WHERE state = 'waiting' ORDER BY attempts, rowid")
        return [str(uid) for (uid,) in rows]

    def attempt(self, uid: str) -> int:
        """Count an attempt to answer a study, and return the number of attempts.

        Args:
            uid: Study Instance UID.
        """
        command = "UPDATE studies SET attempts = attempts + 1 WHERE uid = ? RETURNING attempts"
        return int(str(self._execute(command, uid)[0][0]))

    def set_state(self, uid: str, state: str, reason: str = "") -> None:
        """Set the state of a study.

        Args:
            uid: Study Instance UID.
            state: One of `STATES`.
            reason: Why the study failed or waits.
        """
        self._execute("UPDATE studies SET state = ?, reason = ? WHERE uid = ?", state, reason[:1000], uid)

    def retry_failed(self) -> None:
        """Let every failed study wait again."""
        self._execute("UPDATE studies SET state = 'waiting', attempts = 0, reason = '' WHERE state = 'failed'")

    def counts(self) -> dict[str, int]:
        """Return the number of studies in each state."""
        rows = self._execute("SELECT state, COUNT(*) FROM studies GROUP BY state")
        return dict.fromkeys(STATES, 0) | {str(state): int(str(count)) for state, count in rows}

    def close(self) -> None:
        """Close the file."""
        self._base.close()


@contextmanager
def open_journal(path: Path) -> Iterator[StudyJournal]:
    """Open a journal, which is made if missing. One process at a time may have it open.

    Args:
        path: Path of the file.

    Yields:
        The journal.

    Raises:
        RunError: Another process has the journal open, or the file is no journal.
    """
    try:
        with file_lock(path.with_name(f".{path.name}.lock"), timeout_s=0):
            try:
                journal = StudyJournal(path)
            except sqlite3.DatabaseError as error:
                raise RunError(f"{path} is no journal of studies: {error}. Choose another file.") from error
            try:
                yield journal
            finally:
                journal.close()
    except TimeoutError:
        raise RunError(f"{path} is open in another process. Stop it, or choose another file.") from None
