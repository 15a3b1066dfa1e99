"""Subgroups of patients by the values of a column."""

import numpy as np

from ichprog.metrics.subgroups import by_edges, by_value


def test_text_is_split_by_value_and_many_numbers_by_terciles():
    groups = by_value(["F", "M", "", "F", None])
    assert {name: members.tolist() for name, members in groups.items()} == {
        "F": [True, False, False, True, False],
        "M": [False, True, False, False, False],
    }
    few = by_value(["10", "9", "", "9"])
    assert {name: members.sum() for name, members in few.items()} == {"9": 2, "10": 1}
    assert list(few) == ["9", "10"]
    years = [str(year) for year in range(41, 71)]
    many = by_value([*years, "", "nan"])
    assert list(many) == ["<= 50.67", "50.67 to 60.33", "> 60.33"]
    assert [members.sum() for members in many.values()] == [10, 10, 10]
    assert not np.stack(list(many.values()))[:, 30:].any()
    assert by_value(["", None]) == {}
    skewed = by_value(np.array([0.0] * 40 + list(range(1, 8))))
    assert np.stack(list(skewed.values())).sum(axis=0).tolist() == [1] * 47


def test_numbers_are_split_at_edges_and_an_edge_belongs_to_the_higher_subgroup():
    groups = by_edges(np.array([59.0, 60.0, 70.0, np.nan]), [70, 60])
    assert {name: members.tolist() for name, members in groups.items()} == {
        "< 60": [True, False, False, False],
        "60 to < 70": [False, True, False, False],
        ">= 70": [False, False, True, False],
    }
