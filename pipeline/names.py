"""What to say to whoever gave a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED = 20
_LONGEST = 100  # of a name that is compared; what is longer is no slip of a finger


def suggestion(name: str, known: Iterable[str]) -> str:
    """The name that is most like it, as a question; where none is, those that there are."""
    names = list(known)
    ends = [other for other in names if other.endswith(f".{name}")]  # lr for train.lr
    near = ends or difflib.get_close_matches(name[:_LONGEST], names, n=1)
    return f"did you mean {', '.join(near)}?" if near else f"there are: {listed(names)}"


def listed(names: Iterable[str]) -> str:
    """Names in a line, the first twenty of many."""
    shown = list(names)
    return ", ".join(shown[:_MOST_LISTED]) + (", ..." if len(shown) > _MOST_LISTED else "") if shown else "none"
