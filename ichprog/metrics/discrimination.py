"""Discrimination: how well probabilities rank patients, and how good decisions at a threshold are."""

import numpy as np
from numpy.typing import ArrayLike

from ichprog.metrics.metric import WeightedPredictions, metric, ratio


@metric("AUROC", compared=True, in_subgroups=True)
def auroc(predictions: WeightedPredictions) -> np.ndarray:
    """Return the area under the ROC curve.

    More than two labels take the mean over events: label k or later for ordered labels, label k against all others
    for labels without order. Ties count half. Source: Hanley and McNeil, Radiology 1982;143:29-36.

    Args:
        predictions: The predictions.
    """
    areas: np.ndarray = np.mean([area for area, _ in predictions.rankings], axis=0)
    return areas


@metric("AUPRC", kinds=["binary"], compared=True)
def auprc(predictions: WeightedPredictions) -> np.ndarray:
    """Return the average precision, the area under the precision-recall curve without interpolation.

    Args:
        predictions: The predictions.
    """
    return predictions.rankings[0][1]


@metric("balanced accuracy", compared=True, in_subgroups=True, at_threshold=True)
def balanced_accuracy(predictions: WeightedPredictions) -> np.ndarray:
    """Return the mean recall over the labels present, NaN if only one label is present.

    Source: Brodersen et al., ICPR 2010 (doi 10.1109/ICPR.2010.764).

    Args:
        predictions: The predictions.
    """
    table = predictions.confusion
    recalls = ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(axis=2))
    present = np.isfinite(recalls).sum(axis=1).astype(np.float64)
    return ratio(np.nansum(recalls, axis=1), np.where(present > 1, present, 0))


@metric("accuracy", at_threshold=True)
def accuracy(predictions: WeightedPredictions) -> np.ndarray:
    """Return the share of patients whose decided label is the true one.

    Args:
        predictions: The predictions.
    """
    table = predictions.confusion
    return ratio(np.trace(table, axis1=1, axis2=2), table.sum(axis=(1, 2)))


@metric("sensitivity", kinds=["binary"], compared=True, in_subgroups=True, at_threshold=True)
def sensitivity(predictions: WeightedPredictions) -> np.ndarray:
    """Return the share of positive patients who are called positive.

    Args:
        predictions: The predictions.
    """
    _, _, fn, tp = _outcomes(predictions)
    return ratio(tp, tp + fn)


@metric("specificity", kinds=["binary"], compared=True, in_subgroups=True, at_threshold=True)
def specificity(predictions: WeightedPredictions) -> np.ndarray:
    """Return the share of negative patients who are called negative.

    Args:
        predictions: The predictions.
    """
    tn, fp, _, _ = _outcomes(predictions)
    return ratio(tn, tn + fp)


@metric("PPV", kinds=["binary"], at_threshold=True)
def ppv(predictions: WeightedPredictions) -> np.ndarray:
    """Return the positive predictive value, the share of positive calls that are right.

    Args:
        predictions: The predictions.
    """
    _, fp, _, tp = _outcomes(predictions)
    return ratio(tp, tp + fp)


@metric("NPV", kinds=["binary"], at_threshold=True)
def npv(predictions: WeightedPredictions) -> np.ndarray:
    """Return the negative predictive value, the share of negative calls that are right.

    Args:
        predictions: The predictions.
    """
    tn, _, fn, _ = _outcomes(predictions)
    return ratio(tn, tn + fn)


@metric("F1", kinds=["binary"], at_threshold=True)
def f1(predictions: WeightedPredictions) -> np.ndarray:
    """Return the harmonic mean of sensitivity and positive predictive value.

    Args:
        predictions: The predictions.
    """
    _, fp, fn, tp = _outcomes(predictions)
    return ratio(2 * tp, 2 * tp + fp + fn)


def _outcomes(predictions: WeightedPredictions) -> np.ndarray:
    """Return the true negatives, false positives, false negatives and true positives, each `(D,)`."""
    return predictions.confusion.reshape(-1, 4).T


def choose_threshold(truth: ArrayLike, p: ArrayLike) -> float:
    """Choose the threshold with the highest balanced accuracy, from validation patients only.

    Source: Youden, Cancer 1950;3:32-35.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.

    Returns:
        A number midway between two neighbouring probabilities. Of equally good thresholds it is the one nearest to 0.5.
        If only one outcome occurs, or no threshold is better than chance, 0.5.

    Examples:
        >>> round(choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]), 3)
        0.4
    """
    y, values = np.asarray(truth) == 1, np.asarray(p, np.float64)
    levels = np.unique(values)
    middle = (levels[:-1] + levels[1:]) / 2
    thresholds = np.where(middle < levels[1:], middle, levels[:-1])  # neighbours with no number between them
    if not len(thresholds) or y.all() or not y.any():
        return 0.5
    positive, negative = np.sort(values[y]), np.sort(values[~y])
    sensitivities = 1 - np.searchsorted(positive, thresholds, side="right") / len(positive)
    youden = sensitivities + np.searchsorted(negative, thresholds, side="right") / len(negative) - 1
    best = thresholds[np.isclose(youden, youden.max(), rtol=0, atol=1e-12)]
    return float(best[np.abs(best - 0.5).argmin()]) if youden.max() > 1e-12 else 0.5


def net_benefit(truth: ArrayLike, p: ArrayLike, thresholds: ArrayLike) -> dict[str, np.ndarray]:
    """Compute the decision curve: true positives per patient less false positives weighted by the threshold's odds.

    Source: Vickers and Elkin, Med Decis Making 2006;26:565-574.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        thresholds: Probabilities `(T,)` under 1 from which one would treat.

    Returns:
        `thresholds`, and the net benefit `(T,)` of treating by the `model`, of treating `all` and of treating `none`.

    Examples:
        >>> net_benefit([1, 0, 0, 0], [0.9, 0.6, 0.1, 0.2], [0.5])["model"]
        array([0.])
    """
    y, limits = np.asarray(truth, np.float64), np.asarray(thresholds, np.float64)
    treated = np.asarray(p, np.float64) > limits[:, None]
    odds, share, n = limits / (1 - limits), y.mean() if len(y) else np.nan, max(len(y), 1)
    model = (treated @ y - odds * (treated @ (1 - y))) / n
    return {"thresholds": limits, "model": model, "all": share - odds * (1 - share), "none": np.zeros_like(limits)}
