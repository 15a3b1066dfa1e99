"""A small study of three variants and four baselines, and its patients."""

import dataclasses
import json

import nibabel as nib
import numpy as np

from ichprog import zoo
from ichprog.spec import PluginRef

from support.cohorts import ellipsoid

STUDY = """
name = "small"
cohort = ["cohort.csv"]
folds = 2
brain = "given"
device = "cpu"
correlations = ["age"]
[protocol]
epochs = 12
batch_size = 4
validation_fraction = 0.25
[[variant]]
name = "one"
model = "spec.json"
tasks = ["prognosis"]
[[variant]]
name = "gcs"
model = "spec.json"
tasks = ["gcs"]
[[variant]]
name = "all"
model = "spec.json"
"""
BASELINES = """
[[baseline]]
name = "majority"
kind = "majority"
[[baseline]]
name = "clinical"
kind = "logistic"
columns = ["age", "gcs"]
[[baseline]]
name = "fusion"
kind = "fusion"
variant = "all"
columns = ["age"]
[[baseline]]
name = "score"
kind = "logistic"
columns = ["ich_score"]
optional = true
"""
JOBS = ["one-0", "one-1", "gcs-0", "gcs-1", "all-0", "all-1", "majority", "clinical", "fusion"]


def write_patients(root):
    """Write 28 patients and a small model. The outcome depends on the haemorrhage, and every seventh GCS is blank."""
    random = np.random.default_rng(0)
    rows = ["patient,scan,poor_outcome,gcs,age"]
    voxels = np.ogrid[:40, :40, :10]
    for number in range(28):
        poor = number % 5 in (1, 3)
        blood = ellipsoid(voxels, (22, 18, 5), (6, 6, 2.5) if poor else (3, 3, 1)) <= 1
        noise = 4 * random.standard_normal((40, 40, 10))
        hu = np.where(ellipsoid(voxels, (20, 20, 5), (13, 16, 4.6)) <= 1, np.where(blood, 68, 33) + noise, 0)
        image = nib.Nifti1Image(hu.round().astype(np.int16), np.diag([-4.5, -4.5, 14, 1]))
        image.to_filename(root / f"{number}.nii.gz")
        gcs = "" if number % 7 == 0 else random.choice([5, 10, 14])
        rows.append(f"P{number:02},{number}.nii.gz,{int(poor)},{gcs},{random.integers(60, 95)}")
    (root / "cohort.csv").write_text("\n".join(rows))
    spec = zoo.find("compact.prognosis_gcs3_age")
    contract = dataclasses.replace(spec.input, shape=(8, 24, 24), expected_ranges={"no-blood": (None, None)})
    small = dataclasses.replace(spec, name="small.three", backbone=PluginRef("compact", {"width": 4}), input=contract)
    (root / "spec.json").write_text(json.dumps(small.to_dict()))


def job_names(statuses, state="done"):
    return [status.job.name for status in statuses if status.state == state]
