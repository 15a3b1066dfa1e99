from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ichprog.errors import ScanError, UnknownNameError
from ichprog.scan import morphology, read
from ichprog.scan.brain import has_skull, isolate_brain, run_extractor
from ichprog.scan.morphology import resample

from support import phantoms

DATA = Path(__file__).parents[3] / "shared" / "data"
KINDS = [*phantoms.BLOOD, "subdural"]


@cache
def plain():
    return phantoms.head(blood="lobar")


@cache
def plain_mask():
    return run_extractor(plain().scan)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def kept(made, mask, what):
    """Share of the voxels of `what` that stay, of those a network can see: under 100 HU."""
    seen = what & (made.scan.hu < 100)
    return (mask & seen).sum() / seen.sum()


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is absent")
    return read(path)


@pytest.mark.parametrize(
    ("spacing", "least"), [((1.0, 1.0, 2.0), 0.99), ((1.5, 1.5, 5.0), 0.97), ((1.0, 1.0, 7.0), 0.95)], ids=str
)
def test_the_known_brain_is_found_at_any_slice_spacing(spacing, least):
    made = phantoms.head(spacing)
    mask = run_extractor(made.scan)
    assert mask.shape == made.scan.hu.shape
    assert mask.dtype == bool
    assert dice(mask, made.brain) > least  # what is missing is mixed with bone and denser than 140 HU
    assert kept(made, mask, made.brain) > 0.995
    bone = made.scan.hu > 300
    assert not (mask & bone & ~made.brain).any()


@pytest.mark.parametrize(
    ("spacing", "hu", "noise"), [((1.5, 1.5, 5.0), 57, 4), ((1.2, 1.2, 7.0), 80, 8), ((1.5, 1.5, 3.0), 92, 12)], ids=str
)
def test_no_blood_is_lost_wherever_it_lies(spacing, hu, noise):
    made = phantoms.head(spacing, blood=KINDS, blood_hu=hu, noise=noise)
    assert kept(made, run_extractor(made.scan), made.blood) == 1


@pytest.mark.parametrize(
    "defect", [((70, 0, 15), 55), ((50, -50, 40), 9), ((0, -80, 20), 45)], ids=["side", "burr", "front"]
)
def test_a_skull_defect_loses_no_brain_and_excludes_the_skin(defect):
    made = phantoms.head(blood="epidural", defect=defect)
    mask = run_extractor(made.scan)
    assert dice(mask, made.brain) > 0.94
    assert kept(made, mask, made.brain) > 0.995
    assert kept(made, mask, made.blood) == 1


def test_fluid_and_calcification_inside_the_brain_remain():
    made, mask = plain(), plain_mask()
    deep = np.zeros_like(mask)
    i, j, k = made.scan.hu.shape
    deep[i // 3 : 2 * i // 3, j // 3 : 2 * j // 3, k // 2 : 2 * k // 3] = True
    assert (made.scan.hu[deep] > 150).any()
    assert mask[deep].all()


@pytest.mark.parametrize(
    "cut",
    [
        {"low": (-95, -120, -220)},
        {"low": (-95, -120, -20)},
        {"high": (95, 115, 40)},
        {"low": (-72, -88, -110), "high": (72, 86, 92)},
        {"holder": False},
    ],
    ids=["long neck", "no base", "no top", "tight", "no holder"],
)
def test_a_longer_or_shorter_scan_is_extracted(cut):
    made = phantoms.head(**cut)
    mask = run_extractor(made.scan)
    assert dice(mask, made.brain) > 0.97
    assert kept(made, mask, made.brain) > 0.995


def test_padding_of_a_regridded_scan_changes_nothing():
    made = plain()
    padded = made.scan.hu.copy()
    corner = np.add.outer(np.arange(padded.shape[1]), 2 * np.arange(padded.shape[2])) < 40
    padded[:, corner] = -1024
    again = run_extractor(phantoms.scan_of(padded, made.scan.affine))
    assert dice(again, plain_mask()) > 0.999


def test_a_skull_is_seen_in_heads_and_not_in_brains():
    made = plain()
    assert has_skull(made.scan)
    alone = phantoms.brain_only(made)
    alone.hu[20:24, 30:34, 5:7] = 3000  # a clip and crumbs
    alone.hu[60:75, 20:22, 20:23] = 700
    assert not has_skull(alone)


def test_auto_extracts_if_a_skull_is_visible():
    made = plain()
    scan, mask, record = isolate_brain(made.scan, "auto")
    assert record["brain"] == "extracted"
    assert record["brain_ml"] == pytest.approx(mask.sum() * np.prod(made.scan.spacing) / 1000, abs=0.1)
    assert not scan.hu[~mask].any()
    np.testing.assert_array_equal(scan.hu[mask], made.scan.hu[mask])
    assert scan.hu.dtype == np.float32


@pytest.mark.parametrize("empty", [0, -1024, -3])
@pytest.mark.parametrize("mode", ["auto", "given"])
def test_a_given_brain_is_unchanged(mode, empty):
    made = plain()
    alone = phantoms.brain_only(made)
    alone.hu[~made.brain] = empty
    scan, mask, record = isolate_brain(alone, mode)
    assert scan is alone
    assert record["brain"] == "given"
    assert dice(mask, made.brain) > 0.99


def test_errors_name_the_remedy():
    alone = phantoms.brain_only(plain())
    with pytest.raises(UnknownNameError, match="given"):
        isolate_brain(alone, "givn")
    with pytest.raises(ScanError, match="brain='given'") as e:
        run_extractor(alone)
    assert e.value.code == "no-brain"


def test_a_skull_without_a_brain_is_an_error():
    made = plain()
    hollow = np.where(made.brain, -1000, made.scan.hu)
    with pytest.raises(ScanError) as e:
        run_extractor(phantoms.scan_of(hollow, made.scan.affine))
    assert e.value.code == "no-brain"


@pytest.mark.parametrize("shape", [(4, 6, 5), (8, 12, 3), (3, 20, 9)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_resampling_keeps_constants_and_slopes(shape, order):
    assert resample(np.full((6, 9, 7), 3.0, order=order), shape) == pytest.approx(3)
    for n, m in ((24, 12), (12, 24)):
        known, wanted = ((np.arange(cells) + 0.5) / cells for cells in (n, m))
        for axis in range(3):
            sides, final = [6, 5, 4], [3, 7, 8]
            sides[axis], final[axis] = n, m
            along = np.asarray(np.moveaxis(np.broadcast_to(known, (*np.delete(sides, axis), n)), -1, axis), order=order)
            slope = np.moveaxis(resample(along, final), axis, -1)[..., 1:-1]
            np.testing.assert_allclose(slope, np.broadcast_to(wanted[1:-1], slope.shape), atol=1e-6)


def masks():
    """Masks of any density, with holes and pieces, in both orders of memory and as parts of larger ones."""
    shapes = st.tuples(*[st.integers(2, 9)] * 3)
    return st.builds(random_mask, shapes, st.integers(0, 999), st.floats(0, 1), st.sampled_from("CF"), st.booleans())


def random_mask(shape, seed, density, order, part):
    mask = np.asarray(np.random.default_rng(seed).random(shape) < density, order=order)
    return mask[1:] if part else mask


@given(masks(), masks())
@settings(max_examples=200, deadline=None)
def test_components_and_holes_equal_those_of_scipy(mask, among):
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    np.testing.assert_array_equal(morphology.filter_components(mask, lambda sizes: sizes >= 3), (sizes >= 3)[labels])
    piece = morphology.largest_component(mask)
    assert piece.sum() == sizes.max()
    assert (labels[piece] == labels[piece][:1]).all()
    np.testing.assert_array_equal(morphology.fill_holes(mask), ndimage.binary_fill_holes(mask))
    if among.shape == mask.shape:
        touched = np.unique(labels[among & mask])
        kept = morphology.filter_components(mask, lambda sizes: sizes > 0, count_in=among)
        np.testing.assert_array_equal(kept, np.isin(labels, touched) & mask)
        counts = np.bincount(labels[among & mask], minlength=1)
        assert (morphology.largest_component(mask, count_in=among) & among).sum() == counts.max()


@given(masks(), st.tuples(*[st.sampled_from([0.5, 1.9973, 2.0, 5.0])] * 3), st.sampled_from([2.0, 2.5, 6.0, 9.7]))
@settings(max_examples=200, deadline=None)
def test_distances_equal_those_of_scipy(mask, spacing, most):
    far = ndimage.distance_transform_edt(~mask, sampling=spacing) if mask.any() else np.full(mask.shape, np.inf)
    np.testing.assert_array_equal(morphology.dilate_mm(mask, most, spacing), far <= most)
    found = morphology.distance_mm(mask, spacing, most)
    np.testing.assert_allclose(found[far <= most], far[far <= most], rtol=1e-6)
    assert (found[far > most] > most - 1e-5).all()


def test_a_real_head_is_extracted():
    scan = real("head_ct_ge_dicom.zip")
    mask = run_extractor(scan)
    ml = mask.sum() * np.prod(scan.spacing) / 1000
    assert 1350 < ml < 1550
    assert np.median(scan.hu[mask]) == pytest.approx(33, abs=5)
    assert (scan.hu[mask] > 140).mean() < 0.003
    assert (scan.hu[mask] < -30).mean() < 0.003


def test_a_real_brain_has_no_skull():
    scan = real("brain_ct_average_1mm.nii.gz")
    assert not has_skull(scan)
    _, _, record = isolate_brain(scan, "auto")
    assert record["brain"] == "given"
    assert 1250 < record["brain_ml"] < 1400
