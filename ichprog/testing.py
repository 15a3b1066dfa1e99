"""The contract suite: check that a backbone, head, fusion, saliency method or brain extractor keeps its contract.

Use the checks in the tests of a plugin's distribution, or by hand:

    from ichprog import testing

    testing.check_backbone("mine", width=4)

A check returns None if the plugin keeps its contract. Otherwise it raises a `PluginError` that names the plugin, its
distribution and the broken rule.
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

from ichprog import networks, registry, saliency, zoo
from ichprog.errors import InvalidValueError, PluginError, ScanError
from ichprog.registry import Registry
from ichprog.runtime import build_runtimes
from ichprog.spec import ClinicalValue, ModelSpec, PluginRef

Shape = tuple[int, int, int]
Broken = Callable[[str], PluginError]  # builds the error of a broken rule


def check_backbone(name: str, *, shape: Shape = (32, 64, 64), export: bool = True, **options: Any) -> None:
    """Check the contract of a backbone.

    - The features are `(B, C, d, h, w)` of finite float32 numbers, and C is `out_channels`.
    - The layer `cam_layer` is used and has an output of the same form.
    - The same grid gives the same features, in any batch.
    - A grid of another shape works too, or raises a `PluginError`.
    - The features depend on the grid, and every parameter gets a gradient.
    - Evaluation changes neither the network, nor its input, nor the state of torch.
    - Two networks from one seed are equal, and the state of one network fits another.
    - OpenVINO gives the same results as torch.

    Args:
        name: Name of the backbone.
        shape: D, H and W of the test grids.
        export: Whether OpenVINO must run the backbone. Set it to False for a backbone that only torch can run.
        **options: Options of the backbone.

    Raises:
        PluginError: The backbone breaks its contract.
        UnknownNameError: There is no such backbone.
        SpecError: The backbone refuses its options.

    Examples:
        >>> check_backbone("compact", shape=(8, 32, 32), export=False)
    """
    broken = _broken(registry.backbones, name)
    spec = _spec(PluginRef(name, options), shape)
    with _seeded():
        grids = torch.rand(2, 1, *shape)
        network = _build_seeded(spec, 1)
        backbone: Any = network.backbone
        features = _check_features(broken, backbone, grids)
        _check_repeatability(broken, backbone, grids, features)
        _check_another_shape(broken, backbone, shape)
        _check_gradients(broken, backbone, grids)
        _check_state(broken, spec, backbone, grids, features)
        if export:
            _check_compiled(broken, spec, network, grids[:1])


def _build_seeded(spec: ModelSpec, seed: int) -> networks.Network:
    torch.manual_seed(seed)
    return networks.build(spec).eval()


def _check_features(broken: Broken, backbone: Any, grids: Tensor) -> Tensor:
    """Check the features and the output of `cam_layer`, and return the features."""
    outputs: list[Any] = []
    layer = backbone.get_submodule(backbone.cam_layer)
    handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        features: Tensor = _attempt(broken, lambda: backbone(grids))
    finally:
        handle.remove()
    _check_values(broken, features, "features", (2, backbone.out_channels, None, None, None))
    if not outputs:
        raise broken(f"its cam_layer {backbone.cam_layer!r} is not used")
    _check_values(broken, outputs[-1], f"the output of its cam_layer {backbone.cam_layer!r}", (2, *[None] * 4))
    return features


def _check_repeatability(broken: Broken, backbone: Any, grids: Tensor, features: Tensor) -> None:
    with _unchanged(broken, backbone, grids), torch.no_grad():
        again, alone = backbone(grids), backbone(grids[1:])
    if not torch.equal(again, features):
        raise broken("the same grid must give the same features in evaluation")
    if not _is_close(alone, features[1:]):
        raise broken("the features of a grid must not depend on the other grids in a batch")


def _check_state(broken: Broken, spec: ModelSpec, backbone: Any, grids: Tensor, features: Tensor) -> None:
    """Check that a seed determines the backbone, and that its state fits another backbone."""
    if not _is_close(_build_seeded(spec, 1).backbone(grids), features):
        raise broken("two backbones from one seed must be equal")
    other = _build_seeded(spec, 2).backbone
    if list(other.state_dict()) != list(backbone.state_dict()):
        raise broken("its keys must be the same in every build")
    other.load_state_dict(copy.deepcopy(backbone.state_dict()))
    if not _is_close(other(grids), features):
        raise broken("a second backbone with its state must give the same features")


def check_head(name: str, *, labels: Sequence[str] = ("low", "middle", "high"), **options: Any) -> None:
    """Check the contract of a head.

    - The logits are `(B, K)` and do not depend on the rest of the batch.
    - The probabilities are `(B, labels)`, not negative, sum to one, and each has a gradient.
    - The loss is a finite scalar, the mean over the batch, and minimising it makes the true label the most probable.
    - The state of one head fits another.
    - The method `rescale_(scale, shift)`, if there is one, maps the logits to scale x logits + shift.
    - A dense head pools the logits of voxels and slices to the logits of the labels, and minimising its `dense_loss`
      makes the true region of a voxel the most probable. Unknown cells do not change the loss.

    Args:
        name: Name of the head.
        labels: Labels of the test task.
        **options: Options of the head.

    Raises:
        PluginError: The head breaks its contract.
        UnknownNameError: There is no such head.
        SpecError: The head refuses its options.

    Examples:
        >>> check_head("softmax")
    """
    broken = _broken(registry.heads, name)
    channels, count = 8, len(labels)
    other = {key: value for key, value in options.items() if key != "regions"}  # regions come from a spec's mask

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return networks.build_head(PluginRef(name, other), channels, labels, options.get("regions")).eval()

    with _seeded():
        features = torch.rand(2 * count, channels, 2, 3, 4)
        target = torch.arange(2 * count) % count
        _check_outputs(broken, build(1), features, target)
        # each label has a channel of its own, so that the task can be learned
        separable = 0.1 * features + nn.functional.one_hot(target, channels)[:, :, None, None, None]
        head = _trained(build(1), separable, target)
        _check_trained(broken, head, separable, target, labels)
        _check_copies(broken, head, build(2), separable)
        if callable(getattr(head, "dense", None)):
            _check_dense(broken, build(1), channels)


def _check_outputs(broken: Broken, head: Any, features: Tensor, target: Tensor) -> None:
    """Check logits, probabilities and loss of a new head."""
    rows, count = len(target), len(target) // 2
    with _unchanged(broken, head, features), torch.no_grad():
        logits = _attempt(broken, lambda: head(features))
        probabilities = _attempt(broken, lambda: head.probabilities(logits))
        loss = _attempt(broken, lambda: head.loss(logits, target))
        alone = head(features[:1])
        halves = [head.loss(head(features[part]), target[part]) for part in (slice(count), slice(count, None))]
    _check_values(broken, logits, "logits", (rows, None))
    _check_probabilities(broken, probabilities, rows, count)
    if loss.ndim or not bool(loss.isfinite()):
        raise broken(f"a loss is one finite number, this loss is {loss.tolist()}")
    if not _is_close(alone, logits[:1]):
        raise broken("logits must not depend on the rest of the batch")
    if not _is_close(sum(halves) / 2, loss):
        raise broken("a loss must be the mean over the batch: the loss of two halves is not the mean of their losses")


def _trained(head: Any, features: Tensor, target: Tensor) -> Any:
    """Return the head after it minimised its loss on the features."""
    head.train()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(head(features), target).backward()
        optimizer.step()
    return head.eval()


def _check_trained(broken: Broken, head: Any, features: Tensor, target: Tensor, labels: Sequence[str]) -> None:
    """Check gradients, extreme logits and the most probable label of a trained head."""
    exact = head(features).detach().double().requires_grad_()
    for position, label in enumerate(labels):
        (gradient,) = torch.autograd.grad(head.probabilities(exact)[:, position].sum(), exact)
        if not gradient.abs().amax() > 0:
            raise broken(f"the probability of {label!r} does not depend on the logits")
    with torch.no_grad():
        probabilities = head.probabilities(head(features))
        extreme = head.probabilities(head(features * 1e3))
    _check_probabilities(broken, probabilities, len(target), len(labels))
    _check_probabilities(broken, extreme, len(target), len(labels))
    if not torch.equal(probabilities.argmax(1), target):
        raise broken("minimising its loss must make the true label the most probable")


def _check_copies(broken: Broken, head: Any, other: Any, features: Tensor) -> None:
    """Check that the state of a head fits another head, and that `rescale_` maps the logits as promised."""
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    with torch.no_grad():
        if not _is_close(other.probabilities(other(features)), head.probabilities(head(features))):
            raise broken("a second head with its state must give the same probabilities")
        if hasattr(other, "rescale_"):
            before, scale = other(features), torch.tensor(0.5)
            shift = torch.linspace(0.3, 0.1, before.shape[1])
            other.rescale_(scale, shift)
            if not _is_close(other(features), scale * before + shift):
                raise broken("after rescale_(scale, shift), logits must be scale x logits + shift")


def _check_dense(broken: Broken, head: Any, channels: int) -> None:
    """Check the logits of voxels, slices and regions, and what minimising the dense loss leads to."""
    region = (
        torch.arange(2 * 4 * 4 * 4).view(2, 4, 4, 4) % (head.dense(torch.rand(1, channels, 1, 2, 2)).voxels.shape[1])
    )
    count = int(region.max())
    features = 0.1 * torch.rand(2, channels, 4, 4, 4)
    features[:, : count + 1] += nn.functional.one_hot(region, count + 1).permute(0, 4, 1, 2, 3)
    target = nn.functional.one_hot(region, count + 1).permute(0, 4, 1, 2, 3)[:, 1:].float()
    with torch.no_grad():
        dense = _attempt(broken, lambda: head.dense(features))
        _check_values(broken, dense.voxels, "the logits of voxels", (2, count + 1, None, None, None))
        _check_values(broken, dense.slices, "the logits of slices", (2, dense.voxels.shape[2]))
        _check_values(broken, dense.regions, "the logits of regions", (2, count))
        if not _is_close(_attempt(broken, lambda: head.pool(dense)), head(features)):
            raise broken("pool(dense(features)) must equal the logits of the labels")
        half = target.clone()
        half[1] = torch.nan
        other = head.dense(torch.cat([features[:1], features[1:] + 1]))
        if not _is_close(head.dense_loss(other, half), head.dense_loss(dense, half)):
            raise broken("the dense_loss must not depend on unknown cells")
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        head.dense_loss(head.dense(features), target).backward()
        optimizer.step()
    with torch.no_grad():
        voxels = nn.functional.interpolate(head.dense(features).voxels, target.shape[2:])
    if not torch.equal(voxels.argmax(1), region):
        raise broken("minimising its dense_loss must make the true region the most probable")


def check_fusion(name: str, **options: Any) -> None:
    """Check the contract of a fusion.

    - The result has the shape of the features, and consists of finite float32 numbers.
    - A missing value changes nothing, whatever number stands in its place. A known value changes the result, and so
      does whether the value is known.
    - The result depends on the features, and every parameter gets a gradient.
    - The same inputs give the same result, in any batch.
    - The state of one fusion fits another, and evaluation changes neither the fusion nor its inputs.

    Args:
        name: Name of the fusion.
        **options: Options of the fusion.

    Raises:
        PluginError: The fusion breaks its contract.
        UnknownNameError: There is no such fusion.
        SpecError: The fusion refuses its options.

    Examples:
        >>> check_fusion("film")
    """
    broken = _broken(registry.fusions, name)
    channels, values = 6, 2

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        fusion = networks.build_fusion(_fused_spec(PluginRef(name, options), values), channels)
        assert fusion is not None  # noqa: S101  # the spec has a fusion
        for parameter in fusion.parameters():  # a fusion may begin as the identity
            nn.init.normal_(parameter, std=0.5)
        return fusion.plugin.eval()

    with _seeded():
        fusion, features = build(1), torch.randn(3, channels, 2, 3, 3)
        given, known = torch.randn(3, values), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        result = _attempt(broken, lambda: fusion(features, given, known))
        _check_values(broken, result, "the result", features.shape)
        _check_missing(broken, fusion, features, given, known, result)
        if not _is_close(
            torch.cat([fusion(features[i : i + 1], given[i : i + 1], known[i : i + 1]) for i in range(3)]), result
        ):
            raise broken("the result of one patient depends on the batch")
        inputs = features.clone().requires_grad_()
        fusion(inputs, given, known).square().sum().backward()
        if inputs.grad is None or not bool(inputs.grad.any()):
            raise broken("the result does not depend on the features")
        without = [key for key, each in fusion.named_parameters() if each.grad is None or not bool(each.grad.any())]
        if without:
            raise broken(f"the parameter {without[0]} gets no gradient")
        other = build(2)
        other.load_state_dict(fusion.state_dict())
        if not _is_close(other(features, given, known), result):
            raise broken("a fusion with the same state gives another result")


def _check_missing(broken: Broken, fusion: Any, features: Tensor, given: Tensor, known: Tensor, result: Tensor) -> None:
    """Check that missing values change nothing, and that known ones do."""
    if not _is_close(fusion(features, torch.where(known > 0, given, given + 7), known), result):
        raise broken("a missing value changes the result")
    changed = fusion(features, given + 1, known)
    if _is_close(changed[:1], result[:1]):
        raise broken("a known value does not change the result")
    if _is_close(
        fusion(features, torch.zeros_like(given), known)[:1], fusion(features, torch.zeros_like(given), 0 * known)[:1]
    ):
        raise broken("a known value of 0 has the same result as a missing value")


def _fused_spec(fusion: PluginRef, values: int) -> ModelSpec:
    """Return a spec with a fusion of clinical values."""
    spec = zoo.find(zoo.DEFAULT)
    clinical = tuple(ClinicalValue(f"value{number}", "", -10, 10, 0, 1) for number in range(values))
    first, *others = spec.tasks
    return replace(spec, tasks=(replace(first, uses_clinical=True), *others), clinical=clinical, fusion=fusion)


def check_saliency(name: str, **options: Any) -> None:
    """Check the contract of a saliency method on a small network whose important cells are known.

    - The map is `(D, H, W)` or coarser, of finite float32 numbers, signed, unscaled and repeatable.
    - The map highlights the lesion that raises the score, on the left and on the right.
    - After success, a bad target or a failing network, the exception is raised and nothing is left behind: no hook,
      mode, flag, gradient or random state.
    - With `requires = "features"`, the map of a compiled network is the map of the torch network.

    Args:
        name: Name of the method.
        **options: Options of the method.

    Raises:
        PluginError: The method breaks its contract.
        UnknownNameError: There is no such method.

    Examples:
        >>> check_saliency("grad_cam")
    """
    broken = _broken(registry.saliency, name)
    attribute = registry.saliency.load(name)
    network = _BrightnessNetwork().eval().requires_grad_(False)

    def explain(grid: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        with _unchanged(broken, network, grid):
            values = attribute(score, grid, network, **options)
        if not isinstance(values, Tensor) or values.ndim != 3:
            raise broken(f"a map is a tensor (D, H, W), this map is {_describe(values)}")
        _check_values(broken, values, "a map", (None, None, None))
        return values.detach()

    with _seeded():
        for side in (0, 1):
            _check_map(broken, explain, network, side)
        _check_failures(broken, lambda score, grid: attribute(score, grid, network, **options), network)
        _check_requirement(broken, attribute, network, options)


def _check_map(broken: Broken, explain: Callable[..., Tensor], network: "_BrightnessNetwork", side: int) -> None:
    """Check place, sign and scale of the map of a lesion on one side."""

    def score(sign: float) -> Callable[[Tensor], Tensor]:
        return lambda grid: sign * network(grid)["present"][:, 0]

    grid, lesion = _grid_with_lesion(side)
    values = explain(grid, score(1))
    if not torch.equal(explain(grid, score(1)), values):
        raise broken("the same call must return the same map")
    if any(cells > voxels for cells, voxels in zip(values.shape, lesion.shape, strict=True)):
        raise broken(f"a map is at most as fine as the grid {tuple(lesion.shape)}, this map has {tuple(values.shape)}")
    share = _share_on(values, lesion)
    if not share > 0.5:
        where = ("low", "high")[side]
        raise broken(f"only {share:.0%} of the positive part lies on a lesion on the {where} side, expected over half")
    if not _sum_on(explain(grid, score(-1)), lesion) < _sum_on(values, lesion):
        raise broken("a map must be signed: the map of the negative score must be lower on the lesion")
    ratio = explain(grid, score(4)).abs().amax() / values.abs().amax()
    if not ratio > 2:
        raise broken(f"a map must not be scaled: the map of 4 times the score is {ratio:.2f} times as high")


def _check_failures(
    broken: Broken,
    attribute: Callable[[Callable[[Tensor], Tensor], Tensor], Any],
    network: "_BrightnessNetwork",
) -> None:
    """Check that a method raises the exceptions of the score and leaves nothing behind."""
    grid, _ = _grid_with_lesion(0)
    for case, score, expected in (
        ("a bad target", lambda grid: network(grid)["present"][:, 7], IndexError),
        ("a failing network", lambda grid: network(grid, fails=True)["present"][:, 0], _FailureError),
    ):
        with _unchanged(broken, network, grid):
            try:
                attribute(score, grid)
            except (expected, PluginError):
                continue
            except Exception as error:
                raise broken(f"{case} must raise its own error, not {type(error).__name__}: {error}") from error
        raise broken(f"{case} must raise an error")


def _check_requirement(
    broken: Broken, attribute: Callable[..., Any], network: "_BrightnessNetwork", options: dict[str, Any]
) -> None:
    """Check that a method with `requires = "features"` works on a compiled network."""
    try:
        if saliency.requirement_of(attribute) == "network":
            return
    except InvalidValueError as error:
        raise broken(str(error)) from error
    grid, _ = _grid_with_lesion(0)

    def select(logits: dict[str, Tensor]) -> Tensor:
        return logits["present"][:, 0]

    def backward(gradient: Any) -> Any:
        def weighted(grids: Tensor) -> Tensor:
            total: Tensor = (network.backbone(grids) * torch.from_numpy(gradient)).sum()[None]
            return total

        return saliency.guided_backprop(weighted, grid, network)[None, None].numpy()

    expected = attribute(lambda grids: select(network(grids)), grid, network, **options)
    with torch.no_grad():
        features = network.backbone(grid).numpy()
    names = [network.cam_layer, network.cam_layer.removeprefix("backbone.")]
    shared = saliency.CompiledPass({"present": network.head}, grid.detach()[0, 0].numpy(), features, backward, names)
    values = attribute(saliency.Score(shared, select), shared.grid, shared.network, **options)
    if not _is_close(values, expected):
        raise broken("with requires = 'features', a compiled network must give the same map")


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

    Examples:
        >>> check_brain_extractor("morphology")
    """
    broken = _broken(registry.brain_extractors, name)
    extract = registry.brain_extractors.load(name)
    if not callable(extract):
        raise broken("an extractor must be a function")
    for spacing in ((2.0, 2.0, 5.0), (2.5, 2.0, 2.0)):
        hu, brain = _simulated_head(spacing)
        values = hu.copy()
        mask = _attempt(broken, lambda values=values, spacing=spacing: extract(values, spacing))  # type: ignore[misc]
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != hu.shape:
            actual = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise broken(f"a mask must be a bool array {hu.shape}, got {actual}")
        if not np.array_equal(values, hu):
            raise broken("the HU must not be changed")
        if not np.array_equal(extract(values, spacing), mask):
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


class _FailureError(Exception):
    """The error of a network that fails on purpose."""


class _BrightnessNetwork(nn.Module):
    """A network whose only score, `present`, grows with the bright cells of a grid."""

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

    def forward(self, grid: Tensor, *, fails: bool = False) -> dict[str, Tensor]:
        """Return the score as logits `(B, 1)` of a task, or raise an error after the backbone."""
        features = self.backbone(grid)
        if fails:
            raise _FailureError
        return {"present": self.head(features)}


def _grid_with_lesion(side: int) -> tuple[Tensor, Tensor]:
    """Return a dim grid with a bright ball at one end of its last axis, and the mask of the ball."""
    shape = (12, 24, 24)
    centre = (6, 12, 6 if side == 0 else 17)
    axes = torch.meshgrid(*(torch.arange(n) - at for n, at in zip(shape, centre, strict=True)), indexing="ij")
    lesion = sum(axis**2 for axis in axes) <= 16
    return (0.2 * torch.rand(shape) + 0.7 * lesion)[None, None].requires_grad_(), torch.as_tensor(lesion)


def _sum_on(values: Tensor, lesion: Tensor) -> float:
    """Return the sum of a map over a lesion and a margin of two voxels."""
    full = nn.functional.interpolate(values[None, None], lesion.shape)[0, 0]
    margin = nn.functional.max_pool3d(lesion[None, None].float(), 5, 1, 2)[0, 0] > 0
    return float(full[margin].sum())


def _share_on(values: Tensor, lesion: Tensor) -> float:
    """Return the share of the positive part of a map that lies on a lesion."""
    positive = values.clamp(min=0)
    return _sum_on(positive, lesion) / max(_sum_on(positive, torch.ones_like(lesion)), 1e-30)


def _broken(plugins: Registry, name: str) -> Broken:
    """Return the function that builds the error of a broken rule."""
    owner = plugins.entry(name).owner

    def build(rule: str) -> PluginError:
        return PluginError(f"{plugins.kind} {name!r} of {owner} breaks its contract: {rule}.")

    return build


def _spec(backbone: PluginRef, shape: Shape) -> ModelSpec:
    """Return the spec of a model with a backbone, for grids of a shape, without weights."""
    default = zoo.find(zoo.DEFAULT)
    weights = replace(default.weights, repo=None, revision=None, folder="", format="safetensors", keys={}, sha256={})
    return replace(
        default, backbone=backbone, input=replace(default.input, shape=shape), weights=weights, golden_output=None
    )


def _attempt(broken: Broken, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # a plugin may fail in any way
        raise broken(f"{type(error).__name__}: {error}") from error


def _describe(values: Any) -> str:
    return f"a tensor {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"


def _check_values(broken: Broken, values: Any, what: str, shape: Sequence[int | None]) -> None:
    expected = f"({', '.join('any' if n is None else str(n) for n in shape)})"
    if not isinstance(values, Tensor):
        raise broken(f"{what} must be a tensor {expected}, is a {type(values).__name__}")
    if values.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, values.shape, strict=True)):
        raise broken(f"{what} must be {expected}, is {tuple(values.shape)}")
    if values.dtype != torch.float32:
        raise broken(f"{what} must be float32, is {str(values.dtype).removeprefix('torch.')}")
    if not bool(values.isfinite().all()):
        raise broken(f"{what} must be finite")


def _check_probabilities(broken: Broken, values: Tensor, rows: int, labels: int) -> None:
    _check_values(broken, values, "probabilities", (rows, labels))
    if bool((values < 0).any()) or not _is_close(values.sum(1), torch.ones(rows)):
        raise broken("probabilities must not be negative and must sum to one")


def _check_another_shape(broken: Broken, backbone: Any, shape: Shape) -> None:
    """Check that a larger batch of larger, non-square grids works or raises a PluginError."""
    depth, height, width = shape
    larger = torch.rand(3, 1, depth + depth // 4, height, width + width // 4)
    try:
        with torch.no_grad():
            features, alone = backbone(larger), backbone(larger[2:])
    except PluginError:  # the message names the allowed shapes
        return
    except Exception as error:  # a plugin may fail in any way
        rule = f"grids {tuple(larger.shape)} after {shape} must work, or raise a PluginError that gives the reason"
        raise broken(f"{rule}; {type(error).__name__}: {error}") from error
    _check_values(broken, features, f"features of grids {tuple(larger.shape)}", (3, backbone.out_channels, *[None] * 3))
    if not _is_close(alone, features[2:]):
        raise broken("the features of a grid must not depend on the other grids in a batch")


def _check_gradients(broken: Broken, backbone: nn.Module, grids: Tensor) -> None:
    """Check that gradients reach the grid and every parameter."""
    learner, grids = copy.deepcopy(backbone).train(), grids.clone().requires_grad_()
    if (frozen := [values.requires_grad for values in learner.parameters()]) and not any(frozen):
        raise broken("all its parameters are frozen (requires_grad is False), so training cannot change it")
    learner(grids).square().mean().backward()
    if grids.grad is None or not bool(grids.grad.isfinite().all()) or not grids.grad.abs().amax() > 0:
        raise broken("features must depend on the grid, with a finite gradient")
    if unused := [name for name, values in learner.named_parameters() if values.requires_grad and values.grad is None]:
        raise broken(f"parameters without a gradient: {', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}")


def _check_compiled(broken: Broken, spec: ModelSpec, network: nn.Module, grid: Tensor) -> None:
    """Check that OpenVINO and torch give the same probabilities."""
    from safetensors.torch import save_file

    from ichprog.hub import WeightFile
    from ichprog.runtime import resolve_runtime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({key: values.contiguous() for key, values in network.state_dict().items()}, path)
        file = WeightFile(0, path, "0" * 64, str(path), "0" * 64)
        outputs = []
        for runtime in ("openvino", "torch"):
            try:
                (fold,), _ = build_runtimes(
                    spec, [file], resolve_runtime(runtime, "cpu", "float32"), Path(folder) / runtime
                )
                outputs.append(fold.run(grid[:, 0].numpy()))
            except PluginError as error:
                raise broken(f"OpenVINO must run it: {error}") from error
    for task, compiled in outputs[0].items():
        if not _is_close(torch.from_numpy(compiled.probabilities), torch.from_numpy(outputs[1][task].probabilities)):
            raise broken("OpenVINO must give the same probabilities as torch")


def _is_close(values: Any, expected: Tensor) -> bool:
    """Return whether tensors are equal up to rounding."""
    return values.shape == expected.shape and torch.allclose(values, expected, rtol=1e-3, atol=1e-5)


@contextmanager
def _seeded() -> Iterator[None]:
    """Use a fixed random seed in the block and restore the random state of the caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _unchanged(broken: Broken, module: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Check that the block changes neither a network, nor its input, nor the state of torch, also if it raises."""
    before = _state_of(module, inputs)
    try:
        yield
    finally:
        after = _state_of(module, inputs)
        for what, value in before.items():
            same = torch.equal(value, after[what]) if isinstance(value, Tensor) else value == after[what]
            if not same:
                raise broken(f"it must not change {what}")


def _state_of(module: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Return everything that a plugin could change by mistake."""
    hooks = {
        f"{name}{kind}": list(hooks)
        for name, part in module.named_modules()
        for kind, hooks in vars(part).items()
        if kind.endswith("hooks") and hooks
    }
    return {
        "the hooks of the network": hooks,
        "the modules of the network": [(name, id(part)) for name, part in module.named_modules()],
        "the attributes of the network": [(sorted(vars(part)), vars(part).get("inplace")) for part in module.modules()],
        "the modes of the network": [part.training for part in module.modules()],
        "requires_grad of the network": [part.requires_grad for part in module.parameters()],
        "the gradients of the network": [part.grad is not None for part in module.parameters()],
        "the weights and buffers of the network": nn.utils.parameters_to_vector(module.state_dict().values()).clone(),
        "the input": inputs.detach().clone(),
        "requires_grad of the input": inputs.requires_grad,
        "the gradient of the input": inputs.grad is not None,
        "the hooks of the input": len(inputs._backward_hooks or ()),
        "the random state of torch": torch.get_rng_state(),
        "the gradient mode of torch": torch.is_grad_enabled(),
        "the deterministic mode of torch": torch.are_deterministic_algorithms_enabled(),
        "the precision of torch": (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
    }
