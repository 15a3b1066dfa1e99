import json
import os
import subprocess
import sys
from dataclasses import replace

import ichprog_timm
import nibabel as nib
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import ichprog
from ichprog import networks, registry, testing
from ichprog.errors import PluginError, SpecError, UnknownNameError
from ichprog.spec import PluginRef

SHAPE = (6, 64, 96)
POOLINGS = ["attention", "transformer", "none"]
# a convolutional network of each of three kinds, two vision transformers, and one that keeps channels last
FAMILIES = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_vit",
    "test_vit3",
    "swin_tiny_patch4_window7_224",
]


def built(name, **options):
    return registry.backbones.load(f"timm/{name}")(**options)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_pooling_keeps_the_contract(name, pooling):
    testing.check_backbone(f"timm/{name}", shape=SHAPE, export=name == "test_resnet", pooling=pooling)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit3"])
def test_other_families_keep_the_contract(name):
    testing.check_backbone(f"timm/{name}", shape=SHAPE, export=False)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 5, "stride": 2}, {"checkpointing": True}])
def test_every_option_keeps_the_contract(options):
    testing.check_backbone("timm/test_efficientnet", shape=SHAPE, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_get_the_features_of_the_network_alone(name):
    backbone = built(name, pooling="none", window=3).eval()
    grid = torch.rand(2, 1, *SHAPE)
    with torch.no_grad():
        features = backbone(grid)
        assert features.shape[:3] == (2, backbone.out_channels, SHAPE[0])
        for slice_, three in ((0, [0, 0, 1]), (2, [1, 2, 3]), (5, [4, 5, 5])):
            alone = backbone.network.forward_features(grid[:1, 0, three])
            if alone.ndim == 3:
                alone = alone[:, backbone.network.num_prefix_tokens :].transpose(1, 2).unflatten(2, features.shape[3:])
            elif name.startswith("swin"):
                alone = alone.permute(0, 3, 1, 2)
            torch.testing.assert_close(features[:1, :, slice_], alone, rtol=1e-4, atol=1e-5)


def test_a_window_has_the_given_width():
    grid = torch.rand(1, 1, *SHAPE)
    for window, reached in ((1, {3}), (3, {2, 3, 4}), (5, {1, 2, 3, 4, 5})):
        backbone = built("test_resnet", pooling="none", window=window).eval()
        with torch.no_grad():
            before = backbone(grid)
            changed = grid.clone()
            changed[:, :, 3] += 1
            differs = (backbone(changed) - before).abs().amax((0, 1, 3, 4)) > 0
        assert set(differs.nonzero().flatten().tolist()) == reached


@pytest.mark.parametrize(("depth", "stride", "middles"), [(6, 2, [1, 3, 5]), (7, 3, [1, 3, 5]), (6, 3, [1, 4])])
def test_a_stride_takes_the_middle_slices(depth, stride, middles):
    torch.manual_seed(0)
    all_slices = built("test_resnet", pooling="none").eval()
    some = built("test_resnet", pooling="none", stride=stride).eval()
    some.load_state_dict(all_slices.state_dict())
    grid = torch.rand(1, 1, depth, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(some(grid), all_slices(grid)[:, :, middles], rtol=1e-4, atol=1e-5)


def test_attention_makes_the_mean_over_slices_a_weighted_mean():
    attention = ichprog_timm.Attention(4)
    features = torch.rand(2, 4, 5, 3, 3)
    found = attention(features)
    weights = (found / features)[:, 0, :, 0, 0] / 5
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    expected = (weights[:, None, :, None, None] * features).sum(2)
    torch.testing.assert_close(found.mean(2), expected)


def test_a_transformer_mixes_slices_and_knows_their_positions():
    torch.manual_seed(0)
    mix = ichprog_timm.Transformer(8).eval()
    features = torch.rand(1, 8, 5, 2, 2)
    changed = features.clone()
    changed[:, :, 4] += torch.arange(8)[:, None, None]
    assert (mix(changed) - mix(features))[:, :, 0].abs().amax() > 1e-4
    assert not torch.allclose(mix(features.flip(2)), mix(features).flip(2), atol=1e-4)


def model(folder, **options):
    """A model in a folder, with seeded weights, as any trained one."""
    like = ichprog.list_models("compact.prognosis_gcs3_age")[0]
    spec = replace(
        like,
        name="timm.example",
        backbone=PluginRef("timm/test_resnet", options),
        input=replace(like.input, shape=(20, 64, 64)),
        weights=replace(like.weights, folder="", sha256={}),
        golden_output=None,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec.to_dict()))
    plain = replace(
        spec, backbone=PluginRef("timm/test_resnet", {k: v for k, v in options.items() if k != "pretrained"})
    )
    torch.manual_seed(0)
    save_file(networks.build(plain).state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def scan():
    """A simulated brain with a ball of blood."""
    at = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in (160, 160, 30)), indexing="ij"), axis=-1)
    brain = ((at / (60, 70, 13)) ** 2).sum(-1) <= 1
    blood = (((at - (20, 10, 2)) / (15, 15, 4)) ** 2).sum(-1) <= 1
    hu = np.where(brain, 33, 0) + np.where(blood, 35, 0)
    return nib.Nifti1Image(hu.astype(np.int16), np.diag([-1.0, -1.0, 5.0, 1.0]))


@pytest.mark.parametrize("options", [{}, {"checkpointing": True, "pooling": "transformer"}])
@pytest.mark.parametrize("method", ["grad_cam", "guided_backprop", "guided_grad_cam"])
def test_a_model_in_a_folder_predicts_and_explains(tmp_path, monkeypatch, scan, method, options):
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path / "cache"))
    name = model(tmp_path / "model", **options)
    loaded = ichprog.load_model(name)
    assert sum(ichprog.predict(loaded, scan)["prognosis"].probabilities.values()) == pytest.approx(1)
    saliency = ichprog.explain(loaded, scan, task="prognosis", method=method)
    assert saliency.image.shape == scan.shape
    assert saliency.grid_map.shape[0] == 20
    assert np.isfinite(saliency.grid_map).all()
    assert saliency.empty == (np.abs(saliency.grid_map).max() == 0)
    assert not (method == "grad_cam" and saliency.empty)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_checkpointing_recomputes_and_changes_no_gradient(name):
    gradients, passes = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = ichprog_timm.backbone(name, checkpointing=checkpointing).train()
        last = [module for module in backbone.network.modules() if "Block" in type(module).__name__][-1]
        last.register_forward_pre_hook(lambda *_, at=checkpointing: passes.append(at))
        torch.manual_seed(1)
        backbone(torch.rand(1, 1, *SHAPE)).square().mean().backward()
        gradients.append([values.grad for values in backbone.parameters()])
    assert passes == [False, True, True]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "options", "error", "message"), [
    ("resnet81", {}, UnknownNameError, "Did you mean resnet18"),
    ("resnet18.a1_in2k", {}, UnknownNameError, "Did you mean resnet18.a1_in1k"),
    ("hf-hub:a/b", {}, UnknownNameError, "hf-hub:a/b"),
    ("test_resnet", {"window": 2}, ValueError, "window is 2; expected an odd number"),
    ("test_resnet", {"window": "3"}, ValueError, "window is '3'"),
    ("test_resnet", {"stride": 0}, ValueError, "stride is 0"),
    ("test_resnet", {"pooling": "mean"}, ValueError, "attention, transformer, none"),
    ("test_resnet", {"pretrained": "false"}, ValueError, "pretrained is 'false'; expected true or false"),
    ("test_resnet", {"width": 3}, TypeError, "width"),
    ("crossvit_tiny_240", {"checkpointing": True}, ValueError, "has no gradient checkpointing. Use"),
    ("hiera_tiny_224", {}, ValueError, "timm/hiera_tiny_224 has no features on a slice"),
    ("test_mambaout.none", {}, UnknownNameError, "test_mambaout"),
])  # fmt: skip
def test_invalid_names_and_options_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        ichprog_timm.backbone(name, **options)


def test_an_invalid_option_in_a_spec_is_a_spec_error(tmp_path):
    with pytest.raises(SpecError, match="window is 4"):
        model(tmp_path / "model", window=4)


@pytest.mark.parametrize(("name", "side", "message"), [
    ("test_convnext", (16, 16), r"slices of 16 x 16 cells .* are 32 x 32;"),
    ("test_maxvit", (96, 100), r"slices of 96 x 100 cells .* are \d+ x \d+; the next .* are \d+ x \d+"),
])  # fmt: skip
def test_the_error_of_an_unsupported_grid_names_supported_sizes(name, side, message):
    backbone = ichprog_timm.backbone(name)
    with pytest.raises(PluginError, match=message):
        backbone(torch.rand(1, 1, 4, *side))
    assert backbone.training


def test_an_error_of_another_cause_is_raised_unchanged(monkeypatch):
    backbone = ichprog_timm.backbone("test_resnet")

    def no_memory(slices):
        if slices.device.type == "meta":
            return torch.zeros(1, 1, 1, 1)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(backbone.network, "forward_features", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        backbone(torch.rand(1, 1, *SHAPE))


OFFLINE = """
import sys
import ichprog
assert "timm" not in sys.modules
from ichprog.errors import WeightsError
try:
    ichprog.load_model(sys.argv[1])
except WeightsError as error:
    print(error)
"""


def test_the_error_without_a_network_connection_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path / "cache"))
    name = model(tmp_path / "model", pretrained=True)
    lost = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", OFFLINE, name], env=lost, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert shown.startswith("timm/test_resnet: its pretrained weights cannot be downloaded")
    assert '"pretrained": false' in shown
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"pretrained": true', '"pretrained": false'))
    assert ichprog.load_model(name).spec.backbone.options == {"pretrained": False}


def test_pretrained_weights_are_used(monkeypatch):
    channels = []
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda module, **how: channels.append(how["in_chans"]))
    ichprog_timm.backbone("test_resnet", pretrained=True, window=5)
    assert channels == [5]
