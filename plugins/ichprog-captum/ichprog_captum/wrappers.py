"""Wrap a score and its network for captum, and restore both afterwards."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ichprog.errors import PluginError, UnknownNameError
from ichprog.saliency import ScoreFunction, resolve_layer

_logger = logging.getLogger("ichprog.captum")


class ScoreModule(nn.Module):
    """A score as a module, which captum needs, with the network as a submodule.

    Args:
        score: The score to explain.
        network: The network behind the score.
        on_grids: Called with the number of grids after each pass.
    """

    def __init__(self, score: ScoreFunction, network: nn.Module, on_grids: Callable[[int], object]) -> None:
        super().__init__()
        self.training, self.network, self._score, self._on_grids = network.training, network, score, on_grids

    def forward(self, grids: Tensor) -> Tensor:
        """Return the score `(B,)` of grids `(B, 1, D, H, W)`."""
        scores = self._score(grids)
        self._on_grids(len(grids))
        return scores


@contextmanager
def wrapped(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, passes: int | None = None
) -> Iterator[tuple[ScoreModule, Tensor]]:
    """Give captum a score and a copy of the grid, and leave the network unchanged, also after an error.

    captum removes its own hooks. This function removes the attributes that DeepLift leaves on modules if the score
    raises. In-place modules would spoil DeepLift, so they do not work in place while the block runs.

    Args:
        score: The score to explain.
        grid: The grid to explain.
        network: The network behind the score.
        passes: Number of grids that will pass through the network. It is logged, and a terminal shows a progress bar.
    """
    from tqdm import tqdm

    if passes is not None:
        _logger.info("This map takes %s passes through the network.", passes)
    in_place = [module for module in network.modules() if vars(module).get("inplace")]
    before = [(module, set(vars(module))) for module in network.modules()]
    disable = True if passes is None else None  # None disables the bar unless there is a terminal
    bar = tqdm(total=passes, unit="pass", leave=False, delay=1, disable=disable)
    try:
        for module in in_place:
            vars(module)["inplace"] = False
        with warnings.catch_warnings(), torch.enable_grad():
            for message in ("Setting (forward, )?backward hooks", "Couldn't appropriately interpolate"):
                warnings.filterwarnings("ignore", message)  # hooks are removed, and a failing map is refused
            yield ScoreModule(score, network, bar.update), grid.detach().clone().requires_grad_()
    finally:
        bar.close()
        for module in in_place:
            vars(module)["inplace"] = True
        for module, attributes in before:
            for name in {"input", "output"} & vars(module).keys() - attributes:
                delattr(module, name)


@contextmanager
def faster_threads(run: Callable[[], object], device: torch.device) -> Iterator[None]:
    """Use one thread in the block if that is faster than the number set for torch, and restore the number.

    Threads of OpenMP spin and wait for each other after every operation. If other programs occupy the cores, a pass
    over a small grid spends most of its time waiting. One timed pass each decides. A pass before them warms up.

    Args:
        run: One pass.
        device: Device of the pass. Only a CPU is timed.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield
        return
    try:
        run()
        seconds = {}
        for number in (threads, 1):
            torch.set_num_threads(number)
            start = time.perf_counter()
            run()
            seconds[number] = time.perf_counter() - start
        torch.set_num_threads(min(seconds, key=lambda number: seconds[number]))
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Use a random seed on one device in the block and restore the random state of the caller."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def existing_layer(network: nn.Module, layer: str | None) -> str:
    """Return the full name of a layer.

    Raises:
        UnknownNameError: The network has no such layer.
    """
    name = resolve_layer(network, layer)
    try:
        network.get_submodule(name)
    except AttributeError as error:
        raise UnknownNameError("layer", name, [one for one, _ in network.named_modules() if one]) from error
    return name


@contextmanager
def layer_errors(name: str) -> Iterator[None]:
    """Raise a PluginError that names the layer if the score does not depend on the layer."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        if not any(text in str(error) for text in ("did not obtain any outputs", "appears to not have been used")):
            raise
        raise PluginError(
            f"The score does not depend on layer {name!r}. Choose a layer between the grid and the score."
        ) from error


def require_features(values: Tensor, layer: str) -> Tensor:
    """Return the values of a layer if they are features `(B, C, d, h, w)`, and raise a PluginError otherwise."""
    if values.ndim != 5:
        raise PluginError(f"Layer {layer!r} has no features (B, C, d, h, w). Choose a layer that has.")
    return values


def refuse_functional_relus(method: str, module: ScoreModule, grid: Tensor) -> None:
    """Raise a PluginError if the score has ReLUs that captum cannot see, because they would pass all gradients."""
    seen_by_captum: set[Any] = set()
    handles = [
        relu.register_forward_hook(lambda _module, _inputs, output: seen_by_captum.add(output.grad_fn))
        for relu in module.modules()
        if isinstance(relu, nn.ReLU)
    ]
    try:
        pending = [module(grid).grad_fn]
    finally:
        for handle in handles:
            handle.remove()
    visited: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in visited:
            visited.add(node)
            pending.extend(following for following, _ in node.next_functions)
    relus = {node for node in visited if node.name() == "ReluBackward0"}
    if not relus:
        raise PluginError(f"{method} needs ReLUs between the grid and the score, and this network has none.")
    if unseen := relus - seen_by_captum:
        raise PluginError(
            f"{method} sees only ReLU modules, and {len(unseen)} of {len(relus)} ReLUs between the grid and the score "
            f"are functions. Use ichprog's own {method.removeprefix('captum_')}, which sees all of them."
        )
