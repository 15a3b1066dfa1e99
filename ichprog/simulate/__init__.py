"""Simulated patients with an intracranial haemorrhage: scans, masks, labels and their true probabilities.

`realism` holds the options. `population` draws patients and their outcomes. `anatomy` deforms a template into a head,
`haemorrhage` adds blood, and `structures` adds what is taken for blood. `scanner` acquires the scan, and `dicom` writes
it as a series. `insertion` adds blood to a given head. No real patient is involved, and results on simulated patients
show nothing about real ones.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.cohort import SIMULATION_RECORD
from ichprog.errors import InvalidValueError, RunError
from ichprog.io import atomic_write, file_lock, write_csv, write_json
from ichprog.parallel import parallel_map
from ichprog.simulate.anatomy import Individual
from ichprog.simulate.haemorrhage import MASK_VALUES, Shape, draw_haemorrhage
from ichprog.simulate.insertion import add_haemorrhage
from ichprog.simulate.population import Person, draw_person
from ichprog.simulate.realism import PRESETS, Realism, find_realism
from ichprog.simulate.scanner import MATRIX, SimulatedScan, acquire

__all__ = [
    "MASK_VALUES",
    "MATRIX",
    "PRESETS",
    "Patient",
    "Person",
    "Realism",
    "SimulatedScan",
    "add_haemorrhage",
    "find_realism",
    "simulate",
]

_VERSION = 2  # increase whenever a seed gives other patients


@dataclass(frozen=True)
class Patient:
    """Simulate one patient. The same seed and number give the same patient in any cohort.

    Attributes:
        seed: The cohort's seed.
        number: The patient's number, from 0.
        preset: "plain", "realistic", or options.

    Raises:
        UnknownNameError: There is no such preset.

    Examples:
        >>> patient = Patient(seed=0, number=3)
        >>> patient.name, 3 <= patient.person.gcs <= 15
        ('sim0-00003', True)
    """

    seed: int
    number: int
    preset: str | Realism = "realistic"

    def __post_init__(self) -> None:
        find_realism(self.preset)

    @property
    def realism(self) -> Realism:
        """Return the options of the preset."""
        return find_realism(self.preset)

    @property
    def name(self) -> str:
        """Return the patient's name in tables and file names."""
        return f"sim{self.seed}-{self.number:05d}"

    @cached_property
    def person(self) -> Person:
        """Return age, haemorrhage, GCS and outcome."""
        return draw_person(self._random[0], self.realism)

    @cached_property
    def shape(self) -> Shape:
        """Return the haemorrhage in the patient's head."""
        return self._head[1]

    def scan(self, *, skull: bool = False, matrix: int = MATRIX) -> SimulatedScan:
        """Acquire the scan.

        Args:
            skull: Whether the whole head is visible; by default, voxels outside the skull's inside are 0.
            matrix: Number of pixels along an edge of a slice.

        Raises:
            IchprogError: nilearn, which provides the template, is not installed.
        """
        individual, shape = self._head
        random = np.random.default_rng([self.seed, self.number, 2])
        return acquire(individual, shape, random, skull=skull, realism=self.realism, matrix=matrix)

    def save(
        self, folder: Path, *, skull: bool = False, dicom: bool = False, matrix: int = MATRIX
    ) -> tuple[Path, Path]:
        """Acquire the scan and write it with the mask of the blood, atomically.

        Args:
            folder: Parent folder of `scans/` and `masks/`.
            skull: Whether the whole head is visible.
            dicom: Whether to write a DICOM series instead of a NIfTI file.
            matrix: Number of pixels along an edge of a slice.

        Returns:
            The paths of the scan and of the mask.
        """
        import nibabel as nib

        from ichprog.simulate.dicom import save_series

        acquired = self.scan(skull=skull, matrix=matrix)
        scan, mask = self.paths(folder, dicom=dicom)
        for path in (scan, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(mask) as part:
            nib.save(_image(acquired.blood, acquired.affine), part)
        if dicom:
            save_series(acquired, scan, self.name, self.person.age, self.person.sex)
        else:
            with atomic_write(scan) as part:
                nib.save(_image(acquired.hu, acquired.affine), part)
        return scan, mask

    def paths(self, folder: Path, *, dicom: bool = False) -> tuple[Path, Path]:
        """Return the paths that `save` writes: the scan and the mask."""
        scan = folder / "scans" / (self.name if dicom else f"{self.name}.nii.gz")
        return scan, folder / "masks" / f"{self.name}.nii.gz"

    def columns(self) -> dict[str, Any]:
        """Return labels and clinical columns, as a clinic would record them.

        Without haemorrhage, the outcome, the GCS and the scores are None, which tables show as blank.
        """
        person = self.person
        bleeds = person.bleeds
        return {
            "haemorrhage": int(bleeds),
            "poor_outcome": int(person.poor) if bleeds else None,
            "gcs": person.gcs if bleeds else None,
            "age": person.age,
            "sex": person.sex,
            "location": person.site,
            "dead_30_days": int(person.dead) if bleeds else None,
            "cognitive_impairment": int(person.impaired),
            "ich_score": person.ich_score() if bleeds else None,
            "func_score": person.func_score() if bleeds else None,
        }

    def truth(self) -> dict[str, Any]:
        """Return the causes of the scan and the true probabilities, which a clinic could not know."""
        person = self.person
        values: dict[str, Any] = {"haemorrhage": int(person.bleeds), "kind": person.kind, "location": person.site}
        values |= {"side": person.side, "infratentorial": int(person.infratentorial), "volume_ml": person.volume_ml}
        values |= {"ventricular": person.ventricular, "midline_shift_mm": round(self.shape.midline_shift_mm(), 2)}
        probabilities = {n: None if value is None else round(value, 5) for n, value in person.truth().items()}
        return {**values, **person.marks, **probabilities}

    @property
    def _random(self) -> list[np.random.Generator]:
        return [np.random.default_rng([self.seed, self.number, part]) for part in range(2)]

    @cached_property
    def _head(self) -> tuple[Individual, Shape]:
        person, random = self.person, self._random[1]
        individual = Individual(person.marks, random, self.realism.fill_mm)
        return individual, draw_haemorrhage(person, individual, random, self.realism)


def simulate(
    output: str | Path,
    *,
    patients: int = 200,
    seed: int = 0,
    preset: str | Realism = "realistic",
    skull: bool = False,
    dicom: bool = False,
    matrix: int = MATRIX,
    workers: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Path:
    """Simulate a cohort into a folder. Existing patients are reused, so an interrupted run can be resumed.

    The folder receives `cohort.csv` (patient, scan, labels, clinical columns and mask), `truth.csv` (causes, true
    probabilities of the labels, and the volume of each kind of blood in the mask), `scans/`, and `masks/` with the
    values of `MASK_VALUES`: 1 parenchymal, 2 ventricular, 3 subarachnoid, 4 subdural or epidural haemorrhage.

    Args:
        output: The folder.
        patients: Number of patients.
        seed: Random seed. A larger cohort of the same seed begins with the smaller one.
        preset: "realistic" shows what is taken for blood on real heads, and a part of the patients have no
            haemorrhage. "plain" is simpler: every patient has a haemorrhage. Or options.
        skull: Whether whole heads are visible instead of the brain alone.
        dicom: Whether to write DICOM series instead of NIfTI files.
        matrix: Number of pixels along an edge of a slice. With as many as the grid of a model has cells, scans are
            several times faster to simulate, and on that grid they nearly equal full scans.
        workers: Number of processes; the files do not depend on it.
        progress: Called with the number of finished patients after each patient.

    Returns:
        The path of `cohort.csv`.

    Raises:
        InvalidValueError: `patients` or `workers` is less than 1, `seed` is negative, or `matrix` is less than 16.
        UnknownNameError: There is no such preset.
        RunError: The folder holds a cohort of another seed or kind, or another process writes to it.
        IchprogError: nilearn is not installed.
        OSError: The folder cannot be written.

    Examples:
        ```python
        cohort = simulate("patients", patients=20, seed=1)
        ```
    """
    counts = (("patients", patients, 1), ("seed", seed, 0), ("matrix", matrix, 16), ("workers", workers, 1))
    for name, value, least in counts:
        if value < least:
            raise InvalidValueError(name, value, f"a whole number of {least} or more")
    folder = Path(output)
    realism = find_realism(preset)
    kind = {"simulation": _VERSION, "preset": realism.describe(), "seed": seed, "skull": skull, "dicom": dicom}
    kind |= {"matrix": matrix} if matrix != MATRIX else {}
    everyone = [Patient(seed, number, realism) for number in range(patients)]
    with _lock_folder(folder, kind):
        missing = [p for p in everyone if not all(path.exists() for path in p.paths(folder, dicom=dicom))]
        done = patients - len(missing)
        save = partial(Patient.save, folder=folder, skull=skull, dicom=dicom, matrix=matrix)
        for _ in parallel_map(save, missing, workers=workers):
            done += 1
            if progress:
                progress(done)
    masks = [p.paths(folder, dicom=dicom)[1] for p in everyone]
    volumes = parallel_map(_read_volumes, masks, workers=workers)
    truths = [{"patient": p.name, **p.truth(), **ml} for p, ml in zip(everyone, volumes, strict=True)]
    write_csv(folder / "truth.csv", list(truths[0]), truths)
    relative = ([path.as_posix() for path in p.paths(Path(), dicom=dicom)] for p in everyone)
    rows = [
        {"patient": p.name, "scan": scan, **p.columns(), "mask": mask}
        for p, (scan, mask) in zip(everyone, relative, strict=True)
    ]
    write_csv(folder / "cohort.csv", list(rows[0]), rows)
    return folder / "cohort.csv"


def _read_volumes(mask: Path) -> dict[str, float]:
    """Return the volume of each kind of haemorrhage in a mask, in mL."""
    import nibabel as nib

    image: Any = nib.load(mask)
    voxel_ml = float(np.prod(image.header.get_zooms()[:3])) / 1000
    voxels = np.bincount(np.asarray(image.dataobj).ravel(), minlength=len(MASK_VALUES) + 1)
    return {f"{kind}_ml": round(float(voxels[value]) * voxel_ml, 3) for kind, value in MASK_VALUES.items()}


@contextmanager
def _lock_folder(folder: Path, kind: dict[str, Any]) -> Iterator[None]:
    """Lock the folder for this cohort within a context, or refuse a folder with another cohort."""
    try:
        with file_lock(folder / ".lock", timeout_s=0):
            stamp = folder / SIMULATION_RECORD
            if not stamp.exists():
                if (folder / "cohort.csv").exists():
                    raise RunError(f"{folder}: holds a cohort that was not simulated here. Choose another folder.")
                write_json(stamp, kind)
            try:
                existing = json.loads(stamp.read_text(encoding="utf-8"))
            except ValueError:
                existing = {}
            if existing != kind:
                raise RunError(
                    f"{folder}: holds simulated patients of {existing}, requested are {kind}. Choose another folder."
                )
            for partial_path in folder.glob("*/.*"):  # left by a process that was killed
                shutil.rmtree(partial_path) if partial_path.is_dir() else partial_path.unlink()
            yield
    except TimeoutError:
        raise RunError(f"{folder}: another process simulates into it. Wait for it, or choose another folder.") from None


def _image(values: np.ndarray, affine: np.ndarray) -> Any:
    import nibabel as nib

    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"simulated, no patient"
    return image
