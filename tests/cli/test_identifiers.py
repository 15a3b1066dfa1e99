"""What the header of a DICOM file says of a patient reaches no output, unless it was asked for."""

import gzip
import json
import logging
import shutil
import stat

import pytest
from click.testing import CliRunner
from pydicom import dcmread

from ichprog.cli import main
from ichprog.pseudonyms import pseudonym
from ichprog.scan.series import _TAGS

from support import dicom_series

UIDS = ("2.25.7777771", "2.25.7777772", "2.25.7777773", "2.25.7777774")  # study, series, image, frame of reference
SECRETS = (
    "Unmistakable",
    "Quisquam",
    "ID-4711-SECRET",
    "19310203",
    "2.25.777777",
    "ACC-0815",
    "SERIAL-99",
    "Nosokomion",
)
OTHER = {"PatientID": "ID-4711-SECRET-2", "StudyInstanceUID": "2.25.7777779", "SeriesInstanceUID": "2.25.7777778"}


def identify(path, number, **changes):
    """Put names, identifiers and dates into a file wherever a header may have them."""
    data = dcmread(path)
    data.PatientName, data.PatientID = "Unmistakable^Quisquam", "ID-4711-SECRET"
    data.OtherPatientIDs, data.PatientBirthDate = "ID-4711-SECRET-B", "19310203"
    data.PatientComments = data.ImageComments = data.StudyComments = "Unmistakable, born 19310203"
    data.ReferringPhysicianName = data.PerformingPhysicianName = data.OperatorsName = "Quisquam^Doctor"
    data.InstitutionName, data.StationName, data.DeviceSerialNumber = "Nosokomion", "Nosokomion", "SERIAL-99"
    data.AccessionNumber, data.StudyID, data.StudyDescription = "ACC-0815", "ACC-0815", "Head of Unmistakable"
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = data.ContentDate = "19310203"
    data.StudyInstanceUID, data.SeriesInstanceUID, image, data.FrameOfReferenceUID = UIDS
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{image}.{number}"
    block = data.private_block(0x0011, "Unmistakable", create=True)
    block.add_new(1, "LO", "Unmistakable^Quisquam")
    for keyword, value in changes.items():
        setattr(data, keyword, value)
    data.save_as(path)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Return a folder with two studies of two patients, and with a damaged one in a folder of its own."""
    root = tmp_path_factory.mktemp("export")
    for start, changes in ((0, {}), (100, OTHER)):
        for number, path in enumerate(dicom_series.write(root / "good", count=26, numbered_from=start)):
            identify(path, number + start, **changes)
    changes = {"PatientID": "ID-4711-SECRET-3", "StudyInstanceUID": "2.25.7777770", "SeriesInstanceUID": "2.25.7777775"}
    for number, path in enumerate(dicom_series.write(root / "bad", count=8)):
        identify(path, number, **changes, ImagePositionPatient=[0, 0, 40 * number**2])
    return root


def contents(folder):
    """Yield name and content of every file, unpacked."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        yield str(path), gzip.decompress(data) if path.suffix == ".gz" else data


def leaks(text, folder=None):
    """Return the secrets in a text, and in the names and contents of the files of a folder."""
    found = [secret for secret in SECRETS if secret in text]
    for name, data in contents(folder) if folder else ():
        spellings = {s: (s.encode(), s.encode("utf-16-le"), s.encode().hex().encode()) for s in SECRETS}
        found += [(name, s) for s, forms in spellings.items() if s in name or any(form in data for form in forms)]
    return found


@pytest.fixture
def invoke(caplog):
    """Run a command with all logs, and return its result and everything that it printed and logged."""

    def run(*arguments):
        caplog.clear()
        with caplog.at_level(logging.DEBUG), caplog.at_level(logging.WARNING, "matplotlib"):
            result = CliRunner().invoke(main, ["-vv", *map(str, arguments)])
        return result, result.output + result.stdout + result.stderr + caplog.text

    return run


def test_the_headers_hold_every_secret(export):
    text = "".join(str(dcmread(path)) for path in (export / "good").iterdir())
    assert leaks(text) == list(SECRETS)


def test_no_output_holds_an_identifier(export, bright_model, invoke, tmp_path):
    pytest.importorskip("jinja2")
    out, model = tmp_path / "out", ("-m", bright_model, "--runtime", "torch", "--fold", "0")
    maps = ("--maps", out / "maps", "--masks", out / "masks")
    commands = [
        ("scans", export, "--volumes", out / "volumes"),
        ("scans", export, "--json"),
        ("predict", export, *model, "-o", out / "r.jsonl", "--explain", "grad_cam", *maps, "--report", out / "reports"),
        ("predict", export, *model, "-o", out / "r.csv"),
        ("predict", export, *model, "--json"),
        ("predict", export / "bad", *model, "--series", "9"),
        ("explain", export / "good", *model, "--method", "grad_cam", "-o", out / "explained", "--png"),
        ("report", out / "r.jsonl", "-o", out / "again", *maps),
    ]
    for command in commands:
        result, text = invoke(*command)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert leaks(text) == [], command[0]
    records = [json.loads(line) for line in (out / "r.jsonl").read_text().splitlines()]
    assert sorted("error" in record for record in records) == [False, False, True]
    names = {name for name, _ in contents(out)}
    assert {name.rpartition(".")[2] for name in names} >= {"gz", "html", "csv", "jsonl", "png"}
    assert leaks("", out) == []
    study = pseudonym(UIDS[0])
    assert any(study in record["scan"] for record in records)
    assert any(study in name for name in names)


def test_identifiers_are_written_where_they_are_asked_for(export, bright_model, invoke, tmp_path):
    pytest.importorskip("highdicom")
    (tmp_path / "mapping").mkdir()
    invoke("scans", export, "--mapping", tmp_path / "mapping" / "mapping.csv")
    assert {secret for _, secret in leaks("", tmp_path / "mapping")} == {"ID-4711-SECRET", "2.25.777777"}
    assert stat.S_IMODE((tmp_path / "mapping" / "mapping.csv").stat().st_mode) == 0o600
    shutil.copytree(export / "good", tmp_path / "good")
    for path in (tmp_path / "good").iterdir():
        if dcmread(path).PatientID.endswith("-2"):
            path.unlink()
    _, text = invoke(
        "predict", tmp_path / "good", "-m", bright_model, "--runtime", "torch", "--dicom-out", tmp_path / "objects"
    )
    assert leaks(text) == []
    (report,) = (tmp_path / "objects").rglob("report.dcm")
    data = dcmread(report)
    assert (data.PatientID, data.StudyInstanceUID) == ("ID-4711-SECRET", UIDS[0])


def test_names_of_persons_are_not_even_read():
    assert not {tag for tag in _TAGS.split() if tag.startswith(("Patient", "Referring", "Institution", "Accession"))}
