"""The actor-learner loop: the replay ratio, the lead, reproducibility, resumption, and workers that die."""

from __future__ import annotations

import os
import signal
import time

import catch
import numpy as np
import pytest
import ray
from catch import VectorCatch
from rl_toys import make_encoder, toy_config, toy_ray, train

from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from rllib_ext.algorithm import RESULTS_KEY, LatentDQN
from rllib_ext.runner import LatentEnvRunner
from rllib_ext.settings import DQNSettings, QConfig
from rllib_ext.workers import Request, Weights

pytest_plugins = ["rl_fixtures"]


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    with toy_ray(8):
        yield


def assert_same(one: LatentDQN, other: LatentDQN) -> None:
    assert (one.agent_steps, one.updates, one.num_episodes) == (other.agent_steps, other.updates, other.num_episodes)
    for name, value in one.network_state().items():
        np.testing.assert_array_equal(value, other.network_state()[name])
    for name, column in one.replay.columns.items():
        held = column[:, : int(one.replay.written.max())]
        np.testing.assert_array_equal(held, other.replay.columns[name][:, : held.shape[1]], err_msg=name)


@pytest.mark.parametrize(
    ("num_runners", "num_learners", "priority_alpha"), [(0, 0, 0.0), (0, 0, 0.6), (2, 0, 0.6), (0, 2, 0.6)]
)
def test_synchronous_runs_repeat_and_a_resumed_one_equals_an_uninterrupted_one(
    build, encoder, tmp_path, num_runners, num_learners, priority_alpha
):
    config = toy_config("frozen", encoder, synchronous=True, priority_alpha=priority_alpha)
    config = config.env_runners(num_env_runners=num_runners).learners(num_learners=num_learners)
    whole = build(config.copy())
    train(whole, 220)  # in the midst of every game, which takes 12 rows
    path = whole.save_to_path(tmp_path / "checkpoint")
    train(whole, 600)
    again = build(config.copy())
    train(again, 220)
    again.save_to_path(tmp_path / "another")
    train(again, 600)
    assert_same(whole, again)
    resumed = build(config.copy())
    resumed.restore_from_path(path)
    train(resumed, 600)
    assert_same(whole, resumed)
    assert whole.replay.num_cut_episodes == resumed.replay.num_cut_episodes > 0


@pytest.mark.parametrize("mode", ["frozen", "finetune", "pixels"])
def test_a_resumed_run_with_convolutions_equals_an_uninterrupted_one(build, tmp_path, mode):
    """Their weights do not lie in memory as the arrays of a checkpoint do; Adam's moments must lie as they."""
    vae = VAESettings(patch=3, widths=(8, 8), num_blocks=1, latent_channels=2)
    config = toy_config(mode, make_encoder(tmp_path / "encoder", settings=vae), synchronous=True)
    config.latent(q=QConfig(hidden=(32,), grid_channels=4), encoder_config=None if mode != "pixels" else vae)
    whole = build(config.copy())
    train(whole, 220)
    path = whole.save_to_path(tmp_path / "checkpoint")
    resumed = build(config.copy())
    resumed.restore_from_path(path)
    for algorithm in (whole, resumed):
        train(algorithm, 300)
    assert_same(whole, resumed)


@pytest.mark.parametrize(("num_runners", "ratio"), [(0, 0.25), (1, 0.5), (3, 0.125)])
def test_the_asynchronous_loop_holds_the_replay_ratio_and_the_lead(build, encoder, num_runners, ratio):
    config = toy_config("frozen", encoder, updates_per_agent_step=ratio).env_runners(num_env_runners=num_runners)
    algorithm, settings = build(config), config.settings
    limit = settings.max_lead_fragments * max(1, num_runners) * settings.fragment_steps
    limit += 1 / ratio  # what makes no whole update due yet
    while algorithm.agent_steps < 6_000:
        figures = algorithm.train()[RESULTS_KEY]
        lead = algorithm.agent_steps + algorithm.workers.steps_under_way
        assert lead - settings.consumed_agent_steps(algorithm.updates) <= limit
        assert algorithm.updates <= settings.due_updates(algorithm.agent_steps)
    backlog = limit * ratio / algorithm.updates
    assert figures["replay_ratio"] == pytest.approx(ratio, rel=max(0.01, backlog))
    assert 0 <= figures["runner_idle_share"] <= 1
    assert (
        0 <= figures["staleness_updates"] <= (limit + settings.fragment_steps) * ratio + settings.max_updates_per_step
    )


def test_a_slow_learner_makes_the_workers_wait(build, encoder, monkeypatch):
    algorithm = build(toy_config("frozen", encoder).env_runners(num_env_runners=2))
    train(algorithm, 200)
    update = algorithm.learners.update

    def slowly(drawn, updates_before):
        time.sleep(0.2)
        return update(drawn, updates_before)

    monkeypatch.setattr(algorithm.learners, "update", slowly)
    figures = [algorithm.train()[RESULTS_KEY] for _ in range(12)][4:]
    assert np.mean([step["runner_idle_share"] for step in figures if "runner_idle_share" in step]) > 0.5
    assert np.mean([step["learner_idle_share"] for step in figures]) < 0.2


def open_episodes(algorithm: LatentDQN, runner: int) -> int:
    """How many of a runner's episodes have no last row in the replay yet."""
    replay, num_envs = algorithm.replay, algorithm.settings.envs_per_runner
    lanes = np.arange((runner - 1) * num_envs, runner * num_envs)
    return int((~replay.columns["is_last"][lanes, (replay.written[lanes] - 1) % replay.spec.lane_rows]).sum())


def test_a_killed_worker_is_replaced_and_nothing_that_had_arrived_is_lost(build, encoder):
    algorithm = build(toy_config("frozen", encoder).env_runners(num_env_runners=2))
    train(algorithm, 400)
    written = algorithm.replay.written.copy()
    pids = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
    os.kill(pids[0], signal.SIGKILL)
    before, until = algorithm.agent_steps, time.monotonic() + 90
    while time.monotonic() < until and not algorithm.workers.deaths:
        algorithm.train()
    num_open = open_episodes(algorithm, runner=1)
    while time.monotonic() < until and 1 not in algorithm.env_runner_group.healthy_env_runner_ids():
        algorithm.train()
    assert algorithm.workers.deaths == {1: 1}
    assert algorithm.agent_steps > before
    after, at_return = algorithm.agent_steps, algorithm.replay.written.copy()
    train(algorithm, after + 400)
    while time.monotonic() < until and not (algorithm.replay.written > at_return).all():  # it may be slow to begin
        algorithm.train()
    assert (algorithm.replay.written > at_return).all()
    assert (at_return >= written).all()
    assert algorithm.replay.written.sum() >= algorithm.agent_steps
    assert algorithm.replay.num_cut_episodes == num_open
    now = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
    assert len(now) == 2
    assert pids[0] not in now


class BrokenCatch(VectorCatch):
    def step(self, actions):
        raise ZeroDivisionError("the game is broken")


def broken_factory(preprocess, num_envs, num_threads):
    return BrokenCatch(num_envs)


def test_an_error_of_the_environment_ends_the_run(build, encoder):
    import sys

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = toy_config("frozen", encoder).latent(env_factory=broken_factory).env_runners(num_env_runners=1)
    algorithm = build(config)
    with pytest.raises(ZeroDivisionError, match="the game is broken"):
        algorithm.train()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def nan_factory(preprocess, num_envs, num_threads):
    return VectorCatch(num_envs, scale=float("nan"))


EXPECTED, DISTRIBUTIONS = QConfig(hidden=(32,)), QConfig(hidden=(32,), num_atoms=7)


@pytest.mark.parametrize("priority_alpha", [0.0, 0.6])
@pytest.mark.parametrize("q", [EXPECTED, DISTRIBUTIONS], ids=["values", "distributions"])
@pytest.mark.parametrize("has_nan_rewards", [False, True], ids=["rate", "rewards"])
def test_a_loss_that_is_no_number_ends_the_run(build, encoder, priority_alpha, q, has_nan_rewards):
    rates = {} if has_nan_rewards else {"lr": 1e30, "grad_clip": 0.0}
    config = toy_config("frozen", encoder, priority_alpha=priority_alpha, **rates).latent(q=q)
    algorithm = build(config.latent(env_factory=nan_factory if has_nan_rewards else catch.catch_factory))
    with pytest.raises(UserError, match=r"Q-learning has diverged: the loss is (nan|inf) after \d+ updates") as caught:
        train(algorithm, 600)
    assert "\n" not in str(caught.value)


def test_a_synchronous_run_waits_while_its_only_worker_is_away(build, encoder):
    algorithm = build(toy_config("frozen", encoder, synchronous=True).env_runners(num_env_runners=1))
    algorithm.train()
    steps = algorithm.agent_steps
    (pid,) = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
    os.kill(pid, signal.SIGKILL)
    for _ in range(3):
        algorithm.train()
        assert algorithm.agent_steps > steps, "no step is empty"
        steps = algorithm.agent_steps
    assert algorithm.workers.deaths == {1: 1}


@pytest.mark.parametrize("num_learners", [1, 2])
def test_remote_learners_learn_and_set_priorities(build, encoder, num_learners):
    config = toy_config("frozen", encoder, priority_alpha=0.6).env_runners(num_env_runners=1)
    algorithm = build(config.learners(num_learners=num_learners))
    before = algorithm.network_state()
    told = []
    update_priorities = algorithm.replay.update_priorities
    algorithm.replay.update_priorities = lambda ids, errors: (told.append(ids), update_priorities(ids, errors))
    train(algorithm, 400)
    assert any((value != before[name]).any() for name, value in algorithm.network_state().items())
    assert sum(len(ids) for ids in told) == algorithm.updates * config.settings.batch_size


@pytest.mark.parametrize("num_runners", [0, 1])
def test_the_highest_seed_that_is_allowed_seeds_every_process(build, encoder, num_runners):
    config = (
        toy_config("frozen", encoder).env_runners(num_env_runners=num_runners).debugging(seed=2**32 - 1 - num_runners)
    )
    assert train(build(config), 100)["agent_steps"] >= 100


def test_a_new_era_starts_new_episodes_from_other_seeds(encoder):
    algorithm = toy_config("frozen", encoder).build_algo()
    runner: LatentEnvRunner = algorithm.env_runner
    weights = Weights(1, 0, algorithm.learners.inference_state())

    def first_frames(era):
        return runner.sample_fragment(Request(0, era, weights)).rows

    one = first_frames((0, 1))
    assert not first_frames((0, 1)).is_first[0].any()  # the same era goes on
    other, again = first_frames((0, 2)), first_frames((0, 1))
    assert other.is_first[0].all()
    assert (other.action != one.action).any()
    np.testing.assert_array_equal(again.obs, one.obs)
    np.testing.assert_array_equal(again.action, one.action)
    algorithm.stop()


def test_apex_gives_each_environment_its_own_rate():
    settings = DQNSettings(exploration="apex", warmup_agent_steps=100)
    assert settings.apex_epsilon(50, 3, 8) == 1.0
    rates = [settings.apex_epsilon(100, e, 8) for e in range(8)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[-1] == pytest.approx(0.4**8)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64, "replay_capacity": 32}, "less than one batch of 64"),
        ({"n_step": 9}, "longer than a fragment of 8"),
        ({"exploration": "sometimes"}, "choose one of schedule, apex"),
        ({"precision": "fp8"}, "choose one of float32, bf16, auto"),
        ({"max_lead_fragments": 0}, "max_lead_fragments is 0; it must be 1 or more"),
        ({"max_lead_fragments": 0.99}, "max_lead_fragments is 0.99; it must be 1 or more"),
        ({"replay_capacity": 10**12}, "GiB when full; this machine has"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(encoder, changes, message):
    with pytest.raises(UserError, match=message):
        toy_config("frozen", encoder, **changes).validate()


def test_learners_are_refused_where_there_is_no_room_for_them(encoder):
    too_many = toy_config("frozen", encoder, batch_size=16).env_runners(num_env_runners=5).learners(num_learners=4)
    too_many.check()  # asks no cluster
    with pytest.raises(UserError, match=r"num_env_runners is 5 and num_learners is 4, which take 9 CPUs, .* the 8 "):
        too_many.validate()
    too_many.learners(num_learners=2).validate()
    with pytest.raises(UserError, match=r"num_env_runners is 0 and num_learners is 16, which take 16 CPUs"):
        toy_config("frozen", encoder, batch_size=16).learners(num_learners=16).validate()
    with pytest.raises(UserError, match="3 learners cannot share"):
        toy_config("frozen", encoder, batch_size=16).learners(num_learners=3).validate()
