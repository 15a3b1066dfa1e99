"""The built-in heads.

A head plugin is a function `build(in_channels, labels, **options)` that returns a module which turns features
`(B, C, d, h, w)` into logits `(B, K)` and has two methods: `probabilities(logits)`, `(B, K)` to `(B, len(labels))`
adding to one, and `loss(logits, target)`, a scalar, with `target` the `(B,)` index of the true label. `loss` is a mean
over the batch.

A head may have a third, `rescale_(scale, shift)`, after which its logits are scale x logits + shift, with `scale` a
positive number and `shift` `(K,)`. Training sets probabilities right by it; a head without it is left as it is.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Pool = Literal["average", "max", "both"]


class _Pooled(nn.Module):
    """Features pooled over space, then one linear layer."""

    def __init__(self, in_channels: int, outputs: int, pool: Pool, activation: bool) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {get_args(Pool)}, is {pool!r}")
        self.pool, self.activation = pool, activation
        self.relu = nn.ReLU()  # a module, as methods that replace ReLUs look for it among modules
        self.linear = nn.Linear(2 * in_channels if pool == "both" else in_channels, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """The layer's outputs `(B, outputs)` of features `(B, C, d, h, w)`."""
        if self.activation:
            features = self.relu(features)
        pooled = []
        if self.pool != "max":
            pooled.append(features.mean((2, 3, 4)))
        if self.pool != "average":
            pooled.append(features.amax((2, 3, 4)))
        outputs: Tensor = self.linear(torch.cat(pooled, dim=1))
        return outputs


class _PooledLinear(_Pooled):
    """A head whose logits `(B, K)` are the linear layer's outputs, so that it can be made to scale and shift them."""

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


class ProportionalOdds(_Pooled):
    """Labels in order, by one score a patient: logit k, score - threshold k, is that of P(label > k).

    There is one fewer threshold than labels. They are the same for every patient and rise: each is the last one and a
    positive step, so that logits fall with k. The first is 0, as the score has an intercept of its own.
    """

    # No `rescale_`: shifts that are fitted to each logit alone may bring thresholds out of their order.

    def __init__(self, in_channels: int, labels: int, pool: Pool, activation: bool) -> None:
        super().__init__(in_channels, 1, pool, activation)
        # It starts where a score without any features gives every label the same probability.
        even = torch.logit(torch.arange(1, labels) / labels)
        self.steps = nn.Parameter(even.diff().expm1().log())  # the softplus of which is a step
        nn.init.constant_(self.linear.bias, -float(even[0]))

    @property
    def thresholds(self) -> Tensor:
        """The thresholds `(labels - 1,)` of the score, rising from 0."""
        return functional.pad(functional.softplus(self.steps).cumsum(0), (1, 0))

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(B, labels - 1)` of features `(B, C, d, h, w)`."""
        return super().forward(features) - self.thresholds

    def probabilities(self, logits: Tensor) -> Tensor:
        """Label probabilities `(B, labels)` of logits `(B, labels - 1)`."""
        return self._log_probabilities(logits).exp()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean negative log likelihood, for `target` `(B,)` of label indices."""
        return functional.nll_loss(self._log_probabilities(logits), target)

    @staticmethod
    def _log_probabilities(logits: Tensor) -> Tensor:
        # P(label > k - 1) - P(label > k) as a product, which loses nothing where both are nearly 0 or nearly 1:
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))
        before, after = logits[:, :-1], logits[:, 1:]
        within = functional.logsigmoid(before) + functional.logsigmoid(-after) + _log_one_minus_exp(after - before)
        first, last = functional.logsigmoid(-logits[:, :1]), functional.logsigmoid(logits[:, -1:])
        return torch.cat([first, within, last], dim=1)


class IntervalRegression(_PooledLinear):
    """A normally distributed quantity of which only the interval is known; labels are intervals in their order.

    The two logits of a patient say the distribution in the edges' own measure, which counts from the middle of the
    edges in halves of what they span: the mean, and the log of the standard deviation above its least. So logits of 0
    spread over all intervals, whatever the quantity's unit.
    """

    # Standard deviations in that measure. One of 0 would have no gradient, one beyond all numbers neither.
    _LEAST, _LOG_MOST = 1e-3, 10.0

    def __init__(self, in_channels: int, edges: Sequence[float], pool: Pool, activation: bool) -> None:
        super().__init__(in_channels, 2, pool, activation)
        self.middle = (edges[0] + edges[-1]) / 2
        # Negative where edges fall: in the edges' own measure they always rise with the labels.
        self.unit = (edges[-1] - edges[0]) / 2 or 1.0
        self.edges = [(edge - self.middle) / self.unit for edge in edges]

    def estimate(self, logits: Tensor) -> Tensor:
        """The quantity itself: mean and standard deviation `(B, 2)` in its own unit, of logits `(B, 2)`.

        Raises:
            ValueError: There are two labels. Of their one edge it can be learnt how many standard deviations away the
                mean is, but not how much that is.
        """
        if len(self.edges) < 2:
            raise ValueError("an estimate needs three labels or more; this head has two, whose one edge has no scale")
        mean, sd = self._normal(logits)
        return torch.cat([self.middle + self.unit * mean, abs(self.unit) * sd], dim=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Label probabilities `(B, labels)` of logits `(B, 2)`."""
        edges = self._standardised_edges(logits) * math.sqrt(0.5)
        below, above = torch.erfc(-edges) / 2, torch.erfc(edges) / 2
        # An interval's probability is the difference of the smaller tails, which keep their digits.
        within = torch.where(
            edges[:, :-1] + edges[:, 1:] > 0, above[:, :-1] - above[:, 1:], below[:, 1:] - below[:, :-1]
        )
        return torch.cat([below[:, :1], within.clamp(min=0), above[:, -1:]], dim=1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean negative log likelihood, for `target` `(B,)` of label indices."""
        # The slope of a far tail's log is a difference of large numbers: it needs digits that not every device has.
        edges = self._standardised_edges(logits.to("cpu", torch.float64))
        low, high = edges[:, :-1], edges[:, 1:]
        # An interval above the mean is as probable as its mirror image below it, where logs keep their digits.
        above = low + high > 0
        low, high = torch.where(above, -high, low), torch.where(above, -low, high)
        upto_low, upto_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        within = upto_high + _log_one_minus_exp(upto_low - upto_high)
        first, last = torch.special.log_ndtr(edges[:, :1]), torch.special.log_ndtr(-edges[:, -1:])
        return functional.nll_loss(torch.cat([first, within, last], dim=1), target.cpu()).to(logits)

    def _normal(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, `(B, 1)` each, in the edges' own measure."""
        return logits[:, :1], self._LEAST + logits[:, 1:].clamp(max=self._LOG_MOST).exp()

    def _standardised_edges(self, logits: Tensor) -> Tensor:
        """How many standard deviations each edge is above the mean, `(B, labels - 1)`."""
        mean, sd = self._normal(logits)
        return (logits.new_tensor(self.edges) - mean) / sd


def _log_one_minus_exp(values: Tensor) -> Tensor:
    """The log of 1 - exp(values), for negative values; what rounding has brought to 0 counts as the least below it."""
    return (-values.clamp(max=-torch.finfo(values.dtype).tiny).expm1()).log()


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


def proportional_odds(
    in_channels: int, labels: Sequence[str], *, pool: Pool = "average", activation: bool = True
) -> ProportionalOdds:
    """A head for labels in order that differ by one score, as the modified Rankin Scale does; for two, the binary one.

    What raises the odds of a label above 0 raises those of one above 1, 2, ... by the same factor. Where `ordinal`
    learns a direction in the features for each step of the scale, this learns one for all: fewer numbers, which a long
    scale with few patients a label can bear.

    Args:
        in_channels: C of the features.
        labels: The labels in order.
        pool: How features are pooled over space, as for `ordinal`.
        activation: Whether a ReLU comes before the pooling.

    Source: McCullagh, "Regression models for ordinal data", J R Stat Soc B 1980, 42, 109-142.
    """
    return ProportionalOdds(in_channels, len(labels), pool, activation)


def interval_regression(
    in_channels: int,
    labels: Sequence[str],
    *,
    edges: Sequence[float] | None = None,
    pool: Pool = "average",
    activation: bool = True,
) -> IntervalRegression:
    """A head for a continuous quantity, such as an age in years, that is known as the interval it lies in.

    The labels are intervals in their order, the first and the last without an end. The quantity is taken to be normal
    given the features, with mean and log standard deviation linear in them; `IntervalRegression.estimate` gives both.

    Args:
        in_channels: C of the features.
        labels: The intervals in order.
        edges: Where one interval ends and the next begins, in the quantity's unit: one fewer than labels, rising, or
            falling where low numbers are the later labels. They are the `cuts` of the task's target. Where not given,
            labels are taken for the whole numbers 0, 1, 2, ..., with edges halfway between.
        pool: How features are pooled over space, as for `ordinal`.
        activation: Whether a ReLU comes before the pooling.

    Raises:
        ValueError: The edges are no such numbers.

    Source: Stewart, "On least squares estimation when the dependent variable is grouped", Review of Economic Studies
    1983, 50, 737-753, for the likelihood; here the standard deviation depends on the features too.
    """
    number = len(labels) - 1
    given = [k + 0.5 for k in range(number)] if edges is None else [float(edge) for edge in edges]
    steps = [after - before for before, after in pairwise(given)]
    ordered = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    if len(given) != number or not ordered or not all(map(math.isfinite, given)):
        raise ValueError(
            f"{len(labels)} labels need {number} edges that rise or fall, such as the cuts of the task's target; given "
            f"are {given}"
        )
    return IntervalRegression(in_channels, given, pool, activation)
