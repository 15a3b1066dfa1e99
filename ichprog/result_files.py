"""Files of results: CSV, Parquet, JSON or JSON Lines, which survive an interruption and can be resumed.

While a file is written, each result is appended to a journal next to it, `FILE.journal`, and flushed to the disk. The
file itself appears, whole, when all results are there; then the journal is removed. So an interrupted run loses no
result, and a resumed run ends with the same bytes as an uninterrupted one.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ichprog.errors import RunError, UnknownNameError, missing_extra
from ichprog.io import atomic_write, file_lock, read_csv, write_rows
from ichprog.journal import Journal, check_run
from ichprog.results import (
    BLOOD,
    CLINICAL,
    Haemorrhage,
    Prediction,
    Scores,
    haemorrhage_row,
    prediction_row,
    with_scores,
)
from ichprog.spec import ModelSpec

Record = dict[str, Any]
Key = tuple[str, str]  # name of the patient, or "", and of the scan
Columns = dict[str, type]  # `str` or `float` by name

_ROW_GROUP = 10_000  # rows of a .parquet that are in memory together


class Entry(NamedTuple):
    """One result of a file.

    Attributes:
        key: Name of the patient, or "", and of the scan.
        status: "ok" or "failed".
        record: What the file holds of the result, as plain data.
    """

    key: Key
    status: str
    record: Record


@dataclass(frozen=True)
class ResultsTable:
    """How results become the rows of a table. `prediction_table` and `haemorrhage_table` return one.

    Attributes:
        columns: Names of the columns with the type of their values, `str` or `float`.
        to_row: Returns a result as a row.
        notice: The notice of the whole table, which its first row states.
    """

    columns: Columns
    to_row: Callable[[Any], Record]
    notice: str

    def entry(self, result: Prediction | Haemorrhage, scores: Scores | None, suffix: str) -> Entry:
        """Return a result as an entry of a file.

        Args:
            result: The result of a scan.
            scores: Clinical scores of the patient.
            suffix: Suffix of the file: a table holds rows, another file the whole result.
        """
        if suffix in _TABLES:
            row = self.to_row(result) | ({} if scores is None else scores.to_row())
            form = _cell if suffix == ".csv" else _value
            record = {column: form(row[column]) for column in self.columns if column in row}
        else:
            record = with_scores(result, scores)
        status = "ok" if result.error is None else "failed"
        return Entry((result.patient or "", result.scan), status, json.loads(json.dumps(record)))


def prediction_table(
    spec: ModelSpec,
    *,
    with_patients: bool = False,
    detector: ModelSpec | None = None,
    score_columns: Iterable[str] = (),
) -> ResultsTable:
    """Return the table of the predictions of a model.

    Args:
        spec: The model that predicts.
        with_patients: Whether there is a column `patient`, for scans of a cohort.
        detector: The model that finds haemorrhages, if the predictions have them.
        score_columns: Columns of clinical scores, if they are added.
    """
    columns: Columns = {}
    for task in spec.tasks:
        columns |= {f"{task.name}_label": str, **dict.fromkeys((f"{task.name}_{x}" for x in task.labels), float)}
        columns[f"{task.name}_std"] = float
        if task.mask is not None:
            columns |= dict.fromkeys((f"{task.name}_{part}_ml" for part in ("total", *task.mask.regions)), float)
    columns |= {**_clinical_columns(spec), **_calibration_columns(spec)}
    notice = spec.notice if spec.dense_task is None else _with_limits(spec.notice, spec)
    if detector is not None:
        columns |= {f"{BLOOD}{column}": kind for column, kind in _haemorrhage_columns(detector).items()}
        notice = _with_limits(notice, detector)
    columns |= dict.fromkeys(score_columns, float)
    return ResultsTable(_all_columns(columns, with_patients), prediction_row, notice)


def haemorrhage_table(
    spec: ModelSpec, *, with_patients: bool = False, score_columns: Iterable[str] = ()
) -> ResultsTable:
    """Return the table of the haemorrhages that a model finds.

    Args:
        spec: The model that finds haemorrhages.
        with_patients: As in `prediction_table`.
        score_columns: As in `prediction_table`.
    """
    columns = {**_haemorrhage_columns(spec), **dict.fromkeys(score_columns, float)}
    return ResultsTable(_all_columns(columns, with_patients), haemorrhage_row, _with_limits(spec.notice, spec))


class ResultsFile:
    """A file of results that is being written. `results_file` opens one.

    Attributes:
        target: Path of the file.
        journal: Path of the journal.
        done: Status of each result that is there, "ok" or "failed", by patient and scan.
    """

    def __init__(self, target: Path, table: ResultsTable, run: Mapping[str, Any]) -> None:
        self.target, self.journal = target, target.with_name(f"{target.name}.journal")
        self.done: dict[Key, str] = {}
        self._table, self._journal = table, Journal(self.journal, run)
        self._positions: dict[Key, int] = {}  # in the journal

    def add(self, result: Prediction | Haemorrhage, scores: Scores | None = None) -> None:
        """Add a result, with clinical scores or without. It is on the disk when this function returns.

        Args:
            result: The result of a scan.
            scores: Clinical scores of the patient.
        """
        self.add_entry(self._table.entry(result, scores, self.target.suffix))

    def add_entry(self, entry: Entry) -> None:
        """Add an entry of the table, which another process may have made.

        Args:
            entry: Result of `ResultsTable.entry`.
        """
        self._positions[entry.key] = self._journal.add(entry._asdict())
        self.done[entry.key] = entry.status

    def _open(self, *, resume: bool, retry_failed: bool, overwrite: bool) -> None:
        """Begin or continue the journal."""
        if not resume and not overwrite and (self.target.exists() or self.journal.exists()):
            existing = self.target if self.target.exists() else self.journal
            raise RunError(
                f"{existing} exists. Continue the run with --resume, replace its results with --overwrite, or choose "
                "another file."
            )
        positions = self._journal.begin(self._kept(retry_failed=retry_failed) if resume else ())
        self._positions = dict(zip(self.done, positions, strict=True))

    def _kept(self, *, retry_failed: bool) -> Iterator[Record]:
        """Yield the results of an interrupted run, or of a finished one."""
        existing = self.journal if self.journal.exists() else self.target
        try:
            for entry in self._existing():
                if entry.key not in self.done and not (retry_failed and entry.status == "failed"):
                    self.done[entry.key] = entry.status
                    yield entry._asdict()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunError(
                f"{existing} cannot be read as results ({type(error).__name__}). Choose another file, or replace it "
                "with --overwrite."
            ) from error

    def _existing(self) -> Iterator[Entry]:
        if self.journal.exists():
            for entry in self._journal.read():
                yield Entry((entry["key"][0], entry["key"][1]), entry["status"], entry["record"])
        elif self.target.exists():
            model = self._journal.run["model"]
            for record in _FORMATS[self.target.suffix].read(self.target):
                check_run(self.target, {"model": model}, {"model": record.get("model")})
                status = record.get("status") or ("failed" if "error" in record else "ok")
                yield Entry((record.get("patient") or "", record["scan"]), status, record)

    def _finish(self, order: Iterable[Key] | None) -> None:
        """Write the file and remove the journal."""
        keys = self._positions if order is None else order
        records = (self._journal.at(self._positions[key])["record"] for key in keys)
        with atomic_write(self.target) as partial:
            _FORMATS[self.target.suffix].write(partial, records, self._table)
        self._journal.remove()


def read_records(path: Path) -> list[Record]:
    """Read a file of results as plain data.

    Args:
        path: A .json or .jsonl file of `ichprog predict` or `ichprog haemorrhage`.

    Raises:
        UnknownNameError: The file has another suffix.
        RunError: The file holds no results.
        OSError: The file cannot be read.

    Examples:
        ```python
        for record in read_records(Path("results.jsonl")):
            print(record["scan"], record["warnings"])
        ```
    """
    if path.suffix not in (".json", ".jsonl"):
        hint = "A .csv holds only a part of each result. Predict again with -o results.jsonl."
        raise UnknownNameError("format of results", path.suffix or path.name, (".json", ".jsonl"), hint)
    try:
        records = list(_FORMATS[path.suffix].read(path))
        if not records:
            raise ValueError("the file is empty")
        for number, record in enumerate(records, start=1):
            if not (isinstance(record["scan"], str) and record["scan"] and isinstance(record["model"], str)):
                raise ValueError(f"result {number} has no scan or no model")
            if not {"tasks", "volume_ml", "error"} & record.keys():
                raise ValueError(f"result {number} holds neither a prediction nor an error")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} holds no results ({type(error).__name__}: {error}). Give a file that `ichprog predict -o` wrote."
        ) from error
    return records


@contextmanager
def results_file(
    target: Path,
    table: ResultsTable,
    run: Mapping[str, Any],
    *,
    order: Iterable[Key] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
) -> Iterator[ResultsFile]:
    """Open a file of results, which appears whole when the block ends without an error.

    After an error or an interruption the journal stays, and `resume` continues from it.

    Args:
        target: A path that ends in .csv or .parquet (one row per scan), .json (one list) or .jsonl (one line per scan).
            Its folder is created if missing.
        table: The table of the results.
        run: What determines the results, as plain data with the key `model`; other results are not resumed.
        order: Patient and scan of each result in the order of the file; by default the order of their addition.
        resume: Whether to keep the results of an interrupted or finished run.
        retry_failed: Whether not to keep those of scans that failed.
        overwrite: Whether to replace existing results.

    Yields:
        The file, whose method `add` adds one result.

    Raises:
        UnknownNameError: The path has another suffix.
        RunError: There are results already, or results of another run, or another process writes the file.
        IchprogError: The path ends in .parquet, and pyarrow is not installed.
        OSError: The file cannot be written.
    """
    if target.suffix not in _FORMATS:
        raise UnknownNameError("format of results", target.suffix or target.name, _FORMATS)
    if target.suffix == ".parquet":
        _import_pyarrow()
    target.parent.mkdir(parents=True, exist_ok=True)
    file = ResultsFile(target, table, run)
    lock = file.journal.with_name(f".{file.journal.name}.lock")
    try:
        with file_lock(lock, timeout_s=0):
            file._open(resume=resume, retry_failed=retry_failed, overwrite=overwrite)
            try:
                yield file
                file._finish(order)
            finally:
                file._journal.close()
                if not file.done:
                    file._journal.remove()  # nothing is lost
                lock.unlink(missing_ok=True)
    except TimeoutError:
        raise RunError(f"{target} is being written by another process. Wait for it, or choose another file.") from None


def _clinical_columns(spec: ModelSpec) -> Columns:
    """Return the columns of clinical values, and of what each changed."""
    names = [value.column for value in spec.clinical]
    fused = [task.name for task in spec.tasks if task.uses_clinical or task.combinations]
    changes = [f"{task}_change_{name}" for task in fused for name in names]
    return dict.fromkeys([*(f"{CLINICAL}{name}" for name in names), *changes], float)


def _calibration_columns(spec: ModelSpec) -> Columns:
    """Return the columns of `_calibration_values`."""
    if spec.calibration is None:
        return {}
    columns: Columns = {}
    for name in spec.calibration.tasks:
        columns |= dict.fromkeys((f"{name}_calibrated_{label}" for label in spec.task(name).labels), float)
        columns[f"{name}_set"] = str
    abstained = dict.fromkeys((f"{task.name}_abstained" for task in spec.tasks), str)
    return {**columns, "coverage": float, **abstained, "input_distance": float, "input_distance_threshold": float}


def _all_columns(columns: Columns, with_patients: bool) -> Columns:
    first = [*(["patient"] if with_patients else []), "scan", "model", "status"]
    last = ["warnings", "error_code", "error_message", "notice"]
    return {**dict.fromkeys(first, str), **columns, **dict.fromkeys(last, str)}


def _with_limits(notice: str, spec: ModelSpec) -> str:
    """Return the notice of a table, followed by the first limit of a model that measures volumes."""
    return " ".join([notice, *spec.limits[:1]])


def _haemorrhage_columns(spec: ModelSpec) -> Columns:
    """Return the columns of `_haemorrhage_values`."""
    task = spec.dense_task
    parts = ("total", *task.mask.regions) if task is not None and task.mask is not None else ()
    volumes = [f"{part}_{kind}" for part in parts for kind in ("ml", "low_ml", "high_ml")]
    shift = ["midline_shift_mm", "midline_shift_low_mm", "midline_shift_high_mm"]
    return {
        "present": str,
        **dict.fromkeys(["probability", "threshold", *volumes, "intraventricular", "infratentorial"], float),
        "side": str,
        "location": str,
        **dict.fromkeys(shift, float),
    }


def _cell(value: Any) -> str:
    """Return a value as a cell of a table."""
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _value(value: Any) -> Any:
    """Return a value as a typed cell."""
    return float(value) if isinstance(value, int | float) else value


def _write_csv(path: Path, records: Iterator[Record], table: ResultsTable) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # the first row states the notice for the whole table
        rows = (record | {"notice": "" if number else table.notice} for number, record in enumerate(records))
        write_rows(file, list(table.columns), rows)


def _write_parquet(path: Path, records: Iterator[Record], table: ResultsTable) -> None:
    pyarrow, parquet = _import_pyarrow()
    kinds = {str: pyarrow.string(), float: pyarrow.float64()}
    schema = pyarrow.schema([(column, kinds[kind]) for column, kind in table.columns.items()])
    rows = (record | {"notice": None if number else table.notice} for number, record in enumerate(records))
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, _ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _write_json(path: Path, records: Iterator[Record], _: ResultsTable) -> None:
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for record in records:
            file.write(separator + json.dumps(record, ensure_ascii=False))
            separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")


def _write_jsonl(path: Path, records: Iterator[Record], _: ResultsTable) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)


def _read_csv(path: Path) -> list[Record]:
    rows: list[Record] = [*read_csv(path)]
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    if "scan" not in columns:
        raise ValueError("the table has no column scan")
    return rows


def _read_parquet(path: Path) -> list[Record]:
    _, parquet = _import_pyarrow()
    rows: list[Record] = parquet.read_table(path).to_pylist()
    return [{column: value for column, value in row.items() if value is not None} for row in rows]


def _read_json(path: Path) -> list[Record]:
    records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
    return records


def _read_jsonl(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _import_pyarrow() -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra("parquet", "pyarrow", "Parquet") from error
    return pyarrow, parquet


class _Format(NamedTuple):
    write: Callable[[Path, Iterator[Record], ResultsTable], None]
    read: Callable[[Path], list[Record]]


_FORMATS = {
    ".csv": _Format(_write_csv, _read_csv),
    ".parquet": _Format(_write_parquet, _read_parquet),
    ".json": _Format(_write_json, _read_json),
    ".jsonl": _Format(_write_jsonl, _read_jsonl),
}
_TABLES = {".csv", ".parquet"}
