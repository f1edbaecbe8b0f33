"""Evaluation: episodes depend on (seed, number) alone, intervals cover, and the job's real entry point runs."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from catch import SIZE, VectorCatch, catch_preprocess
from PIL import Image, ImageSequence
from policies import make_encoder, make_policy

import jobs.evaluate
import pipeline.play as pipeline_play
from jobs.evaluate import GreedyPlayer, reconstructor
from jobs.workspace import Workspace
from pipeline.artifact import load_model
from pipeline.atari import VectorAtari, make_vector, preprocess_for
from pipeline.bootstrap import bootstrap_interval
from pipeline.errors import UserError
from pipeline.gameplay import FRAME_DURATION_MS
from pipeline.play import RandomPlayer, episode_seed, film, play
from pipeline.schema import Preprocess
from pipeline.scores import human_normalised
from rllib_ext.policy import load_policy

CAP_ENV_FRAMES = 400


class SeededPlayer:
    """Acts on the frame and on chance from the episode's seed, and notes what it was told."""

    def __init__(self) -> None:
        self.generators: dict[int, np.random.Generator] = {}
        self.num_begun = 0

    def act(self, frames: np.ndarray, is_first: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        for lane in np.flatnonzero(is_first):
            self.generators[int(lane)] = np.random.default_rng(int(seeds[lane]))
            self.num_begun += 1
        return np.array([self.generators[lane].integers(3) for lane in range(len(frames))])


class BestPlayer:
    """Follows the ball: earns 1 in every game of catch that can be won."""

    def act(self, frames: np.ndarray, is_first: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        balls = frames[:, : SIZE - 1].reshape(len(frames), -1).argmax(1) % SIZE
        paddles = (frames[:, SIZE - 1] == 128).argmax(1)
        return 1 + np.sign(balls - (paddles + 1)) * (np.abs(balls - (paddles + 1)) > 1)


def catch_env(preprocess: object, num_envs: int, num_threads: int) -> VectorCatch:
    return VectorCatch(num_envs, balls=3, scale=2.0)


@pytest.fixture
def capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts every game of the job short, so that untrained agents, which never press FIRE, come to an end."""

    def short(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorAtari:
        return make_vector(preprocess, num_envs, num_threads=1, max_env_frames=CAP_ENV_FRAMES)

    monkeypatch.setattr(jobs.evaluate, "play", functools.partial(play, make_env=short))
    player = functools.partial(pipeline_play.make_player, max_env_frames=CAP_ENV_FRAMES)
    monkeypatch.setattr(pipeline_play, "make_player", player)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One for all runs: making a tracking database takes seconds."""
    torch.set_num_threads(1)
    return Workspace.at(str(tmp_path_factory.mktemp("evaluate") / "home"))


@pytest.mark.parametrize("max_envs", [1, 3, 7, 20])
def test_episodes_do_not_depend_on_who_plays_beside_them(max_envs: int) -> None:
    alone = play(SeededPlayer(), catch_preprocess(), 11, 5, max_envs=11, make_env=catch_env)
    batched = play(SeededPlayer(), catch_preprocess(), 11, 5, max_envs=max_envs, make_env=catch_env)
    for field in dataclasses.fields(alone):
        np.testing.assert_array_equal(getattr(alone, field.name), getattr(batched, field.name))


def test_first_episodes_are_the_same_however_many_follow() -> None:
    few = play(SeededPlayer(), catch_preprocess(), 4, 0, make_env=catch_env)
    many = play(SeededPlayer(), catch_preprocess(), 9, 0, make_env=catch_env)
    np.testing.assert_array_equal(few.returns, many.returns[:4])
    other_seed = play(SeededPlayer(), catch_preprocess(), 9, 1, make_env=catch_env)
    assert (other_seed.seeds != many.seeds).all()


def test_every_episode_is_begun_once_counted_once_and_closed() -> None:
    environments: list[VectorCatch] = []

    def kept(preprocess: object, num_envs: int, num_threads: int) -> VectorCatch:
        environments.append(VectorCatch(num_envs, balls=2))
        return environments[-1]

    player, finished = SeededPlayer(), []
    results = play(player, catch_preprocess(), 7, 0, max_envs=3, make_env=kept, on_finished=finished.append)
    assert player.num_begun == 7
    assert sum(finished) == 7
    assert len(results.returns) == 7
    assert (results.lengths >= SIZE - 1).all()
    assert environments[0].num_closed == 1


def test_best_play_earns_the_best_return() -> None:
    env = functools.partial(lambda preprocess, num_envs, num_threads: VectorCatch(num_envs))
    results = play(BestPlayer(), catch_preprocess(), 25, 0, max_envs=4, make_env=env)
    assert results.returns.mean() > 0.9
    assert (results.lengths == SIZE - 1).all()


def test_truncated_games_are_counted_and_said() -> None:
    def short(preprocess: object, num_envs: int, num_threads: int) -> VectorCatch:
        return VectorCatch(num_envs, balls=50, max_steps=6)

    results = play(BestPlayer(), catch_preprocess(), 5, 0, max_envs=2, make_env=short)
    assert results.truncated.all()
    assert (results.lengths == 6).all()


@pytest.mark.usefixtures("capped")
def test_random_games_are_the_same_in_any_batch_and_on_film() -> None:
    preprocess = preprocess_for("space_invaders")
    together = jobs.evaluate.play(RandomPlayer(preprocess), preprocess, 5, 0, max_envs=5)
    apart = jobs.evaluate.play(RandomPlayer(preprocess), preprocess, 5, 0, max_envs=2)
    assert len(set(together.returns)) > 1
    np.testing.assert_array_equal(together.returns, apart.returns)
    np.testing.assert_array_equal(together.lengths, apart.lengths)
    shot = film(RandomPlayer(preprocess), preprocess, episode_seed(0, 1), num_moments=10)
    assert (shot.game_return, shot.game_length) == (together.returns[1], together.lengths[1])
    assert len(shot.moments) == 10


def test_film_shows_the_stretch_with_most_points() -> None:
    preprocess = preprocess_for("breakout")
    whole = film(RandomPlayer(preprocess), preprocess, episode_seed(0, 0), num_moments=10_000)
    assert len(whole.moments) == whole.game_length
    part = film(RandomPlayer(preprocess), preprocess, episode_seed(0, 0), num_moments=20)
    shown = whole.moments[part.first_agent_step : part.first_agent_step + 20]
    for one, other in zip(part.moments, shown, strict=True):
        np.testing.assert_array_equal(one.frame, other.frame)
        np.testing.assert_array_equal(one.screen, other.screen)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.exponential(1.0, 60), num_resamples=500) for _ in range(300)]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.98


def test_bootstrap_is_seeded_and_handles_single_and_equal_values() -> None:
    values = [1.0, 5.0, 2.0]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval([4.0]) == (4.0, 4.0)
    assert bootstrap_interval([-21.0] * 20) == (-21.0, -21.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bootstrap_refuses_nothing_and_nan(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(values)


def test_reconstruction_is_the_decoders_mean_of_the_posterior_mean(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    policy = load_policy(make_policy(tmp_path / "policy", encoder=encoder))
    frames = np.random.default_rng(0).integers(0, 256, (3, 84, 84), dtype=np.uint8)
    reconstruct = reconstructor(policy)
    assert reconstruct is not None
    expected = load_model(encoder).reconstruct(torch.from_numpy(frames)).mean - 0.5
    difference = reconstruct(frames).astype(np.float32) - expected.numpy().clip(0, 255)
    assert np.abs(difference).max() <= 0.51


def test_greedy_player_forgets_between_games(tmp_path: Path) -> None:
    policy = load_policy(make_policy(tmp_path / "policy", encoder=make_encoder(tmp_path / "encoder")))
    frames = np.random.default_rng(0).integers(0, 256, (6, 4, 84, 84), dtype=np.uint8)
    player, first = GreedyPlayer(policy), np.ones(4, bool)
    seeds = np.zeros(4, np.int64)

    def game() -> list[np.ndarray]:
        return [player.act(f, first if i == 0 else ~first, seeds) for i, f in enumerate(frames)]

    np.testing.assert_array_equal(game(), game())
    player.act(frames[0, :1], first[:1], seeds[:1])


@pytest.mark.usefixtures("capped")
def test_job_plays_films_and_leaves_everything_in_its_folder(tmp_path: Path, workspace: Workspace) -> None:
    policy = make_policy(tmp_path / "policy", encoder=make_encoder(tmp_path / "encoder"))
    result = jobs.evaluate.run(workspace, str(policy), episodes=3, seed=1, video=True)
    folder = Path(result["run_folder"])
    assert result["mean_return"] == np.mean(result["returns"])
    assert result["ci95_low"] <= result["mean_return"] <= result["ci95_high"]
    assert result["episodes"] == len(result["lengths"]) == 3
    assert result["human_normalised"] == human_normalised("breakout", result["mean_return"])
    assert result["lengths"] == [CAP_ENV_FRAMES // 4] * 3
    assert json.loads((folder / "result.json").read_text()) == result
    assert [row["episode"] for row in json.loads((folder / "episodes.json").read_text())] == [0, 1, 2]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert (folder / "config.yaml").is_file()
    with Image.open(folder / result["video"]["file"]) as picture:
        shown_ms = sum(frame.info["duration"] for frame in ImageSequence.Iterator(picture))
    assert result["video"]["shown_agent_steps"] == CAP_ENV_FRAMES // 4
    assert shown_ms == FRAME_DURATION_MS * CAP_ENV_FRAMES // 4
    again = jobs.evaluate.run(workspace, str(policy), episodes=3, seed=1)
    assert (again["returns"], again["video"]) == (result["returns"], None)


@pytest.mark.usefixtures("capped")
def test_job_films_an_agent_without_decoder_too(tmp_path: Path, workspace: Workspace) -> None:
    result = jobs.evaluate.run(workspace, str(make_policy(tmp_path / "policy", "pixels")), episodes=1, video=True)
    assert result["video"]["has_reconstruction"] is False
    assert (Path(result["run_folder"]) / "gameplay.gif").is_file()


def test_job_scores_the_random_agent(workspace: Workspace) -> None:
    result = jobs.evaluate.run(workspace, "random:Breakout", episodes=4)
    assert result["game"] == "breakout"
    assert result["protocol"] == "atari100k"
    assert 0 <= result["mean_return"] < 5
    assert result["truncated"] == 0


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("random:pongg", {}, "pong"),
        ("no/such/folder", {}, "no/such/folder"),
        ("random:pong", {"episodes": 0}, "--episodes is 0"),
        ("random:pong", {"seed": -1}, "--seed is -1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, policy: str, options: dict[str, int], message: str
) -> None:
    workspace = Workspace.at(str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        jobs.evaluate.run(workspace, policy, **options)
    assert "\n" not in str(caught.value)
    assert not workspace.runs.exists()


def test_an_encoder_is_no_policy(tmp_path: Path, workspace: Workspace) -> None:
    with pytest.raises(UserError, match="not a policy"):
        jobs.evaluate.run(workspace, str(make_encoder(tmp_path / "encoder")))


def test_a_changed_byte_is_named(tmp_path: Path, workspace: Workspace) -> None:
    policy = make_policy(tmp_path / "policy", encoder=make_encoder(tmp_path / "encoder"))
    weights = policy / "q.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01"[:1])
    with pytest.raises(UserError, match=r"q\.safetensors"):
        jobs.evaluate.run(workspace, str(policy))
