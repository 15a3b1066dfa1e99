"""Predict and explain scans."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import ichprog
from ichprog.cli import process
from ichprog.cli.options import as_json, brain, loading, model_option, parse_assignments, with_options
from ichprog.errors import ScanError

if TYPE_CHECKING:
    from ichprog.model import Model
    from ichprog.results import Prediction, Saliency
    from ichprog.scan import Scan
    from ichprog.sources import ScanSource

_Result = TypeVar("_Result")
_LAYER = "layer=features.transition3.conv"

_scans = click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SCAN...")
_tasks = click.option(
    "--task", "tasks", multiple=True, help="Task to explain; repeatable. By default, the model's first task."
)
_options = click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE",
    help=f"Option of a saliency method; repeatable. Example: {_LAYER}.",
)  # fmt: skip


@click.command()
@_scans
@model_option
@with_options(loading)
@brain
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File of results: .csv, .json or .jsonl.")
@click.option(
    "--explain", "methods", multiple=True, metavar="METHOD", help="Saliency method; repeatable. Needs --maps."
)
@_tasks
@_options
@click.option("--maps", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the maps of --explain.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the brain masks.")
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
    """Predict every task for every SCAN.

    SCAN is a NIfTI file, a DICOM folder or a .zip of one, a folder of scans, or a table of patients (.csv).
    """
    from ichprog.results import results_file
    from ichprog.sources import patient_of

    if bool(methods) != (maps is not None):
        raise click.UsageError("--explain and --maps need each other: a saliency method, and a folder for its maps.")
    chosen = parse_assignments("--option", options, _LAYER)
    sources = _find_scans(scans)
    model = _load_model(name, brain, loading)
    has_failed = False
    with ExitStack() as stack:
        add = None
        if output:
            from_cohort = any(patient_of(source) is not None for source in sources)
            add = stack.enter_context(results_file(output, model.spec, with_patients=from_cohort))
        for _, stem, (prediction, examined) in _with_progress(sources, model.predict_iter(sources, brain=brain)):
            if add:
                add(prediction)
            click.echo(json.dumps(prediction.to_dict()) if as_json else _format_prediction(prediction))
            if isinstance(examined, ScanError):
                has_failed = True
                continue
            if not as_json:
                _print_warnings(examined)
            if masks:
                _save_mask(examined, masks / f"{stem}_brain.nii.gz")
            if maps:
                _save_maps(model, examined, maps, stem, tasks, methods, None, chosen)
    _print_notice(model)
    ctx.exit(1 if has_failed else 0)


@click.command()
@_scans
@model_option
@with_options(loading)
@brain
@_tasks
@click.option("--label", help="Label to explain. By default, the task's last label, which is the most severe.")
@click.option(
    "--method", "methods", multiple=True, default=["guided_backprop"], show_default=True,
    help="Saliency method; repeatable. `ichprog plugins` lists the methods.",
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
    chosen = parse_assignments("--option", options, _LAYER)
    sources = _find_scans(scans)
    model = _load_model(name, brain, loading)
    has_failed = False
    for source, stem, examined in _with_progress(sources, _examine(model, sources, brain)):
        if isinstance(examined, ScanError):
            has_failed = True
            failed = model.error_prediction(source, examined)
            click.echo(json.dumps(failed.to_dict()) if as_json else _format_prediction(failed), err=not as_json)
            continue
        if not as_json:
            _print_warnings(examined)
        for path, saliency in _save_maps(model, examined, output, stem, tasks, methods, label, chosen):
            if as_json:
                click.echo(json.dumps(saliency.to_dict() | {"map": str(path)}))
            else:
                click.echo(f"{path}{'  (empty)' if saliency.empty else ''}")
    _print_notice(model)
    ctx.exit(1 if has_failed else 0)


def _load_model(name: str, brain: str, loading: dict[str, Any]) -> "Model":
    from ichprog.model import resolve_brain

    resolve_brain(brain)
    model = ichprog.load_model(name, **loading)
    process.import_nibabel()
    return model


def _find_scans(paths: tuple[Path, ...]) -> "list[ScanSource]":
    """Return every scan behind the paths once, as `predict` resolves them."""
    from ichprog.sources import name_of, resolve

    resolved, _ = resolve(paths)
    return list({name_of(source): source for source in resolved}.values())


def _examine(model: "Model", sources: "list[ScanSource]", brain: Any) -> "Iterator[Scan | ScanError]":
    """Yield each scan, read and checked, or its error."""
    for source in sources:
        try:
            yield model.load_scan(source, brain=brain)
        except ScanError as error:
            yield error


def _with_progress(
    sources: "list[ScanSource]", results: Iterable[_Result]
) -> "Iterator[tuple[ScanSource, str, _Result]]":
    """Yield each scan with a stem for its files and its result, and show a progress bar on a terminal."""
    is_shown = sys.stderr.isatty() and len(sources) > 1
    with _progress_bar(len(sources)) if is_shown else nullcontext() as bar:
        for source, stem, result in zip(sources, _stems(sources), results, strict=True):
            if bar is not None:
                bar.clear()  # frees the line for the output of this scan
            yield source, stem, result
            if bar is not None:
                bar.update()


def _progress_bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="scan", mininterval=0, file=sys.stderr)


def _stems(sources: "list[ScanSource]") -> list[str]:
    """Return a stem for the files of each scan: its name, with as many folder names as make the stems unique."""
    from ichprog.sources import name_of

    paths = [Path(name_of(source)) for source in sources]
    parts = [[*path.resolve().parts[:-1], path.resolve().name] for path in paths]
    for names in parts:
        for suffix in (".nii.gz", ".nii", ".zip", ".dcm"):
            names[-1] = names[-1].removesuffix(suffix)
    for depth in range(1, max((len(names) for names in parts), default=1) + 1):
        stems = ["_".join(names[-depth:]) for names in parts]
        if len(set(stems)) == len(stems):
            return stems
    raise click.UsageError("Two scans differ only in their suffix, so their files would overwrite each other.")


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
    maps = ichprog.explain(model, examined, task=names, label=label, method=methods, **options)
    return [
        (saliency.save(folder / f"{stem}_{task}_{method}.nii.gz"), saliency)
        for (task, method), saliency in maps.items()
    ]


def _format_prediction(prediction: "Prediction") -> str:
    """Return one line: the patient, the scan, and each task's label with its probability, or the error."""
    name = prediction.scan if prediction.patient is None else f"{prediction.patient}  {prediction.scan}"
    if prediction.error is not None:
        return f"{name}  FAILED  {prediction.error['message']}"
    answers = []
    for task_name, task in prediction.tasks.items():
        spread = "" if task.std is None else f" ± {task.std[task.label]:.3f}"
        answers.append(f"{task_name} {task.label} {task.probabilities[task.label]:.3f}{spread}")
    return "  ".join([name, *answers])


def _print_warnings(examined: "Scan") -> None:
    for warning in examined.warnings:
        click.echo(f"{examined.name}: {warning.code}: {warning.message}", err=True)


def _print_notice(model: "Model") -> None:
    if model.fallback_reason is not None:
        click.echo(f"Run by {model.runtime} in {model.precision}: {model.fallback_reason}.", err=True)
    click.echo(model.spec.notice, err=True)
