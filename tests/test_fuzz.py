"""Every loader under spoiled files: each is loaded, or refused in one clear line. Nothing else may happen.

`make test` runs a few hundred of them, always the same; `make fuzz` runs LATENTRL_FUZZ (10,000) over all loaders, new
ones each time, and hypothesis shrinks what it finds.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fuzz_targets import TARGETS, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError

WANTED = int(os.environ.get("LATENTRL_FUZZ", "0"))
INPUTS = -(-WANTED // len(TARGETS)) if WANTED else 20
HANGS_AFTER_S = 120  # of a machine that may be busy; nothing here takes more than a few seconds
MOST_BYTES = 8 << 30  # of address space beyond what is there now: whoever takes a declared size at its word gets none


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Little memory, and no chatter of what is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, hard))
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good files for every target, each of which is loaded once."""
    folders = {}
    for target in TARGETS:
        folders[target.name] = tmp_path_factory.mktemp(target.name)
        target.make(folders[target.name])
        copy = tmp_path_factory.mktemp("copy") / target.name
        target.load(shutil.copytree(folders[target.name], copy))
    return folders


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_spoiled_files(target: Target, made: dict[str, Path]) -> None:
    @settings(
        max_examples=INPUTS,
        deadline=None,
        database=None,
        derandomize=not WANTED,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.randoms(use_true_random=False))
    def attack(random: Random) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as room:
            spoil_and_load(target, made[target.name], Path(room), random)

    attack()


def spoil_and_load(target: Target, good: Path, room: Path, random: Random) -> None:
    """One input: loaded or refused, in time, and with nothing touched outside of its folder."""
    folder = shutil.copytree(good, room / "files", symlinks=True)
    outside = room / "outside"
    outside.mkdir()
    (outside / "file").write_text("keep")
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    try:
        target.spoil(random, folder, outside)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.load(folder)
    except UserError as refusal:
        line = " ".join(str(refusal).split())
        assert 10 < len(line) < 4000, line
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert sorted(path.name for path in room.iterdir()) == ["files", "outside"]
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "keep"
