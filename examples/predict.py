"""Simulate one patient and predict with the embedded model.

Run `python examples/predict.py FOLDER`. The example needs `pip install "ichprog[simulate]"` and no network.
"""

import sys
from pathlib import Path

import ichprog
from ichprog.simulate import simulate

folder = Path(sys.argv[1])
cohort = simulate(folder / "patients", patients=1, seed=7, preset="plain")
scan = next((cohort.parent / "scans").iterdir())

prediction = ichprog.predict("compact.prognosis_gcs3_age", scan)
for name in prediction:
    task = prediction[name]
    print(f"{name}: {task.label} ({task.probabilities[task.label]:.2f})")
for warning in prediction.warnings:
    print(warning.message)
