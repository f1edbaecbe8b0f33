"""Who reads what a command prints may have had enough (`latentrl jobs logs JOB --follow | head`): it ends quietly."""

from __future__ import annotations

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
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(_has_lost_its_reader, (sys.stdout, sys.stderr)):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return EXIT_CODE


def _has_lost_its_reader(stream: TextIO | None) -> bool:
    if stream is None:  # closed when this process was started
        return False
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # errors are always told
    except (OSError, ValueError):  # no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
