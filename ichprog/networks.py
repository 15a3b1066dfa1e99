"""A spec becomes a torch module, and a file of weights fills it, strictly."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ichprog import registry
from ichprog.errors import IchprogError, PluginError, SpecError, WeightsError
from ichprog.registry import Registry
from ichprog.spec import ModelSpec, PluginRef


class Network(nn.Module):
    """One backbone and a head for each task; all heads read the same features.

    Attributes:
        backbone: Grid `(B, 1, D, H, W)` to features `(B, C, d, h, w)`.
        heads: Task name to head.
    """

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    @property
    def cam_layer(self) -> str:
        """Name of the submodule class activation maps are taken at, from the network down."""
        return f"backbone.{self.backbone.cam_layer}"

    def forward(self, grid: Tensor) -> dict[str, Tensor]:
        """Each task's logits `(B, K)` of a grid `(B, 1, D, H, W)`."""
        features = self.backbone(grid)
        return {task: head(features) for task, head in self.heads.items()}

    def probabilities(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each task's label probabilities `(B, labels)` of its logits `(B, K)`."""
        return {task: head.probabilities(logits[task]) for task, head in self.heads.items()}  # type: ignore[operator]


def build(spec: ModelSpec) -> Network:
    """The network of a spec, with the weights its plugins start from.

    Raises:
        UnknownNameError: A backbone or head of that name is not installed.
        SpecError: A plugin refuses its options.
        PluginError: A plugin cannot be loaded or breaks its contract.
    """
    backbone = _built(registry.backbones, spec.backbone)
    channels, layer = getattr(backbone, "out_channels", None), getattr(backbone, "cam_layer", None)
    if not isinstance(channels, int) or not isinstance(layer, str):
        raise _broken(registry.backbones, spec.backbone, "needs the attributes out_channels (int) and cam_layer (str)")
    if layer not in dict(backbone.named_modules()):
        raise _broken(registry.backbones, spec.backbone, f"its cam_layer {layer!r} names none of its modules")
    heads: dict[str, nn.Module] = {}
    for task in spec.tasks:
        heads[task.name] = build_head(task.head, channels, task.labels)
    return Network(backbone, heads)


def build_head(part: PluginRef, channels: int, labels: Sequence[str]) -> nn.Module:
    """A head, with the weights it starts from.

    Args:
        part: Its name and options.
        channels: C of the features `(B, C, d, h, w)` that it reads.
        labels: The task's labels.

    Raises:
        UnknownNameError: A head of that name is not installed.
        SpecError: It refuses its options.
        PluginError: It cannot be loaded or breaks its contract.
    """
    head = _built(registry.heads, part, channels, labels)
    for method in ("probabilities", "loss"):
        if not callable(getattr(head, method, None)):
            raise _broken(registry.heads, part, f"needs a method {method}")
    return head


def load(spec: ModelSpec, path: Path) -> Network:
    """The network of a spec filled with weights, ready to answer: in evaluation mode, its parameters fixed.

    Args:
        spec: The model.
        path: A safetensors file with exactly the network's keys.

    Raises:
        WeightsError: The file cannot be read, or a key is missing, unknown or of another shape.
    """
    network = build(spec)
    _fill(network, _state(path), path, spec)
    return network.eval().requires_grad_(False)


def channels_last(module: nn.Module) -> None:
    """Lays out the weights of a module's 3D convolutions as these run fastest; others, of 2D ones say, stay.

    Args:
        module: A network or what holds one.
    """
    for values in module.parameters():
        if values.ndim == 5:
            values.data = values.data.contiguous(memory_format=torch.channels_last_3d)


def load_heads(spec: ModelSpec, path: Path, channels: int) -> dict[str, nn.Module]:
    """Each task's head alone, filled with weights and ready to answer.

    Args:
        spec: The model.
        path: A safetensors file with the network's keys.
        channels: C of the features `(B, C, d, h, w)` that the heads read.

    Raises:
        WeightsError: The file cannot be read, or a key of the heads is missing, unknown or of another shape.
    """
    heads = nn.ModuleDict({task.name: build_head(task.head, channels, task.labels) for task in spec.tasks})
    own = {key.removeprefix("heads."): v for key, v in _state(path).items() if key.startswith("heads.")}
    _fill(heads, own, path, spec)
    return dict(heads.eval().requires_grad_(False).items())


def _state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors: {error}") from error


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path, spec: ModelSpec) -> None:
    """Puts a state into a module, whose keys and shapes must be the same."""
    own = module.state_dict()
    problems = [f"{key} is missing" for key in own.keys() - state.keys()]
    problems += [f"{key} is not part of the network" for key in state.keys() - own.keys()]
    problems += [
        f"{key} has shape {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + ("; ..." if len(problems) > 5 else "")
        raise WeightsError(
            f"{path}: {len(problems)} of {len(own)} keys do not fit {spec.name}: {shown}. "
            "The weights belong to another network than the spec describes."
        )
    module.load_state_dict(state)


def _built(plugins: Registry, part: PluginRef, *args: Any) -> nn.Module:
    """A plugin's module, built with the options of the spec."""
    factory: Callable[..., Any] = plugins.load(part.name)
    try:
        module = factory(*args, **part.options)
    except IchprogError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"{plugins.kind} {part.name!r} refuses its options {dict(part.options)}: {error}") from error
    except Exception as error:  # a plugin may fail in any way
        raise PluginError(f"{plugins.kind} {part.name!r} cannot be built: {type(error).__name__}: {error}") from error
    if isinstance(module, nn.Module):
        return module
    raise _broken(plugins, part, f"must build a torch.nn.Module, built a {type(module).__name__}")


def _broken(plugins: Registry, part: PluginRef, how: str) -> PluginError:
    owner = plugins.entry(part.name).owner
    return PluginError(f"{plugins.kind} {part.name!r} of {owner} breaks its contract: {how}.")
