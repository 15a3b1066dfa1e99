import ichprog_timm
import pytest
import timm
import torch

from ichprog import registry, saliency, testing
from ichprog.errors import PluginError, UnknownName, WeightsError

SHAPE = (6, 64, 96)
FAMILIES = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_vit3"]


@pytest.mark.parametrize("pooling", ["attention", "transformer", "none"])
def test_the_contract_with_every_pooling(pooling):
    testing.check_backbone("timm/test_resnet", shape=SHAPE, pooling=pooling)


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_the_contract_of_other_families(name):
    testing.check_backbone(f"timm/{name}", shape=SHAPE, export=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_are_seen_with_their_neighbours_as_by_the_network_alone(name):
    built = registry.backbones.load(f"timm/{name}")(pooling="none", window=3).eval()
    grid = torch.rand(2, 1, *SHAPE)
    with torch.no_grad():
        features = built(grid)
        assert features.shape[:3] == (2, built.out_channels, SHAPE[0])
        for slice_, three in ((0, [0, 0, 1]), (2, [1, 2, 3]), (5, [4, 5, 5])):
            alone = built.network.forward_features(grid[:1, 0, three])
            if alone.ndim == 3:
                alone = alone[:, built.network.num_prefix_tokens :].transpose(1, 2).reshape(1, -1, *features.shape[3:])
            torch.testing.assert_close(features[:1, :, slice_], alone, rtol=1e-4, atol=1e-5)


def test_attention_makes_the_mean_over_slices_a_weighted_one():
    attention = ichprog_timm.Attention(4)
    features = torch.rand(2, 4, 5, 3, 3)
    found = attention(features)
    weights = (found / features)[:, 0, :, 0, 0] / 5
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    expected = (weights[:, None, :, None, None] * features).sum(2)
    torch.testing.assert_close(found.mean(2), expected)


def test_grad_cam_is_as_fine_as_the_slices():
    built = registry.backbones.load("timm/test_resnet")().eval().requires_grad_(False)
    grid = torch.rand(1, 1, *SHAPE).requires_grad_()
    found = saliency.grad_cam(lambda grids: built(grids).square().mean((1, 2, 3, 4)), grid, built)
    assert found.shape[0] == SHAPE[0]
    assert found.abs().amax() > 0


def test_checkpointing_changes_memory_and_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        built = ichprog_timm.backbone("test_resnet", checkpointing=checkpointing).train()
        torch.manual_seed(1)
        built(torch.rand(1, 1, *SHAPE)).square().mean().backward()
        gradients.append([values.grad for values in built.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "options", "error", "said"), [
    ("resnet81", {}, UnknownName, "resnet8|resnet18"),
    ("hf-hub:a/b", {}, UnknownName, "hf-hub:a/b"),
    ("test_resnet", {"window": 2}, ValueError, "window is 2"),
    ("test_resnet", {"pooling": "mean"}, ValueError, "attention, transformer, none"),
])  # fmt: skip
def test_wrong_names_and_options(name, options, error, said):
    with pytest.raises(error, match=said):
        ichprog_timm.backbone(name, **options)


def test_a_grid_that_does_not_fit_is_told():
    built = ichprog_timm.backbone("test_vit")
    with pytest.raises(PluginError, match=r"timm/test_vit cannot take slices of 60 x 61 cells"):
        built(torch.rand(1, 1, 4, 60, 61))


def test_pretrained_weights_without_a_network(monkeypatch):
    def unreachable(*_args, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", unreachable)
    with pytest.raises(WeightsError, match="pretrained=false"):
        ichprog_timm.backbone("test_resnet", pretrained=True)
