"""Brain masks and brain extractors in place of the built-in extraction."""

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import InvalidValueError, PluginError, ScanError, UnknownNameError, registry, scan
from ichprog.model import resolve_brain
from ichprog.scan import BrainExtractor, brain_key

from support import phantoms


@pytest.fixture(scope="module")
def head():
    return phantoms.head(blood="deep")


@pytest.fixture(scope="module")
def image(head):
    return nib.Nifti1Image(head.scan.hu, head.scan.affine)


@pytest.fixture(scope="module")
def mask(head):
    return nib.Nifti1Image(head.brain.astype(np.uint8), head.scan.affine)


def load(image, brain):
    return scan.load(image, expected_ranges={}, brain=brain)


@pytest.mark.parametrize("kind", ["image", "path", "compressed path", "array"])
def test_a_mask_replaces_the_extraction(head, image, mask, tmp_path, kind):
    if "path" in kind:
        given = tmp_path / ("mask.nii.gz" if "compressed" in kind else "mask.nii")
        mask.to_filename(given)
    else:
        given = mask if kind == "image" else head.brain
    loaded = load(image, given)
    np.testing.assert_array_equal(loaded.brain, head.brain)
    np.testing.assert_array_equal(loaded.hu, np.where(head.brain, head.scan.hu, 0))
    assert loaded.record["brain"] == "mask"


def test_a_mask_in_another_voxel_order_is_reordered(head, image, mask):
    to_ras = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(mask.affine), nib.orientations.axcodes2ornt("SRA")
    )
    np.testing.assert_array_equal(load(image, mask.as_reoriented(to_ras)).brain, head.brain)


def test_an_array_has_the_voxel_order_of_the_source(head, image):
    order = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt("RAS")
    )
    source = image.as_reoriented(order)
    given = nib.orientations.apply_orientation(head.brain, order)
    np.testing.assert_array_equal(load(source, given).brain, head.brain)


@pytest.mark.parametrize(
    ("change", "code", "unit", "measured"),
    [
        (lambda mask: mask.slicer[:, :, 1:], "mask-geometry", "voxels", [127, 157, 39]),
        (lambda mask: nib.Nifti1Image(mask.dataobj, np.diag([-1.5, -1.5, 5, 1])), "mask-geometry", "mm", None),
        (lambda mask: nib.Nifti1Image(np.arange(np.prod(mask.shape)).reshape(mask.shape) % 3 * 1.0, mask.affine),
         "mask-values", "values", 3),
        (lambda mask: np.ones((3, 4, 5), bool), "mask-geometry", "voxels", [3, 4, 5]),
    ],
    ids=["shape", "affine", "labels", "array"],
)  # fmt: skip
def test_a_mask_that_does_not_fit_is_refused_in_units(image, mask, change, code, unit, measured):
    with pytest.raises(ScanError) as caught:
        load(image, change(mask))
    assert (caught.value.code, caught.value.unit) == (code, unit)
    if measured is not None:
        assert caught.value.measured == measured


def test_an_empty_mask_is_no_brain(head, image):
    with pytest.raises(ScanError) as caught:
        load(image, np.zeros_like(head.brain))
    assert caught.value.code == "no-brain"


def test_an_extractor_gets_hu_in_lps_order_with_spacing_in_mm(head, image):
    received = {}

    def extract(hu, spacing_mm, *, lowres):
        received.update(hu=hu, spacing=spacing_mm, lowres=lowres)
        return head.brain

    order = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt("SAR")
    )
    loaded = load(image.as_reoriented(order), BrainExtractor("known", extract, "test 1.0"))
    np.testing.assert_array_equal(received["hu"], head.scan.hu)
    assert received["spacing"] == pytest.approx((1.5, 1.5, 5.0))
    assert received["lowres"].ndim == 3
    np.testing.assert_array_equal(loaded.brain, head.brain)
    assert loaded.record["brain_extractor"] == "known (test 1.0)"


def test_a_failing_extractor_is_an_error_of_its_scan(image):
    with pytest.raises(ScanError, match="'broken' failed: ZeroDivisionError") as caught:
        load(image, BrainExtractor("broken", lambda hu, spacing_mm: 1 / 0, "test"))
    assert caught.value.code == "extractor-failed"


def test_an_extractor_with_a_wrong_result_breaks_its_contract(image):
    with pytest.raises(PluginError, match="Expected a bool array"):
        load(image, BrainExtractor("wrong", lambda hu, spacing_mm: hu, "test"))


def test_the_built_in_extractor_is_a_plugin_like_any_other(image):
    by_name, default = load(image, resolve_brain("morphology")), load(image, "extract")
    np.testing.assert_array_equal(by_name.brain, default.brain)
    assert registry.brain_extractors.entry("morphology").distribution == "ichprog"


def test_a_registered_extractor_is_used_by_name(head, bright_model, image):
    ichprog.register_brain_extractor("known", lambda hu, spacing_mm: head.brain)
    try:
        by_name = ichprog.predict(bright_model, image, brain="known")
    finally:
        registry.brain_extractors.unregister("known")
    by_mask = ichprog.predict(bright_model, image, brain=head.brain)
    assert by_name["prognosis"].probabilities == by_mask["prognosis"].probabilities
    assert by_name.provenance["scan"]["brain_extractor"] == "known (this session)"


@pytest.mark.parametrize(
    ("brain", "error", "message"),
    [
        ("morfology", UnknownNameError, "Unknown brain mode or extractor 'morfology'. Did you mean morphology"),
        ("lost.nii.gz", InvalidValueError, "Expected an existing file"),
        (3, InvalidValueError, "Invalid type of brain 'int'"),
    ],
    ids=["name", "path", "type"],
)
def test_an_unusable_brain_option_is_refused_before_a_scan_is_read(brain, error, message):
    with pytest.raises(error, match=message):
        resolve_brain(brain)


def test_the_key_of_a_mask_follows_its_content(mask, tmp_path):
    mask.to_filename(tmp_path / "one.nii")
    mask.to_filename(tmp_path / "same.nii")
    nib.Nifti1Image(1 - np.asarray(mask.dataobj), mask.affine).to_filename(tmp_path / "other.nii")
    one, same, other = (brain_key(tmp_path / f"{name}.nii") for name in ("one", "same", "other"))
    assert one == same != other
    assert brain_key("auto") == "auto"
