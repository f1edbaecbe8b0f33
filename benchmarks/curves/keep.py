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

LIMIT_S = 7_200.0
_DIGITS = 1


class Kept:
    """Finished runs in a folder, one JSON file each."""

    def __init__(self, folder: Path, work: Path) -> None:
        """`work`: where runs put what is large."""
        self._folder, self._work = folder, work.absolute()

    def path(self, cell: Cell) -> Path:
        """The cell's file."""
        return self._folder / f"{cell.task}-{cell.arm}-{cell.seed}-{cell.digest}.json"

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished run gave."""
        for path in sorted(self._folder.glob(f"{cell.task}-{cell.arm}-{cell.seed}-*.json")):
            record = json.loads(path.read_text())
            if is_as_kept(cell.configuration, record["configuration"]):
                result: dict[str, Any] = record["result"]
                return result
        return None

    def run(self, cell: Cell) -> bool:
        """Runs the cell unless it has been run; False if it failed."""
        name = f"{cell.task} {cell.arm} seed {cell.seed}"
        if self.find(cell) is not None:
            print(f"{name}: kept", file=sys.stderr, flush=True)
            return True
        started = time.monotonic()
        try:
            result = run_apart("curves.runs", [cell.to_json(), str(self._work)], LIMIT_S)
        except CellFailed as failure:
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
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(record, separators=(",", ":")) + "\n")
        draft.replace(path)
