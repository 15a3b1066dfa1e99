"""Compare saliency maps of networks with and without GCS and age: `python docs/gallery.py FOLDER STUDY`.

STUDY is the folder of the study for one value of the dial, written by `benchmarks/study/dial.py`. The networks explain
simulated patients of another seed, whose scans are kept in FOLDER. The script draws `docs/pictures/gallery.png` and
writes the table of localisation into `docs/explain.md`.
"""

import argparse
from pathlib import Path
from typing import Any

from ichprog.cohort import Cohort
from ichprog.evaluation.localization import compare_maps, measure_maps, summarise_maps
from ichprog.export import markdown_table
from ichprog.io import atomic_write
from ichprog.simulate import simulate

DOCS = Path(__file__).parent
VARIANTS = {"outcome": "outcome alone", "outcome_gcs_age": "outcome, GCS and age"}
METHODS = ("guided_backprop", "grad_cam", "guided_grad_cam")
PATIENTS = {"patients": 40, "seed": 8, "preset": "plain"}
SHOWN = 3
TASK = "prognosis"
RESOLUTION_DPI = 80
BEGIN, END = "<!-- localisation -->", "<!-- end -->"


def main() -> None:
    """Measure and draw the maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("study", type=Path)
    args = parser.parse_args()
    models = {shown: f"local-dir:{(args.study / 'runs' / name).absolute()}" for name, shown in VARIANTS.items()}
    cohort = Cohort.read(simulate(args.folder / "gallery", **PATIENTS))  # type: ignore[arg-type]
    shown = [(patient.name, None) for patient in cohort.patients[:SHOWN]]
    figure = compare_maps(models, cohort, shown, folds=None, task=TASK, method=METHODS[0], brain="given")
    with atomic_write(DOCS / "pictures" / "gallery.png") as part:
        figure.savefig(part, dpi=RESOLUTION_DPI, format="png")
    measured = measure_maps(models, cohort, folds=None, tasks=[TASK], methods=METHODS, brain="given")
    rows = [format_row(summary) for summary in summarise_maps(measured)]
    columns = ["method", "network", "highest value in the blood", "relevance in the blood", "less a map of density"]
    page = DOCS / "explain.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    table = markdown_table(columns, sorted(rows))
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(table)


def format_row(summary: dict[str, Any]) -> list[str]:
    """Return the cells of a variant and a method."""

    def cell(metric: str) -> str:
        found = summary[metric]
        return "" if found is None else f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"

    names = [f"`{summary['method']}`", summary["variant"]]
    return [*names, *map(cell, ("pointing_game", "relevance_mass_accuracy", "mass_gain_over_dense"))]


if __name__ == "__main__":
    main()
