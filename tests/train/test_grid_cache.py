"""The cache of prepared grids."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from ichprog import CohortError
from ichprog.train import TrainOptions, grid_cache, train

from support.cohorts import QUICK, SHAPE


def test_all_unreadable_scans_are_named(cohort, spec, tmp_path):
    patients = list(cohort.patients)
    for number in (3, 9):
        (tmp_path / f"bad{number}.nii.gz").write_bytes(b"no scan")
        patients[number] = dataclasses.replace(patients[number], scan=tmp_path / f"bad{number}.nii.gz")
    broken = dataclasses.replace(cohort, patients=tuple(patients[2:14]))
    with pytest.raises(CohortError, match=r"(?s)2 of 12 scans cannot be used.*bad3\.nii.*bad9\.nii"):
        train(
            broken,
            spec,
            tmp_path / "run",
            folds=2,
            protocol=QUICK.replace(validation_fraction=0.4),
            options=TrainOptions(cache_dir=tmp_path / "c", workers=2),
        )
    assert not (tmp_path / "run").exists()
    assert len(list((tmp_path / "c" / "grids").glob("*.npy"))) == 10, "the others are kept for the next time"


def test_grids_are_prepared_once(folder, cohort, spec, monkeypatch):
    monkeypatch.setattr("ichprog.scan.load", None)
    scans = [patient.scan for patient in cohort.patients]
    files = grid_cache.prepare(scans, spec.input, brain="auto", folder=folder / "c/grids")
    assert np.load(files[0]).shape == SHAPE
    others = grids_of(scans, dataclasses.replace(spec.input, pad_slices=False), "auto")
    given = grids_of(scans, spec.input, "given")
    assert not set(files) & {*others, *given}
    doubted = dataclasses.replace(spec.input, expected_ranges={"slices": (1, 2)})
    assert grids_of(scans, doubted, "auto") == [path.name for path in files]


def grids_of(scans, contract, brain):
    recipe = json.dumps(
        [
            grid_cache._CACHE_VERSION,
            brain,
            {k: v for k, v in dataclasses.asdict(contract).items() if k != "expected_ranges"},
        ]
    )
    return [f"{grid_cache._cache_key(scan, recipe)}.npy" for scan in scans]


def test_a_changed_scan_is_prepared_again(folder, tmp_path):
    shutil.copy(folder / "0.nii.gz", tmp_path / "scan.nii.gz")
    before = grid_cache._cache_key(tmp_path / "scan.nii.gz", "recipe")
    os.utime(tmp_path / "scan.nii.gz", ns=(1, 1))
    assert grid_cache._cache_key(tmp_path / "scan.nii.gz", "recipe") != before
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"1")
    before = grid_cache._cache_key(tmp_path / "series", "recipe")
    (tmp_path / "series" / "2.dcm").write_bytes(b"2")
    assert grid_cache._cache_key(tmp_path / "series", "recipe") != before
