"""The contract suite: what every backbone, head, saliency method and brain extractor promises, checked by name.

For the tests of a plugin's own distribution, and by hand:

    from ichprog import testing

    testing.check_backbone("mine", width=4)

A check says nothing where every promise is kept. Else it raises a `PluginError` with the plugin, whose it is, and the
promise that is broken.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ichprog import networks, registry, zoo
from ichprog.errors import PluginError, ScanError
from ichprog.registry import Registry
from ichprog.runtime import build_runtimes
from ichprog.spec import ModelSpec, PluginRef

Shape = tuple[int, int, int]


def check_backbone(name: str, *, shape: Shape = (32, 64, 64), export: bool = True, **options: Any) -> None:
    """Checks a backbone.

    It builds twice alike; features are `(B, C, d, h, w)` of finite float32 numbers with C its `out_channels`; the
    layer for class activation maps gives such a thing too; the same grid gives the same features, whatever is beside it
    in the batch; a grid of another shape is answered too, or refused by a `PluginError`; features depend on the grid,
    and every parameter learns; nothing changes by looking; its state fills another of its kind; and OpenVINO answers
    as torch does.

    Args:
        name: The name it is registered by.
        shape: D, H and W of the grids it is tried with.
        export: Whether it must run outside of torch; one that cannot is run by torch, slower.
        **options: Its options.

    Raises:
        PluginError: It breaks a promise.
        UnknownNameError: There is none of that name.
        SpecError: It refuses its options.
    """
    broken = _broken(registry.backbones, name)
    spec = _spec(PluginRef(name, options), shape)
    with _seeded():
        grids = torch.rand(2, 1, *shape)
        torch.manual_seed(1)
        whole = networks.build(spec).eval()
        backbone: Any = whole.backbone
        layer = backbone.get_submodule(backbone.cam_layer)
        seen: list[Any] = []
        handle = layer.register_forward_hook(lambda _module, _given, output: seen.append(output))
        try:
            features = _tried(broken, lambda: backbone(grids))
        finally:
            handle.remove()
        _check_values(broken, features, "features", (2, backbone.out_channels, None, None, None))
        if not seen:
            raise broken(f"its cam_layer {backbone.cam_layer!r} is not used")
        _check_values(broken, seen[-1], f"the output of its cam_layer {backbone.cam_layer!r}", (2, *[None] * 4))

        with _untouched(broken, backbone, grids), torch.no_grad():
            again, alone = backbone(grids), backbone(grids[1:])
        if not torch.equal(again, features):
            raise broken("the same grid must give the same features in evaluation")
        if not _alike(alone, features[1:]):
            raise broken("a grid's features must not depend on what is beside it in a batch")

        _check_another_shape(broken, backbone, shape)
        _check_learning(broken, backbone, grids)
        torch.manual_seed(1)
        twin: Any = networks.build(spec).eval().backbone
        if not _alike(twin(grids), features):
            raise broken("built twice from one seed, it must be the same")
        torch.manual_seed(2)
        other: Any = networks.build(spec).eval().backbone
        if list(other.state_dict()) != list(backbone.state_dict()):
            raise broken("its keys must be the same each time it is built")
        other.load_state_dict(copy.deepcopy(backbone.state_dict()))
        if not _alike(other(grids), features):
            raise broken("its state, filled into another of its kind, must make that the same")
        if export:
            _check_compiled(broken, spec, whole, grids[:1])


def check_head(name: str, *, labels: Sequence[str] = ("low", "middle", "high"), **options: Any) -> None:
    """Checks a head.

    Logits are `(B, K)`; label probabilities `(B, labels)`, none negative, adding to one, with a gradient for each; the
    loss is a finite scalar, a mean over the batch, and following it makes the true label the most probable; answers do
    not depend on what is beside them in a batch; its state fills another of its kind; `rescale_`, where it has that,
    does to logits what it says.

    Args:
        name: The name it is registered by.
        labels: The labels it is tried with.
        **options: Its options.

    Raises:
        PluginError: It breaks a promise.
        UnknownNameError: There is none of that name.
        SpecError: It refuses its options.
    """
    broken = _broken(registry.heads, name)
    channels, count = 8, len(labels)

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return networks.build_head(PluginRef(name, options), channels, labels).eval()

    with _seeded():
        features = torch.rand(2 * count, channels, 2, 3, 4)
        target = torch.arange(2 * count) % count
        head = build(1)
        with _untouched(broken, head, features), torch.no_grad():
            logits = _tried(broken, lambda: head(features))
            probabilities = _tried(broken, lambda: head.probabilities(logits))
            loss = _tried(broken, lambda: head.loss(logits, target))
            alone = head(features[:1])
            halves = [head.loss(head(features[part]), target[part]) for part in (slice(count), slice(count, None))]
        _check_values(broken, logits, "logits", (2 * count, None))
        _check_probabilities(broken, probabilities, 2 * count, count)
        if loss.ndim or not bool(loss.isfinite()):
            raise broken(f"a loss is one finite number, this is {loss.tolist()}")
        if not _alike(alone, logits[:1]):
            raise broken("logits must not depend on what is beside them in a batch")
        if not _alike(sum(halves) / 2, loss):
            raise broken("a loss must be the mean over the batch: that of two halves is not the mean of theirs")
        # each label has a channel of its own, so that there is something to be learnt
        clear = 0.1 * features + nn.functional.one_hot(target, channels)[:, :, None, None, None]
        learner = build(1).train()
        rate = torch.optim.Adam(learner.parameters(), lr=0.05)
        for _ in range(300):
            rate.zero_grad()
            learner.loss(learner(clear), target).backward()
            rate.step()
        learner.eval()
        exact = learner(clear).detach().double().requires_grad_()
        for position, label in enumerate(labels):
            (gradient,) = torch.autograd.grad(learner.probabilities(exact)[:, position].sum(), exact)
            if not gradient.abs().amax() > 0:
                raise broken(f"the probability of {label!r} does not depend on the logits")
        with torch.no_grad():
            learnt = learner.probabilities(learner(clear))
            extreme = learner.probabilities(learner(clear * 1e3))
        _check_probabilities(broken, learnt, 2 * count, count)
        _check_probabilities(broken, extreme, 2 * count, count)
        if not torch.equal(learnt.argmax(1), target):
            raise broken("following its loss must make the true label the most probable")
        twin = build(2)
        twin.load_state_dict(copy.deepcopy(learner.state_dict()))
        with torch.no_grad():
            if not _alike(twin.probabilities(twin(clear)), learnt):
                raise broken("its state, filled into another of its kind, must make that the same")
            if hasattr(twin, "rescale_"):
                before, scale = twin(clear), torch.tensor(0.5)
                shift = torch.linspace(0.3, 0.1, before.shape[1])
                twin.rescale_(scale, shift)
                if not _alike(twin(clear), scale * before + shift):
                    raise broken("after rescale_(scale, shift), logits must be scale x logits + shift")


def check_saliency(name: str, **options: Any) -> None:
    """Checks a saliency method, on a small network of which it is known where it looks.

    The map is `(D, H, W)` or coarser, of finite numbers, the same each time; it lies where the lesion is that the score
    comes from, on the left and on the right; its sign tells for from against, and it is not scaled; and after success,
    a bad target or a network that breaks down, the exception comes through and nothing is left on network, grid and
    torch: no hook, mode, flag, gradient or random state.

    Args:
        name: The name it is registered by.
        **options: Its options.

    Raises:
        PluginError: It breaks a promise.
        UnknownNameError: There is none of that name.
    """
    broken = _broken(registry.saliency, name)
    attribute = registry.saliency.load(name)
    looking = _Looking().eval().requires_grad_(False)

    def explained(grid: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        with _untouched(broken, looking, grid):
            found = attribute(score, grid, looking, **options)
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise broken(f"a map is a tensor (D, H, W), this is {_shape_of(found)}")
        _check_values(broken, found, "a map", (None, None, None))
        return found.detach()

    def score_of(sign: float) -> Callable[[Tensor], Tensor]:
        return lambda grid: sign * looking(grid)["present"][:, 0]

    with _seeded():
        for side in (0, 1):
            grid, lesion = _with_lesion(side)
            found = explained(grid, score_of(1))
            if not torch.equal(explained(grid, score_of(1)), found):
                raise broken("the same question must have the same map")
            if any(cells > voxels for cells, voxels in zip(found.shape, lesion.shape, strict=True)):
                raise broken(f"a map is no finer than the grid {tuple(lesion.shape)}, this has {tuple(found.shape)}")
            there = _share(found, lesion)
            if not there > 0.5:
                where = ("low", "high")[side]
                raise broken(f"of what speaks for a lesion on the {where} side, {there:.0%} lies on it, not over half")
            against = explained(grid, score_of(-1))
            if not _on(against, lesion) < _on(found, lesion):
                raise broken("a map must be signed: what speaks for a score must not speak for its opposite")
            more = explained(grid, score_of(4)).abs().amax() / found.abs().amax()
            if not more > 2:
                raise broken(f"a map must not be scaled: that of 4 times the score is {more:.2f} times as high")

        grid, _ = _with_lesion(0)
        for what, score, fault in (
            ("a bad target", lambda grid: looking(grid)["present"][:, 7], IndexError),
            ("a network that breaks down", lambda grid: looking(grid, breaks=True)["present"][:, 0], _BreakdownError),
        ):
            with _untouched(broken, looking, grid):
                try:
                    attribute(score, grid, looking, **options)
                except (fault, PluginError):
                    continue
                except Exception as error:
                    raise broken(f"{what} must be told as it is, not as {type(error).__name__}: {error}") from error
            raise broken(f"{what} must not be passed over in silence")


def check_brain_extractor(name: str, *, min_dice: float = 0.8) -> None:
    """Check the contract of a brain extractor on simulated heads.

    The mask is a bool array of the shape of the HU, for thin and for thick slices. It lies on the brain: the Dice
    coefficient with the true brain is at least `min_dice`. The same HU give the same mask, and the HU are not changed.
    A volume of air gives an empty mask or a ScanError.

    Args:
        name: Name of the extractor.
        min_dice: Lowest allowed Dice coefficient with the true brain. A trained extractor may need a lower value,
            because the simulated heads are ellipsoids.

    Raises:
        PluginError: The extractor breaks its contract.
        UnknownNameError: There is no such extractor.

    Example:
        >>> check_brain_extractor("morphology")
    """
    broken = _broken(registry.brain_extractors, name)
    extract = registry.brain_extractors.load(name)
    if not callable(extract):
        raise broken("an extractor must be a function")
    for spacing in ((2.0, 2.0, 5.0), (2.5, 2.0, 2.0)):
        hu, brain = _simulated_head(spacing)
        given = hu.copy()
        mask = _tried(broken, lambda given=given, spacing=spacing: extract(given, spacing))  # type: ignore[misc]
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != hu.shape:
            got = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise broken(f"a mask must be a bool array {hu.shape}, got {got}")
        if not np.array_equal(given, hu):
            raise broken("the HU must not be changed")
        if not np.array_equal(extract(given, spacing), mask):
            raise broken("the same HU must give the same mask")
        dice = 2 * float((mask & brain).sum()) / max(float(mask.sum() + brain.sum()), 1.0)
        if not dice >= min_dice:
            raise broken(f"the Dice coefficient with the brain is {dice:.2f}, expected at least {min_dice:g}")
    try:
        mask = extract(np.full((40, 40, 20), -1000, np.float32), (4.0, 4.0, 8.0))
    except ScanError:
        return
    except Exception as error:
        raise broken(f"air must give an empty mask or a ScanError, not {type(error).__name__}; {error}") from error
    if mask.any():
        raise broken("air must give an empty mask or a ScanError")


def _simulated_head(spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return HU of a head in LPS order, left of the middle of the scan, and its brain."""
    shape = [round(mm / step) for mm, step in zip((220, 240, 200), spacing_mm, strict=True)]
    axes = (np.arange(n) * step for n, step in zip(shape, spacing_mm, strict=True))
    i, j, k = np.meshgrid(*axes, indexing="ij")

    def ellipsoid(*half: float) -> np.ndarray:
        inside: np.ndarray = ((i - 120) / half[0]) ** 2 + ((j - 120) / half[1]) ** 2 + ((k - 100) / half[2]) ** 2 <= 1
        return inside

    noise = np.random.default_rng(0).normal(0, 4, shape)
    hu = np.full(shape, -1000.0)
    hu[ellipsoid(84, 104, 86)] = 30.0  # scalp
    hu[ellipsoid(76, 96, 78)] = 900.0  # skull
    brain = ellipsoid(70, 90, 72)
    hu[brain] = 35.0
    hu[((i - 140) ** 2 + (j - 110) ** 2 + (k - 110) ** 2) <= 15**2] = 65.0  # haematoma
    return np.asarray(np.round(hu + noise), np.float32, order="F"), brain


class _BreakdownError(Exception):
    """What a network raises that breaks down on purpose."""


class _Looking(nn.Module):
    """A network whose one score, `present`, is how much of a grid is bright and nothing else."""

    cam_layer = "backbone.2"

    def __init__(self) -> None:
        super().__init__()
        mean = nn.Conv3d(1, 2, 3, padding=1)
        nn.init.constant_(mean.weight, 1 / 27)
        mean.bias = nn.Parameter(torch.tensor([-0.5, -0.7]))
        self.backbone = nn.Sequential(mean, nn.ReLU(), nn.AvgPool3d(2))
        linear = nn.Linear(2, 1)
        nn.init.constant_(linear.weight, 30.0)
        nn.init.constant_(linear.bias, -1.0)
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), linear)

    def forward(self, grid: Tensor, *, breaks: bool = False) -> dict[str, Tensor]:
        """The score, as logits `(B, 1)` of a task; or a breakdown halfway."""
        features = self.backbone(grid)
        if breaks:
            raise _BreakdownError
        return {"present": self.head(features)}


def _with_lesion(side: int) -> tuple[Tensor, Tensor]:
    """A dim grid with a bright ball at one end of its last axis, and where the ball is."""
    shape = (12, 24, 24)
    middle = (6, 12, 6 if side == 0 else 17)
    axes = torch.meshgrid(*(torch.arange(n) - at for n, at in zip(shape, middle, strict=True)), indexing="ij")
    lesion = sum(axis**2 for axis in axes) <= 16
    return (0.2 * torch.rand(shape) + 0.7 * lesion)[None, None].requires_grad_(), torch.as_tensor(lesion)


def _on(found: Tensor, lesion: Tensor) -> float:
    """What of a map, brought to the grid, lies on a lesion and one cell of the map around it."""
    full = nn.functional.interpolate(found[None, None], lesion.shape)[0, 0]
    around = nn.functional.max_pool3d(lesion[None, None].float(), 5, 1, 2)[0, 0] > 0
    return float(full[around].sum())


def _share(found: Tensor, lesion: Tensor) -> float:
    positive = found.clamp(min=0)
    return _on(positive, lesion) / max(_on(positive, torch.ones_like(lesion)), 1e-30)


def _broken(plugins: Registry, name: str) -> Callable[[str], PluginError]:
    """How a plugin's broken promise is told."""
    owner = plugins.entry(name).owner

    def told(how: str) -> PluginError:
        return PluginError(f"{plugins.kind} {name!r} of {owner} breaks its contract: {how}.")

    return told


def _spec(backbone: PluginRef, shape: Shape) -> ModelSpec:
    """A model with a backbone, on a grid of a shape, whose weights are nowhere."""
    like = zoo.find(zoo.DEFAULT)
    nowhere = replace(like.weights, repo=None, revision=None, folder="", format="safetensors", keys={}, sha256={})
    return replace(like, backbone=backbone, input=replace(like.input, shape=shape), weights=nowhere, golden_output=None)


def _tried(broken: Callable[[str], PluginError], work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # a plugin may fail in any way
        raise broken(f"{type(error).__name__}: {error}") from error


def _shape_of(found: Any) -> str:
    return f"one of {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"


def _check_values(broken: Callable[[str], PluginError], found: Any, what: str, shape: Sequence[int | None]) -> None:
    said = f"({', '.join('any' if n is None else str(n) for n in shape)})"
    if not isinstance(found, Tensor):
        raise broken(f"{what} must be a tensor {said}, is a {type(found).__name__}")
    fits = found.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    if not fits:
        raise broken(f"{what} must be {said}, is {tuple(found.shape)}")
    if found.dtype != torch.float32:
        raise broken(f"{what} must be float32, is {str(found.dtype).removeprefix('torch.')}")
    if not bool(found.isfinite().all()):
        raise broken(f"{what} must be finite")


def _check_probabilities(broken: Callable[[str], PluginError], found: Tensor, rows: int, labels: int) -> None:
    _check_values(broken, found, "probabilities", (rows, labels))
    if bool((found < 0).any()) or not _alike(found.sum(1), torch.ones(rows)):
        raise broken("probabilities must not be negative and must add to one")


def _check_another_shape(broken: Callable[[str], PluginError], backbone: Any, shape: Shape) -> None:
    """Whether a larger batch of larger grids, not as high as wide, is answered, or refused in words."""
    depth, height, width = shape
    larger = torch.rand(3, 1, depth + depth // 4, height, width + width // 4)
    try:
        with torch.no_grad():
            features, alone = backbone(larger), backbone(larger[2:])
    except PluginError:  # it says what it takes
        return
    except Exception as error:  # a plugin may fail in any way
        said = f"grids {tuple(larger.shape)} after {shape} must be answered, or refused by a PluginError that says why"
        raise broken(f"{said}; {type(error).__name__}: {error}") from error
    _check_values(broken, features, f"features of grids {tuple(larger.shape)}", (3, backbone.out_channels, *[None] * 3))
    if not _alike(alone, features[2:]):
        raise broken("a grid's features must not depend on what is beside it in a batch")


def _check_learning(broken: Callable[[str], PluginError], backbone: nn.Module, grids: Tensor) -> None:
    """Whether gradients reach the grid and every parameter."""
    learner, grids = copy.deepcopy(backbone).train(), grids.clone().requires_grad_()
    if (frozen := [values.requires_grad for values in learner.parameters()]) and not any(frozen):
        raise broken("all its parameters are frozen (requires_grad is False), so that training could change nothing")
    learner(grids).square().mean().backward()
    if grids.grad is None or not bool(grids.grad.isfinite().all()) or not grids.grad.abs().amax() > 0:
        raise broken("features must depend on the grid, by a finite gradient")
    if idle := [name for name, values in learner.named_parameters() if values.requires_grad and values.grad is None]:
        raise broken(f"parameters that take no part: {', '.join(idle[:3])}{', ...' if len(idle) > 3 else ''}")


def _check_compiled(broken: Callable[[str], PluginError], spec: ModelSpec, whole: nn.Module, grid: Tensor) -> None:
    """Whether OpenVINO answers as torch does."""
    from safetensors.torch import save_file

    from ichprog.hub import WeightFile
    from ichprog.runtime import resolve_runtime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({key: values.contiguous() for key, values in whole.state_dict().items()}, path)
        file = WeightFile(0, path, "0" * 64, str(path), "0" * 64)
        answers = []
        for runtime in ("openvino", "torch"):
            try:
                (member,), _ = build_runtimes(
                    spec, [file], resolve_runtime(runtime, "cpu", "float32"), Path(folder) / runtime
                )
                answers.append(member.run(grid[:, 0].numpy()))
            except PluginError as error:
                raise broken(f"it must run outside of torch: {error}") from error
    for task, compiled in answers[0].items():
        if not _alike(torch.from_numpy(compiled.probabilities), torch.from_numpy(answers[1][task].probabilities)):
            raise broken("OpenVINO must answer as torch does")


def _alike(found: Any, expected: Tensor) -> bool:
    """Whether numbers are the same but for rounding."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers of a seed, and the caller's own afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _untouched(broken: Callable[[str], PluginError], module: nn.Module, given: Tensor) -> Iterator[None]:
    """Holds what the block does to a network, its input and torch against nothing at all, whether it ends or raises."""
    before = _traces(module, given)
    try:
        yield
    finally:
        after = _traces(module, given)
        for what, value in before.items():
            same = torch.equal(value, after[what]) if isinstance(value, Tensor) else value == after[what]
            if not same:
                raise broken(f"it must leave {what} as it was")


def _traces(module: nn.Module, given: Tensor) -> dict[str, Any]:
    """All that could be left behind."""
    hooks = {
        f"{name}{kind}": list(hooks)
        for name, one in module.named_modules()
        for kind, hooks in vars(one).items()
        if kind.endswith("hooks") and hooks
    }
    return {
        "the hooks of the network": hooks,
        "the modules of the network": [(name, id(one)) for name, one in module.named_modules()],
        "the attributes of the network": [(sorted(vars(one)), vars(one).get("inplace")) for one in module.modules()],
        "the modes of the network": [one.training for one in module.modules()],
        "what of the network takes gradients": [one.requires_grad for one in module.parameters()],
        "the gradients of the network": [one.grad is not None for one in module.parameters()],
        "the numbers of the network": nn.utils.parameters_to_vector(module.state_dict().values()).clone(),
        "the input": given.detach().clone(),
        "whether the input takes gradients": given.requires_grad,
        "the input's gradient": given.grad is not None,
        "the hooks of the input": len(given._backward_hooks or ()),
        "torch's random numbers": torch.get_rng_state(),
        "whether torch keeps gradients": torch.is_grad_enabled(),
        "whether torch is deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch's precision": (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
    }
