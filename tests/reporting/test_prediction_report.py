"""Reports of predictions, without a browser: what they show, what they hide, and what bad input does."""

import base64
import dataclasses
import gzip
import hashlib
import json
import sys
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import zoo
from ichprog.errors import IchprogError, RunError, ScanError
from ichprog.io import write_text
from ichprog.reporting import prediction_report, volumes
from ichprog.reporting.pdf import count_pages, find_chromium, write_pdf
from ichprog.reporting.prediction_report import read_summary, render
from ichprog.reporting.report_index import write_index
from ichprog.reporting.volumes import Layer, prepare_volumes
from ichprog.scan import read

from support import phantoms
from support.results import full_record

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&'\""
SPEC = zoo.find("compact.prognosis_gcs3_age_clinical")


@pytest.fixture(scope="module")
def head():
    return phantoms.head((3.0, 3.0, 10.0), blood="lobar")


@pytest.fixture(scope="module")
def layers(head):
    """Return the brain, blood of two kinds, and a signed map with one extreme voxel."""
    blood = head.blood.astype(np.uint8)
    blood[:, :, : blood.shape[2] // 2] *= 2
    values = np.random.default_rng(0).normal(size=head.scan.hu.shape).astype(np.float32)
    values[20, 20, 5] = 1000
    return [
        Layer("Brain", "brain", head.brain),
        Layer("Haemorrhage", "haemorrhage", blood, ("one", "two")),
        Layer("A map", "map", values),
    ]


@pytest.fixture(scope="module")
def prepared(head, layers):
    return prepare_volumes(head.scan, layers)


class Page(HTMLParser):
    """The elements, attributes, scripts and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts, self._open = [], [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._open = tag
        if tag == "script":
            self.scripts.append(dict(attrs))

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1]["content"] = data
        elif self._open != "style":
            self.text += " " + data

    @property
    def words(self):
        return " ".join(self.text.split())

    def data(self, name):
        return json.loads(next(each["content"] for each in self.scripts if each.get("id") == name))


def decode(image):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(image["data"])))


def box_of(image, scan):
    """Return the voxels of a scan that an unaveraged image covers, by the two affines."""
    to_scan = np.linalg.inv(scan.affine) @ image.affine
    np.testing.assert_allclose(to_scan[:3, :3], np.eye(3), atol=1e-5)
    start = np.rint(to_scan[:3, 3]).astype(int)
    return tuple(slice(first, first + size) for first, size in zip(start, image.shape, strict=True))


def test_the_viewer_has_the_scan_and_its_masks_at_their_position(head, layers, prepared):
    scan, brain, blood, _ = map(decode, prepared.images)
    for image, values in ((scan, head.scan.hu), (brain, head.brain), (blood, layers[1].values)):
        shown = np.asarray(image.dataobj)
        assert np.abs(shown - np.clip(values[box_of(image, head.scan)], -1024, 3071)).max() <= 0.5
    assert np.asarray(blood.dataobj).sum() == layers[1].values.sum()
    assert (scan.get_data_dtype(), brain.get_data_dtype()) == (np.int16, np.uint8)
    assert prepared.images[2]["regions"] == ["one", "two"]


def test_the_viewer_starts_in_the_blood(head, prepared):
    i, j, k = np.rint(np.linalg.inv(head.scan.affine) @ [*prepared.start, 1])[:3].astype(int)
    assert head.blood[i, j, k]


def test_a_map_is_within_the_stated_error_and_0_outside_the_brain(head, layers, prepared):
    image = decode(prepared.images[3])
    top = np.percentile(np.abs(layers[2].values[head.brain]), 99.5)
    expected = np.where(head.brain, np.clip(layers[2].values / top, -1, 1), 0)[box_of(image, head.scan)]
    assert np.abs(np.asarray(image.dataobj) - expected).max() <= 1 / 254 + 1e-6
    assert prepared.images[3]["top"] == pytest.approx(top, rel=1e-6)
    assert "1/254" in " ".join(prepared.notes)


def test_a_scan_with_many_voxels_is_averaged_and_the_report_says_so(head, layers, monkeypatch):
    monkeypatch.setattr(volumes, "MOST_VOXELS", 10_000)
    made = prepare_volumes(head.scan, layers)
    image, mask = decode(made.images[0]), decode(made.images[2])
    assert image.shape == mask.shape
    assert np.prod(image.shape) <= 10_000
    factors = np.rint(np.array(image.header.get_zooms()) / head.scan.spacing).astype(int)
    assert f"means over {' x '.join(map(str, factors))} voxels" in made.notes[1]
    centre = np.linalg.inv(head.scan.affine) @ image.affine @ [3, 3, 1, 1]
    start = np.rint(centre[:3] - (factors - 1) / 2).astype(int)
    block = head.scan.hu[tuple(slice(s, s + f) for s, f in zip(start, factors, strict=True))]
    assert np.asarray(image.dataobj)[3, 3, 1] == pytest.approx(np.clip(block.mean(), -1024, 3071), abs=0.51)
    assert np.asarray(mask.dataobj).any()


def test_a_scan_that_compresses_badly_is_averaged_until_it_is_small(head, monkeypatch):
    whole = len(prepare_volumes(head.scan).images[0]["data"])
    monkeypatch.setattr(volumes, "_MOST_BYTES", whole // 3)
    made = prepare_volumes(head.scan)
    assert len(made.images[0]["data"]) <= whole // 3
    assert "means over" in made.notes[1]


@pytest.mark.parametrize("slices", [1, 1000], ids=["1-slice", "1000-slices"])
def test_any_number_of_slices(head, slices):
    values = np.full((16, 16, slices), -1000, np.float32)
    values[4:12, 4:12] = 30
    made = prepare_volumes(dataclasses.replace(head.scan, hu=values))
    assert decode(made.images[0]).shape[2] == slices
    assert base64.b64decode(made.picture)[:2] == b"\xff\xd8"  # a JPEG


def test_air_alone_is_shown_as_it_is():
    made = prepare_volumes(read((np.full((20, 24, 4), -1000, np.float32), np.diag([-1.0, -1.0, 5.0, 1.0]))))
    assert decode(made.images[0]).shape == (20, 24, 4)


def test_an_empty_map_and_an_empty_mask_are_called_empty(head):
    nothing = np.zeros(head.scan.hu.shape, np.float32)
    made = prepare_volumes(head.scan, [Layer("A map", "map", nothing), Layer("Blood", "haemorrhage", nothing)])
    assert [image["empty"] for image in made.images[1:]] == [True, True]
    assert Page(render(full_record(), volumes=made)).words.count("(empty)") == 2


def test_a_layer_of_another_scan_is_refused(head):
    with pytest.raises(ScanError, match="another scan") as caught:
        prepare_volumes(head.scan, [Layer("A map", "map", np.zeros((2, 2, 2)))])
    assert caught.value.code == "other-scan"


def test_a_report_shows_the_result_in_words(prepared):
    page = Page(render(full_record(), volumes=prepared, spec=SPEC, is_simulated=True))
    for words in (
        "For research only, not for patient care.", "The patient is simulated.", "Trained on simulated patients only.",
        "prognosis: poor", SPEC.task("prognosis").meaning, "70.4 %", "± 5.2", "68.0 % calibrated",
        "the probability of poor, 70.4 %, exceeds the threshold of 50 %",
        "the probability of 9-12 or 3-8, 41.0 %, does not exceed the threshold of 50 %",
        "At a coverage of 80 %: good or poor", "The model abstains from prognosis: Every label is possible",
        "age 71", "+0.31 of prognosis poor", "-0.12 of prognosis poor", "Not known: nihss",
        "Haemorrhage: found", "97.4 %", "13.7 mL , 10.9 to 48.5 mL", "no interval known", "midline shift",
        "0.7 mm (0.0 to 3.4 mm)", "Volumes are uncertain.", "ICH score 1 to 2 : death within 30 days 13 % to 26 %",
        "Slices are thick.", "measured 7.5 mm", "expected 0.5 to 6 mm", "Written by ichprog", "NiiVue, BSD 2-Clause",
    ):  # fmt: skip
        assert words in page.words, words
    assert ("div", "role", "note") in page.attributes
    before, details = page.text.split("Provenance", 1)
    assert "sha256" in details
    assert "sha256" not in before


def test_bars_spread_and_threshold_are_drawn_at_their_place():
    record = full_record()
    task = dataclasses.replace(SPEC.tasks[0], threshold=0.37)
    text = render(record | {"haemorrhage": None}, spec=dataclasses.replace(SPEC, tasks=(task, *SPEC.tasks[1:])))
    assert '<i class="threshold" style="left: 37.00%"></i>' in text
    assert '<i class="fill" style="width: 70.40%"></i>' in text
    assert '<i class="spread" style="left: 65.20%; width: 10.40%"></i>' in text
    assert text.count('class="threshold"') == 3  # one of the outcome, and one for each further label of the GCS
    assert 'class="threshold"' not in render(record | {"haemorrhage": None})  # without a spec it is not known


def test_a_probability_near_0_or_1_is_not_rounded_to_it():
    record = full_record()
    record["tasks"]["prognosis"]["probabilities"] = {"good": 0.99999, "poor": 0.00001}
    words = Page(render(record)).words
    assert "> 99.9 %" in words
    assert "< 0.1 %" in words


def test_names_and_texts_from_files_are_escaped(prepared, tmp_path):
    record = full_record(patient=HOSTILE, scan=f"{HOSTILE}.nii.gz", model=HOSTILE)
    record["warnings"][0]["message"] = record["tasks"]["prognosis"]["label"] = HOSTILE
    record["provenance"]["scan"] = {HOSTILE: HOSTILE}
    hostile = dataclasses.replace(prepared, images=tuple(each | {"name": HOSTILE} for each in prepared.images))
    clean = Page(render(full_record(), volumes=prepared))
    page = Page(render(record, volumes=hostile))
    assert page.tags == clean.tags  # no element more
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text
    write_text(tmp_path / "a.html", render(record, volumes=hostile))
    assert read_summary(tmp_path / "a.html")["name"] == HOSTILE
    assert page.data("images")["images"][0]["name"] == HOSTILE


def test_a_report_asks_for_nothing_from_outside(prepared):
    page = Page(render(full_record(), volumes=prepared))
    assert not [
        value for _, name, value in page.attributes if name in ("src", "href") and not value.startswith("data:")
    ]
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    code = [script["content"] for script in page.scripts if "type" not in script]
    assert len(code) == 2
    for script in code:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_a_failed_scan_has_a_report_with_its_error():
    error = {"code": "not-hu", "message": "scans/a.nii.gz: no HU.", "measured": [0, 4], "expected": "HU", "unit": "HU"}
    record = {"scan": "scans/a.nii.gz", "model": "m", "tasks": {}, "warnings": [], "provenance": {}, "error": error}
    words = Page(render(record)).words
    assert "No prediction: the scan failed A: no HU. measured 0, 4 HU · expected HU · not-hu" in words


def test_results_without_maps_or_scan_have_no_viewer():
    page = Page(render(full_record(), no_viewer="the scan is gone"))
    assert "No viewer The scan is gone." in page.words
    assert "canvas" not in page.tags
    assert "prognosis: poor" in page.words


def test_a_record_that_is_no_result_is_refused():
    record = full_record()
    del record["tasks"]["prognosis"]["probabilities"]
    with pytest.raises(RunError, match="cannot be read"):
        render(record)


def test_a_report_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    write_text(path, render(full_record()))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("ichprog.io.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, render(full_record(model="another")))
    assert [each.name for each in tmp_path.iterdir()] == ["a.html"]
    assert path.read_bytes() == before


def test_the_same_result_gives_the_same_bytes(head, layers):
    first, second = (render(full_record(), volumes=prepare_volumes(head.scan, layers)) for _ in range(2))
    assert first == second


def test_a_report_of_a_haemorrhage_alone():
    words = Page(render(full_record()["haemorrhage"])).words
    assert "Haemorrhage: found" in words
    assert "Volumes are uncertain." in words


def index_of(folder):
    page = Page(write_index(folder).read_text())
    return page.data("data")["rows"], page


def test_the_index_lists_every_report_and_flags_what_is_unusual(tmp_path):
    for number in range(9):
        record = full_record(patient=f"P{number}", scan=f"{number}.nii.gz")
        record["abstained"] = {"prognosis": "because"} if number == 1 else {}
        record["warnings"] = record["warnings"] if number == 2 else []
        record["haemorrhage"]["volume_ml"]["total"] = 900.0 if number == 3 else 10.0 + number
        write_text(tmp_path / f"{number}.html", render(record))
    failed = {"scan": "x.nii.gz", "model": "m", "tasks": {}, "provenance": {}, "error": {"code": "bad", "message": "m"}}
    write_text(tmp_path / "x.html", render(failed))
    (tmp_path / "other.html").write_text("<html>no report</html>")
    rows, page = index_of(tmp_path)
    flags = {row["name"]: row["flags"] for row in rows if row["flags"]}
    assert flags == {"P1": ["abstains"], "P2": ["warnings"], "P3": ["extreme"], "x": ["failed"]}
    assert [row["name"] for row in rows if row["extremes"] == ["blood"]] == ["P3"]
    assert "failed (1)" in page.words
    assert rows[0]["p0"] == pytest.approx(0.704)
    assert "For research only, not for patient care." in page.words
    assert len(index_of(tmp_path)[0]) == 10  # the index itself is no report


def test_few_reports_have_no_extremes(tmp_path):
    for number in range(4):
        record = full_record(scan=f"{number}.nii.gz")
        record["haemorrhage"]["volume_ml"]["total"] = 900.0 if number == 3 else 10.0
        write_text(tmp_path / f"{number}.html", render(record))
    assert not any("extreme" in row["flags"] for row in index_of(tmp_path)[0])


def test_the_index_escapes_what_reports_hold(tmp_path):
    for number in range(2):
        record = full_record(patient=HOSTILE, scan=f"{number}.nii.gz", model=HOSTILE)
        record["tasks"] = {HOSTILE: record["tasks"]["prognosis"]}
        write_text(tmp_path / f"{number}.html", render(record))
    rows, page = index_of(tmp_path)
    assert rows[0]["name"] == HOSTILE
    assert len(page.scripts) == 2
    assert "img" not in page.tags


def test_one_report_has_no_index(tmp_path):
    write_text(tmp_path / "a.html", render(full_record()))
    assert write_index(tmp_path) is None


def test_a_damaged_report_is_left_out_of_the_index(tmp_path):
    for name in "abc":
        write_text(tmp_path / f"{name}.html", render(full_record(scan=f"{name}.nii.gz")))
    text = (tmp_path / "a.html").read_text()
    (tmp_path / "a.html").write_text(text.replace('id="summary">{', 'id="summary">{{'))
    assert [row["file"] for row in index_of(tmp_path)[0]] == ["b.html", "c.html"]


def test_save_report_writes_a_prediction_from_python(bright_model, tmp_path):
    path = tmp_path / "scan.nii.gz"
    nib.Nifti1Image(phantoms.brain_hu((96, 96, 30)), np.diag([-2.5, -2.5, 5, 1])).to_filename(path)
    model = ichprog.load_model(bright_model)
    prediction = ichprog.predict(model, path)
    maps = ichprog.explain(model, path, task=["prognosis", "age"], method=["guided_backprop"])
    report = ichprog.save_report(prediction, path, tmp_path / "new" / "a.html", maps=maps, spec=model.spec)
    page = Page(report.read_text())
    assert f"{100 * prediction['prognosis'].probabilities['poor']:.1f} %" in page.words
    assert "Map of age: >=80, guided_backprop" in page.words
    assert [image["kind"] for image in page.data("images")["images"]] == ["scan", "brain", "map", "map"]
    assert str(tmp_path) not in report.read_text()
    without = ichprog.save_report(prediction, None, tmp_path / "b.html", identifiers=True)
    assert str(path) in Page(without.read_text()).text


def test_reports_need_jinja2(monkeypatch):
    prediction_report.template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(IchprogError, match=r"ichprog\[report\]"):
        render(full_record())
    prediction_report.template.cache_clear()


def test_a_pdf_needs_chromium(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(IchprogError, match="apt install chromium"):
        find_chromium()


def test_a_chromium_that_prints_nothing_is_reported(monkeypatch, tmp_path):
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\necho 'no display' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(IchprogError, match="no display"):
        write_pdf("<html lang='en'></html>", tmp_path / "a.pdf")
    assert not (tmp_path / "a.pdf").exists()


def test_pages_of_a_pdf_are_counted():
    assert count_pages(b"<</Type /Pages /Count 2>> <</Type /Page\n>> <</Type/Page>>") == 2
