"""The report of a study: one HTML file with everything in it, and the TRIPOD+AI list as far as the run can fill it."""

import base64
import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.errors import RunError
from ichprog.io import atomic_write
from ichprog.metrics import PRIMARY
from ichprog.reporting import tables
from ichprog.reporting.tables import Columns, Row
from ichprog.spec import ModelSpec, Task
from ichprog.study.config import Study

CAUTION = "For research only, not for patient care."
SIMULATED = "The patients of this study are simulated. Nothing here says anything about real patients."
OPEN = "to be written by the authors"
CHECKLIST = {"number": "item", "topic": "topic", "asks": "what a report should say", "said": "in this study"}
_BRAIN = {"auto": "extracted where a skull is seen", "extract": "extracted from every scan", "given": "as given"}
_KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Table:
    """A table of a section.

    Attributes:
        rows: Its rows, as `ichprog.reporting.tables` takes them.
        columns: Which columns, and what readers see in the place of their names.
        caption: What it shows.
    """

    rows: Sequence[Row]
    columns: Columns
    caption: str


@dataclass(frozen=True)
class Picture:
    """A picture of a section.

    Attributes:
        path: An SVG or a PNG.
        caption: What it shows; it also stands for the picture where that cannot be seen.
    """

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report under a heading of its own.

    Attributes:
        title: The heading.
        text: Paragraphs, which come first.
        tables: Tables, which come next.
        pictures: Pictures, which come last.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Contents:
    """What a report holds.

    Attributes:
        title: The study's name.
        simulated: Whether its patients are simulated, which is said at the top.
        sections: Its parts in order: what was compared, patients, results, failures and what else there is.
        limits: What a reader must know, in sentences.
        facts: What the checklist is filled with, as `facts` makes it.
    """

    title: str
    simulated: bool
    sections: Sequence[Section]
    limits: Sequence[str]
    facts: Mapping[str, object]


def report(folder: Path, contents: Contents) -> Path:
    """Writes `report.html` into a study's folder: one file that needs no other, no network and no script.

    Limits and the TRIPOD+AI list follow the given sections.

    Args:
        folder: The study's folder.
        contents: What it holds.

    Returns:
        The file, which appears whole or not at all; the same contents give the same bytes.

    Raises:
        RunError: A picture is not there, or is neither SVG nor PNG.
    """
    listed = Table(checklist(contents.facts), CHECKLIST, "")
    about = (
        "The items of TRIPOD+AI (Collins et al., BMJ 2024;385:e078378, doi 10.1136/bmj-2023-078378) in this project's "
        "own words, and what the run knows of them. For a submission take the authors' own form."
    )
    sections = [
        *contents.sections,
        Section("Limits", contents.limits),
        Section("TRIPOD+AI", [about], [listed]),
    ]
    names = [f"section-{number}" for number, _ in enumerate(sections, start=1)]
    links = "".join(
        f'<li><a href="#{name}">{escape(section.title)}</a></li>' for name, section in zip(names, sections, strict=True)
    )
    notices = [*([SIMULATED] if contents.simulated else []), CAUTION]
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(contents.title)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<header><h1>{escape(contents.title)}</h1>",
        *(f'<p class="notice" role="note">{escape(notice)}</p>' for notice in notices),
        f"</header><nav><ol>{links}</ol></nav><main>",
        *(_section(name, section) for name, section in zip(names, sections, strict=True)),
        f"</main><footer><p>Written by ichprog {escape(version('ichprog'))}. {' '.join(notices)}</p></footer>",
        "</body></html>",
    ]
    path = folder / "report.html"
    with atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return path


def checklist(facts: Mapping[str, object]) -> list[dict[str, str]]:
    """The TRIPOD+AI items, each with what a study knows of it and what is left to its authors.

    Args:
        facts: What is known, by the names in braces in `tripod.toml`; an item of which one is None or missing is left
            to the authors whole.

    Returns:
        Rows with "number", "section", "topic", "applies", "asks" and "said".
    """
    items = tomllib.loads((files(__package__) / "tripod.toml").read_text(encoding="utf-8"))["item"]
    return [
        {key: item[key] for key in ("number", "section", "topic", "applies", "asks")} | {"said": _said(item, facts)}
        for item in items
    ]


def compared(study: Study) -> Table:
    """What a study compares: a row for every variant and baseline."""
    rows = [
        {
            "name": variant.name,
            "model": _network(variant.spec),
            "input": "image, " + " x ".join(map(str, variant.spec.input.shape)),
            "tasks": ", ".join(task.name for task in variant.spec.tasks),
        }
        for variant in study.variants
    ]
    for one in study.baselines:
        given = [*([f"answer of {one.variant}"] if one.variant else []), *one.columns]
        rows.append({"name": one.name, "model": one.kind, "input": ", ".join(given) or "none", "tasks": one.task})
    columns = {"name": "variant", "model": "model", "input": "input", "tasks": "tasks"}
    return Table(rows, columns, f"What is compared, on the same {study.folds} folds.")


def people(study: Study, truth: Mapping[str, np.ndarray]) -> Table:
    """How many patients have which label, and how many have none, a row a task.

    Args:
        study: The study.
        truth: By task, `(N,)` indices of labels over all patients, -1 where not known.
    """
    rows = []
    for name, known in truth.items():
        labels = _labels(study.task(name), known)
        rows.append({"task": name, "patients": len(known), "missing": int((known < 0).sum()), "labels": labels})
    columns = {"task": "task", "patients": "patients", "missing": "label missing", "labels": "labels"}
    return Table(rows, columns, "Patients and labels, by task.")


def facts(
    study: Study,
    truth: Mapping[str, np.ndarray],
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    simulated: bool,
    metric: str = PRIMARY,
) -> dict[str, object]:
    """What the TRIPOD+AI list is filled with.

    Args:
        study: The study.
        truth: By task, `(N,)` indices of labels over all patients, -1 where not known.
        metrics: As in `metrics.json`, by variant, task and metric.
        simulated: Whether the patients are simulated.
        metric: The metric that is told of every variant, for the task that folds are stratified by.
    """
    main = study.split_by
    specs = [variant.spec for variant in study.variants]
    performances = [
        f"{name} {tables.shown(tasks[main][metric])}"
        for name, tasks in metrics.items()
        if tasks.get(main, {}).get(metric) is not None
    ]
    columns = sorted({column for one in study.baselines for column in one.columns})
    source = "Patients simulated by ichprog" if simulated else f"{', '.join(path.name for path in study.cohort)}"
    return {
        "source": source,
        "patients": max((len(known) for known in truth.values()), default=None),
        "labels": "; ".join(f"{name} ({_labels(study.task(name), known)})" for name, known in truth.items()) or None,
        "missing": ", ".join(f"{name} {int((known < 0).sum())}" for name, known in truth.items()) or None,
        "outcome": " ".join(_outcome(study.task(name)) for name in truth) or None,
        "variants": ", ".join(variant.name for variant in study.variants),
        "baselines": ", ".join(one.name for one in study.baselines) or "no baselines",
        "columns": ", ".join(columns) or "no columns",
        "models": "; ".join(f"{variant.name}: {_network(variant.spec)}" for variant in study.variants) + ".",
        "preparation": " ".join(dict.fromkeys(_preparation(spec) for spec in specs)),
        "brain": _BRAIN[study.brain],
        "folds": study.folds,
        "split_by": main,
        "validation": f"{100 * study.protocol.validation_fraction:g} %",
        "balance": ", ".join(dict.fromkeys(variant.protocol.balance.replace("_", " ") for variant in study.variants)),
        "draws": f"{study.draws:,}",
        "subgroups": ", ".join(study.subgroups) or "none",
        "performance": f"{tables.words(metric)} of {main}: {'; '.join(performances)}" if performances else None,
        "version": version("ichprog"),
    }


def _said(item: Mapping[str, str], facts: Mapping[str, object]) -> str:
    filled, left = item.get("filled", ""), item.get("left", "")
    needed = {name for _, name, _, _ in string.Formatter().parse(filled) if name}
    if any(facts.get(name) is None for name in needed):
        filled, left = "", ""
    if not filled:
        return f"{OPEN[0].upper()}{OPEN[1:]}{f': {left}' if left else ''}."
    said = re.sub(r"\.\.(?!\.)", ".", filled.format_map(facts))
    return f"{said} {OPEN[0].upper()}{OPEN[1:]}: {left}." if left else said


def _labels(task: Task, known: np.ndarray) -> str:
    return ", ".join(f"{label}: {int((known == index).sum())}" for index, label in enumerate(task.labels))


def _outcome(task: Task) -> str:
    cuts = ", ".join(f"{cut:g}" for cut in task.target.bin_edges)
    return (
        f"{task.name}: {task.meaning.rstrip('.')}; labels {', '.join(task.labels)}, {task.target.column} cut at {cuts}."
    )


def _network(spec: ModelSpec) -> str:
    options = ", ".join(f"{key} {value}" for key, value in spec.backbone.options.items())
    return f"{spec.backbone.name} ({options})" if options else spec.backbone.name


def _preparation(spec: ModelSpec) -> str:
    given, window = spec.input, spec.input.window
    what = "The brain alone" if given.brain_only else "The head"
    shape = " x ".join(map(str, given.shape))
    return f"{what}, {window.low:g} to {window.high:g} HU, averaged to {shape} cells (slices, rows, columns)."


def _section(name: str, section: Section) -> str:
    lines = [f'<section id="{name}"><h2>{escape(section.title)}</h2>']
    lines += [f"<p>{escape(paragraph)}</p>" for paragraph in section.text]
    for table in section.tables:
        lines.append(f'<div class="wide">{tables.html(table.rows, table.columns, table.caption)}</div>')
    for picture in section.pictures:
        said = escape(picture.caption)
        lines.append(
            f'<figure><img src="{_inlined(picture.path)}" alt="{said}"><figcaption>{said}</figcaption></figure>'
        )
    return "\n".join([*lines, "</section>"])


def _inlined(path: Path) -> str:
    """A picture as an address that holds all of it."""
    if path.suffix not in _KINDS:
        raise RunError(f"{path}: a report takes {' and '.join(_KINDS)}; save the picture as one of them")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: a picture of the report cannot be read: {error.strerror or error}") from error
    return f"data:{_KINDS[path.suffix]};base64,{base64.b64encode(data).decode()}"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 0 auto;
       padding: 1rem 1.5rem 3rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
p, li { max-width: 46rem; }
.notice { border-left: 5px solid #d55e00; background: #fdf1e9; padding: .6rem 1rem; font-weight: 600; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
caption { text-align: left; padding: .3rem 0; font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #888; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: .875rem; max-width: 46rem; }
footer { margin-top: 3rem; border-top: 1px solid #ccc; font-size: .875rem; }
@media print { nav { display: none; } section { break-inside: auto; } figure { break-inside: avoid; } }
"""
