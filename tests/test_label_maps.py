"""Label maps of saliency maps, and the viewer in a notebook."""

import dataclasses
import gzip
import json
import sys

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

import ichprog
from ichprog import IchprogError, InvalidValueError
from ichprog.cli import main

from support.phantoms import brain_hu


@pytest.fixture
def scan(tmp_path):
    """Return a scan whose voxels are stored in another order than that of the network."""
    path = tmp_path / "scan.nii.gz"
    image = nib.Nifti1Image(brain_hu((96, 96, 30)), np.diag([-2.5, -2.5, 5, 1]))
    image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])).to_filename(path)
    return path


@pytest.fixture
def saliency(bright_model, scan):
    model = ichprog.load_model(bright_model, runtime="torch")
    return ichprog.explain(model, scan, method="guided_backprop", brain="given")


def strongest(values, brain, percent):
    """Return the labels of a map, voxel by voxel."""
    inside = sorted((abs(v) for v, b in zip(values.flat, brain.flat, strict=True) if b), reverse=True)
    least = inside[-(-len(inside) * percent // 100) - 1]
    labels = [
        0 if not b or v == 0 or abs(v) < least else 1 if v > 0 else 2
        for v, b in zip(values.flat, brain.flat, strict=True)
    ]
    return np.reshape(labels, values.shape)


@pytest.mark.parametrize("percent", [1, 20, 100])
def test_labels_are_the_strongest_voxels_of_the_brain(saliency, scan, percent):
    signed = dataclasses.replace(saliency, grid_map=saliency.grid_map - saliency.grid_map.mean())
    brain = np.asarray(nib.load(scan).dataobj) != 0
    image = signed.labels(percent)
    labels = np.asarray(image.dataobj)
    assert np.array_equal(labels, strongest(np.asarray(signed.image.dataobj), brain, percent))
    assert np.allclose(image.affine, nib.load(scan).affine)
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert (labels > 0).sum() >= brain.sum() * percent / 100 * 0.99


def test_an_empty_map_has_no_labels(saliency):
    empty = dataclasses.replace(saliency, grid_map=saliency.grid_map * 0)
    assert not np.asarray(empty.labels(5).dataobj).any()


@pytest.mark.parametrize("percent", [0, -1, 101, float("nan")])
def test_a_percentage_outside_the_range_is_refused(saliency, percent):
    with pytest.raises(InvalidValueError, match="above 0 and at most 100"):
        saliency.labels(percent)


def test_the_command_writes_label_maps_that_say_what_they_are(bright_model, scan, tmp_path):
    arguments = ["explain", str(scan), "-m", bright_model, "--runtime", "torch", "--brain", "given"]
    arguments += ["-o", str(tmp_path / "maps"), "--labels", "5"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    image = nib.load(written["labels"])
    assert image.get_data_dtype() == np.uint8
    assert image.header.get_intent()[0] == "label"
    assert image.header["descrip"].item().decode().startswith("5% strongest, 1 raises 2 lowers: guided_backprop of")
    inside = np.asarray(nib.load(scan).dataobj) != 0
    labels = np.asarray(image.dataobj)
    assert 0 < (labels > 0).sum() <= np.ceil(inside.sum() * 0.05) * 1.01
    assert not labels[~inside].any()
    again = CliRunner().invoke(main, [*arguments, "--resume"])
    assert "1 of 1 scans have their maps" in again.stderr
    nib.load(written["labels"])
    (tmp_path / "maps" / written["labels"]).unlink()
    assert "0 of 1 scans have their maps" in CliRunner().invoke(main, [*arguments, "--resume"]).stderr


def test_maps_of_other_settings_are_not_resumed(bright_model, scan, tmp_path):
    arguments = ["explain", str(scan), "-m", bright_model, "--runtime", "torch", "--brain", "given"]
    arguments += ["-o", str(tmp_path / "maps")]
    for more in ([], ["--resume", "--labels", "5"], ["--resume", "--method", "grad_cam"], ["--resume"]):
        assert CliRunner().invoke(main, [*arguments, *more]).exit_code == 0
    for more, said in ((["--labels", "6"], "labels was 5.0, is 6.0"), (["--label", "good"], "label was None, is good")):
        refused = CliRunner().invoke(main, [*arguments, "--resume", *more])
        assert refused.exit_code == 1
        assert said in refused.stderr
        assert "Choose another folder" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--labels", "6"]).exit_code == 0
    for damaged in ("{", "[1]", "7"):
        (tmp_path / "maps" / ".explain.json").write_text(damaged)
        refused = CliRunner().invoke(main, [*arguments, "--resume"])
        assert refused.exit_code == 1
        assert "explain.json is damaged" in refused.stderr


def decode(layer):
    return nib.Nifti1Image.from_bytes(gzip.decompress(layer.data))


def test_the_viewer_has_the_scan_the_map_and_masks_as_layers(saliency, scan):
    ipyniivue = pytest.importorskip("ipyniivue", reason="the viewer needs ipyniivue")
    mask = nib.Nifti1Image((nib.load(scan).get_fdata() > 60).astype(np.uint8), nib.load(scan).affine)
    widget = saliency.view(masks={"blood": mask})
    assert isinstance(widget, ipyniivue.NiiVue)
    ct, heat, blood = widget.volumes
    assert [layer.name for layer in widget.volumes] == [
        "CT.nii.gz", "guided_backprop of prognosis poor, bright.prognosis_gcs3_age.nii.gz", "blood.nii.gz",
    ]  # fmt: skip
    assert np.array_equal(np.asarray(decode(ct).dataobj), np.asarray(nib.load(scan).dataobj))
    assert np.allclose(decode(heat).get_fdata(), saliency.image.get_fdata())
    assert np.array_equal(np.asarray(decode(blood).dataobj), np.asarray(mask.dataobj))
    assert heat.cal_max == pytest.approx(
        np.percentile(np.abs(saliency.image.get_fdata()[nib.load(scan).get_fdata() != 0]), 99.5), rel=1e-5
    )
    (again, *_) = saliency.view(scan).volumes
    assert np.array_equal(np.asarray(decode(again).dataobj), np.asarray(decode(ct).dataobj))


def test_a_viewer_without_ipyniivue_names_the_extra(saliency, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(IchprogError, match=r"pip install 'ichprog\[notebook\]'"):
        saliency.view()


def test_a_map_of_a_checked_scan_needs_the_scan_to_be_viewed(bright_model, scan):
    model = ichprog.load_model(bright_model, runtime="torch")
    saliency = ichprog.explain(model, model.load_scan(scan, brain="given"))
    with pytest.raises(InvalidValueError, match="checked Scan"):
        saliency.view()
