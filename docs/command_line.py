"""Write the tables of options in docs/command-line.md from the commands themselves: `python docs/command_line.py`.

A test fails if the page is out of date.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import click

from ichprog.cli import main

PAGE = Path(__file__).with_name("command-line.md")
GENERAL = {"--json", "--help", "--version"}  # the page describes them once


def updated_page(page: str) -> str:
    """Return the page with its tables replaced.

    Args:
        page: Text of the page. A table stands between comments such as `<!-- options: explain, after predict -->` and
            `<!-- end -->`. It has the options of `explain`, and names those that are the same in `predict`. Several
            commands stand after each other, such as `after pacs find and predict`.
    """
    pattern = r"(<!-- options: ([\w -]+?)(?:, after ([\w -]+))? -->\n).*?\n(<!-- end -->)"
    return re.sub(
        pattern, lambda match: f"{match[1]}\n{_options_text(match[2], match[3])}\n{match[4]}", page, flags=re.S
    )


def _commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{before}{name}", command
        if isinstance(command, click.Group):
            yield from _commands(command, f"{before}{name} ")


def _options(command: click.Command) -> list[click.Option]:
    return [each for each in command.params if isinstance(each, click.Option) and not GENERAL & set(each.opts)]


def _options_text(name: str, described: str | None) -> str:
    commands = dict(_commands(main))
    rows = {_row(each): each.opts[-1] for each in _options(commands[name])}
    paragraphs = []
    for other in described.split(" and ") if described else ():
        if shared := [row for row in map(_row, _options(commands[other])) if row in rows]:
            names = ", ".join(f"`{rows.pop(row)}`" for row in shared)
            paragraphs.append(f"As in [`ichprog {other}`](#{other.replace(' ', '-')}): {names}.\n")
    if rows:
        paragraphs.append("".join(["| option | meaning |\n| --- | --- |\n", *rows]))
    return "\n".join(paragraphs)


def _row(option: click.Option) -> str:
    """Return the row of an option: its spellings and its value; what it means, its allowed words and its default."""
    value = "" if option.is_flag else option.make_metavar(click.Context(main)).removesuffix(" RANGE")
    words = [f"`{word}`" for word in value.strip("[]").split("|")] if "|" in value else []
    spellings = [f"`{each}`" for each in option.opts]
    if value and not words:
        spellings[-1] = f"`{option.opts[-1]} {value}`"
    meaning = re.sub(r"(?<![\w`-])(--[a-z-]+( [a-z_]+=\S*\w)?)", r"`\1`", (option.help or "").removesuffix("."))
    sentences = [f"One of {', '.join(words)}", meaning] if words else [meaning]
    if option.required:
        sentences.append("Required")
    elif option.show_default:
        default = option.default if isinstance(option.default, (list, tuple)) else [option.default]
        sentences.append(f"Default: {', '.join(f'`{each}`' for each in default)}")
    return f"| {', '.join(spellings)} | {'. '.join(sentences)}. |\n"


if __name__ == "__main__":
    PAGE.write_text(updated_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
