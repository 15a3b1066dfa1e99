"""Summarise an evaluation so that it can leave a hospital: counts and sums of many patients, no row of a patient.

A summary has one event of each task: the last label. Several events of one task would share patients, and differences
of their counts could be counts of few patients. For this event a summary holds:

- the number of patients with and without the event in bins of the probability. The edges are multiples of 0.05.
  Neighbouring bins are merged until every number is at least the smallest allowed count. No number is left out, so that
  none follows from a total.
- six sums over all patients, for the Brier score, the expected number of events, and the first step of a recalibration.
- slope and intercept of the calibration with standard errors, rounded to four decimals.

The sums and estimates are ten numbers. They are given only if there are at least as many patients for each of these
numbers as the smallest allowed count. A task with fewer patients is withheld.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.errors import InvalidValueError, RunError
from ichprog.evaluation.validation import EventValidation
from ichprog.metrics.binned import bin_scores, merge_small_bins
from ichprog.metrics.bootstrap import finite
from ichprog.metrics.calibration import calibration_estimates, log_odds
from ichprog.spec import ModelSpec

FORMAT_VERSION = 1
MIN_COUNT = 5
BINS = 20
SUMS = ("p_with_event", "p_without_event", "p_squared", "residual_x", "variance_x", "variance_x_squared")
ESTIMATES = ("slope", "slope_error", "intercept", "intercept_error")
_NUMBERS = len(SUMS) + len(ESTIMATES)
_DIGITS = 12  # significant digits of sums
_SMALLEST_MIN_COUNT = 3


def build_summary(
    spec: ModelSpec,
    weights: Sequence[Mapping[str, Any]],
    events: Mapping[str, Sequence[EventValidation]],
    *,
    simulated: bool,
    min_count: int = MIN_COUNT,
) -> dict[str, Any]:
    """Return the summary of an evaluation as plain data.

    Args:
        spec: The specification of the model.
        weights: `fold` and `sha256` of the weights that were used.
        events: Figures of each event by task.
        simulated: Whether patients are simulated.
        min_count: Smallest number of patients behind any number.

    Raises:
        InvalidValueError: The smallest number is below 3.
    """
    if min_count < _SMALLEST_MIN_COUNT:
        raise InvalidValueError("min_count", min_count, f"a whole number from {_SMALLEST_MIN_COUNT}")
    found = {task: _summarise_event(each[-1], min_count) for task, each in events.items()}
    reason = f"fewer than {min_count} patients with or without the event, or fewer than {min_count * _NUMBERS} patients"
    return {
        "format": "summary of ichprog evaluate",
        "format_version": FORMAT_VERSION,
        "ichprog": version("ichprog"),
        "model": spec.name,
        "spec_sha256": _spec_digest(spec),
        "weights": [{"fold": each["fold"], "sha256": each["sha256"]} for each in weights],
        "simulated": simulated,
        "min_count": min_count,
        "tasks": {task: each for task, each in found.items() if each is not None},
        "withheld": {task: reason for task, each in found.items() if each is None},
        "notice": spec.notice,
    }


def read_summary(path: Path) -> dict[str, Any]:
    """Read a summary.

    Args:
        path: JSON file that `ichprog evaluate --summary` wrote.

    Raises:
        RunError: The file cannot be read, is no summary, or has another format version.
    """
    hint = "Give a file that `ichprog evaluate --summary` wrote."
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}. {hint}") from error
    except ValueError as error:
        raise RunError(f"{path}: is no JSON ({error}). {hint}") from error
    if not isinstance(summary, dict) or "format_version" not in summary:
        raise RunError(f"{path}: is no summary of an evaluation. {hint}")
    if summary["format_version"] != FORMAT_VERSION:
        raise RunError(
            f"{path}: has format version {summary['format_version']}. This version of ichprog reads version "
            f"{FORMAT_VERSION}. Write all summaries with one version of ichprog."
        )
    try:
        for task in summary["tasks"].values():
            _check_task(task, summary["min_count"])
        _ = [summary[key] for key in ("model", "spec_sha256", "weights", "ichprog", "simulated", "notice")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: the summary is damaged ({error}). {hint}") from error
    return summary


def _summarise_event(event: EventValidation, min_count: int) -> dict[str, Any] | None:
    truth, p = event.truth, event.probabilities
    fine = bin_scores(truth, p, np.arange(BINS + 1) / BINS)
    merged = merge_small_bins(fine, min_count)
    if merged is None or len(truth) < min_count * _NUMBERS:
        return None
    x, variance = log_odds(p), p * (1 - p)
    sums = [p[truth].sum(), p[~truth].sum(), p @ p, (truth - p) @ x, variance @ x, variance @ x**2]
    fitted = calibration_estimates(truth, p)
    estimates = [number for name in ("slope", "intercept") for number in fitted[name]]
    return {
        "event": event.event,
        "edges": [round(float(edge), 2) for edge in merged.edges],
        "with_event": merged.events.tolist(),
        "without_event": merged.others.tolist(),
        "sums": {name: float(f"{number:.{_DIGITS}g}") for name, number in zip(SUMS, sums, strict=True)},
        "estimates": {name: finite(round(number, 4)) for name, number in zip(ESTIMATES, estimates, strict=True)},
    }


def _check_task(task: Mapping[str, Any], min_count: int) -> None:
    edges, counts = task["edges"], [*task["with_event"], *task["without_event"]]
    bins = len(edges) - 1
    if edges[0] != 0 or edges[-1] != 1 or sorted(set(edges)) != edges or len(counts) != 2 * bins or bins < 1:
        raise ValueError("edges and counts do not match")
    if any(not isinstance(count, int) or count < min_count for count in counts):
        raise ValueError(f"a count is below {min_count}")
    if set(task["sums"]) != set(SUMS) or set(task["estimates"]) != set(ESTIMATES) or not task["event"]:
        raise ValueError("a number is missing")
    for number in task["sums"].values():
        float(number)


def _spec_digest(spec: ModelSpec) -> str:
    """Return a checksum of what determines a prediction, apart from the weights."""
    described = spec.to_dict()
    text = json.dumps({key: described[key] for key in ("backbone", "tasks", "input")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
