"""Prepare a scan with its masks and saliency maps for the viewer of a report, and draw pictures of its slices."""

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ichprog.errors import ScanError, missing_extra
from ichprog.reporting.overlay import head_box, scale_map
from ichprog.scan import Scan

MOST_VOXELS = 6_000_000  # of the scan in the viewer
MOST_MAP_VOXELS = 600_000  # of one map in the viewer
MOST_MAPS_VOXELS = 4_000_000  # of all maps together
_MOST_BYTES = 8_500_000  # of the compressed scan in base64
_HU_RANGE = (-1024, 3071)  # 12 bits, as most scanners store
_WINDOW_HU = (0.0, 80.0)
_LEVELS = 127  # steps of a map from 0 to its full colour
_PICTURE_PIXELS, _THUMBNAIL_PIXELS = 200, 72  # width of one slice
_PICTURE_SLICES = 6
_TINT = np.array([255.0, 60.0, 40.0])  # colour of blood in pictures
_COMPRESSION = 2  # of ISA-L: a tenth larger than the best of zlib, in a tenth of its time
_ALIKE = 1.2  # ratio up to which voxels are averaged along both axes

Factors = tuple[int, int, int]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Layer:
    """A mask or a saliency map over a scan.

    Attributes:
        name: What the layer shows, for people.
        kind: "map" for a signed saliency map, "brain" or "haemorrhage" for a mask.
        values: `(i, j, k)`, one value for each voxel of the scan in LPS order.
        regions: Names of the values 1, 2, ... of a mask.
    """

    name: str
    kind: Literal["map", "brain", "haemorrhage"]
    values: np.ndarray = field(repr=False)
    regions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Volumes:
    """A scan with its layers as the viewer takes them.

    Attributes:
        images: Scan and layers, each with its name, kind and compressed NIfTI in base64, as plain data.
        start: Position in RAS mm at which the viewer starts.
        notes: Sentences about what was changed for the viewer.
        picture: Slices of the scan with the haemorrhage, a JPEG in base64.
        caption: What the picture shows.
        thumbnail: One slice, a JPEG in base64.
    """

    images: tuple[dict[str, Any], ...]
    start: tuple[float, float, float]
    notes: tuple[str, ...]
    picture: str
    caption: str
    thumbnail: str


def prepare_volumes(scan: Scan, layers: Sequence[Layer] = ()) -> Volumes:
    """Crop a scan with its layers to the head, and compress them for the viewer.

    A scan with more than `MOST_VOXELS` voxels is averaged to fewer, along the axes with the smallest voxels first. HU
    are rounded to whole numbers. Maps are averaged to at most `MOST_MAP_VOXELS` voxels, clipped to the brain and to the
    99.5th percentile of their absolute values there, and rounded to 1/127 of it.

    Args:
        scan: The scan.
        layers: Masks and maps.

    Raises:
        ScanError: A layer has another shape than the scan (code `other-scan`).
        IchprogError: Pillow is not installed.
    """
    for layer in layers:
        _check_shape(layer, scan)
    in_plane = head_box(scan)
    box = (*in_plane, slice(0, scan.hu.shape[2]))
    factors = _factors(_shape(box), scan.spacing, MOST_VOXELS)
    image = _encode(*_compress_scan(scan, box, factors))
    while len(image) > _MOST_BYTES:
        factors = _coarser(factors, scan.spacing)
        image = _encode(*_compress_scan(scan, box, factors))
    images: list[dict[str, Any]] = [{"name": "CT", "kind": "scan", "data": image}]
    brain = next((layer.values > 0 for layer in layers if layer.kind == "brain"), None)
    maps = [layer for layer in layers if layer.kind == "map"]
    most = min(MOST_MAP_VOXELS, MOST_MAPS_VOXELS // max(len(maps), 1))
    map_factors = _factors(_shape(box), scan.spacing, most)
    shown: list[np.ndarray] = []
    for layer in layers:
        entry: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "regions": list(layer.regions)}
        if layer.kind == "map":
            inside = scan.foreground if brain is None else brain
            scaled, top = scale_map(layer.values[box], inside[box])
            shown.append(scaled)
            values = np.rint(_average(scaled, map_factors) * _LEVELS).astype(np.int8)
            entry |= {"top": top, "empty": not values.any()}
            entry["data"] = _encode(values, _affine(scan, box, map_factors), 1 / _LEVELS)
        else:
            values = _largest(layer.values[box].astype(np.uint8), factors)
            entry |= {"empty": not values.any(), "data": _encode(values, _affine(scan, box, factors))}
        images.append(entry)
    blood = next((layer.values > 0 for layer in layers if layer.kind == "haemorrhage" and layer.values.any()), None)
    interest = blood[box] if blood is not None else np.abs(shown[0]) if shown else scan.foreground[box]
    i, j, k = _find_start(interest)
    start = i + in_plane[0].start, j + in_plane[1].start, k
    picture, caption = _draw_row(scan, in_plane, blood)
    thumbnail = _jpeg(_draw_slice(scan, in_plane, k, blood, _THUMBNAIL_PIXELS), 60)
    x, y, z = (scan.affine @ [*start, 1])[:3].tolist()
    notes = _notes(scan, factors, map_factors if maps else None)
    return Volumes(tuple(images), (x, y, z), notes, picture, caption, thumbnail)


def _find_start(interest: np.ndarray) -> tuple[int, int, int]:
    """Return the centre of the slice with the highest sum of values; the centre of the scan if all are 0."""
    sums = interest.sum((0, 1), dtype=float)
    if not sums.any():
        i, j, k = (n // 2 for n in interest.shape)
        return i, j, k
    k = int(np.argmax(sums))
    plane = interest[:, :, k].astype(float)
    i, j = (round(float(np.average(np.arange(n), weights=plane.sum(1 - axis)))) for axis, n in enumerate(plane.shape))
    return i, j, k


def _check_shape(layer: Layer, scan: Scan) -> None:
    if layer.values.shape != scan.hu.shape:
        raise ScanError(
            f"{layer.name} has {layer.values.shape} voxels and the scan has {scan.hu.shape}, so it belongs to another "
            "scan. Give the layers of this scan.",
            code="other-scan",
            measured=list(layer.values.shape),
            expected=list(scan.hu.shape),
            unit="voxels",
        )


def _shape(box: Box) -> tuple[int, int, int]:
    i, j, k = (side.stop - side.start for side in box)
    return i, j, k


def _factors(shape: tuple[int, ...], spacing: tuple[float, ...], most: int) -> Factors:
    """Return how many voxels are averaged along each axis so that at most a number of voxels is left."""
    factors: Factors = (1, 1, 1)
    while np.prod([-(-n // f) for n, f in zip(shape, factors, strict=True)]) > most:
        factors = _coarser(factors, spacing)
    return factors


def _coarser(factors: Factors, spacing: tuple[float, ...]) -> Factors:
    """Return factors with one more voxel along the axes whose averaged voxels are smallest."""
    sizes = [f * mm for f, mm in zip(factors, spacing, strict=True)]
    i, j, k = (f + (size < _ALIKE * min(sizes)) for f, size in zip(factors, sizes, strict=True))
    return i, j, k


def _blocks(values: np.ndarray, factors: Factors) -> np.ndarray:
    """Return the values as blocks `(i, fi, j, fj, k, fk)`; the last block of an axis repeats the last value."""
    padding = [(0, -n % f) for n, f in zip(values.shape, factors, strict=True)]
    padded = np.pad(values, padding, mode="edge") if any(after for _, after in padding) else values
    pairs = [(n // f, f) for n, f in zip(padded.shape, factors, strict=True)]
    return padded.reshape(list(itertools.chain.from_iterable(pairs)))


def _average(values: np.ndarray, factors: Factors) -> np.ndarray:
    """Return the mean of each block."""
    if factors == (1, 1, 1):
        return values
    averaged: np.ndarray = _blocks(values, factors).mean((1, 3, 5), dtype=np.float32)
    return averaged


def _largest(values: np.ndarray, factors: Factors) -> np.ndarray:
    """Return the largest value of each block, so that no small region disappears."""
    if factors == (1, 1, 1):
        return values
    largest: np.ndarray = _blocks(values, factors).max((1, 3, 5))
    return largest


def _compress_scan(scan: Scan, box: Box, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Return the HU of a box as int16, and their affine."""
    averaged = _average(scan.hu[box], factors)
    return np.rint(np.clip(averaged, *_HU_RANGE)).astype(np.int16), _affine(scan, box, factors)


def _affine(scan: Scan, box: Box, factors: Factors) -> np.ndarray:
    """Return the affine of averaged voxels: the centre of the first block is at voxel 0."""
    step = np.diag([*factors, 1.0])
    step[:3, 3] = [side.start + (f - 1) / 2 for side, f in zip(box, factors, strict=True)]
    affine: np.ndarray = scan.affine @ step
    return affine


def _encode(values: np.ndarray, affine: np.ndarray, slope: float = 1.0) -> str:
    """Return an image as compressed NIfTI in base64."""
    import nibabel as nib
    from isal import igzip

    image = nib.Nifti1Image(values, affine, dtype=values.dtype)
    if slope != 1.0:
        image.header.set_slope_inter(slope, 0)
    header = image.header.copy()
    header["vox_offset"] = 352
    content = header.binaryblock + b"\0\0\0\0" + values.tobytes("F")
    return base64.b64encode(igzip.compress(content, _COMPRESSION, mtime=0)).decode()


def _notes(scan: Scan, factors: Factors, map_factors: Factors | None) -> tuple[str, ...]:
    """Return what the viewer shows and how exactly."""
    shown = tuple(f * mm for f, mm in zip(factors, scan.spacing, strict=True))
    notes = [f"The scan has {_format_shape(scan.hu.shape)} voxels of {_format_mm(scan.spacing)} mm."]
    if factors == (1, 1, 1):
        notes.append("The viewer shows all of them around the head, in whole HU.")
    else:
        notes.append(
            f"The viewer shows means over {_format_shape(factors)} voxels, {_format_mm(shown)} mm, around the head, in "
            "whole HU. A voxel of a mask is shown if any of these voxels belongs to it."
        )
    if map_factors is not None:
        of_maps = tuple(f * mm for f, mm in zip(map_factors, scan.spacing, strict=True))
        notes.append(
            f"Maps are shown in voxels of {_format_mm(of_maps)} mm, with a rounding error of at most 1/{2 * _LEVELS} "
            "of the full colour. The full colour, 1, is the 99.5th percentile of the absolute values of a map in the "
            "brain; larger values are clipped to it."
        )
    return tuple(notes)


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _format_mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.2f}" for mm in spacing)


def _draw_row(scan: Scan, in_plane: tuple[slice, slice], blood: np.ndarray | None) -> tuple[str, str]:
    """Return a row of slices, over the haemorrhage or over the head, and its caption."""
    slices = np.flatnonzero((scan.foreground if blood is None else blood).any((0, 1)))
    low, high = (int(slices[0]), int(slices[-1])) if slices.size else (0, scan.hu.shape[2] - 1)
    if blood is None:  # without the lowest and the highest slices, which show little brain
        low, high = low + (high - low) // 4, high - (high - low) // 8
    count = min(_PICTURE_SLICES, high - low + 1)
    chosen = sorted({round(k) for k in np.linspace(low, high, count)})
    row = [_draw_slice(scan, in_plane, k, blood, _PICTURE_PIXELS) for k in chosen]
    tinted = "" if blood is None else " The haemorrhage that was found is red."
    caption = (
        f"Slices {', '.join(str(k + 1) for k in chosen)} of {scan.hu.shape[2]}, counted from the lowest, from 0 to 80 "
        f"HU. The patient's right is on the left.{tinted}"
    )
    return _jpeg(np.concatenate(row, axis=1), 82), caption


def _draw_slice(scan: Scan, in_plane: tuple[slice, slice], k: int, blood: np.ndarray | None, width: int) -> np.ndarray:
    """Return a slice as a square colour picture with rows from anterior to posterior, `(width, width, 3)`."""
    low, high = _WINDOW_HU
    plane = np.clip((scan.hu[in_plane][:, :, k].T - low) / (high - low), 0, 1) * 255
    colours = np.repeat(plane[:, :, None], 3, axis=2)
    if blood is not None:
        inside = blood[in_plane][:, :, k].T
        colours[inside] = 0.55 * colours[inside] + 0.45 * _TINT
    return _fit(colours.astype(np.uint8), scan.spacing, width)


def _fit(colours: np.ndarray, spacing: tuple[float, ...], width: int) -> np.ndarray:
    """Resize a picture into a black square, with the shape of the head preserved."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("report", "pillow", "A report with pictures") from error
    rows, columns = colours.shape[0] * spacing[1], colours.shape[1] * spacing[0]
    scale = width / max(rows, columns)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    resized = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.BOX))
    square = np.zeros((width, width, 3), np.uint8)
    top, left = (width - size[1]) // 2, (width - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = resized
    return square


def _jpeg(colours: np.ndarray, quality: int) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(colours).save(file, "JPEG", quality=quality)
    return base64.b64encode(file.getvalue()).decode()
