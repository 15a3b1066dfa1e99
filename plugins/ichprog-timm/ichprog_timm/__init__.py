"""Any network of timm as a 2.5D backbone of ichprog: slices through a 2D network, then slices weighed or mixed."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ichprog.errors import PluginError, UnknownName, WeightsError

Pooling = Literal["attention", "transformer", "none"]


def backbone(
    name: str,
    *,
    window: int = 3,
    pooling: Pooling = "attention",
    pretrained: bool = False,
    checkpointing: bool = False,
) -> "Slices":
    """A network of timm, run on every slice; `timm/resnet18` is the backbone of the name "resnet18".

    A grid `(B, 1, D, H, W)` becomes features `(B, C, D, h, w)`: no slice is lost, and Grad-CAM is as fine as the grid
    along D.

    Args:
        name: A name of `timm.list_models()`, with a tag where pretrained weights are to be those of the tag.
        window: Slices that the network sees at once as channels: each slice in the middle of its neighbours, an odd
            number. Beyond the first and the last slice these are seen again.
        pooling: How slices are brought together: by "attention", which weighs each so that a mean over D is a weighted
            mean; by a "transformer" layer over slices, added to each slice; or by "none".
        pretrained: Whether the 2D network starts from timm's weights, by timm's own way from the Hub. A trained model
            brings all weights itself: its description says `false`, as else they would be looked for in vain.
        checkpointing: Whether timm computes activations again on the way back instead of keeping them, in training.

    Raises:
        UnknownName: timm has no network of that name.
        ValueError: An option is none of those above, or the network cannot do it.
        WeightsError: The pretrained weights cannot be had.

    Source: Wightman, PyTorch Image Models (doi 10.5281/zenodo.4414861).
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UnknownName("network of timm", name, timm.list_models())
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window!r}; it must be an odd number from 1 on")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}")
    asked = {"in_chans": window, "num_classes": 0, "global_pool": "", "pretrained": pretrained}
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **asked)  # of those that have a size of their own
        except TypeError:
            network = timm.create_model(name, **asked)
    except Exception as error:  # timm and what it calls raise many kinds
        if not pretrained:
            raise
        raise WeightsError(
            f"timm/{name}: its pretrained weights cannot be had ({type(error).__name__}: {error}). Check the network, "
            "its proxy and HF_ENDPOINT; or take the option pretrained=false, which starts from random weights."
        ) from error
    if checkpointing:
        try:
            network.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"timm/{name} has no gradient checkpointing; take checkpointing=false") from error
    return Slices(name, network, window, pooling)


class Slices(nn.Module):
    """A 2D network on every slice with its neighbours, and what brings slices together.

    Args:
        name: What timm calls the network.
        network: From `(N, window, H, W)` to features by its `forward_features`.
        window: Slices seen at once.
        pooling: As for `backbone`.
    """

    cam_layer = "together"

    def __init__(self, name: str, network: Any, window: int, pooling: Pooling) -> None:
        super().__init__()
        self.name, self.network, self.window = name, network, window
        seen = self._seen(torch.zeros(1, window, *network.eval().default_cfg["input_size"][1:]))
        self.out_channels = int(seen.shape[1])
        own = list(network.parameters())
        for values, gradient in zip(own, torch.autograd.grad(seen.sum(), own, allow_unused=True), strict=True):
            values.requires_grad_(gradient is not None)  # the classifier's part learns nothing
        network.train()
        together = {"attention": Attention, "transformer": Transformer}.get(pooling)
        self.together = together(self.out_channels) if together else nn.Identity()

    def forward(self, grid: Tensor) -> Tensor:
        """Features `(B, C, D, h, w)` of a grid `(B, 1, D, H, W)`.

        Raises:
            PluginError: Its slices are too small for the network.
        """
        batch, _, depth, height, width = grid.shape
        reach = torch.arange(self.window, device=grid.device) - self.window // 2
        beside = (torch.arange(depth, device=grid.device)[:, None] + reach).clamp(0, depth - 1)
        slices = grid[:, 0, beside].reshape(batch * depth, self.window, height, width)
        try:
            seen = self._seen(slices)
        except (RuntimeError, AssertionError) as error:
            raise PluginError(
                f"timm/{self.name} cannot take slices of {height} x {width} cells ({error}). Take a larger grid, or "
                "sides that are multiples of 32, or another network."
            ) from error
        found: Tensor = self.together(seen.unflatten(0, (batch, depth)).transpose(1, 2))
        return found

    def _seen(self, slices: Tensor) -> Tensor:
        """Features `(N, C, h, w)` of slices `(N, window, H, W)`, whatever form the network has for them."""
        seen: Tensor = self.network.forward_features(slices)
        if seen.ndim == 3:  # tokens
            rows, columns = self.network.patch_embed.dynamic_feat_size(slices.shape[2:])
            seen = seen[:, self.network.num_prefix_tokens :].transpose(1, 2).unflatten(2, (rows, columns))
        elif getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            seen = seen.permute(0, 3, 1, 2)
        return seen


class Attention(nn.Module):
    """Weighs slices by a score of each, so that the mean over D becomes a weighted one.

    Source: Ilse et al., ICML 2018 (arXiv 1802.04712).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(channels, max(channels // 4, 8)), nn.Tanh())
        self.weight = nn.Linear(max(channels // 4, 8), 1, bias=False)  # a bias would not change a softmax

    def forward(self, features: Tensor) -> Tensor:
        """Weighed features `(B, C, D, h, w)` of features `(B, C, D, h, w)`."""
        weights = self.weight(self.score(features.mean((3, 4)).transpose(1, 2))).softmax(1)
        return features * (weights * features.shape[2]).transpose(1, 2)[..., None, None]


class Transformer(nn.Module):
    """One transformer layer over slices, whose answer is added to every cell of a slice.

    Source: Vaswani et al., NeurIPS 2017 (arXiv 1706.03762), with normalisation first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, 8)
        self.before, self.between = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.asks = nn.Linear(channels, 3 * channels)
        self.answers = nn.Linear(channels, channels)
        self.mix = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, C, D, h, w)`, each slice knowing of the others, of features `(B, C, D, h, w)`."""
        tokens = features.mean((3, 4)).transpose(1, 2)
        depth, channels = tokens.shape[1:]
        normal = self.before(tokens + _positions(depth, channels).to(tokens))
        query, key, value = self.asks(normal).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        mixed = self.answers(attended)
        mixed = mixed + self.mix(self.between(tokens + mixed))
        return features + mixed.transpose(1, 2)[..., None, None]


def _positions(depth: int, channels: int) -> Tensor:
    """Sines and cosines of where a slice is, `(D, C)`."""
    angles = torch.arange(depth)[:, None] / 10000 ** (torch.arange(channels)[None] // 2 * 2 / channels)
    return torch.where(torch.arange(channels) % 2 == 0, angles.sin(), angles.cos())
