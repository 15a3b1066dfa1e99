"""Attribution methods of captum as saliency methods of ichprog.

Each is a function `attribute(score, grid, network, **options)` of a score, grids `(B, 1, D, H, W)` to numbers `(B,)`, a
grid `(1, 1, D, H, W)` and the network behind the score. It gives a signed, unscaled map `(D, H, W)`, or coarser where
the method's resolution is. Where a method compares with a grid without anything in it, that is 0 everywhere, which is
what lies outside of a brain. One grid goes through the network at a time, so that memory is that of one pass.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ichprog.errors import PluginError, UnknownName
from ichprog.saliency import layer_name

ScoreFunction = Callable[[Tensor], Tensor]
Steps = int | tuple[int, int, int]


def integrated_gradients(score: ScoreFunction, grid: Tensor, network: nn.Module, *, steps: int = 32) -> Tensor:
    """The mean gradient on the way from an empty grid to this one, times the grid; `(D, H, W)`.

    It sums to the difference of the two scores, the better the more steps there are. `steps` passes there and back.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        steps: Points on the way, by Gauss-Legendre quadrature.

    Raises:
        ValueError: There are no steps.

    Source: Sundararajan et al., ICML 2017 (arXiv 1703.01365).
    """
    from captum.attr import IntegratedGradients

    _whole("steps", steps)
    with _lent(score, grid, network) as (scored, given):
        found = IntegratedGradients(scored).attribute(given, n_steps=steps, internal_batch_size=1)
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
        ValueError: There are no samples, or the noise is negative.

    Source: Smilkov et al., 2017 (arXiv 1706.03825).
    """
    from captum.attr import NoiseTunnel, Saliency

    _whole("samples", samples)
    if not noise > 0:
        raise ValueError(f"noise is {noise}; it must be above 0")
    devices = [grid.device] if grid.device.type == "cuda" else []
    with _lent(score, grid, network) as (scored, given), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        found = NoiseTunnel(Saliency(scored)).attribute(
            given, nt_type="smoothgrad", nt_samples=samples, nt_samples_batch_size=1, stdevs=noise, abs=False
        )
    return found[0, 0].detach()


def occlusion(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, window: Steps | None = None, stride: Steps | None = None
) -> Tensor:
    """How much the score falls where a window of the grid is emptied, the mean over windows; `(D, H, W)`.

    One pass for each place of the window and one more: 325 for 40 x 301 x 301 cells as it comes.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        window: Slices, rows and columns of the window, or one number for all; a quarter of the slices and a fifth of
            rows and columns where not given.
        stride: How far it moves each time; its own slices, and half of its rows and columns, where not given.

    Raises:
        ValueError: Window or stride are no such numbers, or the stride leaves cells out.

    Source: Zeiler and Fergus, ECCV 2014 (arXiv 1311.2901).
    """
    from captum.attr import Occlusion

    shape = grid.shape[2:]
    size = _steps("window", window) or (-(-shape[0] // 4), -(-shape[1] // 5), -(-shape[2] // 5))
    size = tuple(min(cells, most) for cells, most in zip(size, shape, strict=True))
    step = _steps("stride", stride) or (size[0], -(-size[1] // 2), -(-size[2] // 2))
    if any(far > cells for far, cells in zip(step, size, strict=True)):
        raise ValueError(f"a stride of {step} leaves cells out between windows of {size}; it can be as far at most")
    with _lent(score, grid, network) as (scored, given), torch.no_grad():
        found = Occlusion(scored).attribute(
            given, sliding_window_shapes=(1, *size), strides=(1, *step), show_progress=sys.stderr.isatty()
        )
    return found[0, 0].to(grid.dtype)


def deep_lift(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Tensor:
    """What each cell contributes to the score's difference from that of an empty grid; `(D, H, W)`. One pass.

    It holds for networks whose non-linear steps are modules that are used once each.

    Raises:
        PluginError: It does not hold for this network: contributions do not sum to the difference.

    Source: Shrikumar et al., ICML 2017 (arXiv 1704.02685).
    """
    from captum.attr import DeepLift

    with _lent(score, grid, network) as (scored, given):
        found, over = DeepLift(scored).attribute(given, return_convergence_delta=True)
        with torch.no_grad():
            difference = float(score(given) - score(torch.zeros_like(given)))
    if not abs(float(over)) <= 0.01 * abs(difference) + 1e-4:
        raise PluginError(
            f"deep_lift does not hold for this network: contributions sum to {difference + float(over):.4g} and the "
            f"score differs by {difference:.4g}. Its non-linear steps must be modules, used once each; take "
            "integrated_gradients, which asks for nothing of the kind."
        )
    return found[0, 0].detach()


def captum_grad_cam(score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None) -> Tensor:
    """Grad-CAM by captum, `(d, h, w)` of its layer, signed: ichprog's own `grad_cam` from other hands.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of the layer, from the network or its backbone down; the backbone's own choice where not given.

    Raises:
        UnknownName: The network has no such layer.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    from captum.attr import LayerGradCam

    with _lent(score, grid, network) as (scored, given):
        found = LayerGradCam(scored, _layer(network, layer)).attribute(given)
    return found[0, 0].detach()


def captum_guided_grad_cam(
    score: ScoreFunction, grid: Tensor, network: nn.Module, *, layer: str | None = None
) -> Tensor:
    """Guided Grad-CAM by captum, `(D, H, W)`: ichprog's own `guided_grad_cam` from other hands.

    It knows ReLUs that are modules; ones that are functions let all gradients through.

    Args:
        score: The score to explain.
        grid: The grid to explain, `(1, 1, D, H, W)`.
        network: The network behind the score.
        layer: Name of Grad-CAM's layer, as there.

    Raises:
        UnknownName: The network has no such layer.
        PluginError: The network has no ReLU that is a module.

    Source: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
    """
    from captum.attr import GuidedGradCam

    chosen = _layer(network, layer)
    if not any(isinstance(module, nn.ReLU) for module in network.modules()):
        raise PluginError("captum_guided_grad_cam needs ReLUs that are modules, and this network has none")
    with _lent(score, grid, network) as (scored, given):
        found = GuidedGradCam(scored, chosen).attribute(given, interpolate_mode="trilinear")
    return found[0, 0].detach()


class _Scored(nn.Module):
    """A score as the module that captum asks for, with the network inside it."""

    def __init__(self, score: ScoreFunction, network: nn.Module) -> None:
        super().__init__()
        self.training, self.network, self._score = network.training, network, score

    def forward(self, grid: Tensor) -> Tensor:
        """The score `(B,)` of grids `(B, 1, D, H, W)`."""
        return self._score(grid)


@contextmanager
def _lent(score: ScoreFunction, grid: Tensor, network: nn.Module) -> Iterator[tuple[_Scored, Tensor]]:
    """A score and a copy of the grid for captum, which leaves nothing on the network, whatever happens.

    captum takes its hooks back where it succeeds; where the score raises, some stay, and the tensors beside them. ReLUs
    that work in place would spoil what its hooks keep, so they do not while the block runs.
    """
    before = [(module, dict(vars(module)), _hooks(module)) for module in network.modules()]
    in_place = [module for module in network.modules() if getattr(module, "inplace", False)]
    for module in in_place:
        module.inplace = False
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # captum tells of the hooks that it will take back
            yield _Scored(score, network), grid.detach().clone().requires_grad_()
    finally:
        for module in in_place:
            module.inplace = True
        for module, attributes, hooks in before:
            for name in vars(module).keys() - attributes.keys():
                delattr(module, name)
            for name, kept in hooks.items():
                own = vars(module)[name]
                for key in own.keys() - kept:
                    del own[key]


def _hooks(module: nn.Module) -> dict[str, set[int]]:
    """The hooks of a module by their kind."""
    return {name: set(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks") and hooks is not None}


def _layer(network: nn.Module, layer: str | None) -> nn.Module:
    name = layer_name(network, layer)
    modules = dict(network.named_modules())
    if name not in modules:
        raise UnknownName("layer", name, [known for known in modules if known])
    return modules[name]


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 on")
    return value


def _steps(name: str, given: object) -> tuple[int, int, int] | None:
    """Slices, rows and columns, of three numbers or one for all."""
    if given is None:
        return None
    three = (given,) * 3 if isinstance(given, int) else given
    if not isinstance(three, (tuple, list)) or len(three) != 3:
        raise ValueError(f"{name} is {given!r}; it takes a whole number, or three: slices, rows, columns")
    slices, rows, columns = (_whole(name, value) for value in three)
    return slices, rows, columns
