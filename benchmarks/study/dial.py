"""Do auxiliary tasks help, under which conditions, and by how much? `python benchmarks/study/dial.py FOLDER`.

The dial is `shared_causes` of the simulation: how strongly GCS and age depend on what the image shows, from 0, not at
all. At 1 the correlations with the outcome are near the published ones. For each value, `dial.toml` is run on other
simulated patients: the outcome alone and with GCS and age, each with several seeds, on all patients and on fewer. Then
`contrast.toml` asks the same of as many patients as the power analysis wants. The script writes `dial.json` and the
forest plot `docs/study-dial.svg`. Files in FOLDER are reused, so an interrupted run can be continued.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ichprog.evaluation.predictions import Predictions
from ichprog.reporting import figures
from ichprog.study import Study, analysis, manifest, run

HERE = Path(__file__).parent
DIAL = (0.0, 1.0, 3.0)
MULTI = "outcome_gcs_age"  # compared with the variant of one task


def run_study(study: Study, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Run a study and return the difference between the two variants for each number of training patients."""
    statuses = run(study, folder, workers=workers)
    if failed := [status for status in statuses if status.state != "done"]:
        raise SystemExit(f"{folder}: {failed[0].job.name}: {failed[0].error or failed[0].state}")
    cohort = manifest.load_cohort(study, folder)
    results = analysis.analyse(study, cohort, Predictions.read(folder / "predictions.csv"))
    train = min(len(fold["train"]) for fold in manifest.read_manifest(folder)["membership"].values())
    rows = []
    for row in results.comparisons:
        compared = study.runs[row["variant"]]
        if (compared.variant.name, row["metric"], row["task"]) == (MULTI, "auroc", study.stratify_by):
            kept = ("first", "second", "difference", "low", "high", "p", "p_folds", "n")
            rows.append({"training_patients": compared.size or train} | {key: row[key] for key in kept})
    variances = [row for row in results.variances if row["task"] == study.stratify_by]
    return [row | {"variances": variances} if row["training_patients"] == train else row for row in rows]


def main() -> None:
    """Run the study for each value of the dial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=HERE.parents[1], help="where `benchmarks` and `docs` are")
    args = parser.parse_args()
    study = Study.read(HERE / "dial.toml")
    studies = {"2,400 patients": (Study.read(HERE / "contrast.toml"), "contrast")}
    for value in DIAL:
        simulated = dataclasses.replace(study.simulated, shared_causes=value)  # type: ignore[type-var]
        studies[f"shared causes {value:g}"] = dataclasses.replace(study, simulated=simulated), f"{value:g}"
    found = {name: run_study(each, args.folder / place, args.workers) for name, (each, place) in studies.items()}
    intervals = {
        f"{name}, {row['training_patients']} trained on": {
            "value": row["difference"], "low": row["low"], "high": row["high"],
        }
        for name, rows in found.items()
        for row in sorted(rows, key=lambda each: each["training_patients"])
    }  # fmt: skip
    figure = figures.forest(intervals, "AUROC with GCS and age minus AUROC of the outcome alone", line=0.0)
    vector, pixels = figures.save(figure, args.output / "docs", "study-dial")
    pixels.unlink()
    text = json.dumps(found, indent=1)
    (args.output / "benchmarks" / "study" / "dial.json").write_text(text + "\n", encoding="utf-8")
    print(vector)


if __name__ == "__main__":
    main()
