"""Preparing a scan.

A `.nii.gz` is read, checked and brought to the network's grid, beside MONAI's chain of transforms, which checks
nothing. Both give the same grid.
"""

import pytest

import ichprog
from ichprog.preprocessing import prepare

from support import reference_pipeline


@pytest.mark.parametrize("slices", [16, 32, 64, 128])
def test_a_scan(beside, figure, cache, scan, slices):
    model, path = ichprog.load_model(), scan(slices)

    def ours():
        return prepare(model.load_scan(path, brain="given").hu, model.spec.input)

    mine, peer = beside(ours, lambda: reference_pipeline.grid(path), rounds=9)
    what, peer_is = f"512 x 512 x {slices}, `.nii.gz` to grid", "MONAI's chain"
    target = ("ratio", "at most", 0.5) if slices == 32 else None
    figure(what, "s", mine.seconds, peer.seconds, beside=peer_is, target=target, slices=slices)
