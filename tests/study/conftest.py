"""Fixtures of several study tests: the patients and the finished run of a small study."""

import pytest

from ichprog.study import Study, jobs

from support.small_study import BASELINES, STUDY, write_patients


@pytest.fixture(scope="package")
def patients_folder(tmp_path_factory):
    """Return a folder with the patients and the model of the small study."""
    folder = tmp_path_factory.mktemp("patients")
    write_patients(folder)
    return folder


@pytest.fixture
def make_study(patients_folder):
    """Return a function that reads a study from text."""

    def make(text=STUDY, more=BASELINES):
        (patients_folder / "study.toml").write_text(text + more)
        return Study.read(patients_folder / "study.toml")

    return make


@pytest.fixture(scope="package")
def finished_study(patients_folder, tmp_path_factory):
    """Return the folder of the small study, run by one process with one thread."""
    import torch

    (patients_folder / "finished.toml").write_text(STUDY + BASELINES)
    out, threads = tmp_path_factory.mktemp("finished") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    statuses = jobs.run(Study.read(patients_folder / "finished.toml"), out, cache_dir=patients_folder / "c")
    torch.set_num_threads(threads)
    assert {status.state for status in statuses} == {"done"}, [status.error for status in statuses]
    return out


@pytest.fixture
def one_thread_in_workers(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
