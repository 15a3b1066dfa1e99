"""Write the tables of docs/scans.md from the table of scan checks: `python docs/scan_checks.py`.

A test fails if the page is out of date.
"""

import re
from pathlib import Path

from ichprog.scan import CHECKS, format_range
from ichprog.scan.codes import ERRORS, READ_WARNINGS

PAGE = Path(__file__).with_name("scans.md")


def updated_page(page: str) -> str:
    """Return the page with its tables replaced.

    Args:
        page: Text of the page; each table follows a comment such as `<!-- table: warnings -->`.
    """
    for name, table in (("warnings", warnings_table()), ("errors", errors_table())):
        pattern = rf"(<!-- table: {name}.*? -->\n\n)(?:\|.*\n)*"
        page = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}", page)
    return page


def warnings_table() -> str:
    """Return the table of all warnings: those of the checks, then those of reading."""
    checks = [
        (f"`{check.code}`", check.description, format_range(check.expected) if check.expected else "", check.unit or "")
        for check in CHECKS.values()
    ]
    reading = [(f"`{each.code}`", each.description, "", each.unit or "") for each in READ_WARNINGS]
    return _table([("code", "finding", "default range", "unit"), *checks, *reading])


def errors_table() -> str:
    """Return the table of all errors."""
    return _table([("code", "finding", "unit"), *((f"`{e.code}`", e.description, e.unit or "") for e in ERRORS)])


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


if __name__ == "__main__":
    PAGE.write_text(updated_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
