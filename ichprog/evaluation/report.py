"""Write an evaluation: tables, figures, an HTML report with TRIPOD+AI items, and a section for a model card.

FOLDER/tables/                  each table as CSV, Markdown and LaTeX
      /figures/                 each figure as SVG and PNG
      /report.html              everything in one file
      /model_card_section.md    the results for a model card, with metadata for the Hub
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichprog.cohort import Origin
from ichprog.evaluation.validation import EventValidation, comparison_rows
from ichprog.evaluation.validation_tables import METHOD_NAMES, operating_rows, recalibration_rows
from ichprog.metrics import PRIMARY, label_of, registered
from ichprog.reporting import figures, tables, tripod
from ichprog.reporting.html import Picture, Section, Table, write_report
from ichprog.reporting.tables import format_value, readable_name
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Described = Mapping[str, Any]  # `Evaluation.to_dict`
Events = Mapping[str, Sequence[EventValidation]]

_RECALIBRATION_NOTE = (
    "Recalibrated probabilities are cross-fitted: the recalibration of a patient was fitted to other patients. The "
    "number of patients needed is the smallest from which on a recalibration reliably helps. It helps reliably if it "
    "improves the log loss of the other patients in at least 90 % of 100 random draws."
)
_OPERATING_NOTE = (
    "The threshold was chosen on these patients, so that the rates on the same patients are too good. Expect the "
    "cross-fitted rates elsewhere: each patient was decided by a threshold that was chosen on other patients. "
    "Intervals are Wilson's and take thresholds as fixed."
)
_KINDS = {
    "simulated": "simulated patients",
    "mixed": "simulated and other patients",
    "not simulated": "patients of an external cohort",
}
_LIMITS = (
    "Intervals describe the variation between patients. The networks are fixed.",
    "The results hold for these patients. Another hospital or period may give others.",
    "P values are not adjusted for the number of metrics, tasks and subgroups.",
)


def write(folder: Path, spec: ModelSpec, described: Described, events: Events) -> Path:
    """Write tables, figures, report and model card section of an evaluation.

    Args:
        folder: Folder.
        spec: The specification of the model.
        described: Result of `Evaluation.to_dict`.
        events: Figures of each event by task.

    Returns:
        The path of `report.html`.

    Raises:
        IchprogError: matplotlib or Jinja2 is not installed; tables and the model card section are written all the same.
    """
    contents = _tables(spec, described, events)
    caption = f"{_title(spec, described)} {described['leakage']} {described['intervals']}. {spec.notice}"
    for name, table in contents.items():
        tables.write(table.rows, table.columns, folder / "tables", name, f"{table.caption} {caption}")
    checklist = tripod.fill_checklist(tripod_facts(spec, described), kind="evaluation")
    tables.write(checklist, tripod.COLUMNS, folder / "tables", "tripod", "TRIPOD+AI")
    (folder / "model_card_section.md").write_text(card_section(spec, described, events), encoding="utf-8")
    pictures = {task: list(_pictures(folder, spec, task, each)) for task, each in events.items()}
    sections = [
        *_sections(spec, described, contents, pictures),
        Section("Limits", [*_LIMITS, *spec.limits]),
        tripod.checklist_section(checklist),
        Section("Model card", [_card_sentence(spec, described), "The file model_card_section.md has the section."]),
    ]
    title = f"External validation of {spec.name}"
    return write_report(folder / "report.html", title, sections, notices=_notices(spec, described))


def _title(spec: ModelSpec, described: Described) -> str:
    return f"{spec.name} on {described['scored']} patients of {Path(described['cohort']).name}."


def _notices(spec: ModelSpec, described: Described) -> list[str]:
    origin = _origin(described)
    nothing = " The results say nothing about real patients." if origin.kind == "simulated" else ""
    return [*([origin.sentence + nothing] if origin.simulated else []), spec.notice]


def _origin(described: Described) -> Origin:
    return Origin(described["patients"], described["simulated"])


def _tables(spec: ModelSpec, described: Described, events: Events) -> dict[str, Table]:
    """Return each table that has rows, by name of its files."""
    contents = {"patients": _patients_table(spec, described), "metrics": _metrics_table(described)}
    contents["calibration"] = Table(
        [row for task, each in events.items() for row in _calibration_rows(task, described["calibration"][task])],
        ("task", "event", "predicted", "observed", "low", "high", "count"),
        "Calibration curves, in bins with equally many patients.",
    )
    contents["recalibration"] = Table(
        [row for task, each in events.items() for row in recalibration_rows(task, each)],
        {"task": "task", "event": "event", "probabilities": "probabilities", "brier": "Brier score",
         "calibration_slope": "slope", "calibration_intercept": "intercept", "needed": "patients needed"},
        "Calibration before and after local recalibration, cross-fitted.",
    )  # fmt: skip
    contents["recalibration-curve"] = Table(
        [
            {"task": task, "event": event.event, "method": METHOD_NAMES[each.method], **row}
            for task, one in events.items()
            for event in one
            for each in event.recalibrations
            for row in each.learning_curve
        ],
        {"task": "task", "event": "event", "method": "fitted", "patients": "fitted to patients",
         "gain": "mean gain in log loss", "share_improved": "share of draws improved"},
        "Recalibration fitted to few patients, tested on all others.",
    )  # fmt: skip
    contents["decision-curve"] = Table(
        [row for task, each in events.items() for row in _decision_rows(task, each)],
        {"task": "task", "event": "event", "threshold": "threshold", "model": "model", "all": "treat all",
         "none": "treat none", "recalibrated_intercept_and_slope": "recalibrated"},
        "Net benefit.",
    )  # fmt: skip
    contents["operating-points"] = Table(
        [row for task, each in events.items() for row in operating_rows(task, each)],
        {"task": "task", "event": "event", "required": "required", "threshold": "threshold", "patients": "rates on",
         "sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV",
         "called_positive": "called positive"},
        "Operating points.",
    )  # fmt: skip
    contents["subgroups"] = _subgroups_table(spec, described)
    contents["comparison"] = _comparison_table(spec, described)
    return {name: table for name, table in contents.items() if table.rows}


def _patients_table(spec: ModelSpec, described: Described) -> Table:
    rows = [
        {
            "task": task.name,
            "labelled": sum(described["label_counts"][task.name].values()),
            "missing": described["labels_missing"].get(task.name),
            "labels": ", ".join(f"{label}: {n}" for label, n in described["label_counts"][task.name].items()),
        }
        for task in spec.tasks
        if task.name in described["label_counts"]
    ]
    columns = {"task": "task", "labelled": "patients with a label", "missing": "label missing", "labels": "labels"}
    return Table(rows, columns, "Patients and labels, by task.")


def _metrics_table(described: Described) -> Table:
    rows = [
        {
            "task": task,
            "n": sum(described["label_counts"][task].values()),
            "metric": readable_name(name),
            "value": value,
        }
        for task, values in described["metrics"].items()
        for name, value in values.items()
    ]
    columns = {"task": "task", "n": "patients", "metric": "metric", "value": "value"}
    return Table(rows, columns, "Metrics at the model's own thresholds.")


def _calibration_rows(task: str, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[dict[str, Any]]:
    for event, curve in curves.items():
        for values in zip(*curve.values(), strict=True):
            yield {"task": task, "event": event, **dict(zip(curve, values, strict=True))}


def _decision_rows(task: str, events: Sequence[EventValidation]) -> Iterator[dict[str, Any]]:
    """Yield every fifth threshold; the JSON has all of them."""
    for event in events:
        curve = event.decision_curve
        for index in range(4, len(curve["thresholds"]), 5):
            row = {name: float(values[index]) for name, values in curve.items()}
            yield {"task": task, "event": event.event, "threshold": row.pop("thresholds"), **row}


def _subgroups_table(spec: ModelSpec, described: Described) -> Table:
    names = dict.fromkeys(each.name for task in spec.tasks for each in registered(task.kind) if each.in_subgroups)
    columns = {"task": "task", "column": "column", "group": "group", "patients": "patients"}
    columns |= {"with_last_label": "with the last label"} | {name: label_of(name) or name for name in names}
    return Table(described["subgroups"], columns, "Subgroups.")


def _comparison_table(spec: ModelSpec, described: Described) -> Table:
    compared = described["comparison"] or {"differences": {}, "model": ""}
    rows = [row | {"metric": readable_name(row["metric"])} for row in comparison_rows(compared["differences"])]
    columns = {
        "task": "task", "metric": "metric", "first": spec.name, "second": compared["model"],
        "difference": "difference", "p": "p", "n": "patients", "method": "test",
    }  # fmt: skip
    return Table(
        rows, columns, "The same patients, predicted by both models. A difference is the first less the second."
    )


def _pictures(folder: Path, spec: ModelSpec, task: str, events: Sequence[EventValidation]) -> Iterator[Picture]:
    """Draw the ROC curves, calibration curves and decision curves of a task."""

    def picture(name: str, figure: "Figure", caption: str) -> Picture:
        vector, _ = figures.save(figure, folder / "figures", name)
        return Picture(vector, caption)

    curves = {each.event: (each.truth.astype(int), each.probabilities) for each in events}
    yield picture(f"roc-{task}", figures.roc(curves), f"{task}: ROC curves with the area under each curve.")
    panels = {each.event: _calibration_curves(each) for each in events}
    caption = f"{task}: observed share by predicted probability, as predicted and recalibrated, cross-fitted."
    yield picture(f"calibration-{task}", figures.calibration(panels), caption)
    for number, each in enumerate(events, start=1):
        name = f"decision-{task}" if len(events) == 1 else f"decision-{task}-{number}"
        curve = each.decision_curve
        shown = {spec.name: curve}
        if "recalibrated_intercept_and_slope" in curve:
            shown["recalibrated"] = curve | {"model": curve["recalibrated_intercept_and_slope"]}
        caption = f"{task}: net benefit of acting on {each.event}, compared with acting for all patients and for none."
        yield picture(name, figures.decision_curve(shown), caption)


def _calibration_curves(event: EventValidation) -> dict[str, Any]:
    from ichprog.metrics.calibration import calibration_curve

    curves = {"as predicted": calibration_curve(event.truth, event.probabilities)}
    return curves | {f"{METHOD_NAMES[each.method]} fitted": each.calibration for each in event.recalibrations}


def _sections(
    spec: ModelSpec, described: Described, contents: Mapping[str, Table], pictures: Mapping[str, list[Picture]]
) -> Iterator[Section]:
    tables_of_patients = [contents["patients"]] if "patients" in contents else []
    yield Section("Patients", [*_patient_sentences(described)], tables_of_patients)
    yield Section("Leakage control", [described["leakage"]])
    for task in spec.tasks:
        if task.name not in described["metrics"]:
            continue
        own = {
            name: Table([row for row in table.rows if row["task"] == task.name], table.columns, table.caption)
            for name, table in contents.items()
            if name not in ("patients", "calibration", "subgroups", "comparison")
        }
        parts = [table for table in own.values() if table.rows]
        notes = [_RECALIBRATION_NOTE]
        notes += [_OPERATING_NOTE] if "operating-points" in own and own["operating-points"].rows else []
        text = [task.meaning, f"{described['intervals']}.", *notes]
        yield Section(f"Results: {task.name}", text, parts, pictures.get(task.name, []))
    if "subgroups" in contents:
        yield Section("Subgroups", ["Small groups have wide intervals."], [contents["subgroups"]])
    if "comparison" in contents:
        compared = described["comparison"]
        text = [f"{spec.name} compared with {compared['model']}.", f"{compared['model']}: {compared['leakage']}"]
        yield Section("Comparison of models", text, [contents["comparison"]])


def _patient_sentences(described: Described) -> Iterator[str]:
    yield f"{described['scored']} of {described['patients']} patients were scored."
    reasons = {
        "left_out": "no fold of the model may predict them",
        "unlabelled": "they have no label of any task",
        "failed": "their scan could not be read",
    }
    for key, reason in reasons.items():
        if described[key]:
            yield f"{described[key]} were not scored: {reason}."
    for task, column in described["tasks_not_scored"].items():
        yield f"{task} was not scored: column {column} is missing or blank."
    counts = Counter(warning["code"] for warnings in described["warnings"].values() for warning in warnings)
    if counts:
        found = ", ".join(f"{code} ({count})" for code, count in sorted(counts.items()))
        yield f"Warnings about scans, with the number of patients: {found}."


def tripod_facts(spec: ModelSpec, described: Described) -> dict[str, object]:
    """Return the facts of an evaluation that fill the TRIPOD+AI checklist.

    Args:
        spec: The specification of the model.
        described: Result of `Evaluation.to_dict`.
    """
    counts = described["label_counts"]
    performance = [
        f"{task}: {readable_name(PRIMARY)} {format_value(values[PRIMARY])}"
        for task, values in described["metrics"].items()
        if values[PRIMARY]["value"] is not None
    ]
    groups = list(dict.fromkeys(row["column"] for row in described["subgroups"]))
    compared = described["comparison"]
    source = "Patients simulated by ichprog" if _origin(described).kind == "simulated" else ""
    source = source or Path(described["cohort"]).name
    labels = [f"{task} ({', '.join(f'{label}: {n}' for label, n in each.items())})" for task, each in counts.items()]
    shape = " x ".join(map(str, spec.input.shape))
    window = spec.input.window
    return {
        "model": spec.name,
        "source": source,
        "patients": described["patients"],
        "scored": described["scored"],
        "left_out": described["left_out"],
        "failed": described["failed"],
        "labels": "; ".join(labels),
        "missing": ", ".join(f"{task} {n}" for task, n in described["labels_missing"].items()),
        "outcome": " ".join(f"{task.name}: {task.meaning}" for task in spec.tasks if task.name in counts),
        "preparation": f"{'The brain only' if spec.input.brain_only else 'The head'}, {window.low:g} to "
        f"{window.high:g} HU, averaged to a grid of {shape} (slices, rows, columns).",
        "leakage": described["leakage"],
        "intervals": described["intervals"],
        "subgroups": ", ".join(groups) or "none",
        "comparison": f"Compared with {compared['model']} on the same patients."
        if compared
        else "No model is compared.",
        "performance": "; ".join(performance) or None,
        "version": version("ichprog"),
    }


def card_section(spec: ModelSpec, described: Described, events: Events) -> str:
    """Return a section for a model card in Markdown, with the results as metadata of the Hub in its header.

    Args:
        spec: The specification of the model.
        described: Result of `Evaluation.to_dict`.
        events: Figures of each event by task.
    """
    from huggingface_hub import EvalResult, ModelCardData

    data = _KINDS[_origin(described).kind]
    names = {"auroc": "roc_auc", "brier": "brier_score"}
    results = [
        EvalResult(
            task_type="image-classification", task_name=f"{task}: {event.event}", dataset_type="external",
            dataset_name=f"{event.counts['patients']} {data}", dataset_config=f"{task}: {event.event}",
            metric_type=names[metric], metric_name=label_of(metric) or metric,
            metric_value=round(value, 3),
        )
        for task, each in events.items()
        for event in each
        for metric in names
        if (value := event.metrics[metric]["value"]) is not None
    ]  # fmt: skip
    header = ModelCardData(
        model_name=spec.name if results else None, eval_results=results or None, library_name="ichprog"
    )
    columns = {"task": "task", "event": "event", "patients": "patients", "observed": "with the event", "auroc": "AUROC",
               "calibration_slope": "calibration slope", "calibration_intercept": "calibration intercept"}  # fmt: skip
    rows = [
        {"task": task, "event": one.event, **one.counts, **one.metrics} for task, each in events.items() for one in each
    ]
    return f"""\
---
{str(header.to_yaml()).strip()}
---

## External validation

{_card_sentence(spec, described)}

{tables.to_markdown(rows, columns)}
{described["intervals"]}. Measured with ichprog {version("ichprog")}. {" ".join(_notices(spec, described))}
"""


def _card_sentence(spec: ModelSpec, described: Described) -> str:
    data = _KINDS[_origin(described).kind]
    return f"{spec.name} was evaluated on {described['scored']} {data}. {described['leakage']}"
