"""The built-in heads.

A head plugin is a function `build(in_channels, labels, **options)` that returns a module which turns features
`(B, C, d, h, w)` into logits `(B, K)` and has two methods: `probabilities(logits)`, `(B, K)` to `(B, len(labels))`
adding to one, and `loss(logits, target)`, a scalar, with `target` the `(B,)` index of the true label. `loss` is a mean
over the batch.

A head may have a third, `rescale_(scale, shift)`, after which its logits are scale x logits + shift, with `scale` a
positive number and `shift` `(K,)`. Training sets probabilities right by it; a head without it is left as it is.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Pool = Literal["average", "max", "both"]


class _PooledLinear(nn.Module):
    """Features pooled over space, then one linear layer."""

    def __init__(self, in_channels: int, outputs: int, pool: Pool, activation: bool) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {get_args(Pool)}, is {pool!r}")
        self.pool, self.activation = pool, activation
        self.linear = nn.Linear(2 * in_channels if pool == "both" else in_channels, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(B, K)` of features `(B, C, d, h, w)`."""
        if self.activation:
            features = functional.relu(features)
        pooled = []
        if self.pool != "max":
            pooled.append(features.mean((2, 3, 4)))
        if self.pool != "average":
            pooled.append(features.amax((2, 3, 4)))
        logits: Tensor = self.linear(torch.cat(pooled, dim=1))
        return logits

    @torch.no_grad()
    def rescale_(self, scale: Tensor, shift: Tensor) -> None:
        """Makes the logits `scale` times what they were, plus `shift` `(K,)`."""
        self.linear.weight.mul_(scale)
        self.linear.bias.mul_(scale).add_(shift)


class Ordinal(_PooledLinear):
    """Labels in order: logit k is that of P(label > k), and there is one fewer than labels."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Label probabilities `(B, K + 1)` of logits `(B, K)`.

        P(label > k) is made to fall with k by its running minimum before the differences are taken, so that no
        probability is negative.
        """
        # The running minimum column by column, as ONNX has no operator for it.
        beyond = torch.stack(list(accumulate(logits.sigmoid().unbind(dim=1), torch.minimum)), dim=1)
        one = torch.ones_like(beyond[:, :1])
        return torch.cat([one, beyond], dim=1) - torch.cat([beyond, torch.zeros_like(one)], dim=1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean binary cross-entropy of every P(label > k), for `target` `(B,)` of label indices."""
        steps = torch.arange(logits.shape[1], device=logits.device)
        return functional.binary_cross_entropy_with_logits(logits, (target[:, None] > steps).to(logits.dtype))


class Softmax(_PooledLinear):
    """Labels without order: one logit each."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Label probabilities `(B, K)` of logits `(B, K)`."""
        return logits.softmax(dim=1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy, for `target` `(B,)` of label indices."""
        return functional.cross_entropy(logits, target)


def ordinal(in_channels: int, labels: Sequence[str], *, pool: Pool = "average", activation: bool = True) -> Ordinal:
    """A head for labels in order; for two labels it is the ordinary binary one.

    Args:
        in_channels: C of the features.
        labels: The labels in order.
        pool: How features are pooled over space: their "average", which small things hardly move; their "max", which
            does not tell how much there is; or "both", side by side.
        activation: Whether a ReLU comes before the pooling.

    Source: Cobo et al. 2024; the label coding is that of Cheng et al. 2008 (arXiv 0704.1028).
    """
    return Ordinal(in_channels, len(labels) - 1, pool, activation)


def softmax(in_channels: int, labels: Sequence[str], *, pool: Pool = "average", activation: bool = True) -> Softmax:
    """A head for labels without order.

    Args:
        in_channels: C of the features.
        labels: The labels.
        pool: How features are pooled over space: their "average", which small things hardly move; their "max", which
            does not tell how much there is; or "both", side by side.
        activation: Whether a ReLU comes before the pooling.
    """
    return Softmax(in_channels, len(labels), pool, activation)
