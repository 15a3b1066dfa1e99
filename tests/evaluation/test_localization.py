"""Localization: lesion masks, metrics of maps, their summary and the figure of maps."""

import nibabel as nib
import numpy as np
import pytest
import scipy.stats
import torch

import ichprog
from ichprog import ScanError, UnknownNameError, registry
from ichprog.cohort import Cohort, find_masks
from ichprog.errors import CohortError
from ichprog.evaluation.localization import MapMetrics, compare_maps, measure_maps, summarise_maps
from ichprog.scan import load_regions

from support.lesions import LEFT, SHAPE, masked_cohort_in
from support.models import fill_heads, local_model, mean_backbone, torch_model
from support.phantoms import brain_hu

RNG = np.random.default_rng(3)


def map_metrics(**values):
    """Return metrics of a map with these values."""
    default = {"variant": "v", "fold": 0, "patient": "p", "task": "prognosis", "label": "poor", "method": "m"}
    default |= {"empty": False, "pointing_game": 1.0, "relevance_mass_accuracy": 0.5, "lesion_share": 0.1}
    default |= {"hemisphere_correct": True}
    return MapMetrics(**default | values)


def test_masks_are_found_next_to_the_scans(masked_cohort):
    assert {name: path.name for name, path in find_masks(masked_cohort).items()} == {
        "p0": "p0.nii.gz",
        "p1": "p1.nii.gz",
    }
    assert all(path.parent.name == "masks" for path in find_masks(masked_cohort).values())


def test_a_column_has_the_paths_of_the_masks_and_a_blank_means_no_mask(tmp_path):
    named = masked_cohort_in(tmp_path / "a", column=["masks/p1.nii.gz", ""])
    assert find_masks(named) == {"p0": tmp_path / "a/masks/p1.nii.gz"}
    joined = Cohort.join([named, masked_cohort_in(tmp_path / "b", column=["masks/p0.nii.gz", "masks/p1.nii.gz"])])
    assert {name: str(path.relative_to(tmp_path)) for name, path in find_masks(joined).items()} == {
        "a_cohort_p0": "a/masks/p1.nii.gz",
        "b_cohort_p0": "b/masks/p0.nii.gz",
        "b_cohort_p1": "b/masks/p1.nii.gz",
    }


def test_a_missing_mask_is_named(tmp_path):
    with pytest.raises(CohortError, match=r"patient p1.*masks/nowhere\.nii\.gz"):
        find_masks(masked_cohort_in(tmp_path / "c", column=["", "masks/nowhere.nii.gz"]))


def test_a_mask_may_differ_in_voxel_order_but_not_in_position(masked_cohort):
    patient = masked_cohort.patients[0]
    scan, image = ichprog.scan.read(patient.scan), nib.load(find_masks(masked_cohort)["p0"])
    expected = np.asarray(image.dataobj) > 0
    turned = nib.as_closest_canonical(image)  # RAS
    assert turned.affine[0, 0] > 0
    assert np.array_equal(load_regions(turned, scan) > 0, expected)
    moved = image.affine.copy()
    moved[:3, 3] += 20
    for other in (nib.Nifti1Image(expected.astype(np.uint8), moved), image.slicer[:, :, :-1]):
        with pytest.raises(ScanError) as error:
            load_regions(other, scan)
        assert error.value.code == "other-scan"


def test_the_maps_of_a_network_that_detects_blood_lie_in_the_lesion(bright_model, masked_cohort):
    rows = list(
        measure_maps(
            {"v": torch_model(bright_model)}, masked_cohort, folds={"p0": 0, "p1": 1}, methods=["guided_backprop"]
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


def upsample(values, shape):
    """Return for each voxel the value of its cell, voxel by voxel."""
    result = np.zeros(shape)
    for i, j, k in np.ndindex(*shape):
        d, h, w = (int((at + 0.5) * n / size) for at, n, size in zip((k, j, i), values.shape, shape[::-1], strict=True))
        result[i, j, k] = values[d, h, w]
    return result


def cell_means(values, brain, cells):
    """Return the mean of the values over the brain in each voxel's cell."""
    result = np.zeros(values.shape)
    for cell in np.unique(cells[brain]):
        here = (cells == cell) & brain
        result[here] = values[here].mean()
    return result


def by_voxels(values, lesion):
    """Return the pointing game and the relevance mass accuracy of a map that is 0 outside the brain."""
    top = values == values.max()
    return lesion[top].mean(), values.clip(min=0)[lesion].sum() / values.clip(min=0).sum()


@pytest.fixture
def coarse_method():
    """Register a method whose map has 4 x 6 x 6 cells, and return the map."""
    values = np.random.default_rng(8).standard_normal((4, 6, 6)).astype(np.float32)
    values[2, 2, 3] = 5.0  # the cell with the lesion of patient p0
    ichprog.register_saliency("coarse", lambda score, grid, network: torch.from_numpy(values))
    yield values
    registry.saliency.unregister("coarse")


def test_a_map_is_measured_at_its_resolution_in_the_brain_with_two_baselines(coarse_method, mean_model, masked_cohort):
    model, patient = torch_model(mean_model), masked_cohort.patients[0]
    (found,) = measure_maps(
        {"v": model}, Cohort((patient,), masked_cohort.source), folds=None, tasks=["gcs"], methods=["coarse"]
    )
    scan = model.load_scan(patient.scan)
    lesion = np.asarray(nib.load(find_masks(masked_cohort)["p0"]).dataobj) > 0
    brain = np.asarray(scan.brain)
    expected = by_voxels(np.where(brain, upsample(coarse_method, SHAPE), 0), lesion & brain)
    assert (found.pointing_game, found.relevance_mass_accuracy) == pytest.approx(expected, rel=1e-5)
    assert 0 < found.pointing_game < 1, "the cell is larger than the lesion"
    assert found.cell_ml == pytest.approx(np.prod(scan.spacing) * np.prod(SHAPE) / 1000 / (4 * 6 * 6))
    cells = upsample(np.arange(4 * 6 * 6).reshape(4, 6, 6), SHAPE)
    middle = np.argwhere(brain).mean(0)
    distance = np.linalg.norm((np.moveaxis(np.indices(SHAPE), 0, -1) - middle) * scan.spacing, axis=-1)
    near = by_voxels(cell_means(1 - distance / distance[brain].max(), brain, cells), lesion & brain)
    assert (found.centre_pointing_game, found.centre_mass_accuracy) == pytest.approx(near, rel=1e-5)
    dense = by_voxels(cell_means(((scan.hu >= 50) & (scan.hu <= 100)).astype(float), brain, cells), lesion & brain)
    assert (found.dense_pointing_game, found.dense_mass_accuracy) == pytest.approx(dense, rel=1e-5)
    (summary,) = summarise_maps([found])
    assert summary["pointing_gain_over_centre"]["value"] == pytest.approx(expected[0] - near[0])
    assert summary["mass_gain_over_dense"]["value"] == pytest.approx(expected[1] - dense[1])


def test_mirrored_masks_reverse_the_metrics(bright_model, tmp_path):
    mirrored = masked_cohort_in(tmp_path / "mirrored", flip=True)
    for each in measure_maps(
        {"v": torch_model(bright_model)}, mirrored, folds=None, methods=["guided_backprop", "grad_cam"]
    ):
        assert (each.pointing_game, each.hemisphere_correct) == (0.0, False)
        assert each.relevance_mass_accuracy < each.lesion_share
        assert each.fold is None


def test_only_the_network_of_the_patients_test_fold_explains_the_patient(tmp_path, masked_cohort):
    """The maps of fold 1 are empty because all its weights are negative; those of fold 0 are not."""
    folder = tmp_path / "folds"
    ichprog.register_backbone("mean", mean_backbone)
    try:
        name = local_model(folder, "mean", shape=(20, 48, 48), folds=1, adjust=lambda s: fill_heads(s, 4.0, 0.0))
        local_model(tmp_path / "other", "mean", shape=(20, 48, 48), adjust=lambda s: fill_heads(s, -4.0, 0.0))
        (tmp_path / "other/fold0.safetensors").rename(folder / "fold1.safetensors")
        sources = {
            "name": name,
            "model": ichprog.load_model(name),
            "function": lambda f: ichprog.load_model(name, fold=f),
        }
        rows = list(
            measure_maps(sources, masked_cohort, folds={"p0": 1, "p1": 0}, tasks=["gcs"], methods=["guided_backprop"])
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
            measure_maps(
                {"v": sources["model"]}, masked_cohort, folds={"p1": 0}, tasks=["gcs"], methods=["guided_backprop"]
            )
        )
        assert [r.patient for r in left_out] == ["p1"]
        with pytest.raises(UnknownNameError, match="fold"):
            list(measure_maps({"v": sources["model"]}, masked_cohort, folds={"p1": 7}, methods=["guided_backprop"]))
    finally:
        registry.backbones.unregister("mean")


def test_patients_without_a_fold_and_unknown_tasks_are_refused(bright_model, masked_cohort):
    with pytest.raises(CohortError, match="none of 2 patients"):
        list(measure_maps({"v": torch_model(bright_model)}, masked_cohort, folds={"someone else": 0}))
    with pytest.raises(UnknownNameError, match="task of any model"):
        list(measure_maps({"v": torch_model(bright_model)}, masked_cohort, folds=None, tasks=["mortality"]))


def test_a_summary_has_means_with_intervals_over_patients():
    shares = RNG.beta(2, 5, 60)
    rows = [
        map_metrics(patient=f"p{n}", relevance_mass_accuracy=float(value), lesion_share=0.1)
        for n, value in enumerate(shares)
    ]
    (summary,) = summarise_maps(rows, n_bootstrap=4000)
    assert (summary["variant"], summary["task"], summary["method"], summary["maps"]) == ("v", "prognosis", "m", 60)
    assert summary["relevance_mass_accuracy"]["value"] == pytest.approx(shares.mean())
    expected = scipy.stats.bootstrap(
        (shares,), np.mean, method="percentile", n_resamples=4000, rng=1
    ).confidence_interval
    assert (summary["relevance_mass_accuracy"]["low"], summary["relevance_mass_accuracy"]["high"]) == pytest.approx(
        tuple(expected), abs=0.006
    )
    assert summary["relevance_mass_gain"]["value"] == pytest.approx(shares.mean() - 0.1)
    assert summary["relevance_mass_gain"]["low"] == pytest.approx(summary["relevance_mass_accuracy"]["low"] - 0.1)
    assert summary["pointing_game"] == {"value": 1.0, "low": 1.0, "high": 1.0, "patients": 60}
    assert summary["deletion"] is None


def test_empty_maps_count_as_empty_and_not_as_wrong():
    rows = [map_metrics(patient=f"p{n}", pointing_game=float(n % 2)) for n in range(8)]
    rows += [
        map_metrics(
            patient=f"e{n}", empty=True, pointing_game=None, relevance_mass_accuracy=None, hemisphere_correct=None
        )
        for n in range(2)
    ]
    (summary,) = summarise_maps(rows)
    assert (summary["maps"], summary["empty"]["value"]) == (10, 0.2)
    assert (summary["pointing_game"]["value"], summary["pointing_game"]["patients"]) == (0.5, 8)


def test_each_variant_task_and_method_has_its_own_summary_and_one_patient_gives_no_interval():
    rows = [map_metrics(variant=v, task=t, method=m) for v in "ab" for t in "cd" for m in "ef"]
    summary = summarise_maps(rows)
    assert [(s["variant"], s["task"], s["method"]) for s in summary] == [
        (v, t, m) for v in "ab" for t in "cd" for m in "ef"
    ]
    assert summary[0]["relevance_mass_accuracy"] == {"value": 0.5, "low": None, "high": None, "patients": 1}


def panels(figure):
    return figure.get_axes()


def test_a_figure_has_a_row_for_each_slice_and_a_panel_for_each_model(bright_model, mean_model, masked_cohort):
    models = {"bright": torch_model(bright_model), "mean": torch_model(mean_model)}
    drawn = compare_maps(models, masked_cohort, [("p0", None), ("p1", 12)], folds=None)
    axes = panels(drawn)
    assert len(axes) == 6
    assert [len(axis.images) for axis in axes] == [1, 2, 2] * 2
    for at, (patient, name) in enumerate((p, m) for p in masked_cohort.patients for m in models.values()):
        summary = ichprog.predict(name, patient.scan)["prognosis"].probabilities["poor"]
        axis = [a for n, a in enumerate(axes) if n % 3][at]
        assert axis.get_title() == f"{('bright', 'mean')[at % 2]}\np(poor) = {summary:.2f}"
    mask = np.asarray(nib.load(find_masks(masked_cohort)["p0"]).dataobj)
    most = mask.sum((0, 1))
    first, second = axes[0].get_title(), axes[3].get_title()
    assert first == f"p0, truth: poor\nslice {most.argmax() + 1} of 30"
    assert second == "p1, truth: poor\nslice 12 of 30"
    assert all(axis.collections for axis in axes[:3])  # the outline of the lesion
    assert "research" in drawn.get_suptitle()


def test_a_panel_shows_the_slice_with_its_map(bright_model, masked_cohort):
    drawn = compare_maps({"v": torch_model(bright_model)}, masked_cohort, [("p0", None)], folds=None)
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
    values = np.asarray(ichprog.explain(torch_model(bright_model), masked_cohort.patients[0].scan).image.dataobj)
    here = values[i[0] : i[-1] + 1, j[0] : j[-1] + 1, number].T
    top = np.percentile(np.abs(values[hu != 0]), 99.5)
    assert np.allclose(colours, np.where(expected != 0, np.clip(here / top, -1, 1), 0))


def test_an_empty_map_is_labelled_in_the_figure(tmp_path, masked_cohort):
    ichprog.register_backbone("mean", mean_backbone)
    try:
        name = local_model(
            tmp_path / "negative", "mean", shape=(20, 48, 48), adjust=lambda state: fill_heads(state, -3.0, 0.0)
        )
        drawn = compare_maps({"v": torch_model(name)}, masked_cohort, [("p0", None)], folds=None)
        axis = panels(drawn)[1]
        assert [text.get_text() for text in axis.texts] == ["empty map"]
        assert len(axis.images) == 1
    finally:
        registry.backbones.unregister("mean")


def test_unknown_patients_slices_and_folds_are_refused(bright_model, masked_cohort):
    for chosen, folds in (([("nobody", None)], None), ([("p0", 31)], None), ([("p0", None)], {"p1": 0})):
        with pytest.raises(UnknownNameError):
            compare_maps({"v": torch_model(bright_model)}, masked_cohort, chosen, folds=folds)
