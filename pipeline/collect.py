"""Collection: Ray actors play a game and write frames datasets.

The rows of a dataset are dealt to *lanes*. A lane is one environment with a seed of its own that plays episode after
episode until it has written its share of the rows, into a file of its own; its last episode is truncated there. The
number of lanes follows from the number of rows alone, so that the same seed gives the same bytes whatever the number
of workers. A *shard*, the unit of work, is a few lanes stepped together.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import ray

from pipeline.atari import make_vector
from pipeline.errors import UserError
from pipeline.lanes import Lane, LaneResult, LaneWriter
from pipeline.policies import BehaviourFactory
from pipeline.protocols import protocol_rules
from pipeline.schema import EPISODES_SCHEMA, ROW_GROUP_ROWS, Preprocess
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


def plan_shards(frames: int, seed: int) -> list[list[Lane]]:
    """Deals `frames` rows to lanes and lanes to shards, by `frames` and `seed` alone."""
    num_lanes = min(MAX_LANES, 1 << max(0, (frames // LANE_ROWS).bit_length() - 1))
    share, rest = divmod(frames, num_lanes)
    seeds = np.random.SeedSequence(seed).generate_state(num_lanes) & 0x7FFFFFFF
    lanes = [Lane(i, int(seeds[i]), share + (i < rest)) for i in range(num_lanes)]
    return [lanes[i : i + LANES_PER_SHARD] for i in range(0, num_lanes, LANES_PER_SHARD)]


def collect(
    out: str,
    preprocess: Preprocess,
    *,
    frames: int,
    behaviour: BehaviourFactory,
    played_by: Mapping[str, Any],
    seed: int = 0,
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
        with_ram: Stores the emulator's RAM beside each frame.
        num_workers: Actors, one CPU and one environment thread each.
        overwrite: Replaces what is at `out`.
        on_rows: Called with the number of rows that were just written.

    Raises:
        UserError: `out` exists or cannot be written, or the disk is full; nothing is left behind.
    """
    require_room(out, frames, overwrite=overwrite)
    filesystem, root = _make_room(out, overwrite=overwrite)
    workers: list[Any] = []
    try:
        place = (filesystem, root)
        workers += [_Collector.remote(place, preprocess, with_ram) for _ in range(num_workers)]  # type: ignore[attr-defined]
        ray.get([worker.ready.remote() for worker in workers])
        start = time.perf_counter()
        with writing_told(filesystem, out), _full_disk_told(out):
            results, rows_per_worker = _run_shards(workers, plan_shards(frames, seed), behaviour, on_rows)
            require_written(filesystem, root, (result.file for result in results), out)
            settings = {**played_by, "seed": seed, "lanes": len(results)}
            _finish(filesystem, root, preprocess, results, seed=seed, with_ram=with_ram, collection=settings)
    except BaseException:
        for worker in workers:
            ray.kill(worker)  # first, so that none writes into what is deleted
        _delete(filesystem, root, out)
        raise
    return Collected(FramesDataset.open(out), time.perf_counter() - start, rows_per_worker)


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
    """Leaves an empty `data` folder at the root of the dataset."""
    filesystem, root = locate(out)
    try:
        if overwrite and filesystem.get_file_info(root).type == pafs.FileType.Directory:
            clear(filesystem, root)
        filesystem.create_dir(f"{root}/data", recursive=True)
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


@contextlib.contextmanager
def _full_disk_told(out: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause: Any = getattr(error, "cause", error)
        if isinstance(cause, OSError) and (cause.errno == errno.ENOSPC or "No space left" in str(cause)):
            raise UserError(
                f"the disk of {shown(out)} is full; free space or name another folder (nothing was kept)"
            ) from None
        raise


def _run_shards(
    workers: list[Any], shards: list[list[Lane]], behaviour: BehaviourFactory, on_rows: Callable[[int], None]
) -> tuple[list[LaneResult], dict[str, int]]:
    """Hands each idle worker the next shard; results come back in order of their lanes."""
    waiting, running, results = list(shards), {}, []
    rows_per_worker = {str(i): 0 for i in range(len(workers))}

    def give_work(index: int) -> None:
        if waiting:
            stream = workers[index].run.remote(waiting.pop(0), behaviour)
            running[stream] = index

    for index in range(len(workers)):
        give_work(index)
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        for stream in ready:
            index = running[stream]
            try:
                item = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                give_work(index)
                continue
            if isinstance(item, int):
                on_rows(item)
                rows_per_worker[str(index)] += item
            else:
                results.extend(item)
    return sorted(results, key=lambda result: result.lane.index), rows_per_worker


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


@ray.remote(num_cpus=1)
class _Collector:
    """A worker: plays the lanes of a shard and writes their files."""

    def __init__(self, place: tuple[pafs.FileSystem, str], preprocess: Preprocess, with_ram: bool) -> None:
        self._filesystem, self._root = place
        self._preprocess = preprocess
        self._with_ram = with_ram
        pa.array(
            [0]
        )  # pyarrow imports pandas at its first array, a third of a second: better now than in the first shard

    def ready(self) -> bool:
        """Answers once the process has started."""
        return True

    @ray.method(num_returns="streaming")
    def run(self, lanes: list[Lane], behaviour: BehaviourFactory) -> Iterator[int | list[LaneResult]]:
        """Yields numbers of written rows as they come, and at last the results of the lanes."""
        writers = [LaneWriter(self._filesystem, self._root, self._preprocess, lane, self._with_ram) for lane in lanes]
        yield from play_lanes(self._preprocess, lanes, writers, behaviour, with_ram=self._with_ram)
        yield [writer.close() for writer in writers]


def play_lanes(
    preprocess: Preprocess,
    lanes: list[Lane],
    writers: list[LaneWriter],
    behaviour: BehaviourFactory,
    *,
    with_ram: bool,
) -> Iterator[int]:
    """Steps the lanes' environments together until every writer has its rows; yields numbers of rows written."""
    rules = protocol_rules(preprocess.protocol)
    seeds = [lane.seed for lane in lanes]
    policy = behaviour(preprocess, seeds)
    env = make_vector(preprocess, len(lanes), with_ram=with_ram, life_loss_ends=rules.life_loss_ends_episode)
    step = env.reset(np.array(seeds, np.int64))
    is_first, pending = np.ones(len(lanes), bool), 0
    while any(not writer.is_full for writer in writers):
        actions = policy.act(step.frames, is_first)
        ended = step.terminated | step.truncated
        following = env.step(actions)
        for index, writer in enumerate(writers):
            pending += writer.add(step, index, int(actions[index]), float(following.rewards[index]))
        is_first, step = ended, following
        if pending >= ROW_GROUP_ROWS:
            yield pending
            pending = 0
    env.close()
    if pending:
        yield pending
