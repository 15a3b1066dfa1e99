"""What needs no image: the share of each label, models of a few columns, and a model's answer together with columns.

Each is fitted anew in every fold, on patients that the fold does not test. Columns hold numbers. A blank is the median
of the patients it is fitted to, with one more column that says where it was blank; then all are standardised by the
same patients.
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

Fitted = Callable[[np.ndarray], np.ndarray]  # columns (N, C), blanks NaN, to probabilities of the last label (N,)

_PASSES, _BATCH, _RATE, _DECAY = 200, 128, 1e-3, 1e-3  # of the network; passes are ours, the rest is published


def predict(
    baseline: Baseline,
    cohort: Cohort,
    task: Task,
    parts: "Sequence[Fold]",
    *,
    seed: int = 1,
    image: Mapping[str, TaskPredictions] | None = None,
) -> dict[str, TaskPredictions]:
    """What a baseline says of the validation and test part of each fold.

    All but "fusion" are fitted to the training part. "fusion" is a logistic regression over the log-odds of an image
    model and columns. An image model's answers to those it was trained on are too good, so fusion is fitted to the
    fold's validation part, whom the model has not been trained on; each of that part is then answered by a fit to the
    others of it.

    Args:
        baseline: The baseline.
        cohort: The patients.
        task: What is predicted, a task of two labels.
        parts: The folds.
        seed: Seed of what is random: forest and network.
        image: For "fusion", what the image model says of this task, by split.

    Returns:
        By split, "validation" and "test".

    Raises:
        UnknownNameError: The cohort has not such a column.
        CohortError: A column holds something else than numbers.
        RunError: Fusion is asked for without an image model's answers to all these patients.
    """
    x = np.stack([np.empty(len(cohort)) * np.nan, *map(cohort.numbers, baseline.columns)], axis=1)[:, 1:]
    labels = cohort.labels(task)
    found: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for number, fold in enumerate(parts):
        if baseline.kind == "fusion":
            seen = {split: _log_odds(image, split, number, getattr(fold, split), cohort) for split in SPLITS}
            both = {split: np.column_stack([seen[split], x[getattr(fold, split)]]) for split in SPLITS}
            known = labels[fold.validation]
            found["validation"].append(_each_by_others(both["validation"], known, seed))
            found["test"].append(fit("logistic", both["validation"], known, seed=seed)(both["test"]))
            continue
        says = fit(baseline.kind, x[fold.train], labels[fold.train], seed=seed)
        for split in SPLITS:
            found[split].append(says(x[getattr(fold, split)]))
    return {split: _answers(found[split], split, parts, cohort, labels) for split in SPLITS}


def fit(kind: str, x: np.ndarray, labels: np.ndarray, *, seed: int = 1) -> Fitted:
    """Fits one model.

    Args:
        kind: "majority", "logistic" (L2 penalty of 1 on standardised columns), "tree" (of depth 3 and 5 patients a leaf
            at least), "forest" (500 trees, 5 patients a leaf at least) or "network".
        x: Columns `(N, C)`, blanks NaN.
        labels: `(N,)` 0 or 1; -1 where not known, and then left out.
        seed: Seed of what is random.

    Returns:
        A function of columns `(M, C)` that gives probabilities `(M,)` of label 1. Where one label alone is known, or no
        column is given, it is the share of that label.

    Raises:
        UnknownNameError: There is no such kind.

    Source: the network is that of the tabular model of Cobo et al. 2024, with its optimiser.
    """
    if kind not in _KINDS:
        raise UnknownNameError("kind of baseline", kind, _KINDS)
    known = labels >= 0
    x, y = x[known], labels[known]
    if kind == "majority" or len(np.unique(y)) < 2:
        share = float(y.mean()) if len(y) else 0.5
        return lambda asked: np.full(len(asked), share)
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
    return lambda asked: np.asarray(model.predict_proba(scale.transform(asked))[:, 1], np.float64)


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
    """The probability that a model of two columns gives everywhere between their smallest and largest value.

    Args:
        kind: The kind of `fit`.
        cohort: The patients.
        columns: The column along x and the one along y.
        task: What is predicted, a task of two labels.
        patients: Positions `(n,)` of those it is fitted to, such as a fold's training part.
        size: Points along each.
        seed: Seed of what is random.

    Returns:
        Values of x `(size,)`, of y `(size,)`, and probabilities of the last label `(size, size)`, rows along y.
    """
    values = np.stack([cohort.numbers(column) for column in columns], axis=1)[patients]
    says = fit(kind, values, cohort.labels(task)[patients], seed=seed)
    x, y = (np.linspace(np.nanmin(column), np.nanmax(column), size) for column in values.T)
    points = np.stack(np.meshgrid(x, y), axis=-1)
    return x, y, says(points.reshape(-1, 2)).reshape(size, size)


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


def _network(scale: Any, x: np.ndarray, y: np.ndarray, seed: int) -> Fitted:
    import torch
    from torch import nn

    inputs, target = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1)),
        )
        optimiser = torch.optim.Adam(network.parameters(), lr=_RATE, weight_decay=_DECAY, amsgrad=True)
        with torch.enable_grad():
            for _ in range(_PASSES):
                order = torch.randperm(len(target))
                batches = torch.tensor_split(order, list(range(_BATCH, len(order) - 1, _BATCH)))  # never a batch of one
                for batch in batches:
                    optimiser.zero_grad()
                    loss = nn.functional.binary_cross_entropy_with_logits(network(inputs[batch])[:, 0], target[batch])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
    network.eval()

    def says(asked: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = network(torch.from_numpy(scale.transform(asked)).float())[:, 0]
        return np.asarray(logits.double().sigmoid().numpy())

    return says


def _each_by_others(x: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Each patient's probability by a logistic regression fitted to the others."""
    others = [np.delete(np.arange(len(x)), place) for place in range(len(x))]
    said = [fit("logistic", x[rest], labels[rest], seed=seed)(x[[i]]) for i, rest in enumerate(others)]
    return np.concatenate(said)


def _log_odds(
    image: Mapping[str, TaskPredictions] | None, split: str, fold: int, part: np.ndarray, cohort: Cohort
) -> np.ndarray:
    """An image model's log-odds of the last label, for patients of one part of a fold."""
    if image is None:
        raise RunError("fusion needs an image model's answers to validation and test parts; give them as `image`.")
    said = image[split]
    p = {name: row[1] for name, at, row in zip(said.patients, said.fold, said.probabilities, strict=True) if at == fold}
    names = [cohort.patients[int(place)].name for place in part]
    if absent := [name for name in names if name not in p]:
        raise RunError(
            f"fusion: the image model says nothing of patient {absent[0]} in the {split} part of fold {fold}; its "
            "answers must be of the same folds."
        )
    chance = np.array([p[name] for name in names], np.float64).clip(1e-6, 1 - 1e-6)
    return np.asarray(np.log(chance / (1 - chance)))


def _answers(
    p: Sequence[np.ndarray], split: str, parts: "Sequence[Fold]", cohort: Cohort, labels: np.ndarray
) -> TaskPredictions:
    places = np.concatenate([getattr(fold, split) for fold in parts])
    of = np.concatenate([np.full(len(getattr(fold, split)), number) for number, fold in enumerate(parts)])
    last = np.concatenate(p)
    names = tuple(cohort.patients[int(place)].name for place in places)
    return TaskPredictions(names, of.astype(np.int64), labels[places], np.stack([1 - last, last], axis=1))
