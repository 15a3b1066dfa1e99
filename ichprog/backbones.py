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

    Example:
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

    Example:
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


class _UNet(nn.Module):
    """Add a decoder to the layers of `compact`, which brings the features back to the resolution of the first layer.

    Args:
        encoder: Three layers that halve the resolution, and the layers at the lowest resolution.
        width: Channels of the first layer.
    """

    def __init__(self, encoder: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList([_conv(6 * width, 2 * width, (1, 1, 1)), _conv(3 * width, 2 * width, (1, 1, 1))])

    def forward(self, grid: Tensor) -> Tensor:
        """Return features `(B, 2 width, D, H / 2, W / 2)` for a grid `(B, 1, D, H, W)`."""
        fine = self.encoder[0](grid)
        middle = self.encoder[1](fine)
        features: Tensor = self.encoder[2](middle)
        for layer, skipped in zip(self.decoder, (middle, fine), strict=True):
            enlarged = functional.interpolate(features, skipped.shape[2:], mode="nearest")
            features = layer(torch.cat([enlarged, skipped], dim=1))
        return features


def compact(*, width: int = 16, dropout: float = 0.0, decoder: bool = False) -> Backbone:
    """Build a small convolutional network for a small grid. C is 4 x `width`, or 2 x `width` with a decoder.

    A grid of 24 x 112 x 112 becomes features of 6 x 14 x 14, or of 24 x 56 x 56 with a decoder. 0.14 M parameters at a
    width of 16, 0.20 M with a decoder.

    Args:
        width: Channels of the first layer; the other layers have two, three and four times as many.
        dropout: Rate at which whole channels of the features are dropped during training.
        decoder: Whether a U-Net decoder brings the features back to the resolution of the first layer, for heads that
            answer voxel by voxel.

    Example:
        >>> compact(width=8).out_channels
        32

    Source: this project; the decoder follows Ronneberger et al., MICCAI 2015 (arXiv 1505.04597).
    """
    channels = [1, width, 2 * width, 3 * width, 4 * width]
    strides = [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)]
    blocks = [_conv(*pair, stride) for pair, stride in zip(pairwise(channels), strides, strict=True)]
    if decoder:
        lowest = nn.Sequential(blocks[2], blocks[3])
        features = nn.Sequential(_UNet([blocks[0], blocks[1], lowest], width), nn.Dropout3d(dropout))
        return Backbone(features, out_channels=2 * width, cam_layer="features.0.decoder.1")
    layers = [layer for block in blocks for layer in block]
    return Backbone(nn.Sequential(*layers, nn.Dropout3d(dropout)), channels[-1], f"features.{len(layers) - 2}")


def _conv(before: int, after: int, stride: tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(before, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after), nn.ReLU())
