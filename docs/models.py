"""Write the model pages from the specs in the zoo: `python docs/models.py`.

All content comes from the JSON files of the models. The pages are part of the repository, and a test fails if they are
out of date.
"""

import textwrap
from pathlib import Path

from ichprog import zoo
from ichprog.export import CAUTION, card_sections, markdown_table
from ichprog.spec import ModelSpec

FOLDER = Path(__file__).with_suffix("")
NOTICE = "For research only, not for patient care."


def pages() -> dict[str, str]:
    """Return the text of each page by its file name: the list of models and one page for each model."""
    specs = [zoo.read_entry(entry) for entry in zoo.entries() if entry.distribution == "ichprog"]
    return {"index.md": _list_page(specs), **{f"{spec.name}.md": _model_page(spec) for spec in specs}}


def _list_page(specs: list[ModelSpec]) -> str:
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

A name consists of a backbone and tasks, and its meaning never changes. The table shows the number of labels of each
task in parentheses. Models with the same backbone differ only in tasks and weights, so that multi-task and single-task
models can be compared.

{markdown_table(["name", "tasks", "summary"], rows)}

{_caution(NOTICE)}
Each page states the notice, the limits and the licences of its model. `python docs/models.py` writes these pages.
"""


def _model_page(spec: ModelSpec) -> str:
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
    """Write every page, and remove the pages of models that no longer exist."""
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
