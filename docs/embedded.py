"""Makes the embedded model anew, and measures it: `python docs/embedded.py FOLDER`.

Simulated patients to train on, training by cross-validation, 300 simulated patients of another seed to measure on. The
weights and the description with its figures go into `ichprog/zoo/`, the figures into `docs/embedded.json` too. What is
in FOLDER already is used again, so an interrupted run goes on. With `--measure` only the last step is done.
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
DRAWS = 2000
_FIGURE = "AUC for"
SHOWN = ("ventricular", "midline_shift_mm", "atrophy", "white_matter", "calcification")
QUESTIONS = (  # task, the first of the labels that count as yes, in words, the best probability there is
    ("prognosis", 1, "poor outcome", lambda truth: truth["seen_poor"]),
    ("gcs", 1, "GCS of 12 or less", lambda truth: truth["p_gcs_9_12"] + truth["p_gcs_3_8"]),
    ("gcs", 2, "GCS of 8 or less", lambda truth: truth["p_gcs_3_8"]),
    ("age", 1, "age of 80 or more", lambda truth: truth["seen_age_80"]),
)


def main(folder: Path, *, only_measure: bool) -> None:
    """Trains where that is asked for, measures, and writes both into the project."""
    weights = ZOO / NAME
    learn = simulate(folder / "train", **TRAINED_ON, workers=2, progress=_told("train"))
    test = simulate(folder / "test", **MEASURED_ON, workers=2, progress=_told("test"))
    if not only_measure:
        run, spec = folder / "run", ModelSpec.read(ZOO / f"{NAME}.json")
        said = tuple(limit for limit in spec.limits if not limit.startswith(_FIGURE))
        spec = dataclasses.replace(spec, limits=said, weights=dataclasses.replace(spec.weights, sha256={}))
        train(
            learn, spec, run, folds=FOLDS, protocol=PROTOCOL, resume=run.exists(),
            options=TrainOptions(cache_dir=folder / "cache", workers=2, progress=True),
        )  # fmt: skip
        trained = ModelSpec.read(run / "config.json")
        weights.mkdir(exist_ok=True)
        for file in run.glob("fold*.safetensors"):
            shutil.copyfile(file, weights / file.name)
        _write(dataclasses.replace(trained, weights=dataclasses.replace(trained.weights, folder=NAME)))
    figures = measure(test, learn)
    (Path(__file__).parent / "embedded.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    spec = ModelSpec.read(ZOO / f"{NAME}.json")
    said = (limit for limit in spec.limits if not limit.startswith(_FIGURE))
    _write(dataclasses.replace(spec, limits=(*said, *_said(figures))))
    print("\n".join(_said(figures)))


def measure(test: Path, learn: Path) -> list[dict[str, Any]]:
    """The AUC of each question on the test patients: the model's, the oracle's, and the best that there can be.

    The oracle is a logistic regression on the true variables that an image shows, fitted to the training patients.
    """
    model = ichprog.load_model(NAME)
    patients, truths = Cohort.read(test), [_numbers(row) for row in _truth(test)]
    answers = [ichprog.predict(model, patient.scan) for patient in patients.patients]
    figures = []
    for name, first, what, best in QUESTIONS:
        task = model.spec.task(name)
        true = patients.labels(task) >= first
        said = [sum(answer[name].probabilities[label] for label in task.labels[first:]) for answer in answers]
        everyone = {"model": said, "oracle": _oracle(learn, test, task, first), "ceiling": list(map(best, truths))}
        figure: dict[str, Any] = {"task": name, "what": what, "patients": len(true), "positive": int(true.sum())}
        for who, scores in everyone.items():
            scores = np.asarray(scores)
            draws = [_auc(true[chosen], scores[chosen]) for chosen in _resampled(len(true))]
            figure[who] = [round(float(v), 3) for v in (_auc(true, scores), *np.quantile(draws, (0.025, 0.975)))]
        figures.append(figure)
    return figures


def _oracle(learn: Path, test: Path, task: Task, first: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    fitted.fit(_shown(learn), Cohort.read(learn).labels(task) >= first)
    found: np.ndarray = fitted.predict_proba(_shown(test))[:, 1]
    return found


def _shown(cohort: Path) -> np.ndarray:
    """The true variables that an image shows, a row a patient."""
    rows = []
    for truth in _truth(cohort):
        sites = [float(truth["location"] == site) for site in SITES]
        values = _numbers(truth)
        extended = float(values["ventricular"] > 0)
        rows.append([np.log(values["volume_ml"]), extended, *(values[name] for name in SHOWN), *sites])
    return np.array(rows)


def _auc(true: np.ndarray, said: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(true, said))


def _resampled(count: int) -> list[np.ndarray]:
    """Patients drawn with replacement, the same draws for everything that is compared."""
    random = np.random.default_rng(0)
    return [random.integers(0, count, count) for _ in range(DRAWS)]


def _said(figures: list[dict[str, Any]]) -> list[str]:
    return [
        f"{_FIGURE} a simulated {f['what']} on {f['patients']} simulated patients of another seed: "
        f"{f['model'][0]:.3f} (95 % interval {f['model'][1]:.3f} to {f['model'][2]:.3f}); chance 0.5; logistic "
        f"regression on the true variables that an image shows {f['oracle'][0]:.3f} ({f['oracle'][1]:.3f} to "
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


def _told(what: str) -> Any:
    return lambda done: print(f"\r{what}: {done} patients", end="", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), only_measure="--measure" in sys.argv)
