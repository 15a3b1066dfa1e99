"""DICOM as departments export it: several patients and studies, an index, and the choice of a series."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

from ichprog import ScanError
from ichprog.cli import main
from ichprog.pseudonyms import pseudonym
from ichprog.scan import DicomStudy, find_scans, read

from support import dicom_series
from support.cohorts import read_table

SMITH, JONES = "Smith", "=Jones"  # the second one looks like a formula


def write_series(folder, patient, study, number=1, **options):
    """Write a series of eight slices."""
    tags = {"PatientID": patient, "StudyInstanceUID": study, "SeriesNumber": number, "SeriesDescription": "HEAD"}
    tags |= {"SeriesInstanceUID": f"{study}.{number}"} | options.pop("tags", {})
    dicom_series.write(folder, count=8, tags=tags, **options)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Write a standard export: an index, two patients, three studies, one of them with two series."""
    root = tmp_path_factory.mktemp("export") / "DISK"
    write_series(root / "PT0" / "ST0" / "SE0", SMITH, "1.2.1")
    write_series(root / "PT0" / "ST0" / "SE1", SMITH, "1.2.1", 2, tags={"ConvolutionKernel": "BONE"})
    write_series(root / "PT0" / "ST1" / "SE0", SMITH, "1.2.2")
    write_series(root / "PT1" / "ST0" / "SE0", JONES, "1.2.3")
    shutil.copy(next((root / "PT0" / "ST1" / "SE0").iterdir()), root / "DICOMDIR")  # an index is DICOM, too
    return root


@pytest.fixture(scope="module")
def flat(export, tmp_path_factory):
    """Write the same files into one folder."""
    folder = tmp_path_factory.mktemp("flat")
    for number, path in enumerate(sorted(export.rglob("*.dcm"))):
        shutil.copy(path, folder / f"{number:03}")
    return folder


@pytest.fixture(scope="module")
def packed(export, tmp_path_factory):
    """Write the export into a .zip."""
    target = tmp_path_factory.mktemp("packed") / "export.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(path for path in export.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(export))
    return target


def test_a_standard_export_gives_one_scan_for_each_study(export):
    expected = ["PT0/ST0", "PT0/ST1/SE0", "PT1/ST0/SE0"]  # the lowest folder with the whole study
    assert find_scans(export) == [export / name for name in expected]


@pytest.mark.parametrize("kind", ["flat", "packed"])
def test_files_of_several_studies_in_one_place_give_one_scan_for_each_study(kind, export, request):
    found = find_scans(request.getfixturevalue(kind))
    assert [(type(scan), scan.patient, scan.uid) for scan in found] == [
        (DicomStudy, SMITH, "1.2.1"), (DicomStudy, SMITH, "1.2.2"), (DicomStudy, JONES, "1.2.3"),
    ]  # fmt: skip
    assert [len(scan.files) for scan in found] == [16, 8, 8]
    for scan, folder in zip(found, find_scans(export), strict=True):
        assert np.array_equal(read(scan).hu, read(folder).hu)
        assert np.array_equal(read(scan).affine, read(folder).affine)


def test_a_study_that_is_spread_over_folders_is_one_scan(tmp_path):
    for name, number in (("a", 1), ("b", 2)):
        write_series(tmp_path / name, SMITH, "1.2.1", number, tags={"ConvolutionKernel": "BONE"} if number == 2 else {})
    write_series(tmp_path / "c", JONES, "1.2.3")
    assert [(scan.uid, len(scan.files)) for scan in find_scans(tmp_path)] == [("1.2.1", 16), ("1.2.3", 8)]


def test_names_of_scans_hold_no_identifier(flat):
    for scan in find_scans(flat):
        name = str(scan).removeprefix(str(flat))
        assert name == f"/patient-{pseudonym(scan.patient)}/study-{pseudonym(scan.uid)}"
        assert scan.patient not in name
        assert scan.uid not in name
        assert scan.uid not in repr(scan)
        assert read(scan).name == str(scan)


@pytest.mark.parametrize(("series", "number"), [(None, "1"), ("2", "2"), ("1.2.1.2", "2")])
def test_a_series_is_chosen_by_number_or_uid(series, number, flat):
    study = find_scans(flat)[0]
    record = read(DicomStudy(study.path, study.patient, study.uid, study.files, series)).record
    assert record["series"]["number"] == number


def test_a_series_that_does_not_exist_is_an_error(flat):
    study = find_scans(flat)[0]
    with pytest.raises(ScanError, match=r"holds no series '7'. `ichprog scans` lists") as caught:
        read(DicomStudy(study.path, study.patient, study.uid, study.files, "7"))
    assert caught.value.code == "no-ct"


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_the_command_lists_patients_studies_and_series(export):
    result = invoke("scans", export)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"{export / 'PT0' / 'ST0'}  patient {pseudonym(SMITH)}, study {pseudonym('1.2.1')}"
    assert lines[1].startswith("  read  series 1 'HEAD', 8 slices every 5 mm over 35 mm: preferred for")
    assert lines[2].endswith("another has a soft-tissue kernel")
    assert len(lines) == 7
    assert SMITH not in result.output
    assert "1.2.1" not in result.output


def test_the_command_prints_json_and_writes_volumes_and_the_mapping(flat, tmp_path):
    result = invoke("scans", flat, "--json", "--volumes", tmp_path / "volumes", "--mapping", tmp_path / "mapping.csv")
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert [each["patient"] for each in described] == list(map(pseudonym, (SMITH, SMITH, JONES)))
    assert [series["taken"] for series in described[0]["series"]] == [True, False]
    assert "1.2.1" not in result.stdout
    for each, scan in zip(described, find_scans(flat), strict=True):
        volume = read(tmp_path / "volumes" / f"study-{each['study']}.nii.gz")
        assert np.abs(volume.hu - read(scan).hu).max() < 0.51
        assert np.allclose(volume.affine, read(scan).affine, atol=1e-3)
    rows = read_table(tmp_path / "mapping.csv")
    assert [row["StudyInstanceUID"] for row in rows] == ["1.2.1", "1.2.2", "1.2.3"]
    assert rows[2]["PatientID"] == "'=Jones"  # no formula for a spreadsheet


def test_a_study_without_a_suitable_series_is_listed_with_the_reason(tmp_path):
    write_series(tmp_path, SMITH, "1.2.1", tags={"Modality": "MR"})
    result = invoke("scans", tmp_path)
    assert result.exit_code == 1
    assert "modality MR, not CT" in result.output


def test_predict_takes_each_study_or_the_chosen_one(flat, bright_model, tmp_path):
    command = ["predict", flat, "-m", bright_model, "--runtime", "torch"]
    result = invoke(*command, "-o", tmp_path / "all.jsonl")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [each["scan"] for each in found] == list(map(str, find_scans(flat)))
    invoke(*command, "--study", "1.2.2", "-o", tmp_path / "one.jsonl")
    (one,) = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert one["scan"] == found[1]["scan"]
    result = invoke(*command, "--study", "1.2.9")
    assert result.exit_code == 2
    assert "None of the scans is the study '1.2.9'. `ichprog scans` lists" in result.output
