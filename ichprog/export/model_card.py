"""Describe a model in Markdown, from its spec: its page in the documentation and its model card on the Hub."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ichprog.hub import WeightFile
from ichprog.scan import CHECKS, format_range, resolve_ranges
from ichprog.spec import ModelSpec, PluginRef, Task

CAUTION = (
    "The models predict outcomes of patients under the care that these patients received. If care was withdrawn early, "
    "a poor outcome followed from the withdrawal, and a prediction of it fulfils itself. Guidelines recommend to wait "
    "48 to 72 hours. Do not use any result of a model in a decision to withdraw or limit care."
)
_LICENCES = (  # names of licences on the Hub; any other licence is "other" there
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "unlicense",
)  # fmt: skip


def config_json(spec: ModelSpec) -> str:
    """Return the text of a `config.json`.

    Args:
        spec: The model.
    """
    return json.dumps(spec.to_dict(), indent=2, ensure_ascii=False) + "\n"


def build_card(spec: ModelSpec, repo: str, run: Mapping[str, Any] | None = None) -> str:
    """Return the model card for the Hub, with metadata in its header.

    Args:
        spec: The model.
        repo: Repository, "org/name".
        run: Summary of the training run by `read_run_summary`, if the weights come from a run.

    Examples:
        >>> from ichprog import zoo
        >>> build_card(zoo.find("compact.prognosis_gcs3_age"), "org/name").splitlines()[0]
        '---'
    """
    sections = list(card_sections(spec).items())
    if run is not None:
        index = [title for title, _ in sections].index("Weights") + 1
        sections.insert(index, ("Training", _without_html(_training_section(spec, run))))
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    intro = _without_html(f"> **{' '.join(spec.notice.split())}** {CAUTION}\n\n{spec.summary}")
    return f"""\
---
{_metadata(spec, run)}
---

# {spec.name}

{intro}

```bash
pip install ichprog
```

```python
import ichprog

model = ichprog.load_model("hf-hub:{repo}@main")  # replace main by a commit to pin the weights
prediction = ichprog.predict(model, "scan.nii.gz")
print(prediction["{spec.tasks[0].name}"].probabilities)
```

{body}
"""


def card_sections(spec: ModelSpec, *, warning: str = "warning") -> dict[str, str]:
    """Return the sections of a model's description, Markdown by title.

    Args:
        spec: The model.
        warning: Word for warnings, such as a link to their documentation.
    """
    cited = spec.citation
    doi = f"doi [{cited.doi}](https://doi.org/{cited.doi})." if cited.doi else ""
    tasks = ["task", "meaning", "labels in order", "true label", "head", "threshold", "loss weight"]
    terms = [
        ["published code", spec.licence.code],
        ["weights", spec.licence.weights],
        ["training data", spec.licence.data],
    ]
    sections = {
        "Intended use": spec.intended_use,
        "Predictions": f"""\
{markdown_table(tasks, [_task_row(task) for task in spec.tasks])}

The true label is the last one whose bound the patient's number in the column of the cohort meets, otherwise the first.
The predicted label is the last one for which the probability of this label or a later one exceeds the threshold.
Backbone: `{spec.backbone.name}`{_format_options(spec.backbone)}.""",
        **_clinical_section(spec),
        **_calibration_section(spec),
        "Preprocessing": f"""\
{chr(10).join(f"{number}. {step}" for number, step in enumerate(_preprocessing_steps(spec), 1))}

Expected scans; outside of these ranges the prediction comes with a {warning}:

{_expected_ranges_table(spec)}""",
        "Weights": markdown_table(["", ""], _weight_rows(spec)),
        "Licences": f"""\
{markdown_table(["what", "terms"], terms)}

The library, ichprog, is under the MIT licence. This licence covers weights or data only if the table says so.""",
        "Limits": "\n".join(f"- {limit}" for limit in spec.limits),
        "Citation": " ".join(part for part in (cited.text, doi, cited.url) if part),
    }
    return {title: _without_html(text) for title, text in sections.items()}


def _without_html(text: str) -> str:
    """Return Markdown in which no text of a description or a run is an HTML tag. "<80" is none."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def _clinical_section(spec: ModelSpec) -> dict[str, str]:
    """Return the section on clinical values, if the model uses any."""
    if not spec.clinical:
        return {}
    rows = [[f"`{v.column}`", v.unit, f"{v.lowest:g} to {v.highest:g}"] for v in spec.clinical]
    users = ", ".join(f"`{task.name}`" for task in spec.tasks if task.uses_clinical or task.combinations)
    how = "a regression on the answers of the networks" if spec.fusion is None else f"the fusion `{spec.fusion.name}`"
    text = f"Used for {users} by {how}, in addition to the image. Any value may be missing, and none is replaced."
    return {"Clinical values": f"{markdown_table(['value', 'unit', 'allowed'], rows)}\n\n{text}"}


def _calibration_section(spec: ModelSpec) -> dict[str, str]:
    """Return the section on the calibration, if the model has one."""
    if spec.calibration is None:
        return {}
    rows = []
    for name, each in spec.calibration.tasks.items():
        changes = "; ".join(f"slope {a.slope:.2f}, intercept {a.intercept:+.2f}" for a in each.adjustments)
        limit = f"{each.set_limits['90']:.3f}" if "90" in each.set_limits else "none"
        rows.append([f"`{name}`", str(each.patients), changes, limit])
    head = ["task", "patients", "change of the log-odds", "lowest probability of a label in a set for 90 %"]
    text = (
        f"{spec.calibration.patients} A scan is unusual beyond a distance of {spec.calibration.inputs.threshold:.1f}. "
        "The calibration holds for patients like these."
    )
    return {"Calibration": f"{markdown_table(head, rows)}\n\n{text}"}


def read_run_summary(folder: Path, weights: Sequence[WeightFile]) -> dict[str, Any] | None:
    """Return the publishable facts of a training run: numbers and versions, without names of patients or paths.

    Args:
        folder: Folder of the run.
        weights: Published weights; only the results of these weights are returned.

    Returns:
        `protocol`, `versions`, number of `patients`, number of `simulated` patients, number of `folds`, `results`,
        `out_of_fold` AUCs, and the name of the `description` that was trained by. None if the folder has no readable
        record of a run.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        checksums = {file.sha256 for file in weights}
        return {
            "protocol": {n: v for n, v in run["protocol"].items() if isinstance(v, int | float | str)},
            "versions": {n: v for n, v in run["versions"].items() if isinstance(v, str)},
            "patients": int(run["cohort"]["patients"]),
            "folds": int(run["folds"]),
            "results": [result for result in run["results"].values() if result["sha256"] in checksums],
            "simulated": run.get("origin", {}).get("simulated"),
            "description": run.get("description"),
            # these figures hold for all folds of the run together
            "out_of_fold": run.get("out_of_fold", [])
            if all(result["sha256"] in checksums for result in run["results"].values())
            else [],
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        head: Titles of the columns.
        rows: Cells of each row.

    Examples:
        >>> print(markdown_table(["name", "value"], [["a", "1"]]))
        | name | value |
        | --- | --- |
        | a | 1 |
    """
    lines = [[" ".join(cell.replace("|", "&#124;").split()) for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metadata(spec: ModelSpec, run: Mapping[str, Any] | None) -> str:
    """Return the header of a model card as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    licence = spec.licence.weights.lower()
    simulated = "simulated " if run and run["simulated"] == run["patients"] else ""
    results = [
        EvalResult(
            task_type="image-classification", task_name=each["task"], dataset_type="out-of-fold",
            dataset_name=f"{simulated}training patients, out of fold", metric_type="roc_auc",
            metric_name="out-of-fold AUC", metric_value=round(each["auc"], 3),
        )
        for each in _out_of_fold(run) if each["auc"] is not None
    ] or [
        EvalResult(
            task_type="image-classification", task_name=task, dataset_type="validation",
            dataset_name=f"validation parts of the {simulated}training patients", metric_type="roc_auc",
            metric_name="mean AUC over folds", metric_value=round(statistics.mean(values), 3),
        )
        for task, values in _validation_aucs(spec, run).items()
    ]  # fmt: skip
    data = ModelCardData(
        license=licence if licence in _LICENCES else "other",
        library_name="ichprog",
        tags=["ichprog", "medical", "intracranial-haemorrhage"],
        model_name=spec.name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _validation_aucs(spec: ModelSpec, run: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """Return the AUC of each fold on its validation part, by task."""
    results = run["results"] if run else []
    values = {task.name: [r.get("best", {}).get(f"val_auc_{task.name}") for r in results] for task in spec.tasks}
    known = {task: [value for value in aucs if value is not None] for task, aucs in values.items()}
    return {task: aucs for task, aucs in known.items() if aucs}


def _out_of_fold(run: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the out-of-fold AUC of each task, with its interval."""
    return list(run["out_of_fold"]) if run else []


def _format_out_of_fold(auc: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row of the table of out-of-fold AUCs."""
    value = "undefined" if auc["auc"] is None else f"{auc['auc']:.3f}"
    interval = "" if auc["low"] is None else f"{auc['low']:.3f} to {auc['high']:.3f}"
    return [f"`{auc['task']}`", value, interval, str(auc["patients"]), str(auc["folds"])]


def _training_section(spec: ModelSpec, run: Mapping[str, Any]) -> str:
    """Describe how weights were trained, with the results of the run."""
    described, simulated = run["description"], run["simulated"]
    about = f", {'all' if simulated == run['patients'] else f'{simulated} of them'} simulated" if simulated else ""
    rows = [
        ["patients", f"{run['patients']}{about}"],
        *([["trained by the description", f"`{described}`, without its weights"]] if described else []),
        ["folds", f"{len(run['results'])} of {run['folds']} are published"],
        ["protocol", ", ".join(f"{name} {value}" for name, value in run["protocol"].items())],
        ["versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items())],
    ]
    summary = markdown_table(["", ""], rows)
    results = [
        [f"`{task}`", f"{statistics.mean(values):.3f}", _format_sd(values), str(len(values))]
        for task, values in _validation_aucs(spec, run).items()
    ]
    tested = [_format_out_of_fold(each) for each in _out_of_fold(run)]
    if tested:
        summary += f"""

Out-of-fold AUC: each patient is predicted by the fold that was not trained on this patient.

{markdown_table(["task", "AUC", "95 % interval", "patients", "folds"], tested)}"""
    if not results:
        return summary
    return f"""\
{summary}

AUC in the validation part of each fold, which also selected the best epoch. Expect less for other patients:

{markdown_table(["task", "mean AUC", "SD between folds", "folds"], results)}"""


def _task_row(task: Task) -> list[str]:
    return [
        f"`{task.name}`",
        task.meaning,
        ", ".join(f"`{label}`" for label in task.labels),
        _format_target(task),
        f"`{task.head.name}`{_format_options(task.head)}",
        "none: the most probable label" if task.threshold is None else f"{task.threshold:g}",
        f"{task.loss_weight:g}",
    ]


def _preprocessing_steps(spec: ModelSpec) -> list[str]:
    contract, window = spec.input, spec.input.window
    above = {"zero": "0, which removes dense structures", "one": "1"}[window.above]
    steps = [
        f"Voxels are reordered to {contract.orientation}: left, posterior, superior.",
        "Everything outside the brain becomes 0." if contract.brain_only else "The whole head is used.",
        f"{window.low:g} HU and less becomes 0; {window.high:g} HU and more becomes {above}.",
    ]
    if contract.pad_slices:
        steps.append(f"A scan with fewer than {contract.shape[0]} slices is padded with 0 on both sides.")
    size = " x ".join(map(str, contract.shape))
    return [*steps, f"The grid is resized to {size} (slices, rows, columns) by {contract.resize} averaging."]


def _weight_rows(spec: ModelSpec) -> list[list[str]]:
    weights = spec.weights
    return [
        ["repository on the Hub", f"`{weights.repo}`" if weights.repo else "none: stored with the spec"],
        ["commit", f"`{weights.revision}`" if weights.revision else "none"],
        ["folder", f"`{weights.folder}`" if weights.folder else "top"],
        ["format", weights.format],
        *([f"SHA-256 of `{name}`", f"`{value}`"] for name, value in weights.sha256.items()),
    ]


def _expected_ranges_table(spec: ModelSpec) -> str:
    ranges = resolve_ranges(spec.input.expected_ranges)
    rows = [[CHECKS[code].quantity, format_range(bounds), CHECKS[code].unit or ""] for code, bounds in ranges.items()]
    return markdown_table(["quantity", "expected", "unit"], rows)


def _format_target(task: Task) -> str:
    """Return the column of a task's true label with the bound of each label."""
    word = "from" if task.target.severity == "high" else "below"
    bounds = zip(task.labels[1:], task.target.bin_edges, strict=True)
    return f"`{task.target.column}`: " + ", ".join(f"`{label}` {word} {edge:g}" for label, edge in bounds)


def _format_sd(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""


def _format_options(plugin: PluginRef) -> str:
    options = ", ".join(f"{name} {value}" for name, value in plugin.options.items())
    return f" ({options})" if options else ""
