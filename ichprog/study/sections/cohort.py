"""Sections about the patients: folds, description, subgroups, readers."""

from collections.abc import Iterator

from ichprog.metrics import PRIMARY, registered
from ichprog.reporting import figures
from ichprog.reporting.html import Section
from ichprog.reporting.tables import readable_name
from ichprog.study import facts
from ichprog.study.analysis import Row
from ichprog.study.sections.context import ReportContext, join_interval


def comparison(context: ReportContext) -> Iterator[Section]:
    """Yield the variants and the folds that are compared."""
    left_out = [f"{name} was left out: {reason}." for name, reason in context.record["left_out"].items()]
    sizes = ", ".join(
        " / ".join(str(len(fold[part])) for part in ("train", "validation", "test"))
        for fold in context.record["membership"].values()
    )
    text = f"Patients of each fold in the training / validation / test part: {sizes}. All variants use the same folds."
    yield Section("What was compared", [text, *left_out], [facts.comparison_table(context.study)])


def patients(context: ReportContext) -> Iterator[Section]:
    """Yield the description of the patients, and correlations with the outcome."""
    content = [facts.patients_table(context.study, context.truth)]
    if context.results.correlations:
        rows = [join_interval(row, "rho") for row in context.results.correlations]
        columns = {"name": "column", "n": "patients", "rho": "Spearman's rho", "p": "p", "p_holm": "p (Holm)"}
        caption = f"Correlation of columns with {context.study.stratify_by}, with 95 % intervals."
        content.append(context.write_table("correlations", rows, columns, caption))
    yield Section("Patients", [], content)


def subgroups(context: ReportContext) -> Iterator[Section]:
    """Yield the results for groups of patients."""
    rows, task, best = context.results.subgroups, context.study.main_task, context.best_run
    if not rows:
        return
    columns = {"column": "column", "group": "group", "variant": "variant", "patients": "patients"}
    columns |= {"with_last_label": task.labels[-1]}
    columns |= {each.name: each.label for each in registered(task.kind) if each.in_subgroups}
    table = context.write_table("subgroups", rows, columns, f"{task.name} by groups of patients.")
    label = f"{readable_name(PRIMARY)} (variant {best})"
    intervals = {f"{row['column']} {row['group']}": row[PRIMARY] for row in rows if row["variant"] == best}
    drawn = figures.forest(intervals, label, line=0.5)
    yield Section(
        "Subgroups",
        [],
        [table],
        [
            context.write_figure(
                "subgroups", drawn, f"{readable_name(PRIMARY)} by groups of patients, for the variant {best}."
            )
        ],
    )


def readers(context: ReportContext) -> Iterator[Section]:
    """Yield the comparison of the models with human readers."""
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
