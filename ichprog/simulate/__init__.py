"""Simulated patients with an intracranial haemorrhage: scans, masks, labels and the truth behind them.

`population` says who they are and why their outcome is what it is, `anatomy` bends a head out of a template,
`haemorrhage` puts blood into it, `scanner` takes the picture, `dicom` writes it as a series. No patient stands behind
any of it, and nothing that is shown on simulated patients is shown on real ones.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ichprog.errors import RunError
from ichprog.io import atomic_write
from ichprog.parallel import parallel_map
from ichprog.simulate.anatomy import Individual
from ichprog.simulate.haemorrhage import Shape, shape_of
from ichprog.simulate.population import Person, draw
from ichprog.simulate.scanner import Exposure, expose

__all__ = ["Exposure", "Patient", "Person", "simulate"]

_VERSION = 1  # of what a seed stands for: raised whenever any patient would come out differently


@dataclass(frozen=True)
class Patient:
    """One simulated patient; the same seed and number give the same one, in any cohort.

    Attributes:
        seed: The cohort's seed.
        number: The patient's number, from 0.
    """

    seed: int
    number: int

    @property
    def name(self) -> str:
        """The patient's name in tables and of files."""
        return f"sim{self.seed}-{self.number:05d}"

    @cached_property
    def person(self) -> Person:
        """Who it is."""
        return draw(self._random[0])

    @cached_property
    def shape(self) -> Shape:
        """The haemorrhage in its head."""
        return self._head[1]

    def scan(self, *, skull: bool = False) -> Exposure:
        """Takes the picture.

        Args:
            skull: Whether all of the head is seen; else what is not inside the skull is 0.

        Raises:
            RunError: nilearn, which brings the anatomy, is not installed.
        """
        individual, shape = self._head
        return expose(individual, shape, np.random.default_rng([self.seed, self.number, 2]), skull=skull)

    def save(self, folder: Path, *, skull: bool = False, dicom: bool = False) -> tuple[Path, Path]:
        """Takes the picture and writes it, with the mask of the blood; files appear whole or not at all.

        Args:
            folder: Where `scans/` and `masks/` are to be.
            skull: Whether all of the head is seen.
            dicom: A folder with a DICOM series instead of a NIfTI file.

        Returns:
            The paths of the scan and of the mask.
        """
        import nibabel as nib

        from ichprog.simulate.dicom import save_series

        exposure = self.scan(skull=skull)
        scan, mask = self.paths(folder, dicom=dicom)
        for path in (scan, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(mask) as part:
            nib.save(_image(exposure.blood, exposure.affine), part)
        if dicom:
            save_series(exposure, scan, self.name, self.person.age, self.person.sex)
        else:
            with atomic_write(scan) as part:
                nib.save(_image(exposure.hu, exposure.affine), part)
        return scan, mask

    def paths(self, folder: Path, *, dicom: bool = False) -> tuple[Path, Path]:
        """Where `save` puts the scan and the mask."""
        scan = folder / "scans" / (self.name if dicom else f"{self.name}.nii.gz")
        return scan, folder / "masks" / f"{self.name}.nii.gz"

    def columns(self) -> dict[str, Any]:
        """What a clinic would know: the labels, and clinical columns beside them."""
        person = self.person
        return {
            "poor_outcome": int(person.poor),
            "gcs": person.gcs,
            "age": person.age,
            "sex": person.sex,
            "location": person.site,
            "dead_30_days": int(person.dead),
            "cognitive_impairment": int(person.impaired),
            "ich_score": person.ich_score(),
            "func_score": person.func_score(),
        }

    def truth(self) -> dict[str, Any]:
        """What nobody would know: what the picture was drawn from, and the probabilities of `Person.truth`."""
        person = self.person
        known = {"location": person.site, "side": person.side, "volume_ml": person.volume_ml}
        known |= {"ventricular": person.ventricular, "midline_shift_mm": round(self.shape.midline_shift_mm(), 2)}
        return {**known, **person.marks, **{name: round(value, 5) for name, value in person.truth().items()}}

    @property
    def _random(self) -> list[np.random.Generator]:
        return [np.random.default_rng([self.seed, self.number, part]) for part in range(2)]

    @cached_property
    def _head(self) -> tuple[Individual, Shape]:
        person, random = self.person, self._random[1]
        individual = Individual(person.marks, random)
        return individual, shape_of(person, individual, random)


def simulate(
    out: str | Path,
    *,
    patients: int = 200,
    seed: int = 0,
    skull: bool = False,
    dicom: bool = False,
    workers: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Path:
    """Simulates a cohort into a folder; what is there already is kept, so that an interrupted run goes on.

    The folder gets `cohort.csv` (patient, scan, labels and clinical columns), `truth.csv` (what the labels were drawn
    from, and the probabilities), `scans/` and `masks/` (1 in the haemorrhage, 2 in blood that entered the ventricles).

    Args:
        out: The folder.
        patients: How many.
        seed: Which ones. A larger cohort of one seed begins with the smaller one.
        skull: Whole heads instead of the brain alone.
        dicom: A DICOM series each instead of a NIfTI file.
        workers: Processes that share the work; the files are the same for any number.
        progress: Called with the number of patients done, each time one is.

    Returns:
        The path of `cohort.csv`.

    Raises:
        RunError: The folder holds a cohort of another seed or kind, another process is at work in it, or nilearn is not
            installed.
        OSError: The folder cannot be written.
    """
    if patients < 1 or seed < 0 or workers < 1:
        raise RunError(
            f"simulate takes 1 patient or more, a seed of 0 or more and 1 worker or more; got {patients}, {seed} and "
            f"{workers}."
        )
    folder = Path(out)
    kind = {"simulation": _VERSION, "seed": seed, "skull": skull, "dicom": dicom}
    everyone = [Patient(seed, number) for number in range(patients)]
    with _claimed(folder, kind):
        missing = [p for p in everyone if not all(path.exists() for path in p.paths(folder, dicom=dicom))]
        done = patients - len(missing)
        for _ in parallel_map(partial(Patient.save, folder=folder, skull=skull, dicom=dicom), missing, workers=workers):
            done += 1
            if progress:
                progress(done)
    _table(folder / "truth.csv", [{"patient": p.name, **p.truth()} for p in everyone])
    scans = (p.paths(Path(), dicom=dicom)[0].as_posix() for p in everyone)
    rows = [{"patient": e.name, "scan": scan, **e.columns()} for e, scan in zip(everyone, scans, strict=True)]
    _table(folder / "cohort.csv", rows)
    return folder / "cohort.csv"


@contextmanager
def _claimed(folder: Path, kind: dict[str, Any]) -> Iterator[None]:
    """Makes the folder this cohort's while the block runs, or refuses where it is another's."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            stamp = folder / "simulation.json"
            if not stamp.exists():
                if (folder / "cohort.csv").exists():
                    raise RunError(f"{folder}: holds a cohort that was not simulated here. Give another folder.")
                with atomic_write(stamp) as part:
                    part.write_text(json.dumps(kind), encoding="utf-8")
            try:
                found = json.loads(stamp.read_text(encoding="utf-8"))
            except ValueError:
                found = {}
            if found != kind:
                raise RunError(
                    f"{folder}: holds simulated patients of {found}, asked for are {kind}. Give another folder."
                )
            for left in folder.glob("*/.*"):  # what a process that was killed had begun
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
    except Timeout:
        raise RunError(f"{folder}: another process simulates into it. Wait for it, or give another folder.") from None


def _image(values: np.ndarray, affine: np.ndarray) -> Any:
    import nibabel as nib

    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"simulated, no patient"
    return image


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
