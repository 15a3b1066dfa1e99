"""A scan: HU in one fixed voxel order, and the way back to the order it came in."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import InvalidValueError, ScanError, ScanWarning
from ichprog.scan.morphology import banded, weigh_slices, weights

if TYPE_CHECKING:
    import nibabel as nib

AIR_HU = -200.0  # fat and all that is softer is above
_LPS = ("L", "P", "S")
_MOST_OBLIQUE_DEG = 40.0  # nearer to 45 degrees the voxel axes no longer say which is which
_MOST_SHEAR_DEG = 1.0
_STEP_MM = 2.0
_COARSE_HU = (-400.0, 500.0)
_PIECE_BYTES = 2**18


@dataclass(frozen=True, eq=False)
class Scan:
    """One head CT.

    Attributes:
        hu: `(i, j, k)` float32 HU; i runs to the patient's left, j to posterior, k to superior.
        affine: `(4, 4)` from voxel (i, j, k) of `hu` to RAS mm, as nibabel has it.
        name: What was read, for results and messages.
        source_shape: Shape of the array as it came.
        source_affine: Affine of the array as it came.
        record: What was read and what was done to it, as plain data.
        warnings: Doubts about it.
        brain: `(i, j, k)` bool, true in the brain, once the scan was examined and `hu` is 0 elsewhere; else None.
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
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along i, j and k, in mm."""
        i, j, k = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return i, j, k

    @property
    def coarse_form(self) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
        """Shape of a grid of about 2 mm over the scan, and its spacing along i, j and k in mm."""
        i, j, k = (max(2, round(n * mm / _STEP_MM)) for n, mm in zip(self.hu.shape, self.spacing, strict=True))
        x, y, z = (n * mm / m for n, mm, m in zip(self.hu.shape, self.spacing, (i, j, k), strict=True))
        return (i, j, k), (x, y, z)

    @functools.cached_property
    def coarse(self) -> np.ndarray:
        """HU on the grid of about 2 mm, clipped so that air and dense bone do not outweigh what they are mixed with."""
        matrices = [banded(weights(n, m)) for n, m in zip(self.hu.shape, self.coarse_form[0], strict=True)]
        return weigh_slices((np.clip(plane, *_COARSE_HU) for plane in np.moveaxis(self.hu, 2, 0)), matrices)

    @functools.cached_property
    def extremes(self) -> tuple[float, float]:
        """The lowest and the highest HU."""
        each = [(plane.min(), plane.max()) for plane in np.moveaxis(self.hu, 2, 0)]  # while it is in the cache
        return float(min(low for low, _ in each)), float(max(high for _, high in each))

    @functools.cached_property
    def background(self) -> tuple[float, float]:
        """The commonest value on the four sides, and the share of the sides that has it."""
        return background(self.hu)

    @functools.cached_property
    def matter(self) -> np.ndarray:
        """Where there is something, `(i, j, k)` bool: not the background's value, and denser than air."""
        empty, _ = self.background
        found = np.empty_like(self.hu, bool)
        for hu, here in zip(np.moveaxis(self.hu, 2, 0), np.moveaxis(found, 2, 0), strict=True):
            here[:] = ((hu > empty + 0.5) | (hu < empty - 0.5)) & (hu > AIR_HU)
        return found

    def image(self, values: np.ndarray) -> "nib.Nifti1Image":
        """Values over this scan as an image in the scan's own shape, voxel order and affine.

        Args:
            values: `(i, j, k)`, one value for each voxel of `hu`.
        """
        return image(values, self.source_shape, self.source_affine)


def image(values: np.ndarray, source_shape: tuple[int, ...], source_affine: np.ndarray) -> "nib.Nifti1Image":
    """Values over a scan as an image as the scan came.

    Args:
        values: `(i, j, k)`, one value for each voxel of the scan's `hu`.
        source_shape: The scan's own.
        source_affine: The scan's own.
    """
    import nibabel as nib

    back = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(_LPS), nib.orientations.io_orientation(source_affine)
    )
    return nib.Nifti1Image(nib.orientations.apply_orientation(values, back).reshape(source_shape), source_affine)


def background(hu: np.ndarray) -> tuple[float, float]:
    """The commonest value on the four sides of a scan, and the share of the sides that has it.

    Args:
        hu: `(i, j, k)` HU.
    """
    sides = np.concatenate([hu[[0, -1]].ravel(), hu[:, [0, -1]].ravel()])
    values, counts = np.unique(sides, return_counts=True)
    return float(values[np.argmax(counts)]), float(counts.max() / sides.size)


def read(source: Any) -> Scan:
    """Reads one head CT, whatever it comes as.

    Args:
        source: A NIfTI file (.nii, .nii.gz), a DICOM folder, a .zip of one, one DICOM file, a nibabel image, or a
            Scan, which is returned as it is.

    Raises:
        ScanError: There is no such file, it cannot be read, or what it holds is no three-dimensional scan.
    """
    import nibabel as nib

    if isinstance(source, Scan):
        return source
    if isinstance(source, nib.spatialimages.SpatialImage):
        return _from_image(source, source.get_filename() or "image in memory", {"format": type(source).__name__})
    if isinstance(source, tuple):
        return _from_pair(source)
    if not isinstance(source, str | Path):
        expected = "a path to NIfTI or DICOM, a nibabel image, or a tuple (array, affine)"
        raise InvalidValueError("type of scan", type(source).__name__, expected)
    path = Path(source)
    if not path.exists():
        raise ScanError(f"{path}: there is no such file or folder.", code="not-found")
    if path.is_file() and path.stat().st_size == 0:
        raise ScanError(f"{path}: the file is empty.", code="unreadable")
    if path.name.endswith((".nii", ".nii.gz")):
        try:
            return _from_image(nib.load(path), str(path), {"format": "NIfTI"})
        except ScanError:
            raise
        except Exception as error:  # a damaged file makes nibabel and zlib raise almost anything
            raise ScanError(f"{path}: cannot be read as NIfTI: {error}.", code="unreadable") from error
    from ichprog.scan import dicom

    if not (path.is_dir() or path.suffix.lower() == ".zip" or dicom.is_dicom(path)):
        raise ScanError(
            f"{path}: neither NIfTI (.nii, .nii.gz) nor DICOM (a folder, a .zip of one, or a file).", code="unreadable"
        )
    series = dicom.read(path)
    return _from_array(series.hu, series.affine, str(path), {"format": "DICOM", **series.record}, series.warnings)


def _from_pair(pair: tuple[Any, ...]) -> Scan:
    """Return the Scan of an array and its affine."""
    name = "array in memory"
    if len(pair) != 2 or np.shape(pair[1]) != (4, 4):
        expected = "(array, affine), with an affine of shape (4, 4) from voxels to RAS mm"
        raise InvalidValueError("shapes of a tuple", tuple(np.shape(each) for each in pair), expected)
    array, affine = np.asarray(pair[0]), np.asarray(pair[1], float)
    _refuse_unless_numbers(array, name)
    return _from_array(array, affine, name, {"format": "array"})


def _refuse_unless_numbers(data: np.ndarray, name: str) -> None:
    if data.dtype.kind not in "iuf":
        raise ScanError(f"{name}: voxels are {data.dtype}, not one number each in HU.", code="not-scalar")


def _from_image(image: Any, name: str, record: dict[str, Any]) -> Scan:
    """A nibabel image as a Scan, its data read once."""
    data = _stored(image.dataobj)
    _refuse_unless_numbers(data, name)
    scan = _from_array(data, image.affine, name, record)
    header = image.header
    if hasattr(header, "get_sform") and not (int(header["sform_code"]) or int(header["qform_code"])):
        doubt = ScanWarning(
            "orientation-unstated",
            f"the header states no orientation (sform and qform codes are 0); voxel order {scan.record['voxel_order']} "
            "is assumed, so left and right may be exchanged.",
            measured=0,
            expected="an sform or qform code above 0",
        )
        return dataclasses.replace(scan, warnings=(doubt,))
    return scan


def _stored(voxels: Any) -> np.ndarray:
    """The values of an image.

    Those of a compressed file are unpacked piece by piece into their array, which takes a fifth of nibabel's time.
    """
    path = getattr(voxels, "file_like", None)
    if not (isinstance(path, str) and path.endswith(".gz")):
        return np.asanyarray(voxels)
    from isal import igzip
    from nibabel.volumeutils import apply_read_scaling

    data = np.empty(voxels.shape, voxels.dtype, voxels.order)
    left = data.ravel("K").view(np.uint8).data
    with igzip.open(path) as file:
        file.seek(voxels.offset)
        while left:
            if not (count := file.readinto(left[:_PIECE_BYTES])):
                raise EOFError(f"{len(left)} bytes of {data.nbytes} are missing")
            left = left[count:]
        file.read(1)  # goes on to the end, where the file holds a checksum of all this
    return np.asanyarray(apply_read_scaling(data, voxels.slope, voxels.inter))


def _from_array(
    data: np.ndarray, affine: np.ndarray, name: str, record: dict[str, Any], warnings: tuple[ScanWarning, ...] = ()
) -> Scan:
    import nibabel as nib

    source_shape = data.shape
    _refuse_unless_3d(source_shape, name)
    data = data.reshape(source_shape[:3])
    _refuse_strange_affine(affine, name)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        bad = int(data.size - np.isfinite(data).sum())
        raise ScanError(
            f"{name}: {bad} of {data.size} voxels are NaN or infinite; every voxel needs a value in HU.",
            code="not-finite",
            measured=bad,
            expected=0,
            unit="voxels",
        )
    to_lps = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(_LPS)
    )
    # In memory the voxels lie as in a file, row by row and slice by slice, which is how everything goes through them.
    hu = nib.orientations.apply_orientation(data, to_lps).astype(np.float32, order="F")
    lps_affine = affine @ nib.orientations.inv_ornt_aff(to_lps, data.shape)
    record = {
        **record,
        "voxel_order": "".join(nib.orientations.aff2axcodes(affine)),
        "obliquity_deg": round(float(np.degrees(nib.affines.obliquity(affine)).max()), 2),
    }
    return Scan(hu, lps_affine, name, source_shape, affine, record, warnings)


def _refuse_unless_3d(shape: tuple[int, ...], name: str) -> None:
    if len(shape) > 3 and max(shape[3:]) > 1:
        raise ScanError(
            f"{name}: has {len(shape)} axes {shape}, the fourth a series of volumes; give one volume of it.",
            code="time-axis",
            measured=list(shape),
            expected="three axes",
            unit="voxels",
        )
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise ScanError(
            f"{name}: shape {shape} is no volume; a head CT has rows, columns and several slices.",
            code="not-3d",
            measured=list(shape),
            expected="three axes",
            unit="voxels",
        )


def _refuse_strange_affine(affine: np.ndarray, name: str) -> None:
    import nibabel as nib

    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() == 0 or abs(np.linalg.det(axes / lengths)) < 0.1:
        raise ScanError(f"{name}: the affine {affine.tolist()} does not place voxels in space.", code="affine")
    cosines = (axes / lengths).T @ (axes / lengths)
    shear = float(np.degrees(np.arcsin(np.clip(np.abs(cosines - np.eye(3)).max(), 0, 1))))
    if shear > _MOST_SHEAR_DEG:
        raise ScanError(
            f"{name}: the voxel axes lean {shear:.1f} degrees against each other, an uncorrected gantry tilt or "
            f"another shear; up to {_MOST_SHEAR_DEG:g} is read. Give the DICOM series, which is straightened here, "
            "or resample the image.",
            code="sheared",
            measured=round(shear, 1),
            expected=f"<= {_MOST_SHEAR_DEG:g}",
            unit="degrees",
        )
    oblique = float(np.degrees(nib.affines.obliquity(affine)).max())
    if oblique > _MOST_OBLIQUE_DEG:
        raise ScanError(
            f"{name}: the voxel axes are turned {oblique:.1f} degrees against the patient's; up to "
            f"{_MOST_OBLIQUE_DEG:g} is read. Resample the image along the patient's axes.",
            code="oblique",
            measured=round(oblique, 1),
            expected=f"<= {_MOST_OBLIQUE_DEG:g}",
            unit="degrees",
        )
