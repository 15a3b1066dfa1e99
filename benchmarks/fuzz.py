"""Read damaged and hostile files: `python benchmarks/fuzz.py --inputs 2000`.

Valid files are changed at random: bytes, lengths, numbers and words. Reading one must give a result or an error of this
library within the time limit, and never another exception. The script prints a row for each kind of file, and writes
inputs that fail to the folder of `--keep`. `tests/test_fuzz.py` runs a short form.
"""

import argparse
import io
import json
import shutil
import signal
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from ichprog import IchprogError, hub, zoo
from ichprog.cohort import Cohort
from ichprog.result_files import read_records
from ichprog.scan import load
from ichprog.spec import ModelSpec
from ichprog.study import Study, template

LIMIT_S = 20
WORDS = [
    b"-1", b"0", b"1e309", b"nan", b"inf", b"99999999999999999999", b"null", b"true", b"[]", b"{}", b'""', b"../../x",
    b"<script>", b"=1+1", b"\xff\xfe", b"\x00", b"A" * 5000,
]  # fmt: skip
RESULT = {
    "scan": "scan.nii.gz",
    "model": "compact.prognosis_gcs3_age",
    "tasks": {"gcs": {"label": "13-15"}},
    "warnings": [],
}
Mutator = Callable[[bytes, np.random.Generator], bytes]


class Target(NamedTuple):
    """A kind of file: a valid example, how it is changed, and how it is read."""

    name: str
    suffix: str
    example: bytes
    mutate: Mutator
    read: Callable[[Path], Any]


class Outcome(NamedTuple):
    """What reading the inputs of a kind gave.

    Attributes:
        results: Inputs with a result.
        errors: Inputs with an error of this library.
        others: Other exceptions, with one input each.
        slowest_s: Longest time in seconds.
    """

    results: int
    errors: int
    others: dict[str, bytes]
    slowest_s: float


def mutate_bytes(data: bytes, random: np.random.Generator) -> bytes:
    """Change, cut, repeat or insert some bytes, mostly in the first kilobyte."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 9)):
        end = min(len(changed), 1200) if random.random() < 0.8 else len(changed)
        position = int(random.integers(max(end, 1)))
        kind = random.integers(5)
        if kind == 0 and changed:
            changed[min(position, len(changed) - 1)] = random.integers(256)
        elif kind == 1:
            changed[position : position + 4] = random.choice([0, 1, 0x7F, 0xFF], 4).astype(np.uint8).tobytes()
        elif kind == 2 and random.random() < 0.2:
            del changed[position:]
        elif kind == 3:
            changed[position:position] = changed[position : position + int(random.integers(1, 32))]
        else:
            changed[position : position + 2] = WORDS[random.integers(len(WORDS))]
    return bytes(changed)


def mutate_text(data: bytes, random: np.random.Generator) -> bytes:
    """Replace a number or a word of a text by an unusual one, or change bytes."""
    if random.random() < 0.3:
        return mutate_bytes(data, random)
    parts = data.replace(b",", b" , ").replace(b":", b" : ").split(b" ")
    for _ in range(random.integers(1, 4)):
        position = int(random.integers(len(parts)))
        parts[position] = WORDS[random.integers(len(WORDS))]
    return b" ".join(parts)


def mutate_header(data: bytes, random: np.random.Generator) -> bytes:
    """Replace or remove some values of a DICOM header, which stays well-formed."""
    from pydicom import dcmread
    from pydicom.dataelem import RawDataElement

    header = dcmread(io.BytesIO(data), force=True)
    places = [header, *(item for element in header.iterall() if element.VR == "SQ" for item in element.value)]
    for _ in range(random.integers(1, 4)):
        place = places[random.integers(len(places))]
        tags = [*place.keys()]
        if not tags:
            continue
        tag = tags[random.integers(len(tags))]
        old = place.get_item(tag)
        value = old.value if isinstance(old.value, bytes) else str(old.value).encode()
        kind = random.integers(5)
        if kind == 0:
            del place[tag]
            continue
        if kind == 1:
            value = value[: int(random.integers(len(value) + 1))]
        elif kind == 2:
            value = mutate_bytes(value, random)
        else:
            count = int(random.integers(1, 7))
            value = b"\\".join(WORDS[random.integers(len(WORDS))] for _ in range(count))
        value += b" " * (len(value) % 2)
        vr = "UN" if old.VR == "SQ" else old.VR
        place[tag] = RawDataElement(old.tag, vr, len(value), value, 0, False, True)
    target = io.BytesIO()
    try:
        header.save_as(target)
    except Exception:  # the library for writing refuses some values
        return mutate_bytes(data, random)
    return target.getvalue()


def brain() -> np.ndarray:
    """Return the HU `(i, j, k)` of a small brain with a haemorrhage."""
    i, j, k = np.ogrid[:48, :48, :10]
    inside = ((i - 24) / 15) ** 2 + ((j - 24) / 18) ** 2 + ((k - 5) / 4.6) ** 2 <= 1
    blood = ((i - 20) / 7) ** 2 + ((j - 28) / 7) ** 2 + ((k - 5) / 2.5) ** 2 <= 1
    noise = 4 * np.random.default_rng(0).standard_normal(inside.shape)
    return np.where(inside, np.where(blood, 68, 33) + noise, 0).round().astype(np.int16)


def compressed(data: bytes, syntax: str) -> bytes:
    """Return a DICOM file with its pixels compressed by GDCM."""
    import gdcm

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slice.dcm"
        path.write_bytes(data)
        reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        changer = gdcm.ImageChangeTransferSyntax()
        changer.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
        if not reader.Read():
            raise ValueError("GDCM cannot read the example")
        changer.SetInput(reader.GetImage())
        if not changer.Change():
            raise ValueError(f"GDCM cannot compress the example as {syntax}")
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(changer.GetOutput())
        writer.Write()
        return path.read_bytes()


def enhanced(slices: list[Path]) -> bytes:
    """Return the slices as one multi-frame file."""
    from pydicom import Dataset, dcmread
    from pydicom.uid import EnhancedCTImageStorage

    headers = [dcmread(path) for path in slices]
    data = headers[0]
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    data.NumberOfFrames, data.PixelData = len(headers), b"".join(each.PixelData for each in headers)
    frames = []
    for each in headers:
        place, measures, frame = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = each.ImagePositionPatient
        measures.PixelSpacing, measures.SliceThickness = each.PixelSpacing, each.SliceThickness
        frame.PlanePositionSequence, frame.PixelMeasuresSequence = [place], [measures]
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = frames
    del data.ImagePositionPatient, data.PixelSpacing
    target = io.BytesIO()
    data.save_as(target)
    return target.getvalue()


def small_series(folder: Path) -> Path:
    """Write a series of ten small CT slices."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    series, study = generate_uid(entropy_srcs=["series"]), generate_uid(entropy_srcs=["study"])
    folder.mkdir(parents=True, exist_ok=True)
    for number, plane in enumerate(np.moveaxis(brain(), 2, 0)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(number)])
        header = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        header.StudyInstanceUID, header.SeriesInstanceUID, header.Modality = study, series, "CT"
        header.SeriesDescription, header.ImageType = "HEAD", ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.ImagePositionPatient, header.ImageOrientationPatient = [-106, -106, 14.0 * number], [1, 0, 0, 0, 1, 0]
        header.PixelSpacing, header.SliceThickness = [4.5, 4.5], 14
        header.Rows = header.Columns = 48
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, 1
        header.RescaleSlope, header.RescaleIntercept = 1, 0
        header.PixelData = plane.T.tobytes()
        header.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def targets(folder: Path) -> list[Target]:
    """Return every kind of file with a valid example."""
    from pydicom.uid import JPEG2000Lossless, JPEGLSLossless
    from safetensors.numpy import save

    image = nib.Nifti1Image(brain(), np.diag([-4.5, -4.5, 14.0, 1.0]))
    series = small_series(folder / "series")
    slices = sorted(series.iterdir())
    spec = zoo.find("compact.prognosis_gcs3_age_clinical")
    packed = folder / "series.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in slices:
            archive.write(path, path.name)
    scan = folder / "scan.nii.gz"
    image.to_filename(scan)

    def read_scan(path: Path) -> None:
        load(path, expected_ranges={})

    def read_slice(path: Path) -> None:
        """Read a series in which one slice is the input."""
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for each in slices[1:]:
                (Path(scratch) / each.name).hardlink_to(each)
            (Path(scratch) / slices[0].name).hardlink_to(path)
            read_scan(Path(scratch))

    def read_weights(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / f"_fold0{path.suffix}"
            shutil.copy(path, target)
            form = "pickle" if path.suffix == ".pth" else "safetensors"
            weights = {"repo": None, "revision": None, "folder": "", "format": form, "keys": {"": "x."}, "sha256": {}}
            fields = zoo.find("perez2023.prognosis").to_dict() | {"weights": weights}
            hub.weights(ModelSpec.from_dict(fields), directory=scratch, cache_dir=Path(scratch) / "cache")

    (folder / "scan.nii.gz").touch()
    (folder / "cohort.csv").touch()
    study, first = template("smoke").encode(), slices[0].read_bytes()
    table = b"patient,scan,poor_outcome,gcs,age,mask\nA,scan.nii.gz,1,9,71,\nB,scan.nii.gz,0,15,60,\n"
    return [
        Target("NIfTI", ".nii", image.to_bytes(), mutate_bytes, read_scan),
        Target("NIfTI, gzip", ".nii.gz", scan.read_bytes(), mutate_bytes, read_scan),
        Target("DICOM, one slice of a series", ".dcm", first, mutate_bytes, read_slice),
        Target("DICOM, header values", ".dcm", first, mutate_header, read_slice),
        Target("DICOM, JPEG 2000", ".dcm", compressed(first, JPEG2000Lossless), mutate_bytes, read_slice),
        Target("DICOM, JPEG-LS", ".dcm", compressed(first, JPEGLSLossless), mutate_bytes, read_slice),
        Target("DICOM, multi-frame", ".dcm", enhanced(slices), mutate_header, read_scan),
        Target("DICOM, .zip", ".zip", packed.read_bytes(), mutate_bytes, read_scan),
        Target("model description", ".json", json.dumps(spec.to_dict()).encode(), mutate_text, ModelSpec.read),
        Target(
            "weights, safetensors", ".safetensors", save({"a": np.ones((4, 4), np.float32)}), mutate_bytes, read_weights
        ),
        Target("weights, pickle", ".pth", _pickle(folder), mutate_bytes, read_weights),
        Target("table of patients", ".csv", table, mutate_text, Cohort.read),
        Target("study file", ".toml", study, mutate_text, Study.read),
        Target("results", ".jsonl", json.dumps(RESULT).encode(), mutate_text, read_records),
    ]


def _pickle(folder: Path) -> bytes:
    import torch

    path = folder / "example.pth"
    torch.save({"a": torch.ones(4, 4)}, path)
    return path.read_bytes()


def run(target: Target, number: int, folder: Path, seed: int) -> Outcome:
    """Read a number of changed inputs of one kind."""
    counts: Counter[str] = Counter()
    others: dict[str, bytes] = {}
    slowest = 0.0

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    path = folder / f"input{target.suffix}"
    try:
        for index in range(number):
            data = target.mutate(target.example, np.random.default_rng([seed, index]))
            path.unlink(missing_ok=True)  # a new inode, because the old one may be linked or cached
            path.write_bytes(data)
            started = time.perf_counter()
            signal.alarm(LIMIT_S)
            try:
                target.read(path)
                counts["results"] += 1
            except IchprogError:
                counts["errors"] += 1
            except Exception as error:
                others.setdefault(f"{type(error).__name__}: {error}"[:120], data)
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - started)
    finally:
        signal.signal(signal.SIGALRM, before)
    return Outcome(counts["results"], counts["errors"], others, slowest)


def main() -> None:
    """Read the inputs of every kind and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="only this kind; repeatable")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for inputs that fail")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of pydicom and nibabel about damaged files
    print("| file | inputs | results | errors of ichprog | other exceptions | slowest in s |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets(Path(scratch)):
            if args.kind and target.name not in args.kind:
                continue
            found = run(target, args.inputs, Path(scratch), args.seed)
            cells = [args.inputs, found.results, found.errors, len(found.others), f"{found.slowest_s:.1f}"]
            print(f"| {target.name} | {' | '.join(map(str, cells))} |", flush=True)
            for number, (text, data) in enumerate(found.others.items()):
                print(f"  {text}", flush=True)
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    (args.keep / f"{target.name.replace(' ', '-')}-{number}{target.suffix}").write_bytes(data)


if __name__ == "__main__":
    main()
