"""OpenVINO itself: how it is imported, what it says of the processor, and how a torch module gets into it."""

import functools
import importlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import nn

_Done = TypeVar("_Done")


def openvino() -> Any:
    """OpenVINO without the tools that it imports by itself, which take as long as the rest and send word to its makers.

    Who imports OpenVINO for himself, before or after, finds it whole.
    """
    return wake()()[0]


@functools.cache
def wake() -> Callable[[], tuple[Any, Any]]:
    """Begins to import OpenVINO beside whatever the caller does next; what comes back waits for it and its core."""
    return aside(_woken)


def _woken() -> tuple[Any, Any]:
    module = _imported()
    return module, module.Core()


def _imported() -> Any:
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    tools = "openvino.tools.ovc"
    sys.modules[tools] = None  # type: ignore[assignment]  # is not found then, which OpenVINO allows for
    try:
        module: Any = importlib.import_module("openvino")
    finally:
        del sys.modules[tools]
    module.convert_model = lambda *args, **options: importlib.import_module(tools).convert_model(*args, **options)
    return module


def processor() -> str:
    """The processor and what it computes in, as OpenVINO tells them."""
    name, capabilities = (core().get_property("CPU", key) for key in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
    return " ".join([name.strip(), *sorted(capabilities)])


def computes_in_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def core() -> Any:
    """OpenVINO's core, which compiles and loads."""
    return wake()()[1]


def converted(module: "nn.Module", shape: Sequence[int]) -> Any:
    """A torch module as a graph of OpenVINO.

    Args:
        module: From one grid `(1, 1, D, H, W)` on.
        shape: D, H and W.

    Raises:
        Exception: Whatever torch and OpenVINO raise where they cannot.
    """
    import torch
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    size = (1, 1, *shape)
    with quiet(), torch.no_grad():
        program = torch.export.export(module, (torch.zeros(size),))
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchFXPythonDecoder.from_exported_program(program)  # has to live as long as it is read
        model = frontend.convert(frontend.load(decoder))
    model.reshape(list(size))
    apply_moc_transformations(model, cf=False)  # joins what belongs together: normalisation with convolution
    _pool_first(model)
    return model


def _pool_first(model: Any) -> None:
    """Averages over cells what each cell mixes of its channels before it does: the same numbers, from fewer cells."""
    make = openvino().opset15
    whole = {"strides": [1, 1, 1], "pads_begin": [0, 0, 0], "pads_end": [0, 0, 0], "dilations": [1, 1, 1]}
    for pool in model.get_ops():
        mix = pool.input_value(0).get_node() if pool.get_type_name() == "AvgPool" else None
        if mix is None or mix.get_type_name() != "Convolution" or len(mix.output(0).get_target_inputs()) > 1:
            continue
        values, weights = mix.input_values()
        about = mix.get_attributes()
        if list(weights.get_shape())[2:] == [1, 1, 1] and all(about[key] == value for key, value in whole.items()):
            window = {key.replace("-", "_"): value for key, value in pool.get_attributes().items()}
            pooled = make.avg_pool(values, kernel_shape=window.pop("kernel"), **window)
            pool.output(0).replace(make.convolution(pooled, weights, **whole).output(0))
    model.validate_nodes_and_infer_types()


def pair_columns(model: Any) -> None:
    """Has convolutions of one channel that step by two columns see those as two channels: the same numbers.

    Processors multiply bfloat16 in pairs of channels, and one alone would leave half of every pair empty.

    Args:
        model: A graph of OpenVINO; it is changed.
    """
    make = openvino().opset15
    for convolution in model.get_ops():
        if convolution.get_type_name() != "Convolution":
            continue
        values, weights = convolution.input_values()
        about, kernel = convolution.get_attributes(), weights.get_node()
        steps = about["strides"][-1], about["dilations"][-1]
        if list(weights.get_shape())[1] != 1 or steps != (2, 1) or kernel.get_type_name() != "Constant":
            continue
        *strides, _ = about["strides"]
        (*begin, left), (*end, _) = about["pads_begin"], about["pads_end"]
        taps = np.asarray(kernel.data, np.float32)
        taps = np.pad(taps, [(0, 0)] * (taps.ndim - 1) + [(0, taps.shape[-1] % 2)])
        taps = np.moveaxis(taps.reshape(*taps.shape[:-1], -1, 2)[:, 0], -1, 1)
        batch, _, *sizes = (int(n) for n in values.get_shape())
        columns = convolution.output(0).get_shape()[-1] + taps.shape[-1] - 1
        right = 2 * columns - left - sizes[-1]
        before, after = (np.array([*[0] * (len(sizes) + 1), each]) for each in (left, right))
        padded = make.pad(values, before, after, "constant", make.constant(np.float32(0)))
        pairs = make.reshape(padded, make.constant(np.array([batch, *sizes[:-1], columns, 2])), special_zero=False)
        turned = make.transpose(pairs, make.constant(np.array([0, len(sizes) + 1, *range(1, len(sizes) + 1)])))
        found = make.convolution(
            turned,
            make.constant(np.ascontiguousarray(taps)),
            strides=[*strides, 1],
            pads_begin=[*begin, 0],
            pads_end=[*end, 0],
            dilations=about["dilations"],
        )
        convolution.output(0).replace(found.output(0))
    model.validate_nodes_and_infer_types()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps from users what torch and OpenVINO say to their developers of a graph, and leaves logging as it was."""
    root, silent = logging.getLogger(), logging.NullHandler()
    disabled = root.manager.disable
    root.addHandler(silent)  # without any, the first word to the root logger would set one up for good
    logging.disable(logging.CRITICAL)
    try:
        # What torch prints of a graph that it cannot trace is in the error too.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)


def aside(work: Callable[[], _Done]) -> Callable[[], _Done]:
    """Begins work in a thread.

    Args:
        work: The work.

    Returns:
        A function that waits for what it gives, and raises what it raises.
    """
    done: Future[_Done] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="ichprog-load").start()
    return done.result
