"""Kill commands, fill disks, change clocks, damage caches and lie about downloads.

`python benchmarks/faults.py --trials 100` prints a row for each kind of fault.

After each fault the command is run again without one. It must end with the same bytes as a run without any fault. At no
time may a finished file be there in part, and an error must be one message without a traceback. The script uses a tiny
model, tiny simulated heads and a Hub on the loopback. Full disks need root, and other clocks libfaketime.
`tests/test_faults.py` runs a short form.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from ichprog.cli import main as main_command

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.hub_server import HubServer
from support.small_study import write_patients

LIMIT_S = 300
STUDY = """
name = "small"
cohort = ["cohort.csv"]
folds = 2
brain = "given"
device = "cpu"
[protocol]
epochs = 2
batch_size = 4
validation_fraction = 0.25
[[variant]]
name = "one"
model = "spec.json"
tasks = ["prognosis"]
[[baseline]]
name = "majority"
kind = "majority"
"""
HUB_MODEL = "hf-hub:org/tiny@main"
SAME, ERROR, WRONG = "same bytes", "clear error", "WRONG"


@dataclass
class Outcome:
    """What the trials of a kind of fault gave.

    Attributes:
        name: Kind of fault.
        counts: Number of trials by result.
        problems: What was wrong.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str | None, result: str = SAME) -> None:
        """Count a trial."""
        self.counts[WRONG if problem else result] += 1
        if problem:
            self.problems.append(f"{self.name}: {problem}")


@dataclass(frozen=True)
class Scenario:
    """A command and its files.

    Attributes:
        name: Name of the command.
        arguments: Its arguments. `OUT` is the folder that it writes.
        resume: Further arguments of a run after a fault.
        files: Patterns of its finished files in that folder.
        uses_cache: Whether it starts with a filled cache.
    """

    name: str
    arguments: tuple[str, ...]
    resume: tuple[str, ...]
    files: tuple[str, ...]
    uses_cache: bool = True


_TINY = ("-m", "local-dir:tiny")
_TO_FILE = ("-o", "OUT/results.jsonl")
_TRAIN = ("--folds", "2", "--epochs", "2", "--device", "cpu")
_TRAINED = ("run/fold*.safetensors", "run/predictions.csv", "run/folds/*/predictions.csv")
_STUDIED = ("study/predictions.csv", "study/metrics.json", "study/baselines/*.csv", "study/runs/*/fold*.safetensors")
SCENARIOS = {
    each.name: each
    for each in (
        Scenario(
            "predict",
            ("predict", "scans", *_TINY, *_TO_FILE, "--masks", "OUT/masks"),
            ("--resume",),
            ("results.jsonl", "masks/*.nii.gz"),
        ),
        Scenario(
            "explain", ("explain", "scans", *_TINY, "--method", "grad_cam", "-o", "OUT"), ("--resume",), ("*.nii.gz",)
        ),
        Scenario(
            "train", ("train", "cohort.csv", "-m", "spec.json", "-o", "OUT/run", *_TRAIN), ("--resume",), _TRAINED
        ),
        Scenario("study", ("study", "run", "study.toml", "-o", "OUT/study"), (), _STUDIED),
        Scenario(
            "fetch",
            ("fetch", HUB_MODEL),
            (),
            ("cache/**/*.safetensors", "cache/**/config.json"),
            uses_cache=False,
        ),
        Scenario(
            "compile",
            ("predict", "scans/0.nii.gz", *_TINY, *_TO_FILE),
            ("--resume",),
            ("results.jsonl",),
            uses_cache=False,
        ),
    )
}
_FROM_HUB = Scenario(
    "predict from the Hub",
    ("predict", "scans", "-m", HUB_MODEL, *_TO_FILE),
    ("--resume",),
    ("results.jsonl",),
    uses_cache=False,
)


class Laboratory:
    """A folder with a tiny model, patients and a Hub, in which commands are run.

    Args:
        root: The folder.
        server: The Hub.
        seed: Random seed.
        in_process: Whether commands that are not killed run in this process, which is faster.
    """

    def __init__(self, root: Path, server: HubServer, seed: int = 0, *, in_process: bool = False) -> None:
        self.root, self.server, self.random = root, server, np.random.default_rng(seed)
        self.in_process = in_process
        self.cache = root / "cache"
        self.clock: dict[str, str] = {}  # variables of the environment that change the clock of processes
        self._number = 0

    def write_inputs(self) -> None:
        """Write the patients, their scans, the study, and the model as a folder and on the Hub."""
        import torch
        from safetensors.torch import save_file

        from ichprog import networks
        from ichprog.spec import ModelSpec

        write_patients(self.root)
        (self.root / "study.toml").write_text(STUDY)
        (self.root / "scans").mkdir()
        for number in range(4):
            shutil.copyfile(self.root / f"{number}.nii.gz", self.root / "scans" / f"{number}.nii.gz")
        spec = json.loads((self.root / "spec.json").read_text())
        spec["weights"] |= {"repo": None, "revision": None, "folder": "", "format": "safetensors", "keys": {}}
        spec |= {"golden_output": None}
        spec["weights"]["sha256"] = {}
        torch.manual_seed(0)
        state = networks.build(ModelSpec.read(self.root / "spec.json")).state_dict()
        for folder in (self.root / "tiny", self.server.root / "org" / "tiny"):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(spec))
            save_file(state, folder / "fold0.safetensors")

    def new_folder(self) -> Path:
        """Return a new empty folder."""
        self._number += 1
        folder = self.root / f"trial-{self._number}"
        folder.mkdir()
        return folder

    def environment(self, scenario: Scenario, out: Path) -> dict[str, str]:
        """Return the variables of the environment of a scenario."""
        cache = self.cache if scenario.uses_cache else out / "cache"
        own = {"ICHPROG_CACHE": str(cache), "HF_ENDPOINT": self.server.url, "ICHPROG_BACKGROUND_COMPILE": "0"}
        return own | self.clock

    def start(self, scenario: Scenario, out: Path, *more: str) -> "subprocess.Popen[str]":
        """Start the command of a scenario."""
        arguments = [each.replace("OUT", str(out)) for each in scenario.arguments]
        return subprocess.Popen(
            [sys.executable, "-m", "ichprog", *arguments, *more],
            cwd=self.root, env=os.environ | self.environment(scenario, out),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, scenario: Scenario, out: Path, *more: str) -> tuple[int, str]:
        """Run the command of a scenario, and return its exit code and its messages."""
        if self.in_process:
            arguments = [each.replace("OUT", str(out)) for each in scenario.arguments]
            with chdir(self.root):
                result = CliRunner().invoke(main_command, [*arguments, *more], env=self.environment(scenario, out))
            failed = result.exception is not None and not isinstance(result.exception, SystemExit)
            return result.exit_code, result.stderr + (f"Traceback: {result.exception!r}" if failed else "")
        process = self.start(scenario, out, *more)
        try:
            _, messages = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            _, messages = process.communicate()
            return -1, f"{messages}\nno end within {LIMIT_S} s"
        return process.returncode, messages

    def reference(self, scenario: Scenario) -> tuple[dict[str, str], float]:
        """Return the checksums of the finished files of a run without a fault, and its duration in seconds."""
        if scenario.uses_cache:
            self.run(scenario, self.new_folder())  # fills the cache
        out, start = self.new_folder(), time.monotonic()
        code, messages = self.run(scenario, out)
        assert code == 0, messages
        start_up_s = 2 if self.in_process else 0  # of the processes that are killed
        return finished(scenario, out), time.monotonic() - start + start_up_s


def finished(scenario: Scenario, out: Path) -> dict[str, str]:
    """Return the checksums of the finished files of a scenario by name."""
    paths = {path for pattern in scenario.files for path in out.glob(pattern)}
    visible = (path for path in paths if not any(part.startswith(".") for part in path.relative_to(out).parts))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(visible)}


def find_half_file(scenario: Scenario, out: Path, reference: dict[str, str]) -> str | None:
    """Return a finished file that differs from that of the reference, or None."""
    if scenario.name == "study":  # its tables hold what is done so far
        return None
    wrong = [name for name, digest in finished(scenario, out).items() if reference.get(name) != digest]
    return f"half a file: {wrong[0]}" if wrong else None


def check_end(laboratory: Laboratory, scenario: Scenario, out: Path, reference: dict[str, str]) -> str | None:
    """Run the command to its end, and return what is wrong with its files, or None."""
    code, messages = laboratory.run(scenario, out, *scenario.resume)
    if code != 0:
        return f"the next run ends with {code}: {messages.strip()[-500:]}"
    if finished(scenario, out) != reference:
        return "other bytes than without a fault"
    # lock files stay also without a fault
    partial = [path for path in out.rglob(".*-*") if path.is_file() and path.suffix != ".lock"]
    return f"a partial file is left: {partial[0].name}" if partial else None


def unclear(code: int, messages: str) -> str | None:
    """Return why an error is not one message, or None."""
    if "Traceback" in messages or code < 0 or not messages.strip():
        return f"exit code {code}: {messages.strip()[-500:]}"
    return None


def kill(laboratory: Laboratory, scenario: Scenario, trials: int) -> Outcome:
    """Kill a command at random moments."""
    outcome = Outcome(f"SIGKILL of {scenario.name}")
    reference, duration_s = laboratory.reference(scenario)
    for _ in range(trials):
        out = laboratory.new_folder()
        process = laboratory.start(scenario, out)
        time.sleep(laboratory.random.uniform(0, duration_s))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        outcome.add(find_half_file(scenario, out, reference) or check_end(laboratory, scenario, out, reference))
        shutil.rmtree(out)
    return outcome


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Mount a disk of some bytes on a folder, and yield a function that changes its size. Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Return whether this process may mount a disk."""
    try:
        with small_disk(folder, 4096):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill_disk(laboratory: Laboratory, scenario: Scenario, trials: int) -> Outcome:
    """Let a command write to a disk that is full after some bytes, from none to almost enough."""
    outcome = Outcome(f"disk full in {scenario.name}")
    reference, _ = laboratory.reference(scenario)
    out = laboratory.new_folder()
    laboratory.run(scenario, out)
    needed = sum(path.stat().st_blocks * 512 for path in out.rglob("*") if path.is_file())
    for size in np.linspace(4096, needed, trials, dtype=int):
        folder = laboratory.new_folder()
        with small_disk(folder, int(size)) as resize:
            code, messages = laboratory.run(scenario, folder)
            problem = None if code == 0 else unclear(code, messages)
            problem = problem or find_half_file(scenario, folder, reference)
            resize(1 << 30)
            outcome.add(problem or check_end(laboratory, scenario, folder, reference), ERROR if code else SAME)
    return outcome


def run_twice(laboratory: Laboratory, scenario: Scenario, trials: int) -> Outcome:
    """Run a command twice at the same time."""
    outcome = Outcome(f"two processes of {scenario.name}")
    reference, duration_s = laboratory.reference(scenario)
    for _ in range(trials):
        out = laboratory.new_folder()
        first = laboratory.start(scenario, out)
        time.sleep(laboratory.random.uniform(0, duration_s / 2))
        second = laboratory.start(scenario, out, *scenario.resume)
        problem, result = None, SAME
        for process in (first, second):
            _, messages = process.communicate(timeout=LIMIT_S)
            if process.returncode != 0:
                problem, result = problem or unclear(process.returncode, messages), ERROR
        problem = problem or find_half_file(scenario, out, reference)
        outcome.add(problem or check_end(laboratory, scenario, out, reference), result)
    return outcome


def clock_library() -> Path | None:
    """Return the library of libfaketime, which changes the clock of a process, or None and say so."""
    found = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
    if found is None:
        print("Clock changes are left out: libfaketime is not installed.", file=sys.stderr)
    return found


def change_clock(laboratory: Laboratory, scenario: Scenario, trials: int) -> Outcome:
    """Set the clock of a command back or forward by 400 days while it runs, kill it, and set the clock again."""
    outcome = Outcome(f"clock changes in {scenario.name}")
    reference, duration_s = laboratory.reference(scenario)
    offset = laboratory.root / "offset"
    laboratory.clock = {
        "LD_PRELOAD": str(clock_library()),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    for days in itertools.islice(itertools.cycle(["-400d", "+400d"]), trials):
        out = laboratory.new_folder()
        offset.write_text("+0")
        process = laboratory.start(scenario, out)
        time.sleep(laboratory.random.uniform(0, duration_s / 2))
        offset.write_text(days)
        time.sleep(laboratory.random.uniform(0, duration_s / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        offset.write_text("+0")
        outcome.add(find_half_file(scenario, out, reference) or check_end(laboratory, scenario, out, reference))
        shutil.rmtree(out)
    laboratory.clock = {}
    return outcome


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "empty": lambda _, __: b"",
    "cut": lambda data, random: data[: int(random.integers(0, len(data) + 1))],
    "one bit": lambda data, random: _flip(data, int(random.integers(0, max(1, len(data))))),
    "foreign": lambda _, random: random.bytes(5000),
    "text": lambda *_: b'{"files": {"fold0.safetensors": 3}}',
}


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :] if data else data


def damage_cache(laboratory: Laboratory, trials: int) -> Outcome:
    """Damage one file of a filled cache, weights or compiled networks, at a time."""
    outcome = Outcome("damaged file in the cache")
    scenario = _FROM_HUB
    filled = laboratory.new_folder()
    code, messages = laboratory.run(scenario, filled)
    assert code == 0, messages
    reference = finished(scenario, filled)
    files = sorted(path.relative_to(filled) for path in (filled / "cache").rglob("*") if path.is_file())
    names = list(DAMAGES)
    for number in range(trials):
        out = laboratory.new_folder()
        shutil.copytree(filled / "cache", out / "cache")
        file, name = files[number % len(files)], names[(number // len(files) + number) % len(names)]
        (out / file).write_bytes(DAMAGES[name]((out / file).read_bytes(), laboratory.random))
        code, messages = laboratory.run(scenario, out)
        if code != 0:
            problem = unclear(code, messages)
        else:
            problem = None if finished(scenario, out) == reference else "other bytes than with a sound cache"
        outcome.add(f"{name}, {file}: {problem}" if problem else None, ERROR if code else SAME)
        shutil.rmtree(out)
    return outcome


LIES = {
    "half a body": {"GET /org/tiny/resolve": "half"},
    "a wrong hash": {"GET /org/tiny/resolve": "flip"},
    "a login page": {"GET /org/tiny/resolve": "wrong"},
    "a stall": {"GET /org/tiny/resolve": "hang"},
    "a redirect loop": {"HEAD /org/tiny/resolve": "loop"},
    "a redirect loop of the body": {"GET /org/tiny/resolve": "loop"},
    "an endless body": {"GET /org/tiny/resolve": "endless"},
    "a huge file": {"/api/models/org/tiny": "huge", "HEAD /org/tiny/resolve": "huge"},
    "a list of nothing": {"/api/models/org/tiny": "wrong"},
    "an internal error": {"GET /org/tiny/resolve": 500},
    "a missing file": {"HEAD /org/tiny/resolve": "404:EntryNotFound"},
}


def lie(laboratory: Laboratory, names: "list[str] | None" = None) -> Outcome:
    """Let the Hub answer wrongly, then rightly."""
    outcome, scenario = Outcome("a Hub that lies"), SCENARIOS["fetch"]
    reference, _ = laboratory.reference(scenario)
    for name in names or LIES:
        out = laboratory.new_folder()
        laboratory.server.faults = dict(LIES[name])
        code, messages = laboratory.run(scenario, out)
        laboratory.server.faults = {}
        problem = None if code == 0 else unclear(code, messages)
        problem = problem or find_half_file(scenario, out, reference)
        left = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        if left > 50e6:
            problem = problem or f"{left / 1e6:.0f} MB are left on the disk"
        problem = problem or check_end(laboratory, scenario, out, reference)
        outcome.add(f"{name}: {problem}" if problem else None, ERROR if code else SAME)
    return outcome


def change_pinned_file(laboratory: Laboratory) -> Outcome:
    """Change a file on the Hub at the same commit, and offer it to a filled and to an empty cache."""
    outcome, scenario = Outcome("changed file of a pinned commit"), SCENARIOS["fetch"]
    reference, _ = laboratory.reference(scenario)
    out = laboratory.new_folder()
    laboratory.run(scenario, out)
    path = laboratory.server.root / "org" / "tiny" / "fold0.safetensors"
    before = path.read_bytes()
    path.write_bytes(_flip(before, len(before) - 1))
    outcome.add(check_end(laboratory, scenario, out, reference))  # the cache needs no network
    (weights,) = (out / "cache").rglob("fold0.safetensors")
    weights.unlink()
    code, messages = laboratory.run(scenario, out)
    outcome.add(unclear(code, messages) if code else "another file was taken for the listed one", ERROR)
    path.write_bytes(before)
    outcome.add(check_end(laboratory, scenario, out, reference))
    return outcome


@contextmanager
def open_laboratory(seed: int = 0, *, in_process: bool = False) -> Iterator[Laboratory]:
    """Yield a laboratory with its inputs."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "hub").mkdir()
        with HubServer(root / "hub") as server:
            laboratory = Laboratory(root, server, seed, in_process=in_process)
            laboratory.write_inputs()
            yield laboratory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="kills of each command, and damaged caches")
    parser.add_argument("--slow-trials", type=int, help="kills of train and study; --trials by default")
    parser.add_argument("--disks", type=int, default=20, help="sizes of full disks")
    parser.add_argument("--only", nargs="+", help="parts: kill, disk, twice, cache, hub, clock")
    parser.add_argument("--commands", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS), help="to kill")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    options = parser.parse_args()
    parts = options.only or ["hub", "cache", "twice", "disk", "clock", "kill"]
    slow = options.trials if options.slow_trials is None else options.slow_trials
    with open_laboratory(options.seed) as laboratory:
        print(f"{'fault':36}{SAME:>12}{ERROR:>13}{WRONG:>7}", flush=True)
        problems: list[str] = []

        def report(outcome: Outcome) -> None:
            problems.extend(outcome.problems)
            counts = outcome.counts
            print(f"{outcome.name:36}{counts[SAME]:12}{counts[ERROR]:13}{counts[WRONG]:7}", flush=True)

        if "hub" in parts:
            report(lie(laboratory))
            report(change_pinned_file(laboratory))
        if "cache" in parts:
            report(damage_cache(laboratory, options.trials))
        if "twice" in parts:
            for name in ("predict", "study", "fetch", "compile"):
                report(run_twice(laboratory, SCENARIOS[name], 2))
        if "disk" in parts and can_mount(laboratory.new_folder()):
            for name in ("predict", "explain", "fetch", "compile", "train"):
                report(
                    fill_disk(
                        laboratory, SCENARIOS[name], max(3, options.disks // 4) if name == "train" else options.disks
                    )
                )
        if "clock" in parts and clock_library():
            for name in ("predict", "study", "fetch"):
                report(change_clock(laboratory, SCENARIOS[name], max(2, options.trials // 10)))
        if "kill" in parts:
            for name in options.commands:
                report(kill(laboratory, SCENARIOS[name], slow if name in ("train", "study") else options.trials))
        print(*problems, sep="\n")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
