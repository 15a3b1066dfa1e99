"""Demonstrate the package on one simulated patient, with no data and no network."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

import ichprog
from ichprog import zoo
from ichprog.cli.command import Command, examples
from ichprog.cli.options import as_json, print_json
from ichprog.cli.scan_runs import format_clinical, format_haemorrhage, format_scores

_MODEL = "compact.prognosis_gcs3_age_v2"
_FUSED_MODEL = "compact.prognosis_gcs3_age_clinical"
_PATIENT = (2, 24)  # seed and number of a patient that the embedded models were not trained on
_METHOD = "grad_cam"

if TYPE_CHECKING:
    from ichprog.clinical_scores import ClinicalScores
    from ichprog.model import Model
    from ichprog.results import Prediction


@click.command(cls=Command, epilog=examples("demo", "demo -o first-look"))
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path), default=Path("ichprog-demo"), show_default=True,
    help="Folder of the scan, the results, the maps and the picture.",
)  # fmt: skip
@as_json
def demo(folder: Path, as_json: bool) -> None:
    """Simulate a patient, predict, explain and measure the haemorrhage, with no data and no network."""
    from ichprog.clinical_scores import check_clinical, from_haemorrhage
    from ichprog.io import atomic_write
    from ichprog.reporting.overlay import plot
    from ichprog.result_files import prediction_table, results_file
    from ichprog.simulate import Patient

    folder.mkdir(parents=True, exist_ok=True)
    click.echo("Simulating a patient.", err=True)
    patient = Patient(*_PATIENT)
    scan_path, _ = patient.save(folder)
    click.echo("Predicting with three embedded models in PyTorch.", err=True)
    model = ichprog.load_model(_MODEL, runtime="torch")  # compiles nothing and leaves nothing in the cache
    scan = model.load_scan(scan_path)
    prediction, columns = ichprog.predict(model, scan), patient.columns()
    fused_model = ichprog.load_model(_FUSED_MODEL, runtime="torch")
    values = {value.column: columns[value.column] for value in fused_model.spec.clinical}
    fused = ichprog.predict(fused_model, scan, clinical=values)
    blood = ichprog.haemorrhage(scan_path, model=ichprog.load_model(zoo.DETECTOR, runtime="torch"))
    with results_file(
        folder / "results.csv", prediction_table(model.spec), {"model": model.spec.name}, overwrite=True
    ) as file:
        file.add(prediction)
    scores = from_haemorrhage(blood, check_clinical(values))
    click.echo("Explaining, and drawing the picture.", err=True)
    maps = ichprog.explain(model, scan, task=[task.name for task in model.spec.tasks], method=[_METHOD])
    for (name, method), saliency in maps.items():
        saliency.save(folder / f"{patient.name}_{name}_{method}.nii.gz")
    picture = folder / "picture.png"
    with atomic_write(picture) as partial:
        plot(maps, scan_path, prediction=prediction, outline=blood.mask).savefig(partial, dpi=110)
    if as_json:
        results = {"prediction": prediction.to_dict(), "prediction_with_values": fused.to_dict()}
        results |= {"haemorrhage": blood.to_dict(), "scores": scores.to_dict()}
        print_json({**results, "truth": patient.truth(), "folder": str(folder)})
    else:
        click.echo(f"{'task':12}{'prediction':12}{'probability':>12}   truth")
        for task in model.spec.tasks:
            answer, value = prediction[task.name], columns[task.target.column]
            truth = f"{task.labels[task.target.index(float(value))]} ({task.target.column} {value})"
            click.echo(f"{task.name:12}{answer.label:12}{answer.probabilities[answer.label]:12.2f}   {truth}")
        _print_with_values(fused_model, fused, scores)
        person = patient.person
        click.echo(
            f"{format_haemorrhage(blood)}   truth {person.site}, {person.volume_ml:.0f} mL outside the ventricles"
        )
        click.echo(f"The patient is simulated. Picture, with the blood that was found outlined: {picture}")
    click.echo(blood.limits[0], err=True)
    click.echo(model.spec.notice, err=True)


def _print_with_values(model: "Model", prediction: "Prediction", scores: "ClinicalScores") -> None:
    """Print the tasks that use clinical values, what each value changed, and the clinical scores."""
    for task in model.spec.tasks:
        if task.uses_clinical:
            answer = prediction[task.name]
            click.echo(
                f"{task.name:12}{answer.label:12}{answer.probabilities[answer.label]:12.2f}   with clinical values"
            )
    if prediction.clinical is not None:
        click.echo(format_clinical(prediction.clinical))
    click.echo(format_scores(scores))
