"""Columnar replay: one ring per environment (lane), single frames or latents, states made when drawn.

A row is one observation with the action taken on it and what that action brought. Row i of a lane holds:

    obs        the observation (uint8 frame or float16 latent), once; states are stacked from it when drawn
    action     the action taken on it; void in an episode's last row
    reward     what the action brought
    terminated the action ended the bootstrap: game over, or a life lost while the game goes on in row i + 1
    truncated  the action ended the episode without ending the bootstrap; row i + 1 holds the final observation
    is_last    the row holds an episode's final observation: no action was taken on it, it is never a start
    age        rows since the episode's first one; stacks are clipped there

and, worked out once when the rows that decide it have arrived:

    is_start   a transition can start here: an action was taken, the rewards up to the bootstrap and the observation to
               bootstrap from are there, and the whole stack is still held
    returns    the discounted sum of the rewards up to the bootstrap
    ahead      how many rows further the observation to bootstrap from lies; 0 where the bootstrap ended

Where an encoder goes on learning, three columns more keep latents of the frames, which `rllib_ext.cache` makes:

    z          by the encoder that Q reads with, float16; drawn as `obs` (double Q-learning: as `next_obs_online` too)
    z_target   by the target network's own; drawn as `next_obs`
    version    of the encoder that made them

With priorities, a sum tree holds one leaf a row: greater than 0 exactly where `is_start` is.

A transition's id is row * L + lane, its row counted from the lane's first ever. Rows are never counted anew when the
ring wraps, so an id is unique for the life of a run; its generation, how often its slot was used before, is
row // C. Whoever names an id can therefore never hit the transition that has taken its slot since.

Shapes: L lanes, C rows of a lane's ring, T rows and E lanes of a fragment, B batch, K stacked observations. A place is
a slot's index over all lanes, lane * C + row % C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rllib_ext.replay_spec import ReplaySpec, required_bytes
from rllib_ext.stacking import stack_positions
from rllib_ext.sum_tree import SumTree

_SENT = ("obs", "action", "reward", "terminated", "truncated", "is_last")
_LEAST_TD_ERROR = 1e-6  # keeps every transition drawable
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
    """Drawn transitions.

    `obs`, `next_obs` (B, K, ...) in the dtype stored; `action` (B,) int64; `returns` (B,) float32, the discounted sum
    of the rewards up to the bootstrap; `discount` (B,) float32, what the value of `next_obs` counts: 0 after a
    termination, else gamma to the number of rewards summed; `ids` (B,) int64, for `update_priorities`; `weights` (B,)
    float32, importance weights divided by the greatest of the batch, 1 where draws are uniform. `next_obs_online`
    (B, K, ...): what the online network reads of the next state, to choose its action; None where that is `next_obs`.
    """

    obs: NDArray[Any]
    action: NDArray[np.int64]
    returns: NDArray[np.float32]
    next_obs: NDArray[Any]
    discount: NDArray[np.float32]
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    next_obs_online: NDArray[Any] | None = None

    def of_each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Transitions:
        """The same with every column changed in one way."""
        return Transitions._make(column if column is None else change(column) for column in self)


class ColumnarReplay:
    """The rings, how they are filled, and draws from them.

    Attributes:
        columns: Name to (L, C, ...) array.
        written: (L,) int64, rows ever written; row r lies in slot r % C.
        tree: Priorities by place; None where draws are uniform.
        max_priority: The greatest priority seen so far, which new transitions get; 1 at first.
        num_cut_episodes: Episodes that were cut because their lane went on with another one.
        saved_as: Id of the checkpoint it was last saved to or loaded from; None before the first.
    """

    def __init__(self, spec: ReplaySpec, seed: int = 0) -> None:
        """Reserves memory for all rows; the system hands pages out as they are first written."""
        self.spec = spec
        self.rng = np.random.default_rng(seed)
        rings = (spec.num_lanes, spec.lane_rows)
        self.columns: dict[str, NDArray[Any]] = {
            name: np.zeros((*rings, *shape), dtype) for name, (dtype, shape) in spec.columns.items()
        }
        seen, seen_by_target = ("z", "z_target") if spec.z_dim else ("obs", "obs")
        self._read = {"obs": seen, "next_obs": seen_by_target, "next_obs_online": seen}
        self._flat = {name: column.reshape(-1, *column.shape[2:]) for name, column in self.columns.items()}
        self.written = np.zeros(spec.num_lanes, np.int64)
        self.tree = SumTree(spec.num_lanes * spec.lane_rows) if spec.priority_alpha else None
        self.max_priority = 1.0
        self.num_cut_episodes = 0
        self.saved_as: str | None = None
        self._drawn: dict[str, NDArray[Any]] = {}  # the observations of the last draw
        self._discounts = np.array([0.0, *spec.gamma ** np.arange(1, spec.n_step + 1)], np.float32)  # by `ahead`

    def __len__(self) -> int:
        """Rows held."""
        return int(np.minimum(self.written, self.spec.lane_rows).sum())

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row takes, in all columns and the tree."""
        return -(-required_bytes(self.spec) // (self.spec.num_lanes * self.spec.lane_rows))

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
        numbers = self.written[lanes] + np.arange(num_rows)[:, None]
        places = self._places(lanes, numbers)
        self._flat["age"][places] = self._ages(rows.is_first, lanes)
        self._flat["is_start"][places] = False
        for name in _SENT:
            self._flat[name][places] = getattr(rows, name)
        self.written[lanes] += num_rows
        self._find_starts(lanes, num_rows)

    def sample(self, batch_size: int, beta: float = 0.0, num_batches: int = 1) -> Transitions:
        """Draws transitions with replacement: in proportion to their priorities, or each equally likely.

        Args:
            batch_size: Transitions of a batch.
            beta: Exponent of the importance weights: 0 corrects nothing, 1 the whole bias of prioritised draws.
            num_batches: Batches drawn at once, one behind the other; weights are divided by the greatest of each.

        Returns:
            num_batches * batch_size transitions; their observations until the next draw, which takes their memory.

        Raises:
            ValueError: Nothing can be drawn yet.

        References:
            Schaul et al. (2016), Prioritized Experience Replay, eq. 1 and section 3.4. arXiv:1511.05952.
        """
        if not self.written.any():
            raise ValueError("the replay is empty")
        num_drawn = num_batches * batch_size
        if self.tree is None:
            return self._gather(self._draw_uniform(num_drawn), np.ones(num_drawn, np.float32))
        if self.tree.total == 0.0:
            raise self._no_transition()
        places = self.tree.find(self.rng.random(num_drawn))
        priorities = self.tree.weights.take(places).reshape(num_batches, batch_size)
        weights = (priorities / priorities.min(1, keepdims=True)) ** -beta  # N and the total cancel out
        return self._gather(places, weights.reshape(-1).astype(np.float32))

    def update_priorities(self, ids: NDArray[np.int64], td_errors: NDArray[np.float32]) -> None:
        """Sets priorities to (|TD error| + 1e-6) ** alpha; does nothing where draws are uniform.

        Args:
            ids: (N,) of drawn transitions. Those that have left the replay since are ignored; of one that is named
                several times the last TD error counts.
            td_errors: (N,) signed or absolute.

        Raises:
            ValueError: A TD error is not finite.
        """
        if self.tree is None:
            return
        held = self.is_start(ids)
        priorities = (np.abs(td_errors, dtype=np.float64) + _LEAST_TD_ERROR) ** self.spec.priority_alpha
        greatest = float(priorities.max(initial=0.0, where=held))
        if not math.isfinite(greatest):
            raise ValueError(f"TD errors must be finite; the greatest priority among {len(ids)} is {greatest}")
        self.max_priority = max(self.max_priority, greatest)
        self.tree.set(self._places_of(ids[held]), priorities[held])

    def is_start(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(N,) whether these transitions can be drawn: they are complete and still wholly held."""
        newest = self.written.take(ids % self.spec.num_lanes)
        rows = ids // self.spec.num_lanes
        is_held = (rows < newest) & (rows >= newest - self.spec.lane_rows)
        sound: NDArray[np.bool_] = is_held & self._flat["is_start"].take(self._places_of(ids))
        return sound

    def gather(self, ids: NDArray[np.int64]) -> Transitions:
        """The transitions of ids of which `is_start` holds, with weights of 1; memory as of `sample`."""
        return self._gather(self._places_of(ids), np.ones(len(ids), np.float32))

    def held_places(self, picks: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) places of the rows held, counted lane by lane: picks (N,) from 0 to `len(self)` - 1."""
        held = np.minimum(self.written, self.spec.lane_rows)
        ends = np.cumsum(held)
        lane = np.searchsorted(ends, picks, side="right")
        places: NDArray[np.int64] = lane * self.spec.lane_rows + picks - (ends - held).take(lane)
        return places

    def places_in_turn(self, first: int, count: int) -> tuple[NDArray[np.int64], int]:
        """Places of rows held, on a walk that comes by one slot of every lane before it comes by the next.

        Lanes that fill side by side are walked to their ends however slowly. Slots that hold nothing yet are passed.

        Args:
            first: Where the walk goes on.
            count: Slots to come by; once around at most.

        Returns:
            (N,) places, N at most `count`, and where the walk goes on after them.
        """
        lanes = np.flatnonzero(self.written)
        if not lanes.size:
            return np.zeros(0, np.int64), 0
        held = np.minimum(self.written[lanes], self.spec.lane_rows)
        num_slots = int(held.max()) * len(lanes)
        slot, lane = np.divmod((first + np.arange(min(count, num_slots))) % num_slots, len(lanes))
        places: NDArray[np.int64] = (lanes[lane] * self.spec.lane_rows + slot)[slot < held[lane]]
        return places, (first + min(count, num_slots)) % num_slots

    def draw_rows(self, count: int) -> NDArray[np.int64]:
        """Places (count,) of rows held, each equally likely, with replacement."""
        return self.held_places(self.rng.integers(0, len(self), count))

    def newest_places(self, first_lane: int, num_lanes: int, num_rows: int) -> NDArray[np.int64]:
        """(R, E) places of the newest rows of some lanes, oldest first; R is less where fewer are held."""
        lanes = np.arange(first_lane, first_lane + num_lanes)
        num_rows = int(min(num_rows, self.spec.lane_rows, self.written[lanes].min()))
        return self._places(lanes, self.written[lanes] + np.arange(-num_rows, 0)[:, None])

    def ends(self, num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places (N,) of the newest rows, and of the oldest held, of all lanes that hold any; at most so many a lane.

        Of each lane as many; fewer than asked for where a lane holds fewer.
        """
        lanes = np.flatnonzero(self.written)
        written, held = self.written[lanes], np.minimum(self.written[lanes], self.spec.lane_rows)
        rows = np.arange(min(num_rows, int(held.min())))[:, None]
        newest, oldest = (
            self._places(lanes, first + rows).reshape(-1) for first in (written - len(rows), written - held)
        )
        return newest, oldest

    def rows_at(self, name: str, places: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of a column's rows (N, ...) at places (N,)."""
        rows: NDArray[Any] = self._flat[name].take(places, axis=0)
        return rows

    def set_latents(self, places: NDArray[np.int64], z: NDArray[Any], z_target: NDArray[Any], version: int) -> None:
        """Sets latents (N, Z), both kinds, at places (N,), and the version that made them."""
        for name, value in (("z", z), ("z_target", z_target), ("version", version)):
            self._flat[name][places] = value

    def _draw_uniform(self, num_drawn: int) -> NDArray[np.int64]:
        num_held, places = len(self), np.empty(0, np.int64)
        for _ in range(_MAX_DRAWS):
            drawn = self.held_places(self.rng.integers(0, num_held, num_drawn - len(places)))
            places = np.append(places, drawn[self._flat["is_start"].take(drawn)])
            if len(places) == num_drawn:
                return places
        raise self._no_transition()

    def _no_transition(self) -> ValueError:
        return ValueError(f"no complete transition among the {len(self)} rows of the replay")

    def _gather(self, places: NDArray[np.int64], weights: NDArray[np.float32]) -> Transitions:
        lanes = places // self.spec.lane_rows
        lane_begins = lanes * self.spec.lane_rows
        newest = self.written.take(lanes) - 1
        rows = newest - (newest - (places - lane_begins)) % self.spec.lane_rows
        ahead, age = self._flat["ahead"].take(places), self._flat["age"].take(places)
        both = np.concatenate([rows, rows + ahead]), np.concatenate([age, age + ahead])
        positions = stack_positions(*both, self.spec.stack).reshape(2, len(places), self.spec.stack)
        positions = positions % self.spec.lane_rows + lane_begins[:, None]
        return Transitions(
            obs=self._observations("obs", positions[0]),
            action=self._flat["action"].take(places).astype(np.int64),
            returns=self._flat["returns"].take(places),
            next_obs=self._observations("next_obs", positions[1]),
            next_obs_online=self._observations("next_obs_online", positions[1]) if self.spec.is_double else None,
            discount=self._discounts.take(ahead),
            ids=rows * self.spec.num_lanes + lanes,
            weights=weights,
        )

    def _observations(self, name: str, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Gathers into memory of its own: fresh blocks of megabytes cost page faults and leave holes in the heap."""
        column = self._flat[self._read[name]]
        if len(self._drawn.get(name, ())) < len(positions):
            self._drawn[name] = np.empty((*positions.shape, *column.shape[1:]), column.dtype)
        drawn = self._drawn[name][: len(positions)]
        column.take(positions, axis=0, out=drawn, mode="clip")  # "raise" would gather twice
        return drawn

    def _places(self, lanes: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        places: NDArray[np.int64] = lanes * self.spec.lane_rows + rows % self.spec.lane_rows
        return places

    def _places_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._places(ids % self.spec.num_lanes, ids // self.spec.num_lanes)

    def _ages(self, is_first: NDArray[np.bool_], lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        newest = self._flat["age"].take(self._places(lanes, self.written[lanes] - 1))
        before = np.where(self.written[lanes] > 0, newest, -1)
        rows = np.arange(len(is_first))[:, None]
        since = np.maximum.accumulate(np.where(is_first, rows, -1 - before), axis=0)
        ages: NDArray[np.int64] = rows - since
        return ages

    def _cut_open_episodes(self, lanes: NDArray[np.int64]) -> None:
        lanes = lanes[self.written[lanes] > 0]
        if not lanes.size:  # nearly always
            return
        newest = self._places(lanes, self.written[lanes] - 1)
        is_open = ~self._flat["is_last"].take(newest)
        lanes, newest = lanes[is_open], newest[is_open]
        self.num_cut_episodes += len(lanes)
        self._flat["is_last"][newest] = True
        lanes = lanes[self._flat["age"].take(newest) > 0]
        before = self._places(lanes, self.written[lanes] - 2)
        self._flat["truncated"][before] = ~self._flat["terminated"].take(before)

    def _find_starts(self, lanes: NDArray[np.int64], num_added: int) -> None:
        """Works out transitions anew wherever the last add (and its cuts) can have changed them.

        Those are the rows added, the n before them, whose rewards may have been waiting for them, and the oldest
        K - 1, whose stacks may have been overwritten.
        """
        newest, oldest = self.written[lanes], np.maximum(self.written[lanes] - self.spec.lane_rows, 0)
        rows = newest + np.arange(-num_added - self.spec.n_step, 0)[:, None]
        places = self._places(lanes, rows)
        returns, ahead, is_complete = self._n_step_returns(places)
        is_held = rows >= oldest
        stack_start = rows - np.minimum(self._flat["age"].take(places), self.spec.stack - 1)
        is_start = is_complete & (stack_start >= oldest)
        kept = places[is_held]
        was_start = self._flat["is_start"].take(kept)
        self._flat["returns"][kept] = returns[is_held]
        self._flat["ahead"][kept] = ahead[is_held]
        self._flat["is_start"][kept] = is_start[is_held]
        broken = self._broken_stacks(lanes, oldest)
        self._flat["is_start"][broken] = False
        if self.tree is not None:
            before = np.where(was_start, self.tree.weights.take(kept), self.max_priority)
            priorities = np.where(is_start[is_held], before, 0.0)
            self.tree.set(np.append(kept, broken), np.append(priorities, np.zeros(len(broken))))

    def _n_step_returns(
        self, places: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
        """Returns, rows ahead to the bootstrap (0: none), and whether all that decides them has arrived.

        Args:
            places: (R, E) of consecutive rows, the last one the newest of its lane.
        """
        reward, terminated = self._flat["reward"].take(places), self._flat["terminated"].take(places)
        stops = terminated | self._flat["truncated"].take(places)
        returns, length = np.zeros(places.shape), np.zeros(places.shape, np.int64)
        goes_on, has_ended = np.ones(places.shape, bool), np.zeros(places.shape, bool)
        for k in range(min(self.spec.n_step, len(places))):
            here = slice(0, len(places) - k)
            returns[here] += goes_on[here] * (self.spec.gamma**k * reward[k:])
            length[here] += goes_on[here]
            has_ended[here] |= goes_on[here] & terminated[k:]
            goes_on[here] &= ~stops[k:]
        has_bootstrap = np.arange(len(places))[:, None] + length < len(places)
        is_complete = (has_ended | has_bootstrap) & ~self._flat["is_last"].take(places)
        return returns, np.where(has_ended, 0, length), is_complete

    def _broken_stacks(self, lanes: NDArray[np.int64], oldest: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) places among the oldest rows whose stack reaches back to rows that are no longer held."""
        rows = oldest + np.arange(min(self.spec.stack - 1, self.spec.lane_rows))[:, None]
        places = self._places(lanes, rows)
        stack_start = rows - np.minimum(self._flat["age"].take(places), self.spec.stack - 1)
        broken: NDArray[np.int64] = places[stack_start < oldest]
        return broken
