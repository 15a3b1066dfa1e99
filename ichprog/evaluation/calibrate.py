"""Calibrate a model on a cohort: recalibration, conformal sets, and which scans are unusual."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ichprog.cohort import Cohort
from ichprog.errors import CohortError
from ichprog.evaluation.cohort_predictions import plan_patients, predict_patients, tabulate
from ichprog.evaluation.model_folder import check_folder, write_model
from ichprog.model import Model, load_model, resolve_brain
from ichprog.spec import Calibration
from ichprog.train.calibration import MIN_PATIENTS, fit_calibration

if TYPE_CHECKING:
    from ichprog.scan.brain import Brain


def calibrate(
    model: Model | str,
    cohort: Cohort | str | Path,
    output: str | Path,
    *,
    brain: "Brain" = "auto",
    progress: bool = False,
) -> Calibration:
    """Calibrate a model on patients with labels, and write it with the calibration into a folder.

    Each patient is predicted only by folds that were not trained on the patient, as in `evaluate`. The weights stay.
    The calibration holds for patients like those of the cohort.

    Args:
        model: A model, or a name that `load_model` takes.
        cohort: The patients, or the path of their table. At least `MIN_PATIENTS` need a label.
        output: Folder of the new model, for `load_model("local-dir:FOLDER")`. It must be empty or missing.
        brain: As in `predict`.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The calibration, which the description of the new model holds.

    Raises:
        CohortError: The table is wrong, or no task has enough labels of patients that the model may predict.
        RunError: The folder is not empty.
        UnknownNameError, SpecError, WeightsError, PluginError: As in `load_model`.

    Examples:
        ```python
        from ichprog.evaluation import calibrate

        calibrate("compact.prognosis_gcs3_age", "patients/cohort.csv", "calibrated")
        prediction = ichprog.predict("local-dir:calibrated", "scan.nii.gz", coverage=0.9)
        print(prediction["prognosis"].label_set, prediction.abstained)
        ```
    """
    folder = Path(output)
    check_folder(folder)
    brain = resolve_brain(brain)
    table = cohort if isinstance(cohort, Cohort) else Cohort.read(cohort, scans=False)
    loaded = load_model(model) if isinstance(model, str) else model
    spec = loaded.spec
    plan = plan_patients(loaded, table)
    results = predict_patients(loaded, table, plan, brain, progress=progress, with_inputs=True)
    predictions = tabulate(spec, table, plan, results)
    found = {task: (each.truth, each.probabilities) for task, each in predictions.items()}
    inputs = [results.inputs[index] for index in sorted(results.inputs)]
    patients = f"{len(inputs)} patients of {Path(table.source).name}. {table.origin.sentence}".strip()
    fitted = fit_calibration(spec, found, inputs, patients)
    if fitted is None:
        counts = ", ".join(f"{task} {int((truth >= 0).sum())}" for task, (truth, _) in found.items())
        raise CohortError(
            f"{table.source}: too few patients for a calibration. Labels of patients that the model may predict: "
            f"{counts}; at least {MIN_PATIENTS} of a task are needed. Add patients with labels."
        )
    write_model(loaded, replace(spec, calibration=fitted), folder)
    return fitted
