"""The columnar replay against a slow, obvious one, for any mix of endings, cuts, ring sizes and fragment lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from rllib_ext.replay import ColumnarReplay, ReplaySpec, Rows
from rllib_ext.replay_files import load_replay, save_replay
from rllib_ext.stacking import RollingStack

GAMMA = 0.9
GO, LIFE, OVER, CUT_SHORT = "go", "life lost", "game over", "truncated"
EVENTS = st.sampled_from([GO, GO, GO, GO, LIFE, OVER, CUT_SHORT])


class SlowReplay:
    """Whole histories in lists of dicts; every question is answered by walking along them."""

    def __init__(self, spec: ReplaySpec) -> None:
        self.spec = spec
        self.lanes: list[list[dict]] = [[] for _ in range(spec.num_lanes)]

    def add(self, rows: Rows) -> None:
        for t in range(len(rows.action)):
            for e, lane in enumerate(self.lanes):
                row = {name: getattr(rows, name)[t, e] for name in Rows._fields}
                if row["is_first"] and lane and not lane[-1]["is_last"]:
                    lane[-1]["is_last"] = True
                    if not lane[-1]["is_first"] and not lane[-2]["terminated"]:
                        lane[-2]["truncated"] = True
                lane.append(row)

    def transition(self, lane: int, start: int):
        """(stack, action, return, next stack or None, discount), or None where none can start."""
        rows = self.lanes[lane]
        oldest_held = max(0, len(rows) - self.spec.lane_rows)
        if start < oldest_held or rows[start]["is_last"]:
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

    def __init__(self, num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self.count = 0
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
def histories(draw):
    num_lanes = draw(st.integers(1, 3))
    num_rows = draw(st.integers(1, 5))
    spec = ReplaySpec(
        num_lanes=num_lanes,
        lane_rows=draw(st.integers(max(5, num_rows), 14)),
        obs_shape=(2,),
        obs_dtype="uint8",
        stack=draw(st.integers(1, 4)),
        n_step=draw(st.integers(1, 4)),
        gamma=GAMMA,
    )
    vector_step = st.lists(EVENTS, min_size=num_lanes, max_size=num_lanes)
    fragment = st.tuples(st.booleans(), st.lists(vector_step, min_size=num_rows, max_size=num_rows))
    return spec, draw(st.lists(fragment, min_size=1, max_size=10))


def play(spec: ReplaySpec, fragments) -> tuple[ColumnarReplay, SlowReplay]:
    fast, slow, game = ColumnarReplay(spec), SlowReplay(spec), FakeGame(spec.num_lanes)
    for is_restart, events in fragments:
        if is_restart:
            game.restart()
        rows = game.fragment(events)
        fast.add(rows, 0)
        slow.add(rows)
    return fast, slow


@settings(max_examples=250, deadline=None)
@given(histories())
def test_every_transition_equals_the_slow_reference(history):
    fast, slow = play(*history)
    for lane, rows in enumerate(slow.lanes):
        for start in range(max(0, len(rows) - fast.spec.lane_rows), len(rows)):
            expected = slow.transition(lane, start)
            where = np.array([lane]), np.array([start])
            assert bool(fast.is_start(*where)[0]) == (expected is not None)
            if expected is None:
                continue
            stack, action, total, next_stack, discount = expected
            drawn = fast.gather(*where)
            np.testing.assert_array_equal(drawn.obs[0], stack)
            assert drawn.action[0] == action
            assert drawn.returns[0] == pytest.approx(total)
            assert drawn.discount[0] == pytest.approx(discount)
            if discount:
                np.testing.assert_array_equal(drawn.next_obs[0], next_stack)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_rolling_stacks_are_the_stacks_of_the_replay(history):
    spec, fragments = history
    fast, game, rolling = ColumnarReplay(spec), FakeGame(spec.num_lanes), RollingStack(spec.stack)
    for _, events in fragments:
        rows = game.fragment(events)
        fast.add(rows, 0)
        for t in range(len(events)):
            acted_on = rolling.push(rows.obs[t], rows.is_first[t])
            age_limit = fast.spec.lane_rows - (len(events) - t)
            for lane in range(spec.num_lanes):
                row = fast.written[lane] - len(events) + t
                if fast.columns["age"][lane, row % spec.lane_rows] < age_limit:
                    np.testing.assert_array_equal(fast._stacked(np.array([lane]), np.array([row]))[0], acted_on[lane])


def one_lane(events: list[str], n_step: int = 3, lane_rows: int = 50) -> ColumnarReplay:
    spec = ReplaySpec(1, lane_rows, (2,), "uint8", 2, n_step, GAMMA)
    return play(spec, [(False, [[event] for event in events])])[0]


def starts(replay: ColumnarReplay) -> list[int]:
    rows = np.arange(replay.written[0])
    return rows[replay.is_start(np.zeros_like(rows), rows)].tolist()


def test_every_state_of_an_episode_can_be_drawn_the_last_ones_included():
    assert starts(one_lane([GO] * 5 + [OVER, GO])) == [0, 1, 2, 3, 4, 5]
    assert starts(one_lane([GO] * 5 + [CUT_SHORT, GO])) == [0, 1, 2, 3, 4, 5]


def test_a_lost_life_ends_the_bootstrap_and_the_game_goes_on():
    replay = one_lane([GO, GO, LIFE, GO, GO, GO, GO])
    assert starts(replay) == [0, 1, 2, 3]
    drawn = replay.gather(np.zeros(3, np.int64), np.array([1, 2, 3]))
    np.testing.assert_allclose(drawn.discount, [0, 0, GAMMA**3])
    np.testing.assert_allclose(drawn.returns[:2], [1 + GAMMA * 2, 2])
    np.testing.assert_array_equal(drawn.obs[2][:, 0], [2, 3])  # the stack reaches back over the lost life


def test_a_truncation_bootstraps_from_the_final_observation():
    replay = one_lane([GO, CUT_SHORT, GO, GO])
    drawn = replay.gather(np.zeros(1, np.int64), np.array([0]))
    assert drawn.discount[0] == pytest.approx(GAMMA**2)
    np.testing.assert_array_equal(drawn.next_obs[0][:, 0], [1, 2])


def test_a_restart_cuts_the_open_episode():
    spec = ReplaySpec(1, 50, (2,), "uint8", 2, 3, GAMMA)
    replay, _ = play(spec, [(False, [[GO]] * 4), (True, [[GO]] * 4)])
    assert starts(replay) == [0, 1, 2, 4]
    assert replay.gather(np.zeros(1, np.int64), np.array([2])).discount[0] == pytest.approx(GAMMA)


def test_draws_are_uniform_over_valid_starts():
    spec = ReplaySpec(2, 12, (2,), "uint8", 3, 2, GAMMA)
    events = [[GO, GO], [OVER, GO], [GO, CUT_SHORT]] * 6
    replay, slow = play(spec, [(False, events[i : i + 6]) for i in range(0, len(events), 6)])
    valid = [(lane, i) for lane in range(2) for i in range(len(events)) if slow.transition(lane, i) is not None]
    num_draws = 40_000
    drawn = list(zip(*(array.tolist() for array in replay._draw(num_draws)), strict=True))
    assert set(drawn) == set(valid)
    counts = np.array([drawn.count(start) for start in valid])
    expected = num_draws / len(valid)
    assert ((counts - expected) ** 2 / expected).sum() < len(valid) + 5 * np.sqrt(2 * len(valid))


def test_saved_and_loaded_replays_are_equal_and_go_on_alike(tmp_path):
    for name, num_steps in (("filling", 5), ("wrapped", 40)):
        spec = ReplaySpec(2, 16, (3, 3), "uint8", 2, 2, GAMMA)
        replay = ColumnarReplay(spec, seed=3)
        rng = np.random.default_rng(0)
        for _ in range(num_steps // 5):
            replay.add(random_rows(rng, 5, 2, (3, 3)), 0)
        save_replay(replay, tmp_path / name)
        loaded = load_replay(tmp_path / name, spec)
        assert not list(tmp_path.rglob("*.pkl"))
        for mine, theirs in zip(replay.sample(64), loaded.sample(64), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        more = random_rows(rng, 5, 2, (3, 3))
        replay.add(more, 0)
        loaded.add(more, 0)
        for mine, theirs in zip(replay.sample(64), loaded.sample(64), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def random_rows(rng: np.random.Generator, num_rows: int, num_lanes: int, shape: tuple[int, ...]) -> Rows:
    flags = np.zeros((num_rows, num_lanes), bool)
    return Rows(
        obs=rng.integers(0, 255, (num_rows, num_lanes, *shape), dtype=np.uint8),
        action=rng.integers(0, 4, (num_rows, num_lanes)),
        reward=rng.normal(size=(num_rows, num_lanes)).astype(np.float32),
        is_first=flags,
        terminated=rng.random(flags.shape) < 0.1,
        truncated=flags,
        is_last=flags,
    )


def test_a_replay_of_other_settings_is_refused(tmp_path):
    spec = ReplaySpec(1, 16, (2,), "uint8", 2, 2, GAMMA)
    save_replay(ColumnarReplay(spec), tmp_path / "replay")
    with pytest.raises(UserError, match=r"stack=2.*stack=4"):
        load_replay(tmp_path / "replay", ReplaySpec(1, 16, (2,), "uint8", 4, 2, GAMMA))


def test_an_empty_replay_and_one_without_a_transition_say_so():
    spec = ReplaySpec(1, 16, (2,), "uint8", 2, 3, GAMMA)
    with pytest.raises(ValueError, match="empty"):
        ColumnarReplay(spec).sample(1)
    with pytest.raises(ValueError, match="no complete transition"):
        one_lane([GO, GO]).sample(1)


def test_memory_is_small_and_touched_as_it_fills():
    latents = ColumnarReplay(ReplaySpec(4, 1000, (128,), "float16", 4, 3, GAMMA))
    frames = ColumnarReplay(ReplaySpec(4, 1000, (84, 84), "uint8", 4, 3, GAMMA))
    assert latents.bytes_per_row <= 2 * 128 + 64
    assert frames.bytes_per_row <= 7_300
