"""Cells that are measured once: a small JSON file each; and tables between two marks of a page kept by hand."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"

Record = dict[str, Any]


def measured_once(path: Path, measure: Callable[[], Record], seconds_key: str) -> Record:
    """The record kept at `path`, measured first unless it is there; its seconds are added under `seconds_key`."""
    if not path.is_file():
        began = time.perf_counter()
        found = measure()
        found[seconds_key] = round(time.perf_counter() - began, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(found) + "\n")
        draft.replace(path)
    record: Record = json.loads(path.read_text())
    return record


def exit_code(main: Callable[[], int]) -> int:
    """A benchmark's exit code; what its user can mend is one line and code 2, as of `latentrl`."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def kept(folder: Path) -> list[Record]:
    """All records of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def write_page(folder: Path, name: str, summary: Record, tables: str) -> None:
    """`NAME.json` with the summary, and the tables between the two marks of `NAME.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    path = folder / f"{name}.md"
    before, _, rest = (path.read_text() if path.is_file() else f"# {name}\n\n{BEGIN}\n{END}\n").partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{rest.partition(END)[2]}")
