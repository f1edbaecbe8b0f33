"""What a test that injects a fault has measured, for `benchmarks/faults.py`, which makes the page of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

PROPERTY = "fault"
_PATH = re.compile(r"(?:/[\w.@-]+)+((?:/[\w.@-]+){2})")  # a path's end says enough, and no machine's places
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
    figures: dict[str, Any] = {"row": row, "lost": lost, "read": _PATH.sub(r"...\1", read)}
    figures["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    record_property(PROPERTY, figures)
