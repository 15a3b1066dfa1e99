"""The OpenVINO runtime: runs a network that is compiled for this CPU."""

import functools
import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.hub import WeightFile
from ichprog.runtime import TaskOutput
from ichprog.runtime.openvino import backend
from ichprog.runtime.openvino.backend import CompilationError
from ichprog.runtime.openvino.graph_cache import GraphCache
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from ichprog import saliency
    from ichprog.networks import Network
    from ichprog.runtime.torch_runtime import TorchRuntime

__all__ = ["CompilationError", "OpenVinoRuntime", "is_cached"]

_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # largest difference of a probability from torch
_PREDICT = "predict"
_EXPLAIN = ("forward", "backward")
Shape = tuple[int, int, int]

_logger = logging.getLogger(__name__)
_progress = logging.getLogger("ichprog.progress")


class OpenVinoRuntime:
    """The network of one fold on the CPU.

    A cached graph is loaded in a background thread. Otherwise the graph is compiled from the torch network, its
    probabilities are compared with torch, and it is cached.

    Args:
        spec: The specification of the model.
        file: Weight file of the fold.
        precision: "float32" or "bfloat16".
        cache: The cache folder.
        only_cached: Whether torch explains if the explanation graphs are not cached, instead of compiling them.

    Raises:
        CompilationError: OpenVINO cannot run the network, or its probabilities differ from torch.
        WeightsError: The weights do not fit the network.
    """

    def __init__(
        self, spec: ModelSpec, file: WeightFile, precision: str, cache: Path, only_cached: bool = False
    ) -> None:
        self.spec, self.file, self.precision = spec, file, precision
        self._only_cached = only_cached
        self._cache = GraphCache(spec, file, cache, backend.processor(), precision)
        self._graphs: dict[tuple[str, Shape], _CompiledGraph] = {}
        self._lock = threading.Lock()
        shape = spec.input.shape
        metadata = self._cache.read_metadata(_PREDICT, shape)
        if metadata is not None and "refused" in metadata:
            raise CompilationError(metadata["refused"])
        if metadata is not None:
            backend.run_in_thread(lambda: self._graph(_PREDICT, shape))  # `run` waits for the graph
        else:
            self._graph(_PREDICT, shape)

    def run(self, grids: np.ndarray, clinical: np.ndarray | None = None) -> dict[str, TaskOutput]:
        """Run the network, as in `Runtime.run`. A new grid shape compiles a new graph first."""
        graph = self._graph(_PREDICT, grids.shape[1:])
        with graph.lock:
            self.release_memory()
            batches = [
                [output.copy() for output in graph.infer([grid[None, None], *values])]
                for grid, values in zip(grids, self._clinical_inputs(clinical, len(grids)), strict=True)
            ]
        return self._by_task([np.concatenate(batch) for batch in zip(*batches, strict=True)])

    def _clinical_inputs(self, clinical: np.ndarray | None, number: int) -> list[list[np.ndarray]]:
        """Return the second input of the graph for each grid; empty for a model without clinical values."""
        if self.spec.fusion is None:
            return [[] for _ in range(number)]
        if clinical is None:
            clinical = np.zeros((number, 2 * len(self.spec.clinical)), np.float32)
        return [[np.ascontiguousarray(values[None], np.float32)] for values in clinical]

    def _by_task(self, outputs: Sequence[np.ndarray]) -> dict[str, TaskOutput]:
        """Return the outputs of the graph, which are in the order of the tasks, by task."""
        remaining = iter(outputs)
        return {task.name: TaskOutput(*islice(remaining, 5 if task.mask else 2)) for task in self.spec.tasks}

    def release_memory(self) -> None:
        """Release the working memory of all graphs that are not running."""
        for graph in list(self._graphs.values()):
            graph.release_memory()

    def prefetch_explanation(self) -> None:
        """Prefetch the explanation graphs of the model's own grid shape in a background thread, if they are cached."""
        shape = self.spec.input.shape
        if self.is_compiled(explain=True):
            backend.run_in_thread(lambda: [self._graph(name, shape) for name in _EXPLAIN])

    def compile(self) -> None:
        """Compile and cache the graphs of the model's own grid shape that are not cached yet."""
        for name in (_PREDICT, *_EXPLAIN):
            try:
                self._graph(name, self.spec.input.shape)
            except CompilationError as error:  # of an explanation, for which torch is the fallback
                _logger.info("Not compiled: %s.", error)

    def is_compiled(self, *, explain: bool) -> bool:
        """Return whether the graphs of the model's own grid shape are cached; that of predictions always is."""
        return not explain or self._is_cached(_EXPLAIN, self.spec.input.shape)

    def _is_cached(self, names: Collection[str], shape: Sequence[int]) -> bool:
        return all(self._cache.read_metadata(name, shape) is not None for name in names)

    def torch_module(self) -> "nn.Module":
        """Return a torch network with the weights of this runtime. It is loaded on first use."""
        return self._torch_runtime.network

    @contextmanager
    def explanation_session(
        self,
        grid: np.ndarray,
        layers: Collection[str | None],
        *,
        needs_network: bool,
        clinical: np.ndarray | None = None,
    ) -> "Iterator[saliency.ForwardPass]":
        """Run one forward pass with compiled graphs, or with torch if a method or layer needs the torch network."""
        import torch

        from ichprog import networks, saliency

        reason, graphs = self._explanation_graphs(grid.shape, layers, needs_network=needs_network)
        if graphs is None:
            _logger.info("Falling back to torch for the explanation: %s.", reason)
            with self._torch_runtime.explanation_session(
                grid, layers, needs_network=needs_network, clinical=clinical
            ) as shared:
                shared.fallback_reason = reason
                yield shared
            return
        forward, backward = graphs
        with forward.lock, backward.lock, torch.inference_mode(mode=False), torch.enable_grad():
            self.release_memory()
            features, *saved = forward.infer([grid[None, None]])
            fixed = None if clinical is None else torch.from_numpy(clinical)[None]
            heads = networks.load_heads(self.spec, self.file.path, features.shape[1], fixed)
            yield saliency.CompiledPass(
                heads,
                grid,
                features,
                lambda gradient: backward.infer([gradient, *saved])[0],
                forward.metadata["feature_layers"],
            )

    def _explanation_graphs(
        self, shape: Sequence[int], layers: Collection[str | None], *, needs_network: bool
    ) -> "tuple[str | None, tuple[_CompiledGraph, _CompiledGraph] | None]":
        """Return the forward and the backward graph, or None and the reason why torch has to explain."""
        if needs_network:
            return "a saliency method needs the torch network", None
        if self._only_cached and not self._is_cached(_EXPLAIN, shape):
            return "the explanation is not compiled for this CPU yet", None
        try:
            forward, backward = (self._graph(name, shape) for name in _EXPLAIN)
        except CompilationError as error:
            return str(error), None
        names = forward.metadata["feature_layers"]
        if not set(layers) <= ({None, *names} if names else set()):
            return "a requested layer is not the output of the backbone", None
        return None, (forward, backward)

    @functools.cached_property
    def _torch_runtime(self) -> "TorchRuntime":
        from ichprog.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(self.spec, self.file.path, "cpu", self.precision)

    def _graph(self, name: str, shape: Sequence[int]) -> "_CompiledGraph":
        """Return a graph for grids of a shape: from memory, from the cache, or newly compiled."""
        shape = (shape[0], shape[1], shape[2])
        with self._lock:
            if (name, shape) not in self._graphs:
                self._graphs[name, shape] = self._load(name, shape) or self._cache.build_locked(
                    name, shape, lambda: self._load(name, shape) or self._build(name, shape)
                )
            return self._graphs[name, shape]

    def _load(self, name: str, shape: Shape) -> "_CompiledGraph | None":
        """Load a graph from the cache, or return None if the cache has no valid graph."""
        if (cached := self._cache.load(name, shape)) is None:
            return None
        exported, metadata = cached
        if "refused" in metadata:
            raise CompilationError(metadata["refused"])
        try:
            compiled = backend.import_model(exported, self.precision)
        except RuntimeError:  # the file is intact, but OpenVINO cannot read it
            return None
        _logger.debug("Loaded the compiled graph %r of %s fold %s.", name, self.spec.name, self.file.fold)
        return _CompiledGraph(compiled, metadata, exported)

    def _build(self, name: str, shape: Shape) -> "_CompiledGraph":
        """Compile a graph, and the graphs that are compiled with it, from torch and cache them."""
        from ichprog import networks

        what = "predictions" if name == _PREDICT else "explanations"
        model = f"{self.spec.name} fold {self.file.fold}"
        _logger.debug("Compiling %s for grids of %s x %s x %s.", model, *shape)
        _progress.info("Compiling %s of %s for this CPU, once. A large network takes about a minute.", what, model)
        network = networks.load(self.spec, self.file.path)
        try:
            graphs = self._build_predict(network, shape) if name == _PREDICT else self._build_explain(network, shape)
        except CompilationError as error:
            for refused in (_PREDICT,) if name == _PREDICT else _EXPLAIN:
                self._cache.save(refused, shape, b"", {"refused": str(error)})
            raise
        for built, graph in graphs.items():
            self._cache.save(built, shape, graph.compiled.export_model().getvalue(), graph.metadata)
            self._graphs[built, shape] = graph
        return graphs[name]

    def _build_predict(self, network: "Network", shape: Shape) -> "dict[str, _CompiledGraph]":
        """Compile the graph from a grid to the outputs of all tasks."""
        import torch

        values = 0 if self.spec.fusion is None else 2 * len(self.spec.clinical)
        graph = self._compile(self._convert(_with_outputs(network), shape, values))
        random = np.random.default_rng(0)
        inputs = [random.random((1, 1, *shape), np.float32)]
        if values:
            inputs.append(random.random((1, values), np.float32))
        with torch.inference_mode():
            expected = network.outputs(*map(torch.from_numpy, inputs))
        actual = self._by_task(graph.infer(inputs))
        difference = max(
            float(np.abs(own - reference.numpy()).max())
            for name, references in expected.items()
            for own, reference in zip(actual[name][1:], references[1:], strict=False)  # without logits
        )
        if not difference <= _TOLERANCE[self.precision]:
            raise CompilationError(
                f"{self.spec.name}: OpenVINO's probabilities differ by {difference:.2g} from torch's"
            )
        return {_PREDICT: graph}

    def _build_explain(self, network: "Network", shape: Shape) -> "dict[str, _CompiledGraph]":
        """Compile the graph from a grid to features and saved tensors, and the graph back to the guided gradient."""
        import torch

        from ichprog import saliency
        from ichprog.runtime.openvino import guided_graph

        model = self._convert(network.backbone, shape)
        try:
            forward, backward = guided_graph.build_adjoint(backend.openvino(), model)
        except guided_graph.UnsupportedOpError as error:
            raise CompilationError(f"{self.spec.name}: guided backpropagation cannot be compiled ({error})") from error
        names: list[str] = []  # of the layer that outputs the features, if that layer is `cam_layer`
        layer = network.cam_layer
        with torch.inference_mode(), saliency.record_outputs(network, [layer]) as outputs:
            features = network.backbone(torch.rand(1, 1, *shape))
            if outputs[layer].shape == features.shape and torch.equal(outputs[layer], features):
                names = [layer, layer.removeprefix("backbone.")]
        return {
            "forward": self._compile(forward, {"feature_layers": names}),
            "backward": self._compile(backward),
        }

    def _convert(self, module: "nn.Module", shape: Shape, values: int = 0) -> Any:
        """Convert a torch module and name the model in the error."""
        try:
            return backend.convert(module, shape, values)
        except (MemoryError, CompilationError):
            raise
        except Exception as error:  # a plugin may compute anything
            cause = " ".join(str(error).split())[:200]
            raise CompilationError(
                f"{self.spec.name}: OpenVINO cannot run its network ({type(error).__name__}: {cause})"
            ) from error

    def _compile(self, model: Any, metadata: dict[str, Any] | None = None) -> "_CompiledGraph":
        return _CompiledGraph(backend.compile_model(model, self.precision), metadata or {})


def is_cached(spec: ModelSpec, file: WeightFile, precision: str, cache: Path) -> bool:
    """Return whether the graph of predictions is cached, or the knowledge that OpenVINO cannot run the network.

    Args:
        spec: The specification of the model.
        file: Weight file of the fold.
        precision: "float32" or "bfloat16".
        cache: The cache folder.
    """
    if not GraphCache.has_graphs(file, cache):
        return False  # without waiting for the import of OpenVINO
    graphs = GraphCache(spec, file, cache, backend.processor(), precision)
    return graphs.read_metadata(_PREDICT, spec.input.shape) is not None


class _CompiledGraph:
    """A compiled graph with its working memory. Hold `lock` while it runs.

    Args:
        compiled: The compiled model.
        metadata: Plain data about the graph.
        exported: The exported graph. The compiled model may refer to this memory.
    """

    def __init__(self, compiled: Any, metadata: dict[str, Any], exported: np.ndarray | None = None) -> None:
        self.compiled, self.metadata = compiled, metadata
        self.lock = threading.Lock()
        self._has_memory = False
        self._exported = exported
        self._request = compiled.create_infer_request()

    def release_memory(self) -> None:
        """Release the working memory unless the graph is running. The next run allocates it again."""
        if self._has_memory and self.lock.acquire(blocking=False):
            try:
                self.compiled.release_memory()
                self._has_memory = False
            finally:
                self.lock.release()

    def infer(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the graph. The outputs are views of memory that the next run overwrites."""
        self._has_memory = True
        for position, values in enumerate(inputs):
            self._request.set_input_tensor(position, backend.as_tensor(values))
        self._request.infer()
        return [self._request.get_output_tensor(i).data for i in range(len(self.compiled.outputs))]


def _with_outputs(network: "Network") -> "nn.Module":
    """Return a module that outputs everything in `Network.outputs`, task by task."""
    from torch import Tensor, nn

    class WithOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, grid: Tensor, clinical: Tensor | None = None) -> tuple[Tensor, ...]:
            return tuple(chain.from_iterable(self.network.outputs(grid, clinical).values()))

    return WithOutputs().eval()
