"""Sections about the training: learning curves over patients, losses over epochs."""

from collections.abc import Iterator

import numpy as np

from ichprog.io import read_csv
from ichprog.metrics import PRIMARY
from ichprog.reporting import figures
from ichprog.reporting.html import Section
from ichprog.reporting.tables import readable_name
from ichprog.study import analysis
from ichprog.study.config import Run
from ichprog.study.sections.context import ReportContext, join_interval
from ichprog.study.study_file import Budget


def learning_curve(context: ReportContext) -> Iterator[Section]:
    """Yield the results of training on fewer patients."""
    study = context.study
    if not study.curve_sizes:
        return
    label, main = readable_name(PRIMARY), study.stratify_by
    full_size = round(float(np.mean([len(fold["train"]) for fold in context.record["membership"].values()])))
    content, pictures = [], []
    for budget in study.curve_budgets:
        curves = analysis.learning_curves(study, context.results.metrics, full_size, budget)
        rows = [
            {"variant": name, "size": size, "epochs": _epochs(context, name, size, budget), PRIMARY: value}
            for name, by_size in curves.items()
            for size, value in by_size.items()
        ]
        columns = {"variant": "variant", "size": "training patients", "epochs": "epochs", PRIMARY: label}
        suffix = "" if budget == "epochs" else f"-{budget}"
        equal = f"equal numbers of {'epochs' if budget == 'epochs' else 'optimiser steps'}"
        caption = f"{main}: {label} by number of training patients, with {equal}."
        content.append(context.write_table(f"learning-curve{suffix}", rows, columns, caption))
        drawn = figures.learning_curve(curves, PRIMARY, chance=0.5)
        pictures.append(context.write_figure(f"learning-curve{suffix}", drawn, f"Learning curves with {equal}."))
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
    draws = f" The patients of each size were drawn {study.curve_draws} times." if study.curve_draws > 1 else ""
    text = (
        "Training on fewer patients, with the same test parts. A larger number includes the patients of a smaller one."
        + draws
    )
    yield Section("Fewer patients", [text], content, pictures)


def _epochs(context: ReportContext, variant: str, size: int, budget: Budget) -> int:
    """Return the largest number of epochs of a learning-curve run, or of the training on all patients."""
    run = Run(context.study.variant(variant), size, budget).group
    record: int = context.record["variants"].get(run, context.record["variants"][variant])["protocol"]["epochs"]
    return record


def losses(context: ReportContext) -> Iterator[Section]:
    """Yield the losses of each variant by epoch."""
    pictures = []
    for variant in context.study.variants:
        log = context.out / "runs" / variant.name / "log.csv"
        if log.is_file():
            drawn = figures.training(read_csv(log), title=variant.name)
            pictures.append(context.write_figure(f"training-{variant.name}", drawn, f"Losses of {variant.name}."))
    if pictures:
        yield Section("Training", [], [], pictures)
