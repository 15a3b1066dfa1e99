"""Start-up.

Whole processes are timed, from the start of a command to its end. Weights and graphs are in the cache. The peer of a
command only imports the libraries that the published code imports first. All packages have bytecode, as after an
installation by pip.
"""

import shutil
import sys
from functools import partial

import pytest

from ichprog import zoo

from process import run_command
from workloads import ICHPROG

FORWARD = """
import torch, monai
network = monai.networks.nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=1).eval()
with torch.inference_mode():
    network(torch.zeros(1, 1, 40, 301, 301))
"""


def python(code):
    return partial(run_command, sys.executable, "-c", code)


@pytest.mark.parametrize(("brain", "what", "limit"), [
    ("given", "predict one brain-only scan", 0.3),
    ("extract", "predict one whole head with brain extraction", 0.5),
])  # fmt: skip
def test_a_cold_command(compare, record, cache, scan, head, brain, what, limit):
    path = scan(32) if brain == "given" else head
    command = partial(run_command, ICHPROG, "predict", path, "-m", zoo.DEFAULT, "--brain", brain, "--json")
    command()  # the first prediction fills the graph cache
    ours, peer = compare(command, python("import torch, monai"), rounds=9)
    peer_name = "`import torch, monai`"
    record(what, "s", ours.seconds, peer.seconds, peer_name=peer_name, target=("ratio", "at most", limit))


def test_the_first_answer_of_a_model(compare, record, cache, scan):
    """The model was never used here: its weights are in the cache, but nothing is compiled."""
    command = [ICHPROG, "predict", scan(32), "-m", zoo.DEFAULT, "--brain", "given", "--json", "--runtime", "cached"]

    def predict():
        shutil.rmtree(cache / "compiled", ignore_errors=True)
        run_command(*command)

    ours, peer = compare(predict, python(FORWARD), rounds=5)
    peer_name = "`import torch, monai` and one eager forward pass"
    target = ("ratio", "at most", 2.0)
    record("first answer of a model", "s", ours.seconds, peer.seconds, peer_name=peer_name, target=target)
    print(f"first answer {min(ours.seconds):.1f} s, {peer_name} {min(peer.seconds):.1f} s")


@pytest.mark.parametrize("arguments", [("models",), ("--help",)], ids=" ".join)
def test_a_light_command(compare, record, arguments):
    ours, peer = compare(partial(run_command, ICHPROG, *arguments), python("import torch"), rounds=9)
    what, peer_name = f"`ichprog {' '.join(arguments)}`", "`import torch`"
    record(what, "s", ours.seconds, peer.seconds, peer_name=peer_name, target=("ratio", "at most", 1 / 3))


def test_importing_ichprog(compare, record):
    ours, peer = compare(python("import ichprog"), python("pass"), rounds=25)
    peer_name = "the bare interpreter"
    target = ("difference", "at most", 0.06)
    record("`import ichprog`", "s", ours.seconds, peer.seconds, peer_name=peer_name, target=target)
