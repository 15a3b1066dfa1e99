"""What the suites stand on: seeded weights in a cache, simulated scans, and a peer timed in turns with what is ours.

`pytest benchmarks` runs the suites but for what takes very long, `pytest benchmarks/test_prepare.py` one of them,
`python benchmarks/report.py` all of all and writes `docs/speed.md`. They need
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

PIXEL, EXTENT, THINNEST = 0.47, 160.0, 128  # mm in the plane, mm from foot to head, the most slices a scan is made of
HALF_FIELD = 512 * PIXEL / 2
FILES = 8  # different scans of a cohort; more of them are links


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="Times that each is measured, instead of what its suite says.")


@pytest.fixture(scope="session", autouse=True)
def bytecode() -> Iterator[None]:
    """What is timed keeps its bytecode from process to process, as all that pip installs has it from the beginning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own with the default model's seeded weights, and no way to anything beyond the loopback."""
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    repository = zoo.find(zoo.DEFAULT).weights
    reference_pipeline.save(zoo.DEFAULT, root / str(repository.repo), SEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICHPROG_CACHE", str(cache))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        with HubServer(root, str(repository.revision)) as server:
            patch.setenv("HF_ENDPOINT", server.url)
            process.run(ICHPROG, "fetch", zoo.DEFAULT)
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        yield cache


@pytest.fixture(scope="session")
def anatomy() -> phantoms.Head:
    """A simulated head in 512 x 512 pixels and thin slices, without blood."""
    low, high = (-HALF_FIELD, -HALF_FIELD, -76.0), (HALF_FIELD, HALF_FIELD, EXTENT - 76.0)
    return phantoms.head((PIXEL, PIXEL, EXTENT / THINNEST), low=low, high=high)


@pytest.fixture(scope="session")
def head(anatomy: phantoms.Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated whole head, 512 x 512 x 32, with a haematoma."""
    path = tmp_path_factory.mktemp("head") / "head.nii.gz"
    return _write(path, _thick(_bled(anatomy, 0), 32))


@pytest.fixture(scope="session")
def scan(anatomy: phantoms.Head, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A simulated brain-only scan of so many slices, 512 x 512 pixels each, with a haematoma."""
    folder = tmp_path_factory.mktemp("scan")

    def make(slices: int) -> Path:
        path = folder / f"{slices}.nii.gz"
        return path if path.exists() else _write(path, _thick(_bled(anatomy, 0) * anatomy.brain, slices))

    return make


@pytest.fixture(scope="session")
def cohort(anatomy: phantoms.Head, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder of so many simulated brain-only scans, 512 x 512 x 32: links to eight with different haematomas."""
    folder = tmp_path_factory.mktemp("cohort")
    files: list[Path] = []

    def make(scans: int) -> Path:
        for number in range(len(files), min(scans, FILES)):
            hu = _thick(_bled(anatomy, number) * anatomy.brain, 32)
            files.append(_write(folder / f"{number}.nii.gz", hu))
        links = folder / str(scans)
        if not links.exists():
            links.mkdir()
            for number in range(scans):
                (links / f"{number:04}.nii.gz").symlink_to(files[number % FILES])
        return links

    return make


def _bled(anatomy: phantoms.Head, number: int) -> np.ndarray:
    """The head's HU with a haematoma, another one for each number."""
    hu, random = anatomy.scan.hu.copy(), np.random.default_rng(number)
    centre = np.array(hu.shape) / 2 + random.uniform(-1, 1, 3) * (80, 100, 16)
    radius = random.uniform(12, 24)  # mm
    axes = np.ogrid[tuple(map(slice, hu.shape))]
    voxel = (PIXEL, PIXEL, EXTENT / THINNEST)
    inside = sum(((a - c) * mm / radius) ** 2 for a, c, mm in zip(axes, centre, voxel, strict=True)) <= 1
    hu[inside & anatomy.brain] = 65
    return hu


def _thick(hu: np.ndarray, slices: int) -> np.ndarray:
    """Slices as thick as their number asks for."""
    thick: np.ndarray = hu.reshape(*hu.shape[:2], slices, -1).mean(-1)
    return thick


def _write(path: Path, hu: np.ndarray) -> Path:
    affine = np.diag([-PIXEL, -PIXEL, EXTENT / hu.shape[2], 1.0])
    nib.Nifti1Image(hu.round().astype(np.int16), affine).to_filename(path)
    return path


class Timed(NamedTuple):
    """What one of two did, round by round."""

    seconds: list[float]
    answers: list[Any]


@pytest.fixture
def beside(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., tuple[Timed, Timed]]:
    """Times something of ours and its peer in turns, so that what else the machine does falls on both."""

    def alternate(
        ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int, warm_up: bool = True
    ) -> tuple[Timed, Timed]:
        first, second = Timed([], []), Timed([], [])

        def timed(work: Callable[[], Any], into: Timed) -> None:
            started = time.perf_counter()
            answer = work()
            into.seconds.append(time.perf_counter() - started)
            into.answers.append(answer)

        if warm_up:
            peer()
            ours()
        benchmark.pedantic(
            timed, args=(ours, first), setup=lambda: timed(peer, second), rounds=request.config.option.rounds or rounds
        )
        return first, second

    return alternate


@pytest.fixture
def figure(benchmark: Any) -> Callable[..., None]:
    """Puts a figure into the run's JSON, for `report.py`."""

    def add(
        what: str,
        unit: str,
        ours: list[float],
        peer: list[float] | None = None,
        *,
        beside: str = "",
        target: tuple[str, str, float] | None = None,
        **at: float,
    ) -> None:
        """Adds one.

        Args:
            what: What was measured, in words; once in its suite.
            unit: Of both.
            ours: Ours, round by round.
            peer: The peer's, where there is one.
            beside: What the peer is, in words.
            target: What is compared, "ratio" (ours : peer), "difference" (ours - peer) or "ours"; "at most" or "at
                least"; and the bound.
            **at: Where the figure lies on the axes of a plot.
        """
        figures = benchmark.extra_info.setdefault("figures", [])
        figures.append(
            {"what": what, "unit": unit, "ours": ours, "peer": peer, "beside": beside, "target": target, "at": at}
        )

    return add
