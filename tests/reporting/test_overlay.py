"""Overlays: the drawn arrays equal the maps and the scan."""

import dataclasses
import sys

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import IchprogError, ScanError
from ichprog.results import ClinicalUse

from support.phantoms import brain_hu


@pytest.fixture
def explained(bright_model, tmp_path):
    """Return a scan that is not in LPS order, its maps and its prediction."""
    path = tmp_path / "scan.nii.gz"
    turned = nib.Nifti1Image(brain_hu((96, 96, 30))[::-1, ::-1], np.diag([2.5, 2.5, 5, 1]))  # RAS
    turned.to_filename(path)
    model = ichprog.load_model(bright_model)
    maps = ichprog.explain(model, path, task=["prognosis", "gcs"], method=["guided_backprop"])
    return path, maps, ichprog.predict(model, path)


def slice_axes(figure):
    """Return the axes of all slices, without the colour bar."""
    return [axis for axis in figure.get_axes() if axis.get_label() != "<colorbar>"]


def drawn(figure, width):
    """Return the images of each row of slices."""
    axes = slice_axes(figure)
    return [[a.images for a in axes[i : i + width]] for i in range(0, len(axes), width)]


def test_a_row_for_the_scan_and_one_for_each_map(explained):
    path, maps, prediction = explained
    figure = ichprog.plot(maps, path, prediction=prediction, slices=3)
    scan_row, *map_rows = drawn(figure, 3)
    assert [len(images) for images in scan_row] == [1, 1, 1]
    assert len(map_rows) == 2
    assert all(len(images) == 2 for row in map_rows for images in row)
    title = figure.get_suptitle()
    assert f"poor {prediction['prognosis'].probabilities['poor']:.2f}" in title
    assert "research only" in title


def test_the_patients_left_is_on_the_right_and_the_map_covers_the_blood(explained):
    """The haematoma of the simulated brain is on the patient's left, in column 330 of 512."""
    path, maps, _ = explained
    saliency = maps["prognosis", "guided_backprop"]
    figure = ichprog.plot(saliency, path, slices=1)
    background, overlay = drawn(figure, 1)[1][0]
    picture, colours = np.asarray(background.get_array()), np.asarray(overlay.get_array())
    assert picture.shape == colours.shape
    blood = np.argwhere(picture > 60).mean(0)
    brain = np.argwhere(picture > 0).mean(0)
    assert blood[1] > brain[1] + 5
    assert np.abs(colours).max() <= 1
    strongest = np.argwhere(np.abs(colours) > 0.5 * np.abs(colours).max()).mean(0)
    assert np.hypot(*(strongest - blood)) < 12


def test_an_outline_is_drawn_if_one_is_given(explained):
    path, maps, _ = explained
    mask = nib.Nifti1Image((np.asarray(nib.load(path).dataobj) == 68).astype(np.uint8), nib.load(path).affine)
    plain, lined = (ichprog.plot(maps, path, outline=o, slices=2) for o in (None, mask))
    assert not any(a.collections for a in slice_axes(plain))
    assert any(a.collections for a in slice_axes(lined))


def test_an_empty_map_is_labelled_instead_of_drawn(explained):
    path, maps, _ = explained
    saliency = next(iter(maps.values()))
    empty = dataclasses.replace(saliency, grid_map=np.zeros_like(saliency.grid_map), empty=True)
    figure = ichprog.plot(empty, path, slices=2)
    assert "empty map" in [text.get_text() for axis in figure.get_axes() for text in axis.texts]
    assert all(len(images) == 1 for images in drawn(figure, len(figure.get_axes()) // 2)[1])


def test_a_map_of_another_scan_is_refused(explained):
    _, maps, _ = explained
    other = nib.Nifti1Image(brain_hu((64, 64, 20)), np.diag([-3.8, -3.8, 5, 1]))
    with pytest.raises(ScanError, match="belongs to another scan") as error:
        ichprog.plot(maps, other)
    assert error.value.code == "other-scan"


def test_a_missing_matplotlib_names_the_extra_to_install(explained, monkeypatch):
    path, maps, _ = explained
    monkeypatch.delitem(sys.modules, "ichprog.reporting.notebook_figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IchprogError, match=r"needs matplotlib. Install it with: pip install 'ichprog\[report\]'\."):
        ichprog.plot(maps, path)


def test_one_voxel_does_not_set_the_scale_and_nothing_is_drawn_outside_the_brain(explained):
    path, maps, _ = explained
    saliency = maps["prognosis", "guided_backprop"]
    grid = np.random.default_rng(0).random(saliency.grid_map.shape).astype(np.float32)
    grid[grid.shape[0] // 2, grid.shape[1] // 2, grid.shape[2] // 2] = 1000
    figure = ichprog.plot(dataclasses.replace(saliency, grid_map=grid), path, slices=1)
    background, overlay = drawn(figure, 1)[1][0]
    picture, colours = np.asarray(background.get_array()), np.asarray(overlay.get_array())
    assert np.median(colours[picture > 0]) > 0.3
    assert not colours[picture == 0].any()


def test_sides_and_scale_are_labelled(explained):
    path, maps, _ = explained
    figure = ichprog.plot(maps, path, slices=2)
    assert {"R", "L", "50 mm"} <= {text.get_text() for text in slice_axes(figure)[0].texts}
    (bar,) = [axis for axis in figure.get_axes() if axis.get_label() == "<colorbar>"]
    assert bar.get_ylabel() == "scaled by percentile 99.5 in the brain"


def test_clinical_values_are_bars_with_their_changes(explained):
    path, maps, prediction = explained
    use = ClinicalUse({"age": 71.0, "gcs": 9.0}, (), {"prognosis": {"age": 0.5, "gcs": -0.25}})
    figure = ichprog.plot(maps, path, prediction=dataclasses.replace(prediction, clinical=use), slices=2)
    axis = figure.get_axes()[-1]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["prognosis: age 71", "prognosis: gcs 9"]
    assert [bar.get_width() for bar in axis.patches] == [0.5, -0.25]
    assert {"+0.50", "-0.25"} <= {text.get_text() for text in axis.texts}
