"""Training in several processes, and after a process was killed."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import ichprog
from ichprog.spec import PluginRef
from ichprog.train import train

from support.cohorts import QUICK, read_table, run_checksums

DRIVER = """
import os, signal, sys
import pathlib
import torch
torch.set_num_threads(1)
import ichprog
from ichprog.train import TrainOptions, trainer, train
sys.path.insert(0, {tests!r})
from support.cohorts import QUICK, plain_backbone

def dying(work, at):
    left = [at]
    def step(*given, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*given, **options)
    return step

def run():
    train(table, spec, out, folds=4, only_folds=only, protocol=QUICK, resume=True, options=options)

def run_and_die(death):
    what, _, at = death.partition(":")
    if what == "batch":
        trainer.augment = dying(trainer.augment, int(at))
    if what == "file":
        pathlib.Path.replace = dying(pathlib.Path.replace, int(at))
    run()

ichprog.register_backbone("plain", plain_backbone)
table, spec, out, cache = sys.argv[1:]
options = TrainOptions(cache_dir=cache, device="cpu")
only = [0] if "WORLD_SIZE" in os.environ else None
for death in os.environ.get("DEATHS", "").split():
    process = os.fork()  # the child has the imported libraries
    if process == 0:
        try:
            run_and_die(death)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == -signal.SIGKILL, (death, status)
    assert not (pathlib.Path(out) / "config.json").exists(), death
run()
"""


def drive(tmp_path, folder, spec, out, launcher=(sys.executable,), **environment):
    """Train in another process with the driver script."""
    script, description = tmp_path / "driver.py", tmp_path / "spec.json"
    script.write_text(DRIVER.format(tests=str(Path(__file__).parents[1])))
    description.write_text(json.dumps(spec.to_dict()))
    command = [*launcher, script, folder / "cohort.csv", description, out, folder / "c"]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_files(trained, folder, spec, tmp_path):
    """Killed in the first pass, between two passes, while a fold is finished, and in a pass of a later fold."""
    out = tmp_path / "run"
    done = drive(tmp_path, folder, spec, out, DEATHS="batch:2 file:9 file:26 batch:70")
    assert done.returncode == 0, done.stderr
    assert run_checksums(out) == run_checksums(trained)
    assert not [path for path in out.rglob(".*-*") if path.is_file()], "nothing half-written is left"


def test_two_processes_train_like_one(folder, cohort, spec, tmp_path, options):
    """Without normalisation over a batch, two gloo processes and one give the same network."""
    spec = dataclasses.replace(spec, backbone=PluginRef("plain", {}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    launcher.append(f"--master-port={port}")
    done = drive(tmp_path, folder, spec, tmp_path / "two", launcher)
    assert done.returncode == 0, done.stderr
    train(cohort, spec, tmp_path / "one", folds=4, only_folds=[0], protocol=QUICK, options=options)
    for one, two in zip(*(read_table(tmp_path / run / "out_of_fold.csv") for run in ("one", "two")), strict=True):
        assert one["patient"] == two["patient"]
        assert float(one["prognosis_poor"]) == pytest.approx(float(two["prognosis_poor"]), abs=1e-3)
    logs = [read_table(tmp_path / run / "log.csv") for run in ("one", "two")]
    assert [float(row["loss"]) for row in logs[0]] == pytest.approx([float(row["loss"]) for row in logs[1]], abs=1e-3)
    patient = cohort.patients[int(read_table(tmp_path / "two" / "out_of_fold.csv")[0]["patient"][1:])]
    assert 0 <= ichprog.predict(f"local-dir:{tmp_path / 'two'}", patient.scan)["prognosis"].probabilities["poor"] <= 1


@pytest.mark.slow
def test_accelerate_launch_runs_the_command(folder, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--module", "ichprog"]
    command += [
        "train",
        folder / "cohort.csv",
        "-m",
        folder / "spec.json",
        "-o",
        tmp_path / "run",
        "--folds=4",
        "--only-fold=1",
    ]
    command += ["--epochs=2", "--cache-dir", folder / "c", "--preset=paper", "--set=validation_fraction=0.2"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"local-dir:{tmp_path / 'run'}") == 1
    assert ichprog.load_model(f"local-dir:{tmp_path / 'run'}").check_golden_output()["state"] == "holds"
