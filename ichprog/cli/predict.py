"""Predict and explain scans."""

import itertools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ichprog
from ichprog import zoo
from ichprog.cli.options import as_json, brain, find_spec, loading, model_option, parse_assignments, with_options
from ichprog.cli.scans import (
    ScoreComputer,
    check_resume,
    dicom_options,
    find_scans,
    format_clinical,
    format_haemorrhage,
    format_reliability,
    format_scores,
    key_of,
    load_model,
    open_results,
    output,
    print_limits,
    print_line,
    print_notice,
    print_warnings,
    read_clinical,
    resume_options,
    save_image,
    scans_argument,
    score_options,
    stems,
    take_shard,
    with_progress,
)
from ichprog.errors import ScanError

if TYPE_CHECKING:
    from ichprog.clinical_scores import ClinicalScores
    from ichprog.model import Model
    from ichprog.result_files import ResultsFile
    from ichprog.results import Prediction, Saliency
    from ichprog.scan import Scan
    from ichprog.sources import ScanSource

_LAYER = "layer=features.transition3.conv"

_tasks = click.option(
    "--task", "tasks", multiple=True, help="Task to explain; repeatable. By default, the model's first task."
)
_options = click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE",
    help=f"Option of a saliency method; repeatable. Example: {_LAYER}.",
)  # fmt: skip


@click.command()
@scans_argument
@model_option
@with_options(loading)
@brain
@with_options(dicom_options)
@output
@click.option("--haemorrhage", is_flag=True, help="Find the haemorrhage of each scan as well.")
@click.option(
    "--haemorrhage-model",
    "detector_name",
    default=zoo.DETECTOR,
    show_default=True,
    metavar="NAME",
    help="Model for --haemorrhage and --scores.",
)
@with_options(resume_options)
@with_options(score_options)
@click.option(
    "--coverage", type=float, metavar="SHARE",
    help="Probability with which the set of labels holds the true one, for a calibrated model; 0.9 by default.",
)  # fmt: skip
@click.option(
    "--explain", "methods", multiple=True, metavar="METHOD", help="Saliency method; repeatable. Needs --maps."
)
@_tasks
@_options
@click.option("--maps", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the maps of --explain.")
@click.option(
    "--masks", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the masks of brains and haemorrhages."
)
@as_json
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    scans: tuple[Path, ...],
    name: str,
    brain: Any,
    study: str | None,
    series: str | None,
    output: Path | None,
    haemorrhage: bool,
    detector_name: str,
    resume: bool,
    retry_failed: bool,
    overwrite: bool,
    shard: str | None,
    scores: bool,
    clinical: tuple[str, ...],
    coverage: float | None,
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
    if bool(methods) != (maps is not None):
        raise click.UsageError("--explain and --maps need each other: a saliency method, and a folder for its maps.")
    if detector_name != zoo.DETECTOR and not (haemorrhage or scores):
        raise click.UsageError("--haemorrhage-model needs --haemorrhage or --scores.")
    chosen = parse_assignments("--option", options, _LAYER)
    check_resume(output, resume=resume, retry_failed=retry_failed, overwrite=overwrite)
    sources = take_shard(find_scans(scans, study=study, series=series), shard)
    given = read_clinical(clinical, sources)
    for_model, for_scores = _split_clinical(given, name, with_scores=scores)
    computer = ScoreComputer(sources, for_scores, is_requested=scores)
    model = load_model(name, brain, loading)
    detector = load_model(detector_name, brain, {**loading, "fold": None}) if haemorrhage or scores else None
    has_failed, has_files = False, any((output, maps, masks))
    settings = {
        "weights": [file.sha256 for file in model.weights], "precision": model.precision, "brain": str(brain),
        "clinical": for_model, "coverage": coverage, "scores": for_scores if scores else None,
    }  # fmt: skip
    choices = {"resume": resume, "retry_failed": retry_failed, "overwrite": overwrite}
    opened = (
        None
        if output is None
        else _results_file(output, model, detector, sources, settings, choices, with_scores=scores)
    )
    with open_results(opened, sources) as (file, todo):
        results = model.predict_iter(todo, brain=brain, detector=detector, clinical=for_model, coverage=coverage)
        for source, stem, (prediction, examined) in with_progress(sources, results, todo):
            computed = computer.scores(source, prediction.haemorrhage)
            _print_prediction(prediction, computed, as_json=as_json, has_files=has_files)
            if isinstance(examined, ScanError):
                if file is not None:
                    file.add(prediction, computed)
                has_failed = True
                continue
            if masks:
                save_image(ichprog.brain_mask(examined), masks / f"{stem}_brain.nii.gz")
                if prediction.haemorrhage is not None:
                    save_image(prediction.haemorrhage.mask, masks / f"{stem}_haemorrhage.nii.gz")
            if maps:
                used = {} if prediction.clinical is None else {"clinical": prediction.clinical.used}
                _save_maps(model, examined, maps, stem, tasks, methods, None, chosen | used)
            if file is not None:  # last, so that a scan with a result has its maps and masks
                file.add(prediction, computed)
        has_failed |= file is not None and "failed" in file.done.values()
    if detector is not None and not as_json:
        print_limits(detector)
    print_notice(model)
    ctx.exit(1 if has_failed else 0)


def _split_clinical(given: dict[str, Any], model: str, *, with_scores: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the clinical values for the model, and those for the scores; many are for both."""
    if not given:
        return {}, {}
    columns = [value.column for value in find_spec(model).clinical]
    if not columns and not with_scores:
        raise click.UsageError(f"--clinical needs --scores, or a model with clinical values. {model} has none.")
    if not with_scores:
        return given, {}
    from ichprog.clinical_scores import CLINICAL_COLUMNS

    only_model = set(columns) - set(CLINICAL_COLUMNS.values())
    return (
        {name: value for name, value in given.items() if name in columns},
        {name: value for name, value in given.items() if name not in only_model},
    )


def _results_file(
    output: Path,
    model: "Model",
    detector: "Model | None",
    sources: "list[ScanSource]",
    settings: dict[str, Any],
    choices: dict[str, bool],
    *,
    with_scores: bool,
) -> "AbstractContextManager[ResultsFile]":
    """Return the file of results, which a context opens."""
    from ichprog.clinical_scores import SCORE_COLUMNS
    from ichprog.result_files import results_file
    from ichprog.sources import patient_of

    return results_file(
        output,
        model.spec,
        with_patients=any(patient_of(source) is not None for source in sources),
        detector=None if detector is None else detector.spec,
        score_columns=SCORE_COLUMNS if with_scores else (),
        order=[key_of(source) for source in sources],
        settings=settings,
        **choices,
    )


@click.command()
@scans_argument
@model_option
@with_options(loading)
@brain
@with_options(dicom_options)
@_tasks
@click.option("--label", help="Label to explain. By default, the task's last label, which is the most severe.")
@click.option(
    "--method", "methods", multiple=True, default=["guided_backprop"], show_default=True,
    help="Saliency method; repeatable. `ichprog plugins` lists the methods.",
)  # fmt: skip
@_options
@click.option(
    "--clinical",
    multiple=True,
    metavar="NAME=VALUE",
    help="Clinical value of the patient, which stays fixed; repeatable.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="Folder for the maps.")
@click.option("--png", is_flag=True, help="Also draw the maps of each scan over its slices.")
@click.option("--resume", is_flag=True, help="Explain only scans whose maps are not there yet.")
@as_json
@click.pass_context
def explain(
    ctx: click.Context,
    /,
    scans: tuple[Path, ...],
    name: str,
    brain: str,
    study: str | None,
    series: str | None,
    tasks: tuple[str, ...],
    label: str | None,
    methods: tuple[str, ...],
    options: tuple[str, ...],
    clinical: tuple[str, ...],
    output: Path,
    png: bool,
    resume: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Write saliency maps of every SCAN as NIfTI in the scan's own space."""
    chosen = parse_assignments("--option", options, _LAYER)
    sources = find_scans(scans, study=study, series=series)
    given = read_clinical(clinical, sources)
    model = load_model(name, brain, loading)
    values = [model.clinical_values(source, given) for source in sources]  # refuses wrong ones before a scan is read
    todo = list(zip(sources, values, strict=True))
    if resume:
        names = tasks or (model.spec.tasks[0].name,)
        suffixes = [f"_{task}_{method}.nii.gz" for task in names for method in methods] + [".png"] * png
        missing = [not all((output / (stem + suffix)).is_file() for suffix in suffixes) for stem in stems(sources)]
        todo = list(itertools.compress(todo, missing))
        click.echo(f"{len(sources) - len(todo)} of {len(sources)} scans have their maps in {output}.", err=True)
    has_failed, left = False, [source for source, _ in todo]
    results = with_progress(sources, _examine(model, left, brain), left)
    for (source, stem, examined), (_, known) in zip(results, todo, strict=True):
        if isinstance(examined, ScanError):
            has_failed = True
            failed = model.error_prediction(source, examined)
            click.echo(json.dumps(failed.to_dict()) if as_json else _format_prediction(failed), err=not as_json)
            continue
        if not as_json:
            print_warnings(examined.name, examined.warnings)
        options_of_scan = chosen | {"clinical": known}
        written = _save_maps(model, examined, output, stem, tasks, methods, label, options_of_scan)
        if png:
            picture = _draw_maps([saliency for _, saliency in written], examined, output / f"{stem}.png")
            if not as_json:
                click.echo(str(picture))
        for path, saliency in written:
            if as_json:
                click.echo(json.dumps(saliency.to_dict() | {"map": str(path)}))
            else:
                click.echo(f"{path}{'  (empty)' if saliency.empty else ''}")
    print_notice(model)
    ctx.exit(1 if has_failed else 0)


def _examine(model: "Model", sources: "list[ScanSource]", brain: Any) -> "Iterator[Scan | ScanError]":
    """Yield each scan, read and checked, or its error."""
    for source in sources:
        try:
            yield model.load_scan(source, brain=brain)
        except ScanError as error:
            yield error


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


def _draw_maps(maps: "list[Saliency]", scan: "Scan", target: Path) -> Path:
    """Draw maps over the slices of their scan."""
    from ichprog.io import atomic_write

    figure = ichprog.plot(maps, scan)
    with atomic_write(target) as partial:
        figure.savefig(partial, dpi=110)
    return target


def _print_prediction(
    prediction: "Prediction", scores: "ClinicalScores | None", *, as_json: bool, has_files: bool
) -> None:
    """Print a prediction with its scores, and as text also its warnings and those of its haemorrhage."""
    from ichprog.results import with_scores

    if as_json:
        print_line(json.dumps(with_scores(prediction, scores)), has_files=has_files)
        return
    lines = [_format_prediction(prediction)]
    if prediction.clinical is not None:
        lines.append(format_clinical(prediction.clinical))
    if prediction.coverage is not None:
        lines.append(format_reliability(prediction))
    if scores is not None:
        lines.append(format_scores(scores))
    print_line("\n".join(lines), has_files=has_files)
    print_warnings(prediction.scan, prediction.warnings)
    if prediction.haemorrhage is not None:
        others = [warning for warning in prediction.haemorrhage.warnings if warning not in prediction.warnings]
        print_warnings(prediction.scan, others)


def _format_prediction(prediction: "Prediction") -> str:
    """Return one line: the patient, the scan, and each task's label with its probability, or the error."""
    name = prediction.scan if prediction.patient is None else f"{prediction.patient}  {prediction.scan}"
    if prediction.error is not None:
        return f"{name}  FAILED  {prediction.error['message']}"
    answers = []
    for task_name, task in prediction.tasks.items():
        spread = "" if task.std is None else f" ± {task.std[task.label]:.3f}"
        answers.append(f"{task_name} {task.label} {task.probabilities[task.label]:.3f}{spread}")
    if prediction.haemorrhage is not None:
        answers.append(format_haemorrhage(prediction.haemorrhage))
    return "  ".join([name, *answers])
