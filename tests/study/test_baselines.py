"""Baselines: the same numbers as scikit-learn, and no use of test labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from ichprog import RunError, UnknownNameError, zoo
from ichprog.cohort import Cohort, Patient
from ichprog.evaluation.predictions import TaskPredictions
from ichprog.study import baselines
from ichprog.study.config import Baseline
from ichprog.train import folds

TASK = zoo.find("densenet121.prognosis").tasks[0]
KINDS = ["majority", "logistic", "tree", "forest", "network"]


def cohort_of(labels, **columns):
    """Return patients with these columns; "" is blank."""
    rows = [
        {"poor_outcome": str(label) if label >= 0 else "", **{name: str(cells[i]) for name, cells in columns.items()}}
        for i, label in enumerate(labels)
    ]
    return Cohort(tuple(Patient(f"P{i:03}", Path("none"), row) for i, row in enumerate(rows)), "made.csv")


@pytest.fixture(scope="module")
def patients():
    """Return 200 patients whose outcome depends on two columns, with some blanks."""
    random = np.random.default_rng(0)
    age, gcs = random.normal(70, 12, 200).round(1), random.integers(3, 16, 200)
    odds = (age - 70) / 8 - (gcs - 10) / 2
    labels = (random.random(200) < 1 / (1 + np.exp(-odds))).astype(int)
    labels[::25] = -1
    cells = np.where(np.arange(200) % 17 == 0, "", gcs.astype(str))
    return cohort_of(labels, age=age, gcs=cells), labels, np.stack([age, gcs], 1), cells


def baseline(kind, columns=("age", "gcs"), variant=None):
    return Baseline("b", kind, () if kind == "majority" else columns, variant, "prognosis", False)


def by_hand(x, place_of_blank, train):
    """Impute medians, mark blanks and standardise with the training patients."""
    blank = np.isnan(x[:, place_of_blank])
    filled = x.copy()
    filled[blank, place_of_blank] = np.nanmedian(x[train, place_of_blank])
    filled = np.column_stack([filled, blank])
    return (filled - filled[train].mean(0)) / filled[train].std(0)


def known_part(labels, part):
    return part[labels[part] >= 0]


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("majority", DummyClassifier(strategy="prior")),
        ("logistic", LogisticRegression(max_iter=1000)),
        ("tree", DecisionTreeClassifier(max_depth=3, min_samples_leaf=5, random_state=4)),
        pytest.param("forest", RandomForestClassifier(500, min_samples_leaf=5, random_state=4), marks=pytest.mark.slow),
    ],
)
def test_predictions_equal_those_of_scikit_learn(kind, theirs, patients):
    cohort, labels, values, cells = patients
    x = np.where(np.stack([np.zeros(200, bool), cells == ""], 1), np.nan, values)
    parts = folds.split(labels, 3)
    predicted = baselines.predict(baseline(kind), cohort, TASK, parts, seed=4)
    for split in ("validation", "test"):
        answers = predicted[split]
        for number, fold in enumerate(parts):
            train, chosen = known_part(labels, fold.train), getattr(fold, split)
            scaled = by_hand(x, 1, train)
            expected = theirs.fit(scaled[train], labels[train]).predict_proba(scaled[chosen])
            mine = answers.fold == number
            assert answers.probabilities[mine] == pytest.approx(expected, abs=1e-9)
            assert [p for p, m in zip(answers.patients, mine, strict=True) if m] == [f"P{i:03}" for i in chosen]
            assert answers.truth[mine].tolist() == labels[chosen].tolist()
    assert len(set(predicted["test"].patients)) == (labels >= 0).sum() == len(predicted["test"])


def test_majority_predicts_the_label_share_of_the_training_part(patients):
    cohort, labels, *_ = patients
    parts = folds.split(labels, 3)
    predicted = baselines.predict(baseline("majority"), cohort, TASK, parts)["test"]
    for number, fold in enumerate(parts):
        share = (labels[fold.train] == 1).sum() / (labels[fold.train] >= 0).sum()
        assert predicted.probabilities[predicted.fold == number] == pytest.approx(
            np.array([[1 - share, share]] * len(fold.test))
        )


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "forest")) for kind in (*KINDS, "fusion")]
)
def test_test_labels_do_not_change_predictions(kind, patients):
    cohort, labels, values, cells = patients
    parts = folds.split(labels, 2)
    image = image_of(parts, labels) if kind == "fusion" else None
    chosen = baseline(kind, variant="v" if image else None)
    before = baselines.predict(chosen, cohort, TASK, parts, image=image)
    for number, fold in enumerate(parts):
        changed = labels.copy()
        changed[fold.test] = 1 - labels[fold.test]
        other = baselines.predict(chosen, cohort_of(changed, age=values[:, 0], gcs=cells), TASK, parts, image=image)
        mine = before["test"].fold == number
        assert other["test"].probabilities[mine].tolist() == before["test"].probabilities[mine].tolist()
        assert other["test"].truth[mine].tolist() != before["test"].truth[mine].tolist()
        changed = labels.copy()
        changed[fold.validation if kind == "fusion" else fold.train[:40]] *= 0
        other = baselines.predict(chosen, cohort_of(changed, age=values[:, 0], gcs=cells), TASK, parts, image=image)
        assert other["test"].probabilities[mine].tolist() != before["test"].probabilities[mine].tolist()


def test_the_network_is_reproducible_and_learns(patients):
    """Its AUROC is close to that of a logistic regression, and one seed gives one network."""
    _, labels, values, _ = patients
    x, y = values[labels >= 0], labels[labels >= 0]
    state = torch.random.get_rng_state()
    predicted, again, other = (baselines.fit("network", x, y, seed=seed)(x) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert predicted.tolist() == again.tolist() != other.tolist()
    plain = baselines.fit("logistic", x, y)(x)
    assert roc_auc_score(y, predicted) > roc_auc_score(y, plain) - 0.03
    assert 0 < predicted.min() < 0.2 < 0.8 < predicted.max() < 1


def test_the_network_has_the_published_layers_and_optimiser(patients, monkeypatch):
    _, labels, values, _ = patients
    built, adam = [], torch.optim.Adam

    def record(parameters, **options):
        parameters_list = list(parameters)
        built.append((sum(p.numel() for p in parameters_list), options))
        return adam(parameters_list, **options)

    monkeypatch.setattr(torch.optim, "Adam", record)
    baselines.fit("network", values, labels)
    published = nn.Sequential(
        nn.Linear(2, 64), nn.Linear(64, 32), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)
    )
    assert built == [
        (sum(p.numel() for p in published.parameters()), {"lr": 1e-3, "weight_decay": 1e-3, "amsgrad": True})
    ]


@pytest.mark.parametrize("number", [2, 128, 129, 130, 257])
def test_the_network_is_never_trained_on_a_batch_of_one(number):
    """Batch normalisation fails on a batch of one."""
    random = np.random.default_rng(1)
    x = random.normal(size=(number, 2))
    assert np.isfinite(baselines.fit("network", x, np.arange(number) % 2)(x)).all()


# fusion


def image_of(parts, labels, seed=3):
    """Return predictions of an image model: the truth with noise."""
    random, found = np.random.default_rng(seed), {}
    for split in ("validation", "test"):
        places = np.concatenate([getattr(fold, split) for fold in parts])
        fold = np.concatenate([np.full(len(getattr(f, split)), n) for n, f in enumerate(parts)])
        p = 1 / (1 + np.exp(-(labels[places] * 2 - 1 + random.normal(0, 2, len(places)))))
        names = tuple(f"P{i:03}" for i in places)
        found[split] = TaskPredictions(names, fold, labels[places], np.stack([1 - p, p], 1))
    return found


def test_fusion_is_fitted_to_the_validation_part_and_predicts_it_by_leave_one_out(patients):
    cohort, labels, values, _ = patients
    parts = folds.split(labels, 3, validation_fraction=0.3)
    image = image_of(parts, labels)
    predicted = baselines.predict(baseline("fusion", ("age",), "v"), cohort, TASK, parts, image=image)
    for number, fold in enumerate(parts):
        odds = {}
        for split in ("validation", "test"):
            p = image[split].probabilities[image[split].fold == number, 1]
            odds[split] = np.column_stack([np.log(p / (1 - p)), values[getattr(fold, split), 0]])

        def scaled(chosen, by):
            return (chosen - by.mean(0)) / by.std(0)

        x, y = odds["validation"], labels[fold.validation]
        model = LogisticRegression(max_iter=1000).fit(scaled(x, x), y)
        mine = predicted["test"].probabilities[predicted["test"].fold == number]
        assert mine == pytest.approx(model.predict_proba(scaled(odds["test"], x)), abs=1e-6)
        mine = predicted["validation"].probabilities[predicted["validation"].fold == number]
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            model = LogisticRegression(max_iter=1000).fit(scaled(x[rest], x[rest]), y[rest])
            assert mine[i] == pytest.approx(model.predict_proba(scaled(x[[i]], x[rest]))[0], abs=1e-6)


def test_fusion_matches_patients_by_name_and_refuses_missing_ones(patients):
    cohort, labels, *_ = patients
    parts = folds.split(labels, 2)
    image = image_of(parts, labels)
    shuffled = {
        split: answers.select(np.random.default_rng(0).permutation(len(answers))) for split, answers in image.items()
    }
    chosen = baseline("fusion", ("age",), "v")
    predicted, again = (baselines.predict(chosen, cohort, TASK, parts, image=i) for i in (image, shuffled))
    assert predicted["test"].probabilities.tolist() == again["test"].probabilities.tolist()
    lost = image | {"test": image["test"].select(np.arange(1, len(image["test"])))}
    with pytest.raises(
        RunError, match=f"no prediction of patient {image['test'].patients[0]} in the test part of fold 0"
    ):
        baselines.predict(chosen, cohort, TASK, parts, image=lost)
    with pytest.raises(RunError, match="needs the image model's predictions"):
        baselines.predict(chosen, cohort, TASK, parts)


# edge cases


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_label_gives_its_share(kind):
    assert baselines.fit(kind, np.zeros((5, 1)), np.ones(5, int))(np.zeros((2, 1))).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_may_be_blank_in_training_or_in_prediction(kind):
    random = np.random.default_rng(0)
    x = np.column_stack([random.normal(size=40), np.full(40, np.nan)])
    chosen = np.array([[np.nan, 3.0], [0.0, np.nan]])
    predicted = baselines.fit(kind, x, np.arange(40) % 2)(chosen)
    assert ((predicted > 0) & (predicted < 1)).all()


def test_an_unknown_column_and_an_unknown_kind_are_refused(patients):
    cohort, labels, *_ = patients
    with pytest.raises(UnknownNameError, match=r"Unknown column of made\.csv 'gsc'\. Did you mean gcs"):
        baselines.predict(baseline("logistic", ("gsc",)), cohort, TASK, folds.split(labels, 2))
    with pytest.raises(UnknownNameError, match=r"Unknown baseline kind 'forrest'\. Did you mean forest"):
        baselines.fit("forrest", np.zeros((4, 1)), np.array([0, 1, 0, 1]))


def test_a_decision_surface_is_the_model_at_every_point(patients):
    cohort, labels, values, cells = patients
    fold = folds.split(labels, 2)[0]
    x, y, p = baselines.decision_surface("tree", cohort, ("age", "gcs"), TASK, fold.train, size=7, seed=2)
    seen = np.where(np.stack([np.zeros(200, bool), cells == ""], 1), np.nan, values)[fold.train]
    predictor = baselines.fit("tree", seen, labels[fold.train], seed=2)
    assert (x[0], x[-1]) == (values[fold.train, 0].min(), values[fold.train, 0].max())
    assert p.shape == (7, 7)
    for row in range(7):
        for column in range(7):
            assert p[row, column] == predictor(np.array([[x[column], y[row]]]))[0]
    assert p[0, -1] > 0.7 > 0.3 > p[-1, 0], "old and a low GCS is poor, young and a high one good"
