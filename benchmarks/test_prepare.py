"""Preprocessing a scan.

A `.nii.gz` is read, checked and preprocessed to the network's grid. The peer is MONAI's transforms, which check
nothing. Both give the same grid.
"""

import pytest

import ichprog
from ichprog.preprocessing import prepare

from support import reference_pipeline


@pytest.mark.parametrize("slices", [16, 32, 64, 128])
def test_preprocessing_a_scan(compare, record, cache, scan, slices):
    model, path = ichprog.load_model(), scan(slices)

    def ours():
        return prepare(model.load_scan(path, brain="given").hu, model.spec.input)

    mine, peer = compare(ours, lambda: reference_pipeline.grid(path), rounds=9)
    what, peer_name = f"512 x 512 x {slices}, `.nii.gz` to grid", "MONAI's transforms"
    target = ("ratio", "at most", 0.5) if slices == 32 else None
    record(what, "s", mine.seconds, peer.seconds, peer_name=peer_name, target=target, slices=slices)
