"""Simulated head CTs: ellipsoids for skull, brain, ventricles, face and neck, with a known mask of brain and blood.

Coordinates are in mm from the centre of the brain: x to the left, y to posterior, z to superior.
"""

from dataclasses import dataclass

import numpy as np

from ichprog.scan.volume import Scan

AIR, FAT, FLUID, BRAIN, MUSCLE, BONE = -1000.0, -95.0, 8.0, 34.0, 55.0, 1000.0
LOW, HIGH = np.array([-95.0, -120.0, -110.0]), np.array([95.0, 115.0, 92.0])  # corners of the scanned volume
CAVITY = (  # centre and half axes of the ellipsoids that form the inside of the skull
    ((0, 0, 0), (68, 85, 66)),
    ((0, 38, -28), (54, 42, 40)),
    ((36, -22, -34), (26, 34, 20)),
    ((-36, -22, -34), (26, 34, 20)),
)
ORBIT_ROOF_Z = -30.0  # lower end of the first ellipsoid
BLOOD = {  # centre and radius of haemorrhages, spheres clipped at the bone
    "deep": ((25, 0, 10), 14),
    "lobar": ((50, 45, 20), 20),
    "epidural": ((66, -5, 20), 24),
    "occipital": ((-20, 80, 5), 20),
    "cerebellar": ((18, 66, -45), 17),
    "temporal pole": ((40, -46, -36), 14),
    "vertex": ((15, 5, 62), 16),
}


@dataclass(frozen=True)
class Head:
    """A scan, and its true masks of brain and blood, all `(i, j, k)`."""

    scan: Scan
    brain: np.ndarray
    blood: np.ndarray


def head(
    spacing=(1.5, 1.5, 5.0), *, blood=None, blood_hu=65.0, defect=None, holder=True, noise=4.0, low=LOW, high=HIGH
) -> Head:
    """Return a simulated whole head.

    Args:
        spacing: Voxel spacing along i, j and k, in mm.
        blood: A name in `BLOOD`, "subdural", a centre and a radius in mm, a list of these, or None.
        blood_hu: Density of the blood, in HU.
        defect: Centre and radius in mm of a sphere without skull, or None.
        holder: Whether the head lies in a head holder.
        noise: Standard deviation of the noise, in HU.
        low: Lower corner (x, y, z) of the scanned volume, in mm.
        high: Upper corner (x, y, z) of the scanned volume, in mm.
    """
    low, high = np.asarray(low, float), np.asarray(high, float)
    shape = np.round((high - low) / spacing).astype(int)
    thin = max(1, round(spacing[2] / 2.5))  # thin slices per slice, which is their mean
    counts = shape * (1, 1, thin)
    x, y, z = np.ogrid[tuple(slice(0, n) for n in counts)]
    x, y, z = (lo + (c + 0.5) * mm for c, lo, mm in zip((x, y, z), low, np.array(spacing) / (1, 1, thin), strict=True))

    def ellipsoid(centre, half, grow=0.0):
        return sum(((c - m) / (h + grow)) ** 2 for c, m, h in zip((x, y, z), centre, half, strict=True))

    def cavity(grow):
        largest, *rest = (ellipsoid(*piece, grow) <= 1 for piece in CAVITY)
        return np.logical_or.reduce([largest & (z > ORBIT_ROOF_Z - grow), *rest])

    inside = cavity(0.0)
    around = np.hypot(x, y - 40)
    hu = np.full(counts, AIR, np.float32)
    hu[(ellipsoid((0, -15, -70), (68, 85, 75)) <= 1) & (z < -20)] = FAT  # face
    hu[(np.hypot(x / 62, (y - 15) / 70) <= 1) & (z < -50)] = FAT  # neck
    hu[(np.hypot(x / 58, (y - 15) / 66) <= 1) & (z < -55)] = MUSCLE
    hu[cavity(13.0)] = FAT
    hu[cavity(10.0)] = MUSCLE
    hu[cavity(7.0)] = BONE
    for side in (-1, 1):  # orbits, open to the front
        hu[(ellipsoid((32 * side, -70, -50), (22, 40, 18)) <= 1) & ~inside & (z < ORBIT_ROOF_Z - 4)] = FAT
        hu[ellipsoid((32 * side, -82, -50), (12, 12, 12)) <= 1] = FLUID
    hu[(ellipsoid((0, -78, -55), (12, 28, 20)) <= 1) & (z < ORBIT_ROOF_Z - 4)] = AIR  # nose
    spine = (z < -62) & (around <= 24) & ~inside
    hu[spine] = BONE
    hu[(z < -55) & (around <= 13) & ~inside] = FLUID  # foramen magnum and canal
    hu[(z < -55) & (around <= 6) & ~inside] = BRAIN
    hu[inside] = BRAIN
    hu[cavity(0.0) & ~cavity(-2.5)] = FLUID
    for side in (-1, 1):
        hu[ellipsoid((14 * side, 5, 10), (9, 32, 13)) <= 1] = FLUID
        hu[ellipsoid((18 * side, 28, 8), (3, 3, 3)) <= 1] = 250.0  # plexus calcification
    if defect is not None:
        centre, radius = defect
        hu[(ellipsoid(centre, (radius,) * 3) <= 1) & cavity(7.0) & ~inside] = MUSCLE
    if holder:
        arc = ellipsoid((0, 0, 0), (88, 108, 1e9))
        hu[(arc > 1) & (arc < 1.05) & (y > 30) & (hu == AIR)] = 300.0

    is_blood = np.zeros(counts, bool)
    for piece in blood if isinstance(blood, list) else [blood] * (blood is not None):
        if piece == "subdural":
            is_blood |= inside & (ellipsoid(*CAVITY[0], -8.0) > 1) & (x > 0) & (z > -20) & (np.abs(y) < 70)
        else:
            centre, radius = BLOOD[piece] if isinstance(piece, str) else piece
            is_blood |= inside & (ellipsoid(centre, (radius,) * 3) <= 1)
    hu[is_blood] = blood_hu

    hu, inside, is_blood = (a.reshape(*shape, thin).mean(-1) for a in (hu, inside, is_blood))
    hu = np.round(hu + np.random.default_rng(0).normal(0, noise, shape))
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (low + np.array(spacing) / 2) * (-1, -1, 1)
    return Head(scan_of(np.maximum(hu, -1024), affine), inside > 0.5, is_blood > 0.5)


def scan_of(hu, affine=None, **record) -> Scan:
    """Return an array in LPS order as a `Scan`.

    Args:
        hu: `(i, j, k)` HU.
        affine: Affine from voxels to RAS mm. By default voxels of 1 mm.
        record: Further entries of the scan's record.
    """
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine
    hu = np.asarray(hu, np.float32)
    return Scan(hu, affine, "head", hu.shape, affine, {"obliquity_deg": 0.0, **record})


def brain_only(whole: Head) -> Scan:
    """Return the scan of a head with 0 HU outside the brain."""
    return scan_of(np.where(whole.brain, whole.scan.hu, 0), whole.scan.affine)


def brain_hu(shape=(512, 512, 30), lesion=(330, 220, 16), seed=0):
    """Return a simulated brain in LPS order: an ellipsoid with ventricles and about 30 mL of blood, 0 HU outside.

    Args:
        shape: Shape `(i, j, k)`.
        lesion: Centre of the blood, in voxels of a scan of 512 x 512 x 30.
        seed: Random seed of the noise.
    """
    rng = np.random.default_rng(seed)
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    centre_of_scan = np.array(shape) / 2
    half = np.array([0.29, 0.35, 0.47]) * shape

    def is_inside(centre, radii):
        return sum(((x - c) / r) ** 2 for x, c, r in zip((i, j, k), centre, radii, strict=True)) <= 1

    brain = is_inside(centre_of_scan, half)
    hu = np.where(brain, 33 + 4 * rng.standard_normal(shape), 0)
    hu[is_inside(centre_of_scan + np.array([0, 20, 1]), (25, 60, 4)) & brain] = 8
    scale = np.array(shape) / (512, 512, 30)
    hu[is_inside(np.array(lesion) * scale, (40 * scale[0], 40 * scale[1], 4 * scale[2]))] = 68
    return hu.round().astype(np.int16)
