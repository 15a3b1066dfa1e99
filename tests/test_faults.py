"""Kills, full disks, damaged caches and a Hub that lies: a short form of `benchmarks/faults.py`."""

import runpy
from pathlib import Path

import pytest

FAULTS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "faults.py"), run_name="faults")
SAME, ERROR = FAULTS["SAME"], FAULTS["ERROR"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def laboratory():
    with FAULTS["open_laboratory"](seed=1, in_process=True) as laboratory:
        yield laboratory


def check(outcome, trials, *results):
    """Check that every trial ended with one of some results."""
    assert not outcome.problems
    assert sum(outcome.counts[result] for result in results) == trials


def test_a_killed_prediction_ends_with_the_same_bytes(laboratory):
    check(FAULTS["kill"](laboratory, FAULTS["SCENARIOS"]["predict"], 1), 1, SAME)


def test_a_damaged_cache_is_repaired(laboratory):
    check(FAULTS["damage_cache"](laboratory, 2), 2, SAME)


def test_downloads_that_are_wrong_are_refused_and_leave_nothing(laboratory):
    check(FAULTS["lie"](laboratory, ["a wrong hash", "an endless body"]), 2, ERROR)


def test_a_full_disk_gives_an_error_and_costs_no_result(laboratory):
    if not FAULTS["can_mount"](laboratory.new_folder()):
        pytest.skip("mounting a small disk needs root")
    check(FAULTS["fill_disk"](laboratory, FAULTS["SCENARIOS"]["predict"], 1), 1, ERROR)


@pytest.mark.slow
@pytest.mark.skipif(FAULTS["clock_library"]() is None, reason="another clock needs libfaketime")
@pytest.mark.parametrize("name", ["predict", "study", "fetch"])
def test_a_clock_that_changes_costs_nothing(name, laboratory):
    check(FAULTS["change_clock"](laboratory, FAULTS["SCENARIOS"][name], 2), 2, SAME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["explain", "train", "study", "fetch", "compile"])
def test_another_killed_command_ends_with_the_same_bytes(name, laboratory):
    check(FAULTS["kill"](laboratory, FAULTS["SCENARIOS"][name], 3), 3, SAME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "study", "fetch"])
def test_two_processes_do_not_disturb_each_other(name, laboratory):
    check(FAULTS["run_twice"](laboratory, FAULTS["SCENARIOS"][name], 1), 1, SAME, ERROR)


@pytest.mark.slow
def test_every_lie_of_the_hub_is_refused(laboratory):
    names = [name for name in FAULTS["LIES"] if name != "a stall"]  # takes a minute
    check(FAULTS["lie"](laboratory, names), len(names), ERROR)
    check(FAULTS["change_pinned_file"](laboratory), 3, SAME, ERROR)
