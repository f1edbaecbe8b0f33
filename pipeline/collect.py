"""Collection: Ray actors play a game and write frames datasets.

The rows of a dataset are dealt to *lanes*. A lane is one environment with a seed of its own that plays episode after
episode until it has written its share of the rows, into a file of its own; its last episode is truncated there. The
number of lanes follows from the number of rows alone, so that the same seed gives the same bytes whatever the number
of workers. A *shard*, the unit of work, is a few lanes stepped together.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.crew import Crew
from pipeline.disk import full_disk_told
from pipeline.errors import Terminated, UserError
from pipeline.lanes import Lane, LaneResult
from pipeline.policies import BehaviourFactory
from pipeline.protocols import PARTS
from pipeline.schema import EPISODES_SCHEMA, Preprocess
from pipeline.storage import locate, reason, require_bucket, shown, writing_told
from pipeline.store import (
    FramesDataset,
    assign_splits,
    clear,
    episode_hash,
    require_written,
    write_manifest,
)

log = logging.getLogger(__name__)

LANE_ROWS = 4096  # a lane has at least so many rows
MAX_LANES = 256
LANES_PER_SHARD = 2


@dataclass(frozen=True)
class Collected:
    """A finished collection: the dataset, seconds of collecting, rows by each worker."""

    dataset: FramesDataset
    seconds: float
    rows_per_worker: dict[str, int] = field(default_factory=dict)


def plan_shards(frames: int, seed: int, part: str | None = None) -> list[list[Lane]]:
    """Deals `frames` rows to lanes and lanes to shards, by these arguments alone."""
    num_lanes = min(MAX_LANES, 1 << max(0, (frames // LANE_ROWS).bit_length() - 1))
    share, rest = divmod(frames, num_lanes)
    seeds = lane_seeds(seed, num_lanes, part)
    lanes = [Lane(i, seeds[i], share + (i < rest)) for i in range(num_lanes)]
    return [lanes[i : i + LANES_PER_SHARD] for i in range(0, num_lanes, LANES_PER_SHARD)]


def lane_seeds(seed: int, num_lanes: int, part: str | None = None) -> list[int]:
    """Seeds of emulators and policies; the lowest bit is the part's, so that no two parts ever share one."""
    if part is None:
        return [int(drawn) & 0x7FFFFFFF for drawn in np.random.SeedSequence(seed).generate_state(num_lanes)]
    number = PARTS.index(part)
    drawn = np.random.SeedSequence([seed, 1 + number]).generate_state(num_lanes)
    return [int(value) & 0x7FFFFFFE | number for value in drawn]


def collect(
    out: str,
    preprocess: Preprocess,
    *,
    frames: int,
    behaviour: BehaviourFactory,
    played_by: Mapping[str, Any],
    seed: int = 0,
    part: str | None = None,
    with_ram: bool = False,
    num_workers: int = 1,
    overwrite: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Collected:
    """Collects a dataset of exactly `frames` rows on `num_workers` Ray actors; Ray must be running.

    Args:
        out: Folder or pyarrow.fs address of the dataset.
        preprocess: What a frame is.
        frames: Rows to store; each lane's last episode is truncated at its share.
        behaviour: Makes the policy that plays.
        played_by: For the record: the policy's name or address, a bundle's sha256, its share of random actions.
        seed: Decides everything; the digest depends on it and not on `num_workers`.
        part: One of PARTS; no seed gives an emulator of one part the seed of one of the other.
        with_ram: Stores the emulator's RAM beside each frame.
        num_workers: Actors, one CPU and one environment thread each.
        overwrite: Replaces what is at `out`.
        on_rows: Called with the number of rows that were just written; negative where they were lost with a worker.

    Raises:
        UserError: `out` exists or cannot be written, or the disk is full; nothing is left behind.
    """
    require_room(out, frames, overwrite=overwrite)
    filesystem, root = _make_room(out, overwrite=overwrite)
    crew = Crew((filesystem, root), preprocess, num_workers, with_ram=with_ram)
    try:
        crew.wait_until_ready()
        start = time.perf_counter()
        with writing_told(filesystem, out), full_disk_told(shown(out)):
            results = crew.play(plan_shards(frames, seed, part), behaviour, on_rows)
            require_written(filesystem, root, (result.file for result in results), out)
            settings = {**played_by, "seed": seed, "lanes": len(results), **({"part": part} if part else {})}
            _finish(filesystem, root, preprocess, results, seed=seed, with_ram=with_ram, collection=settings)
    except BaseException as error:
        crew.stop()  # first, so that no worker writes into what is deleted
        _delete(filesystem, root, out)
        if isinstance(error, Terminated):
            raise Terminated(f"terminated; nothing of {shown(out)} was kept: run the same command again") from None
        raise
    crew.stop()
    return Collected(FramesDataset.open(out), time.perf_counter() - start, crew.rows_per_worker)


def require_room(out: str, frames: int, *, overwrite: bool) -> None:
    """Refuses a collection that cannot be stored, before anything is started; writes nothing.

    Raises:
        UserError: No frames are asked for, or `out` exists or is not a place for a dataset.
    """
    if frames < 1:
        raise UserError(f"--frames is {frames}; ask for at least 1")
    filesystem, root = locate(out)
    require_bucket(filesystem, root, out)
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            raise UserError(f"{shown(out)} is a file; name a folder for the dataset")
        if isinstance(filesystem, pafs.LocalFileSystem):
            _require_writable(Path(root), out)
        if info.type == pafs.FileType.Directory and filesystem.get_file_info(pafs.FileSelector(root)):
            if not overwrite:
                raise UserError(f"{shown(out)} exists and is not empty; add --overwrite or name another folder")
            _require_dataset_to_replace(filesystem, root, out)
    except OSError as error:
        raise _unwritable(out, error) from None


def _require_writable(root: Path, out: str) -> None:
    nearest = next(path for path in (root, *root.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {shown(out)} ({nearest} is no writable folder); name another one")


def _make_room(out: str, *, overwrite: bool) -> tuple[pafs.FileSystem, str]:
    """Leaves an empty `data` folder at the root of the dataset, which no other collection has made."""
    filesystem, root = locate(out)
    try:
        if overwrite and filesystem.get_file_info(root).type == pafs.FileType.Directory:
            clear(filesystem, root)
        if isinstance(filesystem, pafs.LocalFileSystem):
            Path(root, "data").mkdir(parents=True)
        else:
            filesystem.create_dir(f"{root}/data", recursive=True)
    except FileExistsError:
        raise UserError(f"another collection is writing {out}; wait for it or name another folder") from None
    except OSError as error:
        raise _unwritable(out, error) from None
    return filesystem, root


def _unwritable(out: str, error: OSError) -> UserError:
    return UserError(f"cannot write to {shown(out)} ({reason(error)}); mend that, or name another place")


def _require_dataset_to_replace(filesystem: pafs.FileSystem, root: str, out: str) -> None:
    """--overwrite replaces a dataset, finished or not, and never anything else."""
    names = {entry.base_name for entry in filesystem.get_file_info(pafs.FileSelector(root))}
    if not names <= {"data", "meta"}:
        raise UserError(f"{shown(out)} holds other things than a dataset ({sorted(names)[:3]}); name another folder")


def _delete(filesystem: pafs.FileSystem, root: str, out: str) -> None:
    try:
        filesystem.delete_dir(root)
    except OSError as error:
        log.warning("what was written to %s is left there, without a manifest (%s)", shown(out), reason(error))


def _finish(
    filesystem: pafs.FileSystem,
    root: str,
    preprocess: Preprocess,
    results: list[LaneResult],
    *,
    seed: int,
    with_ram: bool,
    collection: dict[str, Any],
) -> None:
    rows = [(e[0], r.file.name, e[1], e[2], e[3], r.lane.seed) for r in results for e in r.episodes]
    splits = assign_splits([episode_hash(preprocess.game, seed, row[0]) for row in rows])
    columns = [list(column) for column in zip(*[(*row, split) for row, split in zip(rows, splits)])]
    write_manifest(
        filesystem,
        root,
        preprocess=preprocess,
        files=tuple(result.file for result in results),
        episodes=pa.table(columns, schema=EPISODES_SCHEMA),
        has_ram=with_ram,
        collection=collection,
    )
