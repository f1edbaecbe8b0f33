"""The three ways in which a stage ends other than well, each with its exit code."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """Something the user can mend: one line that says what, the value seen, and what to do.

    The command line prints it as `error: ...` and exits with code 2, without a traceback.
    """


class TrackingPending(Exception):
    """The work is done and safe on disk, but the tracking server has not received all of it.

    The command line prints the line, which names `latentrl sync RUN`, and exits with code 3.

    Attributes:
        result: What the stage would have returned, where it ended as a whole.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message, result)
        self.result = result

    def __str__(self) -> str:
        return str(self.args[0])


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM), and has kept or dropped its work as the line says.

    The command line prints the line and exits with code 143; uncaught it ends the process with that code too.

    Attributes:
        line: For the user: what is kept, and how to go on.
    """

    def __init__(self, line: str) -> None:
        super().__init__(143)
        self.line = line

    def __str__(self) -> str:
        return self.line


@contextlib.contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Around the reading of what another person may have made: whatever goes wrong in there is the file's fault.

    Args:
        what: Is read, for the message ("the encoder bundle enc").
        advice: What to do about it.

    Raises:
        UserError: In place of any other exception, which stays its cause; a full disk is no fault of the file.
    """
    try:
        yield
    except (UserError, TrackingPending):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{what} cannot be read ({reason(error)}); {advice}") from error


def reason(error: BaseException) -> str:
    """An error in one short line, its kind named where its text alone says little."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    line = text if len(text.split()) > 2 else f"{kind}: {text}" if text else kind
    return line if len(line) <= 300 else line[:297] + "..."
