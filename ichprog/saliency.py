"""The built-in saliency methods.

A saliency plugin is a function `attribute(score, grid, network, **options)` that returns a signed, unscaled map of
what in the grid speaks for the score:

- `score` is a function, a grid `(B, 1, D, H, W)` to one number each, `(B,)`;
- `grid` is `(1, 1, D, H, W)` and requires a gradient;
- `network` is the module behind the score, with `cam_layer` the name of its layer for class activation maps;
- the map is `(D, H, W)`, or coarser where the method's resolution is.

A method leaves the network as it found it, whatever happens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ichprog.errors import PluginError, UnknownNameError

ScoreFunction = Callable[[Tensor], Tensor]


class Pass(Protocol):
    """A forward pass that was run already, so that several tasks and methods can be explained from it.

    Attributes:
        runtime: What ran it, "openvino" or "torch".
        grid: The grid to explain, `(1, 1, D, H, W)`, which requires a gradient.
        network: The network behind it, with `cam_layer`.
        logits: Each task's logits, `(1, K)`.
        outputs: Outputs of layers by name, from the network down.
        note: Why it was run by that, where something else was asked for.
    """

    runtime: str
    fallback_reason: str | None
    grid: Tensor
    network: Any
    logits: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def guided_gradient(self, value: Tensor) -> Tensor:
        """The guided gradient `(D, H, W)` by the grid, of a value computed from `logits`."""

    def rounding(self) -> AbstractContextManager[Any]:
        """The context in which it computes as precisely as was asked for."""


class ForwardPass:
    """A forward pass of a network, with the graph that autograd keeps of it.

    Args:
        network: The network, its parameters fixed.
        grid: `(1, 1, D, H, W)`, requiring a gradient.
        layers: Names of the layers whose outputs are kept.
        rounding: The context in which the network computes.

    Raises:
        UnknownNameError: The network has no such layer.
    """

    runtime = "torch"
    fallback_reason: str | None = None

    def __init__(
        self,
        network: nn.Module,
        grid: Tensor,
        layers: Iterable[str],
        rounding: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.network, self.grid, self.rounding = network, grid, rounding
        with kept_outputs(network, layers) as self.outputs, rounding():
            self.logits: dict[str, Tensor] = network(grid)

    def guided_gradient(self, value: Tensor) -> Tensor:
        """The guided gradient `(D, H, W)` by the grid, of a value computed from `logits`."""
        return _guided_gradient(value, self.grid)


class CompiledPass:
    """A forward pass that was run elsewhere up to the features; heads go on from there in torch.

    Args:
        heads: Each task's head.
        grid: `(D, H, W)`.
        features: `(1, C, d, h, w)`.
        back: The gradient of a score by the features to the guided gradient `(1, 1, D, H, W)` by the grid.
        layers: What the layer is called whose output the features are, where that is the one for class activation
            maps; else nothing.
    """

    runtime = "openvino"
    fallback_reason: str | None = None

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        grid: np.ndarray,
        features: np.ndarray,
        back: Callable[[np.ndarray], np.ndarray],
        layers: Sequence[str],
    ) -> None:
        self.grid = torch.from_numpy(grid)[None, None].requires_grad_()
        self.network = SimpleNamespace(cam_layer=next(iter(layers), None), heads=heads)
        self._features, self._back = torch.from_numpy(features).requires_grad_(), back
        self.outputs = dict.fromkeys(layers, self._features)
        self.logits: dict[str, Tensor] = {task: head(self._features) for task, head in heads.items()}

    def guided_gradient(self, value: Tensor) -> Tensor:
        """The guided gradient `(D, H, W)` by the grid, of a value computed from `logits`."""
        with _guided_relus(value, needed=False):
            gradient = _gradient(value, self._features)
        return torch.from_numpy(self._back(gradient.numpy()).copy())[0, 0]

    def rounding(self) -> AbstractContextManager[Any]:
        """No context: what is left to torch is small."""
        return nullcontext()


class Score:
    """A scalar of a network's answer; called, it runs the network, and for one grid it has been run already.

    Args:
        known: The pass that was run.
        pick: The network's logits to the score `(B,)`.
    """

    def __init__(self, known: Pass, pick: Callable[[dict[str, Tensor]], Tensor]) -> None:
        self.known, self._pick = known, pick

    def __call__(self, grid: Tensor) -> Tensor:
        """The score `(B,)` of a grid `(B, 1, D, H, W)`, from a forward pass of its own."""
        return self._pick(self.known.network(grid))

    @cached_property
    def value(self) -> Tensor:
        """The score of the grid to explain, from the forward pass that is shared."""
        return self._pick(self.known.logits)

    @cached_property
    def guided_gradient(self) -> Tensor:
        """Its guided gradient `(D, H, W)` by the grid to explain, which several methods ask for."""
        return self.known.guided_gradient(self.value)


def guided_backprop(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Tensor:  # noqa: ARG001  # the contract
    """The gradient of the score by the grid, with only positive gradients let through each ReLU; `(D, H, W)`.

    Raises:
        PluginError: There is no ReLU between the grid and the score, so the method does not apply.

    Source: Springenberg et al., 2015 (arXiv 1412.6806).
    """
    if _is_known(score, grid):
        return score.guided_gradient
    return _guided_gradient(score(grid), grid)


def grad_cam(score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None) -> Tensor:
    """A layer's channels weighted by the mean gradient of the score by each; `(d, h, w)` of that layer.

    Signed: the ReLU of the paper is left to whoever draws the map.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, from the network or its backbone down; the backbone's own choice where not given.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: The layer's output is not `(B, C, d, h, w)`, or the score does not depend on it.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    name = layer_name(network, layer)
    value, features = _evaluate(score, grid, network, name)
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
        UnknownNameError: The network has no such layer.
        PluginError: As for either of the two.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    coarse = grad_cam(score, grid, network, layer=layer).clamp(min=0)
    upsampled = functional.interpolate(coarse[None, None], grid.shape[2:], mode="trilinear", align_corners=False)
    return guided_backprop(score, grid, network) * upsampled[0, 0]


FROM_FEATURES = frozenset({guided_backprop, grad_cam, guided_grad_cam})  # what a `CompiledPass` is enough for


def _is_known(score: ScoreFunction, grid: Tensor) -> TypeGuard[Score]:
    return isinstance(score, Score) and grid is score.known.grid


def _evaluate(score: ScoreFunction, grid: Tensor, network: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    """The score of the grid and the output of a layer, from the shared pass where it has that."""
    if _is_known(score, grid) and layer in score.known.outputs:
        return score.value, score.known.outputs[layer]
    with kept_outputs(network, [layer]) as outputs:
        return score(grid), outputs[layer]


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
def kept_outputs(network: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keeps what layers put out while the block runs.

    Args:
        network: The network.
        layers: Names of layers from the network down.

    Raises:
        UnknownNameError: The network has no such layer.
    """
    outputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., Tensor]:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            outputs[name] = output
            return output.clone()  # what follows may work in place, and must not on what is kept

        return keep

    with ExitStack() as hooks:
        for name in set(layers):
            if not _has(network, name):
                raise UnknownNameError("layer", name, [n for n, _ in network.named_modules() if n])
            hooks.callback(network.get_submodule(name).register_forward_hook(keeper(name)).remove)
        yield outputs


@contextmanager
def _guided_relus(value: Tensor, *, needed: bool = True) -> Iterator[None]:
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
    if not relus and needed:
        raise PluginError(
            "guided backpropagation needs ReLUs between grid and score, and this network has none; "
            "take another method, such as grad_cam."
        )
    with ExitStack() as hooks:
        for node in relus:
            hooks.callback(node.register_prehook(lambda gradients: tuple(g.clamp(min=0) for g in gradients)).remove)
        yield


def _guided_gradient(value: Tensor, grid: Tensor) -> Tensor:
    with _guided_relus(value):
        return _gradient(value, grid)[0, 0]


def _gradient(value: Tensor, of: Tensor) -> Tensor:
    try:
        return torch.autograd.grad(value.sum(), of, retain_graph=True)[0]
    except RuntimeError as error:
        raise PluginError(f"the score has no gradient there: {error}") from error
