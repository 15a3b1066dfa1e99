"""Training in bfloat16: whether a device and a network are fit for it, and how a processor is brought to do it well.

A processor that multiplies in bfloat16 trains faster so. But oneDNN, by which PyTorch computes convolutions there, is
wrong in some (seen with oneDNN 3.12 in PyTorch 2.13 on AVX512_BF16): where the input is hardly longer than the kernel,
the loop over slices leaves the front padding by a step too far and reads past the input, so that gradients of the
weights become anything up to infinity, and some of these write where they must not. In DenseNet121 on a grid of 40
slices it is the third block, 2 cells deep under kernels of 3. Convolutions of this kind, dilated and transposed ones
are therefore left in float32. And a network is tried before it is trained: all its other convolutions, values and both
gradients, in both precisions. On a processor bfloat16 is only taken where it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ichprog.runtime.openvino.backend import computes_in_bfloat16

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_NOT_EXAMINED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_POOLS = {functional.avg_pool3d, functional.max_pool3d, torch.max_pool3d}
_TOLERANCE = 0.05  # of a convolution in bfloat16, as a share of its largest value; right ones stay under 0.01


@contextmanager
def computing(device: torch.device, *, rounded: bool) -> Iterator[None]:
    """A context in which a network is run.

    Args:
        device: Where.
        rounded: Whether convolutions and matrix products are in bfloat16. Parameters stay in float32.
    """
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=rounded):
        if device.type == "cpu":
            with _OnProcessor():
                yield
        else:
            yield


def lack(device: torch.device) -> str | None:
    """Why bfloat16 is of no use on a device, as the end of a sentence; None where it is of use."""
    if device.type == "cpu":
        return None if computes_in_bfloat16() else "this processor does not multiply in bfloat16"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return None
    return f"the device {device} does not compute in bfloat16"


def fault(network: nn.Module, grids: Tensor) -> str | None:
    """What goes wrong where a network is trained in bfloat16 on this processor, as the end of a sentence; or None.

    Args:
        network: The network; it is left as it is.
        grids: `(B, 1, D, H, W)` some of those it will be trained by.
    """
    trial, training = _Trial(grids), network.training
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), trial:
            network.eval()(grids)
    except RuntimeError as error:  # there is no kernel for it
        return f"this processor cannot: {error}"
    finally:
        network.train(training)
    return trial.wrong


class _OnProcessor(TorchFunctionMode):
    """Sets right what PyTorch does badly on processors, where a network calls it.

    Convolutions that would be wrong in bfloat16 are computed in float32. What pooling gives is of the precision and in
    the memory layout of what it got: PyTorch's own is in float32 under autocast, and average pooling puts channels
    first, and then all that follows is twice as large and is turned round at every convolution.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _POOLS:
            return _pooled(func, *args, **kwargs)
        if func in _CONVOLUTIONS and torch.is_autocast_enabled("cpu"):
            call = _call(*args, **kwargs)
            if _doubtful(call):
                return _in_float32(func, *call).to(call.input.dtype)
            self.round(func, call)
        if func in _NOT_EXAMINED and torch.is_autocast_enabled("cpu"):
            return _in_float32(func, *args, **kwargs)
        return func(*args, **kwargs)

    def round(self, convolution: Callable[..., Tensor], call: "_Call") -> None:
        """Is told of every convolution that is about to be computed in bfloat16."""


class _Trial(_OnProcessor):
    """Tries every convolution in both precisions, once for each shape.

    Args:
        grids: What the network is run on; nobody asks for the gradient by it.

    Attributes:
        wrong: What was found wrong, or None.
    """

    def __init__(self, grids: Tensor) -> None:
        super().__init__()
        self.grids = grids
        self.wrong: str | None = None
        self._tried: set[str] = set()

    def round(self, convolution: Callable[..., Tensor], call: "_Call") -> None:
        shape = str([list(value.shape) if isinstance(value, Tensor) else value for value in call])
        if self.wrong or shape in self._tried:
            return
        self._tried.add(shape)
        exact = self._results(convolution, call, None)
        for right, found in zip(exact, self._results(convolution, call, exact[0]), strict=True):
            error = float((found.float() - right).abs().max() / right.abs().max().clamp_min(1e-20))
            if not error < _TOLERANCE:  # nor is NaN
                self.wrong = (
                    f"on this processor a convolution of {_sizes(call.input)} by {_sizes(call.weight)} or its gradient "
                    f"is wrong in bfloat16, by {error:.2g} of its largest value"
                )

    def _results(self, convolution: Callable[..., Tensor], call: "_Call", along: Tensor | None) -> list[Tensor]:
        """A convolution and its gradients: in float32, or in bfloat16 along what that gave."""
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=along is not None):
            inputs, weight = call.input.detach().float(), call.weight.detach().float().requires_grad_()
            by = [weight] if call.input is self.grids else [weight, inputs.requires_grad_()]
            made = convolution(inputs, weight, *map(_widened, call[2:]))
            direction = (made if along is None else along).detach().to(made.dtype)
            return [made.detach(), *torch.autograd.grad(made, by, direction)]


class _Call(NamedTuple):
    """What a convolution is called with."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int | Sequence[int]
    padding: int | str | Sequence[int]
    dilation: int | Sequence[int]
    groups: int


def _call(
    input: Tensor,  # noqa: A002  by its name in PyTorch
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> _Call:
    return _Call(input, weight, bias, stride, padding, dilation, groups)


def _doubtful(call: _Call) -> bool:
    """Whether a convolution is dilated, or its input so short along an axis that its kernel fits there but once."""
    axes = call.weight.dim() - 2
    steps, gaps = (
        [each] * axes if isinstance(each, int) else list(each) * (axes if len(each) == 1 else 1)
        for each in (call.stride, call.dilation)
    )
    lengths, kernels = call.input.shape[-axes:], call.weight.shape[-axes:]
    return any(
        (kernel > 1 or step > 1) and (gap > 1 or length < kernel + step)
        for length, kernel, step, gap in zip(lengths, kernels, steps, gaps, strict=True)
    )


def _in_float32(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return function(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _pooled(function: Callable[..., Any], values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pooling that leaves precision and layout as they were."""
    with torch.autocast("cpu", enabled=False):
        if "avg" not in function.__name__:
            return function(values, *args, **kwargs)
        made = function(values.float(), *args, **kwargs).to(values.dtype)  # there is none in bfloat16
    if values.dim() == 5 and values.is_contiguous(memory_format=torch.channels_last_3d):
        made = made.contiguous(memory_format=torch.channels_last_3d)
    return made


def _sizes(values: Tensor) -> str:
    return " x ".join(map(str, values.shape))
