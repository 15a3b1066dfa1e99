"""Training in bfloat16: whether a device and a network support it, and the CPU's workarounds.

CPUs that multiply in bfloat16 train faster in it. But oneDNN, which computes PyTorch's convolutions there, has a bug
(seen with oneDNN 3.12 in PyTorch 2.13 on AVX512_BF16). If the input is hardly longer than the kernel, the loop over
slices leaves the front padding a step too late and reads past the input. Weight gradients then become arbitrarily wrong
or infinite, and some convolutions write out of bounds. In DenseNet121 on a grid of 40 slices this affects the third
block, whose features are 2 voxels deep under kernels of size 3.

Convolutions of this kind, dilated ones and transposed ones therefore stay in float32. Another bug of the same version
(seen on AMX with two threads): the weight gradient of some convolutions with kernels of size 1 never ends. They are
computed as matrix products. Before training, every other convolution of the network is checked in both precisions: its
values and both gradients. On a CPU bfloat16 is used only if the protocol requests it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ichprog.runtime.openvino.backend import supports_bfloat16

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_POOLS = {functional.avg_pool3d, functional.max_pool3d, torch.max_pool3d}
_TOLERANCE = 0.05  # relative to the largest value of a bfloat16 convolution; correct ones stay under 0.01


@contextmanager
def autocast(device: torch.device, *, is_bfloat16: bool) -> Iterator[None]:
    """Run a network in the training precision within a context.

    Args:
        device: The device.
        is_bfloat16: Whether convolutions and matrix products use bfloat16. Parameters stay in float32.
    """
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bfloat16):
        if device.type == "cpu":
            with _CpuWorkarounds():
                yield
        else:
            yield


def unsupported_reason(device: torch.device) -> str | None:
    """Return why a device does not support bfloat16, as the end of a sentence, or None if it does."""
    if device.type == "cpu":
        return None if supports_bfloat16() else "this processor does not multiply in bfloat16"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return None
    return f"the device {device} does not compute in bfloat16"


def find_fault(network: nn.Module, grids: Tensor) -> str | None:
    """Return what this CPU computes wrongly in bfloat16, as the end of a sentence, or None.

    Args:
        network: The network; it is not changed.
        grids: `(B, 1, D, H, W)` some training grids.
    """
    check, training = _ConvolutionCheck(grids), network.training
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), check:
            network.eval()(grids)
    except RuntimeError as error:  # PyTorch has no kernel for an operation
        return f"this processor cannot: {error}"
    finally:
        network.train(training)
    return check.fault


class _CpuWorkarounds(TorchFunctionMode):
    """Replace operations that PyTorch computes wrongly or slowly on CPUs.

    Convolutions affected by the bug are computed in float32. Pooling preserves the precision and the memory layout of
    its input. PyTorch's own pooling returns float32 under autocast, and its average pooling returns channels first;
    all later operations would then use twice the memory and convert the layout at every convolution.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _POOLS:
            return _pool(func, *args, **kwargs)
        if func in _CONVOLUTIONS and torch.is_autocast_enabled("cpu"):
            call = _bind(*args, **kwargs)
            if _is_affected(call):
                return _in_float32(func, *call).to(call.input.dtype)
            if _is_pointwise(call):
                product = functional.linear(call.input.movedim(1, -1), call.weight.flatten(1), call.bias)
                return product.movedim(-1, 1)
            self.on_convolution(func, call)
        if func in _TRANSPOSED and torch.is_autocast_enabled("cpu"):
            return _in_float32(func, *args, **kwargs)
        return func(*args, **kwargs)

    def on_convolution(self, convolution: Callable[..., Tensor], call: "_Call") -> None:
        """Handle a convolution that is about to be computed in bfloat16."""


class _ConvolutionCheck(_CpuWorkarounds):
    """Compare every convolution in both precisions, once for each shape.

    Args:
        grids: Input of the network. The gradient with respect to the input is not needed.

    Attributes:
        fault: Description of the first wrong convolution, or None.
    """

    def __init__(self, grids: Tensor) -> None:
        super().__init__()
        self.grids = grids
        self.fault: str | None = None
        self._checked: set[str] = set()

    def on_convolution(self, convolution: Callable[..., Tensor], call: "_Call") -> None:
        shape = str([list(value.shape) if isinstance(value, Tensor) else value for value in call])
        if self.fault or shape in self._checked:
            return
        self._checked.add(shape)
        expected = self._results(convolution, call, None)
        for right, actual in zip(expected, self._results(convolution, call, expected[0]), strict=True):
            error = float((actual.float() - right).abs().max() / right.abs().max().clamp_min(1e-20))
            if not error < _TOLERANCE:  # this also rejects NaN
                self.fault = (
                    f"on this processor a convolution of {_format_size(call.input)} by {_format_size(call.weight)} or "
                    f"its gradient is wrong in bfloat16, by {error:.2g} of its largest value"
                )

    def _results(self, convolution: Callable[..., Tensor], call: "_Call", expected: Tensor | None) -> list[Tensor]:
        """Return a convolution and its gradients: in float32, or in bfloat16 if the float32 output is given."""
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=expected is not None):
            inputs, weight = call.input.detach().float(), call.weight.detach().float().requires_grad_()
            variables = [weight] if call.input is self.grids else [weight, inputs.requires_grad_()]
            output = convolution(inputs, weight, *map(_to_float32, call[2:]))
            direction = (output if expected is None else expected).detach().to(output.dtype)
            return [output.detach(), *torch.autograd.grad(output, variables, direction)]


class _Call(NamedTuple):
    """Hold the arguments of a convolution."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int | Sequence[int]
    padding: int | str | Sequence[int]
    dilation: int | Sequence[int]
    groups: int


def _bind(
    input: Tensor,  # noqa: A002  PyTorch's name of the argument
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> _Call:
    return _Call(input, weight, bias, stride, padding, dilation, groups)


def _is_affected(call: _Call) -> bool:
    """Return whether a convolution is dilated, or its kernel fits only once into its input along an axis."""
    axes = call.weight.dim() - 2
    strides, dilations = (
        [each] * axes if isinstance(each, int) else list(each) * (axes if len(each) == 1 else 1)
        for each in (call.stride, call.dilation)
    )
    lengths, kernels = call.input.shape[-axes:], call.weight.shape[-axes:]
    return any(
        (kernel > 1 or stride > 1) and (dilation > 1 or length < kernel + stride)
        for length, kernel, stride, dilation in zip(lengths, kernels, strides, dilations, strict=True)
    )


def _is_pointwise(call: _Call) -> bool:
    """Return whether a convolution has kernels of size 1 and takes every voxel once."""
    no_padding = isinstance(call.padding, str) or not np.any(call.padding)  # "same" and "valid" are the same here
    return (
        set(call.weight.shape[2:]) == {1} and bool(np.all(np.equal(call.stride, 1))) and no_padding and call.groups == 1
    )


def _in_float32(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return function(*map(_to_float32, args), **{name: _to_float32(value) for name, value in kwargs.items()})


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _pool(function: Callable[..., Any], values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pool without changing precision and memory layout."""
    with torch.autocast("cpu", enabled=False):
        if "avg" not in function.__name__:
            return function(values, *args, **kwargs)
        pooled = function(values.float(), *args, **kwargs).to(values.dtype)  # PyTorch has no bfloat16 average pooling
    if values.dim() == 5 and values.is_contiguous(memory_format=torch.channels_last_3d):
        pooled = pooled.contiguous(memory_format=torch.channels_last_3d)
    return pooled


def _format_size(values: Tensor) -> str:
    return " x ".join(map(str, values.shape))
