"""Compare variants of a model, and baselines without an image, on the same folds of one cohort.

`Study.read` reads a study file (`config`, `variants`), whose keys `study_file` describes. `run` trains the variants
and fits the baselines, one job at a time or on several workers (`jobs`, `baselines`), in a folder that `manifest`
describes. `report` computes every figure from the predictions (`analysis`), measures saliency maps
(`saliency_results`) and writes tables, figures and `report.html` (`sections`). `parallel.cluster` yields an executor
for `run`. `compute_power` says how many patients and seeds a study needs.
"""

from ichprog.study.config import Study
from ichprog.study.jobs import Job, JobStatus, run, stages, status
from ichprog.study.manifest import research_notice
from ichprog.study.power import Assumptions, Power, compute_power
from ichprog.study.report import report, require_packages
from ichprog.study.saliency_results import saliency_figure
from ichprog.study.study_file import presets, template

__all__ = [
    "Assumptions",
    "Job",
    "JobStatus",
    "Power",
    "Study",
    "compute_power",
    "presets",
    "report",
    "require_packages",
    "research_notice",
    "run",
    "saliency_figure",
    "stages",
    "status",
    "template",
]
