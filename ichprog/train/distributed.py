"""Distributed training: a single process, or several that `accelerate launch` or `torchrun` started."""

import atexit
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ichprog.errors import IchprogError, InvalidValueError, missing_extra
from ichprog.runtime import resolve_runtime

_T = TypeVar("_T")


class DistributedContext:
    """Describe this process among the processes of a training.

    Args:
        device: A device name as in `load_model`. With several processes only "auto" and "cpu" are allowed.

    Attributes:
        device: The device of this process.
        num_processes: Number of processes.
        process_index: Index of this process.

    Raises:
        UnknownNameError: The device does not exist.
        InvalidValueError: There are several processes, and the device is a single one.
        IchprogError: There are several processes, and Accelerate is not installed.

    Examples:
        >>> DistributedContext("cpu").is_main_process
        True
    """

    def __init__(self, device: str) -> None:
        self.num_processes, self.process_index = int(os.environ.get("WORLD_SIZE", "1")), 0
        self._accelerator = None
        if self.num_processes == 1:
            self.device = torch.device(resolve_runtime("auto", device, "float32")[1])
            return
        if device not in ("auto", "cpu"):
            raise InvalidValueError("device", device, f"'auto' or 'cpu' for {self.num_processes} processes")
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise missing_extra("train", "accelerate", "Training in several processes") from error
        # The protocol decides on the precision, whatever the launcher's configuration is.
        self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", gradient_accumulation_steps=1)
        atexit.register(self._accelerator.end_training)  # avoids an abort if a process ends before its group
        self.process_index, self.num_processes = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device

    @property
    def is_main_process(self) -> bool:
        """Return whether this process writes files and reports progress."""
        return self.process_index == 0

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to this process's device and average its gradients over all processes."""
        module = module.to(self.device)
        return module if self._accelerator is None else cast("nn.Module", self._accelerator.prepare_model(module))

    def no_sync(self, module: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """Return a context that keeps gradients local, for all batches of a step but the last."""
        if self._accelerator is None or not enabled:
            return nullcontext()
        return cast("AbstractContextManager[Any]", self._accelerator.no_sync(module))

    def gather(self, entries: list[_T]) -> list[_T]:
        """Return the entries of all processes."""
        if self._accelerator is None:
            return entries
        from accelerate.utils import gather_object

        return cast("list[_T]", gather_object(entries))

    def run_on_main(self, function: Callable[[], _T]) -> _T:
        """Call a function in the main process and return its result, or raise its error, in every process."""
        if self._accelerator is None:
            return function()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main_process:
            try:
                outcome[0] = function()
            except IchprogError as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return cast("_T", outcome[0])

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Copy the main process's buffers, such as running means of batch normalisation, to every process."""
        if self._accelerator is None:
            return
        from accelerate.utils import broadcast

        for buffer in module.buffers():
            buffer.copy_(broadcast(buffer))
