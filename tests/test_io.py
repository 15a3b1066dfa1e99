"""Atomic writes, tables, JSON and locks."""

import csv
import json
import os
import stat
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ichprog.io import atomic_write, file_lock, read_csv, write_csv, write_json


def test_two_threads_write_one_target_without_mixing(tmp_path):
    """Both threads are inside the block at the same time; the last rename wins."""
    target, both_inside = tmp_path / "target.bin", threading.Barrier(2)
    contents = [b"a" * 100_000, b"b" * 100_000]

    def write(content):
        for _ in range(20):
            with atomic_write(target) as partial, partial.open("wb") as file:
                file.write(content[:50_000])
                both_inside.wait()
                file.write(content[50_000:])
            assert target.read_bytes() in contents

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    target, events = tmp_path / "target.txt", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: events.append(target.exists()) or fsync(number))
    with atomic_write(target) as partial:
        partial.write_text("new")
    assert events == [False]
    assert target.read_text() == "new"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("old")

    def fail():
        with atomic_write(target) as partial:
            partial.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_tables_take_mappings_and_sequences(tmp_path):
    write_csv(tmp_path / "t.csv", ["a", "b"], [{"a": 1, "b": "x, y"}, [2, 'say "z"'], {"a": 3}])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", "x, y"], ["2", 'say "z"'], ["3", ""]]


FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
CELLS = TEXTS | st.builds(str.__add__, st.sampled_from(["=", "+", "-", "@", "'=", "''-"]), TEXTS)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=3))
@example([("=1+1", "-0.5"), ("'=1+1", "'quoted'"), ("-1e5", "+49 30"), ("\uff1d1+1", "\n=1")])
def test_no_cell_is_a_formula_and_all_are_read_back(rows):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        write_csv(path, ["a", "=b"], rows)
        assert [tuple(row.values()) for row in read_csv(path)] == rows
        assert all(list(row) == ["a", "=b"] for row in read_csv(path))
        with path.open(encoding="utf-8", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=b" in cells
    for cell in cells:
        assert cell[:1] not in FORMULA_STARTS or isinstance(float(cell), float)


def test_a_private_table_is_readable_by_its_user_only(tmp_path):
    write_csv(tmp_path / "t.csv", ["a"], [["1"]], is_private=True)
    write_csv(tmp_path / "u.csv", ["a"], [["1"]])
    assert stat.S_IMODE((tmp_path / "t.csv").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "u.csv").stat().st_mode) & 0o444 == 0o444 & ~os.umask(os.umask(0o022))


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "t.json", {"name": "Tº", "values": [1, 2]})
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "Tº", "values": [1, 2]}
    assert "Tº" in text


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    lock = tmp_path / "folder" / ".lock"
    with file_lock(lock), pytest.raises(TimeoutError), file_lock(lock, timeout_s=0):
        pass
    with file_lock(lock, timeout_s=0):
        pass
