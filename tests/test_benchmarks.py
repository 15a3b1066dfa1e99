"""The speed page reports every measurement and every missed target."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPORT = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))


def test_the_page_and_its_plots_are_up_to_date():
    """To update them, run `python benchmarks/report.py --from benchmarks/results.json`."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert page == REPORT["page"](results)
    plots = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("speed*.svg")}
    assert set(re.findall(r"\]\((speed[\w-]*\.svg)\)", page)) == set(plots)
    digests = {letter: REPORT["digest"](one["records"]) for letter, one in zip("abcdef", results, strict=False)}
    for name, text in plots.items():
        assert digests[name.removeprefix("speed-")[0]] in text


def test_every_suite_has_a_position_on_the_page():
    suites = {path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py")}
    assert suites <= set(REPORT["SUITES"])
    assert len(suites) >= 5


def record(what, ours, peer, target, unit="s"):
    return {"what": what, "unit": unit, "ours": ours, "peer": peer, "peer_name": "another", "target": target, "at": {}}


def pytest_run(*records, cpu="Fast"):
    """Return a run as pytest-benchmark writes it."""
    return {
        "machine_info": {"system": "Linux", "machine": "x86_64", "cpu": {"brand_raw": cpu, "count": 2, "flags": []}},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": [
            {"fullname": "benchmarks/test_prepare.py::test_a_scan", "extra_info": {"records": [one]}} for one in records
        ],
    }


@pytest.mark.parametrize(("ours", "target", "row", "missed"), [
    ([9, 2, 3], ("ratio", "at most", 0.5), "3.00 s (2.00 to 9.00) | 10.0 s, another | 0.300 | at most 0.500 | yes", ""),
    ([6], ("ratio", "at most", 0.5), "6.00 s | 10.0 s, another | 0.600 | at most 0.500 | **no**", "0.600"),
    ([12.4], ("ratio", "at least", 1.25), "12.4 s | 10.0 s, another | 1.24 | at least 1.25 | **no**", "1.24"),
    ([10.2], ("difference", "at most", 0.25), "| 1.02 | at most 250 ms more | yes", ""),
    ([10.5], ("difference", "at most", 0.25), "| 1.05 | at most 250 ms more | **no**", "500 ms"),
    ([0.008], ("ours", "at most", 0.01), "| 8.00 ms | 10.0 s, another | 8.0e-04 | at most 10.0 ms | yes", ""),
    ([1.5], None, "| 1.50 s | 10.0 s, another | 0.150 |  |  |", ""),
])  # fmt: skip
def test_a_target_is_compared_with_its_own_quantity(ours, target, row, missed):
    text = REPORT["page"]([REPORT["condense"](pytest_run(record("this", ours, [10], target)))])
    assert row in text
    listed = re.findall(r"^- Preprocessing a scan: this: (\S+(?: ms)?), target", text, re.MULTILINE)
    assert listed == ([missed] if missed else [])
    assert "**A**: 2 cores of Fast" in text


def test_a_new_measurement_leaves_other_records_and_other_machines():
    first = REPORT["condense"](pytest_run(record("a", [1], [2], None), record("b", [3], [4], None)))
    again = REPORT["condense"](pytest_run(record("a", [5], [6], None)))
    elsewhere = REPORT["condense"](pytest_run(record("a", [7], [8], None), cpu="Slow"))
    (merged,) = REPORT["merge"]([first], again)
    assert [(one["what"], one["ours"]["median"]) for one in merged["records"]] == [("a", 5), ("b", 3)]
    assert REPORT["merge"]([first], elsewhere) == [first, elsewhere]
    assert REPORT["merge"]([first, elsewhere], again) == [merged, elsewhere]
    assert REPORT["merge"]([first, elsewhere], again, whole=True) == [again, elsewhere]
    newer = again | {"versions": {"torch": "9"}}
    assert REPORT["merge"]([first, elsewhere], newer) == [newer, elsewhere]
    text = REPORT["page"]([first, elsewhere])
    assert "**A**: 2 cores of Fast" in text
    assert "**B**: 2 cores of Slow" in text
    assert "| B | a | 7.00 s | 8.00 s, another |" in text
