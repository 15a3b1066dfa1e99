"""Explaining a scan.

Maps of three tasks by three methods, from a file. medcam makes the same nine in float32, each by itself, from a network
that is cut down to one task for it. Of a first scan it makes every map twice, as a trial; of a further one it does not,
and all has been loaded. Its class activation maps have lost what is negative, and are compared with those made by brute
force without it; in its guided ones they are scaled to 0 and 1 first, which is why these correlate less. Ours in
bfloat16, where the processor has it, comes right after the two.
"""

import numpy as np
import pytest

from ichprog.runtime.openvino import backend

from process import Contestant

MEDCAM = "medcam, eager float32"
GB = 1e9
ROUNDED = ["bfloat16"] if backend.computes_in_bfloat16() else []


@pytest.fixture(scope="module")
def used(cache, scan, tmp_path_factory):
    """A scan that has been explained, so that what is kept for later uses has been made."""
    path, maps = scan(32), tmp_path_factory.mktemp("first") / "maps.npz"
    for precision in ["float32", *ROUNDED]:
        with Contestant("ichprog_explain", scan=path, maps=maps, precision=precision) as first_use:
            first_use()
    return path


def test_nine_maps(beside, figure, used, tmp_path):
    ours_at, peer_at, true_at = (tmp_path / f"{name}.npz" for name in ("ours", "medcam", "true"))
    with (
        Contestant("ichprog_explain", scan=used, maps=ours_at) as ours,
        Contestant("medcam_explain", scan=used, maps=peer_at) as peer,
    ):
        mine, medcams = beside(ours, peer, rounds=1, warm_up=False)
    with Contestant("brute_force_explain", scan=used, maps=true_at) as brute_force:
        brute_force()
    target = ("ratio", "at most", 1 / 15)
    figure("nine maps of a first scan", "s", mine.seconds, medcams.seconds, beside=MEDCAM, target=target)
    target = ("ratio", "at most", 0.6)
    figure("peak memory", "GB", [ours.peak / GB], [peer.peak / GB], beside=MEDCAM, target=target)
    figure(
        "least correlation of any map with that made by brute force", "",
        [least_correlation(ours_at, true_at)], [least_correlation(peer_at, true_at, rectified=True)],
        beside=MEDCAM, target=("ours", "at least", 0.999),
    )  # fmt: skip
    for precision in ROUNDED:
        at = tmp_path / f"{precision}.npz"
        with Contestant("ichprog_explain", scan=used, maps=at, precision=precision) as rounded:
            took = rounded.seconds()
        figure(f"nine maps of a first scan, {precision}", "s", [took], medcams.seconds, beside=MEDCAM)
        figure(f"least correlation of any map, {precision}", "", [least_correlation(at, true_at)])


def test_nine_maps_of_a_further_scan(beside, figure, used, tmp_path):
    with (
        Contestant("ichprog_explain", scan=used, maps=tmp_path / "ours.npz") as ours,
        Contestant("medcam_explain", scan=used, maps=tmp_path / "medcam.npz", tried=True) as peer,
    ):
        ours()
        mine, medcams = beside(ours, peer, rounds=1, warm_up=False)
    figure("nine maps of a further scan", "s", mine.seconds, medcams.seconds, beside=MEDCAM)
    for precision in ROUNDED:
        with Contestant("ichprog_explain", scan=used, maps=tmp_path / "rounded.npz", precision=precision) as rounded:
            rounded()
            took = rounded.seconds()
        figure(f"nine maps of a further scan, {precision}", "s", [took], medcams.seconds, beside=MEDCAM)


def least_correlation(maps, truth, *, rectified=False):
    """Over all maps; `rectified` where class activation maps have lost what is negative, as medcam's have."""
    found, true = dict(np.load(maps)), dict(np.load(truth))
    assert found.keys() == true.keys()
    if rectified:
        true = {key: values.clip(0) if key.endswith(" grad_cam") else values for key, values in true.items()}
    return min(float(np.corrcoef(found[key].ravel(), true[key].ravel())[0, 1]) for key in true)
