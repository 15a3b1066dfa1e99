"""Metrics of ordered labels, checked against scikit-learn, published examples and brute force."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from ichprog import zoo
from ichprog.metrics import compute
from ichprog.metrics.ordinal import uoc_index

from support.predictions import three_labels

TASK = next(task for task in zoo.find(zoo.DEFAULT).tasks if task.kind == "ordinal")


def brute_uoc(table):
    """Every path, one at a time, and the mean over beta by quadrature."""
    table = np.array(table, float)
    last, present = len(table) - 1, (table.sum(axis=1) > 0).sum()
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    far = abs(np.subtract.outer(np.arange(len(table)), np.arange(len(table))))
    spread = (shares * far).sum()

    def paths(row, column):
        if row == column == last:
            yield [(row, column)]
        for down, on in ((1, 0), (0, 1), (1, 1)):
            if row + down <= last and column + on <= last:
                for rest in paths(row + down, column + on):
                    yield [(row, column), *rest]

    lines = []
    for path in paths(0, 0):
        earned = sum(shares[cell] for cell in path) / (present + spread)
        lines.append((1 - earned, sum(shares[cell] * far[cell] for cell in path) / present))
    lines = np.array(lines)
    beta = np.linspace(0, 1, 20001)
    return np.trapezoid((lines[:, :1] + lines[:, 1:] * beta).min(axis=0), beta)


@pytest.mark.parametrize(
    ("table", "published"),
    [
        ([[4, 0, 0, 0], [0, 5, 0, 0], [0, 0, 6, 0], [0, 0, 0, 1]], 0.0),
        ([[0, 4, 0, 0], [0, 0, 6, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.56),
        ([[0, 0, 4, 0], [0, 0, 6, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.65),
        ([[0, 4, 0, 0], [6, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.61),
        ([[0, 4, 0, 0], [6, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 3]], 0.74),
        ([[0, 40, 0, 0], [6, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 3]], 0.61),
    ],
    ids="ABCDEF",
)
def test_the_ordinal_index_equals_the_published_examples(table, published):
    """Table 1 of Silva, Pinto, Cardoso, IJCNN 2018: the index averaged over beta, printed with two digits."""
    found = uoc_index(np.array([table], float))[0]
    assert found == pytest.approx(published, abs=0.0061)
    assert found == pytest.approx(brute_uoc(table), abs=2e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_of_ordered_labels_equal_those_of_scikit_learn(seed):
    y, p = three_labels(seed=seed)
    decided = [TASK.labels.index(TASK.decide(dict(zip(TASK.labels, row, strict=True)))) for row in p]
    cuts = [sklearn_metrics.roc_auc_score(y >= 1, p[:, 1] + p[:, 2]), sklearn_metrics.roc_auc_score(y >= 2, p[:, 2])]
    tails = np.stack([p[:, 1] + p[:, 2], p[:, 2]], axis=1)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(y, decided),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, decided),
        "mae": sklearn_metrics.mean_absolute_error(y, decided),
        "rmse": sklearn_metrics.mean_squared_error(y, decided) ** 0.5,
        "quadratic_kappa": sklearn_metrics.cohen_kappa_score(y, decided, weights="quadratic"),
        "auroc_1": cuts[0],
        "auroc_2": cuts[1],
        "auroc": sum(cuts) / 2,
        "rps": np.mean([sklearn_metrics.brier_score_loss(y >= k, tails[:, k - 1]) for k in (1, 2)]),
    }
    found = compute(y, p, kind="ordinal")
    assert found.pop("uoc") == pytest.approx(brute_uoc(sklearn_metrics.confusion_matrix(y, decided)), abs=2e-5)
    assert found == pytest.approx(expected, rel=1e-9)
