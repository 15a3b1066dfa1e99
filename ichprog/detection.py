"""Describe the haemorrhage in a scan by the answer of a model whose task is answered voxel by voxel."""

import dataclasses
from typing import cast

import numpy as np

from ichprog import location, zoo
from ichprog.errors import InvalidValueError, ScanWarning
from ichprog.results import Haemorrhage, Prediction, Segmentation
from ichprog.scan import Scan
from ichprog.scan.measurements import volume_ml as volume_of
from ichprog.scan.volume import to_lps
from ichprog.spec import ExpectedRanges, ModelSpec, Task

BLOOD_CHECK = "no-blood"  # the scan check of blood by its density, which the answer of a model replaces
_SKULL_CHECK = "skull-present"  # the scan check of a scan that is wrongly given as the brain alone
_BRAIN_ONLY = "brain-only"
_VENTRICULAR = "ventricular"  # the region of blood in the ventricles


def find_task(spec: ModelSpec) -> Task:
    """Return the task of a model that finds haemorrhages: the first one that is answered voxel by voxel.

    Args:
        spec: The model.

    Raises:
        InvalidValueError: The model has no such task. The message names the models that have one.
    """
    task = spec.dense_task
    if task is None:
        names = [each.name for each in zoo.list_models() if each.dense_task is not None]
        expected = "a model with a task that has a mask"
        hint = f"Use one of: {', '.join(names)}." if names else "Train one: give a task of a spec a mask."
        raise InvalidValueError("model for haemorrhages", spec.name, expected, hint)
    return task


def describe(prediction: Prediction, spec: ModelSpec, scan: Scan | None) -> Haemorrhage:
    """Return the haemorrhage of a scan.

    Args:
        prediction: The prediction of a model that finds haemorrhages.
        spec: The model.
        scan: The checked scan; None if the prediction has an error.
    """
    task = find_task(spec)
    if scan is None:
        return Haemorrhage(prediction, task, spec.limits)
    segmentation = cast("Segmentation", prediction[task.name].segmentation)  # the task has a mask
    if scan.record.get("brain") == "given" and all(warning.code != _SKULL_CHECK for warning in scan.warnings):
        prediction = dataclasses.replace(prediction, warnings=(*prediction.warnings, _brain_only_warning(scan)))
    result = Haemorrhage(
        prediction, task, spec.limits, intraventricular=segmentation.region_probabilities.get(_VENTRICULAR)
    )
    place = _locate(result, scan)
    if place is None:
        return result
    return dataclasses.replace(
        result,
        infratentorial=place.infratentorial if place.location is not None else None,
        side=place.side,
        location=place.location,
        shares=place.shares,
        midline_shift_mm=place.midline_shift_mm,
        midline_shift_interval_mm=place.midline_shift_interval_mm,
        midline_shift_reason=place.midline_shift_reason,
    )


def _brain_only_warning(scan: Scan) -> ScanWarning:
    """Return the warning that blood next to the skull may be missing."""
    volume_ml = volume_of(scan.brain, scan) if scan.brain is not None else 0.0
    message = (
        f"the scan holds {volume_ml:.0f} mL of brain without a skull: blood between brain and skull may have been "
        "removed with the skull, so volumes may be too small. Give the whole head."
    )
    return ScanWarning(_BRAIN_ONLY, message, round(volume_ml, 1), "a whole head", "mL")


def _locate(haemorrhage: Haemorrhage, scan: Scan) -> location.Location | None:
    """Return the place of a haemorrhage, or None if the model finds no kinds of haemorrhage that have a place."""
    known = {name: value for value, name in enumerate(location.KINDS, start=1)}
    if scan.brain is None or not known.keys() & haemorrhage.regions.keys():
        return None
    values = np.zeros(256, np.uint8)  # of the kinds in an atlas, by the value of the mask
    if haemorrhage.is_present:
        for name, value in haemorrhage.regions.items():
            values[value] = known.get(name, 0)
    image = haemorrhage.mask
    mask, _ = to_lps(np.asarray(image.dataobj).reshape(image.shape[:3]), scan.source_affine)
    return location.locate(values[mask], scan.brain, scan.hu, scan.spacing)


def without_blood_check(ranges: ExpectedRanges) -> ExpectedRanges:
    """Return expected ranges that leave out the check of blood by its density.

    Args:
        ranges: Expected ranges by check code.
    """
    return {**ranges, BLOOD_CHECK: (None, None)}


def find_missing_blood(haemorrhage: Haemorrhage, lowest_ml: float | None) -> ScanWarning | None:
    """Return the warning that a scan shows no haemorrhage, or None if the scan shows one.

    Args:
        haemorrhage: The haemorrhage of the scan.
        lowest_ml: The least volume of blood in mL that the outcome model expects; None if it expects none.
    """
    if haemorrhage.is_present or lowest_ml is None or lowest_ml <= 0:
        return None
    message = (
        f"no haemorrhage was found: {haemorrhage.model} gives a probability of {haemorrhage.probability:.3f}, and a "
        f"haemorrhage is called present above {haemorrhage.threshold:g}. The outcome model was made for scans with at "
        f"least {lowest_ml:g} mL of blood."
    )
    return ScanWarning(
        BLOOD_CHECK, message, round(haemorrhage.probability, 4), f"> {haemorrhage.threshold:g}", "probability"
    )
