"""A study on Slurm: one node on the loopback, whose jobs are real and are cancelled in the middle of their work."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import test_study_jobs as tiny

from ichprog import RunError, parallel
from ichprog.study import jobs

folder, study, done = tiny.folder, tiny.study, tiny.done
one_thread_in_workers = tiny.one_thread_in_workers

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


def asked(*command):
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
    """A process until the end of the block; it is told to stop, and has some time for it."""
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
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
    """A Slurm of one node, whose files are all in one folder."""
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
    """The numbers of the jobs there are."""
    return asked("squeue", "-h", f"--states={state}", "-o", "%A").split()


@pytest.mark.slow
def test_slurm_itself(slurm, tmp_path):
    asked("sbatch", "--wait", "-o", str(tmp_path / "said"), "--wrap", "hostname")
    until((tmp_path / "said").exists)
    assert (tmp_path / "said").read_text().strip() == socket.gethostname()


@contextmanager
def beside(doing):
    """Something done by another thread during the block; what it raises is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(doing)
        yield
        future.result()


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["one worker", "one job", "every job"])
def test_jobs_do_the_same_as_one_process_though_some_are_killed(dies, slurm, done, folder, study, tmp_path):
    """A worker's process is killed, or jobs are cancelled, as it is at the end of their time; all in mid-cell."""
    from distributed import default_client

    asked_for, out, gone = study(), tmp_path / "out", []

    def kill():
        until(lambda: len(tiny.names(jobs.status(asked_for, out), "running")) == 2)
        if dies == "one worker":
            os.kill(min(default_client().run(os.getpid).values()), signal.SIGKILL)
        else:
            gone.extend(slurm_jobs()[: None if dies == "every job" else 1])
            asked("scancel", *gone)

    with parallel.cluster(slurm={"queue": "gpu", "log_directory": str(tmp_path)}, workers=2) as executor, beside(kill):
        found = jobs.run(asked_for, out, executor=executor, cache_dir=folder / "c")
        after = slurm_jobs()
    assert tiny.names(found) == tiny.JOBS, [status.error for status in found]
    assert (out / "predictions.csv").read_bytes() == (done / "predictions.csv").read_bytes()
    until(lambda: not slurm_jobs())
    if dies == "every job":
        assert len(gone) == 2
        assert after
        assert not set(gone) & set(after), "others took their place"


@pytest.mark.slow
def test_options_may_be_text_and_a_worker_has_the_processors_of_its_job(slurm, tmp_path):
    options = {"cores": "2", "memory": "1GiB", "walltime": "00:20:00", "job_extra_directives": "--comment=told"}
    with parallel.cluster(slurm=options | {"log_directory": str(tmp_path)}) as executor:
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result(60) == "2"
        (number,) = slurm_jobs()
        said = set(asked("scontrol", "show", "job", number).split())
    assert {"NumCPUs=2", "MinMemoryNode=1G", "TimeLimit=00:20:00", "Comment=told"} <= said
    until(lambda: not slurm_jobs())


@pytest.mark.slow
def test_what_slurm_refuses_is_said(slurm):
    refused = pytest.raises(RunError, match=r"(?s)Slurm refuses the jobs.*invalid partition specified: none")
    with refused, parallel.cluster(slurm={"queue": "none"}):
        pass
    assert not slurm_jobs()


@pytest.mark.filterwarnings("ignore:unclosed cluster:ResourceWarning")  # dask-jobqueue's, where it takes no options
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queu": "gpu"}, r"Invalid Slurm options: .*unexpected keyword argument 'queu'"),
        ({"cores": "two"}, r"Invalid Slurm options: .*'two'"),
        ({"memory": "1GB"}, r"Slurm refuses the jobs: .*'sbatch'.*that has sbatch"),
    ],
)
def test_options_that_are_none_and_a_machine_without_slurm(options, said, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=said), parallel.cluster(slurm=options):
        pass
