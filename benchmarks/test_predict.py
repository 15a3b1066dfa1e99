"""Predicting many scans.

A list of scans, from files to probabilities, beside the published pipeline: MONAI's chain in a `DataLoader` of two
workers, and the network in eager float32 with batches of 8. Each is a process that has loaded everything and has
answered one scan. Memory is the most that a process and those it started held together; pages that they share count
once.
"""

import numpy as np
import pytest

from ichprog.runtime.openvino import backend

from process import Contestant

PIPELINE = "the published pipeline"
GB = 1e9


def rates(scans, timed):
    return [scans / seconds for seconds in timed.seconds]


@pytest.mark.parametrize(("precision", "scans", "least", "differs"), [
    ("float32", 1, None, None),
    ("float32", 4, None, None),
    ("float32", 16, 2.5, 1e-5),
    ("bfloat16", 16, 4.5, 2e-3),
])  # fmt: skip
def test_a_list(beside, figure, cache, cohort, precision, scans, least, differs):
    if precision == "bfloat16" and not backend.computes_in_bfloat16():
        pytest.skip("this processor does not compute in bfloat16")
    folder = cohort(scans)
    with (
        Contestant("ichprog_predict", scans=folder, precision=precision) as ours,
        Contestant("published_predict", scans=folder) as peer,
    ):
        mine, published = beside(ours, peer, rounds=3, warm_up=False)
    target = ("ratio", "at least", least) if least else None
    at = {"scans": scans} if precision == "float32" else {}
    figure(
        f"{scans} scan{'s' * (scans > 1)}, {precision}", "scans/s", rates(scans, mine), rates(scans, published),
        beside=PIPELINE, target=target, **at,
    )  # fmt: skip
    if differs:
        difference = float(np.abs(np.subtract(mine.answers[0], published.answers[0])).max())
        what = f"largest difference of any probability, {precision}"
        figure(what, "", [difference], target=("ours", "at most", differs))


def peak(name, **options):
    """The contestant's highest memory in one piece of work, in GB."""
    with Contestant(name, **options) as contestant:
        contestant()
    return contestant.peak / GB


@pytest.mark.parametrize("scans", [10, 50, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_memory_of_a_list(benchmark, figure, cache, cohort, scans):
    options = {"scans": cohort(scans), "precision": "float32"}
    peak("ichprog_predict", scans=cohort(1), precision="float32")  # what is kept for later uses is made in the first
    ours = benchmark.pedantic(peak, args=("ichprog_predict",), kwargs=options)
    what, target = f"peak memory, {scans:,} scans", ("ours", "at most", 1.5)
    if scans == 10:
        peer, peer_is = peak("published_predict", scans=options["scans"]), PIPELINE
        figure(what, "GB", [ours], [peer], beside=peer_is, target=target)
    else:
        peer, peer_is = peak("ichprog_predict", scans=cohort(10), precision="float32"), "ours, 10 scans"
        figure(what, "GB", [ours], target=target)
        figure(f"{what}, more than 10 take", "GB", [ours], [peer], beside=peer_is, target=("ratio", "at most", 1.05))
