"""Tests of the batches that `docs/haemorrhage.py` trains on, and of its stages."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ichprog import zoo

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "haemorrhage.py"))
Batches, Item, Stage = (SCRIPT[name] for name in ("Batches", "Item", "Stage"))
SHAPE = (16, 64, 64)


@pytest.fixture
def items(tmp_path):
    """Two prepared patients with a small bleed, one of them a real head whose slices alone are labelled."""
    filled = np.zeros((4, *SHAPE), np.float16)
    filled[0, 4:12, 24:30, 40:46] = 1
    grid = np.where(filled[0] > 0, 0.6, 0.3)
    weak = np.where(filled[:1].any((2, 3), keepdims=True), -1, 0) * np.ones_like(filled)
    for name, regions in (("simulated", filled), ("real", weak)):
        np.savez(tmp_path / f"{name}.npz", grid=grid.astype(np.float16), regions=regions)
    return [Item("simulated", "simulated", tmp_path, None), Item("weak", "real", tmp_path, 0)], tmp_path


def draw(items, shares, width, count=25):
    listed, folder = items
    stage = Stage(1, 1e-3, shares, 4, width, {})
    batches = Batches(listed, folder, stage, seed=0)
    grids, regions = (np.concatenate(each) for each in zip(*(batches.draw() for _ in range(count)), strict=True))
    return grids, regions


def test_parts_of_slices_hold_the_blood_and_its_surroundings(items):
    grids, regions = draw(items, {"simulated": 1.0}, 32)
    assert grids.shape == (100, 1, 12, 32, 32)
    assert regions.shape == (100, 4, 12, 32, 32)
    assert 0.7 < np.mean(regions.any((1, 2, 3, 4))) < 0.99  # at random positions it would be about a quarter
    bleeding = regions.sum(1) > 0
    centres = [np.argwhere(each).mean(0)[1:] for each in bleeding if each.any()]
    assert np.std(centres, axis=0).min() > 4  # not always at the same place of the part


def test_blood_is_dense_where_the_regions_say_it_is(items):
    grids, regions = draw(items, {"simulated": 1.0}, 32)
    inside = regions.sum(1) > 0
    assert np.median(grids[:, 0][inside]) > 0.5 > np.median(grids[:, 0][~inside & (grids[:, 0] > 0)])


def test_slices_are_whole_where_only_slices_are_labelled(items):
    grids, regions = draw(items, {"weak": 0.5, "simulated": 0.5}, 64)
    assert grids.shape[3:] == (64, 64)
    unknown = (regions == -1).any((1, 3, 4))
    whole = (regions == -1).all(1).mean((2, 3))
    assert unknown.any()
    assert (whole[unknown] > 0.8).all()


def test_a_fold_goes_through_its_stages_and_leaves_out_its_own_heads(items, monkeypatch):
    listed, folder = items
    (folder / "grids").mkdir()
    (folder / "simulated.npz").rename(folder / "grids" / "simulated.npz")
    own = Item("simulated", "not prepared", folder, 0)
    train_part, spec = SCRIPT["train_part"], zoo.find("compact.haemorrhage")
    one_step = Stage(1, 1e-3, {"simulated": 1.0}, 1, 32, {})
    monkeypatch.setitem(train_part.__globals__, "START", one_step)
    monkeypatch.setitem(train_part.__globals__, "FOLD_STAGES", (one_step, one_step))
    train_part("start", spec, listed[:1], folder, bfloat16=False)
    train_part("0", spec, [listed[0], own], folder, bfloat16=False)
    files = [folder / f"{name}.safetensors" for name in ("start", "fold0-stage1", "fold0")]
    weights = [load_file(file)["heads.haemorrhage.voxels.weight"] for file in files]
    assert not np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[1], weights[2])
    files[2].unlink()
    train_part("0", spec, [listed[0], own], folder, bfloat16=False)
    assert np.array_equal(load_file(files[2])["heads.haemorrhage.voxels.weight"], weights[2])
