"""Size a study: the power to find a difference between two AUROCs on the same patients, by simulation.

Scores of both models are drawn as correlated normal numbers, whose means differ between patients with and without the
event. The AUROCs are compared by DeLong's test, to whose variance the variance between training seeds is added.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ichprog.errors import InvalidValueError
from ichprog.metrics.comparisons import delong

_progress = logging.getLogger("ichprog.progress")
SIZES = (200, 400, 800, 1600, 3200, 6400)
"""Numbers of patients that a table of the power has by default."""


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of two models.

    Attributes:
        difference: Difference of their AUROCs.
        auroc: AUROC of the weaker model.
        positive: Share of patients with the event.
        correlation: Correlation of the scores of both models among patients with the same label.
        seed_sd: Standard deviation of the AUROC of one training between training seeds, on the same patients.

    Raises:
        InvalidValueError: A number is out of its range.
    """

    difference: float = 0.02
    auroc: float = 0.75
    positive: float = 0.5
    correlation: float = 0.8
    seed_sd: float = 0.012

    def __post_init__(self) -> None:
        for name, low, high in (("auroc", 0.5, 1), ("difference", 0, 1), ("positive", 0, 1), ("correlation", -1, 1)):
            if not low < (value := getattr(self, name)) < high:
                raise InvalidValueError(name, value, f"a number between {low} and {high}")
        if not 0 <= self.seed_sd < 0.5:
            raise InvalidValueError("seed_sd", self.seed_sd, "a number from 0 to 0.5")
        if self.auroc + self.difference >= 1:
            raise InvalidValueError("difference", self.difference, f"less than {1 - self.auroc:g} for this auroc")


@dataclass(frozen=True)
class Power:
    """The power of one design.

    Attributes:
        patients: Number of patients, each tested once.
        seeds: Number of training seeds of each model.
        power: Share of simulated studies in which the better model is significantly better.
        error: Standard error of `power`, because the number of simulated studies is limited.
    """

    patients: int
    seeds: int
    power: float
    error: float


def compute_power(
    assumptions: Assumptions,
    *,
    patients: Sequence[int] = SIZES,
    seeds: Sequence[int] = (1, 5, 10),
    folds: int = 5,
    alpha: float = 0.05,
    studies: int = 500,
    seed: int = 0,
) -> list[Power]:
    """Simulate studies and return the power of each design.

    The AUROC of a design is that of all patients, each scored by the fold that was not trained on the patient, and is
    averaged over seeds. Each fold and each seed is a training of its own. The AUROC therefore varies between seeds with
    the variance of one training divided by the numbers of folds and seeds.

    Args:
        assumptions: What is assumed of the two models.
        patients: Numbers of patients.
        seeds: Numbers of training seeds.
        folds: Number of folds.
        alpha: Two-sided level of significance.
        studies: Number of simulated studies for each number of patients.
        seed: Random seed.

    Returns:
        One entry for each number of patients and of seeds, in this order.

    Raises:
        InvalidValueError: A count is too small, or `alpha` is not between 0 and 1.

    Examples:
        >>> few, many = compute_power(Assumptions(difference=0.1), patients=[100, 400], seeds=[5], studies=100)
        >>> few.power < many.power
        True

    Source: DeLong et al., Biometrics 1988;44:837-845, for the test; the binormal model of scores is that of Hanley,
    Medical Decision Making 1988;8:197-203.
    """
    for name, values, least in (
        ("patients", patients, 20), ("seeds", seeds, 1), ("folds", [folds], 1), ("studies", [studies], 1),
    ):  # fmt: skip
        for value in values:
            if value < least:
                raise InvalidValueError(name, value, f"a whole number of {least} or more")
    if not 0 < alpha < 1:
        raise InvalidValueError("alpha", alpha, "a number between 0 and 1")
    random = np.random.default_rng(seed)
    critical = NormalDist().inv_cdf(1 - alpha / 2)
    result = []
    for count in patients:
        _progress.info("Simulating %d studies of %d patients.", studies, count)
        tested = np.array([_compare_once(assumptions, count, random) for _ in range(studies)])
        for number in seeds:
            variance = 2 * assumptions.seed_sd**2 / (folds * number)
            differences = tested[:, 0] + random.normal(0, math.sqrt(variance), studies)
            share = float((differences / np.sqrt(tested[:, 1] ** 2 + variance) > critical).mean())
            result.append(Power(count, number, share, math.sqrt(share * (1 - share) / studies)))
    return result


def _compare_once(assumptions: Assumptions, count: int, random: np.random.Generator) -> tuple[float, float]:
    """Return the difference of the AUROCs in one sample of patients, and DeLong's standard error."""
    positive = round(min(max(assumptions.positive * count, 2), count - 2))
    truth = np.arange(count) < positive
    scores = random.multivariate_normal([0, 0], [[1, assumptions.correlation], [assumptions.correlation, 1]], count)
    areas = (assumptions.auroc + assumptions.difference, assumptions.auroc)
    scores[truth] += [math.sqrt(2) * NormalDist().inv_cdf(area) for area in areas]
    return delong(truth, scores[:, 0], scores[:, 1])[:2]
