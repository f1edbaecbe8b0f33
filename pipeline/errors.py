"""The two ways in which a stage ends other than well, each with its exit code."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: one line that says what, the value seen, and what to do.

    The command line prints it as `error: ...` and exits with code 2, without a traceback.
    """


class TrackingPending(Exception):
    """The work is done and safe on disk, but the tracking server has not received all of it.

    The command line prints the line, which names `latentrl sync RUN`, and exits with code 3.
    """
