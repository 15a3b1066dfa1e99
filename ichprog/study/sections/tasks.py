"""Sections about the results of a task: metrics, comparisons, probabilities, models of two columns."""

from collections.abc import Iterator, Mapping

import numpy as np

from ichprog.metrics import AT_HALF, PRIMARY, RECALIBRATED, calibration, conformal, discrimination, registered
from ichprog.reporting import figures
from ichprog.reporting.html import Picture, Section, Table
from ichprog.reporting.tables import readable_name
from ichprog.spec import Task
from ichprog.study import baselines, manifest
from ichprog.study.analysis import TaskAnalysis
from ichprog.study.sections.context import ReportContext, join_interval
from ichprog.train.description import describe_labels

_FAR_FROM_FOLDS = 0.05


def results(context: ReportContext, task: Task) -> Iterator[Section]:
    """Yield the metrics, comparisons and figures of a task.

    Args:
        context: Results of the study.
        task: Task.
    """
    analyses = context.analyses_of(task)
    if not analyses:
        return
    ambiguous = context.is_ambiguous(task)
    name = f"{task.name}{len(task.labels)}" if ambiguous else task.name
    title = f"{task.name} ({', '.join(task.labels)})" if ambiguous else task.name
    _write_fold_table(context, task, analyses, name, title)
    content = [*_metric_tables(context, task, analyses, name, title), *_comparison_table(context, task, name, title)]
    yield Section(
        f"Results: {title}",
        [describe_labels(task, context.cohort.origin), *_pooling_note(context, task, analyses)],
        content,
        _task_figures(context, task, analyses, name, title),
    )


def _metric_tables(
    context: ReportContext, task: Task, analyses: Mapping[str, TaskAnalysis], name: str, title: str
) -> Iterator[Table]:
    metrics = [each for each in registered(task.kind) if each.in_report]
    rows = [
        {
            "variant": run,
            "repetitions": len(context.study.repetitions(run)),
            "patients": len(one.predictions),
            **context.results.metrics[run][task.name],
            "mean_of_folds": _mean_of_folds(context, run, task),
        }
        for run, one in analyses.items()
    ]
    columns = {"variant": "variant", "patients": "patients"}
    columns |= {"repetitions": "trainings"} if context.study.seeds else {}
    for each in metrics:
        columns[each.name] = each.label
        if each.name == PRIMARY:
            columns["mean_of_folds"] = f"{each.label}, mean of folds"
    lower = [each.label for each in metrics if each.higher_is_better is False]
    caption = f"{title}: test parts of all folds together{_threshold_note(task)}."
    caption += f" Lower is better for: {', '.join(lower)}." if lower else ""
    yield context.write_table(name, rows, columns, caption)
    if task.kind == "binary":
        columns = {"variant": "variant"}
        columns |= {each.name + AT_HALF: each.label for each in registered(task.kind) if each.at_threshold}
        caption = f"{title}: the same at a threshold of 0.5."
        yield context.write_table(f"{name}-at-half", rows, columns, caption, folded=True)


def _mean_of_folds(context: ReportContext, run: str, task: Task) -> float | None:
    """Return the mean of the primary metric over folds, each with its own patients only."""
    values = [value for value in context.results.per_fold[run][task.name][PRIMARY] if value is not None]
    return float(np.mean(values)) if values else None


def _pooling_note(context: ReportContext, task: Task, analyses: Mapping[str, TaskAnalysis]) -> Iterator[str]:
    """Yield a note if the metric of all folds together is outside the range of the folds, or far from their mean."""
    disagreeing = []
    for run in analyses:
        pooled = context.results.metrics[run][task.name][PRIMARY]["value"]
        values = [value for value in context.results.per_fold[run][task.name][PRIMARY] if value is not None]
        if pooled is None or not values:
            continue
        if abs(pooled - np.mean(values)) > _FAR_FROM_FOLDS or not min(values) <= pooled <= max(values):
            folds = ", ".join(f"{value:.2f}" for value in values)
            disagreeing.append(f"{run} ({folds} in the folds, {pooled:.2f} together)")
    if disagreeing:
        yield (
            f"The {readable_name(PRIMARY)} of all folds together disagrees with that of the single folds for "
            f"{'; '.join(disagreeing)}. It also compares patients of different folds, whose networks may give other "
            "levels of probability. Few patients in a fold make the folds themselves unreliable."
        )


def repetitions(context: ReportContext) -> Iterator[Section]:
    """Yield by how much the primary metric varies with the random seed, the folds and the patients."""
    rows = context.results.variances
    if not rows:
        return
    label = readable_name(PRIMARY)
    columns = {"task": "task", "variant": "variant", "repetitions": "trainings", "lowest": "lowest"}
    columns |= {"highest": "highest", "seeds_sd": "SD of seeds", "patients_sd": "SE of patients"}
    columns |= {
        "fold_folds_sd": "SD of folds",
        "fold_seeds_sd": "SD of seeds in folds",
        "fold_rest_sd": "SD of the rest",
    }
    caption = f"How {label} varies. The first SDs are of all folds together, the last three of single folds."
    text = (
        f"Every variant was trained with {len(context.study.seeds)} random seeds, on the same patients and folds. Its "
        "metrics are means over these trainings. Intervals and tests include patients and seeds: each bootstrap sample "
        "draws both. The analysis of variance splits single folds into folds, seeds and the rest."
    )
    yield Section("Seeds", [text], [context.write_table("seeds", rows, columns, caption)])


def _threshold_note(task: Task) -> str:
    return "; thresholds from validation parts" if task.kind == "binary" else ""


def _comparison_table(context: ReportContext, task: Task, name: str, title: str) -> Iterator[Table]:
    runs = context.analyses_of(task)
    rows = [
        join_interval(row, "difference")
        for row in context.results.comparisons
        if row["task"] == task.name and row["variant"] in runs
    ]
    if rows:
        columns = {
            "variant": "variant", "reference": "reference", "metric": "metric", "difference": "difference", "p": "p",
            "p_holm": "p (Holm)", "p_folds": "p (folds)", "n": "patients", "method": "test",
        }  # fmt: skip
        caption = f"{title}: paired comparisons. p (folds) is Student's test over folds, corrected for their overlap."
        yield context.write_table(f"{name}-compared", rows, columns, caption, folded=True)


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


def probabilities(context: ReportContext) -> Iterator[Section]:
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


def boundaries(context: ReportContext) -> Iterator[Section]:
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
