"""Writes the model pages from the zoo: `python docs/models.py`.

Everything on them is in the models' JSON files; the pages are kept in the repository so that they can be read there,
and a test says when they are out of date.
"""

from pathlib import Path

from ichprog import zoo
from ichprog.spec import ModelSpec

FOLDER = Path(__file__).with_suffix("")
_CAUTION = """\
!!! warning "{notice}"
    The models answer with what happened to patients under the care they were given. Where care was withdrawn early, a
    poor outcome followed from that, and a prediction of it fulfils itself. Guidelines ask to wait 48 to 72 hours. No
    result of a model may take part in a decision to withdraw or limit care.
"""


def pages() -> dict[str, str]:
    """Each page's text by its file name: one of each model of this project, and the list of them."""
    specs = [zoo.spec_of(entry) for entry in zoo.entries() if entry.distribution == "ichprog"]
    return {"index.md": _list(specs), **{f"{spec.name}.md": _page(spec) for spec in specs}}


def _list(specs: list[ModelSpec]) -> str:
    rows = [
        [
            f"[{spec.name}]({spec.name}.md)" + (" (the default)" if spec.name == zoo.DEFAULT else ""),
            ", ".join(f"{task.name} ({len(task.labels)})" for task in spec.tasks),
            spec.summary,
        ]
        for spec in specs
    ]
    return f"""\
# Models

A name is a backbone and the tasks, and never changes its meaning. The number behind a task is that of its labels.
Models of one backbone differ in their tasks and their weights alone, so that several tasks and one can be compared.

{_table(["name", "tasks", "what it is"], rows)}

{_CAUTION.format(notice=specs[0].notice)}
These pages are written from the models' own descriptions by `python docs/models.py`.
"""


def _page(spec: ModelSpec) -> str:
    contract, seen, weights = spec.input, spec.input.plausible, spec.weights
    tasks = [
        [
            f"`{task.name}`",
            task.meaning,
            ", ".join(f"`{label}`" for label in task.labels),
            f"`{task.head.name}`{_options(task.head.options)}",
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
    usual = [
        ["slices", _range(seen.slices), ""],
        ["pixel spacing", _range(seen.in_plane_spacing_mm), "mm"],
        ["distance of slices", _range(seen.slice_spacing_mm), "mm"],
        ["extent from foot to head", _range(seen.coverage_mm), "mm"],
        ["extent of a slice", _range(seen.field_of_view_mm), "mm"],
        ["volume of the brain", _range(seen.brain_ml), "mL"],
        ["largest piece as dense as blood", f"at least {seen.blood_dense_ml:g}", "mL"],
        ["turn against the patient's axes", f"at most {seen.obliquity_deg:g}", "degrees"],
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
    return f"""\
# {spec.name}

{spec.summary}

{_CAUTION.format(notice=spec.notice)}
## Intended use

{spec.intended_use}

## What it predicts

{_table(["task", "meaning", "labels in order", "head", "threshold", "loss weight"], tasks)}

The label is the last one for which the probability of it or a later one exceeds the threshold.
Backbone: `{spec.backbone.name}`{_options(spec.backbone.options)}.

## What it sees

{chr(10).join(f"{number}. {step}" for number, step in enumerate(steps, 1))}

What scans for this model look like; outside of it a scan is answered with a [warning](../scans.md#warnings):

{_table(["measure", "usual", "unit"], usual)}

## Weights

{_table(["", ""], place)}

## Licences

{_table(["what", "terms"], terms)}

This library is under the MIT licence; that covers neither the weights nor the data.

## Limits

{chr(10).join(f"- {limit}" for limit in spec.limits)}

## To cite

{spec.citation.text} doi [{spec.citation.doi}](https://doi.org/{spec.citation.doi}). {spec.citation.url}
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:g} to {bounds[1]:g}"


def _options(options: object) -> str:
    said = ", ".join(f"{name} {value}" for name, value in dict(options).items())  # type: ignore[call-overload]
    return f" ({said})" if said else ""


def main() -> None:
    """Writes every page and takes away those of models that are no more."""
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
