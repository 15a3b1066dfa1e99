"""A metric that is registered in one place appears in everything that a study writes."""

import csv
import json

import numpy as np
import pytest

from ichprog import metrics as metrics_package
from ichprog.cohort import Cohort
from ichprog.evaluation import Predictions, TaskPredictions
from ichprog.io import write_json
from ichprog.study import Study, report
from ichprog.study.manifest import build_manifest

PATIENTS, FOLDS = 36, 3
STUDY = """
name = "added metric"
cohort = ["cohort.csv"]
folds = 3
n_bootstrap = 20
brain = "given"
subgroups = { ward = [] }
[[variant]]
name = "one"
model = "compact.prognosis_gcs3_age"
tasks = ["prognosis"]
[[variant]]
name = "two"
model = "compact.prognosis_gcs3_age"
tasks = ["prognosis", "age"]
[[baseline]]
name = "majority"
kind = "majority"
"""


@pytest.fixture
def added_metric():
    """Register a metric by one decorated function."""

    @metrics_package.metric("Youden index", kinds=["binary"], compared=True, in_subgroups=True, at_threshold=True)
    def youden_index(predictions):
        """Return sensitivity plus specificity less 1."""
        true_negative, false_positive, false_negative, true_positive = predictions.confusion.reshape(-1, 4).T
        sensitivity = metrics_package.ratio(true_positive, true_positive + false_negative)
        return sensitivity + metrics_package.ratio(true_negative, true_negative + false_positive) - 1

    yield "youden_index"
    metrics_package.unregister("youden_index")


@pytest.fixture
def folder(tmp_path):
    """Return a study with predictions: variant "two" is never wrong, so that no network explains a mistake."""
    outcome = np.arange(PATIENTS) % 2
    rows = ["patient,scan,poor_outcome,age,ward"]
    for number, value in enumerate(outcome):
        (tmp_path / f"{number}.nii.gz").touch()
        rows.append(f"p{number},{number}.nii.gz,{value},{60 + 30 * value},{'NS'[number // 2 % 2]}")
    (tmp_path / "cohort.csv").write_text("\n".join(rows))
    (tmp_path / "study.toml").write_text(STUDY)
    study, cohort = Study.read(tmp_path / "study.toml"), Cohort.read(tmp_path / "cohort.csv")
    names, random = tuple(patient.name for patient in cohort.patients), np.random.default_rng(0)
    entries = {}
    for variant, task, spread in (("one", "prognosis", 1.5), ("two", "prognosis", 0.1), ("two", "age", 0.1)):
        for split, shift in (("validation", 1), ("test", 0)):
            p = 1 / (1 + np.exp(-(2 * outcome - 1 + spread * random.normal(size=PATIENTS))))
            fold = (np.arange(PATIENTS) // 2 + shift) % FOLDS
            entries[variant, task, split] = TaskPredictions(names, fold, outcome, np.stack([1 - p, p], axis=1))
    out = tmp_path / "out"
    out.mkdir()
    Predictions(entries).write(out / "predictions.csv")
    write_json(out / "study.json", build_manifest(study, cohort))
    return tmp_path


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_metric_is_added_in_one_place(folder, added_metric):
    out = folder / "out"
    page = report(Study.read(folder / "study.toml"), out).read_text()
    values = json.loads((out / "metrics.json").read_text())
    assert values["two"]["prognosis"]["youden_index"]["value"] == 1
    assert values["two"]["age"]["youden_index"]["value"] == 1
    assert values["one"]["prognosis"]["youden_index_at_half"]["value"] < 1
    tables = out / "tables"
    row = read_table(tables / "prognosis.csv")[1]
    assert (row["variant"], float(row["youden_index"])) == ("two", 1)
    assert "youden_index_at_half" in read_table(tables / "prognosis-at-half.csv")[0]
    compared = {row["metric"]: row for row in read_table(tables / "prognosis-compared.csv")}
    assert float(compared["youden_index"]["difference"]) > 0
    assert "youden_index" in {row["metric"] for row in read_table(tables / "prognosis-folds.csv")}
    assert "youden_index" in read_table(tables / "subgroups.csv")[0]
    assert "Youden index" in page
    assert "| Youden index" in (tables / "prognosis.md").read_text()
