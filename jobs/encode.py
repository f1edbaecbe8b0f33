"""`latentrl encode`: a dataset of frames becomes a dataset of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.cluster import ray_session
from jobs.progress import progress
from jobs.workspace import Workspace
from pipeline.encode import encode_dataset
from pipeline.errors import UserError
from pipeline.gauges import Gauges
from pipeline.registry import resolve
from pipeline.storage import base_name, shown
from pipeline.store import FramesDataset


def run(workspace: Workspace, data: str, encoder: str, out: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Encodes a frames dataset.

    Args:
        workspace: Where registry and Ray are.
        data: Folder or address of the frames.
        encoder: Address of the encoder.
        out: Folder or address of the latents.
        overwrite: Replaces latents that are there; without it an unfinished folder is finished.

    Returns:
        The keys that `latentrl encode --json` prints.

    Raises:
        UserError: What cannot work.
    """
    dataset = FramesDataset.open(data if "://" in data else str(Path(data).expanduser().absolute()))
    resolved = resolve(encoder, workspace.tracking_uri, workspace.cache)
    if resolved.kind != "encoder":
        raise UserError(f"{encoder} is a {resolved.kind}, not an encoder; give the encoder's address")
    dataset.require_sound_files()
    gauges = Gauges("encode", base_name(out), dataset.preprocess.game)
    with (
        ray_session(workspace, needs={"CPU": 1}, what="an encoding worker", data=data),
        progress(dataset.num_frames, f"encode {dataset.preprocess.game}", "frames", gauges) as bar,
    ):
        encoded = encode_dataset(dataset, resolved.path, out, overwrite=overwrite, on_frames=bar.advance)
    return {
        "dataset": shown(out),
        "frames": encoded.frames,
        "transitions": encoded.transitions,
        "frames_per_s": round(encoded.frames_now / max(encoded.seconds, 1e-9), 1),
        "encoder": resolved.uri or resolved.address,
        "encoder_sha256": resolved.sha256,
    }
