"""How a model is trained, as data: the published way with its quirks, and ours."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ichprog.errors import RunError, UnknownNameError


@dataclass(frozen=True)
class Protocol:
    """Everything about a training that is not the model or the patients.

    Attributes:
        epochs: The most passes over the training part.
        patience: Passes without a better validation after which a fold stops; 0 never stops early.
        select: What makes a pass better on the validation part: the lower "loss", or the higher "balanced_accuracy" of
            the first task.
        validation: Share of a fold's training part that is set aside for validation.
        split_seed: Seed of the folds and of their validation parts.
        seed: Seed of all else: the first weights, the order of patients, augmentation, dropout.
        batch: Patients a batch, over all processes together.
        accumulate: Batches a step of the optimiser.
        trailing: Whether the gradients of the batches left at the end of a pass make a step ("kept"), or are "dropped";
            then the first step has one batch less too, as published.
        lr: The highest learning rate.
        weight_decay: Decoupled weight decay.
        amsgrad: Whether AdamW keeps the largest second moment.
        schedule: "cosine": up during the warm-up and down to zero. "plateau": shrunk where the training loss does not
            fall, looked at after each step.
        warm_up: Passes of linear warm-up of "cosine".
        plateau_patience: Steps without a lower loss before "plateau" shrinks the rate.
        plateau_factor: What the rate is then multiplied by.
        loss_weighting: "fixed" takes the tasks' own weights, "uncertainty" learns them (Kendall et al., CVPR 2018).
        balance: "class_weights" weighs each task's labels inversely to their number, "oversample" repeats patients of
            the first task's rarer labels, "none" does neither.
        recalibrate: Whether a scale and a shift of each task's logits are fitted to the validation part in the end.
        rotation: Largest angle about each axis, in degrees.
        rotation_p: Share of scans that are rotated.
        rotation_in: Whether angles are meant in "mm" or in "cells" of the grid.
        zoom: Largest change of size, as a share of it.
        zoom_how: "random" draws a size for each scan, "always" magnifies every training scan by the largest change.
        shift: Largest displacement along each axis, as a share of its extent.
        flip_p: Share of scans whose left and right are exchanged.
        noise: Standard deviation of Gaussian noise, on the grid's scale from 0 to 1.
        noise_p: Share of scans with noise.
        gain: Largest change of contrast, as a share of it.
        offset: Largest change of brightness where the grid is not 0.
        precision: "float32"; "bfloat16" for convolutions and matrix products, on a processor where it multiplies in
            that and the network's convolutions are found right in it; "auto": bfloat16 on a GPU that computes in it.
    """

    epochs: int = 60
    patience: int = 20
    select: Literal["loss", "balanced_accuracy"] = "loss"
    validation: float = 0.1
    split_seed: int = 1
    seed: int = 1
    batch: int = 8
    accumulate: int = 1
    trailing: Literal["kept", "dropped"] = "kept"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    amsgrad: bool = False
    schedule: Literal["cosine", "plateau"] = "cosine"
    warm_up: int = 3
    plateau_patience: int = 5
    plateau_factor: float = 0.98
    loss_weighting: Literal["fixed", "uncertainty"] = "fixed"
    balance: Literal["none", "class_weights", "oversample"] = "class_weights"
    recalibrate: bool = True
    rotation: float = 8.0
    rotation_p: float = 0.8
    rotation_in: Literal["mm", "cells"] = "mm"
    zoom: float = 0.1
    zoom_how: Literal["random", "always"] = "random"
    shift: float = 0.04
    flip_p: float = 0.5
    noise: float = 0.01
    noise_p: float = 0.5
    gain: float = 0.1
    offset: float = 0.02
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(kind) is Literal:
                if value not in typing.get_args(kind):
                    raise RunError(f"protocol: {name} is one of {list(typing.get_args(kind))}, not {value!r}")
                continue
            if kind is float and type(value) is int:
                object.__setattr__(self, name, float(value))
            elif type(value) is not kind:
                raise RunError(f"protocol: {name} is a {kind.__name__}, not {value!r}")
            low, high = _RANGES.get(name, (0, float("inf")))
            if not low <= value <= high:
                raise RunError(f"protocol: {name} lies between {low:g} and {high:g}, not at {value!r}")

    def replace(self, **changes: Any) -> "Protocol":
        """This protocol with some of its fields changed.

        Raises:
            UnknownNameError: There is no such field.
            RunError: A field cannot have that value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UnknownNameError("field of a protocol", name, known)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The protocol as plain data."""
        return dataclasses.asdict(self)

    def quirks(self) -> list[str]:
        """What of this protocol is kept only because it was published so, in sentences."""
        mine = self.to_dict()
        return [said for when, said in QUIRKS if all(mine[name] == value for name, value in when.items())]


_RANGES = {
    "epochs": (1, 1e6),
    "batch": (2, 1e5),
    "accumulate": (1, 1e5),
    "validation": (0.01, 0.9),
    "lr": (1e-12, 1e3),
    "plateau_factor": (1e-3, 0.999),
    "rotation_p": (0, 1),
    "flip_p": (0, 1),
    "noise_p": (0, 1),
    "zoom": (0, 0.9),
    "shift": (0, 0.9),
    "gain": (0, 0.9),
    "rotation": (0, 180),
}  # what is not here is 0 or more

QUIRKS: tuple[tuple[Mapping[str, Any], str], ...] = (
    (
        {"zoom_how": "always"},
        "Every training scan is magnified, no validation or test scan is: the published transform ignores the "
        "probability that it is given.",
    ),
    (
        {"balance": "oversample", "recalibrate": False},
        "Labels are balanced by oversampling and the probabilities are not recalibrated: they are scores, too high for "
        "the rarer label.",
    ),
    (
        {"schedule": "plateau"},
        "The learning rate is looked at after every step, by the loss of that step, and not after every pass by the "
        "validation.",
    ),
    (
        {"trailing": "dropped"},
        "The first step of a pass has one batch less than the others, and the gradients left at its end are dropped.",
    ),
    (
        {"rotation_in": "cells"},
        "Rotations are made in cells of the grid, which are higher than wide: a head leans forward or aside by more "
        "than the angle says.",
    ),
    (
        {"select": "balanced_accuracy"},
        "A pass is chosen by the balanced accuracy of one task in about 24 patients, a number that many passes share; "
        "the first of them is kept.",
    ),
)

PRESETS: Mapping[str, Protocol] = {
    "default": Protocol(),
    "paper": Protocol(
        epochs=100,
        patience=20,
        select="balanced_accuracy",
        batch=8,
        accumulate=3,
        trailing="dropped",
        lr=1e-3,
        weight_decay=1e-4,
        amsgrad=True,
        schedule="plateau",
        plateau_patience=5,
        plateau_factor=0.98,
        balance="oversample",
        recalibrate=False,
        rotation=5.0,
        rotation_p=0.5,
        rotation_in="cells",
        zoom=0.1,
        zoom_how="always",
        shift=0.0,
        flip_p=0.0,
        noise=0.01,
        noise_p=0.5,
        gain=0.0,
        offset=0.0,
        precision="float32",
    ),
}
