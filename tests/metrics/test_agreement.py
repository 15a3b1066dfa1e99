"""Agreement of readers, of readers with a model, and of saliency maps with lesions."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from ichprog.errors import InvalidValueError
from ichprog.metrics import agreement

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
    from statsmodels.stats.inter_rater import fleiss_kappa as statsmodels_fleiss
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint

RNG = np.random.default_rng(3)


def ball(shape, centre, radius):
    """Return a mask of a ball."""
    return sum((axis - c) ** 2 for axis, c in zip(np.ogrid[tuple(map(slice, shape))], centre, strict=True)) <= radius**2


def test_kappas_equal_those_of_scikit_learn_and_statsmodels():
    random = np.random.default_rng(0)
    calls = random.integers(3, size=(50, 1)) * (random.random((50, 5)) < 0.6)
    counts = np.stack([(calls == label).sum(axis=1) for label in range(3)], axis=1)
    assert agreement.fleiss_kappa(counts) == pytest.approx(statsmodels_fleiss(counts, method="fleiss"))
    a, b = calls[:, 0], calls[:, 1]
    assert agreement.cohen_kappa(a, b) == pytest.approx(sklearn_metrics.cohen_kappa_score(a, b))
    assert agreement.cohen_kappa(a, a) == 1
    assert agreement.cohen_kappa([0, 1, 0, 1], [1, 0, 1, 0]) == -1
    for undefined in ([], np.empty((0, 2)), [[3, 0], [3, 0]], [[1, 0], [0, 1]]):
        assert math.isnan(agreement.fleiss_kappa(undefined))
    assert math.isnan(agreement.cohen_kappa([], []))
    assert math.isnan(agreement.cohen_kappa([1, 1], [1, 1]))
    with pytest.raises(InvalidValueError, match="number of readers '2 to 3'"):
        agreement.fleiss_kappa([[3, 0], [1, 1]])


def test_readers_are_compared_with_a_model_and_with_each_other():
    random = np.random.default_rng(1)
    truth = random.integers(2, size=80)
    calls = {
        name: np.where(random.random(80) < skill, truth, 1 - truth)
        for name, skill in (("A", 0.9), ("B", 0.6), ("C", 0.7))
    }
    model = np.where(random.random(80) < 0.8, truth, 1 - truth)
    calls["B"] = np.where(np.arange(80) < 20, -1, calls["B"])
    calls["C"] = np.where(np.arange(80) >= 70, np.nan, calls["C"])
    found = agreement.compare_readers(truth, calls, model)
    tests = []
    for name, given in calls.items():
        read = given >= 0
        y, called, of_model, row = truth[read], given[read], model[read], found["readers"][name]
        assert row["n"] == read.sum()
        for figure, part in (("accuracy", y >= 0), ("sensitivity", y == 1), ("specificity", y == 0)):
            hits = (called == y)[part]
            low, high = proportion_confint(hits.sum(), len(hits), method="wilson")
            assert row[figure] == pytest.approx({"value": hits.mean(), "low": low, "high": high})
            ours = (of_model == y)[part]
            test = row["against_model"][figure]
            assert test["difference"] == pytest.approx(ours.mean() - hits.mean())
            table = [[(ours & hits).sum(), (ours & ~hits).sum()], [(~ours & hits).sum(), (~ours & ~hits).sum()]]
            assert (test["model_only"], test["reader_only"]) == (table[0][1], table[1][0])
            assert test["p"] == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
            tests.append(test)
    adjusted = multipletests([test["p"] for test in tests], method="holm")[1]
    assert [test["p_holm"] for test in tests] == pytest.approx(adjusted.tolist())
    assert found["model"]["sensitivity"]["value"] == pytest.approx(sklearn_metrics.recall_score(truth, model))
    counts = np.stack([sum(given[20:70] == label for given in calls.values()) for label in (0, 1)], axis=1)
    assert found["fleiss"] == {"kappa": pytest.approx(statsmodels_fleiss(counts)), "n": 50}
    pairs = {(row["first"], row["second"]): row for row in found["cohen"]}
    assert list(pairs) == [("A", "B"), ("A", "C"), ("B", "C")]
    expected = sklearn_metrics.cohen_kappa_score(calls["A"][20:].astype(int), calls["B"][20:].astype(int))
    assert pairs["A", "B"] == {"first": "A", "second": "B", "kappa": pytest.approx(expected), "n": 60}


def test_few_readers_and_wrong_calls():
    none = agreement.compare_readers([0, 1], {}, [0, 1])
    assert none["readers"] == {}
    assert none["fleiss"] == {"kappa": None, "n": 0}
    one = agreement.compare_readers([1, 1], {"A": [1, -1]}, [1, 0])
    assert one["fleiss"]["kappa"] is None
    assert one["readers"]["A"]["specificity"] == {"value": None, "low": None, "high": None}
    assert one["readers"]["A"]["against_model"]["specificity"]["p"] is None
    assert one["readers"]["A"]["against_model"]["accuracy"]["p_holm"] == 1
    with pytest.raises(InvalidValueError, match=r"call of reader A 2\.0\. Expected 0 or 1"):
        agreement.compare_readers([0, 1], {"A": [2, 1]}, [0, 1])
    with pytest.raises(InvalidValueError, match="number of calls of reader A"):
        agreement.compare_readers([0, 1], {"A": [0, 1, 1]}, [0, 1])


def test_the_pointing_game_is_won_if_the_highest_voxel_is_in_the_lesion():
    lesion = ball((20, 20, 10), (14, 10, 5), 3)
    values = RNG.random(lesion.shape) - 0.5
    values[14, 11, 5] = 2
    assert agreement.pointing_game(values, lesion) == 1
    values[2, 11, 5] = 3
    assert agreement.pointing_game(values, lesion) == 0


def test_a_voxel_near_the_lesion_counts_within_the_tolerance_in_mm():
    lesion = np.zeros((10, 10, 10), bool)
    lesion[5, 5, 5] = True
    values = np.zeros(lesion.shape)
    values[5, 7, 6] = 1  # 2 rows of 0.5 mm and a slice of 5 mm away
    away = math.hypot(2 * 0.5, 5)
    spacing = (0.5, 0.5, 5.0)
    assert agreement.pointing_game(values, lesion, spacing=spacing, tolerance_mm=away + 0.01) == 1
    assert agreement.pointing_game(values, lesion, spacing=spacing, tolerance_mm=away - 0.01) == 0


def test_several_highest_voxels_count_by_the_share_in_the_lesion():
    lesion = np.zeros((4, 4, 4), bool)
    lesion[0] = True
    assert agreement.pointing_game(np.ones((4, 4, 4)), lesion) == 0.25


def test_relevance_mass_accuracy_equals_a_sum_over_voxels():
    lesion, values = ball((9, 8, 7), (5, 3, 3), 2), RNG.standard_normal((9, 8, 7))
    within = total = 0.0
    for at in np.ndindex(values.shape):
        total += max(values[at], 0)
        within += max(values[at], 0) if lesion[at] else 0
    assert agreement.relevance_mass_accuracy(values, lesion) == pytest.approx(within / total)


def test_a_constant_map_has_the_volume_share_of_the_lesion():
    lesion = ball((9, 8, 7), (5, 3, 3), 2)
    assert agreement.relevance_mass_accuracy(np.full(lesion.shape, 0.3, np.float32), lesion) == pytest.approx(
        lesion.mean()
    )


def turned_brain(degrees, lesion_side):
    """Return a rotated brain, a lesion in one hemisphere, and the left side of the mid-plane."""
    i, j, k = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (81, 81, 21)), indexing="ij")
    angle = math.radians(degrees)
    across, along = i * math.cos(angle) + j * math.sin(angle), j * math.cos(angle) - i * math.sin(angle)
    brain = (across / 24) ** 2 + (along / 36) ** 2 + (k / 10) ** 2 <= 1
    lesion = (across - 6 * lesion_side) ** 2 + (along - 24) ** 2 + k**2 <= 9
    return brain, lesion, across > 0


@pytest.mark.parametrize("degrees", [-15, 0, 10])
@pytest.mark.parametrize("side", [-1, 1])
def test_hemispheres_are_those_of_the_brain_and_not_of_the_array(degrees, side):
    brain, lesion, left = turned_brain(degrees, side)
    right_side, wrong_side = (brain & (left == (side * sign > 0)) for sign in (1, -1))
    assert agreement.hemisphere_correct(right_side.astype(float), lesion, brain) is True
    assert agreement.hemisphere_correct(wrong_side.astype(float), lesion, brain) is False
    assert agreement.hemisphere_correct(-right_side.astype(float), lesion, brain) is None


def test_a_lesion_in_both_hemispheres_has_no_hemisphere():
    brain, left_one, left = turned_brain(10, 1)
    _, right_one, _ = turned_brain(10, -1)
    assert agreement.hemisphere_correct(left.astype(float), left_one | right_one, brain) is None


def test_empty_maps_and_masks_have_no_value():
    lesion, none = ball((6, 6, 6), (4, 2, 2), 1), np.zeros((6, 6, 6), bool)
    everywhere = np.ones((6, 6, 6), bool)
    for values, mask in ((np.zeros((6, 6, 6)), lesion), (-np.ones((6, 6, 6)), lesion), (np.ones((6, 6, 6)), none)):
        assert agreement.pointing_game(values, mask) is None
        assert agreement.relevance_mass_accuracy(values, mask) is None
        assert agreement.hemisphere_correct(values, mask, everywhere) is None
