"""Fixtures of the tests of training."""

import numpy as np
import pytest
import torch

import ichprog
from ichprog import registry
from ichprog.cohort import Cohort
from ichprog.train import PRESETS, TrainOptions, grid_cache, train

from support.cohorts import QUICK, plain_backbone, write_cohort


@pytest.fixture(autouse=True, scope="module")
def registered_plain_backbone():
    registry.register_backbone("plain", plain_backbone)
    yield
    registry.backbones.unregister("plain")


@pytest.fixture(autouse=True)
def single_threaded(one_thread):
    """Every process of these tests computes with one thread, so that their results are equal."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a small cohort, with its prepared grids in the cache folder `c`."""
    root = tmp_path_factory.mktemp("patients")
    cohort = Cohort.read(write_cohort(root))
    spec = ichprog.ModelSpec.read(root / "spec.json")
    grid_cache.prepare([p.scan for p in cohort.patients], spec.input, brain="auto", folder=root / "c/grids")
    return root


@pytest.fixture(scope="session")
def cohort(folder):
    return Cohort.read(folder / "cohort.csv")


@pytest.fixture(scope="session")
def spec(folder):
    return ichprog.ModelSpec.read(folder / "spec.json")


@pytest.fixture(scope="session")
def options(folder):
    """Options with the cache of prepared grids."""
    return TrainOptions(cache_dir=folder / "c")


@pytest.fixture(scope="session")
def trained(cohort, spec, options, tmp_path_factory):
    """A run of four folds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests that compare with this run
    run = train(cohort, spec, tmp_path_factory.mktemp("run") / "run", folds=4, protocol=QUICK, options=options)
    torch.set_num_threads(threads)
    return run


@pytest.fixture
def without_augmentation():
    """Return the default protocol without augmentation, with changes."""

    def build(**changes):
        off = dict.fromkeys(
            ("rotation_degrees", "zoom", "shift", "flip_prob", "noise_std", "contrast", "brightness"), 0
        )
        return PRESETS["default"].replace(**off | changes)

    return build


@pytest.fixture
def published_labels():
    """Labels with the counts of the published cohort."""
    return np.random.RandomState(0).permutation([0] * 99 + [1] * 162)
