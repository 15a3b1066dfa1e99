"""Plugins: which there are, what they cost, and the beginnings of a new one."""

import keyword
import re
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import click

from ichprog.cli.options import as_json, print_json
from ichprog.errors import IchprogError

_KINDS = {"backbone": "backbones", "head": "heads", "saliency": "saliency"}  # and their registries


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def plugins(ctx: click.Context, /, as_json: bool) -> None:
    """List the plugins there are, whose they are, and whether they load; measure them; begin one."""
    if ctx.invoked_subcommand is not None:
        return
    found = states()
    if as_json:
        print_json(found)
        return
    for plugin in found:
        owner = f"{plugin['distribution']} {plugin['version']}".rstrip()
        click.echo(f"{plugin['kind']:18}  {plugin['name']:36}  {owner:24}  {plugin['problem'] or 'loads'}")


def states() -> list[dict[str, Any]]:
    """Every claim to a name, with what hinders it from loading or None."""
    from ichprog import registry, zoo

    found = []
    kinds = [registry.backbones, registry.heads, registry.saliency, registry.models]
    for entries, load in [*((kind.entries(), registry.Entry.load) for kind in kinds), (zoo.entries(), zoo.read_entry)]:
        for entry in entries:
            try:
                registry.single_entry(other for other in entries if other.matches(entry.name))
                load(entry)
                problem = None
            except IchprogError as error:
                problem = str(error)
            found.append(
                {
                    "kind": entry.kind,
                    "name": entry.name,
                    "distribution": entry.distribution,
                    "version": entry.version,
                    "problem": problem,
                }
            )
    return found


@plugins.command()
@click.argument("name")
@click.option(
    "--kind", type=click.Choice(list(_KINDS)), default="backbone", show_default=True, help="What it is to be."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of the distribution; ichprog-NAME if absent."
)
def new(name: str, kind: str, output: Path | None) -> None:
    """Write an installable distribution with a plugin NAME that works, and a test that it keeps its contract."""
    from ichprog import registry

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise click.UsageError(f"NAME is {name!r}; it takes small letters, digits and _, and begins with a letter.")
    group: registry.Registry = getattr(registry, _KINDS[kind])
    if taken := [entry.owner for entry in group.entries() if entry.matches(name)]:
        raise click.UsageError(f"The {group.kind} {name!r} is there already, from {taken[0]}. Take another name.")
    folder = output or Path(f"ichprog-{name}")
    if folder.exists():
        raise click.UsageError(f"{folder} is there already. Take another name, or another folder by --output.")
    here = version("ichprog")
    major, minor, *_ = (int(part) for part in re.findall(r"\d+", here))
    words = {
        "name": name,
        "kind": group.kind,
        "group": group.group,
        "check": kind,
        "version": here,
        "next": f"0.{minor + 1}" if major == 0 else str(major + 1),
    }
    package = f"ichprog_{name}"
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{kind}.py": f"{package}/__init__.py",
        "test_plugin.py": "tests/test_plugin.py",
    }
    for source, target in places.items():
        text = files("ichprog.cli").joinpath("template", f"{source}.txt").read_text(encoding="utf-8")
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        # safe: a dollar sign of the template's own stays
        path.write_text(Template(text).safe_substitute(words), encoding="utf-8")
    click.echo(f"{folder}: next, `cd {folder} && pip install -e '.[dev]' && pytest`.")


@plugins.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--kind", "kinds", type=click.Choice(list(_KINDS)), multiple=True, help="Of this kind only; repeatable.")
@click.option(
    "--shape", type=click.IntRange(min=1), nargs=3, metavar="D H W", help="Slices, rows and columns of grids."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the tables as Markdown to this file.")
@as_json
@click.pass_context
def costs(
    ctx: click.Context,
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    shape: tuple[int, int, int] | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure parameters, operations, memory and time of plugins.

    Of the NAMEs given, such as timm/resnet18, or of all but families where none is given.
    """
    from tqdm import tqdm

    from ichprog import profiling, registry
    from ichprog.io import atomic_write

    asked = profiling.claims(names, [getattr(registry, _KINDS[kind]).kind for kind in kinds])
    found, failed = [], []
    bar = tqdm(asked, unit="plugin", leave=False, disable=None)  # None: where there is no terminal
    for kind, name in bar:
        bar.set_postfix_str(name)
        try:
            found.append(profiling.measure(kind, name, shape=shape))
        except IchprogError as error:
            failed.append((kind, name, str(error)))
    text = f"{profiling.table(found, failed=[(name, why) for _, name, why in failed])}\n\nOn {profiling.machine()}.\n"
    if output is not None:
        with atomic_write(output) as partial:
            partial.write_text(text, encoding="utf-8")
    if as_json:
        problems = [{"kind": kind, "name": name, "problem": why} for kind, name, why in failed]
        print_json({"machine": profiling.machine(), "costs": [asdict(cost) for cost in found], "failed": problems})
    else:
        click.echo(output if output is not None else text, nl=output is not None)
    if failed:
        ctx.exit(1)
