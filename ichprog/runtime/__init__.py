"""Run networks on grids.

`torch_runtime` runs a network in torch on any device and is the reference. `openvino` runs a network that OpenVINO
compiled for this CPU: it is faster, and needs no torch once the compiled graphs are cached.
"""

import ctypes
import logging
import sys
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ichprog.errors import PluginError, UnknownNameError
from ichprog.hub import WeightFile
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from ichprog.saliency import ForwardPass

__all__ = ["PRECISIONS", "RUNTIMES", "Runtime", "RuntimeConfig", "TaskOutput", "build_runtimes", "resolve_runtime"]

RUNTIMES = ("auto", "cached", "openvino", "torch")
PRECISIONS = ("float32", "bfloat16")

_logger = logging.getLogger(__name__)


class TaskOutput(NamedTuple):
    """The output of a network for one task.

    Attributes:
        logits: `(B, K)`.
        probabilities: `(B, labels)`.
        voxels: `(B, R + 1, d, h, w)` probabilities of no region and of each region, for a dense task.
        slices: `(B, d)` probability that a slice holds a region, for a dense task.
        regions: `(B, R)` probability that the scan holds each region, for a dense task.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    voxels: np.ndarray | None = None
    slices: np.ndarray | None = None
    regions: np.ndarray | None = None


class Runtime(Protocol):
    """The network of one fold, ready to run."""

    def run(self, grids: np.ndarray, clinical: np.ndarray | None = None) -> dict[str, TaskOutput]:
        """Run the network and return the output of each task.

        Args:
            grids: `(B, D, H, W)` float32.
            clinical: `(B, 2 V)` float32 from `clinical.encode`, for a model with clinical values; None if no value is
                known.
        """

    def release_memory(self) -> None:
        """Release the working memory until the next run."""

    def prefetch_explanation(self) -> None:
        """Prefetch the explanation graphs in a background thread."""

    def compile(self) -> None:
        """Compile and cache every graph of predictions and explanations that is not cached yet."""

    def is_compiled(self, *, explain: bool) -> bool:
        """Return whether a run needs no graph that is not cached yet.

        Args:
            explain: Whether the run explains, too.
        """

    def torch_module(self) -> "nn.Module":
        """Return the network as a torch module in evaluation mode."""

    def explanation_session(
        self,
        grid: np.ndarray,
        layers: Collection[str | None],
        *,
        needs_network: bool,
        clinical: np.ndarray | None = None,
    ) -> "AbstractContextManager[ForwardPass]":
        """Run one forward pass, which saliency methods share while the block runs.

        Args:
            grid: `(D, H, W)` float32.
            layers: Layers that the methods read; None is the `cam_layer` of the backbone.
            needs_network: Whether a method needs the torch network.
            clinical: `(2 V,)` float32 from `clinical.encode`, which stay fixed; None if no value is known.

        Raises:
            UnknownNameError: The network has no such layer.
        """


class RuntimeConfig(NamedTuple):
    """How networks are run.

    Attributes:
        runtime: "openvino" or "torch".
        device: A torch device.
        precision: One of `PRECISIONS`.
        explicit: Whether the user named the runtime, so that there is no fallback.
        fallback_reason: Why runtime or precision differ from the requested ones, or None.
        only_cached: Whether nothing is compiled: torch computes what has no cached graph.
    """

    runtime: str
    device: str
    precision: str
    explicit: bool
    fallback_reason: str | None = None
    only_cached: bool = False


def resolve_runtime(runtime: str, device: str, precision: str) -> RuntimeConfig:
    """Resolve "auto" and "cached": OpenVINO on the CPU, torch on other devices.

    Args:
        runtime: One of `RUNTIMES`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: One of `PRECISIONS`. Without bfloat16 support in the CPU, OpenVINO uses float32.

    Raises:
        UnknownNameError: There is no such runtime, precision or device.

    Examples:
        >>> resolve_runtime("torch", "cpu", "float32")
        RuntimeConfig(runtime='torch', device='cpu', precision='float32', explicit=True, fallback_reason=None)
    """
    if runtime not in RUNTIMES:
        raise UnknownNameError("runtime", runtime, RUNTIMES)
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    if runtime == "openvino" and device not in ("auto", "cpu"):
        raise UnknownNameError(
            "device of the runtime openvino", device, ("auto", "cpu"), "For other devices use runtime='torch'."
        )
    resolved = "cpu" if runtime == "openvino" or device == "cpu" else _resolve_device(device)
    if resolved != "cpu" or runtime == "torch":
        return RuntimeConfig("torch", resolved, precision, explicit=True)
    from ichprog.runtime.openvino import backend

    backend.start_import()
    reason = None
    if precision == "bfloat16" and not backend.supports_bfloat16():
        precision, reason = "float32", "this CPU does not support bfloat16, so the model computes in float32"
        _logger.info("Precision falls back to float32: %s.", reason)
    return RuntimeConfig("openvino", resolved, precision, runtime == "openvino", reason, runtime == "cached")


def build_runtimes(
    spec: ModelSpec, files: Sequence[WeightFile], config: RuntimeConfig, cache: Path
) -> tuple[tuple[Runtime, ...], RuntimeConfig]:
    """Build the runtime of each fold.

    Args:
        spec: The specification of the model.
        files: Weight file of each fold.
        config: The requested runtime. If OpenVINO cannot run the network, or only cached graphs are requested and a
            fold has none, torch runs every fold.
        cache: The cache folder for compiled networks.

    Returns:
        The runtimes, and the configuration with which they run.

    Raises:
        WeightsError: The weights do not fit the network.
        SpecError: The spec has options that its plugins refuse.
        UnknownNameError: The spec names a plugin that is not installed.
        PluginError: A plugin cannot be loaded or breaks its contract, or OpenVINO cannot run the network and the user
            named that runtime.
    """
    if config.runtime == "openvino":
        from ichprog.runtime.openvino.runtime import CompilationError, OpenVinoRuntime, is_cached

        if config.only_cached and not all(is_cached(spec, file, config.precision, cache) for file in files):
            return _build_torch(spec, files, config._replace(runtime="torch"))
        only_cached = config.only_cached
        try:
            return tuple(OpenVinoRuntime(spec, file, config.precision, cache, only_cached) for file in files), config
        except CompilationError as error:
            if config.explicit:
                raise PluginError(f"{error}. Use runtime='torch', or 'auto' to fall back to torch.") from error
            _logger.info("Falling back to the torch runtime: %s.", error)
            config = config._replace(runtime="torch", fallback_reason=str(error), only_cached=False)
    return _build_torch(spec, files, config)


def _build_torch(
    spec: ModelSpec, files: Sequence[WeightFile], config: RuntimeConfig
) -> tuple[tuple[Runtime, ...], RuntimeConfig]:
    from ichprog.runtime.torch_runtime import TorchRuntime

    return tuple(TorchRuntime(spec, file.path, config.device, config.precision) for file in files), config


def _resolve_device(name: str) -> str:
    """Return the torch device of a name. torch is imported only if there may be another device than the CPU."""
    if name == "auto" and not _has_cuda_driver():
        return "cpu"
    import torch

    available = ["auto", "cpu"]
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available += ["mps"] if torch.backends.mps.is_available() else []
    device = "cuda:0" if name == "cuda" else name
    if device not in available:
        raise UnknownNameError("device", name, available)
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return device


def _has_cuda_driver() -> bool:
    """Return whether NVIDIA's driver is installed, without importing torch."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
