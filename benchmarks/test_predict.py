"""Predicting many scans.

A list of scans is predicted, from files to probabilities. The peer is the published pipeline: MONAI's transforms in a
`DataLoader` of two workers, and the network in eager float32 with batches of 8. Each runs in a process that has loaded
everything and has predicted one scan. Peak memory is the sum over a process and its children; shared pages count once.
"""

import numpy as np
import pytest

from ichprog.runtime.openvino import backend

from process import WorkloadProcess

PIPELINE = "the published pipeline"
GB = 1e9


def rates(scans, timing):
    return [scans / seconds for seconds in timing.seconds]


@pytest.mark.parametrize(("precision", "scans", "lowest", "tolerance"), [
    ("float32", 1, None, None),
    ("float32", 4, None, None),
    ("float32", 16, 2.5, 1e-5),
    ("bfloat16", 16, 4.5, 2e-3),
])  # fmt: skip
def test_a_list_of_scans(compare, record, cache, cohort, precision, scans, lowest, tolerance):
    if precision == "bfloat16" and not backend.supports_bfloat16():
        pytest.skip("this processor does not support bfloat16")
    folder = cohort(scans)
    with (
        WorkloadProcess("ichprog_predict", scans=folder, precision=precision) as ours,
        WorkloadProcess("published_predict", scans=folder) as peer,
    ):
        mine, published = compare(ours, peer, rounds=3, warm_up=False)
    target = ("ratio", "at least", lowest) if lowest else None
    at = {"scans": scans} if precision == "float32" else {}
    record(
        f"{scans} scan{'s' * (scans > 1)}, {precision}", "scans/s", rates(scans, mine), rates(scans, published),
        peer_name=PIPELINE, target=target, **at,
    )  # fmt: skip
    if tolerance:
        difference = float(np.abs(np.subtract(mine.results[0], published.results[0])).max())
        what = f"largest difference of any probability, {precision}"
        record(what, "", [difference], target=("ours", "at most", tolerance))


def peak_memory(name, **options):
    """Return the peak memory of one unit of work, in GB."""
    with WorkloadProcess(name, **options) as workload:
        workload()
    return workload.peak / GB


@pytest.mark.parametrize("scans", [10, 50, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_memory_of_a_list_of_scans(benchmark, record, cache, cohort, scans):
    options = {"scans": cohort(scans), "precision": "float32"}
    peak_memory("ichprog_predict", scans=cohort(1), precision="float32")  # the first prediction fills the graph cache
    ours = benchmark.pedantic(peak_memory, args=("ichprog_predict",), kwargs=options)
    what, target = f"peak memory, {scans:,} scans", ("ours", "at most", 1.5)
    if scans == 10:
        peer, peer_name = peak_memory("published_predict", scans=options["scans"]), PIPELINE
        record(what, "GB", [ours], [peer], peer_name=peer_name, target=target)
    else:
        peer, peer_name = peak_memory("ichprog_predict", scans=cohort(10), precision="float32"), "ours, 10 scans"
        record(what, "GB", [ours], target=target)
        record(f"{what} compared with 10", "GB", [ours], [peer], peer_name=peer_name, target=("ratio", "at most", 1.05))
