"""Train the tasks of the embedded model on a backbone of your own, for one epoch on eight simulated patients.

Run `python examples/swap_backbone.py FOLDER`. The example needs `pip install "ichprog[simulate,train]"` and no network.
"""

import sys
from pathlib import Path

from torch import nn

import ichprog
from ichprog.backbones import Backbone
from ichprog.simulate import simulate
from ichprog.train import PRESETS, train

folder = Path(sys.argv[1])


def two_layers(*, width: int = 8) -> Backbone:
    """Build a network of two convolutions."""
    layers = nn.Sequential(nn.Conv3d(1, width, 3, stride=4), nn.ReLU(), nn.Conv3d(width, width, 3, stride=2), nn.ReLU())
    return Backbone(layers, width, "features.3")


ichprog.register_backbone("two_layers", two_layers)
(spec,) = ichprog.list_models("compact.prognosis_gcs3_age")
fields = spec.to_dict() | {"name": "two_layers.prognosis_gcs3_age", "backbone": {"name": "two_layers", "options": {}}}

cohort = simulate(folder / "patients", patients=8, seed=7, preset="plain")
protocol = PRESETS["default"].replace(epochs=1, batch_size=4, validation_fraction=0.5)
run = train(cohort, ichprog.ModelSpec.from_dict(fields), folder / "run", folds=2, protocol=protocol)

model = ichprog.load_model(f"local-dir:{run}")
prediction = ichprog.predict(model, next((cohort.parent / "scans").iterdir()))
print({name: prediction[name].label for name in prediction})
