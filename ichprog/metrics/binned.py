"""Discrimination from counts of patients in bins of the score, of one site or of several sites with other bins."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ichprog.metrics.metric import ratio


@dataclass(frozen=True)
class BinnedScores:
    """Numbers of patients with and without an event in bins of the predicted probability.

    Attributes:
        edges: Increasing edges `(B + 1,)` of the bins from 0 to 1. A bin includes its lower edge, the last also 1.
        events: Number of patients with the event in each bin `(B,)`.
        others: Number of patients without the event in each bin `(B,)`.
    """

    edges: np.ndarray
    events: np.ndarray
    others: np.ndarray


def bin_scores(truth: ArrayLike, p: ArrayLike, edges: ArrayLike) -> BinnedScores:
    """Count patients in bins of the predicted probability.

    Args:
        truth: Outcomes `(N,)`, 0 or 1.
        p: Probabilities of outcome 1 `(N,)`.
        edges: Increasing edges `(B + 1,)` from 0 to 1.

    Examples:
        >>> bin_scores([0, 1, 1], [0.1, 0.5, 1.0], [0, 0.5, 1]).events
        array([0, 2])
    """
    y, values, limits = np.asarray(truth) == 1, np.asarray(p, np.float64), np.asarray(edges, np.float64)
    counts = [np.histogram(values[members], limits)[0] for members in (y, ~y)]
    return BinnedScores(limits, *counts)


def merge_small_bins(scores: BinnedScores, min_count: int) -> BinnedScores | None:
    """Merge neighbouring bins until every bin has enough patients with and without the event.

    Bins are closed from the lowest score on. A remainder at the end joins the last bin.

    Args:
        scores: Counts.
        min_count: Smallest number of patients with the event, and of patients without, in every bin.

    Returns:
        The merged counts; None if all patients together are too few.

    Examples:
        >>> fine = BinnedScores(np.linspace(0, 1, 5), np.array([1, 2, 0, 3]), np.array([4, 1, 2, 2]))
        >>> merge_small_bins(fine, 3).edges
        array([0. , 0.5, 1. ])
    """
    kept, counts = [0], []
    events = others = 0
    for index, (more_events, more_others) in enumerate(zip(scores.events, scores.others, strict=True), start=1):
        events, others = events + int(more_events), others + int(more_others)
        if min(events, others) >= min_count:
            kept.append(index)
            counts.append((events, others))
            events = others = 0
    if not counts:
        return None
    kept[-1] = len(scores.events)
    counts[-1] = (counts[-1][0] + events, counts[-1][1] + others)
    table = np.array(counts, np.int64)
    return BinnedScores(scores.edges[kept], table[:, 0], table[:, 1])


def binned_auroc(sites: Sequence[BinnedScores]) -> tuple[float, float]:
    """Compute the AUROC of all pairs of an event and another patient, of one or several sites.

    A pair in overlapping bins counts half, like a tie. With one site, the area is exact for the binned scores.

    Args:
        sites: Counts of each site. Sites may have other edges.

    Returns:
        The area and its bound: the area of the unbinned scores differs by at most the bound. NaN without a pair.

    Examples:
        >>> binned_auroc([BinnedScores(np.array([0.0, 0.5, 1.0]), np.array([0, 2]), np.array([2, 0]))])
        (1.0, 0.0)
    """
    certain = overlapping = pairs = 0.0
    for one in sites:
        for other in sites:
            low, high = one.edges[:-1, None], one.edges[1:, None]  # bins of patients with the event
            other_low, other_high = other.edges[None, :-1], other.edges[None, 1:]
            counts = np.outer(one.events, other.others).astype(np.float64)
            above = low >= other_high
            overlap = (low < other_high) & (other_low < high)
            certain += float(counts[above].sum())
            overlapping += float(counts[overlap].sum())
            pairs += float(counts.sum())
    if not pairs:
        return np.nan, np.nan
    return (certain + overlapping / 2) / pairs, overlapping / 2 / pairs


def binned_auroc_error(scores: BinnedScores) -> float:
    """Compute the standard error of the AUROC of binned scores by the method of DeLong et al., Biometrics 1988;44:837.

    Args:
        scores: Counts of one site.

    Returns:
        The standard error, NaN with fewer than two patients with or without the event.

    Examples:
        >>> binned_auroc_error(BinnedScores(np.array([0.0, 0.5, 1.0]), np.array([0, 2]), np.array([2, 0])))
        0.0
    """
    n_events, n_others = float(scores.events.sum()), float(scores.others.sum())
    if min(n_events, n_others) < 2:
        return np.nan
    below = np.cumsum(scores.others) - scores.others / 2  # patients without the event that a bin ranks above
    above = n_events - np.cumsum(scores.events) + scores.events / 2
    of_events, of_others = below / n_others, above / n_events
    area = float(scores.events @ of_events / n_events)
    variance = float(scores.events @ (of_events - area) ** 2) / (n_events - 1) / n_events
    variance += float(scores.others @ (of_others - area) ** 2) / (n_others - 1) / n_others
    return float(np.sqrt(variance))


def rates_at_edges(scores: BinnedScores) -> dict[str, np.ndarray]:
    """Return sensitivity and specificity at the inner edges, exactly as for the unbinned scores.

    A patient is called positive from the edge on.

    Args:
        scores: Counts.

    Returns:
        `threshold`, `sensitivity` and `specificity` `(B - 1,)`.
    """
    events = np.cumsum(scores.events[::-1])[::-1][1:]
    others = np.cumsum(scores.others)[:-1]
    total = np.full(len(events), float(scores.events.sum())), np.full(len(others), float(scores.others.sum()))
    return {
        "threshold": scores.edges[1:-1],
        "sensitivity": ratio(events.astype(np.float64), total[0]),
        "specificity": ratio(others.astype(np.float64), total[1]),
    }
