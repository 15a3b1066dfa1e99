"""Blood of known volume in a given head: its volume, its place, and its density."""

import nibabel as nib
import numpy as np
import pytest

from ichprog import InvalidValueError, ScanError, UnknownNameError
from ichprog.simulate import MASK_VALUES, Patient, Realism, add_haemorrhage

NO_BLOOD = Realism(without_blood=1.0)
VALUES = {"parenchymal": 1, "ventricular": 2, "subarachnoid": 3, "subdural": 4, "epidural": 4}


@pytest.fixture(scope="module")
def head():
    """A head without blood, whose affine and voxel order are not those of the simulation."""
    acquired = Patient(0, 3, NO_BLOOD).scan()
    image = nib.Nifti1Image(acquired.hu, acquired.affine)
    return nib.as_closest_canonical(image), acquired.inside[::-1, ::-1]


def millilitres(mask):
    return float(np.asarray(mask.dataobj).astype(bool).sum() * np.prod(mask.header.get_zooms())) / 1000


@pytest.mark.parametrize(("kind", "volume_ml"), [("parenchymal", 20.0), ("ventricular", 3.0), ("subarachnoid", 5.0),
                                                 ("subdural", 12.0), ("epidural", 12.0)])  # fmt: skip
def test_blood_has_its_volume_kind_density_and_place(head, kind, volume_ml):
    before, inside = head
    image, mask = add_haemorrhage(before, kind, volume_ml, seed=2)
    np.testing.assert_array_equal(image.affine, before.affine)
    values, hu = np.asarray(mask.dataobj), np.asarray(image.dataobj)
    blood = values > 0
    assert set(np.unique(values)) == {0, VALUES[kind]} <= {0, *MASK_VALUES.values()}
    assert millilitres(mask) == pytest.approx(volume_ml, abs=0.01)
    assert inside[blood].all()
    assert 40 < np.median(hu[blood]) < 80
    original = np.asarray(before.dataobj)
    assert (np.median(hu[blood]) - np.median(original[blood])) > 12
    far = hu - original.astype(int)
    assert (far[~inside] == 0).all()
    if kind in ("ventricular", "subarachnoid"):
        assert np.median(original[blood]) < 25  # only fluid is replaced
    if kind in ("subdural", "epidural"):
        from scipy import ndimage

        depth = ndimage.distance_transform_edt(inside, before.header.get_zooms())
        assert np.percentile(depth[blood], 5) < 3
        assert depth[blood].max() < 40


def test_small_and_large_volumes_keep_the_noise(head):
    before, _ = head
    for volume_ml in (1.0, 50.0):
        image, mask = add_haemorrhage(before, "parenchymal", volume_ml)
        assert millilitres(mask) == pytest.approx(volume_ml, abs=0.01)
    blood = np.asarray(mask.dataobj) > 0
    assert 2 < np.asarray(image.dataobj)[blood].std() < 15


def test_the_seed_decides(head):
    masks = [np.asarray(add_haemorrhage(head[0], "parenchymal", 5.0, seed=seed)[1].dataobj) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


def test_what_does_not_fit_is_refused(head):
    with pytest.raises(UnknownNameError, match="Unknown kind of haemorrhage"):
        add_haemorrhage(head[0], "epidral", 5.0)
    with pytest.raises(InvalidValueError, match="Expected a number of mL above 0"):
        add_haemorrhage(head[0], "epidural", 0.0)
    with pytest.raises(InvalidValueError, match=r"less than the .* mL that can hold ventricular blood in this head"):
        add_haemorrhage(head[0], "ventricular", 500.0)
    with pytest.raises(ScanError, match="no such file"):
        add_haemorrhage("absent.nii.gz", "epidural", 5.0)
