"""Prepared grids on disk: each scan is read, checked, freed of its skull and averaged once, for every later run."""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ichprog import preprocessing
from ichprog import scan as scan_package
from ichprog.errors import CohortError, RunError, ScanError
from ichprog.io import atomic_write
from ichprog.parallel import parallel_map
from ichprog.scan import BrainMode
from ichprog.spec import InputSpec

_RECIPE = 1  # raised when the same scan and contract would give another grid


def prepare(
    scans: Sequence[Path],
    contract: InputSpec,
    *,
    brain: BrainMode,
    folder: Path,
    workers: int = 1,
    progress: bool = False,
) -> list[Path]:
    """The grids of scans, made where they are not there yet.

    Args:
        scans: Paths that `scan.read` takes.
        contract: The model's input contract.
        brain: How the brain is found.
        folder: Where grids are kept, each as `(D, H, W)` float32 in a .npy file.
        workers: Processes that prepare side by side.
        progress: Whether a bar is shown on standard error.

    Returns:
        One file for each scan.

    Raises:
        CohortError: Scans cannot be read or used; it says what is wrong with each.
        RunError: The disk has no room for them.
    """
    from filelock import FileLock

    mode = brain if contract.brain_only else "given"
    scan_package.refuse_unknown_mode(mode)
    recipe = json.dumps([_RECIPE, mode, {k: v for k, v in asdict(contract).items() if k != "expected_ranges"}])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{_key(scan, recipe)}.npy" for scan in scans]
        if all(file.is_file() for file in files):  # a cache that many share may be read-only
            return files
        # Whoever comes second finds the work done, be it another process of this run or another run.
        with FileLock(folder / f".{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.lock"):
            missing = {file: scan for file, scan in zip(files, scans, strict=True) if not file.is_file()}
            _make(missing, contract, mode, folder, workers, progress)
    except OSError as error:
        raise RunError(
            f"prepared grids cannot be kept in {folder}: {error}. "
            + ("Make room there" if error.errno == errno.ENOSPC else "Give the right to write there")
            + ", or choose another folder by `cache_dir` or the environment variable ICHPROG_CACHE."
        ) from error
    return files


def _make(
    missing: dict[Path, Path], contract: InputSpec, mode: BrainMode, folder: Path, workers: int, progress: bool
) -> None:
    from tqdm import tqdm

    if not missing:
        return
    for left in folder.glob(".*.npy"):  # by a process that was killed
        if folder / left.name.partition("-")[2] in missing:
            left.unlink(missing_ok=True)
    needed = len(missing) * (int(np.prod(contract.shape)) * 4 + 128)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: {len(missing)} prepared grids need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. Make "
            "room there, or choose another folder by `cache_dir` or the environment variable ICHPROG_CACHE."
        )
    work = partial(_prepared, contract=contract, mode=mode)
    with tqdm(total=len(missing), desc="grids", unit="scan", file=sys.stderr, disable=not progress) as bar:
        problems = []
        for problem in parallel_map(work, list(missing.items()), workers=workers):
            bar.update()
            if problem:
                problems.append(problem)
    if problems:
        raise CohortError(
            f"{len(problems)} of {len(missing)} scans cannot be used; repair them or take their patients out of the "
            "cohort:\n" + "\n".join(problems)
        )


def _prepared(item: tuple[Path, Path], *, contract: InputSpec, mode: BrainMode) -> str | None:
    """Makes one grid; tells what is wrong where that cannot be done."""
    file, source = item
    try:
        examined = scan_package.examine(source, expected_ranges=contract.expected_ranges, brain=mode)
    except ScanError as error:
        return str(error)
    with atomic_write(file) as part, part.open("wb") as opened:
        np.save(opened, preprocessing.prepare(examined.hu, contract))
    return None


def _key(scan: Path, recipe: str) -> str:
    """A name that changes with the scan's files and with the recipe."""
    files = sorted(p for p in scan.rglob("*") if p.is_file()) if scan.is_dir() else [scan] if scan.exists() else []
    seen: list[Any] = [(str(f.relative_to(scan)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps([str(scan.resolve()), seen, recipe]).encode()).hexdigest()
