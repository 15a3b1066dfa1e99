"""Shared fixtures: seeded weights in a cache, simulated scans, and timing of ichprog and a peer in alternation.

`pytest benchmarks` runs all suites except the slow measurements. `pytest benchmarks/test_prepare.py` runs one suite.
`python benchmarks/report.py` runs everything and writes `docs/speed.md`. Install the requirements with
`pip install -e ".[study]" --group bench`.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest

from ichprog import zoo

import process
from support import phantoms, reference_pipeline
from support.hub_server import HubServer
from workloads import ICHPROG, SEED

PIXEL, EXTENT, THINNEST = 0.47, 160.0, 128  # in-plane mm, mm from foot to head, largest number of slices
HALF_FIELD = 512 * PIXEL / 2
FILES = 8  # different scans in a cohort; further ones are links to them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="Number of rounds, instead of the default of each suite.")


@pytest.fixture(scope="session", autouse=True)
def bytecode() -> Iterator[None]:
    """Let timed processes write bytecode, because packages installed by pip have bytecode too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a cache with the default model's seeded weights; no other host can be reached."""
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    repository = zoo.find(zoo.DEFAULT).weights
    reference_pipeline.save(zoo.DEFAULT, root / str(repository.repo), SEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICHPROG_CACHE", str(cache))
        patch.setenv("ICHPROG_BACKGROUND_COMPILE", "0")  # no process competes with the timed ones
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        with HubServer(root, str(repository.revision)) as server:
            patch.setenv("HF_ENDPOINT", server.url)
            process.run_command(ICHPROG, "fetch", zoo.DEFAULT)
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        yield cache


@pytest.fixture(scope="session")
def anatomy() -> phantoms.Head:
    """Return a simulated head of 512 x 512 pixels and thin slices, without blood."""
    low, high = (-HALF_FIELD, -HALF_FIELD, -76.0), (HALF_FIELD, HALF_FIELD, EXTENT - 76.0)
    return phantoms.head((PIXEL, PIXEL, EXTENT / THINNEST), low=low, high=high)


@pytest.fixture(scope="session")
def head(anatomy: phantoms.Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a simulated whole head, 512 x 512 x 32 voxels, with a haematoma."""
    path = tmp_path_factory.mktemp("head") / "head.nii.gz"
    return _write(path, _average_slices(_with_haematoma(anatomy, 0), 32))


@pytest.fixture(scope="session")
def scan(anatomy: phantoms.Head, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function from a number of slices to a simulated brain-only scan, 512 x 512 pixels per slice."""
    folder = tmp_path_factory.mktemp("scan")

    def make(slices: int) -> Path:
        path = folder / f"{slices}.nii.gz"
        return (
            path
            if path.exists()
            else _write(path, _average_slices(_with_haematoma(anatomy, 0) * anatomy.brain, slices))
        )

    return make


@pytest.fixture(scope="session")
def cohort(anatomy: phantoms.Head, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function from a number of scans to a folder of simulated brain-only scans, 512 x 512 x 32 voxels.

    The folder holds links to eight scans with different haematomas.
    """
    folder = tmp_path_factory.mktemp("cohort")
    files: list[Path] = []

    def make(scans: int) -> Path:
        for number in range(len(files), min(scans, FILES)):
            hu = _average_slices(_with_haematoma(anatomy, number) * anatomy.brain, 32)
            files.append(_write(folder / f"{number}.nii.gz", hu))
        links = folder / str(scans)
        if not links.exists():
            links.mkdir()
            for number in range(scans):
                (links / f"{number:04}.nii.gz").symlink_to(files[number % FILES])
        return links

    return make


def _with_haematoma(anatomy: phantoms.Head, number: int) -> np.ndarray:
    """Return the head's HU with a haematoma that depends on the number."""
    hu, random = anatomy.scan.hu.copy(), np.random.default_rng(number)
    centre = np.array(hu.shape) / 2 + random.uniform(-1, 1, 3) * (80, 100, 16)
    radius = random.uniform(12, 24)  # mm
    axes = np.ogrid[tuple(map(slice, hu.shape))]
    voxel = (PIXEL, PIXEL, EXTENT / THINNEST)
    inside = sum(((a - c) * mm / radius) ** 2 for a, c, mm in zip(axes, centre, voxel, strict=True)) <= 1
    hu[inside & anatomy.brain] = 65
    return hu


def _average_slices(hu: np.ndarray, slices: int) -> np.ndarray:
    """Average thin slices into the given number of thick ones."""
    averaged: np.ndarray = hu.reshape(*hu.shape[:2], slices, -1).mean(-1)
    return averaged


def _write(path: Path, hu: np.ndarray) -> Path:
    affine = np.diag([-PIXEL, -PIXEL, EXTENT / hu.shape[2], 1.0])
    nib.Nifti1Image(hu.round().astype(np.int16), affine).to_filename(path)
    return path


class Timing(NamedTuple):
    """The seconds and the results of one side, by round."""

    seconds: list[float]
    results: list[Any]


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., tuple[Timing, Timing]]:
    """Time ichprog and a peer in alternation, so that other load on the machine affects both."""

    def alternate(
        ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int, warm_up: bool = True
    ) -> tuple[Timing, Timing]:
        first, second = Timing([], []), Timing([], [])

        def run_timed(work: Callable[[], Any], timing: Timing) -> None:
            start = time.perf_counter()
            result = work()
            timing.seconds.append(time.perf_counter() - start)
            timing.results.append(result)

        if warm_up:
            peer()
            ours()
        benchmark.pedantic(
            run_timed,
            args=(ours, first),
            setup=lambda: run_timed(peer, second),
            rounds=request.config.option.rounds or rounds,
        )
        return first, second

    return alternate


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """Add a measurement to the JSON of the run, for `report.py`."""

    def add(
        what: str,
        unit: str,
        ours: list[float],
        peer: list[float] | None = None,
        *,
        peer_name: str = "",
        target: tuple[str, str, float] | None = None,
        **at: float,
    ) -> None:
        """Add one measurement.

        Args:
            what: Description, unique in its suite.
            unit: Unit of both sides.
            ours: Values of ichprog, by round.
            peer: Values of the peer, by round.
            peer_name: Description of the peer.
            target: The compared quantity: "ratio" (ours : peer), "difference" (ours - peer) or "ours"; then "at most"
                or "at least"; then the bound.
            **at: Position on the axes of a plot.
        """
        values = {"what": what, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name}
        benchmark.extra_info.setdefault("records", []).append(values | {"target": target, "at": at})

    return add
