"""Write tables of results: the same rows as CSV, Markdown and LaTeX.

A row is a mapping from column names to text, numbers, None, or intervals `{"value": .., "low": .., "high": ..}`.
Markdown and LaTeX have rounded numbers. The CSV has full precision, and an interval takes three columns: `auroc`,
`auroc_low` and `auroc_high`.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ichprog.io import write_rows, write_text
from ichprog.metrics import label_of

Row = Mapping[str, Any]
Columns = Mapping[str, str] | Sequence[str]  # names and their headings, or names alone

NO_VALUE = "-"


def readable_name(name: str) -> str:
    """Return the name of a metric or column as a reader sees it.

    Args:
        name: Name in files.

    Examples:
        >>> readable_name("balanced_accuracy"), readable_name("auroc_1"), readable_name("mean_age")
        ('balanced accuracy', 'AUROC 1', 'mean age')
    """
    return label_of(name) or name.replace("_", " ")


def format_value(value: Any) -> str:
    """Format a table cell for readers.

    Args:
        value: Text, number, None, or interval. Numbers below 10 get three decimals, larger numbers fewer. None and
            numbers that are not finite are a dash.

    Examples:
        >>> format_value({"value": 0.7123, "low": 0.65, "high": 0.77}), format_value(0.00001), format_value(None)
        ('0.712 (0.650 to 0.770)', '<0.001', '-')
    """
    if isinstance(value, Mapping):
        middle, low, high = (_finite(value.get(key)) for key in ("value", "low", "high"))
        if middle is None:
            return NO_VALUE
        digits = _decimals(middle)
        if low is None or high is None:
            return _fixed(middle, digits)
        return f"{_fixed(middle, digits)} ({_fixed(low, digits)} to {_fixed(high, digits)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        number = _finite(value)
        if number is None:
            return NO_VALUE
        return "<0.001" if 0 < number < 0.0005 else _fixed(number, _decimals(number))
    return NO_VALUE if value is None or value == "" else " ".join(str(value).split())


@dataclass(frozen=True)
class Column:
    """A column of a formatted table.

    Attributes:
        heading: Heading for readers.
        numeric: Whether the column holds numbers, which are aligned to the right.
    """

    heading: str
    numeric: bool


@dataclass(frozen=True)
class FormattedTable:
    """A table as readers see it.

    Attributes:
        columns: Columns.
        rows: Cells of each row.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def format_table(rows: Iterable[Row], columns: Columns) -> FormattedTable:
    """Format a table for readers.

    Args:
        rows: Rows.
        columns: Names of the columns, or a mapping from names to headings.

    Examples:
        >>> format_table([{"n": 3, "auroc": 0.5}], ["n", "auroc"]).rows
        (('3', '0.500'),)
    """
    rows, headings = list(rows), _headings(columns)
    return FormattedTable(
        tuple(Column(heading, _is_numeric(rows, name)) for name, heading in headings.items()),
        tuple(tuple(format_value(row.get(name)) for name in headings) for row in rows),
    )


def to_markdown(rows: Iterable[Row], columns: Columns, caption: str = "") -> str:
    """Return a table as Markdown, with numbers aligned to the right.

    Args:
        rows: Rows.
        columns: Names of the columns, or a mapping from names to headings.
        caption: What the table shows.
    """
    table = format_table(rows, columns)
    lines = [
        [_escape_markdown(column.heading) for column in table.columns],
        ["---:" if column.numeric else "---" for column in table.columns],
        *([_escape_markdown(cell) for cell in row] for row in table.rows),
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_escape_markdown(caption)}\n" if caption else f"{text}\n"


def to_latex(rows: Iterable[Row], columns: Columns, caption: str = "", *, label: str = "") -> str:
    """Return a table as LaTeX that needs no package.

    Args:
        rows: Rows.
        columns: Names of the columns, or a mapping from names to headings.
        caption: What the table shows.
        label: Label, which gets the prefix "tab:".
    """
    table = format_table(rows, columns)
    lines = [r"\begin{table}", r"\centering"]
    if caption:
        lines.append(rf"\caption{{{_escape_latex(caption)}}}")
    if label:
        lines.append(rf"\label{{tab:{label}}}")
    lines += [
        rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in table.columns)}}}",
        r"\hline",
        " & ".join(_escape_latex(column.heading) for column in table.columns) + r" \\",
        r"\hline",
        *(" & ".join(map(_escape_latex, row)) + r" \\" for row in table.rows),
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(rows: Iterable[Row], columns: Columns) -> str:
    """Return a table as CSV with the names of the columns and full precision. Missing values are blank.

    Args:
        rows: Rows.
        columns: Names of the columns, or a mapping from names to headings.
    """
    rows, names = list(rows), list(_headings(columns))
    intervals = {name for name in names if any(isinstance(row.get(name), Mapping) for row in rows)}
    file = io.StringIO()
    header = ([name, f"{name}_low", f"{name}_high"] if name in intervals else [name] for name in names)
    lines = []
    for row in rows:
        cells: list[Any] = []
        for name in names:
            value = row.get(name)
            if name in intervals:
                interval = value if isinstance(value, Mapping) else {"value": value}
                cells += [_plain(interval.get(key)) for key in ("value", "low", "high")]
            else:
                cells.append(_plain(value))
        lines.append(cells)
    write_rows(file, [cell for cells in header for cell in cells], lines, line_end="\n")
    return file.getvalue()


def write(rows: Iterable[Row], columns: Columns, folder: Path, name: str, caption: str = "") -> tuple[Path, ...]:
    """Write a table as `name.csv`, `name.md` and `name.tex`, each whole or not at all.

    Args:
        rows: Rows. A missing value is blank.
        columns: Names of the columns, or a mapping from names to headings.
        folder: Folder, which is created.
        name: Name of the files without extension, and label in LaTeX.
        caption: What the table shows.

    Returns:
        The paths of the files.

    Examples:
        ```python
        write([{"variant": "prognosis", "auroc": 0.74}], ["variant", "auroc"], Path("tables"), "results")
        ```
    """
    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "csv": to_csv(rows, columns),
        "md": to_markdown(rows, columns, caption),
        "tex": to_latex(rows, columns, caption, label=name),
    }
    for extension, text in texts.items():
        write_text(folder / f"{name}.{extension}", text)
    return tuple(folder / f"{name}.{extension}" for extension in texts)


def _headings(columns: Columns) -> dict[str, str]:
    return dict(columns) if isinstance(columns, Mapping) else {name: readable_name(name) for name in columns}


def _is_numeric(rows: Sequence[Row], name: str) -> bool:
    """Return whether a column holds numbers only, apart from missing values."""
    values = [row[name] for row in rows if row.get(name) not in (None, "")]
    return bool(values) and all(isinstance(value, Real | Mapping) and not isinstance(value, bool) for value in values)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _decimals(value: float) -> int:
    return 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0


def _fixed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text  # "-0.000" becomes "0.000"


def _plain(value: Any) -> Any:
    """Return a number with full precision as Python's own type, and any other value as it is."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return _finite(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _escape_markdown(text: str) -> str:
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


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
