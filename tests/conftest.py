"""What several tests stand on: a loopback Hub with the published layout, and scans."""

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import registry

from support import reference_pipeline
from support.hub_server import HubServer
from support.models import REPOSITORY, bright_backbone, local_model
from support.phantoms import brain_hu


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, and none can reach beyond the loopback."""
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory):
    """Folders as on the Hub: every published model with seeded weights, fold 0, and Perez in two folds."""
    root = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(reference_pipeline.PUBLISHED):
        reference_pipeline.save(name, root / REPOSITORY.repo, seed)
    reference_pipeline.save("perez2023.prognosis", root / REPOSITORY.repo, seed=100, fold=1)
    return root


@pytest.fixture
def hub_server(hub_root, monkeypatch):
    with HubServer(hub_root, REPOSITORY.revision) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session")
def scan_path(tmp_path_factory):
    """A simulated brain-only scan as NIfTI, its voxels in LPS order as published."""
    path = tmp_path_factory.mktemp("scans") / "1_brain.nii.gz"
    nib.Nifti1Image(brain_hu(), np.diag([-0.47, -0.47, 5.0, 1.0])).to_filename(path)
    return path


@pytest.fixture
def bright_model(tmp_path):
    """The name of a model in a folder, with two folds and a network that answers to blood; it runs in no time."""
    ichprog.register_backbone("bright", bright_backbone)
    yield local_model(tmp_path / "bright", "bright", shape=(20, 96, 96), folds=2, adjust=_decided)
    registry.backbones.unregister("bright")


def _decided(state):
    """Heads that follow the features, and strongly."""
    return {k: v.abs() * 40 + 3000 if k.endswith("linear.weight") else v for k, v in state.items()}
