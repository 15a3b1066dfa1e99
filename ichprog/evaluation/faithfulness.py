"""Faithfulness of saliency maps: tests that need no lesion mask.

`deletion_insertion` replaces the cells that a map calls important and measures the probability.
`parameter_randomisation` replaces the network's weights and measures the map.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ichprog import hub, preprocessing
from ichprog.errors import InvalidValueError, UnknownNameError
from ichprog.model import Model, explain, load_model
from ichprog.results import Saliency
from ichprog.runtime import resolve_runtime
from ichprog.spec import InputSpec

if TYPE_CHECKING:
    from torch import nn

    from ichprog.scan.brain import Brain
    from ichprog.sources import ScanSource

Baseline = Literal["zero", "blurred"]

RANDOM = "random order"  # name of the random order, used like the name of a method
_BLUR = 0.03  # standard deviation of "blurred" as a share of the grid's extent: about 6 mm of a head


@dataclass(frozen=True, eq=False)
class DeletionInsertion:
    """The probability of the explained label while the most important cells are deleted or inserted.

    Attributes:
        shares: Share of the cells replaced `(S + 1,)`, from 0 to 1.
        deletion: Probability `(S + 1,)` from the whole grid to the baseline.
        insertion: Probability `(S + 1,)` from the baseline to the whole grid.
    """

    shares: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray

    @property
    def deletion_area(self) -> float:
        """Return the area under `deletion`; lower is better."""
        return float(np.trapezoid(self.deletion, self.shares))

    @property
    def insertion_area(self) -> float:
        """Return the area under `insertion`; higher is better."""
        return float(np.trapezoid(self.insertion, self.shares))


def deletion_insertion(
    model: Model | str,
    scan: "ScanSource",
    maps: Saliency | Mapping[tuple[str, str], Saliency],
    *,
    steps: int = 20,
    baseline: Baseline = "zero",
    brain: "Brain" = "auto",
    seed: int = 0,
) -> dict[tuple[str, str], DeletionInsertion]:
    """Compute the deletion and insertion curves of saliency maps of one scan.

    Cells of the grid are replaced in the order of the map, the highest first and ties at random. Cells that equal the
    baseline, such as those around the brain, are not replaced. Source: Petsiuk et al., "RISE", BMVC 2018
    (arXiv 1806.07421).

    Args:
        model: The explained model, or its name. Several folds give their mean probability.
        scan: The explained scan.
        maps: The result of `explain`.
        steps: Number of steps.
        baseline: Replacement of the cells: "zero", or "blurred", the grid after a Gaussian of 3 % of its extent.
        brain: As in `explain`.
        seed: Random seed of the random order.

    Returns:
        Curves by (task, method), and by (task, `RANDOM`) for a random order of the same cells.

    Raises:
        UnknownNameError: No baseline has this name.
        InvalidValueError: `steps` is less than 1.
        ScanError: The scan cannot be read, or the model cannot process it.

    Examples:
        ```python
        maps = ichprog.explain(model, "scan.nii.gz", method=["grad_cam"])
        curves = deletion_insertion(model, "scan.nii.gz", maps)
        print(curves["prognosis", "grad_cam"].deletion_area, curves["prognosis", RANDOM].deletion_area)
        ```
    """
    if steps < 1:
        raise InvalidValueError("steps", steps, "1 or more, usually 20")
    loaded = load_model(model) if isinstance(model, str) else model
    contract = loaded.spec.input
    whole = preprocessing.prepare(loaded.load_scan(scan, brain=brain).hu, contract)
    replacement = _replacement(whole, baseline)
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(whole != replacement))
    shares = np.linspace(0, 1, steps + 1)
    curves: dict[tuple[str, str], DeletionInsertion] = {}
    for each in [maps] if isinstance(maps, Saliency) else maps.values():
        probability = _probability(loaded, each.task, each.label)
        values = _resample_to_grid(each.grid_map, contract).ravel()[shuffled]
        orders = {RANDOM: shuffled, each.method: shuffled[np.argsort(-values, kind="stable")]}
        for method, order in orders.items():
            if (each.task, method) not in curves:
                deletion = _replace_cells(probability, whole, replacement, order, shares)
                insertion = _replace_cells(probability, replacement, whole, order, shares)
                curves[each.task, method] = DeletionInsertion(shares, deletion, insertion)
    return curves


def _probability(model: Model, task: str, label: str) -> Callable[[np.ndarray], float]:
    """Return a function from a grid `(D, H, W)` to the probability of a label, the mean over folds."""
    index = model.spec.task(task).labels.index(label)

    def probability(grid: np.ndarray) -> float:
        folds = model.predict_grids(grid[None])
        return float(np.mean([fold[task].probabilities[0, index] for fold in folds], dtype=np.float64))

    return probability


def _replace_cells(
    probability: Callable[[np.ndarray], float],
    start: np.ndarray,
    end: np.ndarray,
    order: np.ndarray,
    shares: np.ndarray,
) -> np.ndarray:
    """Return the probability after each step from one grid to another, cell by cell in an order."""
    grid = start.copy()
    values, done = [probability(grid)], 0
    for stop in np.rint(shares[1:] * len(order)).astype(int):
        grid.flat[order[done:stop]] = end.flat[order[done:stop]]
        values.append(probability(grid))
        done = stop
    return np.array(values)


def _replacement(grid: np.ndarray, baseline: Baseline) -> np.ndarray:
    if baseline not in get_args(Baseline):
        raise UnknownNameError("baseline", baseline, get_args(Baseline))
    if baseline == "zero":
        return np.zeros_like(grid)
    from scipy.ndimage import gaussian_filter

    blurred: np.ndarray = gaussian_filter(grid, [_BLUR * n for n in grid.shape])
    return blurred


def _resample_to_grid(values: np.ndarray, contract: InputSpec) -> np.ndarray:
    """Return a map in the resolution of the grid `(D, H, W)`."""
    return preprocessing.to_scan(values, contract.shape[::-1], contract).transpose(2, 1, 0)


@dataclass(frozen=True)
class RandomisationStage:
    """Similarity of the trained network's map to the maps of networks with random weights in the last layers.

    Each similarity is the mean over the seeds of the random weights for which it is defined, with the standard
    deviation over these seeds.

    Attributes:
        down_to: The module with random weights that is nearest to the input.
        layers: Number of modules with random weights.
        pearson: Pearson's correlation of the maps in the brain; None if a map is constant with every seed.
        spearman: Spearman's rank correlation of the maps.
        spearman_absolute: Spearman's rank correlation of the absolute values, which a change of sign leaves equal.
        pearson_sd: Standard deviation of `pearson`; None if it is defined for fewer than two seeds.
        spearman_sd: Standard deviation of `spearman`.
        spearman_absolute_sd: Standard deviation of `spearman_absolute`.
        seeds: Number of seeds for which the correlations are defined.
    """

    down_to: str
    layers: int
    pearson: float | None
    spearman: float | None
    spearman_absolute: float | None
    pearson_sd: float | None = None
    spearman_sd: float | None = None
    spearman_absolute_sd: float | None = None
    seeds: int = 1


def parameter_randomisation(
    model: Model | str,
    scan: "ScanSource",
    *,
    task: str | Sequence[str] | None = None,
    label: str | Mapping[str, str] | None = None,
    method: str | Sequence[str] = "guided_backprop",
    stages: int = 5,
    brain: "Brain" = "auto",
    seeds: Sequence[int] = (0, 1, 2),
    **options: Any,
) -> dict[tuple[str, str], tuple[RandomisationStage, ...]]:
    """Test whether saliency maps depend on the network's weights.

    Weights become random from the heads towards the input, at last all weights. Random weights are normal with mean 0
    and the root mean square of the trained tensor, so that activations keep their size. Running means and variances of
    normalisation stay. A map that does not change does not explain the network. Source: Adebayo et al., "Sanity checks
    for saliency maps", NeurIPS 2018 (arXiv 1810.03292), cascading randomisation.

    Args:
        model: A model, or a name that `load_model` takes. The model is not changed. Of several folds the first is
            tested.
        scan: One scan, as in `explain`.
        task: As in `explain`.
        label: As in `explain`.
        method: As in `explain`.
        stages: Number of steps in which the backbone's layers become random, after the heads.
        brain: As in `explain`.
        seeds: Random seeds of the weights, each once.
        **options: Options of the methods.

    Returns:
        By (task, method) a stage for the heads and for each further step.

    Raises:
        InvalidValueError: There is no seed, or a seed is given twice.
        UnknownNameError: No task, label, method or option has this name.
        ScanError: The scan cannot be read, or the model cannot process it.
        PluginError: A method does not apply to the network.

    Examples:
        ```python
        stages = parameter_randomisation("compact.prognosis_gcs3_age", "scan.nii.gz", method="grad_cam")
        print([stage.spearman for stage in stages["prognosis", "grad_cam"]])
        ```
    """
    import torch

    if not seeds or len(set(seeds)) != len(seeds):
        raise InvalidValueError("seeds", list(seeds), "one or more different numbers, such as 0, 1, 2")
    loaded = load_model(model) if isinstance(model, str) else model
    methods = [method] if isinstance(method, str) else list(method)
    config = resolve_runtime("torch", loaded.device, "float32")
    with torch.random.fork_rng(devices=[]):
        copy = Model.build(loaded.spec, loaded.weights[:1], config, hub.cache_folder())  # its weights may change
    network = copy.torch_module()
    loaded_scan = copy.load_scan(scan, brain=brain)
    inside = preprocessing.prepare(loaded_scan.hu, copy.spec.input) > 0

    def compute_maps() -> dict[tuple[str, str], np.ndarray]:
        maps = explain(copy, loaded_scan, task=task, label=label, method=methods, **options)
        return {key: _resample_to_grid(each.grid_map, copy.spec.input)[inside] for key, each in maps.items()}

    trained, weights = compute_maps(), {name: values.clone() for name, values in network.state_dict().items()}
    groups = _cascade(network, stages)
    similarities: dict[tuple[str, str], list[list[_Similarity]]] = {key: [[] for _ in groups] for key in trained}
    for seed in seeds:
        network.load_state_dict(weights)
        random = torch.Generator().manual_seed(seed)
        for number, group in enumerate(groups):
            for module in group:
                _randomise(network.get_submodule(module), random)
            for key, values in compute_maps().items():
                similarities[key][number].append(_similarity(trained[key], values))
    layers = np.cumsum([len(group) for group in groups]).tolist()
    return {
        key: tuple(map(_average_seeds, (group[-1] for group in groups), layers, each))
        for key, each in similarities.items()
    }


def _average_seeds(down_to: str, layers: int, similarities: "Sequence[_Similarity]") -> RandomisationStage:
    """Return the mean and the standard deviation over seeds of each correlation that is defined."""
    columns = [[value for value in column if value is not None] for column in zip(*similarities, strict=True)]
    means = [float(np.mean(column)) if column else None for column in columns]
    spreads = [float(np.std(column, ddof=1)) if len(column) > 1 else None for column in columns]
    return RandomisationStage(
        down_to, layers, means[0], means[1], means[2], spreads[0], spreads[1], spreads[2], len(columns[0])
    )


def _cascade(network: "nn.Module", stages: int) -> list[list[str]]:
    """Return the names of modules with weights: those of the heads, then the backbone's from its end in steps."""
    names = [name for name, module in network.named_modules() if any(True for _ in module.parameters(recurse=False))]
    heads = [name for name in names if name.startswith("heads.")]
    backbone = [name for name in reversed(names) if not name.startswith("heads.")]
    steps = np.array_split(np.arange(len(backbone)), min(stages, len(backbone))) if backbone else []
    return [heads, *([backbone[index] for index in step] for step in steps)]


def _randomise(module: "nn.Module", random: Any) -> None:
    import torch

    with torch.no_grad():
        for values in module.parameters(recurse=False):
            drawn = torch.randn(values.shape, generator=random).to(values)
            values.copy_(drawn * values.square().mean().sqrt())


_Similarity = tuple[float | None, float | None, float | None]


def _similarity(first: np.ndarray, second: np.ndarray) -> _Similarity:
    """Return Pearson's and Spearman's correlation, and Spearman's of the absolute values."""
    from scipy.stats import rankdata

    ranks = (rankdata(first), rankdata(second)), (rankdata(np.abs(first)), rankdata(np.abs(second)))
    pearson, spearman, absolute = (_correlation(*pair) for pair in ((first, second), *ranks))
    return pearson, spearman, absolute


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    pair = [values.astype(np.float64) for values in (first, second)]
    if any(values.size < 2 or np.ptp(values) == 0 for values in pair):
        return None
    a, b = ((values - values.mean()) / np.abs(values - values.mean()).max() for values in pair)
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))
