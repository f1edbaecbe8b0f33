"""`metrics.jsonl` of a run: one line a step and its figures, which also go to the tracking server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

from pipeline.disk import write_text
from pipeline.errors import reading
from pipeline.registry import Run

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """The figures of a run being written."""

    def __init__(self, opened: Run) -> None:
        self._run, self._path = opened, opened.folder / METRICS_FILE

    def add(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Appends figures by step."""
        with self._path.open("a") as stream:
            for step, values in rows:
                stream.write(json.dumps({"step": step, **values}) + "\n")
                self._run.log_metrics(values, step=step)

    def forget(self, is_done_again: Callable[[int], bool]) -> None:
        """Drops what an earlier sitting recorded after its last checkpoint, and a line that it left half-written."""
        lines = self._path.read_text().split("\n")[:-1] if self._path.is_file() else []
        with reading(str(self._path), "remove it to go on without the curve so far"):
            kept = [line for line in lines if not is_done_again(json.loads(line)["step"])]
        write_text(self._path, "".join(f"{line}\n" for line in kept))
