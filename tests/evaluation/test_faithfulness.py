"""Faithfulness: deletion and insertion curves, and randomised parameters."""

import copy
import dataclasses
import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import ichprog
from ichprog import UnknownNameError, registry
from ichprog.errors import InvalidValueError
from ichprog.evaluation.faithfulness import RANDOM, deletion_insertion, parameter_randomisation
from ichprog.evaluation.localization import measure_maps, summarise_maps

from support.models import local_model, torch_model

RNG = np.random.default_rng(3)


def by_hand(cells, order, steps):
    """Return the deletion and insertion curves of sigmoid(30 x mean - 1), cells replaced by 0."""
    bounds = [round(s * len(order) / steps) for s in range(steps + 1)]
    gone = [cells[order[:upto]].sum(dtype=np.float64) for upto in bounds]
    whole = cells.sum(dtype=np.float64)
    return [[1 / (1 + math.exp(1 - 30 * total / cells.size)) for total in side] for side in
            ([whole - part for part in gone], gone)]  # fmt: skip


def test_curves_of_a_linear_network_equal_those_computed_by_hand(mean_model, masked_cohort):
    model, path = torch_model(mean_model), masked_cohort.patients[0].scan
    saliency = ichprog.explain(model, path)
    cells = ichprog.preprocessing.prepare(model.load_scan(path).hu, model.spec.input)
    ranked = dataclasses.replace(saliency, grid_map=cells + 1e-6 * RNG.random(cells.shape, np.float32))
    found = deletion_insertion(model, path, ranked, steps=7)
    there = np.flatnonzero(cells)
    order = there[np.argsort(-ranked.grid_map.ravel()[there])]
    deletion, insertion = by_hand(cells.ravel(), order, 7)
    curve = found["prognosis", "guided_backprop"]
    assert curve.deletion == pytest.approx(deletion, abs=1e-5)
    assert curve.insertion == pytest.approx(insertion, abs=1e-5)
    for area, values in ((curve.deletion_area, deletion), (curve.insertion_area, insertion)):
        assert area == pytest.approx(sum((a + b) / 14 for a, b in itertools.pairwise(values)), abs=1e-5)
    random = found["prognosis", RANDOM]
    even = by_hand(np.where(cells, cells[cells > 0].mean(), 0).ravel(), there, 7)  # a random order replaces mean cells
    assert random.deletion == pytest.approx(even[0], abs=0.01)
    assert random.insertion == pytest.approx(even[1], abs=0.01)
    assert curve.deletion_area < random.deletion_area
    assert curve.insertion_area > random.insertion_area


def test_a_constant_map_is_no_better_than_a_random_order(mean_model, masked_cohort):
    """The guided gradient of a mean is constant."""
    model, path = torch_model(mean_model), masked_cohort.patients[0].scan
    found = deletion_insertion(model, path, ichprog.explain(model, path), steps=5)
    assert found["prognosis", "guided_backprop"].deletion_area == found["prognosis", RANDOM].deletion_area


def test_curves_end_at_the_blurred_baseline(bright_model, masked_cohort):
    path = masked_cohort.patients[0].scan
    model = torch_model(bright_model)
    found = deletion_insertion(
        model, path, ichprog.explain(model, path, method=["grad_cam"]), steps=3, baseline="blurred"
    )
    curve = found["prognosis", "grad_cam"]
    probability = ichprog.predict(model, path)["prognosis"].probabilities["poor"]
    assert [curve.deletion[0], curve.insertion[-1]] == pytest.approx([probability] * 2, abs=1e-6)
    cells = ichprog.preprocessing.prepare(model.load_scan(path).hu, model.spec.input)
    blurred = scipy.ndimage.gaussian_filter(cells, [0.03 * n for n in cells.shape])
    expected = np.mean([fold["prognosis"].probabilities[0, 1] for fold in model.predict_grids(blurred[None])])
    assert [curve.deletion[-1], curve.insertion[0]] == pytest.approx([expected] * 2, abs=1e-6)


def test_unknown_baselines_and_no_steps_are_refused(mean_model, masked_cohort):
    model, path = torch_model(mean_model), masked_cohort.patients[0].scan
    saliency = ichprog.explain(model, path)
    with pytest.raises(UnknownNameError, match="baseline"):
        deletion_insertion(model, path, saliency, baseline="noise")
    with pytest.raises(InvalidValueError, match="steps 0"):
        deletion_insertion(model, path, saliency, steps=0)


def test_measured_maps_have_the_areas_of_the_curves(bright_model, masked_cohort):
    model, path = torch_model(bright_model), masked_cohort.patients[0].scan
    rows = list(
        measure_maps({"v": model}, masked_cohort, folds=None, tasks=["prognosis"], methods=["grad_cam"], steps=4)
    )
    found = deletion_insertion(model, path, ichprog.explain(model, path, method=["grad_cam"]), steps=4)
    curve, random = found["prognosis", "grad_cam"], found["prognosis", RANDOM]
    assert (rows[0].deletion, rows[0].insertion) == (curve.deletion_area, curve.insertion_area)
    assert (rows[0].random_deletion, rows[0].random_insertion) == (random.deletion_area, random.insertion_area)
    assert rows[0].deletion < rows[0].random_deletion
    (summary,) = summarise_maps(rows)
    assert summary["deletion_gain"]["value"] > 0


@pytest.fixture
def methods():
    """Register an edge detector and a method with fixed maps, and return these maps."""
    given = [RNG.standard_normal((20, 96, 96)) for _ in range(4)]
    remaining = iter(given)
    ichprog.register_saliency("edges", lambda score, grid, network: torch.gradient(grid.detach()[0, 0], dim=2)[0].abs())
    ichprog.register_saliency("fixed", lambda score, grid, network: torch.from_numpy(next(remaining)))
    yield given
    for name in ("edges", "fixed"):
        registry.saliency.unregister(name)


@pytest.fixture(scope="module")
def compact_model(tmp_path_factory):
    return local_model(tmp_path_factory.mktemp("compact") / "model", "compact", shape=(16, 48, 48))


def test_random_weights_change_a_gradient_map_but_not_an_edge_detector(compact_model, masked_cohort, methods):
    path = masked_cohort.patients[0].scan
    found = parameter_randomisation(torch_model(compact_model), path, method=["guided_backprop", "edges"], stages=2)
    assert all(abs(value) < 0.5 for value in dataclasses.astuple(found["prognosis", "guided_backprop"][-1])[2:4])
    for stage in found["prognosis", "edges"]:
        assert (stage.pearson, stage.spearman, stage.spearman_absolute) == pytest.approx((1, 1, 1))


def test_a_random_head_of_one_channel_scales_the_map_and_a_dead_network_has_no_correlation(bright_model, masked_cohort):
    path = masked_cohort.patients[0].scan
    found = parameter_randomisation(torch_model(bright_model), path, stages=1, seeds=[0])
    heads, whole = found["prognosis", "guided_backprop"]
    assert heads.down_to.startswith("heads.")
    assert heads.spearman_absolute == pytest.approx(1, abs=1e-6)
    assert (whole.down_to, whole.layers) == ("backbone.features.0", heads.layers + 1)
    assert (whole.pearson, whole.spearman, whole.spearman_absolute) == (None, None, None)


def test_correlations_equal_those_of_scipy_in_the_brain(bright_model, masked_cohort, methods):
    path = masked_cohort.patients[0].scan
    model = torch_model(bright_model)
    found = parameter_randomisation(model, path, method="fixed", stages=3, seeds=[0])["prognosis", "fixed"]
    assert len(found) == 2  # the heads, and the only layer of the backbone
    inside = ichprog.preprocessing.prepare(model.load_scan(path).hu, model.spec.input) > 0
    first, *later = (values[inside].astype(np.float32) for values in methods[:3])
    for stage, values in zip(found, later, strict=True):
        assert stage.pearson == pytest.approx(scipy.stats.pearsonr(first, values).statistic, abs=1e-6)
        assert stage.spearman == pytest.approx(scipy.stats.spearmanr(first, values).statistic, abs=1e-6)
        absolute = scipy.stats.spearmanr(abs(first), abs(values)).statistic
        assert stage.spearman_absolute == pytest.approx(absolute, abs=1e-6)


def test_weights_become_random_from_the_heads_to_the_input(compact_model, masked_cohort):
    found = parameter_randomisation(
        torch_model(compact_model), masked_cohort.patients[0].scan, method=["guided_backprop"], stages=3
    )
    stages = found["prognosis", "guided_backprop"]
    assert [stage.down_to.split(".")[0] for stage in stages] == ["heads", "backbone", "backbone", "backbone"]
    network = ichprog.networks.build(ichprog.load_model(compact_model, runtime="torch").spec)
    own = [n for n, module in network.named_modules() if list(module.parameters(recurse=False))]
    assert stages[-1].layers == len(own)
    assert stages[-1].down_to == next(n for n in own if n.startswith("backbone."))
    assert [stage.layers for stage in stages] == sorted({stage.layers for stage in stages})
    assert abs(stages[-1].pearson) < 0.5


def test_the_model_is_not_changed(bright_model, masked_cohort):
    model = ichprog.load_model(bright_model, runtime="torch")
    before = copy.deepcopy(model.torch_module().state_dict())
    files = [Path(file.path).read_bytes() for file in model.weights]
    random_state = torch.get_rng_state()
    parameter_randomisation(model, masked_cohort.patients[0].scan, stages=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [Path(file.path).read_bytes() for file in model.weights] == files
    after = model.torch_module().state_dict()
    assert all(torch.equal(values, before[key]) for key, values in after.items())


def test_equal_seeds_give_equal_random_weights(compact_model, masked_cohort):
    path = masked_cohort.patients[0].scan
    first, again, other = (
        parameter_randomisation(torch_model(compact_model), path, stages=1, seeds=[seed]) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_several_seeds_give_the_mean_and_the_spread(compact_model, masked_cohort):
    model, path = torch_model(compact_model), masked_cohort.patients[0].scan
    single = [parameter_randomisation(model, path, stages=1, seeds=[seed]) for seed in (4, 5, 6)]
    [key] = single[0]
    for number, stage in enumerate(parameter_randomisation(model, path, stages=1, seeds=[4, 5, 6])[key]):
        for name in ("pearson", "spearman", "spearman_absolute"):
            values = [getattr(each[key][number], name) for each in single]
            assert getattr(stage, name) == pytest.approx(statistics.mean(values))
            assert getattr(stage, f"{name}_sd") == pytest.approx(statistics.stdev(values))
            assert getattr(single[0][key][number], f"{name}_sd") is None
        assert stage.seeds == 3


@pytest.mark.parametrize("seeds", [[], [1, 2, 1]])
def test_no_seeds_and_repeated_seeds_are_refused(compact_model, seeds):
    with pytest.raises(InvalidValueError, match="different numbers"):
        parameter_randomisation(compact_model, "no-scan.nii.gz", seeds=seeds)
