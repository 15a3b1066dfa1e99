"""Write the index of a folder of reports: one HTML file with a table that sorts, filters and flags."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.io import write_text
from ichprog.reporting.prediction_report import NOTICE, asset, content_policy, read_summary, template

INDEX = "index.html"
_FEWEST = 8  # reports from which values can be extreme
_WHISKERS = 1.5  # interquartile ranges


def write_index(folder: Path) -> Path | None:
    """Write an index of all reports in a folder, whole or not at all.

    A value is flagged as extreme if it lies more than 1.5 interquartile ranges outside the quartiles of its column
    (Tukey, Exploratory Data Analysis, 1977), from 8 reports on.

    Args:
        folder: Folder of reports.

    Returns:
        The path of the index, or None if the folder has fewer than two reports.

    Raises:
        IchprogError: Jinja2 is not installed.
    """
    found = {path.name: read_summary(path) for path in sorted(folder.glob("*.html")) if path.name != INDEX}
    summaries = {name: summary for name, summary in found.items() if summary is not None}
    if len(summaries) < 2:
        return None
    text = render_index(summaries)
    write_text(folder / INDEX, text)
    return folder / INDEX


def render_index(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the HTML of an index.

    Args:
        summaries: Summary of each report, by the name of its file.
    """
    tasks = list(dict.fromkeys(task for each in summaries.values() for task in each.get("tasks") or {}))
    rows = [_row(file, each, tasks) for file, each in summaries.items()]
    columns = [
        {"key": f"p{number}", "title": task, "label": _last_label(task, summaries.values()), "unit": "%"}
        for number, task in enumerate(tasks)
    ]
    if any(row["blood"] is not None for row in rows):
        columns.append({"key": "blood", "title": "blood", "label": "", "unit": "mL"})
    for column in columns:
        _flag_extremes(rows, str(column["key"]))
    notices = dict.fromkeys(str(each.get("notice") or "").replace(NOTICE, "").strip() for each in summaries.values())
    simulated = sum(bool(each.get("simulated")) for each in summaries.values())
    several = f"{simulated} of {len(rows)} patients are simulated."
    script = asset("index.js")
    text: str = template("index.html").render(
        rows=rows,
        columns=columns,
        counts=Counter(flag for row in rows for flag in row["flags"]),
        notices=[NOTICE, *([several] if simulated else []), *filter(None, notices)],
        style=asset("prediction.css") + asset("index.css"),
        script=script,
        policy=content_policy([script]),
        version=version("ichprog"),
    )
    return text


def _row(file: str, summary: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return one row as plain data."""
    answers, failed = summary.get("tasks") or {}, summary.get("error")
    warnings, abstained = list(map(str, summary.get("warnings") or ())), summary.get("abstained") or ()
    flags = [
        name
        for name, is_set in (("failed", failed), ("abstains", abstained), ("warnings", warnings))
        if is_set
    ]  # fmt: skip
    values: dict[str, Any] = {}
    for number, task in enumerate(tasks):
        values[f"p{number}"] = _number(answers.get(task, {}).get("p"))
        values[f"l{number}"] = str(answers.get(task, {}).get("label", ""))
    return {
        "file": file,
        "name": str(summary["name"]),
        "scan": str(summary.get("scan", "")),
        "model": str(summary.get("model", "")),
        "error": str(failed or ""),
        "warnings": warnings,
        "abstained": ", ".join(map(str, abstained)),
        "blood": _number(summary.get("blood_ml")),
        "flags": flags,
        "extremes": [],
        "picture": str(summary.get("thumbnail") or ""),
        **values,
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _last_label(task: str, summaries: Any) -> str:
    """Return the label whose probability a column shows; "" if the models differ."""
    labels = {str(each["tasks"][task].get("last", "")) for each in summaries if task in (each.get("tasks") or {})}
    return labels.pop() if len(labels) == 1 else ""


def _flag_extremes(rows: Sequence[dict[str, Any]], key: str) -> None:
    """Flag the rows whose value of a column lies far outside its quartiles."""
    values = np.array([row[key] for row in rows if row[key] is not None])
    if len(values) < _FEWEST:
        return
    low, high = np.percentile(values, [25, 75])
    reach = _WHISKERS * (high - low)
    for row in rows:
        if row[key] is not None and not low - reach <= row[key] <= high + reach:
            row["extremes"].append(key)
            if "extreme" not in row["flags"]:
                row["flags"].append("extreme")
