"""The Atari preprocessing: golden bytes, and the C++ environment against the plain one."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from pipeline.atari import canonical_game, make_vector, preprocess_for
from pipeline.errors import UserError
from pipeline.protocols import PROTOCOLS
from pipeline.schema import Preprocess
from pipeline.scores import human_normalised

SEEDS = np.array([3, 71, 20_000])
GOLDEN = {
    "pong": "c453d289a7db7f3a70ef7baa06d63cc75e2a32f2f288a1bf8d04b2904b40358c",
    "breakout": "3729c21d11c0fc5c1a0d7206fec1153bd96ae4357bfda89f37de1321f64e1e79",
    "ms_pacman": "97fbdb8c98b331f231bbd10b04de49543181c5a846de5e83b42c1d974e0c6e95",
}


def frames_of(game: str, steps: int = 40) -> np.ndarray:
    """(steps, 2, 84, 84) frames under fixed actions."""
    env = make_vector(preprocess_for(game), 2)
    step, frames = env.reset(np.array([1, 2])), []
    for t in range(steps):
        frames.append(step.frames)
        step = env.step(np.array([t % env.num_actions, (3 * t) % env.num_actions]))
    env.close()
    return np.stack(frames)


@pytest.mark.parametrize("game", GOLDEN)
def test_preprocessing_has_not_changed(game: str) -> None:
    assert hashlib.sha256(frames_of(game).tobytes()).hexdigest() == GOLDEN[game]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("game", ["breakout", "pong", "seaquest"])
def test_cpp_and_plain_environment_agree_exactly(game: str, protocol: str) -> None:
    """Frames, rewards, ends and lives, over game ends, lost lives, no-op starts and sticky actions."""
    preprocess = preprocess_for(game, protocol)
    settings = {"life_loss_ends": PROTOCOLS[protocol].life_loss_ends_episode, "max_env_frames": 600}
    fast = make_vector(preprocess, len(SEEDS), **settings)
    plain = make_vector(preprocess, len(SEEDS), with_ram=True, **settings)
    rng = np.random.default_rng(0)
    ours, theirs = fast.reset(SEEDS), plain.reset(SEEDS)
    ends = 0
    for _ in range(320):
        for name in ("frames", "rewards", "terminated", "truncated", "lives"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        ends += int((ours.terminated | ours.truncated).sum())
        actions = rng.integers(0, fast.num_actions, len(SEEDS))
        ours, theirs = fast.step(actions), plain.step(actions)
    assert ends >= 6
    assert theirs.ram is not None
    assert theirs.ram.shape == (3, 128)


def test_cap_is_in_emulator_frames() -> None:
    env = make_vector(preprocess_for("breakout"), 1, max_env_frames=400)
    env.reset(np.array([0]))
    ends = [bool(env.step(np.array([0])).truncated[0]) for _ in range(100)]
    assert ends == [False] * 99 + [True]


def test_masked_reset_restarts_only_the_chosen_games() -> None:
    env = make_vector(preprocess_for("pong"), 2)
    first = env.reset(np.array([5, 6])).frames
    for _ in range(40):
        moved = env.step(np.array([2, 3])).frames
    again = env.reset(np.array([5]), mask=np.array([True, False])).frames
    np.testing.assert_array_equal(again[0], first[0])
    np.testing.assert_array_equal(again[1], moved[1])


def test_full_resolution_is_not_resized() -> None:
    env = make_vector(preprocess_for("pong", "atariari", (210, 160)), 1)
    assert env.reset(np.array([0])).frames.shape == (1, 210, 160)


@pytest.mark.parametrize("name", ["MsPacman", "ms_pacman", "ms-pacman", "ALE/MsPacman-v5", "MsPacmanNoFrameskip-v4"])
def test_spellings_of_a_game(name: str) -> None:
    assert canonical_game(name) == "ms_pacman"


def test_unknown_game_shows_near_matches() -> None:
    with pytest.raises(UserError, match=r"unknown game 'pongg'; did you mean pong"):
        canonical_game("pongg")


def test_preprocess_record_survives_json_and_refuses_others() -> None:
    record = preprocess_for("pong")
    assert Preprocess.from_record(json.loads(record.to_json()), "it") == record
    with pytest.raises(UserError, match="missing keys"):
        Preprocess.from_record({}, "it")
    with pytest.raises(UserError, match=r"height.*84.*210"):
        record.require_match(preprocess_for("pong", "atari100k", (210, 160)), mine="the encoder", theirs="the game")


def test_human_normalised_scale() -> None:
    assert human_normalised("pong", -20.7) == pytest.approx(0)
    assert human_normalised("pong", 14.6) == pytest.approx(1)
    assert human_normalised("tetris", 3) is None
