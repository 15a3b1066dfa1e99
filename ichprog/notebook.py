"""How objects show themselves in a notebook: small HTML tables, and a viewer of images."""

import gzip
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ichprog.errors import missing_extra

_WINDOW_HU = (0.0, 80.0)
_MASK_COLOURS = ("red", "green", "blue", "violet")


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


def view(scan: Any, maps: Mapping[str, tuple[Any, float]], masks: Mapping[str, Any]) -> Any:
    """Return a NiiVue widget with a scan, maps and masks as layers.

    Args:
        scan: The scan, as a nibabel image or a NIfTI path.
        maps: By name, each map and the absolute value that has the full colour.
        masks: By name, each mask.

    Raises:
        IchprogError: ipyniivue is not installed.
    """
    try:
        from ipyniivue import NiiVue
    except ImportError as error:
        raise missing_extra("notebook", "ipyniivue", "A viewer in a notebook") from error
    low, high = _WINDOW_HU
    layers = [{"data": _compressed(scan), "name": "CT.nii.gz", "colormap": "gray", "cal_min": low, "cal_max": high}]
    for name, (image, top) in maps.items():
        colours = {"colormap": "warm", "colormap_negative": "winter", "opacity": 0.6}
        limits = {"cal_min": top / 20, "cal_max": top, "cal_min_neg": -top, "cal_max_neg": -top / 20}
        layers.append({"data": _compressed(image), "name": f"{name}.nii.gz", **colours, **limits})
    for number, (name, image) in enumerate(masks.items()):
        colour = _MASK_COLOURS[number % len(_MASK_COLOURS)]
        layers.append(
            {"data": _compressed(image), "name": f"{name}.nii.gz", "colormap": colour, "opacity": 0.4, "cal_min": 0.0}
        )
    widget = NiiVue(is_radiological_convention=True)
    widget.load_volumes(layers)
    return widget


def _compressed(image: Any) -> bytes:
    """Return an image as the bytes of a .nii.gz file."""
    import nibabel as nib

    loaded: Any = nib.load(image) if isinstance(image, str | Path) else image
    return gzip.compress(loaded.to_bytes(), 1)


def _cells(tag: str, values: Iterable[object]) -> str:
    return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)
