"""`latentrl report`: one self-contained page of a run, beside it and in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.lineage import RunFolder, find_relatives
from jobs.page import page_content
from jobs.workspace import Workspace
from pipeline.errors import TrackingPending
from pipeline.outbox import Outbox
from pipeline.report import write_report
from pipeline.tracking import CLOSE_PATIENCE_S, Tracking, open_outbox, pending_message

PAGE = "report.html"


def run(workspace: Workspace, run: str) -> dict[str, Any]:
    """Writes `report.html` into a run's folder and logs it as an artifact of the run.

    Args:
        workspace: Where runs are.
        run: A run folder, its name or an MLflow run id, of a train, evaluate or pretrain run.

    Returns:
        path: Of the page.

    Raises:
        UserError: No such run, or a stage that has no page.
        TrackingPending: The page is written, but the server has not received it.
    """
    folder = RunFolder.read(workspace.find_run(run))
    kin = find_relatives(folder, workspace)
    path = write_report(folder.path / PAGE, page_content(folder, kin, workspace))
    result = {"path": str(path)}
    outbox = _log_artifact(folder, path, workspace)
    if outbox.close(CLOSE_PATIENCE_S) > 0:
        message = pending_message(folder.path, folder.record.uri, outbox)
        raise TrackingPending(f"the page is written, but {message}", result)
    return result


def _log_artifact(folder: RunFolder, path: Path, workspace: Workspace) -> Outbox:
    """Adds the page to a run that has ended, and leaves its status and times as they are."""
    own, given = Tracking(folder.record.uri), Tracking(workspace.tracking_uri)
    address = given.address if given.uri == own.uri else own.address  # the given one may hold a password
    outbox = open_outbox(folder.path, folder.record, address)
    outbox.start()
    outbox.append("file", {"path": str(path), "directory": ""})
    return outbox
