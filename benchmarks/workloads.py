"""Workloads that run in processes of their own: `python benchmarks/workloads.py NAME OPTIONS`, with options as JSON.

A workload is a generator. The code before its first `yield` loads and warms up. Then each line on standard input starts
one unit of work, and the process prints its result as JSON.
"""

import json
import sys
import sysconfig
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ICHPROG = Path(sysconfig.get_path("scripts")) / "ichprog"
SEED = 5  # random seed of the weights; no saliency map is empty with this one
BATCH, LOADERS = 8, 2  # as published
# names in ichprog: names in medcam, and in the published network
METHODS = {"guided_backprop": "gbp", "grad_cam": "gcam", "guided_grad_cam": "ggcam"}
TASKS = {"prognosis": "binary_head", "gcs": "ordinal_headGCS", "age": "ordinal_headAge"}
LAYER = "feature_extractor.features.norm5"  # the layer of class activation maps


def ichprog_predict(scans: str, precision: str) -> Iterator[Any]:
    """Predict every label's probability for each scan in a folder with ichprog."""
    import ichprog

    model, paths = ichprog.load_model(precision=precision), sorted(Path(scans).iterdir())
    ichprog.predict(model, paths[:1], brain="given")
    yield None
    while True:
        predictions = ichprog.predict(model, paths, brain="given")
        yield [[p for task in one.tasks.values() for p in task.probabilities.values()] for one in predictions]


def published_predict(scans: str) -> Iterator[Any]:
    """Predict with the published pipeline: MONAI transforms in a DataLoader, the network in eager float32."""
    import torch
    from torch.utils.data import DataLoader

    from ichprog import zoo

    from support import reference_pipeline

    name, paths = zoo.DEFAULT, sorted(Path(scans).iterdir())
    network = reference_pipeline.network(name, SEED)
    with torch.no_grad():
        network(reference_pipeline.grid(paths[0])[None])
        yield None
        while True:
            probabilities = []
            for grids in DataLoader(_Grids(paths), batch_size=BATCH, num_workers=LOADERS):
                logits = network(grids)
                for patient in range(len(grids)):
                    own = [values[patient : patient + 1] for values in logits]
                    by_task = reference_pipeline.probabilities(name, own)
                    probabilities.append(np.concatenate(list(by_task.values())).tolist())
            yield probabilities


class _Grids:
    """Apply the published transforms to each scan."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        from support import reference_pipeline

        return reference_pipeline.grid(self.paths[number])


def ichprog_explain(scan: str, maps: str, precision: str = "float32") -> Iterator[Any]:
    """Explain three tasks with three methods in ichprog, and save the maps as `.npz` at the end."""
    import ichprog

    model, maps_by_key = ichprog.load_model(precision=precision), {}
    tasks = [task.name for task in model.spec.tasks]
    yield None
    try:
        while True:
            maps_by_key = ichprog.explain(model, scan, task=tasks, method=list(METHODS), brain="given")
            yield None
    finally:
        _save(maps, {key: saliency.grid_map for key, saliency in maps_by_key.items()})


def medcam_explain(scan: str, maps: str, *, warm: bool = False) -> Iterator[Any]:
    """Explain with medcam, which injects one method into a network of one task.

    On the first call medcam runs each method twice, as a test. With `warm` this happens before the timed work.
    """
    from medcam import medcam

    from support import reference_pipeline

    grid, maps_by_key = reference_pipeline.grid(Path(scan))[None], {}
    networks = {task: _one_task(task, grid) for task in TASKS}

    def inject(task: str, method: str) -> Any:
        network, label = networks[task]
        return medcam.inject(network.requires_grad_(), backend=METHODS[method], layer=LAYER, label=label)

    injected = {key: inject(*key) for key in product(TASKS, METHODS)} if warm else {}
    for network in injected.values():
        network.test_run(grid.clone().requires_grad_())
    yield None
    try:
        while True:
            grid = reference_pipeline.grid(Path(scan))[None]
            for key in product(TASKS, METHODS):
                network = injected.get(key) or inject(*key)
                network(grid.clone().requires_grad_())
                maps_by_key[key] = network.get_attention_map()[0, 0]
            yield None
    finally:
        _save(maps, maps_by_key)


def brute_force_explain(scan: str, maps: str) -> Iterator[Any]:
    """Explain from the definitions: rebuild the network with the guided rule, and take the gradient of a layer."""
    import torch
    from torch.nn import functional

    from support import reference_pipeline

    yield None
    grid, maps_by_key = reference_pipeline.grid(Path(scan))[None], {}
    for task in TASKS:
        network, label = _one_task(task, grid)
        outputs = []
        layer = network.get_submodule(LAYER)
        hook = layer.register_forward_hook(lambda _m, _i, out, outputs=outputs: outputs.append(out))
        values = grid.clone().requires_grad_()
        score = network(values)[0, label]
        hook.remove()
        (gradient,) = torch.autograd.grad(score, outputs)
        coarse = (gradient.mean((2, 3, 4), keepdim=True) * outputs[0]).sum(1, keepdim=True).detach()
        _replace_relus(network)
        network(values)[0, label].backward()
        upsampled = functional.interpolate(coarse.clamp(min=0), grid.shape[2:], mode="trilinear")
        by_method = (values.grad, coarse, values.grad * upsampled)
        maps_by_key |= {(task, m): one[0, 0].numpy() for m, one in zip(METHODS, by_method, strict=True)}
    _save(maps, maps_by_key)
    yield None


def ichprog_train(scans: str, precision: str, folder: str) -> Iterator[Any]:
    """Train one step on all scans of a folder with ichprog, and return the mean loss."""
    from our_training import epoch_runner

    paths = sorted(Path(scans).iterdir())
    run_epoch = epoch_runner(paths, _targets(len(paths)), Path(folder), precision=precision, batch=len(paths))
    yield None
    while True:
        yield run_epoch()


def published_train(scans: str) -> Iterator[Any]:
    """Train one step with the published loop, and return the mean loss."""
    from published_training import Training

    paths = sorted(Path(scans).iterdir())
    training = Training(paths, _targets(len(paths)), batch=len(paths))
    yield None
    while True:
        yield training.run_epoch()


def _targets(patients: int) -> Any:
    """Return targets (N, 4): a poor outcome and a low GCS for every second patient, a high age for the others."""
    import torch

    return torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1]]).repeat(patients // 2, 1)


def _one_task(task: str, grid: Any) -> tuple[Any, int]:
    """Return the published network with one task, and the index of the logit of the task's last label.

    For ordered labels this is the lowest logit, because the probabilities are made monotone.
    """
    import torch

    from ichprog import zoo

    from support import reference_pipeline

    network = reference_pipeline.network(zoo.DEFAULT, SEED)
    head = network.get_submodule(TASKS[task])
    network.forward = lambda grid: head(network.feature_extractor.features(grid))
    with torch.no_grad():
        return network, int(network(grid)[0].argmin())


def _replace_relus(network: Any) -> None:
    import torch
    from torch import nn

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)

    class Guided(nn.Module):
        def forward(self, x: Any) -> Any:
            return Rule.apply(x)

    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Guided())


def _save(path: str, maps: dict[tuple[str, str], Any]) -> None:
    np.savez(path, **{" ".join(key): values for key, values in maps.items()})


def main() -> None:
    """Run the workload of the command line, and send the output of libraries to standard error."""
    output, sys.stdout = sys.stdout, sys.stderr
    for result in globals()[sys.argv[1]](**json.loads(sys.argv[2])):
        print(json.dumps(result), file=output, flush=True)
        if not sys.stdin.readline():
            break


if __name__ == "__main__":
    main()
