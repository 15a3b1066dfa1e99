"""Fit the calibration of a model: recalibration, conformal sets and the distribution of inputs."""

from collections.abc import Mapping, Sequence

import numpy as np

from ichprog.calibration import adjust, event_probabilities
from ichprog.metrics.calibration import fit_recalibration
from ichprog.spec import Adjustment, Calibration, InputDistribution, ModelSpec, Task, TaskCalibration

MIN_PATIENTS = 50
"""Fewest patients for which a calibration is worth anything: a set for 90 % then covers 80 % to 97 %."""

MIN_EVENTS = 10
"""Fewest patients with and without an event for which its probabilities are recalibrated."""

USUAL_SHARE = 0.99  # of the patients of a calibration lie within the threshold of the distance
_PERCENTS = range(50, 100)
_PARTS = 10
_DIGITS = 8


def fit_calibration(
    spec: ModelSpec,
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray]],
    statistics: Sequence[Mapping[str, float]],
    patients: str,
) -> Calibration | None:
    """Fit a calibration to patients on whom the networks were not trained.

    Args:
        spec: The model.
        predictions: For each task, label indices `(N,)`, -1 if unknown, and probabilities `(N, K)`.
        statistics: Result of `calibration.input_statistics` for each patient.
        patients: The patients, in words.

    Returns:
        The calibration. Tasks with fewer than `MIN_PATIENTS` labels are left out; None if no task is left, or if there
        are fewer than `MIN_PATIENTS` statistics.
    """
    tasks = {}
    for name, (truth, probabilities) in predictions.items():
        known = truth >= 0
        if known.sum() >= MIN_PATIENTS:
            tasks[name] = fit_task(spec.task(name), truth[known], probabilities[known])
    if not tasks or len(statistics) < MIN_PATIENTS:
        return None
    return Calibration(patients, tasks, fit_inputs(statistics))


def fit_task(task: Task, truth: np.ndarray, probabilities: np.ndarray, *, seed: int = 0) -> TaskCalibration:
    """Fit the recalibration and the limits of conformal sets of a task.

    The limits come from probabilities that were recalibrated by a fit to other patients. The score of a label is its
    probability, as in `metrics.conformal`.

    Args:
        task: The task.
        truth: Label indices `(N,)`.
        probabilities: `(N, K)`.
        seed: Random seed of the parts for the limits.
    """
    number = len(truth)
    part = np.random.default_rng(seed).permutation(number) % _PARTS
    recalibrated = np.empty_like(probabilities, np.float64)
    for k in range(_PARTS):
        own = part == k
        others = _fit_adjustments(task, truth[~own], probabilities[~own])
        recalibrated[own] = adjust(task, probabilities[own], others)
    of_truth = np.sort(recalibrated[np.arange(number), truth])[::-1]
    ranks = {percent: int(np.ceil(round((number + 1) * percent / 100, 9))) for percent in _PERCENTS}
    limits = {str(percent): float(of_truth[rank - 1]) for percent, rank in ranks.items() if rank <= number}
    return TaskCalibration(
        number,
        _fit_adjustments(task, truth, probabilities),
        {percent: round(limit, _DIGITS) for percent, limit in limits.items()},
    )


def fit_inputs(statistics: Sequence[Mapping[str, float]], *, seed: int = 0) -> InputDistribution:
    """Fit the distribution of inputs, with a threshold that nearly all patients like these do not exceed.

    The threshold comes from distances of patients to whom the distribution was not fitted.

    Args:
        statistics: Result of `calibration.input_statistics` for each patient.
        seed: Random seed of the parts for the threshold.
    """
    names = list(statistics[0])
    table = np.array([[row[name] for name in names] for row in statistics])
    part = np.random.default_rng(seed).permutation(len(table)) % _PARTS
    distances = np.empty(len(table))
    for k in range(_PARTS):
        own = part == k
        mean, scale, precision = _fit_distribution(table[~own])
        z = (table[own] - mean) / scale
        distances[own] = np.sqrt(np.einsum("ij,jk,ik->i", z, precision, z))
    rank = min(len(table), int(np.ceil((len(table) + 1) * USUAL_SHARE)))
    mean, scale, precision = _fit_distribution(table)
    return InputDistribution(
        {name: _rounded(value) for name, value in zip(names, mean, strict=True)},
        {name: _rounded(value) for name, value in zip(names, scale, strict=True)},
        tuple(tuple(map(_rounded, row)) for row in precision),
        _rounded(np.sort(distances)[rank - 1]),
    )


def coverage_interval(patients: int, coverage: float) -> tuple[float, float]:
    """Return the interval that holds the true coverage of a conformal set in 95 % of calibrations of a size.

    Args:
        patients: Number of patients of the calibration.
        coverage: The chosen coverage.

    Source: Vovk, Asian Conference on Machine Learning 2012; the coverage has a beta distribution.

    Examples:
        >>> low, high = coverage_interval(200, 0.9)
        >>> round(low, 2), round(high, 2)
        (0.86, 0.94)
    """
    from scipy.stats import beta

    rank = int(np.ceil(round((patients + 1) * coverage, 9)))
    if rank > patients:
        return 1.0, 1.0
    low, high = beta.ppf([0.025, 0.975], rank, patients + 1 - rank)
    return float(low), float(high)


def _fit_adjustments(task: Task, truth: np.ndarray, probabilities: np.ndarray) -> tuple[Adjustment, ...]:
    """Fit the change of the log-odds of each event; an event of few patients stays as it is."""
    p = event_probabilities(task, probabilities)
    number = p.shape[1]
    events = truth[:, None] == np.arange(number) if task.kind == "nominal" else truth[:, None] > np.arange(number)
    adjustments = []
    for k in range(number):
        slope, intercept = 1.0, 0.0
        if min(events[:, k].sum(), (~events[:, k]).sum()) >= MIN_EVENTS:
            slope, intercept = fit_recalibration(events[:, k], p[:, k])
        adjustments.append(Adjustment(_rounded(slope), _rounded(intercept)))
    return tuple(adjustments)


def _fit_distribution(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean, the scale and the shrunk precision of standardised statistics."""
    from sklearn.covariance import LedoitWolf

    mean, scale = table.mean(0), np.maximum(table.std(0), 1e-4)
    return mean, scale, LedoitWolf(assume_centered=True).fit((table - mean) / scale).precision_


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
