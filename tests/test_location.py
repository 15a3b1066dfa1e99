"""Haemorrhages of known place in simple heads are found there, however the head lies in the scanner."""

import json
from functools import cache
from importlib.resources import files

import numpy as np
import pytest

from ichprog.errors import InvalidValueError, ScanError
from ichprog.location import locate

from support import phantoms

SPACING = (1.5, 1.5, 5.0)
PARENCHYMAL, VENTRICULAR, SUBARACHNOID, SUBDURAL = 1, 2, 3, 4


@cache
def head(blood=None, spacing=SPACING):
    return phantoms.head(spacing, blood=blood)


def place(blood, kind=PARENCHYMAL, spacing=SPACING):
    made = head(blood, spacing)
    return locate(made.blood * np.uint8(kind), made.brain, made.scan.hu, spacing)


@pytest.mark.parametrize(
    ("blood", "side", "location"),
    [
        ("deep", "left", "deep"),
        ("lobar", "left", "lobar"),
        ("occipital", "right", "lobar"),
        ("cerebellar", "left", "infratentorial"),
        ("temporal pole", "left", "lobar"),
        ("vertex", "left", "lobar"),
        (((-25, 0, 10), 14), "right", "deep"),
        (((-18, 66, -45), 17), "right", "infratentorial"),
        (((0, 30, -48), 8), "midline", "infratentorial"),
    ],
    ids=str,
)
def test_parenchymal_blood_is_located(blood, side, location):
    found = place(blood)
    assert (found.side, found.location) == (side, location)
    assert (found.infratentorial > 0.5) == (location == "infratentorial")
    assert sum(found.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("blood", "region"), [("deep", "basal ganglia"), ("occipital", "occipital lobe")])
def test_most_of_the_blood_is_in_its_region(blood, region):
    shares = place(blood).shares
    assert max(shares, key=shares.get) == region


@pytest.mark.parametrize(
    ("kind", "name"), [(VENTRICULAR, "ventricular"), (SUBARACHNOID, "subarachnoid"), (SUBDURAL, "subdural_epidural")]
)
def test_other_blood_has_its_kind_as_location(kind, name):
    found = place("epidural", kind)
    assert (found.side, found.location) == ("left", name)


def test_blood_on_both_sides_is_told_apart_from_blood_in_the_midline():
    made = head()
    left, right = (place(((x, 0, 20), 14)) for x in (40, -40))
    assert (left.side, right.side) == ("left", "right")
    mask = head(((40, 0, 20), 14)).blood | head(((-40, 0, 20), 14)).blood
    assert locate(mask.astype(np.uint8), made.brain, made.scan.hu, SPACING).side == "both"
    assert place(((0, 0, 20), 10)).side == "midline"


def test_blood_that_enters_the_ventricles_does_not_change_side_and_location():
    made, other = head("cerebellar"), head(((-12, -5, 15), 15))
    mask = made.blood * np.uint8(PARENCHYMAL)
    mask[other.blood] = VENTRICULAR
    found = locate(mask, made.brain, made.scan.hu, SPACING)
    assert (found.side, found.location) == ("left", "infratentorial")
    alone = np.where(mask == VENTRICULAR, mask, 0).astype(np.uint8)
    assert locate(alone, made.brain, made.scan.hu, SPACING).location == "ventricular"


def test_less_blood_of_another_kind_does_not_change_side_and_location():
    made, other = head(((40, 0, 20), 14)), head(((-40, 0, 20), 12))
    mask = made.blood * np.uint8(PARENCHYMAL)
    mask[other.blood] = SUBDURAL
    found, alone = locate(mask, made.brain, made.scan.hu, SPACING), place(((40, 0, 20), 14))
    assert (found.side, found.location) == (alone.side, alone.location) == ("left", alone.location)
    assert np.count_nonzero(other.blood) > 0.4 * np.count_nonzero(made.blood)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 2.0), (1.5, 1.5, 7.0), (3.0, 3.0, 3.0)], ids=str)
def test_the_location_does_not_depend_on_the_voxel_spacing(spacing):
    for blood in ("deep", "cerebellar", "occipital"):
        found, expected = place(blood, spacing=spacing), place(blood)
        assert (found.side, found.location) == (expected.side, expected.location)
        assert found.shares == pytest.approx(expected.shares, abs=0.15)


def turned(array, degrees, axes, shift):
    """Rotate a head about its middle and move it in the scanner, in voxels of 3 mm."""
    from scipy import ndimage

    rotated = ndimage.rotate(array.astype(np.float32), degrees, axes, reshape=False, order=1)
    return ndimage.shift(rotated, shift, order=1) > 0.5


@pytest.mark.parametrize(
    ("degrees", "axes", "shift"),
    [(12, (0, 1), (6, 0, 0)), (-12, (0, 1), (-6, 3, 0)), (20, (1, 2), (0, 0, 2)), (-20, (1, 2), (0, 4, 0)),
     (8, (0, 2), (5, 0, 0))],
    ids=str,
)  # fmt: skip
def test_a_head_that_is_turned_and_off_centre_has_its_own_midsagittal_plane(degrees, axes, shift):
    spacing = (3.0, 3.0, 3.0)
    for x, side in ((8, "left"), (-8, "right")):  # nearer to the midline than the head is from the middle
        made = head(((x, -30, 30), 5), spacing)
        brain, blood = (turned(mask, degrees, axes, shift) for mask in (made.brain, made.blood))
        found = locate(blood.astype(np.uint8), brain, np.zeros(brain.shape, np.float32), spacing)
        assert (found.side, found.location) == (side, "lobar")
        made = head("cerebellar", spacing)
        brain, blood = (turned(mask, degrees, axes, shift) for mask in (made.brain, made.blood))
        assert locate(blood.astype(np.uint8), brain, np.zeros(brain.shape, np.float32), spacing).infratentorial > 0.9


def test_a_brain_without_its_top_or_base_is_still_located():
    made = head("deep")
    for part in (slice(5, None), slice(0, -5)):
        occupied = np.flatnonzero(made.brain.any((0, 1)))
        slices = slice(occupied[0], occupied[-1] + 1)
        arrays = [a[:, :, slices][:, :, part] for a in (made.blood.astype(np.uint8), made.brain, made.scan.hu)]
        found = locate(*arrays, SPACING)
        assert (found.side, found.location) == ("left", "deep")


def test_a_head_without_blood_has_no_location():
    made = head()
    found = locate(np.zeros(made.brain.shape, np.uint8), made.brain, made.scan.hu, SPACING)
    assert (found.side, found.location, found.infratentorial) == (None, None, 0.0)
    assert not any(found.shares.values())


def test_the_result_is_plain_data_and_cannot_be_changed():
    found = place("deep")
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored["side"] == "left"
    assert stored["shares"] == dict(found.shares)
    with pytest.raises(AttributeError):
        found.side = "right"
    with pytest.raises(TypeError):
        found.shares["thalamus"] = 1.0


def moved_ventricles(i_mm):
    """Move the middle of a brain to the left, but not the skull."""
    made = head()
    hu = made.scan.hu.copy()
    low = made.scan.affine[:3, 3] * (-1, -1, 1)
    x, y, z = (lo + mm * np.arange(n) for lo, mm, n in zip(low, SPACING, hu.shape, strict=True))
    box = np.ix_(np.abs(x) < 45, np.abs(y - 5) < 45, np.abs(z - 10) < 20)
    hu[box] = np.roll(hu[box], round(i_mm / SPACING[0]), axis=0)
    return hu


@pytest.mark.parametrize("shift_mm", [0.0, 4.5, 9.0, -9.0])
def test_a_shift_of_the_ventricles_is_measured(shift_mm):
    made = head()
    found = locate(np.zeros(made.brain.shape, np.uint8), made.brain, moved_ventricles(shift_mm), SPACING)
    assert found.midline_shift_mm == pytest.approx(abs(shift_mm), abs=max(1.0, 0.2 * abs(shift_mm)))
    low, high = found.midline_shift_interval_mm
    assert 0 <= low <= found.midline_shift_mm <= high
    assert found.midline_shift_reason is None


def test_blood_in_the_ventricles_does_not_hide_the_shift():
    made, hu = head(), moved_ventricles(9.0)
    mask = ((hu < 20) & made.brain).astype(np.uint8) * np.uint8(VENTRICULAR)
    clotted = np.where(mask > 0, 65, hu)
    found = locate(mask, made.brain, clotted.astype(np.float32), SPACING)
    assert found.midline_shift_mm == pytest.approx(9.0, abs=1.5)


def test_a_shift_that_cannot_be_measured_has_a_reason():
    made = head()
    mask = np.zeros(made.brain.shape, np.uint8)
    dense = np.full(made.brain.shape, 34, np.float32)
    found = locate(mask, made.brain, dense, SPACING)
    assert (found.midline_shift_mm, found.midline_shift_interval_mm) == (None, None)
    assert "0.0 mL of fluid" in found.midline_shift_reason
    top = np.flatnonzero(made.brain.any((0, 1)))[-1] - 9
    upper = [a[:, :, top:] for a in (mask, made.brain, made.scan.hu)]
    assert locate(*upper, SPACING).midline_shift_mm is None


def test_the_same_head_gives_the_same_location():
    assert place("lobar") == place("lobar")


def test_wrong_input_is_refused():
    made = head("deep")
    mask = made.blood.astype(np.uint8)
    with pytest.raises(InvalidValueError, match=r"Invalid brain 'of shape \(1, 1, 1\)'"):
        locate(mask, np.ones((1, 1, 1), bool), made.scan.hu, SPACING)
    with pytest.raises(InvalidValueError, match="Invalid hu"):
        locate(mask, made.brain, made.scan.hu[:, :, 1:], SPACING)
    with pytest.raises(InvalidValueError, match="values from 0 to 5"):
        locate(mask * np.uint8(5), made.brain, made.scan.hu, SPACING)
    with pytest.raises(InvalidValueError, match="float32"):
        locate(mask.astype(np.float32) / 2, made.brain, made.scan.hu, SPACING)
    with pytest.raises(InvalidValueError, match="spacing_mm"):
        locate(mask, made.brain, made.scan.hu, (1.0, 0.0, 1.0))
    with pytest.raises(InvalidValueError, match="three axes"):
        locate(mask[0], made.brain[0], made.scan.hu[0], SPACING)
    with pytest.raises(ScanError, match="brain mask is empty") as error:
        locate(mask, np.zeros_like(made.brain), made.scan.hu, SPACING)
    assert error.value.code == "no-brain"


def test_the_atlas_is_small_and_carries_its_licence():
    folder = files("ichprog.location")
    atlas = folder / "atlas.npz"
    assert atlas.stat().st_size < 100_000
    with atlas.open("rb") as file, np.load(file) as stored:
        assert "BLAST-CT" in str(stored["source"])
        assert str(stored["licence"]) == (folder / "LICENSE.blast-ct").read_text(encoding="utf-8")
        assert "Apache License" in str(stored["licence"])
