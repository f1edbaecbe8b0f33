"""A replay on disk: one .npy file a column and one JSON file; no pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from rllib_ext.replay import ColumnarReplay, ReplaySpec

_RECORD = "replay.json"


def save_replay(replay: ColumnarReplay, folder: Path) -> None:
    """Writes the rows held, the counters and the state of the generator into a new folder."""
    folder.mkdir(parents=True)
    filled = int(min(replay.written.max(initial=0), replay.spec.lane_rows))
    for name, column in replay.columns.items():
        stored = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", column.dtype, (column.shape[0], filled, *column.shape[2:])
        )
        stored[:] = column[:, :filled]
        stored.flush()
    record = {
        "spec": dataclasses.asdict(replay.spec),
        "written": replay.written.tolist(),
        "rng": replay.rng.bit_generator.state,
    }
    (folder / _RECORD).write_text(json.dumps(record))


def load_replay(folder: Path, expected: ReplaySpec) -> ColumnarReplay:
    """Reads what `save_replay` wrote.

    Args:
        folder: The folder it wrote.
        expected: What the run's settings ask for.

    Raises:
        UserError: The replay was made with other settings; both are shown.
    """
    record = json.loads((folder / _RECORD).read_text())
    spec = ReplaySpec(**{**record["spec"], "obs_shape": tuple(record["spec"]["obs_shape"])})
    if spec != expected:
        raise UserError(
            f"the replay in {folder} was made with {spec}, this run asks for {expected}; resume with the settings "
            f"the run was started with"
        )
    replay = ColumnarReplay(spec)
    for name, column in replay.columns.items():
        stored = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        column[:, : stored.shape[1]] = stored
    replay.written[:] = record["written"]
    replay.rng.bit_generator.state = record["rng"]
    return replay
