"""A cohort is a table: a row a patient, with a scan, what is known of the patient, and blanks for what is not."""

import csv
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ichprog.errors import CohortError, UnknownNameError
from ichprog.io import atomic_write
from ichprog.spec import Task

_In = TypeVar("_In")
_Out = TypeVar("_Out")

NEEDED = ("patient", "scan")
KNOWN: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "poor_outcome": (lambda value: value in (0, 1), "0 and 1"),
    "gcs": (lambda value: value in range(3, 16), "whole numbers from 3 to 15"),
    "age": (lambda value: 0 <= value <= 120, "years from 0 to 120"),
}  # columns whose values are checked; every other column may hold anything
_SHOWN = 10  # problems that are spelt out

CSIC_TABLE = "CLINICAL_DATA_ICH.csv"
CSIC_IMAGES = "ICH_nii_StrippedSkull"
CSIC_GROUPS = ("GOOD_PROGNOSIS", "POOR_PROGNOSIS")  # in the order of the label: 0, 1
CSIC_COLUMNS = {"PatientID": "patient", "Label (poor_prognosis)": "poor_outcome", "Age": "age", "GCS": "gcs"}
CSIC_LEFT_OUT = "213"


@dataclass(frozen=True)
class Patient:
    """One row of a cohort.

    Attributes:
        name: The patient's name in the table, unlike every other's.
        scan: The scan, found from where the table is.
        columns: Every other column's cell as text; "" where it is blank.
    """

    name: str
    scan: Path
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Cohort:
    """A table of patients.

    Attributes:
        patients: The rows, in the table's order.
        source: Where they came from, for messages.
    """

    patients: tuple[Patient, ...]
    source: str

    @classmethod
    def read(cls, path: str | Path, *, scans: bool = True) -> "Cohort":
        """Reads a table and checks it.

        Args:
            path: A .csv in UTF-8, its cells parted by commas or semicolons, with the columns `patient` and `scan`, any
                of `KNOWN`, and whatever else. Scans are paths relative to the table.
            scans: Whether every scan must be there.

        Raises:
            CohortError: The file cannot be read as a table, a column is missing, or rows are wrong; it names them.
        """
        rows, problems = _table(Path(path), NEEDED)
        return cls._checked(rows, problems, Path(path), scans)

    @classmethod
    def _checked(
        cls, rows: Mapping[int, dict[str, str]], problems: list[tuple[int, str]], table: Path, scans: bool
    ) -> "Cohort":
        """The patients of these rows, which are numbered as a spreadsheet does, unless there is a problem."""
        if not rows and not problems:
            raise CohortError(f"{table}: there is no patient below the first row")
        for column in dict.fromkeys(column for row in rows.values() for column in row):
            if column not in KNOWN and column.lower() in KNOWN:  # it would be passed over where a label is looked for
                raise CohortError(f"{table}: column {column} must be written {column.lower()}")
        seen: dict[str, int] = {}
        patients = []
        for number, row in rows.items():
            name, scan = (row[column] for column in NEEDED)
            columns = {column: cell for column, cell in row.items() if column not in NEEDED}
            patients.append(Patient(name, table.parent / scan, columns))
            said = []
            if not name:
                said.append("column patient is blank; every patient needs a name")
            elif name in seen:
                said.append(f"the patient is in row {seen[name]} already; a patient has one row")
            seen.setdefault(name, number)
            if not scan:
                said.append("column scan is blank; it takes a path relative to the table")
            elif scans and not patients[-1].scan.exists():
                said.append(f"there is no scan {patients[-1].scan}; paths are relative to the table")
            for column, (allows, allowed) in KNOWN.items():
                cell = columns.get(column, "")
                value = _number(cell)
                if cell and (value is None or not allows(value)):
                    said.append(f"column {column} is {cell}; {allowed} are allowed, or blank")
            problems += [(number, f" (patient {name}): {words}" if name else f": {words}") for words in said]
        _refuse(str(table), [f"row {number}{words}" for number, words in sorted(problems, key=lambda said: said[0])])
        return cls(tuple(patients), str(table))

    @classmethod
    def join(cls, cohorts: Sequence["Cohort"]) -> "Cohort":
        """Several cohorts as one, one after another.

        A column that a cohort lacks is blank for its patients. A name that two cohorts have is taken for two patients:
        each gets its table's name before its own, and the table's folders' as far as that is needed.

        Raises:
            CohortError: There is no cohort, one patient is in two of them with the same scan, or names stay alike.
        """
        if not cohorts:
            raise CohortError("there is no cohort to join; give one or more")
        source = ", ".join(cohort.source for cohort in cohorts)
        times = Counter(patient.name for cohort in cohorts for patient in cohort.patients)
        blank = dict.fromkeys((column for cohort in cohorts for column in cohort._columns()), "")
        alike: dict[tuple[str, Path], Cohort] = {}
        problems, patients = [], []
        for cohort, prefix in zip(cohorts, _prefixes([cohort.source for cohort in cohorts]), strict=True):
            for patient in cohort.patients:
                name = patient.name
                if times[name] > 1:
                    key = (name, patient.scan.resolve())
                    if key in alike:
                        tables = f"{alike[key].source} and {cohort.source}"
                        problems.append(f"patient {name} has the same scan in {tables}; keep one of the rows")
                    alike[key] = cohort
                    name = f"{prefix}_{name}"
                patients.append(replace(patient, name=name, columns=blank | dict(patient.columns)))
        for name, count in Counter(patient.name for patient in patients).items():
            if count > 1 and not problems:
                problems.append(f"{count} patients would be called {name}; rename a table or a patient")
        _refuse(source, problems)
        return cls(tuple(patients), source)

    def write(self, path: str | Path) -> Path:
        """Writes the table, whole or not at all, with scans relative to it.

        Args:
            path: The .csv to be; `read` of it gives these patients again.

        Returns:
            The path.
        """
        target = Path(path)
        folder = target.parent.resolve()
        columns = list(self._columns())
        with atomic_write(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow([*NEEDED, *columns])
            for patient in self.patients:
                # Only the folders are resolved: a scan may be a link, and is meant by the link's name.
                scan = os.path.relpath(patient.scan.parent.resolve() / patient.scan.name, folder)
                cells = [patient.columns.get(column, "") for column in columns]
                table.writerow([patient.name, Path(scan).as_posix(), *cells])
        return target

    def __len__(self) -> int:
        return len(self.patients)

    def _columns(self) -> dict[str, None]:
        """Every column beside `patient` and `scan`, in the order in which they first appear."""
        return dict.fromkeys(column for patient in self.patients for column in patient.columns)

    def numbers(self, column: str) -> np.ndarray:
        """A column as numbers.

        Returns:
            `(N,)` float64, in the order of the patients; NaN where the cell is blank.

        Raises:
            UnknownNameError: No patient has such a column.
            CohortError: A cell is no number; it names the patient.
        """
        if column not in self._columns():
            raise UnknownNameError(f"column of {self.source}", column, self._columns())
        cells = [patient.columns.get(column, "") for patient in self.patients]
        values = [_number(cell) if cell else math.nan for cell in cells]
        _refuse(
            self.source,
            [
                f"patient {patient.name}: column {column} is {cell}; numbers are allowed, or blank"
                for patient, cell, value in zip(self.patients, cells, values, strict=True)
                if value is None
            ],
        )
        return np.array(values, dtype=np.float64)

    def labels(self, task: Task) -> np.ndarray:
        """The true label of a task for every patient, as the task's target reads its column.

        Returns:
            `(N,)` int64, the index of the label; -1 where the cell is blank.

        Raises:
            UnknownNameError: No patient has the target's column.
            CohortError: A cell is no number; it names the patient.
        """
        values = self.numbers(task.target.column)
        return np.array([-1 if np.isnan(value) else task.target.index(value) for value in values], dtype=np.int64)


def from_csic(folder: str | Path) -> Cohort:
    """The cohort of the published data set, in the order of its clinical table and without patient 213.

    Published with Cobo et al., "Multi-task Learning Approach for Intracranial Hemorrhage Prognosis", 2024, whose code
    leaves that patient out.

    Args:
        folder: The folder that holds `CLINICAL_DATA_ICH.csv`, at whatever depth, and `ICH_nii_StrippedSkull`.

    Returns:
        The outcome, age and GCS in the columns of `KNOWN`; every other column under the name it has in the table.

    Raises:
        CohortError: The table or the images are not there, or rows are wrong: without an image, with two, or with one
            in the folder of the other outcome.
    """
    folder = Path(folder)
    images = folder / CSIC_IMAGES
    tables = sorted(folder.rglob(CSIC_TABLE))
    if len(tables) != 1:
        found = ", ".join(map(str, tables)) or "none"
        raise CohortError(f"{folder}: needs one {CSIC_TABLE}, found {found}")
    for group in CSIC_GROUPS:
        if not (images / group).is_dir():
            raise CohortError(f"{folder}: there is no folder {images / group}; the brain images are expected there")
    raw, problems = _table(tables[0], tuple(CSIC_COLUMNS))
    rows = {}
    for number, row in raw.items():
        if row["PatientID"] == CSIC_LEFT_OUT:
            continue
        file = f"{row['PatientID']}_brain.nii.gz"
        label = _number(row["Label (poor_prognosis)"])
        found_in = [group for group in CSIC_GROUPS if (images / group / file).exists()]
        who = f" (patient {row['PatientID']}): "
        if len(found_in) != 1:
            where = "both" if found_in else "neither"
            problems.append((number, f"{who}{file} is in {where} of {' and '.join(CSIC_GROUPS)} of {images}"))
        elif label in (0, 1) and CSIC_GROUPS[int(label)] != found_in[0]:
            problems.append((number, f"{who}Label (poor_prognosis) is {label:g}, but {file} is in {found_in[0]}"))
        scan = images.resolve() / (found_in or CSIC_GROUPS)[0] / file
        rows[number] = {CSIC_COLUMNS.get(column, column): cell for column, cell in row.items()} | {"scan": str(scan)}
    return Cohort._checked(rows, problems, tables[0], scans=False)


def _table(path: Path, needed: Sequence[str]) -> tuple[dict[int, dict[str, str]], list[tuple[int, str]]]:
    """A .csv as its rows by number, with stripped cells by column, and the rows whose cells do not fit the header.

    A row that is blank throughout counts but is passed over, and so is a column without a name.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = ";" if first.count(";") > first.count(",") else ","
            cells = [[cell.strip() for cell in row] for row in csv.reader(file, delimiter=delimiter, strict=True)]
    except UnicodeDecodeError as error:
        raise CohortError(f"{path}: is no text in UTF-8 ({error.reason}); save it as CSV UTF-8") from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise CohortError(f"{path}: cannot be read as a table: {reason}") from error
    header = cells[0] if cells else []
    said = [f"there is no column {column}" for column in needed if column not in header]
    said += [f"column {c} is there {n} times" for c, n in Counter(header).items() if c and n > 1]
    if said:
        raise CohortError(f"{path}: {'; '.join(said)}. The first row is {', '.join(header) or 'blank'}")
    rows: dict[int, dict[str, str]] = {}
    problems = []
    for number, row in enumerate(cells[1:], start=2):
        if not any(row):
            continue
        if len(row) == len(header):
            rows[number] = {column: cell for column, cell in zip(header, row, strict=True) if column}
        else:
            problems.append((number, f": {len(row)} cells, where the first row has {len(header)}"))
    return rows, problems


def _number(cell: str) -> float | None:
    """The finite number that a cell holds; None where it holds none."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in cell else None


def _prefixes(sources: Sequence[str]) -> list[str]:
    """Each table's name without its suffix, with its folders' as far as that tells them apart."""
    parts = [Path(source).with_suffix("").parts for source in sources]
    depths = range(1, max(map(len, parts)) + 1)
    short = (["_".join(names[-depth:]) for names in parts] for depth in depths)
    return next((names for names in short if len(set(names)) == len(names)), list(sources))


def _refuse(source: str, problems: Sequence[str]) -> None:
    """Raises one error of all problems, where there are any."""
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CohortError("\n  ".join([f"{source}:", *problems[:_SHOWN], *more]))
