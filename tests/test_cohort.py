"""Cohorts: reading, checking, joining and writing tables, and the published data set."""

import csv
import json
import math
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ichprog import UnknownNameError, zoo
from ichprog.cli import main
from ichprog.cohort import Cohort, Patient, from_csic, from_ct_ich
from ichprog.errors import CohortError

from support.phantoms import brain_hu

HEADER = """PatientID, Label (poor_prognosis), Gender, Age, Antihypertensive_drugs,
  Smoker, Alcohol, HT, DM, Dyslipidemia, MH_ICH, MH_CVD, MH_neuro, MH_dementia, MH_cancer, MH_hematho, MH_others,
  Anticoagulant, Antiaggregant, Calcium_antag, Alpha_blockers, Systolic_AP, Dyastolic_AP, OxSat, Tº, HR, RF,
  PE_neuro, GCS, Glucose, Creatinine, Urea, Sodium, Potassium, WBC, Hgb, Platelets, MCV, RCDW, CMHC, MPV, INR,
  Fibrinogen, Cause_head_trauma""".replace("\n ", "").split(", ")  # as published


@pytest.fixture
def write_table(tmp_path):
    """Write a table next to some scans and return its path."""
    for name in ("a.nii.gz", "b.zip"):
        (tmp_path / name).touch()
    (tmp_path / "dicom").mkdir()

    def write(text, name="cohort.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return path

    return write


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def task(model, name):
    return zoo.find(model).task(name)


def test_a_table_is_read_with_all_its_columns(write_table, tmp_path):
    path = write_table(
        "site,patient, scan ,gcs,age,poor_outcome,note\n"
        "X, 1 ,a.nii.gz,15,80.5,0,\n\n"
        f'Y,two,dicom,,,,"one, two"\nX,3,{tmp_path / "b.zip"},3.0,0,1,\n'
    )
    cohort = Cohort.read(path)
    assert len(cohort) == 3
    assert cohort.source == str(path)
    assert [p.name for p in cohort.patients] == ["1", "two", "3"]
    assert [p.scan for p in cohort.patients] == [tmp_path / "a.nii.gz", tmp_path / "dicom", tmp_path / "b.zip"]
    assert cohort.patients[1].columns == {
        "site": "Y", "gcs": "", "age": "", "poor_outcome": "", "note": "one, two"
    }  # fmt: skip
    np.testing.assert_array_equal(cohort.numbers("gcs"), [15, np.nan, 3])
    np.testing.assert_array_equal(cohort.numbers("age"), [80.5, np.nan, 0])
    assert cohort.numbers("age").dtype == np.float64


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("patient,scan,gcs\n1,a.nii.gz,7\n", "utf-8"),
        ("patient,scan,gcs\r\n1,a.nii.gz,7\r\n,,\r\n", "utf-8-sig"),
        ("patient;scan;gcs\n1;a.nii.gz;7", "utf-8"),
        ("patient\tscan\tgcs\n1\ta.nii.gz\t7\n", "utf-8-sig"),
        (",patient,scan,gcs,\n0,1,a.nii.gz,7,\n", "utf-8"),
        ("Patient,SCAN,gcs\n1,a.nii.gz,7\n", "utf-8"),
    ],
    ids=["commas", "spreadsheet", "semicolons", "tabs", "unnamed columns", "other case"],
)
def test_a_table_is_read_in_every_common_format(write_table, text, encoding):
    (patient,) = Cohort.read(write_table(text, encoding=encoding)).patients
    assert (patient.name, patient.scan.name, patient.columns) == ("1", "a.nii.gz", {"gcs": "7"})
    assert patient.row == 2


def test_column_names_match_regardless_of_case(write_table, tmp_path):
    cohort = Cohort.read(write_table("patient,scan,GCS,mRS\n1,a.nii.gz,7,3\n2,b.zip,99,\n"))
    assert cohort.numbers("mrs")[0] == 3
    assert cohort.has_column("gcs")
    assert "mrs" in cohort.patients[0].columns
    assert cohort.columns == ("GCS", "mRS")
    with pytest.raises(CohortError, match=r"row 3 \(patient 2\): column GCS \(read as gcs\) is 99\. Expected a whole"):
        cohort.labels(task("densenet121.gcs3", "gcs"))
    other = Cohort.read(write_table("patient,scan,gcs\n5,dicom,9\n", "other.csv"))
    joined = Cohort.join([cohort, other])
    assert joined.columns == ("GCS", "mRS")
    assert [patient.columns["gcs"] for patient in joined.patients] == ["7", "99", "9"]
    assert Cohort.read(joined.write(tmp_path / "joined.csv")).columns == ("GCS", "mRS")


def test_the_text_form_of_a_cohort_is_short(write_table):
    rows = "".join(f"p{i},a.nii.gz,7\n" for i in range(40))
    path = write_table("patient,scan,gcs\n" + rows)
    assert repr(Cohort.read(path)) == f"Cohort(40 patients, columns: gcs, source: {str(path)!r})"


@pytest.mark.parametrize("scan", ["a.nii.gz", "gone.nii.gz"])
def test_missing_scans_are_reported_only_if_required(write_table, scan):
    path = write_table(f"patient,scan\n1,{scan}\n")
    assert len(Cohort.read(path, scans=False)) == 1
    if scan == "gone.nii.gz":
        with pytest.raises(CohortError, match=r"row 2 \(patient 1\): scan .*gone\.nii\.gz does not exist"):
            Cohort.read(path)


HEADER_ROW = "patient,scan,gcs,age,poor_outcome\n"
VALID_ROW = "1,a.nii.gz,15,70,0\n"


@pytest.mark.parametrize(
    ("rows", "expected_message"),
    [
        (",b.zip,,,\n", "row 3: column patient is blank"),
        ("2,b.zip,,,\n1,b.zip,,,\n", "row 4 (patient 1): the patient is already in row 2"),
        ("2,,,,\n", "row 3 (patient 2): column scan is blank"),
        ("2,c.nii,,,\n", "row 3 (patient 2): scan "),
        ("\n2,,,,\n", "row 4 (patient 2): column scan is blank"),
        ('2,b.zip,,,\n"3\n",,,,\n', "row 4 (patient 3): column scan is blank"),
        ("2,b.zip,,\n", "row 3: 4 cells, but the first row has 5"),
        ("2,b.zip,,70,5,1\n", "row 3: 6 cells, but the first row has 5; a decimal comma splits a cell"),
        ('2,"b.zip,,,\n', "cannot be read as a table"),
    ],
)
def test_a_wrong_row_is_named(write_table, rows, expected_message):
    path = write_table(HEADER_ROW + VALID_ROW + rows)
    with pytest.raises(CohortError) as error:
        Cohort.read(path)
    assert expected_message in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("row", "column", "expected_message"),
    [
        ("2,b.zip,2,,", "gcs", "column gcs is 2. Expected a whole number from 3 to 15, or blank."),
        ("2,b.zip,16,,", "gcs", "column gcs is 16. Expected a whole number"),
        ("2,b.zip,7.5,,", "gcs", "column gcs is 7.5. Expected a whole number"),
        ("2,b.zip,nan,,", "gcs", "column gcs is nan. Expected a whole number"),
        ("2,b.zip,1_0,,", "gcs", "column gcs is 1_0. Expected a whole number"),
        ("2,b.zip,,-1,", "age", "column age is -1. Expected years from 0 to 120, or blank."),
        ("2,b.zip,,121,", "age", "column age is 121. Expected years"),
        ("2,b.zip,,inf,", "age", "column age is inf. Expected years"),
        ("2,b.zip,,old,", "age", "column age is old. Expected years"),
        ('2,b.zip,,"70,5",', "age", "column age has a decimal comma, 70,5. Write 70.5."),
        ("2,b.zip,,,2", "poor_outcome", "column poor_outcome is 2. Expected 0 or 1, or blank."),
        ("2,b.zip,,,0.5", "poor_outcome", "column poor_outcome is 0.5. Expected 0 or 1"),
        ("2,b.zip,,,yes", "poor_outcome", "column poor_outcome is yes. Expected 0 or 1"),
    ],
)
def test_a_wrong_value_is_named_when_its_column_is_used(write_table, row, column, expected_message):
    path = write_table(HEADER_ROW + VALID_ROW + row + "\n")
    cohort = Cohort.read(path)
    others = {"gcs", "age", "poor_outcome"} - {column}
    assert all(cohort.numbers(other).shape == (2,) for other in others)
    with pytest.raises(CohortError) as error:
        cohort.numbers(column)
    assert f"row 3 (patient 2): {expected_message}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected_message"),
    [
        ("", "column patient is missing; column scan is missing. The first row is blank"),
        ("patient,gcs\n1,15\n", "column scan is missing. The first row is patient, gcs"),
        ("patient,scan,x,x\n1,a.nii.gz,1,2\n", "column x and x is there 2 times"),
        ("patient,scan,gcs,GCS\n1,a.nii.gz,7,8\n", "column gcs and GCS is there 2 times"),
        ("patient,scan\n", "has no patients"),
        ("patient,scan\n,\n\n", "has no patients"),
    ],
)
def test_a_wrong_table_is_refused(write_table, text, expected_message):
    with pytest.raises(CohortError) as error:
        Cohort.read(write_table(text))
    assert expected_message in str(error.value)


def test_a_file_that_is_not_a_table_is_refused(write_table, tmp_path):
    with pytest.raises(CohortError, match=r"none\.csv: cannot be read as a table: No such file"):
        Cohort.read(tmp_path / "none.csv")
    with pytest.raises(CohortError, match="cannot be read as a table"):
        Cohort.read(tmp_path)
    with pytest.raises(CohortError, match="not text in UTF-8"):
        Cohort.read(write_table("patient,scan,Tº\n1,a.nii.gz,37\n", encoding="latin-1"))


def test_a_wrong_table_is_wrong_use_of_the_command(write_table):
    path = write_table("patient,scan,gcs\n1,a.nii.gz,16\n1,a.nii.gz,\n")
    for command in ("predict", "explain"):
        result = run(command, path, code=2)
        assert "row 3 (patient 1): the patient is already in row 2" in result.stderr
        assert result.stdout == ""


def test_all_wrong_rows_are_listed_together(write_table):
    rows = [f"p{i},a.nii.gz,{16 + i}" for i in range(46)]
    rows[3] = "p3,gone,19"
    rows[4] = "p4,gone,99"
    cohort = Cohort.read(write_table("\n".join(["patient,scan,gcs", *rows])), scans=False)
    with pytest.raises(CohortError) as error:
        cohort.numbers("gcs")
    _, *lines, last = str(error.value).splitlines()
    assert [line.split()[1] for line in lines] == [str(number) for number in range(2, 12)]
    assert last.strip() == "and 36 more"
    rows[3] = "p3,gone"  # a row with a missing cell
    with pytest.raises(CohortError) as error:
        Cohort.read(write_table("\n".join(["patient,scan,gcs", *rows])))
    assert [line.split()[1].rstrip(":") for line in str(error.value).splitlines()[1:]] == ["5", "6"]


def by_hand(name, column, value):
    """Return a label by the published definitions."""
    if column == "poor_outcome":
        return "poor" if value == 1 else "good"
    if column == "age":
        return ">=80" if value >= 80 else "<80"
    if name == "gcs2":
        return "3-8" if value <= 8 else "9-15"
    return "13-15" if value > 12 else "9-12" if value >= 9 else "3-8"


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        ("densenet121.prognosis_gcs3_age", "gcs", "gcs3"),
        ("densenet121.prognosis_gcs2_age", "gcs", "gcs2"),
        ("densenet121.prognosis_gcs3_age", "age", "age"),
        ("densenet121.prognosis_gcs3_age", "prognosis", "prognosis"),
    ],
)
def test_labels_equal_the_published_definitions(write_table, model, name, kind):
    wanted = task(model, name)
    column = wanted.target.column
    values = {
        "gcs": list(range(3, 16)),
        "age": [0, 79, 79.9, 79.999, 80, 80.0001, 81, 120],
        "poor_outcome": [0, 1],
    }[column]
    cells = [*(str(v) for v in values), ""]
    cohort = Cohort.read(
        write_table(f"patient,scan,{column}\n" + "".join(f"{i},a.nii.gz,{cell}\n" for i, cell in enumerate(cells)))
    )
    labels = cohort.labels(wanted)
    assert labels.dtype == np.int64
    assert [wanted.labels[i] for i in labels[:-1]] == [by_hand(kind, column, v) for v in values]
    assert labels[-1] == -1


def test_a_missing_or_wordy_column_is_refused(write_table):
    cohort = Cohort.read(write_table("patient,scan,dose\n1,a.nii.gz,2e3\n2,b.zip,much\n3,b.zip,\n4,b.zip,nan\n"))
    with pytest.raises(UnknownNameError, match=r"Unknown column of .*cohort\.csv 'dosis'\. Did you mean dose"):
        cohort.numbers("dosis")
    with pytest.raises(UnknownNameError, match="'gcs'"):
        cohort.labels(task("densenet121.gcs3", "gcs"))
    with pytest.raises(
        CohortError, match=r"row 3 \(patient 2\): column dose is much\. Expected a number, or blank"
    ) as error:
        cohort.numbers("dose")
    assert "row 5 (patient 4): column dose is nan" in str(error.value)


def test_cohorts_are_joined(write_table, tmp_path):
    (tmp_path / "north").mkdir()
    (tmp_path / "south").mkdir()
    north = Cohort.read(write_table("patient,scan,gcs\n1,../a.nii.gz,7\n2,../b.zip,\n", "north/cohort.csv"))
    south = Cohort.read(write_table("patient,scan,age\n1,../dicom,81\n5,../b.zip,30\n", "south/cohort.csv"))
    both = Cohort.join([north, south])
    assert [p.name for p in both.patients] == ["north_cohort_1", "2", "south_cohort_1", "5"]
    assert [p.scan for p in both.patients] == [p.scan for p in (*north.patients, *south.patients)]
    np.testing.assert_array_equal(both.numbers("gcs"), [7, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(both.numbers("age"), [np.nan, np.nan, 81, 30])
    assert list(both.labels(task("densenet121.gcs3", "gcs"))) == [2, -1, -1, -1]
    assert all(set(p.columns) == {"gcs", "age"} for p in both.patients)
    again = Cohort.read(both.write(tmp_path / "both.csv"))
    assert [(p.name, p.columns) for p in again.patients] == [(p.name, p.columns) for p in both.patients]
    assert Cohort.join([north]).patients == north.patients
    with pytest.raises(CohortError, match=r"patient 1 has the same scan in .*; remove one of the rows"):
        Cohort.join([north, north])
    with pytest.raises(CohortError, match="There is no cohort to join"):
        Cohort.join([])


def test_names_that_stay_equal_are_refused():
    def one(source, *names):
        return Cohort(tuple(Patient(n, Path(source) / n, {}) for n in names), source)

    with pytest.raises(CohortError, match="2 patients would be named a_1"):
        Cohort.join([one("a.csv", "1", "a_1"), one("b.csv", "1")])


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).map(str.strip)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(CELL.filter(bool), CELL, st.sampled_from(["", "3", "15.0"])),
        min_size=1, unique_by=lambda row: row[0],
    )
)  # fmt: skip
def test_a_written_table_is_read_back(rows):
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "in" / "here.nii"
        patients = tuple(Patient(name, scan, {"note, Tº": note, "gcs": gcs}) for name, note, gcs in rows)
        again = Cohort.read(Cohort(patients, "made").write(Path(folder) / "cohort.csv"), scans=False)
        assert [(p.name, p.columns) for p in again.patients] == [(p.name, p.columns) for p in patients]
        assert {p.scan for p in again.patients} == {scan}


def test_scans_are_written_relative_to_the_table_without_resolving_links(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x1f").touch()
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "1.nii").symlink_to(tmp_path / "store" / "x1f")
    (tmp_path / "tables").mkdir()
    path = Cohort((Patient("1", tmp_path / "scans" / "1.nii", {}),), "made").write(tmp_path / "tables" / "c.csv")
    assert path.read_text().splitlines() == ["patient,scan", "1,../scans/1.nii"]
    assert len(Cohort.read(path)) == 1


def test_a_table_is_written_atomically(write_table, tmp_path):
    kept = write_table("kept")
    before = sorted(tmp_path.iterdir())
    unwritable = Patient("\ud800", tmp_path / "a.nii.gz", {})
    with pytest.raises(UnicodeEncodeError):
        Cohort((Patient("1", tmp_path / "a.nii.gz", {}), unwritable), "made").write(kept)
    assert kept.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == before


def csic(folder, patients, where=None):
    """The published layout: (id, label, age, gcs) of each patient, and which images are where."""
    images = folder / "ICH_nii_StrippedSkull"
    for group in ("GOOD_PROGNOSIS", "POOR_PROGNOSIS"):
        (images / group).mkdir(parents=True)
    (folder / "ICH_tabular_data").mkdir()
    with (folder / "ICH_tabular_data" / "CLINICAL_DATA_ICH.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, HEADER, restval="0")
        rows.writeheader()
        for name, label, age, gcs in patients:
            cells = {"PatientID": name, "Label (poor_prognosis)": label, "Age": age, "GCS": gcs, "Tº": "36.5"}
            rows.writerow(cells)
            default = [] if name == "213" else ["POOR_PROGNOSIS" if label == "1" else "GOOD_PROGNOSIS"]
            for group in (where or {}).get(name, default):
                (images / group / f"{name}_brain.nii.gz").touch()
    return folder


PUBLISHED = [("30", "1", "84", "6"), ("7", "0", "55", "15"), ("213", "1", "60", "9"), ("9", "1", "79", "")]


def write_simulated(folder, patients=2, **record):
    """Write a table with the layout and the record of the simulation."""
    (folder / "scans").mkdir(parents=True)
    names = [f"{folder.name}{number}" for number in range(patients)]
    for name in names:
        (folder / "scans" / f"{name}.nii.gz").touch()
    (folder / "simulation.json").write_text(json.dumps({"simulation": 2, **record}))
    (folder / "cohort.csv").write_text("\n".join(["patient,scan", *(f"{n},scans/{n}.nii.gz" for n in names)]))
    return Cohort.read(folder / "cohort.csv")


def test_the_record_of_the_simulation_decides_whether_patients_are_simulated(write_table, tmp_path):
    given = Cohort.read(write_table("patient,scan\n1,a.nii\n"), scans=False)
    assert (given.origin.kind, given.origin.sentence, given.origin.records) == ("not simulated", "", ())
    simulated = write_simulated(tmp_path / "sim", seed=3)
    assert (simulated.origin.kind, simulated.origin.patients, simulated.origin.simulated) == ("simulated", 2, 2)
    assert [record["seed"] for record in simulated.origin.records] == [3]
    assert simulated.origin.sentence == "These patients are simulated."
    mixed = Cohort.join([given, simulated, write_simulated(tmp_path / "other", 1, seed=4)])
    assert (mixed.origin.kind, mixed.origin.sentence) == ("mixed", "3 of 4 patients are simulated.")
    assert [record["seed"] for record in mixed.origin.records] == [3, 4]


def test_a_table_elsewhere_and_links_do_not_hide_that_patients_are_simulated(tmp_path):
    simulated = write_simulated(tmp_path / "sim")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x.nii.gz").symlink_to(tmp_path / "sim" / "scans" / "sim0.nii.gz")
    (tmp_path / "links" / "real.nii.gz").touch()
    (tmp_path / "far" / "away").mkdir(parents=True)
    written = simulated.write(tmp_path / "far" / "away" / "table.csv")
    assert Cohort.read(written).origin.kind == "simulated"
    # a real patient in the table of the simulation stays real
    rows = "patient,scan\nx,../links/x.nii.gz\nreal,../links/real.nii.gz\n"
    (tmp_path / "sim" / "both.csv").write_text(rows)
    assert Cohort.read(tmp_path / "sim" / "both.csv").origin.sentence == "1 of 2 patients are simulated."


@pytest.mark.parametrize("text", ["", "[]", '{"preset": "plain"}'])
def test_a_record_that_cannot_be_read_leaves_nothing_to_guess(tmp_path, text):
    simulated = write_simulated(tmp_path / "sim")
    (tmp_path / "sim" / "simulation.json").write_text(text)
    with pytest.raises(CohortError, match=r"simulation\.json: is not the record of a simulation.*Simulate them again"):
        _ = simulated.origin


def test_the_published_data_set_becomes_a_table(tmp_path):
    folder = csic(tmp_path / "data", PUBLISHED)
    result = run("cohort", "csic", folder)
    assert result.stdout == f"{folder / 'cohort.csv'}  3 patients\n"
    assert "Patient 213 is left out" in result.stderr
    cohort = Cohort.read(folder / "cohort.csv")
    assert [p.name for p in cohort.patients] == ["30", "7", "9"]
    assert list(cohort.numbers("poor_outcome")) == [1, 0, 1]
    assert list(cohort.numbers("age")) == [84, 55, 79]
    assert list(cohort.labels(task("densenet121.gcs3", "gcs"))) == [2, 0, -1]
    renamed = {"PatientID": "patient", "Label (poor_prognosis)": "poor_outcome", "Age": "age", "GCS": "gcs"}
    with (folder / "cohort.csv").open(encoding="utf-8", newline="") as file:
        header, first, *_ = csv.reader(file)
    assert header == ["patient", "scan", *(renamed.get(c, c) for c in HEADER[1:])]
    assert first[1] == "ICH_nii_StrippedSkull/POOR_PROGNOSIS/30_brain.nii.gz"
    assert cohort.patients[0].columns["Tº"] == "36.5"


def test_the_table_may_lie_elsewhere(tmp_path):
    folder = csic(tmp_path / "data", PUBLISHED)
    out = tmp_path / "mine.csv"
    described = json.loads(run("cohort", "csic", folder, "-o", out, "--json").stdout)
    assert described == {"path": str(out), "patients": 3, "left_out": ["213"]}
    assert Cohort.read(out).patients == from_csic(folder).patients
    assert not (folder / "cohort.csv").exists()


@pytest.mark.parametrize(
    ("patient", "where", "expected_message"),
    [
        (("9", "1", "70", "9"), ["GOOD_PROGNOSIS"], "row 3 (patient 9): Label (poor_prognosis) is 1, but 9_brain"),
        (("9", "0", "70", "9"), ["POOR_PROGNOSIS"], "row 3 (patient 9): Label (poor_prognosis) is 0, but 9_brain"),
        (("9", "0", "70", "9"), [], "row 3 (patient 9): 9_brain.nii.gz is in neither of"),
        (("9", "0", "70", "9"), ["GOOD_PROGNOSIS", "POOR_PROGNOSIS"], "row 3 (patient 9): 9_brain.nii.gz is in both"),
        (("9", "2", "70", "9"), ["POOR_PROGNOSIS"], "row 3 (patient 9): column poor_outcome is 2. Expected 0 or 1"),
        (("9", "0", "70", "16"), ["GOOD_PROGNOSIS"], "row 3 (patient 9): column gcs is 16"),
        (("7", "0", "70", "9"), ["GOOD_PROGNOSIS"], "row 3 (patient 7): the patient is already in row 2"),
    ],
)
def test_a_contradiction_in_the_data_set_is_named(tmp_path, patient, where, expected_message):
    folder = csic(tmp_path / "data", [PUBLISHED[1], patient], {patient[0]: where})
    (folder / "cohort.csv").write_text("kept")
    assert expected_message in run("cohort", "csic", folder, code=2).stderr
    assert (folder / "cohort.csv").read_text() == "kept"


def test_a_folder_without_the_data_set_is_refused(tmp_path):
    assert "expected one CLINICAL_DATA_ICH.csv, found none" in run("cohort", "csic", tmp_path, code=2).stderr
    folder = csic(tmp_path / "data", PUBLISHED)
    (folder / "ICH_nii_StrippedSkull").rename(folder / "elsewhere")
    assert "GOOD_PROGNOSIS is missing" in run("cohort", "csic", folder, code=2).stderr


def ct_ich(folder, people, slices, scans=("ct_scans/049.nii", "ct_scans/051.nii"), masks=()):
    """The layout of PhysioNet's ct-ich: two rows of headings, patients as numbers, slices from 1."""
    kinds = "Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural"
    head = f'Patient Number,"Age\n(years)",Gender,Hemorrhage type,,,,,Note\n,,,{kinds},\n'
    folder.mkdir()
    (folder / "Patient_demographics.csv").write_text(head + "".join(f"{row},,,,,,\n" for row in people))
    head = f"PatientNumber,SliceNumber,{kinds},No_Hemorrhage,Fracture_Yes_No\n"
    (folder / "hemorrhage_diagnosis_raw_ct.csv").write_text(head + "".join(f"{row},0\n" for row in slices))
    for name in (*scans, *masks):
        (folder / name).parent.mkdir(exist_ok=True)
        nib.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.eye(4)).to_filename(folder / name)
    return folder


PEOPLE = ["49,35,Male", "50,40,Female", "51,0.5,Female"]
SLICES = [
    "49,1,0,0,0,0,0,1", "49,2,0,1,0,1,0,0", "49,3,0,1,0,0,0,0",
    "50,1,0,0,0,0,0,1", "51,1,0,0,0,0,0,1", "51,2,0,0,0,0,0,1",
]  # fmt: skip


def test_the_layout_of_ct_ich_becomes_a_table(tmp_path):
    folder = ct_ich(tmp_path / "data", PEOPLE, SLICES, masks=["masks/049.nii"])
    assert run("cohort", "ct-ich", folder).stdout == f"{folder / 'cohort.csv'}  2 patients, 1 with a haemorrhage\n"
    with (folder / "cohort.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "patient": "49", "scan": "ct_scans/049.nii", "age": "35", "sex": "Male", "haemorrhage": "1",
        "intraventricular": "0", "intraparenchymal": "1", "subarachnoid": "0", "epidural": "1", "subdural": "0",
        "haemorrhage_slices": "1 2", "mask": "masks/049.nii",
    }  # fmt: skip
    assert (second["patient"], second["haemorrhage"], second["haemorrhage_slices"]) == ("51", "0", "")
    elsewhere = tmp_path / "mine.csv"
    described = json.loads(run("cohort", "ct-ich", folder, "-o", elsewhere, "--json").stdout)
    assert described == {"path": str(elsewhere), "patients": 2, "with_haemorrhage": 1}
    cohort = Cohort.read(elsewhere)
    assert list(cohort.numbers("age")) == [35, 0.5]
    assert cohort.patients[0].columns["mask"] == "data/masks/049.nii"


def test_scans_of_ct_ich_may_lie_beside_the_tables(tmp_path):
    folder = ct_ich(tmp_path / "data", PEOPLE, SLICES, scans=["49.nii.gz"])
    cohort = from_ct_ich(folder)
    assert [(patient.name, patient.scan.name) for patient in cohort.patients] == [("49", "49.nii.gz")]
    assert "mask" not in cohort.columns


@pytest.mark.parametrize(
    ("slices", "scans", "expected_message"),
    [
        (["49,1,0,0,0,0,0,0"], ["49.nii"], "row 2 of hemorrhage_diagnosis_raw_ct.csv: No_Hemorrhage is 0"),
        (["49,1,0,1,0,0,0,1"], ["49.nii"], "row 2 of hemorrhage_diagnosis_raw_ct.csv: No_Hemorrhage is 1"),
        (["49,0,0,0,0,0,0,1"], ["49.nii"], "row 2 of hemorrhage_diagnosis_raw_ct.csv: expected numbers from 1"),
        (["49,1,0,2,0,0,0,0"], ["49.nii"], "row 2 of hemorrhage_diagnosis_raw_ct.csv: expected numbers from 1"),
        (["49,4,0,1,0,0,0,0"], ["49.nii"], "row 3 (patient 49): slice 4 is labelled, but 49.nii has 3"),
        (["50,1,0,0,0,0,0,1"], ["49.nii"], "row 3 (patient 49): has no row in hemorrhage_diagnosis*.csv"),
        (["49,1,0,0,0,0,0,1"], ["49.nii", "99.nii"], "99.nii is in no row"),
        (SLICES, [], "found no scan such as ct_scans/049.nii. JPEG slices hold no HU"),
    ],
)
def test_a_contradiction_in_ct_ich_is_named(tmp_path, slices, scans, expected_message):
    folder = ct_ich(tmp_path / "data", PEOPLE, slices, scans=scans)
    assert expected_message in run("cohort", "ct-ich", folder, code=2).stderr
    assert not (folder / "cohort.csv").exists()


def test_a_folder_without_the_tables_of_ct_ich_is_refused(tmp_path):
    assert "expected one *atient_demographics*.csv, found none" in run("cohort", "ct-ich", tmp_path, code=2).stderr


def test_a_cohort_is_predicted_in_order_with_missing_scans_recorded(bright_model, tmp_path):
    """Labels are not used, so that a wrong one does not matter."""
    scan = nib.Nifti1Image(brain_hu((96, 96, 30)), np.diag([-2.5, -2.5, 5, 1]))
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        scan.to_filename(tmp_path / name / "1.nii.gz")
    path = tmp_path / "cohort.csv"
    path.write_text("patient,scan,gcs\nz,south/1.nii.gz,99\ny,gone.nii.gz,\nx,north/1.nii.gz,\n")
    out = tmp_path / "out.csv"
    result = run("predict", path, "-m", bright_model, "-o", out, "--masks", tmp_path / "masks", code=1)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scan"] for row in rows] == [str(p.scan) for p in Cohort.read(path, scans=False).patients]
    assert [math.isfinite(float(row["prognosis_poor"] or "nan")) for row in rows] == [True, False, True]
    assert "no such file" in " ".join(rows[1].values())
    assert result.stdout.count("FAILED") == 1
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["north_1_brain.nii.gz", "south_1_brain.nii.gz"]
    run("explain", path, "-m", bright_model, "--method", "grad_cam", "-o", tmp_path / "maps", code=1)
    assert len(list((tmp_path / "maps").glob("*.nii.gz"))) == 2
