"""Where a command prints to: readers that have had enough (`latentrl jobs logs JOB --follow | head`), full disks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import TextIO

EXIT_CODE = 128 + signal.SIGPIPE  # a shell's word for the end of programs that do not catch SIGPIPE, as Python does


def have_gone() -> bool:
    """Whether nobody reads standard output or standard error any more."""
    return any(map(_has_lost_its_reader, (sys.stdout, sys.stderr)))


def let_go() -> int:
    """Sends what is still to be written there nowhere, so that Python does not complain at its end; the exit code."""
    _send_nowhere(*filter(_has_lost_its_reader, (sys.stdout, sys.stderr)))
    return EXIT_CODE


def give_up(error: OSError) -> int:
    """Says, where that can be said, that what the command prints cannot be written (a full disk); the exit code."""
    with contextlib.suppress(OSError):
        print(f"error: the output cannot be written ({error.strerror}); send it elsewhere", file=sys.stderr, flush=True)
    _send_nowhere(sys.stdout, sys.stderr)
    return 2


def _send_nowhere(*streams: TextIO | None) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or no file
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
    os.close(nowhere)


def _has_lost_its_reader(stream: TextIO | None) -> bool:
    if stream is None:  # closed when this process was started
        return False
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # errors are always told
    except (OSError, ValueError):  # no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
