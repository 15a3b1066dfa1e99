"""The published pipeline, rebuilt from its description with MONAI and torch: the reference of the tests."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class MultiTask(nn.Module):
    """DenseNet121 with named heads and the published keys."""

    def __init__(self, outputs: dict[str, int]) -> None:
        from monai.networks.nets import DenseNet121

        super().__init__()
        trunk = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1, dropout_prob=0.2)
        del trunk.class_layers
        self.feature_extractor = trunk
        for name, count in outputs.items():
            head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1024, count))
            self.add_module(name, head)
        self.names = list(outputs)

    def forward(self, grid: torch.Tensor) -> list[torch.Tensor]:
        features = self.feature_extractor.features(grid)
        return [self.get_submodule(name)(features) for name in self.names]


class Plain(nn.Module):
    """MONAI's DenseNet121, unchanged."""

    def __new__(cls, outputs: int) -> nn.Module:  # type: ignore[misc]
        from monai.networks.nets import DenseNet121

        network = DenseNet121(spatial_dims=3, in_channels=1, out_channels=outputs, dropout_prob=0.2)
        forward = network.forward
        network.forward = lambda grid: [forward(grid)]
        return network


class Perez(nn.Module):
    """The network of Perez et al. 2023."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv3d(1, 16, 3, padding=0, bias=False), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(16, 32, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Dropout3d(0.5),
            nn.Conv3d(32, 64, 3), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(64, 128, 3, bias=False), nn.ReLU(), nn.BatchNorm3d(128), nn.AdaptiveMaxPool3d(1),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(128, 1))

    def forward(self, grid: torch.Tensor) -> list[torch.Tensor]:
        return [self.classifier(self.feature_extractor(grid))]


# zoo name: folder on the Hub, network, file name without the fold, tasks in the order of the outputs
PUBLISHED = {
    "densenet121.prognosis_gcs3_age": (
        "Proposed_ThreeClassOrdinalGCS_BinaryAge_PrognosisICH",
        lambda: MultiTask({"binary_head": 1, "ordinal_headGCS": 2, "ordinal_headAge": 1}),
        "DenseNet_ThreeClassGCS_BinaryAge_Prognosis_SAMEPARAMETERS_asBinaryGCS_BinaryAge_Prognosis_No_pos_weight",
        ("prognosis", "gcs", "age"),
    ),
    "densenet121.prognosis_gcs2_age": (
        "Proposed_BinaryGCS_BinaryAge_PrognosisICH",
        lambda: MultiTask({"binary_head": 1, "ordinal_headGCS": 1, "ordinal_headAge": 1}),
        "any_name",
        ("prognosis", "gcs", "age"),
    ),
    "densenet121.prognosis_gcs3": (
        "ThreeClassOrdinalGCS_PrognosisICH",
        lambda: MultiTask({"binary_head": 1, "ordinal_head": 2}),
        "any_name",
        ("prognosis", "gcs"),
    ),
    "densenet121.prognosis_gcs2": (
        "BinaryGCS_PrognosisICH",
        lambda: MultiTask({"binary_head": 1, "ordinal_head": 1}),
        "any_name",
        ("prognosis", "gcs"),
    ),
    "densenet121.prognosis_age": (
        "BinaryAge_PrognosisICH",
        lambda: MultiTask({"binary_head": 1, "ordinal_headAge": 1}),
        "any_name",
        ("prognosis", "age"),
    ),
    "densenet121.prognosis": ("Baseline_DenseNet_PrognosisICH", lambda: Plain(1), "any_name", ("prognosis",)),
    "densenet121.gcs3": (
        "Baseline_DenseNet_ThreeClassOrdinalGCS",
        lambda: Plain(2),
        "DenseNet_ThreeClassGCS",
        ("gcs",),
    ),
    "densenet121.gcs2": ("Baseline_DenseNet_BinaryGCS", lambda: Plain(1), "any_name", ("gcs",)),
    "densenet121.age": ("Baseline_DenseNet_BinaryAge", lambda: Plain(1), "any_name", ("age",)),
    "perez2023.prognosis": ("Baseline_Perez_et_al", Perez, "any_name", ("prognosis",)),
}


def network(name: str, seed: int) -> nn.Module:
    """Build the published network of a zoo name with seeded weights whose probabilities differ from 0.5."""
    torch.manual_seed(seed)
    network = PUBLISHED[name][1]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.05)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.05)
            nn.init.normal_(module.bias, 0, 1)
    return network.eval().requires_grad_(requires_grad=False)


def save(name: str, hub: Path, seed: int, fold: int = 0) -> Path:
    """Write a seeded checkpoint in the published layout to the folder `hub`, and return its path."""
    path = checkpoint(name, hub, fold)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(network(name, seed).state_dict()), path)
    return path


def checkpoint(name: str, hub: Path, fold: int = 0) -> Path:
    """Return the path of a checkpoint in the published layout."""
    folder, _, stem, _ = PUBLISHED[name]
    return hub / folder / f"{stem}_fold{fold}.pth"


def publish(name: str, hub: Path) -> int:
    """Write the first fold of a model if it is missing, and return the seed of its weights."""
    seed = list(PUBLISHED).index(name)
    if not checkpoint(name, hub).exists():
        save(name, hub, seed)
    return seed


def transforms(shape: tuple[int, int, int] = (40, 301, 301)):  # type: ignore[no-untyped-def]
    """Return the published MONAI transforms: a brain-only NIfTI in LPS order to a grid `(1, D, H, W)`."""
    from monai import transforms as t

    slices, rows, columns = shape
    return t.Compose(
        [
            t.LoadImage(image_only=True),
            t.EnsureChannelFirst(),
            t.Rotate90(k=3),
            t.Flip(spatial_axis=1),
            t.NormalizeIntensity(subtrahend=15, divisor=85),
            t.ThresholdIntensity(threshold=0, above=True, cval=0),
            t.ThresholdIntensity(threshold=1, above=False, cval=0),
            t.SpatialPad((-1, -1, slices), method="symmetric"),
            t.Resize((rows, columns, slices), mode="area"),
            t.Transpose((0, 3, 1, 2)),
        ]
    )


def grid(path: Path) -> torch.Tensor:
    """Return a brain-only NIfTI in LPS order as the published grid `(1, 40, 301, 301)`."""
    return transforms()(str(path)).as_tensor()


def probabilities(name: str, logits: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Return each task's label probabilities, following the published description of the targets."""
    by_task = {}
    for task, values in zip(PUBLISHED[name][3], logits, strict=True):
        beyond = functional.sigmoid(values)[0].double().numpy()
        if len(beyond) == 2:
            first, second = beyond[0], min(beyond)
            by_task[task] = np.array([1 - first, first - second, second])
        else:
            by_task[task] = np.array([1 - beyond[0], beyond[0]])
    return by_task
