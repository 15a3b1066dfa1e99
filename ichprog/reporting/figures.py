"""Draw figures of results from plain data.

Each function returns a matplotlib figure. `save` writes a figure as SVG and PNG with the same bytes each time. Colours
are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers can distinguish. Lines and markers
differ as well. An interval is `{"value": .., "low": .., "high": ..}`. A value of None is not drawn.
Up to ten variants stay legible in one figure.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from ichprog.errors import missing_extra
from ichprog.io import atomic_write
from ichprog.reporting.tables import format_value, readable_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
Interval = Mapping[str, float | None]
Surface = tuple[np.ndarray, np.ndarray, np.ndarray]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS, _DASHES = "osD^vP*Xph", ("-", "--", "-.", ":")
_BLUE, _GREY, _PALE = COLOURS[0], "#7f7f7f", "#d9d9d9"
_STYLE = {
    "font.family": "DejaVu Sans",  # part of matplotlib, so that a PNG is the same on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "ichprog",
    "svg.fonttype": "none",
}
_PANEL_INCHES = 2.7  # width of one of several panels
_DPI = 200


@contextmanager
def _style() -> Iterator[None]:
    try:
        from matplotlib import style
    except ImportError as error:
        raise missing_extra("report", "matplotlib", "Drawing a figure") from error
    with style.context(["default", _STYLE]):
        yield


def _styled(draw: Callable[P, "Figure"]) -> Callable[P, "Figure"]:
    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        with _style():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # a second layout would move everything slightly
            return figure

    return drawn


def save(figure: "Figure", folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as `name.svg` and `name.png`, each whole or not at all.

    A figure of this module gives the same bytes each time with the same version of matplotlib. Text in the SVG stays
    text.

    Args:
        figure: Figure.
        folder: Folder, which is created.
        name: Name of the files without extension.

    Returns:
        The paths of the SVG and the PNG.

    Raises:
        IchprogError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vector, raster = folder / f"{name}.svg", folder / f"{name}.png"
    with _style():
        with atomic_write(vector) as part:
            figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None})
        with atomic_write(raster) as part:
            figure.savefig(part, format="png", dpi=_DPI, metadata={"Software": None})
    return vector, raster


def ablation(
    metrics: Mapping[str, Mapping[str, Mapping[str, Interval | None]]],
    task: str,
    metric: str,
    *,
    chance: float | None = None,
) -> "Figure":
    """Draw one metric of every variant that has the task, with its interval.

    Args:
        metrics: Intervals by variant, task and metric, as in `metrics.json`. Variants are drawn from the top.
        task: Task.
        metric: Name of the metric in `metrics.json`, such as "auroc".
        chance: Value at which a line marks random guessing.

    Examples:
        ```python
        metrics = json.loads(Path("metrics.json").read_text())
        save(ablation(metrics, "prognosis", "auroc", chance=0.5), Path("figures"), "auroc")
        ```
    """
    rows = {variant: tasks[task].get(metric) for variant, tasks in metrics.items() if task in tasks}
    return forest(rows, f"{readable_name(metric)}, {task}", line=chance)


@_styled
def forest(rows: Mapping[str, Interval | None], label: str, *, line: float | None = None) -> "Figure":
    """Draw a forest plot: for each row a dot with its interval, and the numbers on the right.

    Args:
        rows: Intervals by name, from the top.
        label: Label of the axis.
        line: Value at which a line is drawn, such as chance or no difference.
    """
    figure, axis = _figure(7.2, 0.9 + 0.32 * max(len(rows), 1))
    for place, interval in enumerate(rows.values()):
        value, low, high = _parts(interval)
        if value is None:
            continue
        if low is not None and high is not None:
            axis.plot([low, high], [place, place], color=_BLUE, linewidth=2, solid_capstyle="butt")
        axis.plot(value, place, "o", color=_BLUE, markersize=6)
    if line is not None:
        axis.axvline(line, color=_GREY, linewidth=1.3, linestyle="--", zorder=1)
    axis.grid(axis="x")
    axis.set_xlabel(label)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    numbers = axis.twinx()
    numbers.set_ylim(axis.get_ylim())
    numbers.set_yticks(range(len(rows)), [format_value(each) for each in rows.values()])
    for each in (axis, numbers):
        each.tick_params(axis="y", length=0)
        each.spines["left"].set_visible(False)
    return figure


def roc_points(truth: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of an ROC curve: false positive rates and sensitivities, one for each distinct probability.

    Args:
        truth: True labels 0 and 1 `(N,)`, both of which must occur.
        p: Probabilities of label 1 `(N,)`.

    Examples:
        >>> false_positive_rate, sensitivity = roc_points(np.array([0, 1]), np.array([0.2, 0.8]))
        >>> sensitivity.tolist()
        [0.0, 1.0, 1.0]
    """
    order = np.argsort(-p, kind="stable")
    last = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)  # of the patients with the same probability
    true_positives = np.cumsum(truth[order] == 1)[last]
    false_positives = last + 1 - true_positives
    return (
        np.append(0.0, false_positives / false_positives[-1]),
        np.append(0.0, true_positives / true_positives[-1]),
    )


@_styled
def roc(
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray]],
    readers: Mapping[str, Mapping[str, Interval | None]] | None = None,
) -> "Figure":
    """Draw ROC curves, with the area under each curve in the legend, and the operating points of readers.

    Args:
        predictions: By name, true labels 0 and 1 `(N,)` and probabilities of label 1 `(N,)`. With one class only, no
            curve is drawn.
        readers: By reader, the intervals of "sensitivity" and "specificity".
    """
    figure, axis = _figure(6.6 if len(predictions) > 1 or readers else 5.4, 4.2)
    axis.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":", zorder=0)
    for (name, (truth, p)), (colour, dash, _) in zip(predictions.items(), _line_styles(), strict=False):
        if len(np.unique(truth)) < 2:
            axis.plot([], [], color=colour, linestyle=dash, label=f"{name}  one class only")
            continue
        false, true = roc_points(np.asarray(truth), np.asarray(p))
        axis.plot(false, true, dash, color=colour, label=f"{name}  {np.trapezoid(true, false):.3f}")
    for (name, point), marker in zip((readers or {}).items(), itertools.cycle(_MARKERS), strict=False):
        sensitivity, lower, upper = _parts(point.get("sensitivity"))
        specificity, left, right = _parts(point.get("specificity"))
        if sensitivity is None or specificity is None:
            continue
        if lower is not None and upper is not None:
            axis.plot([1 - specificity] * 2, [lower, upper], color=_GREY, linewidth=0.8)
        if left is not None and right is not None:
            axis.plot([1 - left, 1 - right], [sensitivity] * 2, color=_GREY, linewidth=0.8)
        look = {"markerfacecolor": "white", "markeredgecolor": "black", "markersize": 7, "linestyle": "none"}
        axis.plot(1 - specificity, sensitivity, marker, label=name, **look)
    _square(axis, "1 - specificity", "sensitivity")
    _legend(axis)
    return figure


@_styled
def calibration(panels: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> "Figure":
    """Draw calibration curves, one panel for each variant: observed share over predicted probability.

    Bars at the bottom show the numbers of patients of the panel's last curve, and the text the largest number.

    Args:
        panels: By variant and curve, such as "as trained" and "recalibrated", arrays `(B,)` over bins: "predicted",
            "observed", "low", "high" and "count", as `ichprog.metrics.calibration_curve` returns them.
    """
    figure, axes = _panels(len(panels), legend_inches=0.35)
    for (name, curves), axis in zip(panels.items(), axes, strict=True):
        axis.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":", zorder=0)
        for (curve, bins), (colour, dash, marker) in zip(curves.items(), _line_styles(), strict=False):
            predicted, observed = np.asarray(bins["predicted"], float), np.asarray(bins["observed"], float)
            defined = np.isfinite(predicted) & np.isfinite(observed)
            axis.vlines(
                predicted[defined], np.asarray(bins["low"])[defined], np.asarray(bins["high"])[defined],
                color=colour, linewidth=0.8, alpha=0.6,
            )  # fmt: skip
            axis.plot(
                predicted[defined],
                observed[defined],
                dash,
                marker=marker,
                markersize=4,
                color=colour,
                label=curve,
                clip_on=False,
            )
        if curves:
            counts = np.asarray(bins["count"], float)
            most = counts.max(initial=0)
            axis.bar(predicted, 0.12 * counts / (most or 1), width=0.015, color=_PALE, zorder=0)
            axis.annotate(f"{most:.0f} patients", (0.99, 0.125), ha="right", fontsize=7, color=_GREY)
        axis.set_title(name, fontsize=9)
        _square(axis, "predicted probability", "observed share")
    _shared_legend(figure, axes)
    return figure


@_styled
def decision_curve(curves: Mapping[str, Mapping[str, np.ndarray]], *, act: str = "treat") -> "Figure":
    """Draw net benefit over threshold probability, compared with acting for all patients and for none.

    Args:
        curves: By variant, arrays `(T,)`: "thresholds", and the net benefit of acting by the "model" and for "all", as
            `ichprog.metrics.net_benefit` returns them. The curve for "all" is that of the first variant.
        act: Verb for acting.

    Source: Vickers and Elkin, Medical Decision Making 2006.
    """
    figure, axis = _figure(6.6, 3.6)
    top = 0.05
    for (name, curve), (colour, dash, _) in zip(curves.items(), _line_styles(), strict=False):
        axis.plot(curve["thresholds"], curve["model"], dash, color=colour, label=name)
        top = max(top, *np.nan_to_num(curve["model"]), *np.nan_to_num(curve["all"]))
    for curve in list(curves.values())[:1]:
        axis.plot(curve["thresholds"], curve["all"], color=_GREY, linewidth=1, label=f"{act} all")
        axis.set_xlim(float(np.min(curve["thresholds"])), float(np.max(curve["thresholds"])))
    axis.axhline(0, color="black", linewidth=0.8, label=f"{act} none")
    axis.set_ylim(-0.15 * top, 1.05 * top)  # the net benefit of acting for all is unbounded below
    axis.set_xlabel("threshold probability")
    axis.set_ylabel("net benefit")
    _legend(axis)
    return figure


@_styled
def histograms(panels: Mapping[str, Mapping[str, np.ndarray]], labels: Sequence[str]) -> "Figure":
    """Draw histograms of the probability of the last label by true label, one panel for each variant.

    Args:
        panels: By variant, the "edges" of bins `(B + 1,)` and the "counts" by label `(K, B)`, as
            `ichprog.metrics.probability_histogram` returns them.
        labels: The K labels.
    """
    figure, axes = _panels(len(panels), aspect=0.75)
    for (name, panel), axis in zip(panels.items(), axes, strict=True):
        for label, counts, (colour, dash, _) in zip(labels, panel["counts"], _line_styles(), strict=False):
            axis.stairs(counts, panel["edges"], color=colour, fill=True, alpha=0.25)
            axis.stairs(counts, panel["edges"], color=colour, linestyle=dash, linewidth=1.2, label=label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(f"probability of {labels[-1]}")
        axis.set_ylabel("patients")
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=0)
        axis.yaxis.get_major_locator().set_params(integer=True)
    _shared_legend(figure, axes)
    return figure


@_styled
def folds(
    per_fold: Mapping[str, Sequence[float | None]], metric: str, pooled: Mapping[str, Interval | None] | None = None
) -> "Figure":
    """Draw a dot for each fold of every variant, and a mark for the pooled result of all folds.

    Args:
        per_fold: By variant, from the top, one value for each fold, or None if the value is undefined.
        metric: Name of the metric.
        pooled: By variant, the interval of all folds' patients together.
    """
    figure, axis = _figure(6.2, 1.2 + 0.36 * max(len(per_fold), 1))
    dots = [
        (value, place + off)
        for place, values in enumerate(per_fold.values())
        for value, off in zip(values, _offsets(len(values), 0.22), strict=True)
        if value is not None and np.isfinite(value)
    ]
    together = [(_parts((pooled or {}).get(name))[0], place) for place, name in enumerate(per_fold)]
    marks = [(value, place) for value, place in together if value is not None]
    look = {"color": _BLUE, "alpha": 0.55, "markersize": 5, "markeredgewidth": 0}
    axis.plot([x for x, _ in dots], [y for _, y in dots], "o", label="a fold", **look)
    if marks:
        look = {"color": COLOURS[1], "markersize": 16, "markeredgewidth": 2.5}
        axis.plot([x for x, _ in marks], [y for _, y in marks], "|", label="all folds together", **look)
    axis.grid(axis="x")
    axis.set_xlabel(readable_name(metric))
    axis.set_yticks(range(len(per_fold)), list(per_fold))
    axis.set_ylim(max(len(per_fold), 1) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


@_styled
def learning_curve(
    curves: Mapping[str, Mapping[int, Interval | None]], metric: str, *, chance: float | None = None
) -> "Figure":
    """Draw a metric over the number of training patients, with intervals.

    Args:
        curves: Intervals by variant and number of training patients.
        metric: Name of the metric.
        chance: Value at which a line marks random guessing.
    """
    figure, axis = _figure(6.6, 3.6)
    sizes = sorted({size for curve in curves.values() for size in curve})
    axis.set_xscale("log")
    offsets = _offsets(len(curves), 0.06)
    for (name, curve), (colour, dash, marker), off in zip(curves.items(), _line_styles(), offsets, strict=False):
        points = [(size * (1 + off), *_parts(curve[size])) for size in sorted(curve)]
        points = [point for point in points if point[1] is not None]
        axis.plot(
            [point[0] for point in points], [point[1] for point in points], dash, marker=marker, markersize=5,
            color=colour, label=name,
        )  # fmt: skip
        for x, _, low, high in points:
            if low is not None and high is not None:
                axis.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.7)
    if chance is not None:
        axis.axhline(chance, color=_GREY, linewidth=1, linestyle=":", zorder=0)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xticks([], minor=True)
    axis.grid(axis="y")
    axis.set_xlabel("patients trained on")
    axis.set_ylabel(readable_name(metric))
    _legend(axis)
    return figure


@_styled
def boundaries(
    surfaces: Mapping[str, Surface],
    points: tuple[np.ndarray, np.ndarray, np.ndarray],
    columns: tuple[str, str],
    labels: tuple[str, str],
    *,
    threshold: float = 0.5,
) -> "Figure":
    """Draw the probabilities of models of two columns, one panel for each model, with decision boundaries and patients.

    Args:
        surfaces: By model, x `(A,)`, y `(B,)` and probabilities of the last label `(B, A)`.
        points: x `(N,)`, y `(N,)` and true label 0 or 1 `(N,)` of each patient. Patients with a blank are not drawn.
        columns: Names of x and y.
        labels: The two labels.
        threshold: Probability from which the last label is predicted.
    """
    figure, axes = _panels(len(surfaces))
    x, y, truth = (np.asarray(each, float) for each in points)
    picture = None
    for (name, (across, up, p)), axis in zip(surfaces.items(), axes, strict=True):
        picture = axis.pcolormesh(
            across, up, p, cmap="PuOr_r", vmin=0, vmax=1, alpha=0.6, shading="nearest", rasterized=True, linewidth=0
        )
        if np.min(p) < threshold <= np.max(p):
            axis.contour(across, up, p, [threshold], colors="black", linewidths=1.2)
        for index, label in enumerate(labels):
            own = (truth == index) & np.isfinite(x) & np.isfinite(y)
            face = {"markerfacecolor": "black" if index else "white", "markeredgecolor": "black", "clip_on": False}
            axis.plot(
                x[own], y[own], "os"[index], markersize=3.5, markeredgewidth=0.5, linestyle="none", label=label, **face
            )
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(readable_name(columns[0]))
        axis.set_ylabel(readable_name(columns[1]))
    if picture is not None:
        figure.colorbar(picture, ax=axes, label=f"probability of {labels[1]}", aspect=30)
    _shared_legend(figure, axes)
    return figure


@_styled
def training(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> "Figure":
    """Draw training and validation losses over epochs: a thin line for each fold and their mean.

    Args:
        rows: Rows of a run's log with "fold", "epoch", "loss" and "val_loss", as numbers or as text from the CSV.
        title: Title, such as the name of the variant.
    """
    figure, axis = _figure(6.6, 3.4)
    for (column, label), (colour, dash, _) in zip(
        {"loss": "training", "val_loss": "validation"}.items(), _line_styles(), strict=False
    ):
        by_fold: dict[int, dict[int, float]] = {}
        for row in rows:
            if row.get(column) not in (None, ""):
                by_fold.setdefault(int(float(row["fold"])), {})[int(float(row["epoch"]))] = float(row[column])
        for losses in by_fold.values():
            epochs = sorted(losses)
            axis.plot(epochs, [losses[epoch] for epoch in epochs], dash, color=colour, linewidth=0.7, alpha=0.4)
        common = sorted(set.intersection(*map(set, by_fold.values()))) if by_fold else []
        mean = [float(np.mean([losses[epoch] for losses in by_fold.values()])) for epoch in common]
        axis.plot(common, mean, dash, color=colour, linewidth=2.2, label=f"{label}, mean of {len(by_fold)} folds")
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss")
    axis.set_title(title, fontsize=9)
    axis.grid(axis="y")
    _legend(axis)
    return figure


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    from ichprog.reporting.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _panels(count: int, *, aspect: float = 1.0, legend_inches: float = 0.5) -> tuple["Figure", list[Any]]:
    """Return a figure with at most four panels in a row.

    Args:
        count: Number of panels.
        aspect: Height of a panel divided by its width.
        legend_inches: Height of the legend below the panels.
    """
    from ichprog.reporting.notebook_figure import NotebookFigure

    across = min(max(count, 1), 4 if count not in (5, 6, 9) else 3)
    down = -(-max(count, 1) // across)
    size = max(across * _PANEL_INCHES, 4.0), down * (_PANEL_INCHES * aspect + 0.25) + legend_inches
    figure = NotebookFigure(figsize=size, layout="compressed" if aspect == 1 else "constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _square(axis: Any, x: str, y: str) -> None:
    axis.set_aspect("equal")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def _legend(axis: Any) -> None:
    """Place the legend to the right of the axes."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _shared_legend(figure: Any, axes: Sequence[Any]) -> None:
    """Place one legend for all panels below them."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        entry_inches = 0.65 + 0.075 * max(map(len, handles))
        columns = min(len(handles), max(int(figure.get_figwidth() / entry_inches), 1))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def _line_styles() -> Iterator[tuple[str, str, str]]:
    """Yield a colour, a dash and a marker for each curve. The dash changes when the colours repeat."""
    for number in itertools.count():
        turn = number // len(COLOURS) + number % len(COLOURS)
        yield COLOURS[number % len(COLOURS)], _DASHES[turn % len(_DASHES)], _MARKERS[number % len(_MARKERS)]


def _offsets(count: int, reach: float) -> np.ndarray:
    """Return offsets that keep points from hiding each other."""
    return np.linspace(-reach, reach, count) if count > 1 else np.zeros(count)


def _parts(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    numbers = [(interval or {}).get(key) for key in ("value", "low", "high")]
    value, low, high = (float(each) if each is not None and np.isfinite(each) else None for each in numbers)
    return value, low, high
