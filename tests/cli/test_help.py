"""Every command has examples that are valid, its many options have headings, and a shell completes names."""

import os
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from ichprog import registry, zoo
from ichprog.cli import main
from ichprog.cli.command import HEADINGS


def commands(command=main, path=("ichprog",)):
    """Yield each command with its path."""
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, (*path, name))


COMMANDS = dict(commands())


def help_of(path):
    return COMMANDS[path].get_help(click.Context(COMMANDS[path], info_name=" ".join(path)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_valid_examples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "report.dcm").touch()
    _, _, listed = help_of(path).partition("Examples:")
    lines = [line.strip() for line in listed.splitlines() if line.strip()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "ichprog"
        context, command = click.Context(main, info_name="ichprog"), main
        while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
            name, command, arguments = command.resolve_command(context, arguments)
            context = click.Context(command, parent=context, info_name=name)
        if path != ("ichprog",) and not isinstance(COMMANDS[path], click.Group):
            assert command is COMMANDS[path]
        if arguments != ["--help"]:
            command.make_context(command.name, arguments)  # raises UsageError for unknown options and missing values


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_many_options_stand_under_headings(path):
    options = [each for each in COMMANDS[path].params if isinstance(each, click.Option)]
    text = help_of(path)
    if len(options) <= 10:
        assert "\nOptions:" in text
        return
    assert "\nOptions:" not in text
    _, _, other = text.partition("\nOther:\n")
    assert re.findall(r"^ +(-.+?)  ", other, re.MULTILINE) in (["--help"], ["-h, --help"])
    for option in options:
        assert text.count(f"{option.opts[-1]} ") or text.count(f"{option.opts[-1]}\n")


def test_every_heading_is_for_options_that_exist():
    existing = {each.name for command in COMMANDS.values() for each in command.params}
    assert {name for names in HEADINGS.values() for name in names} <= existing


def complete(*arguments):
    completion = ShellComplete(main, {}, "ichprog", "_ICHPROG_COMPLETE")
    return [item.value for item in completion.get_completions(list(arguments[:-1]), arguments[-1])]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("mod",), ["models"]),
        (("study", "st"), ["status"]),
        (("predict", "--over"), ["--overwrite"]),
        (("predict", "-m", "perez"), ["perez2023.prognosis"]),
        (("doctor", "perez"), ["perez2023.prognosis"]),
        (("predict", "--explain", "guided_"), ["guided_backprop", "guided_grad_cam"]),
        (("predict", "--brain", "morph"), ["morphology"]),
        (("explain", "scan.nii.gz", "-m", "perez2023.prognosis", "--task", ""), ["prognosis"]),
        (("explain", "-m", "no.such", "--task", "g"), ["gcs"]),
        (("predict", "-m", "compact.prognosis_gcs3_age_clinical", "--clinical", "ag"), ["age="]),
        (("plugins", "profile", "compa"), ["compact"]),
        (("plugins", "new", "x", "--kind", "fu"), ["fusion"]),
        (("train", "--preset", "pa"), ["paper"]),
        (("predict", "--runtime", "ca"), ["cached"]),
        (("predict", "--report", "--pdf", "-m", "nothing"), []),
    ],
)
def test_a_shell_completes_commands_options_and_names(arguments, expected):
    assert complete(*arguments) == expected


def test_all_models_and_saliency_methods_are_completed():
    assert complete("evaluate", "") == [spec.name for spec in zoo.list_models()]
    assert complete("explain", "--method", "") == registry.saliency.names()


def test_completion_in_a_shell_imports_no_large_library():
    code = (
        "import sys\nsys.argv = ['ichprog']\nfrom ichprog.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'monai', 'openvino', 'nibabel', 'matplotlib'} & sys.modules.keys()))"
    )
    shell = {
        "_ICHPROG_COMPLETE": "bash_complete",
        "COMP_WORDS": "ichprog predict -m densenet121.age",
        "COMP_CWORD": "3",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | shell, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["plain,densenet121.age", "[]"]
    assert not result.stderr
