"""Running a network on grids."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ichprog.errors import UnknownName
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    from ichprog.network import Network

RUNTIMES = ("auto", "torch")
PRECISIONS = ("float32", "bfloat16")


class Answer(NamedTuple):
    """What a network says of one task.

    Attributes:
        logits: `(B, K)`.
        probabilities: `(B, labels)`.
    """

    logits: np.ndarray
    probabilities: np.ndarray


class TorchRuntime:
    """One fold's network on one device.

    Args:
        spec: The model.
        path: The fold's weights, as safetensors.
        device: A device of torch, as `choose_device` gives it.
        precision: One of `PRECISIONS`; with "bfloat16" the matrix products are rounded.

    Raises:
        WeightsError: The weights do not fit the network.
    """

    name = "torch"

    def __init__(self, spec: ModelSpec, path: Path, device: str, precision: str) -> None:
        from ichprog import network

        self.device, self.precision = device, precision
        self.network: Network = network.load(spec, path).to(device)

    def run(self, grids: np.ndarray) -> dict[str, Answer]:
        """Each task's answer.

        Args:
            grids: `(B, D, H, W)` float32.
        """
        import torch

        with torch.inference_mode(), self.rounding():
            logits = self.network(torch.from_numpy(grids).to(self.device)[:, None])
        logits = {task: values.float() for task, values in logits.items()}
        probabilities = self.network.probabilities(logits)
        return {task: Answer(logits[task].cpu().numpy(), probabilities[task].cpu().numpy()) for task in logits}

    def rounding(self) -> AbstractContextManager[Any]:
        """The context in which the network computes at the precision asked for."""
        import torch

        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)


def choose(runtime: str, device: str, precision: str) -> tuple[str, str]:
    """The runtime and the device that "auto" stands for, or those asked for.

    Raises:
        UnknownName: There is no such runtime, precision or device here.
    """
    if runtime not in RUNTIMES:
        raise UnknownName("runtime", runtime, RUNTIMES)
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    import torch

    here = ["auto", "cpu"]
    here += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here += ["mps"] if torch.backends.mps.is_available() else []
    asked = "cuda:0" if device == "cuda" else device
    if asked not in here:
        raise UnknownName("device", device, here)
    if asked == "auto":
        asked = "cuda:0" if torch.cuda.is_available() else "cpu"
    return "torch", asked
