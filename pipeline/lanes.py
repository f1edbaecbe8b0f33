"""Lanes: environments that play and write, each its share of a dataset's rows into a Parquet file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.atari import Step, make_vector
from pipeline.policies import BehaviourFactory
from pipeline.protocols import protocol_rules
from pipeline.schema import RAM_BYTES, ROW_GROUP_ROWS, Preprocess, frames_schema
from pipeline.storage import hash_file
from pipeline.store import FileEntry

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
