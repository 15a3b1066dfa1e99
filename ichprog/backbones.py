"""The built-in backbones.

A backbone plugin is a function `build(**options)` that returns a `torch.nn.Module`. The module turns a grid
`(B, 1, D, H, W)` into features `(B, C, d, h, w)` and has two attributes: `out_channels`, which is C, and `cam_layer`,
the name of the submodule whose output is used for class activation maps.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ichprog.errors import InvalidValueError


class Backbone(nn.Module):
    """Wrap a stack of layers so that it fulfils the contract.

    Args:
        features: Layers from `(B, 1, D, H, W)` to `(B, C, d, h, w)`.
        out_channels: C.
        cam_layer: Name of the submodule for class activation maps, relative to this module.
    """

    def __init__(self, features: nn.Sequential, out_channels: int, cam_layer: str) -> None:
        super().__init__()
        self.features = features
        self.out_channels = out_channels
        self.cam_layer = cam_layer

    def forward(self, grid: Tensor) -> Tensor:
        """Return features `(B, C, d, h, w)` for a grid `(B, 1, D, H, W)`."""
        features: Tensor = self.features(grid)
        return features


def densenet121(*, dropout: float = 0.0) -> Backbone:
    """Build DenseNet121 in three dimensions without its classification layers. C is 1024.

    A grid of 40 x 301 x 301 becomes features of 1 x 9 x 9. 11.2 M parameters.

    Args:
        dropout: Dropout rate in the dense layers during training.

    Examples:
        >>> densenet121().out_channels
        1024

    Source: Huang et al., CVPR 2017 (arXiv 1608.06993), as implemented in MONAI; used by Cobo et al. 2024.
    """
    from monai.networks.nets import DenseNet121

    network = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1, dropout_prob=dropout)
    return Backbone(network.features, out_channels=1024, cam_layer="features.norm5")


def perez2023(*, dropout: float = 0.5) -> Backbone:
    """Build the four-layer convolutional network of Perez et al. 2023. C is 128.

    A grid of 40 x 301 x 301 becomes features of 1 x 33 x 33. 0.3 M parameters. Slices, rows and columns each need
    at least 38 cells.

    Args:
        dropout: Rate at which whole channels are dropped after the second layer during training.

    Examples:
        >>> perez2023().out_channels
        128

    Source: Perez et al. 2023, as reimplemented by Cobo et al. 2024 for their baseline.
    """
    features = nn.Sequential(
        nn.Conv3d(1, 16, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(16, 32, 3),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Dropout3d(dropout),
        nn.Conv3d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(64, 128, 3, bias=False),
        nn.ReLU(),
        nn.BatchNorm3d(128),
    )
    return Backbone(features, out_channels=128, cam_layer="features.12")


def compact(*, width: int = 16, dropout: float = 0.0, coordinates: bool = False, residual: bool = False) -> Backbone:
    """Build a small convolutional network for a small grid. C is 4 x `width`.

    A grid of 24 x 112 x 112 becomes features of 6 x 14 x 14. At a width of 16 it has 0.14 M parameters, with residual
    blocks 0.34 M.

    Args:
        width: Channels of the first layer; the other layers have two, three and four times as many.
        dropout: Rate at which whole channels of the features are dropped during training.
        coordinates: Whether the last layer also gets the position of each cell, -1 to 1 along each axis. Without it,
            features after pooling hardly depend on where in the brain something lies.
        residual: Whether a residual block follows each of the four layers. The first block convolves within slices
            only, the others also across slices.

    Examples:
        >>> compact(width=8).out_channels
        32

    Source: this project; for `coordinates` Liu et al., NeurIPS 2018 (arXiv 1807.03247); for `residual` He et al., CVPR
    2016 (arXiv 1512.03385).
    """
    channels = [1, width, 2 * width, 3 * width, 4 * width]
    strides = [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)]
    layers: list[nn.Module] = []
    for before, after, stride in zip(channels, channels[1:], strides, strict=False):
        positions = 3 if coordinates and after == channels[-1] else 0
        layers += [_Coordinates()] if positions else []
        layers += [nn.Conv3d(before + positions, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after), nn.ReLU()]
        layers += [_Residual(after, depth=1 if before == 1 else 3)] if residual else []
    features = nn.Sequential(*layers, nn.Dropout3d(dropout))
    last = len(layers) - (1 if residual else 2)
    return Backbone(features, out_channels=channels[-1], cam_layer=f"features.{last}")


class _Residual(nn.Module):
    """Add the output of a convolution to its input. A new block adds nothing until it is trained."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(channels, channels, (depth, 3, 3), padding=(depth // 2, 1, 1), bias=False)
        self.normalisation = nn.BatchNorm3d(channels)
        nn.init.zeros_(self.normalisation.weight)
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Return `(B, C, d, h, w)`, without negative values."""
        result: Tensor = self.activation(features + self.normalisation(self.convolution(features)))
        return result


class _Coordinates(nn.Module):
    """Append the position of each cell, -1 to 1 along each axis, as three channels."""

    def forward(self, features: Tensor) -> Tensor:
        """Return `(B, C + 3, d, h, w)` for features `(B, C, d, h, w)`."""
        size = features.shape[2:]
        axes = [torch.linspace(-1, 1, length, dtype=features.dtype, device=features.device) for length in size]
        position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return torch.cat([features, position.expand(len(features), -1, -1, -1, -1)], dim=1)


class _UNet(nn.Module):
    """Hold the layers of `unet`; the resolution changes within slices only."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        fine, middle, coarse, coarsest = widths
        self.encoder = nn.ModuleList(
            [
                nn.Sequential(_conv(1, fine, (1, 5, 5), 2), _conv(fine, fine, (1, 3, 3))),
                nn.Sequential(_conv(fine, middle, (1, 3, 3), 2), _conv(middle, middle, (3, 3, 3))),
                nn.Sequential(_conv(middle, coarse, (1, 3, 3), 2), _conv(coarse, coarse, (3, 3, 3))),
                nn.Sequential(_conv(coarse, coarsest, (3, 3, 3), 2), _conv(coarsest, coarsest, (3, 3, 3))),
            ]
        )
        steps = list(pairwise(reversed(widths)))
        self.lateral = nn.ModuleList(nn.Conv3d(before, after, 1) for before, after in steps)
        self.decoder = nn.ModuleList(_conv(after, after, (1, 3, 3)) for _, after in steps)

    def forward(self, grid: Tensor) -> Tensor:
        """Return features at half the resolution within slices for a grid `(B, 1, D, H, W)`."""
        levels = [self.encoder[0](grid)]
        for layer in self.encoder[1:]:
            levels.append(layer(levels[-1]))
        features: Tensor = levels.pop()
        for lateral, layer in zip(self.lateral, self.decoder, strict=True):
            skipped = levels.pop()
            features = layer(skipped + functional.interpolate(lateral(features), skipped.shape[2:], mode="nearest"))
        return features


def unet(*, widths: Sequence[int] = (16, 24, 40, 64), dropout: float = 0.0) -> Backbone:
    """Build a small U-Net for heads that answer voxel by voxel. C is the first of `widths`.

    A grid of 40 x 160 x 160 becomes features of 40 x 80 x 80: slices keep their number. 0.25 M parameters.

    Args:
        widths: Channels at half, a quarter, an eighth and a sixteenth of the resolution within slices.
        dropout: Rate at which whole channels of the features are dropped during training.

    Raises:
        InvalidValueError: There are not four widths.

    Examples:
        >>> unet(widths=(8, 8, 16, 16)).out_channels
        8

    Source: this project, after Ronneberger et al., MICCAI 2015 (arXiv 1505.04597), with sums instead of concatenation.
    """
    if len(widths) != 4:
        raise InvalidValueError("widths", list(widths), "four whole numbers")
    features = nn.Sequential(_UNet(widths), nn.Dropout3d(dropout))
    return Backbone(features, out_channels=widths[0], cam_layer="features.0.decoder.2")


def _conv(before: int, after: int, kernel: tuple[int, int, int], stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch normalisation and ReLU, whose stride applies within slices."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    convolution = nn.Conv3d(before, after, kernel, (1, stride, stride), padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(after), nn.ReLU())
