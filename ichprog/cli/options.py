"""What several commands take, and how they print."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ichprog.errors import CohortError, InvalidValueError, SpecError, UnknownNameError
from ichprog.zoo import DEFAULT

WRONG_USE = (UnknownNameError, InvalidValueError, SpecError, CohortError)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
model_option = click.option(
    "-m", "--model", "name", default=DEFAULT, show_default=True,
    help="A name of `ichprog models`, hf-hub:org/repo[/folder]@revision, or local-dir:PATH.",
)  # fmt: skip
brain = click.option(
    "--brain", default="auto", show_default=True, metavar="auto|extract|given",
    help="Extract the brain where a skull is seen, always, or never.",
)  # fmt: skip
loading = [
    click.option("--fold", type=int, help="One fold instead of the mean over all there are."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
    click.option("--runtime", default="auto", show_default=True, metavar="auto|openvino|torch"),
    click.option("--precision", default="float32", show_default=True, metavar="float32|bfloat16"),
    click.option("--cache-dir", type=click.Path(path_type=Path), help="Where weights are kept."),
    click.option("--offline", is_flag=True, help="Leave the network alone."),
]


def with_options(options: Iterable[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command with several options, shown in their order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return decorate


def parsed(option: str, given: Iterable[str], example: str) -> dict[str, Any]:
    """NAME=VALUE as given; a value is JSON where it can be read as such and text where not.

    Args:
        option: The option that was given, for messages.
        given: Its values.
        example: One that would do, for messages.
    """
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise click.UsageError(f"{option} takes NAME=VALUE, such as {example}; got {one!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def print_json(data: Any) -> None:
    """Prints data as JSON for people to read too."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
