"""The two questions to a model: predict and explain."""

import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import ichprog
from ichprog.cli.options import as_json, brain, loading, model_option, parsed, with_options
from ichprog.errors import ScanError

if TYPE_CHECKING:
    from ichprog.model import Model
    from ichprog.results import Prediction, Saliency
    from ichprog.scan import Scan

_Result = TypeVar("_Result")
_LAYER = "layer=features.transition3.conv"

_scans = click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SCAN...")
_tasks = click.option(
    "--task", "tasks", multiple=True, help="Task to explain, repeatable; the model's first if absent."
)
_options = click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE",
    help=f"Option of a saliency method, repeatable, such as {_LAYER}.",
)  # fmt: skip


@click.command()
@_scans
@model_option
@with_options(loading)
@brain
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Results as .csv, .json or .jsonl.")
@click.option("--explain", "methods", multiple=True, metavar="METHOD", help="Saliency method, repeatable; with --maps.")
@_tasks
@_options
@click.option("--maps", type=click.Path(path_type=Path), metavar="DIR", help="Where maps of --explain are written.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Where brain masks are written.")
@as_json
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    scans: tuple[Path, ...],
    name: str,
    brain: Any,
    output: Path | None,
    methods: tuple[str, ...],
    tasks: tuple[str, ...],
    options: tuple[str, ...],
    maps: Path | None,
    masks: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Predict for every SCAN: a NIfTI file, a DICOM folder or .zip, a folder of these, or a cohort.csv."""
    from ichprog.results import results_file

    if bool(methods) != (maps is not None):
        raise click.UsageError("--explain and --maps go together: which method, and where its maps are written.")
    sources = _sources(scans)
    model = _load(name, brain, loading)
    chosen = parsed("--option", options, _LAYER)
    with ExitStack() as stack:
        add = stack.enter_context(results_file(output, model.spec)) if output else None
        failed = False
        for _, stem, (prediction, examined) in _each(sources, model.predict_iter(sources, brain=brain)):
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


@click.command()
@_scans
@model_option
@with_options(loading)
@brain
@_tasks
@click.option("--label", help="Label to explain; the task's last, the most severe, if absent.")
@click.option(
    "--method", "methods", multiple=True, default=["guided_backprop"], show_default=True,
    help="Saliency method, repeatable; `ichprog plugins` lists them.",
)  # fmt: skip
@_options
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="Folder for the maps.")
@as_json
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
    sources = _sources(scans)
    model = _load(name, brain, loading)
    chosen = parsed("--option", options, _LAYER)
    failed = False
    for source, stem, examined in _each(sources, _examined(model, sources, brain)):
        if isinstance(examined, ScanError):
            failed = True
            click.echo(
                json.dumps(model.error_prediction(source, examined).to_dict()) if as_json else f"{source}: {examined}",
                err=not as_json,
            )
            continue
        if not as_json:
            _say_warnings(examined)
        for path, saliency in _save_maps(model, examined, output, stem, tasks, methods, label, chosen):
            if as_json:
                click.echo(json.dumps(saliency.to_dict() | {"map": str(path)}))
            else:
                click.echo(f"{path}{'  (empty)' if saliency.empty else ''}")
    _say_notice(model)
    ctx.exit(1 if failed else 0)


def _load(name: str, brain: str, loading: dict[str, Any]) -> "Model":
    from ichprog.scan import validate_brain_mode

    validate_brain_mode(brain)
    model = ichprog.load_model(name, **loading)
    click.get_current_context().find_root().obj = model  # is in use until the process ends, and not taken apart before
    _import_nibabel()
    return model


def _import_nibabel() -> None:
    """Imports nibabel without pydicom, which it looks for in case a header holds DICOM, at more than its own cost.

    Nothing here reads such headers, and DICOM is read by pydicom itself.
    """
    if not {"nibabel", "pydicom"} & sys.modules.keys():
        sys.modules["pydicom"] = None  # type: ignore[assignment]  # is not found then, which nibabel allows for
        try:
            importlib.import_module("nibabel")
        finally:
            del sys.modules["pydicom"]


def _sources(paths: Iterable[Path]) -> list[Path]:
    """Every scan behind the paths, once: a cohort's in the order of its rows, whether they are there or not."""
    from ichprog.scan import find_scans

    sources: list[Path] = []
    for path in paths:
        if path.suffix.lower() == ".csv":
            from ichprog.cohort import Cohort

            sources += [patient.scan for patient in Cohort.read(path, scans=False).patients]
        else:
            sources += find_scans(path)
    return list(dict.fromkeys(sources))


def _examined(model: "Model", sources: list[Path], brain: Any) -> "Iterator[Scan | ScanError]":
    """Each scan read and checked, or what is wrong with it."""
    for source in sources:
        try:
            yield model.load_scan(source, brain=brain)
        except ScanError as error:
            yield error


def _each(sources: list[Path], results: Iterable[_Result]) -> Iterator[tuple[Path, str, _Result]]:
    """Each scan with a name for its files and its result, under a bar where there is somebody to see it."""
    shown = sys.stderr.isatty() and len(sources) > 1
    with _bar(len(sources)) if shown else nullcontext() as bar:
        for source, stem, result in zip(sources, _stems(sources), results, strict=True):
            if bar is not None:
                bar.clear()  # its line is wanted for what is said of this scan
            yield source, stem, result
            if bar is not None:
                bar.update()


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="scan", mininterval=0, file=sys.stderr)


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

    from ichprog.io import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
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
        for (task, method), saliency in found.items()
    ]


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
    if model.fallback_reason is not None:
        click.echo(f"Run by {model.runtime} in {model.precision}: {model.fallback_reason}.", err=True)
    click.echo(model.spec.notice, err=True)
