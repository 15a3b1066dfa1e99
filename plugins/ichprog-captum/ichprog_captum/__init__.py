"""Attribution methods of captum as saliency methods of ichprog.

Each method is a function `attribute(score, grid, network, **options)`, as `ichprog.saliency` describes. It returns a
signed, unscaled map `(D, H, W)`, or a coarser one. Methods with a baseline use an empty grid: 0 everywhere, as outside
of a brain. One grid passes through the network at a time, so that memory is that of one pass.

captum needs hooks on the torch network, so all methods have the default `requires = "network"`.
"""

import contextlib
import math

import torch
from torch import Tensor, nn

from ichprog.errors import PluginError
from ichprog.saliency import ScoreFunction
from ichprog_captum.wrappers import (
    existing_layer,
    faster_threads,
    layer_errors,
    refuse_functional_relus,
    require_features,
    seeded,
    wrapped,
)

Steps = int | str | tuple[int, int, int]

_MIN_TIMED_POSITIONS = 256  # so that the three passes that find the faster number of threads are about one in a hundred


def integrated_gradients(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, steps: int = 32, batch: int = 1
) -> Tensor:
    """Return the mean gradient between an empty grid and the grid, times the grid.

    The map `(D, H, W)` sums to the difference of the two scores, more exactly with more steps. It takes `steps` passes
    forward and backward.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        steps: Number of points of the Gauss-Legendre quadrature.
        batch: Number of points in one pass.

    Raises:
        ValueError: `steps` or `batch` is not a positive whole number.

    Source: Sundararajan et al., ICML 2017 (arXiv 1703.01365).
    """
    from captum.attr import IntegratedGradients

    _whole("steps", steps)
    _whole("batch", batch)
    with wrapped(score, grid, network, passes=steps) as (module, inputs):
        values: Tensor = IntegratedGradients(module).attribute(inputs, n_steps=steps, internal_batch_size=batch)
    return values[0, 0].detach().to(grid.dtype)


def smooth_grad(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, samples: int = 16, noise: float = 0.1, seed: int = 0
) -> Tensor:
    """Return the mean gradient of the score at noisy copies of the grid.

    The map `(D, H, W)` takes `samples` passes forward and backward.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        samples: Number of copies.
        noise: Standard deviation of the Gaussian noise, on the grid's scale from 0 to 1.
        seed: Random seed of the noise; the random state of torch stays unchanged.

    Raises:
        ValueError: An option is outside of its range.

    Source: Smilkov et al., 2017 (arXiv 1706.03825).
    """
    from captum.attr import NoiseTunnel, Saliency

    _whole("samples", samples)
    _whole("seed", seed, least=0)
    if not isinstance(noise, int | float) or not 0 < noise < math.inf:
        raise ValueError(f"noise is {noise!r}; expected a number above 0")
    with wrapped(score, grid, network, passes=samples) as (module, inputs), seeded(seed, grid.device):
        values: Tensor = NoiseTunnel(Saliency(module)).attribute(
            inputs, nt_type="smoothgrad", nt_samples=samples, nt_samples_batch_size=1, stdevs=float(noise), abs=False
        )
    return values[0, 0].detach()


def occlusion(
    score: ScoreFunction,
    grid: Tensor,
    network: nn.Module,
    *,
    window: Steps | None = None,
    stride: Steps | None = None,
    batch: int = 1,
) -> Tensor:
    """Return how much the score falls if a window of the grid is set to 0, the mean over windows.

    The map `(D, H, W)` takes one pass for each position of the window and one more: by default 325 passes for a grid of
    40 x 301 x 301 cells. On a CPU with several threads, three passes more find out whether one thread is faster.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        window: Slices, rows and columns of the window, such as (5, 16, 16) or "5,16,16", or one number for all.
            By default a quarter of the slices and a fifth of rows and columns.
        stride: Step of the window. By default all of its slices and half of its rows and columns.
        batch: Number of positions in one pass. Several are faster for small grids.

    Raises:
        ValueError: An option is not a positive whole number, or the stride skips cells.

    Source: Zeiler and Fergus, ECCV 2014 (arXiv 1311.2901).
    """
    from captum.attr import Occlusion

    shape = grid.shape[2:]
    default_or_window = _steps("window", window) or (-(-shape[0] // 4), -(-shape[1] // 5), -(-shape[2] // 5))
    size = tuple(min(cells, limit) for cells, limit in zip(default_or_window, shape, strict=True))
    step = _steps("stride", stride) or (size[0], -(-size[1] // 2), -(-size[2] // 2))
    if any(move > cells for move, cells in zip(step, size, strict=True)):
        raise ValueError(f"a stride of {step} skips cells between windows of {size}; expected at most the window")
    _whole("batch", batch)
    positions = math.prod(
        -(-(cells - extent) // move) + 1 for cells, extent, move in zip(shape, size, step, strict=True)
    )
    with contextlib.ExitStack() as stack:
        module, inputs = stack.enter_context(wrapped(score, grid, network, passes=positions + 1))
        stack.enter_context(torch.no_grad())
        if positions >= _MIN_TIMED_POSITIONS:
            example = inputs.expand(batch, -1, -1, -1, -1)
            stack.enter_context(faster_threads(lambda: score(example), grid.device))
        values: Tensor = Occlusion(module).attribute(
            inputs, sliding_window_shapes=(1, *size), strides=(1, *step), perturbations_per_eval=batch
        )
    return values[0, 0].to(grid.dtype)


def deep_lift(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Tensor:
    """Return the contribution of each cell to the difference of the score from the score of an empty grid.

    The map `(D, H, W)` takes one pass of both grids forward and backward, and one forward pass of each grid. The method
    is valid if all non-linear operations are modules that are used once.

    Raises:
        PluginError: The method is not valid for this network: contributions do not sum to the difference.

    Source: Shrikumar et al., ICML 2017 (arXiv 1704.02685), the rescale rule.
    """
    from captum.attr import DeepLift

    advice = (
        "Its non-linear operations must be modules that are used once. Use integrated_gradients, which has no such "
        "requirement."
    )
    with wrapped(score, grid, network) as (module, inputs):
        with torch.no_grad():
            difference = float(score(inputs)) - float(score(torch.zeros_like(inputs)))
        try:
            values: Tensor = DeepLift(module).attribute(inputs)[0, 0].detach()
        except RuntimeError as error:
            if "more than once" not in str(error):
                raise
            raise PluginError(f"deep_lift is not valid for this network: a module is used twice. {advice}") from error
    exact = values.cpu().double()
    total = float(exact.sum())
    if not abs(total - difference) <= 1e-4 * float(exact.abs().sum()):  # rounding errors are far smaller
        raise PluginError(
            f"deep_lift is not valid for this network: contributions sum to {total:.4g} and the score differs by "
            f"{difference:.4g}. {advice}"
        )
    return values


def captum_grad_cam(score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None) -> Tensor:
    """Return captum's Grad-CAM, signed, `(d, h, w)` of its layer, to compare with ichprog's `grad_cam`.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, relative to the network or its backbone. By default the backbone's `cam_layer`.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: The layer's output is not `(B, C, d, h, w)`, or the score does not depend on it.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    from captum.attr import LayerGradCam

    name = existing_layer(network, layer)
    with wrapped(score, grid, network) as (module, inputs), layer_errors(name):
        values: Tensor = LayerGradCam(module, network.get_submodule(name)).attribute(inputs)
    return require_features(values, name)[0, 0].detach()


def layer_gradient_x_activation(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None
) -> Tensor:
    """Return the output of a layer times the gradient of the score with respect to it, summed over channels.

    The map `(d, h, w)` is Grad-CAM without averaging the gradient over space. It stays exact if the score weighs
    positions differently. For heads that average over space, the two maps are equal.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, as for Grad-CAM.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: As for Grad-CAM.

    Source: Draelos and Carin, 2020 (arXiv 2011.08891), where the method is called HiResCAM.
    """
    from captum.attr import LayerGradientXActivation

    name = existing_layer(network, layer)
    with wrapped(score, grid, network) as (module, inputs), layer_errors(name):
        values: Tensor = LayerGradientXActivation(module, network.get_submodule(name)).attribute(inputs)
    return require_features(values, name).sum(1)[0].detach()


def captum_guided_backprop(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Tensor:
    """Return captum's guided backpropagation, `(D, H, W)`, to compare with ichprog's `guided_backprop`.

    The map takes two passes. The first checks that all ReLUs are modules, because captum sees no others.

    Raises:
        PluginError: There is no ReLU between the grid and the score, or one that is not a module.

    Source: Springenberg et al., 2015 (arXiv 1412.6806).
    """
    from captum.attr import GuidedBackprop

    with wrapped(score, grid, network) as (module, inputs):
        refuse_functional_relus("captum_guided_backprop", module, inputs)
        values: Tensor = GuidedBackprop(module).attribute(inputs)
    return values[0, 0].detach()


def captum_guided_grad_cam(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None
) -> Tensor:
    """Return captum's guided Grad-CAM, `(D, H, W)`, to compare with ichprog's `guided_grad_cam`.

    The map takes three passes. The first checks that all ReLUs are modules, because captum sees no others.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of Grad-CAM's layer, as in `captum_grad_cam`.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: Grad-CAM or guided backpropagation does not apply.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    from captum.attr import GuidedGradCam

    name = existing_layer(network, layer)
    with wrapped(score, grid, network) as (module, inputs), layer_errors(name):
        refuse_functional_relus("captum_guided_grad_cam", module, inputs)
        values: Tensor = GuidedGradCam(module, network.get_submodule(name)).attribute(
            inputs, interpolate_mode="trilinear"
        )
    return require_features(values, name)[0, 0].detach()


def _whole(name: str, value: object, *, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return value


def _steps(name: str, value: object) -> tuple[int, int, int] | None:
    """Return slices, rows and columns from three numbers, one number or a text."""
    if value is None:
        return None
    if isinstance(value, str):  # from the command line
        return _steps(name, [int(one) if one.strip().isdecimal() else one for one in value.split(",")])
    three = (value,) * 3 if isinstance(value, int) else value
    if not isinstance(three, tuple | list) or len(three) != 3:
        raise ValueError(f"{name} is {value!r}; expected a whole number, or three: slices, rows, columns")
    slices, rows, columns = (_whole(name, number) for number in three)
    return slices, rows, columns
