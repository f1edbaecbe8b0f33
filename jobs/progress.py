"""Progress bars on stderr; stdout is for results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jobs.watch import sign_of_life

_SECONDS_BETWEEN_LINES = 10.0  # where stderr is a file or a pipe


class Progress:
    """A bar that a stage moves."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def advance(self, amount: float) -> None:
        """Moves the bar by an amount in its unit."""
        sign_of_life()
        self._bar.update(amount)

    def note(self, text: str) -> None:
        """Shows a short text behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)


@contextlib.contextmanager
def progress(total: float, label: str, unit: str) -> Iterator[Progress]:
    """A bar from 0 to `total`, on stderr; what is logged meanwhile gets lines of its own above it."""
    is_terminal = sys.stderr.isatty()
    with (
        tqdm(
            total=total,
            desc=label,
            unit=f" {unit}",
            mininterval=0.2 if is_terminal else _SECONDS_BETWEEN_LINES,
            dynamic_ncols=is_terminal,
            ncols=None if is_terminal else 100,
            unit_scale=False,
            file=sys.stderr,
        ) as bar,
        logging_redirect_tqdm(),
    ):
        yield Progress(bar)
