"""The experiment driver: real cells at toy size, what is kept, and figures on made-up results by property."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import atari  # noqa: E402
from curves import keep  # noqa: E402
from curves.runs import read_games  # noqa: E402
from experiment import cartpole, measures, oracle, page, summary  # noqa: E402
from experiment.arms import ARMS, CLOCKED, COMPARED, FROZEN, GAMES, STEADINESS, TRAINED, Cell, cells  # noqa: E402
from experiment.runs import reached_s  # noqa: E402
from experiment.worlds import random_frames, world  # noqa: E402
from peers.running import CellFailed  # noqa: E402

from pipeline.artifact import load_encoder  # noqa: E402
from pipeline.atari import make_vector, preprocess_for  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.scores import RANDOM_AND_HUMAN  # noqa: E402

KEYS = {
    *("cartpole_frozen", "cartpole_online", "frozen_minus_pixels", "frozen_minus_pixels_low"),
    *("clock_excluding", "clock_including", "improve_over_random_encoder", "improve_over_pca"),
    *("online_minus_frozen_low", "mspacman_1m"),
}


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "RESAMPLES", 40)


def test_cells_are_run_once_and_make_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The oracle, an encoder that learns online and a pretrained one, each through its own process, at toy size."""
    places = ["--short", "--results", str(tmp_path / "kept"), "--work", str(tmp_path / "work")]
    chosen = ["--games", "cartpole", "--arms", "ram", "vae-online-scratch", "pca"]
    assert atari.main([*places, *chosen]) == 0
    told = capsys.readouterr()
    assert "FAILED" not in told.err
    assert atari.main([*places, "--cell", "pca", "cartpole", "2", "--json"]) == 0
    told = capsys.readouterr()
    assert told.err.count("kept") == 1
    cell = json.loads(told.out.splitlines()[-1])
    assert (cell["arm"], cell["game"], cell["seed"], len(cell["scores"])) == ("pca", "cartpole", 2, 2)
    assert cell["pretraining_minutes"] > 0
    assert 240 <= cell["updates"] <= 370  # one for each agent step after the warm-up, but for what is under way
    assert atari.main([*places, "--write", str(tmp_path / "page")]) == 0
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"atari.md", "atari.json", "atari-cartpole.png"}
    assert "`pca`" in (tmp_path / "page" / "atari.md").read_text()
    assert atari.main([*places, "--summary", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["arm"] for row in found["cells"]} == {"ram", "vae-online-scratch", "pca"}
    assert found["cartpole_frozen"] is None
    assert found["beside"]["runs"]["cartpole_frozen"] == [0, 5]
    assert found["beside"]["runs"]["frozen_minus_pixels"] == [0, 6]


def test_a_failed_cell_does_not_stop_the_others_and_a_changed_one_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(module: str, arguments: list[str], limit_s: float) -> dict[str, Any]:
        cell = Cell(**json.loads(arguments[0]))
        ran.append((cell.arm, cell.agent_steps))
        if cell.arm == "pixels":
            raise CellFailed("no")
        return result([1.0])

    monkeypatch.setattr(keep, "run_apart", run)
    places = ["--results", str(tmp_path), "--work", str(tmp_path)]
    chosen = ["--games", "pong", "--arms", "pixels", "ram", "pca", "--seeds", "0"]
    assert atari.main([*places, *chosen]) == 1
    assert sorted(arm for arm, _ in ran) == ["pca", "pixels", "ram"]
    assert len(list(tmp_path.iterdir())) == 2
    assert atari.main([*places, *chosen]) == 1
    assert [arm for arm, _ in ran[3:]] == ["pixels"]
    monkeypatch.setitem(GAMES, "pong", replace(GAMES["pong"], train={"n_step": 4}))
    capsys.readouterr()
    assert atari.main([*places, *chosen, "--list"]) == 0
    assert capsys.readouterr().out.count("to run") == 3
    damaged = next(tmp_path.glob("pong-ram-0-*.json"))
    damaged.write_text(damaged.read_text()[:30])
    with pytest.raises(UserError, match=r"the kept run .*pong-ram-0-.* cannot be read .*; restore it, or remove it"):
        atari.main([*places, "--summary", "--json"])


def test_a_cell_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="no cell ram mspacman"):
        atari.main(["--cell", "ram", "mspacman", "0"])
    with pytest.raises(UserError, match="no cell has all of these"):
        atari.main(["--games", "ms_pacman", "--arms", "pixels"])


def test_the_arms_differ_in_nothing_but_what_they_read() -> None:
    """Same Q-learning and same head in a game; every cell has a digest of its own."""
    offered = cells()
    assert len({cell.digest for cell in offered}) == len(offered)
    for game, plan in GAMES.items():
        compared = [Cell.of(game, arm, 0) for arm in plan.arms if arm in COMPARED]
        assert len({(cell.recipe.train, replace(cell.recipe.q, torso="encoder")) for cell in compared}) <= 1
        for cell in compared if game in summary.ATARI else []:
            assert (cell.recipe.train.batch_size, cell.recipe.train.updates_per_agent_step) == (32, 0.25)


def test_a_pretrained_encoder_is_compared_at_equal_size() -> None:
    for game in ("cartpole", "pong"):
        recipes = [Cell.of(game, arm, 0).encoder for arm in ("vae-frozen", "pca", "random-encoder")]
        size = cartpole.SIZE if game == "cartpole" else 84
        assert len({recipe.model.for_frames(size, size).z_dim for recipe in recipes if recipe}) == 1
        assert all(recipe is not None for recipe in recipes)


def test_cartpole_moves_as_gymnasiums() -> None:
    for seed in range(5):
        game, rng = gym.make("CartPole-v1"), np.random.default_rng(seed)
        game.reset(seed=seed)
        ours = cartpole.VectorCartPole(1)
        ours.reset(np.array([seed]))
        ours.states[0] = game.unwrapped.state  # type: ignore[attr-defined]
        over, steps = False, 0
        while not over:
            action = int(rng.integers(2))
            _, reward, over, _, _ = game.step(action)
            step = ours.step(np.array([action]))
            np.testing.assert_allclose(ours.states[0], game.unwrapped.state, atol=1e-12)  # type: ignore[attr-defined]
            assert (step.rewards[0], bool(step.terminated[0])) == (reward, over)
            steps += 1
        assert steps > 5


def balance(states: np.ndarray) -> np.ndarray:
    """A hand-written controller that keeps the pole up and the cart near the middle."""
    return (states @ np.array([0.1, 0.5, 3.0, 1.0]) > 0).astype(np.int64)


def test_a_game_of_cartpole_is_cut_after_500_steps_and_the_next_one_starts() -> None:
    vector = cartpole.cartpole_factory(cartpole.cartpole_preprocess(), 4, 1)
    vector.reset(np.arange(4))
    rewards = np.zeros(4)
    for _ in range(500):
        step = vector.step(balance(vector.states))
        rewards += step.rewards
    assert (rewards == 500).all()
    assert step.truncated.all()
    assert not step.terminated.any()
    step = vector.step(np.zeros(4, np.int64))
    assert (np.abs(vector.states) <= 0.05).all()
    assert not step.rewards.any()


def test_a_tenth_of_a_pixel_shows_and_the_state_can_be_read_off_the_frame() -> None:
    states = np.random.default_rng(0).uniform(-cartpole.ANYWHERE, cartpole.ANYWHERE, (200, 4))
    frames = cartpole.draw(states).astype(float)
    moved = states.copy()
    moved[:, 0] += 0.1 / cartpole._PIXELS_PER_M
    assert (np.abs(cartpole.draw(moved) - frames).max((1, 2)) > 5).all()
    columns = np.arange(cartpole.SIZE) + 0.5
    low, high = frames[:, 50:52].sum(1), frames[:, 12:14].sum(1)  # through the cart, and near the pole's tip
    places = [(part * columns).sum(1) / part.sum(1) for part in (low, high)]
    assert np.corrcoef(places[0], states[:, 0])[0, 1] > 0.99
    assert np.corrcoef(places[1] - places[0], states[:, 2])[0, 1] > 0.99
    assert np.array_equal(cartpole.draw(states), cartpole.draw(states * [1, 0, 1, 0]))  # velocities do not show


def test_the_oracle_shows_the_emulators_memory_and_its_encoder_loses_none_of_it(tmp_path: Path) -> None:
    known = world("pong", is_oracle=True)
    assert known is not None
    shown, plain = known.factory(known.preprocess, 2, 1), make_vector(preprocess_for("pong"), 2, with_ram=True)
    both = [shown.reset(np.array([1, 2])), plain.reset(np.array([1, 2]))]
    for action in (1, 2, 3):
        np.testing.assert_array_equal(both[0].frames.reshape(2, 128), both[1].ram)
        both = [env.step(np.array([action, action])) for env in (shown, plain)]
    frames = random_frames(known, 400, 0)
    oracle.save_scaling_encoder(tmp_path / "encoder", known.preprocess, frames)
    encoder = load_encoder(tmp_path / "encoder", preprocess=known.preprocess)
    z = encoder.encode(torch.from_numpy(frames))
    spread = frames.reshape(len(frames), -1).std(0)
    varied = spread > 2 * oracle.LEAST_SPREAD
    assert varied.sum() > 5
    np.testing.assert_allclose(z.std(0, unbiased=False)[varied], 1, atol=0.01)
    any_bytes = torch.randint(0, 256, (50, *frames.shape[1:]), dtype=torch.uint8)
    per_level = encoder.encode(torch.ones(1, *frames.shape[1:], dtype=torch.uint8))
    zero = encoder.encode(torch.zeros(1, *frames.shape[1:], dtype=torch.uint8))
    read = (encoder.encode(any_bytes) - zero) / (per_level - zero)
    np.testing.assert_allclose(read.round(), any_bytes.flatten(1))


def test_the_seconds_of_sittings_add_up(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "episode_return": 1.0},
        {"step": 20, "seconds": 5.0},
        {"step": 40, "seconds": 9.0},
        {"step": 50, "episode_return": 2.0},
        {"step": 60, "seconds": 2.0},
        {"step": 70, "seconds": 8.0},
        {"step": 80, "episode_return": 3.0},
        {"step": 90, "seconds": 1.0},
    ]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, lines)))
    games, seconds = read_games(tmp_path / "m")
    assert seconds == 9 + 8 + 1
    assert [game[2] for game in games] == [5, 11, 18]


def test_a_score_is_reached_when_the_mean_of_ten_games_is_it() -> None:
    games = [[10 * n, float(n), n / 2] for n in range(40)]
    for score in (4.5, 10.5, 34.5):
        at = reached_s(games, score)
        assert at is not None
        assert measures.at_second(games, at) == pytest.approx(score)
        assert measures.at_second(games, at - 0.5) < score
    assert reached_s(games, 34.6) is None
    assert reached_s(games[:9], -1.0) is None


def result(greedy: list[float], **more: Any) -> dict[str, Any]:
    """What a cell gives."""
    games = [[10.0, greedy[0], 1.0]]
    prior = {"frames": 1, "collect_s": 10.0, "pretrain_s": 20.0}
    return {"games": games, "seconds": 60.0, "updates": 5, "greedy": greedy, "prior": prior, **more}


def made_up(seed: int, shift: float) -> summary.Runs:
    """All cells; frozen VAEs are better than all others by so much of what is between random and human play."""
    rng, runs = np.random.default_rng(seed), {}
    for arm in ARMS:
        for game, plan in GAMES.items():
            if arm not in plan.arms:
                continue
            low, high = RANDOM_AND_HUMAN.get(game, (0.0, 1.0))
            for number in range(plan.seeds):
                share = rng.normal() * 0.1 + shift * (arm == "vae-frozen")
                run = result([low + share * (high - low)])
                if arm in CLOCKED and plan.goal is not None:
                    took = 100.0 if arm == "vae-frozen" else 700.0
                    run["goal"] = {"score": plan.goal, "reached_s": took, "spent_s": took}
                runs.setdefault(arm, {}).setdefault(game, {})[number] = run
    return runs


def test_nothing_measured_is_nothing_said() -> None:
    found = summary.figures({})
    assert found.keys() >= KEYS
    assert all(found[key] is None for key in KEYS)
    assert found["cells"] == []
    assert "not yet" in page.tables(found)


def test_figures_follow_the_runs() -> None:
    found = summary.figures(made_up(0, 0.0))
    assert all(found[key] is not None for key in KEYS)
    assert len(found["cells"]) == sum(len(plan.arms) * plan.seeds for plan in GAMES.values())
    better = summary.figures(made_up(0, 1.0))
    assert better["frozen_minus_pixels"] == pytest.approx(found["frozen_minus_pixels"] + 1, abs=2e-3)
    assert better["online_minus_frozen_low"] == pytest.approx(found["online_minus_frozen_low"] - 1, abs=2e-3)
    assert better["improve_over_pca"] == better["improve_over_random_encoder"] == 1.0
    assert found["frozen_minus_pixels_low"] < found["frozen_minus_pixels"]
    assert found["clock_excluding"] == 7.0
    assert found["clock_including"] == pytest.approx(700 / 130, abs=1e-3)
    text = page.tables(better)
    for name in ("cartpole_frozen", "ms_pacman", "DIAMOND", "Interquartile"):
        assert name in text


def test_exchanged_arms_exchange_the_signs() -> None:
    runs = made_up(1, 0.3)
    exchanged = {**runs, "vae-frozen": runs["pca"], "pca": runs["vae-frozen"]}
    one, other = summary.figures(runs), summary.figures(exchanged)
    assert one["improve_over_pca"] + other["improve_over_pca"] == pytest.approx(1.0, abs=2e-3)
    gains = [found["beside"]["cartpole_gains"]["vae-frozen - pca"] for found in (one, other)]
    assert gains[0]["mean"] == -gains[1]["mean"]
    assert (gains[0]["low"], gains[0]["high"]) == (-gains[1]["high"], -gains[1]["low"])


def test_pixels_that_never_come_there_give_a_lower_bound_and_frozen_ones_none() -> None:
    runs = made_up(2, 0.0)
    runs["pixels"]["pong"][0]["goal"] |= {"reached_s": None, "spent_s": 3600.0}
    clock = summary.figures(runs)["beside"]["clock"]
    assert clock["is_lower_bound"]
    assert clock["excluding"] == pytest.approx((36.0 * 7**5) ** (1 / 6), abs=1e-3)
    runs["vae-frozen"]["pong"][0]["goal"]["reached_s"] = None
    assert summary.figures(runs)["clock_excluding"] is None


def test_at_equal_minutes_a_slow_arm_is_taken_where_it_was() -> None:
    runs = made_up(3, 0.0)
    for game in ("pong", "breakout"):
        low, high = RANDOM_AND_HUMAN[game]
        for seed in range(3):
            runs["pixels"][game][seed]["games"] = [[1, low, 30.0], [9, high + 9 * (high - low), 200.0]]
            runs["vae-frozen"][game][seed]["games"] = [[1, high, 30.0]]
    views = summary.figures(runs)["beside"]["at_equal_minutes"]
    assert views["learning alone"]["frozen_minus_pixels"] == pytest.approx(1.0)
    for by_seed in runs["pixels"].values():
        for run in by_seed.values():
            run["prior"] = None
    runs["pixels"]["pong"][0]["games"][1][2] = 75.0  # within the 30 s of collecting and pretraining
    views = summary.figures(runs)["beside"]["at_equal_minutes"]
    assert views["learning alone"]["frozen_minus_pixels"] == pytest.approx(1.0)
    assert views["with collection and pretraining"]["frozen_minus_pixels"] < 0.5


def test_at_equal_minutes_stand_only_runs_that_can_be_taken_at_them() -> None:
    """With the time of a prior, those that go on; and none whose frozen run is missing."""
    runs = made_up(4, 0.0)
    shared = "pong breakout"
    views = summary.figures(runs)["beside"]["at_equal_minutes"]
    assert set(views["learning alone"]["iqm"][shared]) == set(COMPARED)
    assert set(views["with collection and pretraining"]["iqm"][shared]) == set(CLOCKED)
    assert not any(key.endswith("pca") for key in views["with collection and pretraining"])
    for game in ("pong", "breakout"):
        del runs["vae-frozen"][game]
    views = summary.figures(runs)["beside"]["at_equal_minutes"]
    assert all(view["iqm"][shared] == {} for view in views.values())


def test_a_game_counts_at_the_second_at_which_it_was_kept() -> None:
    assert measures.at_second([[1, 0.0, 50.0], [2, 8.0, 101.4]], 101.39) == 4.0


def test_the_middle_of_scores_is_their_mean_where_they_are_one_and_lies_in_its_interval() -> None:
    assert measures.interquartile_mean(np.full((3, 4), 0.7))["iqm"] == 0.7
    rng = np.random.default_rng(0)
    found = measures.interquartile_mean(rng.normal(size=(3, 4)))
    assert found["low"] < found["iqm"] < found["high"]
    scores = np.sort(rng.normal(size=(4, 1)), 0)
    assert measures.interquartile_mean(scores)["iqm"] == pytest.approx(scores[1:3].mean(), abs=1e-3)


def test_frozen_and_trained_arms_are_those_asked_for() -> None:
    assert set(FROZEN) | set(TRAINED) | set(STEADINESS) | {"tuned", "tuned-long"} == set(ARMS)
    for game in ("pong", "breakout"):
        assert set(GAMES[game].arms) == set(ARMS) - set(STEADINESS) - {"tuned-long"}


def test_steadiness_leaves_out_one_thing_each() -> None:
    base, finetuned = (Cell.of("cartpole", arm, 2).recipe for arm in ("vae-online", "vae-finetuned"))
    exact, fast, joint, *_ = (Cell.of("cartpole", arm, 2).recipe for arm in STEADINESS)
    assert replace(exact, elbo=replace(exact.elbo, q_reads="cache")) == base
    assert replace(fast, elbo=replace(fast.elbo, lr=base.elbo.lr)) == base
    assert fast.elbo.lr == pytest.approx(10 * base.elbo.lr)
    assert joint.elbo.in_finetune
    assert joint.train.encoder_lr == joint.train.lr
    assert joint.train.replace(encoder_lr=finetuned.train.encoder_lr) == finetuned.train


def test_bare_arms_differ_in_whose_gradients_train_the_encoder() -> None:
    online, joint = (Cell.of("rally", arm, 0) for arm in ("online-bare", "joint-bare"))
    assert (online.settings["mode"], joint.settings["mode"]) == ("online", "finetune")
    assert not joint.recipe.q.layer_norm
    assert joint.recipe.q == online.recipe.q
    assert joint.recipe.train.replace(encoder_lr=online.recipe.train.encoder_lr) == online.recipe.train
    assert joint.recipe.train.lr == joint.recipe.train.encoder_lr == joint.recipe.elbo.lr == online.recipe.elbo.lr
