"""The command line: a thin skin over the library."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ichprog
from ichprog.errors import IchprogError, ScanError, SpecError, UnknownName
from ichprog.zoo import DEFAULT

if TYPE_CHECKING:
    from ichprog.model import Model
    from ichprog.results import Prediction, Saliency
    from ichprog.scan import Scan

_WRONG_USE = (UnknownName, SpecError)


class _Group(click.Group):
    """Says what went wrong instead of showing a traceback: exit code 2 for wrong use, 1 for what failed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (IchprogError, OSError) as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, _WRONG_USE) else 1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ichprog")
def main() -> None:
    """Prognosis after intracranial haemorrhage from one head CT. For research only, not for patient care."""


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_model = click.option(
    "-m", "--model", "name", default=DEFAULT, show_default=True,
    help="A name of `ichprog models`, hf-hub:org/repo[/folder]@revision, or local-dir:PATH.",
)  # fmt: skip
_brain = click.option(
    "--brain", default="auto", show_default=True, metavar="auto|extract|given",
    help="Extract the brain where a skull is seen, always, or never.",
)  # fmt: skip
_loading = [
    click.option("--fold", type=int, help="One fold instead of the mean over all there are."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
    click.option("--precision", default="float32", show_default=True, metavar="float32|bfloat16"),
    click.option("--cache-dir", type=click.Path(path_type=Path), help="Where weights are kept."),
    click.option("--offline", is_flag=True, help="Leave the network alone."),
]
_scans = click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SCAN...")
_tasks = click.option(
    "--task", "tasks", multiple=True, help="Task to explain, repeatable; the model's first if absent."
)
_options = click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE",
    help="Option of a saliency method, repeatable, such as layer=features.transition3.conv.",
)  # fmt: skip


def _with(options: Iterable[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return decorate


@main.command()
@click.argument("pattern", default="*")
@_as_json
def models(pattern: str, as_json: bool) -> None:
    """List the models whose names match PATTERN."""
    found = ichprog.list_models(pattern)
    if as_json:
        _print_json([spec.to_dict() for spec in found])
        return
    width = max((len(spec.name) for spec in found), default=0)
    for spec in found:
        click.echo(f"{spec.name:{width}}  {spec.summary}")


@main.command()
@_as_json
def plugins(as_json: bool) -> None:
    """List the plugins there are, whose they are, and whether they load."""
    found = _plugin_states()
    if as_json:
        _print_json(found)
        return
    for plugin in found:
        owner = f"{plugin['distribution']} {plugin['version']}".rstrip()
        click.echo(f"{plugin['kind']:18}  {plugin['name']:36}  {owner:24}  {plugin['problem'] or 'loads'}")


def _plugin_states() -> list[dict[str, Any]]:
    from ichprog import registry, zoo

    found = []
    kinds = [registry.backbones, registry.heads, registry.saliency, registry.models]
    for entries, load in [*((kind.entries(), registry.Entry.load) for kind in kinds), (zoo.entries(), zoo.spec_of)]:
        for entry in entries:
            try:
                registry.sole(other for other in entries if other.name == entry.name)
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


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Every model of the zoo.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where weights are kept.")
@_as_json
@click.pass_context
def fetch(ctx: click.Context, names: tuple[str, ...], everything: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Bring models' weights into the cache, so that they load without a network."""
    from ichprog import hub

    if everything == bool(names):
        raise click.UsageError("Give names of models, or --all.")
    failed = False
    for name in names or [spec.name for spec in ichprog.list_models()]:
        try:
            _, files = hub.fetch(name, cache_dir=cache_dir)
        except IchprogError as error:
            if isinstance(error, _WRONG_USE):
                raise
            failed = True
            click.echo(f"{name}: {error}", err=True)
            continue
        for file in files:
            described = {"model": name, "fold": file.fold, "path": str(file.path), "sha256": file.sha256}
            click.echo(json.dumps(described) if as_json else f"{name}  fold {file.fold}  {file.path}")
    ctx.exit(1 if failed else 0)


@main.command()
@click.argument("name", required=False)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where weights are kept.")
@_as_json
@click.pass_context
def doctor(ctx: click.Context, name: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """Say what is installed, which plugins load, what is cached and whether it is whole.

    With NAME, load that model too and run its golden probe.
    """
    from ichprog import hub
    from ichprog.model import DEPENDENCIES

    model = None if name is None else ichprog.load_model(name, cache_dir=cache_dir)
    report: dict[str, Any] = {
        "installed": {"python": sys.version.split()[0], **{d: version(d) for d in DEPENDENCIES}},
        "plugins": _plugin_states(),
        "cache": {
            "folder": str(cache_dir or hub.default_cache()),
            "files": [{"source": f.source, "path": str(f.path), "holds": holds} for f, holds in hub.cached(cache_dir)],
        },
        "model": model and {"name": name, "weights": model.provenance()["weights"], "probe": model.probe()},
    }
    broken = any(p["problem"] for p in report["plugins"]) or any(not f["holds"] for f in report["cache"]["files"])
    broken |= model is not None and report["model"]["probe"]["state"] == "differs"
    if as_json:
        _print_json(report)
    else:
        for line in _doctor_lines(report):
            click.echo(line)
    ctx.exit(1 if broken else 0)


def _doctor_lines(report: dict[str, Any]) -> Iterator[str]:
    yield "installed  " + ", ".join(f"{name} {number}" for name, number in report["installed"].items())
    problems = [p for p in report["plugins"] if p["problem"]]
    yield f"plugins    {len(report['plugins']) - len(problems)} load, {len(problems)} do not"
    yield from (f"           {p['problem']}" for p in problems)
    yield f"cache      {report['cache']['folder']}: {len(report['cache']['files'])} files of weights"
    for file in report["cache"]["files"]:
        yield f"           {'holds' if file['holds'] else 'BROKEN'}  {file['source']}"
    if report["model"]:
        probe = report["model"]["probe"]
        difference = "" if probe["difference"] is None else f", largest difference {probe['difference']:.2g}"
        yield f"model      {report['model']['name']} loads; golden probe: {probe['state']}{difference}"


@main.command()
@_scans
@_model
@_with(_loading)
@_brain
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Results as .csv, .json or .jsonl.")
@click.option("--explain", "methods", multiple=True, metavar="METHOD", help="Saliency method, repeatable; with --maps.")
@_tasks
@_options
@click.option("--maps", type=click.Path(path_type=Path), metavar="DIR", help="Where maps of --explain are written.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Where brain masks are written.")
@_as_json
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    scans: tuple[Path, ...],
    name: str,
    brain: str,
    output: Path | None,
    methods: tuple[str, ...],
    tasks: tuple[str, ...],
    options: tuple[str, ...],
    maps: Path | None,
    masks: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Predict for every SCAN: a NIfTI file, a DICOM folder or .zip, or a folder of these."""
    from ichprog.results import results_file

    if bool(methods) != (maps is not None):
        raise click.UsageError("--explain and --maps go together: which method, and where its maps are written.")
    model = _load(name, brain, loading)
    chosen = _parsed(options)
    with ExitStack() as stack:
        add = stack.enter_context(results_file(output, model.spec)) if output else None
        failed = False
        for source, stem, examined in _examined(model, scans, brain):
            prediction = (
                model.failure(source, examined) if isinstance(examined, ScanError) else ichprog.predict(model, examined)
            )
            if add:
                add(prediction)
            click.echo(json.dumps(prediction.to_dict()) if as_json else _line(prediction))
            if isinstance(examined, ScanError):
                failed = True
                continue
            if not as_json:
                _say_warnings(examined)
            if masks:
                _save_mask(examined, masks / f"{stem}_brain.nii.gz")
            if maps:
                _save_maps(model, examined, maps, stem, tasks, methods, None, chosen)
    _say_notice(model)
    ctx.exit(1 if failed else 0)


@main.command()
@_scans
@_model
@_with(_loading)
@_brain
@_tasks
@click.option("--label", help="Label to explain; the task's last, the most severe, if absent.")
@click.option(
    "--method", "methods", multiple=True, default=["guided_backprop"], show_default=True,
    help="Saliency method, repeatable; `ichprog plugins` lists them.",
)  # fmt: skip
@_options
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="Folder for the maps.")
@_as_json
@click.pass_context
def explain(
    ctx: click.Context,
    /,
    scans: tuple[Path, ...],
    name: str,
    brain: str,
    tasks: tuple[str, ...],
    label: str | None,
    methods: tuple[str, ...],
    options: tuple[str, ...],
    output: Path,
    as_json: bool,
    **loading: Any,
) -> None:
    """Write saliency maps of every SCAN as NIfTI in the scan's own space."""
    model = _load(name, brain, loading)
    failed = False
    for source, stem, examined in _examined(model, scans, brain):
        if isinstance(examined, ScanError):
            failed = True
            click.echo(
                json.dumps(model.failure(source, examined).to_dict()) if as_json else f"{source}: {examined}",
                err=not as_json,
            )
            continue
        if not as_json:
            _say_warnings(examined)
        for path, saliency in _save_maps(model, examined, output, stem, tasks, methods, label, _parsed(options)):
            if as_json:
                click.echo(json.dumps(saliency.to_dict() | {"map": str(path)}))
            else:
                click.echo(f"{path}{'  (empty)' if saliency.empty else ''}")
    _say_notice(model)
    ctx.exit(1 if failed else 0)


def _load(name: str, brain: str, loading: dict[str, Any]) -> "Model":
    from ichprog.scan import refuse_unknown_mode

    refuse_unknown_mode(brain)
    return ichprog.load_model(name, **loading)


def _examined(model: "Model", paths: Iterable[Path], brain: Any) -> "Iterator[tuple[Path, str, Scan | ScanError]]":
    """Each scan behind the paths with a name for its files, read and checked, or what is wrong with it."""
    from tqdm import tqdm

    from ichprog.scan import find

    sources = list(dict.fromkeys(source for path in paths for source in find(path)))
    stems = _stems(sources)
    shown = sys.stderr.isatty() and len(sources) > 1
    with tqdm(total=len(sources), unit="scan", mininterval=0, file=sys.stderr) if shown else nullcontext() as bar:
        for source, stem in zip(sources, stems, strict=True):
            found: Scan | ScanError
            try:
                found = model.examine(source, brain=brain)
            except ScanError as error:
                found = error
            if bar is not None:
                bar.clear()  # its line is wanted for what is said of this scan
            yield source, stem, found
            if bar is not None:
                bar.update()


def _stems(sources: list[Path]) -> list[str]:
    """A name for each scan's files: its own without suffixes, with its folders' as far as that is needed."""
    parts = [[*source.resolve().parts[:-1], source.resolve().name] for source in sources]
    for names in parts:
        for suffix in (".nii.gz", ".nii", ".zip", ".dcm"):
            names[-1] = names[-1].removesuffix(suffix)
    for depth in range(1, max((len(names) for names in parts), default=1) + 1):
        stems = ["_".join(names[-depth:]) for names in parts]
        if len(set(stems)) == len(stems):
            return stems
    raise click.UsageError("Two of these scans differ only in their suffix, so their files would have one name.")


def _save_mask(examined: "Scan", path: Path) -> None:
    import nibabel as nib

    from ichprog.results import whole_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        nib.save(ichprog.brain_mask(examined), partial)


def _save_maps(
    model: "Model",
    examined: "Scan",
    folder: Path,
    stem: str,
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
    label: str | None,
    options: dict[str, Any],
) -> "list[tuple[Path, Saliency]]":
    folder.mkdir(parents=True, exist_ok=True)
    names = tasks or (model.spec.tasks[0].name,)
    found = ichprog.explain(model, examined, task=names, label=label, method=methods, **options)
    return [
        (saliency.save(folder / f"{stem}_{task}_{method}.nii.gz"), saliency)
        for (task, method), saliency in found.items()  # type: ignore[union-attr]  # several tasks give a dict
    ]


def _parsed(options: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE as given; a value is JSON where it can be read as such and text where not."""
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise click.UsageError(
                f"--option takes NAME=VALUE, such as layer=features.transition3.conv; got {option!r}."
            )
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed


def _line(prediction: "Prediction") -> str:
    """One scan's answers as a line of text."""
    if prediction.error is not None:
        return f"{prediction.scan}  FAILED  {prediction.error['message']}"
    said = []
    for name, task in prediction.tasks.items():
        spread = "" if task.std is None else f" ± {task.std[task.label]:.3f}"
        said.append(f"{name} {task.label} {task.probabilities[task.label]:.3f}{spread}")
    return f"{prediction.scan}  {'  '.join(said)}"


def _say_warnings(examined: "Scan") -> None:
    for warning in examined.warnings:
        click.echo(f"  {warning.code}: {warning.message}", err=True)


def _say_notice(model: "Model") -> None:
    click.echo(model.spec.notice, err=True)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
