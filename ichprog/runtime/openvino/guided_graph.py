"""Guided backpropagation as an inference graph, made from a network's own graph with one rule for each operation.

An inference engine has no gradients, but the gradient of a network that computes with convolutions, ReLUs and pooling
is such a network itself, run from its features back to its grid. Each operation met on the way back has its adjoint,
made of operations that run as fast as those of the forward pass. What has no rule here is left to autograd.

Gradients have their channels last here, and so has what is kept of the forward pass for them: engines hold values so
where they convolve, and turning them round and back would take as long as what is done with them.

Source of the guided rule: Springenberg et al., 2015 (arXiv 1412.6806): at a ReLU only positive gradients pass, and only
where the ReLU let its input through.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

_LANES = 16  # output channels that one vector instruction computes; fewer take as long


class UnsupportedOpError(Exception):
    """The network computes something that no rule here covers; the text says what."""


def reverse(openvino: Any, model: Any) -> tuple[Any, Any]:
    """Two graphs: one that goes from a grid to the features and keeps what the other needs on the way back.

    Args:
        openvino: The module.
        model: An OpenVINO model, grid `(1, 1, D, H, W)` to features `(1, C, d, h, w)`, all shapes known.

    Returns:
        The forward graph: the grid to the features and all that is kept. The backward graph: the gradient of a score by
        the features `(1, C, d, h, w)` and all that was kept, to the guided gradient by the grid `(1, 1, D, H, W)`.

    Raises:
        UnsupportedOpError: The model holds an operation without a rule.
    """
    way = _WayBack(openvino.opset15)
    grid, features = model.inputs[0].node, model.outputs[0].node.input_value(0)
    seed = way.op.parameter(_shape(features), np.float32)
    gradients = {_key(features): way.last(seed.output(0))}
    for node in reversed(model.get_ordered_ops()):
        kind = node.get_type_name()
        if kind in ("Parameter", "Constant", "Result"):
            continue
        gradient = gradients.pop(_key(node.output(0)), None)
        if gradient is None or kind not in way.rules:
            raise UnsupportedOpError(kind)
        for position, share in way.rules[kind](way, node, gradient).items():
            source = _key(node.input_value(position))
            gradients[source] = way.op.add(gradients[source], share).output(0) if source in gradients else share
    forward = openvino.Model([features, *way.kept], [grid], "forward")
    return forward, openvino.Model([way.second(gradients[_key(grid.output(0))])], [seed, *way.inputs], "backward")


class _WayBack:
    """A gradient on its way from the features to the grid, an operation of the forward graph at a time.

    A rule takes an operation and the gradient by its output, and gives the gradient by each input that depends on the
    grid, by the input's position.
    """

    def __init__(self, op: Any) -> None:
        self.op = op
        self.kept: list[Any] = []
        self.inputs: list[Any] = []

    def last(self, value: Any) -> Any:
        """Values `(N, C, ...)` as `(N, ..., C)`."""
        rank = len(_shape(value))
        return self.op.transpose(value, self.op.constant(np.array([0, *range(2, rank), 1]))).output(0)

    def second(self, value: Any) -> Any:
        """Values `(N, ..., C)` as `(N, C, ...)`."""
        rank = len(_shape(value))
        return self.op.transpose(value, self.op.constant(np.array([0, rank - 1, *range(1, rank - 1)]))).output(0)

    def keep(self, output: Any) -> Any:
        """Has the forward graph give an output, and the backward graph take it."""
        self.kept.append(output)
        self.inputs.append(self.op.parameter(_shape(output), output.get_element_type()))
        return self.inputs[-1].output(0)

    def relu(self, node: Any, gradient: Any) -> dict[int, Any]:
        between = _between_convolutions(node)
        passed = self.op.convert(self.op.greater(node.output(0), self.op.constant(np.float32(0))), "u8").output(0)
        kept = self.keep(self.last(passed))
        if not between:
            return {0: self.op.multiply(self.op.relu(gradient), self.op.convert(kept, "f32")).output(0)}
        kept = self.op.convert(self.second(kept), "f32")  # so that the engine finds nothing to turn between the two
        return {0: self.last(self.op.multiply(self.op.relu(self.second(gradient)), kept).output(0))}

    def add(self, node: Any, gradient: Any) -> dict[int, Any]:
        return dict.fromkeys(_varying(node), gradient)

    def multiply(self, node: Any, gradient: Any) -> dict[int, Any]:
        position, *others = _varying(node)
        if others:
            raise UnsupportedOpError("a product of two things that depend on the grid")
        factor = _constant(node, 1 - position)
        factor = factor.reshape([1] * (len(_shape(node.output(0))) - factor.ndim) + list(factor.shape))
        turned = self.op.constant(np.ascontiguousarray(np.moveaxis(factor, 1, -1)))
        return {position: self.op.multiply(gradient, turned).output(0)}

    def concat(self, node: Any, gradient: Any) -> dict[int, Any]:
        axis = node.get_attributes()["axis"]
        ends = np.cumsum([_shape(value)[axis] for value in node.input_values()])
        starts = [0, *ends.tolist()]
        order = [0, *range(2, len(_shape(node.output(0)))), 1]
        return {i: self._slice(gradient, order.index(axis), starts[i], starts[i + 1]) for i in _varying(node)}

    def convolution(self, node: Any, gradient: Any) -> dict[int, Any]:
        """The transposed convolution, written as an ordinary one, which engines run several times as fast."""
        kernel = _constant(node, 1)
        about = _window(node, _shape(node.output(0))[2:])
        sizes, pads, strides, dilations = kernel.shape[2:], about["pads_begin"], about["strides"], about["dilations"]
        spans = [d * (k - 1) for d, k in zip(dilations, sizes, strict=True)]
        if any(p > s for p, s in zip((*pads, *about["pads_end"]), 2 * spans, strict=True)):
            raise UnsupportedOpError("Convolution with more padding than kernel")
        gradient = self.second(gradient)
        if set(strides) == {1}:
            flipped = np.ascontiguousarray(np.flip(kernel.swapaxes(0, 1), tuple(range(2, kernel.ndim))))
            begin, end = ([s - p for s, p in zip(spans, given, strict=True)] for given in (pads, about["pads_end"]))
            found = self.op.convolution(gradient, self.op.constant(flipped), strides, begin, end, dilations)
            return {0: self.last(found.output(0))}
        if set(dilations) != {1}:
            raise UnsupportedOpError("Convolution with stride and dilation")
        return {0: self._strided(gradient, kernel, strides, pads, _shape(node.input_value(0)))}

    def _strided(
        self, gradient: Any, kernel: np.ndarray, strides: Sequence[int], pads: Sequence[int], shape: Sequence[int]
    ) -> Any:
        """The adjoint of a convolution with a stride: a block of cells of the grid at a time, its cells as channels.

        Cell y = block x o + r of the grid takes part in output i by the kernel's element t = y + pad - stride x i. With
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
                if all(0 <= each < k for each, k in zip(t, kernel.shape[2:], strict=True)):
                    taps[np.s_[:, *r, :, *q]] = kernel[np.s_[:, :, *t]].T
        blocks = [-(-n // b) for n, b in zip(extent, block, strict=True)]
        begin = [-w for w in low]
        end = [
            max(0, (n - 1) * f + w - have - p)
            for n, f, w, have, p in zip(blocks, steps, wide, _shape(gradient)[2:], begin, strict=True)
        ]
        weights = self.op.constant(taps.reshape(-1, kernel.shape[0], *wide))
        found = self.last(self.op.convolution(gradient, weights, steps, begin, end, [1] * dimensions).output(0))
        for axis, n in enumerate(blocks, 1):
            found = self._slice(found, axis, 0, n)
        apart = self._reshape(found, [shape[0], *blocks, channels, *block])
        order = [0, *(axis for d in range(dimensions) for axis in (1 + d, 2 + dimensions + d)), 1 + dimensions]
        together = self.op.transpose(apart, self.op.constant(np.array(order)))
        cells = self._reshape(together, [shape[0], *(n * b for n, b in zip(blocks, block, strict=True)), channels])
        for axis, n in enumerate(extent, 1):
            cells = self._slice(cells, axis, 0, n)
        return cells

    def max_pool(self, node: Any, gradient: Any) -> dict[int, Any]:
        """Each gradient goes to the first of the highest values in its window, as in torch; found axis by axis."""
        values = node.input_value(0)
        shape, count = _shape(values), _shape(node.output(0))[2:]
        about = _window(node, count)
        if set(about["dilations"]) != {1}:
            raise UnsupportedOpError("MaxPool with dilation")
        sizes, strides, pads = about["kernel"], about["strides"], about["pads_begin"]
        beyond = [
            max(0, (n - 1) * s + k - p - m)
            for n, s, k, p, m in zip(count, strides, sizes, pads, shape[2:], strict=True)
        ]
        lowest = self.op.constant(np.float32(-np.inf))
        best = self.op.pad(values, np.array([0, 0, *pads]), np.array([0, 0, *beyond]), "constant", lowest).output(0)
        # Which element of its window each maximum is, counted as in memory: a byte says it, an index would take four.
        window = int(np.prod(sizes))
        number = np.uint8 if window <= 256 else np.int32
        element, weight = self.op.constant(np.zeros([1] * len(shape), number)).output(0), 1
        for axis in reversed(range(2, len(shape))):
            size, stride, n = (each[axis - 2] for each in (sizes, strides, count))
            before, known = best, element
            for t in range(size):
                reach = (axis, t, t + (n - 1) * stride + 1, stride)
                candidate = self._slice(before, *reach)
                which = known if _shape(known)[axis] == 1 else self._slice(known, *reach)
                if t == 0:
                    best, element = candidate, which
                    continue
                which = self.op.add(which, self.op.constant(number(t * weight)))
                element = self.op.select(self.op.greater(candidate, best), which, element).output(0)
                best = self.op.maximum(candidate, best).output(0)
            weight *= size
        wide = self.op.broadcast(element, self.op.constant(np.array(_shape(best)))).output(0)
        element = self.op.convert(self.keep(self._reshape(wide, [*shape[:2], -1])), "i32")

        steps = [int(np.prod(shape[axis + 1 :])) for axis in range(2, len(shape))]
        offsets = sum(np.ix_(*(np.arange(k) * step for k, step in zip(sizes, steps, strict=True))), np.int32(0))
        corners = sum(
            np.ix_(*((np.arange(n) * s - p) * step for n, s, p, step in zip(count, strides, pads, steps, strict=True))),
            np.int32(0),
        )
        within = self.op.gather(self.op.constant(np.ravel(offsets).astype(np.int32)), element, self.op.constant(0))
        place = self.op.add(within, self.op.constant(np.reshape(corners, (1, 1, -1)).astype(np.int32))).output(0)
        flat = self._reshape(self.second(gradient), [*shape[:2], -1])
        # Zeros that are computed: as a constant they would be kept with the graph, and loaded.
        nothing = self.op.multiply(self._slice(flat, 2, 0, 1), self.op.constant(np.float32(0)))
        empty = self._pad(nothing, [0, 0, int(np.prod(shape[2:])) - 1])
        spread = self.op.scatter_elements_update(empty, place, flat, self.op.constant(2), reduction="sum")
        return {0: self.last(self._reshape(spread, shape))}

    def average_pool(self, node: Any, gradient: Any) -> dict[int, Any]:
        shape, count = _shape(node.input_value(0)), _shape(node.output(0))[2:]
        about = _window(node, count)
        sizes = about["kernel"]
        whole = all(n * k <= m for n, k, m in zip(count, sizes, shape[2:], strict=True))
        if about["strides"] != sizes or any((*about["pads_begin"], *about["pads_end"])) or not whole:
            raise UnsupportedOpError("AvgPool whose windows overlap or reach beyond the edge")
        found = self.op.multiply(gradient, self.op.constant(np.float32(1 / np.prod(sizes)))).output(0)
        found = self._pad(found, [0, *(1 for _ in count), 0])  # what lies beyond the last window has a zero to take
        for axis, (cells, size, n) in enumerate(zip(shape[2:], sizes, count, strict=True), 1):
            window = self.op.constant(np.minimum(np.arange(cells) // size, n).astype(np.int32))
            found = self.op.gather(found, window, self.op.constant(axis)).output(0)
        return {0: found}

    def _pad(self, value: Any, beyond: Sequence[int]) -> Any:
        """Zeros after the values."""
        before, nothing = np.zeros(len(beyond), int), self.op.constant(np.float32(0))
        return self.op.pad(value, before, np.array(beyond), "constant", nothing).output(0)

    def _slice(self, value: Any, axis: int, start: int, stop: int, step: int = 1) -> Any:
        if (start, step) == (0, 1) and stop >= _shape(value)[axis]:
            return value
        ends = (self.op.constant(np.array([each])) for each in (start, stop, step, axis))
        return self.op.slice(value, *ends).output(0)

    def _reshape(self, value: Any, shape: Sequence[int]) -> Any:
        return self.op.reshape(value, self.op.constant(np.array(shape)), special_zero=False).output(0)

    rules: ClassVar[dict[str, Callable[["_WayBack", Any, Any], dict[int, Any]]]] = {
        "Add": add,
        "AvgPool": average_pool,
        "Concat": concat,
        "Convolution": convolution,
        "MaxPool": max_pool,
        "Multiply": multiply,
        "Relu": relu,
    }


def _varying(node: Any) -> list[int]:
    """Inputs that depend on the grid; each must have the shape of the output, or be joined to it."""
    found = [i for i, value in enumerate(node.input_values()) if value.get_node().get_type_name() != "Constant"]
    if node.get_type_name() != "Concat" and any(_shape(node.input_value(i)) != _shape(node.output(0)) for i in found):
        raise UnsupportedOpError(f"{node.get_type_name()} that widens what depends on the grid")
    return found


def _between_convolutions(node: Any) -> bool:
    """Whether a convolution comes before, but for scales and shifts, and nothing but convolutions after."""
    before = node.input_value(0).get_node()
    while before.get_type_name() in ("Add", "Multiply") and len(varying := _varying(before)) == 1:
        before = before.input_value(varying[0]).get_node()
    after = {each.get_node().get_type_name() for each in node.output(0).get_target_inputs()}
    return before.get_type_name() == "Convolution" and after == {"Convolution"}


def _window(node: Any, count: Sequence[int]) -> dict[str, Any]:
    """Where a convolution or a pooling looks, in whole cells."""
    about: dict[str, Any] = {"dilations": [1] * len(count), **node.get_attributes()}
    if about.get("auto_pad", "explicit") not in ("explicit", "valid"):
        raise UnsupportedOpError(f"{node.get_type_name()} with padding {about['auto_pad']!r}")
    return about


def _constant(node: Any, position: int) -> np.ndarray:
    source = node.input_value(position).get_node()
    if source.get_type_name() != "Constant":
        raise UnsupportedOpError(f"{node.get_type_name()} whose weights are computed")
    return np.asarray(source.data, np.float32)


def _shape(output: Any) -> list[int]:
    return [int(n) for n in output.get_shape()]


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()
