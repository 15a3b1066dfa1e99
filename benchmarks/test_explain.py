"""Explaining a scan.

Nine maps are computed from a file: three tasks with three methods. The peer is medcam in float32. It computes one map
at a time from a network reduced to one task. For the first scan medcam computes every map twice, as a test; for a
later scan it does not, and everything is loaded. Class activation maps of medcam have no negative values, so they are
compared with rectified brute-force maps. Its guided class activation maps are scaled to 0 and 1 first, and therefore
correlate less. If the processor supports bfloat16, ichprog in bfloat16 runs after the two.
"""

import numpy as np
import pytest

from ichprog.runtime.openvino import backend

from process import WorkloadProcess

MEDCAM = "medcam, eager float32"
GB = 1e9
REDUCED = ["bfloat16"] if backend.supports_bfloat16() else []


@pytest.fixture(scope="module")
def explained_scan(cache, scan, tmp_path_factory):
    """Return a scan that has been explained once, so that the graphs are in the cache."""
    path, maps = scan(32), tmp_path_factory.mktemp("first") / "maps.npz"
    for precision in ["float32", *REDUCED]:
        with WorkloadProcess("ichprog_explain", scan=path, maps=maps, precision=precision) as first_use:
            first_use()
    return path


def test_nine_maps_of_the_first_scan(compare, record, explained_scan, tmp_path):
    ours_at, peer_at, true_at = (tmp_path / f"{name}.npz" for name in ("ours", "medcam", "true"))
    with (
        WorkloadProcess("ichprog_explain", scan=explained_scan, maps=ours_at) as ours,
        WorkloadProcess("medcam_explain", scan=explained_scan, maps=peer_at) as peer,
    ):
        mine, medcams = compare(ours, peer, rounds=1, warm_up=False)
    with WorkloadProcess("brute_force_explain", scan=explained_scan, maps=true_at) as brute_force:
        brute_force()
    target = ("ratio", "at most", 1 / 15)
    record("nine maps of the first scan", "s", mine.seconds, medcams.seconds, peer_name=MEDCAM, target=target)
    target = ("ratio", "at most", 0.6)
    record("peak memory", "GB", [ours.peak / GB], [peer.peak / GB], peer_name=MEDCAM, target=target)
    record(
        "lowest correlation of a map with the brute-force map", "",
        [lowest_correlation(ours_at, true_at)], [lowest_correlation(peer_at, true_at, rectified=True)],
        peer_name=MEDCAM, target=("ours", "at least", 0.999),
    )  # fmt: skip
    for precision in REDUCED:
        at = tmp_path / f"{precision}.npz"
        with WorkloadProcess("ichprog_explain", scan=explained_scan, maps=at, precision=precision) as reduced:
            seconds = reduced.seconds()
        record(f"nine maps of the first scan, {precision}", "s", [seconds], medcams.seconds, peer_name=MEDCAM)
        record(
            f"lowest correlation of a map with the brute-force map, {precision}", "", [lowest_correlation(at, true_at)]
        )


def test_nine_maps_of_a_later_scan(compare, record, explained_scan, tmp_path):
    with (
        WorkloadProcess("ichprog_explain", scan=explained_scan, maps=tmp_path / "ours.npz") as ours,
        WorkloadProcess("medcam_explain", scan=explained_scan, maps=tmp_path / "medcam.npz", warm=True) as peer,
    ):
        ours()
        mine, medcams = compare(ours, peer, rounds=1, warm_up=False)
    record("nine maps of a later scan", "s", mine.seconds, medcams.seconds, peer_name=MEDCAM)
    for precision in REDUCED:
        with WorkloadProcess(
            "ichprog_explain", scan=explained_scan, maps=tmp_path / "reduced.npz", precision=precision
        ) as reduced:
            reduced()
            seconds = reduced.seconds()
        record(f"nine maps of a later scan, {precision}", "s", [seconds], medcams.seconds, peer_name=MEDCAM)


def lowest_correlation(maps, truth, *, rectified=False):
    """Return the lowest correlation over all maps; `rectified` if the class activation maps have no negative values."""
    computed, true = dict(np.load(maps)), dict(np.load(truth))
    assert computed.keys() == true.keys()
    if rectified:
        true = {key: values.clip(0) if key.endswith(" grad_cam") else values for key, values in true.items()}
    return min(float(np.corrcoef(computed[key].ravel(), true[key].ravel())[0, 1]) for key in true)
