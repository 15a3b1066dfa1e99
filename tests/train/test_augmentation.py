"""Augmentation, compared with the published transforms of MONAI."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ichprog.scan import resolve_ranges
from ichprog.train import PRESETS
from ichprog.train.augmentation import augment


def smooth(shape, number=1):
    """Blobs that interpolation of any kind hardly changes."""
    from scipy import ndimage

    noise = np.random.default_rng(0).standard_normal((number, 1, *shape))
    made = ndimage.gaussian_filter(noise, (0, 0, 3, 3, 3))
    return torch.from_numpy(made / np.abs(made).max()).float()


def test_grids_are_unchanged_without_augmentation(spec, without_augmentation):
    values = smooth((16, 20, 24), 2)
    assert torch.equal(augment(values, without_augmentation(), spec.input, [(1,), (2,)]), values)


def test_augmentation_depends_on_the_seed_alone(spec):
    values = smooth((16, 20, 24), 3)
    together = augment(values, PRESETS["default"], spec.input, [(7, 1), (7, 2), (7, 3)])
    alone = augment(values[1:2], PRESETS["default"], spec.input, [(7, 2)])
    assert torch.allclose(together[1:2], alone, atol=1e-6)
    other = augment(values[1:2], PRESETS["default"], spec.input, [(7, 4)])
    assert not torch.allclose(alone, other, atol=1e-2)


def inner(values):
    return values[..., 5:-5, 5:-5, 5:-5]


def test_the_published_zoom_equals_the_published_transform(spec, without_augmentation):
    from monai.transforms import Zoom

    values = smooth((24, 28, 32), 4)
    made = augment(values, without_augmentation(zoom=0.1, zoom_mode="always"), spec.input, [(i,) for i in range(4)])
    there = torch.stack([torch.as_tensor(Zoom(1.1, mode="trilinear")(scan)) for scan in values])
    assert (inner(made) - inner(there)).abs().max() < 0.06
    assert (inner(made) - inner(values)).abs().amax((1, 2, 3, 4)).min() > 0.09


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_in_voxels_equals_the_published_transform(axis, spec, monkeypatch, without_augmentation):
    from monai.transforms import Rotate

    drawn = [0.0, 0.0, 0.0]
    drawn[axis] = 1.0

    class Draw:
        random = staticmethod(lambda: 0.4)
        uniform = staticmethod(lambda low, high, size=None: np.array(drawn) if size else 0.0)

    contract = dataclasses.replace(spec.input, shape=(24, 30, 36))
    values = smooth((24, 30, 36))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Draw())
    made = augment(
        values, without_augmentation(rotation_degrees=5, rotation_prob=0.5, rotation_units="voxels"), contract, [(1,)]
    )
    angles = [0.0, 0.0, 0.0]
    angles[axis] = math.pi / 36
    there = [torch.as_tensor(Rotate([s * a for a in angles], keep_size=True)(values[0])) for s in (1, -1)]
    assert min((inner(made[0]) - inner(one)).abs().max() for one in there) < 0.01
    assert (inner(made[0]) - inner(values[0])).abs().max() > 0.05


def test_rotation_in_mm_moves_a_flat_grid_less(spec, without_augmentation):
    """A grid of few high cells: an angle in cells leans the head by several times as many mm."""
    contract = dataclasses.replace(spec.input, shape=(8, 64, 64))
    low, high = resolve_ranges(contract.expected_ranges)["coverage"]
    values = torch.zeros(1, 1, 8, 64, 64)
    values[..., 4, :, :] = 1
    moved = {}
    for units in ("mm", "voxels"):
        made = augment(
            values, without_augmentation(rotation_degrees=8, rotation_prob=1, rotation_units=units), contract, [(3,)]
        )
        moved[units] = float(made[0, 0, 4].mean())
    assert moved["voxels"] < moved["mm"]
    assert low < high


def test_flip_exchanges_only_left_and_right(spec, without_augmentation):
    values = smooth((8, 10, 12))
    made = augment(values, without_augmentation(flip_prob=1), spec.input, [(1,)])
    assert torch.allclose(made, values.flip(-1), atol=1e-5)


def test_noise_contrast_and_brightness_have_the_stated_size(spec, without_augmentation):
    values = torch.zeros(50, 1, 8, 10, 12)
    seeds = [(i,) for i in range(50)]
    noisy = augment(values, without_augmentation(noise_std=0.01, noise_prob=0.5), spec.input, seeds)
    altered = [scan.std() for scan in noisy if scan.any()]
    assert 15 <= len(altered) <= 35
    assert torch.stack(altered).mean() == pytest.approx(0.01, rel=0.02)
    values[..., 6:] = 0.5
    shifted = augment(values, without_augmentation(contrast=0.1, brightness=0.02), spec.input, seeds)
    assert not shifted[..., :6].any()
    inside = shifted[..., 6:].flatten(1)
    assert (inside - inside[:, :1]).abs().max() == 0
    assert 0.43 <= inside.min() < 0.47
    assert 0.53 < inside.max() <= 0.57
