"""Training protocols: how a model is trained, as data. Two presets: the published protocol and the project's own."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ichprog import schema
from ichprog.errors import InvalidValueError, SpecError, UnknownNameError
from ichprog.schema import Bounds

_Count = Annotated[int, Bounds(0)]
_Size = Annotated[float, Bounds(0)]
_Fraction = Annotated[float, Bounds(0, 1)]


@dataclass(frozen=True)
class Protocol:
    """Hold everything about a training that is neither the model nor the patients.

    Attributes:
        epochs: Maximum number of epochs.
        patience: Epochs without a better validation score before a fold stops; 0 disables early stopping.
        monitor: Validation score that selects the best epoch: the lowest "loss", or the highest "balanced_accuracy" of
            the first task.
        validation_fraction: Fraction of a fold's training patients that is set aside for validation.
        split_seed: Random seed of the folds and of their validation parts.
        seed: Random seed of the initial weights, the order of patients, augmentation and dropout.
        batch_size: Patients per batch, summed over all processes.
        accumulation_steps: Batches per optimiser step.
        drop_last: Whether the gradients of incomplete steps are dropped. As published, the first step of an epoch then
            has one batch less, too.
        learning_rate: Highest learning rate of AdamW.
        learning_rates: Learning rates that every fold tries instead of `learning_rate`. The fold keeps the training
            with the best validation score.
        weight_decay: Decoupled weight decay.
        amsgrad: Whether AdamW uses the maximum of the second moments.
        schedule: "cosine": linear warm-up, then cosine decay to zero. "plateau": reduce the rate when the loss of a
            training step stops falling.
        warmup_epochs: Epochs of linear warm-up of the "cosine" schedule.
        plateau_patience: Steps without a lower loss before the "plateau" schedule reduces the rate.
        plateau_factor: Factor by which the "plateau" schedule multiplies the rate.
        freeze_backbone: Whether the backbone keeps the weights that it starts from, so that only heads are trained.
            Needs a run to start from.
        clinical_omission: Probability that each clinical value of a training patient is hidden, so that a fused model
            learns to do without it.
        loss_weighting: "fixed" uses the tasks' own weights, "uncertainty" learns them (Kendall et al., CVPR 2018).
        balance: "class_weights" weights each label inversely to its frequency, "oversample" repeats patients with the
            first task's rarer labels, "none" does neither.
        recalibrate: Whether a scale and a shift of each task's logits are fitted to the validation part at the end.
        rotation_degrees: Largest rotation about each axis, in degrees.
        rotation_prob: Probability that a scan is rotated.
        rotation_units: Space in which rotations are rigid: "mm", or "voxels" of the grid.
        zoom: Largest relative change of size.
        zoom_mode: "random" draws a size for each scan, "always" magnifies every training scan by the largest change.
        shift: Largest displacement along each axis, as a fraction of the extent.
        flip_prob: Probability that left and right are exchanged.
        noise_std: Standard deviation of Gaussian noise, on the grid's scale from 0 to 1.
        noise_prob: Probability of noise.
        contrast: Largest relative change of contrast.
        brightness: Largest change of brightness of nonzero voxels, on the grid's scale from 0 to 1.
        precision: "float32"; "bfloat16" for convolutions and matrix products, on a CPU only if it multiplies in
            bfloat16 and computes the network's convolutions correctly; "auto": bfloat16 on a GPU that supports it.
    """

    epochs: Annotated[int, Bounds(1, 1e6)] = 60
    patience: _Count = 20
    monitor: Literal["loss", "balanced_accuracy"] = "loss"
    validation_fraction: Annotated[float, Bounds(0.01, 0.9)] = 0.1
    split_seed: _Count = 1
    seed: _Count = 1
    batch_size: Annotated[int, Bounds(2, 100000)] = 8
    accumulation_steps: Annotated[int, Bounds(1, 100000)] = 1
    drop_last: bool = False
    learning_rate: Annotated[float, Bounds(1e-12, 1000)] = 1e-3
    learning_rates: tuple[Annotated[float, Bounds(1e-12, 1000)], ...] = ()
    weight_decay: _Size = 1e-2
    amsgrad: bool = False
    schedule: Literal["cosine", "plateau"] = "cosine"
    warmup_epochs: _Count = 3
    plateau_patience: _Count = 5
    plateau_factor: Annotated[float, Bounds(0.001, 0.999)] = 0.98
    freeze_backbone: bool = False
    clinical_omission: _Fraction = 0.3
    loss_weighting: Literal["fixed", "uncertainty"] = "fixed"
    balance: Literal["none", "class_weights", "oversample"] = "class_weights"
    recalibrate: bool = True
    rotation_degrees: Annotated[float, Bounds(0, 180)] = 8.0
    rotation_prob: _Fraction = 0.8
    rotation_units: Literal["mm", "voxels"] = "mm"
    zoom: Annotated[float, Bounds(0, 0.9)] = 0.1
    zoom_mode: Literal["random", "always"] = "random"
    shift: Annotated[float, Bounds(0, 0.9)] = 0.04
    flip_prob: _Fraction = 0.5
    noise_std: _Size = 0.01
    noise_prob: _Fraction = 0.5
    contrast: Annotated[float, Bounds(0, 0.9)] = 0.1
    brightness: _Size = 0.02
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, schema.read(kind, given))  # a whole number becomes a float
            except SpecError:
                raise InvalidValueError(f"protocol {name}", given, schema.describe_type(kind)) from None

    @classmethod
    def read(cls, changes: Mapping[str, Any], base: "Protocol", path: str = "protocol") -> "Protocol":
        """Return a protocol with changes that a file or the command line gives.

        Args:
            changes: New values by field name, as JSON or TOML gives them.
            base: Protocol that is changed.
            path: Path of the changes in their file, for messages.

        Raises:
            SpecError: A field does not exist, or a value is not allowed.

        Examples:
            >>> Protocol.read({"epochs": 0}, PRESETS["paper"])
            Traceback (most recent call last):
            ichprog.errors.SpecError: Invalid protocol.epochs 0. Expected a whole number from 1 to 1e+06.
        """
        return schema.read(cls, {**base.to_dict(), **changes}, path)

    def replace(self, **changes: Any) -> "Protocol":
        """Return a copy of the protocol with some of its fields changed.

        Args:
            changes: New values by field name.

        Raises:
            UnknownNameError: A field does not exist.
            InvalidValueError: A value is not allowed.

        Examples:
            >>> PRESETS["default"].replace(learning_rate=5e-4).learning_rate
            0.0005
        """
        fields = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in fields:
                raise UnknownNameError("protocol field", name, fields)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol as plain data."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def quirks(self) -> list[str]:
        """Return a sentence for each setting that exists only because it was published.

        Examples:
            >>> len(PRESETS["paper"].quirks()), len(PRESETS["default"].quirks())
            (6, 0)
        """
        fields = self.to_dict()
        return [sentence for when, sentence in QUIRKS if all(fields[name] == value for name, value in when.items())]


QUIRKS: tuple[tuple[Mapping[str, Any], str], ...] = (
    (
        {"zoom_mode": "always"},
        "Every training scan is magnified, no validation or test scan is: the published transform ignores its "
        "probability argument.",
    ),
    (
        {"balance": "oversample", "recalibrate": False},
        "Labels are balanced by oversampling and the probabilities are not recalibrated: they are scores, too high for "
        "the rarer label.",
    ),
    (
        {"schedule": "plateau"},
        "The learning rate depends on the loss of each training step, not on the validation loss of each epoch.",
    ),
    (
        {"drop_last": True},
        "The first step of an epoch has one batch less than the others, and incomplete steps at its end are dropped.",
    ),
    (
        {"rotation_units": "voxels"},
        "Rotations are rigid in voxels of the grid, which are higher than wide: a head leans forward or sideways by "
        "more than the angle.",
    ),
    (
        {"monitor": "balanced_accuracy"},
        "The best epoch is selected by the balanced accuracy of one task in about 24 patients. Many epochs share one "
        "value; the first of them wins.",
    ),
)

PRESETS: Mapping[str, Protocol] = {
    "default": Protocol(),
    "paper": Protocol(
        epochs=100,
        patience=20,
        monitor="balanced_accuracy",
        batch_size=8,
        accumulation_steps=3,
        drop_last=True,
        learning_rate=1e-3,
        weight_decay=1e-4,
        amsgrad=True,
        schedule="plateau",
        plateau_patience=5,
        plateau_factor=0.98,
        balance="oversample",
        recalibrate=False,
        rotation_degrees=5.0,
        rotation_prob=0.5,
        rotation_units="voxels",
        zoom=0.1,
        zoom_mode="always",
        shift=0.0,
        flip_prob=0.0,
        noise_std=0.01,
        noise_prob=0.5,
        contrast=0.0,
        brightness=0.0,
        precision="float32",
    ),
}
