"""Metrics of ordered labels: how far the decided label is from the true one."""

import numpy as np

from ichprog.metrics.metric import WeightedPredictions, metric, ratio


@metric("AUROC {cut}", name="auroc_{cut}", kinds=["ordinal"], in_report=False)
def auroc_by_cut(predictions: WeightedPredictions) -> np.ndarray:
    """Return the area under the ROC curve of label k or later, for each cut k `(D, K - 1)`.

    Args:
        predictions: The predictions.
    """
    return np.stack([area for area, _ in predictions.rankings], axis=1)


@metric("MAE", kinds=["ordinal"], higher_is_better=False, compared=True)
def mae(predictions: WeightedPredictions) -> np.ndarray:
    """Return the mean absolute distance between decided and true label, in labels.

    Args:
        predictions: The predictions.
    """
    return _mean_distance(predictions, power=1)


@metric("RMSE", kinds=["ordinal"], higher_is_better=False)
def rmse(predictions: WeightedPredictions) -> np.ndarray:
    """Return the root mean square distance between decided and true label, in labels.

    Args:
        predictions: The predictions.
    """
    root: np.ndarray = np.sqrt(_mean_distance(predictions, power=2))
    return root


@metric("quadratic kappa", kinds=["ordinal"], compared=True)
def quadratic_kappa(predictions: WeightedPredictions) -> np.ndarray:
    """Return Cohen's kappa with quadratic weights.

    Source: Cohen, Psychol Bull 1968;70:213-220.

    Args:
        predictions: The predictions.
    """
    table = predictions.confusion
    squares = _distances(table) ** 2
    by_chance = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
    observed = (table * squares).sum(axis=(1, 2)) * table.sum(axis=(1, 2))
    return 1 - ratio(observed, (by_chance * squares).sum(axis=(1, 2)))


@metric("UOC", kinds=["ordinal"], higher_is_better=False)
def uoc(predictions: WeightedPredictions) -> np.ndarray:
    """Return the uniform ordinal classification index of the decided labels.

    Args:
        predictions: The predictions.
    """
    return uoc_index(predictions.confusion)


@metric("RPS", kinds=["ordinal"], higher_is_better=False)
def rps(predictions: WeightedPredictions) -> np.ndarray:
    """Return the ranked probability score: the Brier score averaged over the cuts between labels.

    Source: Epstein, J Appl Meteorol 1969;8:985-987.

    Args:
        predictions: The predictions.
    """
    later = predictions.truth[:, None] >= np.arange(1, predictions.probabilities.shape[1])
    return predictions.mean(((predictions.cumulative - later) ** 2).mean(axis=1))


def uoc_index(tables: np.ndarray) -> np.ndarray:
    """Compute the uniform ordinal classification index: 0 if every label is right, near 1 if every label is wrong.

    Each row of a confusion matrix is divided by its sum, so that every label weighs the same. A path leads from the
    first cell to the last, each step one row down, one column right, or both. A path earns the shares in its cells and
    pays beta times the shares' distances from the diagonal. The index of the best path is averaged over beta from 0 to
    1. Labels without patients do not count as labels.

    Source: Silva, Pinto, Cardoso, "A uniform performance index for ordinal classification with imbalanced classes",
    IJCNN 2018 (doi 10.1109/IJCNN.2018.8489327). The exponent of distances is 1, as in the paper.

    Args:
        tables: Confusion matrices `(D, K, K)`, a row for each true and a column for each decided label.

    Returns:
        The index `(D,)`, NaN for an empty table.

    Examples:
        >>> uoc_index(np.array([[[4.0, 0.0], [0.0, 2.0]]]))
        array([0.])
    """
    labels = tables.shape[1]
    shares = np.nan_to_num(ratio(tables, tables.sum(axis=2, keepdims=True)))
    costs = shares * _distances(tables)
    present = shares.sum(axis=(1, 2))
    gains = shares / np.maximum(present + costs.sum(axis=(1, 2)), 1)[:, None, None]
    beta = np.linspace(0, 1, 201)
    weights = beta / np.maximum(present, 1)[:, None]  # (D, B)
    best = np.full((labels + 1, labels + 1, *weights.shape), np.inf)
    best[0, 0] = 1
    for row in range(labels):
        for column in range(labels):
            previous = np.minimum(np.minimum(best[row, column], best[row, column + 1]), best[row + 1, column])
            step = weights * costs[:, row, column, None] - gains[:, row, column, None]
            best[row + 1, column + 1] = previous + step
    index: np.ndarray = np.trapezoid(best[labels, labels], beta, axis=1)
    return np.where(present > 0, index, np.nan)


def _distances(tables: np.ndarray) -> np.ndarray:
    labels = np.arange(tables.shape[1])
    distances: np.ndarray = np.abs(np.subtract.outer(labels, labels))
    return distances


def _mean_distance(predictions: WeightedPredictions, *, power: int) -> np.ndarray:
    table = predictions.confusion
    return ratio((table * _distances(table) ** power).sum(axis=(1, 2)), table.sum(axis=(1, 2)))
