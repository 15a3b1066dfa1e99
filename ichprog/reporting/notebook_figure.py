"""A matplotlib figure that shows itself in a notebook. The module needs matplotlib."""

import io

from matplotlib.figure import Figure

_DPI = 80


class NotebookFigure(Figure):
    """A figure that a notebook shows as a picture, also without `%matplotlib inline`.

    pyplot does not know about the figure, so that drawing changes nothing in the process. Of such a figure, a notebook
    would print the size only.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()
