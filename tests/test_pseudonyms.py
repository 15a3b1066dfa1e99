"""Pseudonyms: hashes with a secret key that is made once, and that workers get from the process that sent the work."""

import hashlib
import hmac
import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import ichprog
from ichprog import RunError, parallel, pseudonyms
from ichprog.pseudonyms import pseudonym

from support import dicom_series

PRINT = "from ichprog.pseudonyms import pseudonym; print(pseudonym('Smith'))"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return the data folder of a user without a key."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_pseudonym_is_an_hmac_with_a_key_that_is_made_once(home):
    first = pseudonym("Smith")
    path = home / "ichprog" / "pseudonym.key"
    assert path == pseudonyms.key_file()
    secret = path.read_bytes()
    assert len(bytes.fromhex(secret.decode())) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert first == hmac.new(secret.strip(), b"Smith", hashlib.sha256).hexdigest()[:12]
    assert first != pseudonym("Jones")
    assert not hashlib.sha256(b"Smith").hexdigest().startswith(first)
    assert pseudonym("Smith") == first
    assert path.read_bytes() == secret


def test_users_have_different_keys_and_a_key_file_makes_them_agree(home, tmp_path, monkeypatch):
    mine = pseudonym("Smith")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    assert pseudonym("Smith") != mine
    monkeypatch.setenv("ICHPROG_PSEUDONYM_KEY_FILE", str(home / "ichprog" / "pseudonym.key"))
    assert pseudonym("Smith") == mine


def test_processes_that_start_together_make_one_key(home):
    started = [subprocess.Popen([sys.executable, "-c", PRINT], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate()[0].strip() for process in started} == {pseudonym("Smith")}


def _as_another_user(folder):
    os.environ["XDG_DATA_HOME"] = folder


def test_workers_of_an_executor_use_the_key_of_the_sender(home, tmp_path):
    other = str(tmp_path / "worker")
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_as_another_user, initargs=(other,)) as executor:
        assert executor.submit(pseudonym, "Smith").result() != pseudonym("Smith")
        assert dict(parallel.map_unordered(pseudonym, ["Smith"], executor=executor)) == {"Smith": pseudonym("Smith")}
        assert executor.submit(pseudonym, "Smith").result() != pseudonym("Smith")  # only for that work


def test_local_workers_read_the_same_key(home):
    assert dict(parallel.map_unordered(pseudonym, ["Smith"], workers=2)) == {"Smith": pseudonym("Smith")}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "which is no file"), (b"short\n", "has 5 characters"), (b"x" * 5000, "has 4097 characters")],
    ids=["missing", "short", "long"],
)
def test_a_named_key_file_that_is_no_key_is_refused(content, message, tmp_path, monkeypatch):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("ICHPROG_PSEUDONYM_KEY_FILE", str(path))
    with pytest.raises(RunError, match=message):
        pseudonym("Smith")


def test_a_pipe_as_key_file_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "key")
    monkeypatch.setenv("ICHPROG_PSEUDONYM_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(RunError, match="no file"):
        pseudonym("Smith")


def test_without_a_place_for_the_key_a_dicom_scan_gives_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    dicom_series.write(tmp_path / "series", count=8)
    with pytest.raises(RunError, match=r"cannot be used: .*ICHPROG_PSEUDONYM_KEY_FILE"):
        ichprog.scan.read(tmp_path / "series")


def test_a_key_that_everybody_can_read_is_reported(home, tmp_path, monkeypatch, caplog):
    path = tmp_path / "open.key"
    path.write_text("0123456789abcdef" * 4)
    path.chmod(0o644)
    monkeypatch.setenv("ICHPROG_PSEUDONYM_KEY_FILE", str(path))
    with caplog.at_level(logging.WARNING):
        pseudonym("Smith")
    assert "Every user of this machine can read" in caplog.text
    assert "0123456789abcdef" not in caplog.text
