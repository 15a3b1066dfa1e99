"""Losses: each task's mean loss over patients with a known label, their weighted sum, and recalibration of logits."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ichprog.networks import Network
from ichprog.spec import ModelSpec
from ichprog.train.protocol import Protocol


def label_weights(
    spec: ModelSpec, labels: Mapping[str, np.ndarray], part: np.ndarray, balance: str
) -> dict[str, Tensor]:
    """Return each label's weight in its task's loss, `(labels,)` by task.

    Args:
        spec: The model.
        labels: `(N,)` label indices for each task, -1 if unknown.
        part: Positions of the training patients.
        balance: "class_weights" weights labels inversely to their frequency, with mean 1; otherwise all weights are 1.
    """
    weights = {}
    for task in spec.tasks:
        weights[task.name] = torch.ones(len(task.labels))
        counts = np.bincount(labels[task.name][part][labels[task.name][part] >= 0], minlength=len(task.labels))
        if balance == "class_weights" and counts.any():
            even = counts.sum() / np.count_nonzero(counts)
            weights[task.name] = torch.from_numpy(even / counts.clip(1)).float()
    return weights


def mean_loss(head: nn.Module, logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return a task's loss: the weighted mean over patients with a known label, 0 if there is none.

    Args:
        head: The task's head.
        logits: `(B, K)`.
        target: `(B,)` label indices, -1 if unknown.
        weights: `(labels,)` weight of each label, on the CPU.

    Examples:
        ```python
        loss = mean_loss(head, head(features), target, torch.ones(len(task.labels)))
        ```
    """
    target = target.cpu()
    total = logits.sum() * 0  # without any known label the gradient is zero rather than absent
    groups = [target >= 0] if bool((weights == weights[0]).all()) else [target == k for k in range(len(weights))]
    weight = 0.0
    for group in groups:
        if int(group.sum()):
            group_weight = float(weights[target[group]].sum())
            chosen = group.nonzero()[:, 0].to(logits.device)
            total = total + group_weight * head.loss(logits[chosen], target[group].to(logits.device))  # type: ignore[operator]
            weight += group_weight
    return total / weight if weight else total


class Objective(nn.Module):
    """Combine a network and the fixed or learned weight of each task's loss.

    Learned weights: a task's loss L becomes exp(-s) L + s with one s for each task, learned with the network; for a
    given L the best s is log L. Kendall et al., CVPR 2018 (arXiv 1705.07115), where s is the log variance; their terms
    for classes differ by a factor that all tasks share.

    Args:
        network: The network.
        spec: The model.
        protocol: The protocol.
        weights: Weight of each label, `(labels,)` by task.
    """

    def __init__(self, network: Network, spec: ModelSpec, protocol: Protocol, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self.weights = network, dict(weights)
        self.fixed = {task.name: task.loss_weight for task in spec.tasks}
        self.dense_weights = {task.name: task.mask.loss_weight for task in spec.tasks if task.mask}
        learned = protocol.loss_weighting == "uncertainty"
        self.log_variance = nn.Parameter(torch.zeros(len(spec.tasks))) if learned else None

    def forward(
        self,
        grids: Tensor,
        targets: Mapping[str, Tensor],
        shares: Mapping[str, float],
        regions: Mapping[str, Tensor] | None = None,
        clinical: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a batch's contribution to the loss of its step, and the loss of each task.

        The loss of a dense task is that of its label plus the weighted loss over its voxels and slices.

        Args:
            grids: `(B, 1, D, H, W)`.
            targets: `(B,)` label indices for each task, -1 if unknown.
            shares: Share of this batch in the step's known labels, for each task.
            regions: `(B, R, D, H, W)` fractions for each dense task, as in the contract of heads.
            clinical: `(B, 2 V)` clinical values, from `clinical.encode`.
        """
        outputs, dense = self.network.forward_dense(grids, clinical)
        logits = {task: values.float() for task, values in outputs.items()}
        losses = {t: mean_loss(self.network.heads[t], logits[t], targets[t], self.weights[t]) for t in logits}
        for task, target in (regions or {}).items():
            dense_loss = self.network.heads[task].dense_loss(dense[task], target)  # type: ignore[operator]
            losses[task] = losses[task] + self.dense_weights[task] * dense_loss
        terms = [shares[task] * term for task, term in zip(losses, self.weighted_terms(losses), strict=True)]
        return torch.stack(terms).sum(), losses

    def weighted_terms(self, losses: Mapping[str, Tensor]) -> list[Tensor]:
        """Return each task's term of the sum that is minimised."""
        if self.log_variance is None:
            return [self.fixed[task] * loss for task, loss in losses.items()]
        return [torch.exp(-s) * loss + s for s, loss in zip(self.log_variance, losses.values(), strict=True)]

    def total(self, losses: Mapping[str, float]) -> float:
        """Return one number for each task's losses, comparable between epochs.

        Learned weights are replaced by the best ones for these losses.
        """
        if self.log_variance is None:
            return sum(self.fixed[task] * loss for task, loss in losses.items())
        return float(sum(1 + np.log(max(loss, 1e-12)) for loss in losses.values()))


def recalibrate(head: nn.Module, logits: Tensor, target: Tensor) -> tuple[float, list[float]] | None:
    """Calibrate a task's probabilities on held-out patients, in place.

    Logits become scale x logits + shift, with one positive scale and one shift for each logit. They minimise the
    head's own loss with a unit normal prior on the log scale and on each shift, so that few patients change little.

    Args:
        head: The task's head. A head without a `rescale_` method is not changed.
        logits: `(N, K)` of the validation part.
        target: `(N,)` label indices, -1 if unknown.

    Returns:
        The scale and the shifts, or None if nothing was changed.

    Source: Platt 1999 and Guo et al., ICML 2017 (arXiv 1706.04599), with a prior.
    """
    known = target >= 0
    if not callable(getattr(head, "rescale_", None)) or not bool(known.any()):
        return None
    logits, target, number = logits[known].double().detach(), target[known], int(known.sum())
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scale, shift], max_iter=200, line_search_fn="strong_wolfe")

    def negative_log_posterior() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = number * head.loss(log_scale.exp() * logits + shift, target)  # type: ignore[operator]
        loss = loss + (log_scale.square() + shift.square().sum()) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(negative_log_posterior)  # type: ignore[no-untyped-call]
    scale = log_scale.exp().detach()
    if not bool(torch.isfinite(scale)) or not bool(torch.isfinite(shift).all()):
        return None
    head.rescale_(scale, shift.detach())  # type: ignore[operator]
    return float(scale), shift.detach().tolist()
