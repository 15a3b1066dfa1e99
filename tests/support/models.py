"""Tiny models with known behaviour."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import ichprog
from ichprog import networks, zoo
from ichprog.backbones import Backbone
from ichprog.simulate import MASK_VALUES
from ichprog.spec import MaskTarget, PluginRef, Target, Task, VolumeInterval, Weights

SHARED = Path(__file__).parents[3] / "shared" / "data"
REPOSITORY = zoo.find(zoo.DEFAULT).weights


def bright_backbone():
    """Build a backbone of one channel that is high where the grid is bright, so that its saliency maps are known."""
    convolution = torch.nn.Conv3d(1, 1, 3, padding=1)
    torch.nn.init.constant_(convolution.weight, 1 / 27)
    torch.nn.init.constant_(convolution.bias, -0.45)
    layers = torch.nn.Sequential(convolution, torch.nn.ReLU(inplace=True), torch.nn.AvgPool3d((2, 3, 3)))
    return Backbone(layers, 1, "features.2")


def local_model(folder, backbone, *, shape, folds=1, adjust=lambda state: state):
    """Write a model of three tasks with a registered backbone and seeded weights, and return its name."""
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


def torch_model(name, fold=None):
    """Load a model with runtime "torch", which compiles nothing."""
    return ichprog.load_model(name, fold=fold, runtime="torch")


def mean_backbone():
    """Return a backbone whose feature is the reduced grid, so that a head's logit is weight x mean + bias."""
    convolution = torch.nn.Conv3d(1, 1, 1)
    torch.nn.init.ones_(convolution.weight)
    torch.nn.init.zeros_(convolution.bias)
    return Backbone(torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.AvgPool3d(2)), 1, "features.2")


def fill_heads(state, weight, bias):
    """Fill the weights and biases of all heads of a state with two numbers."""
    for key, values in state.items():
        for suffix, value in {"linear.weight": weight, "linear.bias": bias}.items():
            if key.endswith(suffix):
                values.fill_(value)
    return state


def intensity_backbone():
    """Build a backbone whose feature is the grid itself."""
    convolution = torch.nn.Conv3d(1, 1, 1, bias=False)
    torch.nn.init.ones_(convolution.weight)
    return Backbone(torch.nn.Sequential(convolution, torch.nn.ReLU()), 1, "features.1")


BLEEDING = Task(
    "bleeding", "Whether there is blood.", ("absent", "present"), Target("bleeding", (1.0,), "high"),
    PluginRef("segmentation", {"top_share": 0.002}), 0.4, 1.0,
    MaskTarget(
        "mask", tuple(MASK_VALUES), None, 1.0,
        {"total": (VolumeInterval(0.0, 0.8, 1.5),), "parenchymal": (VolumeInterval(0.0, 0.5, 2.0),)},
    ),
)  # fmt: skip


def local_detector(folder, *, shape=(30, 96, 96), folds=1):
    """Write a model that finds blood by its density, and return its name. The backbone "intensity" must be registered.

    Cells above 45 HU are parenchymal and cells above 75 HU ventricular.
    """
    base = zoo.find("compact.prognosis_gcs3_age")
    window = dataclasses.replace(base.input.window, low=0.0, high=100.0, above="one")
    spec = dataclasses.replace(
        base, name="intensity.bleeding", backbone=PluginRef("intensity", {}), tasks=(BLEEDING,), golden_output=None,
        input=dataclasses.replace(base.input, shape=shape, window=window, pad_slices=False),
        weights=Weights(None, None, "", "safetensors", {}, {}),
        limits=("Density alone decides.", "Old blood is missed."),
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec.to_dict()))
    state = networks.build(spec).state_dict()
    # logits: none 0, the first region 40 (x - 0.45), the second 80 (x - 0.6), which passes the first at 0.75
    state["heads.bleeding.voxels.weight"] = torch.tensor([0.0, 40.0, 80.0, 0.0, 0.0]).view(5, 1, 1, 1, 1)
    state["heads.bleeding.voxels.bias"] = torch.tensor([0.0, -18.0, -48.0, -20.0, -20.0])
    for fold in range(folds):
        save_file(state, folder / f"fold{fold}.safetensors")
    return f"local-dir:{folder}"
