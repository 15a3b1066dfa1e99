"""HTML reports: self-contained, escaped, and the same each time."""

import base64
import re
from html.parser import HTMLParser

import pytest

from ichprog.errors import RunError
from ichprog.reporting import figures, html

from support.results import METRICS

NOTICES = ["The patients are simulated.", "For research only, not for patient care."]


class Page(HTMLParser):
    """The text, addresses and ids of a report, with a check that every element is closed."""

    EMPTY = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, text):
        super().__init__()
        self.texts, self.addresses, self.ids, self.tags, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def sections(tmp_path):
    figure = figures.ablation(METRICS, "prognosis", "auroc", chance=0.5)
    vector, raster = figures.save(figure, tmp_path / "figures", "ablation")
    rows = [{"variant": name, **tasks["prognosis"]} for name, tasks in METRICS.items()]
    return [
        html.Section("Patients & scans", ["Six <patients>."]),
        html.Section(
            "Results",
            ["Out of fold."],
            [html.Table(rows, ["variant", "auroc", "brier"], "All <variants>")],
            [html.Picture(vector, "Bars & dots"), html.Picture(raster, "The same")],
        ),
    ]


def test_a_report_is_self_contained_and_shows_its_content(sections, tmp_path):
    path = html.write_report(tmp_path / "report.html", "Fish & <chips>", sections, notices=NOTICES)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} == set(page.ids)
    text = " ".join(" ".join(page.texts).split())
    for expected in (
        "Fish & <chips>", "All <variants>", "0.712 (0.662 to 0.762)", "0.765 (0.715 to 0.815)", "0.250", "Bars & dots",
        "Six <patients>.", *NOTICES, "two & tasks", "<all>",
    ):  # fmt: skip
        assert expected in text, expected
    pictures = [address for address in page.addresses if address.startswith("data:")]
    for address, kind in zip(pictures, ["svg", "png"], strict=True):
        content = base64.b64decode(address.split(",")[1], validate=True)
        assert content == (tmp_path / "figures" / f"ablation.{kind}").read_bytes()
    assert b"http" not in re.sub(rb"http://(www\.w3\.org|purl\.org|creativecommons\.org)", b"", path.read_bytes())


def test_notices_are_above_the_table_of_contents(sections, tmp_path):
    path = html.write_report(tmp_path / "report.html", "A study", sections, notices=NOTICES)
    text = path.read_text(encoding="utf-8")
    assert all(text.index(notice) < text.index("<nav>") for notice in NOTICES)
    path = html.write_report(tmp_path / "report.html", "A study", sections)
    assert NOTICES[0] not in path.read_text(encoding="utf-8")


def test_a_report_is_the_same_each_time(sections, tmp_path):
    path = tmp_path / "report.html"
    first = html.write_report(path, "A study", sections).read_bytes()
    assert html.write_report(path, "A study", sections).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "message"), [("lost.png", "cannot be read"), ("figure.pdf", "Expected an SVG or PNG file")]
)
def test_a_report_refuses_a_picture_that_it_cannot_embed(name, message, tmp_path):
    section = html.Section("x", pictures=[html.Picture(tmp_path / name, "x")])
    with pytest.raises(RunError, match=message):
        html.write_report(tmp_path / "report.html", "A study", [section])
    assert not (tmp_path / "report.html").exists()


def test_pictures_come_before_tables_and_a_folded_table_opens_on_a_click(sections, tmp_path):
    results = sections[1]
    table = html.Table(results.tables[0].rows, results.tables[0].columns, "All of it", folded=True)
    path = html.write_report(
        tmp_path / "report.html", "A study", [html.Section("Results", [], [table], results.pictures)]
    )
    text = path.read_text(encoding="utf-8")
    assert text.index("<figure>") < text.index("<details>") < text.index("<summary>All of it</summary>")
    assert "<details open" not in text
    assert "<caption>" not in text
