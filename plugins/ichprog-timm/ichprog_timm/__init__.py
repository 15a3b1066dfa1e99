"""Any network of timm as a 2.5D backbone of ichprog: a 2D network on slices, which are then weighted or mixed."""

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
    """Build a network of timm that runs on slices. The name "resnet18" builds the backbone `timm/resnet18`.

    The network maps a grid `(B, 1, D, H, W)` to features `(B, C, d, h, w)`. With `stride=1`, d is D, so Grad-CAM has
    the resolution of the grid along D.

    Args:
        name: A name of `timm.list_models()`, with a tag to select pretrained weights.
        window: Number of slices in one input, as channels: a slice and its neighbours. An odd number. The first and the
            last slice are repeated at the ends.
        stride: Distance between windows, in slices; d is D / `stride`, rounded up. Every slice is used if `stride` is
            at most `window`.
        pooling: How slices are combined: "attention" weights slices so that the mean over d is a weighted mean,
            "transformer" adds the output of a transformer layer over slices to each slice, "none" does neither.
        pretrained: Whether the 2D network starts from timm's weights. timm downloads them whenever the network is
            built. The spec of a trained model, which has all its weights, should say `false`.
        checkpointing: Whether training recomputes activations in the backward pass. Batch normalisation then sees each
            batch twice, and its running averages move faster.

    Raises:
        UnknownNameError: timm has no network of that name, or no weights of that tag.
        ValueError: An option has an invalid value, or the network does not support it.
        WeightsError: The pretrained weights cannot be downloaded.

    Source: Wightman, PyTorch Image Models (doi 10.5281/zenodo.4414861).
    """
    import timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise UnknownNameError("network of timm", name, timm.list_models())
    if tag and name not in (tagged := timm.list_pretrained(f"{plain}.*")):
        raise UnknownNameError("network of timm", name, [plain, *tagged])
    if type(window) is not int or window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window!r}; expected an odd number of at least 1")
    if type(stride) is not int or stride < 1:
        raise ValueError(f"stride is {stride!r}; expected a whole number of at least 1")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; expected one of: {', '.join(get_args(Pooling))}")
    for option, value in (("pretrained", pretrained), ("checkpointing", checkpointing)):
        if type(value) is not bool:  # the word "false" would count as true
            raise ValueError(f"{option} is {value!r}; expected true or false")
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained weights for {name}. Use pretrained=false")
    try:
        network = _create(name, in_chans=window, num_classes=0, pretrained=pretrained)
    except Exception as error:  # timm and what it calls raise many kinds
        if not pretrained:
            raise
        raise WeightsError(
            f"timm/{name}: its pretrained weights cannot be downloaded ({type(error).__name__}: {error}). Check the "
            "connection, the proxy and HF_ENDPOINT, or copy the cache of the Hub from another machine. With "
            '"pretrained": false nothing is downloaded. Use that for a trained model, which has all its weights (write '
            "it into its config.json), and to start from random weights."
        ) from error
    return Slices(name, network, window, stride, pooling, checkpointing)


def _create(name: str, **options: Any) -> Any:
    """Create a network of timm without a classifier, for slices of any size if the network supports that."""
    import timm

    any_size = {"dynamic_img_size": True, "global_pool": ""}
    # most networks have no fixed size and lack the first option; a few lack the pooling option too
    for extra in ({**any_size, "dynamic_img_pad": True}, any_size, {"global_pool": ""}):
        try:
            return timm.create_model(name, **extra, **options)
        except (TypeError, AssertionError):
            continue
    return timm.create_model(name, **options)


class Slices(nn.Module):
    """A 2D network on slices with their neighbours, and a module that combines the slices.

    Args:
        name: Name of the network in timm.
        network: Maps `(N, window, H, W)` to features.
        window, stride, pooling, checkpointing: As in `backbone`.
    """

    cam_layer = "combine"

    def __init__(
        self, name: str, network: Any, window: int, stride: int, pooling: Pooling, checkpointing: bool
    ) -> None:
        super().__init__()
        self.name, self.network, self.window, self.stride = name, network, window, stride
        self.checkpointing = checkpointing
        shadow = self._shadow()
        blank = torch.zeros(1, window, *network.default_cfg["input_size"][1:], device="meta")
        trainable = [values for values in shadow.parameters() if values.requires_grad]
        try:
            self.in_tokens = getattr(shadow.forward_features(blank), "ndim", None) != 4
            with torch.enable_grad():
                features = self._features(shadow, blank)
                gradients = torch.autograd.grad(features.sum(), trainable, allow_unused=True)
        except Exception as error:  # networks of timm differ in many ways
            raise ValueError(f"timm/{name} has no features on a slice ({error}). Use another network.") from error
        parameters = [values for values in network.parameters() if values.requires_grad]
        for values, gradient in zip(parameters, gradients, strict=True):
            values.requires_grad_(gradient is not None)  # parameters of the classifier are not trained
        self.out_channels = int(features.shape[1])
        combine = {"attention": Attention, "transformer": Transformer}.get(pooling)
        self.combine = combine(self.out_channels) if combine else nn.Identity()
        try:
            self.train()
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"timm/{name} has no gradient checkpointing. Use checkpointing=false.") from error

    def train(self, mode: bool = True) -> "Slices":
        """Set the mode. Checkpointing is on in training only, so that explanations run each layer once."""
        if self.checkpointing:
            self.network.set_grad_checkpointing(mode)
        return super().train(mode)

    def forward(self, grid: Tensor) -> Tensor:
        """Return features `(B, C, d, h, w)` of grids `(B, 1, D, H, W)`.

        Raises:
            PluginError: The network does not support the size of the slices.
        """
        batch, _, depth, height, width = grid.shape
        count = -(-depth // self.stride)
        centres = (2 * torch.arange(count, device=grid.device) + 1) * depth // (2 * count)
        reach = torch.arange(self.window, device=grid.device) - self.window // 2
        neighbours = (centres[:, None] + reach).clamp(0, depth - 1)
        slices = grid[:, 0, neighbours].reshape(batch * count, self.window, height, width)
        try:
            features = self._features(self.network, slices)
        except (RuntimeError, AssertionError) as error:
            self._refuse(height, width, error)
            raise  # another cause, such as memory
        combined: Tensor = self.combine(features.reshape(batch, count, *features.shape[1:]).transpose(1, 2))
        return combined

    def _shadow(self) -> Any:
        """Return the 2D network without weights, which computes shapes only."""
        return copy.deepcopy(self.network).to("meta").eval()

    def _features(self, network: Any, slices: Tensor) -> Tensor:
        """Return features `(N, C, h, w)` of slices `(N, window, H, W)` in a form common to all networks."""
        features: Tensor
        if self.in_tokens:  # some tokens may belong to no position
            (features,) = network.forward_intermediates(slices, indices=1, norm=True, intermediates_only=True)
            return features
        features = network.forward_features(slices)
        is_channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if is_channels_last else features

    def _refuse(self, height: int, width: int, error: Exception) -> None:
        """Refuse slices of an unsupported size and name supported sizes.

        Raises:
            PluginError: The network does not support the size.
        """
        shadow = self._shadow()

        def supports(height: int, width: int) -> bool:
            try:
                return all(self._features(shadow, torch.zeros(1, self.window, height, width, device="meta")).shape)
            except (RuntimeError, AssertionError):
                return False

        if supports(height, width):
            return
        least, above = (
            next((f"{side} x {side}" for side in range(first, first + 512, 16) if supports(side, side)), "not found")
            for first in (16, -(-max(height, width) // 16) * 16)
        )
        raise PluginError(
            f"timm/{self.name} does not support slices of {height} x {width} cells ({error}). The smallest supported "
            f"square slices, in steps of 16, are {least}; the next ones as large as these are {above}. Change the "
            "shape of the grid or use another network."
        ) from error


class Attention(nn.Module):
    """Weights each slice by a score, so that the mean over d becomes a weighted mean.

    Source: Ilse et al., ICML 2018 (arXiv 1802.04712).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(channels, max(channels // 4, 8)), nn.Tanh())
        self.weight = nn.Linear(max(channels // 4, 8), 1, bias=False)  # a softmax ignores a bias

    def forward(self, features: Tensor) -> Tensor:
        """Return weighted features `(B, C, d, h, w)` of features `(B, C, d, h, w)`."""
        weights: Tensor = self.weight(self.score(features.mean((3, 4)).transpose(1, 2))).softmax(1)
        return features * (weights * features.shape[2]).transpose(1, 2)[..., None, None]


class Transformer(nn.Module):
    """One transformer layer over slices, whose output is added to every cell of a slice.

    torch's own layer rounds differently if no gradient is needed. This layer always computes the same numbers.

    Source: Vaswani et al., NeurIPS 2017 (arXiv 1706.03762), with normalisation first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, 8)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_query_key_value = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.mix = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Return features `(B, C, d, h, w)` that combine all slices, of features `(B, C, d, h, w)`."""
        tokens = features.mean((3, 4)).transpose(1, 2)
        depth, channels = tokens.shape[1:]
        normal = self.norm1(tokens + _positions(depth, channels).to(tokens))
        query, key, value = self.to_query_key_value(normal).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        mixed: Tensor = self.project(attended)
        mixed = mixed + self.mix(self.norm2(tokens + mixed))
        return features + mixed.transpose(1, 2)[..., None, None]


def _positions(depth: int, channels: int) -> Tensor:
    """Return the sine and cosine encoding of the slice positions, `(d, C)`."""
    angles = torch.arange(depth)[:, None] / 10000 ** (torch.arange(channels)[None] // 2 * 2 / channels)
    return torch.where(torch.arange(channels) % 2 == 0, angles.sin(), angles.cos())
