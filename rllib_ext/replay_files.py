"""A replay on disk: .npy files and one JSON file; no pickle.

replay.json       settings, counters, the state of the generator
COLUMN.npy        one a column but obs, (L, rows held, ...), whole
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

from pipeline.errors import UserError, reading
from pipeline.untrusted import converted, from_record, read_json, short
from rllib_ext.replay import ColumnarReplay
from rllib_ext.replay_spec import ReplaySpec

_RECORD = "replay.json"
_FORMAT = 3
_PRIORITIES = "priorities"
_ADDED = {"z_dim": 0, "is_double": False}  # to the spec, since the first version of this format
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
            f"the replay in {folder} has format {short(record.get('format', 1))}, this version reads format {_FORMAT}; "
            f"resume with the version that wrote it, or start the run anew"
        )
    with reading(f"the replay in {folder}", "restore it, or start the run anew"):
        spec = from_record(ReplaySpec, _ADDED | record["spec"], "its spec")
        if spec != expected:
            raise UserError(
                f"the replay in {folder} was made with {spec}, this run asks for {expected}; resume with the settings "
                f"the run was started with"
            )
        replay = ColumnarReplay(spec)
        replay.written[:] = converted(record["written"], tuple[int, ...], "written")
        replay.max_priority = converted(record["max_priority"], float, "max_priority")
        replay.num_cut_episodes = converted(record["num_cut_episodes"], int, "num_cut_episodes")
        replay.rng.bit_generator.state = record["rng"]
        replay.saved_as = converted(record["id"], str, "id")
        _read_columns(replay, folder, converted(record["segment_rows"], int, "segment_rows"))
        return replay


def _read_columns(replay: ColumnarReplay, folder: Path, segment_rows: int) -> None:
    if replay.written.min() < 0 or segment_rows < 1 or replay.max_priority <= 0:
        raise ValueError("its counters are not above 0")
    filled = _rows_filled(replay)
    for name in _whole_columns(replay):
        _fill(replay.columns[name][:, :filled], folder / f"{name}.npy")
    if not (replay.columns["age"] >= 0).all() or not _within(replay.columns["ahead"], 0, replay.spec.n_step):
        raise ValueError("its rows point at rows that it does not hold")
    for i, begin in enumerate(range(0, filled, segment_rows)):
        _fill(replay.columns["obs"][:, begin : min(begin + segment_rows, filled)], folder / _segment_name(i))
    if replay.tree is not None:
        _read_priorities(replay, folder, filled)


def _read_priorities(replay: ColumnarReplay, folder: Path, filled: int) -> None:
    assert replay.tree is not None
    weights = np.zeros((replay.spec.num_lanes, filled))
    _fill(weights, folder / f"{_PRIORITIES}.npy")
    if not np.isfinite(weights).all() or not ((weights > 0) == replay.columns["is_start"][:, :filled]).all():
        raise ValueError("its priorities are not above 0 exactly where a transition starts")
    for lane, priorities in enumerate(weights):
        replay.tree.set(lane * replay.spec.lane_rows + np.arange(filled), priorities)


def _fill(target: NDArray[Any], path: Path) -> None:
    """Copies a stored array into one of the same form; an array of Python objects, a pickle, is not read at all."""
    stored = np.lib.format.open_memmap(path, mode="r")
    if (stored.dtype, stored.shape) != (target.dtype, target.shape):
        raise ValueError(f"{path.name} holds {stored.dtype} {stored.shape}, not {target.dtype} {target.shape}")
    target[:] = stored


def _within(column: NDArray[Any], least: int, most: int) -> bool:
    return bool(((column >= least) & (column <= most)).all())


def _small_columns(replay: ColumnarReplay) -> dict[str, NDArray[Any]]:
    columns = {name: replay.columns[name] for name in _whole_columns(replay)}
    if replay.tree is not None:
        columns[_PRIORITIES] = replay.tree.weights.reshape(replay.spec.num_lanes, replay.spec.lane_rows)
    return columns


def _whole_columns(replay: ColumnarReplay) -> list[str]:
    return [name for name in replay.spec.columns if name != "obs"]


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
    return read_json(folder / _RECORD, f"the {_RECORD} in {folder}")
