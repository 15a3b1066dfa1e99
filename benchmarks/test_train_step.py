"""The training step.

One step of the optimiser, from files to new weights, beside the published loop: MONAI's chain from `.nii.gz` each time
with its augmentation, in a `DataLoader` of two workers, and DenseNet121 with three heads in eager float32. Ours reads
prepared grids, and its protocol is the published preset but for the precision. Both train the same number of scans a
step, on a grid of 40 x 301 x 301. Each is alone in a process; what is timed is its second step, and ours its third,
which is the first that finds the memory of the one before it kept. The curves are mean losses of passes over 32
simulated patients on a smaller grid, with three seeds each: half of the patients have a haematoma of twice the radius
and a poor outcome.
"""

from statistics import mean, stdev

import nibabel as nib
import numpy as np
import pytest
import torch
from our_training import passes
from published_training import Training

from ichprog.train import mixed_precision

from process import Contestant

BATCH = 8  # as published
PIPELINE = "published loop"
ROUNDS = 2


def needs_bfloat16():
    if (why := mixed_precision.lack(torch.device("cpu"))) is not None:
        pytest.skip(why)


def a_step(name, *, warm_up, **options):
    """Seconds of a contestant's step, after some that make it ready; alone, as two would take too much memory."""
    with Contestant(name, **options) as contestant:
        for _ in range(warm_up):
            contestant()
        return contestant.seconds()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_step(benchmark, figure, cohort, tmp_path, precision):
    if precision == "bfloat16":
        needs_bfloat16()
    scans = cohort(BATCH)

    def turn():
        ours = a_step("ichprog_train", scans=scans, precision=precision, folder=tmp_path, warm_up=2)
        return ours, a_step("published_train", scans=scans, warm_up=1)

    mine, peers = zip(*benchmark.pedantic(lambda: [turn() for _ in range(ROUNDS)]), strict=True)
    rates = [[BATCH / seconds for seconds in timed] for timed in (mine, peers)]
    best = precision == "bfloat16" or mixed_precision.lack(torch.device("cpu")) is not None
    target = ("ratio", "at least", 2.0) if best else None
    figure(f"steps of {BATCH} scans, precision `{precision}`", "scans/s", *rates, beside=PIPELINE, target=target)


PATIENTS, SHAPE, PASSES, SEEDS = 32, (32, 64, 64), 8, (0, 1, 2)


def patients(folder):
    """Simulated patients: brain-only scans of an ellipsoid with a ball of blood, and their targets."""
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
def test_the_loss_curves(benchmark, figure, tmp_path):
    needs_bfloat16()
    scans, targets = patients(tmp_path)

    def curves():
        mine = [passes(scans, targets, tmp_path, precision="bfloat16", shape=SHAPE, seed=seed) for seed in SEEDS]
        peers = [Training(scans, targets, batch=BATCH, shape=SHAPE, seed=seed).run_pass for seed in SEEDS]
        return [[[run() for _ in range(PASSES)] for run in runs] for runs in (mine, peers)]

    mine, peers = (np.array(runs).T for runs in benchmark.pedantic(curves))
    for number, (our, their) in enumerate(zip(mine.tolist(), peers.tolist(), strict=True), start=1):
        figure(f"loss of pass {number}", "", our, their, beside=PIPELINE, passes=number)
    apart = [mean(our) - mean(their) for our, their in zip(mine.tolist(), peers.tolist(), strict=True)]
    spread = [stdev(their) for their in peers.tolist()]
    figure(
        "distance of the curves in standard deviations between seeds",
        "",
        [np.hypot.reduce(apart) / np.hypot.reduce(spread)],
        target=("ours", "at most", 2.0),
    )
