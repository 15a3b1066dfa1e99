"""Score the embedded model on eight simulated patients that it was not trained on.

Run `python examples/evaluate.py FOLDER`. The example needs `pip install "ichprog[simulate,study]"` and no network.
"""

import sys
from pathlib import Path

from ichprog.evaluation import evaluate
from ichprog.simulate import simulate

folder = Path(sys.argv[1])
cohort = simulate(folder / "patients", patients=8, seed=7, preset="plain")

evaluation = evaluate("compact.prognosis_gcs3_age", cohort)
print(evaluation.write(folder / "evaluation"))
