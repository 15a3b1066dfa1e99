"""Dense tasks: regions found voxel by voxel, in the scan's own space, and learned from masks, slices and labels."""

import csv
import errno
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import openvino
import pytest
import torch
from safetensors.torch import save_file
from scipy import special
from torch.nn import functional

import ichprog
from ichprog import heads, networks, preprocessing, registry, testing, zoo
from ichprog.cohort import Cohort
from ichprog.errors import CohortError, PluginError, RunError, SpecError, UnknownNameError
from ichprog.export import export
from ichprog.result_files import prediction_table, results_file
from ichprog.spec import MaskTarget, ModelSpec, PluginRef, Target, Task, VolumeInterval, Weights
from ichprog.train import PRESETS, TrainOptions, grid_cache, train
from ichprog.train.grid_cache import RegionSource

pytestmark = pytest.mark.usefixtures("registered_intensity_backbone")


SHAPE = (12, 32, 32)
VOXEL_MM = (1.5, 1.5, 5.0)
SCAN = (128, 128, 24)
REGIONS = ("dense", "denser")
MASK = MaskTarget("mask", REGIONS, "positive_slices", 1.0)
TASK = Task(
    "lesion", "Whether there is a lesion.", ("absent", "present"), Target("lesion", (1.0,), "high"),
    PluginRef("segmentation", {"top_share": 0.01}), 0.5, 1.0, MASK,
)  # fmt: skip

PROTOCOL = PRESETS["default"].replace(
    epochs=8, warmup_epochs=1, batch_size=4, learning_rate=0.05, validation_fraction=0.3, rotation_prob=0.0
)


@pytest.fixture(scope="module")
def spec():
    base = zoo.find("compact.prognosis_gcs3_age")
    contract = replace(base.input, shape=SHAPE, window=replace(base.input.window, low=0.0, high=100.0))
    weights = Weights(None, None, "", "safetensors", {}, {})
    return replace(
        base, name="intensity.lesion", backbone=PluginRef("intensity", {}), tasks=(TASK,), input=contract,
        weights=weights, golden_output=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def threshold_model(spec, tmp_path_factory):
    """A model that marks cells above 45 HU as region 1 and above 75 HU as region 2."""
    folder = tmp_path_factory.mktemp("models") / "threshold"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec.to_dict()))
    state = networks.build(spec).state_dict()
    # logits: none 0, region 1 is 40 (x - 0.45), region 2 is 80 (x - 0.6), which passes region 1 at 0.75
    state["heads.lesion.voxels.weight"] = torch.tensor([0.0, 40.0, 80.0]).view(3, 1, 1, 1, 1)
    state["heads.lesion.voxels.bias"] = torch.tensor([0.0, -18.0, -48.0])
    save_file(state, folder / "fold0.safetensors")
    return f"local-dir:{folder}"


def brain_with_boxes(*boxes, seed=0):
    """Return HU of a cylinder of brain with boxes of a density, and the mask of the boxes."""
    rows, columns = np.mgrid[: SCAN[0], : SCAN[1]]
    hu = np.zeros(SCAN, np.float32)
    hu[(rows - 64) ** 2 + (columns - 64) ** 2 < 50**2] = 30
    hu += np.random.default_rng(seed).normal(0, 1, SCAN).astype(np.float32) * (hu > 0)
    mask = np.zeros(SCAN, np.uint8)
    for region, density, where in boxes:
        hu[where], mask[where] = density, region
    return hu, mask


def image(values, affine=None):
    return nib.Nifti1Image(values, np.diag([-VOXEL_MM[0], -VOXEL_MM[1], VOXEL_MM[2], 1]) if affine is None else affine)


BOXES = (
    (1, 60.0, np.s_[40:64, 40:64, 8:12]),
    (2, 90.0, np.s_[72:88, 64:88, 14:16]),
)


def test_fractions_of_regions_equal_average_pooling(spec):
    mask = np.random.default_rng(1).integers(0, 3, (50, 41, 17)).astype(np.uint8)
    fractions = preprocessing.prepare_regions(mask, 2, replace(spec.input, pad_slices=False))
    for region in (1, 2):
        own = torch.from_numpy((mask == region).astype(np.float32).transpose(2, 1, 0))[None, None]
        expected = functional.adaptive_avg_pool3d(own, SHAPE)[0, 0].numpy()
        assert np.allclose(fractions[region - 1], expected, atol=1e-6)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_regions_are_found_in_the_space_of_the_scan_and_measured(threshold_model, runtime, tmp_path):
    hu, mask = brain_with_boxes(*BOXES)
    model = ichprog.load_model(threshold_model, runtime=runtime, cache_dir=tmp_path)
    result = ichprog.predict(model, image(hu))["lesion"]
    found = np.asarray(result.segmentation.mask.dataobj)
    voxel_ml = np.prod(VOXEL_MM) / 1000
    for region, name in enumerate(REGIONS, start=1):
        both = 2 * ((found == region) & (mask == region)).sum() / ((found == region).sum() + (mask == region).sum())
        assert both > 0.85  # the rim of the denser region has the density of the other
        assert result.segmentation.volume_ml[name] == pytest.approx((found == region).sum() * voxel_ml)
        assert result.segmentation.volume_ml[name] == pytest.approx((mask == region).sum() * voxel_ml, rel=0.2)
    assert result.segmentation.volume_ml["total"] == pytest.approx((mask > 0).sum() * voxel_ml, rel=0.15)
    assert result.label == "present"
    assert min(result.segmentation.region_probabilities.values()) > 0.4  # the head was not trained to find them
    present = np.array(result.segmentation.slice_probabilities) > 0.5
    assert np.array_equal(np.flatnonzero(present), np.flatnonzero(mask.any((0, 1))))


def test_another_voxel_order_gives_the_same_regions_in_its_own_order(threshold_model):
    model = ichprog.load_model(threshold_model, runtime="torch")
    original = image(brain_with_boxes(*BOXES)[0])
    flipped = original.slicer[::-1, :, ::-1]
    expected = ichprog.predict(model, original)["lesion"].segmentation
    result = ichprog.predict(model, flipped)["lesion"].segmentation
    assert np.array_equal(np.asarray(result.mask.dataobj)[::-1, :, ::-1], np.asarray(expected.mask.dataobj))
    assert np.allclose(result.mask.affine, flipped.affine)
    assert result.slice_probabilities == pytest.approx(expected.slice_probabilities[::-1])
    assert result.volume_ml == pytest.approx(expected.volume_ml)


def test_a_scan_without_a_region_has_no_volume(threshold_model, tmp_path):
    model = ichprog.load_model(threshold_model, runtime="torch")
    prediction = ichprog.predict(model, image(brain_with_boxes()[0]))
    assert prediction["lesion"].label == "absent"
    assert prediction["lesion"].segmentation.volume_ml == {"total": 0, "dense": 0, "denser": 0}
    assert max(prediction["lesion"].segmentation.region_probabilities.values()) < 0.1
    with results_file(tmp_path / "results.csv", prediction_table(model.spec), {"model": model.spec.name}) as file:
        file.add(prediction)
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert row["lesion_total_ml"] == row["lesion_denser_ml"] == "0.0000"
    assert row["notice"].endswith(model.spec.limits[0])
    data = json.loads(json.dumps(prediction.to_dict()))
    assert data["tasks"]["lesion"]["volume_ml"]["total"] == 0
    assert data["provenance"]["limits"] == list(model.spec.limits)


def test_a_label_of_a_dense_task_is_explained(threshold_model, tmp_path):
    hu, mask = brain_with_boxes(*BOXES)
    model = ichprog.load_model(threshold_model, cache_dir=tmp_path)
    saliency = ichprog.explain(model, image(hu), method="guided_backprop")
    values = np.asarray(saliency.image.dataobj)
    assert values[mask > 0].sum() > 0.6 * values.clip(min=0).sum() > 0  # cells reach beyond the lesion


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_exported_network_has_the_regions(threshold_model, format, tmp_path):  # noqa: A002
    model = ichprog.load_model(threshold_model, runtime="torch")
    path = export(model, tmp_path / "out", format=format)
    grids = np.random.default_rng(0).random((2, *SHAPE), np.float32)
    (expected,) = (fold["lesion"] for fold in model.predict_grids(grids))
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(grids[:, None])
    names = {
        "lesion": "probabilities",
        "lesion_voxels": "voxels",
        "lesion_slices": "slices",
        "lesion_regions": "regions",
    }
    assert [output.get_any_name() for output in compiled.outputs] == list(names)
    for name, attribute in names.items():
        assert np.allclose(found[name], getattr(expected, attribute), atol=1e-5)


def test_a_dense_head_keeps_its_contract():
    for labels in (["absent", "present"], ["none", "small", "large"]):
        testing.check_head("segmentation", labels=labels, regions=REGIONS, top_share=0.05)


def test_a_dense_head_that_breaks_its_contract_is_named():
    class Deaf(heads.Segmentation):
        def dense_loss(self, dense, target):
            return self.voxels.weight.square().sum()

    registry.register_head("deaf", lambda channels, labels, *, regions: Deaf(channels, len(labels), len(regions), 0.1))
    try:
        with pytest.raises(PluginError, match="minimising its dense_loss must make the true region"):
            testing.check_head("deaf", regions=REGIONS)
    finally:
        registry.heads.unregister("deaf")


def test_unknown_cells_have_no_influence_and_a_positive_slice_raises_its_evidence():
    torch.manual_seed(0)
    head = heads.segmentation(2, ["absent", "present"], regions=["lesion"], top_share=0.1)
    torch.nn.init.zeros_(head.voxels.weight)  # at first no cell stands out
    features = torch.rand(1, 2, 3, 4, 4)
    unknown = torch.full((1, 1, 3, 4, 4), torch.nan)
    assert head.dense_loss(head.dense(features), unknown).item() == 0
    weak = torch.zeros(1, 1, 3, 4, 4)
    weak[:, :, 1] = -1
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    features[:, 0, 1, 2, 2] = 5.0  # what marks the positive slice
    for _ in range(100):
        optimizer.zero_grad()
        head.dense_loss(head.dense(features), weak).backward()
        optimizer.step()
    dense = head.dense(features)
    assert (dense.slices[0].sigmoid() > 0.5).tolist() == [False, True, False]
    assert int(dense.voxels.softmax(1)[0, 1, 1].argmax()) == 2 * 4 + 2  # the cell that explains the slice


def test_a_region_is_found_in_a_scan_that_holds_it():
    torch.manual_seed(0)
    head = heads.segmentation(2, ["absent", "present"], regions=REGIONS, top_share=0.1)
    features, target = torch.rand(3, 2, 3, 4, 4), torch.zeros(3, 2, 3, 4, 4)
    for region in (0, 1):  # the third scan holds none
        features[region, region, :2, 1:3, 1:3] = 5.0
        target[region, region, :2, 1:3, 1:3] = 1.0
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        head.dense_loss(head.dense(features), target).backward()
        optimizer.step()
    found = head.dense(features).regions.sigmoid() > 0.5
    assert found.tolist() == [[True, False], [False, True], [False, False]]
    partly_known = target.clone()
    partly_known[:, :, 0] = torch.nan  # what lies there might be either region
    head.zero_grad()
    head.dense_loss(head.dense(features), partly_known).backward()
    assert head.region_shift.grad.abs().max() == 0


def test_a_spec_with_a_mask_is_read_as_it_was_written_and_checked(spec):
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert zoo.find("perez2023.prognosis").tasks[0].mask is None
    with pytest.raises(SpecError, match=r"tasks.lesion.mask.regions \['a', 'a'\]"):
        replace(spec, tasks=(replace(TASK, mask=replace(MASK, regions=("a", "a"))),))
    wide, narrow = VolumeInterval(0.0, 0.5, 1.5), VolumeInterval(5.0, 0.8, 1.25)
    intervals = replace(MASK, volume_intervals={"total": (wide, narrow), "denser": (wide,)})
    with_intervals = replace(spec, tasks=(replace(TASK, mask=intervals),))
    assert ModelSpec.from_dict(json.loads(json.dumps(with_intervals.to_dict()))) == with_intervals
    for wrong, message in [
        ({"other": (wide,)}, "Unknown part 'other'"),
        ({"total": (replace(wide, low=2.0),)}, "total: low 2 and high 1.5"),
        ({"total": ()}, r"total: from_ml is \[\]"),
        ({"total": (narrow,)}, r"total: from_ml is \[5.0\]"),
        ({"total": (wide, narrow, narrow)}, r"total: from_ml is \[0.0, 5.0, 5.0\]"),
    ]:
        with pytest.raises(SpecError, match=f"tasks.lesion.mask.volume_intervals.*{message}"):
            replace(spec, tasks=(replace(TASK, mask=replace(MASK, volume_intervals=wrong)),))
    with pytest.raises(SpecError, match="head 'ordinal' does not answer voxel by voxel"):
        networks.build(replace(spec, tasks=(replace(TASK, head=PluginRef("ordinal", {})),)))


def test_the_interval_of_a_volume_follows_from_ratios():
    intervals = (VolumeInterval(0.0, 0.5, 1.5), VolumeInterval(5.0, 0.8, 1.25))
    mask = replace(MASK, volume_intervals={"total": intervals})
    assert mask.volume_interval_ml("total", 0.0) == (0.0, 0.5)
    assert mask.volume_interval_ml("total", 3.0) == (1.0, 5.0)
    assert mask.volume_interval_ml("total", 5.0) == pytest.approx((3.8, 6.5))
    assert mask.volume_interval_ml("total", 19.0) == (15.0, 24.0)
    assert mask.volume_interval_ml("dense", 9.0) is None


@pytest.fixture
def cohort_folder(tmp_path):
    """Twelve patients: half with a lesion, of which two have a mask, two have slice numbers, and two have neither."""
    rows = ["patient,scan,lesion,mask,positive_slices"]
    for number in range(12):
        boxes = [BOXES[number % 4 // 2]] if number % 2 else []
        hu, mask = brain_with_boxes(*boxes, seed=number)
        nib.save(image(hu.astype(np.int16)), tmp_path / f"{number}.nii.gz")
        has_mask, has_slices = number in (1, 3), number in (5, 7)
        if has_mask:
            nib.save(image(mask), tmp_path / f"mask{number}.nii.gz")
        slices = " ".join(map(str, np.flatnonzero(mask.any((0, 1))))) if has_slices else ""
        rows.append(f"p{number},{number}.nii.gz,{number % 2},{f'mask{number}.nii.gz' if has_mask else ''},{slices}")
    (tmp_path / "cohort.csv").write_text("\n".join(rows))
    return tmp_path


def test_training_uses_masks_slices_and_labels(cohort_folder, spec):
    run = train(
        cohort_folder / "cohort.csv", spec, cohort_folder / "run", folds=2, only_folds=[0], protocol=PROTOCOL,
        options=TrainOptions(cache_dir=cohort_folder / "cache"),
    )  # fmt: skip
    log = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    assert float(log[-1]["loss_lesion"]) < 0.9 * float(log[0]["loss_lesion"])
    kinds = [np.load(file) for file in sorted((cohort_folder / "cache/grids").glob("regions-*.npy"))]
    assert sum(bool((each > 0).any()) for each in kinds) == 2  # masks
    assert sum(bool((each == -1).any()) for each in kinds) == 2  # slice numbers
    assert sum(bool(np.isnan(each).all()) for each in kinds) == 2  # the label alone
    assert sum(bool((each == 0).all()) for each in kinds) == 6  # no lesion
    result = ichprog.predict(ichprog.load_model(f"local-dir:{run}", runtime="torch"), cohort_folder / "1.nii.gz")
    assert set(result["lesion"].segmentation.volume_ml) == {"total", *REGIONS}


def test_a_run_with_other_masks_or_slices_is_not_resumed(cohort_folder, spec):
    settings = {
        "folds": 2, "only_folds": [0], "protocol": PROTOCOL.replace(epochs=1, warmup_epochs=0),
        "options": TrainOptions(cache_dir=cohort_folder / "cache"),
    }  # fmt: skip
    arguments = (cohort_folder / "cohort.csv", spec, cohort_folder / "run")
    run = train(*arguments, **settings)
    assert train(*arguments, **settings, resume=True) == run
    first, second = (cohort_folder / f"mask{number}.nii.gz" for number in (1, 3))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(RunError, match=r"holds another run: regions\.lesion was"):
        train(*arguments, **settings, resume=True)
    first.write_bytes(content)
    table = (cohort_folder / "cohort.csv").read_text()
    (cohort_folder / "cohort.csv").write_text(table.replace("8 9 10 11", "8 9 10"))
    with pytest.raises(RunError, match=r"holds another run: regions\.lesion was"):
        train(*arguments, **settings, resume=True)
    (cohort_folder / "cohort.csv").write_text(table)
    train(*arguments, **settings, resume=True)


def test_a_full_disk_is_reported_while_regions_are_cached(cohort_folder, spec, monkeypatch):
    def full(file, fractions):
        raise OSError(errno.ENOSPC, "No space left on device")

    scan = cohort_folder / "1.nii.gz"
    monkeypatch.setattr(grid_cache.np, "save", full)
    with pytest.raises(RunError, match=r"cannot be cached in .*grids: .*No space left on device\. Free some space"):
        grid_cache.prepare_regions(
            [RegionSource(scan, cohort_folder / "mask1.nii.gz", None)], spec.input, 2, folder=cohort_folder / "grids"
        )
    assert not list((cohort_folder / "grids").glob("*.npy"))


def test_a_named_column_of_masks_must_exist(cohort_folder, spec):
    table = (cohort_folder / "cohort.csv").read_text()
    (cohort_folder / "cohort.csv").write_text(table.replace("lesion,mask,", "lesion,outline,"))
    (cohort_folder / "masks").mkdir()
    (cohort_folder / "mask1.nii.gz").rename(cohort_folder / "masks" / "p1.nii.gz")
    with pytest.raises(UnknownNameError, match=r"Unknown column of .*cohort\.csv 'mask'"):
        train(cohort_folder / "cohort.csv", spec, cohort_folder / "run", folds=2, protocol=PROTOCOL)


def test_slice_numbers_and_regions_that_do_not_exist_are_refused(cohort_folder, spec):
    table = (cohort_folder / "cohort.csv").read_text()
    assert Cohort.read(cohort_folder / "cohort.csv").slices("positive_slices")[5] == (8, 9, 10, 11)
    (cohort_folder / "cohort.csv").write_text(table.replace("8 9 10 11", "8 9 10 99"))
    with pytest.raises(CohortError, match="slice 99 does not exist; there are 24"):
        train(cohort_folder / "cohort.csv", spec, cohort_folder / "run", folds=2, protocol=PROTOCOL)
    (cohort_folder / "cohort.csv").write_text(table.replace("8 9 10 11", "eight"))
    with pytest.raises(CohortError, match=r"row 7 .*column positive_slices is eight. Expected slice numbers"):
        train(cohort_folder / "cohort.csv", spec, cohort_folder / "run", folds=2, protocol=PROTOCOL)
    (cohort_folder / "cohort.csv").write_text(table)
    fewer = replace(spec, tasks=(replace(TASK, mask=replace(MASK, regions=("dense",))),))
    with pytest.raises(CohortError, match="the mask has region 2; the task has regions 1 to 1"):
        train(cohort_folder / "cohort.csv", fewer, cohort_folder / "run", folds=2, protocol=PROTOCOL)


def test_the_overlap_counts_every_grid_alike_and_the_kinds_count_every_region_alike():
    torch.manual_seed(0)
    head = heads.segmentation(2, ["absent", "present"], regions=REGIONS, top_share=0.1)
    dense = head.dense(3 * torch.randn(2, 2, 6, 20, 20))
    target = torch.zeros(2, 2, 6, 20, 20)
    target[0, 0, :4] = 1  # a large region in the first grid, a small one of the other kind in the second
    target[1, 1, 2, :10, :10] = 1
    logits = dense.voxels.detach().double().numpy()
    inside = target.numpy()

    head.loss_weights = heads.DenseLossWeights(cells=0, dice=1, kinds=0, slices=0, regions=0)
    blood, filled = 1 - special.softmax(logits, axis=1)[:, 0], inside.sum(1)
    dice = [(2 * (p * f).sum() + 10) / (p.sum() + f.sum() + 10) for p, f in zip(blood, filled, strict=True)]
    assert head.dense_loss(dense, target).item() == pytest.approx(1 - np.mean(dice), rel=1e-4)

    head.loss_weights = heads.DenseLossWeights(cells=0, dice=0, kinds=1, slices=0, regions=0)
    surprise = -special.log_softmax(logits[:, 1:], axis=1)
    of_regions = [surprise[:, k][inside[:, k] == 1].mean() for k in range(2)]
    assert abs(of_regions[0] - of_regions[1]) > 0.1  # so that a mean over cells differs
    assert head.dense_loss(dense, target).item() == pytest.approx(np.mean(of_regions), rel=0.01)
