"""Fixtures shared by several packages: a Hub on the loopback with the published layout, scans, and a small model."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers with as many threads as cores would slow each other down
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import registry, runtime, zoo

from support import reference_pipeline
from support.hub_server import HubServer
from support.models import REPOSITORY, bright_backbone, intensity_backbone, local_model
from support.phantoms import brain_hu


@pytest.fixture(autouse=True, scope="session")
def user_data(tmp_path_factory):
    """Keep the key of pseudonyms of the tests apart from that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patch.delenv("ICHPROG_PSEUDONYM_KEY_FILE", raising=False)
        yield


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """Use an empty cache, and let no test reach a host beyond the loopback."""
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("ICHPROG_BACKGROUND_COMPILE", "0")  # tests leave no processes behind
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture(autouse=True)
def restored_registries(monkeypatch):
    """Remove the plugins and models that a test registers."""
    for plugins in (each for each in vars(registry).values() if isinstance(each, registry.Registry)):
        monkeypatch.setattr(plugins, "_registered", plugins._registered.copy())
    monkeypatch.setattr(zoo, "_registered", zoo._registered.copy())


@pytest.fixture(autouse=True)
def computed_by_torch(request, monkeypatch):
    """Let torch compute unless a test names another runtime: compiling a network takes longer than most tests.

    Tests of the choice of the runtime have the marker `compiled`.
    """
    if request.node.get_closest_marker("compiled") is None:
        resolve = runtime.resolve_runtime
        monkeypatch.setattr(
            "ichprog.model.resolve_runtime", lambda name, *rest: resolve("torch" if name == "auto" else name, *rest)
        )


@pytest.fixture(scope="module")
def registered_intensity_backbone():
    """Register a backbone whose feature is the grid itself, for the tests of dense tasks."""
    registry.register_backbone("intensity", intensity_backbone)
    yield
    registry.backbones.unregister("intensity")


@pytest.fixture(scope="module")
def one_thread():
    """Torch computes with one thread in a module that uses this fixture."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory):
    """Return a folder as on the Hub: the default model, and the model of Perez et al. with two folds.

    A large network takes seconds, so a test that needs another one adds it with `reference_pipeline.publish`.
    """
    root = tmp_path_factory.mktemp("hub")
    for name in (zoo.DEFAULT, "perez2023.prognosis"):
        reference_pipeline.publish(name, root / REPOSITORY.repo)
    reference_pipeline.save("perez2023.prognosis", root / REPOSITORY.repo, seed=100, fold=1)
    return root


@pytest.fixture
def hub_server(hub_root, monkeypatch):
    with HubServer(hub_root, REPOSITORY.revision) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session")
def scan_path(tmp_path_factory):
    """Return the path of a simulated brain-only scan in NIfTI, with voxels in LPS order as published."""
    path = tmp_path_factory.mktemp("scans") / "1_brain.nii.gz"
    nib.Nifti1Image(brain_hu(), np.diag([-0.47, -0.47, 5.0, 1.0])).to_filename(path)
    return path


@pytest.fixture
def bright_model(tmp_path):
    """Return the name of a fast local model with two folds, whose network responds to blood."""
    ichprog.register_backbone("bright", bright_backbone)
    return local_model(tmp_path / "bright", "bright", shape=(20, 96, 96), folds=2, adjust=_strengthen_heads)


def _strengthen_heads(state):
    """Return weights with which the heads respond strongly to the features."""
    return {k: v.abs() * 40 + 3000 if k.endswith("linear.weight") else v for k, v in state.items()}
