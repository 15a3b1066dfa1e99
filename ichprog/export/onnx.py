"""Convert the folds of a model to one ONNX network."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ichprog import networks
from ichprog.errors import PluginError
from ichprog.hub import WeightFile
from ichprog.networks import FusedHead, Network
from ichprog.runtime.openvino.backend import silenced
from ichprog.spec import ModelSpec


def save(spec: ModelSpec, files: Sequence[WeightFile], folder: Path) -> Path:
    """Write a model as `model.onnx`.

    Args:
        spec: The model.
        files: Weights of its folds.
        folder: Existing folder for the file.

    Returns:
        Path of the file.

    Raises:
        PluginError: A plugin uses an operation that ONNX lacks, or supports only one batch size.
    """
    program = _convert_model(spec, files)
    program.model.metadata_props.update(
        {"ichprog.model": spec.name, "ichprog.notice": spec.notice}
        | {f"ichprog.fold{file.fold}.sha256": file.source_sha256 for file in files}
    )
    path = folder / "model.onnx"
    program.save(path)
    return path


class _FoldEnsemble(nn.Module):
    """Average the probabilities of all folds."""

    def __init__(self, spec: ModelSpec, files: Sequence[WeightFile]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(networks.load(spec, file.path) for file in files)

    def forward(self, grid: Tensor, clinical: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the probabilities of each task, in the order of `_output_names`."""
        outputs = [fold.outputs(grid, clinical) for fold in cast("Iterable[Network]", self.folds)]
        return tuple(
            torch.stack(values).mean(0)
            for task in outputs[0]
            for values in zip(*(output[task][1:] for output in outputs), strict=True)  # the first entry is the logits
        )


def _output_names(spec: ModelSpec) -> list[str]:
    """Return the name of each output: that of the task, with a suffix for the further outputs of a dense task."""
    suffixes = ("", "_voxels", "_slices", "_regions")
    return [task.name + suffix for task in spec.tasks for suffix in suffixes[: None if task.mask else 1]]


class _HeadProbabilities(nn.Module):
    """Turn features into label probabilities with one head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head.probabilities(self.head(features))  # type: ignore[operator, no-any-return]


def _convert_model(spec: ModelSpec, files: Sequence[WeightFile]) -> Any:
    """Return the folds of a model as an ONNX program; an error names the plugin that cannot be converted."""
    ensemble, grids = _FoldEnsemble(spec, files).eval(), torch.zeros(2, 1, *spec.input.shape)
    inputs = {"grid": grids} | ({"clinical": torch.zeros(2, 2 * len(spec.clinical))} if spec.fusion else {})
    try:
        return _convert_module(ensemble, inputs, _output_names(spec))
    except Exception as error:  # a plugin may fail in any way
        plugin = _find_unsupported_plugin(spec, cast("Network", ensemble.folds[0]), grids)
        detail = " ".join(str(error.__cause__ or error).split())[:300]
        raise PluginError(
            f"{plugin} cannot be exported ({type(error).__name__}: {detail}). Use only operations of torch that ONNX "
            "has, for any batch size."
        ) from error


def _find_unsupported_plugin(spec: ModelSpec, fold: Network, grids: Tensor) -> str:
    """Return the first plugin of a model that cannot be converted alone."""
    with torch.no_grad():
        features = fold.backbone(grids)
    parts: list[tuple[str, nn.Module, Tensor]] = [(f"backbone {spec.backbone.name!r}", fold.backbone, grids)]
    parts += [
        (f"head {task.head.name!r} of {task.name!r}", _HeadProbabilities(fold.heads[task.name]), features)
        for task in spec.tasks
    ]
    if fold.fusion is not None and spec.fusion is not None:
        parts.append((f"fusion {spec.fusion.name!r}", FusedHead(nn.Identity(), fold.fusion, None), features))
    for name, module, example in parts:
        try:
            _convert_module(module, {"grid": example}, ["output"])
        except Exception:
            return name
    return spec.name


def _convert_module(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Any:
    """Return a module as an ONNX program for batches of any size, without stack traces in its metadata."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    with silenced():
        # The module is traced separately: the ONNX exporter would fix the batch size instead of reporting an error.
        traced = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes)
        program = torch.onnx.export(
            traced, dynamo=True, input_names=list(inputs), output_names=outputs, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None  # noqa: S101  # it is None only if a file name is given
    model: Any = program.model
    graph = model.graph
    for part in (model, graph, *graph.all_nodes(), *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()  # stack traces contain paths of this machine
    return program
