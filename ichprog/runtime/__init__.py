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

from ichprog.errors import PluginError, UnknownName
from ichprog.hub import WeightFile
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    from ichprog.saliency import Pass

__all__ = ["PRECISIONS", "RUNTIMES", "Answer", "Choice", "Runtime", "choose", "members"]

RUNTIMES = ("auto", "openvino", "torch")
PRECISIONS = ("float32", "bfloat16")


class Answer(NamedTuple):
    """What a network says of one task.

    Attributes:
        logits: `(B, K)`.
        probabilities: `(B, labels)`.
    """

    logits: np.ndarray
    probabilities: np.ndarray


class Runtime(Protocol):
    """One fold's network, ready to run."""

    def answer(self, grids: np.ndarray) -> dict[str, Answer]:
        """The answer to each task.

        Args:
            grids: `(B, D, H, W)` float32.
        """

    def rest(self) -> None:
        """Gives back the memory that runs take, until the next."""

    def expect_to_explain(self) -> None:
        """Begins to load what explaining takes, beside whatever the caller does next."""

    def forward_pass(
        self, grid: np.ndarray, methods: Collection[Callable[..., Any]], layers: Collection[str | None]
    ) -> "AbstractContextManager[Pass]":
        """One forward pass, from which saliency methods explain while the block runs.

        Args:
            grid: `(D, H, W)` float32.
            methods: The methods that will ask.
            layers: The layers they ask for; None is the backbone's own choice.

        Raises:
            UnknownName: The network has no such layer.
        """


class Choice(NamedTuple):
    """How networks are run.

    Attributes:
        runtime: "openvino" or "torch".
        device: A device of torch.
        precision: One of `PRECISIONS`.
        firm: Whether the runtime was asked for by name, so that no other stands in for it.
        note: Why it is not what was asked for, or None.
    """

    runtime: str
    device: str
    precision: str
    firm: bool
    note: str | None = None


def choose(runtime: str, device: str, precision: str) -> Choice:
    """What "auto" stands for here: OpenVINO on a processor, torch on a graphics card.

    Args:
        runtime: One of `RUNTIMES`.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: One of `PRECISIONS`; what a processor does not compute in becomes float32.

    Raises:
        UnknownName: There is no such runtime, precision or device here.
    """
    if runtime not in RUNTIMES:
        raise UnknownName("runtime", runtime, RUNTIMES)
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if runtime == "openvino" and device not in ("auto", "cpu"):
        raise UnknownName(
            "device of the runtime openvino", device, ("auto", "cpu"), "Other devices take runtime='torch'."
        )
    where = "cpu" if runtime == "openvino" or device == "cpu" else _device(device)
    if where != "cpu" or runtime == "torch":
        return Choice("torch", where, precision, firm=True)
    from ichprog.runtime import engine

    engine.wake()
    if precision == "bfloat16" and not engine.computes_in_bfloat16():
        note = "this processor does not compute in bfloat16, so float32 was taken"
        return Choice("openvino", where, "float32", runtime == "openvino", note)
    return Choice("openvino", where, precision, runtime == "openvino")


def members(
    spec: ModelSpec, files: Sequence[WeightFile], choice: Choice, cache: Path
) -> tuple[tuple[Runtime, ...], Choice]:
    """Each fold's network, ready to run, and how it is run in the end.

    Args:
        spec: The model.
        files: Each fold's weights.
        choice: How they are to be run. Torch stands in for OpenVINO where that cannot run the network.
        cache: The folder where compiled networks are kept.

    Raises:
        WeightsError: The weights do not fit the network.
        SpecError: The spec names options that its plugins refuse.
        UnknownName: The spec names a plugin that is not installed.
        PluginError: A plugin cannot be loaded or breaks its contract; or OpenVINO, asked for by name, cannot run it.
    """
    if choice.runtime == "openvino":
        from ichprog.runtime.compiled import NotCompiledError, OpenVinoRuntime

        try:
            return tuple(OpenVinoRuntime(spec, file, choice.precision, cache) for file in files), choice
        except NotCompiledError as error:
            if choice.firm:
                raise PluginError(f"{error}. Take runtime='torch', or 'auto', which does so by itself.") from error
            choice = choice._replace(runtime="torch", note=str(error))
    from ichprog.runtime.eager import TorchRuntime

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
        raise UnknownName("device", asked, here)
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
