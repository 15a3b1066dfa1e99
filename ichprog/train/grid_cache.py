"""Cache of prepared grids: each scan is read, checked, brain-extracted and resampled once, for every later run."""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichprog import preprocessing
from ichprog import scan as scan_package
from ichprog.errors import CohortError, RunError, ScanError
from ichprog.io import atomic_write, file_lock
from ichprog.parallel import parallel_map
from ichprog.spec import InputSpec

if TYPE_CHECKING:
    from ichprog.scan.brain import Brain

_CACHE_VERSION = 1  # increase if the same scan and input contract give another grid


def prepare(
    scans: Sequence[Path],
    contract: InputSpec,
    *,
    brain: "Brain",
    folder: Path,
    workers: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Return cached grids of scans, preparing those that are missing.

    Args:
        scans: Paths that `scan.read` accepts.
        contract: The model's input contract.
        brain: Brain mode, extractor or mask, as `model.resolve_brain` returns it.
        folder: Cache folder. Each grid is a .npy file with `(D, H, W)` float32.
        workers: Number of processes.
        progress: Whether a progress bar is shown on standard error.

    Returns:
        One file for each scan.

    Raises:
        CohortError: Scans cannot be used; the message names each with its problem.
        RunError: The disk is full or the folder cannot be written.

    Example:
        ```python
        files = prepare(["1.nii.gz"], spec.input, brain="auto", folder=Path("grids"), workers=4)
        ```
    """
    if not contract.brain_only:
        brain = "given"
    scan_package.validate_brain_mode(brain)
    unchecked = {k: v for k, v in asdict(contract).items() if k != "expected_ranges"}
    settings = json.dumps([_CACHE_VERSION, scan_package.brain_key(brain), unchecked])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{_cache_key(scan, settings)}.npy" for scan in scans]
        if all(file.is_file() for file in files):  # a shared cache may be read-only
            return files
        # A second process waits here and then reuses the cached grids.
        with file_lock(folder / f".{hashlib.sha256(settings.encode()).hexdigest()[:16]}.lock"):
            missing = {file: scan for file, scan in zip(files, scans, strict=True) if not file.is_file()}
            if missing:
                _prepare_missing(missing, contract, brain, folder, workers, progress)
    except OSError as error:
        remedy = "Free some space" if error.errno == errno.ENOSPC else "Grant write permission"
        raise RunError(
            f"Prepared grids cannot be cached in {folder}: {error}. {remedy}, or choose another folder with "
            "`cache_dir` or the environment variable ICHPROG_CACHE."
        ) from error
    return files


def _prepare_missing(
    missing: dict[Path, Path], contract: InputSpec, brain: "Brain", folder: Path, workers: int, progress: bool
) -> None:
    from tqdm import tqdm

    for partial_file in folder.glob(".*.npy"):  # left by a process that was killed
        if folder / partial_file.name.partition("-")[2] in missing:
            partial_file.unlink(missing_ok=True)
    needed = len(missing) * (int(np.prod(contract.shape)) * 4 + 128)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: {len(missing)} prepared grids need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. Free "
            "some space, or choose another folder with `cache_dir` or the environment variable ICHPROG_CACHE."
        )
    prepare_one = partial(_prepare_one, contract=contract, brain=brain)
    with tqdm(total=len(missing), desc="grids", unit="scan", file=sys.stderr, disable=not progress) as bar:
        problems = []
        for problem in parallel_map(prepare_one, list(missing.items()), workers=workers):
            bar.update()
            if problem:
                problems.append(problem)
    if problems:
        raise CohortError(
            f"{len(problems)} of {len(missing)} scans cannot be used; repair them or remove their patients from the "
            "cohort:\n" + "\n".join(problems)
        )


def _prepare_one(item: tuple[Path, Path], *, contract: InputSpec, brain: "Brain") -> str | None:
    """Prepare one grid, or return the problem of its scan."""
    file, source = item
    try:
        examined = scan_package.load(source, expected_ranges=contract.expected_ranges, brain=brain)
    except ScanError as error:
        return str(error)
    with atomic_write(file) as part, part.open("wb") as opened:
        np.save(opened, preprocessing.prepare(examined.hu, contract))
    return None


def _cache_key(scan: Path, settings: str) -> str:
    """Return a key that changes with the scan's files and with the settings."""
    files = sorted(p for p in scan.rglob("*") if p.is_file()) if scan.is_dir() else [scan] if scan.exists() else []
    state: list[Any] = [(str(f.relative_to(scan)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps([str(scan.resolve()), state, settings]).encode()).hexdigest()
