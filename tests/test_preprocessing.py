"""The grid against MONAI's own transforms, and the mapping back to the scan."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai import transforms

from ichprog import preprocessing, zoo

from support import reference_pipeline

CONTRACT = zoo.find("densenet121.prognosis_gcs3_age").input
EDGES = [-1024, -1, 0, 14, 15, 15.5, 16, 57.5, 99, 99.99, 100, 100.5, 101, 3071]


def random_hu(shape, seed=0):
    rng = np.random.default_rng(seed)
    hu = rng.normal(35, 30, shape).astype(np.float32)
    at = rng.random(shape) < 0.2
    hu[at] = rng.choice(EDGES, at.sum())
    return hu


@pytest.mark.parametrize(
    "shape",
    [(512, 512, 24), (512, 512, 40), (512, 512, 54), (301, 301, 40), (257, 199, 31), (200, 640, 7), (333, 90, 83)],
)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_equals_the_published_chain(tmp_path, shape, dtype):
    hu = random_hu(shape).astype(dtype)
    nib.Nifti1Image(hu, np.diag([-0.5, -0.5, 5, 1])).to_filename(tmp_path / "brain.nii.gz")
    expected = reference_pipeline.grid(tmp_path / "brain.nii.gz")[0].numpy()
    got = preprocessing.prepare(hu, CONTRACT)
    assert got.shape == (40, 301, 301)
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 1e-6


@given(st.tuples(*[st.integers(2, 60)] * 3), st.integers(0, 99), st.sampled_from("CF"), st.booleans())
@settings(max_examples=80, deadline=None)
def test_equals_monai_at_any_size(shape, seed, order, small):
    """Whether a brain fills the scan or lies somewhere in it, and in whatever order in memory."""
    contract = type(CONTRACT)(**{**vars(CONTRACT), "shape": (9, 17, 13)})
    hu = np.asarray(random_hu(shape, seed), order=order)
    if small:
        low, high = (np.array(shape) // 3, np.array(shape) // 3 + 1 + seed % 9)
        outside = np.ones(shape, bool)
        outside[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = False
        hu[outside] = -1024
    y = (hu - 15) / 85
    y = np.where((y <= 0) | (y >= 1), 0, y).astype(np.float32)[None]
    y = transforms.Resize((13, 17, 9), mode="area")(transforms.SpatialPad((-1, -1, 9))(y)).numpy()
    assert np.abs(preprocessing.prepare(hu, contract) - y[0].transpose(2, 1, 0)).max() <= 1e-6


def test_what_is_denser_than_the_window_is_removed_or_kept_as_the_spec_says():
    hu = np.full((4, 4, 40), 150, np.float32)
    assert preprocessing.prepare(hu, CONTRACT).max() == 0
    window = type(CONTRACT.window)(15, 100, "one")
    contract = type(CONTRACT)(**{**vars(CONTRACT), "window": window})
    assert preprocessing.prepare(hu, contract).min() == 1


@pytest.mark.parametrize("slices", [24, 40, 54])
def test_a_map_comes_back_to_the_voxels_it_was_made_of(slices):
    """A smooth pattern over the scan, averaged to the grid and brought back, is the pattern."""
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in (512, 480, slices)), indexing="ij", sparse=True)
    pattern = (55 + 10 * i - 10 * j + 5 * k + 10 * i * j).astype(np.float32)
    there = preprocessing.prepare(pattern, CONTRACT)
    back = preprocessing.to_scan(there, pattern.shape, CONTRACT)
    assert back.shape == pattern.shape
    inner = (slice(4, -4), slice(4, -4), slice(2, -2))
    assert np.abs(back[inner] * 85 + 15 - pattern[inner]).max() < 0.2


def test_a_coarse_map_spreads_over_the_whole_scan():
    coarse = np.zeros((1, 9, 9), np.float32)
    coarse[0, 4, 1] = 1  # middle row, second column from the patient's right
    back = preprocessing.to_scan(coarse, (512, 512, 30), CONTRACT)
    i, j, _ = np.unravel_index(back.argmax(), back.shape)
    assert abs(i - 512 * 1.5 / 9) < 2
    assert abs(j - 256) < 2
    assert np.ptp(back, axis=2).max() == 0
