"""Measure parameters, operations, memory and time of a backbone, a head or a saliency method.

    from ichprog import profiling

    profiles = [profiling.profile("backbone", "compact"), profiling.profile("saliency method", "grad_cam")]
    print(profiling.table(profiles))

All plugins run in torch, in float32 on the CPU, with their initial weights. The figures compare plugins with each
other. OpenVINO runs a model faster, if it can run the model.
"""

import os
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ichprog import networks, registry, zoo
from ichprog.errors import IchprogError, PluginError, UnknownNameError
from ichprog.registry import Registry
from ichprog.saliency import Score, TorchPass
from ichprog.spec import ModelSpec, PluginRef

Shape = tuple[int, int, int]

REGISTRIES = {plugins.kind: plugins for plugins in (registry.backbones, registry.heads, registry.saliency)}
SMALL_BACKBONE = "compact"  # the backbone whose network the saliency methods explain
LABELS = ("low", "middle", "high")  # of the task of the heads
MAX_RUNS, MAX_SECONDS = 5, 10.0  # of the timed runs


@dataclass(frozen=True)
class Profile:
    """The measured figures of one plugin.

    Attributes:
        kind: "backbone", "head" or "saliency method".
        name: Name of the plugin.
        distribution: The distribution that contains the plugin.
        version: Version of the distribution.
        input_shape: Shape of the input: a grid `(D, H, W)`, or features `(C, d, h, w)` for a head.
        output_shape: Shape of the output: features `(C, d, h, w)`, label probabilities `(labels,)`, or a map
            `(d, h, w)`.
        parameters: Number of parameters; None for a saliency method.
        gflop: Floating-point operations in units of 10^9, forward and backward. A multiply-add counts as two. Only
            convolutions, matrix products and attention are counted.
        forward: Number of grids that passed forward through the network.
        backward: Number of grids for which a gradient of the score was computed.
        memory_bytes: Peak size of all tensors at one time: weights, input, and intermediate tensors. Buffers inside an
            operation are not counted.
        seconds: Median time of several runs on this machine.
    """

    kind: str
    name: str
    distribution: str
    version: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int | None
    gflop: float
    forward: int
    backward: int
    memory_bytes: int
    seconds: float


def select(names: Iterable[str] = (), kinds: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Select plugins by name and kind.

    Args:
        names: Names, such as "compact" or, in a family, "timm/resnet18". By default all plugins except families, whose
            members cannot be listed.
        kinds: Kinds of plugins: "backbone", "head" and "saliency method". By default all.

    Returns:
        The kind and the name of each plugin.

    Raises:
        UnknownNameError: There is no such kind, or no plugin of that name among these kinds.
    """
    kinds, names = list(kinds) or list(REGISTRIES), list(names)
    for kind in kinds:
        if kind not in REGISTRIES:
            raise UnknownNameError("kind of plugin", kind, REGISTRIES)
    entries = {kind: REGISTRIES[kind].entries() for kind in kinds}
    if not names:
        return [(kind, name) for kind in kinds for name in REGISTRIES[kind].names() if not name.endswith("/*")]
    selected = [(kind, name) for name in names for kind in kinds if any(entry.matches(name) for entry in entries[kind])]
    for name in names:
        if name not in {match for _, match in selected}:
            available = sorted({entry.name for group in entries.values() for entry in group})
            raise UnknownNameError(" or ".join(kinds), name, available, hint="`ichprog plugins` lists all.")
    return selected


def profile(kind: str, name: str, *, shape: Shape | None = None) -> Profile:
    """Build a plugin without options, run it and measure it.

    A backbone computes the features of one grid. A head computes the probabilities of three labels from the features
    of the default model. A saliency method computes one map of the compact backbone with a linear head on the mean.
    The forward pass of the map is included.

    Args:
        kind: "backbone", "head" or "saliency method".
        name: Name of the plugin.
        shape: D, H and W of the grid, for a head of the default model's grid. By default the grid of the zoo's first
            model with the backbone, or of the default model; for a saliency method the grid of the compact model.

    Raises:
        UnknownNameError: There is no such kind or plugin.
        SpecError: The plugin cannot be built without options.
        PluginError: The plugin cannot be loaded or built, or fails on its input.

    Examples:
        >>> profile("backbone", "compact", shape=(8, 32, 32)).parameters
        138992
    """
    if kind not in REGISTRIES:
        raise UnknownNameError("kind of plugin", kind, REGISTRIES)
    return _PROFILERS[kind](REGISTRIES[kind], name, shape)


def _profile_backbone(plugins: Registry, name: str, shape: Shape | None) -> Profile:
    spec = _spec(name, shape)
    backbone = _build_seeded(lambda: networks.build(spec)).backbone.eval()
    grid = _grid(spec)
    return _measure(plugins, name, backbone, grid, lambda: torch.no_grad()(backbone)(grid))


def _profile_head(plugins: Registry, name: str, shape: Shape | None) -> Profile:
    channels, *space = networks.feature_shape(_spec(zoo.find(zoo.DEFAULT).backbone.name, shape))
    head: Any = _build_seeded(lambda: networks.build_head(PluginRef(name, {}), channels, LABELS)).eval()
    features = torch.rand(1, channels, *space, generator=torch.Generator().manual_seed(0))
    return _measure(
        plugins, name, head, features, lambda: torch.no_grad()(lambda: head.probabilities(head(features)))()
    )


def _profile_saliency(plugins: Registry, name: str, shape: Shape | None) -> Profile:
    attribute = plugins.load(name)
    spec = _spec(SMALL_BACKBONE, shape)
    spec = replace(spec, tasks=(replace(spec.tasks[0], head=PluginRef("ordinal", {})),))
    network = _build_seeded(lambda: networks.build(spec)).eval().requires_grad_(False)
    grid, task, counter = _grid(spec).requires_grad_(), spec.tasks[0].name, _PassCounter()

    def compute_map() -> Tensor:
        shared = TorchPass(network, grid, [network.cam_layer])
        values: Tensor = attribute(Score(shared, lambda logits: logits[task][:, -1]), grid, network)
        return values.detach()[None]

    handle = network.register_forward_hook(counter.record)
    try:
        result = _measure(plugins, name, network, grid, compute_map, counter)
    finally:
        handle.remove()
    return replace(result, parameters=None)


_PROFILERS: dict[str, Callable[[Registry, str, Shape | None], Profile]] = dict(
    zip(REGISTRIES, (_profile_backbone, _profile_head, _profile_saliency), strict=True)
)


class _PassCounter:
    """Counts the grids that pass forward through a network, and those that get a gradient."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def record(self, _module: nn.Module, inputs: tuple[Tensor, ...], outputs: dict[str, Tensor]) -> None:
        """Count the grids of one call, as a forward hook."""
        self.forward += len(inputs[0])
        for logits in outputs.values():
            if logits.requires_grad:
                logits.register_hook(self._record_gradient)  # type: ignore[no-untyped-call]

    def _record_gradient(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def _measure(
    plugins: Registry,
    name: str,
    module: nn.Module,
    inputs: Tensor,
    work: Callable[[], Tensor],
    passes: _PassCounter | None = None,
) -> Profile:
    """Run the work once with counters, then several times with a clock."""
    entry = plugins.entry(name)
    existing = {_storage(values) for values in (*module.parameters(), *module.buffers(), inputs)}
    seconds: list[float] = []
    try:
        with _OperationCounter(existing) as counter:
            output = work()
        forward, backward = (passes.forward, passes.backward) if passes else (1, 0)
        while len(seconds) < MAX_RUNS and sum(seconds) < MAX_SECONDS:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    except IchprogError:
        raise
    except Exception as error:  # a plugin may fail in any way
        raise PluginError(
            f"{plugins.kind} {name!r} of {entry.owner} fails on {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {error}. Try another shape."
        ) from error
    return Profile(
        kind=plugins.kind,
        name=name,
        distribution=entry.distribution,
        version=entry.version,
        input_shape=tuple(inputs.shape[1 if plugins is registry.heads else 2 :]),
        output_shape=tuple(output.shape[1:]),
        parameters=sum(values.numel() for values in module.parameters()),
        gflop=counter.operations / 1e9,
        forward=forward,
        backward=backward,
        memory_bytes=counter.peak,
        seconds=median(seconds),
    )


class _OperationCounter(TorchDispatchMode):
    """Counts operations and the memory of tensors.

    `torch.utils.flop_counter` sets hooks on every tensor to attribute operations to modules, and the hooks of a
    saliency method fail with them. This class uses only the formulas of that module.

    Args:
        existing: Existing storages, each with its size in bytes.
    """

    def __init__(self, existing: Iterable[tuple[int, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self._alive = dict(existing)
        self._current = self.peak = sum(self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (new := _storage(tensor))[0] not in self._alive:
                self._alive.update([new])
                self._current += new[1]
                weakref.finalize(tensor.untyped_storage(), self._release, new[0])
        self.peak = max(self.peak, self._current)
        return result

    def _release(self, storage: int) -> None:
        self._current -= self._alive.pop(storage, 0)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return the storage of a tensor and its size in bytes. Views share a storage."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _spec(backbone: str, shape: Shape | None) -> ModelSpec:
    """Return the zoo's first model with a backbone, or the default model with that backbone, for grids of a shape."""
    default = zoo.find(zoo.DEFAULT)
    template = next((spec for spec in zoo.list_models() if spec.backbone.name == backbone), default)
    return replace(
        template, backbone=PluginRef(backbone, {}), input=replace(template.input, shape=shape or template.input.shape)
    )


def _grid(spec: ModelSpec) -> Tensor:
    """Return a random grid `(1, 1, D, H, W)` with values from 0 to 1."""
    return torch.rand(1, 1, *spec.input.shape, generator=torch.Generator().manual_seed(0))


def _build_seeded(build: Callable[[], Any]) -> Any:
    """Build with a fixed random seed and restore the random state of the caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def machine() -> str:
    """Describe the machine of the measured times in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    threads = torch.get_num_threads()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or "an unknown CPU")
    return (
        f"{os.cpu_count()} cores of {processor}, {platform.system()} {platform.machine()}; Python "
        f"{platform.python_version()}, torch {torch.__version__} with {threads} thread{'s' * (threads > 1)}"
    )


def table(profiles: Iterable[Profile], *, failed: Sequence[tuple[str, str]] = (), level: int = 2) -> str:
    """Format profiles as Markdown, with one table for each kind.

    Args:
        profiles: The profiles.
        failed: Plugins that could not be measured: the name and the reason of each.
        level: Level of the headings.
    """
    parts, profiles = [], list(profiles)
    for kind in REGISTRIES:
        if own := [each for each in profiles if each.kind == kind]:
            rows = [_columns(kind), *map(_row, own)]
            widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
            rows.insert(1, ["-" * width for width in widths])
            lines = (" | ".join(map(str.ljust, row, widths)) for row in rows)
            parts += [f"{'#' * level} {kind[0].upper()}{kind[1:]}s", "\n".join(f"| {line} |" for line in lines)]
    if failed:
        parts += [f"{'#' * level} Not measured", "\n".join(f"- {name}: {reason}" for name, reason in failed)]
    return "\n\n".join(parts)


def _columns(kind: str) -> list[str]:
    inputs, output = {
        "backbone": ("grid", "features"),
        "head": ("features", "probabilities"),
        "saliency method": ("grid", "map"),
    }[kind]
    own = ["forward", "backward"] if kind == registry.saliency.kind else ["parameters"]
    return ["name", "distribution", inputs, output, *own, "GFLOP", "MiB", "s"]


def _row(profile: Profile) -> list[str]:
    own = [profile.forward, profile.backward] if profile.parameters is None else [profile.parameters]
    return [
        f"`{profile.name}`",
        f"{profile.distribution} {profile.version}".rstrip(),
        " x ".join(map(str, profile.input_shape)),
        " x ".join(map(str, profile.output_shape)),
        *(f"{number:,}" for number in own),
        *map(_digits, (profile.gflop, profile.memory_bytes / 2**20, profile.seconds)),
    ]


def _digits(number: float) -> str:
    """Format a number with three significant digits, in scientific notation only if it is below 1e-4."""
    if number and number < 1e-4:
        return f"{number:.1e}"
    return f"{float(f'{number:.3g}'):.10g}"
