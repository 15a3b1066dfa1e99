"""Simulate one patient and write saliency maps of two methods as NIfTI in the space of the scan.

Run `python examples/explain.py FOLDER`. The example needs `pip install "ichprog[simulate]"` and no network.
"""

import sys
from pathlib import Path

import ichprog
from ichprog.simulate import simulate

folder = Path(sys.argv[1])
cohort = simulate(folder / "patients", patients=1, seed=7, preset="plain")
scan = next((cohort.parent / "scans").iterdir())

model = ichprog.load_model("compact.prognosis_gcs3_age")
maps = ichprog.explain(model, scan, task=["prognosis"], method=["guided_backprop", "grad_cam"])
for (task, method), saliency in maps.items():
    print(saliency.save(folder / f"{task}_{method}.nii.gz"))
