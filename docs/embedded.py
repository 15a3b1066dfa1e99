"""Train the embedded outcome models again and measure them: `python docs/embedded.py FOLDER --workers 2`.

The script simulates patients straight onto the grid of the model and trains networks of the image, one after the other;
the last ones are published. Then it trains their fusion with age and GCS, on the fixed features. It calibrates both
models and measures them, on simulated patients of other seeds. It writes the weights and the specs into `ichprog/zoo/`,
and the results into the specs and `docs/embedded.json`. Finished steps in FOLDER are reused, so an interrupted run can
be continued. `--only-measure` only measures. `--ablation` trains the network of the image for a few steps, each time
without one part and with two seeds, and writes `docs/embedded-ablation.json`.

Training does not use `ichprog train`, because it learns from what only a simulation knows: the probabilities of the
labels given the image instead of labels, and the causes of the image.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import ichprog
from ichprog import metrics, networks, preprocessing
from ichprog.calibration import COVERAGE, adjust, conformal_set, input_statistics, log_odds, measure_distance
from ichprog.clinical import encode
from ichprog.io import atomic_write
from ichprog.parallel import parallel_map
from ichprog.scan import load, load_regions
from ichprog.simulate import MASK_VALUES, simulate
from ichprog.simulate.population import MARKS, SITES
from ichprog.spec import GoldenOutput, ModelSpec, PluginRef
from ichprog.train.calibration import fit_calibration

NAME, FUSED = "compact.prognosis_gcs3_age_v2", "compact.prognosis_gcs3_age_clinical"
DOCS, ZOO = Path(__file__).parent, Path(ichprog.__file__).parent / "zoo"
TRAINED_ON = {"patients": 10_000, "seed": 1}
CALIBRATED_ON = {"patients": 500, "seed": 6}
FULL_CALIBRATION = {"patients": 300, "seed": 6}  # the same patients; scans on the grid have less noise
MEASURED_ON = [{"patients": 1500, "seed": seed} for seed in (2, 3, 4, 5)]
FULL_SCANS = {"patients": 200, "seed": 2}
CYCLES = (1600, 600, 600, 3000, 2800, 4500, 4300)  # optimiser steps; the last cycle begins with `deepen`
NETWORKS = 1  # that of the last cycle, as only it has residual blocks
ABLATED_PATIENTS, ABLATION_STEPS, ABLATION_SEEDS = 4000, 300, (0, 1)
ABLATION_MEASURED = 500  # patients of each seed
BATCH, LEARNING_RATE, WEIGHT_DECAY, AVERAGE = 16, 4e-3, 1e-3, 0.99
STATISTICS_OF = 640  # patients
CAUSES_WEIGHT, CELLS_WEIGHT = 1.0, 10.0
RARE = -5.0  # log-odds of blood in a cell before anything is learned
PRINT_EVERY = 100
FUSION_STEPS, FUSION_BATCH, FUSION_RATE = 1500, 64, 3e-3
PATTERNS = {  # known values, and the best possible probability of a poor outcome
    (): "seen_poor",
    ("age",): "seen_poor_with_age",
    ("gcs",): "seen_poor_with_gcs",
    ("age", "gcs"): "seen_poor_with_age_gcs",
}
QUESTIONS = (  # task, first positive label, description
    ("prognosis", 1, "poor outcome"),
    ("gcs", 1, "GCS of 12 or less"),
    ("gcs", 2, "GCS of 8 or less"),
    ("age", 1, "age of 80 or more"),
)
_FIGURE = "AUC for"


@dataclass(frozen=True)
class Design:
    """Choices of the training that the ablation compares.

    Attributes:
        probabilities: Whether the targets are the probabilities of the labels given the image, instead of labels.
        causes: Whether the networks also learn the causes of the image.
        cells: Whether the networks also learn which kind of blood is where.
        coordinates: Whether the last layer knows positions.
        hidden: Units of the second layer of each head.
        randomised: Whether grids are turned, moved, brightened and made noisier at random.
        patients: Share of the patients that are trained on.
        gcs_weight: Weight of each of the two questions about GCS in the loss; that of the others is 1.
    """

    probabilities: bool = True
    causes: bool = True
    cells: bool = True
    coordinates: bool = True
    hidden: int = 32
    randomised: bool = True
    patients: float = 1.0
    gcs_weight: float = 1.0


ABLATIONS = {
    "everything": Design(),
    "labels instead of probabilities": Design(probabilities=False),
    "without causes": Design(causes=False),
    "without blood in cells": Design(cells=False),
    "without causes and cells": Design(causes=False, cells=False),
    "without coordinates": Design(coordinates=False),
    "heads of one layer": Design(hidden=0),
    "without randomisation": Design(randomised=False),
    "half of the patients": Design(patients=0.5),
}


@dataclass(frozen=True)
class Patients:
    """Prepared patients.

    Attributes:
        grids: `(N, D, H, W)` float16.
        cells: `(N, R, d, h, w)` float16: the fraction of each kind of blood in coarser cells.
        probabilities: `(N, 4)` of the `QUESTIONS` given the image, NaN without haemorrhage.
        labels: `(N, 4)` 0 or 1, NaN without haemorrhage.
        sizes: `(N, S)` logarithms of volumes, and marks of age.
        flags: `(N, F)` 0 or 1: blood, ventricular blood, infratentorial, each site.
        values: `(N, 2)` age and GCS, NaN without haemorrhage.
        given: `(N, 4)` probability of a poor outcome given the image and each of `PATTERNS`, NaN without haemorrhage.
    """

    grids: np.ndarray
    cells: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    flags: np.ndarray
    values: np.ndarray
    given: np.ndarray


def prepare_patients(cohort: Path, spec: ModelSpec, workers: int) -> None:
    """Prepare the patients of a simulated cohort, except those that are prepared."""
    folder = cohort.parent / "grids"
    folder.mkdir(exist_ok=True)
    names = [row["patient"] for row in _read(cohort)]
    list(parallel_map(partial(prepare, cohort.parent, folder, spec), names, workers=workers))


def load_patients(cohort: Path, spec: ModelSpec, most: int | None = None) -> Patients:
    """Read the prepared patients of a simulated cohort: all of them, or the first `most`."""
    truth, rows = _read(cohort.with_name("truth.csv"))[:most], _read(cohort)[:most]
    grids = np.empty((len(rows), *spec.input.shape), np.float16)
    cells = np.empty((len(rows), len(MASK_VALUES), *_cells_shape(spec)), np.float16)
    for number, row in enumerate(rows):
        with np.load(cohort.parent / "grids" / f"{row['patient']}.npz") as stored:
            grids[number], cells[number] = stored["grid"], stored["cells"]
    gcs, poor, age = ([_number(row[name]) for row in rows] for name in ("gcs", "poor_outcome", "age"))
    bleeds = np.array([row["haemorrhage"] == "1" for row in truth])
    below = [np.where(bleeds, np.array(gcs) <= most, np.nan) for most in (12, 8)]
    p_below = [[_number(row[n]) for row in truth] for n in ("p_gcs_9_12", "p_gcs_3_8")]
    ml = np.array([[_number(row[f"{kind}_ml"]) for kind in MASK_VALUES] for row in truth])
    below_tentorium = [row["infratentorial"] == "1" for row in truth]
    sites = np.array([[row["location"] == site for site in SITES] for row in truth])
    return Patients(
        grids,
        cells,
        np.column_stack(
            [
                [_number(row["seen_poor"]) for row in truth],
                np.sum(p_below, axis=0),
                p_below[1],
                [_number(row["seen_age_80"]) for row in truth],
            ]
        ),
        np.column_stack([poor, *below, np.array(age) >= 80]),
        np.column_stack(
            [
                np.log(np.column_stack([ml, ml.sum(1)]) + 0.3),
                [[_number(row[mark]) for mark in MARKS] for row in truth],
            ]
        ),
        np.column_stack([bleeds, ml[:, 1] > 0, below_tentorium, sites]).astype(np.float64),
        np.column_stack([age, gcs]),
        np.array([[_number(row[name]) for name in PATTERNS.values()] for row in truth]),
    )


def prepare(folder: Path, target: Path, spec: ModelSpec, patient: str) -> None:
    """Write the grid of a patient and the blood in its coarser cells, unless the file exists."""
    file = target / f"{patient}.npz"
    if file.exists():
        return
    scan = load(folder / "scans" / f"{patient}.nii.gz", expected_ranges={"no-blood": (None, None)}, brain="given")
    mask, (depth, height, width) = load_regions(folder / "masks" / f"{patient}.nii.gz", scan), _cells_shape(spec)
    cells = np.zeros((len(MASK_VALUES), depth, height, width), np.float32)
    for number in np.unique(mask[mask > 0]):  # most patients have one kind of blood
        (fractions,) = preprocessing.prepare_regions(mask == number, 1, spec.input)
        cells[number - 1] = fractions.reshape(depth, 2, height, 4, width, 4).mean((1, 3, 5))
    grid = preprocessing.prepare(scan.hu, spec.input)
    with atomic_write(file) as part, part.open("wb") as opened:
        np.savez(opened, grid=grid.astype(np.float16), cells=cells.astype(np.float16))


def _cells_shape(spec: ModelSpec) -> tuple[int, int, int]:
    depth, height, width = spec.input.shape
    return depth // 2, height // 4, width // 4


class Training:
    """Train networks one after the other, each from the average of the one before: a snapshot ensemble.

    Args:
        spec: The model.
        patients: Patients to train on.
        design: Choices of the training.
        seed: Random seed.

    Source: Huang et al., ICLR 2017 (arXiv 1704.00109).
    """

    def __init__(self, spec: ModelSpec, patients: Patients, design: Design, seed: int = 0) -> None:
        import torch
        from torch import nn

        torch.manual_seed(seed)
        self.patients, self.design, self.random = patients, design, np.random.default_rng(seed)
        self.count = round(design.patients * len(patients.grids))
        self.network = networks.build(spec).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        channels = self.network.backbone.out_channels
        outputs = patients.sizes.shape[1] + patients.flags.shape[1]
        self.causes = networks.build_head(
            PluginRef("ordinal", {"pool": "both", "hidden": design.hidden}), channels, ["none"] * (outputs + 1)
        )
        self.cells = nn.Conv3d(channels, patients.cells.shape[1] + 1, 1)
        nn.init.constant_(self.cells.bias, RARE)  # type: ignore[arg-type]
        self.auxiliary = nn.ModuleList([self.causes, self.cells])
        self.modules = nn.ModuleList([self.network, self.auxiliary])
        self.average = torch.optim.swa_utils.AveragedModel(
            self.network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
        )
        self.scale = patients.sizes.mean(0), patients.sizes.std(0)
        self.order: list[int] = []

    def run_cycle(self, steps: int, name: str) -> dict[str, Any]:
        """Train for one rise and fall of the learning rate, and return the weights of the averaged network."""
        import torch

        self.network.load_state_dict(self.average.module.state_dict())
        optimiser = torch.optim.AdamW(self.modules.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps, pct_start=0.15)
        self.modules.train()
        losses = []
        for step in range(1, steps + 1):
            loss = self._loss()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            self.average.update_parameters(self.network)
            losses.append(float(loss.detach()))
            if step % PRINT_EVERY == 0:
                print(f"{name}, step {step} of {steps}: loss {np.mean(losses[-PRINT_EVERY:]):.4f}", flush=True)
        # the statistics of batch normalisation are those of the averaged weights, not averages of statistics
        batches = (self._grids(np.arange(i, i + BATCH)) for i in range(0, min(STATISTICS_OF, self.count), BATCH))
        torch.optim.swa_utils.update_bn(batches, self.average)
        return {key: values.contiguous().clone() for key, values in self.average.module.state_dict().items()}

    def _loss(self) -> Any:
        """Return the loss of the next batch."""
        import torch
        from torch.nn import functional

        if len(self.order) < BATCH:
            self.order += list(self.random.permutation(self.count))
        chosen, self.order = np.array(self.order[:BATCH]), self.order[BATCH:]
        patients = self.patients
        cells = torch.from_numpy(patients.cells[chosen].astype(np.float32))
        grids, cells = self._augment(self._grids(chosen), cells)
        features = self.network.backbone(grids.contiguous(memory_format=torch.channels_last_3d))
        logits = torch.cat([head(features) for head in self.network.heads.values()], dim=1)
        wanted = patients.probabilities if self.design.probabilities else patients.labels
        target = torch.from_numpy(wanted[chosen]).float()
        errors = functional.binary_cross_entropy_with_logits(logits, target.nan_to_num(), reduction="none")
        weights = torch.tensor([self.design.gcs_weight if task == "gcs" else 1.0 for task, _, _ in QUESTIONS])
        loss = (errors * ~target.isnan() * weights).sum() / BATCH
        if self.design.causes:
            mean, spread = self.scale
            sizes = torch.from_numpy((patients.sizes[chosen] - mean) / spread).float()
            flags = torch.from_numpy(patients.flags[chosen]).float()
            causes = self.causes(features)
            split = sizes.shape[1]
            about = functional.smooth_l1_loss(causes[:, :split], sizes)
            about = about + functional.binary_cross_entropy_with_logits(causes[:, split:], flags)
            loss = loss + CAUSES_WEIGHT * 2 * about
        if self.design.cells:
            below = torch.from_numpy(patients.flags[chosen, 2]).float()[:, None, None, None, None]
            kinds = functional.avg_pool3d(cells, 2)
            kinds = torch.cat([kinds, kinds.sum(1, keepdim=True) * below], dim=1).clamp(0, 1)
            loss = loss + CELLS_WEIGHT * functional.binary_cross_entropy_with_logits(self.cells(features), kinds)
        return loss

    def _grids(self, chosen: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(self.patients.grids[chosen].astype(np.float32))[:, None]

    def _augment(self, grids: Any, cells: Any) -> tuple[Any, Any]:
        """Flip, turn, resize and move slices, and change contrast, brightness and noise, by random amounts."""
        import torch
        from torch.nn import functional

        if not self.design.randomised:
            return grids, cells
        random, number = self.random, len(grids)
        angles, sizes = np.radians(random.uniform(-10, 10, number)), random.uniform(0.95, 1.05, number)
        turn = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]]) * sizes
        turn[:, 0] *= random.choice([-1, 1], number)
        moves = np.concatenate([turn.transpose(2, 0, 1), random.uniform(-0.05, 0.05, (number, 2, 1))], axis=2)

        def moved(values: Any) -> Any:
            flat = values.flatten(1, 2)
            at = functional.affine_grid(torch.from_numpy(moves).float(), list(flat.shape), align_corners=False)
            return functional.grid_sample(flat, at, align_corners=False).unflatten(1, values.shape[1:3])

        grids, cells = moved(grids), moved(cells)
        inside, shape = grids > 0, (number, 1, 1, 1, 1)
        gain, offset, noise = (
            torch.from_numpy(each).float()
            for each in (
                random.uniform(0.94, 1.06, shape),
                random.uniform(-0.03, 0.03, shape),
                np.abs(random.normal(0, 0.012, shape)),
            )
        )
        grids = (grids * gain + offset + noise * torch.randn(grids.shape)) * inside
        return grids.clamp(0, 1), cells


def train(spec: ModelSpec, patients: Patients, run: Path) -> None:
    """Train the networks and write their weights, from the last one that exists."""
    from safetensors.torch import load_file, save_file

    run.mkdir(exist_ok=True)
    training, files = Training(_without_blocks(spec), patients, Design()), weight_files(run)
    for file, steps in zip(files, CYCLES, strict=True):
        if file == files[-1]:
            training = deepen(training, spec)
        other = file.with_name(f"auxiliary-{file.name}")  # without its other outputs, a network learns them again
        if file.exists():
            training.average.module.load_state_dict(load_file(file))
            if other.exists():
                training.auxiliary.load_state_dict(load_file(other))
            continue
        state = training.run_cycle(steps, file.stem)
        for path, values in ((other, training.auxiliary.state_dict()), (file, state)):
            with atomic_write(path) as part:
                save_file(values, part)


def deepen(training: Training, spec: ModelSpec) -> Training:
    """Return a training that continues another one, with residual blocks and twice the weight of GCS.

    The blocks add nothing at first and double the time of a step. GCS is the hardest to learn.
    """
    from torch import nn

    deeper = Training(spec, training.patients, Design(gcs_weight=2.0))
    before, after = training.average.module, deeper.average.module
    kinds = nn.Conv3d, nn.BatchNorm3d
    layers = ([layer for layer in each.backbone.features if isinstance(layer, kinds)] for each in (before, after))
    for old, new in zip(*layers, strict=True):
        new.load_state_dict(old.state_dict())
    after.heads.load_state_dict(before.heads.state_dict())
    deeper.auxiliary.load_state_dict(training.auxiliary.state_dict())
    return deeper


def _without_blocks(spec: ModelSpec) -> ModelSpec:
    options = {**spec.backbone.options, "residual": False}
    return dataclasses.replace(spec, backbone=PluginRef(spec.backbone.name, options))


def weight_files(run: Path) -> list[Path]:
    """Return the weight file of each cycle of the training; the last `NETWORKS` of them are published."""
    return [run / f"fold{number}.safetensors" for number in range(len(CYCLES))]


def train_fusion(spec: ModelSpec, patients: Patients, run: Path, target: Path) -> None:
    """Train the fusion and the head of the outcome on the fixed features of each network, unless they exist.

    Each value is hidden at random. The target is the probability given the image and the values that are left.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional

    target.mkdir(exist_ok=True)
    chosen = np.flatnonzero(patients.flags[:, 0] == 1)
    known_of = np.array([[name in pattern for name in ("age", "gcs")] for pattern in PATTERNS], np.float32)
    for number, source in enumerate(weight_files(run)[-NETWORKS:]):
        file = target / source.name
        if file.exists():
            continue
        torch.manual_seed(number)
        random, network = np.random.default_rng(number), networks.build(spec)
        network.load_state_dict(load_file(source), strict=False)  # the fusion is new
        network.eval()
        with torch.no_grad():
            features = torch.cat(
                [
                    network.backbone(torch.from_numpy(patients.grids[chosen[i : i + 32]].astype(np.float32))[:, None])
                    for i in range(0, len(chosen), 32)
                ]
            )
        encoded = encode_patterns(spec, patients.values[chosen], [("age", "gcs")] * len(chosen))
        task = next(task for task in spec.tasks if task.uses_clinical)
        head, fusion = network.heads[task.name], network.fusion
        trained = [*fusion.parameters(), *head.parameters()]
        optimiser = torch.optim.AdamW(trained, FUSION_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, FUSION_RATE, FUSION_STEPS, pct_start=0.1)
        losses = []
        for step in range(1, FUSION_STEPS + 1):
            batch = random.integers(len(chosen), size=FUSION_BATCH)
            pattern = random.integers(len(PATTERNS), size=FUSION_BATCH)
            left = encoded[batch] * np.tile(known_of[pattern], 2)
            logits = head(fusion(features[batch], torch.from_numpy(left)))[:, 0]
            wanted = torch.from_numpy(patients.given[chosen[batch], pattern]).float()
            loss = functional.binary_cross_entropy_with_logits(logits, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if step % 500 == 0:
                print(f"fusion {number}, step {step}: loss {np.mean(losses[-500:]):.4f}", flush=True)
        with atomic_write(file) as part:
            save_file({key: each.contiguous() for key, each in network.state_dict().items()}, part)


def measure_fused(spec: ModelSpec, cohorts: Sequence[Patients], training: Patients) -> list[dict[str, Any]]:
    """Return the AUC of a poor outcome for each pattern of known values, the best possible one, and the sets."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bleeds = [each.flags[:, 0] == 1 for each in cohorts]
    truth, given, values, grids = (
        np.concatenate([getattr(each, name)[b] for each, b in zip(cohorts, bleeds, strict=True)])
        for name in ("labels", "given", "values", "grids")
    )
    poor, bled = truth[:, 0], training.flags[:, 0] == 1
    clinical = make_pipeline(StandardScaler(), LogisticRegression()).fit(
        training.values[bled], training.labels[bled, 0]
    )
    alone = clinical.predict_proba(values)[:, 1]
    delong, compare = metrics.comparisons.delong_interval, metrics.comparisons.delong
    figures, scores = [], {}
    for column, known in enumerate(PATTERNS):
        encoded = encode_patterns(spec, values, [known] * len(values))
        found = mean_probabilities(spec, grids, encoded)
        scores[known] = p = found["prognosis"][:, 1]
        difference, error, _ = compare(poor, p, given[:, column])
        estimates = metrics.calibration.calibration_estimates(poor, p)
        figures.append(
            {
                "known": list(known),
                "sets": measure_sets(spec, found, truth),
                "patients": len(p),
                "model": _rounded(delong(poor, p)),
                "best": _rounded(delong(poor, given[:, column])),
                "difference": _rounded((difference, difference - 1.96 * error, difference + 1.96 * error)),
                "slope": _rounded(_with_interval(estimates["slope"])),
                "intercept": _rounded(_with_interval(estimates["intercept"])),
            }
        )
    better = max(scores[()], alone, key=lambda p: delong(poor, p)[0])
    gain, error, _ = compare(poor, scores["age", "gcs"], better)
    columns = list(PATTERNS)
    for name, other in (("age", ("gcs",)), ("gcs", ("age",))):  # of each contribution, with the other value known
        true = log_odds(given[:, columns.index(("age", "gcs"))]) - log_odds(given[:, columns.index(other)])
        ours = log_odds(scores["age", "gcs"]) - log_odds(scores[other])
        figures[-1][f"sign_of_{name}"] = round(float(np.mean(np.sign(true) == np.sign(ours))), 3)
    figures[-1]["clinical_alone"] = _rounded(delong(poor, alone))
    figures[-1]["gain"] = _rounded((gain, gain - 1.96 * error, gain + 1.96 * error))
    return figures


def publish(spec: ModelSpec, run: Path) -> ModelSpec:
    """Copy the weights of the last networks into the zoo, and write the spec with their checksums and golden output."""
    folder = ZOO / spec.name
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    checksums = {}
    for number, file in enumerate(weight_files(run)[-NETWORKS:]):
        name = f"fold{number}.safetensors"
        (folder / name).write_bytes(file.read_bytes())
        checksums[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    weights = dataclasses.replace(spec.weights, sha256=checksums)
    spec = dataclasses.replace(spec, weights=weights, golden_output=None, calibration=None)
    _write(spec)
    grid = np.random.default_rng(0).random((1, *spec.input.shape), np.float32)
    outputs = ichprog.load_model(spec.name, runtime="torch").predict_grids(grid)
    logits = {
        str(fold): {task: tuple(map(float, output.logits[0])) for task, output in tasks.items()}
        for fold, tasks in enumerate(outputs)
    }
    spec = dataclasses.replace(spec, golden_output=GoldenOutput(0, spec.input.shape, logits))
    _write(spec)
    return spec


def mean_probabilities(spec: ModelSpec, grids: np.ndarray, clinical: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return the probabilities `(N, K)` of each task, the mean over the networks.

    Args:
        spec: The model.
        grids: `(N, D, H, W)`.
        clinical: `(N, 2 V)` clinical values from `clinical.encode`.
    """
    model = ichprog.load_model(spec.name)
    parts: dict[str, list[np.ndarray]] = {task.name: [] for task in spec.tasks}
    for start in range(0, len(grids), 32):
        rows = slice(start, start + 32)
        outputs = model.predict_grids(grids[rows].astype(np.float32), None if clinical is None else clinical[rows])
        for task, found in parts.items():
            found.append(np.mean([fold[task].probabilities for fold in outputs], axis=0, dtype=float))
    return {task: np.concatenate(found) for task, found in parts.items()}


def answers(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the probability of each of the `QUESTIONS`, `(N, 4)`, from those of the tasks."""
    return np.column_stack([found[task][:, first:].sum(1) for task, first, _ in QUESTIONS])


def true_labels(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the label indices `(N,)` of each task from the answers to the `QUESTIONS`."""
    known = labels.astype(int)
    return {"prognosis": known[:, 0], "gcs": known[:, 1] + known[:, 2], "age": known[:, 3]}


def calibrate(spec: ModelSpec, patients: Patients, statistics: Sequence[Mapping[str, float]]) -> ModelSpec:
    """Calibrate a model on patients with a haemorrhage, of whom any clinical values are known, and write its spec.

    Args:
        spec: The model.
        patients: Patients on the grid, for the probabilities.
        statistics: Statistics of full scans, from `full_scan_statistics`.
    """
    bled = np.flatnonzero(patients.flags[:, 0] == 1)
    grids, truth, clinical = patients.grids[bled], true_labels(patients.labels[bled]), None
    if spec.clinical:
        patterns = np.random.default_rng(0).integers(len(PATTERNS), size=len(bled))
        clinical = encode_patterns(spec, patients.values[bled], [list(PATTERNS)[number] for number in patterns])
    found = mean_probabilities(spec, grids, clinical)
    about = (
        f"{len(bled)} simulated patients with a haemorrhage (seed {CALIBRATED_ON['seed']}, preset realistic); "
        f"the distance of a scan: full scans of the first {len(statistics)} of them."
    )
    fitted = fit_calibration(spec, {task: (truth[task], p) for task, p in found.items()}, statistics, about)
    spec = dataclasses.replace(spec, calibration=fitted)
    _write(spec)
    return spec


def full_scan_statistics(spec: ModelSpec, cohort: Path, workers: int) -> list[dict[str, float]]:
    """Return the statistics of the grid of each patient with a haemorrhage, read like a scan to predict."""
    with_blood = [row["patient"] for row in _read(cohort.with_name("truth.csv")) if row["haemorrhage"] == "1"]
    scans = [cohort.parent / "scans" / f"{patient}.nii.gz" for patient in with_blood]
    return list(parallel_map(partial(_scan_statistics, spec), scans, workers=workers))


def _scan_statistics(spec: ModelSpec, scan: Path) -> dict[str, float]:
    loaded = load(scan, expected_ranges=spec.input.expected_ranges, brain="auto")
    return input_statistics(preprocessing.prepare(loaded.hu, spec.input))


def encode_patterns(spec: ModelSpec, values: np.ndarray, known: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the clinical values of patients `(N, 2 V)`, of which only some are known.

    Args:
        spec: The model.
        values: `(N, 2)` age and GCS.
        known: Names of the known values of each patient.
    """
    return np.stack(
        [
            encode(spec, {name: value for name, value in zip(("age", "gcs"), row, strict=True) if name in names})
            for row, names in zip(values, known, strict=True)
        ]
    )


def measure_sets(spec: ModelSpec, found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Return the share of patients whose conformal set for 90 % holds the label, by task.

    Args:
        spec: The model.
        found: Probabilities `(N, K)` of each task.
        labels: Answers to the `QUESTIONS` `(N, 4)`.
    """
    covered, truth = {}, true_labels(labels)
    for name, fitted in spec.calibration.tasks.items() if spec.calibration else ():
        task, p = spec.task(name), adjust(spec.task(name), found[name], fitted.adjustments)
        sets = [conformal_set(task, fitted, row, COVERAGE) for row in p]
        hits = [task.labels[label] in labels for label, labels in zip(truth[name], sets, strict=True)]
        covered[name] = round(float(np.mean(hits)), 3)
    return covered


def measure(probabilities: Sequence[np.ndarray], cohorts: Sequence[Patients]) -> list[dict[str, Any]]:
    """Return for each question the AUC and the calibration on all cohorts, and the best possible AUC.

    Args:
        probabilities: `(N, 4)` for each cohort.
        cohorts: Patients of each seed.
    """
    figures = []
    for number, (task, _, what) in enumerate(QUESTIONS):
        bleeds = [each.flags[:, 0] == 1 for each in cohorts]
        truths = [each.labels[b, number] for each, b in zip(cohorts, bleeds, strict=True)]
        best = [each.probabilities[b, number] for each, b in zip(cohorts, bleeds, strict=True)]
        scores = [p[b, number] for p, b in zip(probabilities, bleeds, strict=True)]
        truth, p, ideal = (np.concatenate(each) for each in (truths, scores, best))
        delong = metrics.comparisons.delong_interval
        difference, error, _ = metrics.comparisons.delong(truth, p, ideal)
        estimates = metrics.calibration.calibration_estimates(truth, p)
        figures.append(
            {
                "task": task,
                "what": what,
                "patients": len(truth),
                "positive": int(truth.sum()),
                "model": _rounded(delong(truth, p)),
                "best": _rounded(delong(truth, ideal)),
                "difference": _rounded((difference, difference - 1.96 * error, difference + 1.96 * error)),
                "by_seed": _rounded([delong(t, s)[0] for t, s in zip(truths, scores, strict=True)]),
                "slope": _rounded(_with_interval(estimates["slope"])),
                "intercept": _rounded(_with_interval(estimates["intercept"])),
            }
        )
    return figures


def measure_full_scans(spec: ModelSpec, cohort: Path, patients: Patients) -> dict[str, Any]:
    """Compare full scans with scans on the grid of the same patients.

    Returns:
        How much the probabilities differ, and how many full scans and scans on the grid are unlike those of the
        calibration.
    """
    model = ichprog.load_model(spec.name)
    rows = _read(cohort)
    predictions = [ichprog.predict(model, cohort.parent / row["scan"]) for row in rows]
    full = np.array(
        [
            [
                sum(each[task].probabilities[label] for label in spec.task(task).labels[first:])
                for task, first, _ in QUESTIONS
            ]
            for each in predictions
        ]
    )
    grids, usual = patients.grids[: len(rows)], spec.calibration.inputs  # type: ignore[union-attr]
    on_grid = answers(mean_probabilities(spec, grids))
    distances = [measure_distance(usual, input_statistics(grid)) for grid in grids]
    return {
        "patients": len(rows),
        "mean_difference": _rounded(np.abs(full - on_grid).mean(0)),
        "unusual": sum(bool(each.input_distance and each.input_distance.is_unusual) for each in predictions),
        "unusual_on_grid": sum(each.is_unusual for each in distances),
    }


def ablate(folder: Path, workers: int) -> None:
    """Train a network for each of `ABLATIONS` and each seed, and write the AUC of each question by seed."""
    (folder / "ablation").mkdir(exist_ok=True)
    runs = [(name, seed) for seed in ABLATION_SEEDS for name in ABLATIONS]
    measured = dict(zip(runs, parallel_map(partial(ablate_once, folder), runs, workers=workers), strict=True))
    rows = [
        {"design": name, **{what: [measured[name, seed][what] for seed in ABLATION_SEEDS] for _, _, what in QUESTIONS}}
        for name in ABLATIONS
    ]
    results = {"patients": ABLATED_PATIENTS, "steps": ABLATION_STEPS, "seeds": ABLATION_SEEDS, "rows": rows}
    (DOCS / "embedded-ablation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def ablate_once(folder: Path, run: tuple[str, int]) -> dict[str, float]:
    """Train the network of a design with a seed, unless it is measured, and return the AUC of each question."""
    import torch

    name, seed = run
    stored = folder / "ablation" / f"{list(ABLATIONS).index(name)}-{seed}.json"
    if not stored.exists():
        spec, design = ModelSpec.read(ZOO / f"{NAME}.json"), ABLATIONS[name]
        training, *cohorts = prepared_patients(folder)
        heads = tuple(
            dataclasses.replace(task, head=PluginRef("ordinal", {**task.head.options, "hidden": design.hidden}))
            for task in spec.tasks
        )
        options = {**_without_blocks(spec).backbone.options, "coordinates": design.coordinates}
        backbone = PluginRef("compact", options)
        trained = Training(dataclasses.replace(spec, tasks=heads, backbone=backbone), training, design, seed)
        trained.run_cycle(ABLATION_STEPS, f"{name}, seed {seed}")
        network = trained.average.module.eval()
        scores = []
        with torch.no_grad():
            for each in cohorts:
                parts = [
                    torch.cat(list(network(torch.from_numpy(each.grids[i : i + 32]).float()[:, None]).values()), 1)
                    for i in range(0, len(each.grids), 32)
                ]
                scores.append(torch.cat(parts).sigmoid().numpy())
        figures = measure(scores, cohorts)
        stored.write_text(json.dumps({each["what"]: each["model"][0] for each in figures}), encoding="utf-8")
    aucs: dict[str, float] = json.loads(stored.read_text(encoding="utf-8"))
    return aucs


@cache
def prepared_patients(folder: Path) -> tuple[Patients, ...]:
    """Read the patients that the ablation trains on, and those of each seed that are measured."""
    spec = ModelSpec.read(ZOO / f"{NAME}.json")
    chosen = [(TRAINED_ON, ABLATED_PATIENTS), *((options, ABLATION_MEASURED) for options in MEASURED_ON)]
    return tuple(load_patients(folder / f"seed{each['seed']}" / "cohort.csv", spec, most) for each, most in chosen)


def main() -> None:
    """Run every step whose result is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate and prepare")
    parser.add_argument("--threads", type=int, help="threads that train; by default those of the machine")
    parser.add_argument("--only-measure", action="store_true", help="measure the weights in the package")
    parser.add_argument("--ablation", action="store_true", help="train the networks of the ablation only")
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    spec = ModelSpec.read(ZOO / f"{NAME}.json")
    matrix = spec.input.shape[-1]

    def simulated(options: dict[str, int]) -> Path:
        name = f"seed{options['seed']}"
        cohort = simulate(args.folder / name, **options, matrix=matrix, workers=args.workers, progress=_progress(name))
        prepare_patients(cohort, spec, args.workers)
        return cohort

    def patients(options: dict[str, int]) -> Patients:
        return load_patients(simulated(options), spec)

    if args.ablation:
        for options in (TRAINED_ON, *MEASURED_ON):
            simulated(options)
        ablate(args.folder, args.workers)
        return
    training, fused = patients(TRAINED_ON), ModelSpec.read(ZOO / f"{FUSED}.json")
    if not args.only_measure:
        train(spec, training, args.folder / "run")
        calibration = patients(CALIBRATED_ON)
        name = "full calibration scans"
        full = simulate(
            args.folder / "full-calibration", **FULL_CALIBRATION, workers=args.workers, progress=_progress(name)
        )
        statistics = full_scan_statistics(spec, full, args.workers)
        spec = calibrate(publish(spec, args.folder / "run"), calibration, statistics)
        train_fusion(fused, training, args.folder / "run", args.folder / "fused")
        fused = calibrate(publish(fused, args.folder / "fused"), calibration, statistics)
    cohorts = [patients(options) for options in MEASURED_ON]
    found = [mean_probabilities(spec, each.grids) for each in cohorts]
    figures = measure([answers(each) for each in found], cohorts)
    bled = [each.flags[:, 0] == 1 for each in cohorts]
    of_bled = {task: np.concatenate([each[task][b] for each, b in zip(found, bled, strict=True)]) for task in found[0]}
    sets = measure_sets(spec, of_bled, np.concatenate([c.labels[b] for c, b in zip(cohorts, bled, strict=True)]))
    by_pattern = measure_fused(fused, cohorts, training)
    full = simulate(args.folder / "full", **FULL_SCANS, workers=args.workers, progress=_progress("full scans"))
    results = {
        "figures": figures,
        "fused": by_pattern,
        "sets": sets,
        "full_scans": measure_full_scans(spec, full, cohorts[0]),
    }
    (DOCS / "embedded.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for each, lines in ((spec, _format_results(figures)), (fused, _format_fused(by_pattern))):
        limits = (limit for limit in each.limits if not limit.startswith(_FIGURE))
        _write(dataclasses.replace(each, limits=(*limits, *lines)))
        print("\n".join(lines))


def _format_results(figures: list[dict[str, Any]]) -> list[str]:
    return [
        f"{_FIGURE} a simulated {f['what']} on {f['patients']} simulated patients of {len(MEASURED_ON)} other seeds: "
        f"{f['model'][0]:.3f} (95 % interval {f['model'][1]:.3f} to {f['model'][2]:.3f}; by seed "
        f"{min(f['by_seed']):.3f} to {max(f['by_seed']):.3f}); {_format_best(f)}; chance 0.5; {_format_calibration(f)}"
        for f in figures
    ]


def _format_fused(figures: list[dict[str, Any]]) -> list[str]:
    return [
        f"{_FIGURE} a simulated poor outcome on {f['patients']} simulated patients of {len(MEASURED_ON)} other seeds, "
        f"with {' and '.join(f['known']) or 'no value'} known: {f['model'][0]:.3f} (95 % interval {f['model'][1]:.3f} "
        f"to {f['model'][2]:.3f}); {_format_best(f)}; {_format_calibration(f)}"
        for f in figures
    ]


def _format_best(figure: dict[str, Any]) -> str:
    difference, low, high = figure["difference"]
    return f"best possible {figure['best'][0]:.3f}, difference {difference:.3f} ({low:.3f} to {high:.3f})"


def _format_calibration(figure: dict[str, Any]) -> str:
    slope, intercept = figure["slope"][0], figure["intercept"][0]
    return f"calibration slope {slope:.2f}, intercept {intercept:.2f}. It says nothing about real patients."


def _with_interval(estimate: tuple[float, float]) -> tuple[float, float, float]:
    value, error = estimate
    return value, value - 1.96 * error, value + 1.96 * error


def _rounded(numbers: Any) -> list[float]:
    return [round(float(number), 3) for number in numbers]


def _write(spec: ModelSpec) -> None:
    text = json.dumps(spec.to_dict(), indent=2, ensure_ascii=False)
    (ZOO / f"{spec.name}.json").write_text(text + "\n", encoding="utf-8")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _progress(what: str) -> Any:
    return lambda done: print(f"\r{what}: {done} patients", end="", file=sys.stderr)


if __name__ == "__main__":
    main()
