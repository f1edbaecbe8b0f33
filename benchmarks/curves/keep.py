"""Runs cells in processes of their own and keeps what they gave, by the digest of their configuration."""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from peers.results import machine
from peers.running import CellFailed, run_apart

from curves.arms import Cell, is_as_kept, plain
from pipeline import disk
from pipeline.errors import UserError, reading

LIMIT_S = 7_200.0
_DIGITS = 1


class Kept:
    """Finished runs in a folder, one JSON file each."""

    def __init__(self, folder: Path, work: Path, module: str = "curves.runs", limit_s: float = LIMIT_S) -> None:
        """`work`: where runs put what is large; `module`: of the benchmarks, runs a cell as `curves.runs` does."""
        self._folder, self._work, self._module, self._limit_s = folder, work.absolute(), module, limit_s

    def path(self, cell: Cell) -> Path:
        """The cell's file."""
        return self._folder / f"{cell.task}-{cell.arm}-{cell.seed}-{cell.digest}.json"

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished run gave.

        Raises:
            UserError: The cell has settings that there are not, or its file is damaged.
        """
        for path in sorted(self._folder.glob(f"{cell.task}-{cell.arm}-{cell.seed}-*.json")):
            with reading(f"the kept run {path}", "restore it, or remove it to have it run again"):
                record = json.loads(path.read_text())
                configuration, result = record["configuration"], dict[str, Any](record["result"])
            if is_as_kept(cell.configuration, configuration):
                return result
        return None

    def run(self, cell: Cell) -> bool:
        """Runs the cell unless it has been run; False if it failed."""
        name = f"{cell.task} {cell.arm} seed {cell.seed}"
        started = time.monotonic()
        try:
            if self.find(cell) is not None:
                print(f"{name}: kept", file=sys.stderr, flush=True)
                return True
            result = run_apart(self._module, [cell.to_json(), str(self._work)], self._limit_s)
        except (CellFailed, UserError) as failure:
            print(f"{name}: FAILED\n{failure}", file=sys.stderr, flush=True)
            return False
        self._keep(cell, result)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return True

    def _keep(self, cell: Cell, result: dict[str, Any]) -> None:
        result["games"] = [[int(steps), round(value, 2), round(s, _DIGITS)] for steps, value, s in result["games"]]
        record = {
            "configuration": plain(cell.configuration),
            "torch": metadata.version("torch"),
            "machine": machine(),
            "result": result,
        }
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, json.dumps(record, separators=(",", ":")) + "\n")
