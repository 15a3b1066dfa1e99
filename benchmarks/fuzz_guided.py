"""Fuzz one kind of file guided by coverage: `python benchmarks/fuzz_guided.py "study file" --seconds 60`.

The kinds are those of `benchmarks/fuzz.py`. Needs `pip install atheris`, on Linux. Inputs that reach new code of
ichprog, nibabel or pydicom are kept and changed further. The first exception that is no error of ichprog ends the run
with its traceback, and its input is written to the current folder as `crash-*`.
"""

import argparse
import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ichprog", "nibabel", "pydicom", "tomllib"]):
    import fuzz

    from ichprog import IchprogError

MAX_BYTES = 20_000
SLOW_S = 20


def main() -> None:
    """Fuzz a kind of file for a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of pydicom and nibabel about damaged files
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        target = {each.name: each for each in fuzz.targets(folder)}[args.kind]
        corpus, path = folder / "corpus", folder / f"input{target.suffix}"
        corpus.mkdir()
        (corpus / "example").write_bytes(target.example)

        def read(data: bytes) -> None:
            path.unlink(missing_ok=True)  # a new inode, because the old one may be linked or cached
            path.write_bytes(data)
            with contextlib.suppress(IchprogError):
                target.read(path)

        limits = [
            f"-max_total_time={args.seconds}",
            f"-max_len={MAX_BYTES}",
            f"-timeout={SLOW_S}",
            f"-seed={args.seed}",
        ]
        atheris.Setup([sys.argv[0], *limits, "-rss_limit_mb=8000", "-print_final_stats=1", str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
