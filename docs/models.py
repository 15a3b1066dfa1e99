"""Writes the model pages from the zoo: `python docs/models.py`.

Everything on them is in the models' JSON files; the pages are kept in the repository so that they can be read there,
and a test says when they are out of date.
"""

import textwrap
from pathlib import Path

from ichprog import zoo
from ichprog.export import CAUTION, card_sections, markdown_table
from ichprog.spec import ModelSpec

FOLDER = Path(__file__).with_suffix("")


def pages() -> dict[str, str]:
    """Each page's text by its file name: one of each model of this project, and the list of them."""
    specs = [zoo.read_entry(entry) for entry in zoo.entries() if entry.distribution == "ichprog"]
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

{markdown_table(["name", "tasks", "what it is"], rows)}

{_caution(specs[0].notice)}
These pages are written from the models' own descriptions by `python docs/models.py`.
"""


def _page(spec: ModelSpec) -> str:
    parts = card_sections(spec, warning="[warning](../scans.md#warnings)")
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    return f"""\
# {spec.name}

{spec.summary}

{_caution(spec.notice)}
{body}
"""


def _caution(notice: str) -> str:
    lines = textwrap.wrap(CAUTION, 120, initial_indent="    ", subsequent_indent="    ")
    return f'!!! warning "{notice}"\n' + "\n".join(lines) + "\n"


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
