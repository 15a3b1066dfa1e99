"""Codes of scan errors and of the warnings that reading gives, with their descriptions for the documentation.

The warnings of checks are described in `checks.CHECKS`.
"""

from typing import NamedTuple


class Code(NamedTuple):
    """A code of an error or warning.

    Attributes:
        code: The code.
        description: What was found.
        unit: Unit of the measured and expected values, or None.
    """

    code: str
    description: str
    unit: str | None = None


READ_WARNINGS = (
    Code("orientation-unstated", "a NIfTI header that states no orientation; left and right may be exchanged"),
    Code("no-rescale", "DICOM slices that do not state how stored values become HU", "slices"),
    Code("gantry-tilt", "slices shifted by a gantry tilt, which was corrected", "degrees"),
    Code("missing-slice", "missing slices, which were interpolated", "mm"),
    Code("uneven-slices", "slices at uneven distances, which were interpolated", "mm"),
)

ERRORS = (
    Code("not-found", "no such file or folder"),
    Code("unreadable", "an empty, damaged or truncated file, or neither NIfTI nor DICOM"),
    Code("too-large", "more voxels, files or bytes than any head CT has", "voxels, files or bytes"),
    Code("not-scalar", "voxels that are colours or complex numbers"),
    Code("not-finite", "voxels that are NaN or infinite", "voxels"),
    Code("not-3d", "a single slice or a line", "voxels"),
    Code("time-axis", "several volumes in one file", "voxels"),
    Code("affine", "an affine that does not place voxels in space"),
    Code("sheared", "voxel axes sheared by more than 1 degree", "degrees"),
    Code("oblique", "voxel axes rotated by more than 40 degrees", "degrees"),
    Code("spacing", "voxels outside 0.1 to 15 mm, or an extent outside 40 to 1000 mm", "mm"),
    Code("too-few-slices", "fewer than 8 slices, or DICOM series of single slices", "slices"),
    Code("empty", "one value everywhere"),
    Code("windowed", "a whole head clipped so that bone, or everything less dense than brain, is lost", "HU"),
    Code("eight-bit", "an image of 0 to 255", "HU"),
    Code("not-hu", "other values that are not HU: an MR image, normalised values, a missing offset of 1024", "HU"),
    Code("no-brain", "less than 100 mL of brain, or no skull to extract the brain from", "mL"),
    Code("extractor-failed", "a brain-extractor plugin that failed on this scan"),
    Code("mask-geometry", "a brain mask whose shape or affine differs from the scan's", "voxels or mm"),
    Code("mask-values", "a brain mask with more than two values", "values"),
    Code("other-scan", "a mask of a haemorrhage whose shape or position differs from the scan's", "voxels, and mm"),
    Code("no-dicom", "a folder or .zip without DICOM files", "DICOM files"),
    Code("no-ct", "DICOM, but no axial CT of the head"),
    Code("contrast", "DICOM, but contrast medium was given"),
    Code("several-series", "several suitable series, and no rule selects one"),
    Code("mixed-positions", "different pixels at the same positions", "different slices"),
    Code(
        "uneven-slices-shape",
        "slices of one series that differ in rows, columns or pixel size",
        "rows, columns, mm, mm",
    ),
    Code("gap", "a gap of more than 25 mm between slices", "mm"),
    Code("pixel-data", "pixels that cannot be decoded"),
    Code("worker-died", "with several workers: every worker died while it had the scan"),
)
