"""What is compared in processes of its own: `python benchmarks/workloads.py NAME OPTIONS`, with options as JSON.

A contestant is a generator. What comes before its first `yield` makes it ready; then each line on its standard input
asks for one more piece of work, whose answer it prints.
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
SEED = 5  # of the weights: one of those for which none of the maps is empty
BATCH, LOADERS = 8, 2  # as published
# our names, and those of medcam and of the published network
METHODS = {"guided_backprop": "gbp", "grad_cam": "gcam", "guided_grad_cam": "ggcam"}
TASKS = {"prognosis": "binary_head", "gcs": "ordinal_headGCS", "age": "ordinal_headAge"}
LAYER = "feature_extractor.features.norm5"  # whose output class activation maps are taken at


def ichprog_predict(scans: str, precision: str) -> Iterator[Any]:
    """Every label's probability of each scan in a folder."""
    import ichprog

    model, paths = ichprog.load_model(precision=precision), sorted(Path(scans).iterdir())
    ichprog.predict(model, paths[:1], brain="given")
    yield None
    while True:
        found = ichprog.predict(model, paths, brain="given")
        yield [[p for task in one.tasks.values() for p in task.probabilities.values()] for one in found]


def published_predict(scans: str) -> Iterator[Any]:
    """The same the published way: MONAI's chain in a DataLoader, the network in eager float32."""
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
            found = []
            for grids in DataLoader(_Grids(paths), batch_size=BATCH, num_workers=LOADERS):
                logits = network(grids)
                for patient in range(len(grids)):
                    said = reference_pipeline.probabilities(name, [values[patient : patient + 1] for values in logits])
                    found.append(np.concatenate(list(said.values())).tolist())
            yield found


class _Grids:
    """The published chain as a data set."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        from support import reference_pipeline

        return reference_pipeline.grid(self.paths[number])


def ichprog_explain(scan: str, maps: str, precision: str = "float32") -> Iterator[Any]:
    """Three tasks by three methods, kept as `.npz` in the end."""
    import ichprog

    model, found = ichprog.load_model(precision=precision), {}
    tasks = [task.name for task in model.spec.tasks]
    yield None
    try:
        while True:
            found = ichprog.explain(model, scan, task=tasks, method=list(METHODS), brain="given")
            yield None
    finally:
        _keep(maps, {key: saliency.grid_map for key, saliency in found.items()})


def medcam_explain(scan: str, maps: str, *, tried: bool = False) -> Iterator[Any]:
    """The same by medcam, which takes a network of one output and injects one method into it.

    It runs whatever it injected twice when that is first called, as a trial; `tried` does this beforehand.
    """
    from medcam import medcam

    from support import reference_pipeline

    grid, found = reference_pipeline.grid(Path(scan))[None], {}
    networks = {task: _one_task(task, grid) for task in TASKS}

    def inject(task: str, method: str) -> Any:
        network, label = networks[task]
        return medcam.inject(network.requires_grad_(), backend=METHODS[method], layer=LAYER, label=label)

    injected = {key: inject(*key) for key in product(TASKS, METHODS)} if tried else {}
    for network in injected.values():
        network.test_run(grid.clone().requires_grad_())
    yield None
    try:
        while True:
            grid = reference_pipeline.grid(Path(scan))[None]
            for key in product(TASKS, METHODS):
                network = injected.get(key) or inject(*key)
                network(grid.clone().requires_grad_())
                found[key] = network.get_attention_map()[0, 0]
            yield None
    finally:
        _keep(maps, found)


def brute_force_explain(scan: str, maps: str) -> Iterator[Any]:
    """The same from the definitions: the network rebuilt with the guided rule, and a layer's gradient."""
    import torch
    from torch.nn import functional

    from support import reference_pipeline

    yield None
    grid, found = reference_pipeline.grid(Path(scan))[None], {}
    for task in TASKS:
        network, label = _one_task(task, grid)
        kept = []
        hook = network.get_submodule(LAYER).register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out))
        values = grid.clone().requires_grad_()
        score = network(values)[0, label]
        hook.remove()
        (gradient,) = torch.autograd.grad(score, kept)
        coarse = (gradient.mean((2, 3, 4), keepdim=True) * kept[0]).sum(1, keepdim=True).detach()
        _with_guided_relus(network)
        network(values)[0, label].backward()
        upsampled = functional.interpolate(coarse.clamp(min=0), grid.shape[2:], mode="trilinear")
        of_methods = (values.grad, coarse, values.grad * upsampled)
        found |= {(task, m): one[0, 0].numpy() for m, one in zip(METHODS, of_methods, strict=True)}
    _keep(maps, found)
    yield None


def ichprog_train(scans: str, precision: str, folder: str) -> Iterator[Any]:
    """The mean loss of a step over the scans of a folder."""
    import torch
    from our_training import passes

    from ichprog.train import allocator

    paths = sorted(Path(scans).iterdir())
    run_pass = passes(paths, _targets(len(paths)), Path(folder), precision=precision, batch=len(paths))
    yield None
    with allocator.kept(torch.device("cpu")) as keep_memory:  # as a training of many passes has it
        while True:
            loss = run_pass()
            keep_memory()
            yield loss


def published_train(scans: str) -> Iterator[Any]:
    """The same the published way."""
    from published_training import Training

    paths = sorted(Path(scans).iterdir())
    training = Training(paths, _targets(len(paths)), batch=len(paths))
    yield None
    while True:
        yield training.run_pass()


def _targets(patients: int) -> Any:
    """Of the four logits, for every second patient a poor outcome and a low GCS, for the others none and a high age."""
    import torch

    return torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1]]).repeat(patients // 2, 1)


def _one_task(task: str, grid: Any) -> tuple[Any, int]:
    """The published network with one task alone, and which of its outputs is the log-odds of the task's last label.

    Of ordered labels that is the lowest, since their probabilities are made monotone.
    """
    import torch

    from ichprog import zoo

    from support import reference_pipeline

    network = reference_pipeline.network(zoo.DEFAULT, SEED)
    head = network.get_submodule(TASKS[task])
    network.forward = lambda grid: head(network.feature_extractor.features(grid))
    with torch.no_grad():
        return network, int(network(grid)[0].argmin())


def _with_guided_relus(network: Any) -> None:
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


def _keep(path: str, maps: dict[tuple[str, str], Any]) -> None:
    np.savez(path, **{" ".join(key): values for key, values in maps.items()})


def main() -> None:
    """Does what is asked for, and keeps what others print away from the answers."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for answer in globals()[sys.argv[1]](**json.loads(sys.argv[2])):
        print(json.dumps(answer), file=answers, flush=True)
        if not sys.stdin.readline():
            break


if __name__ == "__main__":
    main()
