"""Guided backpropagation as an inference graph, built from the graph of the network with one rule per operation.

An inference engine computes no gradients. However, the gradient of a network of convolutions, ReLUs and pooling is
itself such a network, from the features to the grid. Each operation has an adjoint, built from operations that run as
fast as the forward ones. Networks with an operation that has no rule are explained by autograd.

Gradients and saved tensors have their channels last. OpenVINO convolves in this layout, and transposing would take as
long as the operations themselves.

Source of the guided rule: Springenberg et al., 2015 (arXiv 1412.6806): at a ReLU only positive gradients pass, and only
where the ReLU let its input through.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

_LANES = 16  # output channels that one vector instruction computes; fewer take the same time


class UnsupportedOpError(Exception):
    """The network has an operation without a rule. The message names the operation."""


def build_adjoint(openvino: Any, model: Any) -> tuple[Any, Any]:
    """Build the forward graph, which saves tensors for the gradient, and the backward graph, which uses them.

    Args:
        openvino: The module.
        model: An OpenVINO model, grid `(1, 1, D, H, W)` to features `(1, C, d, h, w)`, with static shapes.

    Returns:
        The forward graph, from the grid to the features and the saved tensors. The backward graph, from the gradient
        of a score with respect to the features `(1, C, d, h, w)` and the saved tensors to the guided gradient with
        respect to the grid `(1, 1, D, H, W)`.

    Raises:
        UnsupportedOpError: The model has an operation without a rule.
    """
    builder = _AdjointBuilder(openvino.opset15)
    grid, features = model.inputs[0].node, model.outputs[0].node.input_value(0)
    seed = builder.op.parameter(_shape(features), np.float32)
    gradients = {_key(features): builder.channels_last(seed.output(0))}
    for node in reversed(model.get_ordered_ops()):
        kind = node.get_type_name()
        if kind in ("Parameter", "Constant", "Result"):
            continue
        gradient = gradients.pop(_key(node.output(0)), None)
        if gradient is None or kind not in builder.rules:
            raise UnsupportedOpError(kind)
        for position, share in builder.rules[kind](builder, node, gradient).items():
            source = _key(node.input_value(position))
            gradients[source] = builder.op.add(gradients[source], share).output(0) if source in gradients else share
    forward = openvino.Model([features, *builder.saved], [grid], "forward")
    return forward, openvino.Model(
        [builder.channels_first(gradients[_key(grid.output(0))])], [seed, *builder.inputs], "backward"
    )


class _AdjointBuilder:
    """Builds the backward graph, one operation of the forward graph at a time.

    A rule takes an operation and the gradient of its output. It returns the gradient of each input that depends on the
    grid, keyed by the position of the input.
    """

    def __init__(self, op: Any) -> None:
        self.op = op
        self.saved: list[Any] = []
        self.inputs: list[Any] = []

    def channels_last(self, value: Any) -> Any:
        """Transpose `(N, C, ...)` to `(N, ..., C)`."""
        rank = len(_shape(value))
        return self.op.transpose(value, self.op.constant(np.array([0, *range(2, rank), 1]))).output(0)

    def channels_first(self, value: Any) -> Any:
        """Transpose `(N, ..., C)` to `(N, C, ...)`."""
        rank = len(_shape(value))
        return self.op.transpose(value, self.op.constant(np.array([0, rank - 1, *range(1, rank - 1)]))).output(0)

    def save_for_backward(self, output: Any) -> Any:
        """Add an output to the forward graph and the matching input to the backward graph, and return the input."""
        self.saved.append(output)
        self.inputs.append(self.op.parameter(_shape(output), output.get_element_type()))
        return self.inputs[-1].output(0)

    def relu(self, node: Any, gradient: Any) -> dict[int, Any]:
        passed = self.op.convert(self.op.greater(node.output(0), self.op.constant(np.float32(0))), "u8").output(0)
        mask = self.save_for_backward(self.channels_last(passed))
        if not _is_between_convolutions(node):
            return {0: self.op.multiply(self.op.relu(gradient), self.op.convert(mask, "f32")).output(0)}
        # channels first, so that the engine needs no transposition between the two convolutions
        mask = self.op.convert(self.channels_first(mask), "f32")
        return {0: self.channels_last(self.op.multiply(self.op.relu(self.channels_first(gradient)), mask).output(0))}

    def add(self, node: Any, gradient: Any) -> dict[int, Any]:
        return dict.fromkeys(_varying(node), gradient)

    def multiply(self, node: Any, gradient: Any) -> dict[int, Any]:
        position, *others = _varying(node)
        if others:
            raise UnsupportedOpError("Multiply of two values that depend on the grid")
        factor = _constant(node, 1 - position)
        factor = factor.reshape([1] * (len(_shape(node.output(0))) - factor.ndim) + list(factor.shape))
        weights = self.op.constant(np.ascontiguousarray(np.moveaxis(factor, 1, -1)))
        return {position: self.op.multiply(gradient, weights).output(0)}

    def concat(self, node: Any, gradient: Any) -> dict[int, Any]:
        axis = node.get_attributes()["axis"]
        ends = np.cumsum([_shape(value)[axis] for value in node.input_values()])
        starts = [0, *ends.tolist()]
        order = [0, *range(2, len(_shape(node.output(0)))), 1]
        return {i: self._slice(gradient, order.index(axis), starts[i], starts[i + 1]) for i in _varying(node)}

    def convolution(self, node: Any, gradient: Any) -> dict[int, Any]:
        """Build the transposed convolution as an ordinary one, which engines run several times as fast."""
        kernel = _constant(node, 1)
        window = _window(node, _shape(node.output(0))[2:])
        sizes, pads, strides, dilations = kernel.shape[2:], window["pads_begin"], window["strides"], window["dilations"]
        spans = [d * (k - 1) for d, k in zip(dilations, sizes, strict=True)]
        if any(p > s for p, s in zip((*pads, *window["pads_end"]), 2 * spans, strict=True)):
            raise UnsupportedOpError("Convolution with more padding than kernel")
        gradient = self.channels_first(gradient)
        if set(strides) == {1}:
            flipped = np.ascontiguousarray(np.flip(kernel.swapaxes(0, 1), tuple(range(2, kernel.ndim))))
            begin, end = ([s - p for s, p in zip(spans, pad, strict=True)] for pad in (pads, window["pads_end"]))
            result = self.op.convolution(gradient, self.op.constant(flipped), strides, begin, end, dilations)
            return {0: self.channels_last(result.output(0))}
        if set(dilations) != {1}:
            raise UnsupportedOpError("Convolution with stride and dilation")
        return {0: self._strided(gradient, kernel, strides, pads, _shape(node.input_value(0)))}

    def _strided(
        self, gradient: Any, kernel: np.ndarray, strides: Sequence[int], pads: Sequence[int], shape: Sequence[int]
    ) -> Any:
        """Build the adjoint of a strided convolution, which computes a block of cells at a time as channels.

        Cell y = block x o + r of the grid contributes to output i through kernel element t = y + pad - stride x i. With
        i = (block / stride) x o + q this is t = r + pad - stride x q, the same for every o: a convolution over q.
        """
        channels, dimensions, extent = kernel.shape[1], len(strides), shape[2:]
        block = list(strides)
        block[-1] *= max(1, -(-_LANES // (channels * int(np.prod(strides)))))
        steps = [b // s for b, s in zip(block, strides, strict=True)]
        low = [-((k - 1 - p) // s) for k, p, s in zip(kernel.shape[2:], pads, strides, strict=True)]
        high = [(b - 1 + p) // s for b, p, s in zip(block, pads, strides, strict=True)]
        wide = [h - w + 1 for w, h in zip(low, high, strict=True)]
        taps: Any = np.zeros((channels, *block, kernel.shape[0], *wide), np.float32)
        for r in itertools.product(*map(range, block)):
            for q in itertools.product(*map(range, wide)):
                t = [i + p - s * (j + w) for i, p, s, j, w in zip(r, pads, strides, q, low, strict=True)]
                if all(0 <= i < k for i, k in zip(t, kernel.shape[2:], strict=True)):
                    taps[np.s_[:, *r, :, *q]] = kernel[np.s_[:, :, *t]].T
        blocks = [-(-n // b) for n, b in zip(extent, block, strict=True)]
        begin = [-w for w in low]
        end = [
            max(0, (n - 1) * f + w - size - p)
            for n, f, w, size, p in zip(blocks, steps, wide, _shape(gradient)[2:], begin, strict=True)
        ]
        weights = self.op.constant(taps.reshape(-1, kernel.shape[0], *wide))
        result = self.channels_last(
            self.op.convolution(gradient, weights, steps, begin, end, [1] * dimensions).output(0)
        )
        for axis, n in enumerate(blocks, 1):
            result = self._slice(result, axis, 0, n)
        split = self._reshape(result, [shape[0], *blocks, channels, *block])
        order = [0, *(axis for d in range(dimensions) for axis in (1 + d, 2 + dimensions + d)), 1 + dimensions]
        merged = self.op.transpose(split, self.op.constant(np.array(order)))
        cells = self._reshape(merged, [shape[0], *(n * b for n, b in zip(blocks, block, strict=True)), channels])
        for axis, n in enumerate(extent, 1):
            cells = self._slice(cells, axis, 0, n)
        return cells

    def max_pool(self, node: Any, gradient: Any) -> dict[int, Any]:
        """Route each gradient to the first of the largest values in its window, as torch does, axis by axis."""
        values = node.input_value(0)
        shape, count = _shape(values), _shape(node.output(0))[2:]
        window = _window(node, count)
        if set(window["dilations"]) != {1}:
            raise UnsupportedOpError("MaxPool with dilation")
        sizes, strides, pads = window["kernel"], window["strides"], window["pads_begin"]
        pads_end = [
            max(0, (n - 1) * s + k - p - m)
            for n, s, k, p, m in zip(count, strides, sizes, pads, shape[2:], strict=True)
        ]
        lowest = self.op.constant(np.float32(-np.inf))
        best = self.op.pad(values, np.array([0, 0, *pads]), np.array([0, 0, *pads_end]), "constant", lowest).output(0)
        # Position of each maximum in its window, in memory order: a byte is enough, an index would take four.
        cells = int(np.prod(sizes))
        number = np.uint8 if cells <= 256 else np.int32
        element, weight = self.op.constant(np.zeros([1] * len(shape), number)).output(0), 1
        for axis in reversed(range(2, len(shape))):
            size, stride, n = (each[axis - 2] for each in (sizes, strides, count))
            previous, positions = best, element
            for t in range(size):
                reach = (axis, t, t + (n - 1) * stride + 1, stride)
                candidate = self._slice(previous, *reach)
                which = positions if _shape(positions)[axis] == 1 else self._slice(positions, *reach)
                if t == 0:
                    best, element = candidate, which
                    continue
                which = self.op.add(which, self.op.constant(number(t * weight)))
                element = self.op.select(self.op.greater(candidate, best), which, element).output(0)
                best = self.op.maximum(candidate, best).output(0)
            weight *= size
        wide = self.op.broadcast(element, self.op.constant(np.array(_shape(best)))).output(0)
        element = self.op.convert(self.save_for_backward(self._reshape(wide, [*shape[:2], -1])), "i32")

        steps = [int(np.prod(shape[axis + 1 :])) for axis in range(2, len(shape))]
        offsets = sum(np.ix_(*(np.arange(k) * step for k, step in zip(sizes, steps, strict=True))), np.int32(0))
        corners = sum(
            np.ix_(*((np.arange(n) * s - p) * step for n, s, p, step in zip(count, strides, pads, steps, strict=True))),
            np.int32(0),
        )
        offset = self.op.gather(self.op.constant(np.ravel(offsets).astype(np.int32)), element, self.op.constant(0))
        index = self.op.add(offset, self.op.constant(np.reshape(corners, (1, 1, -1)).astype(np.int32))).output(0)
        flat = self._reshape(self.channels_first(gradient), [*shape[:2], -1])
        # Computed zeros: a constant would be stored in the graph and loaded with it.
        zero = self.op.multiply(self._slice(flat, 2, 0, 1), self.op.constant(np.float32(0)))
        empty = self._pad(zero, [0, 0, int(np.prod(shape[2:])) - 1])
        spread = self.op.scatter_elements_update(empty, index, flat, self.op.constant(2), reduction="sum")
        return {0: self.channels_last(self._reshape(spread, shape))}

    def average_pool(self, node: Any, gradient: Any) -> dict[int, Any]:
        shape, count = _shape(node.input_value(0)), _shape(node.output(0))[2:]
        window = _window(node, count)
        sizes = window["kernel"]
        is_inside = all(n * k <= m for n, k, m in zip(count, sizes, shape[2:], strict=True))
        if window["strides"] != sizes or any((*window["pads_begin"], *window["pads_end"])) or not is_inside:
            raise UnsupportedOpError("AvgPool with overlapping windows or padding")
        result = self.op.multiply(gradient, self.op.constant(np.float32(1 / np.prod(sizes)))).output(0)
        result = self._pad(result, [0, *(1 for _ in count), 0])  # cells after the last window get zero
        for axis, (cells, size, n) in enumerate(zip(shape[2:], sizes, count, strict=True), 1):
            index = self.op.constant(np.minimum(np.arange(cells) // size, n).astype(np.int32))
            result = self.op.gather(result, index, self.op.constant(axis)).output(0)
        return {0: result}

    def _pad(self, value: Any, pads_end: Sequence[int]) -> Any:
        """Append zeros along each axis."""
        pads_begin, zero = np.zeros(len(pads_end), int), self.op.constant(np.float32(0))
        return self.op.pad(value, pads_begin, np.array(pads_end), "constant", zero).output(0)

    def _slice(self, value: Any, axis: int, start: int, stop: int, step: int = 1) -> Any:
        if (start, step) == (0, 1) and stop >= _shape(value)[axis]:
            return value
        ends = (self.op.constant(np.array([n])) for n in (start, stop, step, axis))
        return self.op.slice(value, *ends).output(0)

    def _reshape(self, value: Any, shape: Sequence[int]) -> Any:
        return self.op.reshape(value, self.op.constant(np.array(shape)), special_zero=False).output(0)

    rules: ClassVar[dict[str, Callable[["_AdjointBuilder", Any, Any], dict[int, Any]]]] = {
        "Add": add,
        "AvgPool": average_pool,
        "Concat": concat,
        "Convolution": convolution,
        "MaxPool": max_pool,
        "Multiply": multiply,
        "Relu": relu,
    }


def _varying(node: Any) -> list[int]:
    """Return the positions of the inputs that depend on the grid. Broadcasting such an input is not supported."""
    positions = [i for i, value in enumerate(node.input_values()) if value.get_node().get_type_name() != "Constant"]
    if node.get_type_name() != "Concat" and any(
        _shape(node.input_value(i)) != _shape(node.output(0)) for i in positions
    ):
        raise UnsupportedOpError(f"{node.get_type_name()} that broadcasts a value that depends on the grid")
    return positions


def _is_between_convolutions(node: Any) -> bool:
    """Return whether a convolution precedes, ignoring scales and shifts, and only convolutions follow."""
    before = node.input_value(0).get_node()
    while before.get_type_name() in ("Add", "Multiply") and len(varying := _varying(before)) == 1:
        before = before.input_value(varying[0]).get_node()
    after = {target.get_node().get_type_name() for target in node.output(0).get_target_inputs()}
    return before.get_type_name() == "Convolution" and after == {"Convolution"}


def _window(node: Any, count: Sequence[int]) -> dict[str, Any]:
    """Return kernel, strides, pads and dilations of a convolution or pooling."""
    window: dict[str, Any] = {"dilations": [1] * len(count), **node.get_attributes()}
    if window.get("auto_pad", "explicit") not in ("explicit", "valid"):
        raise UnsupportedOpError(f"{node.get_type_name()} with padding {window['auto_pad']!r}")
    return window


def _constant(node: Any, position: int) -> np.ndarray:
    source = node.input_value(position).get_node()
    if source.get_type_name() != "Constant":
        raise UnsupportedOpError(f"{node.get_type_name()} with computed weights")
    return np.asarray(source.data, np.float32)


def _shape(output: Any) -> list[int]:
    return [int(n) for n in output.get_shape()]


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()
