"""What an earlier run has left to go on with, for `--resume` and `--resume-if-any`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import sync
from jobs.garbage import removal_note
from jobs.settings import load_resolved
from jobs.workspace import RESULT_FILE, Workspace
from pipeline.errors import UserError, reading
from pipeline.untrusted import read_json

Result = dict[str, Any]


@dataclass(frozen=True)
class Earlier:
    """What an earlier run has left; nothing of either where a new one is to be started.

    Attributes:
        folder: Of the run that was cut off.
        result: Of a run that was done, but whose records reached the tracking server only now.
    """

    folder: Path | None = None
    result: Result | None = None


def earlier_run(
    workspace: Workspace,
    name: str,
    settings: Mapping[str, Any],
    has_started: Callable[[Path], object],
    *,
    is_required: bool,
    extended_by: str | None = None,
) -> Earlier:
    """Looks for the latest run of a name that can go on.

    A run that is done is one only where it is to go further. Without that, `is_required` decides: `--resume` refuses,
    and `--resume-if-any` delivers what the tracking server has not heard of it. Where there was something to deliver,
    that was all that the same command had left to do; else a new run is started.

    Args:
        workspace: Where runs are.
        name: Of the runs, without their number.
        settings: As `save_resolved` was given them.
        has_started: Whether there is something in a run's folder to go on with.
        is_required: Whether it is an error where there is none.
        extended_by: The setting that may differ: a run that is done with less of it goes on.

    Raises:
        UserError: There is none and `is_required`; or the latest was cut off and had other settings.
    """
    folder = workspace.latest_run_folder(name)
    if folder is None or not has_started(folder):
        if is_required:
            removed = removal_note(folder) if folder is not None else ""
            raise UserError(f"there is no {name} run under {workspace.runs} to go on with{removed}; leave out --resume")
        return Earlier()
    changed = _changed(folder, settings, extended_by)
    done = _result(folder)
    with reading(f"the {RESULT_FILE} of {folder.name}", "restore it or start another run"):
        goes_further = extended_by is not None and done is not None and done[extended_by] < settings[extended_by]
    if changed and (done is None or is_required):
        raise UserError(
            f"{folder.name} was started with other settings ({changed}); resume with those it was started with"
        )
    if done is None or (goes_further and not changed):
        return Earlier(folder)
    if is_required:
        raise UserError(f"run {folder.name} has finished; leave out --resume to start another")
    return Earlier() if changed else _delivered_now(workspace, folder)


def _delivered_now(workspace: Workspace, folder: Path) -> Earlier:
    if sync.run(workspace, folder.name)["delivered"] == 0:
        return Earlier()
    print(f"{folder.name} was done but for its records in MLflow, which are there now", file=sys.stderr)
    return Earlier(result=_result(folder))


def _changed(folder: Path, settings: Mapping[str, Any], extended_by: str | None) -> str:
    before = load_resolved(folder)
    changed = [key for key in settings if key != extended_by and before.get(key) != settings[key]]
    return "; ".join(f"{key}: {before.get(key)!r} then, {settings[key]!r} now" for key in changed)


def _result(folder: Path) -> Result | None:
    path = folder / RESULT_FILE
    return read_json(path, str(path)) if path.is_file() else None
