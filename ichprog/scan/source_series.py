"""The slices of the DICOM series that a scan was read from, and values over the scan at their pixels."""

import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.errors import ScanError
from ichprog.scan.dicom import select_stack
from ichprog.scan.series import Image, Stack
from ichprog.scan.studies import DicomStudy


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """The slices of the DICOM series of a scan, as the scanner acquired them: tilted, or at uneven distances.

    Attributes:
        headers: The pydicom header of each file, without pixels, from foot to head. An enhanced CT is one file.
        frames: Number of the plane of each slice: of its file, or of its frame in the only file.
        count: Number of planes, which is larger than the number of slices if an enhanced CT has other frames, too.
        positions: `(slices, 3)` LPS mm of the first pixel of each slice.
        axes: `(2, 3)` unit vectors in LPS, along the rows of a slice and down its columns.
        pixel_mm: Distance of neighbouring rows, and of neighbouring columns, in mm.
        shape: Rows and columns of a slice.
        slice_spacing: Usual distance of neighbouring slices in mm.
    """

    headers: tuple[Any, ...]
    frames: tuple[int, ...]
    count: int
    positions: np.ndarray
    axes: np.ndarray
    pixel_mm: tuple[float, float]
    shape: tuple[int, int]
    slice_spacing: float

    def sample(self, values: np.ndarray, affine: np.ndarray, *, linear: bool = False) -> np.ndarray:
        """Return values over a scan at the pixels of the slices, 0 outside the scan.

        A scan that was aligned or brought to even spacing has other voxels than its slices. The value of a pixel is
        that of the voxel that contains the centre of the pixel, or interpolated linearly.

        Args:
            values: `(i, j, k)`, one value for each voxel.
            affine: `(4, 4)` from voxel to RAS mm.
            linear: Whether to interpolate.

        Returns:
            `(planes, rows, columns)` in the type of the values.
        """
        to_voxel = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
        along_row, down_column = (self.axes * np.reshape(self.pixel_mm[::-1], (2, 1))) @ to_voxel[:3, :3].T
        row, column = np.ogrid[: self.shape[0], : self.shape[1]]
        planes = np.zeros((self.count, *self.shape), values.dtype)
        for frame, first in zip(self.frames, self.positions @ to_voxel[:3, :3].T + to_voxel[:3, 3], strict=True):
            at = [one + x * column + y * row for one, x, y in zip(first, along_row, down_column, strict=True)]
            planes[frame] = (_interpolate if linear else _nearest)(values, at)
        return planes


def _is_inside(shape: tuple[int, ...], at: list[np.ndarray]) -> np.ndarray:
    inside: np.ndarray = np.logical_and.reduce([(x > -0.5) & (x < n - 0.5) for x, n in zip(at, shape, strict=True)])
    return inside


def _nearest(values: np.ndarray, at: list[np.ndarray]) -> np.ndarray:
    """Return the value of the voxel that contains each point."""
    indices = [np.clip(np.rint(x), 0, n - 1).astype(int) for x, n in zip(at, values.shape, strict=True)]
    return np.where(_is_inside(values.shape, at), values[tuple(indices)], 0)


def _interpolate(values: np.ndarray, at: list[np.ndarray]) -> np.ndarray:
    """Return the values at each point by trilinear interpolation."""
    low = [np.clip(np.floor(x), 0, n - 2).astype(int) for x, n in zip(at, values.shape, strict=True)]
    share = [np.clip(x - start, 0, 1) for x, start in zip(at, low, strict=True)]
    total = np.zeros(np.broadcast_shapes(*(x.shape for x in at)))
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.prod(
            np.broadcast_arrays(*(s if up else 1 - s for s, up in zip(share, corner, strict=True))), axis=0
        )
        total += weight * values[tuple(start + up for start, up in zip(low, corner, strict=True))]
    return np.where(_is_inside(values.shape, at), total, 0)


def read_source_series(source: Any) -> SourceSeries:
    """Read the headers of the series that `read` chooses from a DICOM source.

    Args:
        source: A DICOM folder, a .zip of one, one DICOM file, or a study that `find_scans` returns.

    Raises:
        ScanError: The source is no DICOM (code "no-dicom"), or the series lies in several files with several frames
            each ("several-series"), or it cannot be read.
    """
    files, series = (source.files, source.series) if isinstance(source, DicomStudy) else (None, None)
    if isinstance(source, DicomStudy):
        path = source.path
    elif isinstance(source, str | Path) and not str(source).endswith((".nii", ".nii.gz")):
        path = Path(source)
    else:
        message = f"{source}: is no DICOM series, to which DICOM objects could refer. Give the folder of the series."
        raise ScanError(message, code="no-dicom", measured=0, expected="one head CT", unit="DICOM files")
    if not path.exists():
        raise ScanError(f"{path}: no such file or folder. Check the path.", code="not-found")
    with ExitStack() as opened:
        stack, _ = select_stack(path, files, series, opened)
        first_of_file = {image.name: image for image in reversed(stack.images)}
        headers = [_read_header(first_of_file[name]) for name in dict.fromkeys(image.name for image in stack.images)]
    counts = [int(header.get("NumberOfFrames", 1) or 1) for header in headers]
    if len(headers) > 1 and max(counts) > 1:
        message = f"{path}: the series lies in {len(headers)} files with several frames each. Give one of them."
        raise ScanError(message, code="several-series", measured=len(headers), expected="one file")
    is_enhanced = counts[0] > 1
    frames = [image.frame for image in stack.images] if is_enhanced else list(range(len(headers)))
    return _from_stack(stack, headers, frames, counts[0] if is_enhanced else len(headers))


def _read_header(image: Image) -> Any:
    from pydicom import dcmread

    with image.open() as file:
        return dcmread(file, stop_before_pixels=True, force=True)


def _from_stack(stack: Stack, headers: list[Any], frames: list[int], count: int) -> SourceSeries:
    first = stack.images[0]
    row_mm, column_mm = first.numbers("PixelSpacing", 2).tolist()
    positions = np.array([image.numbers("ImagePositionPatient", 3) for image in stack.images])
    shape = int(first.header.Rows), int(first.header.Columns)
    return SourceSeries(
        tuple(headers), tuple(frames), count, positions, stack.axes[:2], (row_mm, column_mm), shape,
        stack.slice_spacing,
    )  # fmt: skip
