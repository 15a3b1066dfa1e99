"""The scripts for schedulers in docs/cluster.md give all scans, in the hands of a shell that plays the scheduler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from ichprog import result_files

from support.phantoms import brain_hu

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
PARTS = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with three scans, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "scans").mkdir()
    for number in range(2):
        image = nib.Nifti1Image(brain_hu((96, 96, 20), (50 + number, 40, 10)), np.diag([-2.2, -2.2, 7.0, 1.0]))
        image.to_filename(folder / "scans" / f"{number}.nii.gz")
    (folder / "scans" / "2.nii.gz").write_bytes(b"damaged")
    return folder


def script_of(heading, language):
    """Return the first block of a section of the page, with fewer parts, an embedded model and local folders."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    block = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]
    block = re.sub(r" -m \S+", "", block).replace("/data/scans", "scans -m compact.prognosis_gcs3_age_v2 --fold 0")
    return block.replace("/16", f"/{PARTS}").replace("/shared/", "").replace("/data/", "").replace(".parquet", ".jsonl")


def run(folder, command, **variables):
    """Run a script in the folder. A scan that cannot be read gives the exit code 1."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": programs, "ICHPROG_BACKGROUND_COMPILE": "0", "ICHPROG_CACHE": str(folder / "c")}
    done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode


def scans_of(folder):
    """Return the names of the scans in the results of all parts, and remove the files."""
    files = sorted(folder.glob("results-*.jsonl"))
    assert len(files) == PARTS
    results = [Path(each["scan"]).name for file in files for each in result_files.read_records(file)]
    for file in files:
        file.unlink()
    return sorted(results)


ALL = ["0.nii.gz", "1.nii.gz", "2.nii.gz"]


@pytest.mark.parametrize(
    ("heading", "variable"), [("Slurm array", "SLURM_ARRAY_TASK_ID"), ("PBS", "PBS_ARRAY_INDEX")], ids=["slurm", "pbs"]
)
def test_an_array_of_jobs_gives_all_scans(folder, heading, variable):
    script = script_of(heading, "bash")
    others = {"SLURM_CPUS_PER_TASK": "1", "PBS_O_WORKDIR": str(folder)}
    for part in range(1, PARTS + 1):
        run(folder, ["bash", "-c", script], **{variable: str(part)}, **others)
    assert scans_of(folder) == ALL


def test_an_indexed_job_of_kubernetes_gives_all_scans_and_does_not_repeat_unreadable_ones(folder):
    job = yaml.safe_load(script_of("Kubernetes", "yaml"))
    assert job["spec"]["completionMode"] == "Indexed"
    container = job["spec"]["template"]["spec"]["containers"][0]
    for index in range(PARTS):
        code = run(folder, [*container["command"], *container["args"]], JOB_COMPLETION_INDEX=str(index))
        assert code == 0, "the other code would restart the part"
    assert scans_of(folder) == ALL
