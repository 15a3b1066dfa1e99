"""Small HTML tables by which objects show themselves in a notebook."""

from collections.abc import Iterable, Sequence
from html import escape


def card(title: str, head: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """Return a table with a title and notes. Every text is escaped, because names of files may hold markup.

    Args:
        title: Title above the table.
        head: Titles of the columns.
        rows: Cells of each row.
        notes: Sentences below the table.

    Examples:
        >>> card("<a>", ["x"], [[1]])
        '<p><b>&lt;a&gt;</b></p><table><tr><th>x</th></tr><tr><td>1</td></tr></table>'
    """
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<p><b>{escape(title)}</b></p><table><tr>{_cells('th', head)}</tr>{body}</table>{below}"


def _cells(tag: str, values: Iterable[object]) -> str:
    return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)
