"""Any network of timm as a 2.5D backbone of ichprog: slices through a 2D network, then slices weighed or mixed."""

import copy
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ichprog.errors import PluginError, UnknownNameError, WeightsError

Pooling = Literal["attention", "transformer", "none"]


def backbone(
    name: str,
    *,
    window: int = 3,
    stride: int = 1,
    pooling: Pooling = "attention",
    pretrained: bool = False,
    checkpointing: bool = False,
) -> "Slices":
    """A network of timm, run on slices; `timm/resnet18` is the backbone of the name "resnet18".

    A grid `(B, 1, D, H, W)` becomes features `(B, C, d, h, w)`, where d is D unless `stride` says otherwise: no slice
    is lost, and Grad-CAM is as fine as the grid along D.

    Args:
        name: A name of `timm.list_models()`, with a tag where pretrained weights are to be those of the tag.
        window: Slices that the network sees at once as channels: each slice in the middle of its neighbours, an odd
            number. Beyond the first and the last slice these are seen again.
        stride: One window is taken of every so many slices, at their middle; d is D / `stride`, rounded up. No slice
            goes unseen as long as `stride` is no larger than `window`.
        pooling: How slices are brought together: by "attention", which weighs each so that a mean over d is a weighted
            mean; by a "transformer" layer over slices, added to each slice; or by "none".
        pretrained: Whether the 2D network starts from timm's weights, by timm's own way from the Hub. They are looked
            for whenever the network is built, in vain where a trained model brings all weights itself: the description
            of that should say `false`.
        checkpointing: Whether, in training, activations are computed again on the way back instead of being kept. Batch
            normalisation then sees each batch twice, and its running averages move faster.

    Raises:
        UnknownNameError: timm has no network of that name, or no weights of that tag.
        ValueError: An option is none of those above, or the network cannot do it.
        WeightsError: The pretrained weights cannot be had.

    Source: Wightman, PyTorch Image Models (doi 10.5281/zenodo.4414861).
    """
    import timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise UnknownNameError("network of timm", name, timm.list_models())
    if tag and name not in (tagged := timm.list_pretrained(f"{plain}.*")):
        raise UnknownNameError("network of timm", name, [plain, *tagged])
    if type(window) is not int or window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window!r}; it must be an odd number from 1 on")
    if type(stride) is not int or stride < 1:
        raise ValueError(f"stride is {stride!r}; it must be a whole number from 1 on")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}")
    for option, given in (("pretrained", pretrained), ("checkpointing", checkpointing)):
        if type(given) is not bool:  # the word "false" would count as true
            raise ValueError(f"{option} is {given!r}; it must be true or false")
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained weights for {name}; take pretrained=false")
    try:
        network = _created(name, in_chans=window, num_classes=0, pretrained=pretrained)
    except Exception as error:  # timm and what it calls raise many kinds
        if not pretrained:
            raise
        raise WeightsError(
            f"timm/{name}: its pretrained weights cannot be had ({type(error).__name__}: {error}). They come from the "
            "Hub: check the connection, its proxy and HF_ENDPOINT, or bring the Hub's cache from a machine that has "
            'them. With "pretrained": false nothing is looked for: right for a trained model, which brings all its '
            "weights (write it into its config.json), and to start from random ones."
        ) from error
    return Slices(name, network, window, stride, pooling, checkpointing)


def _created(name: str, **asked: Any) -> Any:
    """A network of timm without a classifier, for slices of any size where it is one that can."""
    import timm

    anywhere = {"dynamic_img_size": True, "global_pool": ""}
    # most networks have no size of their own, and no such option; a few have no such pooling either
    for options in ({**anywhere, "dynamic_img_pad": True}, anywhere, {"global_pool": ""}):
        try:
            return timm.create_model(name, **options, **asked)
        except (TypeError, AssertionError):
            continue
    return timm.create_model(name, **asked)


class Slices(nn.Module):
    """A 2D network on slices with their neighbours, and what brings slices together.

    Args:
        name: What timm calls the network.
        network: From `(N, window, H, W)` to features.
        window, stride, pooling, checkpointing: As for `backbone`.
    """

    cam_layer = "together"

    def __init__(
        self, name: str, network: Any, window: int, stride: int, pooling: Pooling, checkpointing: bool
    ) -> None:
        super().__init__()
        self.name, self.network, self.window, self.stride = name, network, window, stride
        self.checkpointing = checkpointing
        shadow = self._shadow()
        blank = torch.zeros(1, window, *network.default_cfg["input_size"][1:], device="meta")
        learnt = [values for values in shadow.parameters() if values.requires_grad]
        try:
            self.in_tokens = getattr(shadow.forward_features(blank), "ndim", None) != 4
            with torch.enable_grad():
                seen = self._seen(shadow, blank)
                reached = torch.autograd.grad(seen.sum(), learnt, allow_unused=True)
        except Exception as error:  # networks of timm differ in many ways
            raise ValueError(f"timm/{name} gives no features that lie on a slice ({error}); take another") from error
        used = [values for values in network.parameters() if values.requires_grad]
        for values, gradient in zip(used, reached, strict=True):
            values.requires_grad_(gradient is not None)  # what only its classifier needs learns nothing
        self.out_channels = int(seen.shape[1])
        together = {"attention": Attention, "transformer": Transformer}.get(pooling)
        self.together = together(self.out_channels) if together else nn.Identity()
        try:
            self.train()
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"timm/{name} has no gradient checkpointing; take checkpointing=false") from error

    def train(self, mode: bool = True) -> "Slices":
        """As of any module. Checkpointing is for training only, so that explanations meet each layer once."""
        if self.checkpointing:
            self.network.set_grad_checkpointing(mode)
        return super().train(mode)

    def forward(self, grid: Tensor) -> Tensor:
        """Features `(B, C, d, h, w)` of a grid `(B, 1, D, H, W)`.

        Raises:
            PluginError: Its slices have a size that the network cannot take.
        """
        batch, _, depth, height, width = grid.shape
        count = -(-depth // self.stride)
        middles = (2 * torch.arange(count, device=grid.device) + 1) * depth // (2 * count)
        reach = torch.arange(self.window, device=grid.device) - self.window // 2
        beside = (middles[:, None] + reach).clamp(0, depth - 1)
        slices = grid[:, 0, beside].reshape(batch * count, self.window, height, width)
        try:
            seen = self._seen(self.network, slices)
        except (RuntimeError, AssertionError) as error:
            self._refuse(height, width, error)
            raise  # of another cause, such as memory
        found: Tensor = self.together(seen.reshape(batch, count, *seen.shape[1:]).transpose(1, 2))
        return found

    def _shadow(self) -> Any:
        """The 2D network without its numbers: shapes are all that it computes."""
        return copy.deepcopy(self.network).to("meta").eval()

    def _seen(self, network: Any, slices: Tensor) -> Tensor:
        """Features `(N, C, h, w)` of slices `(N, window, H, W)`, whatever form the network has for them."""
        seen: Tensor
        if self.in_tokens:  # of which some may stand for no place
            (seen,) = network.forward_intermediates(slices, indices=1, norm=True, intermediates_only=True)
            return seen
        seen = network.forward_features(slices)
        return seen.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else seen

    def _refuse(self, height: int, width: int, error: Exception) -> None:
        """Refuses slices that the network cannot take, and tells which it can.

        Raises:
            PluginError: It cannot take them.
        """
        shadow = self._shadow()

        def takes(height: int, width: int) -> bool:
            try:
                return all(self._seen(shadow, torch.zeros(1, self.window, height, width, device="meta")).shape)
            except (RuntimeError, AssertionError):
                return False

        if takes(height, width):
            return
        least, above = (
            next((f"{side} x {side}" for side in range(first, first + 512, 16) if takes(side, side)), "not found")
            for first in (16, -(-max(height, width) // 16) * 16)
        )
        raise PluginError(
            f"timm/{self.name} cannot take slices of {height} x {width} cells ({error}). Of square ones, tried in "
            f"steps of 16, it takes {least} at least; the next that are as large as these are {above}. Change the "
            "grid's shape, or take another network."
        ) from error


class Attention(nn.Module):
    """Weighs slices by a score of each, so that the mean over d becomes a weighted one.

    Source: Ilse et al., ICML 2018 (arXiv 1802.04712).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(channels, max(channels // 4, 8)), nn.Tanh())
        self.weight = nn.Linear(max(channels // 4, 8), 1, bias=False)  # a bias would not change a softmax

    def forward(self, features: Tensor) -> Tensor:
        """Weighed features `(B, C, d, h, w)` of features `(B, C, d, h, w)`."""
        weights: Tensor = self.weight(self.score(features.mean((3, 4)).transpose(1, 2))).softmax(1)
        return features * (weights * features.shape[2]).transpose(1, 2)[..., None, None]


class Transformer(nn.Module):
    """One transformer layer over slices, whose answer is added to every cell of a slice.

    That of torch goes another way, with other rounding, where no gradient is asked for; this goes one way only.

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
        """Features `(B, C, d, h, w)`, each slice knowing of the others, of features `(B, C, d, h, w)`."""
        tokens = features.mean((3, 4)).transpose(1, 2)
        depth, channels = tokens.shape[1:]
        normal = self.before(tokens + _positions(depth, channels).to(tokens))
        query, key, value = self.asks(normal).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        mixed: Tensor = self.answers(attended)
        mixed = mixed + self.mix(self.between(tokens + mixed))
        return features + mixed.transpose(1, 2)[..., None, None]


def _positions(depth: int, channels: int) -> Tensor:
    """Sines and cosines of where a slice is, `(d, C)`."""
    angles = torch.arange(depth)[:, None] / 10000 ** (torch.arange(channels)[None] // 2 * 2 / channels)
    return torch.where(torch.arange(channels) % 2 == 0, angles.sin(), angles.cos())
