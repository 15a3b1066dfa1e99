"""Build the sections of a study's report, and write their tables and figures.

Each function takes a `ReportContext` and yields the sections of its topic, or nothing if the study lacks the data.
"""

import logging

from ichprog.reporting.html import Section
from ichprog.study.sections import cohort, maps, summary, tasks, training
from ichprog.study.sections.context import ReportContext

__all__ = ["ReportContext", "build_sections"]

_progress = logging.getLogger("ichprog.progress")


def build_sections(context: ReportContext, *, saliency_patients: int) -> list[Section]:
    """Build all sections of the report and write their tables and figures.

    Args:
        context: Results of the study.
        saliency_patients: Number of patients whose saliency maps are measured.
    """
    _progress.info("Writing tables and figures.")
    sections = [*summary.summary(context), *cohort.comparison(context), *cohort.patients(context)]
    for task in context.tasks:
        sections += tasks.results(context, task)
    for build in (
        tasks.repetitions,
        tasks.probabilities,
        training.learning_curve,
        cohort.subgroups,
        cohort.readers,
        tasks.boundaries,
        maps.mistakes,
    ):
        sections += build(context)
    if saliency_patients and any(variant.saliency for variant in context.study.variants):
        _progress.info("Measuring the saliency maps of %d patients.", saliency_patients)
        sections.append(maps.saliency(context, saliency_patients))
    return [*sections, *training.losses(context)]
