"""`latentrl report`: one self-contained page of a run, beside it and in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.page import page_content
from jobs.relatives import RunFolder, find_relatives
from jobs.workspace import Workspace
from pipeline.errors import TrackingPending, reading
from pipeline.outbox import Outbox
from pipeline.report import write_report
from pipeline.tracking import CLOSE_PATIENCE_S, open_outbox, pending_message

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
    folder.record.address(workspace.tracking_uri)  # refuses before the page is made
    path = make_page(folder, workspace)
    result = {"path": str(path)}
    outbox = _log_artifact(folder, path, workspace)
    if outbox.close(CLOSE_PATIENCE_S) > 0:
        message = pending_message(folder.path, folder.record.uri, outbox)
        raise TrackingPending(f"the page is written, but {message}", result)
    return result


def make_page(folder: RunFolder, workspace: Workspace) -> Path:
    """Writes the page into the run's folder; contacts no server.

    Raises:
        UserError: A stage that has no page, or a file of one of the runs that the page shows is damaged.
    """
    kin = find_relatives(folder, workspace)
    with reading(f"a run that the page of {folder.name} shows", "restore its folder, or take it out of the home"):
        return write_report(folder.path / PAGE, page_content(folder, kin, workspace))


def _log_artifact(folder: RunFolder, path: Path, workspace: Workspace) -> Outbox:
    """Adds the page to a run that has ended, and leaves its status and times as they are."""
    outbox = open_outbox(folder.path, folder.record, folder.record.address(workspace.tracking_uri))
    outbox.start()
    outbox.append("file", {"path": str(path), "directory": ""})
    return outbox
