"""A network run in torch, as it stands."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ichprog import networks, saliency
from ichprog.runtime import TaskOutput
from ichprog.spec import ModelSpec


class TorchRuntime:
    """One fold's network on one device.

    Args:
        spec: The model.
        path: The fold's weights, as safetensors.
        device: A device of torch.
        precision: "float32" or "bfloat16", with which matrix products are rounded.

    Raises:
        WeightsError: The weights do not fit the network.
    """

    def __init__(self, spec: ModelSpec, path: Path, device: str, precision: str) -> None:
        self.device, self.precision = device, precision
        self.network = networks.load(spec, path).to(device)
        if device.startswith("cuda"):
            networks.channels_last(self.network)

    def run(self, grids: np.ndarray) -> dict[str, TaskOutput]:
        """Answers, as `Runtime.run` says."""
        with torch.inference_mode(), self._rounding():
            logits = self.network(torch.from_numpy(grids).to(self.device)[:, None])
        logits = {task: values.float() for task, values in logits.items()}
        probabilities = self.network.probabilities(logits)
        return {task: TaskOutput(logits[task].cpu().numpy(), probabilities[task].cpu().numpy()) for task in logits}

    def release_memory(self) -> None:
        """Has nothing to give back."""

    def prefetch_explanation(self) -> None:
        """Has loaded everything."""

    @contextmanager
    def explanation_session(
        self,
        grid: np.ndarray,
        methods: Collection[Callable[..., Any]],  # noqa: ARG002  # any can ask
        layers: Collection[str | None],
    ) -> Iterator[saliency.Pass]:
        """`Runtime.explanation_session`, with its graph kept for any method."""
        names = {saliency.layer_name(self.network, layer) for layer in layers}
        with torch.inference_mode(mode=False), torch.enable_grad():
            values = torch.from_numpy(grid).to(self.device)[None, None].requires_grad_()
            yield saliency.ForwardPass(self.network, values, names, self._rounding)

    def _rounding(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
