"""Agreement: of readers with each other, of readers with a model, and of a saliency map with a lesion."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ichprog.errors import InvalidValueError
from ichprog.metrics.bootstrap import finite, wilson_interval
from ichprog.metrics.comparisons import Row, holm, mcnemar

_MIN_LATERALITY = 0.6  # a lesion with a smaller share on its heavier side has no side


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Compute the agreement of two readers beyond chance.

    Source: Cohen, Educ Psychol Meas 1960;20:37-46.

    Args:
        first: Labels `(N,)` of the first reader.
        second: Labels `(N,)` of the second reader.

    Returns:
        Kappa, NaN without patients or if all calls are one label.

    Examples:
        >>> cohen_kappa([0, 1, 0, 1], [1, 0, 1, 0])
        -1.0
    """
    a, b = np.asarray(first), np.asarray(second)
    if not len(a):
        return np.nan
    chance = sum(float((a == label).mean() * (b == label).mean()) for label in np.union1d(a, b))
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else np.nan


def fleiss_kappa(counts: ArrayLike) -> float:
    """Compute the agreement of many readers beyond chance.

    Source: Fleiss, Psychol Bull 1971;76:378-382.

    Args:
        counts: Number of readers who gave a patient each label `(N, K)`.

    Returns:
        Kappa, NaN without patients, with fewer than two readers, or if all calls are one label.

    Raises:
        InvalidValueError: Patients have different numbers of readers.

    Examples:
        >>> fleiss_kappa([[3, 0], [0, 3]])
        1.0
    """
    table = np.asarray(counts, np.float64)
    if not table.size or table[0].sum() < 2:
        return np.nan
    readers = table.sum(axis=1)
    if (readers != readers[0]).any():
        given = f"{readers.min():g} to {readers.max():g}"
        raise InvalidValueError("number of readers", given, "the same number for every patient")
    agreed = ((table**2).sum(axis=1) - readers) / (readers * (readers - 1))
    chance = float(((table.sum(axis=0) / table.sum()) ** 2).sum())
    return float((agreed.mean() - chance) / (1 - chance)) if chance < 1 else np.nan


def compare_readers(
    truth: ArrayLike, calls: Mapping[str, ArrayLike], model: ArrayLike, *, coverage: float = 0.95
) -> dict[str, Any]:
    """Compare readers with a model and with each other.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        calls: Calls `(N,)` by reader, 0 or 1; NaN or -1 if the reader did not read the patient.
        model: Calls `(N,)` of the model at its threshold, 0 or 1.
        coverage: Coverage of the intervals.

    Returns:
        - `model`: `n`, and `accuracy`, `sensitivity`, `specificity`, each with `value`, `low`, `high` by Wilson.
        - `readers`: the same by reader, on the patients that the reader read, and `against_model`.
        - `against_model`: for each of the three metrics the `difference`, model less reader; `model_only` and
          `reader_only`, the number of patients that only the model or only the reader has right; `p` by McNemar's exact
          test; and `p_holm` over all these tests.
        - `fleiss`: `kappa` over the `n` patients that every reader read.
        - `cohen`: rows of `first`, `second`, `kappa` and `n` for each two readers.

        Undefined values are None.

    Raises:
        InvalidValueError: The calls of a reader are no such numbers, or are not N.

    Examples:
        >>> compare_readers([0, 1], {"A": [0, 1]}, [1, 1])["readers"]["A"]["accuracy"]["value"]
        1.0
    """
    y, positive = np.asarray(truth) == 1, np.asarray(model) == 1
    table = {name: _validate_calls(name, given, len(y)) for name, given in calls.items()}
    rows = {name: _compare_reader(y, given, positive, coverage) for name, given in table.items()}
    tests = [test for row in rows.values() for test in row["against_model"].values()]
    adjusted = holm([np.nan if test["p"] is None else test["p"] for test in tests])
    for test, p in zip(tests, adjusted, strict=True):
        test["p_holm"] = finite(p)
    pairs = []
    for first, second in combinations(table, 2):
        both = ~np.isnan(table[first] + table[second])
        kappa = finite(cohen_kappa(table[first][both], table[second][both]))
        pairs.append({"first": first, "second": second, "kappa": kappa, "n": int(both.sum())})
    return {
        "model": _operating_point(y, positive == y, coverage),
        "readers": rows,
        "fleiss": _fleiss(list(table.values())),
        "cohen": pairs,
    }


def _validate_calls(name: str, given: ArrayLike, n: int) -> np.ndarray:
    values = np.asarray(given, np.float64)
    values = np.where(values == -1, np.nan, values)
    if values.shape != (n,):
        raise InvalidValueError(f"number of calls of reader {name}", values.shape, f"({n},), one for each patient")
    wrong = values[~(np.isnan(values) | (values == 0) | (values == 1))]
    if wrong.size:
        raise InvalidValueError(f"call of reader {name}", float(wrong[0]), "0 or 1, or NaN or -1 if not read")
    return values


def _compare_reader(truth: np.ndarray, calls: np.ndarray, model: np.ndarray, coverage: float) -> Row:
    read = ~np.isnan(calls)
    y, reader_right, model_right = truth[read], (calls == truth)[read], (model == truth)[read]
    against: dict[str, Row] = {}
    for metric, members in _denominators(y).items():
        model_only, reader_only, p = mcnemar(model_right[members], reader_right[members])
        difference = (model_only - reader_only) / members.sum() if members.any() else np.nan
        against[metric] = {"difference": finite(difference), "model_only": model_only, "reader_only": reader_only}
        against[metric]["p"] = p if members.any() else None
    return {**_operating_point(y, reader_right, coverage), "against_model": against}


def _operating_point(truth: np.ndarray, right: np.ndarray, coverage: float) -> Row:
    point: Row = {"n": len(truth)}
    for metric, members in _denominators(truth).items():
        hits, n = int(right[members].sum()), int(members.sum())
        low, high = wilson_interval(hits, n, coverage=coverage)
        value = hits / n if n else np.nan
        point[metric] = {"value": finite(value), "low": finite(float(low)), "high": finite(float(high))}
    return point


def _denominators(truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return the patients over whom each share is taken."""
    return {"accuracy": np.ones_like(truth), "sensitivity": truth, "specificity": ~truth}


def _fleiss(calls: Sequence[np.ndarray]) -> Row:
    every = np.stack(calls) if calls else np.empty((0, 0))
    shared = every[:, ~np.isnan(every).any(axis=0)]
    counts = np.stack([(shared == label).sum(axis=0) for label in (0, 1)], axis=1)
    return {"kappa": finite(fleiss_kappa(counts)), "n": shared.shape[1]}


def pointing_game(
    values: np.ndarray, lesion: np.ndarray, *, spacing: Sequence[float] = (1.0, 1.0, 1.0), tolerance_mm: float = 0.0
) -> float | None:
    """Return 1 if the highest voxel of a map lies in the lesion, else 0.

    Several highest voxels count by the share of them in the lesion. Source: Zhang et al., "Top-down neural attention by
    excitation backprop", ECCV 2016 (arXiv 1608.00507).

    Args:
        values: Saliency map `(i, j, k)`.
        lesion: Lesion mask `(i, j, k)` bool.
        spacing: Distance of voxels along i, j and k, in mm.
        tolerance_mm: Largest distance of the voxel from the lesion, in mm.

    Returns:
        None if the map has no positive voxel or the mask is empty.

    Examples:
        >>> values, lesion = np.zeros((4, 4, 4)), np.zeros((4, 4, 4), bool)
        >>> values[1, 2, 3], lesion[1, 2] = 1.0, True
        >>> pointing_game(values, lesion)
        1.0
    """
    from scipy.spatial import cKDTree

    top = values.max()
    if not top > 0 or not lesion.any():
        return None
    highest, inside = (np.argwhere(where) * np.asarray(spacing) for where in (values == top, lesion))
    distance, _ = cKDTree(inside).query(highest)
    return float((distance <= tolerance_mm).mean())


def relevance_mass_accuracy(values: np.ndarray, lesion: np.ndarray) -> float | None:
    """Return the share of a map's positive values that lies in the lesion.

    A map spread evenly over the brain has the lesion's share of the brain volume. Source: Arras et al., "CLEVR-XAI",
    Inf Fusion 2022;81:14-40 (arXiv 2003.07258).

    Args:
        values: Saliency map `(i, j, k)`.
        lesion: Lesion mask `(i, j, k)` bool.

    Returns:
        None if the map has no positive voxel or the mask is empty.

    Examples:
        >>> lesion = np.zeros((2, 2, 2), bool)
        >>> lesion[0] = True
        >>> relevance_mass_accuracy(np.ones((2, 2, 2)), lesion)
        0.5
    """
    positive = values.clip(min=0)
    total = positive.sum(dtype=np.float64)
    return float(positive[lesion].sum(dtype=np.float64) / total) if total > 0 and lesion.any() else None


def hemisphere_correct(values: np.ndarray, lesion: np.ndarray, brain: np.ndarray) -> bool | None:
    """Return whether most of a map's positive values lie in the lesion's hemisphere.

    The mid-plane is the plane that best halves the brain from left to right in each row of voxels. The head may
    therefore be turned or tilted.

    Args:
        values: Saliency map `(i, j, k)`.
        lesion: Lesion mask `(i, j, k)` bool.
        brain: Brain mask `(i, j, k)` bool that includes the lesion.

    Returns:
        None if the map has no positive voxel, the mask is empty, or less than 60 % of the lesion is in one hemisphere.

    Examples:
        >>> brain, lesion = np.ones((8, 8, 4), bool), np.zeros((8, 8, 4), bool)
        >>> lesion[6, 4, 2] = True
        >>> hemisphere_correct(lesion.astype(float), lesion, brain)
        True
    """
    side = np.sign(np.arange(len(brain))[:, None, None] - _mid_plane(brain))
    right, left = (float((lesion & (side == sign)).sum()) for sign in (-1, 1))
    positive = values.clip(min=0)
    if not positive.any() or not right + left or max(right, left) / (right + left) < _MIN_LATERALITY:
        return None
    balance = float((positive * side).sum(dtype=np.float64))
    return balance * (left - right) > 0


def _mid_plane(brain: np.ndarray) -> np.ndarray:
    """Return the index along i at which the mid-plane crosses each row of voxels `(j, k)`."""
    width = brain.sum(0)
    j, k = np.nonzero(width)
    if not j.size:
        return np.full(width.shape, (len(brain) - 1) / 2)
    middle = (brain.argmax(0) + len(brain) - 1 - brain[::-1].argmax(0))[j, k] / 2
    weight = np.sqrt(width[j, k].astype(float))
    design = np.stack([np.ones(j.size), j - j.mean(), k - k.mean()], 1)
    (centre, by_j, by_k), *_ = np.linalg.lstsq(design * weight[:, None], middle * weight, rcond=None)
    rows, slices = np.ogrid[: width.shape[0], : width.shape[1]]
    plane: np.ndarray = centre + by_j * (rows - j.mean()) + by_k * (slices - k.mean())
    return plane.round(6)  # a voxel on the plane belongs to neither side
