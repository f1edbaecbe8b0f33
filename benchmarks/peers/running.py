"""Runs cells one at a time, each in a process of its own, and keeps what has been measured.

A kept measurement counts only while its cell, the sources and the versions are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from peers.rows import Cell

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pipeline", "rllib_ext", "jobs", "benchmarks")
PACKAGES = ("torch", "numpy", "ray", "gymnasium", "ale-py", "stable-baselines3")
LIMIT_S = 900.0


class CellFailed(Exception):
    """A cell's process gave no figures; the message says which and how it ended."""


def versions() -> dict[str, str]:
    """Of Python and what the rows stand on."""
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in PACKAGES}}


class Bench:
    """The kept measurements under `folder`, and how new ones are made."""

    def __init__(self, folder: Path, *, is_fresh: bool) -> None:
        """`is_fresh`: what was kept before is not used."""
        self._folder, self._is_fresh = folder, is_fresh
        self._state = hashlib.sha256(json.dumps(versions()).encode())
        for path in sorted(_files()):
            self._state.update(path.read_bytes())
        folder.mkdir(parents=True, exist_ok=True)

    def figures(self, cell: Cell) -> dict[str, Any]:
        """The cell's figures: kept, or measured now.

        Raises:
            CellFailed: It gave none.
        """
        path = self._folder / f"{self._digest(cell)}.json"
        if path.is_file() and not self._is_fresh:
            kept: dict[str, Any] = json.loads(path.read_text())["figures"]
            return kept
        figures = run_apart("peers.rows", [cell.to_json()], LIMIT_S)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"cell": json.loads(cell.to_json()), "figures": figures}, indent=1) + "\n")
        draft.replace(path)
        return figures

    def _digest(self, cell: Cell) -> str:
        state = self._state.copy()
        state.update(cell.to_json().encode())
        return state.hexdigest()[:24]


def _files() -> Iterable[Path]:
    return (path for name in SOURCES for path in (ROOT / name).rglob("*.py"))


def run_apart(module: str, arguments: list[str], limit_s: float) -> dict[str, Any]:
    """Runs one of the benchmarks' modules in a new process, ends all that it started, and reads its last JSON line.

    Raises:
        CellFailed: It gave none, or took longer than `limit_s` seconds.
    """
    places = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise CellFailed(f"{arguments[0]} took more than {limit_s:.0f} s") from None
    finally:
        _end(process)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        tail = "\n".join(err.strip().splitlines()[-12:])
        raise CellFailed(f"{arguments[0]} ended with exit code {process.returncode}:\n{tail}")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process that still runs, and all that it started."""
    if process.poll() is None:
        root = psutil.Process(process.pid)
        for one in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
