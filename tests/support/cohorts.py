"""Small cohorts on disk, and what tests of training share."""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from torch import nn

from ichprog import zoo
from ichprog.backbones import Backbone
from ichprog.spec import PluginRef
from ichprog.train import PRESETS

SHAPE = (8, 24, 24)
QUICK = PRESETS["default"].replace(
    epochs=16, patience=0, batch_size=5, learning_rate=0.02, validation_fraction=0.2, rotation_prob=0.3
)


def plain_backbone(*, width=6):
    """Build a backbone without batch normalisation: two processes compute the same as one."""
    layers = nn.Sequential(nn.Conv3d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv3d(width, width, 3, 2, 1), nn.ReLU())
    return Backbone(layers, width, "features.2")


def ellipsoid(voxels, centre, radii):
    """Return the squared distance from a centre in units of the radii: at most 1 inside the ellipsoid."""
    return sum(((x - c) / r) ** 2 for x, c, r in zip(voxels, centre, radii, strict=True))


def write_cohort(root):
    """Write a table and scans of 32 patients and a small model; return the table.

    The outcome depends on the size of the haemorrhage. Every third GCS is blank.
    """
    random = np.random.default_rng(0)
    rows = ["patient,scan,poor_outcome,gcs,age"]
    for number in range(32):
        poor = number % 8 in (1, 3, 4, 6, 7)
        centre = np.append(random.integers(17, 31, 2), random.integers(4, 7))
        voxels = np.ogrid[:48, :48, :10]
        noise = 4 * random.standard_normal((48, 48, 10))
        blood = ellipsoid(voxels, centre, (8, 8, 2.5) if poor else (3, 3, 1)) <= 1
        hu = np.where(ellipsoid(voxels, (24, 24, 5), (15, 18, 4.6)) <= 1, np.where(blood, 68, 33) + noise, 0)
        hu = hu.round().astype(np.int16)
        nib.Nifti1Image(hu, np.diag([-4.5, -4.5, 14, 1])).to_filename(root / f"{number}.nii.gz")
        gcs = "" if number % 3 == 0 else (5 if poor else 14)
        rows.append(f"P{number:02},{number}.nii.gz,{int(poor)},{gcs},{85 if number % 4 == 0 else 60}")
    (root / "cohort.csv").write_text("\n".join(rows))
    (root / "spec.json").write_text(json.dumps(small_spec().to_dict()))
    return root / "cohort.csv"


def small_spec():
    """Return the default model with a compact backbone and a small grid."""
    spec = zoo.find(zoo.DEFAULT)
    contract = dataclasses.replace(spec.input, shape=SHAPE, expected_ranges={"no-blood": (None, None)})
    return dataclasses.replace(spec, name="small.three", backbone=PluginRef("compact", {"width": 4}), input=contract)


def with_columns(cohort, **columns):
    """Return a cohort with columns computed from the position of each patient."""
    patients = [
        dataclasses.replace(patient, columns=dict(patient.columns) | {name: cell(i) for name, cell in columns.items()})
        for i, patient in enumerate(cohort.patients)
    ]
    return dataclasses.replace(cohort, patients=tuple(patients))


def read_table(path):
    """Return the rows of a CSV file."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def run_checksums(run):
    """Return the checksums of the results of a training run."""
    results = [run / name for name in ("config.json", "out_of_fold.csv", "log.csv")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in [*results, *run.glob("*.safetensors")]}
