"""Write an HTML report: one file with text, tables and pictures that needs no other file, network or script."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ichprog.errors import RunError, missing_extra
from ichprog.io import write_text
from ichprog.reporting.tables import Columns, Row, format_table

_MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Table:
    """A table of a section.

    Attributes:
        rows: Rows, as `ichprog.reporting.tables` takes them.
        columns: Names of the columns, or a mapping from names to headings.
        caption: What the table shows.
        folded: Whether the table is closed until the reader opens it.
    """

    rows: Sequence[Row]
    columns: Columns
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture of a section.

    Attributes:
        path: SVG or PNG file.
        caption: What the picture shows, which is also its alternative text.
    """

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading: paragraphs, then pictures, then tables.

    Attributes:
        title: Heading.
        text: Paragraphs.
        tables: Tables.
        pictures: Pictures.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def write_report(path: Path, title: str, sections: Sequence[Section], *, notices: Sequence[str] = ()) -> Path:
    """Write an HTML report, whole or not at all. The same content gives the same bytes.

    Args:
        path: HTML file.
        title: Title.
        sections: Sections in their order.
        notices: Sentences that appear above and below the sections, such as "For research only.".

    Returns:
        The path.

    Raises:
        RunError: A picture cannot be read, or is neither SVG nor PNG.
        IchprogError: Jinja2 is not installed.

    Examples:
        ```python
        table = Table([{"variant": "prognosis", "auroc": 0.74}], ["variant", "auroc"], "Results of the test parts.")
        write_report(Path("report.html"), "A study", [Section("Results", tables=[table])])
        ```
    """
    text = load_template("report.html").render(
        title=title,
        notices=notices,
        sections=sections,
        format_table=lambda table: format_table(table.rows, table.columns),
        embed=lambda picture: _data_uri(picture.path),
        version=version("ichprog"),
    )
    write_text(path, text)
    return path


def load_template(name: str, filters: Mapping[str, Any] | None = None) -> Any:
    """Return a template of the reports, which escapes all text.

    Args:
        name: Name of a file in `templates`.
        filters: Functions that the template may apply to values, by name.

    Raises:
        IchprogError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise missing_extra("report", "jinja2", "An HTML report") from error

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters |= dict(filters or {})
    return environment.get_template(name)


def _data_uri(path: Path) -> str:
    """Return the content of a picture as a data URI."""
    if path.suffix not in _MEDIA_TYPES:
        raise RunError(f"Unsupported picture {path}. Expected an SVG or PNG file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: picture cannot be read: {error.strerror or error}.") from error
    return f"data:{_MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(data).decode()}"
