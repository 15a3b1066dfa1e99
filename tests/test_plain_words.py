"""Docstrings, comments, messages and pages use the field's words instead of metaphors and quaint phrases."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = re.compile(
    r"\b(rooms?|houses?|floors?|shelf|shelves|parcels?|knock(s|ed|ing)?|beside|told|whoever|way back|stands? on"
    r"|where not given|as far as|held against)\b",
    re.IGNORECASE,
)
ALLOWED = re.compile(r"\bfloor\(|\b(np|math|torch)\.floor\b|floor_divide|rounding_mode=\"floor\"")  # the function
FOLDERS = ("ichprog", "plugins", "benchmarks", "docs", "examples", "scripts", "tests")
ENDINGS = {".py", ".md", ".txt", ".toml", ".json"}
STORED_RESULTS = {"results.json", "metrics.json"}


def text_files():
    """Yield every file with prose, except this one and stored results."""
    yield from ROOT.glob("*.md")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in ENDINGS and path.name not in STORED_RESULTS and path != Path(__file__):
                yield path


@pytest.mark.parametrize("path", sorted(text_files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_no_banned_words(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    offending = [f"{number}: {line.strip()}" for number, line in lines if BANNED.search(ALLOWED.sub("", line))]
    assert not offending, "use the words of the glossary in docs/architecture.md:\n" + "\n".join(offending)
