"""A study's figures, tables and report: what is shown is what was given, and it stands alone."""

import base64
import csv
import io
import re
import string
import sys
import tomllib
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest

from ichprog import IchprogError
from ichprog.errors import RunError
from ichprog.metrics.calibration import calibration_curve, probability_histogram
from ichprog.metrics.discrimination import net_benefit
from ichprog.reporting import figures, html, tables
from ichprog.study.config import Study, template

VARIANTS = ["one_task", "two & tasks", "<all>"]


def interval(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half}


METRICS = {
    "one_task": {"prognosis": {"auroc": interval(0.7123), "brier": interval(0.21)}},
    "two & tasks": {"prognosis": {"auroc": interval(0.7654), "brier": interval(0.19)}, "gcs": {"mae": interval(0.6)}},
    "<all>": {"prognosis": {"auroc": None, "brier": {"value": 0.25, "low": None, "high": None}}},
}


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 120)
    return {name: (truth, np.round(rng.beta(2 + truth, 3 - truth), 2)) for name in VARIANTS}


@pytest.fixture(scope="module")
def drawings(answers):
    """One of each kind, from functions so that each can be drawn again."""
    truth = answers["one_task"][0]
    at, up = np.linspace(20, 90, 15), np.linspace(3, 15, 12)
    surface = 1 / (1 + np.exp(-(at - 60) / 10 + (up[:, None] - 9)))
    points = np.where(np.arange(120) % 7, truth * 30.0 + 30, np.nan), np.full(120, 9.0), truth
    log = [
        {"fold": str(f), "epoch": str(e), "loss": str(2 / (e + 1)), "val_loss": "" if f else str(1 / (e + 1))}
        for f in range(2)
        for e in range(4)
    ]
    readers = {"reader A": {"sensitivity": interval(0.7), "specificity": interval(0.8)}, "reader B": {}}
    return {
        "ablation": lambda: figures.ablation(METRICS, "prognosis", "auroc", chance=0.5),
        "forest": lambda: figures.forest({"men": interval(0.1), "women": None}, "difference of AUROC", line=0),
        "roc": lambda: figures.roc({**answers, "constant": (np.ones(4), np.full(4, 0.5))}, readers),
        "calibration": lambda: figures.calibration(
            {v: {"as trained": calibration_curve(truth, q), "recalibrated": calibration_curve(truth, q**2)}
             for v, (_, q) in answers.items()}
        ),
        "decision": lambda: figures.decision_curve(
            {v: net_benefit(truth, q, np.linspace(0.01, 0.99, 50)) for v, (_, q) in answers.items()}
        ),
        "histograms": lambda: figures.histograms(
            {v: probability_histogram(truth, q) for v, (_, q) in answers.items()}, ["ok", "bad"]
        ),
        "folds": lambda: figures.folds({v: [0.7, None, 0.8] for v in VARIANTS}, "auroc", {"one_task": interval(0.75)}),
        "learning": lambda: figures.learning_curve(
            {v: {50: interval(0.6), 100: interval(0.7), 200: None} for v in VARIANTS}, "auroc", chance=0.5
        ),
        "boundaries": lambda: figures.boundaries(
            dict.fromkeys(VARIANTS, (at, up, surface)), points, ("age", "gcs"), ("ok", "bad")
        ),
        "training": lambda: figures.training(log, title="one_task"),
    }  # fmt: skip


KINDS = [
    "ablation", "forest", "roc", "calibration", "decision", "histograms", "folds", "learning", "boundaries", "training",
]  # fmt: skip


def texts(svg):
    """What the text elements of an SVG say."""
    found = re.findall(r"<text[^>]*>(.*?)</text>", svg.read_text(encoding="utf-8"), re.S)
    return [each.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip() for each in found]


@pytest.fixture(scope="module")
def saved(drawings, tmp_path_factory):
    """Each figure with the files that it was written to."""
    folder = tmp_path_factory.mktemp("study") / "figures"
    drawn = {kind: drawings[kind]() for kind in KINDS}
    return {kind: (figure, figures.save(figure, folder, kind)) for kind, figure in drawn.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_axes_are_labelled_and_names_are_text(saved, kind):
    figure, (vector, raster) = saved[kind]
    plots = [axis for axis in figure.axes if axis.get_label() != "<colorbar>" and axis.has_data()]
    assert plots
    for axis in plots:
        assert axis.get_xlabel()
        assert axis.get_ylabel() or all(label.get_text() for label in axis.get_yticklabels())
    assert raster.read_bytes().startswith(b"\x89PNG")
    said = texts(vector)
    names = {"forest": ["men", "women"], "training": ["one_task"]}.get(kind, VARIANTS)
    for name in names:
        assert any(name in text for text in said), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_figure_gives_the_same_bytes(drawings, saved, tmp_path, kind):
    figure, paths = saved[kind]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in figures.save(figure, tmp_path, kind)] == first
    if kind in ("roc", "boundaries"):
        assert [path.read_bytes() for path in figures.save(drawings[kind](), tmp_path, "again")] == first


def test_nothing_of_the_callers_style_changes_or_gets_in(drawings, tmp_path):
    import matplotlib as mpl

    plain = figures.save(drawings["ablation"](), tmp_path, "plain")[0].read_bytes()
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        before = dict(mpl.rcParams)
        assert figures.save(drawings["ablation"](), tmp_path, "styled")[0].read_bytes() == plain
        assert dict(mpl.rcParams) == before


def test_a_failed_save_leaves_nothing(drawings, tmp_path, monkeypatch):
    figure = drawings["forest"]()
    monkeypatch.setattr(type(figure), "savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        figures.save(figure, tmp_path, "forest")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(IchprogError, match=r"needs matplotlib. Install it with: pip install 'ichprog\[report\]'\."):
        figures.forest({}, "x")


def test_an_ablation_draws_values_and_intervals_of_the_task_alone():
    axis, beside = figures.ablation(METRICS, "gcs", "mae").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["two & tasks"]
    assert [label.get_text() for label in beside.get_yticklabels()] == ["0.600 (0.550 to 0.650)"]
    whole, dot = axis.lines
    np.testing.assert_allclose(whole.get_xdata(), [0.55, 0.65])
    np.testing.assert_allclose(dot.get_xdata(), [0.6])


def test_roc_points_and_their_area_are_those_of_scikit_learn(answers):
    from sklearn.metrics import roc_auc_score, roc_curve

    for truth, p in answers.values():
        assert len(np.unique(p)) < len(p), "ties are wanted here"
        false, true = figures.roc_points(truth, p)
        expected_false, expected_true, _ = roc_curve(truth, p, drop_intermediate=False)
        np.testing.assert_allclose(false, expected_false)
        np.testing.assert_allclose(true, expected_true)
    figure = figures.roc(answers)
    for name, (truth, p) in answers.items():
        assert f"{name}  {roc_auc_score(truth, p):.3f}" in figure.axes[0].get_legend_handles_labels()[1]


def test_readers_stand_at_their_operating_points(drawings):
    axis = drawings["roc"]().axes[0]
    dots = {line.get_label(): line.get_xydata() for line in axis.lines if str(line.get_label()).startswith("reader")}
    assert list(dots) == ["reader A"]  # nothing is known of reader B
    np.testing.assert_allclose(dots["reader A"], [[0.2, 0.7]])
    assert "constant  one class only" in axis.get_legend_handles_labels()[1]


def test_training_means_are_over_the_folds(drawings):
    means = {line.get_label(): line.get_ydata() for line in drawings["training"]().axes[0].lines}
    np.testing.assert_allclose(means["training, mean of 2 folds"], [2, 1, 2 / 3, 1 / 2])
    np.testing.assert_allclose(means["validation, mean of 1 folds"], [1, 1 / 2, 1 / 3, 1 / 4])


def test_ten_variants_look_different():
    curves = {f"v{k}": {50: interval(0.5), 100: interval(0.6)} for k in range(10)}
    axis = figures.learning_curve(curves, "auroc").axes[0]
    looks = {(line.get_color(), line.get_linestyle()) for line in axis.lines if str(line.get_label()).startswith("v")}
    assert len(looks) == 10


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: figures.ablation({}, "prognosis", "auroc"),
        lambda: figures.forest({"a": None}, "x"),
        lambda: figures.roc({}),
        lambda: figures.calibration({}),
        lambda: figures.calibration({"a": {"b": calibration_curve([], [])}}),
        lambda: figures.decision_curve({}),
        lambda: figures.histograms({}, ["a", "b"]),
        lambda: figures.folds({"a": [None]}, "auroc"),
        lambda: figures.learning_curve({"a": {}}, "auroc"),
        lambda: figures.boundaries({}, (np.empty(0), np.empty(0), np.empty(0)), ("a", "b"), ("c", "d")),
        lambda: figures.training([]),
    ],
    ids=[
        "ablation",
        "forest",
        "roc",
        "calibration",
        "no_points",
        "decision_curve",
        "histograms",
        "folds",
        "learning_curve",
        "boundaries",
        "training",
    ],
)
def test_nothing_to_draw_is_drawn_as_nothing(drawn):
    from matplotlib.figure import Figure

    assert isinstance(drawn(), Figure)


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
def test_cells_as_readers_see_them(value, text):
    assert tables.shown(value) == text


def test_csv_reads_back_in_full():
    read = list(csv.DictReader(io.StringIO(tables.comma_separated(ROWS, COLUMNS))))
    assert list(read[0]) == ["variant", "auroc", "auroc_low", "auroc_high", "p", "n", "fine", "note"]
    assert [row["variant"] for row in read] == [row["variant"] for row in ROWS]
    assert [float(read[0][key]) for key in ("auroc", "auroc_low", "auroc_high")] == list(ROWS[0]["auroc"].values())
    assert float(read[0]["p"]) == 0.00001
    assert (read[1]["auroc"], read[1]["auroc_low"], read[1]["p"], read[1]["n"]) == ("", "", "", "3")
    assert (read[2]["auroc"], read[2]["auroc_high"], read[2]["note"]) == ("0.5", "", "")


def test_markdown_has_one_cell_a_column():
    lines = tables.markdown(ROWS, COLUMNS, "Of *all*").splitlines()
    assert lines[0] == r"| variant | AUROC | p | patients | fine | note\_1 |"
    assert lines[1] == "| --- | ---: | ---: | ---: | --- | --- |"
    assert lines[2] == r"| one\_task | 0.712 (0.662 to 0.762) | \<0.001 | 12 | yes | 50 % & more |"
    assert all(len(re.split(r"(?<!\\)\|", line)) == 8 for line in lines[:5])
    assert lines[-1] == r"Of \*all\*"


def test_latex_escapes_what_is_special():
    text = tables.latex(ROWS, COLUMNS, "50 % of {all}", label="results")
    assert r"one\_task & 0.712 (0.662 to 0.762) & \textless{}0.001 & 12 & yes & 50 \% \& more \\" in text
    assert r"a\textbar{}b\textbackslash{}c & - & - & 3 & no & \textless{}80 \\" in text
    assert r"\caption{50 \% of \{all\}}" in text
    assert r"\label{tab:results}" in text
    assert r"\begin{tabular}{lrrrll}" in text
    bare = re.sub(r"\\[&%$#_{}]|\\[a-z]+\{\}", "", text[text.index("\\hline") :])
    assert not set(re.findall(r"[%$#_^~<>|]", bare))
    rows = [line for line in bare.splitlines() if line.endswith(r"\\")]
    assert [line.count("&") for line in rows] == [5] * 4


def test_tables_are_written_three_ways_and_stay_the_same(tmp_path):
    written = tables.write(iter(ROWS), COLUMNS, tmp_path / "tables", "results", "All")
    assert [path.name for path in written] == ["results.csv", "results.md", "results.tex"]
    first = [path.read_bytes() for path in written]
    assert all(b"0.712" in each for each in first)
    assert [path.read_bytes() for path in tables.write(ROWS, COLUMNS, tmp_path / "tables", "results", "All")] == first
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in written)


def test_columns_without_heads_get_words():
    head = tables.markdown([{"balanced_accuracy": 1.0}], ["balanced_accuracy", "auroc_1", "f1_at_half"]).splitlines()[0]
    assert head == "| balanced accuracy | AUROC 1 | F1 at half |"


class Page(HTMLParser):
    """What a report holds: text, addresses, ids, and whether every element is closed in turn."""

    EMPTY = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, text):
        super().__init__()
        self.said, self.addresses, self.ids, self.tags, self.open = [], [], [], [], []
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
        self.said.append(data)


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.toml").write_text(template("smoke"))
    return Study.read(tmp_path / "study.toml")


@pytest.fixture
def contents(study, drawings, tmp_path):
    truth = {"prognosis": np.array([0, 1, 1, -1, 0, 1]), "gcs": np.array([0, -1, -1, 2, 1, 1])}
    vector, raster = figures.save(drawings["ablation"](), tmp_path / "figures", "ablation")
    rows = [{"variant": name, **tasks["prognosis"]} for name, tasks in METRICS.items()]
    return html.Contents(
        title="Fish & <chips>",
        simulated=True,
        sections=[
            html.Section("What was compared", tables=[html.compared(study)]),
            html.Section("Patients", tables=[html.people(study, truth)]),
            html.Section(
                "Results",
                ["Out of fold."],
                [html.Table(rows, ["variant", "auroc", "brier"], "All <variants>")],
                [html.Picture(vector, "Bars & dots"), html.Picture(raster, "The same")],
            ),
        ],
        limits=["Six patients."],
        facts=html.facts(study, truth, METRICS, simulated=True),
    )


def test_a_report_stands_alone_and_says_what_it_was_given(contents, tmp_path):
    path = html.report(tmp_path, contents)
    assert path == tmp_path / "report.html"
    seen = Page(path.read_text(encoding="utf-8"))
    assert seen.open == []
    assert {"script", "link", "iframe", "object"}.isdisjoint(seen.tags)
    assert all(address.startswith(("#", "data:image/")) for address in seen.addresses)
    assert {address[1:] for address in seen.addresses if address.startswith("#")} == set(seen.ids)
    said = " ".join(" ".join(seen.said).split())
    for text in (
        "Fish & <chips>", "All <variants>", "0.712 (0.662 to 0.762)", "0.765 (0.715 to 0.815)", "0.250", "Bars & dots",
        "Six patients.", "For research only, not for patient care.", "prognosis_gcs", "answer of all, age, gcs",
        "good: 2, poor: 3",
    ):  # fmt: skip
        assert text in said, text
    pictures = [address for address in seen.addresses if address.startswith("data:")]
    for address, kind in zip(pictures, ["svg", "png"], strict=True):
        inside = base64.b64decode(address.split(",")[1], validate=True)
        assert inside == (tmp_path / "figures" / f"ablation.{kind}").read_bytes()
    assert b"http" not in re.sub(rb"http://(www\.w3\.org|purl\.org|creativecommons\.org)", b"", path.read_bytes())


def test_that_patients_are_simulated_stands_at_the_top_and_only_then(contents, tmp_path):
    import dataclasses

    text = html.report(tmp_path, contents).read_text(encoding="utf-8")
    assert text.index("patients of this study are simulated") < text.index("<nav>")
    assert text.index("For research only") < text.index("<nav>")
    real = html.report(tmp_path, dataclasses.replace(contents, simulated=False, facts={})).read_text(encoding="utf-8")
    assert "of this study are simulated" not in real
    assert "For research only" in real


def test_a_report_is_the_same_each_time(contents, tmp_path):
    first = html.report(tmp_path, contents).read_bytes()
    assert html.report(tmp_path, contents).read_bytes() == first


def test_a_report_refuses_pictures_it_cannot_hold(contents, tmp_path):
    import dataclasses

    for name, match in (("lost.png", "cannot be read"), ("figure.pdf", "as one of them")):
        section = html.Section("x", pictures=[html.Picture(tmp_path / name, "x")])
        with pytest.raises(RunError, match=match):
            html.report(tmp_path, dataclasses.replace(contents, sections=[section]))
    assert not (tmp_path / "report.html").exists()


def test_people_are_counted_by_label(study):
    truth = {"prognosis": np.array([0, 1, 1, -1]), "gcs": np.array([2, 2, 0, -1])}
    rows = {row["task"]: row for row in html.people(study, truth).rows}
    assert rows["prognosis"] == {"task": "prognosis", "patients": 4, "missing": 1, "labels": "good: 1, poor: 2"}
    assert rows["gcs"]["labels"] == "13-15: 1, 9-12: 0, 3-8: 2"


def test_the_checklist_has_every_item_once_and_in_order():
    """27 items with 52 parts, by the statement's own count."""
    numbers = [row["number"] for row in html.checklist({})]
    assert len(numbers) == len(set(numbers)) == 52
    split = [re.fullmatch(r"(\d+)([a-g]?)", number).groups() for number in numbers]
    assert sorted(split, key=lambda each: (int(each[0]), each[1])) == split
    assert {int(number) for number, _ in split} == set(range(1, 28))
    for number in range(1, 28):
        letters = "".join(letter for of, letter in split if int(of) == number)
        assert letters == string.ascii_lowercase[: len(letters)], number
    assert {row["said"] for row in html.checklist({}) if "{" in row["said"]} == set()


def test_the_checklist_takes_what_is_known_and_leaves_the_rest(study):
    truth = {"prognosis": np.array([0, 1, 1, -1, 0, 1])}
    known = html.facts(study, truth, METRICS, simulated=True)
    said = {row["number"]: row["said"] for row in html.checklist(known)}
    assert said["17"] == "To be written by the authors."
    assert said["20a"].startswith("6 patients: prognosis (good: 2, poor: 3).")
    assert "prognosis 1" in said["11"]
    assert said["12a"].startswith("2 folds, stratified by prognosis")
    assert "25 %" in said["12a"]
    assert "one_task 0.712 (0.662 to 0.762)" in said["23a"]
    assert "<all>" not in said["23a"]  # its AUROC is not defined
    assert "Patients simulated by ichprog" in said["5a"]
    unknown = {row["number"]: row["said"] for row in html.checklist(known | {"patients": None})}
    assert unknown["20a"] == "To be written by the authors."
    assert unknown["12a"] == said["12a"]


def test_every_fact_that_the_checklist_asks_for_is_made(study):
    items = tomllib.loads((files("ichprog.study") / "tripod.toml").read_text(encoding="utf-8"))["item"]
    asked = {name for item in items for _, name, _, _ in string.Formatter().parse(item.get("filled", "")) if name}
    made = html.facts(study, {"prognosis": np.array([0, 1])}, METRICS, simulated=False)
    assert asked == set(made)
