"""The first scan of a model that is not compiled yet is computed at once in PyTorch."""

import json
import pickle
import subprocess

import pytest

import ichprog
from ichprog.cli import compilation
from ichprog.cli.workers import Workers
from ichprog.io import file_lock

pytestmark = pytest.mark.compiled

COMPACT = "compact.prognosis_gcs3_age"
LINE = "is not compiled for this CPU yet, so PyTorch computes this scan."
LATER = "A background process then compiles the model"


@pytest.fixture
def started(monkeypatch):
    """Allow background processes, and return those that were started. They have ended after the test."""
    processes, popen = [], subprocess.Popen

    def start(*arguments, **options):
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setenv("ICHPROG_BACKGROUND_COMPILE", "1")
    monkeypatch.setattr(compilation.subprocess, "Popen", start)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def predict(run, scan, *options):
    """Predict with --json, and return the prediction and standard error."""
    result = run("predict", scan, "-m", COMPACT, "--fold", 0, "--brain", "given", "--json", *options)
    return json.loads(result.stdout.splitlines()[0]), result.stderr


def test_the_first_prediction_comes_from_torch_and_later_ones_from_the_compiled_network(run, small_scan, started):
    first, said = predict(run, small_scan)
    assert said.count(LINE) == said.count(LATER) == 1
    assert first["provenance"]["runtime"] == "torch"
    assert started[0].wait(timeout=300) == 0
    second, said = predict(run, small_scan)
    assert LINE not in said
    assert "Compiling" not in said
    assert second["provenance"]["runtime"] == "openvino"
    for task, answer in first["tasks"].items():
        assert second["tasks"][task]["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-4)
    options = ["--fold", 0, "--brain", "given", "-o", small_scan.parent, "--json"]
    explained = run("explain", small_scan, "-m", COMPACT, *options)
    assert LINE not in explained.stderr
    assert json.loads(explained.stdout)["provenance"]["runtime"] == "openvino"
    assert len(started) == 1


@pytest.mark.parametrize(
    ("count", "workers", "shard", "requested", "runtime"),
    [
        (1, 1, None, "auto", "cached"),
        (2, 1, None, "auto", "auto"),
        (1, 2, None, "auto", "auto"),
        (1, 1, "1/9", "auto", "auto"),
        (1, 1, None, "openvino", "openvino"),
    ],
)
def test_only_the_single_scan_of_a_run_is_computed_at_once(
    bright_model, started, monkeypatch, count, workers, shard, requested, runtime
):
    requests, load = [], compilation.load_model
    monkeypatch.setattr(
        compilation, "load_model",
        lambda name, brain, loading: requests.append(loading["runtime"]) or load(name, brain, {"runtime": "torch"}),
    )  # fmt: skip
    loader = compilation.ModelLoader(["scan.nii.gz"] * count, Workers(workers), shard)
    loader.load(bright_model, "given", {"runtime": requested, "cache_dir": None})
    loader.compile_in_background()
    assert requests == [runtime]
    assert not started


def test_several_scans_are_compiled_first_with_a_line(run, small_scan, started):
    second = small_scan.with_name("second.nii.gz")
    second.write_bytes(small_scan.read_bytes())
    prediction, said = predict(run, small_scan, second)
    assert f"Compiling predictions of {COMPACT} fold 0 for this CPU, once." in said
    assert prediction["provenance"]["runtime"] == "openvino"
    assert not started


def test_the_environment_forbids_background_processes(run, bright_model, small_scan, started, monkeypatch):
    monkeypatch.setenv("ICHPROG_BACKGROUND_COMPILE", "0")
    result = run("predict", small_scan, "-m", bright_model, "--brain", "given")
    assert LINE not in result.stderr
    assert not started


def test_a_cache_that_is_not_writable_starts_no_process(run, bright_model, small_scan, started, tmp_path, monkeypatch):
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "compiled").write_text("not a folder")
    said = run("predict", small_scan, "-m", bright_model, "--brain", "given").stderr
    assert LINE in said
    assert LATER not in said
    assert not started


def test_a_second_background_process_ends_at_once(tmp_path):
    jobs = [{"name": COMPACT, "cache_dir": str(tmp_path)}]
    with file_lock(tmp_path / "compiled" / "background.lock"):
        compilation.compile_models(jobs)
    assert not list(tmp_path.rglob("*.blob"))


def test_other_processes_run_a_model_as_this_one_even_if_it_is_compiled_meanwhile():
    model = ichprog.load_model(COMPACT, fold=0, runtime="cached")
    assert model.runtime == "torch"
    assert not model.is_compiled()
    sent = pickle.dumps(model)
    ichprog.load_model(COMPACT, fold=0, runtime="openvino")  # fills the cache with the graph of predictions
    assert pickle.loads(sent).runtime == "torch"
    cached = ichprog.load_model(COMPACT, fold=0, runtime="cached")
    assert cached.runtime == "openvino"
    assert cached.is_compiled()
    assert not cached.is_compiled(explain=True)
