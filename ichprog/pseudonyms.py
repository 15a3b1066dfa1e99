"""Pseudonyms of patients, studies and series: hashes with a secret key.

The key is in a file of this user, which is made at the first use. Everybody with the key file gets the same pseudonyms.
Nobody else can compute the pseudonym of an identifier, or find the identifier by trying all that are possible.
"""

import functools
import hmac
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ichprog.errors import RunError
from ichprog.io import atomic_write, file_lock

KEY_VARIABLE = "ICHPROG_PSEUDONYM_KEY_FILE"
DIGITS = 12  # hexadecimal; two of a million patients get the same pseudonym with a probability of 0.2 %
_KEY_BYTES = 32
_MIN_CHARACTERS, _MAX_CHARACTERS = 32, 4096  # of a key file

_LOG = logging.getLogger("ichprog")
_other_keys: list[bytes] = []  # of the process that sent work to this one


def pseudonym(identifier: str) -> str:
    """Return a short name for an identifier, which depends on the secret key.

    Args:
        identifier: Identifier of a patient, a study or a series.

    Raises:
        RunError: The key cannot be read, or not be made.

    Examples:
        >>> pseudonym("1.2.3") == pseudonym("1.2.3"), len(pseudonym("1.2.3"))
        (True, 12)
    """
    return hmac.digest(key(), identifier.encode("utf-8", "surrogatepass"), "sha256").hex()[:DIGITS]


def key_file() -> Path:
    """Return the path of the key file.

    It is `ICHPROG_PSEUDONYM_KEY_FILE`, or `ichprog/pseudonym.key` in `XDG_DATA_HOME`, by default `~/.local/share`.
    """
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "ichprog" / "pseudonym.key"


def key() -> bytes:
    """Return the secret key, and make its file if there is none at the default place.

    Raises:
        RunError: The file cannot be read or made, or is no key.
    """
    return _other_keys[-1] if _other_keys else _read(key_file(), KEY_VARIABLE in os.environ)


@contextmanager
def use_key(other: bytes | None) -> Iterator[None]:
    """Use the key of the process that sent work to this one while the block runs.

    Args:
        other: The key of the other process; None uses that of this user.
    """
    if other is None:
        yield
        return
    _other_keys.append(other)
    try:
        yield
    finally:
        _other_keys.pop()


@functools.lru_cache(maxsize=8)
def _read(path: Path, is_named: bool) -> bytes:
    """Return the key in a file."""
    try:
        if not path.exists() and not is_named:
            _make(path)
        if not path.is_file():
            raise RunError(
                f"{KEY_VARIABLE} names {path}, which is no file. Copy the key file of another machine there, or make a "
                "new one: python -c 'import secrets; print(secrets.token_hex(32))' > FILE"
            )
        with path.open("rb") as file:
            secret = file.read(_MAX_CHARACTERS + 1).strip()
        is_open = os.name == "posix" and path.stat().st_mode & 0o004
    except OSError as error:
        raise RunError(
            f"The key of pseudonyms {path} cannot be used: {error}. Grant access, or name another file with the "
            f"environment variable {KEY_VARIABLE}."
        ) from error
    if not _MIN_CHARACTERS <= len(secret) <= _MAX_CHARACTERS:
        raise RunError(
            f"The key of pseudonyms {path} has {len(secret)} characters. Expected {_MIN_CHARACTERS} to "
            f"{_MAX_CHARACTERS}. Restore the file; a new key gives other pseudonyms."
        )
    if is_open:
        _LOG.warning("Every user of this machine can read the key of pseudonyms %s. Run chmod o= on it.", path)
    return secret


def _make(path: Path) -> None:
    """Write a new key, unless another process has just written one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file_lock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            with atomic_write(path) as partial:
                partial.touch(mode=0o600)
                partial.write_text(f"{os.urandom(_KEY_BYTES).hex()}\n", encoding="ascii")
