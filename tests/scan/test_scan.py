"""Scans from files and images: orientation, refusals, folders."""

import gzip
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import InvalidValueError, ScanError, UnknownNameError, scan

from support import phantoms
from support.phantoms import brain_hu

AFFINE = np.diag([-2.5, -2.5, 5.0, 1.0])


def turned(degrees, axis=0):
    """The affine turned about one axis."""
    angle = np.radians(degrees)
    a, b = [n for n in range(3) if n != axis]
    rotation = np.eye(4)
    rotation[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return rotation @ AFFINE


@pytest.fixture(scope="module")
def hu():
    return brain_hu((90, 96, 30))


def test_hu_come_in_lps_order_with_a_true_affine(hu):
    image = nib.Nifti1Image(hu, AFFINE)
    for codes in ("LPS", "RAS", "SPR", "AIL"):
        order = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
        read = scan.read(image.as_reoriented(order))
        assert np.array_equal(read.hu, hu.astype(np.float32))
        assert np.allclose(read.affine, AFFINE)
        assert read.record["voxel_order"] == codes
        back = read.image(read.hu)
        assert np.array_equal(np.asarray(back.dataobj), np.asarray(image.as_reoriented(order).dataobj))


def test_scaled_integers_are_read_as_hu(hu, tmp_path):
    path = tmp_path / "scaled.nii"
    nib.Nifti1Image((hu.astype(int) + 1024).astype(np.uint16), AFFINE).to_filename(path)
    body = bytearray(path.read_bytes())
    body[112:120] = np.array([1, -1024], "<f4").tobytes()  # scl_slope and scl_inter
    path.write_bytes(body)
    assert np.array_equal(scan.read(path).hu, hu)


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i2", "u1", "i4", "f4", "f8"])
def test_a_compressed_file_holds_what_the_image_does(hu, tmp_path, dtype, endianness):
    header = nib.Nifti1Header(endianness=endianness)
    header.set_data_dtype(np.dtype(dtype))
    nib.Nifti1Image(hu.clip(0).astype(dtype), AFFINE, header).to_filename(tmp_path / "scan.nii.gz")
    stored = nib.load(tmp_path / "scan.nii.gz")
    assert stored.get_data_dtype() == np.dtype(endianness + dtype)
    read = scan.read(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read.hu, stored.get_fdata())
    assert read.hu.dtype == np.float32


def test_a_compressed_file_of_scaled_integers_is_read_as_hu(hu, tmp_path):
    image = nib.Nifti1Image((hu.astype(int) + 1024) * 2, AFFINE, dtype=np.int32)
    body = bytearray(image.to_bytes())
    body[112:120] = np.array([0.5, -1024], "<f4").tobytes()  # scl_slope and scl_inter
    (tmp_path / "scaled.nii.gz").write_bytes(gzip.compress(body))
    np.testing.assert_array_equal(scan.read(tmp_path / "scaled.nii.gz").hu, hu)


def test_a_single_volume_of_four_axes_is_a_scan(hu):
    read = scan.read(nib.Nifti1Image(hu[..., None], AFFINE))
    assert read.hu.shape == hu.shape
    assert read.image(read.hu).shape == (*hu.shape, 1)


@pytest.mark.parametrize(
    ("values", "affine", "code"),
    [
        (lambda hu: hu[:, :, 0], AFFINE, "not-3d"),
        (lambda hu: hu[:, :, :1], AFFINE, "not-3d"),
        (lambda hu: np.stack([hu, hu], -1), AFFINE, "time-axis"),
        (lambda hu: np.where(hu == 68, np.inf, hu).astype(np.float32), AFFINE, "not-finite"),
        (lambda hu: hu.astype(np.complex64), AFFINE, "not-scalar"),
        (lambda hu: hu, np.zeros((4, 4)), "affine"),
        (lambda hu: hu, turned(43), "oblique"),
        (lambda hu: hu, AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "sheared"),
    ],
)
def test_an_image_without_a_volume_in_space_is_refused(hu, values, affine, code):
    image = nib.Nifti1Image(values(hu), None)
    image._affine = affine
    with pytest.raises(ScanError) as caught:
        scan.read(image)
    assert caught.value.code == code
    if code in ("oblique", "sheared"):
        assert caught.value.unit == "degrees"
        assert "degrees" in str(caught.value)
    if code == "oblique":
        assert caught.value.measured == pytest.approx(43, abs=0.2)


def test_an_oblique_scan_is_read_unchanged_and_reported_in_degrees(hu):
    straight = scan.load(nib.Nifti1Image(hu, AFFINE), expected_ranges={})
    slight = scan.load(nib.Nifti1Image(hu, turned(12)), expected_ranges={})
    much = scan.load(nib.Nifti1Image(hu, turned(30)), expected_ranges={})
    assert np.array_equal(slight.hu, straight.hu)
    assert slight.record["obliquity_deg"] == pytest.approx(12, abs=0.1)
    assert "obliquity" not in {w.code for w in slight.warnings}
    (doubt,) = [w for w in much.warnings if w.code == "obliquity"]
    assert doubt.unit == "degrees"
    assert doubt.measured == pytest.approx(30, abs=0.1)


def test_an_unstated_orientation_gives_a_warning(hu, tmp_path):
    image = nib.Nifti1Image(hu, None)
    image.header.set_zooms((2.5, 2.5, 5))
    image.to_filename(tmp_path / "unstated.nii")
    read = scan.read(tmp_path / "unstated.nii")
    assert [w.code for w in read.warnings] == ["orientation-unstated"]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.nii.gz", b"", "unreadable"),
        ("text.nii.gz", b"dear diary", "unreadable"),
        ("text.nii", b"dear diary", "unreadable"),
        ("text.txt", b"dear diary", "unreadable"),
        ("broken.zip", b"PK\x03\x04", "unreadable"),
        (None, None, "not-found"),
    ],
)
def test_unreadable_files_have_a_code_and_their_path(tmp_path, name, content, code):
    path = tmp_path / (name or "nothing.nii")
    if name:
        path.write_bytes(content)
    with pytest.raises(ScanError) as caught:
        scan.read(path)
    assert caught.value.code == code
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [100, 400, 5000, -1000])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_truncated_files_are_unreadable(hu, tmp_path, kept, ending):
    nib.Nifti1Image(hu, AFFINE).to_filename(tmp_path / f"scan{ending}")
    body = (tmp_path / f"scan{ending}").read_bytes()
    (tmp_path / f"cut{ending}").write_bytes(body[:kept])
    with pytest.raises(ScanError) as caught:
        scan.read(tmp_path / f"cut{ending}")
    assert caught.value.code == "unreadable"


@pytest.mark.parametrize("at", [-5, -2000])
def test_a_compressed_file_with_a_wrong_checksum_is_unreadable(hu, tmp_path, at):
    nib.Nifti1Image(hu, AFFINE).to_filename(tmp_path / "scan.nii.gz")
    body = bytearray((tmp_path / "scan.nii.gz").read_bytes())
    body[at] ^= 4
    (tmp_path / "scan.nii.gz").write_bytes(body)
    with pytest.raises(ScanError) as caught:
        scan.read(tmp_path / "scan.nii.gz")
    assert caught.value.code == "unreadable"


def test_an_array_without_an_affine_is_refused():
    with pytest.raises(InvalidValueError, match="Invalid type of scan 'ndarray'"):
        scan.read(np.zeros((3, 3, 3)))


@pytest.mark.parametrize("mode", ["auto", "given"])
def test_a_deferred_load_gives_the_hu_before_the_checks(hu, mode):
    image = nib.Nifti1Image(hu, AFFINE)
    early, end = scan.load_deferred(image, expected_ranges={}, brain=mode)
    late = end()
    np.testing.assert_array_equal(early, late.hu)
    np.testing.assert_array_equal(early, scan.read(image).hu)
    whole = scan.load(image, expected_ranges={}, brain=mode)
    np.testing.assert_array_equal(late.brain, whole.brain)
    assert late.record == whole.record
    assert [w.code for w in late.warnings] == [w.code for w in whole.warnings]


def test_an_eight_bit_brain_is_refused_by_the_deferred_checks(hu):
    picture = nib.Nifti1Image(np.where(hu == 0, 0, hu * 3 + 40).clip(0, 255).astype(np.uint8), AFFINE)
    _, end = scan.load_deferred(picture, expected_ranges={}, brain="given")
    with pytest.raises(ScanError) as caught:
        end()
    assert caught.value.code == "eight-bit"


def test_an_image_without_hu_is_refused_before_extraction(hu):
    with pytest.raises(ScanError) as caught:
        scan.load_deferred(nib.Nifti1Image((hu / 100).astype(np.float32), AFFINE), expected_ranges={}, brain="extract")
    assert caught.value.code == "not-hu"


@pytest.mark.parametrize("mode", ["auto", "given", "extract"])
def test_a_scan_of_impossible_size_is_refused_at_once(hu, mode):
    with pytest.raises(ScanError) as caught:
        scan.load_deferred(nib.Nifti1Image(hu, AFFINE * 1000), expected_ranges={}, brain=mode)
    assert caught.value.code == "spacing"


def test_an_unknown_mode_is_refused_at_once(hu):
    with pytest.raises(UnknownNameError, match="given"):
        scan.load_deferred(nib.Nifti1Image(hu, AFFINE), expected_ranges={}, brain="givn")


def test_loading_a_head_needs_no_scipy(tmp_path):
    """Its import alone takes longer than the whole examination."""
    head = phantoms.head(blood="deep").scan
    nib.Nifti1Image(head.hu, head.affine).to_filename(tmp_path / "head.nii.gz")
    code = "import sys, nibabel; before = set(sys.modules)\nfrom ichprog import scan\n"
    code += "done = scan.load(sys.argv[1], expected_ranges={})\n"
    code += "print(done.record['brain'], *{m for m in set(sys.modules) - before if m.startswith('scipy')})"
    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "head.nii.gz"], capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-1] == "extracted"


def test_a_loaded_scan_is_returned_unchanged(hu):
    loaded = scan.load(nib.Nifti1Image(hu, AFFINE), expected_ranges={})
    assert scan.load(loaded, expected_ranges={}) is loaded
    early, end = scan.load_deferred(loaded, expected_ranges={})
    assert early is loaded.hu
    assert end() is loaded
    assert np.array_equal(np.asarray(ichprog.brain_mask(loaded).dataobj) > 0, loaded.brain)
