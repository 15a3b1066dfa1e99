"""The library leaves the process as it found it, and logs to the logger `ichprog` only."""

import json
import logging
import subprocess
import sys

import pytest

import ichprog

from support.models import local_model

pytestmark = pytest.mark.compiled
MODEL = "compact.prognosis_gcs3_age"

CODE = """
import gc, json, os, sys, warnings
import click, monai.networks.nets, nibabel, numpy, openvino, pydicom, scipy.ndimage, torch, torch.export
import openvino.frontend.pytorch.fx_decoder

def state():
    return {
        "garbage collector": [gc.isenabled(), gc.get_threshold()],
        "environment": sorted(f"{name}={value}" for name, value in os.environ.items()),
        "warning filters": [str(each) for each in warnings.filters],
        "threads of torch": torch.get_num_threads(),
        "converter of OpenVINO": id(openvino.convert_model),
        "missing modules": [name for name, module in sys.modules.items() if module is None],
    }

others = dict(sys.modules)
before = state()
import ichprog

model = ichprog.load_model(sys.argv[1], fold=0)
list(ichprog.predict(model, sys.argv[2]))
for method in ("guided_backprop", "grad_cam"):
    ichprog.explain(model, sys.argv[2], method=method)
after = state()
changed = [[key, before[key], after[key]] for key in before if before[key] != after[key]]
changed += [name for name, module in others.items() if sys.modules.get(name) is not module]
print(json.dumps(changed))
"""


def test_loading_predicting_and_explaining_leave_the_process_unchanged(scan_path):
    command = [sys.executable, "-c", CODE, MODEL, str(scan_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_compiling_and_falling_back_are_logged(tmp_path, caplog):
    from torch import nn

    from ichprog import registry
    from ichprog.backbones import Backbone

    class Branching(nn.Module):
        """Depends on its input in a way that no graph can express."""

        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv3d(1, 2, 3)

        def forward(self, grid):
            return self.convolution(grid) if float(grid.mean()) > 0.4 else -self.convolution(grid)

    ichprog.register_backbone("branching", lambda: Backbone(nn.Sequential(Branching()), 2, "features.0"))
    try:
        name = local_model(tmp_path / "branching", "branching", shape=(8, 24, 24))
        with caplog.at_level(logging.INFO, logger="ichprog"):
            ichprog.load_model(name)
    finally:
        registry.backbones.unregister("branching")
    messages = [record.message for record in caplog.records if record.name.startswith("ichprog")]
    assert any(message.startswith("Compiling predictions of branching") for message in messages)
    assert any(message.startswith("Falling back to the torch runtime") for message in messages)
