"""Figures of results: they show the values that they are given, and are the same each time."""

import re
import sys

import numpy as np
import pytest

from ichprog import IchprogError
from ichprog.metrics.calibration import calibration_curve, probability_histogram
from ichprog.metrics.discrimination import net_benefit
from ichprog.reporting import figures

from support.results import METRICS, VARIANTS, interval


@pytest.fixture(scope="module")
def predictions():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 120)
    return {name: (truth, np.round(rng.beta(2 + truth, 3 - truth), 2)) for name in VARIANTS}


@pytest.fixture(scope="module")
def drawings(predictions):
    """Return functions that draw one figure of each kind."""
    truth = predictions["one_task"][0]
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
        "roc": lambda: figures.roc({**predictions, "constant": (np.ones(4), np.full(4, 0.5))}, readers),
        "calibration": lambda: figures.calibration(
            {v: {"as trained": calibration_curve(truth, q), "recalibrated": calibration_curve(truth, q**2)}
             for v, (_, q) in predictions.items()}
        ),
        "decision": lambda: figures.decision_curve(
            {v: net_benefit(truth, q, np.linspace(0.01, 0.99, 50)) for v, (_, q) in predictions.items()}
        ),
        "histograms": lambda: figures.histograms(
            {v: probability_histogram(truth, q) for v, (_, q) in predictions.items()}, ["ok", "bad"]
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
    """Return the content of the text elements of an SVG."""
    found = re.findall(r"<text[^>]*>(.*?)</text>", svg.read_text(encoding="utf-8"), re.S)
    return [each.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip() for each in found]


@pytest.fixture(scope="module")
def saved(drawings, tmp_path_factory):
    """Return each figure with the files that it was written to."""
    folder = tmp_path_factory.mktemp("reporting") / "figures"
    drawn = {kind: drawings[kind]() for kind in KINDS}
    return {kind: (figure, figures.save(figure, folder, kind)) for kind, figure in drawn.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_axes_are_labelled_and_names_are_text_in_the_svg(saved, kind):
    figure, (vector, raster) = saved[kind]
    plots = [axis for axis in figure.axes if axis.get_label() != "<colorbar>" and axis.has_data()]
    assert plots
    for axis in plots:
        assert axis.get_xlabel()
        assert axis.get_ylabel() or all(label.get_text() for label in axis.get_yticklabels())
    assert raster.read_bytes().startswith(b"\x89PNG")
    found = texts(vector)
    names = {"forest": ["men", "women"], "training": ["one_task"]}.get(kind, VARIANTS)
    for name in names:
        assert any(name in text for text in found), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_figure_gives_the_same_bytes(drawings, saved, tmp_path, kind):
    figure, paths = saved[kind]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in figures.save(figure, tmp_path, kind)] == first
    if kind in ("roc", "boundaries"):
        assert [path.read_bytes() for path in figures.save(drawings[kind](), tmp_path, "again")] == first


def test_the_matplotlib_style_of_the_caller_is_neither_used_nor_changed(drawings, tmp_path):
    import matplotlib as mpl

    plain = figures.save(drawings["ablation"](), tmp_path, "plain")[0].read_bytes()
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        before = dict(mpl.rcParams)
        assert figures.save(drawings["ablation"](), tmp_path, "styled")[0].read_bytes() == plain
        assert dict(mpl.rcParams) == before


def test_a_failed_save_leaves_no_file(drawings, tmp_path, monkeypatch):
    figure = drawings["forest"]()
    monkeypatch.setattr(type(figure), "savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        figures.save(figure, tmp_path, "forest")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_names_the_extra_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ichprog.reporting.notebook_figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(IchprogError, match=r"needs matplotlib. Install it with: pip install 'ichprog\[report\]'\."):
        figures.forest({}, "x")


def test_an_ablation_draws_values_and_intervals_of_one_task():
    axis, numbers = figures.ablation(METRICS, "gcs", "mae").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["two & tasks"]
    assert [label.get_text() for label in numbers.get_yticklabels()] == ["0.600 (0.550 to 0.650)"]
    whole, dot = axis.lines
    np.testing.assert_allclose(whole.get_xdata(), [0.55, 0.65])
    np.testing.assert_allclose(dot.get_xdata(), [0.6])


def test_roc_points_and_their_area_are_those_of_scikit_learn(predictions):
    from sklearn.metrics import roc_auc_score, roc_curve

    for truth, p in predictions.values():
        assert len(np.unique(p)) < len(p), "the example needs ties"
        false, true = figures.roc_points(truth, p)
        expected_false, expected_true, _ = roc_curve(truth, p, drop_intermediate=False)
        np.testing.assert_allclose(false, expected_false)
        np.testing.assert_allclose(true, expected_true)
    figure = figures.roc(predictions)
    for name, (truth, p) in predictions.items():
        assert f"{name}  {roc_auc_score(truth, p):.3f}" in figure.axes[0].get_legend_handles_labels()[1]


def test_readers_are_drawn_at_their_operating_points(drawings):
    axis = drawings["roc"]().axes[0]
    dots = {line.get_label(): line.get_xydata() for line in axis.lines if str(line.get_label()).startswith("reader")}
    assert list(dots) == ["reader A"]  # reader B has no operating point
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
def test_empty_data_gives_an_empty_figure(drawn):
    from matplotlib.figure import Figure

    assert isinstance(drawn(), Figure)
