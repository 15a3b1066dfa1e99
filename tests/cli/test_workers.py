"""Commands with several workers: the same bytes as one process, also if workers are killed."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

import ichprog
from ichprog import InvalidValueError, RunError, UnknownNameError, parallel
from ichprog.cli import main

from support import crashing_job
from support.cohorts import read_table
from support.models import torch_model
from support.phantoms import brain_hu

MODEL = "compact.prognosis_gcs3_age"
SCANS = 12


@pytest.fixture(autouse=True)
def one_thread_in_workers(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with twelve scans, one of which cannot be read, and the results of one process."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "scans").mkdir()
    for number in range(SCANS):
        image = nib.Nifti1Image(brain_hu((96, 96, 20), (50 + number, 40, 10)), np.diag([-2.2, -2.2, 7.0, 1.0]))
        image.to_filename(folder / "scans" / f"{number:02}.nii.gz")
    (folder / "scans" / "03.nii.gz").write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ICHPROG_CACHE", str(folder / "cache"))
        process = start(folder, "one", "--masks", "masks-one")
        process.communicate()
    assert process.returncode == 1
    return folder


def start(folder, name, *arguments):
    command = [sys.executable, "-m", "ichprog", "predict", "scans", "-m", MODEL, "--fold", "0"]
    command += ["-o", f"{name}.jsonl", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(pid):
    """Return the processes that a process has started, apart from those that only track shared resources."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue  # it has ended meanwhile
        if parent == pid and "resource_tracker" not in command:
            found.append(int(stat.parent.name))
    return found


def wait_for_results(journal, number, seconds=120):
    end = time.monotonic() + seconds
    while not journal.exists() or journal.read_bytes().count(b"\n") <= number:
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds worker processes in /proc")
def test_a_killed_worker_costs_no_scan_and_changes_no_byte(folder, monkeypatch):
    monkeypatch.setenv("ICHPROG_CACHE", str(folder / "cache"))
    process = start(folder, "two", "--workers", "2", "--masks", "masks-two")
    wait_for_results(folder / "two.jsonl.journal", 2)
    workers = children_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    output, messages = process.communicate()
    assert process.returncode == 1, messages
    assert "Traceback" not in messages
    assert len(output.splitlines()) == SCANS
    assert (folder / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    assert contents(folder / "masks-two") == contents(folder / "masks-one")
    assert len(contents(folder / "masks-two")) == SCANS - 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds worker processes in /proc")
def test_workers_end_with_a_killed_command_and_another_number_of_workers_resumes(folder, monkeypatch):
    monkeypatch.setenv("ICHPROG_CACHE", str(folder / "cache"))
    process = start(folder, "killed", "--workers", "2")
    wait_for_results(folder / "killed.jsonl.journal", 2)
    workers = children_of(process.pid)
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "a worker outlives the command"
        time.sleep(0.05)
    _, messages = start(folder, "killed", "--resume").communicate()
    assert f"of {SCANS} scans have results" in messages
    assert (folder / "killed.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_dask_workers_give_the_same_bytes_if_one_is_killed(folder, monkeypatch, tmp_path):
    """The workers start in another folder than the command."""
    from distributed import LocalCluster

    monkeypatch.setenv("ICHPROG_CACHE", str(folder / "cache"))
    monkeypatch.chdir(tmp_path)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local:
        process = start(folder, "dask", "--scheduler", local.scheduler_address, "--masks", "masks-dask")
        wait_for_results(folder / "dask.jsonl.journal", 2)
        killed = local.workers[0].pid
        os.kill(killed, signal.SIGKILL)
        _, messages = process.communicate()
        assert process.returncode == 1, messages
        assert killed not in [nanny.pid for nanny in local.workers.values()]
    assert (folder / "dask.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    assert contents(folder / "masks-dask") == contents(folder / "masks-one")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["haemorrhage", "explain"])
def test_other_commands_write_the_same_files_with_two_workers(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ICHPROG_CACHE", str(folder / "cache"))
    written = {}
    for workers in (1, 2):
        out = folder / f"{command}-{workers}"
        out.mkdir()
        arguments = {
            "haemorrhage": ["-o", str(out / "blood.csv"), "--masks", str(out)],
            "explain": ["-m", MODEL, "--method", "grad_cam", "-o", str(out), "--task", "age"],
        }[command]
        process = subprocess.run(
            [sys.executable, "-m", "ichprog", command, "scans", *arguments, "--workers", str(workers)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 1, process.stderr
        written[workers] = contents(out)
    assert written[1] == written[2]
    visible = [name for name in written[1] if not name.startswith(".")]
    assert len(visible) == {"haemorrhage": SCANS, "explain": SCANS - 1}[command]


def test_a_scan_that_kills_every_worker_is_recorded_as_failed(tmp_path, monkeypatch):
    """The other scans have their results. A worker dies for the item 2, as in the tests of jobs."""
    results = dict(parallel.map_unordered(crashing_job.work, iter(range(6)), workers=2))
    assert isinstance(results.pop(2), parallel.WorkerDiedError)
    assert results == {0: None, 1: None, 3: "wrong", 4: None, 5: None}


def test_workers_share_the_processors_also_if_the_program_uses_numpy(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        """
import numpy as np
import threadpoolctl
from ichprog.parallel import parallel_map

def count_threads(workers):
    np.ones((8, 8)) @ np.ones((8, 8))
    return max(library["num_threads"] for library in threadpoolctl.threadpool_info())

if __name__ == "__main__":
    print(count_threads(1), *parallel_map(count_threads, [2, 2], workers=2))
"""
    )
    environment = {key: value for key, value in os.environ.items() if "NUM_THREADS" not in key}
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
    alone, *shared = map(int, run.stdout.split())
    assert shared == [max(1, alone // 2)] * 2


def test_few_items_are_in_flight():
    taken = []

    def items():
        for number in range(200):
            taken.append(number)
            yield number

    for done, (item, result) in enumerate(parallel.map_unordered(abs, items(), workers=2), start=1):
        assert item == result
        assert len(taken) - done < 8
    assert len(taken) == 200


def test_an_error_of_a_worker_is_that_of_one_process():
    with pytest.raises(UnknownNameError, match="Unknown device 'gpu'") as raised:
        list(parallel.map_unordered(crashing_job.fail, range(3), workers=2))
    assert raised.value.known == ("cpu", "cuda")


def test_a_pickled_model_is_loaded_again_and_other_weights_are_refused(bright_model, scan_path, tmp_path):
    model = torch_model(bright_model)
    copy = pickle.loads(pickle.dumps(model))
    assert ichprog.predict(copy, scan_path).to_dict() == ichprog.predict(model, scan_path).to_dict()
    (fold,) = pickle.loads(pickle.dumps(model.fold(1))).weights
    assert fold.fold == 1
    pickled = pickle.dumps(model)
    folder = Path(bright_model.removeprefix("local-dir:"))
    (folder / "fold1.safetensors").write_bytes((folder / "fold0.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"weights are .* Expected .* as in the process that sent the model"):
        pickle.loads(pickled)
    built = ichprog.model.Model(model.spec, model.weights, model.fold_runtimes, model._config)
    with pytest.raises(InvalidValueError, match="a model from `load_model`"):
        pickle.dumps(built)


def test_parquet_has_the_content_of_csv_with_types(folder, bright_model, monkeypatch, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(folder)
    for name in ("results.csv", "results.parquet"):
        command = ["predict", "scans", "-m", bright_model, "--runtime", "torch", "-o", str(tmp_path / name)]
        assert CliRunner().invoke(main, command).exit_code == 1
    before = (tmp_path / "results.parquet").read_bytes()
    assert CliRunner().invoke(main, [*command, "--resume", "--retry-failed"]).exit_code == 1
    assert (tmp_path / "results.parquet").read_bytes() == before
    rows, table = read_table(tmp_path / "results.csv"), parquet.read_table(tmp_path / "results.parquet")
    assert table.column_names == list(rows[0])
    assert str(table.schema.field("prognosis_poor").type) == "double"
    for expected, found in zip(rows, table.to_pylist(), strict=True):
        for column, value in found.items():
            text = "" if value is None else f"{value:.4f}" if isinstance(value, float) else value
            assert text == expected[column]


def test_contradicting_options_are_refused(folder):
    command = ["predict", str(folder / "scans"), "-m", MODEL, "--scheduler", "tcp://127.0.0.1:1", "--slurm", "queue=a"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "exclude each other" in result.output
