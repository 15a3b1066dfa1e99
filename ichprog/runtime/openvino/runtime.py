"""A network run by OpenVINO, compiled for this processor."""

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog.errors import PluginError
from ichprog.hub import WeightFile
from ichprog.runtime import TaskOutput
from ichprog.runtime.openvino import backend
from ichprog.runtime.openvino.graph_cache import Kept
from ichprog.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from ichprog import saliency
    from ichprog.networks import Network
    from ichprog.runtime.torch_runtime import TorchRuntime

_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a probability, between torch and what was compiled
_EXPLAINING = ("forward", "backward")  # graphs
Shape = tuple[int, int, int]


class CompilationError(PluginError):
    """OpenVINO cannot run a network; the text says why."""


class OpenVinoRuntime:
    """One fold's network on the processor.

    A network that is kept in the cache is loaded beside whatever the caller does next. Another is made from torch
    first, held against it, and kept.

    Args:
        spec: The model.
        file: The fold's weights.
        precision: "float32" or "bfloat16".
        cache: The cache folder.

    Raises:
        CompilationError: OpenVINO cannot run the network, or not rightly.
        WeightsError: The weights do not fit the network.
    """

    def __init__(self, spec: ModelSpec, file: WeightFile, precision: str, cache: Path) -> None:
        self.spec, self.file, self.precision = spec, file, precision
        self._kept = Kept(spec, file, cache, backend.processor(), precision)
        self._programs: dict[tuple[str, Shape], _Program] = {}
        self._lock = threading.Lock()
        shape = spec.input.shape
        noted = self._kept.note("answers", shape)
        if noted is not None and "refused" in noted:
            raise CompilationError(noted["refused"])
        if noted is not None:
            backend.aside(lambda: self._program("answers", shape))  # who asks for it waits for it
        else:
            self._program("answers", shape)

    def run(self, grids: np.ndarray) -> dict[str, TaskOutput]:
        """Answers, as `Runtime.run` says; a grid of another shape has a graph of its own made first."""
        program = self._program("answers", grids.shape[1:])
        with program.turn:
            self.release_memory()
            found = [[each.copy() for each in program.infer([grid[None, None]])] for grid in grids]
        outputs = [np.concatenate(each) for each in zip(*found, strict=True)]
        names = [task.name for task in self.spec.tasks]
        return {
            name: TaskOutput(*pair)
            for name, *pair in zip(names, outputs[: len(names)], outputs[len(names) :], strict=True)
        }

    def release_memory(self) -> None:
        """Gives back the memory that runs take, until the next, but for those that have their turn."""
        for program in list(self._programs.values()):
            program.release_memory()

    def prefetch_explanation(self) -> None:
        """`Runtime.prefetch_explanation`, for grids of the model's own shape, where the graphs are kept."""
        shape = self.spec.input.shape
        if all(self._kept.note(graph, shape) is not None for graph in _EXPLAINING):
            backend.aside(lambda: [self._program(graph, shape) for graph in _EXPLAINING])

    @contextmanager
    def explanation_session(
        self, grid: np.ndarray, methods: Collection[Callable[..., Any]], layers: Collection[str | None]
    ) -> "Iterator[saliency.Pass]":
        """`Runtime.explanation_session`: of compiled graphs where those serve methods and layers, else of torch."""
        import torch

        from ichprog import networks, saliency

        why = None
        if not all(method in saliency.FROM_FEATURES for method in methods):
            why = "a method asked for needs the network itself"
        else:
            try:
                forward, backward = (self._program(graph, grid.shape) for graph in _EXPLAINING)
            except CompilationError as error:
                why = str(error)
            else:
                names = forward.about["features_are"]
                if not set(layers) <= ({None, *names} if names else set()):
                    why = "a layer asked for does not put out the features"
        if why is not None:
            with self._eager.explanation_session(grid, methods, layers) as known:
                known.fallback_reason = why
                yield known
            return
        with forward.turn, backward.turn, torch.inference_mode(mode=False), torch.enable_grad():
            self.release_memory()
            features, *kept = forward.infer([grid[None, None]])
            heads = networks.load_heads(self.spec, self.file.path, features.shape[1])
            yield saliency.CompiledPass(
                heads,
                grid,
                features,
                lambda gradient: backward.infer([gradient, *kept])[0],
                forward.about["features_are"],
            )

    @functools.cached_property
    def _eager(self) -> "TorchRuntime":
        from ichprog.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(self.spec, self.file.path, "cpu", self.precision)

    def _program(self, graph: str, shape: Sequence[int]) -> "_Program":
        """A graph ready to run on grids of a shape: in memory, or in the cache, or made now."""
        shape = (shape[0], shape[1], shape[2])
        with self._lock:
            if (graph, shape) not in self._programs:
                self._programs[graph, shape] = self._found(graph, shape) or self._kept.once(
                    graph, shape, lambda: self._found(graph, shape) or self._made(graph, shape)
                )
            return self._programs[graph, shape]

    def _found(self, graph: str, shape: Shape) -> "_Program | None":
        if (held := self._kept.find(graph, shape)) is None:
            return None
        exported, about = held
        if "refused" in about:
            raise CompilationError(about["refused"])
        try:
            compiled = backend.core().import_model(
                backend.openvino().Tensor(exported, shared_memory=True), "CPU", self._settings
            )
        except RuntimeError:  # whole and of this version, and still not to be read
            return None
        return _Program(compiled, about, exported)

    def _made(self, graph: str, shape: Shape) -> "_Program":
        """Makes a graph from torch, and what goes with it, and keeps them."""
        from ichprog import networks

        whole = networks.load(self.spec, self.file.path)
        try:
            made = self._answering(whole, shape) if graph == "answers" else self._explaining(whole, shape)
        except CompilationError as error:
            for name in ("answers",) if graph == "answers" else _EXPLAINING:
                self._kept.put(name, shape, b"", {"refused": str(error)})
            raise
        for name, program in made.items():
            self._kept.put(name, shape, program.compiled.export_model().getvalue(), program.about)
            self._programs[name, shape] = program
        return made[graph]

    def _answering(self, whole: "Network", shape: Shape) -> "dict[str, _Program]":
        """A grid to each task's logits, then each task's probabilities."""
        import torch

        module = _answers(whole)
        program = self._compiled(self._converted(module, shape))
        seeded = np.random.default_rng(0).random((1, 1, *shape), np.float32)
        with torch.inference_mode():
            expected = [values.numpy() for values in module(torch.from_numpy(seeded))]
        half = len(expected) // 2
        pairs = list(zip(program.infer([seeded]), expected, strict=True))[half:]
        difference = max(float(np.abs(got - right).max()) for got, right in pairs)
        if not difference <= _TOLERANCE[self.precision]:
            raise CompilationError(
                f"{self.spec.name}: OpenVINO's probabilities differ by {difference:.2g} from torch's"
            )
        return {"answers": program}

    def _explaining(self, whole: "Network", shape: Shape) -> "dict[str, _Program]":
        """A grid to features and what is kept of the way; and back."""
        import torch

        from ichprog import saliency
        from ichprog.runtime.openvino import guided_graph

        model = self._converted(whole.backbone, shape)
        try:
            forward, backward = guided_graph.reverse(backend.openvino(), model)
        except guided_graph.UnsupportedOpError as error:
            raise CompilationError(f"there is no compiled way back through {self.spec.name} ({error})") from error
        names: list[str] = []  # of the layer whose output the features are, where that is the backbone's choice
        layer = whole.cam_layer
        with torch.inference_mode(), saliency.kept_outputs(whole, [layer]) as outputs:
            features = whole.backbone(torch.rand(1, 1, *shape))
            if outputs[layer].shape == features.shape and torch.equal(outputs[layer], features):
                names = [layer, layer.removeprefix("backbone.")]
        return {
            "forward": self._compiled(forward, {"features_are": names}),
            "backward": self._compiled(backward),
        }

    def _converted(self, module: "nn.Module", shape: Shape) -> Any:
        try:
            return backend.converted(module, shape)
        except MemoryError:
            raise
        except Exception as error:  # a plugin may compute in any way
            said = " ".join(str(error).split())[:200]
            raise CompilationError(
                f"{self.spec.name}: OpenVINO cannot run its network ({type(error).__name__}: {said})"
            ) from error

    def _compiled(self, model: Any, about: dict[str, Any] | None = None) -> "_Program":
        if self.precision == "bfloat16":
            backend.pair_columns(model)
        return _Program(backend.core().compile_model(model, "CPU", self._settings), about or {})

    @property
    def _settings(self) -> dict[str, str]:
        # The precision is said at every load: left to itself, OpenVINO takes bfloat16 where the processor has it.
        return {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }


class _Program:
    """A compiled graph with the memory it runs in; one run at a time."""

    def __init__(self, compiled: Any, about: dict[str, Any], exported: np.ndarray | None = None) -> None:
        self.compiled, self.about = compiled, about
        self.turn = threading.Lock()
        self._has_memory = False
        self._exported = exported  # its weights may lie in there
        self._request = compiled.create_infer_request()

    def release_memory(self) -> None:
        """Gives back the memory of runs, where none is under way; the next takes it again."""
        if self._has_memory and self.turn.acquire(blocking=False):
            try:
                self.compiled.release_memory()
                self._has_memory = False
            finally:
                self.turn.release()

    def infer(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs, in its `turn`; the outputs lie in the program's own memory until it runs again."""
        self._has_memory = True
        for position, values in enumerate(inputs):
            self._request.set_input_tensor(position, backend.openvino().Tensor(values, shared_memory=True))
        self._request.infer()
        return [self._request.get_output_tensor(i).data for i in range(len(self.compiled.outputs))]


def _answers(network: "Network") -> "nn.Module":
    """A network that gives its logits and then its label probabilities, task by task."""
    from torch import Tensor, nn

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, grid: Tensor) -> tuple[Tensor, ...]:
            logits = self.network(grid)
            return (*logits.values(), *self.network.probabilities(logits).values())

    return Answers().eval()
