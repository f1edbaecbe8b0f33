"""Progress: bars on stderr, since stdout is for results, and figures for those who watch the cluster."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jobs.watch import sign_of_life
from pipeline.gauges import Gauges

_SECONDS_BETWEEN_LINES = 10.0  # where stderr is a file or a pipe


class Progress:
    """A bar that a stage moves."""

    def __init__(self, bar: tqdm[Any], total: float, unit: str, gauges: Gauges | None) -> None:
        self._bar, self._total, self._unit, self._gauges = bar, total, unit, gauges

    def advance(self, amount: float) -> None:
        """Moves the bar by an amount in its unit."""
        sign_of_life()
        self._bar.update(amount)
        if self._gauges is not None:
            self._gauges.count(self._unit, amount)
            self._gauges.show({"progress": self._bar.n / self._total if self._total else 1.0})

    def note(self, text: str) -> None:
        """Shows a short text behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)


@contextlib.contextmanager
def progress(total: float, label: str, unit: str, gauges: Gauges | None = None) -> Iterator[Progress]:
    """A bar from 0 to `total`, on stderr; the share that is done also goes to `gauges`.

    What is logged meanwhile gets lines of its own above the bar.
    """
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
        yield Progress(bar, total, unit, gauges)
