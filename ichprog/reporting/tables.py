"""Tables of results: the same rows as CSV, Markdown, LaTeX and HTML.

A row is a mapping from a column's name to text, a number, None where there is nothing to say, or an interval
`{"value": .., "low": .., "high": ..}` as `metrics.json` holds them. Text for readers is rounded; the CSV is not, and
has an interval in three columns, `auroc, auroc_low, auroc_high`.
"""

import csv
import html as _html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ichprog.io import atomic_write
from ichprog.metrics import label_of

Row = Mapping[str, Any]
Columns = Mapping[str, str] | Sequence[str]  # names and what readers see in their place, or names alone

NOTHING = "-"


def words(name: str) -> str:
    """A plain name such as `balanced_accuracy` or `auroc_1` as a reader sees it: "balanced accuracy", "AUROC 1"."""
    return label_of(name) or name.replace("_", " ")


def shown(value: Any) -> str:
    """A cell as readers see it.

    Shares and the like have three decimals, larger numbers fewer; an interval is "0.712 (0.650 to 0.770)"; what is
    None or not finite is a dash. A number that would round to nothing says so: "<0.001".
    """
    if isinstance(value, Mapping):
        middle, low, high = (_number(value.get(key)) for key in ("value", "low", "high"))
        if middle is None:
            return NOTHING
        digits = _decimals(middle)
        if low is None or high is None:
            return _fixed(middle, digits)
        return f"{_fixed(middle, digits)} ({_fixed(low, digits)} to {_fixed(high, digits)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        number = _number(value)
        if number is None:
            return NOTHING
        return "<0.001" if 0 < number < 0.0005 else _fixed(number, _decimals(number))
    return NOTHING if value is None or value == "" else " ".join(str(value).split())


def markdown(rows: Iterable[Row], columns: Columns, caption: str = "") -> str:
    """The table in Markdown, numbers to the right."""
    rows, heads = list(rows), _heads(columns)
    numeric = _numeric(rows, heads)
    lines = [
        [_markdown(head) for head in heads.values()],
        ["---:" if name in numeric else "---" for name in heads],
        *([_markdown(shown(row.get(name))) for name in heads] for row in rows),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_markdown(caption)}\n" if caption else f"{table}\n"


def latex(rows: Iterable[Row], columns: Columns, caption: str = "", *, label: str = "") -> str:
    """The table in LaTeX, which needs no package."""
    rows, heads = list(rows), _heads(columns)
    numeric = _numeric(rows, heads)
    lines = [r"\begin{table}", r"\centering"]
    if caption:
        lines.append(rf"\caption{{{_latex(caption)}}}")
    if label:
        lines.append(rf"\label{{tab:{label}}}")
    lines += [
        rf"\begin{{tabular}}{{{''.join('r' if name in numeric else 'l' for name in heads)}}}",
        r"\hline",
        " & ".join(map(_latex, heads.values())) + r" \\",
        r"\hline",
        *(" & ".join(_latex(shown(row.get(name))) for name in heads) + r" \\" for row in rows),
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def html(rows: Iterable[Row], columns: Columns, caption: str = "") -> str:
    """The table as an element of HTML."""
    rows, heads = list(rows), _heads(columns)
    numeric = _numeric(rows, heads)
    kind = {name: ' class="number"' if name in numeric else "" for name in heads}
    lines = ["<table>"]
    if caption:
        lines.append(f"<caption>{_html.escape(caption)}</caption>")
    cells = "".join(f'<th scope="col"{kind[name]}>{_html.escape(head)}</th>' for name, head in heads.items())
    lines.append(f"<thead><tr>{cells}</tr></thead><tbody>")
    for row in rows:
        cells = "".join(f"<td{kind[name]}>{_html.escape(shown(row.get(name)))}</td>" for name in heads)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def comma_separated(rows: Iterable[Row], columns: Columns) -> str:
    """The table as CSV under the columns' plain names, unrounded; what is not known is blank."""
    rows, heads = list(rows), _heads(columns)
    ranged = {name for name in heads if any(isinstance(row.get(name), Mapping) for row in rows)}
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow([each for name in heads for each in (_run_jobs(name) if name in ranged else [name])])
    for row in rows:
        cells: list[Any] = []
        for name in heads:
            value = row.get(name)
            if name in ranged:
                interval = value if isinstance(value, Mapping) else {"value": value}
                cells += [_plain(interval.get(key)) for key in ("value", "low", "high")]
            else:
                cells.append(_plain(value))
        table.writerow(cells)
    return file.getvalue()


def write(rows: Iterable[Row], columns: Columns, folder: Path, name: str, caption: str = "") -> tuple[Path, ...]:
    """Writes a table as `name.csv`, `name.md` and `name.tex`, each whole or not at all.

    Args:
        rows: The rows.
        columns: Which columns, in order: names, or names and what readers see in their place. What a row does not
            have is left blank.
        folder: Where to; it is made.
        name: The files' name without an ending, and the label in LaTeX.
        caption: What the table shows.

    Returns:
        The files.
    """
    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "csv": comma_separated(rows, columns),
        "md": markdown(rows, columns, caption),
        "tex": latex(rows, columns, caption, label=name),
    }
    for ending, text in texts.items():
        with atomic_write(folder / f"{name}.{ending}") as part:
            part.write_text(text, encoding="utf-8", newline="")
    return tuple(folder / f"{name}.{ending}" for ending in texts)


def _heads(columns: Columns) -> dict[str, str]:
    return dict(columns) if isinstance(columns, Mapping) else {name: words(name) for name in columns}


def _numeric(rows: Sequence[Row], names: Iterable[str]) -> set[str]:
    """Columns that hold numbers, or nothing, and are set to the right."""
    said = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    return {
        name
        for name, values in said.items()
        if values and all(isinstance(value, Real | Mapping) and not isinstance(value, bool) for value in values)
    }


def _run_jobs(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _decimals(value: float) -> int:
    return 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0


def _fixed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text  # no "-0.000"


def _plain(value: Any) -> Any:
    """A number in full, so that it reads back as it was."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return _number(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|\[\]<>])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
