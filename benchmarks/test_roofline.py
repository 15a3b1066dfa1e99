"""The network.

How fast the network computes, beside the fastest matrix product that the same processor did at the same precision: the
best of two libraries and several sizes. Operations are those of the convolutions, counted; what else the network does
costs time and counts as nothing, nor does what is left out: transitions average cells before they mix channels, and so
mix an eighth of them. In the plot a point's place from left to right is the operations for each byte that
the convolutions must read or write once, and the slope is what copying memory reaches.
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
PRODUCTS = 4e10  # operations in one go, so that small products are timed for as long as large ones
TRANSITIONS = ("transition1.conv", "transition2.conv", "transition3.conv")
BYTES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("precision", BYTES)
def test_the_network(beside, figure, cache, precision):
    model = ichprog.load_model(precision=precision)
    if model.precision != precision:
        pytest.skip(model.fallback_reason)
    shape = model.spec.input.shape
    grid = np.random.default_rng(0).random((1, *shape), np.float32)
    operations, computed, values = work(shape)
    product, product_operations, product_is = fastest_product(precision)
    ours, peer = beside(lambda: model.predict_grids(grid), product, rounds=15)
    figure(
        precision, "GFLOP/s",
        [computed / s / 1e9 for s in ours.seconds], [product_operations / s / 1e9 for s in peer.seconds],
        beside=product_is, target=("ratio", "at least", 0.85), intensity=computed / (values * BYTES[precision]),
    )  # fmt: skip
    if precision == "float32":
        eager = reference_pipeline.network(zoo.DEFAULT, SEED)
        with torch.inference_mode():
            seconds = [timed(lambda: eager(torch.from_numpy(grid)[None])) for _ in range(4)][1:]
        figure("as published, eager float32", "GFLOP/s", [operations / s / 1e9 for s in seconds],
               intensity=operations / (values * BYTES[precision]))  # fmt: skip
        figure("copying memory", "GB/s", bandwidth())
        figure("operations for one grid of " + " x ".join(map(str, shape)), "GFLOP", [operations / 1e9])


def work(shape):
    """What the convolutions of one grid compute, as published and here, and the values each must touch once."""
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
    """The fastest matrix product of two libraries and several sizes, done often; how much that computes, what it is."""
    made = {}
    for size in SIZES:
        times = round(PRODUCTS / (2 * size**3)) or 1
        for library, product in (("torch.mm", of_torch), ("OpenVINO's MatMul", of_openvino)):
            made[library, size] = often(product(size, precision), times), times * 2 * size**3
    for products, _ in made.values():
        products()
    rates = {key: operations / min(timed(products) for _ in range(3)) for key, (products, operations) in made.items()}
    library, size = max(rates, key=rates.get)
    return *made[library, size], f"{library} of {size} x {size}, the fastest product seen"


def often(product, times):
    def products():
        for _ in range(times):
            product()

    return products


def of_torch(size, precision):
    first, second = torch.rand(2, size, size).to(getattr(torch, precision))
    out = torch.empty_like(first)
    return lambda: torch.mm(first, second, out=out)


def of_openvino(size, precision):
    import openvino
    from openvino import opset13

    first, second = np.random.default_rng(0).random((2, size, size), np.float32)
    given = opset13.parameter(first.shape, np.float32)
    # the second factor is a constant, as weights are, so that it may be laid out beforehand
    model = openvino.Model([opset13.matmul(given, opset13.constant(second), False, False)], [given])
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    request = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
    request.set_input_tensor(openvino.Tensor(first))
    return request.infer


def timed(task):
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def bandwidth():
    """GB/s read and written in copying what no cache holds."""
    first = torch.rand(2**27)
    second = torch.empty_like(first)
    return [2 * first.nbytes / timed(lambda: second.copy_(first)) / 1e9 for _ in range(6)][1:]
