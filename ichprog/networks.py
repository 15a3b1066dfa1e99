"""Build the torch module of a spec and load weights into it, strictly."""

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ichprog import registry
from ichprog.errors import IchprogError, PluginError, SpecError, WeightsError
from ichprog.heads import DenseLogits
from ichprog.limits import MAX_WEIGHT_BYTES
from ichprog.registry import Registry
from ichprog.spec import ModelSpec, PluginRef


class Network(nn.Module):
    """One backbone and one head for each task; all heads read the features of the same image.

    Args:
        backbone: Module from a grid `(B, 1, D, H, W)` to features `(B, C, d, h, w)`.
        heads: Head of each task by name.
        dense_tasks: Names of the tasks that are also answered voxel by voxel.
        fusion: Module that combines the features with clinical values, or None.
        fused_tasks: Names of the tasks whose heads read the features after the fusion.

    Attributes:
        backbone: The backbone.
        heads: Head of each task by name.
        dense_tasks: Names of the tasks that are also answered voxel by voxel.
        fusion: The fusion, or None.
        fused_tasks: Names of the tasks that use clinical values.
        fixed_clinical: Clinical values `(1, 2 V)` of every grid that comes without values; None if none are known.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: dict[str, nn.Module],
        dense_tasks: Sequence[str] = (),
        fusion: "Fusion | None" = None,
        fused_tasks: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.dense_tasks = tuple(dense_tasks)
        self.fusion, self.fused_tasks = fusion, tuple(fused_tasks)
        self.fixed_clinical: Tensor | None = None

    @property
    def cam_layer(self) -> str:
        """Return the name of the submodule for class activation maps, relative to the network."""
        return f"backbone.{self.backbone.cam_layer}"

    def forward(self, grid: Tensor, clinical: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits `(B, K)` of each task.

        Args:
            grid: `(B, 1, D, H, W)`.
            clinical: `(B, 2 V)` values and whether each is known, from `clinical.encode`; by default `fixed_clinical`.
        """
        features = self._features_of_tasks(grid, clinical)
        return {task: head(features[task]) for task, head in self.heads.items()}

    def forward_dense(
        self, grid: Tensor, clinical: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, DenseLogits]]:
        """Return what `forward` returns, and the logits of voxels, slices and regions of each dense task."""
        features = self._features_of_tasks(grid, clinical)
        dense = {task: self.heads[task].dense(features[task]) for task in self.dense_tasks}  # type: ignore[operator]
        logits = {
            task: head.pool(dense[task]) if task in dense else head(features[task])  # type: ignore[operator]
            for task, head in self.heads.items()
        }
        return logits, dense

    def _features_of_tasks(self, grid: Tensor, clinical: Tensor | None) -> dict[str, Tensor]:
        """Return the features that the head of each task reads."""
        features = self.backbone(grid)
        by_task = dict.fromkeys(self.heads, features)
        if self.fusion is not None:
            fused = self.fusion(features, self.fixed_clinical if clinical is None else clinical)
            by_task |= dict.fromkeys(self.fused_tasks, fused)
        return by_task

    def outputs(self, grid: Tensor, clinical: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Return the logits `(B, K)` and the label probabilities `(B, labels)` of each task.

        A dense task has three more entries: the probabilities `(B, R + 1, d, h, w)` of the voxels, the probability
        `(B, d)` that a slice holds a region, and the probability `(B, R)` that the scan holds each region.
        """
        logits, dense = self.forward_dense(grid, clinical)
        logits = {task: values.float() for task, values in logits.items()}
        result: dict[str, tuple[Tensor, ...]] = {
            task: (logits[task], values) for task, values in self.probabilities(logits).items()
        }
        for task, (voxels, slices, regions) in dense.items():
            result[task] += (voxels.float().softmax(1), slices.float().sigmoid(), regions.float().sigmoid())
        return result

    def probabilities(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the label probabilities `(B, labels)` of each task for its logits `(B, K)`."""
        return {task: head.probabilities(logits[task]) for task, head in self.heads.items()}  # type: ignore[operator]


class Fusion(nn.Module):
    """Combine features with clinical values by a fusion plugin.

    Args:
        plugin: Module of the plugin, as `ichprog.fusions` describes it.
        values: Number V of clinical values.

    Attributes:
        plugin: Module of the plugin.
        values: Number of clinical values.
    """

    def __init__(self, plugin: nn.Module, values: int) -> None:
        super().__init__()
        self.plugin, self.values = plugin, values

    def forward(self, features: Tensor, clinical: Tensor | None) -> Tensor:
        """Return features `(B, C, d, h, w)`.

        Args:
            features: `(B, C, d, h, w)` of the image.
            clinical: `(B, 2 V)`, or `(1, 2 V)` for all images; None if no value is known.
        """
        if clinical is None:
            clinical = features.new_zeros(1, 2 * self.values)
        values, known = clinical.to(features.dtype).expand(features.shape[0], -1).chunk(2, dim=1)
        fused: Tensor = self.plugin(features, values, known)
        return fused


class FusedHead(nn.Module):
    """Read the features of an image with fixed clinical values, for explanations from features.

    Args:
        head: Head of the task.
        fusion: The fusion of the model.
        clinical: `(1, 2 V)`, or None if no value is known.
    """

    def __init__(self, head: nn.Module, fusion: Fusion, clinical: Tensor | None) -> None:
        super().__init__()
        self.head, self.fusion, self.clinical = head, fusion, clinical

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits `(B, K)` of the task."""
        logits: Tensor = self.head(self.fusion(features, self.clinical))
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the label probabilities `(B, labels)` for the logits `(B, K)`."""
        values: Tensor = self.head.probabilities(logits)  # type: ignore[operator]
        return values


def build(spec: ModelSpec) -> Network:
    """Build the network of a spec with its initial weights.

    Args:
        spec: The model.

    Raises:
        UnknownNameError: No installed backbone or head has the name in the spec.
        SpecError: A plugin refuses its options.
        PluginError: A plugin cannot be loaded or breaks its contract.

    Examples:
        >>> from ichprog import zoo
        >>> list(build(zoo.find("compact.prognosis_gcs3_age")).heads)
        ['prognosis', 'gcs', 'age']
    """
    backbone = _build_plugin(registry.backbones, spec.backbone)
    channels, layer = getattr(backbone, "out_channels", None), getattr(backbone, "cam_layer", None)
    if not isinstance(channels, int) or not isinstance(layer, str):
        problem = "needs the attributes out_channels (int) and cam_layer (str)"
        raise _contract_error(registry.backbones, spec.backbone, problem)
    if layer not in dict(backbone.named_modules()):
        raise _contract_error(registry.backbones, spec.backbone, f"its cam_layer {layer!r} names none of its modules")
    dense = [task.name for task in spec.tasks if task.mask]
    fused = [task.name for task in spec.tasks if task.uses_clinical]
    return Network(backbone, _build_heads(spec, channels), dense, build_fusion(spec, channels), fused)


def feature_shape(spec: ModelSpec) -> tuple[int, ...]:
    """Return the shape `(C, d, h, w)` of the features of a model's grid, without computing them.

    Args:
        spec: The model.

    Raises:
        SpecError: The backbone cannot read grids of this shape.

    Examples:
        >>> from ichprog import zoo
        >>> feature_shape(zoo.find("compact.prognosis_gcs3_age"))
        (64, 6, 14, 14)
    """
    with torch.random.fork_rng(devices=[]):
        backbone = build(spec).backbone.eval()
    shape, shapes_only = spec.input.shape, deepcopy(backbone).to("meta")
    if features := _feature_shape(shapes_only, shape):
        return features
    try:  # a backbone may read values, which tensors without values do not have
        return tuple(backbone(torch.zeros(1, 1, *shape)).shape[1:])
    except RuntimeError as error:
        larger = [tuple(max(size, least) for size in shape) for least in (8, 16, 24, 32, 40, 48, 64, 96, 128)]
        readable = next((each for each in larger if _feature_shape(shapes_only, each)), None)
        advice = f"It can read {readable}." if readable else "Use a larger grid."
        raise SpecError(f"backbone {spec.backbone.name!r} cannot read a grid of {shape}: {error}. {advice}") from error


@torch.inference_mode()
def _feature_shape(backbone: nn.Module, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of features that a backbone on the device "meta" gives, or None if it fails."""
    try:
        return tuple(backbone(torch.empty(1, 1, *shape, device="meta")).shape[1:])
    except RuntimeError:
        return None


def build_fusion(spec: ModelSpec, channels: int) -> Fusion | None:
    """Build the fusion of a spec with its initial weights, or return None if the spec has none.

    Args:
        spec: The model.
        channels: C of the features `(B, C, d, h, w)`.

    Raises:
        UnknownNameError: No installed fusion has this name.
        SpecError: The fusion refuses its options.
        PluginError: The fusion cannot be loaded or breaks its contract.
    """
    if spec.fusion is None:
        return None
    return Fusion(_build_plugin(registry.fusions, spec.fusion, channels, len(spec.clinical)), len(spec.clinical))


def build_head(
    plugin: PluginRef, channels: int, labels: Sequence[str], regions: Sequence[str] | None = None
) -> nn.Module:
    """Build a head with its initial weights.

    Args:
        plugin: Name and options of the head.
        channels: C of the features `(B, C, d, h, w)`.
        labels: Labels of the task.
        regions: Names of the regions of a task that is also answered voxel by voxel.

    Raises:
        UnknownNameError: No installed head has this name.
        SpecError: The head refuses its options, or the task has regions and the head is not dense.
        PluginError: The head cannot be loaded or breaks its contract.

    Examples:
        >>> build_head(PluginRef("ordinal", {}), 8, ["good", "poor"])(torch.zeros(1, 8, 1, 3, 3)).shape
        torch.Size([1, 1])
    """
    given = {} if regions is None else {"regions": regions}
    if given and "regions" not in inspect.signature(registry.heads.load(plugin.name)).parameters:
        raise SpecError(
            f"head {plugin.name!r} does not answer voxel by voxel. Use a dense head such as 'segmentation', or set "
            "`mask` of the task to null."
        )
    head = _build_plugin(registry.heads, plugin, channels, labels, **given)
    dense = () if regions is None else ("dense", "pool", "dense_loss")
    for method in ("probabilities", "loss", *dense):
        if not callable(getattr(head, method, None)):
            raise _contract_error(registry.heads, plugin, f"needs a method {method}")
    return head


def _build_heads(spec: ModelSpec, channels: int) -> dict[str, nn.Module]:
    return {
        task.name: build_head(task.head, channels, task.labels, task.mask.regions if task.mask else None)
        for task in spec.tasks
    }


def load(spec: ModelSpec, path: Path) -> Network:
    """Build the network of a spec and load its weights, in evaluation mode and without gradients.

    Args:
        spec: The model.
        path: Safetensors file with exactly the keys of the network.

    Raises:
        WeightsError: The file cannot be read, or a key is missing, unknown or of another shape.
    """
    network = build(spec)
    _load_state(network, _read_state(path), path, spec)
    return network.eval().requires_grad_(False)


def channels_last(module: nn.Module) -> None:
    """Convert the weights of 3D convolutions to the channels-last memory format, which is faster.

    Args:
        module: Module with the convolutions. Its other parameters stay unchanged.
    """
    for values in module.parameters():
        if values.ndim == 5:
            values.data = values.data.contiguous(memory_format=torch.channels_last_3d)


def load_heads(spec: ModelSpec, path: Path, channels: int, clinical: Tensor | None = None) -> dict[str, nn.Module]:
    """Build only the heads of a spec and load their weights, in evaluation mode and without gradients.

    Args:
        spec: The model.
        path: Safetensors file with the keys of the network.
        channels: C of the features `(B, C, d, h, w)`.
        clinical: Clinical values `(1, 2 V)` that the heads of a fused model read with the features.

    Returns:
        The head of each task by name.

    Raises:
        WeightsError: The file cannot be read, or a key of the heads is missing, unknown or of another shape.
    """
    fusion = build_fusion(spec, channels)
    parts = nn.ModuleDict({"heads": nn.ModuleDict(_build_heads(spec, channels))})
    if fusion is not None:
        parts["fusion"] = fusion
    state = {key: values for key, values in _read_state(path).items() if key.startswith(("heads.", "fusion."))}
    _load_state(parts, state, path, spec)
    parts.eval().requires_grad_(False)
    heads: dict[str, nn.Module] = dict(parts["heads"].items())  # type: ignore[operator]
    if fusion is not None:
        heads |= {task.name: FusedHead(heads[task.name], fusion, clinical) for task in spec.tasks if task.uses_clinical}
    return heads


def load_backbone(network: Network, spec: ModelSpec, path: Path) -> None:
    """Load the weights of a backbone into a network. The heads keep their weights.

    Args:
        network: The network.
        spec: The model of the network.
        path: Safetensors file with the keys of a network with this backbone.

    Raises:
        WeightsError: The file cannot be read, or a key of the backbone is missing, unknown or of another shape.
    """
    state = {key.removeprefix("backbone."): v for key, v in _read_state(path).items() if key.startswith("backbone.")}
    _load_state(network.backbone, state, path, spec)


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if (size := path.stat().st_size) > MAX_WEIGHT_BYTES:
            raise WeightsError(f"{path}: refused, because it has {size} bytes. At most {MAX_WEIGHT_BYTES} are read.")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors: {error}") from error


def _load_state(module: nn.Module, state: dict[str, Tensor], path: Path, spec: ModelSpec) -> None:
    """Load a state dict into a module with equal keys and shapes."""
    own = module.state_dict()
    problems = [f"{key} is missing" for key in own.keys() - state.keys()]
    problems += [f"{key} is not part of the network" for key in state.keys() - own.keys()]
    problems += [
        f"{key} is of type {str(state[key].dtype).removeprefix('torch.')}"
        for key in own.keys() & state.keys()
        if own[key].is_floating_point() != state[key].is_floating_point()
    ]
    problems += [
        f"{key} holds numbers that are not finite"
        for key in own.keys() & state.keys()
        if state[key].is_floating_point() and not bool(torch.isfinite(state[key]).all())
    ]
    problems += [
        f"{key} has shape {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + ("; ..." if len(problems) > 5 else "")
        raise WeightsError(
            f"{path}: {len(problems)} of {len(own)} keys do not fit {spec.name}: {shown}. "
            "The weights are damaged, or belong to another network than the one in the spec."
        )
    module.load_state_dict(state)


def _build_plugin(plugins: Registry, plugin: PluginRef, *args: Any, **given: Any) -> nn.Module:
    """Build the module of a plugin with the options in the spec."""
    factory: Callable[..., Any] = plugins.load(plugin.name)
    label = f"{plugins.kind} {plugin.name!r}"
    try:
        module = factory(*args, **given, **plugin.options)
    except (TypeError, ValueError) as error:  # InvalidValueError is a ValueError
        raise SpecError(f"{label} refuses its options {dict(plugin.options)}: {error}") from error
    except IchprogError:
        raise
    except Exception as error:  # a plugin may fail in any way
        raise PluginError(f"{label} cannot be built: {type(error).__name__}: {error}") from error
    if isinstance(module, nn.Module):
        return module
    raise _contract_error(plugins, plugin, f"must build a torch.nn.Module, built a {type(module).__name__}")


def _contract_error(plugins: Registry, plugin: PluginRef, problem: str) -> PluginError:
    owner = plugins.entry(plugin.name).owner
    return PluginError(f"{plugins.kind} {plugin.name!r} of {owner} breaks its contract: {problem}.")
