"""Columnar replay: one ring per environment (lane), single frames or latents, states and returns made when drawn.

A row is one observation with the action taken on it and what that action brought. Row i of a lane holds:

    obs        the observation (uint8 frame or float16 latent), once; states are stacked from it when drawn
    action     the action taken on it; void in an episode's last row
    reward     what the action brought
    terminated the action ended the bootstrap: game over, or a life lost while the game goes on in row i + 1
    truncated  the action ended the episode without ending the bootstrap; row i + 1 holds the final observation
    is_last    the row holds an episode's final observation: no action was taken on it, it is never a start
    age        rows since the episode's first one; stacks are clipped there

Shapes: L lanes, C rows of a lane's ring, T rows and E lanes of a fragment, B batch, K stacked observations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rllib_ext.stacking import stack_positions

COLUMNS: dict[str, np.dtype[Any]] = {
    "action": np.dtype(np.uint8),
    "reward": np.dtype(np.float32),
    "terminated": np.dtype(np.bool_),
    "truncated": np.dtype(np.bool_),
    "is_last": np.dtype(np.bool_),
    "age": np.dtype(np.int32),
}
_MAX_DRAWS = 1_000


class Rows(NamedTuple):
    """Consecutive rows of E lanes, time first; what a rollout worker sends.

    `obs` (T, E, ...); `action` (T, E) integer; `reward` (T, E) float32; the rest (T, E) bool. `is_first` marks the
    first observation of an episode.
    """

    obs: NDArray[Any]
    action: NDArray[Any]
    reward: NDArray[np.float32]
    is_first: NDArray[np.bool_]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    is_last: NDArray[np.bool_]


class Transitions(NamedTuple):
    """A drawn batch.

    `obs`, `next_obs` (B, K, ...) in the dtype stored; `action` (B,) int64; `returns` (B,) float32, the discounted sum
    of the rewards up to the bootstrap; `discount` (B,) float32, what the value of `next_obs` counts: 0 after a
    termination, else gamma to the number of rewards summed.
    """

    obs: NDArray[Any]
    action: NDArray[np.int64]
    returns: NDArray[np.float32]
    next_obs: NDArray[Any]
    discount: NDArray[np.float32]


@dataclass(frozen=True)
class ReplaySpec:
    """What a replay holds and how it is read.

    Attributes:
        num_lanes: L.
        lane_rows: C.
        obs_shape: Shape of one observation.
        obs_dtype: uint8 (frames) or float16 (latents), as numpy names it.
        stack: K.
        n_step: Greatest number of rewards in a return.
        gamma: Discount per step.
    """

    num_lanes: int
    lane_rows: int
    obs_shape: tuple[int, ...]
    obs_dtype: str
    stack: int
    n_step: int
    gamma: float


class ColumnarReplay:
    """The rings, how they are filled, and uniform draws from them."""

    def __init__(self, spec: ReplaySpec, seed: int = 0) -> None:
        """Reserves memory for all rows; the system hands pages out as they are first written."""
        self.spec = spec
        self.rng = np.random.default_rng(seed)
        shape = (spec.num_lanes, spec.lane_rows)
        self.columns: dict[str, NDArray[Any]] = {name: np.zeros(shape, dtype) for name, dtype in COLUMNS.items()}
        self.columns["obs"] = np.empty((*shape, *spec.obs_shape), spec.obs_dtype)
        self.written = np.zeros(spec.num_lanes, np.int64)  # rows ever written; row r lies in slot r % C

    def __len__(self) -> int:
        """Rows held."""
        return int(np.minimum(self.written, self.spec.lane_rows).sum())

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row takes, in all columns."""
        return sum(column.nbytes for column in self.columns.values()) // (self.spec.num_lanes * self.spec.lane_rows)

    def add(self, rows: Rows, first_lane: int) -> None:
        """Appends rows to E lanes from `first_lane` on.

        A fragment that starts a new episode where the last one was left open (a runner was restarted, a run resumed)
        cuts the open one: its newest row becomes the final observation and the action before it a truncation.
        """
        num_rows, num_lanes = rows.action.shape
        if num_rows > self.spec.lane_rows:
            raise ValueError(f"a fragment of {num_rows} rows does not fit into rings of {self.spec.lane_rows}")
        lanes = np.arange(first_lane, first_lane + num_lanes)
        self._cut_open_episodes(lanes[rows.is_first[0]])
        age = self._ages(rows.is_first, lanes)
        slots = (self.written[lanes] + np.arange(num_rows)[:, None]) % self.spec.lane_rows
        for name, column in self.columns.items():
            column[lanes, slots] = age if name == "age" else getattr(rows, name)
        self.written[lanes] += num_rows

    def sample(self, batch_size: int) -> Transitions:
        """Draws transitions with replacement, each valid start equally likely."""
        lanes, starts = self._draw(batch_size)
        return self.gather(lanes, starts)

    def _draw(self, batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # The place for prioritised draws and for ids: whatever chooses (lane, row), `gather` does the rest.
        held = np.minimum(self.written, self.spec.lane_rows)
        ends = np.cumsum(held)
        if ends[-1] == 0:
            raise ValueError("the replay is empty")
        lanes, starts = np.empty(0, np.int64), np.empty(0, np.int64)
        for _ in range(_MAX_DRAWS):
            pick = self.rng.integers(0, ends[-1], batch_size - len(lanes))
            lane = np.searchsorted(ends, pick, side="right")
            start = (self.written[lane] - (ends[lane] - pick)).astype(np.int64)
            keep = self.is_start(lane, start)
            lanes, starts = np.append(lanes, lane[keep]), np.append(starts, start[keep])
            if len(lanes) == batch_size:
                return lanes, starts
        raise ValueError(f"no complete transition among the {len(self)} rows of the replay")

    def is_start(self, lanes: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a transition can start at these rows.

        It can when an action was taken there, the whole stack is still held, and the rewards up to the bootstrap and
        the observation to bootstrap from have arrived. Rows are counted from the lane's first ever.
        """
        oldest = np.maximum(self.written[lanes] - self.spec.lane_rows, 0)
        stack_start = starts - np.minimum(self.spec.stack - 1, self._at("age", lanes, starts))
        length, ended = self._returns_end(lanes, starts)
        newest_needed = np.where(ended, starts + length - 1, starts + length)
        is_held = (stack_start >= oldest) & (newest_needed < self.written[lanes])
        sound: NDArray[np.bool_] = is_held & ~self._at("is_last", lanes, starts)
        return sound

    def gather(self, lanes: NDArray[np.int64], starts: NDArray[np.int64]) -> Transitions:
        """The transitions that start at valid rows.

        Args:
            lanes: (B,) lane of each.
            starts: (B,) row of each, counted from the lane's first ever.
        """
        length, ended = self._returns_end(lanes, starts)
        steps = np.arange(self.spec.n_step)
        rewards = self._at("reward", lanes[:, None], starts[:, None] + steps)
        weights = np.where(steps < length[:, None], self.spec.gamma**steps, 0.0)
        bootstrap_rows = np.where(ended, starts, starts + length)
        return Transitions(
            obs=self._stacked(lanes, starts),
            action=self._at("action", lanes, starts).astype(np.int64),
            returns=(rewards * weights).sum(1).astype(np.float32),
            next_obs=self._stacked(lanes, bootstrap_rows),
            discount=np.where(ended, 0.0, self.spec.gamma**length).astype(np.float32),
        )

    def _returns_end(
        self, lanes: NDArray[np.int64], starts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(B,) rewards in each return, and whether it ends without a bootstrap. Rows not yet written end nothing."""
        window = starts[:, None] + np.arange(self.spec.n_step)
        is_written = window < self.written[lanes][:, None]
        terminated = self._at("terminated", lanes[:, None], window) & is_written
        stops = terminated | (self._at("truncated", lanes[:, None], window) & is_written)
        stops[:, -1] = True
        last = stops.argmax(1)
        return last + 1, terminated[np.arange(len(last)), last]

    def _stacked(self, lanes: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[Any]:
        positions = stack_positions(rows, self._at("age", lanes, rows), self.spec.stack)
        return self._at("obs", lanes[:, None], positions)

    def _at(self, name: str, lanes: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[Any]:
        values: NDArray[Any] = self.columns[name][lanes, rows % self.spec.lane_rows]
        return values

    def _ages(self, is_first: NDArray[np.bool_], lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        newest = self._at("age", lanes, self.written[lanes] - 1)
        before = np.where(self.written[lanes] > 0, newest, -1)
        rows = np.arange(len(is_first))[:, None]
        since = np.maximum.accumulate(np.where(is_first, rows, -1 - before), axis=0)
        ages: NDArray[np.int64] = rows - since
        return ages

    def _cut_open_episodes(self, lanes: NDArray[np.int64]) -> None:
        lanes = lanes[self.written[lanes] > 0]
        newest = self.written[lanes] - 1
        is_open = ~self._at("is_last", lanes, newest)
        lanes, newest = lanes[is_open], newest[is_open]
        self.columns["is_last"][lanes, newest % self.spec.lane_rows] = True
        has_action_before = self._at("age", lanes, newest) > 0
        lanes, before = lanes[has_action_before], newest[has_action_before] - 1
        slots = before % self.spec.lane_rows
        self.columns["truncated"][lanes, slots] = ~self.columns["terminated"][lanes, slots]
