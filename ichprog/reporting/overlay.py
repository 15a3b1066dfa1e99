"""Pictures of what the models say: slices of a scan with the maps over them and the probabilities above."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import ScanError, missing_extra
from ichprog.results import Prediction, Saliency
from ichprog.scan import read
from ichprog.scan.volume import AIR_HU, background

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW = (0.0, 80.0)  # HU from black to white: width 80, level 40
_MARGIN_MM = 8.0


def plot(
    result: Saliency | Sequence[Saliency] | Mapping[Any, Saliency],
    scan: Any,
    *,
    prediction: Prediction | None = None,
    outline: Any = None,
    slices: int = 5,
) -> "Figure":
    """Draws maps over slices of their scan.

    A row of slices alone comes first, then one for each map. Slices are those in which the maps are strongest, spread
    over them, from foot to head; the patient's right is on the left, as radiologists look at them. Each map is scaled
    by its own largest value, red speaks for the label and blue against it; where nothing speaks, an empty map is said
    to be empty.

    Args:
        result: One map, several, or what `explain` returns for several.
        scan: The scan, as `explain` took it.
        prediction: Answers to print above the slices.
        outline: Where to draw a line, such as the mask of a haemorrhage: an image in the scan's own space.
        slices: How many slices.

    Returns:
        A figure of matplotlib, which `.savefig(path)` writes.

    Raises:
        ScanError: `other-scan`: a map or the outline is of another shape than the scan.
        IchprogError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("report", "matplotlib", "Drawing a figure") from error

    if isinstance(result, Saliency):
        maps = [result]
    else:
        maps = list(result.values() if isinstance(result, Mapping) else result)
    seen = read(scan)
    values = [_over(seen.hu.shape, each.image, f"the map of {each.task}") for each in maps]
    line = None if outline is None else _over(seen.hu.shape, outline, "the outline") > 0
    chosen = _slices(values, line, slices)
    box = _box(seen.hu, seen.spacing)
    width, height = (s.stop - s.start for s in box)
    rows = 1 + len(maps)
    figure = Figure(figsize=(2.6 * len(chosen), 2.6 * height / width * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, len(chosen), squeeze=False)
    for row, axes in enumerate(grid):
        for axis, k in zip(axes, chosen, strict=True):
            axis.imshow(seen.hu[box][:, :, k].T, cmap="gray", vmin=_WINDOW[0], vmax=_WINDOW[1])
            axis.set_xticks([])
            axis.set_yticks([])
            if row:
                _overlay(axis, values[row - 1][box], k)
            if line is not None and line[box][:, :, k].any():
                axis.contour(line[box][:, :, k].T, [0.5], colors="yellow", linewidths=0.8)
        axes[0].set_ylabel(_name(maps[row - 1]) if row else "scan", fontsize=9)
    for axis, k in zip(grid[0], chosen, strict=True):
        axis.set_title(f"slice {k + 1} of {seen.hu.shape[2]}", fontsize=8)
    figure.suptitle(_said(maps, prediction), fontsize=10)
    return figure


def _over(shape: tuple[int, ...], image: Any, what: str) -> np.ndarray:
    """An image's values in the order of the scan's voxels."""
    values = read(image).hu
    if values.shape != shape:
        raise ScanError(
            f"{what} has {values.shape} voxels and the scan {shape}: it belongs to another scan. Give the scan that "
            "was explained.",
            code="other-scan",
            measured=list(values.shape),
            expected=list(shape),
            unit="voxels",
        )
    return values


def _slices(maps: list[np.ndarray], outline: np.ndarray | None, count: int) -> list[int]:
    """Slices where something is to be seen, evenly over its extent."""
    strength = sum(np.abs(values).max((0, 1)) / max(float(np.abs(values).max()), 1e-30) for values in maps)
    strength = np.asarray(strength) / len(maps) + (0 if outline is None else 2.0 * outline.any((0, 1)))
    there = np.flatnonzero(strength > 0.3 * strength.max())
    if not there.size:
        there = np.arange(len(strength))
    low, high = int(there[0]), int(there[-1])
    return sorted({round(k) for k in np.linspace(low, high, min(count, high - low + 1))})


def _box(hu: np.ndarray, spacing: tuple[float, ...]) -> tuple[slice, slice]:
    """Where the head is in the slices."""
    empty, _ = background(hu)
    there = (np.abs(hu - empty) > 0.5) & (hu > AIR_HU)
    box = []
    for axis in range(2):
        seen = np.flatnonzero(there.any((1 - axis, 2)))
        margin = int(_MARGIN_MM / spacing[axis])
        box.append(slice(max(0, int(seen[0]) - margin), int(seen[-1]) + margin + 1) if seen.size else slice(None))
    return box[0], box[1]


def _overlay(axis: Any, values: np.ndarray, k: int) -> None:
    top = float(np.abs(values).max())
    if top == 0:
        axis.text(0.5, 0.5, "empty map", color="white", ha="center", va="center", transform=axis.transAxes)
        return
    scaled = values[:, :, k].T / top
    axis.imshow(scaled, cmap="coolwarm", vmin=-1, vmax=1, alpha=np.clip(np.abs(scaled) * 1.4, 0, 0.75))


def _name(saliency: Saliency) -> str:
    return f"{saliency.task}: {saliency.label}\n{saliency.method}"


def _said(maps: list[Saliency], prediction: Prediction | None) -> str:
    lines = []
    if prediction is not None:
        said = [
            f"{name}: " + ", ".join(f"{label} {value:.2f}" for label, value in task.probabilities.items())
            for name, task in prediction.tasks.items()
        ]
        lines.append("   |   ".join(said))
    return "\n".join([*lines, f"{maps[0].model}. {maps[0].provenance['notice']}"])
