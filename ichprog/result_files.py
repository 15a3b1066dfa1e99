"""Files of results: CSV, JSON or JSON Lines, which survive an interruption and can be resumed.

While a file is written, each result is appended to a journal next to it, `FILE.journal`, and flushed to the disk. The
file itself appears, whole, when all results are there; then the journal is removed. So an interrupted run loses no
result, and a resumed run ends with the same bytes as an uninterrupted one.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ichprog.errors import RunError, UnknownNameError
from ichprog.io import atomic_write, file_lock
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


class ResultsFile:
    """A file of results that is being written. `results_file` and `haemorrhage_file` open one.

    Attributes:
        target: Path of the file.
        journal: Path of the journal.
        done: Status of each result that is there, "ok" or "failed", by patient and scan.
    """

    def __init__(self, target: Path, columns: list[str], to_row: Callable[[Any], Record], notice: str) -> None:
        self.target, self.journal = target, target.with_name(f"{target.name}.journal")
        self.done: dict[Key, str] = {}
        self._columns, self._to_row, self._notice = columns, to_row, notice
        self._records: dict[Key, Record] = {}
        self._file: TextIO | None = None

    def add(self, result: Prediction | Haemorrhage, scores: Scores | None = None) -> None:
        """Add a result, with clinical scores or without. It is on the disk when this function returns.

        Args:
            result: The result of a scan.
            scores: Clinical scores of the patient.
        """
        if self.target.suffix == ".csv":
            row = self._to_row(result) | ({} if scores is None else scores.to_row())
            record = {column: _cell(row[column]) for column in self._columns if column in row}
        else:
            record = with_scores(result, scores)
        key, status = (result.patient or "", result.scan), "ok" if result.error is None else "failed"
        self._keep(key, status, json.loads(json.dumps(record)))
        if self._file is not None:
            print(json.dumps({"key": key, "status": status, "record": record}), file=self._file, flush=True)
            os.fsync(self._file.fileno())

    def _keep(self, key: Key, status: str, record: Record) -> None:
        self.done[key], self._records[key] = status, record

    def open(self, run: Mapping[str, Any], *, resume: bool, retry_failed: bool, overwrite: bool) -> None:
        """Begin or continue the journal.

        Args:
            run: What determines the results, as plain data.
            resume: Whether to keep the results of an interrupted or finished run.
            retry_failed: Whether not to keep those of scans that failed.
            overwrite: Whether to drop the results of another run.

        Raises:
            RunError: There are results already, or results of another run.
        """
        run = json.loads(json.dumps(run))
        if not resume and not overwrite and (self.target.exists() or self.journal.exists()):
            existing = self.target if self.target.exists() else self.journal
            raise RunError(
                f"{existing} exists. Continue the run with --resume, replace its results with --overwrite, or choose "
                "another file."
            )
        if resume:
            self._read(run)
        if retry_failed:
            for key in [key for key, status in self.done.items() if status == "failed"]:
                del self.done[key], self._records[key]
        with atomic_write(self.journal) as partial, partial.open("w", encoding="utf-8") as file:
            print(json.dumps({"run": run}), file=file)
            for key, status in self.done.items():
                print(json.dumps({"key": key, "status": status, "record": self._records[key]}), file=file)
            file.flush()
        self._file = self.journal.open("a", encoding="utf-8")

    def _read(self, run: Mapping[str, Any]) -> None:
        """Read the results of an interrupted run, or of a finished one."""
        existing = self.journal if self.journal.exists() else self.target
        try:
            self._read_existing(run)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunError(
                f"{existing} cannot be read as results ({type(error).__name__}). Choose another file, or replace it "
                "with --overwrite."
            ) from error

    def _read_existing(self, run: Mapping[str, Any]) -> None:
        if self.journal.exists():
            first, *lines = self.journal.read_text(encoding="utf-8").split("\n")
            self._check_run(run, json.loads(first)["run"])
            for line in lines[:-1]:  # a line without an end was cut by the interruption
                entry = json.loads(line)
                self._keep((entry["key"][0], entry["key"][1]), entry["status"], entry["record"])
        elif self.target.exists():
            for record in _READERS[self.target.suffix](self.target):
                if record.get("model") != run["model"]:
                    raise self._other_run("model", record.get("model"), run["model"])
                status = record.get("status") or ("failed" if "error" in record else "ok")
                self._keep((record.get("patient") or "", record["scan"]), status, record)

    def _check_run(self, run: Mapping[str, Any], existing: Mapping[str, Any]) -> None:
        for key in run:
            if existing.get(key) != run[key]:
                raise self._other_run(key, existing.get(key), run[key])

    def _other_run(self, key: str, existing: Any, requested: Any) -> RunError:
        return RunError(
            f"{self.target} belongs to another run: {key} was {existing}, is {requested}. Choose another file, or "
            "replace its results with --overwrite."
        )

    def close(self) -> None:
        """Close the journal, and keep it for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, order: Iterable[Key] | None = None) -> None:
        """Write the file and remove the journal.

        Args:
            order: Patient and scan of each result in the order of the file; by default the order of their addition.
        """
        self.close()
        records = [self._records[key] for key in (self._records if order is None else order)]
        with atomic_write(self.target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            _WRITERS[self.target.suffix](file, records, self._columns, self._notice)
            file.flush()
        self.journal.unlink(missing_ok=True)


@contextmanager
def results_file(
    target: Path,
    spec: ModelSpec,
    *,
    with_patients: bool = False,
    detector: ModelSpec | None = None,
    score_columns: Iterable[str] = (),
    order: Iterable[Key] | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
) -> Iterator[ResultsFile]:
    """Open a file of predictions, which appears whole when the block ends without an error.

    After an error or an interruption the journal stays, and `resume` continues from it.

    Args:
        target: A path that ends in .csv (one row per scan), .json (one list) or .jsonl (one line per scan). Its folder
            is created if missing.
        spec: The model that predicts.
        with_patients: Whether a .csv has the column `patient`, for scans of a cohort.
        detector: The model that finds haemorrhages, if the predictions have them.
        score_columns: Columns of clinical scores in a .csv, if they are added.
        order: Patient and scan of each result in the order of the file; by default the order of their addition.
        settings: What else determines the results, as plain data; a run with other settings is not resumed.
        resume: Whether to keep the results of an interrupted or finished run.
        retry_failed: Whether not to keep those of scans that failed.
        overwrite: Whether to replace existing results.

    Yields:
        The file, whose method `add` adds one prediction.

    Raises:
        UnknownNameError: The path has another suffix.
        RunError: There are results already, or results of another run, or another process writes the file.
        OSError: The file cannot be written.
    """
    columns = []
    for task in spec.tasks:
        columns += [f"{task.name}_label", *(f"{task.name}_{label}" for label in task.labels), f"{task.name}_std"]
        if task.mask is not None:
            columns += [f"{task.name}_{part}_ml" for part in ("total", *task.mask.regions)]
    columns += [*_clinical_columns(spec), *_calibration_columns(spec)]
    notice = spec.notice if spec.dense_task is None else _with_limits(spec.notice, spec)
    if detector is not None:
        columns += [f"{BLOOD}{column}" for column in _haemorrhage_columns(detector)]
        notice = _with_limits(notice, detector)
    run = _run(spec, detector, settings)
    file = ResultsFile(target, _all_columns([*columns, *score_columns], with_patients), prediction_row, notice)
    with _opened(file, run, order, resume=resume, retry_failed=retry_failed, overwrite=overwrite):
        yield file


@contextmanager
def haemorrhage_file(
    target: Path,
    spec: ModelSpec,
    *,
    with_patients: bool = False,
    score_columns: Iterable[str] = (),
    order: Iterable[Key] | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
) -> Iterator[ResultsFile]:
    """Open a file of haemorrhages, which appears whole when the block ends without an error.

    Args:
        target: As in `results_file`.
        spec: The model that finds haemorrhages.
        with_patients: As in `results_file`.
        score_columns: As in `results_file`.
        order: As in `results_file`.
        settings: As in `results_file`.
        resume: As in `results_file`.
        retry_failed: As in `results_file`.
        overwrite: As in `results_file`.

    Yields:
        The file, whose method `add` adds one haemorrhage.

    Raises:
        UnknownNameError, RunError, OSError: As in `results_file`.
    """
    columns = _all_columns([*_haemorrhage_columns(spec), *score_columns], with_patients)
    file = ResultsFile(target, columns, haemorrhage_row, _with_limits(spec.notice, spec))
    run = _run(spec, None, settings)
    with _opened(file, run, order, resume=resume, retry_failed=retry_failed, overwrite=overwrite):
        yield file


@contextmanager
def _opened(file: ResultsFile, run: Record, order: Iterable[Key] | None, **choices: bool) -> Iterator[None]:
    """Write the file when the block ends, and keep its journal after an error."""
    if file.target.suffix not in _WRITERS:
        raise UnknownNameError("format of results", file.target.suffix or file.target.name, _WRITERS)
    file.target.parent.mkdir(parents=True, exist_ok=True)
    lock = file.journal.with_name(f".{file.journal.name}.lock")
    try:
        with file_lock(lock, timeout_s=0):
            file.open(run, **choices)
            try:
                yield
                file.finish(order)
            finally:
                file.close()
                if not file.done:
                    file.journal.unlink(missing_ok=True)  # nothing is lost
                lock.unlink(missing_ok=True)
    except TimeoutError:
        raise RunError(
            f"{file.target} is being written by another process. Wait for it, or choose another file."
        ) from None


def _run(spec: ModelSpec, detector: ModelSpec | None, settings: Mapping[str, Any] | None) -> Record:
    """Return what determines results."""
    models = {"model": spec.name} | ({} if detector is None else {"detector": detector.name})
    return models | dict(settings or {})


def _clinical_columns(spec: ModelSpec) -> list[str]:
    """Return the columns of clinical values, and of what each changed."""
    names = [value.column for value in spec.clinical]
    fused = [task.name for task in spec.tasks if task.uses_clinical or task.combinations]
    return [*(f"{CLINICAL}{name}" for name in names), *(f"{task}_change_{name}" for task in fused for name in names)]


def _calibration_columns(spec: ModelSpec) -> list[str]:
    """Return the columns of `_calibration_values`."""
    if spec.calibration is None:
        return []
    columns = []
    for name in spec.calibration.tasks:
        columns += [*(f"{name}_calibrated_{label}" for label in spec.task(name).labels), f"{name}_set"]
    abstained = [f"{task.name}_abstained" for task in spec.tasks]
    return [*columns, "coverage", *abstained, "input_distance", "input_distance_threshold"]


def _all_columns(columns: list[str], with_patients: bool) -> list[str]:
    first = [*(["patient"] if with_patients else []), "scan", "model", "status"]
    return [*first, *columns, "warnings", "error_code", "error_message", "notice"]


def _with_limits(notice: str, spec: ModelSpec) -> str:
    """Return the notice of a table, followed by the first limit of a model that measures volumes."""
    return " ".join([notice, *spec.limits[:1]])


def _haemorrhage_columns(spec: ModelSpec) -> list[str]:
    """Return the columns of `_haemorrhage_values`."""
    task = spec.dense_task
    parts = ("total", *task.mask.regions) if task is not None and task.mask is not None else ()
    volumes = [f"{part}_{kind}" for part in parts for kind in ("ml", "low_ml", "high_ml")]
    place = ["intraventricular", "infratentorial", "side", "location"]
    shift = ["midline_shift_mm", "midline_shift_low_mm", "midline_shift_high_mm"]
    return ["present", "probability", "threshold", *volumes, *place, *shift]


def _cell(value: Any) -> str:
    """Return a value as a cell of a table."""
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_csv(file: TextIO, records: list[Record], columns: list[str], notice: str) -> None:
    table = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
    table.writeheader()
    for number, record in enumerate(records):  # the first row states the notice for the whole table
        table.writerow(record | {"notice": "" if number else notice})


def _write_json(file: TextIO, records: list[Record], *_: Any) -> None:
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    file.write(f"[\n{lines}\n]\n" if records else "[]\n")


def _write_jsonl(file: TextIO, records: list[Record], *_: Any) -> None:
    file.writelines(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)


def _read_csv(path: Path) -> list[Record]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "scan" not in (reader.fieldnames or ()):
            raise ValueError("the table has no column scan")
        return list(reader)


def _read_json(path: Path) -> list[Record]:
    records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
    return records


def _read_jsonl(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


_WRITERS = {".csv": _write_csv, ".json": _write_json, ".jsonl": _write_jsonl}
_READERS: dict[str, Callable[[Path], list[Record]]] = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
