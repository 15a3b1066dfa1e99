"""What comes out of a study: `metrics.json`, tables, figures and `report.html`, all from what was predicted.

STUDY/metrics.json       by run, task and metric: value, low, high
     /tables/            each as CSV, Markdown and LaTeX
     /figures/           each as SVG and PNG
     /saliency.csv       what was measured of each map, where maps were asked for
     /report.html        all of it in one file
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.cohort import Cohort
from ichprog.errors import RunError
from ichprog.evaluation.predictions import Predictions
from ichprog.io import write_json
from ichprog.metrics import AT_HALF, PRIMARY, RECALIBRATED, calibration, conformal, discrimination, registered
from ichprog.reporting import figures, html, tables
from ichprog.reporting.html import Contents, Picture, Section, Table
from ichprog.reporting.tables import words
from ichprog.spec import Task
from ichprog.study import analysis, baselines, saliency_results
from ichprog.study.analysis import StudyResults, TaskAnalysis
from ichprog.study.config import Study
from ichprog.study.manifest import fold_of_patient, load_cohort, split_folds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIMITS = (
    "Intervals are percentiles of a bootstrap over patients at the cohort's own size. They hold the networks fixed: "
    "what another split or another training of the same network would give is seen in the dots of single folds alone.",
    "P values of the AUROC are DeLong's, others are of a paired bootstrap. Holm's adjustment is over all that one "
    "metric of one task compares; comparisons at fewer patients are a family of their own. Nothing is adjusted over "
    "metrics.",
    "A study compares what was given to it. Another cohort, another hospital or another year may order it otherwise.",
)


@dataclass
class _Writer:
    """Writes tables and figures of a study, and keeps them for its report."""

    out: Path
    cache_dir: str | Path | None = None
    sections: list[Section] = field(default_factory=list)

    def table(self, name: str, rows: Sequence[tables.Row], columns: tables.Columns, caption: str) -> Table:
        tables.write(rows, columns, self.out / "tables", name, caption)
        return Table(rows, columns, caption)

    def picture(self, name: str, figure: "Figure", caption: str, *, raster: bool = False) -> Picture:
        vector, pixels = figures.save(figure, self.out / "figures", name)
        return Picture(pixels if raster else vector, caption)


def report(study: Study, out: str | Path, *, saliency_patients: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Judges what has been predicted, and writes it all.

    Args:
        study: The study.
        out: Its folder, in which `cells.run` has been.
        saliency_patients: Number of patients with a lesion mask, the first ones, whose maps are measured by the
            study's saliency methods. Stored measurements are used again.
        cache_dir: Where compiled networks are kept; `~/.cache/ichprog` or `$ICHPROG_CACHE` where not given.

    Returns:
        The report.

    Raises:
        RunError: Nothing has been predicted there.
        CohortError: A table cannot be used.
    """
    out = Path(out)
    cohort, predictions = load_cohort(study, out), Predictions.read(out / "predictions.csv")
    if not predictions.entries:
        raise RunError(f"{out}: no variant is done in every fold yet; there is nothing to judge.")
    found = analysis.judge(study, cohort, predictions)
    write_json(out / "metrics.json", found.metrics)
    about = json.loads((out / "study.json").read_text("utf-8"))
    truth = {task.name: cohort.labels(task) for task in _tasks(study)}
    writer = _Writer(out, cache_dir)
    writer.sections += [_compared(study, about), _patients(writer, study, found, truth)]
    for task in _tasks(study):
        writer.sections += _results(writer, study, found, task)
    main = study.task(study.split_by)
    if len(main.labels) == 2:
        writer.sections.append(_probabilities(writer, study, found, main))
    writer.sections += _learning(writer, study, found, about)
    writer.sections += _groups(writer, study, found)
    writer.sections += _reading(writer, found, main)
    if len(main.labels) == 2:
        writer.sections += _boundaries(writer, study, cohort, main)
    writer.sections.append(_mistakes(writer, study, cohort, found, out))
    if saliency_patients and any(variant.saliency for variant in study.variants):
        writer.sections.append(_saliency(writer, study, cohort, out, saliency_patients))
    writer.sections += _trainings(writer, study, out)
    facts = html.facts(study, truth, found.metrics, simulated=about["cohort"]["simulated"])
    tables.write(html.checklist(facts), html.CHECKLIST, out / "tables", "tripod", "TRIPOD+AI")
    return html.report(
        out, Contents(study.name, about["cohort"]["simulated"], writer.sections, [*_LIMITS, *_own_limits(study)], facts)
    )


def _tasks(study: Study) -> list[Task]:
    """Every task of the study once, the one that folds are split by first; another set of labels is another task."""
    every = [study.task(study.split_by), *(task for variant in study.variants for task in variant.spec.tasks)]
    return list({(task.name, task.labels): task for task in every}.values())


def _own_limits(study: Study) -> list[str]:
    return list(dict.fromkeys(limit for variant in study.variants for limit in variant.spec.limits))


def _of(study: Study, found: StudyResults, task: Task) -> dict[str, TaskAnalysis]:
    """What is judged of a task by run, those at a size apart; with one set of labels."""
    return {
        run: one
        for run, by_task in found.judged.items()
        if (one := by_task.get(task.name)) and one.task.labels == task.labels and not _sized(study, run)
    }


def _with_interval(row: analysis.Row, name: str) -> analysis.Row:
    """A row whose value has its interval with it, as tables take them."""
    return row | {name: {"value": row[name], "low": row["low"], "high": row["high"]}}


def _sized(study: Study, run: str) -> bool:
    return run in study.runs and study.runs[run][1] is not None


def _title(study: Study, task: Task) -> str:
    """A task's name, with its labels where the study has it with others too."""
    same = [each for each in _tasks(study) if each.name == task.name]
    return task.name if len(same) == 1 else f"{task.name} ({', '.join(task.labels)})"


def _file(study: Study, task: Task) -> str:
    same = [each for each in _tasks(study) if each.name == task.name]
    return task.name if len(same) == 1 else f"{task.name}{len(task.labels)}"


def _compared(study: Study, about: Mapping[str, Any]) -> Section:
    left = [f"{name} was left out: {why}." for name, why in about["left_out"].items()]
    folds = ", ".join(
        f"{len(one['train'])} / {len(one['validation'])} / {len(one['test'])}" for one in about["membership"].values()
    )
    said = f"Patients of each fold who train / validate / test: {folds}. The folds are the same for all."
    return Section("What was compared", [said, *left], [html.compared(study)])


def _patients(writer: _Writer, study: Study, found: StudyResults, truth: Mapping[str, np.ndarray]) -> Section:
    made = [html.people(study, truth)]
    if found.correlations:
        rows = [_with_interval(row, "rho") for row in found.correlations]
        columns = {"name": "column", "n": "patients", "rho": "Spearman's rho", "p": "p", "p_holm": "p (Holm)"}
        caption = f"Correlation of columns with {study.split_by}, with 95 % intervals."
        made.append(writer.table("correlations", rows, columns, caption))
    return Section("Patients", [], made)


def _results(writer: _Writer, study: Study, found: StudyResults, task: Task) -> Iterator[Section]:
    runs, name, title = _of(study, found, task), _file(study, task), _title(study, task)
    if not runs:
        return
    metrics = {run: found.metrics[run][task.name] for run in runs}
    shown = [each.name for each in registered(task.kind) if each.in_report]
    lower = [each.label for each in registered(task.kind) if each.in_report and each.higher_is_better is False]
    rows = [{"variant": run, "patients": len(runs[run].predictions), **figures} for run, figures in metrics.items()]
    columns = {"variant": "variant", "patients": "patients"} | {m: words(m) for m in shown}
    threshold = "; thresholds from validation parts" if len(task.labels) == 2 else ""
    caption = f"{title}: test parts of all folds together{threshold}."
    caption += f" Lower is better for: {', '.join(lower)}." if lower else ""
    made = [writer.table(name, rows, columns, caption)]
    if len(task.labels) == 2:
        columns = {"variant": "variant"}
        columns |= {each.name + AT_HALF: each.label for each in registered(task.kind) if each.at_threshold}
        made.append(writer.table(f"{name}-at-half", rows, columns, f"{title}: the same at a threshold of 0.5."))
    compared = [
        _with_interval(row, "difference")
        for row in found.comparisons
        if row["task"] == task.name and row["variant"] in runs
    ]
    if compared:
        columns = {
            "variant": "variant", "reference": "less", "metric": "metric", "difference": "difference", "p": "p",
            "p_holm": "p (Holm)", "n": "patients", "method": "test",
        }  # fmt: skip
        made.append(writer.table(f"{name}-compared", compared, columns, f"{title}: paired comparisons."))
    per_fold = [
        {"variant": run, "metric": metric, **{f"fold {k}": value for k, value in enumerate(values)}}
        for run in runs
        for metric, values in found.per_fold[run][task.name].items()
        if metric in (*shown, "threshold")
    ]
    columns = {key: key for key in per_fold[0]}
    tables.write(per_fold, columns, writer.out / "tables", f"{name}-folds", f"{title}: each fold's test part.")
    by_task = {run: {task.name: figures} for run, figures in metrics.items()}
    dots = {run: found.per_fold[run][task.name][PRIMARY] for run in runs}
    pooled = {run: figures[PRIMARY] for run, figures in metrics.items()}
    pictures = [
        writer.picture(
            f"{name}-{PRIMARY}", figures.ablation(by_task, task.name, PRIMARY, chance=0.5),
            f"{title}: {words(PRIMARY)} of every variant, all folds together, with 95 % intervals.",
        ),
        writer.picture(
            f"{name}-folds", figures.folds(dots, PRIMARY, pooled),
            f"{title}: {words(PRIMARY)} of each fold and of all together.",
        ),
    ]  # fmt: skip
    if len(task.labels) == 2:
        curves = {run: (one.predictions.truth, one.predictions.probabilities[:, 1]) for run, one in runs.items()}
        pictures.append(writer.picture(f"{name}-roc", figures.roc(curves), f"{title}: ROC curves."))
    yield Section(f"Results: {title}", [task.meaning], made, pictures)


def _probabilities(writer: _Writer, study: Study, found: StudyResults, task: Task) -> Section:
    """Calibration before and after, decisions, and sets, for the task that folds are split by."""
    runs = _of(study, found, task)
    trained = {run: one for run, one in runs.items() if run in study.runs}
    rows = [{"variant": run, **found.metrics[run][task.name]} for run in runs]
    shown = [each.name for each in registered(task.kind) if each.recalibrated]
    shown = [name + suffix for name in shown for suffix in ("", RECALIBRATED)]
    columns = {"variant": "variant"} | {m: words(m) for m in (*shown, *conformal.METRICS)}
    caption = (
        f"Calibration before and after recalibration on validation parts, and conformal sets for {study.coverage:g}."
    )
    made = [writer.table("calibration", rows, columns, caption)]
    panels = {
        run: {
            "as trained": calibration.calibration_curve(one.predictions.truth, one.predictions.probabilities[:, 1]),
            "recalibrated": calibration.calibration_curve(one.predictions.truth, after.probabilities[:, 1]),
        }
        for run, one in trained.items()
        if (after := one.recalibrated) is not None
    }
    at = np.linspace(0.05, 0.95, 91)
    decisions = {
        run: discrimination.net_benefit(one.predictions.truth, one.recalibrated.probabilities[:, 1], at)
        for run, one in runs.items()
        if one.recalibrated is not None
    }
    bars = {
        run: calibration.probability_histogram(one.predictions.truth, one.predictions.probabilities[:, 1])
        for run, one in trained.items()
    }
    pictures = [
        writer.picture("calibration", figures.calibration(panels), "Calibration curves of the trained variants."),
        writer.picture("decisions", figures.decision_curve(decisions), "Decision curves, after recalibration."),
        writer.picture("histograms", figures.histograms(bars, task.labels), "Probabilities as trained, by true label."),
    ]
    said = "Each is fitted to the validation part of the fold that answers, and applied to its test part."
    return Section("Probabilities", [said], made, pictures)


def _learning(writer: _Writer, study: Study, found: StudyResults, about: Mapping[str, Any]) -> Iterator[Section]:
    if not study.sizes:
        return
    whole = round(float(np.mean([len(one["train"]) for one in about["membership"].values()])))
    curves = analysis.curve(study, found.metrics, whole)
    rows = [
        {"variant": name, "size": size, PRIMARY: value}
        for name, by_size in curves.items()
        for size, value in by_size.items()
    ]
    columns = {"variant": "variant", "size": "patients trained on", PRIMARY: words(PRIMARY)}
    made = [
        writer.table("learning-curve", rows, columns, f"{study.split_by}: {words(PRIMARY)} by patients trained on.")
    ]
    compared = [
        _with_interval(row, "difference")
        for row in found.comparisons
        if row["task"] == study.split_by and _sized(study, row["variant"]) and row["metric"] == PRIMARY
    ]
    if compared:
        columns = {
            "variant": "variant",
            "reference": "less",
            "difference": "difference",
            "p": "p",
            "p_holm": "p (Holm)",
        }
        made.append(
            writer.table("learning-curve-compared", compared, columns, f"Differences in {words(PRIMARY)} at each size.")
        )
    drawn = writer.picture("learning-curve", figures.learning_curve(curves, PRIMARY, chance=0.5), "The learning curve.")
    said = "The same test parts; fewer patients to train on, of whom a larger number holds a smaller one."
    yield Section("Fewer patients", [said], made, [drawn])


def _groups(writer: _Writer, study: Study, found: StudyResults) -> Iterator[Section]:
    if not found.subgroups:
        return
    columns = {
        "column": "column", "group": "group", "variant": "variant", "patients": "patients",
        "with_last_label": f"{study.task(study.split_by).labels[-1]}",
    }  # fmt: skip
    columns |= {each.name: each.label for each in registered(study.task(study.split_by).kind) if each.in_subgroups}
    made = writer.table("subgroups", found.subgroups, columns, f"{study.split_by} by groups of patients.")
    best = _best(study, found)
    own = {f"{row['column']} {row['group']}": row[PRIMARY] for row in found.subgroups if row["variant"] == best}
    drawn = writer.picture(
        "subgroups",
        figures.forest(own, f"{words(PRIMARY)} of {best}", line=0.5),
        f"{words(PRIMARY)} of {best} by groups of patients.",
    )
    yield Section("Subgroups", [], [made], [drawn])


def _best(study: Study, found: StudyResults) -> str:
    """The trained variant with the highest primary metric, of the task that folds are split by."""
    runs = [run for run in _of(study, found, study.task(study.split_by)) if run in study.runs]
    if not runs:
        return next(iter(found.judged))
    return max(runs, key=lambda run: found.metrics[run][study.split_by][PRIMARY]["value"] or 0.0)


def _reading(writer: _Writer, found: StudyResults, task: Task) -> Iterator[Section]:
    if not found.readers:
        return
    rows, pairs, pictures = [], [], []
    for variant, said in found.readers.items():
        rows.append({"variant": variant, "reader": "the model", **said["model"]})
        for reader, one in said["readers"].items():
            against = {f"p_{figure}": test["p_holm"] for figure, test in one["against_model"].items()}
            rows.append({"variant": variant, "reader": reader, **one, **against})
        judged = found.judged[variant][task.name].predictions
        curve = {variant: (judged.truth, judged.probabilities[:, 1])}
        drawn = figures.roc(curve, said["readers"])
        pictures.append(writer.picture(f"readers-{variant}", drawn, f"Readers beside the ROC curve of {variant}."))
        pairs = [{"readers": f"{p['first']}, {p['second']}", **p} for p in said["cohen"]]
        pairs.append({"readers": "all (Fleiss)", **said["fleiss"]})
    columns = {
        "variant": "variant", "reader": "reader", "n": "patients", "accuracy": "accuracy",
        "sensitivity": "sensitivity", "specificity": "specificity", "p_accuracy": "p accuracy",
        "p_sensitivity": "p sensitivity", "p_specificity": "p specificity",
    }  # fmt: skip
    made = [
        writer.table("readers", rows, columns, "Readers and models; p by McNemar's exact test, Holm-adjusted."),
        writer.table(
            "agreement", pairs, {"readers": "readers", "kappa": "kappa", "n": "patients"}, "Agreement of the readers."
        ),
    ]  # fmt: skip
    yield Section("Readers", [], made, pictures)


def _boundaries(writer: _Writer, study: Study, cohort: Cohort, task: Task) -> Iterator[Section]:
    """Where models of two columns change their call, fitted to the training part of the first fold."""
    chosen = [one for one in study.baselines if len(one.columns) == 2 and one.kind not in ("majority", "fusion")]
    if not chosen:
        return
    columns = (chosen[0].columns[0], chosen[0].columns[1])
    part = split_folds(study, cohort)[0].train
    surfaces = {
        one.name: baselines.decision_surface(one.kind, cohort, columns, task, part, seed=study.protocol.seed)
        for one in chosen
        if one.columns == columns and one.task == task.name
    }
    points = (cohort.numbers(columns[0])[part], cohort.numbers(columns[1])[part], cohort.labels(task)[part])
    labels = (task.labels[0], task.labels[1])
    drawn = writer.picture(
        "boundaries", figures.boundaries(surfaces, points, columns, labels),
        f"Models of {columns[0]} and {columns[1]} with the patients of the first fold that they were fitted to.",
        raster=True,
    )  # fmt: skip
    yield Section("Models of two columns", [], [], [drawn])


def _mistakes(writer: _Writer, study: Study, cohort: Cohort, found: StudyResults, out: Path) -> Section:
    from ichprog.model import explain, predict
    from ichprog.reporting.overlay import plot

    columns = {
        "variant": "variant", "patient": "patient", "fold": "fold", "truth": "truth", "told": "told",
        "probability": "probability",
    }  # fmt: skip
    rows = [row for row in found.mistakes if not _sized(study, row["variant"])]
    made = writer.table("mistakes", rows, columns, "The most confident mistakes of each variant, on test parts.")
    best, pictures = _best(study, found), []
    scans = {patient.name: patient.scan for patient in cohort.patients}
    method = study.saliency[0] if study.saliency else "grad_cam"
    for row in rows if best in study.runs else []:
        if row["variant"] != best:
            continue
        model, scan = saliency_results.load_fold_model(out, best, row["fold"], writer.cache_dir), scans[row["patient"]]
        examined = model.load_scan(scan, brain=study.brain)
        saliency: Any = explain(model, examined, task=study.split_by, label=row["told"], method=method)
        drawn = plot(saliency, examined, prediction=predict(model, examined))
        caption = f"{row['patient']}: {row['truth']}, told {row['told']} with {row['probability']:.2f} by {best}."
        pictures.append(writer.picture(f"mistake-{row['patient']}", drawn, caption, raster=True))
    return Section("The most confident mistakes", [], [made], pictures)


def _saliency(writer: _Writer, study: Study, cohort: Cohort, out: Path, maps_of: int) -> Section:
    from ichprog.evaluation import localization

    rows_of = saliency_results.measure_maps(study, cohort, out, maps_of, writer.cache_dir)
    if not rows_of:
        return Section("Saliency", ["Nothing was measured: no variant is done whose patients have a lesion mask."])
    rows = localization.summarise_maps(rows_of, n_bootstrap=study.draws, seed=study.seed)
    columns = {
        "variant": "variant", "task": "task", "method": "method", "maps": "maps", "empty": "empty",
        "pointing_game": "pointing game", "relevance_mass_accuracy": "relevance mass accuracy",
        "lesion_share": "lesion's share of the brain", "relevance_mass_gain": "relevance mass accuracy less share",
        "hemisphere_correct": "hemisphere correct", "deletion_gain": "deletion less random",
        "insertion_gain": "insertion less random",
    }  # fmt: skip
    made = [writer.table("saliency", rows, columns, "Maps against lesion masks, with 95 % intervals over patients.")]
    checked = [
        row
        for variant in dict.fromkeys(row.variant for row in rows_of)
        for row in saliency_results.randomise_parameters(study, cohort, out, variant, writer.cache_dir)
    ]
    columns = {
        "variant": "variant",
        "task": "task",
        "method": "method",
        "down_to": "random down to",
        "likeness": "rank correlation",
    }
    caption = (
        "A map beside that of the same network with random weights, from the heads down (first patient with a mask)."
    )
    made.append(writer.table("randomised", checked, columns, caption))
    names = list(dict.fromkeys(row.patient for row in rows_of))[:3]
    models = saliency_results.complete_variants(study, out, writer.cache_dir, task=study.split_by)
    drawn = localization.compare_maps(
        models,
        cohort,
        [(name, None) for name in names],
        folds=fold_of_patient(out),
        task=study.split_by,
        method=rows_of[0].method,
        brain=study.brain,
    )
    said = "Each map is of the network that did not see the patient."
    pictures = [writer.picture("saliency", drawn, "Maps of every variant over one slice.", raster=True)]
    return Section("Saliency", [said], made, pictures)


def _trainings(writer: _Writer, study: Study, out: Path) -> Iterator[Section]:
    pictures = []
    for variant in study.variants:
        log = out / "runs" / variant.name / "log.csv"
        if log.is_file():
            with log.open(encoding="utf-8", newline="") as file:
                drawn = figures.training(list(csv.DictReader(file)), title=variant.name)
            pictures.append(writer.picture(f"training-{variant.name}", drawn, f"Losses of {variant.name}."))
    if pictures:
        yield Section("Training", [], [], pictures)
