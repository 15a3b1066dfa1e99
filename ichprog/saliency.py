"""The built-in saliency methods, and what a saliency plugin may use.

A saliency plugin is a function `attribute(score, grid, network, **options)`. It returns a signed, unscaled map: a
positive value means that the cell raises the score.

- `score` maps grids `(B, 1, D, H, W)` to one number each, `(B,)`.
- `grid` is `(1, 1, D, H, W)` and requires a gradient.
- `network` is the module behind the score. Its `cam_layer` names the layer for class activation maps.
- The map is `(D, H, W)`, or coarser if the method has a coarser resolution.

A method leaves the network unchanged, also if it raises.

The attribute `requires` of the function says what the method needs. With "network", the default, it gets the torch
network. With "features" it also works on a compiled network. Such a method reads the score through
`score_and_features`, `guided_backprop` and the other methods with "features", and never calls `score` itself. If it
reads a layer, it has a keyword-only option `layer`.

torch is imported inside the functions, so that importing a method is cheap.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, TypeVar, cast, get_args

import numpy as np

from ichprog.errors import InvalidValueError, PluginError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor, nn

ScoreFunction = Callable[["Tensor"], "Tensor"]
Requirement = Literal["features", "network"]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def requires(requirement: Requirement) -> Callable[[_Method], _Method]:
    """Declare what a saliency method needs.

    Args:
        requirement: "features" if the method works on a compiled network, "network" if it needs the torch network.

    Raises:
        InvalidValueError: The requirement is neither of the two.

    Examples:
        >>> @requires("features")
        ... def cam(score, grid, network):
        ...     return grad_cam(score, grid, network).clamp(min=0)
        >>> cam.requires
        'features'
    """
    if requirement not in get_args(Requirement):
        raise InvalidValueError("requires", requirement, "'features' or 'network'")

    def mark(method: _Method) -> _Method:
        cast("Any", method).requires = requirement
        return method

    return mark


def requirement_of(method: Callable[..., Any]) -> Requirement:
    """Return what a saliency method needs: its attribute `requires`, or "network" if it has none.

    Raises:
        InvalidValueError: The attribute has another value.
    """
    requirement = getattr(method, "requires", "network")
    if requirement not in get_args(Requirement):
        raise InvalidValueError("requires", requirement, "'features' or 'network'")
    return cast("Requirement", requirement)


class ForwardPass(Protocol):
    """One forward pass that several tasks and methods share.

    Attributes:
        runtime: The runtime that ran the pass, "openvino" or "torch".
        fallback_reason: Why another runtime than the model's own ran the pass, or None.
        grid: The grid to explain, `(1, 1, D, H, W)`, which requires a gradient.
        network: The network, with `cam_layer` and `heads`.
        logits: Logits `(1, K)` of each task.
        outputs: Outputs of layers by full name.
    """

    runtime: str
    fallback_reason: str | None
    grid: "Tensor"
    network: Any
    logits: "dict[str, Tensor]"
    outputs: "dict[str, Tensor]"

    def guided_gradient(self, value: "Tensor") -> "Tensor":
        """Return the guided gradient `(D, H, W)`, with respect to the grid, of a value computed from `logits`."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that sets the precision of the pass."""


class TorchPass:
    """A forward pass in torch, with its autograd graph.

    Args:
        network: The network, with fixed parameters.
        grid: `(1, 1, D, H, W)`, requiring a gradient.
        layers: Full names of the layers whose outputs are recorded.
        autocast: Returns the context that sets the precision.

    Raises:
        UnknownNameError: The network has no such layer.
    """

    runtime = "torch"
    fallback_reason: str | None = None

    def __init__(
        self,
        network: "nn.Module",
        grid: "Tensor",
        layers: Iterable[str],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.network, self.grid, self.autocast = network, grid, autocast
        with record_outputs(network, layers) as self.outputs, autocast():
            self.logits: dict[str, Tensor] = network(grid)

    def guided_gradient(self, value: "Tensor") -> "Tensor":
        """Return the guided gradient `(D, H, W)`, with respect to the grid, of a value computed from `logits`."""
        return _guided_gradient(value, self.grid)


class CompiledPass:
    """A forward pass that a compiled network ran up to the features. The heads run in torch.

    Args:
        heads: Head of each task.
        grid: `(D, H, W)`.
        features: `(1, C, d, h, w)`.
        backward: Maps the gradient of a score with respect to the features, `(1, C, d, h, w)`, to its guided gradient
            with respect to the grid, `(1, 1, D, H, W)`.
        layers: Names of the layer that outputs the features, if that layer is `cam_layer`; otherwise empty.
    """

    runtime = "openvino"
    fallback_reason: str | None = None

    def __init__(
        self,
        heads: "Mapping[str, nn.Module]",
        grid: np.ndarray,
        features: np.ndarray,
        backward: Callable[[np.ndarray], np.ndarray],
        layers: Sequence[str],
    ) -> None:
        import torch

        self.grid = torch.from_numpy(grid)[None, None].requires_grad_()
        self.network = _CompiledNetwork(next(iter(layers), None), heads)
        self._features, self._backward = torch.from_numpy(features).requires_grad_(), backward
        self.outputs = dict.fromkeys(layers, self._features)
        self.logits: dict[str, Tensor] = {task: head(self._features) for task, head in heads.items()}

    def guided_gradient(self, value: "Tensor") -> "Tensor":
        """Return the guided gradient `(D, H, W)`, with respect to the grid, of a value computed from `logits`."""
        import torch

        with _guided_relus(value, required=False):
            gradient = _gradient(value, self._features)
        return torch.from_numpy(self._backward(gradient.numpy()).copy())[0, 0]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return an empty context: the heads always run in float32."""
        return nullcontext()


class _CompiledNetwork:
    """What methods with `requires = "features"` see of a compiled network; it cannot be called."""

    def __init__(self, cam_layer: str | None, heads: "Mapping[str, nn.Module]") -> None:
        self.cam_layer, self.heads = cam_layer, heads

    def __call__(self, grid: "Tensor") -> "dict[str, Tensor]":  # noqa: ARG002  # the signature of a network
        raise PluginError(
            "A saliency method declares requires = 'features' but runs the network. Set requires = 'network', or read "
            "the score through ichprog.saliency.score_and_features."
        )


class Score:
    """A scalar function of a network's logits.

    Calling a score runs the network. `value` and `guided_gradient` use the shared forward pass instead.

    Args:
        shared: The shared forward pass.
        select: Maps the logits of all tasks to the score `(B,)`.
    """

    def __init__(self, shared: ForwardPass, select: "Callable[[dict[str, Tensor]], Tensor]") -> None:
        self.shared, self._select = shared, select

    def __call__(self, grid: "Tensor") -> "Tensor":
        """Return the score `(B,)` of grids `(B, 1, D, H, W)` from a new forward pass."""
        return self._select(self.shared.network(grid))

    @cached_property
    def value(self) -> "Tensor":
        """Return the score of the shared grid."""
        return self._select(self.shared.logits)

    @cached_property
    def guided_gradient(self) -> "Tensor":
        """Return the guided gradient `(D, H, W)` of the score with respect to the shared grid."""
        return self.shared.guided_gradient(self.value)


@requires("features")
def guided_backprop(score: ScoreFunction, grid: "Tensor", network: "nn.Module") -> "Tensor":  # noqa: ARG001  # contract
    """Return the gradient of the score with respect to the grid, passing only positive gradients at each ReLU.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.

    Returns:
        The map `(D, H, W)`.

    Raises:
        PluginError: There is no ReLU between the grid and the score, so the method does not apply.

    Source: Springenberg et al., 2015 (arXiv 1412.6806).
    """
    if _is_shared(score, grid):
        return score.guided_gradient
    return _guided_gradient(score(grid), grid)


@requires("features")
def grad_cam(score: ScoreFunction, grid: "Tensor", network: "nn.Module", *, layer: str | None = None) -> "Tensor":
    """Return the sum of a layer's channels, each weighted by the mean gradient of the score with respect to it.

    The map is signed: the ReLU of the paper is not applied.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, relative to the network or its backbone. By default the backbone's `cam_layer`.

    Returns:
        The map `(d, h, w)` in the resolution of the layer.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: The layer's output is not `(B, C, d, h, w)`, or the score does not depend on it.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    value, features = score_and_features(score, grid, network, layer)
    gradient = _gradient(value, features)
    return (gradient.mean((2, 3, 4), keepdim=True) * features).sum(1)[0]


@requires("features")
def guided_grad_cam(
    score: ScoreFunction, grid: "Tensor", network: "nn.Module", *, layer: str | None = None
) -> "Tensor":
    """Return the product of guided backpropagation and the positive part of Grad-CAM.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of Grad-CAM's layer, as in `grad_cam`.

    Returns:
        The map `(D, H, W)`.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: Grad-CAM or guided backpropagation does not apply.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    from torch.nn import functional

    coarse = grad_cam(score, grid, network, layer=layer).clamp(min=0)
    upsampled = functional.interpolate(coarse[None, None], grid.shape[2:], mode="trilinear", align_corners=False)
    return guided_backprop(score, grid, network) * upsampled[0, 0]


def score_and_features(
    score: ScoreFunction, grid: "Tensor", network: "nn.Module", layer: str | None = None
) -> "tuple[Tensor, Tensor]":
    """Return the score of the grid and the output of a layer, with a graph between the two.

    The values come from the shared forward pass if it recorded the layer, otherwise from a new pass.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, relative to the network or its backbone. By default the backbone's `cam_layer`.

    Returns:
        The score `(1,)` and the features `(1, C, d, h, w)`.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: The layer's output is not `(B, C, d, h, w)`.

    Examples:
        A method that multiplies activations by their gradients and works on compiled networks:

        >>> @requires("features")
        ... def layer_gradient_x_activation(score, grid, network, *, layer=None):
        ...     value, features = score_and_features(score, grid, network, layer)
        ...     (gradient,) = torch.autograd.grad(value.sum(), features, retain_graph=True)
        ...     return (gradient * features).sum(1)[0]
    """
    name = resolve_layer(network, layer)
    if _is_shared(score, grid) and name in score.shared.outputs:
        value, features = score.value, score.shared.outputs[name]
    elif isinstance(network, _CompiledNetwork):
        raise PluginError(
            "A saliency method reads a layer that the compiled network does not output. Give the method a keyword-only "
            "option 'layer', so that ichprog can choose the torch network."
        )
    else:
        with record_outputs(network, [name]) as outputs:
            value = score(grid)
        if name not in outputs:
            raise PluginError(f"The score does not use layer {name!r}. Choose a layer between the grid and the score.")
        features = outputs[name]
    if features.ndim != 5:
        raise PluginError(f"Layer {name!r} outputs shape {tuple(features.shape)}. Expected features (B, C, d, h, w).")
    return value, features


def _is_shared(score: ScoreFunction, grid: "Tensor") -> TypeGuard[Score]:
    return isinstance(score, Score) and grid is score.shared.grid


def resolve_layer(network: "nn.Module", layer: str | None) -> str:
    """Return the full name of a layer.

    Args:
        network: The network.
        layer: A name relative to the network or to its backbone. By default the backbone's `cam_layer`.
    """
    if layer is None:
        return str(network.cam_layer)
    return f"backbone.{layer}" if _has_module(network, f"backbone.{layer}") else layer


def _has_module(network: Any, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


@contextmanager
def record_outputs(network: "nn.Module", layers: Iterable[str]) -> "Iterator[dict[str, Tensor]]":
    """Record the outputs of layers while the block runs.

    Args:
        network: The network.
        layers: Full names of the layers.

    Raises:
        UnknownNameError: The network has no such layer.
    """
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> "Callable[..., Tensor]":
        def record(_module: "nn.Module", _inputs: Any, output: "Tensor") -> "Tensor":
            outputs[name] = output
            return output.clone()  # a later module may work in place and must not change the recorded tensor

        return record

    with ExitStack() as hooks:
        for name in set(layers):
            if not _has_module(network, name):
                raise UnknownNameError("layer", name, [n for n, _ in network.named_modules() if n])
            hooks.callback(network.get_submodule(name).register_forward_hook(recorder(name)).remove)
        yield outputs


@contextmanager
def _guided_relus(value: "Tensor", *, required: bool = True) -> Iterator[None]:
    """Pass only positive gradients into every ReLU between the value and its leaves while the block runs.

    The rule is set on the autograd nodes of the value, not on modules. It therefore also covers functional and
    in-place ReLUs, and leaves no hook on a module.
    """
    relus, visited, pending = [], set(), [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node.name() == "ReluBackward0":
            relus.append(node)
        pending.extend(following for following, _ in node.next_functions)
    if not relus and required:
        raise PluginError(
            "Guided backpropagation needs ReLUs between the grid and the score, and this network has none. Use another "
            "method, such as grad_cam."
        )
    with ExitStack() as hooks:
        for node in relus:
            hooks.callback(node.register_prehook(lambda gradients: tuple(g.clamp(min=0) for g in gradients)).remove)
        yield


def _guided_gradient(value: "Tensor", grid: "Tensor") -> "Tensor":
    with _guided_relus(value):
        return _gradient(value, grid)[0, 0]


def _gradient(value: "Tensor", source: "Tensor") -> "Tensor":
    import torch

    try:
        return torch.autograd.grad(value.sum(), source, retain_graph=True)[0]
    except RuntimeError as error:
        raise PluginError(f"The score has no gradient with respect to the chosen layer: {error}") from error
