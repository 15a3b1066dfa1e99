"""Complete names in a shell: of models, tasks, plugins and clinical columns. Nothing here imports torch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from ichprog.errors import IchprogError
from ichprog.zoo import DEFAULT

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def choices(*names: str) -> Complete:
    """Return a completion of fixed names."""
    return lambda _context, _parameter, start: _matching(names, start)


def one_of(*names: str) -> dict[str, Any]:
    """Return the arguments of an option that takes one of a few names: its metavar and its completion."""
    return {"metavar": "|".join(names), "shell_complete": choices(*names)}


def models(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Complete the name of a model of the zoo."""
    from ichprog import zoo

    return _matching((entry.name for entry in zoo.entries()), start)


def plugins(*kinds: str, before: Sequence[str] = ()) -> Complete:
    """Return a completion of the names of plugins.

    Args:
        kinds: Names of registries of `ichprog.registry`, such as "saliency".
        before: Names that are no plugins.
    """

    def complete(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
        from ichprog import registry

        names = [name for kind in kinds for name in getattr(registry, kind).names()]
        return _matching([*before, *names], start)

    return complete


def tasks(context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Complete a task of the model that the command line names."""
    return _matching((task.name for task in _spec_of(context).tasks), start)


def clinical(context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Complete a clinical column, of the model or of the scores."""
    from ichprog.clinical_scores import CLINICAL_COLUMNS

    names = [value.column for value in _spec_of(context).clinical] + list(CLINICAL_COLUMNS.values())
    return _matching((f"{name}=" for name in names), start)


def _spec_of(context: click.Context) -> Any:
    """Return the spec of the model of a command line, or of the default model. The network is not used."""
    from ichprog import hub, zoo

    name = context.params.get("name") or DEFAULT
    try:
        return hub.resolve(name)[0] if name.startswith("local-dir:") else zoo.find(name)
    except (IchprogError, OSError):
        return zoo.find(DEFAULT)


def _matching(names: Iterable[str], start: str) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(start)]
