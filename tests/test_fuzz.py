"""Damaged and hostile files: a result or an error of this library, within limits. `benchmarks/fuzz.py` reads more."""

import os
import pickle
import runpy
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ichprog
from ichprog import ScanError, SpecError, WeightsError, limits, zoo
from ichprog.scan import read
from ichprog.spec import ModelSpec

from support.models import local_model
from support.phantoms import brain_hu

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fuzz.py"), run_name="fuzz")
KINDS = (
    "NIfTI", "NIfTI, gzip", "DICOM, one slice of a series", "DICOM, header values", "DICOM, JPEG 2000",
    "DICOM, JPEG-LS", "DICOM, multi-frame", "DICOM, .zip", "model description", "weights, safetensors",
    "weights, pickle", "table of patients", "study file", "results",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return {target.name: target for target in FUZZ["targets"](tmp_path_factory.mktemp("fuzz"))}


def test_every_kind_of_file_has_a_test(targets):
    assert tuple(targets) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_example_is_read(kind, targets, tmp_path):
    path = tmp_path / f"input{targets[kind].suffix}"
    path.write_bytes(targets[kind].example)
    for name in ("scan.nii.gz", "cohort.csv"):
        (tmp_path / name).touch()
    targets[kind].read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_give_a_result_or_an_error(kind, targets, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydicom about values of damaged headers
        found = FUZZ["run"](targets[kind], 40, tmp_path, 1)
    assert found.others == {}
    assert found.slowest_s < FUZZ["LIMIT_S"]
    assert {path.name for path in tmp_path.iterdir()} - before == {f"input{targets[kind].suffix}"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../elsewhere"}, "Invalid name"),
        ({"name": "<b>bold</b>"}, "Invalid name"),
        ({"weights": {"folder": "../../"}}, r"Invalid weights\.folder"),
        ({"weights": {"folder": "/etc"}}, r"Invalid weights\.folder"),
        ({"weights": {"folder": "a/../../b"}}, r"Invalid weights\.folder"),
        ({"input": {"shape": [2000, 2000, 100]}}, "product of at most 67108864"),
    ],
)
def test_a_description_cannot_leave_its_folder_or_ask_for_too_much(change, message):
    fields = zoo.find("perez2023.prognosis").to_dict()
    for key, value in change.items():
        fields[key] = fields[key] | value if isinstance(value, dict) else value
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_dict(fields)


@pytest.mark.parametrize(
    ("text", "message"), [("[" * 100_000, "nested too deeply"), (" " * (limits.MAX_DESCRIPTION_BYTES + 1), "is larger")]
)
def test_a_description_that_is_too_deep_or_too_long_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError, match=message):
        ichprog.load_model(f"local-dir:{tmp_path}")


@pytest.fixture
def model(tmp_path):
    return local_model(tmp_path / "model", "compact", shape=(8, 24, 24)).removeprefix("local-dir:")


def changed_weights(folder, change):
    """Change the first floating-point tensor of a model."""
    from safetensors.torch import load_file

    path = Path(folder) / "fold0.safetensors"
    state = load_file(path)
    key = next(key for key, values in state.items() if values.is_floating_point() and values.ndim > 1)
    state[key] = change(state[key])
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values * float("nan"), "not finite"),
        (lambda values: torch.full_like(values, float("inf")), "not finite"),
        (lambda values: values.to(torch.int8), "is of type int8"),
    ],
    ids=["nan", "infinity", "int8"],
)
def test_weights_that_are_not_finite_or_no_floats_are_refused(change, message, model):
    changed_weights(model, change)
    with pytest.raises(WeightsError, match=message):
        ichprog.load_model(f"local-dir:{model}", runtime="torch")


def test_an_answer_that_is_not_finite_is_an_error_whatever_made_it(model):
    changed_weights(model, lambda values: torch.full_like(values, 3e38))  # finite, and overflows in the network
    loaded = ichprog.load_model(f"local-dir:{model}", runtime="torch")
    with pytest.raises(WeightsError, match=r"fold 0: the answer of \w+ is not a finite number"):
        ichprog.predict(loaded, (brain_hu((96, 96, 20), (60, 40, 10)), np.diag([-2.2, -2.2, 7.0, 1.0])))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(1).expand(2**31)}, "more than"),  # 8 GB of one number
        ({"a": torch.ones(3, 3).to_sparse()}, "sparse"),
        ({"a": torch.ones(3, dtype=torch.int8)}, "int8"),
        ({"a": torch.ones(3, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.tensor([1.0, float("nan")])}, "not finite"),
    ],
    ids=["expanded", "sparse", "whole numbers", "complex", "not finite"],
)
def test_pickles_of_other_tensors_are_refused(state, message, tmp_path):
    torch.save(state, tmp_path / "_fold0.pth")
    with pytest.raises(WeightsError, match=message):
        read_pickle(tmp_path)


def read_pickle(folder):
    weights = {"repo": None, "revision": None, "folder": "", "format": "pickle", "keys": {"": "x."}, "sha256": {}}
    spec = ModelSpec.from_dict(zoo.find("perez2023.prognosis").to_dict() | {"weights": weights})
    ichprog.hub.weights(spec, directory=folder, cache_dir=folder / "cache")


def test_a_pickle_that_unpacks_to_more_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ichprog.hub.cache.MAX_WEIGHT_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "_fold0.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(100_000))
    assert (tmp_path / "_fold0.pth").stat().st_size < 10_000
    with pytest.raises(WeightsError, match="refused, because it has 1000"):
        read_pickle(tmp_path)


def test_a_pipe_as_weights_is_refused_at_once(model):
    path = Path(model) / "fold0.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WeightsError, match="no regular file"):
        ichprog.load_model(f"local-dir:{model}")


def test_a_scan_with_too_many_voxels_is_refused_before_memory_is_asked_for(tmp_path):
    import nibabel as nib

    header = nib.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 30))
    header["vox_offset"] = 352
    (tmp_path / "scan.nii").write_bytes(header.binaryblock + bytes(4))
    with pytest.raises(ScanError, match="27000000000 voxels") as caught:
        read(tmp_path / "scan.nii")
    assert caught.value.code == "too-large"


def test_a_folder_with_too_many_files_is_refused(targets, tmp_path, monkeypatch):
    monkeypatch.setattr("ichprog.scan.series.MAX_DICOM_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.dcm").write_bytes(targets["DICOM, one slice of a series"].example)
    with pytest.raises(ScanError, match="more than 3 files") as caught:
        read(tmp_path)
    assert caught.value.code == "too-large"


def test_numbers_beyond_single_precision_are_not_finite(capfd):
    with pytest.raises(ScanError) as caught:
        read((np.full((4, 4, 4), 1e300), np.diag([-1.0, -1.0, 5.0, 1.0])))
    assert caught.value.code == "not-finite"
    assert capfd.readouterr().err == ""
