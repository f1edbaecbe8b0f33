"""A replay on disk: .npy files and one JSON file; no pickle.

replay.json       settings, counters, the state of the generator
COLUMN.npy        one a small column, (L, rows held), whole
priorities.npy    the leaves of the sum tree, (L, rows held) float64; only where draws are prioritised
obs-00000.npy     observations, (L, rows of a segment, ...), one a segment of every ring

A segment that no row was written to since the previous checkpoint is that checkpoint's file once more, by a hard link,
so that a checkpoint costs what has changed and yet stands alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from rllib_ext.replay import COLUMNS, ColumnarReplay, ReplaySpec

_RECORD = "replay.json"
_FORMAT = 3
_PRIORITIES = "priorities"
_SEGMENT_BYTES = 32 * 2**20


def save_replay(replay: ColumnarReplay, folder: Path, previous: Path | None = None) -> None:
    """Writes the rows held, priorities, counters and the state of the generator into a new folder.

    Args:
        replay: What to save.
        folder: Is made.
        previous: A folder that this wrote earlier. Its segments are used again if the replay was last saved there or
            loaded from there; whatever has become of the run otherwise, all is written anew.
    """
    folder.mkdir(parents=True)
    filled = _rows_filled(replay)
    for name, column in _small_columns(replay).items():
        np.save(folder / f"{name}.npy", column[:, :filled])
    segment_rows = _segment_rows(replay.spec)
    is_same = _unchanged_segments(replay, previous, segment_rows)
    for i, begin in enumerate(range(0, filled, segment_rows)):
        path = folder / _segment_name(i)
        if previous is None or not is_same[i] or not _link(previous / path.name, path):
            np.save(path, replay.columns["obs"][:, begin : min(begin + segment_rows, filled)])
    record = {
        "format": _FORMAT,
        "id": uuid.uuid4().hex,
        "spec": dataclasses.asdict(replay.spec),
        "segment_rows": segment_rows,
        "written": replay.written.tolist(),
        "max_priority": replay.max_priority,
        "num_cut_episodes": replay.num_cut_episodes,
        "rng": replay.rng.bit_generator.state,
    }
    (folder / _RECORD).write_text(json.dumps(record))
    replay.saved_as = str(record["id"])


def load_replay(folder: Path, expected: ReplaySpec) -> ColumnarReplay:
    """Reads what `save_replay` wrote; what is drawn from it next equals what the saved one draws next.

    Args:
        folder: The folder it wrote.
        expected: What the run's settings ask for.

    Raises:
        UserError: The replay was made with other settings (both are shown) or by another version of this program.
    """
    record = _read_record(folder)
    if record.get("format") != _FORMAT:
        raise UserError(
            f"the replay in {folder} has format {record.get('format', 1)}, this version reads format {_FORMAT}; resume "
            f"with the version that wrote it, or start the run anew"
        )
    spec = ReplaySpec(**{**record["spec"], "obs_shape": tuple(record["spec"]["obs_shape"])})
    if spec != expected:
        raise UserError(
            f"the replay in {folder} was made with {spec}, this run asks for {expected}; resume with the settings "
            f"the run was started with"
        )
    replay = ColumnarReplay(spec)
    replay.written[:] = record["written"]
    replay.max_priority = record["max_priority"]
    replay.num_cut_episodes = record["num_cut_episodes"]
    replay.rng.bit_generator.state = record["rng"]
    replay.saved_as = record["id"]
    _read_columns(replay, folder, record["segment_rows"])
    return replay


def _read_columns(replay: ColumnarReplay, folder: Path, segment_rows: int) -> None:
    filled = _rows_filled(replay)
    for name in COLUMNS:
        replay.columns[name][:, :filled] = _open(folder / f"{name}.npy")
    for i, begin in enumerate(range(0, filled, segment_rows)):
        stored = _open(folder / _segment_name(i))
        replay.columns["obs"][:, begin : begin + stored.shape[1]] = stored
    if replay.tree is not None:
        for lane, priorities in enumerate(_open(folder / f"{_PRIORITIES}.npy")):
            replay.tree.set(lane * replay.spec.lane_rows + np.arange(filled), priorities)


def _small_columns(replay: ColumnarReplay) -> dict[str, NDArray[Any]]:
    columns = {name: replay.columns[name] for name in COLUMNS}
    if replay.tree is not None:
        columns[_PRIORITIES] = replay.tree.weights.reshape(replay.spec.num_lanes, replay.spec.lane_rows)
    return columns


def _rows_filled(replay: ColumnarReplay) -> int:
    return int(min(replay.written.max(initial=0), replay.spec.lane_rows))


def _segment_rows(spec: ReplaySpec) -> int:
    row = spec.num_lanes * int(np.prod(spec.obs_shape)) * np.dtype(spec.obs_dtype).itemsize
    return max(1, _SEGMENT_BYTES // row)


def _segment_name(i: int) -> str:
    return f"obs-{i:05d}.npy"


def _unchanged_segments(replay: ColumnarReplay, previous: Path | None, segment_rows: int) -> NDArray[np.bool_]:
    """Of every segment of the rings, whether no row was written to it since the checkpoint `previous`."""
    num_slots = replay.spec.lane_rows
    none = np.zeros(-(-num_slots // segment_rows), np.bool_)
    if previous is None or not (previous / _RECORD).is_file():
        return none
    record = _read_record(previous)
    if record.get("id") != replay.saved_as or record.get("segment_rows") != segment_rows:
        return none
    before = np.array(record["written"])
    begins = np.arange(0, num_slots, segment_rows)
    ends = np.minimum(begins + segment_rows, num_slots)
    # Rows before[l] to written[l] - 1 of lane l are new. The next row of a segment to be written, from before[l] on:
    slot = before[:, None] % num_slots
    inside = (begins <= slot) & (slot < ends)
    wait = np.where(inside, 0, (begins - slot) % num_slots)
    is_untouched: NDArray[np.bool_] = before[:, None] + wait >= replay.written[:, None]
    return np.logical_and.reduce(is_untouched)


def _link(source: Path, target: Path) -> bool:
    """Whether the file could be taken over; where there are no hard links it is written anew."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return True
    return False


def _read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
    return record


def _open(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
