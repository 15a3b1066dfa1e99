"""Cache of prepared grids: each scan is read, checked, brain-extracted and resampled once, for every later run."""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

    Examples:
        ```python
        files = prepare(["1.nii.gz"], spec.input, brain="auto", folder=Path("grids"), workers=4)
        ```
    """
    if not contract.brain_only:
        brain = "given"
    scan_package.validate_brain_mode(brain)
    unchecked = {k: v for k, v in asdict(contract).items() if k != "expected_ranges"}
    settings = json.dumps([_CACHE_VERSION, scan_package.brain_key(brain), unchecked])
    with _explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{_cache_key(scan, settings)}.npy" for scan in scans]
        if all(file.is_file() for file in files):  # a shared cache may be read-only
            return files
        # A second process waits here and then reuses the cached grids.
        with file_lock(folder / f".{hashlib.sha256(settings.encode()).hexdigest()[:16]}.lock"):
            missing = {file: scan for file, scan in zip(files, scans, strict=True) if not file.is_file()}
            if missing:
                _prepare_missing(missing, contract, brain, folder, workers, progress)
    return files


class RegionSource(NamedTuple):
    """The source of the true regions of one patient.

    Attributes:
        scan: Path of the scan.
        mask: Path of the mask in the space of the scan, or None.
        slices: Numbers of the slices that hold a region, in the order of the scan file; None if they are unknown.
    """

    scan: Path
    mask: Path | None
    slices: tuple[int, ...] | None


def prepare_regions(
    sources: Sequence[RegionSource], contract: InputSpec, regions: int, *, folder: Path, workers: int = 1
) -> list[Path]:
    """Return cached regions of patients, preparing those that are missing.

    Args:
        sources: The source of each patient.
        contract: Input contract of the model.
        regions: Number of regions.
        folder: Cache folder. Each file is a .npy file with float16 fractions that broadcast to `(R, D, H, W)`, NaN if
            unknown, and -1 in a slice that is known to hold a region in unknown cells.
        workers: Number of processes.

    Returns:
        One file for each patient.

    Raises:
        CohortError: A scan or a mask cannot be used, or a slice number does not exist; the message names each.
        RunError: The disk is full or the folder cannot be written.
    """
    settings = json.dumps([_CACHE_VERSION, regions, asdict(replace(contract, expected_ranges={}))])
    files = []
    with _explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            mask = _cache_key(source.mask, settings) if source.mask else ""
            key = hashlib.sha256(json.dumps([_cache_key(source.scan, settings), mask, source.slices]).encode())
            files.append(folder / f"regions-{key.hexdigest()}.npy")
        missing = {file: source for file, source in zip(files, sources, strict=True) if not file.is_file()}
        prepare_one = partial(_prepare_regions_of, contract=contract, regions=regions)
        problems = list(filter(None, parallel_map(prepare_one, list(missing.items()), workers=workers)))
    if problems:
        raise CohortError("\n  ".join([f"The regions of {len(problems)} patients cannot be used:", *problems]))
    return files


@contextmanager
def _explain_os_errors(folder: Path) -> Iterator[None]:
    """Convert errors of the file system within a context to a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = "Free some space" if error.errno == errno.ENOSPC else "Grant write permission"
        raise RunError(
            f"Prepared grids cannot be cached in {folder}: {error}. {remedy}, or choose another folder with "
            "`cache_dir` or the environment variable ICHPROG_CACHE."
        ) from error


def _prepare_regions_of(item: tuple[Path, RegionSource], *, contract: InputSpec, regions: int) -> str | None:
    """Prepare the regions of one patient, or return the problem of its scan, mask or slices."""
    file, source = item
    try:
        fractions = _region_fractions(source, contract, regions)
    except ScanError as error:
        return str(error)
    with atomic_write(file) as part, part.open("wb") as opened:
        np.save(opened, fractions.astype(np.float16))
    return None


def _region_fractions(source: RegionSource, contract: InputSpec, regions: int) -> np.ndarray:
    """Return the fractions of regions, an array that broadcasts to `(R, D, H, W)`."""
    if source.mask is None and source.slices is None:
        return np.full((regions, 1, 1, 1), np.nan)
    if source.mask is None and not source.slices:
        return np.zeros((regions, 1, 1, 1))
    scan = scan_package.read(source.scan)
    if source.mask is not None:
        mask = scan_package.load_regions(source.mask, scan)
        if mask.max() > regions:
            raise ScanError(
                f"{source.mask}: the mask has region {mask.max()}; the task has regions 1 to {regions}.",
                code="unknown-region",
            )
        return preprocessing.prepare_regions(mask, regions, contract)
    count = scan.hu.shape[2]
    wrong = [number for number in source.slices or () if not 0 <= number < count]
    if wrong:
        raise ScanError(f"{source.scan}: slice {wrong[0]} does not exist; there are {count}.", code="unknown-slice")
    holds = np.zeros(count, np.float32)
    holds[list(source.slices or ())] = 1
    in_scan = np.broadcast_to(scan_package.source_slices(holds, scan.source_affine), (1, 1, count))
    column = replace(contract, shape=(contract.shape[0], 1, 1))
    fractions = preprocessing.prepare_regions(in_scan, 1, column)[0]  # of each slice of the grid
    return np.where(np.broadcast_to(fractions, (regions, *fractions.shape)) > 0, -1.0, 0.0)


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
