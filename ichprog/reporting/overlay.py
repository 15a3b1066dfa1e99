"""Draw slices of a scan with saliency maps over them and probabilities above."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import ScanError, missing_extra
from ichprog.results import Prediction, Saliency
from ichprog.scan import Scan, brain_mask, read
from ichprog.scan.brain import is_brain_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW_HU = (0.0, 80.0)  # from black to white: width 80, level 40
_MARGIN_MM = 8.0
_BAR_MM = 50.0
_COLOURS = "coolwarm"  # suits people who confuse red and green
_PERCENTILE = 99.5  # of the map in the brain that has the full colour


def plot(
    result: Saliency | Sequence[Saliency] | Mapping[Any, Saliency],
    scan: Any,
    *,
    prediction: Prediction | None = None,
    outline: Any = None,
    slices: int = 5,
) -> "Figure":
    """Draw saliency maps over slices of their scan.

    The first row shows slices of the scan, each further row one map. The slices are spread over the region in which the
    maps are strongest, from foot to head. The patient's right is on the left, as in radiology. Maps are shown in the
    brain only. The full colour is the 99.5th percentile of a map's absolute values there, so that no single voxel sets
    the scale. Red increases the score of the label, blue decreases it. An empty map is labelled as empty. If the
    prediction used clinical values, bars show by how much each of them changed the log-odds.

    Args:
        result: One map, several maps, or the result of `explain` for several tasks or methods. Without a map, an empty
            list and a prediction.
        scan: Scan that was explained.
        prediction: Prediction whose probabilities are printed above the slices, and whose clinical values are drawn
            below.
        outline: Image in the space of the scan whose region is outlined, such as the mask of a haemorrhage.
        slices: Number of slices.

    Returns:
        A matplotlib figure.

    Raises:
        ScanError: A map or the outline has another shape than the scan (code `other-scan`).
        IchprogError: matplotlib is not installed.

    Examples:
        ```python
        saliency = ichprog.explain(model, "scan.nii.gz")
        ichprog.plot(saliency, "scan.nii.gz").savefig("map.png")
        ```
    """
    try:
        from ichprog.reporting.notebook_figure import NotebookFigure
    except ImportError as error:
        raise missing_extra("report", "matplotlib", "Drawing a figure") from error

    maps = _as_list(result)
    loaded = read(scan)
    shape = loaded.hu.shape
    values = [_read_aligned(shape, each.image, f"The map of {each.task}") for each in maps]
    region = None if outline is None else _read_aligned(shape, outline, "The outline") > 0
    brain = find_brain(loaded)
    values = [scale_map(each, brain)[0] for each in values]
    chosen = _choose_slices(values, region, slices, shape[2])
    box = head_box(loaded)
    changes = _changes(prediction)
    width, height = ((side.stop - side.start) * mm for side, mm in zip(box, loaded.spacing, strict=False))
    rows, bars = 1 + len(maps), 0.3 + 0.25 * len(changes) if changes else 0.0
    size = 2.6 * len(chosen) + 1.2, 2.6 * height / width * rows + 0.9 + bars
    figure = NotebookFigure(figsize=size, layout="constrained")
    parts = figure.subfigures(
        2 if changes else 1, 1, squeeze=False, height_ratios=[size[1] - bars, *([bars] * bool(changes))]
    )
    grid = parts[0, 0].subplots(rows, len(chosen), squeeze=False)
    for row, axes in enumerate(grid):
        for axis, k in zip(axes, chosen, strict=True):
            _draw_slice(axis, loaded, k, values[row - 1] if row else None, region, box)
        axes[0].set_ylabel(_map_label(maps[row - 1]) if row else "scan", fontsize=9)
    for axis, k in zip(grid[0], chosen, strict=True):
        axis.set_title(f"slice {k + 1} of {shape[2]}", fontsize=8)
    _label_sides(grid[0, 0], loaded.spacing, box)
    if maps:
        _draw_scale(parts[0, 0], grid[1:])
    if changes:
        _draw_changes(parts[1, 0].subplots(), changes)
    figure.suptitle(_title(maps, prediction), fontsize=10, parse_math=False)
    return figure


def _as_list(result: Saliency | Sequence[Saliency] | Mapping[Any, Saliency]) -> list[Saliency]:
    if isinstance(result, Saliency):
        return [result]
    return list(result.values() if isinstance(result, Mapping) else result)


def find_brain(scan: Scan) -> np.ndarray:
    """Return the brain mask of a scan, or the whole scan if no brain is found in it.

    Args:
        scan: The scan.
    """
    if scan.brain is not None:
        return scan.brain
    if is_brain_only(scan, "auto"):
        return scan.foreground
    try:
        return read(brain_mask(scan)).hu > 0
    except ScanError:
        return np.ones(scan.hu.shape, bool)


def scale_map(values: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a map in the brain, from -1 to 1, and its absolute value that became 1.

    This value is the 99.5th percentile of the absolute values in the brain. Larger ones are clipped.

    Args:
        values: `(i, j, k)` map.
        brain: `(i, j, k)` bool mask.

    Returns:
        The map, 0 outside the brain, and 0 everywhere if it is empty in the brain; and the value, 0 for an empty map.

    Examples:
        >>> scaled, top = scale_map(np.array([[[-2.0, 2.0, 9.0]]]), np.array([[[True, True, False]]]))
        >>> scaled.tolist(), top
        ([[[-1.0, 1.0, 0.0]]], 2.0)
    """
    inside = np.abs(values[brain])
    top = float(np.percentile(inside, _PERCENTILE)) if inside.size else 0.0
    top = top or float(inside.max(initial=0))
    scaled = np.where(brain, np.clip(values / top, -1, 1), 0) if top > 0 else np.zeros_like(values)
    return scaled, top


def _draw_slice(
    axis: Any, scan: Scan, k: int, values: np.ndarray | None, region: np.ndarray | None, box: tuple[slice, slice]
) -> None:
    look = {"aspect": scan.spacing[1] / scan.spacing[0]}
    axis.imshow(scan.hu[box][:, :, k].T, cmap="gray", vmin=_WINDOW_HU[0], vmax=_WINDOW_HU[1], **look)
    axis.set_xticks([])
    axis.set_yticks([])
    if values is not None and not values.any():
        axis.text(0.5, 0.5, "empty map", color="white", ha="center", va="center", transform=axis.transAxes)
    elif values is not None:
        shown = values[box][:, :, k].T
        alpha = np.clip(np.abs(shown) * 1.4, 0, 0.75)
        axis.imshow(shown, cmap=_COLOURS, vmin=-1, vmax=1, alpha=alpha, **look)
    if region is not None and region[box][:, :, k].any():
        axis.contour(region[box][:, :, k].T, [0.5], colors="yellow", linewidths=0.8)


def _label_sides(axis: Any, spacing: tuple[float, ...], box: tuple[slice, slice]) -> None:
    """Write the letters of the sides, and draw a bar of known length."""
    style = {"color": "white", "fontsize": 8, "va": "center", "transform": axis.transAxes}
    axis.text(0.03, 0.5, "R", ha="left", **style)
    axis.text(0.97, 0.5, "L", ha="right", **style)
    voxels = _BAR_MM / spacing[0]
    left, low = 0.05 * (box[0].stop - box[0].start), 0.95 * (box[1].stop - box[1].start)
    axis.plot([left, left + voxels], [low, low], color="white", linewidth=2)
    axis.text(
        left + voxels / 2, low - 2 / spacing[1], f"{_BAR_MM:g} mm", color="white", fontsize=7, ha="center", va="bottom"
    )


def _draw_scale(figure: Any, axes: np.ndarray) -> None:
    """Draw the colour bar of the maps."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(
        ScalarMappable(Normalize(-1, 1), _COLOURS), ax=axes, shrink=0.6, aspect=30, fraction=0.03, pad=0.01
    )
    bar.set_ticks([-1, 0, 1], labels=["against", "0", "for the label"], fontsize=7)
    bar.set_label(f"scaled by percentile {_PERCENTILE:g} in the brain", fontsize=7)


def _changes(prediction: Prediction | None) -> dict[str, float]:
    """Return the change of the log-odds by each clinical value, with a label for its bar."""
    if prediction is None or prediction.clinical is None:
        return {}
    use = prediction.clinical
    return {
        f"{task}: {name} {use.used[name]:g}": change
        for task, changes in use.contributions.items()
        for name, change in changes.items()
    }


def _draw_changes(axis: Any, changes: dict[str, float]) -> None:
    values = list(changes.values())
    colours = ["tab:red" if value > 0 else "tab:blue" for value in values]
    bars = axis.barh(range(len(values)), values, color=colours, height=0.6)
    axis.bar_label(bars, [f"{value:+.2f}" for value in values], fontsize=7, padding=2)
    axis.set_yticks(range(len(values)), list(changes), fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("change of the log-odds by each clinical value", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)


def _read_aligned(shape: tuple[int, ...], image: Any, name: str) -> np.ndarray:
    """Return the values of an image in the voxel order of the scan."""
    values = read(image).hu
    if values.shape != shape:
        raise ScanError(
            f"{name} has {values.shape} voxels and the scan has {shape}, so it belongs to another scan. Give the scan "
            "that was explained.",
            code="other-scan",
            measured=list(values.shape),
            expected=list(shape),
            unit="voxels",
        )
    return values


def _choose_slices(maps: list[np.ndarray], region: np.ndarray | None, count: int, depth: int) -> list[int]:
    """Choose slices evenly over the extent of the strong slices of the maps and of the outlined region."""
    sums = [np.abs(values).sum((0, 1)) for values in maps]
    strength = np.zeros(depth) + sum(each / max(float(each.max()), 1e-30) for each in sums) / max(len(sums), 1)
    strength = strength + (0 if region is None else 2.0 * region.any((0, 1)))
    strong = np.flatnonzero(strength > 0.3 * strength.max())
    if not strong.size:
        strong = np.arange(len(strength))
    low, high = int(strong[0]), int(strong[-1])
    return sorted({round(k) for k in np.linspace(low, high, min(count, high - low + 1))})


def head_box(scan: Scan) -> tuple[slice, slice]:
    """Return the rectangle of the head with a margin, over all slices; the whole scan if nothing is denser than air.

    Args:
        scan: The scan.
    """
    box = []
    for axis in range(2):
        indices = np.flatnonzero(scan.foreground.any((1 - axis, 2)))
        margin, size = int(_MARGIN_MM / scan.spacing[axis]), scan.hu.shape[axis]
        low, high = (int(indices[0]) - margin, int(indices[-1]) + margin + 1) if indices.size else (0, size)
        box.append(slice(max(0, low), min(size, high)))
    return box[0], box[1]


def _map_label(saliency: Saliency) -> str:
    return f"{saliency.task}: {saliency.label}\n{saliency.method}"


def _title(maps: list[Saliency], prediction: Prediction | None) -> str:
    lines = []
    if prediction is not None:
        probabilities = [
            f"{name}: " + ", ".join(f"{label} {value:.2f}" for label, value in task.probabilities.items())
            for name, task in prediction.tasks.items()
        ]
        lines.append("   |   ".join(probabilities))
    drawn: list[Saliency | Prediction] = [*maps, *([] if prediction is None else [prediction])]
    return "\n".join([*lines, *(f"{each.model}. {each.provenance['notice']}" for each in drawn[:1])])
