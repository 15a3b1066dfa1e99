"""Compare answers between versions of torch, MONAI, OpenVINO, NumPy and nibabel: `python benchmarks/drift.py`.

Two environments are made, with the lowest and with the newest allowed versions. In each, every embedded model and the
two published networks with seeded weights answer a seeded grid, and a seeded scan is read and prepared. The answers are
compared with those of `benchmarks/drift.json`, of the versions in `requirements.lock`: a probability may differ by 1e-4
in float32, and by 2e-2 from float32 in bfloat16, if the processor has it. `--here` checks the environment of this
process alone, and `--write` renews the file. `--python 3.13` makes the environments with another Python.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).with_suffix(".json")
PACKAGES = ("torch", "monai", "openvino", "numpy", "nibabel")
PUBLISHED = ("densenet121.prognosis_gcs3_age", "perez2023.prognosis")  # the two architectures
CASES = (("torch", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a probability


def seeded(name: str, folder: Path) -> str:
    """Write a published model with weights drawn by NumPy, whose numbers no version changes; return its name."""
    import torch
    from safetensors.torch import save_file

    from ichprog import networks, zoo
    from ichprog.spec import Weights

    spec = dataclasses.replace(
        zoo.find(name), weights=Weights(None, None, "", "safetensors", {}, {}), golden_output=None
    )
    random = np.random.default_rng(0)
    state = networks.build(spec).state_dict()
    for key, old in sorted(state.items()):
        if not old.is_floating_point() or key.endswith("running_mean"):
            continue
        is_scale = key.endswith("running_var") or (old.ndim == 1 and key.endswith("weight"))
        fan_in = max(int(np.prod(old.shape[1:])), 1)
        drawn = random.standard_normal(tuple(old.shape)) * (0.05 if old.ndim == 1 else (2 / fan_in) ** 0.5)
        state[key] = torch.from_numpy((abs(drawn) + 1 if is_scale else drawn).astype(np.float32))
    target = folder / name
    target.mkdir()
    (target / "config.json").write_text(json.dumps(spec.to_dict()))
    save_file(state, target / "fold0.safetensors")
    return f"local-dir:{target}"


def answers() -> Iterator[tuple[str, list[float]]]:
    """Yield the name and the numbers of each answer in this environment."""
    import nibabel as nib

    import ichprog
    from ichprog import preprocessing, zoo
    from ichprog.runtime.openvino.backend import supports_bfloat16
    from ichprog.scan import read

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {spec.name: spec.name for spec in zoo.list_models() if spec.weights.repo is None}
        models |= {name: seeded(name, folder) for name in PUBLISHED}
        hu = np.random.default_rng(1).integers(20, 60, (96, 96, 24)).astype(np.int16)
        nib.Nifti1Image(hu, np.diag([-2.2, -2.2, 6.0, 1.0])).to_filename(folder / "scan.nii.gz")
        scan = read(folder / "scan.nii.gz")
        grid = preprocessing.prepare(scan.hu, zoo.find(zoo.DEFAULT).input)
        yield (
            "reading and preprocessing, float32",
            [float(grid.mean()), float(grid.std()), float(grid.flat[::997].sum())],
        )
        for name, loaded in models.items():
            for runtime, precision in CASES:
                if precision == "bfloat16" and not supports_bfloat16():
                    continue
                model = ichprog.load_model(loaded, runtime=runtime, precision=precision, cache_dir=folder / "cache")
                seeds = np.random.default_rng(2).random((1, *model.spec.input.shape), np.float32)
                found = [
                    output.probabilities.ravel() for fold in model.predict_grids(seeds) for output in fold.values()
                ]
                yield f"{name}, {runtime}, {precision}", [float(number) for number in np.concatenate(found)]


def check(found: dict[str, list[float]], reference: dict[str, list[float]]) -> bool:
    """Print the largest difference of each answer, and return whether all are within their tolerance."""
    is_fine = True
    print("| answer | numbers | largest difference | allowed |\n| --- | --- | --- | --- |")
    for name, numbers in found.items():
        allowed = TOLERANCE[name.rpartition(", ")[2]]
        expected = reference[name.replace("bfloat16", "float32")]
        difference = float(np.abs(np.subtract(numbers, expected)).max())
        is_fine &= difference <= allowed  # false for a number that is not finite
        print(f"| {name} | {len(numbers)} | {difference:.1e} | {allowed:g} |", flush=True)
    return is_fine


def environment(folder: Path, resolution: str, python: str) -> Path:
    """Make an environment with the lowest or the newest allowed versions, and return its interpreter."""
    tools = folder / "tools"
    if not tools.exists():
        subprocess.run([sys.executable, "-m", "venv", tools], check=True)
        subprocess.run([tools / "bin" / "pip", "install", "-q", "uv"], check=True)
    uv, target = tools / "bin" / "uv", folder / resolution
    subprocess.run([uv, "venv", "-q", "--python", python, target], check=True)
    installed = [uv, "pip", "install", "-q", "--python", target / "bin" / "python", "--resolution", resolution]
    subprocess.run([*installed, "-e", ROOT], check=True)
    return target / "bin" / "python"


def main() -> int:
    """Check one environment or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="check the environment of this process")
    parser.add_argument("--write", action="store_true", help="write the answers of this process as the reference")
    parser.add_argument("--python", default=sys.executable, help="Python of the environments")
    args = parser.parse_args()
    if args.here or args.write:
        versions: dict[str, Any] = {name: version(name).partition("+")[0] for name in PACKAGES}
        print(
            f"Python {platform.python_version()}, " + ", ".join(f"{name} {number}" for name, number in versions.items())
        )
        found = dict(answers())
        if args.write:
            kept = {name: numbers for name, numbers in found.items() if name.endswith("float32")}
            REFERENCE.write_text(json.dumps({"versions": versions, "answers": kept}, indent=1) + "\n")
        return 0 if check(found, json.loads(REFERENCE.read_text())["answers"]) else 1
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for resolution in ("lowest-direct", "highest"):
            print(f"\n{resolution}", flush=True)
            python = environment(Path(folder), resolution, args.python)
            codes.append(subprocess.run([python, __file__, "--here"], check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
