"""Predict and explain scans."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ichprog
from ichprog import zoo
from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.compilation import ModelLoader
from ichprog.cli.dicom_objects import check_sources, dicom_out, write_objects
from ichprog.cli.options import as_json, brain, find_spec, loading, model_option, parse_assignments, with_options
from ichprog.cli.reports import ReportFolder, report_options
from ichprog.cli.scan_runs import (
    ResultsOptions,
    ScoreComputer,
    dicom_options,
    find_scans,
    format_clinical,
    format_haemorrhage,
    format_reliability,
    format_scores,
    format_warnings,
    has_patients,
    key_of,
    output,
    print_limits,
    print_notice,
    print_outputs,
    read_clinical,
    resume_options,
    save_image,
    scans_argument,
    score_options,
    stems,
    take_shard,
)
from ichprog.cli.workers import ScanOutput, Workers, with_workers
from ichprog.errors import RunError, ScanError
from ichprog.result_files import prediction_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ichprog.clinical_scores import ClinicalScores
    from ichprog.model import Model
    from ichprog.result_files import ResultsTable
    from ichprog.results import Prediction, Saliency
    from ichprog.scan import Scan
    from ichprog.sources import ScanSource

    Maps = dict[tuple[str, str], Saliency]

_LAYER = "layer=features.transition3.conv"
_SETTINGS = ".explain.json"  # in the folder of the maps

_tasks = click.option(
    "--task", "tasks", multiple=True, help="Task to explain; repeatable. By default, the model's first task.",
    shell_complete=completion.tasks,
)  # fmt: skip
_options = click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE",
    help=f"Option of a saliency method; repeatable. Example: {_LAYER}.",
)  # fmt: skip


@click.command(
    cls=Command,
    interrupted="Nothing is kept without -o. Repeat the command with -o FILE, which --resume continues.",
    epilog=examples(
        "predict scan.nii.gz",
        "predict scans/ -m local-dir:run -o results.csv --resume",
        "predict export.zip --haemorrhage --explain grad_cam --maps maps --report reports",
    ),
)
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
    shell_complete=completion.models,
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
    "--explain",
    "methods",
    multiple=True,
    metavar="METHOD",
    shell_complete=completion.plugins("saliency"),
    help="Saliency method; repeatable. Needs --maps, --report or --dicom-out.",
)
@_tasks
@_options
@click.option("--maps", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the maps of --explain.")
@click.option(
    "--masks", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the masks of brains and haemorrhages."
)
@with_options(report_options)
@dicom_out
@with_workers
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
    report: Path | None,
    identifiers: bool,
    pdf: bool,
    dicom_out: Path | None,
    pool: Workers,
    as_json: bool,
    **loading: Any,
) -> None:
    """Predict every task for every SCAN.

    SCAN is a NIfTI file, a DICOM folder or a .zip of one, a folder of scans, or a table of patients (.csv).
    """
    _check_maps(methods, maps, report, dicom_out)
    if detector_name != zoo.DETECTOR and not (haemorrhage or scores):
        raise click.UsageError("--haemorrhage-model needs --haemorrhage or --scores.")
    results = ResultsOptions(output, resume, retry_failed, overwrite)
    chosen = _MapOptions(tasks, methods, parse_assignments("--option", options, _LAYER))
    sources = take_shard(find_scans(scans, study=study, series=series), shard)
    check_sources(sources, dicom_out)
    given = read_clinical(clinical, sources)
    for_model, for_scores = _split_clinical(given, name, with_scores=scores)
    computer = ScoreComputer(sources, for_scores, is_requested=scores)
    reports = ReportFolder(report, [*map(key_of, sources)], has_pdf=pdf, has_identifiers=identifiers)
    loader = ModelLoader(sources, pool, shard)
    model = loader.load(name, brain, loading, explain=bool(methods))
    detector = loader.load(detector_name, brain, {**loading, "fold": None}) if haemorrhage or scores else None
    table = prediction_table(
        model.spec, with_patients=has_patients(sources), detector=None if detector is None else detector.spec,
        score_columns=computer.columns,
    )  # fmt: skip
    work = _PredictScan(
        model,
        detector,
        brain,
        for_model,
        coverage,
        computer,
        table,
        results.suffix,
        chosen,
        maps,
        masks,
        reports,
        dicom_out,
        as_json,
    )
    models = {"model": model.spec.name} | ({} if detector is None else {"detector": detector.spec.name})
    run = models | {
        "weights": [file.sha256 for file in model.weights], "precision": model.precision, "brain": str(brain),
        "clinical": for_model, "coverage": coverage, "scores": for_scores if scores else None,
    }  # fmt: skip
    with reports, results.open(table, run, sources) as (file, todo):
        has_failed = print_outputs(
            work, sources, todo, pool, file=file, has_files=any((output, maps, masks, report, dicom_out))
        )
    reports.print_path()
    if detector is not None and not as_json:
        print_limits(detector)
    print_notice(model)
    loader.compile_in_background()
    ctx.exit(1 if has_failed else 0)


def _check_maps(methods: tuple[str, ...], maps: Path | None, *others: Path | None) -> None:
    """Check that saliency methods and the folders for their maps suit each other."""
    if methods and not any((maps, *others)):
        raise click.UsageError("--explain needs --maps, --report or --dicom-out: a folder for the maps.")
    if maps is not None and not methods:
        raise click.UsageError("--maps needs --explain: a saliency method.")


@dataclass(frozen=True)
class _MapOptions:
    """The saliency maps of each scan.

    Attributes:
        tasks: Tasks to explain; empty for the first one of the model.
        methods: Saliency methods; empty for no maps.
        options: Options of the methods.
        label: The label to explain, or None for the last one of each task.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    options: dict[str, Any]
    label: str | None = None

    def compute(self, model: "Model", scan: "Scan", known: "Mapping[str, float]") -> "Maps":
        """Return the maps of a scan by task and method."""
        if not self.methods:
            return {}
        names = self.tasks or (model.spec.tasks[0].name,)
        return ichprog.explain(
            model, scan, task=names, label=self.label, method=self.methods, clinical=known, **self.options
        )


def _save_maps(maps: "Maps", folder: Path, stem: str) -> "list[tuple[Path, Saliency]]":
    """Write the maps of a scan, and return each with its path."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        (saliency.save(folder / f"{stem}_{task}_{method}.nii.gz"), saliency)
        for (task, method), saliency in maps.items()
    ]


@dataclass(frozen=True)
class _PredictScan:
    """What `ichprog predict` does with each scan."""

    model: "Model"
    detector: "Model | None"
    brain: Any
    clinical: dict[str, Any]
    coverage: float | None
    computer: ScoreComputer
    table: "ResultsTable"
    suffix: str | None
    explanation: _MapOptions
    maps: Path | None
    masks: Path | None
    reports: ReportFolder
    dicom_out: Path | None
    as_json: bool

    def results(self, sources: "list[ScanSource]") -> "Iterator[tuple[Prediction, Scan | ScanError]]":
        """Yield the prediction of each scan."""
        return self.model.predict_iter(
            sources, brain=self.brain, detector=self.detector, clinical=self.clinical, coverage=self.coverage
        )

    def error_result(self, source: "ScanSource", error: ScanError) -> "Prediction":
        """Return the prediction of a scan with an error."""
        return self.model.error_prediction(source, error)

    def finish(
        self, source: "ScanSource", stem: str, prediction: "Prediction", examined: "Scan | ScanError"
    ) -> ScanOutput:
        """Write the masks, maps and report of a scan, and return its prediction as text and entry."""
        computed, saliency, problem = self.computer.scores(source, prediction.haemorrhage), {}, ""
        if not isinstance(examined, ScanError):
            if self.masks:
                save_image(ichprog.brain_mask(examined), self.masks / f"{stem}_brain.nii.gz")
                if prediction.haemorrhage is not None:
                    save_image(prediction.haemorrhage.mask, self.masks / f"{stem}_haemorrhage.nii.gz")
            used = {} if prediction.clinical is None else prediction.clinical.used
            saliency = self.explanation.compute(self.model, examined, used)
            if self.maps:
                _save_maps(saliency, self.maps, stem)
            if self.dicom_out:
                maps, folder = list(saliency.values()), self.dicom_out / stem
                problem = write_objects(prediction, examined, source, maps, folder)
        self.reports.add_prediction(source, prediction, computed, self.model.spec, examined, saliency)
        text, messages = _describe_prediction(prediction, computed, as_json=self.as_json)
        entry = None if self.suffix is None else self.table.entry(prediction, computed, self.suffix)
        messages = "\n".join(filter(None, (messages, problem)))
        return ScanOutput(text, messages, entry, isinstance(examined, ScanError) or bool(problem))


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


@click.command(
    cls=Command,
    epilog=examples("explain scan.nii.gz --method grad_cam --method guided_backprop --png -o maps"),
    interrupted="Finished maps are kept. Continue with --resume.",
)
@scans_argument
@model_option
@with_options(loading)
@brain
@with_options(dicom_options)
@_tasks
@click.option("--label", help="Label to explain, of one task. By default, its last label, which is the most severe.")
@click.option(
    "--method", "methods", multiple=True, default=["guided_backprop"], show_default=True,
    shell_complete=completion.plugins("saliency"),
    help="Saliency method; repeatable. `ichprog plugins` lists the methods.",
)  # fmt: skip
@_options
@click.option(
    "--clinical",
    multiple=True,
    metavar="NAME=VALUE",
    shell_complete=completion.clinical,
    help="Clinical value of the patient, which stays fixed; repeatable.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder for the maps. By default, the current one.",
)
@click.option("--png", is_flag=True, help="Also draw the maps of each scan over its slices.")
@click.option(
    "--labels", "percent", type=click.FloatRange(0, 100, min_open=True), metavar="PERCENT",
    help="Also write where each map is strongest: 1 and 2 in the PERCENT of brain voxels that raise and lower most.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Explain only scans whose maps and pictures are not there yet.")
@with_workers
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
    percent: float | None,
    resume: bool,
    pool: Workers,
    as_json: bool,
    **loading: Any,
) -> None:
    """Write saliency maps of every SCAN as NIfTI in the scan's own space."""
    maps = _MapOptions(tasks, methods, parse_assignments("--option", options, _LAYER), label)
    sources = find_scans(scans, study=study, series=series)
    given = read_clinical(clinical, sources)
    loader = ModelLoader(sources, pool)
    model = loader.load(name, brain, loading, explain=True)
    for source in sources:
        model.clinical_values(source, given)  # refuses wrong ones before a scan is read
    _record_settings(
        output,
        {
            "model": model.spec.name, "weights": [file.sha256 for file in model.weights], "brain": str(brain),
            "clinical": given, "label": label, "options": maps.options, **({"labels": percent} if percent else {}),
        },
        resume=resume,
    )  # fmt: skip
    todo = sources
    if resume:
        names = tasks or (model.spec.tasks[0].name,)
        kinds = ["", "_labels"] if percent else [""]
        suffixes = [f"{kind}_{task}_{method}.nii.gz" for kind in kinds for task in names for method in methods]
        suffixes += [".png"] * png
        missing = [not all((output / (stem + suffix)).is_file() for suffix in suffixes) for stem in stems(sources)]
        todo = list(itertools.compress(sources, missing))
        click.echo(f"{len(sources) - len(todo)} of {len(sources)} scans have their maps in {output}.", err=True)
    has_failed = print_outputs(
        _ExplainScan(model, brain, given, maps, output, png, percent, as_json), sources, todo, pool
    )
    print_notice(model)
    loader.compile_in_background()
    ctx.exit(1 if has_failed else 0)


def _record_settings(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Record what the maps of a folder depend on, and refuse to resume those that depend on something else."""
    from ichprog.io import write_json
    from ichprog.journal import check_run

    path, existing = folder / _SETTINGS, dict[str, Any]()
    if resume and path.is_file():
        existing = _read_settings(path)
        known = {name: value for name, value in settings.items() if name in existing}
        check_run(folder, known, existing, "Choose another folder, or compute all maps again without --resume.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, existing | settings)


def _read_settings(path: Path) -> dict[str, Any]:
    """Read what the maps of a folder depend on."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path} is damaged. Choose another folder, or compute all maps again without --resume."
        ) from error


@dataclass(frozen=True)
class _ExplainScan:
    """What `ichprog explain` does with each scan."""

    model: "Model"
    brain: Any
    clinical: dict[str, Any]
    maps: _MapOptions
    folder: Path
    png: bool
    percent: float | None
    as_json: bool

    def results(self, sources: "list[ScanSource]") -> "Iterator[tuple[Scan | ScanError, Scan | ScanError]]":
        """Yield each scan, read and checked, or its error, twice: there is no other result yet."""
        for source in sources:
            found: Scan | ScanError
            try:
                found = self.model.load_scan(source, brain=self.brain)
            except ScanError as error:
                found = error
            yield found, found

    def error_result(self, source: "ScanSource", error: ScanError) -> ScanError:  # noqa: ARG002  # the error names it
        """Return the error of a scan."""
        return error

    def finish(self, source: "ScanSource", stem: str, _: Any, examined: "Scan | ScanError") -> ScanOutput:
        """Write the maps of a scan, and return their paths as text."""
        if isinstance(examined, ScanError):
            failed = self.model.error_prediction(source, examined)
            if self.as_json:
                return ScanOutput(json.dumps(failed.to_dict()), has_failed=True)
            return ScanOutput(messages=_format_prediction(failed), has_failed=True)
        known = self.model.clinical_values(source, self.clinical)
        written, lines = _save_maps(self.maps.compute(self.model, examined, known), self.folder, stem), []
        if self.png:
            picture = _draw_maps([saliency for _, saliency in written], examined, self.folder / f"{stem}.png")
            lines += [] if self.as_json else [str(picture)]
        for path, saliency in written:
            paths = {"map": path}
            if self.percent is not None:
                paths["labels"] = self.folder / f"{stem}_labels_{saliency.task}_{saliency.method}.nii.gz"
                save_image(saliency.labels(self.percent), paths["labels"])
            if self.as_json:
                lines.append(json.dumps(saliency.to_dict() | {key: str(each) for key, each in paths.items()}))
            else:
                lines += [f"{each}{'  (empty)' if saliency.empty else ''}" for each in paths.values()]
        warnings = [] if self.as_json else format_warnings(examined.name, examined.warnings)
        return ScanOutput("\n".join(lines), "\n".join(warnings))


def _draw_maps(maps: "list[Saliency]", scan: "Scan", target: Path) -> Path:
    """Draw maps over the slices of their scan."""
    from ichprog.io import atomic_write

    figure = ichprog.plot(maps, scan)
    with atomic_write(target, sole_writer=True) as partial:
        figure.savefig(partial, dpi=110)
    return target


def _describe_prediction(
    prediction: "Prediction", scores: "ClinicalScores | None", *, as_json: bool
) -> tuple[str, str]:
    """Return a prediction with its scores, and as text also its warnings and those of its haemorrhage."""
    from ichprog.results import with_scores

    if as_json:
        return json.dumps(with_scores(prediction, scores)), ""
    lines = [_format_prediction(prediction)]
    if prediction.clinical is not None:
        lines.append(format_clinical(prediction.clinical))
    if prediction.coverage is not None:
        lines.append(format_reliability(prediction))
    if scores is not None:
        lines.append(format_scores(scores))
    warnings = list(prediction.warnings)
    if prediction.haemorrhage is not None:
        warnings += [warning for warning in prediction.haemorrhage.warnings if warning not in prediction.warnings]
    return "\n".join(lines), "\n".join(format_warnings(prediction.scan, warnings))


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
