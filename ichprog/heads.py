"""The built-in heads.

A head plugin is a function `build(in_channels, labels, **options)` that returns a `torch.nn.Module`. The module must
provide:

- `forward(features)`: features `(B, C, d, h, w)` to logits `(B, K)`, with C equal to `in_channels`. The head chooses K.
- `probabilities(logits)`: logits `(B, K)` to label probabilities `(B, len(labels))` that are not negative and sum to 1.
- `loss(logits, target)`: the mean loss of the batch, a scalar. `target` `(B,)` holds the indices of the true labels.

The module may provide `rescale_(scale, shift)`. It changes the head in place so that its logits become
`scale * logits + shift`, with a positive number `scale` and `shift` `(K,)`. Training recalibrates probabilities with it
and leaves a head without this method unchanged.

A dense head also answers voxel by voxel, for a task with a `mask` in its spec. Its `build` takes `regions`, the names
of the R regions, and its module provides in addition:

- `dense(features)`: features to `DenseLogits`.
- `pool(dense)`: `DenseLogits` to the logits `(B, K)`. `forward(features)` equals `pool(dense(features))`.
- `dense_loss(dense, target)`: the loss over voxels, slices and regions, a scalar. `target` `(B, R, D, H, W)` holds the
  fraction of each cell of the grid that lies in each region. NaN is an unknown cell. -1 is an unknown cell of a slice
  that is known to hold a region.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ichprog.errors import InvalidValueError

Pool = Literal["average", "max", "both"]


class DenseLogits(NamedTuple):
    """The logits of a dense head.

    Attributes:
        voxels: `(B, R + 1, d, h, w)` over the extent of the grid, at any resolution. Their softmax over the second axis
            gives the probability of no region, then of each region.
        slices: `(B, d)`, the log odds that a slice holds a region.
        regions: `(B, R)`, the log odds that the scan holds each region.
    """

    voxels: Tensor
    slices: Tensor
    regions: Tensor


class _Pooled(nn.Module):
    """Pool features over space and apply one linear layer, or two with `hidden` units between them."""

    def __init__(self, in_channels: int, outputs: int, pool: Pool, activation: bool, hidden: int = 0) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise InvalidValueError("pool", pool, "'average', 'max' or 'both'")
        if hidden < 0:
            raise InvalidValueError("hidden", hidden, "a whole number of 0 or more")
        self.pool, self.activation = pool, activation
        self.relu = nn.ReLU()  # a module, because saliency methods replace modules of this type
        pooled = 2 * in_channels if pool == "both" else in_channels
        self.hidden = nn.Sequential(nn.Linear(pooled, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.linear = nn.Linear(hidden or pooled, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs `(B, outputs)` of the linear layer for features `(B, C, d, h, w)`."""
        if self.activation:
            features = self.relu(features)
        pooled = []
        if self.pool != "max":
            pooled.append(features.mean((2, 3, 4)))
        if self.pool != "average":
            pooled.append(features.amax((2, 3, 4)))
        outputs: Tensor = self.linear(self.hidden(torch.cat(pooled, dim=1)))
        return outputs


class _PooledLinear(_Pooled):
    """Use the outputs of the linear layer as logits `(B, K)`, which makes them easy to rescale."""

    @torch.no_grad()
    def rescale_(self, scale: Tensor, shift: Tensor) -> None:
        """Change the logits in place to `scale * logits + shift`.

        Args:
            scale: Positive factor.
            shift: Offsets `(K,)`.
        """
        self.linear.weight.mul_(scale)
        self.linear.bias.mul_(scale).add_(shift)


class _Ordered(nn.Module):
    """Read logit k as the log odds of P(label > k); K is the number of labels minus 1."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return label probabilities `(B, K + 1)` for logits `(B, K)`.

        P(label > k) is made monotone by its running minimum before it is differenced, so that no probability is
        negative.
        """
        # The running minimum is computed column by column because ONNX has no operator for it.
        beyond = torch.stack(list(accumulate(logits.sigmoid().unbind(dim=1), torch.minimum)), dim=1)
        one = torch.ones_like(beyond[:, :1])
        return torch.cat([one, beyond], dim=1) - torch.cat([beyond, torch.zeros_like(one)], dim=1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over all P(label > k), for `target` `(B,)` of label indices."""
        steps = torch.arange(logits.shape[1], device=logits.device)
        return functional.binary_cross_entropy_with_logits(logits, (target[:, None] > steps).to(logits.dtype))


class Ordinal(_Ordered, _PooledLinear):
    """Predict ordered labels. Logit k is the log odds of P(label > k); K is the number of labels minus 1."""


class DenseLossWeights(NamedTuple):
    """Weights of the terms of `Segmentation.dense_loss`.

    Attributes:
        cells: Mean cross-entropy over cells. It is small, because few cells lie in a region.
        dice: One minus the soft Dice coefficient.
        kinds: Cross-entropy between regions.
        slices: Cross-entropy over slices.
        regions: Cross-entropy over the regions of grids.
    """

    cells: float = 50.0
    dice: float = 0.5
    kinds: float = 0.1
    slices: float = 0.7
    regions: float = 0.2


class Segmentation(_Ordered):
    """Predict regions voxel by voxel, and ordered labels from the slices with the most evidence of a region.

    The evidence of a voxel is the log odds that the voxel lies in any region. A slice has the mean of its highest
    evidence, and a scan has the mean of its two highest slices. The evidence of one region is the log odds that the
    voxel lies in this region, averaged in the same way. Each of the three means is scaled and shifted.
    """

    _PRIOR_LOG_ODDS = 5.0  # of a cell in no region, before training; regions are rare
    _EMPTY_DICE = 10.0  # cells; a batch without regions must not dominate the loss

    def __init__(self, in_channels: int, labels: int, regions: int, top_share: float) -> None:
        super().__init__()
        self.top_share = top_share
        self.loss_weights = DenseLossWeights()
        self.voxels = nn.Conv3d(in_channels, regions + 1, 1)
        with torch.no_grad():
            self.voxels.bias[0] += self._PRIOR_LOG_ODDS  # type: ignore[index]
        self.slice_scale = nn.Parameter(torch.ones(()))
        self.slice_shift = nn.Parameter(torch.zeros(()))
        self.region_scale = nn.Parameter(torch.ones(regions))
        self.region_shift = nn.Parameter(torch.zeros(regions))
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(labels - 1))

    def dense(self, features: Tensor) -> DenseLogits:
        """Return the logits of voxels, slices and regions for features `(B, C, d, h, w)`."""
        voxels = self.voxels(features)
        slices = self._highest_in_slices(voxels[:, 1:].logsumexp(1) - voxels[:, 0])
        number = voxels.shape[1]
        others = [[k for k in range(number) if k != region] for region in range(1, number)]
        evidence = [voxels[:, k] - voxels[:, others[k - 1]].logsumexp(1) for k in range(1, number)]
        regions = torch.stack([_two_highest(self._highest_in_slices(each)) for each in evidence], dim=1)
        return DenseLogits(
            voxels, self.slice_scale * slices + self.slice_shift, self.region_scale * regions + self.region_shift
        )

    def _highest_in_slices(self, evidence: Tensor) -> Tensor:
        """Return the mean of the highest evidence `(B, d)` in each slice of `(B, d, h, w)`."""
        flat = evidence.flatten(2)
        return flat.topk(max(1, round(self.top_share * flat.shape[2])), dim=2).values.mean(2)

    def pool(self, dense: DenseLogits) -> Tensor:
        """Return the logits `(B, K)` of the labels."""
        return self.scale * _two_highest(dense.slices)[:, None] + self.shift

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits `(B, K)` of the labels for features `(B, C, d, h, w)`."""
        return self.pool(self.dense(features))

    @torch.no_grad()
    def rescale_(self, scale: Tensor, shift: Tensor) -> None:
        """Change the logits of the labels in place to `scale * logits + shift`.

        Args:
            scale: Positive factor.
            shift: Offsets `(K,)`.
        """
        self.scale.mul_(scale)
        self.shift.mul_(scale).add_(shift)

    def dense_loss(self, dense: DenseLogits, target: Tensor) -> Tensor:
        """Return the loss over voxels, slices and regions.

        The loss is the sum of five terms with `loss_weights`. Three are over known cells: the mean binary cross-entropy
        of any region, one minus the soft Dice coefficient of all regions together (mean over grids), and the
        cross-entropy between the regions where there is one, in which each region has the same weight. The other two
        are the mean binary cross-entropies over known slices, and over the regions of known grids. A slice holds a
        region if the regions fill at least half of one of its cells, and holds none if they fill at most a twentieth
        of each. The same rule applies to one region and a grid.

        Args:
            dense: The logits.
            target: `(B, R, D, H, W)` fraction of each cell in each region; NaN and -1 as in the contract.
        """
        voxels = dense.voxels.float()
        if voxels.shape[2:] != target.shape[2:]:
            voxels = functional.interpolate(voxels, target.shape[2:], mode="trilinear")
        known = (target >= 0).all(1)  # false for NaN
        inside = torch.where(known[:, None], target, 0)
        filled = inside.sum(1)
        # Whether there is a region is learned apart from which one it is: small regions then give a clear gradient.
        evidence = voxels[:, 1:].logsumexp(1) - voxels[:, 0]
        entropy = _known_cross_entropy(evidence, filled, known)
        probability = evidence.sigmoid() * known
        overlap, size = (probability * filled).sum((1, 2, 3)), (probability + filled).sum((1, 2, 3))
        dice = (2 * overlap + self._EMPTY_DICE) / (size + self._EMPTY_DICE)  # of each grid: small regions count too
        kinds = _balanced_cross_entropy(voxels[:, 1:], inside)
        slices, regions = self._slice_loss(dense.slices.float(), target, known), _region_loss(dense.regions, target)
        terms = (entropy, (1 - dice).mean(), kinds, slices, regions)
        return torch.stack([weight * term for weight, term in zip(self.loss_weights, terms, strict=True)]).sum()

    def _slice_loss(self, slices: Tensor, target: Tensor, known: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over slices that are known to hold a region or to hold none."""
        if slices.shape[1] != target.shape[2]:
            slices = functional.interpolate(slices[:, None], target.shape[2], mode="linear")[:, 0]
        filled = torch.where(known, target.clamp(min=0).sum(1), 0).amax((2, 3))
        holds = (filled >= 0.5) | ((target[:, 0] == -1).float().mean((2, 3)) > 0.8)
        holds_none = known.all(3).all(2) & (filled <= 0.05)
        return _known_cross_entropy(slices, holds, holds | holds_none)


def _region_loss(regions: Tensor, target: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over regions that a wholly known grid is known to hold or to lack."""
    filled = target.amax((2, 3, 4))
    holds, holds_none = filled >= 0.5, filled <= 0.05
    known = (target >= 0).flatten(1).all(1)[:, None]
    return _known_cross_entropy(regions.float(), holds, known & (holds | holds_none))


def _balanced_cross_entropy(logits: Tensor, inside: Tensor) -> Tensor:
    """Return the cross-entropy between regions inside them, averaged over each region and then over regions."""
    size = inside.sum((0, 2, 3, 4))
    weight = size / (size + 1)  # a region of a fraction of a cell must not count like the others
    entropy = -(inside * logits.log_softmax(1)).sum((0, 2, 3, 4)) / (size + 1)
    return entropy.sum() / weight.sum().clamp(min=1)


def _known_cross_entropy(logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over what is known, 0 if nothing is."""
    loss = functional.binary_cross_entropy_with_logits(logits, truth.to(logits), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def _two_highest(slices: Tensor) -> Tensor:
    """Return the mean of the two highest values `(B,)` of `(B, d)`."""
    return slices.topk(min(2, slices.shape[1]), dim=1).values.mean(1)


class Softmax(_PooledLinear):
    """Predict unordered labels, with one logit for each."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return label probabilities `(B, K)` for logits `(B, K)`."""
        return logits.softmax(dim=1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy, for `target` `(B,)` of label indices."""
        return functional.cross_entropy(logits, target)


class ProportionalOdds(_Pooled):
    """Predict ordered labels from one score per patient. Logit k is score - threshold k, the log odds of P(label > k).

    The number of thresholds is the number of labels minus 1. They are shared by all patients. Each threshold is the
    previous one plus a positive step, so that the logits decrease with k. The first threshold is 0, because the score
    has its own intercept.
    """

    # There is no `rescale_`: a separate shift for each logit could change the order of the thresholds.

    def __init__(self, in_channels: int, labels: int, pool: Pool, activation: bool) -> None:
        super().__init__(in_channels, 1, pool, activation)
        # Initially a score without features gives all labels the same probability.
        even = torch.logit(torch.arange(1, labels) / labels)
        self.steps = nn.Parameter(even.diff().expm1().log())  # each step is the softplus of a parameter
        nn.init.constant_(self.linear.bias, -float(even[0]))

    @property
    def thresholds(self) -> Tensor:
        """Return the thresholds `(labels - 1,)` of the score, in increasing order from 0."""
        return functional.pad(functional.softplus(self.steps).cumsum(0), (1, 0))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(B, labels - 1)` for features `(B, C, d, h, w)`."""
        return super().forward(features) - self.thresholds

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return label probabilities `(B, labels)` for logits `(B, labels - 1)`."""
        return self._log_probabilities(logits).exp()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean negative log likelihood, for `target` `(B,)` of label indices."""
        return functional.nll_loss(self._log_probabilities(logits), target)

    @staticmethod
    def _log_probabilities(logits: Tensor) -> Tensor:
        # P(label > k - 1) - P(label > k) as a product keeps its precision if both are close to 0 or close to 1:
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))
        before, after = logits[:, :-1], logits[:, 1:]
        within = functional.logsigmoid(before) + functional.logsigmoid(-after) + _log_one_minus_exp(after - before)
        first, last = functional.logsigmoid(-logits[:, :1]), functional.logsigmoid(logits[:, -1:])
        return torch.cat([first, within, last], dim=1)


class IntervalRegression(_PooledLinear):
    """Predict a normally distributed quantity that is known only as an interval. Labels are the ordered intervals.

    The two logits of a patient are the mean and the log of the standard deviation (above its minimum). Both are in
    units of half the range of the edges, centred at the middle of the range. Logits of 0 therefore spread over all
    intervals, in any unit of the quantity.
    """

    # Limits of the standard deviation in these units: at 0 and at infinity there is no gradient.
    _MIN_SD, _MAX_LOG_SD = 1e-3, 10.0

    def __init__(self, in_channels: int, edges: Sequence[float], pool: Pool, activation: bool) -> None:
        super().__init__(in_channels, 2, pool, activation)
        self.middle = (edges[0] + edges[-1]) / 2
        # Negative for decreasing edges: in these units the edges always increase with the labels.
        self.unit = (edges[-1] - edges[0]) / 2 or 1.0
        self.edges = [(edge - self.middle) / self.unit for edge in edges]

    def estimate(self, logits: Tensor) -> Tensor:
        """Return the mean and standard deviation `(B, 2)` of the quantity in its own unit, for logits `(B, 2)`.

        Raises:
            InvalidValueError: The head has two labels. One edge determines the mean only in standard deviations.
        """
        if len(self.edges) < 2:
            raise InvalidValueError("number of labels", 2, "three or more", "One edge has no scale to estimate with.")
        mean, sd = self._normal(logits)
        return torch.cat([self.middle + self.unit * mean, abs(self.unit) * sd], dim=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return label probabilities `(B, labels)` for logits `(B, 2)`."""
        edges = self._standardised_edges(logits) * math.sqrt(0.5)
        below, above = torch.erfc(-edges) / 2, torch.erfc(edges) / 2
        # The difference of the two smaller tails keeps its precision.
        within = torch.where(
            edges[:, :-1] + edges[:, 1:] > 0, above[:, :-1] - above[:, 1:], below[:, 1:] - below[:, :-1]
        )
        return torch.cat([below[:, :1], within.clamp(min=0), above[:, -1:]], dim=1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean negative log likelihood, for `target` `(B,)` of label indices."""
        # The gradient in a far tail is a difference of large numbers and needs float64, which some devices lack.
        edges = self._standardised_edges(logits.to("cpu", torch.float64))
        low, high = edges[:, :-1], edges[:, 1:]
        # An interval above the mean is mirrored below the mean, where its log probability keeps its precision.
        above = low + high > 0
        low, high = torch.where(above, -high, low), torch.where(above, -low, high)
        upto_low, upto_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        within = upto_high + _log_one_minus_exp(upto_low - upto_high)
        first, last = torch.special.log_ndtr(edges[:, :1]), torch.special.log_ndtr(-edges[:, -1:])
        return functional.nll_loss(torch.cat([first, within, last], dim=1), target.cpu()).to(logits)

    def _normal(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, `(B, 1)` each, in units of the edges."""
        return logits[:, :1], self._MIN_SD + logits[:, 1:].clamp(max=self._MAX_LOG_SD).exp()

    def _standardised_edges(self, logits: Tensor) -> Tensor:
        """Return the distance `(B, labels - 1)` of each edge above the mean in standard deviations."""
        mean, sd = self._normal(logits)
        return (logits.new_tensor(self.edges) - mean) / sd


def _log_one_minus_exp(values: Tensor) -> Tensor:
    """Return log(1 - exp(values)) for negative values; values rounded to 0 count as the largest negative number."""
    return (-values.clamp(max=-torch.finfo(values.dtype).tiny).expm1()).log()


def ordinal(
    in_channels: int, labels: Sequence[str], *, pool: Pool = "average", activation: bool = True, hidden: int = 0
) -> Ordinal:
    """Build a head for ordered labels. For two labels it equals binary logistic regression.

    Args:
        in_channels: C of the features.
        labels: The ordered labels.
        pool: Pooling over space: "average", which small lesions hardly change; "max", which ignores the size of a
            lesion; or "both", concatenated.
        activation: Whether a ReLU precedes the pooling.
        hidden: Number of units of a second layer after the pooling, or 0 for none.

    Examples:
        >>> head = ordinal(8, ["good", "moderate", "poor"])
        >>> head.probabilities(head(torch.zeros(2, 8, 1, 3, 3))).shape
        torch.Size([2, 3])

    Source: Cobo et al. 2024; the label coding is that of Cheng et al. 2008 (arXiv 0704.1028).
    """
    return Ordinal(in_channels, len(labels) - 1, pool, activation, hidden)


def segmentation(
    in_channels: int, labels: Sequence[str], *, regions: Sequence[str] = ("region",), top_share: float = 0.00125
) -> Segmentation:
    """Build a dense head: regions voxel by voxel, and ordered labels of the scan.

    The features need the resolution at which regions are wanted, such as those of `unet`.

    Args:
        in_channels: C of the features.
        labels: The ordered labels of the scan, such as "absent" and "present".
        regions: Names of the regions.
        top_share: Share of the cells of a slice whose evidence is averaged, at least one cell.

    Raises:
        InvalidValueError: `top_share` is not between 0 and 1.

    Examples:
        >>> head = segmentation(8, ["absent", "present"], regions=["parenchymal", "ventricular"])
        >>> dense = head.dense(torch.zeros(1, 8, 4, 16, 16))
        >>> dense.voxels.shape, dense.slices.shape, head.pool(dense).shape
        (torch.Size([1, 3, 4, 16, 16]), torch.Size([1, 4]), torch.Size([1, 1]))

    Source: this project; the soft Dice loss is that of Milletari et al., 3DV 2016 (arXiv 1606.04797).
    """
    if not 0 < top_share <= 1:
        raise InvalidValueError("top_share", top_share, "a number above 0 and up to 1")
    return Segmentation(in_channels, len(labels), len(regions), top_share)


def softmax(in_channels: int, labels: Sequence[str], *, pool: Pool = "average", activation: bool = True) -> Softmax:
    """Build a head for unordered labels.

    Args:
        in_channels: C of the features.
        labels: The labels.
        pool: Pooling over space: "average", which small lesions hardly change; "max", which ignores the size of a
            lesion; or "both", concatenated.
        activation: Whether a ReLU precedes the pooling.

    Examples:
        >>> head = softmax(8, ["good", "moderate", "poor"])
        >>> head.probabilities(head(torch.zeros(2, 8, 1, 3, 3))).shape
        torch.Size([2, 3])
    """
    return Softmax(in_channels, len(labels), pool, activation)


def proportional_odds(
    in_channels: int, labels: Sequence[str], *, pool: Pool = "average", activation: bool = True
) -> ProportionalOdds:
    """Build a proportional odds head for ordered labels, such as the modified Rankin Scale.

    One score determines all labels: a change of the score multiplies the odds of P(label > k) by the same factor for
    every k. `ordinal` learns one direction in the features for each step of the scale, this head one for all steps. It
    has fewer parameters and suits a long scale with few patients per label. For two labels it equals binary logistic
    regression.

    Args:
        in_channels: C of the features.
        labels: The ordered labels.
        pool: Pooling over space, as for `ordinal`.
        activation: Whether a ReLU precedes the pooling.

    Examples:
        >>> head = proportional_odds(8, ["good", "moderate", "poor"])
        >>> head.probabilities(head(torch.zeros(2, 8, 1, 3, 3))).shape
        torch.Size([2, 3])

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
    """Build a head for a continuous quantity, such as an age in years, that is known only as an interval.

    The labels are the ordered intervals; the first and the last are unbounded. Given the features, the quantity is
    assumed to be normal. Its mean and the log of its standard deviation are linear in the features;
    `IntervalRegression.estimate` returns both.

    Args:
        in_channels: C of the features.
        labels: The ordered intervals.
        edges: Boundaries between neighbouring intervals, in the unit of the quantity; one fewer than labels. They
            increase, or decrease if low numbers are the later labels, like the `bin_edges` of the task's target. By
            default the labels are the whole numbers 0, 1, 2, ... with edges halfway between them.
        pool: Pooling over space, as for `ordinal`.
        activation: Whether a ReLU precedes the pooling.

    Raises:
        InvalidValueError: The number of edges is wrong, or they are not finite and strictly ordered.

    Examples:
        >>> head = interval_regression(8, ["<60", "60-79", ">=80"], edges=[60, 80])
        >>> head.estimate(torch.zeros(1, 2)).shape
        torch.Size([1, 2])

    Source: Stewart, "On least squares estimation when the dependent variable is grouped", Review of Economic Studies
    1983, 50, 737-753, for the likelihood; here the standard deviation depends on the features as well.
    """
    number = len(labels) - 1
    given = [k + 0.5 for k in range(number)] if edges is None else [float(edge) for edge in edges]
    steps = [after - before for before, after in pairwise(given)]
    ordered = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    if len(given) != number or not ordered or not all(map(math.isfinite, given)):
        raise InvalidValueError(
            "edges", given, f"{number} increasing or decreasing numbers for {len(labels)} labels",
            "Use the `bin_edges` of the task's target.",
        )  # fmt: skip
    return IntervalRegression(in_channels, given, pool, activation)
