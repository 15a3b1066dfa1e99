"""What is minimised: each task's loss over the patients whose label is known, and the probabilities set right."""

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
    """What a patient of each label weighs in its task's loss, `(labels,)` by task.

    Args:
        spec: The model.
        labels: For each task `(N,)` label indices, -1 where not known.
        part: Positions of the patients who train.
        balance: With "class_weights", labels weigh inversely to their number and 1 on average; else all weigh 1.
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
    """A task's loss: the weighted mean over patients whose label is known; 0 where there is none.

    Args:
        head: The task's head.
        logits: `(B, K)`.
        target: `(B,)` label indices, -1 where not known.
        weights: `(labels,)` what a patient of each label weighs, on the CPU.
    """
    target = target.cpu()
    total = logits.sum() * 0  # a task nobody is known of still has a gradient, of zero
    groups = [target >= 0] if bool((weights == weights[0]).all()) else [target == k for k in range(len(weights))]
    weight = 0.0
    for group in groups:
        if int(group.sum()):
            mine = float(weights[target[group]].sum())
            chosen = group.nonzero()[:, 0].to(logits.device)
            total = total + mine * head.loss(logits[chosen], target[group].to(logits.device))  # type: ignore[operator]
            weight += mine
    return total / weight if weight else total


class Objective(nn.Module):
    """A network and the weight of each task's loss, fixed or learned.

    Learned weights: a task's loss L becomes exp(-s) L + s with one s for each task, learned with the network; for a
    given L the best s is log L. Kendall et al., CVPR 2018 (arXiv 1705.07115), whose s is the log variance; their terms
    for classes differ by a factor that all tasks share.

    Args:
        network: The network.
        spec: The model.
        protocol: The protocol.
        weights: What a patient of each label weighs, `(labels,)` by task.
    """

    def __init__(self, network: Network, spec: ModelSpec, protocol: Protocol, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self.weights = network, dict(weights)
        self.fixed = {task.name: task.loss_weight for task in spec.tasks}
        learned = protocol.loss_weighting == "uncertainty"
        self.log_variance = nn.Parameter(torch.zeros(len(spec.tasks))) if learned else None

    def forward(
        self, grids: Tensor, targets: Mapping[str, Tensor], shares: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and each task's.

        Args:
            grids: `(B, 1, D, H, W)`.
            targets: For each task `(B,)` label indices, -1 where not known.
            shares: For each task what this batch counts for among those of the step, by its known patients.
        """
        logits = {task: values.float() for task, values in self.network(grids).items()}
        losses = {t: mean_loss(self.network.heads[t], logits[t], targets[t], self.weights[t]) for t in logits}
        terms = [shares[task] * term for task, term in zip(losses, self.weighted(losses), strict=True)]
        return torch.stack(terms).sum(), losses

    def weighted(self, losses: Mapping[str, Tensor]) -> list[Tensor]:
        """Each task's term of the sum that is minimised."""
        if self.log_variance is None:
            return [self.fixed[task] * loss for task, loss in losses.items()]
        return [torch.exp(-s) * loss + s for s, loss in zip(self.log_variance, losses.values(), strict=True)]

    def judge(self, losses: Mapping[str, float]) -> float:
        """One number of validation losses; with learned weights at their best for these, so that passes compare."""
        if self.log_variance is None:
            return sum(self.fixed[task] * loss for task, loss in losses.items())
        return float(sum(1 + np.log(max(loss, 1e-12)) for loss in losses.values()))


def recalibrate(head: nn.Module, logits: Tensor, target: Tensor) -> tuple[float, list[float]] | None:
    """Sets a task's probabilities right by patients it was not trained on, in place.

    Logits become scale x logits + shift, with one positive scale and a shift for each logit: the most probable ones
    under the head's own loss and a unit normal prior on the log of the scale and on each shift. Few patients change
    little.

    Args:
        head: The task's head; one without the method `rescale_` is left as it is.
        logits: `(N, K)` of the validation part.
        target: `(N,)` label indices, -1 where not known.

    Returns:
        The scale and the shifts, or None where nothing was done.

    Source: Platt 1999 and Guo et al., ICML 2017 (arXiv 1706.04599), with a prior.
    """
    known = target >= 0
    if not callable(getattr(head, "rescale_", None)) or not bool(known.any()):
        return None
    logits, target, number = logits[known].double().detach(), target[known], int(known.sum())
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scale, shift], max_iter=200, line_search_fn="strong_wolfe")

    def posterior() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = number * head.loss(log_scale.exp() * logits + shift, target)  # type: ignore[operator]
        loss = loss + (log_scale.square() + shift.square().sum()) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(posterior)  # type: ignore[no-untyped-call]
    scale = log_scale.exp().detach()
    if not bool(torch.isfinite(scale)) or not bool(torch.isfinite(shift).all()):
        return None
    head.rescale_(scale, shift.detach())  # type: ignore[operator]
    return float(scale), shift.detach().tolist()
