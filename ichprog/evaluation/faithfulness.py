"""Whether saliency maps are true to the network, which needs no mask of any lesion.

`curves` takes away and gives back what a map calls important, and watches the answer. `randomised` takes the network's
weights away, and watches the map.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ichprog import hub, preprocessing
from ichprog.errors import RunError, UnknownNameError
from ichprog.model import Model, explain, load_model
from ichprog.results import Saliency
from ichprog.runtime import resolve_runtime
from ichprog.scan import BrainMode
from ichprog.spec import InputSpec

if TYPE_CHECKING:
    from torch import nn

    from ichprog.sources import ScanSource

    Maps = dict[tuple[str, str], Saliency]

Baseline = Literal["zero", "blurred"]

RANDOM = "random order"  # in the place of a method, what chance would give
_BLUR = 0.03  # standard deviation of "blurred", as a share of the grid's extent: about 6 mm of a head


@dataclass(frozen=True, eq=False)
class Curves:
    """The probability of the explained label while a map's most important cells are taken away, or given back.

    Attributes:
        shares: `(S + 1,)` share of the cells done, from 0 to 1.
        deletion: `(S + 1,)` from the whole grid to the baseline.
        insertion: `(S + 1,)` from the baseline to the whole grid.
    """

    shares: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray

    @property
    def deletion_area(self) -> float:
        """The area under `deletion`; low where the answer falls soon."""
        return float(np.trapezoid(self.deletion, self.shares))

    @property
    def insertion_area(self) -> float:
        """The area under `insertion`; high where the answer comes back soon."""
        return float(np.trapezoid(self.insertion, self.shares))


def curves(
    model: Model | str,
    scan: "ScanSource",
    maps: Saliency | Mapping[tuple[str, str], Saliency],
    *,
    steps: int = 20,
    baseline: Baseline = "zero",
    brain: BrainMode = "auto",
    seed: int = 0,
) -> dict[tuple[str, str], Curves]:
    """Insertion and deletion curves of one scan: is what a map calls important what the answer comes from.

    The grid's cells are replaced in the order of the map, the highest first, ties at random. Only cells that differ
    from the baseline take part, so that what lies around the brain counts for nothing.

    Args:
        model: The model whose maps they are, or its name; with several folds, their mean probability is watched.
        scan: The scan that was explained.
        maps: What `explain` gives.
        steps: How many times cells are replaced.
        baseline: What replaces them: "zero", or "blurred", the grid itself after a Gaussian of 3 % of its extent.
        brain: As it was explained.
        seed: Seed of the random order.

    Returns:
        By (task, method) as the maps, and by (task, `RANDOM`) for a random order of the same cells.

    Raises:
        UnknownNameError: There is no such baseline.
        RunError: There is no step.
        ScanError: The scan cannot be read or is none that the model can be asked about.

    Source: Petsiuk et al., "RISE", BMVC 2018 (arXiv 1806.07421).
    """
    if steps < 1:
        raise RunError(f"curves take 1 step or more, not {steps}; 20 are usual.")
    loaded = load_model(model) if isinstance(model, str) else model
    contract = loaded.spec.input
    whole = preprocessing.prepare(loaded.load_scan(scan, brain=brain).hu, contract)
    nothing = _baseline(whole, baseline)
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(whole != nothing))
    shares = np.linspace(0, 1, steps + 1)
    result: dict[tuple[str, str], Curves] = {}
    for each in [maps] if isinstance(maps, Saliency) else maps.values():
        answer = _probability(loaded, each.task, each.label)
        values = _on_grid(each.grid_map, contract).ravel()[shuffled]
        orders = {RANDOM: shuffled, each.method: shuffled[np.argsort(-values, kind="stable")]}
        for method, order in orders.items():
            if (each.task, method) not in result:
                ends = (whole, nothing), (nothing, whole)
                result[each.task, method] = Curves(shares, *(_replaced(answer, *pair, order, shares) for pair in ends))
    return result


def _probability(model: Model, task: str, label: str) -> Callable[[np.ndarray], float]:
    """The probability of a label from a grid `(D, H, W)`, the mean over folds."""
    at = model.spec.task(task).labels.index(label)

    def answer(cells: np.ndarray) -> float:
        return float(
            np.mean([fold[task].probabilities[0, at] for fold in model.predict_grids(cells[None])], dtype=np.float64)
        )

    return answer


def _replaced(
    answer: Callable[[np.ndarray], float], start: np.ndarray, end: np.ndarray, order: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """The answers while one grid becomes another, cell by cell in an order."""
    now = start.copy()
    values, done = [answer(now)], 0
    for upto in np.rint(shares[1:] * len(order)).astype(int):
        now.flat[order[done:upto]] = end.flat[order[done:upto]]
        values.append(answer(now))
        done = upto
    return np.array(values)


def _baseline(whole: np.ndarray, baseline: Baseline) -> np.ndarray:
    if baseline not in get_args(Baseline):
        raise UnknownNameError("baseline", baseline, get_args(Baseline))
    if baseline == "zero":
        return np.zeros_like(whole)
    from scipy.ndimage import gaussian_filter

    blurred: np.ndarray = gaussian_filter(whole, [_BLUR * n for n in whole.shape])
    return blurred


def _on_grid(values: np.ndarray, contract: InputSpec) -> np.ndarray:
    """A map as fine as the grid, `(D, H, W)`."""
    return preprocessing.to_scan(values, contract.shape[::-1], contract).transpose(2, 1, 0)


@dataclass(frozen=True)
class Stage:
    """How like the trained network's map one is that comes from a network with random weights in its last layers.

    Attributes:
        down_to: The module nearest to the input whose weights are random.
        layers: How many modules' weights are.
        pearson: Correlation of the maps in the brain; None where either is the same everywhere.
        spearman: Correlation of their ranks.
        spearman_absolute: Correlation of the ranks of their absolute values, which exchanged signs leave as it is.
    """

    down_to: str
    layers: int
    pearson: float | None
    spearman: float | None
    spearman_absolute: float | None


def randomised(
    model: Model | str,
    scan: "ScanSource",
    *,
    task: str | Sequence[str] | None = None,
    label: str | Mapping[str, str] | None = None,
    method: str | Sequence[str] = "guided_backprop",
    stages: int = 5,
    brain: BrainMode = "auto",
    seed: int = 0,
    **options: Any,
) -> dict[tuple[str, str], tuple[Stage, ...]]:
    """The model-randomisation check: does a method look at the network's weights at all.

    Weights are made random from the heads down, at last all of them: normally distributed about 0, with the root mean
    square that each tensor had, so that what flows through the network keeps its size. Running means and variances of
    normalisation stay. A map that stays the same while the weights go does not explain the network.

    Args:
        model: A model, or a name that `load_model` takes; it is left as it is. Of several folds the first is checked.
        scan: One scan, as `predict` takes it.
        task: As in `explain`.
        label: As in `explain`.
        method: As in `explain`.
        stages: In how many steps the backbone's layers lose their weights, after the heads.
        brain: As in `predict`.
        seed: Seed of the random weights.
        **options: Options of the methods.

    Returns:
        By (task, method), a Stage for the heads and for each step further down.

    Raises:
        UnknownNameError: There is no such task, label, method or option.
        ScanError: The scan cannot be read or is none that the model can be asked about.
        PluginError: A method does not apply to the network.

    Source: Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018 (arXiv 1810.03292), cascading.
    """
    import torch

    loaded = load_model(model) if isinstance(model, str) else model
    methods = [method] if isinstance(method, str) else list(method)
    choice = resolve_runtime("torch", loaded.device, "float32")
    with torch.random.fork_rng(devices=[]):
        own = Model.build(loaded.spec, loaded.weights[:1], choice, hub.cache_folder())  # a copy that may be changed
    network = own.torch_module()
    examined = own.load_scan(scan, brain=brain)
    inside = preprocessing.prepare(examined.hu, own.spec.input) > 0

    def maps() -> dict[tuple[str, str], np.ndarray]:
        found = explain(own, examined, task=task, label=label, method=methods, **options)
        return {key: _on_grid(each.grid_map, own.spec.input)[inside] for key, each in found.items()}

    trained = maps()
    random = torch.Generator().manual_seed(seed)
    result: dict[tuple[str, str], list[Stage]] = {key: [] for key in trained}
    done = 0
    for group in _cascade(network, stages):
        for module in group:
            _randomise(network.get_submodule(module), random)
        done += len(group)
        for key, values in maps().items():
            result[key].append(Stage(group[-1], done, *_likeness(trained[key], values)))
    return {key: tuple(each) for key, each in result.items()}


def _cascade(network: "nn.Module", stages: int) -> list[list[str]]:
    """The modules that have weights of their own by name: those of the heads, then the backbone's from its end."""
    names = [name for name, module in network.named_modules() if any(True for _ in module.parameters(recurse=False))]
    heads = [name for name in names if name.startswith("heads.")]
    backbone = [name for name in reversed(names) if not name.startswith("heads.")]
    steps = np.array_split(np.arange(len(backbone)), min(stages, len(backbone))) if backbone else []
    return [heads, *([backbone[at] for at in step] for step in steps)]


def _randomise(module: "nn.Module", random: Any) -> None:
    import torch

    with torch.no_grad():
        for values in module.parameters(recurse=False):
            drawn = torch.randn(values.shape, generator=random).to(values)
            values.copy_(drawn * values.square().mean().sqrt())


def _likeness(first: np.ndarray, second: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Pearson's and Spearman's correlation, and Spearman's of the absolute values."""
    from scipy.stats import rankdata

    ranks = (rankdata(first), rankdata(second)), (rankdata(np.abs(first)), rankdata(np.abs(second)))
    pearson, spearman, absolute = (_correlation(*pair) for pair in ((first, second), *ranks))
    return pearson, spearman, absolute


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    parts = [values.astype(np.float64) for values in (first, second)]
    if any(values.size < 2 or np.ptp(values) == 0 for values in parts):
        return None
    a, b = ((values - values.mean()) / np.abs(values - values.mean()).max() for values in parts)
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))
