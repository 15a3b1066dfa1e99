"""Options that several commands share, and how the commands print JSON."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichprog.cli import completion
from ichprog.errors import CohortError, InvalidValueError, SpecError, UnknownNameError
from ichprog.zoo import DEFAULT

if TYPE_CHECKING:
    from ichprog.spec import ModelSpec

WRONG_USE = (UnknownNameError, InvalidValueError, SpecError, CohortError)  # errors that exit with 2

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
model_option = click.option(
    "-m", "--model", "name", default=DEFAULT, show_default=True, shell_complete=completion.models,
    help="A name from `ichprog models`, hf-hub:org/repo[/folder]@revision, or local-dir:PATH.",
)  # fmt: skip
brain = click.option(
    "--brain", default="auto", show_default=True, metavar="auto|extract|given|NAME|MASK",
    shell_complete=completion.plugins("brain_extractors", before=("auto", "extract", "given")),
    help="Extract the brain if a skull is visible, always or never; or use the extractor NAME, or a MASK in NIfTI.",
)  # fmt: skip
fold = click.option("--fold", type=int, help="Use one fold. By default, all available folds are averaged.")
cache_dir = click.option("--cache-dir", type=click.Path(path_type=Path), help="Cache folder.")
offline = click.option("--offline", is_flag=True, help="Use only the cache, not the network.")
device = click.option(
    "--device", default="auto", show_default=True, help="Device of torch: auto, cpu, cuda, cuda:1, mps.",
    shell_complete=completion.choices("auto", "cpu", "cuda", "mps"),
)  # fmt: skip
loading = [
    fold,
    device,
    click.option(
        "--runtime", default="auto", show_default=True, **completion.one_of("auto", "cached", "openvino", "torch"),
        help="What computes the network. cached compiles nothing: torch computes what is not compiled yet.",
    ),
    click.option(
        "--precision", default="float32", show_default=True, **completion.one_of("float32", "bfloat16"),
        help="bfloat16 is faster, and less precise, if the processor supports it.",
    ),
    cache_dir,
    offline,
]  # fmt: skip


def with_options(options: Iterable[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds several options to a command, shown in their order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return decorate


def find_spec(name: str) -> "ModelSpec":
    """Return the spec of a model, by its name in the zoo, hf-hub: or local-dir:.

    Raises:
        IchprogError: There is no such model, or it cannot be read.
    """
    from ichprog import hub, zoo

    return hub.resolve(name)[0] if name.startswith(("hf-hub:", "local-dir:")) else zoo.find(name)


def parse_assignments(option: str, values: Iterable[str], example: str) -> dict[str, Any]:
    """Parse NAME=VALUE pairs; a value is read as JSON if possible and is text otherwise.

    Args:
        option: Name of the option, for messages.
        values: The values of the option.
        example: A valid value, for messages.

    Raises:
        click.UsageError: A value has no "=".

    Examples:
        >>> parse_assignments("--option", ["power=2", "layer=features.1"], "power=2")
        {'power': 2, 'layer': 'features.1'}
    """
    parsed = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"Invalid {option} {text!r}. Expected NAME=VALUE, such as {example}.")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def print_path(path: Path, *, as_json: bool) -> None:
    """Print the path of what a command wrote, as text or as JSON."""
    click.echo(json.dumps({"path": str(path)}) if as_json else str(path))


def print_json(data: Any) -> None:
    """Print data as indented JSON."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
