"""What several tests stand on: a loopback Hub with the published layout, and scans."""

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ichprog
from ichprog import networks, registry, zoo
from ichprog.backbones import Backbone
from ichprog.spec import PluginRef

import published
from hub_server import HubServer

SHARED = Path(__file__).parents[2] / "shared" / "data"
REPOSITORY = zoo.find(zoo.DEFAULT).weights


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
    for seed, name in enumerate(published.PUBLISHED):
        published.save(name, root / REPOSITORY.repo, seed)
    published.save("perez2023.prognosis", root / REPOSITORY.repo, seed=100, fold=1)
    return root


@pytest.fixture
def hub_server(hub_root, monkeypatch):
    with HubServer(hub_root, REPOSITORY.revision) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def brain_hu(shape=(512, 512, 30), lesion=(330, 220, 16), seed=0):
    """A simulated brain in LPS order, 0 outside: an ellipsoid with ventricles and a ball of blood of about 30 mL."""
    rng = np.random.default_rng(seed)
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    middle = np.array(shape) / 2
    half = np.array([0.29, 0.35, 0.47]) * shape

    def ball(centre, radii):
        return sum(((x - c) / r) ** 2 for x, c, r in zip((i, j, k), centre, radii, strict=True)) <= 1

    brain = ball(middle, half)
    hu = np.where(brain, 33 + 4 * rng.standard_normal(shape), 0)
    hu[ball(middle + np.array([0, 20, 1]), (25, 60, 4)) & brain] = 8
    scale = np.array(shape) / (512, 512, 30)
    hu[ball(np.array(lesion) * scale, (40 * scale[0], 40 * scale[1], 4 * scale[2]))] = 68
    return hu.round().astype(np.int16)


@pytest.fixture(scope="session")
def scan_path(tmp_path_factory):
    """A simulated brain-only scan as NIfTI, its voxels in LPS order as published."""
    path = tmp_path_factory.mktemp("scans") / "1_brain.nii.gz"
    nib.Nifti1Image(brain_hu(), np.diag([-0.47, -0.47, 5.0, 1.0])).to_filename(path)
    return path


def bright_backbone():
    """One channel that is high where the grid is, so that what it explains is known."""
    convolution = torch.nn.Conv3d(1, 1, 3, padding=1)
    torch.nn.init.constant_(convolution.weight, 1 / 27)
    torch.nn.init.constant_(convolution.bias, -0.45)
    layers = torch.nn.Sequential(convolution, torch.nn.ReLU(inplace=True), torch.nn.AvgPool3d((2, 3, 3)))
    return Backbone(layers, 1, "features.2")


@pytest.fixture
def bright_model(tmp_path):
    """The name of a model in a folder, with two folds and a network that answers to blood; it runs in no time."""
    ichprog.register_backbone("bright", bright_backbone)
    yield local_model(tmp_path / "bright", "bright", shape=(20, 96, 96), folds=2, adjust=_decided)
    registry.backbones.unregister("bright")


def _decided(state):
    """Heads that follow the features, and strongly."""
    return {k: v.abs() * 40 + 3000 if k.endswith("linear.weight") else v for k, v in state.items()}


def local_model(folder, backbone, *, shape, folds=1, adjust=lambda state: state):
    """Writes a model of three tasks with a registered backbone and seeded weights, and tells its name."""
    spec = zoo.find("densenet121.prognosis_gcs3_age")
    weights = dataclasses.replace(
        spec.weights, repo=None, revision=None, folder="", format="safetensors", keys={}, sha256={}
    )
    contract = dataclasses.replace(spec.input, shape=shape, pad_slices=False)
    spec = dataclasses.replace(
        spec,
        name=f"{backbone}.prognosis_gcs3_age",
        backbone=PluginRef(backbone, {}),
        weights=weights,
        input=contract,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec.to_dict()))
    torch.manual_seed(0)
    for fold in range(folds):
        save_file(adjust(networks.build(spec).state_dict()), folder / f"fold{fold}.safetensors")
    return f"local-dir:{folder}"
