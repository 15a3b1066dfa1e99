"""Train one fold: epochs over its patients, a checkpoint after each, and the predictions of the best epoch.

Every random number of an epoch is seeded by its purpose: the fold, the epoch and the patient's position. So a
checkpoint needs no generator state, and a run that was killed resumes to the same result.
"""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ichprog import networks as networks_module
from ichprog.errors import RunError
from ichprog.io import atomic_write
from ichprog.networks import Network
from ichprog.spec import Task
from ichprog.train import mixed_precision
from ichprog.train.augmentation import augment, augment_regions
from ichprog.train.callbacks import Callback
from ichprog.train.distributed import DistributedContext
from ichprog.train.fold_job import FoldJob, FoldResult, LogRow
from ichprog.train.folds import oversample
from ichprog.train.losses import Objective, label_weights, mean_loss, recalibrate
from ichprog.train.protocol import Protocol


def train_fold(job: FoldJob, context: DistributedContext, callback: Callback) -> FoldResult:
    """Train a fold, resuming from its checkpoint if there is one.

    Args:
        job: The fold.
        context: The processes that train it.
        callback: Receives the events of the training.

    Raises:
        RunError: A loss is not finite, or the network cannot be trained in bfloat16 though the protocol requests it.
    """
    with _isolated_randomness(context.device):
        states = [_train(candidate, context, callback) for candidate in job.candidates()]
        state = max(states, key=lambda each: each.best["score"] if each.best else -math.inf)
        return _predict_with_best(state, state.job, context)


def _train(job: FoldJob, context: DistributedContext, callback: Callback) -> "TrainerState":
    """Train with one learning rate until the last epoch or the early stop."""
    state = TrainerState(job, context)
    callback.on_fold_start(job, state.history)
    try:
        while not state.is_finished:
            row = run_epoch(state, job, context, callback)
            row |= _validate(state, job, context)
            state.end_epoch(row)
            if context.is_main_process:
                state.save()
            callback.on_epoch_end(job, row)
    finally:
        callback.on_fold_end()
    return state


def plan_steps(n_patients: int, protocol: Protocol, num_processes: int = 1) -> list[list[np.ndarray]]:
    """Divide an epoch into optimiser steps, each a list of batches of positions.

    A last batch with fewer than two patients per process joins the batch before it, because batch normalisation needs
    two patients.

    Args:
        n_patients: Number of patients.
        protocol: The protocol.
        num_processes: Number of processes.

    Examples:
        >>> steps = plan_steps(5, Protocol(batch_size=2, accumulation_steps=2))
        >>> [[batch.tolist() for batch in step] for step in steps]
        [[[0, 1], [2, 3, 4]]]
    """
    positions, size = np.arange(n_patients), protocol.batch_size
    batches = [positions[i : i + size] for i in range(0, n_patients, size)]
    if len(batches) > 1 and len(batches[-1]) < 2 * num_processes:
        batches[-2:] = [np.concatenate(batches[-2:])]
    n = protocol.accumulation_steps
    if not protocol.drop_last or n == 1:
        return [batches[i : i + n] for i in range(0, len(batches), n)]
    first = batches[: n - 1]  # the published loop counts batches from one and steps if n divides the next count
    whole = [batches[i : i + n] for i in range(n - 1, len(batches) - n + 1, n)]
    return [first, *whole]


def run_epoch(state: "TrainerState", job: FoldJob, context: DistributedContext, callback: Callback) -> LogRow:
    """Train for one epoch.

    Args:
        state: The training; its network, optimiser and schedule are updated.
        job: The fold.
        context: The processes that train it.
        callback: Receives the events of the training.

    Returns:
        Learning rate, precision and mean losses of the epoch.

    Raises:
        RunError: A loss is not finite; the message names the patients of the batch.
    """
    protocol, epoch = job.protocol, state.epoch
    part = job.parts.train
    if protocol.balance == "oversample":
        part = oversample(part, job.labels[job.spec.tasks[0].name])
    order = np.random.default_rng([protocol.seed, job.fold, epoch]).permutation(part)
    torch.manual_seed(job.seed(epoch, context.process_index))
    steps = plan_steps(len(order), protocol, context.num_processes)
    n_batches = sum(map(len, steps))
    sums = _LossSums(job.labels)
    state.module.train()
    if protocol.freeze_backbone:
        state.objective.network.backbone.eval()  # also keeps the statistics of batch normalisation
    learning_rate = 0.0
    for number, batches in enumerate(steps):
        learning_rate = state.set_learning_rate(epoch * len(steps) + number, len(steps))
        state.optimiser.zero_grad()
        step_weights = _label_weight_sums(state.objective, job, order[np.concatenate(batches)])
        step_loss = 0.0
        for batch in batches:
            positions = batch[context.process_index :: context.num_processes]
            with context.no_sync(state.module, enabled=batch is not batches[-1]):
                loss = _train_batch(state, job, context, order, positions, step_weights, sums)
            step_loss += loss
            callback.on_batch_end(job, n_batches, loss)
        state.optimiser.step()
        state.reduce_on_plateau(step_loss)
    means = sums.means(context)
    row: LogRow = {
        "fold": job.fold,
        "epoch": epoch,
        "learning_rate": learning_rate,
        "bfloat16": float(state.is_bfloat16),
        "loss": state.objective.total(means),
        **{f"loss_{task}": value for task, value in means.items()},
    }
    if state.objective.log_variance is not None:
        learned = state.objective.log_variance.detach().tolist()
        row |= {f"log_variance_{task}": value for task, value in zip(job.labels, learned, strict=True)}
    return row


@dataclass
class _LossSums:
    """Accumulate each task's weighted loss over an epoch."""

    tasks: Mapping[str, Any]
    losses: dict[str, float] = field(init=False)
    weights: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.losses, self.weights = dict.fromkeys(self.tasks, 0.0), dict.fromkeys(self.tasks, 0.0)

    def add(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> None:
        for task, loss in losses.items():
            self.losses[task] += weights[task] * loss
            self.weights[task] += weights[task]

    def means(self, context: DistributedContext) -> dict[str, float]:
        """Return each task's mean over all processes, 0 without any known label."""
        gathered = context.gather([(self.losses, self.weights)])
        totals = {task: sum(weights[task] for _, weights in gathered) for task in self.tasks}
        return {task: sum(losses[task] for losses, _ in gathered) / (totals[task] or 1.0) for task in self.tasks}


def _train_batch(
    state: "TrainerState",
    job: FoldJob,
    context: DistributedContext,
    order: np.ndarray,
    positions: np.ndarray,
    step_weights: Mapping[str, float],
    sums: _LossSums,
) -> float:
    """Add a batch's gradient and return its loss.

    Args:
        state: The training.
        job: The fold.
        context: The processes that train it.
        order: Patients in the order of this epoch.
        positions: Positions of the batch in `order`.
        step_weights: Sum of the label weights of the whole step, for each task.
        sums: Updated with the batch's losses.
    """
    protocol, epoch = job.protocol, state.epoch
    patients = order[positions]
    grids, targets = job.load_grids(patients, context.device), job.targets(patients)
    with torch.no_grad():
        seeds = [(protocol.seed, job.fold, epoch, int(position)) for position in positions]
        grids = augment(grids, protocol, job.spec.input, seeds)
        regions = {
            task: augment_regions(values, protocol, job.spec.input, seeds)
            for task, values in job.load_regions(patients, context.device).items()
        }
    weights = _label_weight_sums(state.objective, job, patients)
    shares = {
        task: context.num_processes * weights[task] / whole if whole else 0.0 for task, whole in step_weights.items()
    }
    with state.autocast():
        grids = grids.contiguous(memory_format=torch.channels_last_3d)  # a third faster on CPUs
        clinical = job.load_clinical(patients, context.device, seeds)
        loss, losses = state.module(grids, targets, shares, regions, clinical)
    total, *values = torch.stack([loss.detach(), *(one.detach() for one in losses.values())]).tolist()
    task_losses = dict(zip(losses, values, strict=True))
    if not math.isfinite(total):
        shown = ", ".join(f"{task} {value:g}" for task, value in task_losses.items())
        raise RunError(
            f"fold {job.fold}, epoch {epoch}: the loss is {total:g} ({shown}). The batch: patients "
            f"{job.format_names(patients)}. Check their scans, or lower the protocol's `learning_rate`. Nothing of "
            "this epoch was saved."
        )
    loss.backward()
    sums.add(task_losses, weights)
    return float(total)


def _validate(state: "TrainerState", job: FoldJob, context: DistributedContext) -> LogRow:
    """Return losses and each task's AUC on the validation part, and the first task's balanced accuracy."""
    part, objective = job.parts.validation, state.objective
    logits, dense_losses = predict_part(objective.network, part, job, context)
    targets = job.targets(part)
    losses = {
        task: float(mean_loss(objective.network.heads[task], logits[task].to(context.device), targets[task], weights))
        + dense_losses.get(task, 0.0) * objective.dense_weights.get(task, 0.0)
        for task, weights in objective.weights.items()
    }
    with torch.no_grad():
        on_device = {task: values.to(context.device) for task, values in logits.items()}
        probabilities = {
            task: values.double().cpu().numpy() for task, values in objective.network.probabilities(on_device).items()
        }
    first = job.spec.tasks[0]
    row: LogRow = {"val_loss": objective.total(losses)}
    if math.isnan(row["val_loss"]):
        raise RunError(
            f"fold {job.fold}, epoch {state.epoch}: the validation loss is not a number. Its patients: "
            f"{job.format_names(part)}. Check their scans, or lower the protocol's `learning_rate`."
        )
    row |= {f"val_loss_{task}": loss for task, loss in losses.items()}
    for task in job.spec.tasks:
        row[f"val_auc_{task.name}"] = auc(task, probabilities[task.name], targets[task.name].numpy())
    row["val_balanced_accuracy"] = balanced_accuracy(first, probabilities[first.name], targets[first.name].numpy())
    return row


def predict_logits(network: Network, part: np.ndarray, job: FoldJob, context: DistributedContext) -> dict[str, Tensor]:
    """Return each task's logits `(n, K)` of patients on the CPU, in every process, as `predict_part` does."""
    return predict_part(network, part, job, context)[0]


def predict_part(
    network: Network, part: np.ndarray, job: FoldJob, context: DistributedContext
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return each task's logits of patients, and the mean loss over voxels and slices of each dense task.

    Args:
        network: The network.
        part: Positions of the patients.
        job: The fold.
        context: The processes that share the work.

    Returns:
        `(n, K)` on the CPU for each task, and a number for each dense task, in every process.
    """
    training = network.training
    network.eval()
    context.broadcast_buffers(network)
    entries: list[tuple[int, dict[str, np.ndarray]]] = []
    dense_losses: list[tuple[int, dict[str, float]]] = []
    positions, size = np.arange(len(part))[context.process_index :: context.num_processes], job.protocol.batch_size
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exact, mixed_precision.autocast(context.device, is_bfloat16=False):
        for start in range(0, len(positions), size):
            batch = positions[start : start + size]
            clinical = job.load_clinical(part[batch], context.device)
            outputs, dense = network.forward_dense(job.load_grids(part[batch], context.device), clinical)
            logits = {task: values.float().cpu().numpy() for task, values in outputs.items()}
            entries += [(int(p), {task: values[i] for task, values in logits.items()}) for i, p in enumerate(batch)]
            regions = job.load_regions(part[batch], context.device)
            losses = {t: float(network.heads[t].dense_loss(dense[t], regions[t])) for t in regions}  # type: ignore[operator]
            dense_losses.append((len(batch), losses))
    network.train(training)
    ordered = [values for _, values in sorted(context.gather(entries), key=lambda entry: entry[0])]
    gathered = context.gather(dense_losses)
    return (
        {task: torch.from_numpy(np.stack([values[task] for values in ordered])) for task in job.labels},
        {task: sum(n * losses[task] for n, losses in gathered) / sum(n for n, _ in gathered) for task in job.regions},
    )


def auc(task: Task, probabilities: np.ndarray, target: np.ndarray) -> float:
    """Return the mean AUC over the thresholds between ordered labels, or of each unordered label against the rest.

    Args:
        task: The task.
        probabilities: `(N, labels)`.
        target: `(N,)` label indices, -1 if unknown.

    Returns:
        The AUC, NaN with fewer than two known labels.
    """
    from sklearn.metrics import roc_auc_score

    known = target >= 0
    probabilities, target = probabilities[known], target[known]
    is_ordered = task.threshold is not None
    areas = []
    for k in range(1, len(task.labels)) if is_ordered else range(len(task.labels)):
        positive, score = (
            (target >= k, probabilities[:, k:].sum(1)) if is_ordered else (target == k, probabilities[:, k])
        )
        if 0 < positive.sum() < len(positive) and np.isfinite(score).all():
            areas.append(float(roc_auc_score(positive, score)))
    return float(np.mean(areas)) if areas else math.nan


def balanced_accuracy(task: Task, probabilities: np.ndarray, target: np.ndarray) -> float:
    """Return the mean recall over the labels present.

    Args:
        task: The task.
        probabilities: `(N, labels)`.
        target: `(N,)` label indices, -1 if unknown.
    """
    rows = probabilities.tolist()
    predicted = [task.labels.index(task.decide(dict(zip(task.labels, row, strict=True)))) for row in rows]
    is_correct = np.array(predicted) == target
    return float(np.mean([is_correct[target == k].mean() for k in np.unique(target[target >= 0])]))


def _label_weight_sums(objective: Objective, job: FoldJob, patients: np.ndarray) -> dict[str, float]:
    """Return the sum of the label weights of patients, for each task."""
    sums = {}
    for task, values in job.labels.items():
        known = values[patients]
        sums[task] = float(objective.weights[task][torch.from_numpy(known[known >= 0])].sum())
    return sums


def _predict_with_best(state: "TrainerState", job: FoldJob, context: DistributedContext) -> FoldResult:
    """Restore the best epoch, recalibrate on the validation part, predict the test part."""
    best = state.best
    if best is None:
        raise RunError(
            f"fold {job.fold}: the validation score of every epoch is not a number. Lower the protocol's "
            "`learning_rate`."
        )
    network = networks_module.build(job.spec)
    network.load_state_dict(best["network"])
    network.to(context.device).eval()
    calibration: dict[str, tuple[float, list[float]] | None] = {}
    if job.protocol.recalibrate:
        logits, targets = predict_logits(network, job.parts.validation, job, context), job.targets(job.parts.validation)
        for task in job.labels:
            head = network.heads[task].cpu()
            calibration[task] = recalibrate(head, logits[task], targets[task])
            head.to(context.device)
    test, validation = (predict_logits(network, part, job, context) for part in (job.parts.test, job.parts.validation))
    best_row = state.history[best["epoch"]]
    rate = job.protocol.learning_rate
    return FoldResult(network.cpu(), test, validation, state.history, best_row, calibration, state.precision, rate)


class TrainerState:
    """Hold everything that changes during training, and its checkpoint.

    Args:
        job: The fold. Training resumes from its checkpoint if there is one.
        context: The processes that train it.

    Attributes:
        objective: The network and the loss.
        module: The objective on this process's device, with averaged gradients.
        is_bfloat16: Whether training uses bfloat16.
        precision: The precision in words.
        epoch: Number of completed epochs.
        best: The best epoch with its score and network, or None.
        history: The log, one row per epoch.
    """

    def __init__(self, job: FoldJob, context: DistributedContext) -> None:
        protocol = job.protocol
        self.job, self.context = job, context
        torch.manual_seed(job.seed(2**32 - 1))
        network = networks_module.build(job.spec)
        if job.start_from is not None:
            networks_module.load_backbone(network, job.spec, job.start_from)
        network.backbone.requires_grad_(not protocol.freeze_backbone)
        weights = label_weights(job.spec, job.labels, job.parts.train, protocol.balance)
        self.objective = Objective(network, job.spec, protocol, weights)
        networks_module.channels_last(self.objective)
        self.module: nn.Module = context.prepare(self.objective)
        self.optimiser = torch.optim.AdamW(
            self._parameter_groups(),
            lr=protocol.learning_rate,
            weight_decay=protocol.weight_decay,
            amsgrad=protocol.amsgrad,
        )
        self.plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        if protocol.schedule == "plateau":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimiser, factor=protocol.plateau_factor, patience=protocol.plateau_patience
            )
        self.is_bfloat16, self.precision = self._choose_precision()
        self.epoch = 0
        self.best: dict[str, Any] | None = None
        self.history: list[LogRow] = []
        if job.checkpoint.is_file():
            self._restore(torch.load(job.checkpoint, map_location="cpu", weights_only=True))

    @property
    def is_finished(self) -> bool:
        """Return whether the last epoch or the early stop is reached."""
        protocol = self.job.protocol
        waited = self.epoch - 1 - self.best["epoch"] if self.best else self.epoch
        return self.epoch >= protocol.epochs or 0 < protocol.patience <= waited

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context with the training precision."""
        return mixed_precision.autocast(self.context.device, is_bfloat16=self.is_bfloat16)

    def set_learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Set the learning rate of a step if the schedule depends on the step alone, and return the rate."""
        protocol = self.job.protocol
        if protocol.schedule == "cosine":
            warmup, total = protocol.warmup_epochs * steps_per_epoch, protocol.epochs * steps_per_epoch
            if step < warmup:
                factor = (step + 1) / warmup
            else:
                factor = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
            for group in self.optimiser.param_groups:
                group["lr"] = protocol.learning_rate * factor
        return float(self.optimiser.param_groups[0]["lr"])

    def reduce_on_plateau(self, step_loss: float) -> None:
        """Update the "plateau" schedule with the loss of a step, averaged over the processes."""
        if self.plateau is not None:
            losses = self.context.gather([step_loss])
            self.plateau.step(sum(losses) / len(losses))

    def end_epoch(self, row: LogRow) -> None:
        """Append a log row and save the network if it is the best so far."""
        score = row["val_balanced_accuracy"] if self.job.protocol.monitor == "balanced_accuracy" else -row["val_loss"]
        if math.isfinite(score) and (self.best is None or score > self.best["score"]):
            weights = {
                key: value.detach().to("cpu", copy=True).contiguous()
                for key, value in self.objective.network.state_dict().items()
            }
            self.best = {"score": score, "epoch": self.epoch, "network": weights}
        self.history.append(row)
        self.epoch += 1

    def save(self) -> None:
        """Write the checkpoint atomically."""
        data = {
            "epoch": self.epoch,
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "plateau": self.plateau and self.plateau.state_dict(),
            "best": self.best,
            "history": self.history,
        }
        buffer = io.BytesIO()
        torch.save(data, buffer)
        with atomic_write(self.job.checkpoint) as partial:
            partial.write_bytes(buffer.getbuffer())

    def _restore(self, data: Mapping[str, Any]) -> None:
        self.epoch, self.best, self.history = data["epoch"], data["best"], data["history"]
        self.objective.load_state_dict(data["objective"])
        self.optimiser.load_state_dict(data["optimiser"])
        if self.plateau is not None:
            self.plateau.load_state_dict(data["plateau"])

    def _choose_precision(self) -> tuple[bool, str]:
        """Return whether training uses bfloat16, and the precision in words."""
        job, context, requested = self.job, self.context, self.job.protocol.precision
        if requested == "float32" or (requested == "auto" and context.device.type == "cpu"):
            return False, "float32"
        reason = mixed_precision.unsupported_reason(context.device)
        if reason is None and context.device.type == "cpu":
            grids = job.load_grids(job.parts.train[:2], context.device)
            faults = context.gather([mixed_precision.find_fault(self.objective.network, grids)])
            reason = next((fault for fault in faults if fault), None)
        if reason is not None and requested == "bfloat16":
            raise RunError(f"precision 'bfloat16': {reason}. Choose 'auto' or 'float32'.")
        return reason is None, "bfloat16" if reason is None else f"float32: {reason}"

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return the network's parameters, with weight decay, and the learned task weights, without."""
        groups: list[dict[str, Any]] = [
            {"params": [each for each in self.objective.network.parameters() if each.requires_grad]}
        ]
        if self.objective.log_variance is not None:
            groups.append({"params": [self.objective.log_variance], "weight_decay": 0.0})
        return groups


@contextmanager
def _isolated_randomness(device: torch.device) -> Iterator[None]:
    """Restore torch's generators afterwards, and use deterministic cuDNN algorithms within."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield
