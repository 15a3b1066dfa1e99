"""What a backbone, a head or a saliency method costs: parameters, operations, memory, time, by its name.

    from ichprog import profiling

    print(profiling.table([profiling.measure("backbone", "compact"), profiling.measure("saliency method", "grad_cam")]))

All run in torch as they stand, in float32 on the processor, with the weights they start from: what is found compares
plugins with each other. A model on a processor is run by OpenVINO where that can, and is faster.
"""

import functools
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
SMALL = "compact"  # the backbone that methods explain
LABELS = ("low", "middle", "high")  # of the task that heads answer
RUNS, ENOUGH = 5, 10.0  # timed runs at most, and the seconds after which no other begins


@dataclass(frozen=True)
class Cost:
    """What one plugin costs.

    Attributes:
        kind: "backbone", "head" or "saliency method".
        name: Its name.
        distribution: Whose it is.
        version: The distribution's version.
        given: The shape of what it was given: a grid `(D, H, W)`, or features `(C, d, h, w)` for a head.
        found: The shape of what came of it: features `(C, d, h, w)`, label probabilities `(labels,)`, or a map
            `(d, h, w)`.
        parameters: How many numbers it learns or could learn; None for a method.
        gflop: Floating-point operations in thousands of millions, a multiply-add counting as two: those of
            convolutions, matrix products and attention, on the way back too. Others are not counted.
        forward: Grids that went through the network.
        back: Grids for which a gradient came back from the score; how far it went is not told.
        memory: Bytes that tensors hold at once at most: weights, input, and what is made on the way and for the way
            back. What an operation uses within itself is not counted.
        seconds: The median of several runs, on this machine.
    """

    kind: str
    name: str
    distribution: str
    version: str
    given: tuple[int, ...]
    found: tuple[int, ...]
    parameters: int | None
    gflop: float
    forward: int
    back: int
    memory: int
    seconds: float


def claims(names: Iterable[str] = (), kinds: Iterable[str] = ()) -> list[tuple[str, str]]:
    """The kind and name of each plugin that is asked for, in order.

    Args:
        names: Names, such as "compact", or one of a family, such as "timm/resnet18"; where none is given, all that
            are registered, without families, whose members are not known.
        kinds: The kinds to look among, of "backbone", "head" and "saliency method"; all where none is given.

    Raises:
        UnknownNameError: There is no such kind, or no plugin of that name among these kinds.
    """
    kinds, names = list(kinds) or list(REGISTRIES), list(names)
    for kind in kinds:
        if kind not in REGISTRIES:
            raise UnknownNameError("kind of plugin", kind, REGISTRIES)
    known = {kind: REGISTRIES[kind].entries() for kind in kinds}
    if not names:
        return [(kind, one) for kind in kinds for one in REGISTRIES[kind].names() if not one.endswith("/*")]
    found = [(kind, name) for name in names for kind in kinds if any(entry.matches(name) for entry in known[kind])]
    for name in names:
        if name not in {claimed for _, claimed in found}:
            there = sorted({entry.name for entries in known.values() for entry in entries})
            raise UnknownNameError(" or ".join(kinds), name, there, hint="`ichprog plugins` lists all.")
    return found


def measure(kind: str, name: str, *, shape: Shape | None = None) -> Cost:
    """Builds a plugin without options, runs it, and says what that costs.

    A backbone turns one grid into features. A head turns the features of the default model into the probabilities of
    three labels. A method makes one map of the compact backbone with a linear head on the mean, from a forward pass
    that is part of the cost.

    Args:
        kind: "backbone", "head" or "saliency method".
        name: Its name.
        shape: D, H and W of the grid, for a head that of the default model's grid. Where not given, that of the zoo's
            first model with the backbone, for other backbones that of the default model; for a method that of the
            compact one.

    Raises:
        UnknownNameError: There is no such kind, or none of that name.
        SpecError: It cannot be built without options.
        PluginError: It cannot be loaded or built, or fails on what it is given.
    """
    if kind not in REGISTRIES:
        raise UnknownNameError("kind of plugin", kind, REGISTRIES)
    return _MEASURES[kind](REGISTRIES[kind], name, shape)


def _backbone(plugins: Registry, name: str, shape: Shape | None) -> Cost:
    spec = _spec(name, shape)
    built = _seeded(lambda: networks.build(spec)).backbone.eval()
    grid = _grid(spec)
    return _cost(plugins, name, built, grid, lambda: torch.no_grad()(built)(grid))


def _head(plugins: Registry, name: str, shape: Shape | None) -> Cost:
    channels, *space = _default_features(shape)
    head: Any = _seeded(lambda: networks.build_head(PluginRef(name, {}), channels, LABELS)).eval()
    features = torch.rand(1, channels, *space, generator=torch.Generator().manual_seed(0))
    return _cost(plugins, name, head, features, lambda: torch.no_grad()(lambda: head.probabilities(head(features)))())


def _method(plugins: Registry, name: str, shape: Shape | None) -> Cost:
    attribute = plugins.load(name)
    spec = _spec(SMALL, shape)
    spec = replace(spec, tasks=(replace(spec.tasks[0], head=PluginRef("ordinal", {})),))
    explained = _seeded(lambda: networks.build(spec)).eval().requires_grad_(False)
    grid, task, passes = _grid(spec).requires_grad_(), spec.tasks[0].name, _Passes()

    def map_of() -> Tensor:
        shared = TorchPass(explained, grid, [explained.cam_layer])
        found: Tensor = attribute(Score(shared, lambda logits: logits[task][:, -1]), grid, explained)
        return found.detach()[None]

    handle = explained.register_forward_hook(passes.see)
    try:
        cost = _cost(plugins, name, explained, grid, map_of, passes)
    finally:
        handle.remove()
    return replace(cost, parameters=None)


_MEASURES: dict[str, Callable[[Registry, str, Shape | None], Cost]] = dict(
    zip(REGISTRIES, (_backbone, _head, _method), strict=True)
)


class _Passes:
    """Counts grids that go through a network, and those for which a gradient comes back."""

    def __init__(self) -> None:
        self.forward = self.back = 0

    def see(self, _module: nn.Module, given: tuple[Tensor, ...], outputs: dict[str, Tensor]) -> None:
        """A forward hook."""
        self.forward += len(given[0])
        for logits in outputs.values():
            if logits.requires_grad:
                logits.register_hook(self._came_back)  # type: ignore[no-untyped-call]

    def _came_back(self, gradient: Tensor) -> None:
        self.back += len(gradient)


def _cost(
    plugins: Registry,
    name: str,
    module: nn.Module,
    given: Tensor,
    work: Callable[[], Tensor],
    passes: _Passes | None = None,
) -> Cost:
    """Runs the work once under counters, then against the clock."""
    entry = plugins.entry(name)
    held = {_storage(values) for values in (*module.parameters(), *module.buffers(), given)}
    seconds: list[float] = []
    try:
        with _Counted(held) as counted:
            found = work()
        forward, back = (passes.forward, passes.back) if passes else (1, 0)
        while len(seconds) < RUNS and sum(seconds) < ENOUGH:
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
    except IchprogError:
        raise
    except Exception as error:  # a plugin may fail in any way
        raise PluginError(
            f"{plugins.kind} {name!r} of {entry.owner} fails on {tuple(given.shape)}: {type(error).__name__}: {error}. "
            "Another shape may do."
        ) from error
    return Cost(
        kind=plugins.kind,
        name=name,
        distribution=entry.distribution,
        version=entry.version,
        given=tuple(given.shape[1 if plugins is registry.heads else 2 :]),
        found=tuple(found.shape[1:]),
        parameters=sum(values.numel() for values in module.parameters()),
        gflop=counted.operations / 1e9,
        forward=forward,
        back=back,
        memory=counted.most,
        seconds=median(seconds),
    )


class _Counted(TorchDispatchMode):
    """Counts operations, and follows what tensors hold at once.

    torch's own counter hangs hooks on every tensor to tell modules apart, beside which a method's own hooks fail; here
    its formulas alone are used.

    Args:
        held: The storages that are there already, each with its bytes.
    """

    def __init__(self, held: Iterable[tuple[int, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self._alive = dict(held)
        self._now = self.most = sum(self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts it."""
        given = kwargs or {}
        found = func(*args, **given)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += formula(*args, **given, out_val=found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (new := _storage(tensor))[0] not in self._alive:
                self._alive.update([new])
                self._now += new[1]
                weakref.finalize(tensor.untyped_storage(), self._gone, new[0])
        self.most = max(self.most, self._now)
        return found

    def _gone(self, storage: int) -> None:
        self._now -= self._alive.pop(storage, 0)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Which storage a tensor lies in, and its bytes; views share one."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _spec(backbone: str, shape: Shape | None) -> ModelSpec:
    """The zoo's first model with a backbone, or the default one with that instead of its own, on grids of a shape."""
    default = zoo.find(zoo.DEFAULT)
    like = next((spec for spec in zoo.list_models() if spec.backbone.name == backbone), default)
    return replace(like, backbone=PluginRef(backbone, {}), input=replace(like.input, shape=shape or like.input.shape))


def _grid(spec: ModelSpec) -> Tensor:
    """A grid `(1, 1, D, H, W)` of numbers from 0 to 1."""
    return torch.rand(1, 1, *spec.input.shape, generator=torch.Generator().manual_seed(0))


@functools.cache
def _default_features(shape: Shape | None) -> tuple[int, ...]:
    """The shape `(C, d, h, w)` of the default model's features, found without computing them."""
    spec = _spec(zoo.find(zoo.DEFAULT).backbone.name, shape)
    backbone = _seeded(lambda: networks.build(spec)).backbone.eval().to("meta")
    try:
        return tuple(backbone(torch.empty(1, 1, *spec.input.shape, device="meta")).shape[1:])
    except RuntimeError as error:
        raise PluginError(f"the default backbone gives no features of grids {spec.input.shape}: {error}") from error


def _seeded(build: Callable[[], Any]) -> Any:
    """What is built from random numbers of a seed, with the caller's own as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def machine() -> str:
    """What times were measured on, in a line."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        told = []
    threads = torch.get_num_threads()
    named = (line.partition(":")[2].strip() for line in told if line.startswith("model name"))
    processor = next(named, platform.processor() or "a processor")
    return (
        f"{os.cpu_count()} cores of {processor}, {platform.system()} {platform.machine()}; Python "
        f"{platform.python_version()}, torch {torch.__version__} with {threads} thread{'s' * (threads > 1)}"
    )


def table(costs: Iterable[Cost], *, failed: Sequence[tuple[str, str]] = (), level: int = 2) -> str:
    """Costs as Markdown, a table for each kind.

    Args:
        costs: The costs.
        failed: Names of plugins that could not be measured, each with the reason.
        level: Depth of the headings.
    """
    parts, costs = [], list(costs)
    for kind in REGISTRIES:
        if own := [cost for cost in costs if cost.kind == kind]:
            rows = [_columns(kind), *map(_row, own)]
            widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
            rows.insert(1, ["-" * width for width in widths])
            lines = (" | ".join(map(str.ljust, row, widths)) for row in rows)
            parts += [f"{'#' * level} {kind[0].upper()}{kind[1:]}s", "\n".join(f"| {line} |" for line in lines)]
    if failed:
        parts += [f"{'#' * level} Not measured", "\n".join(f"- {name}: {why}" for name, why in failed)]
    return "\n\n".join(parts)


def _columns(kind: str) -> list[str]:
    given, found = {
        "backbone": ("grid", "features"),
        "head": ("features", "probabilities"),
        "saliency method": ("grid", "map"),
    }[kind]
    own = ["forward", "back"] if kind == registry.saliency.kind else ["parameters"]
    return ["name", "of", given, found, *own, "GFLOP", "MiB", "s"]


def _row(cost: Cost) -> list[str]:
    own = [cost.forward, cost.back] if cost.parameters is None else [cost.parameters]
    return [
        f"`{cost.name}`",
        f"{cost.distribution} {cost.version}".rstrip(),
        " x ".join(map(str, cost.given)),
        " x ".join(map(str, cost.found)),
        *(f"{number:,}" for number in own),
        *map(_digits, (cost.gflop, cost.memory / 2**20, cost.seconds)),
    ]


def _digits(number: float) -> str:
    """Three digits that count, without a power of ten unless it is very small."""
    if number and number < 1e-4:
        return f"{number:.1e}"
    return f"{float(f'{number:.3g}'):.10g}"
