"""The training step.

One step of the optimiser is timed, from files to new weights. The peer is the published loop: MONAI's transforms and
augmentation from `.nii.gz` in a `DataLoader` of two workers, and DenseNet121 with three heads in eager float32. ichprog
reads cached grids, and its protocol is the published preset except for the precision. Both train the same number of
scans per step, on a grid of 40 x 301 x 301. Each runs alone in a process. The third step of ichprog and the second step
of the peer are timed. The curves are mean losses of epochs over 32 simulated patients on a smaller grid, with three
seeds each. Half of the patients have a haematoma of twice the radius and a poor outcome.
"""

from statistics import mean, stdev

import nibabel as nib
import numpy as np
import pytest
import torch
from our_training import epoch_runner
from published_training import Training

from ichprog.train import mixed_precision

from process import WorkloadProcess

BATCH = 8  # as published
PIPELINE = "the published loop"
ROUNDS = 2


def skip_without_bfloat16():
    if (reason := mixed_precision.unsupported_reason(torch.device("cpu"))) is not None:
        pytest.skip(reason)


def step_seconds(name, *, warm_up, **options):
    """Return the seconds of a step after warm-up steps; one process at a time, because two need too much memory."""
    with WorkloadProcess(name, **options) as workload:
        for _ in range(warm_up):
            workload()
        return workload.seconds()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_training_step(benchmark, record, cohort, tmp_path, precision):
    if precision == "bfloat16":
        skip_without_bfloat16()
    scans = cohort(BATCH)

    def one_round():
        ours = step_seconds("ichprog_train", scans=scans, precision=precision, folder=tmp_path, warm_up=2)
        return ours, step_seconds("published_train", scans=scans, warm_up=1)

    mine, peers = zip(*benchmark.pedantic(lambda: [one_round() for _ in range(ROUNDS)]), strict=True)
    rates = [[BATCH / seconds for seconds in times] for times in (mine, peers)]
    best = precision == "bfloat16" or mixed_precision.unsupported_reason(torch.device("cpu")) is not None
    target = ("ratio", "at least", 2.0) if best else None
    record(f"steps of {BATCH} scans, precision `{precision}`", "scans/s", *rates, peer_name=PIPELINE, target=target)


PATIENTS, SHAPE, EPOCHS, SEEDS = 32, (32, 64, 64), 8, (0, 1, 2)


def simulate_patients(folder):
    """Write brain-only scans of an ellipsoid with a ball of blood, and return their paths and targets."""
    random = np.random.default_rng(0)
    poor = np.arange(PATIENTS) % 2
    voxels = np.ogrid[-1:1:128j, -1:1:128j, -1:1:32j]
    for number, radius in enumerate(np.where(poor, 0.3, 0.15)):
        brain = sum((axis / half) ** 2 for axis, half in zip(voxels, (0.62, 0.75, 0.94), strict=True)) <= 1
        centre = random.uniform(-0.3, 0.3, 3)
        blood = sum((axis - at) ** 2 for axis, at in zip(voxels, centre, strict=True)) <= radius**2
        hu = np.where(brain, np.where(blood, 68, 33) + 4 * random.standard_normal(brain.shape), 0).round()
        image = nib.Nifti1Image(hu.astype(np.int16), np.diag([-1.88, -1.88, 5.0, 1.0]))
        image.to_filename(folder / f"{number:02}.nii.gz")
    some, old = random.random((2, PATIENTS)) < 0.5
    targets = np.stack([poor, some | (poor == 1), poor, old], axis=1)
    return sorted(folder.glob("*.nii.gz")), torch.from_numpy(targets.astype(np.float32))


@pytest.mark.slow
def test_the_loss_curves(benchmark, record, tmp_path):
    skip_without_bfloat16()
    scans, targets = simulate_patients(tmp_path)

    def curves():
        mine = [epoch_runner(scans, targets, tmp_path, precision="bfloat16", shape=SHAPE, seed=seed) for seed in SEEDS]
        peers = [Training(scans, targets, batch=BATCH, shape=SHAPE, seed=seed).run_epoch for seed in SEEDS]
        return [[[run() for _ in range(EPOCHS)] for run in runs] for runs in (mine, peers)]

    mine, peers = (np.array(runs).T for runs in benchmark.pedantic(curves))
    for number, (our, their) in enumerate(zip(mine.tolist(), peers.tolist(), strict=True), start=1):
        record(f"loss of epoch {number}", "", our, their, peer_name=PIPELINE, epochs=number)
    apart = [mean(our) - mean(their) for our, their in zip(mine.tolist(), peers.tolist(), strict=True)]
    spread = [stdev(their) for their in peers.tolist()]
    record(
        "distance of the loss curves, in standard deviations between seeds",
        "",
        [np.hypot.reduce(apart) / np.hypot.reduce(spread)],
        target=("ours", "at most", 2.0),
    )
