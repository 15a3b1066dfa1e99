"""How captum borrows a score and the network behind it, and how they come back as they were."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ichprog.errors import PluginError, UnknownNameError
from ichprog.saliency import ScoreFunction, resolve_layer


class Scored(nn.Module):
    """A score as the module that captum asks for, with the network inside it."""

    def __init__(self, score: ScoreFunction, network: nn.Module, told: Callable[[int], object]) -> None:
        super().__init__()
        self.training, self.network, self._score, self._told = network.training, network, score, told

    def forward(self, grids: Tensor) -> Tensor:
        """The score `(B,)` of grids `(B, 1, D, H, W)`."""
        scores = self._score(grids)
        self._told(len(grids))
        return scores


@contextmanager
def lent(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, passes: int | None = None
) -> Iterator[tuple[Scored, Tensor]]:
    """A score and a copy of the grid for captum, which leaves nothing on the network, whatever happens.

    captum takes its hooks back itself. What DeepLift keeps on modules beside them stays where the score raises, and
    modules that work in place would spoil it, so they do not while the block runs.

    Args:
        score: The score to explain.
        grid: The grid to explain.
        network: The network behind the score.
        passes: How many grids will go through the network, where a terminal is to show how far they are.
    """
    from tqdm import tqdm

    in_place = [module for module in network.modules() if vars(module).get("inplace")]
    before = [(module, set(vars(module))) for module in network.modules()]
    silent = True if passes is None else None  # None: where there is no terminal
    bar = tqdm(total=passes, unit="pass", leave=False, delay=1, disable=silent)
    try:
        for module in in_place:
            vars(module)["inplace"] = False
        with warnings.catch_warnings(), torch.enable_grad():
            for known in ("Setting (forward, )?backward hooks", "Couldn't appropriately interpolate"):
                warnings.filterwarnings("ignore", known)  # hooks are taken back, and a map that fails is refused
            yield Scored(score, network, bar.update), grid.detach().clone().requires_grad_()
    finally:
        bar.close()
        for module in in_place:
            vars(module)["inplace"] = True
        for module, attributes in before:
            for name in {"input", "output"} & vars(module).keys() - attributes:
                delattr(module, name)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a seed on one device, and the caller's own afterwards; other devices notice nothing."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def layer_of(network: nn.Module, layer: str | None) -> str:
    """A layer's name from the network down."""
    name = resolve_layer(network, layer)
    try:
        network.get_submodule(name)
    except AttributeError as error:
        raise UnknownNameError("layer", name, [one for one, _ in network.named_modules() if one]) from error
    return name


@contextmanager
def at_layer(name: str) -> Iterator[None]:
    """Tells a layer that the score does not come through as what it is."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        if not any(said in str(error) for said in ("did not obtain any outputs", "appears to not have been used")):
            raise
        raise PluginError(f"the score does not depend on layer {name!r}; take one between grid and score.") from error


def features_of(found: Tensor, layer: str) -> Tensor:
    """What was found at a layer, where that has features `(B, C, d, h, w)`."""
    if found.ndim != 5:
        raise PluginError(f"layer {layer!r} gives no features (B, C, d, h, w); take one that does.")
    return found


def refuse_functional_relus(method: str, scored: Scored, grid: Tensor) -> None:
    """Refuses ReLUs that captum would not find, which would let all gradients through."""
    modules: set[Any] = set()
    handles = [
        module.register_forward_hook(lambda _module, _given, output: modules.add(output.grad_fn))
        for module in scored.modules()
        if isinstance(module, nn.ReLU)
    ]
    try:
        waiting = [scored(grid).grad_fn]
    finally:
        for handle in handles:
            handle.remove()
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    relus = {node for node in seen if node.name() == "ReluBackward0"}
    if not relus:
        raise PluginError(f"{method} needs ReLUs between grid and score, and this network has none.")
    if relus - modules:
        raise PluginError(
            f"{method} knows ReLUs that are modules only, and {len(relus - modules)} of {len(relus)} between grid and "
            f"score are not; take ichprog's own {method.removeprefix('captum_')}, which finds all."
        )
