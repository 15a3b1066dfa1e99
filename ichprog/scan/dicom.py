"""Read one head CT in DICOM as a volume in HU with aligned, evenly spaced slices.

Geometry comes from Image Position and Image Orientation (Patient) alone, because slice thickness, slice location,
spacing between slices and gantry tilt often contradict the pixels. A series with aligned, evenly spaced slices keeps
its pixels. Any other series is interpolated linearly once.
"""

import functools
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.errors import IchprogError, ScanError, ScanWarning
from ichprog.limits import check_voxels
from ichprog.scan.series import (
    AIR_HU,
    TOLERANCE_MM,
    Stack,
    choose_stack,
    group_stacks,
    has_dicom_magic,
    iter_files,
    read_hu,
    read_images,
)

_MAX_GAP_MM = 25.0  # a wider gap can hide a whole ventricle


@dataclass(frozen=True)
class Series:
    """One axial series as a volume.

    Attributes:
        hu: `(i, j, k)` float32 HU, -1024 in the padding; i runs to the patient's left, j to posterior, k to superior,
            as nearly as the slices allow.
        affine: `(4, 4)` float64 from voxel (i, j, k) to RAS mm, as in nibabel.
        record: The selected and the excluded series and the processing steps, as plain data.
        warnings: Warnings about the series.
    """

    hu: np.ndarray
    affine: np.ndarray
    record: dict[str, Any]
    warnings: tuple[ScanWarning, ...]


def is_dicom(path: Path) -> bool:
    """Return whether a file starts like DICOM, with or without the preamble.

    Args:
        path: A file.
    """
    with path.open("rb") as file:
        return has_dicom_magic(file.read(132))


def read_series(path: Path, *, files: Collection[str] | None = None, series: str | None = None) -> Series:
    """Read the axial non-contrast head CT from the export of a scanner or archive.

    Of several series of one study, these are preferred in order: a soft-tissue kernel, an original over a reformat,
    the whole head over a part, and the slice spacing nearest 5 mm. Series of different studies are not compared.

    Args:
        path: A folder, which is searched with all subfolders; a .zip of one, which is not unpacked; or one DICOM file.
        files: Names of the files to read, as `iter_files` yields them; by default all.
        series: Series Instance UID, pseudonym or number of the series to read; by default the best one.

    Raises:
        ScanError: Nothing is readable (code "unreadable", "no-dicom"); no series is suitable ("no-ct", "contrast",
            "too-few-slices"); several are equally suitable ("several-series"); the series forms no volume
            ("mixed-positions", "uneven-slices-shape", "gap"); or pixels cannot be decoded ("pixel-data").
    """
    try:
        with np.errstate(all="ignore"):
            return _read_series(path, files, series)
    except IchprogError:
        raise
    except Exception as error:  # values of damaged headers make anything fail, and no file can be named then
        message = f"{path}: a header of the series is damaged: {type(error).__name__}: {error}. Export it again."
        raise ScanError(message, code="unreadable") from error


def _read_series(path: Path, names: Collection[str] | None, series: str | None) -> Series:
    with ExitStack() as opened:
        stack, record = select_stack(path, names, series, opened)
        planes, warnings = _read_planes(stack, path)
    planes, steps, origin, done, more_warnings = _regrid(planes, stack, path)
    hu, affine = _reorient(planes, steps, origin)
    return Series(hu, affine, {**record, **done}, (*warnings, *more_warnings))


def select_stack(
    path: Path, names: Collection[str] | None, series: str | None, opened: ExitStack
) -> tuple[Stack, dict[str, Any]]:
    """Select the slices of the best series.

    Args:
        path: As in `read_series`.
        names: Names of the files to read; all if None.
        series: As in `read_series`.
        opened: Closes a .zip, when the pixels of the slices have been read.

    Returns:
        The slices, and a record of the files and of the selection.

    Raises:
        ScanError: As in `read_series`.
    """
    chosen = (each for each in iter_files(path, opened) if names is None or each[0] in names)
    images, files = read_images(chosen, series)
    if not images and series is not None and files["dicom"]:
        message = f"{path}: holds no series {series!r}. `ichprog scans` lists the series."
        raise ScanError(message, code="no-ct", measured=0, expected="one series")
    if not images:
        kind = "folder" if path.is_dir() else "archive" if path.suffix.lower() == ".zip" else "file"
        message = f"{path}: the {kind} holds no scan: none of {files['other']} files is DICOM or NIfTI."
        raise ScanError(message, code="no-dicom", measured=0, expected="one head CT", unit="DICOM files")
    stack, record = choose_stack(group_stacks(images), path)
    return stack, {"files": files, **record}


def _read_planes(stack: Stack, path: Path) -> tuple[np.ndarray, list[ScanWarning]]:
    """Return the HU of a stack, `(slice, row, column)` float32, and warnings."""
    geometries = sorted({image.pixel_geometry for image in stack.images})
    if len(geometries) > 1:
        message = f"{path}: slices of {stack} differ in rows, columns or pixel size: {geometries}. Export one series."
        unit = "rows, columns, mm, mm"
        raise ScanError(message, code="uneven-slices-shape", measured=geometries, expected="one geometry", unit=unit)
    check_voxels((len(stack.images), *map(int, geometries[0][:2])), str(path))
    planes = np.empty((len(stack.images), *map(int, geometries[0][:2])), np.float32)
    for plane, hu in zip(planes, read_hu(stack.images), strict=True):
        plane[:] = hu
    count = sum(not image.numbers("RescaleSlope", 1).size for image in stack.images)
    message = f"{count} slices do not state how stored values become HU; the values are used as HU."
    return planes, [ScanWarning("no-rescale", message, count, 0, "slices")] if count else []


def _regrid(
    planes: np.ndarray, stack: Stack, path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any], list[ScanWarning]]:
    """Align planes and bring them to even spacing.

    Returns:
        The planes; the voxel steps that `_reorient` takes; LPS mm of the first voxel; a record of the steps; warnings.
    """
    depths, drift, gaps, gap = stack.depths, stack.offsets[:, :2], np.diff(stack.depths), stack.slice_spacing
    if gaps.max() > _MAX_GAP_MM:
        widest, most = round(float(gaps.max()), 2), f"<= {_MAX_GAP_MM:g}"
        message = f"{path}: {stack} has a gap of {widest} mm; {most} mm is interpolated. Give all slices."
        raise ScanError(message, code="gap", measured=widest, expected=most, unit="mm")

    count = round(stack.coverage / gap) + 1
    step = stack.coverage / (count - 1)  # both ends keep their position
    even = count == len(depths) and bool(np.abs(depths - step * np.arange(count)).max() <= TOLERANCE_MM)
    straight = bool(np.abs(drift).max() <= TOLERANCE_MM)
    shift = drift[-1] @ stack.axes[:2]
    tilt = 0.0 if straight else float(np.degrees(np.arctan2(np.linalg.norm(shift), stack.coverage)))
    tilt *= -1 if shift[1] > 0 else 1

    # A gap of a multiple of the usual spacing misses slices if its neighbours are too thin to fill it. If thickness is
    # not stated, only a rare gap counts: thick slices above thin ones miss nothing.
    thickness = np.array([image.number("SliceThickness", 0) for image in stack.images])
    parts = np.round(gaps / gap)
    wide = (parts > 1) & (np.abs(gaps / gap - parts) < 0.1)
    hole = wide & np.where(thickness.all(), np.maximum(thickness[1:], thickness[:-1]) < 0.75 * gaps, wide.mean() <= 0.1)
    missing, usual = int((parts - 1)[hole].sum()), gaps[~hole]

    warnings = []
    if not straight:
        message = f"slices are shifted by a gantry tilt of {tilt:.1f} degrees; aligned by linear interpolation."
        warnings.append(ScanWarning("gantry-tilt", message, round(tilt, 2), 0, "degrees"))
    if missing:
        message = f"{missing} slices are missing in gaps of up to {gaps[hole].max():.2f} mm and were interpolated."
        warnings.append(ScanWarning("missing-slice", message, round(float(gaps[hole].max()), 3), round(gap, 3), "mm"))
    if not even and (not missing or np.ptp(usual) > 2 * TOLERANCE_MM):
        finest, coarsest = round(float(usual.min()), 3), round(float(usual.max()), 3)
        message = f"slices lie {finest:g} to {coarsest:g} mm apart; interpolated linearly to every {step:.3g} mm."
        warnings.append(ScanWarning("uneven-slices", message, [finest, coarsest], round(step, 3), "mm"))

    first = stack.images[0]
    origin, pixel_mm = first.numbers("ImagePositionPatient", 3), first.numbers("PixelSpacing", 2)
    if not (straight and even):
        across = drift[:, ::-1] / pixel_mm * (not straight)
        check_voxels((count, *planes.shape[1:] + np.ceil(np.ptp(across, axis=0))), str(path))
        planes, corner = _interpolate_planes(planes, depths, across, step * np.arange(count))
        origin = origin + (corner * pixel_mm)[::-1] @ stack.axes[:2]
    done = {
        "slice_spacing_mm": round(step, 4),
        "gaps_mm": {f"{one:.2f}": number for one, number in sorted(Counter(gaps.round(2).tolist()).items())},
        "missing_slices": missing,
        "tilt_deg": round(tilt, 2),
        "tilt_sign": "positive where slices shift to anterior from foot to head",
        "resampled": not (straight and even),
    }
    return planes, stack.axes.T * (*pixel_mm[::-1], step), origin, done, warnings


def _interpolate_planes(
    planes: np.ndarray, depths: np.ndarray, across: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate shifted, unevenly spaced planes linearly onto a grid that contains all of them.

    Args:
        planes: `(slice, row, column)`.
        depths: `(slice,)` mm.
        across: `(slice, 2)` row and column, in pixels, at which each plane starts.
        wanted: Depths of the planes of the grid in mm.

    Returns:
        The planes of the grid, and the row and column at which they start.
    """
    corner = across.min(axis=0)
    shape = tuple(planes.shape[1:] + np.ceil(np.ptp(across, axis=0)).astype(int))

    @functools.lru_cache(maxsize=2)
    def shifted(n: int) -> np.ndarray:
        return _shift_plane(planes[n], across[n] - corner, shape)

    grid = np.empty((len(wanted), *shape), np.float32)
    for plane, depth in zip(grid, wanted, strict=True):
        below = int(np.clip(np.searchsorted(depths, depth, "right") - 1, 0, len(depths) - 2))
        weight = round(float((depth - depths[below]) / (depths[below + 1] - depths[below])), 3)
        plane[:] = (1 - weight) * shifted(below) + weight * shifted(below + 1)
    return grid, corner


def _shift_plane(plane: np.ndarray, by: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Shift a plane down and to the right by linear interpolation, with air around the plane."""
    values, box = plane.astype(np.float64), []
    for axis, far in enumerate(by):
        start = int(np.ceil(far))
        if share := start - far:
            first, last = (
                values.take(range(values.shape[axis] - 1), axis),
                values.take(range(1, values.shape[axis]), axis),
            )
            values = (1 - share) * first + share * last
        box.append(slice(start, start + values.shape[axis]))
    whole = np.full(shape, AIR_HU, np.float32)
    whole[tuple(box)] = values
    return whole


def _reorient(planes: np.ndarray, steps: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip the axes of planes to `(i, j, k)` in LPS order, and return the RAS affine too.

    Args:
        planes: `(slice, row, column)`.
        steps: `(3, 3)` LPS mm in columns: to the next voxel along a row, down a column, to the next slice.
        origin: LPS mm of the first voxel.
    """
    import nibabel as nib

    nio: Any = nib.orientations
    ras = np.eye(4)
    ras[:3] = np.diag([-1, -1, 1]) @ np.column_stack([steps, origin])
    voxels = planes.transpose(2, 1, 0)
    to_lps = nio.ornt_transform(nio.io_orientation(ras), nio.axcodes2ornt("LPS"))
    return nio.apply_orientation(voxels, to_lps), ras @ nio.inv_ornt_aff(to_lps, voxels.shape)
