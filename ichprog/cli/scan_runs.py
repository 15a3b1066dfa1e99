"""Share between commands how scans are found, and how progress, files, warnings and clinical scores are written."""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ichprog
from ichprog.cli import completion, process, progress
from ichprog.cli.options import parse_assignments
from ichprog.errors import CohortError, InvalidValueError

if TYPE_CHECKING:
    import nibabel as nib

    from ichprog.cli.workers import ScanWork, Workers
    from ichprog.clinical_scores import ClinicalScores, ScoreRange, ScoreVariable
    from ichprog.errors import ScanWarning
    from ichprog.model import Model
    from ichprog.result_files import ResultsFile, ResultsTable
    from ichprog.results import ClinicalUse, Haemorrhage, Prediction
    from ichprog.sources import ScanSource

_CLINICAL_EXAMPLE = "location=lobar"

scans_argument = click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SCAN...")
output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File of results: .csv, .parquet, .json or .jsonl."
)
dicom_options = [
    click.option(
        "--study", metavar="NAME", help="Take only this DICOM study: a pseudonym from `ichprog scans`, or a UID."
    ),
    click.option(
        "--series", metavar="NAME", help="Read this DICOM series, by number, pseudonym or UID, instead of the best."
    ),
]
resume_options = [
    click.option("--resume", is_flag=True, help="Continue an interrupted run, or add scans to a finished one."),
    click.option("--retry-failed", is_flag=True, help="With --resume, also try the scans that failed."),
    click.option("--overwrite", is_flag=True, help="Replace results that exist."),
    click.option(
        "--shard", metavar="K/N", help="Take only every N-th scan, from the K-th; for N jobs on several machines."
    ),
]
score_options = [
    click.option("--scores", is_flag=True, help="Compute the ICH and FUNC scores of each patient."),
    click.option(
        "--clinical", multiple=True, metavar="NAME=VALUE", shell_complete=completion.clinical,
        help=f"Clinical value of the only patient; repeatable. Example: {_CLINICAL_EXAMPLE}.",
    ),
]  # fmt: skip


def load_model(name: str, brain: str, loading: dict[str, Any]) -> "Model":
    """Check the brain option, load a model, and import what reads scans."""
    from ichprog.model import resolve_brain

    resolve_brain(brain)
    model = ichprog.load_model(name, **loading)
    process.import_nibabel()
    return model


def find_scans(paths: tuple[Path, ...], *, study: str | None = None, series: str | None = None) -> "list[ScanSource]":
    """Return every scan behind the paths once, as `predict` resolves them.

    Args:
        paths: Files, folders and tables.
        study: Pseudonym or Study Instance UID of the only study to take.
        series: Number or Series Instance UID of the series to read.

    Raises:
        click.UsageError: No scan is a study of this name, or no scan is DICOM.
    """
    from ichprog.pseudonyms import pseudonym
    from ichprog.scan.studies import study_of
    from ichprog.sources import name_of, resolve

    resolved, _ = resolve(paths)
    sources = {name_of(source): source for source in resolved}
    if study is None and series is None:
        return list(sources.values())
    chosen: list[ScanSource] = [
        dataclasses.replace(found, series=series)
        for found in filter(None, map(study_of, sources.values()))
        if study in (None, found.uid, pseudonym(found.uid))
    ]
    if not chosen:
        wanted = "a DICOM study" if study is None else f"the study {study!r}"
        raise click.UsageError(f"None of the scans is {wanted}. `ichprog scans` lists the studies.")
    return chosen


def read_clinical(assignments: tuple[str, ...], sources: "list[ScanSource]") -> dict[str, Any]:
    """Parse the clinical values of the only scan. The rows of a table have their own.

    Args:
        assignments: Values NAME=VALUE.
        sources: The scans.

    Raises:
        click.UsageError: Values are given for several scans, or one is not NAME=VALUE.
    """
    given = parse_assignments("--clinical", assignments, _CLINICAL_EXAMPLE)
    if given and len(sources) > 1:
        raise click.UsageError(
            f"--clinical describes one patient, and there are {len(sources)} scans. Give a table of patients (.csv) "
            f"with the columns {', '.join(given)}."
        )
    return given


class ScoreComputer:
    """Compute the clinical scores of each patient.

    Args:
        sources: The scans.
        given: Clinical values of the only scan, from `read_clinical`.
        is_requested: Whether scores are computed at all.

    Raises:
        IchprogError: A clinical value is unknown or impossible.
    """

    def __init__(self, sources: "list[ScanSource]", given: Mapping[str, Any], *, is_requested: bool) -> None:
        from ichprog.clinical_scores import check_clinical

        self._is_requested = is_requested
        self._given = check_clinical(given if is_requested else {})
        for source in sources if is_requested else ():
            self._values(source)  # refuses wrong values before a scan is read

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the scores in a table; none if no scores are requested."""
        from ichprog.clinical_scores import SCORE_COLUMNS

        return SCORE_COLUMNS if self._is_requested else ()

    def scores(self, source: "ScanSource", haemorrhage: "Haemorrhage | None") -> "ClinicalScores | None":
        """Return the scores of a patient; None if none are requested or the scan has an error."""
        from ichprog.clinical_scores import from_haemorrhage

        if not self._is_requested or haemorrhage is None or haemorrhage.error is not None:
            return None
        return from_haemorrhage(haemorrhage, self._values(source))

    def _values(self, source: "ScanSource") -> Mapping[str, Any]:
        from ichprog.clinical_scores import CLINICAL_COLUMNS, check_clinical
        from ichprog.cohort import Patient

        if not isinstance(source, Patient):
            return self._given
        columns = source.columns
        try:
            own = check_clinical(
                {CLINICAL_COLUMNS[each]: columns[each] for each in CLINICAL_COLUMNS if each in columns}
            )
        except InvalidValueError as error:
            raise CohortError(f"Patient {source.name}: {error}") from None
        return own | self._given


@dataclasses.dataclass(frozen=True)
class ResultsOptions:
    """The file of results of a command: the values of -o, --resume, --retry-failed and --overwrite.

    Attributes:
        output: The file, or None.
        resume: Whether to keep the results of an interrupted or finished run.
        retry_failed: Whether not to keep those of scans that failed.
        overwrite: Whether to replace existing results.
    """

    output: Path | None
    resume: bool
    retry_failed: bool
    overwrite: bool

    def __post_init__(self) -> None:
        """Check that the options suit each other.

        Raises:
            click.UsageError: An option is given without another one that it needs.
        """
        if (self.resume or self.overwrite) and self.output is None:
            raise click.UsageError("--resume and --overwrite need -o: the file of results.")
        if self.retry_failed and not self.resume:
            raise click.UsageError("--retry-failed needs --resume.")

    @property
    def suffix(self) -> str | None:
        """Return the suffix of the file, or None without a file."""
        return None if self.output is None else self.output.suffix

    @contextmanager
    def open(
        self, table: "ResultsTable", run: Mapping[str, Any], sources: "list[ScanSource]"
    ) -> "Iterator[tuple[ResultsFile | None, list[ScanSource]]]":
        """Open the file, and yield it with the scans that have no result yet.

        If the command is interrupted, a sentence says how to continue.

        Args:
            table: The table of the results.
            run: What determines the results, as in `result_files.results_file`.
            sources: All scans.
        """
        from ichprog.result_files import results_file

        if self.output is None:
            yield None, sources
            return
        order = [key_of(source) for source in sources]
        choices = {"resume": self.resume, "retry_failed": self.retry_failed, "overwrite": self.overwrite}
        with results_file(self.output, table, run, order=order, **choices) as file:
            todo = [source for source in sources if key_of(source) not in file.done]
            if len(todo) < len(sources):
                done = f"{len(sources) - len(todo)} of {len(sources)} scans have results in {file.target}."
                click.echo(done, err=True)
            try:
                yield file, todo
            except KeyboardInterrupt:
                done = f"{len(file.done)} of {len(sources)} results are in {file.journal}."
                raise KeyboardInterrupt(f"{done} Continue with --resume.") from None


def take_shard(sources: "list[ScanSource]", shard: str | None) -> "list[ScanSource]":
    """Return the scans of a shard K/N: every N-th one, from the K-th."""
    if shard is None:
        return sources
    first, slash, count = shard.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise click.UsageError(f"Invalid --shard {shard!r}. Expected K/N with K from 1 to N, such as 3/16.")
    return sources[int(first) - 1 :: int(count)]


def key_of(source: "ScanSource") -> tuple[str, str]:
    """Return the patient and the scan by which a file of results knows a source."""
    from ichprog.sources import name_of, patient_of

    return patient_of(source) or "", name_of(source)


def has_patients(sources: "list[ScanSource]") -> bool:
    """Return whether a scan comes from a table of patients."""
    from ichprog.sources import patient_of

    return any(patient_of(source) is not None for source in sources)


def print_line(text: str, *, has_files: bool) -> None:
    """Print a line. If nobody reads the output any more, end, or continue silently for the sake of files.

    Args:
        text: The line.
        has_files: Whether the command writes files, too.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not has_files:
            raise SystemExit(0) from None


def print_outputs(
    work: "ScanWork",
    sources: "list[ScanSource]",
    todo: "list[ScanSource]",
    pool: "Workers",
    *,
    file: "ResultsFile | None" = None,
    has_files: bool = True,
) -> bool:
    """Work on scans, print and record what is left of each, and show a progress bar on a terminal.

    Args:
        work: What is done with each scan.
        sources: All scans, which determine the stems of the names of files.
        todo: The scans to work on.
        pool: Where to work.
        file: File of results, or None.
        has_files: Whether the command writes files, too.

    Returns:
        Whether a scan has an error.
    """
    from ichprog.cli.workers import work_on_scans

    stem_of = dict(zip(map(key_of, sources), stems(sources), strict=True))
    items, has_failed = [(source, stem_of[key_of(source)]) for source in todo], False
    with (
        pool.start() as where,
        progress.bar(len(sources), "scan", done=len(sources) - len(todo)) if len(sources) > 1 else nullcontext() as bar,
    ):
        for result in work_on_scans(work, items, **where):
            if bar is not None:
                bar.clear()  # frees the line for the output of this scan
            if result.text:
                print_line(result.text, has_files=has_files)
            if result.messages:
                click.echo(result.messages, err=True)
            has_failed |= result.has_failed
            if file is not None and result.entry is not None:
                file.add_entry(result.entry)
            if bar is not None:
                bar.update()
    return has_failed or (file is not None and "failed" in file.done.values())


def stems(sources: "list[ScanSource]") -> list[str]:
    """Return a stem for the files of each scan: its name, with as many folder names as make the stems unique."""
    from ichprog.sources import name_of

    resolve_folder = functools.cache(Path.resolve)  # thousands of scans share few folders
    paths = [Path(name_of(source)) for source in sources]
    paths = [path.resolve() if path.name in ("", "..") else resolve_folder(path.parent) / path.name for path in paths]
    parts = [list(path.parts) for path in paths]
    for names in parts:
        for suffix in (".nii.gz", ".nii", ".zip", ".dcm"):
            names[-1] = names[-1].removesuffix(suffix)
    for depth in range(1, max((len(names) for names in parts), default=1) + 1):
        unique = ["_".join(names[-depth:]) for names in parts]
        if len(set(unique)) == len(unique):
            return unique
    raise click.UsageError("Two scans differ only in their suffix, so their files would overwrite each other.")


def save_image(image: "nib.Nifti1Image", path: Path) -> None:
    """Write an image atomically, in a folder that is created if missing."""
    import nibabel as nib

    from ichprog.io import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, sole_writer=True) as partial:
        nib.save(image, partial)


def format_haemorrhage(haemorrhage: "Haemorrhage") -> str:
    """Return one line: whether a haemorrhage is present, its volumes with intervals, and its place."""
    parts = [f"haemorrhage {'present' if haemorrhage.is_present else 'absent'} {haemorrhage.probability:.3f}"]
    for part, volume in haemorrhage.volume_ml.items():
        if part == "total" or volume > 0:
            parts.append(f"{part} {volume:.1f} mL{_format_interval(haemorrhage.intervals_ml[part])}")
    if haemorrhage.is_present:
        parts += filter(None, [haemorrhage.side, haemorrhage.location])
        for name in ("intraventricular", "infratentorial"):
            if (probability := getattr(haemorrhage, name)) is not None:
                parts.append(f"{name} {probability:.3f}")
    if haemorrhage.midline_shift_mm is not None:
        shift = _format_interval(haemorrhage.midline_shift_interval_mm)
        parts.append(f"midline shift {haemorrhage.midline_shift_mm:.1f} mm{shift}")
    return "  ".join(parts)


def format_clinical(use: "ClinicalUse") -> str:
    """Return one line: each known value with what it changed, and the values that are not known."""
    used = []
    for name, value in use.used.items():
        changes = ", ".join(f"{task} {by[name]:+.2f}" for task, by in use.contributions.items())
        used.append(f"{name} {value:g} (log-odds of {changes})")
    missing = f"not known: {', '.join(use.missing)}" if use.missing else ""
    return "  clinical values: " + "; ".join(each for each in (*used, missing) if each)


def format_reliability(prediction: "Prediction") -> str:
    """Return lines with the calibrated probabilities and label sets, and why the model abstains."""
    lines = []
    for name, task in prediction.tasks.items():
        if task.calibrated is not None and task.label_set is not None:
            label, p = max(task.calibrated.items(), key=lambda each: each[1])
            labels = " or ".join(task.label_set)
            lines.append(f"  {name}: calibrated {label} {p:.3f}; at {prediction.coverage:.0%} coverage: {labels}")
    reasons: dict[str, list[str]] = {}
    for name, reason in prediction.abstained.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"  abstains from {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def format_scores(scores: "ClinicalScores") -> str:
    """Return the scores with their published outcome and the source of each variable, one line for each."""
    lines = [_format_score(score) for score in (scores.ich, scores.func) if score is not None]
    return "\n".join(f"  {line}" for line in (*lines, *scores.notes))


def _format_score(score: "ScoreRange") -> str:
    number = f"{score.low}" if score.low == score.high else f"{score.low} to {score.high}"
    shares = sorted({score.share_low, score.share_high})
    share = " to ".join(f"{value:.0%}" for value in shares)
    variables = ", ".join(map(_format_variable, score.variables))
    return f"{score.name} score {number}: {score.outcome} {share} ({score.source}); {variables}"


def _format_variable(variable: "ScoreVariable") -> str:
    source: str = variable.source
    if variable.probability is not None:
        source += f", probability {variable.probability:.2f}"
    if variable.value is None:
        possible = " or ".join(map(str, variable.choices))
        text = possible or ("unknown" if variable.source == "unknown" else "uncertain")
        return f"{variable.name} {text}" if text == "unknown" else f"{variable.name} {text} ({source})"
    if isinstance(variable.value, bool):
        return f"{variable.name} {'yes' if variable.value else 'no'} ({source})"
    value = f"{variable.value:.4g}" if isinstance(variable.value, float) else variable.value
    return f"{variable.name} {value}{_format_interval(variable.interval)} ({source})"


def _format_interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.1f} to {interval[1]:.1f})"


def print_limits(model: "Model") -> None:
    """Print the first limit of a model that measures volumes."""
    for limit in model.spec.limits[:1]:
        click.echo(f"Limits: {limit}")


def format_warnings(name: str, warnings: "Iterable[ScanWarning]") -> list[str]:
    """Return a line for each warning about a scan, with its name."""
    return [f"{name}: {warning.code}: {warning.message}" for warning in warnings]


def print_notice(model: "Model") -> None:
    """Print the notice of a model and why it does not run as requested, to standard error."""
    if model.fallback_reason is not None:
        click.echo(f"Run by {model.runtime} in {model.precision}: {model.fallback_reason}.", err=True)
    click.echo(model.spec.notice, err=True)
