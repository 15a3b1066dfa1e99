"""Start-up.

Whole processes, from the command to its end, with the weights in the cache and not for the first time. The peer of a
command is the import of the libraries that the published code begins with, which does nothing more. All have their
bytecode, as what pip installs has.
"""

import sys
from functools import partial

import pytest

from ichprog import zoo

from process import run
from workloads import ICHPROG


def python(code):
    return partial(run, sys.executable, "-c", code)


@pytest.mark.parametrize(("brain", "what", "most"), [
    ("given", "answer for a scan of the brain alone", 0.3),
    ("extract", "answer for a whole head, its brain extracted", 0.5),
])  # fmt: skip
def test_a_cold_command(beside, figure, cache, scan, head, brain, what, most):
    path = scan(32) if brain == "given" else head
    command = partial(run, ICHPROG, "predict", path, "-m", zoo.DEFAULT, "--brain", brain, "--json")
    command()  # what is kept for later uses is made in the first
    ours, peer = beside(command, python("import torch, monai"), rounds=9)
    peer_is = "`import torch, monai`"
    figure(what, "s", ours.seconds, peer.seconds, beside=peer_is, target=("ratio", "at most", most))


@pytest.mark.parametrize("arguments", [("models",), ("--help",)], ids=" ".join)
def test_a_light_command(beside, figure, arguments):
    ours, peer = beside(partial(run, ICHPROG, *arguments), python("import torch"), rounds=9)
    what, peer_is = f"`ichprog {' '.join(arguments)}`", "`import torch`"
    figure(what, "s", ours.seconds, peer.seconds, beside=peer_is, target=("ratio", "at most", 1 / 3))


def test_the_import(beside, figure):
    ours, peer = beside(python("import ichprog"), python("pass"), rounds=25)
    peer_is = "the interpreter alone"
    target = ("difference", "at most", 0.06)
    figure("`import ichprog`", "s", ours.seconds, peer.seconds, beside=peer_is, target=target)
