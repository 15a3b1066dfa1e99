"""A model as one file that other runtimes read."""

import importlib.util
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ichprog import hub, networks
from ichprog.errors import PluginError, UnknownNameError, missing_extra
from ichprog.export.model_card import config
from ichprog.hub import WeightFile
from ichprog.model import Model
from ichprog.networks import Network
from ichprog.runtime.openvino.backend import openvino, silenced
from ichprog.spec import ModelSpec

FORMATS = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript")}  # and what they need


def export(model: Model | str, out: str | Path, *, format: str = "onnx") -> Path:  # noqa: A002  # what it is
    """Writes a model as one network: grid `(B, 1, D, H, W)` to each task's label probabilities, the mean over folds.

    The input is called "grid" and each output as its task. Beside the file lies `config.json`, which says how a scan
    becomes a grid and in what order the labels come. Files appear when all are written.

    Args:
        model: A model, or a name that `load_model` takes.
        out: The folder for the files.
        format: "onnx", or "openvino" for OpenVINO's own files.

    Returns:
        The file: `model.onnx`, or `model.xml` with `model.bin` beside it.

    Raises:
        UnknownNameError: There is no such format or model.
        WeightsError: The weights cannot be had or do not fit.
        PluginError: A plugin of the model does what ONNX cannot say, or holds for one batch size only.
        IchprogError: A library that the format needs is not installed.
    """
    refuse_unless_possible(format)
    spec, files = hub.fetch(model) if isinstance(model, str) else (model.spec, model.weights)
    program = _program(spec, files)
    program.model.metadata_props.update(
        {"ichprog.model": spec.name, "ichprog.notice": spec.notice}
        | {f"ichprog.fold{file.fold}.sha256": file.source_sha256 for file in files}
    )
    folder = Path(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        made = Path(scratch, "onnx", "model.onnx")
        made.parent.mkdir()
        program.save(made)
        if format == "openvino":
            read, made = made, Path(scratch, "openvino", "model.xml")
            openvino().save_model(openvino().Core().read_model(read), made, compress_to_fp16=False)
        Path(made.parent, "config.json").write_text(config(spec), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in sorted(made.parent.iterdir(), key=lambda file: file.name == made.name):  # the model comes last
            file.replace(folder / file.name)
    return folder / made.name


def refuse_unless_possible(form: str) -> None:
    """Says no to a format that there is not, or that cannot be written here.

    Raises:
        UnknownNameError: There is no such format.
        IchprogError: A library that it needs is not installed.
    """
    if form not in FORMATS:
        raise UnknownNameError("format to export to", form, FORMATS)
    if missing := [name for name in FORMATS[form] if not _installed(name)]:
        raise missing_extra("export", " and ".join(missing), f"Exporting to {form}")


class _Folds(nn.Module):
    """All folds as one network."""

    def __init__(self, spec: ModelSpec, files: Sequence[WeightFile]) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks.load(spec, file.path) for file in files)

    def forward(self, grid: Tensor) -> tuple[Tensor, ...]:
        """Each task's label probabilities `(B, labels)`, in the order of the tasks."""
        answers = [member.probabilities(member(grid)) for member in cast("Iterable[Network]", self.members)]
        return tuple(torch.stack([answer[task] for answer in answers]).mean(0) for task in answers[0])


class _Head(nn.Module):
    """A head alone, from features to label probabilities."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head.probabilities(self.head(features))  # type: ignore[operator, no-any-return]


def _program(spec: ModelSpec, files: Sequence[WeightFile]) -> Any:
    """A model's folds as ONNX; where they do not become that, it says whose fault it is."""
    whole, grids = _Folds(spec, files).eval(), torch.zeros(2, 1, *spec.input.shape)
    try:
        return _onnx(whole, grids, [task.name for task in spec.tasks])
    except Exception as error:  # a plugin may fail in any way
        who = _culprit(spec, cast("Network", whole.members[0]), grids)
        said = " ".join(str(error.__cause__ or error).split())[:300]
        raise PluginError(
            f"{who} cannot be exported ({type(error).__name__}: {said}). It must compute with operators of torch that "
            "ONNX has, whatever the size of the batch."
        ) from error


def _culprit(spec: ModelSpec, member: Network, grids: Tensor) -> str:
    """The first plugin of a model that cannot be exported by itself."""
    with torch.no_grad():
        features = member.backbone(grids)
    parts = [(f"backbone {spec.backbone.name!r}", member.backbone, grids)]
    parts += [(f"head {t.head.name!r} of {t.name!r}", _Head(member.heads[t.name]), features) for t in spec.tasks]
    for name, part, example in parts:
        try:
            _onnx(part, example, ["output"])
        except Exception:
            return name
    return spec.name


def _onnx(module: nn.Module, example: Tensor, outputs: Sequence[str]) -> Any:
    """A module as an ONNX program for batches of any size, with nothing in it of where it was made."""
    shapes = ({0: torch.export.Dim("batch")},)
    with silenced():
        # Traced first by itself: the exporter would fix the size of the batch rather than say that it cannot vary.
        traced = torch.export.export(module, (example,), dynamic_shapes=shapes)
        program = torch.onnx.export(
            traced, dynamo=True, input_names=["grid"], output_names=outputs, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None  # noqa: S101  # as no file was asked for
    model: Any = program.model
    graph = model.graph
    for part in (model, graph, *graph.all_nodes(), *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()  # stack traces, with paths of this machine
    return program


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # what stands for a module that is kept from being imported
        return False
