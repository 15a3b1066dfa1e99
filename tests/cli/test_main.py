"""What all commands share: errors, exit codes and logging."""

import json
import logging
import subprocess
import sys

import click
import pytest

import ichprog
from ichprog.cli import main
from ichprog.simulate import anatomy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict"], "Missing argument"),
        (["predict", "SCAN", "-m", "densenet121.prognosys"], "Did you mean densenet121.prognosis"),
        (["predict", "SCAN", "-m", "BRIGHT", "--fold", "9"], "Unknown fold"),
        (["predict", "SCAN", "-m", "BRIGHT", "--brain", "perhaps"], "'perhaps'"),
        (["predict", "SCAN", "-m", "BRIGHT", "--device", "tpu"], "Unknown device 'tpu'"),
        (["predict", "SCAN", "-m", "BRIGHT", "-o", "out.xlsx"], "Unknown format of results '.xlsx'"),
        (["predict", "SCAN", "-m", "BRIGHT", "--explain", "grad_cam"], "--explain needs --maps, --report or"),
        (["predict", "SCAN", "-m", "BRIGHT", "--maps", "m"], "--maps needs --explain"),
        (["predict", "SCAN", "-m", "BRIGHT", "--pdf"], "--pdf and --identifiers need --report"),
        (["report", "out.csv", "-o", "r"], "Expected one of: .json, .jsonl"),
        (["predict", "SCAN", "-m", "BRIGHT", "--explain", "gradcam", "--maps", "m"], "Did you mean grad_cam"),
        (["explain", "SCAN", "-m", "BRIGHT", "--option", "layer", "-o", "m"], "Expected NAME=VALUE"),
        (["explain", "SCAN", "-m", "BRIGHT", "--task", "sex", "-o", "m"], "Unknown task"),
        (["fetch"], "Give names of models, or --all"),
        (["fetch", "nothing"], "Unknown model 'nothing'"),
        (["doctor", "nothing"], "Unknown model 'nothing'"),
        (["unheard"], "No such command"),
    ],
)
def test_wrong_use_exits_with_2_and_a_message(run, bright_model, small_scan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"SCAN": small_scan, "BRIGHT": bright_model}
    assert message in run(*(names.get(argument, argument) for argument in arguments), code=2).stderr


def test_a_command_without_its_extra_names_the_extra(run, tmp_path, monkeypatch):
    anatomy.template.cache_clear()
    monkeypatch.setitem(sys.modules, "scipy", None)
    result = run("simulate", tmp_path / "cohort", "--patients", 1, code=1)
    assert "Error: ichprog simulate needs scipy. Install it with: pip install 'ichprog[simulate]'." in result.stderr


def test_the_verbose_option_logs_to_standard_error(run, monkeypatch):
    def log(pattern="*"):
        logging.getLogger("ichprog.zoo").info("reading the zoo")
        logging.getLogger("ichprog.zoo").debug("reading one file")
        return list_models(pattern)

    list_models = ichprog.list_models
    monkeypatch.setattr(ichprog, "list_models", log, raising=False)
    assert run("models").stderr == ""
    assert run("-v", "models").stderr == "INFO ichprog.zoo: reading the zoo\n"
    assert "DEBUG ichprog.zoo: reading one file" in run("-vv", "models").stderr
    assert run("models").stderr == ""
    assert logging.getLogger("ichprog").level == logging.NOTSET


def test_every_command_takes_json():
    def commands(name, command):
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield name, command
        for sub_name, sub_command in getattr(command, "commands", {}).items():
            yield from commands(f"{name} {sub_name}", sub_command)

    has_json = {name: any("--json" in o.opts for o in command.params) for name, command in commands("ichprog", main)}
    assert [name for name, has in has_json.items() if not has] == ["ichprog spec"], "which always prints JSON"


def test_study_new_prints_the_path_as_json(run, tmp_path):
    printed = run("study", "new", tmp_path / "study.toml", "--json").stdout
    assert json.loads(printed) == {"path": str(tmp_path / "study.toml")}


@pytest.mark.parametrize(
    ("missing", "packages"),
    [(["matplotlib"], "matplotlib. Install it"), (["jinja2", "sklearn"], "jinja2 and scikit-learn. Install them")],
)
def test_a_study_names_missing_packages_before_the_first_job(missing, packages, run, tmp_path, monkeypatch):
    run("study", "new", tmp_path / "study.toml", "--preset", "smoke")
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    done = run("study", "run", tmp_path / "study.toml", code=1)
    assert done.stderr == f"Error: The report of a study needs {packages} with: pip install 'ichprog[study]'.\n"
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_the_process_ends_with_the_exit_code_and_whole_output(code):
    arguments = ["models", "perez*" if code == 0 else "zzz*"]
    done = subprocess.run([sys.executable, "-m", "ichprog", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("perez2023.prognosis" in done.stdout) == (code == 0)
    assert ("Error: Unknown model" in done.stderr) == (code == 2)


def test_public_names_are_all_that_dir_lists():
    assert dir(ichprog) == sorted([*ichprog.__all__, "__version__"])
    assert all(hasattr(ichprog, name) for name in dir(ichprog))


def test_the_version_is_that_of_the_installed_package(run):
    assert run("--version").stdout.strip().endswith(ichprog.__version__)
