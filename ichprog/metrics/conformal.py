"""Conformal prediction: sets of labels that contain the true label with a chosen probability."""

import numpy as np
from numpy.typing import ArrayLike

from ichprog.metrics.bootstrap import finite, percentile_interval, resample_counts, wilson_interval

METRICS = ("conformal_coverage", "conformal_size")  # the metrics in the result of `set_metrics`


def conformal_sets(
    truth: ArrayLike, validation: np.ndarray, probabilities: np.ndarray, *, coverage: float = 0.9
) -> np.ndarray:
    """Compute label sets by split conformal prediction.

    The score of a label is 1 less its probability. The limit is the k-th smallest score of the true label among the V
    validation patients, with k = ceil((V + 1) * coverage). If V is too small for such a limit, every set has all
    labels. A set may be empty. The coverage holds on average over patients like the validation patients, not for each
    group of patients. Source: Sadinle et al., J Am Stat Assoc 2019;114:223-234.

    Args:
        truth: Label indices `(V,)` of the validation patients, on whom the network was not trained.
        validation: Probabilities `(V, K)` of the validation patients.
        probabilities: Probabilities `(N, K)` of the patients to predict.
        coverage: Probability with which a set contains the true label.

    Returns:
        Whether each label is in the set of each patient, `(N, K)` bool.

    Examples:
        >>> conformal_sets([0, 1], np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([[0.8, 0.2]]), coverage=0.5)
        array([[ True, False]])
    """
    indices = np.asarray(truth, np.int64)
    scores = np.sort(1 - validation[np.arange(len(indices)), indices])
    rank = int(np.ceil(round((len(indices) + 1) * coverage, 9)))
    limit = scores[rank - 1] if rank <= len(indices) else np.inf
    sets: np.ndarray = 1 - np.asarray(probabilities, np.float64) <= limit
    return sets


def set_statistics(sets: np.ndarray, truth: ArrayLike) -> dict[str, float]:
    """Describe label sets: coverage reached, mean size, share of sets with one label and share of empty sets.

    Args:
        sets: Label sets `(N, K)` bool.
        truth: Label indices `(N,)`.

    Returns:
        `coverage`, `size`, `one` and `none`; NaN without patients.

    Examples:
        >>> set_statistics(np.array([[True, False], [True, True]]), [0, 1])
        {'coverage': 1.0, 'size': 1.5, 'one': 0.5, 'none': 0.0}
    """
    size = sets.sum(axis=1)
    hit = sets[np.arange(len(sets)), np.asarray(truth, np.int64)]
    columns = {"coverage": hit, "size": size, "one": size == 1, "none": size == 0}
    return {name: float(values.mean()) if len(sets) else np.nan for name, values in columns.items()}


def set_metrics(
    sets: np.ndarray, truth: ArrayLike, *, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """Compute the coverage and mean size of label sets with 95 % intervals.

    The interval of the coverage is Wilson's; the interval of the size is a percentile bootstrap over patients.

    Args:
        sets: Label sets `(N, K)` bool.
        truth: Label indices `(N,)`.
        n_bootstrap: Number of bootstrap samples.
        seed: Random seed.

    Returns:
        `conformal_coverage` and `conformal_size`, each with `value`, `low` and `high`; None if undefined.
    """
    n, statistics = len(sets), set_statistics(sets, truth)
    low, high = wilson_interval(round(statistics["coverage"] * n) if n else 0, n)
    ends = float(low), float(high)
    sizes = resample_counts(n, n_bootstrap=n_bootstrap, seed=seed) @ sets.sum(axis=1) / n if n else np.empty(0)
    intervals = {"coverage": ends, "size": percentile_interval(sizes)}
    return {
        f"conformal_{name}": {"value": finite(statistics[name]), "low": finite(low), "high": finite(high)}
        for name, (low, high) in intervals.items()
    }
