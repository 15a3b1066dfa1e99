"""List plugins, profile them, and write the template of a new one."""

import keyword
import re
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import click

from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, print_json
from ichprog.errors import IchprogError

_REGISTRIES = {"backbone": "backbones", "head": "heads", "saliency": "saliency"}  # by kind, in `ichprog.registry`
_kinds = click.Choice(list(_REGISTRIES))
_TEMPLATES = _REGISTRIES | {"fusion": "fusions", "brain_extractor": "brain_extractors"}


@click.group(invoke_without_command=True, epilog=examples("plugins --json"))
@as_json
@click.pass_context
def plugins(ctx: click.Context, /, as_json: bool) -> None:
    """List all plugins with their distribution and whether they load."""
    if ctx.invoked_subcommand is not None:
        return
    listed = check_all()
    if as_json:
        print_json(listed)
        return
    for plugin in listed:
        owner = f"{plugin['distribution']} {plugin['version']}".rstrip()
        click.echo(f"{plugin['kind']:18}  {plugin['name']:36}  {owner:24}  {plugin['problem'] or 'loads'}")


def check_all() -> list[dict[str, Any]]:
    """Load every plugin and return one row each; `problem` is the error message, or None if the plugin loads."""
    from ichprog import registry, zoo

    rows = []
    kinds = [registry.backbones, registry.heads, registry.fusions, registry.saliency]
    kinds += [registry.brain_extractors, registry.models]
    for entries, load in [*((kind.entries(), registry.Entry.load) for kind in kinds), (zoo.entries(), zoo.read_entry)]:
        for entry in entries:
            problem = None
            try:
                registry.single_entry(other for other in entries if other.matches(entry.name))
                load(entry)
            except IchprogError as error:
                problem = str(error)
            owner = {"distribution": entry.distribution, "version": entry.version}
            rows.append({"kind": entry.kind, "name": entry.name, **owner, "problem": problem})
    return rows


@plugins.command(cls=Command, epilog=examples("plugins new mymap --kind saliency"))
@click.argument("name")
@click.option(
    "--kind", type=click.Choice(list(_TEMPLATES)), default="backbone", show_default=True, help="Kind of the plugin."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of the distribution. By default, ichprog-NAME."
)
@as_json
def new(name: str, kind: str, output: Path | None, as_json: bool) -> None:
    """Write an installable distribution with a working plugin NAME and a test of its contract."""
    from ichprog import registry

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise click.UsageError(f"Invalid NAME {name!r}. Expected lower-case letters, digits and _, a letter first.")
    group: registry.Registry = getattr(registry, _TEMPLATES[kind])
    if owners := [entry.owner for entry in group.entries() if entry.matches(name)]:
        raise click.UsageError(f"The {group.kind} {name!r} exists already, from {owners[0]}. Choose another name.")
    folder = output or Path(f"ichprog-{name}")
    if folder.exists():
        raise click.UsageError(f"{folder} exists already. Choose another name, or another folder with --output.")
    _write_template(folder, name, kind, group)
    command = f"cd {folder} && pip install -e '.[dev]' && pytest"
    if as_json:
        print_json({"folder": str(folder), "next": command})
    else:
        click.echo(f"{folder}: next, `{command}`.")


def _write_template(folder: Path, name: str, kind: str, group: Any) -> None:
    installed = version("ichprog")
    major, minor, *_ = (int(part) for part in re.findall(r"\d+", installed))
    fields = {
        "name": name,
        "kind": group.kind,
        "group": group.group,
        "check": kind,
        "version": installed,
        "next": f"0.{minor + 1}" if major == 0 else str(major + 1),
    }
    targets = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{kind}.py": f"ichprog_{name}/__init__.py",
        "test_plugin.py": "tests/test_plugin.py",
    }
    for source, target in targets.items():
        text = files("ichprog.cli").joinpath("template", f"{source}.txt").read_text(encoding="utf-8")
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        # safe_substitute leaves other dollar signs of the template unchanged
        path.write_text(Template(text).safe_substitute(fields), encoding="utf-8")


@plugins.command(cls=Command, epilog=examples("plugins profile compact guided_backprop -o costs.md"))
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completion.plugins(*_REGISTRIES.values()))
@click.option("--kind", "kinds", type=_kinds, multiple=True, help="Profile only this kind; repeatable.")
@click.option(
    "--shape",
    type=click.IntRange(min=1),
    nargs=3,
    metavar="D H W",
    help="Slices, rows and columns of the grids. For a head, of the grid behind its features.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the tables as Markdown to this file.")
@as_json
@click.pass_context
def profile(
    ctx: click.Context,
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    shape: tuple[int, int, int] | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure parameters, operations, memory and time of plugins.

    NAME is a plugin, or a member of a family such as timm/resnet18. By default, all plugins except families are
    measured.
    """
    from tqdm import tqdm

    from ichprog import profiling, registry
    from ichprog.io import write_text

    selected = profiling.select(names, [getattr(registry, _REGISTRIES[kind]).kind for kind in kinds])
    profiles, failed = [], []
    bar = tqdm(selected, unit="plugin", leave=False, disable=None)  # None hides the bar outside a terminal
    for kind, name in bar:
        bar.set_postfix_str(name)
        try:
            profiles.append(profiling.profile(kind, name, shape=shape))
        except IchprogError as error:
            failed.append((kind, name, str(error)))
    machine = profiling.machine()
    text = f"{profiling.table(profiles, failed=[(name, problem) for _, name, problem in failed])}\n\nOn {machine}.\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text)
    if as_json:
        problems = [{"kind": kind, "name": name, "problem": problem} for kind, name, problem in failed]
        print_json({"machine": machine, "profiles": [asdict(profile) for profile in profiles], "failed": problems})
    else:
        click.echo(output if output is not None else text, nl=output is not None)
    if failed:
        ctx.exit(1)
