"""What is said of a model in prose, from its description: its page in the documentation, its card on the Hub."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ichprog.hub import WeightFile
from ichprog.scan import CHECKS, format_range, resolve_ranges
from ichprog.spec import ModelSpec, PluginRef, Task

CAUTION = (
    "The models answer with what happened to patients under the care they were given. Where care was withdrawn early, "
    "a poor outcome followed from that, and a prediction of it fulfils itself. Guidelines ask to wait 48 to 72 hours. "
    "No result of a model may take part in a decision to withdraw or limit care."
)
_LICENCES = (  # the Hub's names of licences; any other is "other" there
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "unlicense",
)  # fmt: skip


def config(spec: ModelSpec) -> str:
    """The text of a `config.json`."""
    return json.dumps(spec.to_dict(), indent=2, ensure_ascii=False) + "\n"


def card(spec: ModelSpec, repo: str, run: Mapping[str, Any] | None = None) -> str:
    """A model card for the Hub.

    Args:
        spec: The model.
        repo: Where it is published, "org/name".
        run: What `record` gives, where the weights come from a run.
    """
    licence = spec.licence.weights.lower()
    known = licence in _LICENCES
    parts = sections(spec)
    if run is not None:
        place = list(parts).index("Weights") + 1
        parts = dict([*list(parts.items())[:place], ("Training", _training(spec, run)), *list(parts.items())[place:]])
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    return f"""\
---
license: {licence if known else "other"}
library_name: ichprog
tags:
- ichprog
- medical
- intracranial-haemorrhage
---

# {spec.name}

> **{spec.notice}** {CAUTION}

{spec.summary}

```bash
pip install ichprog
```

```python
import ichprog

model = ichprog.load_model("hf-hub:{repo}@main")  # a commit in place of main never changes
prediction = ichprog.predict(model, "scan.nii.gz")
print(prediction["{spec.tasks[0].name}"].probabilities)
```

{body}
"""


def sections(spec: ModelSpec, *, warning: str = "warning") -> dict[str, str]:
    """What is said of a model, each title with its text in Markdown.

    Args:
        spec: The model.
        warning: How warnings are called, such as a link to where they are explained.
    """
    contract, weights = spec.input, spec.weights
    rows = [
        [
            f"`{task.name}`",
            task.meaning,
            ", ".join(f"`{label}`" for label in task.labels),
            _target(task),
            f"`{task.head.name}`{_options(task.head)}",
            "most probable label" if task.threshold is None else f"{task.threshold:g}",
            f"{task.loss_weight:g}",
        ]
        for task in spec.tasks
    ]
    above = {"zero": "0 (what is denser is removed)", "one": "1"}[contract.window.above]
    steps = [
        f"Voxels in {contract.orientation} order: left, posterior, superior.",
        "The brain alone: everything else is 0." if contract.brain_only else "The whole head.",
        f"{contract.window.low:g} HU becomes 0, and so does all below; {contract.window.high:g} HU and all above "
        f"becomes {above}.",
        *([f"Fewer than {contract.shape[0]} slices are padded with 0 on both sides."] if contract.pad_slices else []),
        f"Resized to {' x '.join(map(str, contract.shape))} (slices, rows, columns) by {contract.resize} averaging.",
    ]
    place = [
        ["repository on the Hub", f"`{weights.repo}`" if weights.repo else "none: beside the model's description"],
        ["commit", f"`{weights.revision}`" if weights.revision else "none"],
        ["folder", f"`{weights.folder}`" if weights.folder else "the top"],
        ["format", weights.format],
        *([f"SHA-256 of `{name}`", f"`{value}`"] for name, value in weights.sha256.items()),
    ]
    terms = [
        ["published code", spec.licence.code],
        ["weights", spec.licence.weights],
        ["training data", spec.licence.data],
    ]
    heads = ["task", "meaning", "labels in order", "true label", "head", "threshold", "loss weight"]
    cited = spec.citation
    doi = f"doi [{cited.doi}](https://doi.org/{cited.doi})." if cited.doi else ""
    return {
        "Intended use": spec.intended_use,
        "What it predicts": f"""\
{table(heads, rows)}

The true label is the last one whose bound the patient's number in that column of a cohort meets, else the first. The
predicted label is the last one for which the probability of it or a later one exceeds the threshold.
Backbone: `{spec.backbone.name}`{_options(spec.backbone)}.""",
        "What it sees": f"""\
{chr(10).join(f"{number}. {step}" for number, step in enumerate(steps, 1))}

What scans for this model look like; outside of it a scan is answered with a {warning}:

{_usual(spec)}""",
        "Weights": table(["", ""], place),
        "Licences": f"""\
{table(["what", "terms"], terms)}

The library, ichprog, is under the MIT licence; it covers weights or data only where they say so here.""",
        "Limits": "\n".join(f"- {limit}" for limit in spec.limits),
        "To cite": " ".join(part for part in (cited.text, doi, cited.url) if part),
    }


def record(folder: Path, weights: Sequence[WeightFile]) -> dict[str, Any] | None:
    """What may be told of the run that weights come from: numbers and versions, no names and no paths.

    Args:
        folder: The folder of a run.
        weights: The weights; of the run's results those that belong to them are kept.

    Returns:
        `protocol`, `versions`, `patients`, the number of `folds`, and of those that are here the `results`; None where
        the folder has no record of a run that can be read.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        sums = {file.sha256 for file in weights}
        return {
            "protocol": {n: v for n, v in run["protocol"].items() if isinstance(v, int | float | str)},
            "versions": {n: v for n, v in run["versions"].items() if isinstance(v, str)},
            "patients": int(run["cohort"]["patients"]),
            "folds": int(run["folds"]),
            "results": [result for result in run["results"].values() if result["sha256"] in sums],
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _training(spec: ModelSpec, run: Mapping[str, Any]) -> str:
    """How weights were trained, and the figures that the run itself has."""
    rows = [
        ["patients", str(run["patients"])],
        ["folds", f"{len(run['results'])} of {run['folds']} are here"],
        ["protocol", ", ".join(f"{name} {value}" for name, value in run["protocol"].items())],
        ["versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items())],
    ]
    figures = []
    for task in spec.tasks:
        found = [value for r in run["results"] if (value := r.get("best", {}).get(f"val_auc_{task.name}")) is not None]
        if found:
            spread = f"{statistics.stdev(found):.3f}" if len(found) > 1 else ""
            figures.append([f"`{task.name}`", f"{statistics.mean(found):.3f}", spread, str(len(found))])
    said = table(["", ""], rows)
    if not figures:
        return said
    return f"""\
{said}

In the part of its training patients by which each fold's epoch was chosen; of other patients expect less:

{table(["task", "mean AUC", "SD between folds", "folds"], figures)}"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _usual(spec: ModelSpec) -> str:
    """The table of what scans for a model look like."""
    ranges = resolve_ranges(spec.input.expected_ranges)
    rows = [[CHECKS[code].quantity, format_range(bounds), CHECKS[code].unit or ""] for code, bounds in ranges.items()]
    return table(["measure", "usual", "unit"], rows)


def _target(task: Task) -> str:
    """Where a task's true label comes from: a column, and each label's bound in it."""
    word = "from" if task.target.severity == "high" else "below"
    bounds = zip(task.labels[1:], task.target.bin_edges, strict=True)
    return f"`{task.target.column}`: " + ", ".join(f"`{label}` {word} {cut:g}" for label, cut in bounds)


def _options(part: PluginRef) -> str:
    said = ", ".join(f"{name} {value}" for name, value in part.options.items())
    return f" ({said})" if said else ""
