"""`latentrl sync RUN`: sends what a run could not tell its tracking server while that was away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.workspace import RESULT_FILE, Workspace
from pipeline.disk import write_text
from pipeline.registry import Registered, registrations, sync
from pipeline.untrusted import read_json


def run(workspace: Workspace, run: str) -> dict[str, Any]:
    """Delivers the rest of a run's journal, a registration included, and completes the run's `result.json`.

    Args:
        workspace: Where runs are.
        run: Folder, folder name or MLflow run id.

    Returns:
        run (folder name), delivered (entries sent now), and registered (addresses of the run's model versions).

    Raises:
        UserError: No such run, it is still being written, or the server does not answer.
        TrackingPending: The server went away again before the end.
    """
    folder = workspace.find_run(run)
    delivered = sync(folder, workspace.tracking_uri)
    versions = registrations(folder)
    if versions:
        _complete_result(folder / RESULT_FILE, versions[-1])
    return {"run": folder.name, "delivered": delivered, "registered": [version.uri for version in versions]}


def _complete_result(path: Path, registered: Registered) -> None:
    """Fills in what the stage did not know yet when it ended without its server."""
    if not path.exists():
        return
    result = read_json(path, str(path))
    late = {"model_uri": registered.uri, "version": registered.version, "aliases": list(registered.aliases)}
    missing = {key: value for key, value in late.items() if key in result and result[key] in (None, [])}
    if missing:
        write_text(path, json.dumps({**result, **missing}, indent=2) + "\n")
