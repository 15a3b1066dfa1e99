"""Pool the summaries of several hospitals: figures of each site, of all patients together, and heterogeneity.

Counts and sums add up, so that the figures of all patients equal those of a joint table. The AUROC of all patients has
a stated bound, because a summary has scores in bins only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.errors import InvalidValueError
from ichprog.evaluation.summary import read_summary
from ichprog.io import write_json
from ichprog.metrics.binned import BinnedScores, binned_auroc, binned_auroc_error, rates_at_edges
from ichprog.metrics.bootstrap import finite
from ichprog.metrics.meta_analysis import PooledEstimate, random_effects
from ichprog.reporting import figures, tables
from ichprog.reporting.html import Picture, Section, Table, write_report

Row = dict[str, Any]
_SAME = {
    "ichprog": "versions of ichprog",
    "model": "models",
    "spec_sha256": "tasks, preprocessing or networks",
    "weights": "weights",
}
MEASURES = {
    "auroc": "AUROC",
    "observed_expected": "observed / expected events",
    "calibration_intercept": "calibration intercept",
    "calibration_slope": "calibration slope",
}
_TOGETHER = {
    "patients": "patients",
    "events": "patients with the event",
    "expected_events": "expected events",
    "observed_expected": "observed / expected events",
    "brier": "Brier score",
    "auroc": "AUROC",
    "auroc_bound": "largest error of the AUROC from bins",
    "score_chi2": "score test of calibration, chi-squared with two degrees of freedom",
    "score_p": "p of the score test; small if not calibrated",
}
_Z = 1.959963984540054  # of 95 % intervals


@dataclass(frozen=True)
class PooledTask:
    """Figures of one task from several sites.

    Attributes:
        task: Name of the task.
        event: Name of the event.
        sites: Rows: figures of each site.
        together: Figures of all patients together. `auroc_bound` is the largest error of `auroc` from bins.
        between_sites: Random-effects meta-analysis by measure.
        rates: Rows: sensitivity and specificity at the edges that all sites share.
        withheld: Names of the sites that withhold the task.
    """

    task: str
    event: str
    sites: list[Row]
    together: Row
    between_sites: Mapping[str, PooledEstimate]
    rates: list[Row]
    withheld: tuple[str, ...]

    def to_dict(self) -> Row:
        """Return the figures as plain data."""
        return {
            "event": self.event,
            "sites": self.sites,
            "together": self.together,
            "between_sites": {name: asdict(each) for name, each in self.between_sites.items()},
            "rates_at_shared_edges": self.rates,
            "withheld_by": list(self.withheld),
        }


@dataclass(frozen=True)
class PooledEvaluation:
    """The evaluation of one model by the summaries of several sites.

    Attributes:
        model: Name of the model.
        sites: Names of the sites.
        tasks: Figures of each task.
        is_simulated: Whether patients of a site are simulated.
        notice: Notice of the model.
    """

    model: str
    sites: tuple[str, ...]
    tasks: tuple[PooledTask, ...]
    is_simulated: bool
    notice: str

    def to_dict(self) -> Row:
        """Return the evaluation as plain data, ready for JSON."""
        return {
            "model": self.model,
            "sites": list(self.sites),
            "tasks": {each.task: each.to_dict() for each in self.tasks},
            "simulated": self.is_simulated,
            "notice": self.notice,
        }

    def write(self, folder: str | Path) -> Path:
        """Write `pooled.json`, tables, forest plots and `report.html` into a folder.

        Args:
            folder: The folder, created if missing.

        Returns:
            The folder.

        Raises:
            IchprogError: matplotlib or Jinja2 is not installed; only figures and report are missing then.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "pooled.json", self.to_dict())
        simulated = ["Patients of a site are simulated. The results say nothing about real patients."]
        notices = [*(simulated if self.is_simulated else []), self.notice]
        contents = {each.task: _tables(each) for each in self.tasks}
        for task, each in contents.items():
            for name, table in each.items():
                caption = f"{self.model}, {task}. {table.caption} {' '.join(notices)}"
                tables.write(table.rows, table.columns, out / "tables", f"{name}-{task}", caption)
        sections = [_section(task, contents[task.task], out) for task in self.tasks]
        write_report(out / "report.html", f"{self.model} at {len(self.sites)} sites", sections, notices=notices)
        return out


def measure_rows(task: PooledTask) -> list[Row]:
    """Return the rows of a table of the random-effects meta-analysis.

    Args:
        task: Figures of a task.
    """
    rows = []
    for name, each in task.between_sites.items():
        middle = {"value": each.value, "low": each.low, "high": each.high}
        new_site = {"value": each.value, "low": each.prediction_low, "high": each.prediction_high}
        span = None if each.prediction_low is None else new_site
        rows.append(
            {"measure": MEASURES[name], "sites": each.sites, "pooled": middle, "new_site": span, "i2": each.i2}
            | {"tau2": each.tau2, "p": each.p}
        )
    return rows


def _tables(task: PooledTask) -> dict[str, Table]:
    """Return the tables of a task, by name of their files."""
    site = {
        "site": "site",
        "patients": "patients",
        "events": "with the event",
        "auroc": "AUROC",
        "brier": "Brier score",
    }
    site |= {name: label for name, label in MEASURES.items() if name != "auroc"}
    together = [{"measure": label, "value": task.together[name]} for name, label in _TOGETHER.items()]
    contents = {
        "sites": Table(task.sites, site, f"Event: {task.event}. Each site, with 95 % intervals."),
        "together": Table(together, ("measure", "value"), "All patients together."),
        "between-sites": Table(
            measure_rows(task),
            {"measure": "measure", "sites": "sites", "pooled": "pooled", "new_site": "95 % prediction interval",
             "i2": "I2", "tau2": "variance between sites", "p": "p of heterogeneity"},
            "Random-effects meta-analysis by DerSimonian and Laird.",
        ),
        "rates": Table(task.rates, ("threshold", "sensitivity", "specificity"), "All patients, at the shared edges."),
    }  # fmt: skip
    return {name: table for name, table in contents.items() if table.rows}


def _section(task: PooledTask, contents: Mapping[str, Table], out: Path) -> Section:
    text = [
        f"The AUROC of all patients together differs from that of unbinned scores by at most "
        f"{task.together['auroc_bound']:.3f}. All other figures of all patients together are exact.",
        *([f"Withheld, as too few patients: {', '.join(task.withheld)}."] if task.withheld else []),
    ]
    pictures = []
    for name, label in MEASURES.items():
        pooled = task.between_sites[name]
        rows = {row["site"]: row[name] for row in task.sites}
        rows["pooled"] = {"value": pooled.value, "low": pooled.low, "high": pooled.high}
        if pooled.prediction_low is not None:
            rows["a new site"] = {"value": pooled.value, "low": pooled.prediction_low, "high": pooled.prediction_high}
        line = None if name == "auroc" else float(name != "calibration_intercept")
        drawn = figures.forest(rows, label, line=line)
        vector, _ = figures.save(drawn, out / "figures", f"{name.replace('_', '-')}-{task.task}")
        pictures.append(Picture(vector, f"{task.task}: {label} of each site, pooled, and expected at a new site."))
    return Section(f"{task.task}: {task.event}", text, list(contents.values()), pictures)


def pool_summaries(paths: Sequence[str | Path]) -> PooledEvaluation:
    """Pool summaries that `ichprog evaluate --summary` wrote at several sites.

    Args:
        paths: Summaries, one of each site. A site is named after its file.

    Raises:
        RunError: A file cannot be read or is no summary.
        InvalidValueError: There are fewer than two files, a file occurs twice, or the summaries are of different
            models, weights or versions.

    Examples:
        ```python
        pooled = pool_summaries(["north.json", "south.json"])
        print(pooled.tasks[0].together)
        ```
    """
    files = [Path(path) for path in paths]
    if len(files) < 2:
        raise InvalidValueError("number of summaries", len(files), "at least 2", "Give a file of each site.")
    summaries = [read_summary(path) for path in files]
    _check_same_model(files, summaries)
    stems = [path.stem for path in files]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in files]
    by_site = dict(zip(names, summaries, strict=True))
    tasks = dict.fromkeys(task for summary in summaries for task in summary["tasks"])
    if not tasks:
        raise InvalidValueError("summaries", ", ".join(names), "summaries with a task that is not withheld")
    return PooledEvaluation(
        summaries[0]["model"],
        tuple(names),
        tuple(_pool_task(task, by_site) for task in tasks),
        any(summary["simulated"] for summary in summaries),
        summaries[0]["notice"],
    )


def _check_same_model(files: Sequence[Path], summaries: Sequence[Mapping[str, Any]]) -> None:
    first = summaries[0]
    for path, summary in zip(files[1:], summaries[1:], strict=True):
        for key, what in _SAME.items():
            if summary[key] != first[key]:
                raise InvalidValueError(
                    "summaries", f"{files[0].name} and {path.name}", "summaries of one model and version",
                    f"They have different {what}: {_shorten(first[key])} and {_shorten(summary[key])}.",
                )  # fmt: skip
    for index, summary in enumerate(summaries):
        if summary["tasks"] and any(summary["tasks"] == other["tasks"] for other in summaries[:index]):
            raise InvalidValueError(
                "summaries", files[index].name, "each site once", "Another file has the same numbers."
            )


def _shorten(value: object) -> str:
    text = ", ".join(each["sha256"] for each in value) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _pool_task(task: str, by_site: Mapping[str, Mapping[str, Any]]) -> PooledTask:
    own = {site: summary["tasks"][task] for site, summary in by_site.items() if task in summary["tasks"]}
    scores = {
        site: BinnedScores(np.array(each["edges"]), np.array(each["with_event"]), np.array(each["without_event"]))
        for site, each in own.items()
    }
    totals = {site: _totals(scores[site], each["sums"]) for site, each in own.items()}
    rows = [_site_row(site, scores[site], totals[site], each["estimates"]) for site, each in own.items()]
    shared = _on_shared_edges(list(scores.values()))
    rates = rates_at_edges(shared)
    return PooledTask(
        task,
        next(iter(own.values()))["event"],
        rows,
        _together(list(scores.values()), list(totals.values())),
        _between_sites(rows),
        [
            dict(zip(rates, (float(number) for number in values), strict=True))
            for values in zip(*rates.values(), strict=True)
        ],
        tuple(site for site in by_site if site not in own),
    )


def _totals(scores: BinnedScores, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the additive numbers of a site."""
    n_events, n_others = float(scores.events.sum()), float(scores.others.sum())
    return {"patients": n_events + n_others, "events": n_events, **sums}


def _figures(totals: Mapping[str, float]) -> Row:
    """Return the figures that follow from sums alone."""
    n, events = totals["patients"], totals["events"]
    expected = totals["p_with_event"] + totals["p_without_event"]
    return {
        "patients": int(n),
        "events": int(events),
        "brier": (totals["p_squared"] - 2 * totals["p_with_event"] + events) / n,
        "expected_events": expected,
        "observed_expected": events / expected,
    }


def _site_row(site: str, scores: BinnedScores, totals: Mapping[str, float], estimates: Mapping[str, Any]) -> Row:
    area, bound = binned_auroc([scores])
    error = binned_auroc_error(scores)
    inside = 0 < area < 1 and error > 0
    scaled = error / (area * (1 - area)) if inside else math.nan  # on the scale of the logit
    row = {"site": site, **_figures(totals)}
    row["auroc"] = _interval(math.log(area / (1 - area)) if inside else math.nan, scaled, _inverse_logit)
    if not inside:
        row["auroc"]["value"] = finite(area)
    row["auroc_bound"] = bound
    ratio, n, events = row["observed_expected"], totals["patients"], totals["events"]
    row["observed_expected"] = _interval(math.log(ratio), math.sqrt((1 - events / n) / events), math.exp)
    for name in ("slope", "intercept"):
        value, deviation = estimates[name], estimates[f"{name}_error"]
        row[f"calibration_{name}"] = _interval(_number(value), _number(deviation), float)
    return row


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _inverse_logit(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _interval(value: float, error: float, back: Callable[[float], float]) -> Row:
    """Return an estimate with its 95 % interval on the scale of the result, and both numbers on their own scale."""
    if math.isnan(value) or math.isnan(error):
        return {"value": None, "low": None, "high": None, "estimate": None, "error": None}
    low, high = back(value - _Z * error), back(value + _Z * error)
    return {"value": back(value), "low": low, "high": high, "estimate": value, "error": error}


def _together(scores: Sequence[BinnedScores], totals: Sequence[Mapping[str, float]]) -> Row:
    """Return the figures of all patients together."""
    sums = {name: math.fsum(each[name] for each in totals) for name in totals[0]}
    area, bound = binned_auroc(scores)
    return {**_figures(sums), "auroc": area, "auroc_bound": bound, **recalibration_step(sums)}


def recalibration_step(sums: Mapping[str, float]) -> Row:
    """Return the first Newton step of a logistic recalibration from slope 1 and intercept 0, and the score test.

    The step is near the maximum-likelihood estimate only if the model is nearly calibrated. Otherwise use the slope of
    the random-effects meta-analysis. Source of the test: Cox, Biometrika 1958;45:562-565.

    Args:
        sums: `patients`, `events` and the sums of a summary.

    Returns:
        `first_step_intercept` and `first_step_slope` after the step, `score_chi2` with two degrees of freedom,
        and `score_p`, which is small if the probabilities are not calibrated.
    """
    from scipy.special import chdtrc

    expected = sums["p_with_event"] + sums["p_without_event"]
    gradient = np.array([sums["events"] - expected, sums["residual_x"]])
    information = np.array(
        [[expected - sums["p_squared"], sums["variance_x"]], [sums["variance_x"], sums["variance_x_squared"]]]
    )
    determinant = float(np.linalg.det(information))
    if determinant <= 0:
        return dict.fromkeys(("first_step_intercept", "first_step_slope", "score_chi2", "score_p"))
    step = np.linalg.solve(information, gradient)
    chi2 = float(gradient @ step)
    return {
        "first_step_intercept": float(step[0]),
        "first_step_slope": 1 + float(step[1]),
        "score_chi2": chi2,
        "score_p": float(chdtrc(2, chi2)),
    }


def _between_sites(rows: Sequence[Row]) -> dict[str, PooledEstimate]:
    scales: dict[str, Callable[[float], float]] = {"auroc": _inverse_logit, "observed_expected": math.exp}
    return {
        name: random_effects(
            [_number(row[name]["estimate"]) for row in rows],
            [_number(row[name]["error"]) for row in rows],
            back=scales.get(name, float),
        )
        for name in MEASURES
    }


def _on_shared_edges(scores: Sequence[BinnedScores]) -> BinnedScores:
    """Return the counts of all sites in the bins between the edges that all sites share."""
    shared = np.array(sorted(set.intersection(*({float(edge) for edge in each.edges} for each in scores))))
    counts = np.zeros((2, len(shared) - 1), np.int64)
    for each in scores:
        bins = np.searchsorted(shared, each.edges[:-1], side="right") - 1
        np.add.at(counts[0], bins, each.events)
        np.add.at(counts[1], bins, each.others)
    return BinnedScores(shared, counts[0], counts[1])
