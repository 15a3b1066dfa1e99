"""Read a scan from NIfTI or DICOM into one fixed voxel order, and write values in the order of the source."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import InvalidValueError, ScanError, ScanWarning
from ichprog.limits import check_voxels
from ichprog.scan.morphology import cut_bands, resample_slices, triangle_weights
from ichprog.scan.studies import DicomStudy

if TYPE_CHECKING:
    import nibabel as nib

Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]

AIR_HU = -200.0  # fat and denser tissue lie above
_LPS = ("L", "P", "S")
_MAX_OBLIQUITY_DEG = 40.0  # near 45 degrees the voxel axes cannot be distinguished
_MAX_SHEAR_DEG = 1.0
_LOWRES_MM = 2.0
_LOWRES_CLIP_HU = (-400.0, 500.0)
_CHUNK_BYTES = 2**18
_MASK_DISTANCE_MM = 1.0  # largest distance of a mask's corners from the scan's corners


@dataclass(frozen=True, eq=False)
class Scan:
    """One head CT.

    Attributes:
        hu: `(i, j, k)` float32 HU; i runs to the patient's left, j to posterior, k to superior.
        affine: `(4, 4)` from voxel (i, j, k) of `hu` to RAS mm, as in nibabel.
        name: Path or other name of the source, for results and messages.
        source_shape: Shape of the source array.
        source_affine: Affine of the source array.
        record: Source and processing steps, as plain data.
        warnings: Warnings about the scan.
        brain: `(i, j, k)` bool brain mask if the scan was checked and `hu` is 0 outside the brain; otherwise None.
    """

    hu: np.ndarray
    affine: np.ndarray
    name: str
    source_shape: tuple[int, ...]
    source_affine: np.ndarray
    record: dict[str, Any]
    warnings: tuple[ScanWarning, ...] = ()
    brain: np.ndarray | None = None

    @property
    def spacing(self) -> Spacing:
        """Return the voxel spacing along i, j and k, in mm."""
        i, j, k = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return i, j, k

    @property
    def lowres_geometry(self) -> tuple[Shape, Spacing]:
        """Return shape and spacing in mm of a grid of about 2 mm over the scan."""
        return lowres_geometry(self.hu.shape, self.spacing)

    @functools.cached_property
    def lowres(self) -> np.ndarray:
        """Return the HU on the grid of about 2 mm, as `lowres_hu` computes them."""
        return lowres_hu(self.hu, self.spacing)

    @functools.cached_property
    def hu_range(self) -> tuple[float, float]:
        """Return the lowest and the highest HU."""
        ranges = [(plane.min(), plane.max()) for plane in np.moveaxis(self.hu, 2, 0)]  # one plane fits the CPU cache
        return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))

    @functools.cached_property
    def background(self) -> tuple[float, float]:
        """Return the most frequent value on the four sides, and the share of the sides that has this value."""
        return background(self.hu)

    @functools.cached_property
    def foreground(self) -> np.ndarray:
        """Return the foreground mask, `(i, j, k)` bool: denser than air and not the background value."""
        value, _ = self.background
        mask = np.empty_like(self.hu, bool)
        for hu, plane in zip(np.moveaxis(self.hu, 2, 0), np.moveaxis(mask, 2, 0), strict=True):
            plane[:] = ((hu > value + 0.5) | (hu < value - 0.5)) & (hu > AIR_HU)
        return mask

    def image(self, values: np.ndarray) -> "nib.Nifti1Image":
        """Return values over this scan as an image in the shape, voxel order and affine of the source.

        Args:
            values: `(i, j, k)`, one value for each voxel of `hu`.
        """
        return source_image(values, self.source_shape, self.source_affine)


def lowres_geometry(shape: tuple[int, ...], spacing_mm: Spacing) -> tuple[Shape, Spacing]:
    """Return shape and spacing in mm of a grid of about 2 mm over the extent of a scan.

    Args:
        shape: Shape of the scan.
        spacing_mm: Voxel spacing of the scan along i, j and k, in mm.

    Examples:
        >>> lowres_geometry((512, 512, 30), (0.5, 0.5, 5.0))
        ((128, 128, 75), (2.0, 2.0, 2.0))
    """
    i, j, k = (max(2, round(n * mm / _LOWRES_MM)) for n, mm in zip(shape, spacing_mm, strict=True))
    x, y, z = (n * mm / m for n, mm, m in zip(shape, spacing_mm, (i, j, k), strict=True))
    return (i, j, k), (x, y, z)


def lowres_hu(hu: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
    """Return HU resampled to a grid of about 2 mm.

    HU are clipped to -400 and 500 first, so that air and dense bone do not dominate the averages.

    Args:
        hu: `(i, j, k)` HU.
        spacing_mm: Voxel spacing along i, j and k, in mm.
    """
    shape, _ = lowres_geometry(hu.shape, spacing_mm)
    matrices = [cut_bands(triangle_weights(n, m)) for n, m in zip(hu.shape, shape, strict=True)]
    return resample_slices((np.clip(plane, *_LOWRES_CLIP_HU) for plane in np.moveaxis(hu, 2, 0)), matrices)


def source_image(values: np.ndarray, source_shape: tuple[int, ...], source_affine: np.ndarray) -> "nib.Nifti1Image":
    """Return values over a scan as an image in the shape, voxel order and affine of the source.

    Args:
        values: `(i, j, k)`, one value for each voxel of the scan's `hu`.
        source_shape: Shape of the source array.
        source_affine: Affine of the source array.
    """
    import nibabel as nib

    to_source = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(_LPS), nib.orientations.io_orientation(source_affine)
    )
    return nib.Nifti1Image(nib.orientations.apply_orientation(values, to_source).reshape(source_shape), source_affine)


def load_regions(mask: Any, scan: Scan) -> np.ndarray:
    """Load a lesion mask in the voxels of a scan.

    Args:
        mask: An image in the scan's space, or its path; 0 outside the lesion, and region numbers inside.
        scan: The scan.

    Returns:
        `(i, j, k)` uint8 region numbers.

    Raises:
        ScanError: The mask cannot be read. With code `other-scan` the mask has another shape or position than the scan.

    Examples:
        >>> import nibabel
        >>> affine = np.diag([-1, -1, 5, 1])
        >>> scan = read(nibabel.Nifti1Image(np.zeros((4, 4, 2), np.int16), affine))
        >>> int(load_regions(nibabel.Nifti1Image(np.ones((4, 4, 2), np.uint8), affine), scan).sum())
        32
    """
    image = read(mask)
    corners = np.array(np.meshgrid(*([0, n - 1] for n in scan.hu.shape), [1])).reshape(4, -1)
    distance = float(np.linalg.norm((image.affine - scan.affine) @ corners, axis=0).max())
    if image.hu.shape != scan.hu.shape or distance > _MASK_DISTANCE_MM:
        raise ScanError(
            f"{image.name}: the mask has {image.hu.shape} voxels, up to {distance:.1f} mm away from those of scan "
            f"{scan.name} with {scan.hu.shape}. Give the mask that was drawn on this scan.",
            code="other-scan",
            measured=[*image.hu.shape, round(distance, 1)],
            expected=[*scan.hu.shape, 0],
            unit="voxels, and mm",
        )
    regions: np.ndarray = image.hu.clip(0, 255).astype(np.uint8)
    return regions


def source_slices(values: np.ndarray, source_affine: np.ndarray) -> np.ndarray:
    """Return one value for each slice in the order in which the source stores the slices.

    Args:
        values: `(k,)`, one value for each slice of the scan's `hu`, from inferior to superior.
        source_affine: Affine of the source array.

    Examples:
        >>> source_slices(np.array([1, 2, 3]), np.diag([1.0, 1.0, -5.0, 1.0])).tolist()
        [3, 2, 1]
    """
    import nibabel as nib

    flips = dict(nib.orientations.io_orientation(source_affine))
    return values if flips[2] > 0 else values[::-1]


def background(hu: np.ndarray) -> tuple[float, float]:
    """Return the most frequent value on the four sides of a scan, and the share of the sides that has this value.

    Args:
        hu: `(i, j, k)` HU.

    Examples:
        >>> background(np.zeros((4, 4, 2)))
        (0.0, 1.0)
    """
    sides = np.concatenate([hu[[0, -1]].ravel(), hu[:, [0, -1]].ravel()])
    values, counts = np.unique(sides, return_counts=True)
    return float(values[np.argmax(counts)]), float(counts.max() / sides.size)


def read(source: Any) -> Scan:
    """Read one head CT.

    Args:
        source: A NIfTI file (.nii, .nii.gz), a DICOM folder, a .zip of one, one DICOM file, a nibabel image, a tuple
            of an array and its `(4, 4)` affine from voxels to RAS mm, a study that `find_scans` returns, or a Scan,
            which is returned unchanged.

    Raises:
        InvalidValueError: The source is of another type.
        ScanError: The source does not exist, cannot be read, or holds no three-dimensional scan.

    Examples:
        >>> import nibabel
        >>> image = nibabel.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.diag([-1, -1, 5, 1]))
        >>> read(image).spacing
        (1.0, 1.0, 5.0)
    """
    import nibabel as nib

    if isinstance(source, Scan):
        return source
    if isinstance(source, nib.spatialimages.SpatialImage):
        return _scan_from_image(source, image_name(source), {"format": type(source).__name__})
    if isinstance(source, tuple):
        return _scan_from_pair(source)
    if isinstance(source, DicomStudy):
        return _scan_from_series(source.path, str(source), files=source.files, series=source.series)
    if not isinstance(source, str | Path):
        expected = "a path to NIfTI or DICOM, a nibabel image, or a tuple (array, affine)"
        raise InvalidValueError("type of scan", type(source).__name__, expected)
    path = Path(source)
    if not path.exists():
        raise ScanError(f"{path}: no such file or folder. Check the path.", code="not-found")
    if path.is_file() and path.stat().st_size == 0:
        raise ScanError(f"{path}: the file is empty. Copy it again.", code="unreadable")
    if path.name.endswith((".nii", ".nii.gz")):
        try:
            return _scan_from_image(nib.load(path), str(path), {"format": "NIfTI"})
        except ScanError:
            raise
        except Exception as error:  # nibabel and zlib raise almost anything for a damaged file
            raise ScanError(f"{path}: cannot be read as NIfTI: {error}. Copy it again.", code="unreadable") from error
    from ichprog.scan import dicom

    if not (path.is_dir() or path.suffix.lower() == ".zip" or dicom.is_dicom(path)):
        raise ScanError(
            f"{path}: unknown file format. Expected NIfTI (.nii, .nii.gz) or DICOM (a folder, a .zip of one, or a "
            "file).",
            code="unreadable",
        )
    return _scan_from_series(path, str(path))


def _scan_from_series(path: Path, name: str, **choice: Any) -> Scan:
    from ichprog.scan import dicom

    series = dicom.read_series(path, **choice)
    return _scan_from_array(series.hu, series.affine, name, {"format": "DICOM", **series.record}, series.warnings)


def image_name(image: Any) -> str:
    """Return the file name of a nibabel image, for messages.

    Args:
        image: A nibabel image.
    """
    return image.get_filename() or "image in memory"


def to_lps(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorder the axes of an array to LPS: to the patient's left, posterior and superior.

    Args:
        values: Three-dimensional array.
        affine: `(4, 4)` from voxel to RAS mm.

    Returns:
        A view of the array in LPS order, and its affine.

    Examples:
        >>> values, affine = to_lps(np.arange(8).reshape(2, 2, 2), np.eye(4))
        >>> values[0, 0, 0], affine[0].tolist()
        (np.int64(6), [-1.0, 0.0, 0.0, 1.0])
    """
    import nibabel as nib

    transform = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(_LPS)
    )
    reordered: np.ndarray = nib.orientations.apply_orientation(values, transform)
    return reordered, affine @ nib.orientations.inv_ornt_aff(transform, values.shape)


def read_voxels(image: Any) -> np.ndarray:
    """Read the voxels of a nibabel image.

    ISA-L decompresses a .nii.gz file straight into its array, in a fifth of nibabel's time.

    Args:
        image: A nibabel image.
    """
    voxels = image.dataobj
    path = getattr(voxels, "file_like", None)
    return _decompress(voxels, path) if isinstance(path, str) and path.endswith(".gz") else np.asanyarray(voxels)


def _decompress(voxels: Any, path: str) -> np.ndarray:
    from isal import igzip
    from nibabel.volumeutils import apply_read_scaling

    data = np.empty(voxels.shape, voxels.dtype, voxels.order)
    remaining = data.ravel("K").view(np.uint8).data
    with igzip.open(path) as file:
        file.seek(voxels.offset)
        while remaining:
            if not (count := file.readinto(remaining[:_CHUNK_BYTES])):
                raise EOFError(f"{len(remaining)} bytes of {data.nbytes} are missing")
            remaining = remaining[count:]
        file.read(1)  # reads to the end of the file, where its checksum is verified
    return np.asanyarray(apply_read_scaling(data, voxels.slope, voxels.inter))


def _scan_from_pair(pair: tuple[Any, ...]) -> Scan:
    if len(pair) != 2 or np.shape(pair[1]) != (4, 4):
        expected = "(array, affine), with an affine of shape (4, 4) from voxels to RAS mm"
        raise InvalidValueError("shapes of a tuple", tuple(np.shape(each) for each in pair), expected)
    return _scan_from_array(np.asarray(pair[0]), np.asarray(pair[1], float), "array in memory", {"format": "array"})


def _scan_from_image(image: Any, name: str, record: dict[str, Any]) -> Scan:
    check_voxels(image.shape, name)
    with np.errstate(all="ignore"):  # the result is checked for numbers that are not finite
        scan = _scan_from_array(read_voxels(image), image.affine, name, record)
    header = image.header
    if hasattr(header, "get_sform") and not (int(header["sform_code"]) or int(header["qform_code"])):
        warning = ScanWarning(
            "orientation-unstated",
            f"the header states no orientation (sform and qform codes are 0); voxel order {scan.record['voxel_order']} "
            "is assumed, so left and right may be exchanged.",
            measured=0,
            expected="an sform or qform code above 0",
        )
        return dataclasses.replace(scan, warnings=(warning,))
    return scan


def _scan_from_array(
    data: np.ndarray, affine: np.ndarray, name: str, record: dict[str, Any], warnings: tuple[ScanWarning, ...] = ()
) -> Scan:
    import nibabel as nib

    if data.dtype.kind not in "iuf":
        raise ScanError(
            f"{name}: voxels have type {data.dtype}. Expected one real number in HU for each voxel.", code="not-scalar"
        )
    source_shape = data.shape
    _validate_shape(source_shape, name)
    data = data.reshape(source_shape[:3])
    _validate_affine(affine, name)
    with np.errstate(all="ignore"):
        values = data.astype(np.float32) if data.dtype.kind == "f" else data
    if data.dtype.kind == "f" and not np.isfinite(values).all():
        count = int(data.size - np.isfinite(values).sum())
        raise ScanError(
            f"{name}: {count} of {data.size} voxels are NaN or infinite. Every voxel needs a value in HU.",
            code="not-finite",
            measured=count,
            expected=0,
            unit="voxels",
        )
    reordered, lps_affine = to_lps(values, affine)
    hu = reordered.astype(np.float32, order="F")  # the memory order of a file: row by row, slice by slice
    record = {
        **record,
        "voxel_order": "".join(nib.orientations.aff2axcodes(affine)),
        "obliquity_deg": round(float(np.degrees(nib.affines.obliquity(affine)).max()), 2),
    }
    return Scan(hu, lps_affine, name, source_shape, affine, record, warnings)


def _validate_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) > 3 and max(shape[3:]) > 1:
        raise ScanError(
            f"{name}: has {len(shape)} axes {shape}, so it holds several volumes. Give one volume.",
            code="time-axis",
            measured=list(shape),
            expected="three axes",
            unit="voxels",
        )
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise ScanError(
            f"{name}: shape {shape} is no volume. A head CT has rows, columns and several slices.",
            code="not-3d",
            measured=list(shape),
            expected="three axes",
            unit="voxels",
        )


def _validate_affine(affine: np.ndarray, name: str) -> None:
    import nibabel as nib

    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() == 0 or abs(np.linalg.det(axes / lengths)) < 0.1:
        raise ScanError(f"{name}: the affine {affine.tolist()} does not place voxels in space.", code="affine")
    cosines = (axes / lengths).T @ (axes / lengths)
    shear = float(np.degrees(np.arcsin(np.clip(np.abs(cosines - np.eye(3)).max(), 0, 1))))
    if shear > _MAX_SHEAR_DEG:
        raise ScanError(
            f"{name}: the voxel axes are sheared by {shear:.1f} degrees, by an uncorrected gantry tilt or otherwise; "
            f"up to {_MAX_SHEAR_DEG:g} degrees is read. Give the DICOM series, whose tilt is corrected, or resample "
            "the image.",
            code="sheared",
            measured=round(shear, 1),
            expected=f"<= {_MAX_SHEAR_DEG:g}",
            unit="degrees",
        )
    obliquity = float(np.degrees(nib.affines.obliquity(affine)).max())
    if obliquity > _MAX_OBLIQUITY_DEG:
        raise ScanError(
            f"{name}: the voxel axes are rotated by {obliquity:.1f} degrees from the patient's axes; up to "
            f"{_MAX_OBLIQUITY_DEG:g} degrees is read. Resample the image along the patient's axes.",
            code="oblique",
            measured=round(obliquity, 1),
            expected=f"<= {_MAX_OBLIQUITY_DEG:g}",
            unit="degrees",
        )
