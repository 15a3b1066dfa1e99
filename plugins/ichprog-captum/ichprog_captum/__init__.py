"""Attribution methods of captum as saliency methods of ichprog.

Each is a function `attribute(score, grid, network, **options)` of a score, grids `(B, 1, D, H, W)` to numbers `(B,)`, a
grid `(1, 1, D, H, W)` and the network behind the score. It gives a signed, unscaled map `(D, H, W)`, or coarser where
the method's resolution is. Where a method compares with a grid without anything in it, that is 0 everywhere, which is
what lies outside of a brain. One grid goes through the network at a time, so that memory is that of one pass.
"""

import math

import torch
from torch import Tensor, nn

from ichprog.errors import PluginError
from ichprog.saliency import ScoreFunction
from ichprog_captum.loan import at_layer, features_of, layer_of, lent, refuse_functional_relus, seeded

Steps = int | str | tuple[int, int, int]


def integrated_gradients(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, steps: int = 32, batch: int = 1
) -> Tensor:
    """The mean gradient on the way from an empty grid to this one, times the grid; `(D, H, W)`.

    It sums to the difference of the two scores, the better the more steps there are. `steps` passes there and back.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        steps: Points on the way, by Gauss-Legendre quadrature.
        batch: Points that go through the network together.

    Raises:
        ValueError: There are no steps, or none go together.

    Source: Sundararajan et al., ICML 2017 (arXiv 1703.01365).
    """
    from captum.attr import IntegratedGradients

    _whole("steps", steps)
    _whole("batch", batch)
    with lent(score, grid, network, passes=steps) as (scored, given):
        found: Tensor = IntegratedGradients(scored).attribute(given, n_steps=steps, internal_batch_size=batch)
    return found[0, 0].detach().to(grid.dtype)


def smooth_grad(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, samples: int = 16, noise: float = 0.1, seed: int = 0
) -> Tensor:
    """The mean gradient of the score at noisy copies of the grid; `(D, H, W)`. `samples` passes there and back.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        samples: Copies.
        noise: Standard deviation of the Gaussian noise, on the grid's scale from 0 to 1.
        seed: Of the noise; torch's own random numbers go on as if nothing had been drawn.

    Raises:
        ValueError: There are no samples, the noise is not above 0, or the seed is no whole number.

    Source: Smilkov et al., 2017 (arXiv 1706.03825).
    """
    from captum.attr import NoiseTunnel, Saliency

    _whole("samples", samples)
    _whole("seed", seed, least=0)
    if not isinstance(noise, int | float) or not 0 < noise < math.inf:
        raise ValueError(f"noise is {noise!r}; it must be a number above 0")
    with lent(score, grid, network, passes=samples) as (scored, given), seeded(seed, grid.device):
        found: Tensor = NoiseTunnel(Saliency(scored)).attribute(
            given, nt_type="smoothgrad", nt_samples=samples, nt_samples_batch_size=1, stdevs=float(noise), abs=False
        )
    return found[0, 0].detach()


def occlusion(
    score: ScoreFunction,
    grid: Tensor,
    network: nn.Module,
    *,
    window: Steps | None = None,
    stride: Steps | None = None,
    batch: int = 1,
) -> Tensor:
    """How much the score falls where a window of the grid is emptied, the mean over windows; `(D, H, W)`.

    One pass for each place of the window and one more: 325 for 40 x 301 x 301 cells as it comes.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        window: Slices, rows and columns of the window, such as (5, 16, 16) or "5,16,16", or one number for all; a
            quarter of the slices and a fifth of rows and columns where not given.
        stride: How far it moves each time; its own slices, and half of its rows and columns, where not given.
        batch: Places that go through the network together.

    Raises:
        ValueError: Window, stride or batch are no such numbers, or the stride leaves cells out.

    Source: Zeiler and Fergus, ECCV 2014 (arXiv 1311.2901).
    """
    from captum.attr import Occlusion

    shape = grid.shape[2:]
    wanted = _steps("window", window) or (-(-shape[0] // 4), -(-shape[1] // 5), -(-shape[2] // 5))
    size = tuple(min(cells, most) for cells, most in zip(wanted, shape, strict=True))
    step = _steps("stride", stride) or (size[0], -(-size[1] // 2), -(-size[2] // 2))
    if any(far > cells for far, cells in zip(step, size, strict=True)):
        raise ValueError(f"a stride of {step} leaves cells out between windows of {size}; it can be as far at most")
    _whole("batch", batch)
    places = math.prod(-(-(cells - wide) // far) + 1 for cells, wide, far in zip(shape, size, step, strict=True))
    with lent(score, grid, network, passes=places + 1) as (scored, given), torch.no_grad():
        found: Tensor = Occlusion(scored).attribute(
            given, sliding_window_shapes=(1, *size), strides=(1, *step), perturbations_per_eval=batch
        )
    return found[0, 0].to(grid.dtype)


def deep_lift(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Tensor:
    """What each cell contributes to the score's difference from that of an empty grid; `(D, H, W)`.

    One pass of the two grids together, there and back, and one of each to know the difference. It holds for networks
    whose non-linear steps are modules that are used once each.

    Raises:
        PluginError: It does not hold for this network: contributions do not sum to the difference.

    Source: Shrikumar et al., ICML 2017 (arXiv 1704.02685), the rescale rule.
    """
    from captum.attr import DeepLift

    needs = (
        "Its non-linear steps must be modules, used once each; take integrated_gradients, which asks for nothing of "
        "the kind."
    )
    with lent(score, grid, network) as (scored, given):
        with torch.no_grad():
            difference = float(score(given)) - float(score(torch.zeros_like(given)))
        try:
            found: Tensor = DeepLift(scored).attribute(given)[0, 0].detach()
        except RuntimeError as error:
            if "more than once" not in str(error):
                raise
            raise PluginError(f"deep_lift does not hold for this network: a module is used again. {needs}") from error
    values = found.cpu().double()
    total = float(values.sum())
    if not abs(total - difference) <= 1e-4 * float(values.abs().sum()):  # rounding stays far below
        raise PluginError(
            f"deep_lift does not hold for this network: contributions sum to {total:.4g} and the score differs by "
            f"{difference:.4g}. {needs}"
        )
    return found


def captum_grad_cam(score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None) -> Tensor:
    """Grad-CAM by captum, `(d, h, w)` of its layer, signed: ichprog's own `grad_cam` from other hands.

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
    from captum.attr import LayerGradCam

    name = layer_of(network, layer)
    with lent(score, grid, network) as (scored, given), at_layer(name):
        found: Tensor = LayerGradCam(scored, network.get_submodule(name)).attribute(given)
    return features_of(found, name)[0, 0].detach()


def layer_gradient_x_activation(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None
) -> Tensor:
    """A layer's output times the gradient of the score by it, summed over channels; `(d, h, w)` of the layer.

    Grad-CAM without its averaging of the gradient over space, so that it shows where the score comes from even where
    the score looks at places differently. For heads that take the mean over space the two are the same.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, as for Grad-CAM.

    Raises:
        UnknownNameError: The network has no such layer.
        PluginError: As for Grad-CAM.

    Source: Draelos and Carin, 2020 (arXiv 2011.08891), who call it HiResCAM.
    """
    from captum.attr import LayerGradientXActivation

    name = layer_of(network, layer)
    with lent(score, grid, network) as (scored, given), at_layer(name):
        found: Tensor = LayerGradientXActivation(scored, network.get_submodule(name)).attribute(given)
    return features_of(found, name).sum(1)[0].detach()


def captum_guided_backprop(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Tensor:
    """Guided backpropagation by captum, `(D, H, W)`: ichprog's own `guided_backprop` from other hands.

    Two passes: captum knows ReLUs that are modules, and a first one finds out whether there are others.

    Raises:
        PluginError: There is no ReLU between the grid and the score, or one that is not a module.

    Source: Springenberg et al., 2015 (arXiv 1412.6806).
    """
    from captum.attr import GuidedBackprop

    with lent(score, grid, network) as (scored, given):
        refuse_functional_relus("captum_guided_backprop", scored, given)
        found: Tensor = GuidedBackprop(scored).attribute(given)
    return found[0, 0].detach()


def captum_guided_grad_cam(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None
) -> Tensor:
    """Guided Grad-CAM by captum, `(D, H, W)`: ichprog's own `guided_grad_cam` from other hands.

    Three passes, the first to find out whether captum knows all ReLUs.

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
    from captum.attr import GuidedGradCam

    name = layer_of(network, layer)
    with lent(score, grid, network) as (scored, given), at_layer(name):
        refuse_functional_relus("captum_guided_grad_cam", scored, given)
        found: Tensor = GuidedGradCam(scored, network.get_submodule(name)).attribute(
            given, interpolate_mode="trilinear"
        )
    return features_of(found, name)[0, 0].detach()


def _whole(name: str, value: object, *, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} on")
    return value


def _steps(name: str, given: object) -> tuple[int, int, int] | None:
    """Slices, rows and columns, of three numbers or one for all."""
    if given is None:
        return None
    if isinstance(given, str):  # as a command line gives them
        return _steps(name, [int(one) if one.strip().isdecimal() else one for one in given.split(",")])
    three = (given,) * 3 if isinstance(given, int) else given
    if not isinstance(three, tuple | list) or len(three) != 3:
        raise ValueError(f"{name} is {given!r}; it takes a whole number, or three: slices, rows, columns")
    slices, rows, columns = (_whole(name, value) for value in three)
    return slices, rows, columns
