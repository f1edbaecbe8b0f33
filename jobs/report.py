"""`latentrl report`: one self-contained page of a run or an encoder, beside it and in MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jobs.encoder_page import encoder_content
from jobs.encoder_place import STAGE, EncoderPlace, find_encoder, is_encoder, place_of_run
from jobs.figures import figures_of
from jobs.page import page_content
from jobs.relatives import RunFolder, find_relatives
from jobs.workspace import Workspace
from pipeline.card import describe
from pipeline.errors import UserError, reading
from pipeline.outbox import Outbox
from pipeline.probed import Probed
from pipeline.registry import add_to_run
from pipeline.report import write_report

PAGE = "report.html"


def run(workspace: Workspace, asked: str, data: str | None = None) -> dict[str, Any]:
    """Writes `report.html` into the folder of a run or an encoder and logs it as an artifact of the run.

    Args:
        workspace: Where runs are.
        asked: A run folder, its name or an MLflow run id, of a train, evaluate or pretrain run; or an encoder's
            address.
        data: Folder or address of frames to show an encoder at work on; those that it learned from if None.

    Returns:
        path: Of the page.

    Raises:
        UserError: No such run or encoder, or a stage that has no page.
        TrackingPending: The page is written, but the server has not received it.
    """
    if is_encoder(asked):
        return _of_encoder(find_encoder(asked, workspace), workspace, data)
    folder = RunFolder.read(workspace.find_run(asked))
    folder.record.address(workspace.tracking_uri)  # refuses before the page is made
    if folder.record.stage == STAGE:
        return _of_encoder(place_of_run(folder), workspace, data)
    if data is not None:
        raise UserError(f"--data is for an encoder's page, and {folder.name} is a run of stage {folder.record.stage}")
    path = make_page(folder, workspace)
    result = {"path": str(path)}
    add_to_run(folder.path, workspace.tracking_uri, partial(_log_page, path), result, "the page is written")
    return result


def make_page(folder: RunFolder, workspace: Workspace) -> Path:
    """Writes the page of a train or evaluate run into the run's folder; contacts no server.

    Raises:
        UserError: A stage that has no page, or a file of one of the runs that the page shows is damaged.
    """
    kin = find_relatives(folder, workspace)
    with reading(f"a run that the page of {folder.name} shows", "restore its folder, or take it out of the home"):
        return write_report(folder.path / PAGE, page_content(folder, kin, workspace))


def _of_encoder(place: EncoderPlace, workspace: Workspace, data: str | None) -> dict[str, Any]:
    remarks: list[str] = []
    place.make_folder()
    pictures, is_new = figures_of(place, data, remarks)
    try:
        probes, missed = place.probes(workspace.tracking_uri), ""
    except UserError as error:
        probes, missed = place.own_probes(), f"Probes that MLflow has on record are not shown: {error}"
    said = {"pictures": remarks, "probes": [missed] if missed else []}
    path = make_encoder_page(place, pictures, probes, said, workspace)
    result = {"path": str(path), "run_id": place.record.run_id if place.record else None}
    if place.record is not None:

        def say(outbox: Outbox) -> None:
            _log_page(path, outbox)
            if is_new:
                outbox.append("folder", {"path": os.path.abspath(pictures), "directory": pictures.name})
            if not missed:
                describe(outbox, place.bundle, place.sha256, probes)

        add_to_run(place.folder, workspace.tracking_uri, say, result, "the page is written")
    return result


def make_encoder_page(
    place: EncoderPlace, pictures: Path, probes: list[Probed], remarks: Mapping[str, list[str]], workspace: Workspace
) -> Path:
    """Writes the page of an encoder into its folder; contacts no server. See `encoder_content`.

    Raises:
        UserError: A file that the page shows is damaged.
    """
    with reading(f"what the page of {place.address} shows", "restore it, or give --data DIR to draw it anew"):
        return write_report(place.folder / PAGE, encoder_content(place, pictures, probes, remarks, workspace))


def _log_page(path: Path, outbox: Outbox) -> None:
    outbox.append("file", {"path": str(path), "directory": ""})
