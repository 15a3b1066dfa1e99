"""Reports and their index in headless Chromium: no error, no request, layers, keyboard, and accessibility."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from ichprog.io import write_text
from ichprog.reporting.pdf import PROGRAMS, count_pages, write_pdf
from ichprog.reporting.prediction_report import render
from ichprog.reporting.report_index import render_index, write_index
from ichprog.reporting.volumes import Layer, prepare_volumes
from ichprog.zoo import find

from support import phantoms
from support.results import full_record

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
axe_core_python = pytest.importorskip("axe_core_python", reason="needs axe-core")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
DRIVER = shutil.which("chromedriver")
AXE = Path(os.environ.get("AXE_CORE", Path(axe_core_python.__file__).parent)) / "axe.min.js"
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver on the PATH", allow_module_level=True)

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
)  # fmt: skip
HOSTILE = "</script><img src=x onerror=document.title='hacked'>"
WAIT_S = 600  # for a loaded machine without a GPU


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return a folder with a report that has every layer, eleven reports without pictures, and their index."""
    folder = tmp_path_factory.mktemp("reports")
    head = phantoms.head((4.0, 4.0, 12.0), blood="lobar")
    made = np.zeros(head.scan.hu.shape, np.float32)
    made[..., made.shape[2] // 2 :] = 1
    layers = [
        Layer("Brain", "brain", head.brain),
        Layer("Haemorrhage", "haemorrhage", head.blood, ("parenchymal",)),
        Layer(f"Map {HOSTILE}", "map", made),
    ]
    record = full_record(patient=HOSTILE)
    spec = find("compact.prognosis_gcs3_age_clinical")
    write_text(folder / "full.html", render(record, volumes=prepare_volumes(head.scan, layers), spec=spec))
    for number in range(11):
        record = full_record(patient=f"P{number}", scan=f"{number}.nii.gz")
        record["tasks"]["prognosis"]["probabilities"] = {"good": 1 - number / 20, "poor": number / 20}
        record["warnings"] = record["warnings"] if number == 4 else []
        write_text(folder / f"{number}.html", render(record))
    write_index(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.page_load_strategy = "eager"
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.command_executor.client_config.timeout = WAIT_S
    driver.set_page_load_timeout(WAIT_S)
    driver.set_script_timeout(WAIT_S)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(browser, pages):
    """Open the full report, and return the browser when the viewer is there."""
    browser.get_log("performance")
    browser.get((pages / "full.html").as_uri())
    wait_until(browser, "document.body.classList.contains('has-viewer')")
    return browser


@pytest.fixture
def index(browser, pages):
    browser.get((pages / "index.html").as_uri())
    return browser


def wait_until(browser, condition):
    end = time.monotonic() + WAIT_S
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < end, browser.get_log("browser")
        time.sleep(0.05)


def element(browser, name):
    return browser.find_element("id", name)


def pixels(browser):
    """Return a hash of the canvas after it was drawn, with the page at its top, so that nothing covers the canvas."""
    browser.execute_script("scrollTo(0, 0)")
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return hashlib.sha256(element(browser, "canvas").screenshot_as_png).hexdigest()


def wait_for_pixels(browser, is_expected):
    """Wait until the canvas is as expected; a toggle loads its layer first."""
    end = time.monotonic() + WAIT_S
    while not is_expected(pixels(browser)):
        assert time.monotonic() < end
        time.sleep(0.05)


def violations(browser):
    """Return the serious and critical violations that axe-core finds, with their elements."""
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text(encoding="utf-8")})
    found = browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
    return [
        (each["id"], [node["target"] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def test_a_report_starts_without_an_error_and_asks_for_nothing(report):
    errors = [entry["message"] for entry in report.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    events = [json.loads(entry["message"])["message"] for entry in report.get_log("performance")]
    addresses = {
        e["params"]["request"]["url"].split(":")[0] for e in events if e["method"] == "Network.requestWillBeSent"
    }
    assert errors == []
    assert addresses <= {"file", "data", "blob"}
    assert "hacked" not in report.title.replace(HOSTILE, "")
    assert report.find_element("tag name", "h1").text == HOSTILE
    assert element(report, "readout").text.count("mm") == 1
    assert "HU" in element(report, "readout").text


@pytest.mark.parametrize("layer", [1, 2, 3], ids=["brain", "haemorrhage", "map"])
def test_a_toggle_changes_the_pixels_and_changes_them_back(report, layer):
    box, before = element(report, f"layer-{layer}"), pixels(report)
    box.click()
    wait_for_pixels(report, lambda now: now != before)
    box.click()
    wait_for_pixels(report, lambda now: now == before)


def test_window_and_threshold_change_the_pixels(report):
    before = pixels(report)
    report.execute_script("""
        const preset = document.getElementById("preset");
        preset.value = "600,2800";
        preset.dispatchEvent(new Event("change"));
    """)
    assert pixels(report) != before
    assert [element(report, name).get_attribute("value") for name in ("centre", "width")] == ["600", "2800"]


def test_keys_move_through_the_slices(report):
    from selenium.webdriver.common.keys import Keys

    canvas, slider = element(report, "canvas"), element(report, "slice-axial")
    start = int(slider.get_attribute("value"))
    canvas.send_keys(Keys.ARROW_UP)
    assert int(slider.get_attribute("value")) == start + 1
    canvas.send_keys(Keys.HOME)
    assert slider.get_attribute("value") == "1"
    before = pixels(report)
    canvas.send_keys(Keys.PAGE_UP)
    assert slider.get_attribute("value") == "6"
    assert pixels(report) != before
    slider.send_keys(Keys.ARROW_RIGHT)
    assert element(report, "slice-axial-value").text.startswith("7 of")


def test_the_patients_left_is_on_the_right(report):
    """The readout names the side of the crosshair, which the left arrow key moves to the left of the picture."""
    from selenium.webdriver.common.keys import Keys

    canvas = element(report, "canvas")
    canvas.send_keys(*[Keys.ARROW_LEFT] * 60)
    assert element(report, "readout").text.startswith("R ")
    canvas.send_keys(*[Keys.ARROW_RIGHT] * 120)
    assert element(report, "readout").text.startswith("L ")


def test_a_report_has_no_serious_violation(report):
    assert violations(report) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(report, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    report.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert report.execute_script("return document.documentElement.scrollWidth") <= width
    assert report.find_element("class name", "notice").is_displayed()
    report.execute_script("scrollTo(0, 9999)")
    top = report.execute_script("return document.querySelector('.notice').getBoundingClientRect().top")
    report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert top == 0  # always in sight


def names(browser):
    return browser.execute_script("return [...document.querySelectorAll('#rows a')].map((link) => link.textContent)")


def test_the_index_sorts_filters_and_searches(index):
    assert len(names(index)) == 12
    assert index.find_element("css selector", "th[aria-sort]").get_attribute("aria-sort") == "ascending"
    order = [name for name in names(index) if name.startswith("P")]
    assert order == [f"P{number}" for number in range(11)]  # P10 is the last: numbers are compared as numbers
    index.find_element("css selector", "th[data-key=p0] button").click()
    assert [name for name in names(index) if name.startswith("P")] == [f"P{number}" for number in range(10, -1, -1)]
    index.find_element("css selector", "input[value=warnings]").click()
    assert sorted(names(index)) == [HOSTILE, "P4"]
    element(index, "search").send_keys("p4")
    assert names(index) == ["P4"]
    assert element(index, "count").text == "1 of 12 reports"
    index.find_element("link text", "P4").click()
    assert index.find_element("tag name", "h1").text == "P4"


def test_an_index_of_5000_reports_shows_a_page_of_them(browser, tmp_path):
    rows = {f"{n}.html": {"name": f"P{n}", "tasks": {"a": {"label": "x", "p": n / 5000}}} for n in range(5000)}
    (tmp_path / "index.html").write_text(render_index(rows), encoding="utf-8")
    browser.get((tmp_path / "index.html").as_uri())
    assert names(browser) == [f"P{n}" for n in range(100)]
    browser.find_element("css selector", "th[data-key=p0] button").click()
    assert names(browser) == [f"P{n}" for n in range(4999, 4899, -1)]
    for _ in range(49):
        element(browser, "next").click()
    assert names(browser) == [f"P{n}" for n in range(99, -1, -1)]
    assert not element(browser, "next").is_enabled()
    element(browser, "search").send_keys("p499")
    assert element(browser, "count").text == "11 of 5000 reports"


def test_the_index_has_no_error_and_no_serious_violation(index):
    assert [entry for entry in index.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert "hacked" not in index.title
    assert violations(index) == []


def test_a_pdf_has_one_page(tmp_path):
    record = full_record()
    record["warnings"] = record["warnings"] * 30
    record["tasks"] |= {f"task{number}": record["tasks"]["gcs"] for number in range(4)}
    assert count_pages(write_pdf(render(record, with_scripts=False), tmp_path / "a.pdf").read_bytes()) == 1
