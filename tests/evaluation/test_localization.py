"""Saliency, measured: planted lesions, brute force, and scores whose curves can be written down."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.stats
import torch

import ichprog
from ichprog import ScanError, UnknownNameError, registry
from ichprog.backbones import Backbone
from ichprog.cohort import Cohort
from ichprog.errors import CohortError, InvalidValueError
from ichprog.evaluation import faithfulness, localization
from ichprog.evaluation.localization import MapMetrics

from support.models import local_model
from support.phantoms import brain_hu

SHAPE = (96, 96, 30)
LEFT, RIGHT = (330, 220, 16), (182, 220, 16)  # where brain_hu puts the lesion, along i of 512
AFFINE = np.diag([-2.5, -2.5, 5.0, 1.0])  # LPS
RNG = np.random.default_rng(3)


def ball(shape, centre, radius):
    """Where a ball is."""
    return sum((axis - c) ** 2 for axis, c in zip(np.ogrid[tuple(map(slice, shape))], centre, strict=True)) <= radius**2


def row(**said):
    """A row of `measured`, with what the test says."""
    plain = {"variant": "v", "fold": 0, "patient": "p", "task": "prognosis", "label": "poor", "method": "m"}
    plain |= {"empty": False, "pointing_game": 1.0, "relevance_mass_accuracy": 0.5, "lesion_share": 0.1}
    plain |= {"hemisphere_correct": True}
    return MapMetrics(**plain | said)


# Masks of a cohort


def cohort_in(folder, *, lesions=(LEFT, RIGHT), column=None, flip=False):
    """A cohort of simulated brains with the masks of their lesions, as `ichprog simulate` lays them out."""
    (folder / "scans").mkdir(parents=True)
    (folder / "masks").mkdir()
    rows = ["patient,scan,poor_outcome" + ("" if column is None else ",mask")]
    for number, lesion in enumerate(lesions):
        hu = brain_hu(SHAPE, lesion, seed=number)
        mask = (hu == 68).astype(np.uint8)
        nib.Nifti1Image(hu, AFFINE).to_filename(folder / "scans" / f"p{number}.nii.gz")
        nib.Nifti1Image(mask[::-1] if flip else mask, AFFINE).to_filename(folder / "masks" / f"p{number}.nii.gz")
        rows.append(f"p{number},scans/p{number}.nii.gz,1" + ("" if column is None else f",{column[number]}"))
    (folder / "cohort.csv").write_text("\n".join(rows))
    return Cohort.read(folder / "cohort.csv")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return cohort_in(tmp_path_factory.mktemp("cohort") / "sim")


def test_masks_are_found_beside_the_scans(cohort):
    assert {name: path.name for name, path in localization.find_masks(cohort).items()} == {
        "p0": "p0.nii.gz",
        "p1": "p1.nii.gz",
    }
    assert all(path.parent.name == "masks" for path in localization.find_masks(cohort).values())


def test_a_column_names_the_masks_and_a_blank_says_there_is_none(tmp_path):
    named = cohort_in(tmp_path / "a", column=["masks/p1.nii.gz", ""])
    assert localization.find_masks(named) == {"p0": tmp_path / "a/masks/p1.nii.gz"}
    joined = Cohort.join([named, cohort_in(tmp_path / "b", column=["masks/p0.nii.gz", "masks/p1.nii.gz"])])
    assert {name: str(path.relative_to(tmp_path)) for name, path in localization.find_masks(joined).items()} == {
        "a_cohort_p0": "a/masks/p1.nii.gz",
        "b_cohort_p0": "b/masks/p0.nii.gz",
        "b_cohort_p1": "b/masks/p1.nii.gz",
    }


def test_a_mask_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CohortError, match=r"patient p1.*masks/nowhere\.nii\.gz"):
        localization.find_masks(cohort_in(tmp_path / "c", column=["", "masks/nowhere.nii.gz"]))


def test_a_mask_may_have_another_voxel_order_but_not_another_place(cohort):
    patient = cohort.patients[0]
    scan, image = ichprog.scan.read(patient.scan), nib.load(localization.find_masks(cohort)["p0"])
    expected = np.asarray(image.dataobj) > 0
    turned = nib.as_closest_canonical(image)  # RAS
    assert turned.affine[0, 0] > 0
    assert np.array_equal(localization.load_mask(turned, scan), expected)
    moved = image.affine.copy()
    moved[:3, 3] += 20
    for other in (nib.Nifti1Image(expected.astype(np.uint8), moved), image.slicer[:, :, :-1]):
        with pytest.raises(ScanError) as error:
            localization.load_mask(other, scan)
        assert error.value.code == "other-scan"


# Models on a cohort


def loaded(name, fold=None):
    """A model run by torch, which need not compile it."""
    return ichprog.load_model(name, fold=fold, runtime="torch")


def test_a_network_that_sees_blood_points_at_it(bright_model, cohort):
    rows = list(
        localization.measure_maps(
            {"v": loaded(bright_model)}, cohort, folds={"p0": 0, "p1": 1}, methods=["guided_backprop"]
        )
    )
    assert [(r.patient, r.fold, r.task) for r in rows] == [
        (name, fold, task) for name, fold in (("p0", 0), ("p1", 1)) for task in ("prognosis", "gcs", "age")
    ]
    for each in rows:
        assert (each.pointing_game, each.hemisphere_correct, each.empty) == (1.0, True, False)
        assert each.relevance_mass_accuracy > 3 * each.lesion_share > 0
    hu = brain_hu(SHAPE, LEFT, seed=0)
    assert rows[0].lesion_share == pytest.approx((hu == 68).sum() / (hu != 0).sum(), rel=0.01)


def test_masks_of_the_other_side_turn_all_of_it_round(bright_model, tmp_path):
    mirrored = cohort_in(tmp_path / "mirrored", flip=True)
    for each in localization.measure_maps(
        {"v": loaded(bright_model)}, mirrored, folds=None, methods=["guided_backprop", "grad_cam"]
    ):
        assert (each.pointing_game, each.hemisphere_correct) == (0.0, False)
        assert each.relevance_mass_accuracy < each.lesion_share
        assert each.fold is None


def test_only_the_network_that_has_not_seen_the_patient_explains_it(tmp_path, cohort):
    """Fold 1's network has heads that nothing speaks for, so that its maps are empty; fold 0's are not."""
    folder = tmp_path / "folds"
    ichprog.register_backbone("plain", plain)
    try:
        name = local_model(folder, "plain", shape=(20, 48, 48), folds=1, adjust=lambda s: known(s, 4.0, 0.0))
        local_model(tmp_path / "other", "plain", shape=(20, 48, 48), adjust=lambda s: known(s, -4.0, 0.0))
        (tmp_path / "other/fold0.safetensors").rename(folder / "fold1.safetensors")
        sources = {
            "name": name,
            "model": ichprog.load_model(name),
            "function": lambda f: ichprog.load_model(name, fold=f),
        }
        rows = list(
            localization.measure_maps(
                sources, cohort, folds={"p0": 1, "p1": 0}, tasks=["gcs"], methods=["guided_backprop"]
            )
        )
        assert {(r.variant, r.patient, r.fold): r.empty for r in rows} == {
            (variant, patient, fold): fold == 1 for variant in sources for patient, fold in (("p0", 1), ("p1", 0))
        }
        assert all(
            r.pointing_game is None and r.relevance_mass_accuracy is None and r.hemisphere_correct is None
            for r in rows
            if r.empty
        )
        left_out = list(
            localization.measure_maps(
                {"v": sources["model"]}, cohort, folds={"p1": 0}, tasks=["gcs"], methods=["guided_backprop"]
            )
        )
        assert [r.patient for r in left_out] == ["p1"]
        with pytest.raises(UnknownNameError, match="fold"):
            list(
                localization.measure_maps({"v": sources["model"]}, cohort, folds={"p1": 7}, methods=["guided_backprop"])
            )
    finally:
        registry.backbones.unregister("plain")


def test_what_cannot_be_measured_is_said(bright_model, cohort):
    with pytest.raises(CohortError, match="none of 2 patients"):
        list(localization.measure_maps({"v": loaded(bright_model)}, cohort, folds={"someone else": 0}))
    with pytest.raises(UnknownNameError, match="task of any model"):
        list(localization.measure_maps({"v": loaded(bright_model)}, cohort, folds=None, tasks=["mortality"]))


# The summary


def test_the_summary_is_the_mean_with_an_interval_over_patients():
    inside = RNG.beta(2, 5, 60)
    rows = [
        row(patient=f"p{n}", relevance_mass_accuracy=float(value), lesion_share=0.1) for n, value in enumerate(inside)
    ]
    (said,) = localization.summarise_maps(rows, n_bootstrap=4000)
    assert (said["variant"], said["task"], said["method"], said["maps"]) == ("v", "prognosis", "m", 60)
    assert said["relevance_mass_accuracy"]["value"] == pytest.approx(inside.mean())
    expected = scipy.stats.bootstrap(
        (inside,), np.mean, method="percentile", n_resamples=4000, rng=1
    ).confidence_interval
    assert (said["relevance_mass_accuracy"]["low"], said["relevance_mass_accuracy"]["high"]) == pytest.approx(
        tuple(expected), abs=0.006
    )
    assert said["relevance_mass_gain"]["value"] == pytest.approx(inside.mean() - 0.1)
    assert said["relevance_mass_gain"]["low"] == pytest.approx(said["relevance_mass_accuracy"]["low"] - 0.1)
    assert said["pointing_game"] == {"value": 1.0, "low": 1.0, "high": 1.0, "patients": 60}
    assert said["deletion"] is None


def test_empty_maps_are_counted_as_empty_and_not_as_misses():
    rows = [row(patient=f"p{n}", pointing_game=float(n % 2)) for n in range(8)]
    rows += [
        row(patient=f"e{n}", empty=True, pointing_game=None, relevance_mass_accuracy=None, hemisphere_correct=None)
        for n in range(2)
    ]
    (said,) = localization.summarise_maps(rows)
    assert (said["maps"], said["empty"]["value"]) == (10, 0.2)
    assert (said["pointing_game"]["value"], said["pointing_game"]["patients"]) == (0.5, 8)


def test_each_variant_task_and_method_is_summed_up_alone_and_one_patient_has_no_interval():
    rows = [row(variant=v, task=t, method=m) for v in "ab" for t in "cd" for m in "ef"]
    said = localization.summarise_maps(rows)
    assert [(s["variant"], s["task"], s["method"]) for s in said] == [
        (v, t, m) for v in "ab" for t in "cd" for m in "ef"
    ]
    assert said[0]["relevance_mass_accuracy"] == {"value": 0.5, "low": None, "high": None, "patients": 1}


# Insertion and deletion


def plain():
    """One channel that is the grid, shrunk: a head's logit is then weight x mean + bias."""
    convolution = torch.nn.Conv3d(1, 1, 1)
    torch.nn.init.ones_(convolution.weight)
    torch.nn.init.zeros_(convolution.bias)
    return Backbone(torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.AvgPool3d(2)), 1, "features.2")


def known(state, weight, bias):
    """Heads of one weight and one bias."""
    said = {"linear.weight": weight, "linear.bias": bias}
    for key, values in state.items():
        for end, value in said.items():
            if key.endswith(end):
                values.fill_(value)
    return state


@pytest.fixture
def plain_model(tmp_path):
    ichprog.register_backbone("plain", plain)
    yield local_model(tmp_path / "plain", "plain", shape=(20, 48, 48), adjust=lambda state: known(state, 30.0, -1.0))
    registry.backbones.unregister("plain")


def by_hand(cells, order, steps):
    """The deletion and insertion curve of sigmoid(30 x mean - 1), cells replaced by 0."""
    bounds = [round(s * len(order) / steps) for s in range(steps + 1)]
    gone = [cells[order[:upto]].sum(dtype=np.float64) for upto in bounds]
    whole = cells.sum(dtype=np.float64)
    return [[1 / (1 + math.exp(1 - 30 * total / cells.size)) for total in side] for side in
            ([whole - part for part in gone], gone)]  # fmt: skip


def test_curves_of_a_score_that_can_be_written_down(plain_model, cohort):
    model, path = loaded(plain_model), cohort.patients[0].scan
    saliency = ichprog.explain(model, path)
    cells = ichprog.preprocessing.prepare(model.load_scan(path).hu, model.spec.input)
    ranked = dataclasses.replace(saliency, grid_map=cells + 1e-6 * RNG.random(cells.shape, np.float32))
    found = faithfulness.deletion_insertion(model, path, ranked, steps=7)
    there = np.flatnonzero(cells)
    order = there[np.argsort(-ranked.grid_map.ravel()[there])]
    deletion, insertion = by_hand(cells.ravel(), order, 7)
    curve = found["prognosis", "guided_backprop"]
    assert curve.deletion == pytest.approx(deletion, abs=1e-5)
    assert curve.insertion == pytest.approx(insertion, abs=1e-5)
    for area, values in ((curve.deletion_area, deletion), (curve.insertion_area, insertion)):
        assert area == pytest.approx(sum((a + b) / 14 for a, b in itertools.pairwise(values)), abs=1e-5)
    random = found["prognosis", faithfulness.RANDOM]
    even = by_hand(np.where(cells, cells[cells > 0].mean(), 0).ravel(), there, 7)  # a random order takes the mean
    assert random.deletion == pytest.approx(even[0], abs=0.01)
    assert random.insertion == pytest.approx(even[1], abs=0.01)
    assert curve.deletion_area < random.deletion_area
    assert curve.insertion_area > random.insertion_area


def test_a_map_without_an_order_is_no_better_than_chance(plain_model, cohort):
    """The gradient of a mean is the same everywhere, and so is this network's guided gradient."""
    model, path = loaded(plain_model), cohort.patients[0].scan
    found = faithfulness.deletion_insertion(model, path, ichprog.explain(model, path), steps=5)
    assert found["prognosis", "guided_backprop"].deletion_area == found["prognosis", faithfulness.RANDOM].deletion_area


def test_a_blurred_baseline_is_where_curves_end(bright_model, cohort):
    path = cohort.patients[0].scan
    model = loaded(bright_model)
    found = faithfulness.deletion_insertion(
        model, path, ichprog.explain(model, path, method=["grad_cam"]), steps=3, baseline="blurred"
    )
    curve = found["prognosis", "grad_cam"]
    probability = ichprog.predict(model, path)["prognosis"].probabilities["poor"]
    assert [curve.deletion[0], curve.insertion[-1]] == pytest.approx([probability] * 2, abs=1e-6)
    cells = ichprog.preprocessing.prepare(model.load_scan(path).hu, model.spec.input)
    blurred = scipy.ndimage.gaussian_filter(cells, [0.03 * n for n in cells.shape])
    expected = np.mean([fold["prognosis"].probabilities[0, 1] for fold in model.predict_grids(blurred[None])])
    assert [curve.deletion[-1], curve.insertion[0]] == pytest.approx([expected] * 2, abs=1e-6)


def test_curves_refuse_what_there_is_not(plain_model, cohort):
    model, path = loaded(plain_model), cohort.patients[0].scan
    saliency = ichprog.explain(model, path)
    with pytest.raises(UnknownNameError, match="baseline"):
        faithfulness.deletion_insertion(model, path, saliency, baseline="noise")
    with pytest.raises(InvalidValueError, match="steps 0"):
        faithfulness.deletion_insertion(model, path, saliency, steps=0)


def test_areas_are_measured_beside_the_lesion(bright_model, cohort):
    model, path = loaded(bright_model), cohort.patients[0].scan
    rows = list(
        localization.measure_maps({"v": model}, cohort, folds=None, tasks=["prognosis"], methods=["grad_cam"], steps=4)
    )
    found = faithfulness.deletion_insertion(model, path, ichprog.explain(model, path, method=["grad_cam"]), steps=4)
    curve, random = found["prognosis", "grad_cam"], found["prognosis", faithfulness.RANDOM]
    assert (rows[0].deletion, rows[0].insertion) == (curve.deletion_area, curve.insertion_area)
    assert (rows[0].random_deletion, rows[0].random_insertion) == (random.deletion_area, random.insertion_area)
    assert rows[0].deletion < rows[0].random_deletion
    (said,) = localization.summarise_maps(rows)
    assert said["deletion_gain"]["value"] > 0


# Random weights


@pytest.fixture
def methods():
    """A method that sees edges and no network, and one whose maps the test knows."""
    given = [RNG.standard_normal((20, 96, 96)) for _ in range(4)]
    left = iter(given)
    ichprog.register_saliency("edges", lambda score, grid, network: torch.gradient(grid.detach()[0, 0], dim=2)[0].abs())
    ichprog.register_saliency("told", lambda score, grid, network: torch.from_numpy(next(left)))
    yield given
    for name in ("edges", "told"):
        registry.saliency.unregister(name)


@pytest.fixture(scope="module")
def compact_model(tmp_path_factory):
    return local_model(tmp_path_factory.mktemp("compact") / "model", "compact", shape=(16, 48, 48))


def test_a_map_of_the_network_goes_with_its_weights_and_an_edge_detector_stays(compact_model, cohort, methods):
    path = cohort.patients[0].scan
    found = faithfulness.parameter_randomisation(
        loaded(compact_model), path, method=["guided_backprop", "edges"], stages=2
    )
    assert all(abs(value) < 0.5 for value in dataclasses.astuple(found["prognosis", "guided_backprop"][-1])[2:4])
    for stage in found["prognosis", "edges"]:
        assert (stage.pearson, stage.spearman, stage.spearman_absolute) == pytest.approx((1, 1, 1))


def test_a_head_of_one_channel_can_only_scale_the_map_and_a_dead_network_has_none(bright_model, cohort):
    heads, whole = faithfulness.parameter_randomisation(loaded(bright_model), cohort.patients[0].scan, stages=1)[
        "prognosis", "guided_backprop"
    ]
    assert heads.down_to.startswith("heads.")
    assert heads.spearman_absolute == pytest.approx(1, abs=1e-6)
    assert (whole.down_to, whole.layers) == ("backbone.features.0", heads.layers + 1)
    assert (whole.pearson, whole.spearman, whole.spearman_absolute) == (None, None, None)


def test_correlations_are_those_of_scipy_in_the_brain(bright_model, cohort, methods):
    path = cohort.patients[0].scan
    model = loaded(bright_model)
    found = faithfulness.parameter_randomisation(model, path, method="told", stages=3)["prognosis", "told"]
    assert len(found) == 2  # the heads, and the only layer of the backbone
    inside = ichprog.preprocessing.prepare(model.load_scan(path).hu, model.spec.input) > 0
    first, *later = (values[inside].astype(np.float32) for values in methods[:3])
    for stage, values in zip(found, later, strict=True):
        assert stage.pearson == pytest.approx(scipy.stats.pearsonr(first, values).statistic, abs=1e-6)
        assert stage.spearman == pytest.approx(scipy.stats.spearmanr(first, values).statistic, abs=1e-6)
        absolute = scipy.stats.spearmanr(abs(first), abs(values)).statistic
        assert stage.spearman_absolute == pytest.approx(absolute, abs=1e-6)


def test_a_deeper_network_loses_its_weights_from_the_heads_down(compact_model, cohort):
    found = faithfulness.parameter_randomisation(
        loaded(compact_model), cohort.patients[0].scan, method=["guided_backprop"], stages=3
    )
    stages = found["prognosis", "guided_backprop"]
    assert [stage.down_to.split(".")[0] for stage in stages] == ["heads", "backbone", "backbone", "backbone"]
    network = ichprog.networks.build(ichprog.load_model(compact_model, runtime="torch").spec)
    own = [n for n, module in network.named_modules() if list(module.parameters(recurse=False))]
    assert stages[-1].layers == len(own)
    assert stages[-1].down_to == next(n for n in own if n.startswith("backbone."))
    assert [stage.layers for stage in stages] == sorted({stage.layers for stage in stages})
    assert abs(stages[-1].pearson) < 0.5


def test_the_model_stays_as_it_was(bright_model, cohort):
    model = ichprog.load_model(bright_model, runtime="torch")
    before = [copy.deepcopy(member.network.state_dict()) for member in model.fold_runtimes]
    files = [Path(file.path).read_bytes() for file in model.weights]
    dice = torch.get_rng_state()
    faithfulness.parameter_randomisation(model, cohort.patients[0].scan, stages=1)
    assert torch.equal(torch.get_rng_state(), dice)
    assert [Path(file.path).read_bytes() for file in model.weights] == files
    for member, state in zip(model.fold_runtimes, before, strict=True):
        assert all(torch.equal(values, state[key]) for key, values in member.network.state_dict().items())


def test_the_same_seed_draws_the_same_weights(compact_model, cohort):
    path = cohort.patients[0].scan
    first, again, other = (
        faithfulness.parameter_randomisation(loaded(compact_model), path, stages=1, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


# The figure


def panels(figure):
    return figure.get_axes()


def test_a_figure_has_a_row_a_slice_and_a_panel_a_model(bright_model, plain_model, cohort):
    models = {"bright": loaded(bright_model), "plain": loaded(plain_model)}
    drawn = localization.compare_maps(models, cohort, [("p0", None), ("p1", 12)], folds=None)
    axes = panels(drawn)
    assert len(axes) == 6
    assert [len(axis.images) for axis in axes] == [1, 2, 2] * 2
    for at, (patient, name) in enumerate((p, m) for p in cohort.patients for m in models.values()):
        said = ichprog.predict(name, patient.scan)["prognosis"].probabilities["poor"]
        axis = [a for n, a in enumerate(axes) if n % 3][at]
        assert axis.get_title().startswith(f"{('bright', 'plain')[at % 2]}\np(poor) = {said:.2f}, map up to ")
    mask = np.asarray(nib.load(localization.find_masks(cohort)["p0"]).dataobj)
    most = mask.sum((0, 1))
    first, second = axes[0].get_title(), axes[3].get_title()
    assert first == f"p0, truth: poor\nslice {most.argmax() + 1} of 30"
    assert second == "p1, truth: poor\nslice 12 of 30"
    assert all(axis.collections for axis in axes[:3])  # the outline of the lesion
    assert "research" in drawn.get_suptitle()


def test_the_figure_shows_the_slice_and_its_map_over_it(bright_model, cohort):
    drawn = localization.compare_maps({"v": loaded(bright_model)}, cohort, [("p0", None)], folds=None)
    slice_, (under, over) = panels(drawn)[0].images[0], panels(drawn)[1].images
    hu = brain_hu(SHAPE, LEFT, seed=0)
    number = int(panels(drawn)[0].get_title().split()[-3]) - 1
    i, j = (np.flatnonzero(hu.any((1 - side, 2))) for side in (0, 1))
    expected = hu[i[0] : i[-1] + 1, j[0] : j[-1] + 1, number].T
    assert np.array_equal(np.asarray(slice_.get_array()), expected)
    assert np.array_equal(np.asarray(under.get_array()), expected)
    colours = np.asarray(over.get_array())
    strongest = np.unravel_index(colours.argmax(), colours.shape)
    assert expected[strongest] == 68
    values = np.asarray(ichprog.explain(loaded(bright_model), cohort.patients[0].scan).image.dataobj)
    here = values[i[0] : i[-1] + 1, j[0] : j[-1] + 1, number].T
    assert np.allclose(colours, here / np.abs(here).max())
    share = np.abs(here).max() / np.abs(values).max()
    assert panels(drawn)[1].get_title().endswith(f"map up to {share:.0%}")


def test_an_empty_map_is_said_in_the_figure(tmp_path, cohort):
    ichprog.register_backbone("plain", plain)
    try:
        name = local_model(tmp_path / "mute", "plain", shape=(20, 48, 48), adjust=lambda state: known(state, -3.0, 0.0))
        drawn = localization.compare_maps({"v": loaded(name)}, cohort, [("p0", None)], folds=None)
        axis = panels(drawn)[1]
        assert [text.get_text() for text in axis.texts] == ["empty map"]
        assert len(axis.images) == 1
    finally:
        registry.backbones.unregister("plain")


def test_the_figure_refuses_who_is_not_there(bright_model, cohort):
    for chosen, folds in (([("nobody", None)], None), ([("p0", 31)], None), ([("p0", None)], {"p1": 0})):
        with pytest.raises(UnknownNameError):
            localization.compare_maps({"v": loaded(bright_model)}, cohort, chosen, folds=folds)
