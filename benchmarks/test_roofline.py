"""The network.

The speed of the network is compared with the fastest matrix product of the same processor at the same precision: the
best of two libraries and several sizes. Only the operations of the convolutions are counted. Other operations cost time
and count as zero. Transitions average cells before they mix channels, which saves seven eighths of their
multiplications; the saved ones are not counted either. In the plot, the horizontal axis is the number of operations for
each byte that the convolutions must read or write. The slope is the speed of copying memory.
"""

import time

import numpy as np
import pytest
import torch

import ichprog
from ichprog import zoo

from support import reference_pipeline
from workloads import SEED

SIZES = (384, 512, 768, 1024, 1536, 2048, 4096)
PRODUCTS = 4e10  # operations per measurement, so that small products are timed as long as large ones
TRANSITIONS = ("transition1.conv", "transition2.conv", "transition3.conv")
BYTES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("precision", BYTES)
def test_the_speed_of_the_network(compare, record, cache, precision):
    model = ichprog.load_model(precision=precision)
    if model.precision != precision:
        pytest.skip(model.fallback_reason)
    shape = model.spec.input.shape
    grid = np.random.default_rng(0).random((1, *shape), np.float32)
    operations, computed, values = count_operations(shape)
    product, product_operations, product_name = fastest_product(precision)
    ours, peer = compare(lambda: model.predict_grids(grid), product, rounds=15)
    record(
        precision, "GFLOP/s",
        [computed / s / 1e9 for s in ours.seconds], [product_operations / s / 1e9 for s in peer.seconds],
        peer_name=product_name, target=("ratio", "at least", 0.85), intensity=computed / (values * BYTES[precision]),
    )  # fmt: skip
    if precision == "float32":
        eager = reference_pipeline.network(zoo.DEFAULT, SEED)
        with torch.inference_mode():
            seconds = [seconds_of(lambda: eager(torch.from_numpy(grid)[None])) for _ in range(4)][1:]
        record("as published, eager float32", "GFLOP/s", [operations / s / 1e9 for s in seconds],
               intensity=operations / (values * BYTES[precision]))  # fmt: skip
        record("copying memory", "GB/s", bandwidth())
        record("operations for one grid of " + " x ".join(map(str, shape)), "GFLOP", [operations / 1e9])


def count_operations(shape):
    """Return the operations of the convolutions as published, those done here, and the number of values they touch."""
    total = {"operations": 0, "computed": 0, "values": 0}

    def count(layer, inputs, output):
        operations = 2 * output.numel() * layer.weight[0].numel()
        total["operations"] += operations
        total["computed"] += operations // (8 if layer in transitions else 1)
        total["values"] += inputs[0].numel() + layer.weight.numel() + output.numel()

    network = reference_pipeline.network(zoo.DEFAULT, SEED).to("meta")
    transitions = {layer for name, layer in network.named_modules() if name.endswith(TRANSITIONS)}
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.empty(1, 1, *shape, device="meta"))
    return total["operations"], total["computed"], total["values"]


def fastest_product(precision):
    """Return the fastest repeated matrix product of two libraries, its number of operations, and its name."""
    products_by_key = {}
    for size in SIZES:
        times = round(PRODUCTS / (2 * size**3)) or 1
        for library, product in (("torch.mm", torch_product), ("OpenVINO's MatMul", openvino_product)):
            products_by_key[library, size] = repeated(product(size, precision), times), times * 2 * size**3
    for products, _ in products_by_key.values():
        products()
    rates = {
        key: operations / min(seconds_of(products) for _ in range(3))
        for key, (products, operations) in products_by_key.items()
    }
    library, size = max(rates, key=rates.get)
    return *products_by_key[library, size], f"{library} of {size} x {size}, the fastest matrix product"


def repeated(product, times):
    def products():
        for _ in range(times):
            product()

    return products


def torch_product(size, precision):
    first, second = torch.rand(2, size, size).to(getattr(torch, precision))
    out = torch.empty_like(first)
    return lambda: torch.mm(first, second, out=out)


def openvino_product(size, precision):
    import openvino
    from openvino import opset13

    first, second = np.random.default_rng(0).random((2, size, size), np.float32)
    parameter = opset13.parameter(first.shape, np.float32)
    # the second factor is constant, like weights, so that OpenVINO can prepare its memory layout
    model = openvino.Model([opset13.matmul(parameter, opset13.constant(second), False, False)], [parameter])
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    request = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
    request.set_input_tensor(openvino.Tensor(first))
    return request.infer


def seconds_of(task):
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def bandwidth():
    """Return GB/s read and written while copying an array that fits in no cache."""
    first = torch.rand(2**27)
    second = torch.empty_like(first)
    return [2 * first.nbytes / seconds_of(lambda: second.copy_(first)) / 1e9 for _ in range(6)][1:]
