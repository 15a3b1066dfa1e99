"""Comparisons on the same patients: of variants, of readers and a model, of columns and an outcome.

Every test is paired, two-sided, and takes patients as independent of each other. Out-of-fold answers come from several
networks that share most of their training patients; that part of chance is in no figure here.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ichprog.evaluation.predictions import TaskPredictions
from ichprog.metrics.bootstrap import bootstrap, finite, interval, resamples, wilson
from ichprog.metrics.discrimination import metrics, weighted_metrics
from ichprog.spec import Task

Row = dict[str, Any]
_ROUNDING = 1e-12  # figures that are no further apart are alike


# ---- two variants ----


def compare(
    task: Task,
    first: TaskPredictions,
    second: TaskPredictions,
    thresholds: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    *,
    draws: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
) -> dict[str, Row]:
    """Every figure of one variant less that of another, on the patients that both answer.

    Args:
        task: What both were asked.
        first: The answers of one, each patient once.
        second: Those of the other.
        thresholds: For each, as of `measure.metrics`.
        draws: Bootstrap samples of patients, the same for both.
        seed: Where chance comes from.
        coverage: Of the intervals.

    Returns:
        For each figure `first`, `second`, `difference`, `low`, `high`, `p`, `n` and `method`: "delong" for the AUROC of
        two labels, "bootstrap" for the rest. None where not defined.

    Raises:
        ValueError: A patient is there twice, or does not have the same truth in both.
    """
    chosen = _shared(first, second)
    sides = []
    for answers, places, limit in zip((first, second), chosen, thresholds, strict=True):
        limits = np.asarray(limit)[places] if np.ndim(limit) else limit  # type: ignore[arg-type]
        sides.append((answers.only(places), limits))
    truth, other = sides[0][0].truth, sides[1][0].truth
    if (truth != other).any():
        names = [sides[0][0].patients[place] for place in np.flatnonzero(truth != other)]
        raise ValueError(f"the truth of {', '.join(names[:5])} is not the same in both; compare answers to one cohort")
    values = [metrics(task, *side) for side in sides]
    weights = resamples(len(truth), draws=draws, seed=seed)
    drawn = [weighted_metrics(task, *side, weights) for side in sides]
    found = {}
    for name in values[0]:
        row = {"first": values[0][name], "second": values[1][name]}
        row |= _difference(row["first"] - row["second"], drawn[0][name] - drawn[1][name], coverage)
        method = "bootstrap"
        if name == "auroc" and len(task.labels) == 2:
            method, p = "delong", [answers.probabilities[:, 1] for answers, _ in sides]
            difference, error, row["p"] = delong(truth == 1, *p)
            row["low"], row["high"] = _wald(difference, error, coverage)
        found[name] = {key: finite(number) for key, number in row.items()} | {"n": len(truth), "method": method}
    return found


def _shared(first: TaskPredictions, second: TaskPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Where the patients of both are in each, in the order of the first."""
    where = []
    for answers in (first, second):
        where.append({patient: place for place, patient in enumerate(answers.patients)})
        if len(where[-1]) < len(answers):
            raise ValueError("a patient is in the answers twice; compare answers to the test parts")
    both = [patient for patient in first.patients if patient in where[1]]
    return np.array([where[0][p] for p in both], np.int64), np.array([where[1][p] for p in both], np.int64)


def paired_bootstrap(
    first: Callable[[np.ndarray], float],
    second: Callable[[np.ndarray], float],
    n: int,
    *,
    draws: int = 1000,
    seed: int = 0,
    strata: ArrayLike | None = None,
    coverage: float = 0.95,
) -> Row:
    """The difference of two statistics of the same patients, with the same bootstrap samples for both.

    Args:
        first: From the places `(n,)` of a sample's patients to a number.
        second: The same of the other.
        n: Patients.
        draws: Samples.
        seed: Where chance comes from.
        strata: `(n,)` groups whose sizes every sample keeps.
        coverage: Of the interval.

    Returns:
        `difference`, `low`, `high`, `p`; None where not defined.
    """

    def both(places: np.ndarray) -> float:
        return first(places) - second(places)

    drawn = bootstrap(both, n, draws=draws, seed=seed, strata=strata)
    found = _difference(both(np.arange(n)), drawn, coverage)
    return {key: finite(number) for key, number in found.items()}


def _difference(difference: float, drawn: np.ndarray, coverage: float) -> dict[str, float]:
    """A difference, its percentile interval, and p: twice the share of draws on the rarer side of 0, one more for each.

    Nothing but the difference where it is not defined in half of the draws.
    """
    found = {"difference": difference, "low": np.nan, "high": np.nan, "p": np.nan}
    known = drawn[np.isfinite(drawn)]
    if np.isnan(difference) or 2 * len(known) < len(drawn):
        return found
    rarer = min((known <= _ROUNDING).sum(), (known >= -_ROUNDING).sum())
    found["low"], found["high"] = interval(known, coverage=coverage)
    return found | {"p": min(1.0, 2 * (rarer + 1) / (len(known) + 1))}


# ---- areas under the ROC curve ----


def delong(truth: ArrayLike, first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """Compares two AUROCs on the same patients.

    Sources: DeLong et al., Biometrics 1988;44:837-845; by ranks as Sun and Xu, IEEE Signal Process Lett
    2014;21:1389-1393.

    Args:
        truth: `(N,)` of 0 and 1.
        first: `(N,)` scores of one.
        second: `(N,)` scores of the other.

    Returns:
        The difference, its standard error and p. NaN where an outcome has fewer than two patients, or where two
        different areas vary by nothing; p is 1 where the areas cannot differ.
    """
    areas, covariance = _areas(truth, first, second)
    difference = float(areas[0] - areas[1])
    error = float(np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0)))
    if error < _ROUNDING:
        return difference, error, 1.0 if abs(difference) < _ROUNDING else np.nan
    return difference, error, _two_sided(difference / error)


def delong_interval(truth: ArrayLike, p: ArrayLike, *, coverage: float = 0.95) -> tuple[float, float, float]:
    """An AUROC and its interval after DeLong et al. 1988, held within 0 and 1.

    Args:
        truth: `(N,)` of 0 and 1.
        p: `(N,)` scores.
        coverage: Of the interval.

    Returns:
        The area, low and high.
    """
    areas, covariance = _areas(truth, p)
    low, high = np.clip(_wald(areas[0], np.sqrt(covariance[0, 0]), coverage), 0, 1)
    return float(areas[0]), float(low), float(high)


def _areas(truth: ArrayLike, *scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The areas of S scores and the covariance `(S, S)` of them."""
    from scipy.stats import rankdata

    y = np.asarray(truth) == 1
    positive, negative = int(y.sum()), int((~y).sum())
    if min(positive, negative) < 2:
        area = np.nan
        return np.full(len(scores), area), np.full((len(scores), len(scores)), np.nan)
    of_positive, of_negative = np.empty((len(scores), positive)), np.empty((len(scores), negative))
    for row, score in enumerate(scores):
        values = np.asarray(score, np.float64)
        ranks = rankdata(values)
        # how many of the other outcome each patient is rightly above, or below, as a share
        of_positive[row] = (ranks[y] - rankdata(values[y])) / negative
        of_negative[row] = 1 - (ranks[~y] - rankdata(values[~y])) / positive
    covariance = np.cov(of_positive) / positive + np.cov(of_negative) / negative
    return of_positive.mean(axis=1), np.atleast_2d(covariance)


def _wald(value: float, error: float, coverage: float) -> tuple[float, float]:
    from scipy.special import ndtri

    half = float(ndtri((1 + coverage) / 2)) * error
    return value - half, value + half


def _two_sided(z: float) -> float:
    from scipy.special import ndtr

    return float(2 * ndtr(-abs(z)))


# ---- families, pairs, agreement ----


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjustment of a family of p values `(M,)` (Scand J Stat 1979;6:65-70); NaN is not of the family."""
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def mcnemar(first: ArrayLike, second: ArrayLike) -> tuple[int, int, float]:
    """McNemar's exact test of two yes-no columns of the same patients (Psychometrika 1947;12:153-157).

    Args:
        first: `(N,)` bool.
        second: `(N,)` bool.

    Returns:
        How many only the first has, how many only the second, and p; 1 where they never differ.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first, bool), np.asarray(second, bool)
    one, other = int((a & ~b).sum()), int((b & ~a).sum())
    return one, other, float(binomtest(one, one + other).pvalue) if one + other else 1.0


def fleiss_kappa(counts: ArrayLike) -> float:
    """Agreement of many readers beyond chance (Fleiss, Psychol Bull 1971;76:378-382).

    Args:
        counts: `(N, K)`, how many readers gave a patient each label; the same number of readers for each patient.

    Returns:
        Kappa, NaN where there are no patients or fewer than two readers, or where all calls are one label.

    Raises:
        ValueError: Patients have different numbers of readers.
    """
    table = np.asarray(counts, np.float64)
    if not table.size or table[0].sum() < 2:
        return np.nan
    readers = table.sum(axis=1)
    if (readers != readers[0]).any():
        raise ValueError(f"patients have {readers.min():g} to {readers.max():g} readers; each needs the same number")
    agreed = ((table**2).sum(axis=1) - readers) / (readers * (readers - 1))
    chance = float(((table.sum(axis=0) / table.sum()) ** 2).sum())
    return float((agreed.mean() - chance) / (1 - chance)) if chance < 1 else np.nan


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Agreement of two readers beyond chance (Cohen, Educ Psychol Meas 1960;20:37-46).

    Args:
        first: `(N,)` labels.
        second: `(N,)` labels.

    Returns:
        Kappa, NaN where there are no patients or all calls are one label.
    """
    a, b = np.asarray(first), np.asarray(second)
    if not len(a):
        return np.nan
    chance = sum(float((a == label).mean() * (b == label).mean()) for label in np.union1d(a, b))
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else np.nan


# ---- readers ----


def readers(
    truth: ArrayLike, calls: Mapping[str, ArrayLike], model: ArrayLike, *, coverage: float = 0.95
) -> dict[str, Any]:
    """Readers of the same patients beside a model, and beside each other.

    Args:
        truth: `(N,)` of 0 and 1.
        calls: By reader, `(N,)` of 0 and 1; NaN or -1 where the reader did not read.
        model: `(N,)` of 0 and 1, what the model says at its threshold.
        coverage: Of the intervals.

    Returns:
        `model` and, by name, `readers`: `n` and `accuracy`, `sensitivity`, `specificity`, each as `value`, `low` and
        `high` by Wilson. Each reader has `against_model`: for each of the three the `difference`, the model's less the
        reader's, on the patients that this reader read; `model_only` and `reader_only`, how many only one of them has
        right; `p` by McNemar's exact test, and `p_holm` over all these tests. `fleiss`: `kappa` over the `n` patients
        whom all have read. `cohen`: rows of `first`, `second`, `kappa`, `n` for each two readers. None where not
        defined.

    Raises:
        ValueError: A call is none of those.
    """
    y, said = np.asarray(truth) == 1, np.asarray(model) == 1
    table = {name: _calls(name, given, len(y)) for name, given in calls.items()}
    rows: dict[str, Row] = {}
    for name, given in table.items():
        read = ~np.isnan(given)
        right, model_right, sick = (given == y)[read], (said == y)[read], y[read]
        against = {}
        for figure, of in (("accuracy", np.ones_like(sick)), ("sensitivity", sick), ("specificity", ~sick)):
            ours, theirs, p = mcnemar(model_right[of], right[of])
            difference = (ours - theirs) / of.sum() if of.any() else np.nan
            against[figure] = {"difference": finite(difference), "model_only": ours, "reader_only": theirs}
            against[figure]["p"] = p if of.any() else None
        rows[name] = {**_operating_point(sick, right, coverage), "against_model": against}
    tests = [test for row in rows.values() for test in row["against_model"].values()]
    family = np.array([np.nan if test["p"] is None else test["p"] for test in tests])
    for test, adjusted in zip(tests, holm(family), strict=True):
        test["p_holm"] = finite(adjusted)
    every = np.stack(list(table.values())) if table else np.empty((0, len(y)))
    shared = every[:, ~np.isnan(every).any(axis=0)] if table else np.empty((0, 0))
    counts = np.stack([(shared == label).sum(axis=0) for label in (0, 1)], axis=1)
    pairs = []
    for one, other in combinations(table, 2):
        both = ~np.isnan(table[one] + table[other])
        kappa = finite(cohen_kappa(table[one][both], table[other][both]))
        pairs.append({"first": one, "second": other, "kappa": kappa, "n": int(both.sum())})
    fleiss = {"kappa": finite(fleiss_kappa(counts)), "n": shared.shape[1]}
    return {"model": _operating_point(y, said == y, coverage), "readers": rows, "fleiss": fleiss, "cohen": pairs}


def _calls(name: str, given: ArrayLike, n: int) -> np.ndarray:
    values = np.asarray(given, np.float64)
    values = np.where(values == -1, np.nan, values)
    if values.shape != (n,) or not (np.isnan(values) | (values == 0) | (values == 1)).all():
        raise ValueError(
            f"the calls of reader {name} must be {n} of 0 and 1, with NaN or -1 for what was not read; got "
            f"{values.shape[0] if values.ndim == 1 else values.shape} with {', '.join(map(str, np.unique(values)[:5]))}"
        )
    return values


def _operating_point(truth: np.ndarray, right: np.ndarray, coverage: float) -> Row:
    found: Row = {"n": len(truth)}
    for figure, of in (("accuracy", np.ones_like(truth)), ("sensitivity", truth), ("specificity", ~truth)):
        hits, patients = int(right[of].sum()), int(of.sum())
        low, high = wilson(hits, patients, coverage=coverage)
        value = hits / patients if patients else np.nan
        found[figure] = {"value": finite(value), "low": finite(float(low)), "high": finite(float(high))}
    return found


# ---- columns ----


def correlations(columns: Mapping[str, ArrayLike], outcome: ArrayLike, *, coverage: float = 0.95) -> list[Row]:
    """Spearman's correlation of each column with the outcome.

    Intervals are by Fisher's z with the variance of Bonett and Wright, Psychometrika 2000;65:23-28:
    (1 + rho^2 / 2) / (n - 3).

    Args:
        columns: `(N,)` numbers each, NaN where blank.
        outcome: `(N,)` numbers, NaN where not known.
        coverage: Of the intervals.

    Returns:
        A row each, in the columns' order: `name`, `n` (the patients who have both), `rho`, `low`, `high`, `p`, and
        `p_holm` over all columns. None where not defined: fewer than three patients, or all values alike; the interval
        needs four.
    """
    from scipy.stats import spearmanr

    rows: list[Row] = []
    y = np.asarray(outcome, np.float64)
    for name, column in columns.items():
        values = np.asarray(column, np.float64)
        both = np.isfinite(values) & np.isfinite(y)
        a, b = values[both], y[both]
        n, rho, p, low, high = len(a), np.nan, np.nan, np.nan, np.nan
        if n >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0:
            rho, p = map(float, spearmanr(a, b))
            if n >= 4:
                z = np.arctanh(np.clip(rho, -1 + 1e-15, 1 - 1e-15))
                low, high = np.tanh(_wald(z, np.sqrt((1 + rho**2 / 2) / (n - 3)), coverage))
        rows.append({"name": name, "n": n, "rho": rho, "low": low, "high": high, "p": p})
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
        row |= {key: finite(row[key]) for key in ("rho", "low", "high", "p", "p_holm")}
    return rows
