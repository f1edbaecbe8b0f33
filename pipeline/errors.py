"""The three ways in which a stage ends other than well, each with its exit code."""

from __future__ import annotations

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
