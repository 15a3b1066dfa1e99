"""Predictions and saliency maps of head CTs, compared with the published pipeline."""

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import weakref
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import ichprog
from ichprog import InvalidValueError, PluginError, ScanError, UnknownNameError, WeightsError, registry

from support import reference_pipeline
from support.models import REPOSITORY, SHARED
from support.phantoms import brain_hu


def each_runtime():
    """Yield every published model in both runtimes. A DenseNet takes long, so most are slow tests.

    The quick ones in torch are one network of each kind: multi-task, plain with one and with two outputs, and Perez.
    """
    quick = {
        "openvino": ("densenet121.prognosis_gcs3_age", "perez2023.prognosis"),
        "torch": ("densenet121.prognosis_gcs3_age", "densenet121.age", "densenet121.gcs3", "perez2023.prognosis"),
    }
    for name in reference_pipeline.PUBLISHED:
        for runtime, names in quick.items():
            yield pytest.param(name, runtime, marks=() if name in names else pytest.mark.slow)


@pytest.mark.parametrize(("name", "runtime"), list(each_runtime()))
def test_equals_the_published_pipeline(name, runtime, hub_root, hub_server, scan_path):
    """Compare the Hub client and the pipeline of ichprog with MONAI's pipeline and the published network."""
    seed = reference_pipeline.publish(name, hub_root / REPOSITORY.repo)
    model = ichprog.load_model(name, fold=0, runtime=runtime)
    got = ichprog.predict(model, scan_path)
    theirs = reference_pipeline.network(name, seed)
    with torch.no_grad():
        logits = theirs(reference_pipeline.grid(scan_path)[None])
    for task, expected in reference_pipeline.probabilities(name, logits).items():
        found = list(got[task].probabilities.values())
        assert np.abs(found - expected).max() < 1e-4
        assert np.abs(expected - 1 / len(expected)).max() > 0.02, "seeded weights must give distinct probabilities"
        assert sum(found) == pytest.approx(1)


@pytest.fixture(scope="module")
def orders():
    """Return a small asymmetric scan in all 48 voxel orders."""
    hu = brain_hu((100, 110, 26), lesion=(350, 150, 20))
    affine = np.diag([-2.0, -2.0, 5.0, 1.0])
    affine[:3, 3] = (90, 120, -40)
    base = nib.Nifti1Image(hu, affine)
    return [
        base.as_reoriented(np.array(list(zip(axes, flips, strict=True))))
        for axes in itertools.permutations(range(3))
        for flips in itertools.product((1, -1), repeat=3)
    ]


def test_every_voxel_order_gives_the_same_prediction_and_map(bright_model, orders):
    model = ichprog.load_model(bright_model)
    first, *others = orders
    answer = ichprog.predict(model, first)
    there = ichprog.explain(model, first).image
    assert len(orders) == 48
    for image in others:
        assert ichprog.predict(model, image).tasks == answer.tasks
    for image in others[::5]:
        back = ichprog.explain(model, image).image
        assert back.shape == image.shape
        assert np.allclose(back.affine, image.affine)
        to_first = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.io_orientation(first.affine))
        assert np.array_equal(back.as_reoriented(to_first).get_fdata(), there.get_fdata())


@pytest.mark.parametrize("method", registry.saliency.names())
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_lesion_is_explained_in_its_place_and_on_its_side(method, side, bright_model, tmp_path):
    """The lesion is placed in mm, and the file is in RAS order."""
    lesion_lps = (360, 200, 20) if side == "left" else (152, 200, 20)
    hu = brain_hu((128, 128, 30), lesion=lesion_lps)
    image = nib.Nifti1Image(hu, np.diag([-1.9, -1.9, 5.0, 1.0])).as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    image.to_filename(tmp_path / "scan.nii.gz")
    saliency = ichprog.explain(bright_model, tmp_path / "scan.nii.gz", method=method)
    assert not saliency.empty
    values = np.asarray(saliency.image.dataobj)
    peak = nib.affines.apply_affine(saliency.image.affine, np.unravel_index(values.argmax(), values.shape))
    blood = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == 68))
    assert np.linalg.norm(peak - blood.mean(0)) < np.ptp(blood, axis=0).max() / 2 + 6
    middle = nib.affines.apply_affine(image.affine, (63.5, 63.5, 15))[0]
    assert (peak[0] < middle) == (side == "left")
    assert saliency.provenance["grid_shape"] == list(saliency.grid_map.shape)
    assert saliency.grid_map.shape == ((10, 32, 32) if method == "grad_cam" else (20, 96, 96))


def test_the_map_of_the_other_label_has_the_opposite_sign(bright_model, scan_path):
    model = ichprog.load_model(bright_model)
    poor = ichprog.explain(model, scan_path, method="grad_cam")
    good = ichprog.explain(model, scan_path, method="grad_cam", label="good")
    assert (poor.label, good.label) == ("poor", "good")
    assert np.allclose(poor.grid_map, -good.grid_map)


def test_tasks_and_methods_share_one_forward_pass_per_fold(bright_model, scan_path):
    model = ichprog.load_model(bright_model, runtime="torch")
    scan = model.load_scan(scan_path)
    runs = []
    hooks = [m.network.backbone.register_forward_hook(lambda *_: runs.append(1)) for m in model.fold_runtimes]
    methods = ["guided_backprop", "grad_cam", "guided_grad_cam"]
    found = ichprog.explain(model, scan, task=["prognosis", "gcs", "age"], method=methods, layer="features.1")
    for hook in hooks:
        hook.remove()
    assert list(found) == list(itertools.product(["prognosis", "gcs", "age"], methods))
    assert len(runs) == len(model.weights) == 2
    alone = ichprog.explain(model, scan, task="gcs", method="grad_cam", layer="features.1")
    assert np.allclose(alone.grid_map, found["gcs", "grad_cam"].grid_map)
    assert all(not m._forward_hooks for member in model.fold_runtimes for m in member.network.modules())


def test_a_list_of_one_task_returns_a_dict(bright_model, scan_path):
    assert list(ichprog.explain(bright_model, scan_path, task=["age"])) == [("age", "guided_backprop")]


def test_explain_works_inside_no_grad_and_keeps_the_gradient_mode(bright_model, scan_path):
    model = ichprog.load_model(bright_model)
    with torch.no_grad():
        inside = ichprog.explain(model, scan_path)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inference = ichprog.explain(model, scan_path)
    assert np.array_equal(inside.grid_map, inference.grid_map)
    assert not inside.empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "prognosys"}, "Unknown task of .* 'prognosys'.*Did you mean prognosis"),
        ({"label": "bad"}, "Unknown label of prognosis 'bad'.*good, poor"),
        ({"task": ["prognosis", "age"], "label": "poor"}, "a label for each task"),
        ({"method": "gradcam"}, "Unknown saliency method 'gradcam'.*Did you mean grad_cam"),
        ({"method": "grad_cam", "layers": "x"}, "Unknown option of grad_cam 'layers'.*Did you mean layer"),
        ({"method": "grad_cam", "layer": "features.9"}, "Unknown layer 'features.9'"),
        ({"brain": "maybe"}, "Unknown brain mode or extractor 'maybe'.*auto, extract, given, morphology"),
    ],
)
def test_unknown_names_are_refused_with_suggestions(arguments, message, bright_model, scan_path):
    with pytest.raises(UnknownNameError, match=message):
        ichprog.explain(bright_model, scan_path, **arguments)


def test_the_error_of_a_broken_method_names_it(bright_model, scan_path):
    ichprog.register_saliency("flat", lambda score, grid, network: grid[0, 0, 0])
    try:
        with pytest.raises(PluginError, match=r"saliency method 'flat' breaks its contract.*shape \(96, 96\)"):
            ichprog.explain(bright_model, scan_path, method="flat")
    finally:
        registry.saliency.unregister("flat")


def test_an_empty_map_is_marked_as_empty(bright_model):
    hu = brain_hu((64, 64, 30))
    image = nib.Nifti1Image(np.where(hu == 68, 33, hu), np.diag([-3.8, -3.8, 5, 1]))
    assert ichprog.explain(bright_model, image).empty
    assert not ichprog.explain(bright_model, nib.Nifti1Image(hu, image.affine)).empty


def test_folds_are_averaged_in_probability_with_their_spread(hub_server, scan_path):
    both = ichprog.predict(ichprog.load_model("perez2023.prognosis"), scan_path)["prognosis"]
    each = [
        ichprog.predict(ichprog.load_model("perez2023.prognosis", fold=fold), scan_path)["prognosis"] for fold in (0, 1)
    ]
    poor = [p.probabilities["poor"] for p in each]
    assert both.probabilities["poor"] == pytest.approx(np.mean(poor))
    assert both.std["poor"] == pytest.approx(np.std(poor, ddof=1))
    assert both.std["poor"] > 0
    assert each[0].std is None
    with pytest.raises(UnknownNameError, match=r"Unknown fold of .*Expected one of: 0, 1"):
        ichprog.load_model("perez2023.prognosis", fold=7)


def test_a_filled_cache_gives_the_same_prediction_offline(hub_server, scan_path, monkeypatch):
    online = ichprog.predict(ichprog.load_model("perez2023.prognosis"), scan_path).to_dict()
    requests = len(hub_server.requests)
    again = ichprog.predict(ichprog.load_model("perez2023.prognosis"), scan_path).to_dict()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline = ichprog.predict(ichprog.load_model("perez2023.prognosis", offline=True), scan_path).to_dict()
    assert online == again == offline
    assert len(hub_server.requests) == requests


def test_the_error_without_network_and_cache_names_the_fetch_command():
    with pytest.raises(WeightsError, match=r"Baseline_Perez_et_al.*ichprog fetch perez2023\.prognosis"):
        ichprog.load_model("perez2023.prognosis", offline=True)


def load_and_predict(arguments):
    model, scan = arguments
    return ichprog.predict(model, scan).to_dict()


def test_several_processes_load_one_model_at_once(hub_server, scan_path):
    with get_context("spawn").Pool(3) as pool:
        first, *others = pool.map(load_and_predict, [("perez2023.prognosis", str(scan_path))] * 3)
    assert all(other == first for other in others)
    assert len(hub_server.requests_with("GET /" + REPOSITORY.repo + "/resolve")) == 2  # one for each fold


def test_lists_return_lists_and_iterables_return_iterators(bright_model, scan_path):
    model = ichprog.load_model(bright_model)
    scan = model.load_scan(scan_path)
    assert isinstance(ichprog.predict(model, scan), ichprog.Prediction)
    assert [p.scan for p in ichprog.predict(model, [scan, scan])] == [scan.name] * 2
    taken = []

    def scans():
        for number in itertools.count():
            taken.append(number)
            yield scan

    answers = ichprog.predict(model, scans())
    assert taken == []
    next(answers)
    next(answers)
    assert taken == [0, 1, 2]  # one is read ahead


def test_a_garbage_collection_in_the_reading_thread_may_close_the_predictions(bright_model, scan_path):
    """Python may collect an abandoned iterator in any thread, also in the one that the iterator started."""
    reads, read = [], threading.Event()

    def extract(hu, spacing_mm):
        reads.append(hu)
        if len(reads) == 2:
            abandoned.wait(60)
            gc.collect()
            read.set()
        return hu > 0

    abandoned, extractor = threading.Event(), ichprog.scan.BrainExtractor("slow", extract, "tests")
    answers = ichprog.predict(ichprog.load_model(bright_model), itertools.repeat(scan_path), brain=extractor)
    next(answers)
    cycle = [answers]
    cycle.append(cycle)
    finalized = weakref.ref(answers)
    gc.disable()  # until the reading thread collects
    try:
        del answers, cycle
        abandoned.set()
        assert read.wait(60)
    finally:
        gc.enable()
    assert finalized() is None


def test_memory_does_not_grow_with_the_number_of_scans(bright_model, tmp_path):
    import tracemalloc

    image = tmp_path / "scan.nii.gz"
    nib.Nifti1Image(brain_hu((64, 64, 30)), np.diag([-3.8, -3.8, 5, 1])).to_filename(image)
    model = ichprog.load_model(bright_model)
    ichprog.predict(model, image)
    peaks = []
    for count in (2, 12):
        tracemalloc.start()
        for _ in ichprog.predict(model, (image for _ in range(count))):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.1


def test_recorded_errors_do_not_stop_other_scans(bright_model, scan_path, tmp_path):
    (tmp_path / "empty.nii.gz").touch()
    sources = [tmp_path / "empty.nii.gz", scan_path, tmp_path / "none.nii.gz"]
    empty, good, none = ichprog.predict(bright_model, sources, on_error="record")
    assert (empty.error["code"], none.error["code"]) == ("unreadable", "not-found")
    assert good.error is None
    assert json.loads(json.dumps(empty.to_dict()))["error"]["message"].endswith("the file is empty. Copy it again.")
    with pytest.raises(ScanError, match="has no prediction"):
        empty["prognosis"]
    with pytest.raises(ScanError):
        ichprog.predict(bright_model, sources)
    with pytest.raises(InvalidValueError, match=r"Invalid on_error .*Expected 'raise' or 'record'"):
        ichprog.predict(bright_model, sources, on_error="ignore")


@pytest.mark.compiled
def test_a_prediction_records_its_provenance(hub_server, scan_path):
    prediction = ichprog.predict("perez2023.prognosis", scan_path)
    data = json.loads(json.dumps(prediction.to_dict()))
    assert list(data) == ["scan", "model", "tasks", "warnings", "provenance"]
    assert list(data["tasks"]["prognosis"]) == ["label", "probabilities", "logits", "std"]
    provenance = data["provenance"]
    assert provenance["model"] == "perez2023.prognosis"
    for fold, weights in enumerate(provenance["weights"]):
        assert weights["source"].startswith(f"hf-hub:{REPOSITORY.repo}/Baseline_Perez_et_al/")
        assert weights["source"].endswith(f"_fold{fold}.pth@{REPOSITORY.revision}")
        assert len(weights["sha256"]) == len(weights["source_sha256"]) == 64
    assert provenance["preprocessing"]["window"] == {"low": 15.0, "high": 100.0, "above": "zero"}
    assert provenance["scan"]["brain"] == "given"
    assert provenance["scan"]["brain_ml"] > 500
    # a build for CUDA adds "+cu130" to one of them
    assert provenance["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (provenance["runtime"], provenance["device"], provenance["precision"]) == ("openvino", "cpu", "float32")
    assert provenance["fallback_reason"] is None
    assert "research" in provenance["notice"]


def test_bfloat16_is_near_float32(bright_model, scan_path):
    exact = ichprog.predict(ichprog.load_model(bright_model), scan_path)
    rounded = ichprog.predict(ichprog.load_model(bright_model, runtime="torch", precision="bfloat16"), scan_path)
    for task in exact.tasks:
        for label, probability in exact[task].probabilities.items():
            assert rounded[task].probabilities[label] == pytest.approx(probability, abs=0.01)
    assert rounded["prognosis"].logits != exact["prognosis"].logits
    assert rounded.provenance["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "Unknown device 'gpu'.*auto, cpu"),
        ({"runtime": "onnx"}, "Unknown runtime 'onnx'"),
        ({"precision": "float16"}, "Unknown precision 'float16'.*Did you mean .*float"),
        ({"name": "densenet121.prognosis_gcs4_age"}, "Did you mean densenet121.prognosis_gcs3_age"),
        ({"name": "weights/model"}, "local-dir:"),
        ({"name": "./weights"}, "hf-hub:"),
    ],
)
def test_unknown_choices_are_refused_with_suggestions(arguments, message):
    with pytest.raises(UnknownNameError, match=message):
        ichprog.load_model(**{"name": "perez2023.prognosis", **arguments})


@pytest.mark.skipif(not (SHARED / "head_ct_ge_dicom.zip").exists(), reason="the real head CT is not here")
def test_a_real_head_ct_is_predicted_and_explained(hub_server, tmp_path):
    """DICOM of a whole, tilted head: extraction, straightening and the map in the straightened scan's space."""
    model = ichprog.load_model("densenet121.prognosis_gcs3_age", runtime="torch")
    scan = model.load_scan(SHARED / "head_ct_ge_dicom.zip")
    prediction = ichprog.predict(model, scan)
    assert prediction.provenance["scan"]["brain"] == "extracted"
    assert 1000 < prediction.provenance["scan"]["brain_ml"] < 1700
    assert {"gantry-tilt", "uneven-slices", "no-blood"} <= {warning.code for warning in prediction.warnings}
    saliency = ichprog.explain(model, scan, method="grad_cam")
    assert saliency.grid_map.shape == (1, 9, 9)
    path = saliency.save(tmp_path / "map.nii.gz")
    written = nib.load(path)
    assert written.shape == scan.source_shape
    assert np.allclose(written.affine, scan.source_affine, atol=1e-4)
    mask = ichprog.brain_mask(SHARED / "head_ct_ge_dicom.zip")
    assert mask.shape == written.shape
    assert np.asarray(mask.dataobj).sum() * abs(np.linalg.det(mask.affine)) / 1000 == pytest.approx(
        prediction.provenance["scan"]["brain_ml"], rel=0.01
    )


def test_a_dead_endpoint_fails_quickly(tmp_path):
    """Use a new process, an empty cache and an endpoint that does not respond."""
    import time

    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "ICHPROG_CACHE": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        "import time, ichprog.hub as h; t = time.time()\ntry: h.fetch('perez2023.prognosis')\n"
        "except Exception as e: print(type(e).__name__, time.time() - t)",
    ]
    started = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kind, seconds = done.stdout.split()
    assert kind == "HubUnreachableError"
    assert float(seconds) < 5
    assert time.time() - started < 30


def test_importing_needs_no_network_and_no_heavy_library():
    code = "import sys, ichprog, ichprog.zoo; ichprog.list_models(); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "monai", "openvino", "numpy", "nibabel", "huggingface_hub"} & set(loaded)
    assert Path(ichprog.__file__).name == "__init__.py"


def test_a_prediction_is_a_mapping_of_its_tasks(bright_model, scan_path):
    prediction = ichprog.predict(bright_model, scan_path)
    assert list(prediction) == ["prognosis", "gcs", "age"]
    assert dict(prediction) == dict(prediction.items()) == dict(prediction.tasks)
    assert "gcs" in prediction
    assert "gcz" not in prediction
    with pytest.raises(UnknownNameError, match="Did you mean gcs"):
        prediction["gcz"]
    assert prediction["gcs"].to_dict() == prediction.to_dict()["tasks"]["gcs"]


def test_predictions_become_a_table(bright_model, scan_path, tmp_path):
    predictions = ichprog.predict(bright_model, [scan_path, tmp_path / "none.nii.gz"], on_error="record")
    table = ichprog.to_frame(predictions)
    assert list(table["status"]) == ["ok", "failed"]
    assert table["prognosis_poor"][0] == predictions[0]["prognosis"].probabilities["poor"]
    assert table["error_code"][1] == "not-found"
    assert len(ichprog.to_frame(predictions[0])) == 1


def test_saving_a_map_refuses_another_suffix(bright_model, scan_path, tmp_path):
    saliency = ichprog.explain(bright_model, scan_path)
    with pytest.raises(InvalidValueError, match=r"Invalid file name of a map .*\.nii\.gz"):
        saliency.save(tmp_path / "map.png")


def test_one_fold_of_a_model_predicts_as_that_fold(bright_model, scan_path):
    model = ichprog.load_model(bright_model)
    outputs = [ichprog.predict(model.fold(fold), scan_path)["gcs"].logits for fold in (0, 1)]
    assert ichprog.predict(model, scan_path)["gcs"].logits == pytest.approx(np.mean(outputs, 0))
    assert repr(model.fold(1)).startswith("<Model bright.prognosis_gcs3_age, folds 1,")
    with pytest.raises(UnknownNameError, match=r"Unknown fold of bright.* '7'"):
        model.fold(7)


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_the_torch_module_of_a_fold_has_its_weights(runtime, bright_model, scan_path):
    model = ichprog.load_model(bright_model, runtime=runtime)
    grid = np.random.default_rng(0).random((1, *model.spec.input.shape), np.float32)
    network = model.torch_module(1)
    assert not network.training
    with torch.no_grad():
        logits = network(torch.from_numpy(grid)[:, None])
    for task, output in model.predict_grids(grid)[1].items():
        assert np.allclose(logits[task].numpy(), output.logits, atol=1e-4)


CAM_PLUGIN = """
import torch
from ichprog.saliency import score_and_features

def cam(score, grid, network, *, layer=None):
    value, features = score_and_features(score, grid, network, layer)
    (gradient,) = torch.autograd.grad(value.sum(), features, retain_graph=True)
    return (gradient * features).sum(1)[0]

def plain(score, grid, network, *, layer=None):
    return cam(score, grid, network, layer=layer)

def careless(score, grid, network):
    return grid[0, 0] * score(grid)

cam.requires = careless.requires = "features"
"""


@pytest.fixture
def cam_distribution(tmp_path, monkeypatch):
    """Install a third-party distribution with saliency methods that declare what they need."""
    folder = tmp_path / "site"
    info = folder / "third_party_cam-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-cam\nVersion: 1.0\n")
    names = "\n".join(f"{name} = third_party_cam:{name}" for name in ("cam", "plain", "careless"))
    (info / "entry_points.txt").write_text(f"[ichprog.saliency]\n{names}\n")
    (folder / "third_party_cam.py").write_text(CAM_PLUGIN)
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("third_party_cam", None)


def test_a_third_party_method_that_requires_features_gets_the_compiled_network(
    cam_distribution, bright_model, scan_path
):
    model = ichprog.load_model(bright_model, runtime="openvino")
    compiled = ichprog.explain(model, scan_path, method="cam")
    plain = ichprog.explain(model, scan_path, method="plain")
    assert compiled.provenance["runtime"] == "openvino"
    assert (plain.provenance["runtime"], plain.provenance["fallback_reason"]) == (
        "torch",
        "a saliency method needs the torch network",
    )
    assert np.allclose(compiled.grid_map, plain.grid_map, atol=1e-4 * np.abs(plain.grid_map).max())
    with pytest.raises(PluginError, match="requires = 'features' but runs the network"):
        ichprog.explain(model, scan_path, method="careless")


TYPED = """
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from nibabel.spatialimages import SpatialImage

import ichprog
from ichprog import Haemorrhage, Prediction

ichprog.explain("perez2023.prognosis", "scan.nii.gz").save("map.nii.gz")
for key, saliency in ichprog.explain("perez2023.prognosis", "scan.nii.gz", method=["grad_cam"]).items():
    saliency.save(key[0] + ".nii")
probability: float = ichprog.predict("perez2023.prognosis", "scan.nii.gz")["prognosis"].probabilities["poor"]
names: list[str] = list(ichprog.predict("perez2023.prognosis", "scan.nii.gz"))

model, zeros = ichprog.load_model("perez2023.prognosis"), np.zeros((2, 2, 2), np.int16)
assert_type(ichprog.predict(model, (zeros, np.eye(4))), Prediction)
def of_image(image: SpatialImage) -> None:
    assert_type(ichprog.predict(model, image), Prediction)
    assert_type(ichprog.haemorrhage(image, model=model), Haemorrhage)
assert_type(ichprog.predict(model, "scan.nii.gz"), Prediction | Any)
assert_type(ichprog.predict(model, Path("scans")), Prediction | Any)
assert_type(ichprog.predict(model, ["scans"]), list[Prediction])
assert_type(ichprog.predict(model, Path().glob("*.nii")), Iterator[Prediction])
assert_type(ichprog.haemorrhage("scan.nii.gz"), Haemorrhage | Any)
assert_type(ichprog.haemorrhage(["scans"]), list[Haemorrhage])
assert_type(ichprog.haemorrhage(Path().glob("*.nii")), Iterator[Haemorrhage])
ichprog.to_frame(ichprog.predict(model, "scans", haemorrhage=True))
found = ichprog.predict(model, "scans")
if isinstance(found, list):
    print(found[0].scan)
ichprog.predict(model, "scan.nii.gz").probability  # type: ignore[union-attr]  # a Prediction has no such attribute
"""


def test_the_examples_of_predict_and_explain_pass_mypy(tmp_path):
    (tmp_path / "example.py").write_text(TYPED)
    # In the project's folder and with its options, mypy reuses what it found in a check of the whole project.
    command = [sys.executable, "-m", "mypy", str(tmp_path / "example.py")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
