"""Train the embedded model again and measure it: `python docs/embedded.py FOLDER`.

The script simulates patients, trains by cross-validation, and measures on 300 simulated patients of another seed. It
writes the weights and the spec into `ichprog/zoo/`, and the results into the spec and `docs/embedded.json`. Files in
FOLDER are reused, so an interrupted run can be continued. `--measure` only measures.
"""

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import ichprog
from ichprog import Cohort
from ichprog.simulate import simulate
from ichprog.simulate.population import SITES
from ichprog.spec import ModelSpec, Task
from ichprog.train import PRESETS, TrainOptions, train

NAME = "compact.prognosis_gcs3_age"
ZOO = Path(ichprog.__file__).parent / "zoo"
TRAINED_ON = {"patients": 600, "seed": 1}
MEASURED_ON = {"patients": 300, "seed": 2}
FOLDS = 3
PROTOCOL = PRESETS["default"].replace(epochs=36, warmup_epochs=2)
N_BOOTSTRAP = 2000
_FIGURE = "AUC for"
VISIBLE = ("ventricular", "midline_shift_mm", "atrophy", "white_matter", "calcification")
QUESTIONS = (  # task, first positive label, description, optimal probability
    ("prognosis", 1, "poor outcome", lambda truth: truth["seen_poor"]),
    ("gcs", 1, "GCS of 12 or less", lambda truth: truth["p_gcs_9_12"] + truth["p_gcs_3_8"]),
    ("gcs", 2, "GCS of 8 or less", lambda truth: truth["p_gcs_3_8"]),
    ("age", 1, "age of 80 or more", lambda truth: truth["seen_age_80"]),
)


def main(folder: Path, *, only_measure: bool) -> None:
    """Train unless `only_measure` is set, measure, and write the results into the project."""
    weights = ZOO / NAME
    training = simulate(folder / "train", **TRAINED_ON, preset="plain", workers=2, progress=_progress("train"))
    test = simulate(folder / "test", **MEASURED_ON, preset="plain", workers=2, progress=_progress("test"))
    if not only_measure:
        run, spec = folder / "run", ModelSpec.read(ZOO / f"{NAME}.json")
        limits = tuple(limit for limit in spec.limits if not limit.startswith(_FIGURE))
        spec = dataclasses.replace(spec, limits=limits, weights=dataclasses.replace(spec.weights, sha256={}))
        train(
            training, spec, run, folds=FOLDS, protocol=PROTOCOL, resume=run.exists(),
            options=TrainOptions(cache_dir=folder / "cache", workers=2, progress=True),
        )  # fmt: skip
        trained = ModelSpec.read(run / "config.json")
        weights.mkdir(exist_ok=True)
        for file in run.glob("fold*.safetensors"):
            shutil.copyfile(file, weights / file.name)
        # texts of the new weights are those of the embedded model, not those that training generates
        stored = dataclasses.replace(trained.weights, folder=NAME)
        _write(dataclasses.replace(spec, weights=stored, golden_output=trained.golden_output))
    figures = measure(test, training)
    (Path(__file__).parent / "embedded.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    spec = ModelSpec.read(ZOO / f"{NAME}.json")
    limits = (limit for limit in spec.limits if not limit.startswith(_FIGURE))
    _write(dataclasses.replace(spec, limits=(*limits, *_format_results(figures))))
    print("\n".join(_format_results(figures)))


def measure(test: Path, training: Path) -> list[dict[str, Any]]:
    """Return the AUC of each question on the test patients for the model, the oracle and the optimal probability.

    The oracle is a logistic regression on the true variables that are visible in an image, fitted to the training
    patients.
    """
    model = ichprog.load_model(NAME)
    patients, truths = Cohort.read(test), [_numbers(row) for row in _truth(test)]
    answers = [ichprog.predict(model, patient.scan) for patient in patients.patients]
    figures = []
    for name, first, what, best in QUESTIONS:
        task = model.spec.task(name)
        true = patients.labels(task) >= first
        scores = [sum(answer[name].probabilities[label] for label in task.labels[first:]) for answer in answers]
        scorers = {"model": scores, "oracle": _oracle(training, test, task, first), "ceiling": list(map(best, truths))}
        figure: dict[str, Any] = {"task": name, "what": what, "patients": len(true), "positive": int(true.sum())}
        for scorer, values in scorers.items():
            values = np.asarray(values)
            draws = [_auc(true[chosen], values[chosen]) for chosen in _bootstrap_samples(len(true))]
            figure[scorer] = [round(float(v), 3) for v in (_auc(true, values), *np.quantile(draws, (0.025, 0.975)))]
        figures.append(figure)
    return figures


def _oracle(training: Path, test: Path, task: Task, first: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    fitted.fit(_visible_variables(training), Cohort.read(training).labels(task) >= first)
    probabilities: np.ndarray = fitted.predict_proba(_visible_variables(test))[:, 1]
    return probabilities


def _visible_variables(cohort: Path) -> np.ndarray:
    """Return the true variables that are visible in an image, one row per patient."""
    rows = []
    for truth in _truth(cohort):
        sites = [float(truth["location"] == site) for site in SITES]
        values = _numbers(truth)
        extended = float(values["ventricular"] > 0)
        rows.append([np.log(values["volume_ml"]), extended, *(values[name] for name in VISIBLE), *sites])
    return np.array(rows)


def _auc(true: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(true, scores))


def _bootstrap_samples(count: int) -> list[np.ndarray]:
    """Return bootstrap samples of patients, the same for all compared scores."""
    random = np.random.default_rng(0)
    return [random.integers(0, count, count) for _ in range(N_BOOTSTRAP)]


def _format_results(figures: list[dict[str, Any]]) -> list[str]:
    return [
        f"{_FIGURE} a simulated {f['what']} on {f['patients']} simulated patients of another seed: "
        f"{f['model'][0]:.3f} (95 % interval {f['model'][1]:.3f} to {f['model'][2]:.3f}); chance 0.5; logistic "
        f"regression on the true variables visible in the image {f['oracle'][0]:.3f} ({f['oracle'][1]:.3f} to "
        f"{f['oracle'][2]:.3f}). It says nothing about real patients."
        for f in figures
    ]


def _write(spec: ModelSpec) -> None:
    text = json.dumps(spec.to_dict(), indent=2, ensure_ascii=False)
    (ZOO / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")


def _truth(cohort: Path) -> list[dict[str, str]]:
    with cohort.with_name("truth.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name not in ("patient", "location")}


def _progress(what: str) -> Any:
    return lambda done: print(f"\r{what}: {done} patients", end="", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), only_measure="--measure" in sys.argv)
