"""The built-in saliency methods.

A saliency plugin is a function `attribute(score, grid, network, **options)` that returns a signed, unscaled map of
what in the grid speaks for the score:

- `score` is a function, a grid `(B, 1, D, H, W)` to one number each, `(B,)`;
- `grid` is `(1, 1, D, H, W)` and requires a gradient;
- `network` is the module behind the score, with `cam_layer` the name of its layer for class activation maps;
- the map is `(D, H, W)`, or coarser where the method's resolution is.

A method leaves the network as it found it, whatever happens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ichprog.errors import PluginError, UnknownName

ScoreFunction = Callable[[Tensor], Tensor]


class ForwardPass:
    """One forward pass of a network, kept so that several tasks and methods can be explained from it.

    Args:
        network: The network, its parameters fixed.
        grid: `(1, 1, D, H, W)`, requiring a gradient.
        layers: Names of the layers whose outputs are kept.

    Raises:
        UnknownName: The network has no such layer.
    """

    def __init__(self, network: nn.Module, grid: Tensor, layers: Iterable[str]) -> None:
        self.network, self.grid = network, grid
        with _kept_outputs(network, layers) as self.outputs:
            self.logits: dict[str, Tensor] = network(grid)

    def score(self, pick: Callable[[dict[str, Tensor]], Tensor]) -> "Score":
        """A score as a function of the grid.

        Args:
            pick: The network's logits to the score `(B,)`.
        """
        return Score(self, pick)


class Score:
    """A scalar of a network's answer; called, it runs the network, and for one grid it has been run already."""

    def __init__(self, known: ForwardPass, pick: Callable[[dict[str, Tensor]], Tensor]) -> None:
        self.known, self._pick = known, pick

    def __call__(self, grid: Tensor) -> Tensor:
        """The score `(B,)` of a grid `(B, 1, D, H, W)`, from a forward pass of its own."""
        return self._pick(self.known.network(grid))

    def of_known_pass(self) -> Tensor:
        """The score of the grid to explain, from the forward pass that is shared."""
        return self._pick(self.known.logits)


def guided_backprop(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Tensor:
    """The gradient of the score by the grid, with only positive gradients let through each ReLU; `(D, H, W)`.

    Raises:
        PluginError: There is no ReLU between the grid and the score, so the method does not apply.

    Source: Springenberg et al., 2015 (arXiv 1412.6806).
    """
    value, _ = _evaluate(score, grid, network, [])
    with _guided_relus(value):
        return _gradient(value, grid)[0, 0]


def grad_cam(score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None) -> Tensor:
    """A layer's channels weighted by the mean gradient of the score by each; `(d, h, w)` of that layer.

    Signed: the ReLU of the paper is left to whoever draws the map.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, from the network or its backbone down; the backbone's own choice where not given.

    Raises:
        UnknownName: The network has no such layer.
        PluginError: The layer's output is not `(B, C, d, h, w)`, or the score does not depend on it.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    name = layer_name(network, layer)
    value, outputs = _evaluate(score, grid, network, [name])
    features = outputs[name]
    if features.ndim != 5:
        raise PluginError(
            f"layer {name!r} gives shape {tuple(features.shape)}; Grad-CAM needs features (B, C, d, h, w)."
        )
    gradient = _gradient(value, features)
    return (gradient.mean((2, 3, 4), keepdim=True) * features).sum(1)[0]


def guided_grad_cam(score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None) -> Tensor:
    """Guided backpropagation where Grad-CAM is positive: their product, `(D, H, W)`.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of Grad-CAM's layer, as there.

    Raises:
        UnknownName: The network has no such layer.
        PluginError: As for either of the two.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    coarse = grad_cam(score, grid, network, layer=layer).clamp(min=0)
    upsampled = functional.interpolate(coarse[None, None], grid.shape[2:], mode="trilinear", align_corners=False)
    return guided_backprop(score, grid, network) * upsampled[0, 0]


def _evaluate(
    score: ScoreFunction, grid: Tensor, network: nn.Module, layers: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The score of the grid and the outputs of layers, from the shared pass where it has them."""
    if isinstance(score, Score) and grid is score.known.grid and set(layers) <= score.known.outputs.keys():
        return score.of_known_pass(), score.known.outputs
    with _kept_outputs(network, layers) as outputs:
        return score(grid), outputs


def layer_name(network: nn.Module, layer: str | None) -> str:
    """A layer's name from the network down.

    Args:
        network: The network.
        layer: A name from the network or from its backbone down; the backbone's `cam_layer` where not given.
    """
    if layer is None:
        return str(network.cam_layer)
    return f"backbone.{layer}" if _has(network, f"backbone.{layer}") else layer


def _has(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


@contextmanager
def _kept_outputs(network: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keeps what layers put out while the block runs."""
    outputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., Tensor]:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            outputs[name] = output
            return output.clone()  # what follows may work in place, and must not on what is kept

        return keep

    with ExitStack() as hooks:
        for name in set(layers):
            if not _has(network, name):
                raise UnknownName("layer", name, [n for n, _ in network.named_modules() if n])
            hooks.callback(network.get_submodule(name).register_forward_hook(keeper(name)).remove)
        yield outputs


@contextmanager
def _guided_relus(value: Tensor) -> Iterator[None]:
    """Lets only positive gradients into every ReLU between the value and its leaves, while the block runs.

    The rule is laid on the nodes of the value's own graph, not on the network: functional and in-place ReLUs are found
    like any other, and nothing is left to undo on a module.
    """
    relus, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "ReluBackward0":
            relus.append(node)
        waiting.extend(following for following, _ in node.next_functions)
    if not relus:
        raise PluginError(
            "guided backpropagation needs ReLUs between grid and score, and this network has none; "
            "take another method, such as grad_cam."
        )
    with ExitStack() as hooks:
        for node in relus:
            hooks.callback(node.register_prehook(lambda gradients: tuple(g.clamp(min=0) for g in gradients)).remove)
        yield


def _gradient(value: Tensor, of: Tensor) -> Tensor:
    try:
        return torch.autograd.grad(value.sum(), of, retain_graph=True)[0]
    except RuntimeError as error:
        raise PluginError(f"the score has no gradient there: {error}") from error
