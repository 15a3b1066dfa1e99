"""Ctrl-C ends every command with one sentence that says how to continue."""

import functools
import re
import shlex
import signal
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from ichprog.cli import main


def commands(command=main, path=()):
    """Yield each command that is no group, with its path."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_says_how_to_continue(path, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "report.dcm").touch()
    monkeypatch.setattr(COMMANDS[path], "callback", interrupt)
    example = re.search(r"^ichprog (.*)$", COMMANDS[path].epilog, re.MULTILINE)[1]
    result = CliRunner().invoke(main, shlex.split(example))
    assert result.exit_code == 130
    assert re.fullmatch(r"\nInterrupted\. .+\.\n", result.stderr)
    options = {name for each in COMMANDS[path].params for name in each.opts}
    assert set(re.findall(r"(?<!\S)--?\w[\w-]*", result.stderr)) <= options


def test_a_signal_ends_a_simulation_which_is_continued_by_the_same_command(tmp_path):
    command = [sys.executable, "-m", "ichprog", "simulate", str(tmp_path / "patients"), "--patients", "8"]
    command += ["--grid", "compact.prognosis_gcs3_age"]
    # A process that runs in the background of a shell ignores the signal, and would pass this on.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.nii.gz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "Interrupted. Finished patients are kept. Repeat the command to continue."
    assert "Traceback" not in said
    assert not (tmp_path / "patients" / "cohort.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_brain.nii.gz") if path.is_file()}
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "patients" / "cohort.csv").exists()
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
