"""Tables of results as CSV, Markdown and LaTeX."""

import csv
import io
import re

import numpy as np
import pytest

from ichprog.reporting import tables

from support.results import interval

ROWS = [
    {"variant": "one_task", "auroc": interval(0.7123), "p": 0.00001, "n": 12, "fine": True, "note": "50 % & more"},
    {"variant": r"a|b\c", "auroc": None, "p": float("nan"), "n": np.int64(3), "fine": False, "note": "<80"},
    {"variant": "third", "auroc": {"value": 0.5, "low": None, "high": None}, "p": 0.25, "n": 1234, "note": None},
]
COLUMNS = {"variant": "variant", "auroc": "AUROC", "p": "p", "n": "patients", "fine": "fine", "note": "note_1"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (interval(0.7123, 0.0603), "0.712 (0.652 to 0.773)"),
        ({"value": 12.3456, "low": -1.0, "high": 40.0}, "12.3 (-1.0 to 40.0)"),
        ({"value": -0.0001, "low": -0.02, "high": 0.02}, "0.000 (-0.020 to 0.020)"),
        ({"value": float("nan"), "low": 0.0, "high": 1.0}, "-"),
        ({"value": 0.5, "low": None, "high": 1.0}, "0.500"),
        (0.00001, "<0.001"),
        (0.0, "0.000"),
        (1.0, "1.000"),
        (np.float32(0.25), "0.250"),
        (float("inf"), "-"),
        (None, "-"),
        ("", "-"),
        (12, "12"),
        (12345.6, "12346"),
        (True, "yes"),
        ("two\nlines", "two lines"),
    ],
)
def test_cells_are_formatted_for_readers(value, text):
    assert tables.format_value(value) == text


def test_a_csv_has_full_precision():
    read = list(csv.DictReader(io.StringIO(tables.to_csv(ROWS, COLUMNS))))
    assert list(read[0]) == ["variant", "auroc", "auroc_low", "auroc_high", "p", "n", "fine", "note"]
    assert [row["variant"] for row in read] == [row["variant"] for row in ROWS]
    assert [float(read[0][key]) for key in ("auroc", "auroc_low", "auroc_high")] == list(ROWS[0]["auroc"].values())
    assert float(read[0]["p"]) == 0.00001
    assert (read[1]["auroc"], read[1]["auroc_low"], read[1]["p"], read[1]["n"]) == ("", "", "", "3")
    assert (read[2]["auroc"], read[2]["auroc_high"], read[2]["note"]) == ("0.5", "", "")


def test_a_markdown_table_has_one_cell_for_each_column():
    lines = tables.to_markdown(ROWS, COLUMNS, "Of *all*").splitlines()
    assert lines[0] == r"| variant | AUROC | p | patients | fine | note\_1 |"
    assert lines[1] == "| --- | ---: | ---: | ---: | --- | --- |"
    assert lines[2] == r"| one\_task | 0.712 (0.662 to 0.762) | \<0.001 | 12 | yes | 50 % & more |"
    assert all(len(re.split(r"(?<!\\)\|", line)) == 8 for line in lines[:5])
    assert lines[-1] == r"Of \*all\*"


def test_latex_escapes_special_characters():
    text = tables.to_latex(ROWS, COLUMNS, "50 % of {all}", label="results")
    assert r"one\_task & 0.712 (0.662 to 0.762) & \textless{}0.001 & 12 & yes & 50 \% \& more \\" in text
    assert r"a\textbar{}b\textbackslash{}c & - & - & 3 & no & \textless{}80 \\" in text
    assert r"\caption{50 \% of \{all\}}" in text
    assert r"\label{tab:results}" in text
    assert r"\begin{tabular}{lrrrll}" in text
    bare = re.sub(r"\\[&%$#_{}]|\\[a-z]+\{\}", "", text[text.index("\\hline") :])
    assert not set(re.findall(r"[%$#_^~<>|]", bare))
    rows = [line for line in bare.splitlines() if line.endswith(r"\\")]
    assert [line.count("&") for line in rows] == [5] * 4


def test_a_table_is_written_in_three_formats_with_the_same_bytes_each_time(tmp_path):
    written = tables.write(iter(ROWS), COLUMNS, tmp_path / "tables", "results", "All")
    assert [path.name for path in written] == ["results.csv", "results.md", "results.tex"]
    first = [path.read_bytes() for path in written]
    assert all(b"0.712" in each for each in first)
    assert [path.read_bytes() for path in tables.write(ROWS, COLUMNS, tmp_path / "tables", "results", "All")] == first
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in written)


def test_columns_without_headings_get_readable_names():
    head = tables.to_markdown(
        [{"balanced_accuracy": 1.0}], ["balanced_accuracy", "auroc_1", "f1_at_half"]
    ).splitlines()[0]
    assert head == "| balanced accuracy | AUROC 1 | F1 at half |"
