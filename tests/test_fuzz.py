"""Every loader under spoiled files, in short: always the same few. `make fuzz` runs 10,000 new ones (fuzzing.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_targets import TARGETS
from fuzzing import run_batches

INPUTS = 10


def test_spoiled_files(tmp_path: Path) -> None:
    tallies = run_batches([target.name for target in TARGETS], INPUTS, seed=None, kept=tmp_path / "kept")
    failures = [f"{name}: {failure}" for name, tally in tallies.items() for failure in tally.failures]
    assert not failures, "\n".join(failures)
    assert all(tally.loaded + tally.refused == INPUTS for tally in tallies.values()), tallies
    assert sum(tally.refused for tally in tallies.values()) > sum(tally.loaded for tally in tallies.values())


FAULTS = """
from spoiling import Target
import ctypes
def write(folder): (folder / "x").write_text("0")
def spoil(random, folder, outside): (folder / "x").write_text("1")
def crash(folder): int((folder / "x").read_text()) and ctypes.string_at(0)
def eat(folder): int((folder / "x").read_text()) and [bytes(1 << 28).replace(b"\\0", b"1") for _ in range(30)]
def leave(folder): int((folder / "x").read_text()) and (folder.parent / "y").write_text("")
TARGETS = tuple(Target(load.__name__, write, spoil, load) for load in (crash, eat, leave))
"""


def test_an_input_that_ends_its_process_is_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer itself, on loaders that fail in the ways it looks for: each is found, and none hides the others."""
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    tallies = run_batches(["crash", "eat", "leave"], 2, seed=None, kept=tmp_path / "kept", module="faults")
    [crash], [eat], [leave] = (tallies[name].failures for name in ("crash", "eat", "leave"))
    assert "ended with -11" in crash
    assert "took " in eat
    assert "outside of the folder: {'y'}" in leave
    assert {path.name.partition("-")[0] for path in (tmp_path / "kept").iterdir()} == set(tallies)
    assert all((path / "x").read_text() == "1" for path in (tmp_path / "kept").iterdir())
