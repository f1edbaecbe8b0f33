"""What a test that injects a fault has measured, for `benchmarks/faults.py`, which makes the page of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROPERTY = "fault"
Record = Callable[[str, object], None]


def measured(record_property: Record, row: str, *, lost: str, read: str, **seconds: float) -> None:
    """Hands on a row's figures; pytest keeps them with the test's result.

    Args:
        record_property: pytest's fixture.
        row: Key of the row.
        lost: What was lost, in words with the figures counted here.
        read: The line that the user reads.
        seconds: From the fault until something, by what ("until_noticed").
    """
    figures: dict[str, Any] = {"row": row, "lost": lost, "read": read}
    figures["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    record_property(PROPERTY, figures)
