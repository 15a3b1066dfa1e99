"""Scans from files and images: orientation, refusals, folders."""

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import ScanError, scan, zoo

from conftest import brain_hu

PLAUSIBLE = zoo.find(zoo.DEFAULT).input.plausible
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
def test_what_is_no_volume_in_space_is_refused(hu, values, affine, code):
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


def test_an_oblique_scan_is_read_as_it_lies_and_said_in_degrees(hu):
    straight = scan.examine(nib.Nifti1Image(hu, AFFINE), plausible=PLAUSIBLE)
    slight = scan.examine(nib.Nifti1Image(hu, turned(12)), plausible=PLAUSIBLE)
    much = scan.examine(nib.Nifti1Image(hu, turned(30)), plausible=PLAUSIBLE)
    assert np.array_equal(slight.hu, straight.hu)
    assert slight.record["obliquity_deg"] == pytest.approx(12, abs=0.1)
    assert "obliquity" not in {w.code for w in slight.warnings}
    (doubt,) = [w for w in much.warnings if w.code == "obliquity"]
    assert doubt.unit == "degrees"
    assert doubt.measured == pytest.approx(30, abs=0.1)


def test_an_unstated_orientation_is_a_doubt(hu, tmp_path):
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
def test_unreadable_files_are_called_what_they_are(tmp_path, name, content, code):
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


def test_what_is_no_scan_at_all_is_refused():
    with pytest.raises(ScanError, match="this is a ndarray"):
        scan.read(np.zeros((3, 3, 3)))


def test_an_examined_scan_is_taken_as_it_is(hu):
    examined = scan.examine(nib.Nifti1Image(hu, AFFINE), plausible=PLAUSIBLE)
    assert scan.examine(examined, plausible=PLAUSIBLE) is examined
    assert np.array_equal(np.asarray(ichprog.brain_mask(examined).dataobj) > 0, examined.brain)
