"""Fixtures of the evaluation tests."""

import pytest

import ichprog
from ichprog import registry

from support.lesions import masked_cohort_in
from support.models import fill_heads, local_model, mean_backbone


@pytest.fixture(scope="module")
def masked_cohort(tmp_path_factory):
    """Return two patients with lesion masks."""
    return masked_cohort_in(tmp_path_factory.mktemp("cohort") / "sim")


@pytest.fixture
def mean_model(tmp_path):
    """Return the name of a model whose logits are 30 x the mean of the grid - 1."""
    ichprog.register_backbone("mean", mean_backbone)
    yield local_model(tmp_path / "mean", "mean", shape=(20, 48, 48), adjust=lambda state: fill_heads(state, 30.0, -1.0))
    registry.backbones.unregister("mean")
