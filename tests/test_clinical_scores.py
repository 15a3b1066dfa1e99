"""The ICH and FUNC scores, checked against the published tables."""

import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from ichprog import IchprogError, clinical_scores

ICH = {
    "gcs": {3: 2, 4: 2, 5: 1, 12: 1, 13: 0, 15: 0},
    "age": {0: 0, 79: 0, 79.9: 0, 80: 1, 101: 1},
    "volume_ml": {0: 0, 29.9: 0, 30: 1, 200: 1},
    "intraventricular": {True: 1, False: 0},
    "infratentorial": {1: 1, 0: 0},
}
FUNC = {
    "volume_ml": {0: 4, 29.9: 4, 30: 2, 60: 2, 60.1: 0},
    "age": {20: 2, 69: 2, 70: 1, 79: 1, 80: 0},
    "location": {"lobar": 2, "deep": 1, "infratentorial": 0},
    "gcs": {3: 0, 8: 0, 9: 2, 15: 2},
    "impaired_before": {False: 1, True: 0},
}
SCORES = [(clinical_scores.ich_score, ICH), (clinical_scores.func_score, FUNC)]


@pytest.mark.parametrize(("score", "table"), SCORES)
def test_points_add_up_as_published(score, table):
    rows = list(product(*table.values()))
    points = [sum(values[cell] for values, cell in zip(table.values(), row, strict=True)) for row in rows]
    columns = dict(zip(table, map(list, zip(*rows, strict=True)), strict=True))
    assert score(**columns).tolist() == points
    for row, expected in zip(rows[::7], points[::7], strict=True):
        one = score(**dict(zip(table, row, strict=True)))
        assert one == expected
        assert isinstance(one, int)


@pytest.mark.parametrize(("score", "table"), SCORES)
def test_unknown_variables_give_the_range_of_scores_that_the_table_allows(score, table):
    random = np.random.default_rng(0)
    for _ in range(60):
        known = {name: random.choice(list(points)) for name, points in table.items() if random.random() < 0.5}
        choices = [[table[name][known[name]]] if name in known else table[name].values() for name in table]
        possible = [sum(points) for points in product(*choices)]
        values = {name: known[name].item() if name in known else None for name in table}
        assert clinical_scores.score_range(score, **values) == (min(possible), max(possible))


def test_an_interval_gives_the_range_of_scores_within_it():
    known = {"gcs": 15, "age": 60, "location": "lobar", "impaired_before": False}
    for volume, expected in (((5, 29), (11, 11)), ((20, 40), (9, 11)), ((20, 90), (7, 11)), ((30, 60), (9, 9))):
        assert clinical_scores.score_range(clinical_scores.func_score, volume_ml=volume, **known) == expected
    with pytest.raises(IchprogError, match="age"):
        clinical_scores.score_range(clinical_scores.func_score, volume_ml=5, **known | {"age": 200})


def test_the_lowest_and_highest_scores_have_their_published_outcomes():
    best = {"gcs": 15, "age": 50, "volume_ml": 5}
    worst = {"gcs": 3, "age": 85, "volume_ml": 90}
    ich = [
        clinical_scores.ich_score(**best, intraventricular=False, infratentorial=False),
        clinical_scores.ich_score(**worst, intraventricular=True, infratentorial=True),
    ]
    func = [
        clinical_scores.func_score(**worst, location="infratentorial", impaired_before=True),
        clinical_scores.func_score(**best, location="lobar", impaired_before=False),
    ]
    assert (ich, func) == ([0, 6], [0, 11])
    assert [clinical_scores.ICH_MORTALITY[k] for k in range(7)] == [0, 0.13, 0.26, 0.72, 0.97, 1, 1]
    bands = [0, 4, 5, 7, 8, 9, 10, 11]
    assert [clinical_scores.FUNC_INDEPENDENCE[k] for k in bands] == [0, 0, 0.13, 0.13, 0.42, 0.66, 0.66, 0.82]
    assert [clinical_scores.FUNC_INDEPENDENCE_OF_SURVIVORS[k] for k in bands] == [
        0,
        0,
        0.29,
        0.29,
        0.48,
        0.75,
        0.75,
        0.95,
    ]
    assert len(clinical_scores.FUNC_INDEPENDENCE) == len(clinical_scores.FUNC_INDEPENDENCE_OF_SURVIVORS) == 12


def test_arrays_are_broadcast_and_unknown_values_give_nan():
    scores = clinical_scores.ich_score(
        gcs=[[3], [15]], age=[70, np.nan, 90], volume_ml=10, intraventricular=[0, 0, None], infratentorial=False
    )
    np.testing.assert_array_equal(scores, [[2, np.nan, np.nan], [0, np.nan, np.nan]])
    values = {"gcs": 12, "age": 75, "volume_ml": 40, "impaired_before": 0}
    for blank in (None, "", math.nan):
        assert math.isnan(clinical_scores.func_score(**values, location=blank))
    np.testing.assert_array_equal(clinical_scores.func_score(**values, location=["deep", None]), [7, np.nan])
    assert math.isnan(clinical_scores.func_score(**values | {"gcs": None}, location="deep"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gcs": 2}, r"Invalid gcs 2\.0\. Expected whole numbers from 3 to 15\. Use None for an unknown value\."),
        ({"gcs": [8, 8.5]}, r"Invalid gcs 8\.5"),
        ({"age": -1}, r"Invalid age -1\.0\. Expected numbers from 0 to 130 years"),
        ({"age": "old"}, "Invalid age 'old'"),
        ({"volume_ml": [3, math.inf]}, r"Invalid volume_ml inf\. Expected numbers from 0 to 2000 mL"),
        ({"impaired_before": 2}, r"Invalid impaired_before 2\.0\. Expected true or false, or 1 or 0"),
        (
            {"location": ["deep", "frontal"]},
            r"Unknown location 'frontal'.*Expected one of: lobar, deep, infratentorial",
        ),
    ],
)
def test_impossible_values_are_refused(changed, message):
    values = {"gcs": 8, "age": 70, "volume_ml": 10, "impaired_before": False, "location": "deep"}
    clinical_scores.func_score(**values)
    with pytest.raises(IchprogError, match=message):
        clinical_scores.func_score(**values | changed)


def test_the_scores_import_only_numpy():
    code = "import sys, ichprog.clinical_scores; "
    code += "print({m.split('.')[0] for m in sys.modules} & {'scipy', 'torch', 'sklearn'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
