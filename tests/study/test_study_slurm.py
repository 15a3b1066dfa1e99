"""Studies and predictions on Slurm: a cluster of one node on the loopback, whose jobs are cancelled while they run."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import nibabel as nib
import numpy as np
import pytest

from ichprog import RunError, parallel
from ichprog.study import jobs

from support.phantoms import brain_hu
from support.small_study import JOBS, job_names

pytestmark = pytest.mark.usefixtures("one_thread", "one_thread_in_workers")


ABSENT = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]

CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES State=UP
"""


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def free_ports():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@contextmanager
def daemon(log, *command):
    """Run a process during the block, then terminate it."""
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Start a Slurm cluster of one node, with all its files in one folder."""
    if ABSENT:
        pytest.skip(f"no {', '.join(ABSENT)} here: apt-get install slurm-wlm munge")
    root = tmp_path_factory.mktemp("slurm")
    port, node_port = free_ports()
    for name in ("state", "spool"):
        (root / name).mkdir()
    (root / "key").write_bytes(secrets.token_bytes(128))
    (root / "key").chmod(0o600)
    (root / "slurm.conf").write_text(
        CONF.format(
            root=root,
            port=port,
            node_port=node_port,
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
        )
    )
    files = {"socket": "munge.socket", "key-file": "key", "pid-file": "munged.pid", "seed-file": "seed"}
    munged = ("munged", "--foreground", "--force", *(f"--{option}={root / name}" for option, name in files.items()))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(root / "slurm.conf"))
        stack.enter_context(daemon(root / "munged.log", *munged))
        until((root / "munge.socket").exists)
        stack.enter_context(daemon(root / "slurmctld.log", "slurmctld", "-D", "-i"))
        stack.enter_context(daemon(root / "slurmd.log", "slurmd", "-D"))
        until(lambda: subprocess.run(("sinfo", "-h", "-o", "%t"), capture_output=True).stdout.strip() == b"idle")
        yield root
        subprocess.run(("scancel", f"--user={getpass.getuser()}"), check=True)
        until(lambda: not slurm_jobs())


def slurm_jobs(state="pending,running,completing"):
    """Return the numbers of the Slurm jobs in some states."""
    return output_of("squeue", "-h", f"--states={state}", "-o", "%A").split()


@pytest.mark.slow
def test_slurm_runs_a_job(slurm, tmp_path):
    output_of("sbatch", "--wait", "-o", str(tmp_path / "output"), "--wrap", "hostname")
    until((tmp_path / "output").exists)
    assert (tmp_path / "output").read_text().strip() == socket.gethostname()


@contextmanager
def in_thread(function):
    """Run a function in another thread during the block, and raise its error at the end."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function)
        yield
        future.result()


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["one worker", "one job", "every job"])
def test_slurm_jobs_give_the_same_files_as_one_process_if_some_are_killed(
    dies, slurm, finished_study, patients_folder, make_study, tmp_path
):
    """A worker is killed, or Slurm jobs are cancelled, while a job runs."""
    from distributed import default_client

    study, out, cancelled = make_study(), tmp_path / "out", []

    def kill():
        until(lambda: len(job_names(jobs.status(study, out), "running")) == 2)
        if dies == "one worker":
            os.kill(min(default_client().run(os.getpid).values()), signal.SIGKILL)
        else:
            cancelled.extend(slurm_jobs()[: None if dies == "every job" else 1])
            output_of("scancel", *cancelled)

    with (
        parallel.cluster(slurm={"queue": "gpu", "log_directory": str(tmp_path)}, workers=2) as executor,
        in_thread(kill),
    ):
        statuses = jobs.run(study, out, executor=executor, cache_dir=patients_folder / "c")
        after = slurm_jobs()
    assert job_names(statuses) == JOBS, [status.error for status in statuses]
    assert (out / "predictions.csv").read_bytes() == (finished_study / "predictions.csv").read_bytes()
    until(lambda: not slurm_jobs())
    if dies == "every job":
        assert len(cancelled) == 2
        assert after
        assert not set(cancelled) & set(after), "other jobs replace the cancelled ones"


@pytest.mark.slow
def test_predicting_on_slurm_gives_the_bytes_of_one_process_if_a_job_is_cancelled(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("ICHPROG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "scans").mkdir()
    for number in range(16):
        image = nib.Nifti1Image(brain_hu((96, 96, 20), (50 + number, 40, 10)), np.diag([-2.2, -2.2, 7.0, 1.0]))
        image.to_filename(tmp_path / "scans" / f"{number:02}.nii.gz")

    def start(name, *arguments):
        command = [sys.executable, "-m", "ichprog", "predict", "scans", "-m", "compact.prognosis_gcs3_age", "-o", name]
        return subprocess.Popen([*command, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    start("one.jsonl").communicate()
    options = ("--slurm", "queue=gpu", "--slurm", f"log_directory={tmp_path}", "--workers", "2")
    process, journal = start("slurm.jsonl", *options), tmp_path / "slurm.jsonl.journal"
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 2, seconds=120)
    output_of("scancel", slurm_jobs("running")[0])
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert (tmp_path / "slurm.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    until(lambda: not slurm_jobs())


@pytest.mark.slow
def test_options_may_be_text_and_a_worker_uses_the_processors_of_its_job(slurm, tmp_path):
    options = {"cores": "2", "memory": "1GiB", "walltime": "00:20:00", "job_extra_directives": "--comment=reported"}
    with parallel.cluster(slurm=options | {"log_directory": str(tmp_path)}) as executor:
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result(60) == "2"
        (number,) = slurm_jobs()
        properties = set(output_of("scontrol", "show", "job", number).split())
    assert {"NumCPUs=2", "MinMemoryNode=1G", "TimeLimit=00:20:00", "Comment=reported"} <= properties
    until(lambda: not slurm_jobs())


@pytest.mark.slow
def test_a_job_that_slurm_refuses_is_an_error(slurm):
    refused = pytest.raises(RunError, match=r"(?s)Slurm refuses the jobs.*invalid partition specified: none")
    with refused, parallel.cluster(slurm={"queue": "none"}):
        pass
    assert not slurm_jobs()


@pytest.mark.filterwarnings("ignore:unclosed cluster:ResourceWarning")  # of dask-jobqueue, if it refuses the options
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queu": "gpu"}, r"Invalid Slurm options: .*unexpected keyword argument 'queu'"),
        ({"cores": "two"}, r"Invalid Slurm options: .*'two'"),
        ({"memory": "1GB"}, r"Slurm refuses the jobs: .*'sbatch'.*that has sbatch"),
    ],
)
def test_invalid_options_and_a_machine_without_slurm_are_refused(options, message, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=message), parallel.cluster(slurm=options):
        pass
