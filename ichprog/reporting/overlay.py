"""Draw slices of a scan with saliency maps over them and probabilities above."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import ScanError, missing_extra
from ichprog.results import Prediction, Saliency
from ichprog.scan import read
from ichprog.scan.volume import AIR_HU, background

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW_HU = (0.0, 80.0)  # from black to white: width 80, level 40
_MARGIN_MM = 8.0


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
    maps are strongest, from foot to head. The patient's right is on the left, as in radiology. Each map is scaled by
    its own largest value. Red increases the score of the label, blue decreases it. An empty map is labelled as empty.

    Args:
        result: One map, several maps, or the result of `explain` for several tasks or methods.
        scan: Scan that was explained.
        prediction: Prediction whose probabilities are printed above the slices.
        outline: Image in the space of the scan whose region is outlined, such as the mask of a haemorrhage.
        slices: Number of slices.

    Returns:
        A matplotlib figure.

    Raises:
        ScanError: A map or the outline has another shape than the scan (code `other-scan`).
        IchprogError: matplotlib is not installed.

    Example:
        ```python
        saliency = ichprog.explain(model, "scan.nii.gz")
        ichprog.plot(saliency, "scan.nii.gz").savefig("map.png")
        ```
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("report", "matplotlib", "Drawing a figure") from error

    maps = _as_list(result)
    loaded = read(scan)
    shape = loaded.hu.shape
    values = [_read_aligned(shape, each.image, f"The map of {each.task}") for each in maps]
    region = None if outline is None else _read_aligned(shape, outline, "The outline") > 0
    chosen = _choose_slices(values, region, slices)
    box = _head_box(loaded.hu, loaded.spacing)
    width, height = (side.stop - side.start for side in box)
    rows = 1 + len(maps)
    figure = Figure(figsize=(2.6 * len(chosen), 2.6 * height / width * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, len(chosen), squeeze=False)
    for row, axes in enumerate(grid):
        for axis, k in zip(axes, chosen, strict=True):
            _draw_slice(axis, loaded.hu[box], k, values[row - 1][box] if row else None, region, box)
        axes[0].set_ylabel(_map_label(maps[row - 1]) if row else "scan", fontsize=9)
    for axis, k in zip(grid[0], chosen, strict=True):
        axis.set_title(f"slice {k + 1} of {shape[2]}", fontsize=8)
    figure.suptitle(_title(maps, prediction), fontsize=10)
    return figure


def _as_list(result: Saliency | Sequence[Saliency] | Mapping[Any, Saliency]) -> list[Saliency]:
    if isinstance(result, Saliency):
        return [result]
    return list(result.values() if isinstance(result, Mapping) else result)


def _draw_slice(
    axis: Any, hu: np.ndarray, k: int, values: np.ndarray | None, region: np.ndarray | None, box: tuple[slice, slice]
) -> None:
    axis.imshow(hu[:, :, k].T, cmap="gray", vmin=_WINDOW_HU[0], vmax=_WINDOW_HU[1])
    axis.set_xticks([])
    axis.set_yticks([])
    if values is not None:
        _draw_map(axis, values, k)
    if region is not None and region[box][:, :, k].any():
        axis.contour(region[box][:, :, k].T, [0.5], colors="yellow", linewidths=0.8)


def _draw_map(axis: Any, values: np.ndarray, k: int) -> None:
    top = float(np.abs(values).max())
    if top == 0:
        axis.text(0.5, 0.5, "empty map", color="white", ha="center", va="center", transform=axis.transAxes)
        return
    scaled = values[:, :, k].T / top
    axis.imshow(scaled, cmap="coolwarm", vmin=-1, vmax=1, alpha=np.clip(np.abs(scaled) * 1.4, 0, 0.75))


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


def _choose_slices(maps: list[np.ndarray], region: np.ndarray | None, count: int) -> list[int]:
    """Choose slices evenly over the extent of the strong slices of the maps and of the outlined region."""
    strength = sum(np.abs(values).max((0, 1)) / max(float(np.abs(values).max()), 1e-30) for values in maps)
    strength = np.asarray(strength) / len(maps) + (0 if region is None else 2.0 * region.any((0, 1)))
    strong = np.flatnonzero(strength > 0.3 * strength.max())
    if not strong.size:
        strong = np.arange(len(strength))
    low, high = int(strong[0]), int(strong[-1])
    return sorted({round(k) for k in np.linspace(low, high, min(count, high - low + 1))})


def _head_box(hu: np.ndarray, spacing: tuple[float, ...]) -> tuple[slice, slice]:
    """Return the rectangle of the head with a margin, over all slices."""
    padding, _ = background(hu)
    head = (np.abs(hu - padding) > 0.5) & (hu > AIR_HU)
    box = []
    for axis in range(2):
        indices = np.flatnonzero(head.any((1 - axis, 2)))
        margin = int(_MARGIN_MM / spacing[axis])
        bounds = slice(max(0, int(indices[0]) - margin), int(indices[-1]) + margin + 1) if indices.size else slice(None)
        box.append(bounds)
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
    return "\n".join([*lines, f"{maps[0].model}. {maps[0].provenance['notice']}"])
