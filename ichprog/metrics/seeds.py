"""Metrics of a model that was trained several times with different random seeds, on the same patients.

Two patients differ, and so do two trainings on the same patients. Intervals include both: each bootstrap sample draws
patients, the same for all trainings, and draws trainings. Of S trainings it draws S - 1, with replacement, because the
mean of S draws varies less than the mean of S trainings does (Rao and Wu, J Am Stat Assoc 1988;83:231-241).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ichprog.errors import InvalidValueError
from ichprog.metrics.bootstrap import finite, percentile_interval, resample_counts
from ichprog.metrics.comparisons import difference_row
from ichprog.metrics.metric import Interval, Kind, compute, compute_weighted

Row = dict[str, Any]


def compute_over_seeds(
    truth: ArrayLike,
    probabilities: Sequence[ArrayLike],
    *,
    kind: Kind,
    thresholds: Sequence[ArrayLike],
    n_bootstrap: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
) -> dict[str, Interval]:
    """Compute the mean of every metric over trainings, with a bootstrap interval over patients and trainings.

    Args:
        truth: Label indices `(N,)`.
        probabilities: Probabilities `(N, K)` of each training.
        kind: Kind of task.
        thresholds: Decision thresholds of each training, each `(N,)` or one for all patients.
        n_bootstrap: Number of bootstrap samples.
        seed: Random seed.
        coverage: Coverage of the intervals.

    Returns:
        By metric name the `value`, `low` and `high`; None if undefined. An interval needs a metric that is defined in
        at least half of the samples.

    Raises:
        InvalidValueError: The arrays do not fit the kind of task, or there is no training.

    Examples:
        >>> truth, trainings = [0, 1, 0, 1], [[0.1, 0.9, 0.2, 0.8], [0.1, 0.9, 0.95, 0.8]]
        >>> compute_over_seeds(truth, trainings, kind="binary", thresholds=[0.5, 0.5], n_bootstrap=50)["auroc"]["value"]
        0.75
    """
    values, samples = _metrics(truth, probabilities, thresholds, kind, n_bootstrap, seed)
    random = np.random.default_rng([seed, 1])
    intervals: dict[str, Interval] = {}
    for name, by_training in values.items():
        drawn = _mean_of_drawn(samples[name], random)
        value, low, high = by_training.mean(), np.nan, np.nan
        if not np.isnan(value) and np.isfinite(drawn).mean() >= 0.5:
            low, high = percentile_interval(drawn, coverage=coverage)
        intervals[name] = {"value": finite(value), "low": finite(low), "high": finite(high)}
    return intervals


def compare_over_seeds(
    truth: ArrayLike,
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    kind: Kind,
    thresholds: tuple[Sequence[ArrayLike], Sequence[ArrayLike]],
    n_bootstrap: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
) -> dict[str, Row]:
    """Compare the means of every metric over the trainings of two models, on the same patients.

    Args:
        truth: Label indices `(N,)`.
        first: Probabilities `(N, K)` of each training of the first model.
        second: Probabilities `(N, K)` of each training of the second model.
        kind: Kind of task.
        thresholds: Decision thresholds of both, as in `compute_over_seeds`.
        n_bootstrap: Number of bootstrap samples of patients, which both models share. Trainings are drawn separately.
        seed: Random seed.
        coverage: Coverage of the intervals.

    Returns:
        By metric name `first`, `second`, `difference`, `low`, `high`, `p`, `n` and `method`; None if undefined.

    Raises:
        InvalidValueError: The arrays do not fit the kind of task, or a model has no training.

    Examples:
        >>> truth, half = [0, 1, 0, 1], [0.5, 0.5]
        >>> good, poor = [[0.1, 0.9, 0.2, 0.8]] * 2, [[0.9, 0.1, 0.2, 0.8]] * 2
        >>> rows = compare_over_seeds(truth, good, poor, kind="binary", thresholds=(half, half), n_bootstrap=50)
        >>> rows["auroc"]["difference"]
        0.75
    """
    sides = [
        _metrics(truth, models, limits, kind, n_bootstrap, seed)
        for models, limits in zip((first, second), thresholds, strict=True)
    ]
    random = np.random.default_rng([seed, 2])
    rows: dict[str, Row] = {}
    for name in sides[0][0]:
        means = [float(values[name].mean()) for values, _ in sides]
        drawn = [_mean_of_drawn(samples[name], random) for _, samples in sides]
        row: Row = {"first": means[0], "second": means[1]}
        row |= difference_row(means[0] - means[1], drawn[0] - drawn[1], coverage)
        rows[name] = {key: finite(number) for key, number in row.items()}
        rows[name] |= {"n": len(np.asarray(truth)), "method": "bootstrap of patients and trainings"}
    return rows


def seed_variance(
    truth: ArrayLike,
    probabilities: Sequence[ArrayLike],
    metric: str,
    *,
    kind: Kind,
    thresholds: Sequence[ArrayLike],
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return by how much a metric varies with the training and with the patients.

    Args:
        truth: Label indices `(N,)`.
        probabilities: Probabilities `(N, K)` of each training.
        metric: Name of the metric.
        kind: Kind of task.
        thresholds: Decision thresholds, as in `compute_over_seeds`.
        n_bootstrap: Number of bootstrap samples of patients.
        seed: Random seed.

    Returns:
        `lowest` and `highest` value of a training; `seeds_sd`, the standard deviation between trainings on the same
        patients; `patients_sd`, the standard error of the mean over trainings with respect to the patients, or
        NaN if the metric is defined in fewer than two samples.

    Raises:
        InvalidValueError: The arrays do not fit the kind of task, or there are fewer than two trainings.
    """
    if len(probabilities) < 2:
        raise InvalidValueError("probabilities", f"{len(probabilities)} trainings", "at least two trainings")
    values, samples = _metrics(truth, probabilities, thresholds, kind, n_bootstrap, seed)
    by_training, means = values[metric], samples[metric].mean(0)
    means = means[~np.isnan(means)]  # a metric need not be defined in every sample
    return {
        "lowest": float(by_training.min()),
        "highest": float(by_training.max()),
        "seeds_sd": float(by_training.std(ddof=1)),
        "patients_sd": float(means.std(ddof=1)) if len(means) > 1 else np.nan,
    }


def crossed_components(values: ArrayLike) -> dict[str, float]:
    """Split the variance of a metric over folds and trainings into their shares.

    The model is value = mean + fold + training + rest, with independent random effects. The estimates are those of the
    analysis of variance, and a negative one becomes 0 (Searle et al., Variance Components, 1992, section 4.3).

    Args:
        values: Value of the metric in each fold of each training `(S, F)`, with at least two of both.

    Returns:
        The standard deviations `folds_sd`, `seeds_sd` and `rest_sd`. The folds differ because their patients differ.

    Raises:
        InvalidValueError: There are fewer than two folds or trainings.

    Examples:
        >>> crossed_components([[0.6, 0.8], [0.6, 0.8]])["seeds_sd"]
        0.0
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise InvalidValueError("values", table.shape, "an array of at least two trainings and two folds")
    trainings, folds = table.shape
    by_training, by_fold, mean = table.mean(1), table.mean(0), table.mean()
    rest = ((table - by_training[:, None] - by_fold + mean) ** 2).sum() / ((trainings - 1) * (folds - 1))
    between_folds = (trainings * ((by_fold - mean) ** 2).sum() / (folds - 1) - rest) / trainings
    between_trainings = (folds * ((by_training - mean) ** 2).sum() / (trainings - 1) - rest) / folds
    variances = {"folds_sd": between_folds, "seeds_sd": between_trainings, "rest_sd": rest}
    return {name: float(np.sqrt(max(variance, 0.0))) for name, variance in variances.items()}


def corrected_resampled_test(differences: ArrayLike, test_share: float) -> tuple[float, float]:
    """Test the mean difference over folds, whose training parts overlap.

    The variance of the mean is that of the differences times 1 / F + test patients / training patients instead of
    1 / F, because overlapping training parts make the folds more alike than independent samples are.

    Args:
        differences: Difference in each fold `(F,)`, at least two. NaN is ignored.
        test_share: Number of test patients of a fold divided by its number of training patients.

    Returns:
        The mean difference, and p by Student's t with F - 1 degrees of freedom. p is NaN without variance.

    Raises:
        InvalidValueError: `test_share` is not positive.

    Source: Nadeau and Bengio, Machine Learning 2003;52:239-281.

    Examples:
        >>> difference, p = corrected_resampled_test([0.01, 0.03, 0.02, 0.05, 0.04], 0.25)
        >>> round(difference, 3), round(p, 3)
        (0.03, 0.047)
    """
    from scipy.special import stdtr

    if test_share <= 0:
        raise InvalidValueError("test_share", test_share, "a positive number")
    known = np.asarray(differences, np.float64)
    known = known[np.isfinite(known)]
    if len(known) < 2 or (spread := known.std(ddof=1)) == 0:
        return float(known.mean()) if len(known) else np.nan, np.nan
    t = known.mean() / (spread * np.sqrt(1 / len(known) + test_share))
    return float(known.mean()), float(2 * stdtr(len(known) - 1, -abs(t)))


def _metrics(
    truth: ArrayLike,
    probabilities: Sequence[ArrayLike],
    thresholds: Sequence[ArrayLike],
    kind: Kind,
    n_bootstrap: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return by metric the values `(S,)` of S trainings, and their values `(S, D)` in D bootstrap samples."""
    if not len(probabilities):
        raise InvalidValueError("probabilities", probabilities, "at least one training")
    weights = resample_counts(len(np.asarray(truth)), n_bootstrap=n_bootstrap, seed=seed)
    pairs = list(zip(probabilities, thresholds, strict=True))
    values = [compute(truth, p, kind=kind, thresholds=limits) for p, limits in pairs]
    samples = [compute_weighted(truth, p, weights, kind=kind, thresholds=limits) for p, limits in pairs]
    return (
        {name: np.array([each[name] for each in values]) for name in values[0]},
        {name: np.stack([each[name] for each in samples]) for name in values[0]},
    )


def _mean_of_drawn(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the mean `(D,)` of S - 1 trainings that are drawn for each bootstrap sample, for samples `(S, D)`."""
    trainings, draws = samples.shape
    if trainings == 1:
        only: np.ndarray = samples[0]
        return only
    chosen = random.integers(trainings, size=(trainings - 1, draws))
    mean: np.ndarray = samples[chosen, np.arange(draws)].mean(0)
    return mean
