"""Train `compact.haemorrhage` again: `python docs/haemorrhage.py FOLDER --real COHORT.csv`.

COHORT.csv lists real heads with the columns patient, scan, haemorrhage and slices: the numbers of the slices with
blood. The script simulates patients and prepares grids. It first trains one network on parts of simulated patients
around their blood. Three folds start from it and go on with simulated patients and two thirds of the real heads, which
the number in the patient's name divides, modulo 3: with whole slices, parts, and whole slices. Then the script chooses
the threshold, states the intervals of volumes, and writes weights and spec into `ichprog/zoo/`. Files in FOLDER are
reused, so an interrupted run can be continued. `--only start` and `--only K` train the first network or one fold and
stop.

Training does not use `ichprog train`: it reads parts of grids rather than whole grids, and mixes kinds of patients in
fixed shares. Both save time on a CPU.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ichprog
from ichprog import networks, preprocessing
from ichprog.errors import InvalidValueError
from ichprog.io import atomic_write
from ichprog.metrics.operating_points import threshold_at
from ichprog.parallel import parallel_map
from ichprog.scan import load, load_regions, source_slices
from ichprog.simulate import MASK_VALUES, add_haemorrhage, simulate
from ichprog.simulate.insertion import KINDS
from ichprog.spec import GoldenOutput, ModelSpec, VolumeInterval

NAME = "compact.haemorrhage"
ZOO = Path(ichprog.__file__).parent / "zoo"
FOLDS = 3
TRAINED_ON = {"patients": 320, "seed": 21}
CALIBRATED_ON = {"patients": 100, "seed": 23}
INTERVALS_OF = {"patients": 200, "seed": 24}
DRAWN_VERSIONS = 8  # of each real head without blood
DRAWN_ML = (0.7, 60.0)

WEIGHT_DECAY, AVERAGE = 1e-4, 0.985
SAVE_EVERY = 100
VOXEL_THRESHOLDS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)
SPECIFICITY = 0.85  # the lowest that the threshold of a scan may have
LEAST_CELLS = 40.0  # about 1 mL
VOLUME_RANGES = (0.0, 0.1, 1.0, 5.0, 20.0)  # lowest measured volume in mL of each range with an interval of its own
LEAST_PATIENTS = 40  # in each range, so that two lie beyond each bound


class Stage(NamedTuple):
    """A stage of the training, in which the learning rate rises and falls once.

    Attributes:
        steps: Number of optimiser steps.
        learning_rate: The highest learning rate.
        shares: Share of each kind of patient in a batch.
        batch: Number of slabs in a batch.
        width: Rows and columns of a slab, in cells of the grid.
        loss_weights: Weights of the terms of the loss.
    """

    steps: int
    learning_rate: float
    shares: Mapping[str, float]
    batch: int
    width: int
    loss_weights: Mapping[str, float]


SLICES = 12  # of a slab
# Parts of slices around blood teach more in the same time than whole slices. Where slices are labelled as a whole, and
# for the evidence of slices and scans, whole slices are needed.
START = Stage(3200, 4e-3, {"simulated": 1.0}, 8, 96, {"dice": 2.0, "kinds": 0.3, "regions": 0.2})
LOSS_OF_WHOLE_SLICES = {"dice": 2.0, "kinds": 0.5, "regions": 0.4}
FOLD_STAGES = (
    Stage(600, 1.2e-3, {"plain": 0.13, "drawn": 0.22, "weak": 0.2, "simulated": 0.45}, 4, 160, LOSS_OF_WHOLE_SLICES),
    Stage(900, 2e-3, {"plain": 0.12, "drawn": 0.48, "simulated": 0.4}, 8, 96, {"dice": 2.0, "kinds": 0.4}),
    Stage(500, 8e-4, {"plain": 0.25, "drawn": 0.35, "simulated": 0.4}, 4, 160, LOSS_OF_WHOLE_SLICES),
    Stage(600, 1.2e-3, {"plain": 0.2, "drawn": 0.3, "simulated": 0.5}, 4, 160, LOSS_OF_WHOLE_SLICES),
)


@dataclass(frozen=True)
class Item:
    """One scan to train on.

    Attributes:
        kind: "plain" and "weak" are real heads without and with blood, "drawn" is a real head with blood drawn into it.
        name: Name of the prepared file.
        scan: Path of the scan.
        fold: The fold that does not train on the scan; None if every fold does.
        mask: Path of the mask of a simulated patient.
        slices: Numbers of the slices with blood, in the order of the file.
        seed: Random seed of the drawn blood.
    """

    kind: str
    name: str
    scan: Path
    fold: int | None
    mask: Path | None = None
    slices: tuple[int, ...] = ()
    seed: int = 0


def fold_of(patient: str) -> int:
    """Return the fold that does not train on a real patient, by the number in the patient's name."""
    return int(re.sub(r"\D", "", patient)) % FOLDS


def list_items(real: Path, simulated: Path, first_slice: int) -> list[Item]:
    """List all scans to train on: real heads, their drawn versions, and simulated patients."""
    items = []
    for row in _rows(real):
        patient, scan, fold = row["patient"], real.parent / row["scan"], fold_of(row["patient"])
        if row["haemorrhage"] == "1":
            slices = tuple(int(number) - first_slice for number in row["slices"].split())
            items.append(Item("weak", patient, scan, fold, slices=slices))
            continue
        items.append(Item("plain", patient, scan, fold))
        for version in range(DRAWN_VERSIONS):
            items.append(Item("drawn", f"{patient}-{version}", scan, fold, seed=len(items)))
    for row in _rows(simulated):
        mask = simulated.parent / "masks" / f"{row['patient']}.nii.gz"
        items.append(Item("simulated", row["patient"], simulated.parent / row["scan"], None, mask))
    return items


def prepare(item: Item, spec: ModelSpec, folder: Path) -> None:
    """Write the grid and the regions of a scan, unless the file exists."""
    target = folder / f"{item.name}.npz"
    if target.exists():
        return
    contract, source, mask = spec.input, item.scan, None
    if item.kind == "drawn":
        source, mask = draw(item)
    loaded = load(source, expected_ranges=contract.expected_ranges, brain="auto")
    regions = len(MASK_VALUES)
    if item.kind == "weak":
        holds = np.zeros(loaded.hu.shape[2], np.float32)
        holds[list(item.slices)] = 1
        column = dataclasses.replace(contract, shape=(contract.shape[0], 1, 1))
        in_order = np.broadcast_to(source_slices(holds, loaded.source_affine), (1, 1, len(holds)))
        filled = preprocessing.prepare_regions(in_order, 1, column)[0]
        fractions = np.broadcast_to(np.where(filled > 0, -1.0, 0.0), (regions, *contract.shape))
    elif item.kind == "plain":
        fractions = np.zeros((regions, *contract.shape))
    else:
        voxels = load_regions(item.mask if mask is None else mask, loaded)
        fractions = preprocessing.prepare_regions(voxels, regions, contract)
    grid = preprocessing.prepare(loaded.hu, contract)
    with atomic_write(target) as part, part.open("wb") as file:
        np.savez_compressed(file, grid=grid.astype(np.float16), regions=fractions.astype(np.float16))


def draw(item: Item) -> tuple[Any, Any]:
    """Draw a haemorrhage of a random kind and volume into a real head, and return the scan and its mask."""
    random = np.random.default_rng([31, item.seed])
    for _ in range(20):
        kind, volume = str(random.choice(KINDS)), float(np.exp(random.uniform(*np.log(DRAWN_ML))))
        try:
            return add_haemorrhage(item.scan, kind, volume, seed=item.seed)
        except InvalidValueError:  # does not fit into narrow ventricles
            continue
    raise AssertionError(item)


class _Scan(NamedTuple):
    """A prepared scan, and its slices with each region; -1 is the region of a scan without blood."""

    grid: np.ndarray
    regions: np.ndarray
    slices: dict[int, np.ndarray]

    @classmethod
    def of(cls, grid: np.ndarray, regions: np.ndarray) -> "_Scan":
        """Find the slices with each region. Slices whose voxels are unknown count for the first region."""
        holds = np.abs(regions).max((2, 3)) > 0.3
        slices = {index: np.flatnonzero(each) for index, each in enumerate(holds) if each.any()}
        if (regions < 0).any():
            slices = dict(list(slices.items())[:1])
        return cls(grid, regions, slices or {-1: np.flatnonzero(grid.any((1, 2)))})


class Batches:
    """Draw batches of slabs, each from one scan.

    Args:
        items: Scans to train on.
        folder: Folder of the prepared files.
        stage: What a batch holds.
        seed: Random seed.
    """

    def __init__(self, items: Sequence[Item], folder: Path, stage: Stage, seed: int) -> None:
        self.random, self.stage = np.random.default_rng([seed, 7]), stage
        self.scans: dict[str, list[_Scan]] = {kind: [] for kind in stage.shares}
        for item in items:
            if item.kind in stage.shares:
                with np.load(folder / f"{item.name}.npz") as stored:
                    self.scans[item.kind].append(_Scan.of(stored["grid"], stored["regions"]))

    def draw(self) -> tuple[Any, Any]:
        """Return grids `(B, 1, d, H, W)` and fractions of regions `(B, R, d, H, W)`."""
        import torch

        shares = self.stage.shares
        kinds = self.random.choice(list(shares), self.stage.batch, p=list(shares.values()))
        slabs = [self._slab(*self._choose(str(kind))) for kind in kinds]
        grids, regions = (torch.from_numpy(np.stack(each).astype(np.float32)) for each in zip(*slabs, strict=True))
        return self._augment(grids[:, None], regions)

    def _choose(self, kind: str) -> tuple[_Scan, np.ndarray]:
        """Choose a scan and slices of it, so that each kind of blood and no blood are equally frequent."""
        regions = sorted({region for scan in self.scans[kind] for region in scan.slices})
        region = self.random.choice(regions)
        scans = [scan for scan in self.scans[kind] if region in scan.slices]
        scan = scans[self.random.integers(len(scans))]
        return scan, scan.slices[region]

    def _slab(self, scan: _Scan, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return neighbouring slices, around one of the chosen slices in two of three slabs."""
        depth = len(scan.grid)
        middle = self.random.integers(depth)
        if self.random.random() < 2 / 3:
            middle = self.random.choice(chosen) + self.random.integers(-SLICES // 3, SLICES // 3 + 1)
        first = int(np.clip(middle - SLICES // 2, 0, depth - SLICES))
        return scan.grid[first : first + SLICES], scan.regions[:, first : first + SLICES]

    def _augment(self, grids: Any, regions: Any) -> tuple[Any, Any]:
        """Cut parts out of slabs, turned and resized, and change contrast, sharpness and noise, by random amounts."""
        import torch
        from torch.nn import functional

        transforms = torch.from_numpy(np.stack([self._transform(filled) for filled in regions.sum((1, 2)).numpy()]))
        slices, width = grids.shape[2], self.stage.width
        at = functional.affine_grid(transforms, [len(grids), 1, width, width], align_corners=False)
        at = at.repeat_interleave(slices, 0)

        def moved(values: Any, mode: str) -> Any:
            flat = values.transpose(1, 2).flatten(0, 1)
            out = functional.grid_sample(flat, at, mode=mode, align_corners=False)
            return out.unflatten(0, (len(values), slices)).transpose(1, 2)

        grids, regions = moved(grids, "bilinear"), moved(regions, "nearest")
        inside = grids > 0
        for index in range(len(grids)):
            grid, random = grids[index], self.random
            if random.random() < 0.25:
                grid = functional.avg_pool3d(grid, (1, 3, 3), 1, (0, 1, 1))
            elif random.random() < 0.2:
                grid = grid + random.uniform(0.2, 0.8) * (grid - functional.avg_pool3d(grid, (1, 3, 3), 1, (0, 1, 1)))
            grid = grid * (1 + random.uniform(-0.04, 0.04)) + random.uniform(-0.016, 0.016)
            noise = torch.from_numpy(random.standard_normal(grid.shape, dtype=np.float32))
            grid = grid + abs(random.normal(0, 0.015)) * noise
            grids[index] = (grid * inside[index]).clamp(0, 1)
        return grids, regions

    def _transform(self, filled: np.ndarray) -> np.ndarray:
        """Draw the map `(2, 3)` from output to input coordinates of a slice, given the blood `(H, W)` of a slab."""
        share = self.stage.width / len(filled)
        angle, size = np.radians(self.random.uniform(-12, 12)), self.random.uniform(0.88, 1.12, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * size * share
        turn[:, 0] *= self.random.choice([-1, 1])
        centre = self.random.uniform(-0.06, 0.06, 2)
        if share < 1:
            centre = self._centre(np.maximum(filled, 0)) * (1 - share)
        return np.concatenate([turn, centre[:, None]], axis=1).astype(np.float32)

    def _centre(self, filled: np.ndarray) -> np.ndarray:
        """Choose the column and row of a part, -1 and 1 at the ends: near blood in four of five parts."""
        if not filled.any() or self.random.random() < 0.2:
            return self.random.uniform(-1, 1, 2)
        height, width = filled.shape
        row, column = divmod(self.random.choice(filled.size, p=filled.ravel() / filled.sum()), width)
        at = np.array([(column + 0.5) / width, (row + 0.5) / height]) * 2 - 1
        at += self.random.uniform(-2 / 3, 2 / 3, 2) * self.stage.width / width
        return np.clip(at / (1 - self.stage.width / width), -1, 1)


class Training:
    """The training of one fold, which is continued from its checkpoint if there is one.

    Args:
        spec: The model.
        checkpoint: File that the state is saved to.
        weights: File of the weights to begin with; None for random ones.
        bfloat16: Compile the network and run it in bfloat16: twice as fast on CPUs with AMX.
    """

    def __init__(self, spec: ModelSpec, checkpoint: Path, weights: Path | None, *, bfloat16: bool) -> None:
        import torch
        from safetensors.torch import load_file

        self.checkpoint, self.step = checkpoint, 0
        self.network = networks.build(spec).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if weights is not None:
            self.network.load_state_dict(load_file(weights))
        self.head = self.network.heads[spec.tasks[0].name]
        self.average = torch.optim.swa_utils.AveragedModel(
            self.network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE), use_buffers=True
        )

        def forward(grids: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                features = self.network.backbone(grids)
            return self.head.dense(features.float())  # type: ignore[operator]

        self.forward = torch.compile(forward) if bfloat16 else forward
        self.stored: dict[str, Any] = {}
        if checkpoint.exists():
            self.stored = torch.load(checkpoint, weights_only=True)
            self.step = self.stored["step"]
            for module, values in zip((self.network, self.average), self.stored["networks"], strict=True):
                module.load_state_dict(values)
        self.network.train()

    def start(self, stage: Stage) -> None:
        """Begin a stage, or continue it after the steps of the checkpoint."""
        import torch

        from ichprog.heads import DenseLossWeights

        rate = stage.learning_rate
        self.optimiser = torch.optim.AdamW(self.network.parameters(), rate, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, rate, stage.steps, pct_start=0.1)
        if self.step:
            for part, values in zip((self.optimiser, self.schedule), self.stored["optimisers"], strict=True):
                part.load_state_dict(values)
        self.head.loss_weights = DenseLossWeights(**stage.loss_weights)

    def train_on(self, grids: Any, regions: Any) -> float:
        """Take one step and return the loss."""
        import torch

        regions = torch.nn.functional.avg_pool3d(regions, (1, 2, 2))  # the resolution of the features
        dense = self.forward(grids.contiguous(memory_format=torch.channels_last_3d))  # faster on CPUs
        loss = self.head.dense_loss(dense, regions)  # type: ignore[operator]
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        self.step += 1
        return float(loss.detach())

    def save(self) -> None:
        """Write the checkpoint."""
        import torch

        states = {"networks": (self.network, self.average), "optimisers": (self.optimiser, self.schedule)}
        stored = {name: [part.state_dict() for part in parts] for name, parts in states.items()}
        with atomic_write(self.checkpoint) as file:
            torch.save({**stored, "step": self.step}, file)


def train(training: Training, stage: Stage, batches: Batches, target: Path) -> None:
    """Train and write the weights: the moving average over the steps."""
    from safetensors.torch import save_file

    losses: list[float] = []
    training.start(stage)
    while training.step < stage.steps:
        losses.append(training.train_on(*batches.draw()))
        if training.step % SAVE_EVERY == 0:
            print(f"{target.stem}, step {training.step}: loss {np.mean(losses[-SAVE_EVERY:]):.3f}", flush=True)
            training.save()
    with atomic_write(target) as file:
        state = training.average.module.state_dict()
        save_file({name: values.contiguous() for name, values in state.items()}, file)
    training.checkpoint.unlink(missing_ok=True)


def train_part(part: str, spec: ModelSpec, items: Sequence[Item], folder: Path, *, bfloat16: bool) -> None:
    """Train the first network or one fold through its stages, except those whose weights are in the folder.

    Args:
        part: "start", or the number of a fold.
        spec: The model.
        items: Scans to train on. A fold leaves out those of its own.
        folder: Folder of the weights and of the prepared files in `grids`.
        bfloat16: As in `Training`.
    """
    import torch

    name, seed, stages, weights = "start", FOLDS, (START,), None
    if part != "start":
        name, seed, stages, weights = f"fold{part}", int(part), FOLD_STAGES, folder / "start.safetensors"
        items = [item for item in items if item.fold != seed]
    for number, stage in enumerate(stages, 1):
        target = folder / (f"{name}.safetensors" if number == len(stages) else f"{name}-stage{number}.safetensors")
        if not target.exists():
            torch.manual_seed(seed)
            training = Training(spec, target.with_suffix(".part"), weights, bfloat16=bfloat16)
            batches = Batches(items, folder / "grids", stage, seed=1000 * seed + 100_000 * (number - 1) + training.step)
            train(training, stage, batches, target)
        weights = target


class Answers(NamedTuple):
    """What each fold F answers for the calibration patients N, and the truth.

    Attributes:
        blood: `(N, d, h, w)` mean probability of blood over folds.
        regions: `(F, N, R)` logits of each region.
        filled: `(N, R)` volume of each region, in cells of the features.
    """

    blood: np.ndarray
    regions: np.ndarray
    filled: np.ndarray


def answer(spec: ModelSpec, run: Path, grids: Sequence[Path]) -> Answers:
    """Apply the folds to the calibration patients."""
    import torch

    folds = [networks.load(spec, run / f"fold{fold}.safetensors") for fold in range(FOLDS)]
    task = spec.tasks[0].name
    rows = []
    for path in grids:
        with np.load(path) as stored:
            grid, filled = torch.from_numpy(stored["grid"].astype(np.float32)), stored["regions"].astype(np.float32)
        with torch.no_grad():
            dense = [fold.forward_dense(grid[None, None])[1][task] for fold in folds]
        blood = 1 - np.mean([each.voxels.softmax(1)[0, 0].numpy() for each in dense], axis=0)
        regions = [each.regions[0].numpy() for each in dense]
        rows.append((blood, regions, filled.sum((1, 2, 3)) / 4))  # cells of the features are 4 times as large
    blood, regions, filled = (np.stack(each) for each in zip(*rows, strict=True))
    return Answers(blood, regions.swapaxes(0, 1), filled)


def find_voxel_threshold(answers: Answers) -> float:
    """Return the probability above which the voxels of simulated patients have the volume of their blood.

    It has the smallest median absolute error of the logarithm of the volume, over patients with at least 1 mL. At a
    probability of one half, volumes may be too small, because the voxels of thin bleeds are doubtful, or too large.
    """
    true = answers.filled.sum(1)
    used = true >= LEAST_CELLS

    def error(threshold: float) -> float:
        found = (answers.blood[used] > threshold).sum((1, 2, 3))
        return float(np.median(np.abs(np.log((found + 1) / (true[used] + 1)))))

    return min(VOXEL_THRESHOLDS, key=error)


def calibrated(logits: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return scale and shift of the logits `(N,)` after which the probabilities are calibrated (Platt 1999)."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10.0).fit(logits[:, None], truth)
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def publish(spec: ModelSpec, run: Path, answers: Answers, voxel_threshold: float) -> ModelSpec:
    """Write the weights into the zoo, and the spec with their checksums.

    The log odds of voxels are shifted so that `voxel_threshold` becomes one half. Those of slices stay as they were.
    Those of the regions of a scan are calibrated on the calibration patients. The logits of scans are not: when they
    were, a threshold chosen on two folds had more errors on the real heads of the third.
    """
    from safetensors.torch import load_file, save_file

    folder = ZOO / NAME
    folder.mkdir(exist_ok=True)
    checksums, odds = {}, float(np.log(1 / voxel_threshold - 1))
    for fold in range(FOLDS):
        state = load_file(run / f"fold{fold}.safetensors")
        head = f"heads.{spec.tasks[0].name}."
        for region, filled in enumerate(answers.filled.T):
            scale, shift = calibrated(answers.regions[fold, :, region], filled >= 1)
            state[f"{head}region_scale"][region] *= scale
            state[f"{head}region_shift"][region] = scale * state[f"{head}region_shift"][region] + shift
        state[f"{head}voxels.bias"][0] -= odds
        for part in ("slice", "region"):
            state[f"{head}{part}_shift"] -= odds * state[f"{head}{part}_scale"]
        file = folder / f"fold{fold}.safetensors"
        save_file(state, file)
        checksums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    spec = dataclasses.replace(spec, weights=dataclasses.replace(spec.weights, sha256=checksums), golden_output=None)
    _write(spec)
    grid = np.random.default_rng(0).random((1, *spec.input.shape), np.float32)
    outputs = ichprog.load_model(NAME, runtime="torch").predict_grids(grid)
    logits = {
        str(fold): {task: tuple(map(float, output.logits[0])) for task, output in tasks.items()}
        for fold, tasks in enumerate(outputs)
    }
    spec = dataclasses.replace(spec, golden_output=GoldenOutput(0, spec.input.shape, logits))
    _write(spec)
    return spec


def find_threshold(real: Path) -> float:
    """Return the probability at which `SPECIFICITY` is reached on the real heads.

    Each head is scored by the fold that was not trained on it. Bleeds in one slice only are left out.
    """
    folds = [ichprog.load_model(NAME, fold=fold) for fold in range(FOLDS)]
    (task,) = folds[0].spec.tasks
    probabilities, bleeding = [], []
    for row in _rows(real):
        count = len(row["slices"].split())
        if count != 1:
            prediction = ichprog.predict(folds[fold_of(row["patient"])], real.parent / row["scan"])
            probabilities.append(prediction[task.name].probabilities[task.labels[-1]])
            bleeding.append(count > 0)
    return threshold_at(bleeding, probabilities, "specificity", SPECIFICITY)


def volume_intervals(cohort: Path, *, workers: int) -> dict[str, tuple[VolumeInterval, ...]]:
    """Return the intervals of true volumes, as `MaskTarget.volume_intervals` states them.

    The bounds are the 5th and the 95th percentile over all simulated patients of a range of measured volumes. The
    patients served no other step. A range with few patients is merged with the range before it.
    """
    rows = _rows(cohort.with_name("truth.csv"))
    patients = list(parallel_map(partial(_volumes, scans=cohort.parent / "scans"), rows, workers=workers))
    return {kind: _intervals_by_range(np.array([volumes[kind] for volumes in patients])) for kind in patients[0]}


def _volumes(row: Mapping[str, str], scans: Path) -> dict[str, tuple[float, float]]:
    """Return the measured and the true volume in mL of each kind of blood, and of all, of a simulated patient."""
    true = {kind: float(row[f"{kind}_ml"]) for kind in MASK_VALUES}
    true["total"] = sum(true.values())
    measured_ml = ichprog.haemorrhage(scans / f"{row['patient']}.nii.gz", model=_published()).volume_ml
    return {kind: (measured, true[kind]) for kind, measured in measured_ml.items()}


@cache
def _published() -> ichprog.Model:
    return ichprog.load_model(NAME)


def _intervals_by_range(volumes: np.ndarray) -> tuple[VolumeInterval, ...]:
    """Return the intervals for measured and true volumes `(N, 2)` in mL."""
    measured, true = volumes.T
    starts = [0.0]
    for start in VOLUME_RANGES[1:]:
        if min((measured[measured >= starts[-1]] < start).sum(), (measured >= start).sum()) >= LEAST_PATIENTS:
            starts.append(start)
    intervals = []
    for start, end in pairwise([*starts, np.inf]):
        within = (measured >= start) & (measured < end)
        low, high = np.quantile((true[within] + 1) / (measured[within] + 1), (0.05, 0.95))
        intervals.append(VolumeInterval(float(start), round(float(low), 3), round(float(high), 3)))
    return tuple(intervals)


def main() -> None:
    """Run every step whose result is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", type=Path, required=True, help="table of real heads")
    parser.add_argument("--first-slice", type=int, default=0, help="number of the first slice in the column slices")
    parser.add_argument("--only", choices=["start", *map(str, range(FOLDS))], help="train this and stop")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16, for CPUs with AMX")
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate and prepare")
    args = parser.parse_args()
    spec, grids = ModelSpec.read(ZOO / f"{NAME}.json"), args.folder / "grids"
    cohort = simulate(args.folder / "simulated", **TRAINED_ON, workers=args.workers)
    items = list_items(args.real, cohort, args.first_slice)
    grids.mkdir(parents=True, exist_ok=True)
    list(parallel_map(partial(prepare, spec=spec, folder=grids), items, workers=args.workers))
    for part in [args.only] if args.only else ["start", *map(str, range(FOLDS))]:
        train_part(part, spec, items, args.folder, bfloat16=args.bfloat16)
    if args.only is None:
        cohort = simulate(args.folder / "calibration", **CALIBRATED_ON, workers=args.workers)
        calibration = [item for item in list_items(args.real, cohort, args.first_slice) if item.kind == "simulated"]
        list(parallel_map(partial(prepare, spec=spec, folder=grids), calibration, workers=args.workers))
        answers = answer(spec, args.folder, [grids / f"{item.name}.npz" for item in calibration])
        threshold = find_voxel_threshold(answers)
        print(f"Voxels hold blood above a probability of {threshold:g}.")
        spec = publish(spec, args.folder, answers, threshold)
        probability = round(find_threshold(args.real), 3)
        print(f"A scan shows blood above a probability of {probability:g}.")
        intervals = volume_intervals(
            simulate(args.folder / "intervals", **INTERVALS_OF, workers=args.workers), workers=args.workers
        )
        (task,) = spec.tasks
        mask = dataclasses.replace(task.mask, volume_intervals=intervals)  # type: ignore[type-var]
        _write(dataclasses.replace(spec, tasks=(dataclasses.replace(task, threshold=probability, mask=mask),)))


def _write(spec: ModelSpec) -> None:
    text = json.dumps(spec.to_dict(), indent=2, ensure_ascii=False)
    (ZOO / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
