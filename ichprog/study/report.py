"""Write the results of a study: metrics, tables, figures and an HTML report, all computed from its predictions.

STUDY/metrics.json       intervals by run, task and metric: value, low, high
     /tables/            each table as CSV, Markdown and LaTeX
     /figures/           each figure as SVG and PNG
     /saliency.csv       measurements of each saliency map, if maps were measured
     /report.html        everything in one file
"""

from importlib.util import find_spec
from pathlib import Path

from ichprog.cohort import Origin
from ichprog.errors import RunError, missing_extra
from ichprog.evaluation.predictions import Predictions
from ichprog.io import write_json
from ichprog.reporting import tables, tripod
from ichprog.reporting.html import Section, write_report
from ichprog.spec import ModelSpec
from ichprog.study import analysis, facts, manifest, sections
from ichprog.study.config import Study
from ichprog.train.description import is_unwritten

_LIMITS = (
    "Intervals are percentiles of a bootstrap over patients at the size of the cohort. They treat the networks as "
    "fixed. The dots of single folds are the only indication of what another split or another training would give.",
    "P values of the AUROC are DeLong's. Other p values come from a paired bootstrap. Holm's adjustment covers all "
    "comparisons in one metric of one task. Comparisons on fewer patients are adjusted separately. There is no "
    "adjustment over metrics.",
    "The results hold for this cohort. Another cohort, hospital or period may rank the variants differently.",
)


_REQUIRED_PACKAGES = {"jinja2": "jinja2", "matplotlib": "matplotlib", "scipy": "scipy", "sklearn": "scikit-learn"}


def require_packages() -> None:
    """Check that the packages that `report` needs are installed, so that a missing one is found before the training.

    Raises:
        IchprogError: A package is not installed. The message names all missing packages and the extra.
    """
    if missing := [package for module, package in _REQUIRED_PACKAGES.items() if find_spec(module) is None]:
        raise missing_extra("study", " and ".join(missing), "The report of a study")


def report(study: Study, out: str | Path, *, saliency_patients: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Analyse the predictions of a study, and write metrics, tables, figures and the report.

    Args:
        study: Study.
        out: Folder of the study, after `run`.
        saliency_patients: Number of patients with a lesion mask, the first ones, whose saliency maps are measured.
            Stored measurements are used again.
        cache_dir: Cache of compiled networks. By default `$ICHPROG_CACHE` or `~/.cache/ichprog`.

    Returns:
        The path of `report.html`.

    Raises:
        RunError: The folder has no predictions.
        CohortError: A table cannot be used.

    Examples:
        ```python
        study = ichprog.study.Study.read("study.toml")
        print(ichprog.study.report(study, "out"))
        ```
    """
    out = Path(out)
    cohort, predictions = manifest.load_cohort(study, out), Predictions.read(out / "predictions.csv")
    if not predictions.entries:
        raise RunError(f"{out}: no variant is done in every fold. Run the study first.")
    results = analysis.analyse(study, cohort, predictions)
    with manifest.lock_results(out):
        write_json(out / "metrics.json", results.metrics)
        record = manifest.read_manifest(out)
        context = sections.ReportContext(study, out, cohort, results, record, cache_dir)
        origin = cohort.origin
        checklist = tripod.fill_checklist(facts.tripod_facts(study, context.truth, results.metrics, origin=origin))
        tables.write(checklist, tripod.COLUMNS, out / "tables", "tripod", "TRIPOD+AI")
        content = [
            *sections.build_sections(context, saliency_patients=saliency_patients),
            Section("Limits", [*_LIMITS, *_model_limits(study, out)]),
            tripod.checklist_section(checklist),
        ]
        return write_report(out / "report.html", study.name, content, notices=_notices(origin))


def _model_limits(study: Study, out: Path) -> list[str]:
    """Return the limits of the trained variants without those to be written. A limit of all variants stands once."""
    limits: dict[str, list[str]] = {}
    for variant in study.variants:
        config = out / "runs" / variant.name / "config.json"
        for limit in ModelSpec.read(config).limits if config.is_file() else ():
            if not is_unwritten(limit):
                limits.setdefault(limit, []).append(variant.name)
    return [
        limit if len(names) == len(study.variants) else f"{', '.join(names)}: {limit}"
        for limit, names in limits.items()
    ]


def _notices(origin: Origin) -> list[str]:
    about = {
        "simulated": ["The patients of this study are simulated. The results say nothing about real patients."],
        "mixed": [f"{origin.sentence} The results do not separate simulated patients from real ones."],
        "not simulated": [],
    }[origin.kind]
    return [*about, "For research only, not for patient care."]
