"""`latentrl STAGE`: arguments in, one stage's `run` called, a result out.

Exit codes: 0 done; 1 a check found faults, or a job that was watched has failed; 2 bad input (one line says what to
do); 3 done, but the tracking server has not heard of it yet; 130 interrupted; 141 whoever read its output has gone;
143 terminated, and what can be kept is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jobs import readers, termination
from jobs.job_commands import add_job_commands
from jobs.operations import add_operations
from jobs.stages import add_stages
from pipeline import disk
from pipeline.errors import Terminated, TrackingPending, UserError
from pipeline.secrets import load_secrets
from pipeline.server import without_passwords

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

DESCRIPTION = """\
Learn a latent-variable model from images that an agent has seen, then learn to act on its latents.

The way of the data:  collect -> pretrain -> train -> evaluate -> report   (`latentrl demo` runs them all)
"""
EPILOG = """\
exit codes: 0 done, 1 a check found faults, 2 bad input, 3 done but the tracking server is behind, 130 interrupted,
141 nobody reads its output any more, 143 terminated: what a stage can keep is kept
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2."""
        self.exit(2, f"error: {without_passwords(message)}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser("latentrl", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter)
    stages = root.add_subparsers(title="stages", metavar="STAGE", required=True, parser_class=_Parser)
    add_stages(stages)
    add_job_commands(stages)
    add_operations(stages)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a stage and returns the exit code."""
    try:
        try:
            return _main(arguments)
        finally:
            print(end="", flush=True)  # there may be no sys.stdout
    except BrokenPipeError:
        return readers.let_go()
    except OSError as error:  # all others are told, or are standard output's or standard error's
        return readers.give_up(error)


def _main(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    termination.install()
    try:
        load_secrets()
        result: dict[str, Any] = options.run(options)
    except UserError as error:
        return _complain(error, 2)
    except TrackingPending as error:
        if error.result is not None:
            _show(error.result, options.present, as_json=options.json)
        return _complain(error, 3)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except Terminated as ended:
        print(ended.line, file=sys.stderr)
        return 143
    except Exception as error:
        if isinstance(error, BrokenPipeError) and readers.have_gone():
            raise
        user_error = _user_error_behind(error)
        if user_error is None:
            print(without_passwords(traceback.format_exc()), file=sys.stderr)
            return 1
        return _complain(user_error, 2)
    _show(result, options.present, as_json=options.json)
    return 1 if result.get("errors") else 0


def _complain(error: BaseException, code: int) -> int:
    line = _shown(" ".join(str(error).split()))
    print(f"error: {line}" if code == 2 else line, file=sys.stderr)
    return code


def _shown(text: str) -> str:
    """A text for a terminal: names and tags in it may be others', and could hold what moves a terminal's cursor."""
    safe = "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)
    return without_passwords(safe)


def _user_error_behind(error: BaseException) -> UserError | TrackingPending | None:
    """What the user can mend, out of the wrappers that Ray puts around it: a worker's UserError, or a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError | TrackingPending) and not hasattr(seen, "cause"):
            return seen
        if isinstance(seen, OSError) and disk.is_full(seen):
            return disk.full(seen.filename or "this machine")
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


def _show(result: dict[str, Any], present: Callable[[dict[str, Any]], str], *, as_json: bool) -> None:
    """The result in words; with --json, as one object on the last line of stdout."""
    print(_shown(present(result)), file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(without_passwords(json.dumps(result)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
