"""Collection: Ray actors play a game and write frames datasets.

The rows of a dataset are dealt to *lanes*. A lane is one environment with a seed of its own that plays episode after
episode until it has written its share of the rows, into a file of its own; its last episode is truncated there. The
number of lanes follows from the number of rows alone, so that the same seed gives the same bytes whatever the number
of workers. A *shard*, the unit of work, is a few lanes stepped together.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray

from pipeline.atari import Step, make_vector
from pipeline.errors import UserError
from pipeline.policies import BehaviourFactory
from pipeline.protocols import protocol_rules
from pipeline.schema import EPISODES_SCHEMA, RAM_BYTES, ROW_GROUP_ROWS, Preprocess, frames_schema
from pipeline.store import FileEntry, FramesDataset, assign_splits, episode_hash, hash_file, locate, write_manifest

LANE_ROWS = 4096  # a lane has at least so many rows
MAX_LANES = 256
LANES_PER_SHARD = 2
_EPISODES_PER_LANE = 1 << 32
_PAGE_BYTES = 8 << 20


@dataclass(frozen=True)
class Lane:
    """One environment's part of a dataset: index, seed of environment and policy, rows it owes."""

    index: int
    seed: int
    rows: int


@dataclass
class LaneResult:
    """What a lane wrote: its file and its episodes as (episode_id, first_row, length, return)."""

    lane: Lane
    file: FileEntry
    episodes: list[tuple[int, int, int, float]]


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
    try:
        workers = [_Collector.remote(out, preprocess, with_ram) for _ in range(num_workers)]  # type: ignore[attr-defined]
        ray.get([worker.ready.remote() for worker in workers])
        start = time.perf_counter()
        results, rows_per_worker = _run_shards(workers, plan_shards(frames, seed), behaviour, on_rows)
        settings = {**played_by, "seed": seed, "lanes": len(results)}
        _finish(filesystem, root, preprocess, results, seed=seed, with_ram=with_ram, collection=settings)
    except BaseException as error:
        filesystem.delete_dir(root)
        _raise_if_disk_full(error, out)
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
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            raise UserError(f"{out} is a file; name a folder for the dataset")
        if isinstance(filesystem, pafs.LocalFileSystem):
            _require_writable(Path(root), out)
        if info.type == pafs.FileType.Directory and filesystem.get_file_info(pafs.FileSelector(root)):
            if not overwrite:
                raise UserError(f"{out} exists and is not empty; add --overwrite or name another folder")
            _require_dataset_to_replace(filesystem, root, out)
    except OSError as error:
        raise _unwritable(out, error) from None


def _require_writable(root: Path, out: str) -> None:
    nearest = next(path for path in (root, *root.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {out} ({nearest} is no writable folder); name another one")


def _make_room(out: str, *, overwrite: bool) -> tuple[pafs.FileSystem, str]:
    """Leaves an empty `data` folder at the root of the dataset."""
    filesystem, root = locate(out)
    try:
        if overwrite and filesystem.get_file_info(root).type == pafs.FileType.Directory:
            filesystem.delete_dir_contents(root)
        filesystem.create_dir(f"{root}/data", recursive=True)
    except OSError as error:
        raise _unwritable(out, error) from None
    return filesystem, root


def _unwritable(out: str, error: OSError) -> UserError:
    return UserError(f"cannot write to {out} ({error.strerror or error}); name a writable folder")


def _require_dataset_to_replace(filesystem: pafs.FileSystem, root: str, out: str) -> None:
    """--overwrite replaces a dataset, finished or not, and never anything else."""
    names = {entry.base_name for entry in filesystem.get_file_info(pafs.FileSelector(root))}
    if not names <= {"data", "meta"}:
        raise UserError(f"{out} holds other things than a dataset ({sorted(names)[:3]}); name another folder")


def _raise_if_disk_full(error: BaseException, out: str) -> None:
    cause: Any = getattr(error, "cause", error)
    if isinstance(cause, OSError) and (cause.errno == errno.ENOSPC or "No space left" in str(cause)):
        raise UserError(f"the disk of {out} is full; free space or name another folder (nothing was kept)") from None


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

    def __init__(self, out: str, preprocess: Preprocess, with_ram: bool) -> None:
        self._filesystem, self._root = locate(out)
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


class LaneWriter:
    """Writes one lane's rows to its Parquet file, a row group at a time.

    Args:
        filesystem: Where the dataset lives.
        root: The dataset's path inside it.
        preprocess: What a frame is.
        lane: The lane; its `rows` are written, no more.
        with_ram: Whether the RAM column is written.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, root: str, preprocess: Preprocess, lane: Lane, with_ram: bool
    ) -> None:
        self._filesystem, self._lane = filesystem, lane
        self._name = f"data/lane-{lane.index:05d}.parquet"
        self._path = f"{root}/{self._name}"
        self._schema = frames_schema(preprocess, with_ram=with_ram)
        self._writer = pq.ParquetWriter(
            self._path,
            self._schema,
            filesystem=filesystem,
            compression="zstd",
            use_dictionary=False,
            write_page_checksum=True,
            data_page_size=_PAGE_BYTES,
            store_schema=True,
        )
        size = min(ROW_GROUP_ROWS, lane.rows)
        self._frames = np.empty((size, preprocess.frame_bytes), np.uint8)
        self._ram = np.empty((size, RAM_BYTES), np.uint8) if with_ram else None
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names if name not in ("obs", "ram")}
        self._written = 0
        self._first_row, self._return = 0, 0.0
        self._episodes: list[tuple[int, int, int, float]] = []

    @property
    def is_full(self) -> bool:
        """Whether the lane has all its rows."""
        return self._written + self._buffered == self._lane.rows

    @property
    def _buffered(self) -> int:
        return len(self._columns["t"])

    def add(self, step: Step, index: int, action: int, reward: float) -> int:
        """Stores environment `index` of a vector step, with the action taken there and the reward it brought.

        Returns:
            Rows stored: 1, or 0 when the lane is full.
        """
        if self.is_full:
            return 0
        position, row = self._buffered, self._written + self._buffered
        self._frames[position] = step.frames[index].reshape(-1)
        if self._ram is not None and step.ram is not None:
            self._ram[position] = step.ram[index]
        terminated = bool(step.terminated[index])
        is_last = terminated or bool(step.truncated[index]) or row + 1 == self._lane.rows
        self._append(row, step, index, None if is_last else action, 0.0 if is_last else reward, terminated, is_last)
        if is_last:
            self._end_episode(row)
        if self._buffered == len(self._frames) or self.is_full:
            self._flush()
        return 1

    def _append(
        self, row: int, step: Step, index: int, action: int | None, reward: float, terminated: bool, is_last: bool
    ) -> None:
        values = {
            "episode_id": self._episode_id,
            "t": row - self._first_row,
            "action": action,
            "reward": reward,
            "terminated": terminated,
            "truncated": is_last and not terminated,
            "lives": min(int(step.lives[index]), 127),
        }
        for name, value in values.items():
            self._columns[name].append(value)
        self._return += reward

    @property
    def _episode_id(self) -> int:
        return self._lane.index * _EPISODES_PER_LANE + len(self._episodes)

    def _end_episode(self, row: int) -> None:
        self._episodes.append((self._episode_id, self._first_row, row + 1 - self._first_row, self._return))
        self._first_row, self._return = row + 1, 0.0

    def _flush(self) -> None:
        count = self._buffered
        arrays = [self._array(name, count) for name in self._schema.names]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=ROW_GROUP_ROWS)
        self._written += count
        for column in self._columns.values():
            column.clear()

    def _array(self, name: str, count: int) -> pa.Array:
        pixels = {"obs": self._frames, "ram": self._ram}.get(name)
        if pixels is not None:
            buffer = pa.py_buffer(pixels[:count].tobytes())
            return pa.Array.from_buffers(pa.binary(pixels.shape[1]), count, [None, buffer])
        return pa.array(self._columns[name], type=self._schema.field(name).type)

    def close(self) -> LaneResult:
        """Finishes the file and returns its record."""
        self._writer.close()
        size = self._filesystem.get_file_info(self._path).size
        digest = hash_file(self._filesystem, self._path)
        return LaneResult(self._lane, FileEntry(self._name, self._written, size, digest), self._episodes)
