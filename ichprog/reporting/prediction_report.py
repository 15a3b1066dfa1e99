"""Write the report of one prediction: one HTML file with a viewer, which needs no other file and no network."""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import RunError
from ichprog.io import write_text
from ichprog.reporting.html import load_template
from ichprog.reporting.privacy import public_name, without_identifiers
from ichprog.reporting.volumes import Layer, Volumes, prepare_volumes

if TYPE_CHECKING:
    from ichprog.results import Prediction, Saliency, Scores
    from ichprog.spec import ModelSpec, Task

NOTICE = "For research only, not for patient care."
SIMULATED = "The patient is simulated."
_SUMMARY_ID = "summary"


def save_report(
    prediction: "Prediction",
    scan: Any,
    target: str | Path,
    *,
    maps: "Saliency | Sequence[Saliency] | Mapping[Any, Saliency]" = (),
    scores: "Scores | None" = None,
    spec: "ModelSpec | None" = None,
    identifiers: bool = False,
) -> Path:
    """Write a prediction as one HTML file with a viewer of the scan, whole or not at all.

    The file needs no network and no other file. It shows the scan with the brain, the haemorrhage and the maps as
    layers, the probabilities, clinical values and scores, warnings and provenance. This function needs the extra
    `report`.

    Args:
        prediction: The prediction.
        scan: The scan, as in `predict`; None for a report without a viewer. A scan that `Model.load_scan` returned
            shows the brain alone.
        target: HTML file. Missing folders are created.
        maps: Saliency maps of the scan.
        scores: Clinical scores of the patient, from `clinical_scores.from_haemorrhage`.
        spec: Description of the model, with the meaning and threshold of each task. By default that of the zoo, if the
            model is there.
        identifiers: Whether to show the path of the scan and what the DICOM header says of its series.

    Returns:
        The path.

    Raises:
        ScanError: The scan cannot be read, or a map belongs to another scan.
        IchprogError: Jinja2 or Pillow is not installed.

    Examples:
        ```python
        prediction = ichprog.predict(model, "scan.nii.gz", haemorrhage=True)
        maps = ichprog.explain(model, "scan.nii.gz", method=["grad_cam", "guided_backprop"])
        ichprog.save_report(prediction, "scan.nii.gz", "report.html", maps=maps)
        ```
    """
    from ichprog.cohort import is_simulated
    from ichprog.reporting.overlay import find_brain
    from ichprog.results import Saliency, with_scores
    from ichprog.scan import read
    from ichprog.sources import scan_of

    volumes = None
    if scan is not None and prediction.error is None:
        loaded = read(scan_of(scan))
        listed = [maps] if isinstance(maps, Saliency) else list(maps.values() if isinstance(maps, Mapping) else maps)
        volumes = prepare_volumes(loaded, layers_of(prediction, find_brain(loaded), listed))
    path, source = Path(target), Path(prediction.scan)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = render(
        with_scores(prediction, scores),
        volumes=volumes,
        spec=spec or find_spec(prediction.model),
        is_simulated=source.exists() and is_simulated(source),
        identifiers=identifiers,
    )
    write_text(path, text)
    return path


def layers_of(prediction: "Prediction", brain: np.ndarray | None, maps: "Sequence[Saliency]") -> list[Layer]:
    """Return brain, haemorrhage and maps as layers of a report.

    Args:
        prediction: The prediction, with its haemorrhage or without.
        brain: `(i, j, k)` mask of the brain in LPS order, or None.
        maps: Saliency maps.
    """
    from ichprog.scan import read

    layers = [] if brain is None else [Layer("Brain", "brain", brain)]
    if prediction.haemorrhage is not None:
        found = prediction.haemorrhage
        layers.append(Layer("Haemorrhage", "haemorrhage", read(found.mask).hu, tuple(found.regions)))
    layers += [Layer(f"Map of {each.task}: {each.label}, {each.method}", "map", read(each.image).hu) for each in maps]
    return layers


def find_spec(model: str) -> "ModelSpec | None":
    """Return the description of a model of the zoo, or None if it is not there.

    Args:
        model: Name of the model.
    """
    from ichprog import zoo
    from ichprog.errors import IchprogError

    try:
        return zoo.find(model)
    except IchprogError:
        return None


def render(
    record: Mapping[str, Any],
    *,
    name: str | None = None,
    volumes: Volumes | None = None,
    no_viewer: str = "",
    spec: "ModelSpec | None" = None,
    is_simulated: bool = False,
    identifiers: bool = False,
    with_scripts: bool = True,
) -> str:
    """Return a result as one HTML file. The same content gives the same text.

    Args:
        record: A result as plain data, as `Prediction.to_dict` returns it and files of results hold it.
        name: Name of the scan in the report; by default its file name, or a pseudonym for DICOM.
        volumes: Scan and layers for the viewer.
        no_viewer: Why there is no viewer, if there are no volumes.
        spec: Description of the model.
        is_simulated: Whether the patient is simulated.
        identifiers: Whether to show the path of the scan and what the DICOM header says of its series.
        with_scripts: Whether the file has the viewer; otherwise it has the picture of slices only, as for printing.

    Raises:
        RunError: The record is no result of a scan.
        IchprogError: Jinja2 is not installed.
    """
    try:
        scan = str(record["scan"])
        shown = name or public_name(scan)
        public = dict(record) if identifiers else without_identifiers(record, shown)
        view = _view(public, spec)
        summary = _summary(public, shown, is_simulated, volumes)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"The result of {record.get('scan', 'a scan')} cannot be read ({type(error).__name__}: {error}). Give a "
            "file that `ichprog predict -o` wrote."
        ) from error
    scripts = [viewer_script(), asset("prediction.js")] if volumes is not None and with_scripts else []
    text: str = template("prediction.html").render(
        view,
        name=shown,
        path=scan if identifiers else None,
        summary=summary,
        summary_id=_SUMMARY_ID,
        volumes=volumes,
        with_scripts=with_scripts,
        no_viewer=no_viewer,
        notices=_notices(public, is_simulated),
        is_simulated=is_simulated,
        style=asset("prediction.css"),
        scripts=scripts,
        policy=content_policy(scripts),
        version=version("ichprog"),
    )
    return text


def read_summary(path: Path) -> dict[str, Any] | None:
    """Return the summary in the head of a report, or None if the file is no report.

    Args:
        path: HTML file.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(65_536)
    found = re.search(rf'<script type="application/json" id="{_SUMMARY_ID}">(.*?)</script>', head, re.DOTALL)
    if found is None:
        return None
    try:
        summary = json.loads(found[1])
    except ValueError:
        return None
    return summary if isinstance(summary, dict) and isinstance(summary.get("name"), str) else None


@functools.cache
def asset(name: str) -> str:
    """Return a style sheet or script of the reports.

    Args:
        name: Name of a file in `templates`.
    """
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def viewer_script() -> str:
    """Return NiiVue with its licence."""
    folder = files(__package__) / "viewer"
    licence = (folder / "LICENSE.txt").read_text(encoding="utf-8")
    return f"/*\n{licence}*/\n{(folder / 'niivue.min.js').read_text(encoding='utf-8')}"


def content_policy(scripts: Sequence[str]) -> str:
    """Return a policy by which a browser runs these scripts only, and connects to no address.

    Args:
        scripts: Scripts as they are in the file.
    """
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def template(name: str) -> Any:
    """Return a template of the reports.

    Args:
        name: Name of a file in `templates`.

    Raises:
        IchprogError: Jinja2 is not installed.
    """
    filters = {"percent": format_percent, "share": _format_share, "number": _format_number, "sentence": _sentence}
    return load_template(name, filters)


def format_percent(p: float) -> str:
    """Return a probability in percent with one decimal; never 0 or 100 unless it is.

    Args:
        p: Probability.

    Examples:
        >>> format_percent(0.7039), format_percent(0.9999), format_percent(0.0)
        ('70.4 %', '> 99.9 %', '0 %')
    """
    if p in (0, 1):
        return f"{100 * p:.0f} %"
    text = f"{100 * p:.1f}"
    return {"0.0": "< 0.1 %", "100.0": "> 99.9 %"}.get(text, f"{text} %")


def _view(record: Mapping[str, Any], spec: "ModelSpec | None") -> dict[str, Any]:
    """Return what the template shows, in words and numbers."""
    is_blood_only = "tasks" not in record and "volume_ml" in record  # of `ichprog haemorrhage`
    blood = record if is_blood_only else record.get("haemorrhage")
    provenance = dict(record.get("provenance") or {})
    tasks = record.get("tasks") or {}
    known = {task.name: task for task in (() if spec is None else spec.tasks)}
    coverage, abstained = record.get("coverage"), record.get("abstained") or {}
    warnings = list(record.get("warnings") or [])
    if blood is not None and not is_blood_only:
        warnings += [each for each in blood.get("warnings", ()) if each not in warnings]
    return {
        "model": str(record["model"]),
        "patient": record.get("patient"),
        "error": None if record.get("error") is None else _view_warning(record["error"]),
        "tasks": [
            _view_task(task, answer, known.get(task), abstained.get(task), coverage) for task, answer in tasks.items()
        ],
        "abstained": _group(abstained),
        "coverage": coverage,
        "clinical": None if record.get("clinical") is None else _view_clinical(record["clinical"], tasks),
        "blood": None if blood is None or "volume_ml" not in blood else _view_blood(blood),
        "scores": None if record.get("scores") is None else _view_scores(record["scores"]),
        "warnings": [_view_warning(each) for each in warnings],
        "limits": list(provenance.get("limits") or ()) if blood is None else list(blood.get("limits") or ()),
        "model_limits": [] if spec is None else list(spec.limits),
        "intended_use": "" if spec is None else spec.intended_use,
        "calibration": "" if spec is None or spec.calibration is None else spec.calibration.patients,
        "provenance": json.dumps(provenance, indent=2, ensure_ascii=False),
        "scan_record": dict(provenance.get("scan") or {}),
    }


def _view_task(
    name: str, answer: Mapping[str, Any], task: "Task | None", abstained: str | None, coverage: float | None
) -> dict[str, Any]:
    """Return one task: bars of its labels, and how the label was chosen."""
    p, std, calibrated = answer["probabilities"], answer.get("std"), answer.get("calibrated")
    labels = list(p)
    threshold = None if task is None else task.threshold
    bars = [
        {
            "label": label,
            "p": float(p[label]),
            "std": None if std is None else float(std[label]),
            "low": max(0.0, p[label] - std[label]) if std else None,
            "high": min(1.0, p[label] + std[label]) if std else None,
            "calibrated": None if calibrated is None else float(calibrated[label]),
            "is_predicted": label == answer["label"],
            "threshold": threshold if len(labels) == 2 and label == labels[-1] else None,
        }
        for label in labels
    ]
    cuts = []
    if threshold is not None and len(labels) > 2:
        cuts = [
            {"label": " or ".join(labels[n:]), "p": sum(float(p[each]) for each in labels[n:]), "threshold": threshold}
            for n in range(1, len(labels))
        ]
    return {
        "name": name,
        "meaning": "" if task is None else task.meaning,
        "label": answer["label"],
        "bars": bars,
        "cuts": cuts,
        "decision": _decision(answer["label"], bars, cuts, threshold),
        "has_spread": std is not None,
        "is_calibrated": calibrated is not None,
        "set": None if answer.get("label_set") is None else " or ".join(answer["label_set"]),
        "coverage": coverage,
        "abstained": abstained,
        "volume_ml": answer.get("volume_ml"),
    }


def _decision(label: str, bars: list[dict[str, Any]], cuts: list[dict[str, Any]], threshold: float | None) -> str:
    """Return in one sentence why a label is predicted."""
    if threshold is None:
        return f"Predicted: {label}."
    ends = cuts or [bars[-1]]
    passed = [end for end in ends if end["p"] > threshold]
    shown = passed[-1] if passed else ends[0]
    verb = "exceeds" if passed else "does not exceed"
    of = f"the probability of {shown['label']}, {format_percent(shown['p'])},"
    return f"Predicted: {label}, because {of} {verb} the threshold of {_format_share(threshold)}."


def _format_share(share: float) -> str:
    """Return a chosen share, such as a threshold, in percent."""
    return f"{100 * share:.4g} %"


def _group(abstained: Mapping[str, str]) -> list[dict[str, str]]:
    """Return each reason to abstain once, with the names of its tasks."""
    tasks: dict[str, list[str]] = {}
    for task, reason in abstained.items():
        tasks.setdefault(str(reason), []).append(task)
    return [{"tasks": ", ".join(names), "reason": reason} for reason, names in tasks.items()]


def _view_clinical(use: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Return each clinical value with the change of the log-odds of the last label of each task."""
    changes = use.get("contributions") or {}
    largest = max((abs(float(change)) for by in changes.values() for change in by.values()), default=0.0) or 1.0
    rows = [
        {
            "name": name,
            "value": value,
            "changes": [
                {
                    "task": task,
                    "label": list(tasks[task]["probabilities"])[-1] if task in tasks else "the last label",
                    "change": float(by[name]),
                    "share": abs(float(by[name])) / largest,
                }
                for task, by in changes.items()
                if name in by
            ],
        }
        for name, value in use["used"].items()
    ]
    return {"rows": rows, "missing": list(use.get("missing") or ())}


def _view_blood(blood: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether there is a haemorrhage, its volumes with intervals, and its place."""
    intervals = blood.get("intervals_ml") or {}
    volumes = [
        {"part": _readable(part), "ml": float(ml), "interval": intervals.get(part)}
        for part, ml in blood["volume_ml"].items()
        if part == "total" or ml > 0
    ]
    places = {"side": blood.get("side"), "location": blood.get("location")}
    facts = [(key, _readable(str(value))) for key, value in places.items() if value is not None]
    for key, words in (("intraventricular", "blood in the ventricles"), ("infratentorial", "below the tentorium")):
        if blood.get(key) is not None:
            facts.append((words, f"probability {format_percent(float(blood[key]))}"))
    if blood.get("midline_shift_mm") is not None:
        interval = blood.get("midline_shift_interval_mm")
        between = "" if not interval else f" ({interval[0]:.1f} to {interval[1]:.1f} mm)"
        facts.append(("midline shift", f"{blood['midline_shift_mm']:.1f} mm{between}"))
    elif blood.get("midline_shift_reason"):
        facts.append(("midline shift", f"not measured: {blood['midline_shift_reason']}"))
    return {
        "model": blood["model"],
        "p": float(blood["probability"]),
        "threshold": float(blood["threshold"]),
        "is_present": bool(blood["is_present"]),
        "volumes": volumes,
        "facts": facts,
    }


def _view_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the clinical scores with their variables."""
    listed = []
    for score in (scores.get("ich"), scores.get("func")):
        if score is None:
            continue
        shares = sorted({float(score["share_low"]), float(score["share_high"])})
        listed.append({
            "name": score["name"],
            "value": str(score["low"]) if score["low"] == score["high"] else f"{score['low']} to {score['high']}",
            "outcome": score["outcome"],
            "share": " to ".join(f"{100 * share:.0f} %" for share in shares),
            "source": score["source"],
            "variables": [_view_variable(each) for each in score["variables"]],
        })  # fmt: skip
    return {"scores": listed, "notes": list(scores.get("notes") or ())}


def _view_variable(variable: Mapping[str, Any]) -> dict[str, str]:
    value, choices = variable.get("value"), variable.get("choices") or ()
    if value is None:
        text = " or ".join(map(str, choices)) or ("unknown" if variable["source"] == "unknown" else "uncertain")
    else:
        text = _format_number(value)
    if variable.get("interval"):
        text += f" ({_format_number(variable['interval'][0])} to {_format_number(variable['interval'][1])})"
    if variable.get("probability") is not None:
        text += f", probability {format_percent(float(variable['probability']))}"
    return {"name": _readable(variable["name"]), "text": text, "source": variable["source"]}


def _view_warning(warning: Mapping[str, Any]) -> dict[str, str]:
    unit = warning.get("unit") or ""
    return {
        "code": str(warning["code"]),
        "message": str(warning["message"]),
        "measured": _with_unit(warning.get("measured"), unit),
        "expected": _with_unit(warning.get("expected"), unit),
    }


def _with_unit(value: Any, unit: str) -> str:
    text = "" if value is None else _format_number(value)
    return f"{text} {unit}".rstrip() if text and text != unit else text


def _notices(record: Mapping[str, Any], is_simulated: bool) -> list[str]:
    """Return the sentences that stay in sight, the most important first."""
    notice = str((record.get("provenance") or {}).get("notice") or "")
    rest = notice.replace(NOTICE, "").strip()
    return [NOTICE, *([SIMULATED] if is_simulated else []), *([rest] if rest else [])]


def _summary(record: Mapping[str, Any], name: str, is_simulated: bool, volumes: Volumes | None) -> dict[str, Any]:
    """Return what an index of reports shows of this one."""
    is_blood_only = "tasks" not in record and "volume_ml" in record
    blood = (record if is_blood_only else record.get("haemorrhage")) or {}
    error = record.get("error")
    return {
        "name": str(record.get("patient") or name),
        "scan": name,
        "model": str(record["model"]),
        "error": None if error is None else str(error.get("code")),
        "simulated": is_simulated,
        "tasks": {
            task: {
                "label": answer["label"],
                "last": list(answer["probabilities"])[-1],
                "p": round(float(list(answer["probabilities"].values())[-1]), 4),
            }
            for task, answer in (record.get("tasks") or {}).items()
        },
        "blood_ml": round(float(blood["volume_ml"]["total"]), 2) if "volume_ml" in blood else None,
        "warnings": sorted({str(each["code"]) for each in _all_warnings(record, blood)}),
        "abstained": list(record.get("abstained") or ()),
        "notice": str((record.get("provenance") or {}).get("notice") or ""),
        "thumbnail": "" if volumes is None else volumes.thumbnail,
    }


def _all_warnings(record: Mapping[str, Any], blood: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from record.get("warnings") or ()
    yield from blood.get("warnings") or ()


def _format_number(value: Any) -> str:
    """Return a value of a warning or a score for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_number, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_format_number(each)}" for key, each in value.items())
    return str(value)


def _readable(name: str) -> str:
    return name.replace("_ml", "").replace("_", " ")


def _sentence(text: str) -> str:
    """Return a text that begins with a capital and ends with a full stop."""
    text = text.strip()
    return text and text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
