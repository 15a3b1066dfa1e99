"""Check answers and measure speed on a GPU: `PYTHONPATH=tests python benchmarks/gpu.py`, in one call.

First the probabilities and maps of the embedded models and of the published network with seeded weights are compared
between the device and the CPU. Then six figures are measured, each next to a peer on the same device, in alternation:
the network in float32 and in bfloat16, two saliency methods, the training step, and scans from files. The peer is the
published network in eager float32, and for scans from files MONAI's transforms with that network.

The exit code is 1 if a difference exceeds its tolerance. `--device cpu --small` tries the script without a GPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch

import ichprog
from ichprog import networks, zoo
from ichprog.simulate import Patient

from support import reference_pipeline
from support.hub_server import HubServer
from workloads import SEED

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # of a probability
LEAST_CORRELATION = 0.99  # of maps of the device and of the CPU, in float32
METHODS = ("guided_backprop", "grad_cam")
EMBEDDED = ("compact.prognosis_gcs3_age_v2", "compact.prognosis_gcs3_age_clinical", "compact.haemorrhage")
LEARNING_RATE = 1e-4


def largest_difference(name: str, device: str, precision: str) -> float:
    """Return the largest difference of a probability between the device and the CPU, on three random grids."""
    shape = zoo.find(name).input.shape
    grids = np.random.default_rng(0).random((3, *shape), np.float32)
    found = []
    for where, with_precision in (("cpu", "float32"), (device, precision)):
        model = ichprog.load_model(name, device=where, runtime="torch", precision=with_precision)
        found.append([task.probabilities for fold in model.predict_grids(grids) for task in fold.values()])
    return max(float(np.abs(a - b).max()) for a, b in zip(*found, strict=True))


def map_correlations(name: str, scan: Path, device: str) -> dict[str, float]:
    """Return for each method the correlation of the maps of the device and of the CPU."""
    maps = [
        ichprog.explain(ichprog.load_model(name, device=where, runtime="torch"), scan, method=list(METHODS))
        for where in ("cpu", device)
    ]
    return {
        method: float(np.corrcoef(maps[0][key].grid_map.ravel(), maps[1][key].grid_map.ravel())[0, 1])
        for key, method in ((key, key[1]) for key in maps[0])
    }


def seconds(work: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call, including the work that the device still has to do."""
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(what: str, ours: Callable[[], Any], peer: Callable[[], Any], device: str, rounds: int) -> dict[str, Any]:
    """Time two functions in alternation, after one call of each."""
    seconds(ours, device), seconds(peer, device)
    times = [(seconds(ours, device), seconds(peer, device)) for _ in range(rounds)]
    mine, others = (median(each) for each in zip(*times, strict=True))
    return {"what": what, "ours_s": mine, "peer_s": others, "ratio": mine / others}


def measure(name: str, device: str, scans: list[Path], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return the six figures of a published model."""
    random = torch.Generator().manual_seed(0)
    grids = torch.rand(batch, 1, *zoo.find(name).input.shape, generator=random)
    published = reference_pipeline.network(name, SEED).to(device)
    models = {each: ichprog.load_model(name, device=device, runtime="torch", precision=each) for each in TOLERANCES}
    values = grids[:, 0].numpy()

    def published_forward() -> Any:
        with torch.inference_mode():
            return [each.cpu() for each in published(grids.to(device))]

    figures = []
    for each, model in models.items():
        forward = partial(model.predict_grids, values)
        figures.append(compare(f"network, {each}, {batch} grids", forward, published_forward, device, rounds))

    def published_gradient() -> Any:
        grid = grids[:1].to(device).requires_grad_()
        return torch.autograd.grad(published(grid)[0].sum(), grid)[0].cpu()

    model = models["float32"]
    scan = model.load_scan(scans[0], brain="given")
    for method in METHODS:
        explain = partial(ichprog.explain, model, scan, method=method)
        figures.append(compare(f"map, {method}, against a plain gradient", explain, published_gradient, device, rounds))
    trained = networks.build(zoo.find(name)).to(device).train()
    networks.channels_last(trained)
    untrained = reference_pipeline.network(name, SEED).to(device).train().requires_grad_()
    half = device.startswith("cuda")
    steps = _training_step(trained, grids, device, half), _training_step(untrained, grids, device, half=False)
    precision = "bfloat16" if half else "float32"
    figures.append(compare(f"training step of {batch} grids, {precision}", *steps, device, rounds))

    def published_predict() -> None:
        for path in scans:
            with torch.inference_mode():
                published(reference_pipeline.grid(path)[None].to(device))

    predict = partial(ichprog.predict, model, scans, brain="given")
    figures.append(compare(f"{len(scans)} scans from files", predict, published_predict, device, rounds))
    return figures


def _training_step(network: Any, grids: torch.Tensor, device: str, half: bool) -> Callable[[], None]:
    """Return a function that makes one step of the optimiser on the same grids."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            outputs = network(grids.to(device))
        logits = list(outputs.values()) if isinstance(outputs, dict) else list(outputs)
        loss = sum(each.float().square().mean() for each in logits)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def main() -> int:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small network and few grids, to try the script")
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON to this file")
    args = parser.parse_args()
    batch, rounds, count = (1, 1, 1) if args.small else (8, 7, 16)
    published = "perez2023.prognosis" if args.small else zoo.DEFAULT
    with tempfile.TemporaryDirectory() as folder, _seeded_weights(published, Path(folder)):
        scans = [_brain_only(Path(folder), number) for number in range(count)]
        differences = [
            {"model": name, "precision": each, "difference": largest_difference(name, args.device, each)}
            for name in (*EMBEDDED, published)
            for each in (TOLERANCES if args.device != "cpu" else ("float32",))
        ]
        maps = map_correlations(EMBEDDED[0], scans[0], args.device)
        figures = measure(published, args.device, scans, batch, rounds)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    results = {"device": device, "torch": torch.__version__, "differences": differences, "maps": maps} | {
        "figures": figures
    }
    print(f"{device}, torch {torch.__version__}")
    for row in differences:
        print(f"{row['model']:40} {row['precision']:9} largest difference of a probability {row['difference']:.2g}")
    for method, correlation in maps.items():
        print(f"map, {method}: correlation of the device and the CPU {correlation:.6f}")
    for row in figures:
        print(f"{row['what']:55} {row['ours_s']:.4f} s, peer {row['peer_s']:.4f} s, ratio {row['ratio']:.3f}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    is_equal = all(row["difference"] <= TOLERANCES[row["precision"]] for row in differences)
    return 0 if is_equal and min(maps.values()) >= LEAST_CORRELATION else 1


@contextmanager
def _seeded_weights(name: str, folder: Path) -> Iterator[None]:
    """Serve a published model with seeded weights on the loopback address while the block runs."""
    repository = zoo.find(name).weights
    reference_pipeline.save(name, folder / "hub" / str(repository.repo), SEED)
    with HubServer(folder / "hub", str(repository.revision)) as server:
        os.environ.update(HF_ENDPOINT=server.url, ICHPROG_CACHE=str(folder / "cache"))
        yield


def _brain_only(folder: Path, number: int) -> Path:
    """Write the brain of a simulated patient in LPS order, as the published transforms expect it."""
    scan, _ = Patient(SEED, number, "plain").save(folder / "patients")
    image, path = nib.load(scan), folder / f"{number:02}.nii.gz"
    change = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LPS"))
    image.as_reoriented(change).to_filename(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
