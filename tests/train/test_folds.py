"""Cross-validation folds and oversampling."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from ichprog import CohortError, RunError, UnknownNameError
from ichprog.train import folds, train

from support.cohorts import QUICK, read_table, with_columns


def test_the_folds_equal_the_published_ones(published_labels):
    """Against scikit-learn used as the published code does, and the checksum of what imbalanced-learn 0.14.2 gave."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    labels = published_labels
    made = folds.split(labels, 10)
    theirs = StratifiedKFold(10, shuffle=True, random_state=1).split(np.zeros((261, 1)), labels)
    for fold, (rest, test) in zip(made, theirs, strict=True):
        inner, chosen = train_test_split(rest, test_size=0.1, random_state=1, stratify=labels[rest])
        assert all(np.array_equal(a, b) for a, b in zip(fold, (inner, chosen, test), strict=True))
    whole = [[folds.oversample(f.train, labels).tolist(), f.validation.tolist(), f.test.tolist()] for f in made]
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    assert digest == "705aee791de00ab75a5171e40a1059db75999a2c9fa67af0e66de9066692a2d5"


def test_oversampling_equals_the_published_draw():
    labels = np.array([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 2, 2, 1])
    drawn = folds.oversample(np.arange(15), labels).tolist()  # imbalanced-learn 0.14.2, random_state=2
    assert drawn[15:] == [0, 3, 0, 8, 8, 0, 8, 13, 13, 13, 13, 13, 13, 13, 12]
    with_unknown = folds.oversample(np.arange(16), np.append(labels, -1)).tolist()
    assert [p for p in with_unknown if p != 15] == drawn
    assert with_unknown.count(15) == 1


def test_patients_without_the_first_label_are_only_trained_on(published_labels):
    labels = published_labels.copy()
    labels[::7] = -1
    for fold in folds.split(labels, 5):
        assert set(np.flatnonzero(labels < 0)) <= set(fold.train)
        assert (labels[fold.validation] >= 0).all()
        assert (labels[fold.test] >= 0).all()
        assert sorted(np.concatenate(fold)) == list(range(261))


def test_given_folds_are_used_unchanged(trained, cohort, spec, tmp_path, options):
    """Those of a run give that run again; fewer patients to train on are another run, tested on the same ones."""
    labels = cohort.labels(spec.tasks[0])
    parts = folds.split(labels, 4, seed=QUICK.split_seed, validation_fraction=QUICK.validation_fraction)
    settings = {"only_folds": [1], "protocol": QUICK, "options": options}
    train(cohort, spec, tmp_path / "same", folds=parts, **settings)
    assert (tmp_path / "same/fold1.safetensors").read_bytes() == (trained / "fold1.safetensors").read_bytes()
    fewer = [fold._replace(train=fold.train[:16]) for fold in parts]
    train(cohort, spec, tmp_path / "fewer", folds=fewer, **settings)
    record = json.loads((tmp_path / "fewer/run.json").read_text())["membership"]["1"]
    assert record["train"] == [cohort.patients[place].name for place in parts[1].train[:16]]
    tested = [[row["patient"] for row in read_table(tmp_path / run / "out_of_fold.csv")] for run in ("same", "fewer")]
    assert tested[0] == tested[1]
    assert len(tested[0]) == 8
    with pytest.raises(RunError, match="holds another run: parts was"):
        train(cohort, spec, tmp_path / "fewer", folds=parts, resume=True, **settings)
    with pytest.raises(UnknownNameError, match="Unknown fold '4'"):
        train(cohort, spec, tmp_path / "other", folds=parts, **settings | {"only_folds": [4]})


def test_a_model_of_another_task_uses_the_folds_of_the_first(cohort, spec, tmp_path, options):
    """Its own label is blank for every third patient, and its folds are not split by it."""
    parts = folds.split(cohort.labels(spec.task("prognosis")), 4, seed=1, validation_fraction=0.2)
    alone = dataclasses.replace(spec, tasks=(spec.task("gcs"),), name="small.one")
    run = train(
        cohort,
        alone,
        tmp_path / "run",
        folds=parts,
        only_folds=[0, 1],
        protocol=QUICK.replace(epochs=2),
        options=options,
    )
    rows = read_table(run / "out_of_fold.csv")
    tested = {cohort.patients[place].name for fold in parts[:2] for place in fold.test}
    assert {row["patient"] for row in rows} == tested
    assert any(row["gcs_true"] == "" for row in rows)


@pytest.mark.parametrize(
    ("parts", "expected_message"),
    [
        ([], "cannot be trained on. No fold is given"),
        ([([0, 1], [], [3])], "fold 0: a part has no patients"),
        ([([0, 1], [2], [99])], "fold 0: takes positions from 0 to 31, each in one of its parts"),
        ([([0, 1], [2], [2])], "fold 0: takes positions from 0 to 31, each in one of its parts"),
        ([([0, 2, 5], [3], [4])], "fold 0, prognosis: of 3 training patients 3 are 'good', 0 are 'poor'"),
        ([([1, 4, 5, 16], [3], [2]), ([1, 4, 5, 16], [3], [2])], "A patient is tested in two folds"),
    ],
)
def test_invalid_given_folds_are_refused(parts, expected_message, cohort, spec, tmp_path):
    made = [folds.Fold(*(np.array(part, np.int64) for part in fold)) for fold in parts]
    with pytest.raises(CohortError, match=expected_message):
        train(cohort, spec, tmp_path / "run", folds=made)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("columns", "changes", "expected_message"),
    [
        ({"age": lambda i: "60"}, {}, "age: of 32 patients 32 are '<80', 0 are '>=80'.*two labels"),
        ({"gcs": lambda i: ""}, {}, "gcs: of 32 patients 0 are '13-15'"),
        (
            {"poor_outcome": lambda i: str(int(i < 3))},
            {},
            "29 are 'good', 3 are 'poor' are fewer than 4 folds.*at most 3",
        ),
        ({}, {"folds": 1}, "1 folds: at least 2"),
        (
            {},
            {"folds": 4, "protocol": QUICK.replace(validation_fraction=0.01)},
            "leave 24 to train on, and 0.01 of them for validation",
        ),
    ],
)
def test_too_few_patients_are_refused(columns, changes, expected_message, cohort, spec, tmp_path, options):
    settings = {"folds": 4, "protocol": QUICK, "options": options} | changes
    with pytest.raises(CohortError, match=expected_message):
        train(with_columns(cohort, **columns), spec, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
