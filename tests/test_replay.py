"""The columnar replay against a slow, obvious one, for any mix of endings, cuts, ring sizes and fragment lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_ext.replay import ColumnarReplay, Rows
from rllib_ext.replay_spec import ReplaySpec, required_bytes
from rllib_ext.stacking import RollingStack

GAMMA = 0.9
GO, LIFE, OVER, CUT_SHORT = "go", "life lost", "game over", "truncated"
ALPHAS = st.sampled_from([0.0, 0.6])
EVENTS = st.sampled_from([GO, GO, GO, GO, LIFE, OVER, CUT_SHORT])


class SlowReplay:
    """Whole histories in lists of dicts; every question is answered by walking along them."""

    def __init__(self, spec: ReplaySpec) -> None:
        self.spec = spec
        self.lanes: list[list[dict]] = [[] for _ in range(spec.num_lanes)]
        self.priorities: dict[int, float] = {}  # by id
        self.max_priority = 1.0
        self.num_cut_episodes = 0

    def add(self, rows: Rows, first_lane: int) -> None:
        for t in range(len(rows.action)):
            for e in range(rows.action.shape[1]):
                self._append({name: getattr(rows, name)[t, e] for name in Rows._fields}, self.lanes[first_lane + e])
        valid = [id for id in range(self.num_ids()) if self.transition(*self.where(id)) is not None]
        self.priorities = {id: self.priorities.get(id, self.max_priority) for id in valid}

    def _append(self, row: dict, lane: list[dict]) -> None:
        if row["is_first"] and lane and not lane[-1]["is_last"]:
            self.num_cut_episodes += 1
            lane[-1]["is_last"] = True
            if not lane[-1]["is_first"] and not lane[-2]["terminated"]:
                lane[-2]["truncated"] = True
        lane.append(row)

    def update(self, ids: list[int], td_errors: list[float]) -> None:
        for id, td_error in zip(ids, td_errors, strict=True):
            if id in self.priorities:
                self.priorities[id] = (abs(td_error) + 1e-6) ** self.spec.priority_alpha
                self.max_priority = max(self.max_priority, self.priorities[id])

    def num_ids(self) -> int:
        return max(len(lane) for lane in self.lanes) * self.spec.num_lanes

    def where(self, id: int) -> tuple[int, int]:
        return id % self.spec.num_lanes, id // self.spec.num_lanes

    def transition(self, lane: int, start: int):
        """(stack, action, return, next stack or None, discount), or None where none can start."""
        rows = self.lanes[lane]
        oldest_held = max(0, len(rows) - self.spec.lane_rows)
        if start < oldest_held or start >= len(rows) or rows[start]["is_last"]:
            return None
        stack = self._stack(rows, start, oldest_held)
        if stack is None:
            return None
        total = 0.0
        for k in range(self.spec.n_step):
            if start + k >= len(rows):
                return None
            row = rows[start + k]
            total += GAMMA**k * float(row["reward"])
            if row["terminated"]:
                return stack, rows[start]["action"], total, None, 0.0
            if row["truncated"] or k == self.spec.n_step - 1:
                if start + k + 1 >= len(rows):
                    return None
                next_stack = self._stack(rows, start + k + 1, oldest_held)
                return stack, rows[start]["action"], total, next_stack, GAMMA ** (k + 1)
        raise AssertionError

    def _stack(self, rows: list[dict], newest: int, oldest_held: int):
        picked = [newest]
        while len(picked) < self.spec.stack:
            picked.append(picked[-1] if rows[picked[-1]]["is_first"] else picked[-1] - 1)
            if picked[-1] < 0:
                return None
        return None if min(picked) < oldest_held else [rows[i]["obs"] for i in reversed(picked)]


class FakeGame:
    """E lanes that end as they are told; observation and reward count the rows, so every mistake shows."""

    def __init__(self, num_lanes: int, count: int = 0) -> None:
        self.num_lanes = num_lanes
        self.count = count
        self.restart()

    def restart(self) -> None:
        self.is_first = np.ones(self.num_lanes, bool)
        self.is_last = np.zeros(self.num_lanes, bool)

    def fragment(self, events: list[list[str]]) -> Rows:
        steps = [self._step(np.array(event)) for event in events]
        return Rows(*(np.stack(column) for column in zip(*steps, strict=True)))

    def _step(self, event: np.ndarray) -> Rows:
        number = self.count + np.arange(self.num_lanes)
        self.count += self.num_lanes
        was_last = self.is_last
        terminated = np.isin(event, [LIFE, OVER]) & ~was_last
        truncated = (event == CUT_SHORT) & ~was_last
        row = Rows(
            obs=np.stack([number % 251, number // 251], 1).astype(np.uint8),
            action=number % 7,
            reward=np.where(was_last, 0, number % 13).astype(np.float32),
            is_first=self.is_first,
            terminated=terminated,
            truncated=truncated,
            is_last=was_last,
        )
        self.is_first = was_last
        self.is_last = ((event == OVER) | (event == CUT_SHORT)) & ~was_last
        return row


@st.composite
def histories(draw, priority_alpha=ALPHAS):
    """(spec, lanes of the first of two workers, what happens).

    What happens: which worker sends, whether it was restarted before, the events of its rows, and priorities that
    arrive afterwards, of transitions that are there, were there, or never came.
    """
    num_lanes = draw(st.integers(1, 4))
    num_rows = draw(st.integers(1, 5))
    spec = ReplaySpec(
        num_lanes=num_lanes,
        lane_rows=draw(st.integers(max(5, num_rows), 14)),
        obs_shape=(2,),
        obs_dtype="uint8",
        stack=draw(st.integers(1, 4)),
        n_step=draw(st.integers(1, 4)),
        gamma=GAMMA,
        priority_alpha=draw(priority_alpha),
    )
    vector_step = st.lists(EVENTS, min_size=num_lanes, max_size=num_lanes)
    rows = st.lists(vector_step, min_size=num_rows, max_size=num_rows)
    updates = st.lists(st.tuples(st.integers(0, 150), st.floats(-9, 9, width=32)), max_size=8)
    happening = st.tuples(st.booleans(), st.booleans(), rows, updates)
    return spec, draw(st.integers(1, num_lanes)), draw(st.lists(happening, min_size=1, max_size=12))


def play(spec: ReplaySpec, split: int, happenings) -> Iterator[tuple[ColumnarReplay, SlowReplay]]:
    """The fast and the slow replay (always the same two), after each thing that happens."""
    fast, slow = ColumnarReplay(spec), SlowReplay(spec)
    games = [FakeGame(split), FakeGame(spec.num_lanes - split, count=30_000)]
    for is_second, is_restart, events, updates in happenings:
        is_second = is_second and split < spec.num_lanes
        first_lane, game = split * is_second, games[is_second]
        if is_restart:
            game.restart()
        rows = game.fragment([event[: game.num_lanes] for event in events])
        fast.add(rows, first_lane)
        slow.add(rows, first_lane)
        ids, td_errors = [id for id, _ in updates], [td_error for _, td_error in updates]
        fast.update_priorities(np.array(ids, np.int64), np.array(td_errors, np.float32))
        slow.update(ids, td_errors)
        yield fast, slow


def played(*history) -> tuple[ColumnarReplay, SlowReplay]:
    return list(play(*history))[-1]


@settings(max_examples=250, deadline=None)
@given(histories())
def test_every_transition_equals_the_slow_reference(history):
    fast, slow = played(*history)
    assert fast.num_cut_episodes == slow.num_cut_episodes
    for id in range(slow.num_ids()):
        expected = slow.transition(*slow.where(id))
        assert fast.is_start(np.array([id])).tolist() == [expected is not None]
        if expected is None:
            continue
        stack, action, total, next_stack, discount = expected
        drawn = fast.gather(np.array([id]))
        assert drawn.ids[0] == id
        np.testing.assert_array_equal(drawn.obs[0], stack)
        assert drawn.action[0] == action
        assert drawn.returns[0] == pytest.approx(total)
        assert drawn.discount[0] == pytest.approx(discount)
        if discount:
            np.testing.assert_array_equal(drawn.next_obs[0], next_stack)


@settings(max_examples=200, deadline=None)
@given(histories(priority_alpha=st.just(0.6)))
def test_priorities_are_those_of_the_slow_reference_whatever_happens(history):
    for fast, slow in play(*history):
        expected = np.zeros((fast.spec.num_lanes, fast.spec.lane_rows))
        for id, priority in slow.priorities.items():
            lane, row = slow.where(id)
            expected[lane, row % fast.spec.lane_rows] = priority
        held = fast.tree.weights.reshape(expected.shape)
        np.testing.assert_allclose(held, expected, rtol=1e-12)
        np.testing.assert_array_equal(held > 0, fast.columns["is_start"])
        assert fast.max_priority == pytest.approx(slow.max_priority)
        assert fast.tree.total == pytest.approx(expected.sum())


@settings(max_examples=60, deadline=None)
@given(histories())
def test_rolling_stacks_are_the_stacks_of_the_replay(history):
    spec, _, happenings = history
    fast, game, rolling = ColumnarReplay(spec), FakeGame(spec.num_lanes), RollingStack(spec.stack)
    for _, _, events, _ in happenings:
        rows = game.fragment(events)
        fast.add(rows, 0)
        for t in range(len(events)):
            acted_on = rolling.push(rows.obs[t], rows.is_first[t])
            age_limit = fast.spec.lane_rows - (len(events) - t)
            for lane in range(spec.num_lanes):
                row = fast.written[lane] - len(events) + t
                if fast.columns["age"][lane, row % spec.lane_rows] < age_limit:
                    drawn = fast.gather(np.array([row * spec.num_lanes + lane]))
                    np.testing.assert_array_equal(drawn.obs[0], acted_on[lane])


def one_lane(events: list[str], lane_rows: int = 50, priority_alpha: float = 0.0) -> ColumnarReplay:
    spec = ReplaySpec(1, lane_rows, (2,), "uint8", 2, 3, GAMMA, priority_alpha)
    return played(spec, 1, [(False, False, [[event] for event in events], [])])[0]


def starts(replay: ColumnarReplay) -> list[int]:
    rows = np.arange(replay.written[0])
    return rows[replay.is_start(rows)].tolist()


def test_every_state_of_an_episode_can_be_drawn_the_last_ones_included():
    assert starts(one_lane([GO] * 5 + [OVER, GO])) == [0, 1, 2, 3, 4, 5]
    assert starts(one_lane([GO] * 5 + [CUT_SHORT, GO])) == [0, 1, 2, 3, 4, 5]


def test_a_lost_life_ends_the_bootstrap_and_the_game_goes_on():
    replay = one_lane([GO, GO, LIFE, GO, GO, GO, GO])
    assert starts(replay) == [0, 1, 2, 3]
    drawn = replay.gather(np.array([1, 2, 3]))
    np.testing.assert_allclose(drawn.discount, [0, 0, GAMMA**3])
    np.testing.assert_allclose(drawn.returns[:2], [1 + GAMMA * 2, 2])
    np.testing.assert_array_equal(drawn.obs[2][:, 0], [2, 3])  # the stack reaches back over the lost life


def test_a_truncation_bootstraps_from_the_final_observation():
    replay = one_lane([GO, CUT_SHORT, GO, GO])
    drawn = replay.gather(np.array([0]))
    assert drawn.discount[0] == pytest.approx(GAMMA**2)
    np.testing.assert_array_equal(drawn.next_obs[0][:, 0], [1, 2])


def test_a_restart_cuts_the_open_episode():
    spec = ReplaySpec(1, 50, (2,), "uint8", 2, 3, GAMMA)
    replay, _ = played(spec, 1, [(False, False, [[GO]] * 4, []), (False, True, [[GO]] * 4, [])])
    assert replay.num_cut_episodes == 1
    assert starts(replay) == [0, 1, 2, 4]
    assert replay.gather(np.array([2])).discount[0] == pytest.approx(GAMMA)


def two_lanes(priority_alpha: float) -> tuple[ColumnarReplay, list[int]]:
    """A wrapped replay and the ids that can be drawn from it."""
    spec = ReplaySpec(2, 12, (2,), "uint8", 3, 2, GAMMA, priority_alpha)
    events = [[GO, GO], [OVER, GO], [GO, CUT_SHORT]] * 6
    happenings = [(False, False, events[i : i + 6], []) for i in range(0, len(events), 6)]
    replay, slow = played(spec, 2, happenings)
    return replay, [id for id in range(slow.num_ids()) if slow.transition(*slow.where(id)) is not None]


def assert_drawn_in_proportion(ids: np.ndarray, expected: dict[int, float]) -> None:
    """Pearson's chi-squared test; the draws have a fixed seed."""
    drawn, counts = np.unique(ids, return_counts=True)
    assert drawn.tolist() == sorted(expected)
    shares = np.array([expected[id] for id in drawn.tolist()])
    wanted = len(ids) * shares / shares.sum()
    assert ((counts - wanted) ** 2 / wanted).sum() < len(wanted) + 5 * np.sqrt(2 * len(wanted))


def test_draws_are_uniform_over_valid_starts():
    replay, valid = two_lanes(priority_alpha=0.0)
    drawn = replay.sample(40_000)
    assert_drawn_in_proportion(drawn.ids, dict.fromkeys(valid, 1.0))
    assert (drawn.weights == 1).all()
    assert replay.tree is None


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_draws_are_in_proportion_to_priorities_and_weights_correct_them(alpha):
    replay, valid = two_lanes(alpha)
    td_errors = np.linspace(-2, 1, len(valid)).astype(np.float32)
    replay.update_priorities(np.array(valid), td_errors)
    priorities = dict(zip(valid, (np.abs(td_errors.astype(float)) + 1e-6) ** alpha, strict=True))
    drawn = replay.sample(8, beta=0.4, num_batches=5_000)
    assert_drawn_in_proportion(drawn.ids, priorities)
    chances = np.array([priorities[id] for id in drawn.ids.tolist()]).reshape(5_000, 8) / sum(priorities.values())
    unscaled = (len(valid) * chances) ** -0.4
    expected = unscaled / unscaled.max(1, keepdims=True)
    np.testing.assert_allclose(drawn.weights.reshape(5_000, 8), expected, rtol=1e-5)
    assert (replay.sample(100).weights == 1).all()  # beta 0


def test_with_beta_1_weighted_draws_have_the_mean_of_uniform_ones():
    replay, valid = two_lanes(priority_alpha=0.6)
    replay.update_priorities(np.array(valid), np.linspace(0.1, 3, len(valid)).astype(np.float32))
    drawn = replay.sample(200_000, beta=1.0)
    weighted = np.average(drawn.returns, weights=drawn.weights)
    assert weighted == pytest.approx(replay.gather(np.array(valid)).returns.mean(), rel=0.02)


def test_a_late_priority_never_hits_the_transition_that_took_the_slot():
    replay = one_lane([GO] * 8, lane_rows=12, priority_alpha=0.6)
    late = replay.gather(np.array([2])).ids
    game = FakeGame(1)
    for _ in range(2):
        replay.add(game.fragment([[GO]] * 8), 0)
    before = replay.tree.weights.copy()
    replay.update_priorities(late, np.array([100.0], np.float32))
    np.testing.assert_array_equal(replay.tree.weights, before)
    assert replay.max_priority == 1.0
    replay.update_priorities(late + 12, np.array([100.0], np.float32))  # the slot's next generation
    assert replay.tree.weights[2] == replay.max_priority > 1.0


def test_td_errors_that_are_not_finite_are_refused():
    replay, valid = two_lanes(priority_alpha=0.6)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="must be finite"):
            replay.update_priorities(np.array(valid[:2]), np.array([1.0, bad], np.float32))


@pytest.mark.parametrize("priority_alpha", [0.0, 0.6])
def test_an_empty_replay_and_one_without_a_transition_say_so(priority_alpha):
    spec = ReplaySpec(1, 16, (2,), "uint8", 2, 3, GAMMA, priority_alpha)
    with pytest.raises(ValueError, match="empty"):
        ColumnarReplay(spec).sample(1)
    with pytest.raises(ValueError, match="no complete transition"):
        one_lane([GO, GO], priority_alpha=priority_alpha).sample(1)


def test_memory_is_small_and_touched_as_it_fills():
    latents = ReplaySpec(4, 1_000_000, (128,), "float16", 4, 3, GAMMA, priority_alpha=0.6)
    frames = ReplaySpec(4, 50_000, (84, 84), "uint8", 4, 3, GAMMA, priority_alpha=0.6)
    for spec, most_bytes in ((latents, 2 * 128 + 64), (frames, 7_300)):
        before = psutil.Process().memory_info().rss
        replay = ColumnarReplay(spec)
        arrays = [*replay.columns.values(), replay.tree._leaves, replay.tree._blocks, replay.tree._top]
        assert required_bytes(spec) == sum(array.nbytes for array in arrays)
        assert replay.bytes_per_row <= most_bytes
        empty = np.zeros((8, 4), bool)
        obs = np.ones((8, 4, *spec.obs_shape), spec.obs_dtype)
        replay.add(Rows(obs, empty.astype(np.uint8), empty.astype(np.float32), empty, empty, empty, empty), 0)
        assert psutil.Process().memory_info().rss - before < required_bytes(spec) / 10
