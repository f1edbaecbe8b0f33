"""The whole algorithm on a toy: it learns, keeps its replay ratio, and goes on after a restore; workers stay light."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import ray
from catch import VectorCatch, catch_preprocess
from rl_toys import make_encoder, toy_config, toy_ray, train

from pipeline.bundle import sha256_of
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from rllib_ext.algorithm import LatentDQN
from rllib_ext.policy import PolicyConfig, load_policy, save_policy
from rllib_ext.settings import QConfig
from rllib_ext.shared_bundle import SharedBundle

pytest_plugins = ["rl_fixtures"]


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    with toy_ray(2):
        yield


def refresh(algorithm: LatentDQN) -> None:
    """Every runner answers once more, and so has the newest weights."""
    algorithm.workers.forget()
    algorithm.workers.ask_all(algorithm._request())
    algorithm.workers.forget()


def greedy_return(algorithm: LatentDQN, tmp_path, num_games: int = 100) -> float:
    """Mean return of the saved and reloaded policy, greedy."""
    policy = load_policy(write_policy(algorithm, tmp_path))
    env = VectorCatch(num_games)
    step = env.reset(np.arange(num_games))
    policy.reset(num_games)
    total, is_first, is_over = 0.0, np.ones(num_games, bool), np.zeros(num_games, bool)
    while not is_over.all():
        step = env.step(policy.act(step.frames, is_first))
        is_first = np.zeros(num_games, bool)
        total += float(step.rewards[~is_over].sum())
        is_over |= step.terminated
    return total / num_games


def write_policy(algorithm: LatentDQN, tmp_path):
    from pipeline import models

    config = algorithm.config
    encoder = config.encoder_path
    origin = {"address": str(encoder), "version": None, "sha256": config.encoder_sha256} if encoder else None
    record = models.to_record(config.encoder_config.for_frames(12, 12))
    policy = PolicyConfig(
        config.mode, config.settings.stack, config.z_shape, config.q, ("LEFT", "NOOP", "RIGHT"), origin, record
    )
    path = tmp_path / f"policy-{algorithm.agent_steps}"
    save_policy(path, policy, catch_preprocess(), algorithm.network_state(), encoder_bundle=encoder, card={})
    return path


LEARNING = {
    "envs_per_runner": 8,
    "batch_size": 32,
    "n_step": 4,
    "updates_per_agent_step": 0.5,
    "replay_capacity": 20_000,
    "target_update_updates": 50,
    "epsilon_decay_agent_steps": 3_000,
}


def test_it_learns_catch_to_near_the_optimum_on_frozen_latents(build, tmp_path):
    encoder = make_encoder(tmp_path / "encoder", settings=VAESettings(z_dim=64, patch=3, widths=(16,), num_blocks=0))
    config = toy_config("frozen", encoder, **LEARNING).latent(q=QConfig(hidden=(128,)))
    algorithm = build(config)
    before = algorithm.encoder_sha256s()
    returns = []  # a single step may fall into a dip; what has been learned is the mean
    for agent_steps in (8_000, 9_000, 10_000):
        figures = train(algorithm, agent_steps)
        returns.append(greedy_return(algorithm, tmp_path))
    assert algorithm.encoder_sha256s() == before
    assert figures["epsilon"] == pytest.approx(0.02)
    backlog = config.settings.due_updates(algorithm.agent_steps) - figures["updates"]
    assert 0 <= backlog <= config.settings.max_updates_per_step
    games = algorithm.take_finished_games()
    assert len(games) == figures["episodes"]
    assert np.mean([value for _, value in games[-20:]]) == pytest.approx(figures["episode_return_mean"])
    assert np.mean(returns) > 0.9


def test_it_learns_catch_from_pixels(build, tmp_path):
    algorithm = build(toy_config("pixels", None, **LEARNING).latent(q=QConfig(hidden=(64,))))
    train(algorithm, 5_000)
    assert greedy_return(algorithm, tmp_path) > 0.5


@pytest.mark.parametrize("mode", ["finetune", "pixels"])
def test_the_other_modes_train_their_encoder_on_learner_and_runner_alike(build, tmp_path, mode):
    algorithm = build(toy_config(mode, make_encoder(tmp_path / "encoder")))
    before = algorithm.encoder_sha256s()
    train(algorithm, 200)
    refresh(algorithm)
    after = algorithm.encoder_sha256s()
    assert set(after) == {"learner", "runner 0"}
    assert len(set(before.values())) == len(set(after.values())) == 1
    assert before["learner"] != after["learner"]


def test_remote_runners_sample_act_with_the_learners_weights_and_stay_light(build, tmp_path):
    num_runners = 2
    config = toy_config("frozen", make_encoder(tmp_path / "encoder")).env_runners(num_env_runners=num_runners)
    algorithm = build(config)
    before = algorithm.encoder_sha256s()
    figures = train(algorithm, 400)
    assert len(algorithm.steps_per_runner) == num_runners
    assert all(" " in who for who in algorithm.steps_per_runner), "every one is an actor"
    assert sum(algorithm.steps_per_runner.values()) == algorithm.agent_steps == figures["agent_steps"]
    assert min(algorithm.steps_per_runner.values()) > 0
    assert algorithm.encoder_sha256s() == before
    assert len(before) == num_runners
    assert len(set(before.values())) == 1
    assert (algorithm.replay.written > 0).all()
    refresh(algorithm)
    assert_same_weights(algorithm)
    assert_light(algorithm)


def assert_same_weights(algorithm: LatentDQN) -> None:
    mine = algorithm.network_state()
    for theirs in algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner.module.get_state(), local_env_runner=False
    ):
        assert {f"network.{name}" for name in mine} == set(theirs)
        for name, value in mine.items():
            np.testing.assert_array_equal(value, theirs[f"network.{name}"])


def assert_light(algorithm: LatentDQN) -> None:
    """No MLflow, none of our stages' modules, and of Ray Data only what importing RLlib's EnvRunner itself brings."""
    loaded = algorithm.env_runner_group.foreach_env_runner(lambda runner: list(sys.modules), local_env_runner=False)
    bare = "import json, sys; import ray.rllib.env.env_runner; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", bare], capture_output=True, text=True, check=True)
    brought_by_rllib = set(json.loads(done.stdout.splitlines()[-1]))
    for modules in loaded:
        assert not [name for name in modules if name.split(".")[0] == "mlflow"]
        of_ray_data = {name for name in modules if name == "ray.data" or name.startswith("ray.data.")}
        assert of_ray_data <= brought_by_rllib
        assert not {"pipeline.registry", "pipeline.stream", "pipeline.train", "jobs.train"} & set(modules)


class WideCatch(VectorCatch):
    """With 300 actions, of which every third does the same; remembers what was taken."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs)
        self.num_actions, self.action_names = 300, tuple(map(str, range(300)))
        self.taken: list[np.ndarray] = []

    def step(self, actions):
        self.taken.append(actions.copy())
        return super().step(actions % 3)


def test_three_hundred_actions_are_learned_from_as_they_were_taken(build, tmp_path):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder"))
    algorithm = build(config.latent(env_factory=lambda preprocess, num_envs, num_threads: WideCatch(num_envs)))
    train(algorithm, 200)
    taken = np.stack(algorithm.env_runner.env.vector.taken)  # (rows, lanes)
    assert taken.max() > 255
    held = algorithm.replay.columns["action"][:, : len(taken)].T
    np.testing.assert_array_equal(held, taken[: len(held)])
    drawn = algorithm.replay.sample(500)
    np.testing.assert_array_equal(drawn.action, taken[drawn.ids // 4, drawn.ids % 4])


@pytest.mark.parametrize("mode", ["frozen", "finetune", "pixels"])
def test_a_convolution_over_the_grid_of_the_latents_is_trained(build, tmp_path, mode):
    vae = VAESettings(patch=3, widths=(8,), num_blocks=0, latent_channels=2)  # 4x4 cells
    config = toy_config(mode, make_encoder(tmp_path / "encoder", settings=vae))
    config.latent(q=QConfig(hidden=(32,), grid_channels=4), encoder_config=None if mode != "pixels" else vae)
    algorithm = build(config)
    assert algorithm.config.z_shape == (2, 4, 4)
    before = algorithm.network_state()["head.grid.conv.weight"].copy()
    figures = train(algorithm, 120)
    assert figures["updates"] > 0
    after = algorithm.network_state()["head.grid.conv.weight"]
    assert after.shape == (4, 2 * 2, 3, 3)
    assert (before != after).mean() > 0.5  # a channel may be dead


def test_a_resumed_run_continues_with_replay_optimizer_and_counters(build, tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    config = toy_config("frozen", encoder).latent(run_id="mine")
    algorithm = build(config)
    train(algorithm, 300)
    path = tmp_path / "checkpoint"
    algorithm.save_to_path(path)
    assert not [file for file in path.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt")]
    resumed = build(config)
    resumed.restore_from_path(path)
    assert (resumed.agent_steps, resumed.updates) == (algorithm.agent_steps, algorithm.updates)
    assert resumed.iteration == algorithm.iteration
    assert resumed.steps_per_runner == algorithm.steps_per_runner
    assert list(resumed.recent_returns) == list(algorithm.recent_returns)
    drawn, drawn_again = algorithm.replay.sample(160), resumed.replay.sample(160)
    for mine, theirs in zip(drawn, drawn_again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    algorithm.learners.update(drawn, algorithm.updates)
    resumed.learners.update(
        drawn_again, resumed.updates
    )  # bit-equal only with the same weights, target and Adam moments
    for name, value in algorithm.network_state().items():
        np.testing.assert_array_equal(value, resumed.network_state()[name])
    figures = train(resumed, 400)
    assert 0 <= config.settings.due_updates(resumed.agent_steps) - figures["updates"] <= 32
    assert resumed.replay.sample(500).obs.shape == (500, 2, 16)


def test_a_checkpoint_of_another_run_or_with_changed_bytes_is_refused(build, tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    algorithm = build(toy_config("frozen", encoder).latent(run_id="mine"))
    path = tmp_path / "checkpoint"
    algorithm.save_to_path(path)
    algorithm.save_to_path(path)  # replaces
    stranger = build(toy_config("frozen", encoder).latent(run_id="theirs"))
    with pytest.raises(UserError, match="written by run 'mine', not by 'theirs'"):
        stranger.restore_from_path(path)
    file = path / "replay" / "action.npy"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"replay/action.npy"):
        algorithm.restore_from_path(path)


def test_a_worker_refuses_bytes_that_the_driver_did_not_send(tmp_path):
    path = make_encoder(tmp_path / "encoder")
    sound = SharedBundle.put(path, sha256_of(path))
    assert sound.load(catch_preprocess()).sha256 == sound.sha256
    with pytest.raises(UserError, match="sha256"):
        SharedBundle(sound.ref, "0" * 64).load(catch_preprocess())
    with pytest.raises(UserError, match=r"packed bundle .* cannot be read"):
        SharedBundle(ray.put(b"not a bundle"), sound.sha256).load(catch_preprocess())


def test_the_saved_policy_acts_as_the_module_does(build, tmp_path):
    for mode in ("frozen", "finetune", "pixels"):
        algorithm = build(toy_config(mode, make_encoder(tmp_path / mode)))
        train(algorithm, 120)
        policy = load_policy(write_policy(algorithm, tmp_path / f"{mode}-policies"))
        refresh(algorithm)
        runner = algorithm.env_runner
        vector, frames = runner.env.vector, []
        for name in ("reset", "step"):
            setattr(vector, name, remembering(getattr(vector, name), frames))
        rows = runner.sample(explore=False, force_reset=True).rows
        policy.reset(4)
        for t, actions in enumerate(rows.action):
            np.testing.assert_array_equal(policy.act(frames[t].frames, rows.is_first[t]), actions)


def remembering(call, results: list):
    """`call` with its results kept."""

    def wrapped(given):
        results.append(call(given))
        return results[-1]

    return wrapped
