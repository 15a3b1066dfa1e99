"""Draw saliency maps of several models over the same slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import missing_extra
from ichprog.reporting.overlay import scale_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW_HU = (0.0, 80.0)  # from black to white


@dataclass(frozen=True, eq=False)
class MapPanel:
    """The map of one model.

    Attributes:
        variant: Name of the model.
        label: The explained label.
        probability: Probability of the label.
        values: Saliency map `(i, j, k)` in LPS order.
    """

    variant: str
    label: str
    probability: float
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class SliceRow:
    """One slice of a scan with the maps of all models.

    Attributes:
        title: Title of the slice.
        hu: The scan `(i, j, k)` in HU, in LPS order.
        brain: Brain mask `(i, j, k)` bool; the slice is cropped to it.
        lesion: Lesion mask `(i, j, k)` bool, or None.
        number: Number of the slice along k, counted from 1.
        panels: A panel for each model.
    """

    title: str
    hu: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray | None
    number: int
    panels: Sequence[MapPanel]


def draw_maps(rows: Sequence[SliceRow], *, title: str) -> "Figure":
    """Draw slices in rows and models in columns: each map over its slice, with the probability of the label.

    The patient's right is on the left. Red speaks for the label and blue against the label. A map is drawn in the
    brain only, and the full colour is the 99.5th percentile of its absolute values there. Masks are drawn as outlines.
    Source: figure 3 of Cobo et al., MLMI 2024 (doi 10.1007/978-3-031-73290-4_2).

    Args:
        rows: The slices, all with the same number of panels.
        title: Title of the figure.

    Returns:
        A matplotlib figure, which `.savefig(path)` writes.

    Raises:
        IchprogError: matplotlib is not installed.
    """
    try:
        from ichprog.reporting.notebook_figure import NotebookFigure
    except ImportError as error:
        raise missing_extra("report", "matplotlib", "A figure of maps") from error

    columns = max(len(row.panels) for row in rows) + 1
    figure = NotebookFigure(figsize=(2.4 * columns, 2.9 * len(rows) + 0.7), layout="constrained")
    for (first, *others), row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        _draw_slice(first, row)
        first.set_title(f"{row.title}\nslice {row.number} of {row.hu.shape[2]}", fontsize=8)
        for axis, panel in zip(others, row.panels, strict=True):
            _draw_slice(axis, row)
            _draw_map(axis, row, panel.values)
            axis.set_title(f"{panel.variant}\np({panel.label}) = {panel.probability:.2f}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _crop(row: SliceRow) -> tuple[slice, slice, int]:
    """Return the part of the slice around the brain."""
    indices = [np.flatnonzero(row.brain.any((1 - axis, 2))) for axis in (0, 1)]
    i, j = (slice(at[0], at[-1] + 1) if at.size else slice(None) for at in indices)
    return i, j, row.number - 1


def _draw_slice(axis: Any, row: SliceRow) -> None:
    box = _crop(row)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow(row.hu[box].T, cmap="gray", vmin=_WINDOW_HU[0], vmax=_WINDOW_HU[1])
    if row.lesion is not None and row.lesion[box].any():
        axis.contour(row.lesion[box].T, [0.5], colors="yellow", linewidths=0.8)


def _draw_map(axis: Any, row: SliceRow, values: np.ndarray) -> None:
    """Draw a map over its slice."""
    scaled, top = scale_map(values, row.brain)
    if top == 0:
        axis.text(0.5, 0.5, "empty map", color="white", ha="center", va="center", transform=axis.transAxes)
        return
    in_slice = scaled[_crop(row)].T
    axis.imshow(in_slice, cmap="coolwarm", vmin=-1, vmax=1, alpha=np.clip(np.abs(in_slice) * 1.4, 0, 0.75))
