"""`ichprog predict --report` and `ichprog report`."""

import base64
import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ichprog.simulate.dicom import save_series

from support import phantoms
from support.models import local_detector

TORCH = ("--runtime", "torch")
EXPLAIN = ("--explain", "guided_backprop", "--task", "prognosis", "--task", "age")


def embedded(report, name):
    """Return the data of a report in a script element."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', report.read_text(), re.DOTALL)
    return None if found is None else json.loads(found[1])


def voxels(image):
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(image["data"]))).dataobj)


@pytest.fixture
def detector(registered_intensity_backbone, tmp_path):
    return local_detector(tmp_path / "detector")


@pytest.fixture
def scans(tmp_path):
    """Return a folder with two scans and a file that is no scan."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, centre in (("a", (330, 220, 16)), ("b", (200, 250, 14))):
        image = nib.Nifti1Image(phantoms.brain_hu((96, 96, 30), centre), np.diag([-2.5, -2.5, 5, 1]))
        image.to_filename(folder / f"{name}.nii.gz")
    (folder / "c.nii.gz").write_bytes(b"no scan")
    return folder


def test_reports_while_predicting_and_again_from_the_results(run, bright_model, detector, scans, tmp_path):
    results, first, second = tmp_path / "r.jsonl", tmp_path / "first", tmp_path / "second"
    folders = ("--maps", tmp_path / "maps", "--masks", tmp_path / "masks")
    blood = ("--haemorrhage", "--haemorrhage-model", detector)
    done = run(
        "predict",
        scans,
        "-m",
        bright_model,
        *TORCH,
        "-o",
        results,
        *EXPLAIN,
        *folders,
        *blood,
        "--report",
        first,
        code=1,
    )
    assert f"Reports: {first / 'index.html'}" in done.stderr
    names = ["a.html", "b.html", "c.html", "index.html"]
    assert sorted(path.name for path in first.iterdir()) == names
    done = run("report", results, "-m", bright_model, "-o", second, *folders, "--json")
    assert [Path(json.loads(line)["report"]).name for line in done.stdout.splitlines()] == names[:3]
    assert "research only" in done.stderr
    for name in ("a.html", "b.html"):
        assert embedded(first / name, "summary") == embedded(second / name, "summary")
        images, again = embedded(first / name, "images")["images"], embedded(second / name, "images")["images"]
        assert [each["name"] for each in images] == [each["name"] for each in again] == [
            "CT", "Brain", "Haemorrhage", "Map of prognosis: poor, guided_backprop",
            "Map of age: >=80, guided_backprop",
        ]  # fmt: skip
        for one, other in zip(images, again, strict=True):
            difference = np.abs(voxels(one).astype(float) - voxels(other).astype(float)).max()
            assert difference <= (2 / 127 if one["kind"] == "map" else 0)  # files of maps have 16 bits
    failed = embedded(first / "c.html", "summary")
    assert failed["error"] == "unreadable"
    assert str(tmp_path) not in (first / "a.html").read_text() + (first / "c.html").read_text()
    rows = embedded(first / "index.html", "data")["rows"]
    assert [(row["name"], row["flags"][:1]) for row in rows] == [
        ("a", ["warnings"]),
        ("b", ["warnings"]),
        ("c", ["failed"]),
    ]


def test_a_resumed_run_adds_the_missing_reports_to_the_index(run, bright_model, scans, tmp_path):
    (scans / "c.nii.gz").unlink()
    arguments = (
        "predict",
        scans,
        "-m",
        bright_model,
        *TORCH,
        "-o",
        tmp_path / "r.json",
        "--report",
        tmp_path / "reports",
    )
    shutil.move(scans / "b.nii.gz", tmp_path / "b.nii.gz")
    run(*arguments)
    assert not (tmp_path / "reports" / "index.html").exists()  # one report needs no index
    shutil.move(tmp_path / "b.nii.gz", scans / "b.nii.gz")
    before = (tmp_path / "reports" / "a.html").stat().st_mtime_ns
    run(*arguments, "--resume")
    assert (tmp_path / "reports" / "a.html").stat().st_mtime_ns == before
    assert [row["name"] for row in embedded(tmp_path / "reports" / "index.html", "data")["rows"]] == ["a", "b"]


def test_no_dicom_identifier_appears_unless_it_is_asked_for(run, bright_model, tmp_path):
    folder = tmp_path / "exports" / "DOE_JANE_1950"
    brain = phantoms.brain_only(phantoms.head(spacing=(2.5, 2.5, 5.0), blood="deep"))
    scan = SimpleNamespace(hu=brain.hu.astype(np.int16), affine=brain.affine)
    folder.parent.mkdir()
    save_series(scan, folder, "DOE-4711", 71, "F")
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.PatientName, data.SeriesDescription, data.PatientBirthDate = "Doe^Jane", "HEAD of Jane Doe", "19500102"
        data.AccessionNumber, data.InstitutionName = "ACC-815", "St. Elsewhere"
        data.save_as(file)
    broken = tmp_path / "exports" / "DOE_JOHN"
    broken.mkdir()
    (broken / "smith.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
    reports, results = tmp_path / "reports", tmp_path / "r.jsonl"
    arguments = ("predict", folder, broken, "-m", bright_model, *TORCH, "--brain", "given", "-o", results)
    run(*arguments, "--report", reports, code=1)
    identifiers = [
        "doe_", "doe^", "doe-", "jane", "john", "4711", "smith", "acc-815", "elsewhere", "19500102",
        str(data.StudyInstanceUID), str(data.SeriesInstanceUID), str(data.SOPInstanceUID), str(tmp_path),
    ]  # fmt: skip
    written = sorted(reports.iterdir())
    assert len(written) == 3
    for path in written:
        text = (path.name + without_code_and_pictures(path.read_text())).lower()
        assert [each for each in identifiers if each in text] == []
    run("report", results, "-o", tmp_path / "named", "--identifiers")
    named = [path for path in (tmp_path / "named").glob("scan-*.html") if embedded(path, "images")]
    assert len(named) == 1  # the other scan failed
    assert str(folder) in named[0].read_text()
    assert "HEAD of Jane Doe" in named[0].read_text()


def without_code_and_pictures(text):
    """Return a page without the scripts, which are the same in every report, and without compressed pictures."""
    return re.sub(r"<script>.*?</script>|[A-Za-z0-9+/=]{200,}", "", text, flags=re.DOTALL)


@pytest.fixture
def results(run, bright_model, scans, tmp_path):
    """Return a file with the result of one scan."""
    run("predict", scans / "a.nii.gz", "-m", bright_model, *TORCH, "-o", tmp_path / "r.json")
    return tmp_path / "r.json"


def test_a_scan_that_is_gone_has_a_report_without_a_viewer(run, results, scans, tmp_path):
    (scans / "a.nii.gz").unlink()
    run("report", results, "-o", tmp_path / "gone")
    assert "was not found" in (tmp_path / "gone" / "a.html").read_text()
    (scans / "a.nii.gz").write_bytes(b"damaged")
    run("report", results, "-o", tmp_path / "damaged")
    assert "cannot be read any more (unreadable)" in (tmp_path / "damaged" / "a.html").read_text()


def test_maps_and_masks_of_another_scan_are_refused(run, results, tmp_path):
    other = nib.Nifti1Image(np.zeros((96, 96, 30), np.float32), np.diag([-2.5, -2.5, 4, 1]))
    for folder, name in (("maps", "a_prognosis_grad_cam.nii.gz"), ("masks", "a_brain.nii.gz")):
        (tmp_path / folder).mkdir()
        other.to_filename(tmp_path / folder / name)
        done = run("report", results, "-o", tmp_path / "out", f"--{folder}", tmp_path / folder, code=1)
        assert name in done.stderr


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[1]", '[{"scan": "a"}]', '[{"scan": "a", "model": "m"}]', '[{"scan": 3, "model": "m"}]', "no"],
)
def test_a_file_without_results_is_refused(run, tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    assert "holds no results" in run("report", tmp_path / "r.json", "-o", tmp_path / "out", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_damaged_results_are_refused(run, tmp_path):
    record = {"scan": "a.nii.gz", "model": "m", "tasks": {"t": {"label": "x"}}}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    assert "cannot be read" in run("report", tmp_path / "r.jsonl", "-o", tmp_path / "out", code=1).stderr


def test_a_pdf_without_chromium_is_refused_before_anything_is_predicted(
    run, bright_model, scans, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("predict", scans, "-m", bright_model, "--report", tmp_path / "out", "--pdf", code=1)
    assert "apt install chromium" in done.stderr
    assert not done.stdout
    assert not (tmp_path / "out").exists()
