"""What a training's workers and its driver tell each other. A module of its own: its process starts without torch."""

from __future__ import annotations

import ray

Row = tuple[int, dict[str, float]]


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds (step, values) rows and lines for the user until the driver takes them, and its wish that training stop."""

    def __init__(self) -> None:
        """Starts empty."""
        self._rows: list[Row] = []
        self._lines: list[str] = []
        self._is_stopping = False

    def put(self, rows: list[Row]) -> bool:
        """Adds rows; whether training is to stop at the next place where it can be kept."""
        self._rows += rows
        return self._is_stopping

    def say(self, line: str) -> None:
        """Adds a line for the user."""
        self._lines.append(line)

    def ask_to_stop(self) -> None:
        """Makes `put` answer so from now on."""
        self._is_stopping = True

    def take(self) -> tuple[list[Row], list[str]]:
        """Empties the box of rows and lines."""
        rows, self._rows = self._rows, []
        lines, self._lines = self._lines, []
        return rows, lines
