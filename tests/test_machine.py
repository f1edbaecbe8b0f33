"""What a machine is taken to have: what this process may use of it, not what is built in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group whose limits are files of this test."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path / "cpu.max"


def test_cores_are_those_that_the_process_is_bound_to(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert machine.cores() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert machine.cores() == 1
    assert machine.ray_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores() == 64


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        *(("max 100000", 8), ("200000 100000", 2), ("250000 100000", 3), ("50000 100000", 1)),
        *(("1600000 100000", 8), ("", 8), ("nonsense", 8)),
    ],
)
def test_a_containers_share_bounds_them(group: Path, limit: str, cores: int) -> None:
    group.write_text(f"{limit}\n")
    assert machine.cores() == cores
