"""Sections with pictures of scans: mistakes, saliency maps."""

from collections.abc import Iterator
from typing import Any

from ichprog.reporting.html import Picture, Section
from ichprog.study import saliency_results
from ichprog.study.analysis import Row
from ichprog.study.sections.context import ReportContext


def mistakes(context: ReportContext) -> Iterator[Section]:
    """Yield the mistakes of each variant that were most certain, with maps of the best variant."""
    columns = {"variant": "variant", "patient": "patient", "fold": "fold", "truth": "truth"}
    columns |= {"predicted": "predicted", "probability": "probability"}
    rows = [row for row in context.results.mistakes if not context.study.is_curve_run(row["variant"])]
    caption = (
        "Mistakes on test parts: for each variant those with the lowest probability of the true label, lowest first."
    )
    table = context.write_table("mistakes", rows, columns, caption, folded=True)
    best = context.best_run
    of_best = [row for row in rows if row["variant"] == best] if best in context.study.runs else []
    pictures = [_draw_mistake(context, row) for row in of_best]
    text = f"The pictures are of {best}. With a probability near that of the other label, a mistake is narrow."
    yield Section("Mistakes", [text] if pictures else [], [table], pictures)


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
        f"Predicted {row['predicted']} with a probability of {row['probability']:.2f}; the true label was "
        f"{row['truth']}. Patient {patient}, variant {variant}."
    )
    return context.write_figure(f"mistake-{patient}", drawn, caption, raster=True)


def saliency(context: ReportContext, n_patients: int) -> Section:
    """Return the measurements of saliency maps against lesion masks.

    Args:
        context: Results of the study.
        n_patients: Number of patients with a mask whose maps are measured.
    """
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
    caption = "Maps and lesion masks in the brain, at the resolution of the maps, with 95 % intervals."
    content = [context.write_table("saliency", rows, columns, caption)]
    columns = {"variant": "variant", "task": "task", "method": "method", "cell_ml": "mL in a cell"}
    for title, metric, short in (("pointing game", "pointing_game", "pointing"), ("mass", "mass_accuracy", "mass")):
        columns |= {f"centre_{metric}": f"{title} of the centre", f"dense_{metric}": f"{title} of dense voxels"}
        columns |= {
            f"{short}_gain_over_centre": f"{title} minus centre",
            f"{short}_gain_over_dense": f"{title} minus dense",
        }
    low, high = localization.DENSE_HU
    caption = (
        "Baselines without a network, at the resolution of the maps: nearness of the centre of the brain, and the "
        f"share of voxels of {low:g} to {high:g} HU. A map that does not exceed them shows no more than these."
    )
    content.append(context.write_table("saliency-baselines", rows, columns, caption))
    randomised = [
        row
        for variant in dict.fromkeys(each.variant for each in measured)
        for row in saliency_results.randomise_parameters(study, context.cohort, out, variant, context.cache_dir)
    ]
    columns = {"variant": "variant", "task": "task", "method": "method", "down_to": "random down to"}
    columns |= {"likeness": "rank correlation", "likeness_sd": "SD over seeds", "seeds": "seeds"}
    caption = (
        "Similarity of a map to the map of the same network with random weights, from the heads downward (first "
        "patient with a mask). Mean over seeds of the random weights."
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
