"""One fold trained: passes over its patients, a checkpoint after each, and what comes of the best.

Everything random in a pass is seeded by what it is for: the fold, the pass, the patient's place in it. So a checkpoint
needs no state of any generator, and a run that was killed goes on to the same result.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ichprog import networks as networks_module
from ichprog.errors import RunError
from ichprog.io import atomic_write
from ichprog.networks import Network
from ichprog.spec import ModelSpec, Task
from ichprog.train import allocator, mixed_precision
from ichprog.train.augmentation import augment
from ichprog.train.distributed import Team
from ichprog.train.folds import Fold, oversample
from ichprog.train.losses import Objective, label_weights, mean_loss, recalibrate
from ichprog.train.protocol import Protocol

Row = dict[str, float]  # a line of the log


@dataclass(frozen=True)
class Job:
    """What one fold is trained with.

    Attributes:
        spec: The model.
        protocol: The protocol.
        fold: The fold's number.
        parts: Its patients.
        names: Every patient's name.
        grids: Every patient's grid, a .npy file.
        labels: For each task every patient's label index, `(N,)`, -1 where not known.
        checkpoint: The file that is written after each pass.
    """

    spec: ModelSpec
    protocol: Protocol
    fold: int
    parts: Fold
    names: Sequence[str]
    grids: Sequence[Path]
    labels: Mapping[str, np.ndarray]
    checkpoint: Path

    def load(self, patients: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
        """Grids `(B, 1, D, H, W)` of patients."""
        stacked = np.stack([np.load(self.grids[int(p)], mmap_mode="r") for p in patients])[:, None]
        return torch.from_numpy(stacked).to(device)

    def targets(self, patients: np.ndarray) -> dict[str, Tensor]:
        """For each task `(B,)` label indices."""
        return {task: torch.from_numpy(values[patients]) for task, values in self.labels.items()}

    def seed(self, *purpose: int) -> int:
        """A seed for one purpose within this fold."""
        return int(np.random.SeedSequence([self.protocol.seed, self.fold, *purpose]).generate_state(1)[0])


@dataclass(frozen=True)
class Outcome:
    """What a fold's training ends with.

    Attributes:
        network: The network of the best pass, recalibrated where the protocol says so, on the CPU.
        logits: For each task `(n, K)` of the test part.
        validation: The same of the validation part.
        history: The log, a row a pass.
        best: The row of the best pass.
        calibration: For each task the scale and shifts that its logits got, or None.
        precision: In what it was trained, and why where "auto" did not take bfloat16.
    """

    network: Network
    logits: dict[str, Tensor]
    validation: dict[str, Tensor]
    history: list[Row]
    best: Row
    calibration: dict[str, tuple[float, list[float]] | None]
    precision: str


def fit(job: Job, team: Team, watch: "Watch") -> Outcome:
    """Trains a fold, from its checkpoint on where there is one.

    Args:
        job: The fold.
        team: The processes that train it together.
        watch: Who is told.

    Raises:
        RunError: A loss is no number, and it names the patients of the batch; or the network cannot be trained in
            bfloat16, which was asked for.
    """
    with _own_randomness(team.device), allocator.kept(team.device) as keep_memory:
        state = State(job, team)
        watch.begin(job, state.history)
        while not state.over:
            row = run_pass(state, job, team, watch)
            row |= _validated(state, job, team)
            state.conclude(row)
            if team.leads:
                state.save()
            watch.row(job, row)
            keep_memory()
        return _best(state, job, team)


class Watch:
    """Who is told how a training goes; this one does nothing."""

    def begin(self, job: Job, history: Sequence[Row]) -> None:
        """A fold begins, or goes on after these passes."""

    def step(self, job: Job, of: int, loss: float) -> None:
        """One of so many batches was trained."""

    def row(self, job: Job, row: Row) -> None:
        """A pass has ended."""


def steps(order: np.ndarray, protocol: Protocol, team_size: int = 1) -> list[list[np.ndarray]]:
    """A pass as steps of the optimiser, each some batches of places in `order`.

    A last batch with fewer than two patients for each process joins the one before it: normalisation over one patient
    would say nothing, or fail.

    Args:
        order: Positions of patients in the order of this pass.
        protocol: The protocol.
        team_size: The number of processes.
    """
    places = np.arange(len(order))
    batches = [places[i : i + protocol.batch] for i in range(0, len(places), protocol.batch)]
    if len(batches) > 1 and len(batches[-1]) < 2 * team_size:
        batches[-2:] = [np.concatenate(batches[-2:])]
    n = protocol.accumulate
    if protocol.trailing == "kept" or n == 1:
        return [batches[i : i + n] for i in range(0, len(batches), n)]
    first = batches[: n - 1]  # published: counted from one, a step is made where the next count divides
    whole = [batches[i : i + n] for i in range(n - 1, len(batches) - n + 1, n)]
    return [first, *whole]


def run_pass(state: "State", job: Job, team: Team, watch: "Watch") -> Row:
    """One pass over the training part.

    Args:
        state: The training; its network, optimiser and schedule go on.
        job: The fold.
        team: The processes that train it together.
        watch: Who is told.

    Returns:
        Its learning rate, precision and losses.

    Raises:
        RunError: A loss is no number; it names the patients of the batch.
    """
    protocol, epoch, device = job.protocol, state.epoch, team.device
    part = job.parts.train
    if protocol.balance == "oversample":
        part = oversample(part, job.labels[job.spec.tasks[0].name])
    order = np.random.default_rng([protocol.seed, job.fold, epoch]).permutation(part)
    torch.manual_seed(job.seed(epoch, team.rank))
    plan = steps(order, protocol, team.size)
    count = sum(map(len, plan))
    sums: dict[str, float] = dict.fromkeys(job.labels, 0.0)
    weights: dict[str, float] = dict.fromkeys(job.labels, 0.0)
    state.trained.train()
    rate = 0.0
    for number, batches in enumerate(plan):
        rate = state.set_rate(epoch * len(plan) + number, len(plan))
        state.optimiser.zero_grad()
        whole = _weight(state.objective, job, order[np.concatenate(batches)])
        step_loss = 0.0
        for batch in batches:
            mine = batch[team.rank :: team.size]
            patients, targets = order[mine], job.targets(order[mine])
            grids = job.load(patients, device)
            seeds = [(protocol.seed, job.fold, epoch, int(place)) for place in mine]
            with torch.no_grad():
                grids = augment(grids, protocol, job.spec.input, seeds)
            weight = _weight(state.objective, job, patients)
            shares = {t: team.size * weight[t] / whole[t] if whole[t] else 0.0 for t in whole}
            with team.alone(state.trained, when=batch is not batches[-1]):
                with state.computing():
                    laid_out = grids.contiguous(memory_format=torch.channels_last_3d)  # a third faster on a processor
                    loss, losses = state.trained(laid_out, targets, shares)
                values = torch.stack([loss.detach(), *(one.detach() for one in losses.values())]).tolist()
                if not math.isfinite(values[0]):
                    said = ", ".join(f"{task} {value:g}" for task, value in zip(losses, values[1:], strict=True))
                    raise RunError(
                        f"fold {job.fold}, epoch {epoch}: the loss is {values[0]:g} ({said}). The batch: patients "
                        f"{', '.join(job.names[int(p)] for p in patients)}. Look at their scans, or lower the "
                        "protocol's `lr`; nothing of this epoch was kept."
                    )
                loss.backward()
            step_loss += values[0]
            for task, value in zip(losses, values[1:], strict=True):
                sums[task], weights[task] = sums[task] + weight[task] * value, weights[task] + weight[task]
            watch.step(job, count, values[0])
        state.optimiser.step()
        if state.plateau is not None:
            told = team.gather([step_loss])
            state.plateau.step(sum(told) / len(told))
    told_sums = team.gather([(sums, weights)])
    totals = {task: sum(w[task] for _, w in told_sums) for task in job.labels}
    means = {task: sum(s[task] for s, _ in told_sums) / (totals[task] or 1.0) for task in job.labels}
    row: Row = {"fold": job.fold, "epoch": epoch, "lr": rate, "bfloat16": float(state.rounded)}
    row["loss"] = state.objective.judge(means)
    row |= {f"loss_{task}": value for task, value in means.items()}
    if state.objective.log_variance is not None:
        learned = state.objective.log_variance.detach().tolist()
        row |= {f"log_variance_{task}": value for task, value in zip(job.labels, learned, strict=True)}
    return row


def _validated(state: "State", job: Job, team: Team) -> Row:
    """The losses of the validation part, the AUC of each task, the balanced accuracy of the first."""
    part, objective = job.parts.validation, state.objective
    logits = answers(objective.network, part, job, team)
    targets = job.targets(part)
    losses = {
        task: float(mean_loss(objective.network.heads[task], logits[task].to(team.device), targets[task], weights))
        for task, weights in objective.weights.items()
    }
    probabilities = _probabilities(objective.network, logits, team.device)
    first = job.spec.tasks[0]
    row: Row = {"val_loss": objective.judge(losses)}
    if math.isnan(row["val_loss"]):
        raise RunError(
            f"fold {job.fold}, epoch {state.epoch}: the validation loss is no number. Its patients: "
            f"{', '.join(job.names[int(p)] for p in part)}. Look at their scans, or lower the protocol's `lr`."
        )
    row |= {f"val_loss_{task}": loss for task, loss in losses.items()}
    for task in job.spec.tasks:
        row[f"val_auc_{task.name}"] = auc(task, probabilities[task.name], targets[task.name].numpy())
    row["val_balanced_accuracy"] = balanced_accuracy(first, probabilities[first.name], targets[first.name].numpy())
    return row


def answers(network: Network, part: np.ndarray, job: Job, team: Team) -> dict[str, Tensor]:
    """Each task's logits `(n, K)` of patients, on the CPU; every process takes its share and has all in the end."""
    training = network.training
    network.eval()
    team.share_buffers(network)
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    mine = np.arange(len(part))[team.rank :: team.size]
    exactly = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exactly, mixed_precision.computing(team.device, rounded=False):
        for start in range(0, len(mine), job.protocol.batch):
            places = mine[start : start + job.protocol.batch]
            logits = {task: v.float().cpu().numpy() for task, v in network(job.load(part[places], team.device)).items()}
            found += [(int(p), {task: v[i] for task, v in logits.items()}) for i, p in enumerate(places)]
    network.train(training)
    ordered = [values for _, values in sorted(team.gather(found), key=lambda entry: entry[0])]
    return {task: torch.from_numpy(np.stack([values[task] for values in ordered])) for task in job.labels}


def auc(task: Task, probabilities: np.ndarray, target: np.ndarray) -> float:
    """The mean AUC over the cuts between a task's labels, or of each label against the rest where they have no order.

    Args:
        task: The task.
        probabilities: `(N, labels)`.
        target: `(N,)` label indices, -1 where not known.

    Returns:
        NaN where no two labels are known.
    """
    from sklearn.metrics import roc_auc_score

    known = target >= 0
    probabilities, target = probabilities[known], target[known]
    found = []
    for k in range(1, len(task.labels)) if task.threshold is not None else range(len(task.labels)):
        positive, score = target == k, probabilities[:, k]
        if task.threshold is not None:
            positive, score = target >= k, probabilities[:, k:].sum(1)
        if 0 < positive.sum() < len(positive) and np.isfinite(score).all():
            found.append(float(roc_auc_score(positive, score)))
    return float(np.mean(found)) if found else math.nan


def balanced_accuracy(task: Task, probabilities: np.ndarray, target: np.ndarray) -> float:
    """The mean, over the labels there are, of the share of their patients who are told right.

    Args:
        task: The task.
        probabilities: `(N, labels)`.
        target: `(N,)` label indices, -1 where not known.
    """
    told = [task.labels.index(task.decide(dict(zip(task.labels, row, strict=True)))) for row in probabilities.tolist()]
    right = np.array(told) == target
    return float(np.mean([right[target == k].mean() for k in np.unique(target[target >= 0])]))


def _probabilities(network: Network, logits: Mapping[str, Tensor], device: torch.device) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = network.probabilities({task: values.to(device) for task, values in logits.items()})
    return {task: values.double().cpu().numpy() for task, values in found.items()}


def _weight(objective: Objective, job: Job, patients: np.ndarray) -> dict[str, float]:
    """What patients weigh together in each task's loss."""
    found = {}
    for task, values in job.labels.items():
        known = values[patients]
        found[task] = float(objective.weights[task][torch.from_numpy(known[known >= 0])].sum())
    return found


def _best(state: "State", job: Job, team: Team) -> Outcome:
    """The network of the best pass, set right by the validation part, and its answers to the parts it did not see."""
    kept = state.best
    if kept is None:
        raise RunError(f"fold {job.fold}: no epoch had a validation that is a number; lower the protocol's `lr`.")
    network = networks_module.build(job.spec)
    network.load_state_dict(kept["network"])
    network.to(team.device).eval()
    calibration: dict[str, tuple[float, list[float]] | None] = {}
    if job.protocol.recalibrate:
        logits, targets = answers(network, job.parts.validation, job, team), job.targets(job.parts.validation)
        for task in job.labels:
            head = network.heads[task].cpu()
            calibration[task] = recalibrate(head, logits[task], targets[task])
            head.to(team.device)
    test, validation = (answers(network, part, job, team) for part in (job.parts.test, job.parts.validation))
    best = state.history[kept["epoch"]]
    return Outcome(network.cpu(), test, validation, state.history, best, calibration, state.precision)


class State:
    """All that changes in a training, and its checkpoint.

    Args:
        job: The fold; it goes on from its checkpoint where there is one.
        team: The processes that train it together.

    Attributes:
        objective: What is minimised, with the network.
        rounded: Whether training is in bfloat16.
        precision: The same in words.
        epoch: Passes that have ended.
        best: The best pass, its score and its network; None before one has a score.
        history: The log, a row a pass.

    Raises:
        RunError: The network cannot be trained in bfloat16, which was asked for.
    """

    def __init__(self, job: Job, team: Team) -> None:
        self.job, self.team, protocol = job, team, job.protocol
        torch.manual_seed(job.seed(-1 % 2**32))
        network = networks_module.build(job.spec)
        weights = label_weights(job.spec, job.labels, job.parts.train, protocol.balance)
        self.objective = Objective(network, job.spec, protocol, weights)
        networks_module.channels_last(self.objective)
        self.trained: nn.Module = team.wrap(self.objective)
        self.optimiser = torch.optim.AdamW(
            self._groups(), lr=protocol.lr, weight_decay=protocol.weight_decay, amsgrad=protocol.amsgrad
        )
        self.plateau = None
        if protocol.schedule == "plateau":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimiser, factor=protocol.plateau_factor, patience=protocol.plateau_patience
            )
        self.rounded, self.precision = self._rounds()
        self.epoch = 0
        self.best: dict[str, Any] | None = None
        self.history: list[Row] = []
        if job.checkpoint.is_file():
            self._restore(torch.load(job.checkpoint, map_location="cpu", weights_only=True))

    @property
    def over(self) -> bool:
        """Whether there is nothing left to train."""
        protocol = self.job.protocol
        waited = self.epoch - 1 - self.best["epoch"] if self.best else self.epoch
        return self.epoch >= protocol.epochs or 0 < protocol.patience <= waited

    def computing(self) -> AbstractContextManager[None]:
        """The context in which the network is trained."""
        return mixed_precision.computing(self.team.device, rounded=self.rounded)

    def set_rate(self, step: int, in_a_pass: int) -> float:
        """Sets the learning rate of a step, where it follows from the step alone; tells it."""
        protocol = self.job.protocol
        if protocol.schedule == "cosine":
            warm, total = protocol.warm_up * in_a_pass, protocol.epochs * in_a_pass
            share = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
            for group in self.optimiser.param_groups:
                group["lr"] = protocol.lr * share
        return float(self.optimiser.param_groups[0]["lr"])

    def conclude(self, row: Row) -> None:
        """Ends a pass: keeps its network where it is the best so far."""
        score = row["val_balanced_accuracy"] if self.job.protocol.select == "balanced_accuracy" else -row["val_loss"]
        if math.isfinite(score) and (self.best is None or score > self.best["score"]):
            state = self.objective.network.state_dict()
            own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
            self.best = {"score": score, "epoch": self.epoch, "network": own}
        self.history.append(row)
        self.epoch += 1

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        data = {
            "epoch": self.epoch,
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "plateau": self.plateau and self.plateau.state_dict(),
            "best": self.best,
            "history": self.history,
        }
        packed = io.BytesIO()
        torch.save(data, packed)
        with atomic_write(self.job.checkpoint) as part:
            part.write_bytes(packed.getbuffer())

    def _restore(self, data: Mapping[str, Any]) -> None:
        self.epoch, self.best, self.history = data["epoch"], data["best"], data["history"]
        self.objective.load_state_dict(data["objective"])
        self.optimiser.load_state_dict(data["optimiser"])
        if self.plateau is not None:
            self.plateau.load_state_dict(data["plateau"])

    def _rounds(self) -> tuple[bool, str]:
        """Whether training is in bfloat16; and the same in words."""
        job, team, asked = self.job, self.team, self.job.protocol.precision
        if asked == "float32" or (asked == "auto" and team.device.type == "cpu"):
            return False, "float32"
        why = mixed_precision.lack(team.device)
        if why is None and team.device.type == "cpu":
            found = mixed_precision.fault(self.objective.network, job.load(job.parts.train[:2], team.device))
            why = next((fault for fault in team.gather([found]) if fault), None)
        if why is not None and asked == "bfloat16":
            raise RunError(f"precision 'bfloat16': {why}. Choose 'auto' or 'float32'.")
        return why is None, "bfloat16" if why is None else f"float32: {why}"

    def _groups(self) -> list[dict[str, Any]]:
        """Weights decay; the learned weights of the tasks do not."""
        groups: list[dict[str, Any]] = [{"params": list(self.objective.network.parameters())}]
        if self.objective.log_variance is not None:
            groups.append({"params": [self.objective.log_variance], "weight_decay": 0.0})
        return groups


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leaves torch's generators as they were, and has cuDNN choose what can be repeated."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield
