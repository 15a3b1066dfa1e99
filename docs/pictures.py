"""Draw the pictures of the documentation: `python docs/pictures.py FOLDER`.

All patients are simulated, and no embedded model was trained on them. FOLDER keeps their scans for another run. The
pictures go to `docs/pictures/`. `--only NAME` draws one picture.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

import ichprog
from ichprog import networks, preprocessing
from ichprog.io import atomic_write, write_json
from ichprog.simulate import Patient

MODEL = "compact.prognosis_gcs3_age_v2"
METHODS = ("guided_backprop", "grad_cam", "guided_grad_cam")
SEED, PATIENT = 7, 37  # no embedded model was trained, calibrated or measured on patients of this seed
DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
INK, PALE, BLUE, RED = "#37474f", "#eceff1", "#3b6ea8", "#b5483a"
RESOLUTION_DPI = 80
NOTICE = "Simulated patient. For research only, not for patient care."


def patient_files(folder: Path, *, skull: bool = False) -> tuple[Path, Path]:
    """Return the scan and the mask of the patient of the pictures, simulated if the files are missing."""
    patient, place = Patient(SEED, PATIENT), folder / ("heads" if skull else "brains")
    scan, mask = patient.paths(place, dicom=False)
    return (scan, mask) if scan.exists() and mask.exists() else patient.save(place, skull=skull)


def draw_multi_task(_: Path) -> Any:
    """Draw one backbone with three heads next to three networks of one task each."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)

    def box(axis: Any, x: float, y: float, width: float, text: str, colour: str) -> None:
        patch = FancyBboxPatch((x, y - 0.35), width, 0.7, boxstyle="round,pad=0.05", facecolor=colour, edgecolor=INK)
        axis.add_patch(patch)
        axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=9, color=INK)

    def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK})

    tasks = ("outcome", "GCS", "age group")
    for axis, title in ((left, "Multi-task: one network"), (right, "Single-task: one network for each answer")):
        axis.set(xlim=(-0.2, 9.2), ylim=(-0.4, 4.4), title=title)
        axis.title.set_size(10)
        axis.axis("off")
    box(left, 0, 2, 1.6, "head CT", PALE)
    box(left, 2.7, 2, 2.2, "backbone", "#cfd8dc")
    arrow(left, (1.7, 2), (2.6, 2))
    for row, task in zip((3.4, 2, 0.6), tasks, strict=True):
        box(left, 6.2, row, 2.8, f"head: {task}", "#d7e3f1")
        arrow(left, (5.0, 2), (6.1, row))
        box(right, 0, row, 1.6, "head CT", PALE)
        box(right, 2.7, row, 2.2, "backbone", "#cfd8dc")
        box(right, 6.2, row, 2.8, f"head: {task}", "#d7e3f1")
        arrow(right, (1.7, row), (2.6, row))
        arrow(right, (5.0, row), (6.1, row))
    return figure


def draw_preprocessing(folder: Path) -> Any:
    """Draw what the network sees of a whole head, and inputs that go wrong, with the warning of each."""
    from matplotlib.figure import Figure

    scan, _ = patient_files(folder, skull=True)
    model, image = ichprog.load_model(MODEL, runtime="torch"), nib.load(scan)
    affine, hu = image.affine, np.asarray(image.dataobj, np.float32)
    grid = preprocessing.prepare(model.load_scan(scan).hu, model.spec.input)
    brain = np.asarray(ichprog.brain_mask(scan).dataobj) > 0
    k = int(brain.sum((0, 1)).argmax())
    steps = [
        ("1. the scan, -1000 to 1000 HU", hu[:, :, k], -1000, 1000),
        ("2. the brain window, 0 to 100 HU", hu[:, :, k], 0, 100),
        ("3. the brain, extracted", np.where(brain, hu, 0)[:, :, k], 0, 100),
        (f"4. the grid, {' x '.join(map(str, grid.shape))}", grid[k * len(grid) // hu.shape[2]].T, 0, 1),
    ]
    window = np.clip((hu + 1000) / 2000 * 255, 0, 255).astype(np.uint8)
    wrong = [
        ("grey values instead of HU", window, affine, "auto"),
        ("half of the slices", hu[:, :, : hu.shape[2] // 2], affine, "auto"),
        ("wrong voxel size", hu, affine @ np.diag([0.5, 0.5, 1, 1]), "auto"),
        ("skull left in", hu, affine, "given"),
    ]
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (title, values, low, high) in zip(axes[0], steps, strict=True):
        axis.imshow(values.T, cmap="gray", vmin=low, vmax=high)
        axis.set_title(title, fontsize=9, color=INK)
    for axis, (title, values, about, choice) in zip(axes[1], wrong, strict=True):
        shown = values[:, :, min(k, values.shape[2] - 1)]
        axis.imshow(shown.T, cmap="gray", vmin=0, vmax=255 if values.dtype == np.uint8 else 100)
        axis.set_title(title, fontsize=9, color=RED)
        axis.set_xlabel(_complaint(model, nib.Nifti1Image(values, about), choice), fontsize=8, color=INK)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"What the network sees, and inputs that go wrong. {NOTICE}", fontsize=10)
    return figure


def _complaint(model: Any, image: Any, brain: str) -> str:
    """Return the codes of the warnings about a scan, or of the error that refuses it."""
    prediction = ichprog.predict(model, [image], brain=brain, on_error="record")[0]
    if prediction.error is not None:
        return f"refused: {prediction.error['code']}"
    return "warnings:\n" + ("\n".join(warning.code for warning in prediction.warnings[:4]) or "none")


def draw_methods(folder: Path) -> Any:
    """Draw the map of each method for the outcome, with the haemorrhage outlined."""
    scan, mask = patient_files(folder)
    model = ichprog.load_model(MODEL, runtime="torch")
    maps = ichprog.explain(model, scan, method=list(METHODS))
    return ichprog.plot(maps, scan, prediction=ichprog.predict(model, scan), outline=mask, slices=4)


def draw_tasks(folder: Path) -> Any:
    """Draw the map of each task by one method."""
    scan, mask = patient_files(folder)
    model = ichprog.load_model(MODEL, runtime="torch")
    maps = ichprog.explain(model, scan, task=[task.name for task in model.spec.tasks], method=["guided_grad_cam"])
    return ichprog.plot(maps, scan, prediction=ichprog.predict(model, scan), outline=mask, slices=4)


def draw_random_network(folder: Path) -> Any:
    """Draw guided backpropagation and Grad-CAM of the trained network and of one with random weights."""
    import torch
    from matplotlib.figure import Figure
    from safetensors.torch import save_file

    scan, mask = patient_files(folder)
    trained, random = ichprog.load_model(MODEL, runtime="torch"), folder / "random"
    random.mkdir(exist_ok=True)
    torch.manual_seed(0)
    file = random / "fold0.safetensors"
    save_file(networks.build(trained.spec).state_dict(), file)
    description = trained.spec.to_dict() | {"golden_output": None, "calibration": None}
    description["weights"] |= {"sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}, "folder": ""}
    write_json(random / "config.json", description)
    untrained = ichprog.load_model(f"local-dir:{random}", runtime="torch")
    hu, blood = (np.asarray(nib.load(path).dataobj, np.float32) for path in (scan, mask))
    k = int((blood > 0).sum((0, 1)).argmax())
    inside = [np.flatnonzero((hu[:, :, k] > 0).any(1 - axis)) for axis in range(2)]
    left, right, front, back = (at for each in inside for at in (each[0] - 10, each[-1] + 10))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 5)
    panels: list[tuple[str, np.ndarray | None]] = [("scan, haemorrhage outlined", None)]
    for method in ("guided_backprop", "grad_cam"):
        for name, model in (("trained", trained), ("random weights", untrained)):
            image = ichprog.explain(model, scan, method=method).image
            panels.append((f"{method}\n{name}", np.asarray(image.dataobj, np.float32)[:, :, k]))
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.imshow(hu[:, :, k].T, cmap="gray", vmin=0, vmax=80)
        if values is not None:
            top = np.percentile(np.abs(values[hu[:, :, k] > 0]), 99.5) or 1.0
            shown = np.clip(values / top, -1, 1).T
            axis.imshow(shown, cmap="coolwarm", vmin=-1, vmax=1, alpha=np.clip(np.abs(shown) * 1.4, 0, 0.8))
        axis.set(xlim=(left, right), ylim=(back, front))
        axis.contour(blood[:, :, k].T > 0, [0.5], colors="yellow", linewidths=0.8)
        axis.set_title(title, fontsize=8, color=INK)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(NOTICE, fontsize=9)
    return figure


def draw_haemorrhage(folder: Path) -> Any:
    """Draw the scan with the haemorrhage that the network finds."""
    scan, _ = patient_files(folder)
    blood = ichprog.haemorrhage(scan)
    return ichprog.plot([], scan, prediction=ichprog.predict(MODEL, scan), outline=blood.mask, slices=6)


def draw_clinical(folder: Path) -> Any:
    """Draw a prediction with clinical values, and what each of them changed."""
    scan, mask = patient_files(folder)
    known = {"age": 71, "gcs": 9}
    prediction = ichprog.predict("compact.prognosis_gcs3_age_clinical", scan, clinical=known)
    return ichprog.plot([], scan, prediction=prediction, outline=mask, slices=6)


def draw_simulation(folder: Path) -> Any:
    """Draw the slice with most blood of simulated heads, of both presets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for row, preset in zip(figure.subplots(2, 6), ("plain", "realistic"), strict=True):
        for number, axis in enumerate(row):
            patient = Patient(SEED, number, preset=preset)
            scan, mask = patient.save(folder / preset, skull=True)
            hu, blood = (np.asarray(nib.load(path).dataobj, np.float32) for path in (scan, mask))
            amount = (blood > 0).sum((0, 1))
            k = int(amount.argmax()) if amount.any() else int((hu > 0).sum((0, 1)).argmax())
            axis.imshow(hu[:, :, k].T, cmap="gray", vmin=0, vmax=80)
            if amount.any():
                axis.contour(blood[:, :, k].T > 0, [0.5], colors="yellow", linewidths=0.6)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(preset, fontsize=9, color=INK)
    figure.suptitle(f"Simulated patients, blood outlined. {NOTICE.partition('. ')[2]}", fontsize=9)
    return figure


def draw_location(_: Path) -> Any:
    """Draw the regions of the atlas on five levels."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from ichprog.location.atlas import load_atlas

    atlas = load_atlas()
    x, y = np.mgrid[-80:81, -110:81]
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    colours = figure_colours(len(atlas.names))
    for axis, z in zip(figure.subplots(1, 5), (-40, -20, 0, 20, 40), strict=True):
        points = np.stack([x.ravel(), y.ravel(), np.full(x.size, z)]).astype(float)
        region = atlas.regions_at(points).reshape(x.shape)
        depth, _slope = atlas.depth_at(points)
        shown = np.ones((*x.shape, 3))
        inside = depth.reshape(x.shape) > 0
        shown[inside] = colours[region[inside]]
        axis.imshow(shown.transpose(1, 0, 2), origin="lower")
        axis.set_title(f"{z} mm", fontsize=8, color=INK)
        axis.axis("off")
    handles = [Patch(color=colour, label=name) for name, colour in zip(atlas.names, colours, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def figure_colours(number: int) -> np.ndarray:
    """Return colours `(number, 3)` that differ."""
    import matplotlib as mpl

    return mpl.colormaps["tab20"](np.arange(number))[:, :3]


def draw_calibration(_: Path) -> Any:
    """Draw what a slope and an intercept other than 1 and 0 mean, by their definition."""
    from matplotlib.figure import Figure

    p = np.linspace(0.01, 0.99, 99)
    log_odds = np.log(p / (1 - p))
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    slopes = ((1, 0, "calibrated"), (0.5, 0, "slope 0.5: too extreme"), (2, 0, "slope 2: too careful"))
    shifts = ((1, 0, "calibrated"), (1, 1, "intercept 1: too low"), (1, -1, "intercept -1: too high"))
    for axis, lines in zip(figure.subplots(1, 2), (slopes, shifts), strict=True):
        for (slope, intercept, label), colour in zip(lines, (INK, BLUE, RED), strict=True):
            axis.plot(p, 1 / (1 + np.exp(-(intercept + slope * log_odds))), color=colour, label=label)
        axis.set(xlabel="predicted probability", ylabel="patients with the label", aspect="equal")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_threshold(_: Path) -> Any:
    """Draw how a threshold trades sensitivity for specificity, on numbers drawn at random."""
    from matplotlib.figure import Figure

    random = np.random.default_rng(0)
    good, poor = (1 / (1 + np.exp(-random.normal(mean, 1, 5000))) for mean in (-1, 0.5))
    thresholds = np.linspace(0, 1, 201)
    sensitivity, specificity = ([(poor >= t).mean() for t in thresholds], [(good < t).mean() for t in thresholds])
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for values, colour, label in ((good, BLUE, "good outcome"), (poor, RED, "poor outcome")):
        left.hist(values, bins=40, range=(0, 1), color=colour, alpha=0.5, label=label)
    left.set(xlabel="predicted probability of a poor outcome", ylabel="patients")
    right.plot(1 - np.array(specificity), sensitivity, color=INK)
    for threshold, marker in ((0.25, "s"), (0.5, "o")):
        left.axvline(threshold, color=INK, linewidth=1, linestyle="-" if threshold == 0.5 else "--")
        at = int(np.argmin(np.abs(thresholds - threshold)))
        label = f"threshold {threshold}: {sensitivity[at]:.2f}, {specificity[at]:.2f}"
        right.plot(1 - specificity[at], sensitivity[at], marker, color=RED, label=label)
    right.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Numbers drawn at random, not patients", fontsize=9)
    return figure


def draw_evidence(_: Path) -> Any:
    """Draw the AUC of the embedded models on simulated patients next to the best possible one."""
    from matplotlib.figure import Figure

    measured = json.loads((DOCS / "embedded.json").read_text(encoding="utf-8"))
    rows = [(each["what"], each) for each in measured["figures"]]
    rows += [
        (f"poor outcome, known: {' and '.join(each['known'])}", each) for each in measured["fused"] if each["known"]
    ]
    figure = Figure(figsize=(7.4, 2.8), layout="constrained")
    axis = figure.subplots()
    for place, (_name, each) in enumerate(rows):
        value, low, high = each["model"]
        axis.plot([low, high], [place, place], color=BLUE, linewidth=2)
        axis.plot(value, place, "o", color=BLUE, label="model, with its 95 % interval" if place == 0 else None)
        axis.plot(each["best"][0], place, "|", color=RED, markersize=14, label="best possible" if place == 0 else None)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel(f"AUC, {rows[0][1]['patients']:,} simulated patients with a haemorrhage")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_training(folder: Path) -> Any:
    """Draw the losses of each epoch of a short training on simulated patients."""
    from matplotlib.figure import Figure

    from ichprog.simulate import simulate
    from ichprog.train import PRESETS, TrainOptions, resolve_spec, train

    run = folder / "run"
    if not (run / "log.csv").exists():
        spec = resolve_spec("compact.prognosis_gcs3_age")
        spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, shape=(12, 48, 48)))
        cohort = simulate(folder / "training", patients=240, seed=SEED, preset="plain", matrix=48, workers=2)
        protocol = PRESETS["default"].replace(epochs=24, patience=0, validation_fraction=0.25)
        options = TrainOptions(device="cpu", brain="given")
        train(cohort, spec, run, folds=2, protocol=protocol, options=options)
    with (run / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7.4, 3), layout="constrained")
    for axis, fold in zip(figure.subplots(1, 2, sharey=True), ("0", "1"), strict=True):
        epochs = [row for row in rows if row["fold"] == fold]
        numbers = [int(row["epoch"]) for row in epochs]
        for column, colour, label in (("loss", BLUE, "training"), ("val_loss", RED, "validation")):
            axis.plot(numbers, [float(row[column]) for row in epochs], color=colour, label=label)
        best = min(epochs, key=lambda row: float(row["val_loss"]))
        axis.plot(int(best["epoch"]), float(best["val_loss"]), "o", color=RED, label="lowest validation loss")
        axis.set(title=f"fold {fold}", xlabel="epoch")
        axis.title.set_size(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss, all tasks")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle("240 simulated patients, two folds", fontsize=9)
    return figure


def profile_bars(page: str, section: str) -> list[tuple[str, float]]:
    """Return the names and seconds of a table of the page about profiles."""
    rows = re.findall(
        r"^\| `(\S+)` .*\| (\S+) +\|$", page.partition(f"## {section}")[2].partition("## ")[0], re.MULTILINE
    )
    return [(name, float(seconds)) for name, seconds in rows]


def draw_profiling(_: Path) -> Any:
    """Draw the seconds of the backbones and of the saliency methods, from the page about profiles."""
    from matplotlib.figure import Figure

    page = (DOCS / "profiling.md").read_text(encoding="utf-8")
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    sections = {"Backbones": "seconds for one grid, forward", "Saliency methods": "seconds for one map of compact"}
    for axis, (section, what) in zip(figure.subplots(1, 2), sections.items(), strict=True):
        names, seconds = zip(*sorted(profile_bars(page, section), key=lambda row: -row[1]), strict=True)
        bars = axis.barh(names, seconds, color=BLUE)
        axis.bar_label(bars, fmt="%.2g", fontsize=7, padding=2)
        axis.set_xscale("log")
        axis.set(title=section, xlabel=what)
        axis.title.set_size(10)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


DRAWINGS: dict[str, Callable[[Path], Any]] = {
    "multi-task.svg": draw_multi_task,
    "preprocessing.png": draw_preprocessing,
    "methods.png": draw_methods,
    "tasks.png": draw_tasks,
    "random-network.png": draw_random_network,
    "haemorrhage.png": draw_haemorrhage,
    "clinical.png": draw_clinical,
    "simulation.png": draw_simulation,
    "location.png": draw_location,
    "calibration.svg": draw_calibration,
    "threshold.svg": draw_threshold,
    "evidence.svg": draw_evidence,
    "training.svg": draw_training,
    "profiling.svg": draw_profiling,
}


def main() -> None:
    """Draw the chosen pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=DRAWINGS, metavar="NAME", help="draw one picture")
    args = parser.parse_args()
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "ichprog"  # an unchanged picture is an unchanged file
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        if args.only in (None, name):
            figure = draw(args.folder)
            with atomic_write(PICTURES / name) as part:
                figure.savefig(part, dpi=RESOLUTION_DPI, format=name.rpartition(".")[2], metadata=_no_date(name))
            print(PICTURES / name)


def _no_date(name: str) -> dict[str, Any]:
    """Return metadata without a date."""
    return {"Date": None} if name.endswith(".svg") else {}


if __name__ == "__main__":
    main()
