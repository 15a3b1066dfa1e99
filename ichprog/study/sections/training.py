"""Sections about the training: learning curves over patients, losses over epochs."""

import csv
from collections.abc import Iterator

import numpy as np

from ichprog.metrics import PRIMARY
from ichprog.reporting import figures
from ichprog.reporting.html import Section
from ichprog.reporting.tables import readable_name
from ichprog.study import analysis
from ichprog.study.sections.context import ReportContext, join_interval


def learning_curve(context: ReportContext) -> Iterator[Section]:
    """Yield the results of training on fewer patients."""
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
        join_interval(row, "difference")
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


def losses(context: ReportContext) -> Iterator[Section]:
    """Yield the losses of each variant by epoch."""
    pictures = []
    for variant in context.study.variants:
        log = context.out / "runs" / variant.name / "log.csv"
        if log.is_file():
            with log.open(encoding="utf-8", newline="") as file:
                drawn = figures.training(list(csv.DictReader(file)), title=variant.name)
            pictures.append(context.write_figure(f"training-{variant.name}", drawn, f"Losses of {variant.name}."))
    if pictures:
        yield Section("Training", [], [], pictures)
