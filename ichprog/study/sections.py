"""Build the sections of a study's report, and write their tables and figures.

Each function takes a `ReportContext` and yields the sections of its topic, or nothing if the study lacks the data.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.cohort import Cohort
from ichprog.metrics import AT_HALF, PRIMARY, RECALIBRATED, calibration, conformal, discrimination, registered
from ichprog.reporting import figures, tables
from ichprog.reporting.html import Picture, Section, Table
from ichprog.reporting.tables import readable_name
from ichprog.spec import Task
from ichprog.study import analysis, baselines, facts, manifest, saliency_results
from ichprog.study.analysis import Row, StudyResults, TaskAnalysis
from ichprog.study.config import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportContext:
    """What the sections of a report are built from.

    Attributes:
        study: Study.
        out: Folder of the study.
        cohort: Patients of the study.
        results: Results of the study.
        record: Content of `study.json`.
        cache_dir: Cache of compiled networks.
    """

    study: Study
    out: Path
    cohort: Cohort
    results: StudyResults
    record: Mapping[str, Any]
    cache_dir: str | Path | None = None

    @cached_property
    def tasks(self) -> list[Task]:
        """Return every task of the study, the main task first. A task with other labels is another task."""
        tasks = [self.study.main_task, *(task for variant in self.study.variants for task in variant.spec.tasks)]
        return list({(task.name, task.labels): task for task in tasks}.values())

    @cached_property
    def truth(self) -> dict[str, np.ndarray]:
        """Return the indices of the true labels of all patients `(N,)` by task, -1 if unknown."""
        return {task.name: self.cohort.labels(task) for task in self.tasks}

    def analyses_of(self, task: Task) -> dict[str, TaskAnalysis]:
        """Return the analyses of a task by run, without learning-curve runs.

        Args:
            task: Task. Runs with other labels of the task are left out.
        """
        return {
            run: one
            for run, by_task in self.results.analyses.items()
            if (one := by_task.get(task.name)) and one.task.labels == task.labels and not self.study.is_curve_run(run)
        }

    @cached_property
    def best_run(self) -> str:
        """Return the trained variant with the highest primary metric of the main task."""
        runs = [run for run in self.analyses_of(self.study.main_task) if run in self.study.runs]
        if not runs:
            return next(iter(self.results.analyses))
        return max(runs, key=lambda run: self.results.metrics[run][self.study.stratify_by][PRIMARY]["value"] or 0.0)

    def is_ambiguous(self, task: Task) -> bool:
        """Return whether the study has the task with other labels as well.

        Args:
            task: Task.
        """
        return sum(each.name == task.name for each in self.tasks) > 1

    def write_table(self, name: str, rows: Sequence[tables.Row], columns: tables.Columns, caption: str) -> Table:
        """Write a table into the folder of the study, and return the table for the report.

        Args:
            name: Name of the files.
            rows: Rows.
            columns: Columns.
            caption: What the table shows.
        """
        tables.write(rows, columns, self.out / "tables", name, caption)
        return Table(rows, columns, caption)

    def write_figure(self, name: str, figure: "Figure", caption: str, *, raster: bool = False) -> Picture:
        """Write a figure into the folder of the study, and return the picture for the report.

        Args:
            name: Name of the files.
            figure: Figure.
            caption: What the figure shows.
            raster: Whether the report shows the PNG instead of the SVG.
        """
        vector, pixels = figures.save(figure, self.out / "figures", name)
        return Picture(pixels if raster else vector, caption)


def build_sections(context: ReportContext, *, saliency_patients: int) -> list[Section]:
    """Build all sections of the report and write their tables and figures.

    Args:
        context: Results of the study.
        saliency_patients: Number of patients whose saliency maps are measured.
    """
    sections = [*_comparison(context), *_patients(context)]
    for task in context.tasks:
        sections += _task_results(context, task)
    for build in (_probabilities, _learning_curve, _subgroups, _readers, _boundaries, _mistakes):
        sections += build(context)
    if saliency_patients and any(variant.saliency for variant in context.study.variants):
        sections.append(_saliency(context, saliency_patients))
    return [*sections, *_training(context)]


def _comparison(context: ReportContext) -> Iterator[Section]:
    left_out = [f"{name} was left out: {reason}." for name, reason in context.record["left_out"].items()]
    sizes = ", ".join(
        " / ".join(str(len(fold[part])) for part in ("train", "validation", "test"))
        for fold in context.record["membership"].values()
    )
    text = f"Patients of each fold in the training / validation / test part: {sizes}. All variants use the same folds."
    yield Section("What was compared", [text, *left_out], [facts.comparison_table(context.study)])


def _patients(context: ReportContext) -> Iterator[Section]:
    content = [facts.patients_table(context.study, context.truth)]
    if context.results.correlations:
        rows = [_join_interval(row, "rho") for row in context.results.correlations]
        columns = {"name": "column", "n": "patients", "rho": "Spearman's rho", "p": "p", "p_holm": "p (Holm)"}
        caption = f"Correlation of columns with {context.study.stratify_by}, with 95 % intervals."
        content.append(context.write_table("correlations", rows, columns, caption))
    yield Section("Patients", [], content)


def _task_results(context: ReportContext, task: Task) -> Iterator[Section]:
    analyses = context.analyses_of(task)
    if not analyses:
        return
    ambiguous = context.is_ambiguous(task)
    name = f"{task.name}{len(task.labels)}" if ambiguous else task.name
    title = f"{task.name} ({', '.join(task.labels)})" if ambiguous else task.name
    _write_fold_table(context, task, analyses, name, title)
    content = [*_metric_tables(context, task, analyses, name, title), *_comparison_table(context, task, name, title)]
    yield Section(f"Results: {title}", [task.meaning], content, _task_figures(context, task, analyses, name, title))


def _metric_tables(
    context: ReportContext, task: Task, analyses: Mapping[str, TaskAnalysis], name: str, title: str
) -> Iterator[Table]:
    metrics = [each for each in registered(task.kind) if each.in_report]
    rows = [
        {"variant": run, "patients": len(one.predictions), **context.results.metrics[run][task.name]}
        for run, one in analyses.items()
    ]
    columns = {"variant": "variant", "patients": "patients"} | {each.name: each.label for each in metrics}
    lower = [each.label for each in metrics if each.higher_is_better is False]
    caption = f"{title}: test parts of all folds together{_threshold_note(task)}."
    caption += f" Lower is better for: {', '.join(lower)}." if lower else ""
    yield context.write_table(name, rows, columns, caption)
    if task.kind == "binary":
        columns = {"variant": "variant"}
        columns |= {each.name + AT_HALF: each.label for each in registered(task.kind) if each.at_threshold}
        yield context.write_table(f"{name}-at-half", rows, columns, f"{title}: the same at a threshold of 0.5.")


def _threshold_note(task: Task) -> str:
    return "; thresholds from validation parts" if task.kind == "binary" else ""


def _comparison_table(context: ReportContext, task: Task, name: str, title: str) -> Iterator[Table]:
    runs = context.analyses_of(task)
    rows = [
        _join_interval(row, "difference")
        for row in context.results.comparisons
        if row["task"] == task.name and row["variant"] in runs
    ]
    if rows:
        columns = {
            "variant": "variant", "reference": "reference", "metric": "metric", "difference": "difference", "p": "p",
            "p_holm": "p (Holm)", "n": "patients", "method": "test",
        }  # fmt: skip
        yield context.write_table(f"{name}-compared", rows, columns, f"{title}: paired comparisons.")


def _write_fold_table(
    context: ReportContext, task: Task, analyses: Mapping[str, TaskAnalysis], name: str, title: str
) -> None:
    included = [*(each.name for each in registered(task.kind) if each.in_report), "threshold"]
    rows = [
        {"variant": run, "metric": metric, **{f"fold {fold}": value for fold, value in enumerate(values)}}
        for run in analyses
        for metric, values in context.results.per_fold[run][task.name].items()
        if metric in included
    ]
    context.write_table(f"{name}-folds", rows, {key: key for key in rows[0]}, f"{title}: test part of each fold.")


def _task_figures(
    context: ReportContext, task: Task, analyses: Mapping[str, TaskAnalysis], name: str, title: str
) -> list[Picture]:
    metrics = {run: context.results.metrics[run][task.name] for run in analyses}
    per_fold = {run: context.results.per_fold[run][task.name][PRIMARY] for run in analyses}
    pooled = {run: intervals[PRIMARY] for run, intervals in metrics.items()}
    by_task = {run: {task.name: intervals} for run, intervals in metrics.items()}
    label = readable_name(PRIMARY)
    pictures = [
        context.write_figure(
            f"{name}-{PRIMARY}",
            figures.ablation(by_task, task.name, PRIMARY, chance=0.5),
            f"{title}: {label} of every variant, all folds together, with 95 % intervals.",
        ),
        context.write_figure(
            f"{name}-folds",
            figures.folds(per_fold, PRIMARY, pooled),
            f"{title}: {label} of each fold and of all folds together.",
        ),
    ]
    if task.kind == "binary":
        curves = {run: (one.predictions.truth, one.predictions.probabilities[:, 1]) for run, one in analyses.items()}
        pictures.append(context.write_figure(f"{name}-roc", figures.roc(curves), f"{title}: ROC curves."))
    return pictures


def _probabilities(context: ReportContext) -> Iterator[Section]:
    """Yield calibration before and after recalibration, decision curves and conformal sets of a binary main task."""
    task = context.study.main_task
    if task.kind != "binary":
        return
    analyses = context.analyses_of(task)
    rows = [{"variant": run, **context.results.metrics[run][task.name]} for run in analyses]
    names = [each.name + suffix for each in registered(task.kind) if each.recalibrated for suffix in ("", RECALIBRATED)]
    columns = {"variant": "variant"} | {name: readable_name(name) for name in (*names, *conformal.METRICS)}
    caption = "Calibration before and after recalibration on validation parts, and conformal sets for a coverage of "
    table = context.write_table("calibration", rows, columns, f"{caption}{context.study.coverage:g}.")
    text = "Each is fitted to the validation part of the fold that predicts, and applied to the test part of that fold."
    yield Section("Probabilities", [text], [table], _probability_figures(context, task, analyses))


def _probability_figures(context: ReportContext, task: Task, analyses: Mapping[str, TaskAnalysis]) -> list[Picture]:
    trained = {run: one for run, one in analyses.items() if run in context.study.runs}
    recalibrated = {run: one.recalibrated for run, one in analyses.items() if one.recalibrated is not None}
    panels = {
        run: {
            "as trained": calibration.calibration_curve(one.predictions.truth, one.predictions.probabilities[:, 1]),
            "recalibrated": calibration.calibration_curve(one.predictions.truth, recalibrated[run].probabilities[:, 1]),
        }
        for run, one in trained.items()
        if run in recalibrated
    }
    thresholds = np.linspace(0.05, 0.95, 91)
    decisions = {
        run: discrimination.net_benefit(one.truth, one.probabilities[:, 1], thresholds)
        for run, one in recalibrated.items()
    }
    histograms = {
        run: calibration.probability_histogram(one.predictions.truth, one.predictions.probabilities[:, 1])
        for run, one in trained.items()
    }
    return [
        context.write_figure("calibration", figures.calibration(panels), "Calibration curves of the trained variants."),
        context.write_figure("decisions", figures.decision_curve(decisions), "Decision curves, after recalibration."),
        context.write_figure(
            "histograms", figures.histograms(histograms, task.labels), "Probabilities as trained, by true label."
        ),
    ]


def _learning_curve(context: ReportContext) -> Iterator[Section]:
    study = context.study
    if not study.curve_sizes:
        return
    label, main = readable_name(PRIMARY), study.stratify_by
    full_size = round(float(np.mean([len(fold["train"]) for fold in context.record["membership"].values()])))
    curves = analysis.learning_curves(study, context.results.metrics, full_size)
    rows = [
        {"variant": name, "size": size, PRIMARY: value}
        for name, by_size in curves.items()
        for size, value in by_size.items()
    ]
    columns = {"variant": "variant", "size": "training patients", PRIMARY: label}
    content = [context.write_table("learning-curve", rows, columns, f"{main}: {label} by number of training patients.")]
    compared = [
        _join_interval(row, "difference")
        for row in context.results.comparisons
        if row["task"] == main and study.is_curve_run(row["variant"]) and row["metric"] == PRIMARY
    ]
    if compared:
        columns = {"variant": "variant", "reference": "reference", "difference": "difference", "p": "p"}
        columns |= {"p_holm": "p (Holm)"}
        caption = f"Differences in {label} at each size."
        content.append(context.write_table("learning-curve-compared", compared, columns, caption))
    drawn = figures.learning_curve(curves, PRIMARY, chance=0.5)
    picture = context.write_figure("learning-curve", drawn, "Learning curves.")
    text = (
        "Training on fewer patients, with the same test parts. A larger number includes the patients of a smaller one."
    )
    yield Section("Fewer patients", [text], content, [picture])


def _subgroups(context: ReportContext) -> Iterator[Section]:
    rows, task, best = context.results.subgroups, context.study.main_task, context.best_run
    if not rows:
        return
    columns = {"column": "column", "group": "group", "variant": "variant", "patients": "patients"}
    columns |= {"with_last_label": task.labels[-1]}
    columns |= {each.name: each.label for each in registered(task.kind) if each.in_subgroups}
    table = context.write_table("subgroups", rows, columns, f"{task.name} by groups of patients.")
    label = f"{readable_name(PRIMARY)} of {best}"
    intervals = {f"{row['column']} {row['group']}": row[PRIMARY] for row in rows if row["variant"] == best}
    drawn = figures.forest(intervals, label, line=0.5)
    yield Section(
        "Subgroups", [], [table], [context.write_figure("subgroups", drawn, f"{label} by groups of patients.")]
    )


def _readers(context: ReportContext) -> Iterator[Section]:
    if not context.results.readers:
        return
    rows: list[Row] = []
    pairs: list[Row] = []
    pictures = []
    for variant, compared in context.results.readers.items():
        rows.append({"variant": variant, "reader": "the model", **compared["model"]})
        for reader, operating_point in compared["readers"].items():
            p_values = {f"p_{name}": test["p_holm"] for name, test in operating_point["against_model"].items()}
            rows.append({"variant": variant, "reader": reader, **operating_point, **p_values})
        predictions = context.results.analyses[variant][context.study.stratify_by].predictions
        curve = {variant: (predictions.truth, predictions.probabilities[:, 1])}
        drawn = figures.roc(curve, compared["readers"])
        pictures.append(context.write_figure(f"readers-{variant}", drawn, f"Readers and the ROC curve of {variant}."))
        pairs = [{"readers": f"{pair['first']}, {pair['second']}", **pair} for pair in compared["cohen"]]
        pairs.append({"readers": "all (Fleiss)", **compared["fleiss"]})
    columns = {
        "variant": "variant", "reader": "reader", "n": "patients", "accuracy": "accuracy",
        "sensitivity": "sensitivity", "specificity": "specificity", "p_accuracy": "p accuracy",
        "p_sensitivity": "p sensitivity", "p_specificity": "p specificity",
    }  # fmt: skip
    caption = "Readers and models; p by McNemar's exact test, Holm-adjusted."
    content = [context.write_table("readers", rows, columns, caption)]
    columns = {"readers": "readers", "kappa": "kappa", "n": "patients"}
    content.append(context.write_table("agreement", pairs, columns, "Agreement of the readers."))
    yield Section("Readers", [], content, pictures)


def _boundaries(context: ReportContext) -> Iterator[Section]:
    """Yield the decision boundaries of baselines of two columns, fitted to the training part of the first fold."""
    study, cohort, task = context.study, context.cohort, context.study.main_task
    chosen = [one for one in study.baselines if len(one.columns) == 2 and one.kind not in ("majority", "fusion")]
    if task.kind != "binary" or not chosen:
        return
    columns = (chosen[0].columns[0], chosen[0].columns[1])
    part = manifest.split_folds(study, cohort)[0].train
    surfaces = {
        one.name: baselines.decision_surface(one.kind, cohort, columns, task, part, seed=study.protocol.seed)
        for one in chosen
        if one.columns == columns and one.task == task.name
    }
    points = (cohort.numbers(columns[0])[part], cohort.numbers(columns[1])[part], cohort.labels(task)[part])
    drawn = figures.boundaries(surfaces, points, columns, (task.labels[0], task.labels[1]))
    caption = f"Models of {columns[0]} and {columns[1]}, with the training patients of the first fold."
    yield Section("Models of two columns", [], [], [context.write_figure("boundaries", drawn, caption, raster=True)])


def _mistakes(context: ReportContext) -> Iterator[Section]:
    columns = {"variant": "variant", "patient": "patient", "fold": "fold", "truth": "truth"}
    columns |= {"predicted": "predicted", "probability": "probability"}
    rows = [row for row in context.results.mistakes if not context.study.is_curve_run(row["variant"])]
    table = context.write_table(
        "mistakes", rows, columns, "The most confident mistakes of each variant, on test parts."
    )
    best = context.best_run
    of_best = [row for row in rows if row["variant"] == best] if best in context.study.runs else []
    pictures = [_draw_mistake(context, row) for row in of_best]
    yield Section("The most confident mistakes", [], [table], pictures)


def _draw_mistake(context: ReportContext, row: Row) -> Picture:
    from ichprog.model import explain, predict
    from ichprog.reporting.overlay import plot

    study, patient, variant = context.study, row["patient"], row["variant"]
    path = next(each.scan for each in context.cohort.patients if each.name == patient)
    model = saliency_results.load_fold_model(context.out, variant, row["fold"], context.cache_dir)
    scan = model.load_scan(path, brain=study.brain)
    method = study.saliency[0] if study.saliency else "grad_cam"
    saliency: Any = explain(model, scan, task=study.stratify_by, label=row["predicted"], method=method)
    drawn = plot(saliency, scan, prediction=predict(model, scan))
    caption = (
        f"{patient}: true label {row['truth']}, predicted {row['predicted']} with probability {row['probability']:.2f} "
        f"by {variant}."
    )
    return context.write_figure(f"mistake-{patient}", drawn, caption, raster=True)


def _saliency(context: ReportContext, n_patients: int) -> Section:
    from ichprog.evaluation import localization

    study, out = context.study, context.out
    measured = saliency_results.measure_maps(study, context.cohort, out, n_patients, context.cache_dir)
    if not measured:
        return Section("Saliency", ["Nothing was measured: no finished variant has patients with a lesion mask."])
    rows = localization.summarise_maps(measured, n_bootstrap=study.n_bootstrap, seed=study.bootstrap_seed)
    columns = {
        "variant": "variant", "task": "task", "method": "method", "maps": "maps", "empty": "empty",
        "pointing_game": "pointing game", "relevance_mass_accuracy": "relevance mass accuracy",
        "lesion_share": "lesion's share of the brain", "relevance_mass_gain": "relevance mass accuracy minus share",
        "hemisphere_correct": "correct hemisphere", "deletion_gain": "deletion minus random",
        "insertion_gain": "insertion minus random",
    }  # fmt: skip
    content = [context.write_table("saliency", rows, columns, "Maps and lesion masks, with 95 % intervals.")]
    randomised = [
        row
        for variant in dict.fromkeys(each.variant for each in measured)
        for row in saliency_results.randomise_parameters(study, context.cohort, out, variant, context.cache_dir)
    ]
    columns = {"variant": "variant", "task": "task", "method": "method", "down_to": "random down to"}
    columns |= {"likeness": "rank correlation"}
    caption = (
        "Similarity of a map to the map of the same network with random weights, from the heads downward (first "
        "patient with a mask)."
    )
    content.append(context.write_table("randomised", randomised, columns, caption))
    patients = list(dict.fromkeys(each.patient for each in measured))[:3]
    drawn = saliency_results.saliency_figure(
        study, out, [(name, None) for name in patients], method=measured[0].method, cache_dir=context.cache_dir
    )
    picture = context.write_figure("saliency", drawn, "Maps of every variant over one slice.", raster=True)
    return Section(
        "Saliency", ["Each map is from the network that was not trained on the patient."], content, [picture]
    )


def _training(context: ReportContext) -> Iterator[Section]:
    pictures = []
    for variant in context.study.variants:
        log = context.out / "runs" / variant.name / "log.csv"
        if log.is_file():
            with log.open(encoding="utf-8", newline="") as file:
                drawn = figures.training(list(csv.DictReader(file)), title=variant.name)
            pictures.append(context.write_figure(f"training-{variant.name}", drawn, f"Losses of {variant.name}."))
    if pictures:
        yield Section("Training", [], [], pictures)


def _join_interval(row: Row, name: str) -> Row:
    """Return a row whose value is an interval, as tables take it."""
    return row | {name: {"value": row[name], "low": row["low"], "high": row["high"]}}
