"""SIGTERM, as schedulers send it before they take a machine away: asked once, a stage that can keep its state does so
and the process ends with code 143; asked twice, or where there is nothing to keep, it ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from pipeline.errors import Terminated

REACH_S = 20.0  # for the next place where the state can be kept; Kubernetes gives 30 s in all by default
_STDERR = 2

_current: Request | None = None


class Request:
    """Whether this process has been asked to end while a stage keeps its state."""

    def __init__(self) -> None:
        self.is_made = False

    def make(self) -> None:
        """Notes it and sees to it that the process ends also if the stage does not come to keep its state."""
        self.is_made = True
        _say(f"\nSIGTERM: the state is kept within {REACH_S:.0f} s, then this ends; a second one ends it at once\n")
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, REACH_S)

    def is_heard(self) -> bool:
        """Whether it is made, asked where the state is kept now; there is no hurry from here on."""
        if self.is_made:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return self.is_made


def install() -> None:
    """Makes SIGTERM mean what this file says; in the main thread."""
    signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Within it the first SIGTERM is a request, which whoever keeps the state looks at now and then.

    Outside of the main thread nothing is deferred, since signals do not arrive there.
    """
    global _current
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before, _current = _current, request
    try:
        yield request
    finally:
        _current = before
        if request.is_made:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    if _current is None:
        raise Terminated("terminated; a run that has a checkpoint goes on with --resume")
    if _current.is_made:
        raise Terminated(
            "terminated at once, on the second SIGTERM; what was kept before is there: go on with --resume"
        )
    _current.make()


def _give_up(signum: int, frame: FrameType | None) -> None:
    raise Terminated(
        f"terminated; the state could not be kept within {REACH_S:.0f} s: go on from the last checkpoint with --resume"
    )


def _say(text: str) -> None:
    """Not by print, which may be at work when the signal arrives."""
    with contextlib.suppress(OSError):
        os.write(_STDERR, text.encode())
