"""Compare small networks, windows and poolings on simulated patients: `python compare.py FOLDER`.

The comparison has 200 simulated patients and grids of 24 x 96 x 96. Training starts from random weights on one half of
the patients, and the other half is the test set. An interrupted run resumes from FOLDER. The script needs `pip install
"ichprog[simulate,train]"` and prints the table of the README.
"""

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import ichprog
from ichprog import registry
from ichprog.simulate import simulate
from ichprog.spec import ModelSpec, PluginRef
from ichprog.train import PRESETS, TrainOptions, train

SHAPE = (24, 96, 96)
PROTOCOL = PRESETS["default"].replace(epochs=10, warmup_epochs=1, learning_rate=0.002)
VARIANTS = (
    PluginRef("timm/test_efficientnet", {"window": 3, "pooling": "attention"}),
    PluginRef("timm/test_efficientnet", {"window": 3, "pooling": "transformer"}),
    PluginRef("timm/test_efficientnet", {"window": 3, "pooling": "none"}),
    PluginRef("timm/test_efficientnet", {"window": 1, "pooling": "attention"}),
    PluginRef("timm/test_efficientnet", {"window": 3, "pooling": "attention", "stride": 2}),
    PluginRef("timm/test_vit", {"window": 3, "pooling": "attention"}),
    PluginRef("compact", {}),  # ichprog's own 3D network
)
SCORES = (("prognosis", "poor"), ("age", ">=80"))


def main(folder: Path) -> None:
    """Train every variant on the same patients and print a row for each."""
    torch.set_num_threads(1)
    cohort = simulate(folder / "patients", patients=200, seed=1, preset="plain", workers=2)
    (small,) = ichprog.list_models("compact.prognosis_gcs3_age")
    click.echo("| backbone | options | parameters | s a step | AUC, poor outcome | AUC, age of 80 or more |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for number, variant in enumerate(VARIANTS):
        spec = replace(small, backbone=variant, input=replace(small.input, shape=SHAPE))
        run = folder / f"run{number}"
        train(
            cohort, spec, run, folds=2, only_folds=[0], protocol=PROTOCOL, resume=run.exists(),
            options=TrainOptions(device="cpu", cache_dir=folder / "cache", workers=2),
        )  # fmt: skip
        options = ", ".join(f"{name} {value}" for name, value in variant.options.items())
        count, seconds = _measure(spec)
        aucs = " | ".join(_auc(run / "out_of_fold.csv", *score) for score in SCORES)
        click.echo(f"| `{variant.name}` | {options} | {count / 1e6:.2f} M | {seconds:.2f} | {aucs} |")


def _measure(spec: ModelSpec) -> tuple[int, float]:
    """Return the parameters of a backbone and the median time of a step with 8 patients, in seconds."""
    backbone: Any = registry.backbones.load(spec.backbone.name)(**spec.backbone.options)
    grids, times = torch.rand(8, 1, *SHAPE), []
    for _ in range(3):
        start = time.perf_counter()
        backbone(grids).square().mean().backward()
        times.append(time.perf_counter() - start)
    return sum(values.numel() for values in backbone.parameters()), float(np.median(times))


def _auc(table: Path, task: str, label: str) -> str:
    """Return the AUC on held-out patients, with the 95 % interval of 2,000 bootstrap samples of patients."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    true = np.array([row[f"{task}_true"] == label for row in rows])
    predicted = np.array([float(row[f"{task}_{label}"]) for row in rows])
    random = np.random.default_rng(0)
    samples = [random.integers(0, len(true), len(true)) for _ in range(2000)]
    low, high = np.quantile([roc_auc_score(true[at], predicted[at]) for at in samples], (0.025, 0.975))
    return f"{roc_auc_score(true, predicted):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
