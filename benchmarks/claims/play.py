"""Random play in memory: the frames that `latentrl collect` stores, without Ray and without a disk."""

from __future__ import annotations

from typing import cast

import numpy as np

from pipeline.atari import Step, preprocess_for
from pipeline.collect import plan_shards
from pipeline.lanes import Lane, LaneWriter, play_lanes
from pipeline.policies import random_policy


class _MemoryWriter:
    """Keeps a lane's frames; see pipeline.lanes.LaneWriter."""

    def __init__(self, lane: Lane, frame_shape: tuple[int, int]) -> None:
        self.frames = np.empty((lane.rows, *frame_shape), np.uint8)
        self._count = 0

    @property
    def is_full(self) -> bool:
        """Whether the lane has all its rows."""
        return self._count == len(self.frames)

    def add(self, step: Step, index: int, action: int, reward: float) -> int:
        """Keeps environment `index`'s frame."""
        if self.is_full:
            return 0
        self.frames[self._count] = step.frames[index]
        self._count += 1
        return 1


def random_frames(game: str, count: int, seed: int) -> np.ndarray:
    """(count, 84, 84) uint8, those of `latentrl collect --game GAME --frames COUNT --seed SEED`, in its order."""
    preprocess = preprocess_for(game)
    kept = []
    for shard in plan_shards(count, seed):
        writers = [_MemoryWriter(lane, (preprocess.height, preprocess.width)) for lane in shard]
        for _ in play_lanes(
            preprocess, shard, cast(list[LaneWriter], writers), random_policy("random"), with_ram=False
        ):
            pass
        kept += [writer.frames for writer in writers]
    return np.concatenate(kept)
