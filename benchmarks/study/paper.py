"""Run the preset `paper` from beginning to end at a reduced size: `python benchmarks/study/paper.py FOLDER`.

The networks, tasks and protocol are those of the preset. The patients are simulated and few, the grids are small, and
there are few folds and epochs, so that two cores are enough and the results mean nothing. FOLDER receives the study
file and the study. Finished jobs are reused, so an interrupted run can be continued.
"""

import argparse
import re
import time
from pathlib import Path

from ichprog.study import Study, report, run, template

SHAPE = [40, 64, 64]  # the least depth that the network of Perez et al. can read


def reduced(preset: str, *, patients: int, folds: int, epochs: int) -> str:
    """Return the text of a study file with the variants and baselines of a preset, and less of everything else."""
    simulated = f'[simulated]\npatients = {patients}\nseed = 400\npreset = "plain"\n'
    text = re.sub(r"^cohort = .*$", "", preset, flags=re.MULTILINE)
    text = re.sub(r"^folds = .*$", f"folds = {folds}", text, flags=re.MULTILINE)
    text = re.sub(r"^n_bootstrap = .*$", "n_bootstrap = 200", text, flags=re.MULTILINE)
    text = re.sub(r"^(\[protocol\]\n.*)$", rf"{simulated}\n\1\nepochs = {epochs}", text, count=1, flags=re.MULTILINE)
    return re.sub(r"^(model = .*)$", rf"\1\nshape = {SHAPE}", text, flags=re.MULTILINE)


def main() -> None:
    """Write the study file, run the study and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "study.toml"
    file.write_text(reduced(template("paper"), patients=args.patients, folds=args.folds, epochs=args.epochs))
    study, start = Study.read(file), time.perf_counter()
    statuses = run(study, args.folder / "study", workers=args.workers)
    states = {state: sum(status.state == state for status in statuses) for state in {s.state for s in statuses}}
    print(f"{states} jobs, {(time.perf_counter() - start) / 60:.0f} minutes")
    print(report(study, args.folder / "study"))


if __name__ == "__main__":
    main()
