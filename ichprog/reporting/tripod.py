"""Fill the TRIPOD+AI checklist with facts of a study.

Source: Collins et al., BMJ 2024;385:e078378, doi 10.1136/bmj-2023-078378.
"""

import re
import string
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Literal

from ichprog.reporting.html import Section, Table

COLUMNS = {"number": "item", "topic": "topic", "content": "what a report should include", "answer": "in this study"}
_OPEN = "To be written by the authors"


def fill_checklist(
    facts: Mapping[str, object], *, kind: Literal["development", "evaluation"] = "development"
) -> list[dict[str, str]]:
    """Return the TRIPOD+AI items with what a study can answer and what its authors must write.

    Args:
        facts: Facts by the names in braces in `tripod.toml`. An item with a fact that is missing or None is left to the
            authors.
        kind: Whether the study develops models, or evaluates a model that was developed before.

    Returns:
        Rows with "number", "section", "topic", "applies", "content" and "answer".

    Examples:
        >>> fill_checklist({})[0]["answer"]
        'To be written by the authors.'
    """
    items = tomllib.loads((files(__package__) / "tripod.toml").read_text(encoding="utf-8"))["item"]
    return [
        {key: item[key] for key in ("number", "section", "topic", "applies", "content")}
        | {"answer": _answer(item, facts, kind)}
        for item in items
    ]


def checklist_section(rows: list[dict[str, str]]) -> Section:
    """Return the filled checklist as a section of a report.

    Args:
        rows: Result of `fill_checklist`.
    """
    source = (
        "The items of TRIPOD+AI (Collins et al., BMJ 2024;385:e078378, doi 10.1136/bmj-2023-078378) in this project's "
        "own words, with the answers that the run can give. Use the official form for a submission."
    )
    return Section("TRIPOD+AI", [source], [Table(rows, COLUMNS, "The checklist", folded=True)])


def _answer(item: Mapping[str, str], facts: Mapping[str, object], kind: str) -> str:
    if kind == "evaluation" and kind not in item["applies"]:
        return "Not applicable: the model was developed before."
    prefix = "evaluation_" if kind == "evaluation" else ""
    answer, remaining = item.get(f"{prefix}answer", ""), item.get(f"{prefix}remaining", "")
    needed = {name for _, name, _, _ in string.Formatter().parse(answer) if name}
    if not answer or any(facts.get(name) is None for name in needed):
        return f"{_OPEN}: {remaining}." if remaining and not answer else f"{_OPEN}."
    text = re.sub(r"\.\.(?!\.)", ".", answer.format_map(facts))
    return f"{text} {_OPEN}: {remaining}." if remaining else text
