"""Predict with baselines that need no image: label shares, models of a few columns, and fusion with an image model.

Each baseline is fitted in every fold, on patients that the fold does not test. Columns are numeric. A blank is replaced
by the median of the patients that the baseline is fitted to, and an additional column marks the blanks. All columns are
standardised with the same patients.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.cohort import Cohort
from ichprog.errors import RunError, UnknownNameError, missing_extra
from ichprog.evaluation.predictions import SPLITS, TaskPredictions
from ichprog.spec import Task
from ichprog.study.config import Baseline

if TYPE_CHECKING:
    from ichprog.train.folds import Fold

Predictor = Callable[[np.ndarray], np.ndarray]  # columns (N, C), blanks NaN, to probabilities of the last label (N,)

# Training of the network, as published except for the number of epochs.
_EPOCHS, _BATCH_SIZE, _LEARNING_RATE, _WEIGHT_DECAY = 200, 128, 1e-3, 1e-3


def predict(
    baseline: Baseline,
    cohort: Cohort,
    task: Task,
    parts: "Sequence[Fold]",
    *,
    seed: int = 1,
    image: Mapping[str, TaskPredictions] | None = None,
) -> dict[str, TaskPredictions]:
    """Predict the validation and test part of each fold with a baseline.

    Every kind except "fusion" is fitted to the training part. "fusion" is a logistic regression on the log-odds of an
    image model and on columns. An image model is overconfident on its training patients, so fusion is fitted to the
    validation part. Each patient of the validation part is predicted by a fit to the other patients of that part.

    Args:
        baseline: Baseline.
        cohort: Patients.
        task: Task with two labels.
        parts: Folds.
        seed: Random seed of the forest and the network.
        image: Predictions of the image model for this task by split, for "fusion".

    Returns:
        Predictions by split, "validation" and "test".

    Raises:
        UnknownNameError: The cohort lacks a column.
        CohortError: A column is not numeric.
        RunError: "fusion" lacks predictions of the image model for some patients.

    Examples:
        ```python
        baseline = Baseline("age_gcs", "logistic", ("age", "gcs"), None, "prognosis", False)
        predictions = predict(baseline, cohort, task, folds)["test"]
        ```
    """
    x = np.stack([np.empty(len(cohort)) * np.nan, *map(cohort.numbers, baseline.columns)], axis=1)[:, 1:]
    labels = cohort.labels(task)
    probabilities: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for number, fold in enumerate(parts):
        if baseline.kind == "fusion":
            odds = {split: _log_odds(image, split, number, getattr(fold, split), cohort) for split in SPLITS}
            inputs = {split: np.column_stack([odds[split], x[getattr(fold, split)]]) for split in SPLITS}
            truth = labels[fold.validation]
            probabilities["validation"].append(_leave_one_out(inputs["validation"], truth, seed))
            probabilities["test"].append(fit("logistic", inputs["validation"], truth, seed=seed)(inputs["test"]))
            continue
        predictor = fit(baseline.kind, x[fold.train], labels[fold.train], seed=seed)
        for split in SPLITS:
            probabilities[split].append(predictor(x[getattr(fold, split)]))
    return {split: _join_folds(probabilities[split], split, parts, cohort, labels) for split in SPLITS}


def fit(kind: str, x: np.ndarray, labels: np.ndarray, *, seed: int = 1) -> Predictor:
    """Fit a model of columns.

    Args:
        kind: "majority", "logistic" (L2 penalty of 1 on standardised columns), "tree" (depth 3, at least 5 patients in
            each leaf), "forest" (500 trees, at least 5 patients in each leaf) or "network".
        x: Columns `(N, C)`, blanks NaN.
        labels: Labels 0 or 1 `(N,)`. Patients with -1 (unknown) are left out.
        seed: Random seed.

    Returns:
        A function from columns `(M, C)` to probabilities of label 1 `(M,)`. With a single label it returns the share of
        label 1.

    Raises:
        UnknownNameError: There is no such kind.

    Source: the network and its optimiser are those of the tabular model of Cobo et al. 2024.

    Examples:
        >>> fit("majority", np.zeros((4, 1)), np.array([0, 1, 1, 1]))(np.zeros((1, 1))).tolist()
        [0.75]
    """
    if kind not in _KINDS:
        raise UnknownNameError("baseline kind", kind, _KINDS)
    known = labels >= 0
    x, y = x[known], labels[known]
    if kind == "majority" or len(np.unique(y)) < 2:
        share = float(y.mean()) if len(y) else 0.5
        return lambda columns: np.full(len(columns), share)
    try:
        from sklearn.impute import SimpleImputer
    except ImportError as error:
        raise missing_extra("study", "scikit-learn", "Fitting a baseline") from error
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    blanks = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    scale = make_pipeline(blanks, StandardScaler()).fit(x)
    if kind == "network":
        return _network(scale, scale.transform(x), y, seed)
    model = _estimator(kind, seed).fit(scale.transform(x), y)
    return lambda columns: np.asarray(model.predict_proba(scale.transform(columns))[:, 1], np.float64)


def decision_surface(
    kind: str,
    cohort: Cohort,
    columns: tuple[str, str],
    task: Task,
    patients: np.ndarray,
    *,
    size: int = 200,
    seed: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the probabilities of a model of two columns between their smallest and largest values.

    Args:
        kind: Kind of model, as in `fit`.
        cohort: Patients.
        columns: Column along x and column along y.
        task: Task with two labels.
        patients: Indices of the patients `(n,)` that the model is fitted to, such as a training part.
        size: Number of points along each axis.
        seed: Random seed.

    Returns:
        x `(size,)`, y `(size,)`, and probabilities of the last label `(size, size)` with rows along y.
    """
    values = np.stack([cohort.numbers(column) for column in columns], axis=1)[patients]
    predictor = fit(kind, values, cohort.labels(task)[patients], seed=seed)
    x, y = (np.linspace(np.nanmin(column), np.nanmax(column), size) for column in values.T)
    points = np.stack(np.meshgrid(x, y), axis=-1)
    return x, y, predictor(points.reshape(-1, 2)).reshape(size, size)


def _estimator(kind: str, seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.tree import DecisionTreeClassifier

    if kind == "logistic":
        return LogisticRegression(max_iter=1000)
    if kind == "tree":
        return DecisionTreeClassifier(max_depth=3, min_samples_leaf=5, random_state=seed)
    return RandomForestClassifier(500, min_samples_leaf=5, random_state=seed)


_KINDS = ("majority", "logistic", "tree", "forest", "network")


def _network(scale: Any, x: np.ndarray, y: np.ndarray, seed: int) -> Predictor:
    """Train the network of the published tabular model."""
    import torch
    from torch import nn

    inputs, target = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1)),
        )
        optimiser = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, amsgrad=True)
        with torch.enable_grad():
            for _ in range(_EPOCHS):
                order = torch.randperm(len(target))
                # The last batch takes one more patient if a batch of one would remain: BatchNorm needs two.
                batches = torch.tensor_split(order, list(range(_BATCH_SIZE, len(order) - 1, _BATCH_SIZE)))
                for batch in batches:
                    optimiser.zero_grad()
                    loss = nn.functional.binary_cross_entropy_with_logits(network(inputs[batch])[:, 0], target[batch])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
    network.eval()

    def predict_columns(columns: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = network(torch.from_numpy(scale.transform(columns)).float())[:, 0]
        return np.asarray(logits.double().sigmoid().numpy())

    return predict_columns


def _leave_one_out(x: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Predict each patient with a logistic regression fitted to the other patients."""
    others = [np.delete(np.arange(len(x)), index) for index in range(len(x))]
    return np.concatenate([fit("logistic", x[rest], labels[rest], seed=seed)(x[[i]]) for i, rest in enumerate(others)])


def _log_odds(
    image: Mapping[str, TaskPredictions] | None, split: str, fold: int, part: np.ndarray, cohort: Cohort
) -> np.ndarray:
    """Return an image model's log-odds of the last label for the patients of one part of a fold."""
    if image is None:
        raise RunError("fusion needs the image model's predictions of validation and test parts. Give them as `image`.")
    rows = zip(image[split].patients, image[split].fold, image[split].probabilities, strict=True)
    probability_of = {name: row[1] for name, row_fold, row in rows if row_fold == fold}
    names = [cohort.patients[int(index)].name for index in part]
    if missing := [name for name in names if name not in probability_of]:
        raise RunError(
            f"fusion: the image model has no prediction of patient {missing[0]} in the {split} part of fold {fold}. "
            "Use predictions of the same folds."
        )
    p = np.array([probability_of[name] for name in names], np.float64).clip(1e-6, 1 - 1e-6)
    return np.asarray(np.log(p / (1 - p)))


def _join_folds(
    p: Sequence[np.ndarray], split: str, parts: "Sequence[Fold]", cohort: Cohort, labels: np.ndarray
) -> TaskPredictions:
    indices = np.concatenate([getattr(fold, split) for fold in parts])
    folds = np.concatenate([np.full(len(getattr(fold, split)), number) for number, fold in enumerate(parts)])
    last = np.concatenate(p)
    names = tuple(cohort.patients[int(index)].name for index in indices)
    return TaskPredictions(names, folds.astype(np.int64), labels[indices], np.stack([1 - last, last], axis=1))
