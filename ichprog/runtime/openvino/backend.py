"""OpenVINO's Python API: import, CPU properties, conversion from torch, compilation.

This is the only module that uses private names of OpenVINO (`_offline_transformations` and the decoder of its PyTorch
front end). They are tested with the version `TESTED_VERSION`. With another version, conversion either works, and the
probabilities are compared with torch as always, or raises a CompilationError that names the tested version.
"""

import functools
import importlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ichprog.errors import PluginError

if TYPE_CHECKING:
    from torch import nn

_Result = TypeVar("_Result")

TESTED_VERSION = "2026.4"  # minor version of OpenVINO that is tested
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class CompilationError(PluginError):
    """OpenVINO cannot run a network. The message gives the reason."""


def openvino() -> Any:
    """Return the module `openvino`."""
    return start_import()()[0]


@functools.cache
def start_import() -> Callable[[], tuple[Any, Any]]:
    """Start to import OpenVINO in a background thread.

    Returns:
        A function that waits for the import and returns the module and its `Core`.
    """
    return run_in_thread(_import)


def _import() -> tuple[Any, Any]:
    """Import OpenVINO without `openvino_telemetry`, which would report the import to its makers over the network.

    OpenVINO allows for the absence of that module. A process that has imported either of them before is left alone.
    """
    is_hidden = not {"openvino", "openvino_telemetry"} & sys.modules.keys()
    if is_hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python then reports it as missing
    try:
        module = importlib.import_module("openvino")
    finally:
        if is_hidden:
            del sys.modules["openvino_telemetry"]
    return module, module.Core()


def core() -> Any:
    """Return OpenVINO's `Core`, which compiles and imports models."""
    return start_import()()[1]


def processor() -> str:
    """Return the name of the CPU and its capabilities, as OpenVINO reports them."""
    name, capabilities = (core().get_property("CPU", key) for key in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
    return " ".join([name.strip(), *sorted(capabilities)])


def supports_bfloat16() -> bool:
    """Return whether the CPU multiplies in bfloat16."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def as_tensor(values: np.ndarray) -> Any:
    """Return an OpenVINO tensor that shares the memory of an array."""
    return openvino().Tensor(values, shared_memory=True)


def compile_model(model: Any, precision: str) -> Any:
    """Compile an OpenVINO model for the CPU.

    Args:
        model: The model. With bfloat16 it is changed.
        precision: "float32" or "bfloat16".
    """
    if precision == "bfloat16":
        columns_to_channels(model)
    return core().compile_model(model, "CPU", _settings(precision))


def import_model(exported: np.ndarray, precision: str) -> Any:
    """Import an exported model, which must stay in memory as long as the compiled model.

    Args:
        exported: The bytes of the exported model.
        precision: The precision with which the model was compiled.

    Raises:
        RuntimeError: OpenVINO cannot read the model.
    """
    return core().import_model(as_tensor(exported), "CPU", _settings(precision))


def _settings(precision: str) -> dict[str, str]:
    # Always set the precision: by default OpenVINO chooses bfloat16 if the CPU supports it.
    return {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}


def convert(module: "nn.Module", shape: Sequence[int], values: int = 0) -> Any:
    """Convert a torch module to an OpenVINO model.

    Args:
        module: Takes one grid `(1, 1, D, H, W)`, and `(1, values)` if `values` is not 0.
        shape: D, H and W.
        values: Length of the second input, or 0 for none.

    Raises:
        CompilationError: This version of OpenVINO lacks a private function that the conversion needs.
        Exception: torch or OpenVINO cannot convert the module. They raise many kinds of errors.
    """
    import torch

    fuse, frontends, decoder_type = _private_api()
    sizes = [(1, 1, *shape), *([(1, values)] if values else [])]
    with silenced(), _unchanged_environment(), torch.no_grad():
        program = torch.export.export(module, tuple(torch.zeros(size) for size in sizes))
        frontend = frontends().load_by_framework("pytorch")
        decoder = decoder_type.from_exported_program(program)  # must stay alive during the conversion
        model = frontend.convert(frontend.load(decoder))
    model.reshape({model.input(index): list(size) for index, size in enumerate(sizes)})
    fuse(model, cf=False)  # fuses operations, such as normalisation into convolution
    _pool_before_pointwise_conv(model)
    return model


def _private_api() -> tuple[Any, Any, Any]:
    """Return OpenVINO's transformations, front ends and PyTorch decoder."""
    try:
        from openvino._offline_transformations import apply_moc_transformations
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        TorchFXPythonDecoder.from_exported_program  # noqa: B018  # raises AttributeError if the version lacks it
    except (ImportError, AttributeError) as error:
        raise CompilationError(
            f"OpenVINO {version('openvino')} cannot convert networks for ichprog ({error}). Version {TESTED_VERSION} "
            f"is tested. Install it: pip install 'openvino~={TESTED_VERSION}.0'"
        ) from error
    return apply_moc_transformations, FrontEndManager, TorchFXPythonDecoder


def _pool_before_pointwise_conv(model: Any) -> None:
    """Move average pooling before a pointwise convolution: the same numbers from fewer cells."""
    op = openvino().opset15
    plain = {"strides": [1, 1, 1], "pads_begin": [0, 0, 0], "pads_end": [0, 0, 0], "dilations": [1, 1, 1]}
    for pool in model.get_ops():
        conv = pool.input_value(0).get_node() if pool.get_type_name() == "AvgPool" else None
        if conv is None or conv.get_type_name() != "Convolution" or len(conv.output(0).get_target_inputs()) > 1:
            continue
        values, weights = conv.input_values()
        attributes = conv.get_attributes()
        is_pointwise = list(weights.get_shape())[2:] == [1, 1, 1]
        if is_pointwise and all(attributes[key] == value for key, value in plain.items()):
            window = {key.replace("-", "_"): value for key, value in pool.get_attributes().items()}
            pooled = op.avg_pool(values, kernel_shape=window.pop("kernel"), **window)
            pool.output(0).replace(op.convolution(pooled, weights, **plain).output(0))
    model.validate_nodes_and_infer_types()


def columns_to_channels(model: Any) -> None:
    """Rewrite one-channel convolutions with a column stride of two to see each pair of columns as two channels.

    The numbers stay the same. CPUs multiply bfloat16 in pairs of channels, and a single channel would leave half of
    each pair empty.

    Args:
        model: An OpenVINO model, which is changed.
    """
    op = openvino().opset15
    for conv in model.get_ops():
        if conv.get_type_name() != "Convolution":
            continue
        values, weights = conv.input_values()
        attributes, kernel = conv.get_attributes(), weights.get_node()
        steps = attributes["strides"][-1], attributes["dilations"][-1]
        if list(weights.get_shape())[1] != 1 or steps != (2, 1) or kernel.get_type_name() != "Constant":
            continue
        *strides, _ = attributes["strides"]
        (*begin, left), (*end, _) = attributes["pads_begin"], attributes["pads_end"]
        taps = np.asarray(kernel.data, np.float32)
        taps = np.pad(taps, [(0, 0)] * (taps.ndim - 1) + [(0, taps.shape[-1] % 2)])
        taps = np.moveaxis(taps.reshape(*taps.shape[:-1], -1, 2)[:, 0], -1, 1)
        batch, _, *sizes = (int(n) for n in values.get_shape())
        columns = conv.output(0).get_shape()[-1] + taps.shape[-1] - 1
        right = 2 * columns - left - sizes[-1]
        before, after = (np.array([*[0] * (len(sizes) + 1), n]) for n in (left, right))
        padded = op.pad(values, before, after, "constant", op.constant(np.float32(0)))
        pairs = op.reshape(padded, op.constant(np.array([batch, *sizes[:-1], columns, 2])), special_zero=False)
        order = np.array([0, len(sizes) + 1, *range(1, len(sizes) + 1)])
        rewritten = op.convolution(
            op.transpose(pairs, op.constant(order)),
            op.constant(np.ascontiguousarray(taps)),
            strides=[*strides, 1],
            pads_begin=[*begin, 0],
            pads_end=[*end, 0],
            dilations=attributes["dilations"],
        )
        conv.output(0).replace(rewritten.output(0))
    model.validate_nodes_and_infer_types()


@contextmanager
def silenced() -> Iterator[None]:
    """Hide the developer messages of torch and OpenVINO during a conversion, and restore logging afterwards."""
    root, handler = logging.getLogger(), logging.NullHandler()
    disabled = root.manager.disable
    root.addHandler(handler)  # otherwise the first message to the root logger would configure it for good
    logging.disable(logging.CRITICAL)
    try:
        # What torch prints about a graph that it cannot trace is also in its error.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)


@contextmanager
def _unchanged_environment() -> Iterator[None]:
    """Remove the environment variables that torch sets while it exports a graph."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            del os.environ[name]


def run_in_thread(work: Callable[[], _Result]) -> Callable[[], _Result]:
    """Run a function in a background thread.

    Args:
        work: The function.

    Returns:
        A function that waits for the result and returns it, or raises the exception of `work`.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ichprog-load").start()
    return future.result
