"""The ICH and FUNC scores, checked against the published tables."""

import math
import subprocess
import sys
from itertools import product

import nibabel as nib
import numpy as np
import pytest

from ichprog import Haemorrhage, IchprogError, Prediction, clinical_scores
from ichprog.results import Segmentation, TaskPrediction
from ichprog.spec import MaskTarget, PluginRef, Target, Task, VolumeInterval

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


def haemorrhage_of(volume_ml=20, *, ratios=(1.0, 1.0), probability=0.99, **findings):
    """Return a haemorrhage in the brain tissue with a volume in whole mL, its interval as ratios, and findings."""
    intervals = {"parenchymal": (VolumeInterval(0.0, *ratios),)} if ratios else {}
    mask = MaskTarget("mask", ("parenchymal", "ventricular"), None, 1.0, intervals)
    target = Target("blood", (1.0,), "high")
    task = Task("blood", "Blood.", ("absent", "present"), target, PluginRef("segmentation", {}), 0.5, 1.0, mask)
    voxels = np.zeros((4, 10, 10), np.uint8)  # of 1 mL
    voxels.flat[:volume_ml] = 1
    voxels[3] = 2
    image = nib.Nifti1Image(voxels, np.diag([10.0, 10.0, 10.0, 1.0]))
    regions = Segmentation(mask.regions, np.zeros(0), (), {}, lambda _: image)
    labels = {"absent": 1 - probability, "present": probability}
    tasks = {"blood": TaskPrediction("present", labels, (0.0,), None, regions)}
    certain = {"intraventricular": 0.99, "infratentorial": 0.01, "location": "deep"}
    return Haemorrhage(Prediction("scan", "model", tasks, (), {}), task, (), **(certain | findings))


def ranges(haemorrhage, **clinical):
    scores = clinical_scores.from_haemorrhage(haemorrhage, clinical)
    return (scores.ich.low, scores.ich.high), (scores.func.low, scores.func.high)


def test_scores_of_a_ct_equal_those_of_its_variables():
    clinical = {"age": 71, "gcs": 9, "impaired_before": False}
    scores = clinical_scores.from_haemorrhage(haemorrhage_of(20), clinical)
    ich = clinical_scores.ich_score(gcs=9, age=71, volume_ml=20, intraventricular=True, infratentorial=False)
    func = clinical_scores.func_score(volume_ml=20, age=71, location="deep", gcs=9, impaired_before=False)
    assert (scores.ich.low, scores.ich.high) == (ich, ich) == (2, 2)
    assert (scores.func.low, scores.func.high) == (func, func) == (9, 9)
    assert (scores.ich.share_low, scores.ich.outcome) == (clinical_scores.ICH_MORTALITY[2], "death within 30 days")
    assert scores.func.share_high == clinical_scores.FUNC_INDEPENDENCE[9]
    sources = {variable.name: variable.source for variable in (*scores.ich.variables, *scores.func.variables)}
    assert {name for name, source in sources.items() if source == "given"} == set(clinical)
    assert sources["volume_ml"] == sources["intraventricular"] == sources["location"] == "CT"
    assert list(scores.to_row().values()) == [2, 2, 0.26, 0.26, 9, 9, 0.66, 0.66]


def test_the_interval_of_a_volume_gives_a_range():
    known = {"age": 71, "gcs": 9, "impaired_before": False}
    assert ranges(haemorrhage_of(28, ratios=(0.9, 1.0)), **known) == ((2, 2), (9, 9))
    assert ranges(haemorrhage_of(28, ratios=(0.9, 1.3)), **known) == ((2, 3), (7, 9))
    assert ranges(haemorrhage_of(28, ratios=(0.9, 1.3)), volume_ml=35, **known) == ((3, 3), (7, 7))


def test_an_uncertain_or_unknown_variable_gives_a_range():
    known = {"age": 71, "gcs": 9, "impaired_before": False}
    assert ranges(haemorrhage_of(infratentorial=0.4), **known) == ((2, 3), (8, 9))
    assert ranges(haemorrhage_of(infratentorial=0.4), infratentorial=True, **known) == ((3, 3), (8, 8))
    assert ranges(haemorrhage_of(infratentorial=0.6, location="infratentorial"), **known) == ((2, 3), (8, 10))
    assert ranges(haemorrhage_of(intraventricular=0.5), **known) == ((1, 2), (9, 9))
    assert ranges(haemorrhage_of(intraventricular=None), **known) == ((1, 2), (9, 9))
    assert ranges(haemorrhage_of(), age=71, gcs=9) == ((2, 2), (8, 9))
    assert ranges(haemorrhage_of(), gcs=9) == ((2, 3), (7, 10))
    assert ranges(haemorrhage_of()) == ((1, 4), (5, 10))
    assert ranges(haemorrhage_of(), location="lobar", **known) == ((2, 2), (10, 10))


def test_scores_are_not_given_for_patients_to_whom_they_do_not_apply():
    scores = clinical_scores.from_haemorrhage(haemorrhage_of(probability=0.2), {"age": 71})
    assert (scores.ich, scores.func) == (None, None)
    assert scores.notes == ("No scores: no haemorrhage was found, at a probability of 0.200.",)
    assert set(scores.to_row().values()) == {None}
    scores = clinical_scores.from_haemorrhage(haemorrhage_of(location="subarachnoid"))
    assert "outside the brain tissue (subarachnoid)" in scores.notes[0]
    scores = clinical_scores.from_haemorrhage(haemorrhage_of(ratios=None), {"age": 71})
    assert "The model states no interval of the volume" in scores.notes[1]


def test_clinical_values_may_be_text_and_blank_ones_are_unknown():
    found = clinical_scores.check_clinical({"age": "71", "gcs": "9", "impaired_before": "Yes", "volume_ml": ""})
    assert found == {"age": 71, "gcs": 9, "impaired_before": True}
    assert clinical_scores.check_clinical({"infratentorial": 0, "location": "Lobar"})["location"] == "lobar"


@pytest.mark.parametrize(
    ("clinical", "message"),
    [
        ({"gcs": 99}, "Invalid gcs 99.0. Expected whole numbers from 3 to 15"),
        ({"age": "old"}, "Invalid age 'old'. Expected numbers from 0 to 130 years"),
        ({"impaired_before": "maybe"}, "Invalid impaired_before 'maybe'. Expected true or false"),
        ({"location": "left"}, "Unknown location 'left'. Expected one of: lobar, deep, infratentorial"),
        ({"agee": 71}, "Unknown clinical value 'agee'. Did you mean age"),
        ({"infratentorial": True, "location": "deep"}, "Invalid infratentorial True. Expected a value that agrees"),
    ],
)
def test_an_impossible_clinical_value_is_refused_by_name(clinical, message):
    with pytest.raises(IchprogError, match=message.replace("(", r"\(")):
        clinical_scores.from_haemorrhage(haemorrhage_of(), clinical)
