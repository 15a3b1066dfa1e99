"""Cohorts: tables with one row per patient, a scan, and optional labels and clinical columns.

The simulation writes a record into the folder of its patients. `Cohort.origin` reads the record, and no other place
decides whether patients are simulated.
"""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ichprog.errors import CohortError, UnknownNameError
from ichprog.io import unescape_cell, write_csv
from ichprog.notebook import card
from ichprog.spec import Task

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("patient", "scan")
CHECKED: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "poor_outcome": (lambda value: value in (0, 1), "0 or 1"),
    "gcs": (lambda value: value in range(3, 16), "a whole number from 3 to 15"),
    "age": (lambda value: 0 <= value <= 120, "years from 0 to 120"),
}  # allowed values of well-known columns; every other column may hold anything
_DELIMITERS = ",;\t"
_SHOWN = 10  # patients in a notebook
_MAX_PROBLEMS = 10  # problems listed in one error message

SIMULATION_RECORD = "simulation.json"
"""Name of the record that the simulation writes into its folder, next to the folder of the scans."""

CSIC_TABLE = "CLINICAL_DATA_ICH.csv"
CSIC_IMAGES = "ICH_nii_StrippedSkull"
CSIC_GROUPS = ("GOOD_PROGNOSIS", "POOR_PROGNOSIS")  # in the order of the label: 0, 1
CSIC_COLUMNS = {"PatientID": "patient", "Label (poor_prognosis)": "poor_outcome", "Age": "age", "GCS": "gcs"}
CSIC_LEFT_OUT = "213"

CT_ICH_DIAGNOSES = "hemorrhage_diagnosis*.csv"
CT_ICH_DEMOGRAPHICS = "*atient_demographics*.csv"
CT_ICH_KINDS = ("intraventricular", "intraparenchymal", "subarachnoid", "epidural", "subdural")


class Columns(dict[str, str]):
    """Cells by column name. Names match regardless of case.

    Examples:
        >>> cells = Columns({"GCS": "15"})
        >>> cells["gcs"], "gcs" in cells, list(cells)
        ('15', True, ['GCS'])
    """

    def __init__(self, cells: Mapping[str, str]) -> None:
        super().__init__(cells)
        self._names = {name.casefold(): name for name in cells}

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(self.written(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.casefold() in self._names

    def get(self, name: str, default: Any = None) -> Any:
        """Return a cell, or the default if the column does not exist."""
        return super().get(self.written(name), default)

    def written(self, name: str) -> str:
        """Return a column's name as the table spells it."""
        return self._names.get(name.casefold(), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Columns, (dict(self),)


@dataclass(frozen=True)
class Patient:
    """One row of a cohort.

    Attributes:
        name: Name of the patient, unique in the cohort.
        scan: Path of the scan.
        columns: Text of every other cell by column, "" if blank.
        row: Row of the table as a spreadsheet numbers it, or None.
    """

    name: str
    scan: Path
    columns: Mapping[str, str]
    row: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.columns, Columns):
            object.__setattr__(self, "columns", Columns(self.columns))


@dataclass(frozen=True)
class Origin:
    """How many patients of a cohort are simulated.

    Attributes:
        patients: Number of patients.
        simulated: Number of simulated patients.
        records: The distinct records of the simulations, such as the seed and the preset.

    Examples:
        >>> Origin(40, 12).sentence
        '12 of 40 patients are simulated.'
    """

    patients: int
    simulated: int
    records: tuple[Mapping[str, Any], ...] = ()

    @property
    def kind(self) -> Literal["simulated", "mixed", "not simulated"]:
        """Return whether all patients are simulated, some, or none."""
        if not self.simulated:
            return "not simulated"
        return "simulated" if self.simulated == self.patients else "mixed"

    @property
    def sentence(self) -> str:
        """Return a sentence about simulated patients, or "" if there are none."""
        if self.kind == "mixed":
            return f"{self.simulated} of {self.patients} patients are simulated."
        return "These patients are simulated." if self.simulated else ""


@dataclass(frozen=True, repr=False)
class Cohort:
    """A table of patients.

    Attributes:
        patients: The patients, in the table's order.
        source: Path of the table, for messages.

    Examples:
        >>> cohort = Cohort((Patient("1", Path("1.nii.gz"), {"gcs": "15"}),), "cohort.csv")
        >>> cohort
        Cohort(1 patient, columns: gcs, source: 'cohort.csv')
        >>> cohort.numbers("GCS")
        array([15.])
    """

    patients: tuple[Patient, ...]
    source: str

    @classmethod
    def read(cls, path: str | Path, *, scans: bool = True) -> "Cohort":
        """Read a table.

        Values of columns are checked when they are used, by `numbers` and `labels`.

        Args:
            path: A CSV file in UTF-8, separated by commas, semicolons or tabs. The columns `patient` and `scan` are
                required. Scans are paths relative to the table. Column names match regardless of case.
            scans: Whether every scan must exist.

        Raises:
            CohortError: The file is not a table, a column is missing or doubled, or rows are wrong; the message names
                the rows.

        Examples:
            ```python
            cohort = Cohort.read("cohort.csv")
            ```
        """
        rows, problems = _read_rows(Path(path), REQUIRED)
        return cls._from_rows(rows, problems, Path(path), check_scans=scans)

    @classmethod
    def from_frame(cls, frame: "pd.DataFrame", *, folder: str | Path = ".", scans: bool = True) -> "Cohort":
        """Make a cohort of a pandas table with the columns `patient` and `scan`.

        Args:
            frame: The table. A missing value is a blank cell.
            folder: Folder at which relative paths of scans start.
            scans: Whether every scan must exist.

        Raises:
            CohortError: A column is missing, or rows are wrong; the message names the rows.

        Examples:
            ```python
            cohort = Cohort.from_frame(pd.read_excel("patients.xlsx"), folder="scans")
            ```
        """
        if missing := [column for column in REQUIRED if column not in (str(c).casefold() for c in frame.columns)]:
            raise CohortError(f"The table has no column {' or '.join(missing)}. Its columns: {list(frame.columns)}.")
        cells = frame.astype(object).where(frame.notna(), "")
        rows = {
            number: Columns({str(column): str(cell).strip() for column, cell in zip(frame.columns, row, strict=True)})
            for number, row in enumerate(cells.itertuples(index=False, name=None), start=2)
        }
        return cls._from_rows(rows, [], Path(folder) / "table", check_scans=scans)

    @classmethod
    def _from_rows(
        cls, rows: Mapping[int, Columns], problems: list[tuple[int, str]], table: Path, *, check_scans: bool
    ) -> "Cohort":
        """Build a cohort from numbered rows, or raise one error with all problems."""
        if not rows and not problems:
            raise CohortError(f"{table}: has no patients. Add a row for each patient below the first row.")
        first_rows: dict[str, int] = {}
        patients = []
        for number, row in rows.items():
            name, scan = (row[column] for column in REQUIRED)
            cells = {column: cell for column, cell in row.items() if column.casefold() not in REQUIRED}
            patient = Patient(name, table.parent / scan, cells, number)
            patients.append(patient)
            if not name:
                problems.append((number, ": column patient is blank; every patient needs a name"))
            elif name in first_rows:
                problems.append((number, f"{_who(patient)}: the patient is already in row {first_rows[name]}"))
            first_rows.setdefault(name, number)
            if not scan:
                problems.append((number, f"{_who(patient)}: column scan is blank; it takes a path"))
            elif check_scans and not _exists(patient.scan):
                text = f"scan {patient.scan} does not exist; paths are relative to the table"
                problems.append((number, f"{_who(patient)}: {text}"))
        _raise_problems(str(table), _by_row(problems))
        return cls(tuple(patients), str(table))

    @classmethod
    def join(cls, cohorts: Sequence["Cohort"]) -> "Cohort":
        """Combine several cohorts, one after another.

        A column that a cohort lacks is blank for its patients. If two cohorts share a patient's name, they are taken
        for two patients, and each name gets its table's name as a prefix, with as many folders as needed.

        Args:
            cohorts: The cohorts.

        Raises:
            CohortError: There is no cohort, two cohorts hold one patient with the same scan, or names stay equal.

        Examples:
            ```python
            both = Cohort.join([Cohort.read("north.csv"), Cohort.read("south.csv")])
            ```
        """
        if not cohorts:
            raise CohortError("There is no cohort to join. Give one or more.")
        source = ", ".join(cohort.source for cohort in cohorts)
        counts = Counter(patient.name for cohort in cohorts for patient in cohort.patients)
        columns = _distinct(column for cohort in cohorts for column in cohort.columns)
        first_cohorts: dict[tuple[str, Path], Cohort] = {}
        problems, patients = [], []
        for cohort, prefix in zip(cohorts, _table_prefixes([cohort.source for cohort in cohorts]), strict=True):
            for patient in cohort.patients:
                name = patient.name
                if counts[name] > 1:
                    key = (name, patient.scan.resolve())
                    if key in first_cohorts:
                        tables = f"{first_cohorts[key].source} and {cohort.source}"
                        problems.append(f"patient {name} has the same scan in {tables}; remove one of the rows")
                    first_cohorts[key] = cohort
                    name = f"{prefix}_{name}"
                cells = {column: patient.columns.get(column, "") for column in columns}
                patients.append(replace(patient, name=name, columns=cells))
        for name, count in Counter(patient.name for patient in patients).items():
            if count > 1 and not problems:
                problems.append(f"{count} patients would be named {name}; rename a table or a patient")
        _raise_problems(source, problems)
        return cls(tuple(patients), source)

    def write(self, path: str | Path) -> Path:
        """Write the table atomically, with scans relative to it, and masks too if their paths are absolute.

        Args:
            path: Path of the CSV file. `Cohort.read` of it returns the same patients.

        Returns:
            The path.

        Examples:
            ```python
            cohort.write("copy.csv")
            ```
        """
        target = Path(path)
        folder, columns = target.parent.resolve(), self.columns

        # Only folders are resolved, because a scan may be a link whose own name matters.
        def relative(path: Path) -> str:
            return Path(os.path.relpath(path.parent.resolve() / path.name, folder)).as_posix()

        def cell(patient: Patient, column: str) -> str:
            text: str = patient.columns.get(column, "")
            return relative(Path(text)) if column.casefold() == "mask" and Path(text).is_absolute() else text

        rows = (
            {
                "patient": patient.name,
                "scan": relative(patient.scan),
                **{column: cell(patient, column) for column in columns},
            }
            for patient in self.patients
        )
        write_csv(target, [*REQUIRED, *columns], rows)
        return target

    def __len__(self) -> int:
        return len(self.patients)

    def __repr__(self) -> str:
        columns = f"columns: {', '.join(self.columns)}, " if self.columns else ""
        return f"Cohort({len(self)} patient{'s' * (len(self) != 1)}, {columns}source: {self.source!r})"

    def _repr_html_(self) -> str:
        """Show the first patients as a table in a notebook."""
        shown = self.patients[:_SHOWN]
        rows = [[p.name, p.scan.name, *(p.columns.get(column, "") for column in self.columns)] for p in shown]
        notes = [f"{len(self) - len(shown)} more patients."] if len(self) > len(shown) else []
        return card(f"{len(self)} patients of {self.source}", ["patient", "scan", *self.columns], rows, notes)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of all columns except `patient` and `scan`, in the table's order."""
        return _distinct(column for patient in self.patients for column in patient.columns)

    @property
    def origin(self) -> Origin:
        """Return how many patients are simulated, by the records of the simulation.

        A patient is simulated if `simulation.json` lies in the folder of the scan, or one level above. The position of
        the table does not matter.

        Raises:
            CohortError: A record cannot be read.
        """
        records: dict[Path, Mapping[str, Any] | None] = {}
        for patient in self.patients:
            for folder in _record_folders(patient.scan):
                if folder not in records:
                    records[folder] = _read_simulation_record(folder / SIMULATION_RECORD)
        found = [
            next((record for folder in _record_folders(patient.scan) if (record := records[folder]) is not None), None)
            for patient in self.patients
        ]
        known = [record for record in found if record is not None]
        distinct = {json.dumps(record, sort_keys=True): record for record in known}
        return Origin(len(self), len(known), tuple(distinct.values()))

    def has_column(self, name: str) -> bool:
        """Return whether a column exists, regardless of case."""
        return name.casefold() in {column.casefold() for column in self.columns}

    def numbers(self, column: str) -> np.ndarray:
        """Return a column as numbers.

        Args:
            column: Name of the column, regardless of case.

        Returns:
            `(N,)` float64 in the order of the patients, NaN if blank.

        Raises:
            UnknownNameError: The column does not exist.
            CohortError: A cell is not a number, or its value is not allowed; the message names the rows.
        """
        if not self.has_column(column):
            raise UnknownNameError(f"column of {self.source}", column, self.columns)
        _raise_problems(self.source, _by_row(_value_problems(self.patients, column)))
        cells = [patient.columns.get(column, "") for patient in self.patients]
        return np.array([float(cell) if cell else math.nan for cell in cells], dtype=np.float64)

    def slices(self, column: str) -> list[tuple[int, ...] | None]:
        """Return a column of slice numbers, which are separated by spaces.

        Args:
            column: Name of the column, regardless of case.

        Returns:
            The numbers for each patient, None if blank.

        Raises:
            UnknownNameError: The column does not exist.
            CohortError: A cell holds something else than whole numbers; the message names the rows.

        Examples:
            >>> Cohort((Patient("1", Path("1.nii.gz"), {"slices": "7 8"}),), "cohort.csv").slices("slices")
            [(7, 8)]
        """
        if not self.has_column(column):
            raise UnknownNameError(f"column of {self.source}", column, self.columns)
        cells = [patient.columns.get(column, "") for patient in self.patients]
        problems = [
            (
                patient.row or 0,
                f"{_who(patient)}: column {column} is {cell}. Expected slice numbers such as 7 8, or blank.",
            )
            for patient, cell in zip(self.patients, cells, strict=True)
            if not all(number.isdigit() for number in cell.split())
        ]
        _raise_problems(self.source, _by_row(problems))
        return [tuple(map(int, cell.split())) or None for cell in cells]

    def labels(self, task: Task) -> np.ndarray:
        """Return the true labels of a task.

        Args:
            task: The task. Its target names the column and the thresholds between labels.

        Returns:
            `(N,)` int64 label indices, -1 if blank.

        Raises:
            UnknownNameError: The target's column does not exist.
            CohortError: A cell is not a number, or its value is not allowed; the message names the rows.
        """
        values = self.numbers(task.target.column)
        return np.array([-1 if np.isnan(value) else task.target.index(value) for value in values], dtype=np.int64)


def find_masks(cohort: Cohort, column: str | None = None) -> dict[str, Path]:
    """Return the path of the lesion mask by name of the patient, for patients with a mask.

    The column has paths relative to the table, blank without a mask.

    Args:
        cohort: The patients.
        column: Name of the column, which must exist. By default the column `mask`. If there is none, masks are
            `masks/<patient>.nii.gz` next to the folder of the scans.

    Raises:
        UnknownNameError: The named column does not exist.
        CohortError: A mask in the column does not exist.

    Examples:
        ```python
        find_masks(Cohort.read("patients/cohort.csv"))  # {"p0001": Path("patients/masks/p0001.nii.gz"), ...}
        ```
    """
    if column is not None and not cohort.has_column(column):
        raise UnknownNameError(f"column of {cohort.source}", column, cohort.columns)
    masks = {}
    for patient in cohort.patients:
        cell = patient.columns.get(column or "mask", None if column is None else "")
        scan = patient.scan.name.removesuffix(".gz").removesuffix(".nii")  # joined cohorts have renamed patients
        names = [f"masks/{name}.nii.gz" for name in (patient.name, scan)] if cell is None else [cell]
        folders = [*patient.scan.parents[:2]] if cell is None else [Path(cohort.source).parent, *patient.scan.parents]
        existing = [folder / name for name in names if name for folder in folders if (folder / name).is_file()]
        if existing:
            masks[patient.name] = existing[0]
        elif cell:
            raise CohortError(
                f"{cohort.source}: patient {patient.name}: the mask {cell} does not exist. Give a path relative to the "
                "table, or leave the cell blank."
            )
    return masks


def from_csic(folder: str | Path) -> Cohort:
    """Build the cohort of the published data set, in the order of its clinical table and without patient 213.

    Published with Cobo et al., "Multi-task Learning Approach for Intracranial Hemorrhage Prognosis", 2024, whose code
    leaves that patient out.

    Args:
        folder: Folder with `ICH_nii_StrippedSkull` and, at any depth, `CLINICAL_DATA_ICH.csv`.

    Returns:
        The cohort, with outcome, age and GCS in the columns `poor_outcome`, `age` and `gcs`. Other columns keep their
        names.

    Raises:
        CohortError: The table or the images are missing, or rows are wrong: no image, two images, or an image in the
            folder of the other outcome.

    Examples:
        ```python
        from_csic("data").write("data/cohort.csv")
        ```
    """
    folder = Path(folder)
    images = folder / CSIC_IMAGES
    tables = sorted(folder.rglob(CSIC_TABLE))
    if len(tables) != 1:
        listed = ", ".join(map(str, tables)) or "none"
        raise CohortError(f"{folder}: expected one {CSIC_TABLE}, found {listed}.")
    for group in CSIC_GROUPS:
        if not (images / group).is_dir():
            raise CohortError(f"{folder}: the folder {images / group} is missing. It should hold the brain images.")
    source_rows, problems = _read_rows(tables[0], tuple(CSIC_COLUMNS))
    rows = {}
    for number, row in source_rows.items():
        if row["PatientID"] == CSIC_LEFT_OUT:
            continue
        file = f"{row['PatientID']}_brain.nii.gz"
        label = _parse_number(row["Label (poor_prognosis)"])
        groups = [group for group in CSIC_GROUPS if (images / group / file).exists()]
        who = f" (patient {row['PatientID']})"
        if len(groups) != 1:
            which = "both" if groups else "neither"
            problems.append((number, f"{who}: {file} is in {which} of {' and '.join(CSIC_GROUPS)} of {images}"))
        elif label in (0, 1) and CSIC_GROUPS[int(label)] != groups[0]:
            problems.append((number, f"{who}: Label (poor_prognosis) is {label:g}, but {file} is in {groups[0]}"))
        scan = images.resolve() / (groups or CSIC_GROUPS)[0] / file
        cells = {CSIC_COLUMNS.get(column, column): cell for column, cell in row.items()} | {"scan": str(scan)}
        rows[number] = Columns(cells)
        patient = Patient(cells["patient"], scan, cells, number)
        problems += [problem for column in CHECKED for problem in _value_problems([patient], column)]
    return Cohort._from_rows(rows, problems, tables[0], check_scans=False)


def from_ct_ich(folder: str | Path) -> Cohort:
    """Build the cohort of the public data set `ct-ich` of PhysioNet from its own layout.

    A patient without a scan is left out. Slices are numbered from 0 along the third axis of the file, which is one less
    than `SliceNumber` of the data set.

    Source: Hssayeni et al., Data 2020;5(1):14 (doi 10.3390/data5010014).

    Args:
        folder: Folder with `Patient_demographics.csv`, `hemorrhage_diagnosis*.csv`, and scans `<number>.nii` or
            `<number>.nii.gz` in `ct_scans` or in the folder itself. Masks with the same names may be in `masks`.

    Returns:
        The cohort in the order of the demographics, named by patient number. Columns are `age` in years, `sex`,
        `haemorrhage` and the five kinds as 0 or 1, `haemorrhage_slices` separated by spaces, and `mask`.

    Raises:
        CohortError: A table or all scans are missing, or rows are wrong: no diagnosis, `No_Hemorrhage` that contradicts
            the kinds, or a slice that the file does not have.

    Examples:
        ```python
        from_ct_ich("ct-ich").write("ct-ich/cohort.csv")
        ```
    """
    folder = Path(folder)
    people, problems = _read_rows(_only_file(folder, CT_ICH_DEMOGRAPHICS), ())
    slices, wrong = _read_ct_ich_slices(_only_file(folder, CT_ICH_DIAGNOSES))
    scans, masks = _numbered_images(folder / "ct_scans"), _numbered_images(folder / "masks")
    scans = scans or _numbered_images(folder)
    if not scans:
        raise CohortError(
            f"{folder}: found no scan such as ct_scans/049.nii. JPEG slices hold no HU; convert them to NIfTI first."
        )
    problems += wrong
    rows, listed = {}, set()
    for number, row in people.items():
        cells = {_letters(column): cell for column, cell in row.items()}
        value = _parse_number(_cell_of(cells, "patientnumber"))
        if value is None or value not in scans:  # a second row of headings, or no scan
            continue
        patient = int(value)
        listed.add(patient)
        columns = {
            "patient": str(patient),
            "scan": str(scans[patient].resolve()),
            "age": _cell_of(cells, "age"),
            "sex": _cell_of(cells, "gender", "sex"),
            **_ct_ich_labels(slices.get(patient, {})),
        }
        if masks:
            columns["mask"] = str(masks[patient].resolve()) if patient in masks else ""
        text = _ct_ich_problem(slices.get(patient, {}), scans[patient])
        problems += [(number, f" (patient {patient}): {text}")] if text else []
        problems += _value_problems([Patient(str(patient), scans[patient], columns, number)], "age")
        rows[number] = Columns(columns)
    problems += [(0, f" {scans[patient].name} is in no row") for patient in sorted(set(scans) - listed)]
    return Cohort._from_rows(rows, problems, folder / "cohort.csv", check_scans=False)


def _ct_ich_labels(slices: Mapping[int, tuple[bool, ...]]) -> dict[str, str]:
    """Return the columns on haemorrhage of one patient, from the kinds that each slice shows."""
    positive = sorted(index for index, kinds in slices.items() if any(kinds))
    shown = {name: any(kinds[at] for kinds in slices.values()) for at, name in enumerate(CT_ICH_KINDS)}
    labels = {name: str(int(is_there)) for name, is_there in {"haemorrhage": bool(positive), **shown}.items()}
    return {**labels, "haemorrhage_slices": " ".join(map(str, positive))}


def _ct_ich_problem(slices: Mapping[int, tuple[bool, ...]], scan: Path) -> str:
    """Return how the labelled slices of one patient contradict the scan, or ""."""
    import nibabel as nib

    if not slices:
        return f"has no row in {CT_ICH_DIAGNOSES}"
    image: Any = nib.load(scan)
    last = max((index for index, kinds in slices.items() if any(kinds)), default=-1)
    return f"slice {last + 1} is labelled, but {scan.name} has {image.shape[2]}" if last >= image.shape[2] else ""


def _read_ct_ich_slices(
    table: Path,
) -> tuple[dict[int, dict[int, tuple[bool, ...]]], list[tuple[int, str]]]:
    """Read which kinds of haemorrhage each slice shows, by patient and by slice from 0, and the rows that are wrong."""
    rows, problems = _read_rows(table, ("PatientNumber", "SliceNumber", *CT_ICH_KINDS))
    slices: dict[int, dict[int, tuple[bool, ...]]] = {}
    for number, row in rows.items():
        patient, index = (_parse_number(row[column]) or 0 for column in ("PatientNumber", "SliceNumber"))
        kinds, none = [row[kind] for kind in CT_ICH_KINDS], row.get("No_Hemorrhage", "")
        if min(patient, index) < 1 or not {*kinds, none or "0"} <= {"0", "1"}:
            problems.append(
                (number, f" of {table.name}: expected numbers from 1 and labels 0 or 1, got {[*row.values()]}")
            )
        elif none and (none == "1") == ("1" in kinds):
            problems.append((number, f" of {table.name}: No_Hemorrhage is {none}, which contradicts the kinds"))
        else:
            slices.setdefault(int(patient), {})[int(index) - 1] = tuple(kind == "1" for kind in kinds)
    return slices, problems


def _only_file(folder: Path, pattern: str) -> Path:
    """Return the only file in a folder that fits a pattern."""
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise CohortError(f"{folder}: expected one {pattern}, found {', '.join(map(str, files)) or 'none'}.")
    return files[0]


def _numbered_images(folder: Path) -> dict[int, Path]:
    """Return the NIfTI files of a folder whose name is a number, by number."""
    files = sorted(path for suffix in (".nii", ".nii.gz") for path in folder.glob(f"*{suffix}"))
    return {int(name): path for path in files if (name := path.name.split(".")[0]).isdecimal()}


def _letters(column: str) -> str:
    return "".join(character for character in column.casefold() if character.isalpha())


def _cell_of(cells: Mapping[str, str], *starts: str) -> str:
    """Return the first cell whose column begins with one of some texts, or ""."""
    return next((cell for column, cell in cells.items() if column.startswith(starts)), "")


def is_simulated(scan: Path) -> bool:
    """Return whether a scan is that of a simulated patient, as `Cohort.origin` decides it.

    Args:
        scan: Path of the scan.

    Raises:
        CohortError: The record of a simulation cannot be read.
    """
    return any(_read_simulation_record(folder / SIMULATION_RECORD) is not None for folder in _record_folders(scan))


def _record_folders(scan: Path) -> Sequence[Path]:
    """Return the folders that may hold the record of the simulation of a patient. A scan may be a link."""
    return list(dict.fromkeys([*scan.absolute().parents[:2], *scan.resolve().parents[:2]]))


def _read_simulation_record(path: Path) -> Mapping[str, Any] | None:
    """Return the record of a simulation, or None if there is none."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        record, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(record, dict) or "simulation" not in record:
        raise CohortError(
            f"{path}: is not the record of a simulation{reason}. Whether the patients are simulated is unknown. "
            "Simulate them again, or remove the file if they are not."
        )
    return record


def _read_rows(path: Path, required: Sequence[str]) -> tuple[dict[int, Columns], list[tuple[int, str]]]:
    """Read a CSV file: rows by number with stripped cells, and the rows that do not fit the first row.

    Blank rows and columns without a name are skipped.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            cells = [[unescape_cell(cell.strip()) for cell in row] for row in lines]
    except UnicodeDecodeError as error:
        raise CohortError(f"{path}: is not text in UTF-8 ({error.reason}). Save the table as CSV UTF-8.") from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise CohortError(f"{path}: cannot be read as a table: {reason}") from error
    header = cells[0] if cells else []
    spellings: dict[str, list[str]] = {}
    for column in filter(None, header):
        spellings.setdefault(column.casefold(), []).append(column)
    wrong = [f"column {column} is missing" for column in required if column.casefold() not in spellings]
    wrong += [f"column {' and '.join(names)} is there {len(names)} times" for names in spellings.values() if names[1:]]
    if wrong:
        raise CohortError(
            f"{path}: {'; '.join(wrong)}. The first row is {', '.join(header) or 'blank'}. Column names match "
            "regardless of case."
        )
    rows: dict[int, Columns] = {}
    problems = []
    for number, row in enumerate(cells[1:], start=2):
        if not any(row):
            continue
        if len(row) == len(header):
            rows[number] = Columns({column: cell for column, cell in zip(header, row, strict=True) if column})
        else:
            hint = "; a decimal comma splits a cell" if delimiter == "," and len(row) > len(header) else ""
            problems.append((number, f": {len(row)} cells, but the first row has {len(header)}{hint}"))
    return rows, problems


def _value_problems(patients: Sequence[Patient], column: str) -> list[tuple[int, str]]:
    """Return the rows whose cell in a column is not a number or not an allowed value."""
    is_allowed, expected = CHECKED.get(column.casefold(), (lambda _: True, "a number"))
    problems = []
    for patient in patients:
        cell = patient.columns.get(column, "")
        value = _parse_number(cell)
        if not cell or (value is not None and is_allowed(value)):
            continue
        written = patient.columns.written(column) if isinstance(patient.columns, Columns) else column
        spelling = "" if written == column else f" (read as {column})"
        with_point = cell.replace(",", ".")
        if value is None and cell.count(",") == 1 and _parse_number(with_point) is not None:
            text = f"has a decimal comma, {cell}. Write {with_point}."
        else:
            text = f"is {cell}. Expected {expected}, or blank."
        problems.append((patient.row or 0, f"{_who(patient)}: column {written}{spelling} {text}"))
    return problems


def _exists(path: Path) -> bool:
    """Return whether a path exists; a name that no file can have does not."""
    try:
        return path.exists()
    except OSError:
        return False


def _parse_number(cell: str) -> float | None:
    """Return the finite number in a cell, or None."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in cell else None


def _table_prefixes(sources: Sequence[str]) -> list[str]:
    """Return each table's name without suffix, with as many folders as make the names differ."""
    parts = [Path(source).with_suffix("").parts for source in sources]
    depths = range(1, max(map(len, parts)) + 1)
    candidates = (["_".join(names[-depth:]) for names in parts] for depth in depths)
    return next((names for names in candidates if len(set(names)) == len(names)), list(sources))


def _distinct(columns: Iterable[str]) -> tuple[str, ...]:
    """Return column names in order, each once regardless of case."""
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(column.casefold(), column)
    return tuple(names.values())


def _who(patient: Patient) -> str:
    return f" (patient {patient.name})" if patient.name else ""


def _by_row(problems: Sequence[tuple[int, str]]) -> list[str]:
    """Return problems as text, sorted by row; row 0 is unknown."""
    ordered = sorted(problems, key=lambda problem: problem[0])
    return [f"row {number}{text}" if number else text.strip() for number, text in ordered]


def _raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raise one error with all problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise CohortError("\n  ".join([f"{source}:", *problems[:_MAX_PROBLEMS], *more]))
