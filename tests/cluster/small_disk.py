"""A small disk of its own, to be filled: a tmpfs, which root may mount."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FILLER = "filler"


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, leave_bytes: int) -> None:
        """Takes all space but so many bytes."""
        with (self.path / FILLER).open("wb") as file:
            file.truncate(0)
            size = shutil.disk_usage(self.path).free - leave_bytes
            assert size > 0
            file.write(bytes(size))

    def empty(self) -> None:
        """Gives the space back."""
        (self.path / FILLER).unlink()


@contextlib.contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """Mounts one at `path`; the test is skipped where this user may not."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount the small disk that is to be filled")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
