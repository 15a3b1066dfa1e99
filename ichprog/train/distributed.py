"""The processes that train together: one, or several that `accelerate launch` or `torchrun` started."""

import atexit
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ichprog.errors import IchprogError, RunError, missing_extra
from ichprog.runtime import resolve_runtime

_T = TypeVar("_T")


class Team:
    """This process among those that train together.

    Args:
        device: A device of `load_model`. Where processes are several, each takes its own: "auto" or "cpu".

    Raises:
        UnknownNameError: There is no such device.
        RunError: Several processes were started with one device for all.
        IchprogError: Several processes were started and Accelerate is not installed.
    """

    def __init__(self, device: str) -> None:
        self.size, self.rank, self._accelerator = int(os.environ.get("WORLD_SIZE", "1")), 0, None
        if self.size == 1:
            self.device = torch.device(resolve_runtime("auto", device, "float32")[1])
            return
        if device not in ("auto", "cpu"):
            raise RunError(f"{self.size} processes cannot all use {device!r}; give 'auto', or 'cpu' for all.")
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise missing_extra("train", "accelerate", "Training in several processes") from error
        # Precision is the protocol's, whatever the launcher was configured for.
        self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", gradient_accumulation_steps=1)
        atexit.register(self._accelerator.end_training)  # a process that ends before its group's threads is aborted
        self.rank, self.size = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this device, its gradients averaged over all processes."""
        module = module.to(self.device)
        return module if self._accelerator is None else cast("nn.Module", self._accelerator.prepare_model(module))

    def alone(self, module: nn.Module, when: bool) -> AbstractContextManager[Any]:
        """A context in which gradients stay with this process, where more batches follow before the step."""
        if self._accelerator is None or not when:
            return nullcontext()
        return cast("AbstractContextManager[Any]", self._accelerator.no_sync(module))

    def gather(self, found: list[_T]) -> list[_T]:
        """Everybody's entries."""
        if self._accelerator is None:
            return found
        from accelerate.utils import gather_object

        return cast("list[_T]", gather_object(found))

    def agree(self, work: Callable[[], _T]) -> _T:
        """What `work` gives when the leading process does it; its error is everybody's."""
        if self._accelerator is None:
            return work()
        from accelerate.utils import broadcast_object_list

        said: list[Any] = [None, None]
        if self.leads:
            try:
                said[0] = work()
            except IchprogError as error:
                said[1] = error
        broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return cast("_T", said[0])

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every process the leading one's buffers, such as the running means of normalisation."""
        if self._accelerator is None:
            return
        from accelerate.utils import broadcast

        for buffer in module.buffers():
            buffer.copy_(broadcast(buffer))
