"""Describe the haemorrhage in a scan by the answer of a model whose task is answered voxel by voxel."""

from typing import cast

from ichprog import zoo
from ichprog.errors import InvalidValueError, ScanWarning
from ichprog.results import Haemorrhage, Prediction, Segmentation
from ichprog.scan import Scan
from ichprog.spec import ExpectedRanges, ModelSpec, Task

BLOOD_CHECK = "no-blood"  # the scan check of blood by its density, which the answer of a model replaces
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
    intraventricular = segmentation.region_probabilities.get(_VENTRICULAR)
    return Haemorrhage(prediction, task, spec.limits, intraventricular)


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
