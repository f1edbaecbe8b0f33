"""Figures on their way from a worker to the driver. A module of its own, so that its process starts without torch."""

from __future__ import annotations

import ray

Row = tuple[int, dict[str, float]]


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds (step, values) rows in order until they are taken."""

    def __init__(self) -> None:
        """Starts empty."""
        self._rows: list[Row] = []

    def put(self, rows: list[Row]) -> None:
        """Adds rows."""
        self._rows += rows

    def take(self) -> list[Row]:
        """Empties the box."""
        rows, self._rows = self._rows, []
        return rows
