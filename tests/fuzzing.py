"""The fuzzer: every loader under spoiled files. Each is loaded, or refused in one clear line; nothing else may happen.

Inputs run in batches, each in a process of its own, so that one that kills its process (a crash of native code, all
memory taken, a hang) is told from the others, and kept.

    python tests/fuzzing.py --inputs 10000                      over all loaders, new ones each time
    python tests/fuzzing.py --target dataset --load FOLDER      an input that was kept, once more
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from spoiling import Target

HANGS_AFTER_S = 120  # of a machine that may be busy
MOST_CPU_S = 20.0
MOST_BYTES = 1 << 30  # resident, beyond what the process had before
BATCH = 400
LOOKS_S = 0.05
_HERE = Path(__file__).resolve()
_KEPT = _HERE.parent.parent / ".fuzz"
_TARGETS = "fuzz_targets"


@dataclass
class Tally:
    """What became of the inputs of one target.

    Attributes:
        loaded: Inputs that were still sound.
        refused: Inputs that ended in one clear line.
        most_bytes: Resident memory that one took at its peak.
        most_cpu_s: CPU time that one took.
        failures: What went wrong, each with the folder that holds the input.
    """

    loaded: int = 0
    refused: int = 0
    most_bytes: int = 0
    most_cpu_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Takes in another batch of the same target."""
        self.loaded, self.refused = self.loaded + other.loaded, self.refused + other.refused
        self.most_bytes = max(self.most_bytes, other.most_bytes)
        self.most_cpu_s = max(self.most_cpu_s, other.most_cpu_s)
        self.failures += other.failures


def run_batches(
    targets: list[str], inputs: int, *, seed: int | None, kept: Path = _KEPT, module: str = _TARGETS
) -> dict[str, Tally]:
    """Runs so many inputs of each target, all targets of a batch in one process.

    Args:
        targets: Names.
        inputs: Of each.
        seed: Of hypothesis; None for the same inputs as always.
        kept: Where inputs that failed go.
        module: That holds the targets.
    """
    tallies = {name: Tally() for name in targets}
    left = list(targets)
    while left:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as room:
            out, complaint = _run_child(module, left, inputs, seed, Path(room))
            for line in out.splitlines():
                record = json.loads(line)
                name = record.pop("target")
                tallies[name].add(Tally(**record))
                left.remove(name)
            if complaint:
                name = left.pop(0)
                tallies[name].failures.append(f"{complaint}\ninput: {_keep(Path(room) / name / 'input', name, kept)}")
    return tallies


def _run_child(module: str, targets: list[str], inputs: int, seed: int | None, room: Path) -> tuple[str, str]:
    """What a process says of its targets, a line each, and what kept it from its end, if something did."""
    command = [sys.executable, str(_HERE), "--child", *targets, "--inputs", str(inputs), "--room", str(room)]
    command += ["--module", module]
    command += [] if seed is None else ["--seed", str(seed)]
    with (room / "out").open("w") as out, (room / "err").open("w") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=_environment())
        ate = _watch(child, room)
    said = (room / "err").read_text(errors="replace")[-6000:]
    if ate:
        complaint = f"took {ate >> 20} MiB"
    elif child.returncode:
        complaint = f"ended with {child.returncode}\n{said}"
    else:
        complaint = ""
    return (room / "out").read_text(), complaint


def _watch(child: subprocess.Popen[bytes], room: Path) -> int:
    """Waits for a process; one that takes twice what it may is killed, before the machine has nothing left."""
    process = psutil.Process(child.pid)
    while child.poll() is None:
        with contextlib.suppress(psutil.Error, ValueError, OSError):
            base = int((room / "base").read_text())
            if (taken := process.memory_info().rss - base) > 2 * MOST_BYTES:
                child.kill()
                child.wait()
                return taken
        time.sleep(LOOKS_S)
    return 0


def _environment() -> dict[str, str]:
    paths = [str(_HERE.parent), str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def _keep(folder: Path, name: str, kept: Path) -> str:
    if not folder.is_dir():
        return "none yet"
    place = kept / f"{name}-{time.time_ns()}"
    _copy(folder, place)
    return f"{place}; again: python tests/fuzzing.py --target {name} --load {place}"


def _copy(source: Path, target: Path) -> None:
    """A folder as it is, pipes and links included."""

    def copy(one: Any, other: str) -> None:
        if Path(one).is_fifo():
            os.mkfifo(other)
        else:
            shutil.copy2(one, other)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


class Child:
    """The process that opens the inputs of one target.

    Args:
        name: The target's.
        room: Its folder; `input` in it is what is being read.
        module: That holds the target.
    """

    def __init__(self, name: str, room: Path, module: str = _TARGETS) -> None:
        self.target = next(target for target in _targets(module) if target.name == name)
        self.good, self.input = room / name / "good", room / name / "input"
        self.tally = Tally()
        self.good.mkdir(parents=True)
        self.target.make(self.good)
        self.load(self.good)  # sound as made; what it takes the first time is no matter
        self.tally = Tally()
        (room / "base").write_text(str(psutil.Process().memory_info().rss))

    def attack(self, inputs: int, seed: int | None) -> Tally:
        """Opens so many spoiled inputs, which hypothesis chooses and shrinks."""
        import hypothesis
        from hypothesis import strategies as st

        @hypothesis.settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            derandomize=seed is None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.randoms(use_true_random=False))
        def one(random: Random) -> None:
            shutil.rmtree(self.input, ignore_errors=True)
            shutil.copytree(self.good, self.input, symlinks=True)
            with tempfile.TemporaryDirectory(prefix="fuzz-") as elsewhere:
                outside = Path(elsewhere) / "outside"
                outside.mkdir()
                (outside / "file").write_text("keep")
                self.target.spoil(random, self.input, outside)
                self.load(self.input)
                _require_only(Path(elsewhere), "outside")
                _require_only(outside, "file")
                assert (outside / "file").read_text() == "keep", "a file outside was written"

        (one if seed is None else hypothesis.seed(seed)(one))()
        return self.tally

    def load(self, source: Path) -> None:
        """Loads a copy of it or sees it refused, in time, with little memory, and with nothing made beside it."""
        from pipeline.errors import UserError

        before, cpu_s = _start_of_peak(), time.process_time()
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as room:
            folder = Path(room) / "files"
            _copy(source, folder)
            try:
                self.target.load(folder)
                self.tally.loaded += 1
            except UserError as refusal:
                self.tally.refused += 1
                _require_clear(refusal)
            finally:
                faulthandler.cancel_dump_traceback_later()
            _require_only(Path(room), "files")
        self._measure(_peak() - before, time.process_time() - cpu_s)

    def _measure(self, taken: int, cpu_s: float) -> None:
        self.tally.most_bytes = max(self.tally.most_bytes, taken)
        self.tally.most_cpu_s = max(self.tally.most_cpu_s, cpu_s)
        assert taken < MOST_BYTES, f"took {taken >> 20} MiB"
        assert cpu_s < MOST_CPU_S, f"took {cpu_s:.0f} s"


def _require_only(folder: Path, name: str) -> None:
    others = {path.name for path in folder.iterdir()} ^ {name}
    assert not others, f"made or removed outside of the folder: {others}"


def _require_clear(refusal: Exception) -> None:
    """One line of moderate length, and not because all the memory was asked for."""
    line = " ".join(str(refusal).split())
    assert 10 < len(line) < 4000, line
    inner: BaseException | None = refusal
    while inner is not None:
        assert not isinstance(inner, MemoryError), repr(inner)
        assert "allocate" not in str(inner), repr(inner)
        inner = inner.__cause__ or inner.__context__


def _targets(module: str) -> tuple[Target, ...]:
    """Imported late: it takes seconds, and only those who open files need them."""
    found: tuple[Target, ...] = importlib.import_module(module).TARGETS
    return found


def _start_of_peak() -> int:
    """Resident bytes now, from which on Linux counts the peak anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    """The most resident bytes since `_start_of_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _be_child(module: str, targets: list[str], inputs: int, seed: int | None, room: Path) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what loaders print
    for name in targets:
        tally = Child(name, room, module).attack(inputs, seed)
        print(json.dumps({"target": name, **asdict(tally)}), file=said, flush=True)


def main() -> int:
    """The command line; exit code 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="over all targets (default 10000)")
    parser.add_argument("--target", action="append", help="only this one; may be given several times")
    parser.add_argument("--load", type=Path, help="a kept input, to be loaded once more")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="new each time by default")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--module", default=_TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--room", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        seed = given.seed if "--seed" in sys.argv else None
        _be_child(given.module, given.child, given.inputs, seed, given.room)
        return 0
    if given.load:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as room:
            child = Child(given.target[0], Path(room))
            child.load(given.load)
            print(json.dumps(asdict(child.tally)))
        return 0
    return _long_form(given.target, given.inputs, given.seed)


def _long_form(only: list[str] | None, inputs: int, seed: int) -> int:
    names = only or [target.name for target in _targets(_TARGETS)]
    each, failed, began = -(-inputs // len(names)), 0, time.monotonic()
    print(f"seed {seed}, {each} inputs of each of {len(names)} targets")
    print(
        "| loader | inputs | loaded | refused | failed | most memory, MiB | most CPU time, s |",
        "|---" * 7 + "|",
        sep="\n",
    )
    for name in names:
        tally = Tally()
        for begin in range(0, each, BATCH):
            tally.add(run_batches([name], min(BATCH, each - begin), seed=seed + begin)[name])
        count = tally.loaded + tally.refused
        cells = (name, count, tally.loaded, tally.refused, len(tally.failures), tally.most_bytes >> 20)
        print("|", *(f"{cell} |" for cell in cells), f"{tally.most_cpu_s:.1f} |", flush=True)
        for failure in tally.failures:
            print(failure, file=sys.stderr, flush=True)
        failed += len(tally.failures)
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
