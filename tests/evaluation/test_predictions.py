"""The table of predictions."""

import dataclasses

import numpy as np
import pytest

from ichprog.errors import InvalidValueError, RunError
from ichprog.evaluation.predictions import Predictions, TaskPredictions, align


@pytest.fixture
def predictions():
    """Return predictions of ten patients, the last without a label."""
    random = np.random.default_rng(0)
    truth = np.append(random.integers(2, size=9), -1)
    return TaskPredictions(tuple("abcdefghij"), np.arange(10) % 2, truth, random.dirichlet([1, 1], 10))


def test_patients_are_selected_by_mask_or_by_index(predictions):
    odd = predictions.select(predictions.fold == 1)
    assert odd.patients == tuple("bdfhj")
    assert predictions.select(np.array([1, 3, 5, 7, 9])).patients == odd.patients
    assert predictions.labelled().patients == tuple("abcdefghi")


def test_patients_of_both_are_aligned_in_the_order_of_the_first(predictions):
    order = np.array([7, 1, 9, 4])
    first, second = align(predictions.select(np.arange(8)), predictions.select(order))
    assert first.tolist() == [1, 4, 7]
    assert second.tolist() == [1, 3, 0]


def test_patients_with_other_names_are_not_aligned(predictions):
    strangers = dataclasses.replace(predictions, patients=tuple("ABCDEFGHIJ"))
    first, second = align(predictions, strangers)
    assert (len(first), len(second)) == (0, 0)


def test_repeated_patients_and_different_labels_are_refused(predictions):
    with pytest.raises(InvalidValueError, match="Expected each patient once"):
        align(predictions.select(np.array([0, 0])), predictions)
    other = dataclasses.replace(predictions, truth=1 - predictions.truth)
    with pytest.raises(InvalidValueError, match="true labels of patients 'a, b, c, d, e'"):
        align(predictions, other)


def test_a_table_is_read_as_it_was_written(predictions, tmp_path):
    table = Predictions({("v", "t", "test"): predictions})
    again = Predictions.read(table.write(tmp_path / "predictions.csv"))
    assert (again.variants, again.tasks("v")) == (("v",), ("t",))
    for name in ("fold", "truth", "probabilities"):
        assert np.array_equal(getattr(again.entries["v", "t", "test"], name), getattr(predictions, name))


@pytest.mark.parametrize("row", ["v,0,training,p,t,1,0.5,0.5", "v,x,test,p,t,1,0.5,0.5", "v,0,test,p,t,1,half,0.5"])
def test_a_wrong_row_is_named_by_its_number(row, tmp_path):
    (tmp_path / "predictions.csv").write_text(f"variant,fold,split,patient,task,truth,p_0,p_1\n{row}\n")
    with pytest.raises(RunError, match="row 2 is no prediction"):
        Predictions.read(tmp_path / "predictions.csv")
    with pytest.raises(RunError, match="cannot be read"):
        Predictions.read(tmp_path / "nothing.csv")
