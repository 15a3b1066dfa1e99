"""The power of a study equals that of the normal approximation, and grows with patients and seeds."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from ichprog import InvalidValueError
from ichprog.cli import main
from ichprog.study import Assumptions, compute_power


def hanley_variance(auroc, positive, negative):
    """The variance of an AUROC under the binormal model, by Hanley and McNeil 1982."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    parts = auroc * (1 - auroc) + (positive - 1) * (q1 - auroc**2) + (negative - 1) * (q2 - auroc**2)
    return parts / (positive * negative)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (1, 0.03), (4, 0.03)])
def test_the_power_is_that_of_the_normal_approximation(seeds, seed_sd):
    assumed = Assumptions(difference=0.06, auroc=0.7, positive=0.4, correlation=0.0, seed_sd=seed_sd)
    (found,) = compute_power(assumed, patients=[600], seeds=[seeds], folds=2, studies=800)
    variance = sum(hanley_variance(area, 240, 360) for area in (0.7, 0.76)) + 2 * seed_sd**2 / (2 * seeds)
    expected = stats.norm.cdf(0.06 / math.sqrt(variance) - stats.norm.ppf(0.975))
    assert abs(found.power - expected) < 3.5 * found.error + 0.02


def test_without_a_difference_studies_find_one_as_often_as_the_level_says():
    (found,) = compute_power(Assumptions(difference=1e-9, correlation=0.5), patients=[200], seeds=[2], studies=2000)
    assert abs(found.power - 0.025) < 4 * math.sqrt(0.025 * 0.975 / 2000)


def test_patients_seeds_and_correlation_raise_the_power():
    few, few_seeds, more, more_seeds = (
        row.power for row in compute_power(Assumptions(), patients=[300, 3000], seeds=[1, 8], studies=200)
    )
    assert few < more < more_seeds
    assert few_seeds < more_seeds
    similar, different = (
        compute_power(Assumptions(correlation=rho), patients=[1000], seeds=[8], studies=200)[0].power
        for rho in (0.95, 0.3)
    )
    assert similar > different


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auroc": 0.4}, "Invalid auroc 0.4. Expected a number between 0.5 and 1"),
        ({"auroc": 0.99}, r"Invalid difference 0.02. Expected less than 0.01 for this auroc"),
        ({"correlation": 1.0}, "Invalid correlation 1.0"),
        ({"seed_sd": -0.1}, "Invalid seed_sd -0.1. Expected a number from 0 to 0.5"),
    ],
)
def test_impossible_assumptions_are_refused(changes, message):
    with pytest.raises(InvalidValueError, match=message):
        Assumptions(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patients": [5]}, "patients 5"),
        ({"seeds": [0]}, "seeds 0"),
        ({"folds": 0}, "folds 0"),
        ({"alpha": 1.0}, "alpha"),
    ],
)
def test_impossible_designs_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        compute_power(Assumptions(), **{"patients": [100], **options})


def test_the_command_prints_the_power():
    arguments = ["study", "power", "--patients", "100", "--patients", "400", "--seeds", "3", "--studies", "50"]
    shown = CliRunner().invoke(main, [*arguments, "--difference", "0.1"])
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["patients", "100", "400"]
    made = json.loads(CliRunner().invoke(main, [*arguments, "--difference", "0.1", "--json"]).stdout)
    assert made["assumptions"]["difference"] == 0.1
    assert [f"{row['power']:.2f}" for row in made["power"]] == [
        line.split()[-1] for line in shown.stdout.splitlines()[1:]
    ]
    assert np.diff([row["power"] for row in made["power"]]) > 0
    assert CliRunner().invoke(main, ["study", "power", "--auroc", "2"]).exit_code == 2
