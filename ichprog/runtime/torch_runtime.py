"""The torch runtime: runs a network on any device that torch supports."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ichprog import networks, saliency
from ichprog.runtime import TaskOutput
from ichprog.spec import ModelSpec


class TorchRuntime:
    """The network of one fold on one device.

    Args:
        spec: The specification of the model.
        path: Weights of the fold, as safetensors.
        device: A torch device.
        precision: "float32" or "bfloat16", the precision of matrix products.

    Raises:
        WeightsError: The weights do not fit the network.
    """

    def __init__(self, spec: ModelSpec, path: Path, device: str, precision: str) -> None:
        self.device, self.precision = device, precision
        self.network = networks.load(spec, path).to(device)
        if device.startswith("cuda"):
            networks.channels_last(self.network)

    def run(self, grids: np.ndarray, clinical: np.ndarray | None = None) -> dict[str, TaskOutput]:
        """Run the network, as in `Runtime.run`."""
        with torch.inference_mode(), self._autocast():
            values = None if clinical is None else torch.from_numpy(clinical).to(self.device)
            outputs = self.network.outputs(torch.from_numpy(grids).to(self.device)[:, None], values)
        return {task: TaskOutput(*(each.cpu().numpy() for each in values)) for task, values in outputs.items()}

    def release_memory(self) -> None:
        """Do nothing: the torch runtime holds no releasable memory."""

    def prefetch_explanation(self) -> None:
        """Do nothing: the torch runtime explains with the loaded network."""

    def compile(self) -> None:
        """Do nothing: the torch runtime has no graphs."""

    def is_compiled(self, *, explain: bool) -> bool:  # noqa: ARG002  # as in `Runtime.is_compiled`
        """Return True: the torch runtime has no graphs."""
        return True

    def torch_module(self) -> nn.Module:
        """Return the network that this runtime runs."""
        return self.network

    @contextmanager
    def explanation_session(
        self,
        grid: np.ndarray,
        layers: Collection[str | None],
        *,
        needs_network: bool,  # noqa: ARG002  # the torch network is always there
        clinical: np.ndarray | None = None,
    ) -> Iterator[saliency.ForwardPass]:
        """Run one forward pass with autograd, as in `Runtime.explanation_session`."""
        names = {saliency.resolve_layer(self.network, layer) for layer in layers}
        with torch.inference_mode(mode=False), torch.enable_grad():
            values = torch.from_numpy(grid).to(self.device)[None, None].requires_grad_()
            if clinical is not None:
                self.network.fixed_clinical = torch.from_numpy(clinical).to(self.device)[None]
            try:
                yield saliency.TorchPass(self.network, values, names, self._autocast)
            finally:
                self.network.fixed_clinical = None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
