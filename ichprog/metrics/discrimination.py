"""The figures of one set of answers, and how sure they are.

Every figure is a function of how often each patient counts: once each gives the figure, a bootstrap draw counts a
patient as often as it was drawn, the jackknife leaves each out once. So a thousand draws are a few products of arrays.

A figure that is not defined, such as an AUROC where all outcomes are alike, is NaN. Of two labels the score is p, the
probability of the last label, and a patient is called positive where p exceeds the threshold that applies.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ichprog.evaluation.predictions import TaskPredictions
from ichprog.metrics.bootstrap import bca, finite, interval, resamples, wilson
from ichprog.spec import Task

_EDGE = 1e-6  # probabilities are held this far from 0 and 1 where their log-odds are taken
_FEW_VALUES = 6  # numbers that take no more values than these are subgroups as they are


def metrics(task: Task, answers: TaskPredictions, thresholds: ArrayLike | None = None) -> dict[str, float]:
    """Every figure of the answers to one task.

    Two labels: `auroc`, `auprc` (average precision); `accuracy`, `balanced_accuracy`, `sensitivity`, `specificity`,
    `ppv`, `npv`, `f1` at the thresholds and, with the ending `_at_half`, at 0.5; `brier`, `log_loss`;
    `calibration_slope`, and `calibration_intercept`, which is calibration in the large: the intercept at a slope of 1.

    More labels in order: `accuracy`, `balanced_accuracy`, `mae`, `rmse`, `quadratic_kappa`, `uoc` (the lower the
    better); `auroc_1`, `auroc_2`, ... of telling label k or later from those before, and their mean `auroc`; `rps`, the
    ranked probability score: the Brier score averaged over these cuts.

    Labels without order: `accuracy`, `balanced_accuracy`, `auroc` (mean of each label against the others), `log_loss`.

    Args:
        task: What was asked.
        answers: Those of `N` patients whose truth is known.
        thresholds: The threshold for each patient `(N,)`, or one for all; the task's own where not given, or 0.5.
    """
    once = np.ones((1, len(answers)))
    return {name: float(values[0]) for name, values in weighted_metrics(task, answers, thresholds, once).items()}


def weighted_metrics(
    task: Task, answers: TaskPredictions, thresholds: ArrayLike | None, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """`metrics` for each of several ways to count the patients.

    Args:
        task: What was asked.
        answers: Those of `N` patients whose truth is known.
        thresholds: As of `metrics`.
        weights: `(D, N)`, how often each patient counts.

    Returns:
        Each figure's values `(D,)`.
    """
    own = 0.5 if task.threshold is None else task.threshold
    cut = np.broadcast_to(np.asarray(own if thresholds is None else thresholds, np.float64), (len(answers),))
    truth, p = answers.truth, answers.probabilities
    if np.isnan(p).any():  # then no figure is defined, and where nobody counts none is
        p, weights = np.nan_to_num(p), np.zeros_like(weights)
    if len(task.labels) == 2:
        return _of_two(truth == 1, p[:, 1], cut, weights)
    if task.threshold is None:
        return _without_order(truth, p, weights)
    return _in_order(truth, p, cut, weights)


def metrics_with_intervals(
    task: Task,
    answers: TaskPredictions,
    thresholds: ArrayLike | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
    method: str = "percentile",
) -> dict[str, dict[str, float | None]]:
    """`metrics`, each with a bootstrap interval over patients.

    Args:
        task: What was asked.
        answers: Those of `N` patients whose truth is known, each patient once.
        thresholds: As of `metrics`; they are not chosen anew in a draw.
        draws: How many samples of `N` patients are drawn with replacement.
        seed: Where chance comes from.
        coverage: Of the interval.
        method: "percentile" or "bca".

    Returns:
        For each figure its `value`, `low` and `high`; None where not defined. An interval is given where the figure is
        defined in at least half of the draws, from those draws.
    """
    drawn = weighted_metrics(task, answers, thresholds, resamples(len(answers), draws=draws, seed=seed))
    left_out: dict[str, np.ndarray] = {}
    if method == "bca":
        left_out = weighted_metrics(task, answers, thresholds, 1 - np.eye(len(answers)))
    elif method != "percentile":
        raise ValueError(f'method is {method!r}; "percentile" and "bca" are allowed')
    found: dict[str, dict[str, float | None]] = {}
    for name, value in metrics(task, answers, thresholds).items():
        low, high = np.nan, np.nan
        if not np.isnan(value) and np.isfinite(drawn[name]).mean() >= 0.5:
            if left_out:
                low, high = bca(drawn[name], value, left_out[name], coverage=coverage)
            else:
                low, high = interval(drawn[name], coverage=coverage)
        found[name] = {"value": finite(value), "low": finite(low), "high": finite(high)}
    return found


# ---- figures; w is (D, N), how often each patient counts ----


def _of_two(truth: np.ndarray, p: np.ndarray, cut: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    area, precision = _ranking(truth, p, w)
    found = {"auroc": area, "auprc": precision}
    for ending, called in (("", p > cut), ("_at_half", p > 0.5)):
        found |= {name + ending: values for name, values in _calls(truth, called, w).items()}
    slope, intercept = _calibration(truth, p, w)
    found |= {"brier": _mean(w, (p - truth) ** 2), "log_loss": _mean(w, _surprise(np.where(truth, p, 1 - p)))}
    return found | {"calibration_slope": slope, "calibration_intercept": intercept}


def _in_order(truth: np.ndarray, p: np.ndarray, cut: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    labels = p.shape[1]
    tails = np.cumsum(np.insert(-p[:, :-1], 0, 1, axis=1), axis=1)[:, 1:]  # (N, K - 1): P(y >= 1), P(y >= 2), ...
    steps = np.arange(1, labels)
    decided = ((tails > cut[:, None]) * steps).max(axis=1)
    table = _confusion(truth, decided, labels, w)
    far = np.abs(np.subtract.outer(np.arange(labels), np.arange(labels)))
    total = table.sum(axis=(1, 2))
    chance = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
    square = (table * far**2).sum(axis=(1, 2))
    areas = {f"auroc_{k}": _ranking(truth >= k, tails[:, k - 1], w)[0] for k in steps}
    return {
        **_agreement(table),
        "mae": _ratio((table * far).sum(axis=(1, 2)), total),
        "rmse": np.sqrt(_ratio(square, total)),
        "quadratic_kappa": 1 - _ratio(square * total, (chance * far**2).sum(axis=(1, 2))),
        "uoc": uoc(table),
        "auroc": np.mean(list(areas.values()), axis=0),
        **areas,
        "rps": _mean(w, ((tails - (truth[:, None] >= steps)) ** 2).mean(axis=1)),
    }


def _without_order(truth: np.ndarray, p: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    labels = p.shape[1]
    areas = [_ranking(truth == k, p[:, k], w)[0] for k in range(labels)]
    return {
        **_agreement(_confusion(truth, p.argmax(axis=1), labels, w)),
        "auroc": np.mean(areas, axis=0),
        "log_loss": _mean(w, _surprise(np.take_along_axis(p, truth[:, None], axis=1)[:, 0])),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    blank = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    found: np.ndarray = np.divide(part, whole, out=blank, where=whole != 0)
    return found


def _mean(w: np.ndarray, values: np.ndarray) -> np.ndarray:
    return _ratio(w @ values, w.sum(axis=1))


def _surprise(p: np.ndarray) -> np.ndarray:
    found: np.ndarray = -np.log(np.clip(p, np.finfo(np.float64).eps, 1))
    return found


def _ranking(truth: np.ndarray, p: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve by ranks, ties counting half, and average precision."""
    order = np.argsort(p, kind="stable")
    starts = np.flatnonzero(np.diff(p[order], prepend=-np.inf))
    counts = w[:, order]
    positive = np.add.reduceat(counts * truth[order], starts, axis=1)
    negative = np.add.reduceat(counts * ~truth[order], starts, axis=1)
    beaten = np.cumsum(negative, axis=1) - negative / 2
    area = _ratio((positive * beaten).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))
    found, called = (np.cumsum(each[:, ::-1], axis=1)[:, ::-1] for each in (positive, positive + negative))
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    average = _ratio((positive * precision).sum(axis=1), positive.sum(axis=1))
    return area, np.where(np.isnan(area), np.nan, average)  # of one outcome only, neither says anything


def _calls(truth: np.ndarray, called: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    tp, fn, fp, tn = (w @ (a & b) for a, b in ((truth, called), (truth, ~called), (~truth, called), (~truth, ~called)))
    sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    return {
        "accuracy": _ratio(tp + tn, tp + fn + fp + tn),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": _ratio(tp, tp + fp),
        "npv": _ratio(tn, tn + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
    }


def _confusion(truth: np.ndarray, decided: np.ndarray, labels: int, w: np.ndarray) -> np.ndarray:
    """How often each label is decided on where each is true: `(D, K, K)`, a row for each true label."""
    found: np.ndarray = w @ np.eye(labels * labels)[truth * labels + decided]
    return found.reshape(-1, labels, labels)


def _agreement(table: np.ndarray) -> dict[str, np.ndarray]:
    recalls = _ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(axis=2))
    present = np.isfinite(recalls).sum(axis=1).astype(np.float64)
    balanced = _ratio(np.nansum(recalls, axis=1), np.where(present > 1, present, 0))
    return {
        "accuracy": _ratio(np.trace(table, axis1=1, axis2=2), table.sum(axis=(1, 2))),
        "balanced_accuracy": balanced,
    }


def uoc(tables: np.ndarray) -> np.ndarray:
    """The uniform ordinal classification index: 0 where all is right, near 1 where all is wrong.

    Each row of the table is divided by its sum, so that every label weighs the same. A path goes from the table's first
    cell to its last, each step one row down, one column on, or both; it earns the shares it meets and pays for their
    distance from the diagonal, times beta. The index of the best path is averaged over beta from 0 to 1. Labels that no
    patient has are left out of the count of labels.

    Args:
        tables: `(D, K, K)`, a row for each true label, a column for each decided one.

    Returns:
        `(D,)`, NaN for an empty table.

    Source: Silva, Pinto, Cardoso, "A uniform performance index for ordinal classification with imbalanced classes",
    IJCNN 2018 (doi 10.1109/IJCNN.2018.8489327), with one exponent for distances, 1, as in the paper.
    """
    labels = tables.shape[1]
    shares = np.nan_to_num(_ratio(tables, tables.sum(axis=2, keepdims=True)))
    paid = shares * np.abs(np.subtract.outer(np.arange(labels), np.arange(labels)))
    present = shares.sum(axis=(1, 2))
    earned = shares / np.maximum(present + paid.sum(axis=(1, 2)), 1)[:, None, None]
    beta = np.linspace(0, 1, 201)
    dear = beta / np.maximum(present, 1)[:, None]  # (D, B)
    best = np.full((labels + 1, labels + 1, *dear.shape), np.inf)
    best[0, 0] = 1
    for row in range(labels):
        for column in range(labels):
            came = np.minimum(np.minimum(best[row, column], best[row, column + 1]), best[row + 1, column])
            cost = dear * paid[:, row, column, None] - earned[:, row, column, None]
            best[row + 1, column + 1] = came + cost
    found: np.ndarray = np.trapezoid(best[labels, labels], beta, axis=1)
    return np.where(present > 0, found, np.nan)


def _calibration(truth: np.ndarray, p: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope of the outcome's log-odds on those of p, and the intercept where that slope is 1.

    NaN where one outcome is missing; the slope also where p parts the outcomes, as it would be infinite.
    """
    x = log_odds(p)
    seen = w > 0
    highest = [np.where(seen & (truth == k), x, -np.inf).max(axis=1, initial=-np.inf) for k in (0, 1)]
    lowest = [np.where(seen & (truth == k), x, np.inf).min(axis=1, initial=np.inf) for k in (0, 1)]
    overlap = (highest[0] > lowest[1]) & (highest[1] > lowest[0])
    slope = np.full(len(w), np.nan)
    if overlap.any():
        slope[overlap] = _slopes(x, truth, w[overlap])
    low, high = np.full(len(w), -40.0), np.full(len(w), 40.0)  # wider than log-odds held within _EDGE can need
    positive = w @ truth
    for _ in range(40):
        middle = (low + high) / 2
        more = (w * _chance(x + middle[:, None])).sum(axis=1) < positive
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    both = (positive > 0) & (positive < w.sum(axis=1))
    return slope, np.where(both, (low + high) / 2, np.nan)


def _slopes(x: np.ndarray, truth: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Slopes of logistic regressions, by Newton's method with held steps; NaN where that does not settle."""
    scale = float(x.std())
    z = (x - x.mean()) / scale
    found, going = np.zeros((len(w), 2)), np.arange(len(w))
    for _ in range(50):
        chance = _chance(found[going, :1] + found[going, 1:] * z)
        left, curve = w[going] * (truth - chance), w[going] * chance * (1 - chance)
        a, b, c = curve.sum(axis=1), curve @ z, curve @ z**2
        first, second = left.sum(axis=1), left @ z
        step = np.stack([c * first - b * second, a * second - b * first], axis=1)
        step = np.clip(step / np.maximum(a * c - b * b, 1e-300)[:, None], -2, 2)
        found[going] += step
        going = going[np.abs(step).max(axis=1) > 1e-9]
        if not len(going):
            break
    found[going] = np.nan
    return found[:, 1] / scale


def log_odds(p: ArrayLike) -> np.ndarray:
    """log(p / (1 - p)) of probabilities held within 1e-6 of 0 and 1."""
    held = np.clip(np.asarray(p, np.float64), _EDGE, 1 - _EDGE)
    found: np.ndarray = np.log(held) - np.log1p(-held)
    return found


def _chance(odds: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    found: np.ndarray = expit(odds)
    return found


# ---- what is chosen on validation parts ----


def choose_threshold(truth: ArrayLike, p: ArrayLike) -> float:
    """The threshold of highest balanced accuracy (Youden, Cancer 1950;3:32-35), for validation answers only.

    Args:
        truth: `(N,)` of 0 and 1.
        p: `(N,)` probabilities of 1.

    Returns:
        Midway between two neighbouring probabilities; of equally good ones the nearest to 0.5. 0.5 where there is one
        outcome only, or no threshold is better than chance.
    """
    y, values = np.asarray(truth) == 1, np.asarray(p, np.float64)
    levels = np.unique(values)
    middle = (levels[:-1] + levels[1:]) / 2
    cuts = np.where(middle < levels[1:], middle, levels[:-1])  # neighbours with no number between them
    if not len(cuts) or y.all() or not y.any():
        return 0.5
    positive, negative = np.sort(values[y]), np.sort(values[~y])
    caught = 1 - np.searchsorted(positive, cuts, side="right") / len(positive)
    youden = caught + np.searchsorted(negative, cuts, side="right") / len(negative) - 1
    best = cuts[np.isclose(youden, youden.max(), rtol=0, atol=1e-12)]
    return float(best[np.abs(best - 0.5).argmin()]) if youden.max() > 1e-12 else 0.5


def recalibration(truth: ArrayLike, p: ArrayLike) -> tuple[float, float]:
    """Logistic recalibration for validation answers: log-odds become slope * log-odds + intercept.

    A weak prior keeps it near no change where patients are few and keeps the slope positive, so that ranks stay: the
    slope's logarithm is normal with mean 0 and standard deviation 1, the intercept with 0 and 2. Without patients, and
    where all are alike, nothing breaks. Source: Cox, Biometrika 1958;45:562-565; the prior is this project's.

    Args:
        truth: `(N,)` of 0 and 1.
        p: `(N,)` probabilities of 1.

    Returns:
        Slope and intercept, for `recalibrate`.
    """
    from scipy.optimize import minimize

    x, sign = log_odds(p), np.where(np.asarray(truth) == 1, 1.0, -1.0)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(at[0])
        margin = sign * (slope * x + at[1])
        pull = -sign * _chance(-margin)
        value = np.logaddexp(0, -margin).sum() + at[0] ** 2 / 2 + at[1] ** 2 / 8
        return float(value), np.array([(pull * slope * x).sum() + at[0], pull.sum() + at[1] / 4])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-4, 4), (-40, 40)], tol=1e-12).x
    return float(np.exp(found[0])), float(found[1])


def recalibrate(p: ArrayLike, slope: float, intercept: float) -> np.ndarray:
    """Probabilities `(N,)` after `recalibration`."""
    return _chance(slope * log_odds(p) + intercept)


def conformal_sets(
    truth: ArrayLike, validation: np.ndarray, probabilities: np.ndarray, *, coverage: float = 0.9
) -> np.ndarray:
    """Sets of labels that hold the true one with at least this probability, by split conformal prediction.

    The score of a label is 1 - its probability; the limit is the validation answers' k-th smallest score of the true
    label, k = ceil((V + 1) * coverage). Where V is too small for that every label is in the set. A set may be empty.
    The promise is for patients like those of the validation part and holds for the average patient, not for each kind.
    Source: Sadinle et al., J Am Stat Assoc 2019;114:223-234.

    Args:
        truth: `(V,)` label indices of the validation patients, whom the network did not learn from.
        validation: `(V, K)` their probabilities.
        probabilities: `(N, K)` those of the patients asked about.
        coverage: What is promised.

    Returns:
        `(N, K)` bool.
    """
    known = np.asarray(truth, np.int64)
    scores = np.sort(1 - validation[np.arange(len(known)), known])
    place = int(np.ceil(round((len(known) + 1) * coverage, 9)))
    limit = scores[place - 1] if place <= len(known) else np.inf
    found: np.ndarray = 1 - np.asarray(probabilities, np.float64) <= limit
    return found


def conformal_figures(sets: np.ndarray, truth: ArrayLike) -> dict[str, float]:
    """The coverage that sets `(N, K)` reached, their mean size, and the shares that hold one label and none."""
    size = sets.sum(axis=1)
    hit = sets[np.arange(len(sets)), np.asarray(truth, np.int64)]
    columns = {"coverage": hit, "size": size, "one": size == 1, "none": size == 0}
    return {name: float(values.mean()) if len(sets) else np.nan for name, values in columns.items()}


# ---- curves and groups ----


def calibration_curve(
    truth: ArrayLike, p: ArrayLike, *, bins: int = 10, quantile: bool = True, coverage: float = 0.95
) -> dict[str, np.ndarray]:
    """How often the outcome came where p was about this much.

    Args:
        truth: `(N,)` of 0 and 1.
        p: `(N,)` probabilities of 1.
        bins: Bins at most; empty ones are left out.
        quantile: Whether bins hold about as many patients each; otherwise they are as wide as each other.
        coverage: Of Wilson's interval.

    Returns:
        Of each bin `predicted` (the mean p), `observed` (the share), `count`, `low`, `high`.
    """
    y, values = np.asarray(truth, np.float64), np.asarray(p, np.float64)
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    if quantile and len(values):
        edges = np.unique(np.quantile(values, edges))
    place = np.searchsorted(edges, values)
    inside = np.arange(bins)[:, None] == place  # (bins, N)
    inside = inside[inside.any(axis=1)]
    count, positive = inside.sum(axis=1), inside @ y
    low, high = wilson(positive, count, coverage=coverage)
    return {
        "predicted": inside @ values / count,
        "observed": positive / count,
        "count": count,
        "low": low,
        "high": high,
    }


def net_benefit(truth: ArrayLike, p: ArrayLike, thresholds: ArrayLike) -> dict[str, np.ndarray]:
    """The decision curve: true positives less false positives, weighed by the threshold's odds, for each patient.

    Source: Vickers and Elkin, Med Decis Making 2006;26:565-574.

    Args:
        truth: `(N,)` of 0 and 1.
        p: `(N,)` probabilities of 1.
        thresholds: `(T,)` probabilities under 1 at which one would act.

    Returns:
        `thresholds`, and the net benefit of acting by the `model`, for `all`, for `none`: each `(T,)`.
    """
    y, at = np.asarray(truth, np.float64), np.asarray(thresholds, np.float64)
    called = np.asarray(p, np.float64) > at[:, None]
    odds, share, n = at / (1 - at), y.mean() if len(y) else np.nan, max(len(y), 1)
    model = (called @ y - odds * (called @ (1 - y))) / n
    return {"thresholds": at, "model": model, "all": share - odds * (1 - share), "none": np.zeros_like(at)}


def histogram(truth: ArrayLike, p: ArrayLike, *, bins: int = 20) -> dict[str, np.ndarray]:
    """How often each probability was given: `edges` `(bins + 1,)` from 0 to 1 and `counts` `(2, bins)` by outcome."""
    edges = np.linspace(0, 1, bins + 1)
    y, values = np.asarray(truth), np.asarray(p, np.float64)
    return {"edges": edges, "counts": np.stack([np.histogram(values[y == k], edges)[0] for k in (0, 1)])}


def subgroups(values: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
    """Groups of patients by a column; blanks are in none.

    Args:
        values: `(N,)` text or numbers; "", None and NaN are blanks. A column is of numbers where every cell can be read
            as one.

    Returns:
        By name, who is in it, `(N,)` bool. Text and numbers of at most six values: by value. Other numbers: by
        terciles, with the cuts in the name.
    """
    cells = ["" if value is None else str(value).strip() for value in values]
    try:
        numbers = np.array([float(cell) if cell else np.nan for cell in cells])
    except ValueError:
        text = np.array(cells)
        return {str(value): text == value for value in np.unique(text) if value}
    known = numbers[np.isfinite(numbers)]
    if len(levels := np.unique(known)) <= _FEW_VALUES:
        return {f"{value:g}": numbers == value for value in levels}
    first, second = np.quantile(known, [1 / 3, 2 / 3])
    groups = {
        f"<= {first:.4g}": numbers <= first,
        f"{first:.4g} to {second:.4g}": (numbers > first) & (numbers <= second),
        f"> {second:.4g}": numbers > second,
    }
    return {name: chosen for name, chosen in groups.items() if chosen.any()}
