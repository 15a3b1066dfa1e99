"""The built-in fusions of the features of an image with clinical values.

A fusion plugin is a function `build(in_channels, values, **options)` that returns a `torch.nn.Module` for V values. The
module must provide `forward(features, values, known)`:

- `features`: `(B, C, d, h, w)`, with C equal to `in_channels`.
- `values`: `(B, V)` in units of the spec's `centre` and `scale`.
- `known`: `(B, V)`, 1 for a known value and 0 for a missing one. The result must not depend on a missing value.

It returns features of the same shape, which the heads of the tasks with `uses_clinical` get.
"""

import torch
from torch import Tensor, nn

from ichprog.errors import InvalidValueError


class Film(nn.Module):
    """Scale and shift each channel of the features by amounts that depend on the values."""

    def __init__(self, in_channels: int, values: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * values, hidden), nn.ReLU(), nn.Linear(hidden, 2 * in_channels))
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)  # before training, the features stay as they are

    def forward(self, features: Tensor, values: Tensor, known: Tensor) -> Tensor:
        """Return features `(B, C, d, h, w)`."""
        scale, shift = self.layers(_encode(values, known))[..., None, None, None].chunk(2, dim=1)
        result: Tensor = features * (1 + scale) + shift
        return result


class Concat(nn.Module):
    """Append the values to each cell of the features, and mix the channels by a convolution of one cell."""

    def __init__(self, in_channels: int, values: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(in_channels + 2 * values, in_channels, 1)
        with torch.no_grad():
            self.mix.weight[:, :in_channels, 0, 0, 0] += torch.eye(in_channels)

    def forward(self, features: Tensor, values: Tensor, known: Tensor) -> Tensor:
        """Return features `(B, C, d, h, w)`."""
        encoded = _encode(values, known)[..., None, None, None].expand(-1, -1, *features.shape[2:])
        mixed: Tensor = self.mix(torch.cat([features, encoded], dim=1))
        return mixed


def _encode(values: Tensor, known: Tensor) -> Tensor:
    """Return the values, 0 if missing, and which are known, `(B, 2 V)`."""
    return torch.cat([values * known, known], dim=1)


def film(in_channels: int, values: int, *, hidden: int = 16) -> Film:
    """Build a fusion that scales and shifts the channels of the features: feature-wise linear modulation.

    Args:
        in_channels: C of the features.
        values: Number of clinical values.
        hidden: Number of hidden units.

    Raises:
        InvalidValueError: `hidden` is less than 1.

    Examples:
        >>> fusion = film(8, 2)
        >>> fusion(torch.zeros(1, 8, 1, 3, 3), torch.zeros(1, 2), torch.zeros(1, 2)).shape
        torch.Size([1, 8, 1, 3, 3])

    Source: Perez et al., AAAI 2018 (arXiv 1709.07871).
    """
    if hidden < 1:
        raise InvalidValueError("hidden", hidden, "a whole number of 1 or more")
    return Film(in_channels, values, hidden)


def concat(in_channels: int, values: int) -> Concat:
    """Build a fusion that appends the values to each cell of the features.

    Args:
        in_channels: C of the features.
        values: Number of clinical values.

    Examples:
        >>> concat(8, 2)(torch.zeros(1, 8, 1, 3, 3), torch.zeros(1, 2), torch.zeros(1, 2)).shape
        torch.Size([1, 8, 1, 3, 3])
    """
    return Concat(in_channels, values)
