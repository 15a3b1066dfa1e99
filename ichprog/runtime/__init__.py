"""Running a network on grids.

`eager` runs it in torch, on any device: short, and what the other is held against. `compiled` runs it as OpenVINO
compiled it for this processor, faster and without torch: `engine` is OpenVINO itself, `kept` keeps what was compiled,
and `guided` makes the graph that explains out of the graph that answers.
"""

import ctypes
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ichprog.errors import PluginError, UnknownNameError
from ichprog.hub import WeightFile
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    from ichprog.saliency import Pass

__all__ = ["PRECISIONS", "RUNTIMES", "Runtime", "RuntimeConfig", "TaskOutput", "build_runtimes", "resolve_runtime"]

RUNTIMES = ("auto", "openvino", "torch")
PRECISIONS = ("float32", "bfloat16")


class TaskOutput(NamedTuple):
    """What a network says of one task.

    Attributes:
        logits: `(B, K)`.
        probabilities: `(B, labels)`.
    """

    logits: np.ndarray
    probabilities: np.ndarray


class Runtime(Protocol):
    """One fold's network, ready to run."""

    def run(self, grids: np.ndarray) -> dict[str, TaskOutput]:
        """The answer to each task.

        Args:
            grids: `(B, D, H, W)` float32.
        """

    def release_memory(self) -> None:
        """Gives back the memory that runs take, until the next."""

    def prefetch_explanation(self) -> None:
        """Begins to load what explaining takes, beside whatever the caller does next."""

    def explanation_session(
        self, grid: np.ndarray, methods: Collection[Callable[..., Any]], layers: Collection[str | None]
    ) -> "AbstractContextManager[Pass]":
        """One forward pass, from which saliency methods explain while the block runs.

        Args:
            grid: `(D, H, W)` float32.
            methods: The methods that will ask.
            layers: The layers they ask for; None is the backbone's own choice.

        Raises:
            UnknownNameError: The network has no such layer.
        """


class RuntimeConfig(NamedTuple):
    """How networks are run.

    Attributes:
        runtime: "openvino" or "torch".
        device: A device of torch.
        precision: One of `PRECISIONS`.
        explicit: Whether the runtime was asked for by name, so that no other stands in for it.
        note: Why it is not what was asked for, or None.
    """

    runtime: str
    device: str
    precision: str
    explicit: bool
    fallback_reason: str | None = None


def resolve_runtime(runtime: str, device: str, precision: str) -> RuntimeConfig:
    """What "auto" stands for here: OpenVINO on a processor, torch on a graphics card.

    Args:
        runtime: One of `RUNTIMES`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: One of `PRECISIONS`; what a processor does not compute in becomes float32.

    Raises:
        UnknownNameError: There is no such runtime, precision or device here.
    """
    if runtime not in RUNTIMES:
        raise UnknownNameError("runtime", runtime, RUNTIMES)
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    if runtime == "openvino" and device not in ("auto", "cpu"):
        raise UnknownNameError(
            "device of the runtime openvino", device, ("auto", "cpu"), "Other devices take runtime='torch'."
        )
    where = "cpu" if runtime == "openvino" or device == "cpu" else _device(device)
    if where != "cpu" or runtime == "torch":
        return RuntimeConfig("torch", where, precision, explicit=True)
    from ichprog.runtime.openvino import backend

    backend.wake()
    if precision == "bfloat16" and not backend.computes_in_bfloat16():
        note = "this processor does not compute in bfloat16, so float32 was taken"
        return RuntimeConfig("openvino", where, "float32", runtime == "openvino", note)
    return RuntimeConfig("openvino", where, precision, runtime == "openvino")


def build_runtimes(
    spec: ModelSpec, files: Sequence[WeightFile], choice: RuntimeConfig, cache: Path
) -> tuple[tuple[Runtime, ...], RuntimeConfig]:
    """Each fold's network, ready to run, and how it is run in the end.

    Args:
        spec: The model.
        files: Each fold's weights.
        choice: How they are to be run. Torch stands in for OpenVINO where that cannot run the network.
        cache: The folder where compiled networks are kept.

    Raises:
        WeightsError: The weights do not fit the network.
        SpecError: The spec names options that its plugins refuse.
        UnknownNameError: The spec names a plugin that is not installed.
        PluginError: A plugin cannot be loaded or breaks its contract; or OpenVINO, asked for by name, cannot run it.
    """
    if choice.runtime == "openvino":
        from ichprog.runtime.openvino.runtime import CompilationError, OpenVinoRuntime

        try:
            return tuple(OpenVinoRuntime(spec, file, choice.precision, cache) for file in files), choice
        except CompilationError as error:
            if choice.explicit:
                raise PluginError(f"{error}. Take runtime='torch', or 'auto', which does so by itself.") from error
            choice = choice._replace(runtime="torch", fallback_reason=str(error))
    from ichprog.runtime.torch_runtime import TorchRuntime

    return tuple(TorchRuntime(spec, file.path, choice.device, choice.precision) for file in files), choice


def _device(asked: str) -> str:
    """A device by the name torch has for it; torch is asked only where there may be another than the processor."""
    if asked == "auto" and not _may_have_cuda():
        return "cpu"
    import torch

    here = ["auto", "cpu"]
    here += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here += ["mps"] if torch.backends.mps.is_available() else []
    device = "cuda:0" if asked == "cuda" else asked
    if device not in here:
        raise UnknownNameError("device", asked, here)
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return device


def _may_have_cuda() -> bool:
    """Whether NVIDIA's driver is here, which is known long before torch is imported."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
