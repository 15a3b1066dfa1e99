"""Slow steps are announced on standard error: by a line, or by a bar on a terminal."""

import io
import logging
import sys

import pytest

from ichprog.cli import progress
from ichprog.cli.study import _StatusPrinter
from ichprog.study import JobStatus
from ichprog.study.jobs import Job

from support.models import REPOSITORY

_logger = logging.getLogger("ichprog.progress")


@pytest.fixture
def handler(monkeypatch):
    handler = progress.LineHandler()
    monkeypatch.setattr(_logger, "level", logging.DEBUG)
    _logger.addHandler(handler)
    yield handler
    _logger.removeHandler(handler)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def publish_sizes(hub_root, folder):
    return sum(file.stat().st_size for file in (hub_root / REPOSITORY.repo / folder).iterdir()) / 1e6


def test_fetch_announces_the_size_of_each_download_and_of_all(run, hub_server, hub_root):
    from ichprog import zoo

    names = ["perez2023.prognosis", zoo.DEFAULT]
    sizes = [publish_sizes(hub_root, zoo.find(name).weights.folder) for name in names]
    said = run("fetch", *names).stderr.splitlines()
    assert said == [
        f"2 models, {sum(sizes):.0f} MB to download.",
        f"Downloading the weights of {names[0]}: 2 files, {sizes[0]:.0f} MB.",
        f"Downloading the weights of {names[1]}: 1 file, {sizes[1]:.0f} MB.",
    ]
    assert run("fetch", *names).stderr == "2 models, 0 MB to download.\n"


def test_fetch_without_a_network_reports_each_model_as_before(run):
    said = run("fetch", "perez2023.prognosis", "densenet121.age", code=1).stderr
    assert "to download" not in said
    assert said.count("cannot be reached") == 2


def test_a_download_is_a_bar_on_a_terminal(handler, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for received in (1e6, 2e6, 4e6):
        _logger.debug("Downloading fold0.safetensors", extra={"received": int(received), "size": 4_000_000})
    assert "Downloading fold0.safetensors: 100%" in sys.stderr.getvalue()
    assert "4.00M/4.00M" in sys.stderr.getvalue()


def test_a_download_prints_nothing_elsewhere(handler, capsys):
    _logger.debug("Downloading fold0.safetensors", extra={"received": 1, "size": 2})
    assert capsys.readouterr().err == ""


def test_a_line_stands_above_a_bar(handler, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(3, "scan") as bar:
        bar.update()
        _logger.info("Compiling.")
    assert "\rCompiling.\n" in sys.stderr.getvalue()


def test_the_jobs_of_a_study_are_counted_with_the_time_left(capsys, monkeypatch):
    """The time before the first job, such as that of a long simulation, does not count."""
    clock = iter([900.0, 900.0, 900.0, 900.0, 930.0, 1000.0])
    monkeypatch.setattr("ichprog.cli.study.time.monotonic", lambda: next(clock))
    jobs = [Job("a", 0), Job("a", 1), Job("b", 0), Job("b", 1)]
    printer = _StatusPrinter()
    for job, state in zip(jobs, ("done", "missing", "failed", "missing"), strict=True):
        printer(JobStatus(job, state))
    for job in jobs[1:]:
        printer(JobStatus(job, "done"))
    assert capsys.readouterr().err.splitlines() == [
        "done     a-0",
        "done     a-1  (2 of 4 jobs, about 1 min left)",
        "done     b-0  (3 of 4 jobs, about 50 s left)",
        "done     b-1  (4 of 4 jobs)",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (200, "3 min"), (9000, "2.5 h")])
def test_durations_have_a_suitable_unit(seconds, text):
    assert progress.format_time(seconds) == text
