"""What a checkpoint gives back: nothing to an algorithm of other settings, everything to one of its own, every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rl_toys import make_encoder, toy_config, toy_ray, train
from test_loop import assert_same

from pipeline.errors import UserError
from rllib_ext.algorithm import LatentDQN
from rllib_ext.config import LatentDQNConfig
from rllib_ext.settings import DQNSettings, QConfig

pytest_plugins = ["rl_fixtures"]


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    with toy_ray(4):
        yield


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory):
    """Of a frozen run with the toys' settings, after 200 agent steps."""
    algorithm = toy_config("frozen", encoder).build_algo()
    train(algorithm, 200)
    path = algorithm.save_to_path(tmp_path_factory.mktemp("run") / "checkpoint")
    algorithm.stop()
    return path


def optimizers(algorithm: LatentDQN) -> dict[str, torch.optim.Optimizer]:
    """By name: "default_policy_head", and "default_policy_encoder" where it is trained."""
    return dict(algorithm.learner_group._learner.get_optimizers_for_module("default_policy"))


def everything(algorithm: LatentDQN) -> dict[str, object]:
    """Counters, weights, optimizers' steps and rows, copied."""
    names = ("agent_steps", "updates", "num_episodes", "num_barriers", "num_restores", "seed", "iteration")
    state = {name: getattr(algorithm, name) for name in names}
    state["rows"] = (
        [column.tobytes() for column in algorithm.replay.columns.values()],
        algorithm.replay.written.tolist(),
    )
    state["weights"] = {name: value.tobytes() for name, value in algorithm.network_state().items()}
    moments = [list(optimizer.state.values()) for optimizer in optimizers(algorithm).values()]
    state["moments"] = [[moment["exp_avg"].tolist() for moment in by_parameter] for by_parameter in moments]
    state["sources"] = dict(algorithm.steps_per_runner), list(algorithm.recent_returns), list(algorithm._finished_games)
    state["random"] = torch.get_rng_state().tolist(), algorithm.replay.rng.bit_generator.state
    return state


CHANGES = {
    "encoder": (lambda config, other: config.latent(encoder=other), r"encoder_sha256: '\w{64}' then, '\w{64}' now"),
    "q head": (lambda config, _: config.latent(q=QConfig(hidden=(16,))), r"q\.hidden: \(32,\) then, \(16,\) now"),
    "replay ratio": (
        lambda config, _: config.training(updates_per_agent_step=0.5),
        r"train\.updates_per_agent_step: 0\.25 then, 0\.5 now",
    ),
    "mode": (lambda config, _: config.latent(mode="finetune"), "mode: 'frozen' then, 'finetune' now"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_other_settings_is_refused_and_nothing_has_changed(
    build, encoder, checkpoint, tmp_path, change, message
):
    other = make_encoder(tmp_path / "other", standardise=False)
    algorithm = build(change(toy_config("frozen", encoder), other))
    train(algorithm, 100)
    before = everything(algorithm)
    with pytest.raises(UserError, match=message) as caught:
        algorithm.restore_from_path(checkpoint)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(" then, ") == 1, "nothing but what differs is named"
    assert everything(algorithm) == before


def test_what_may_change_are_settings():
    assert set(vars(DQNSettings())) >= LatentDQNConfig.MAY_CHANGE


def test_rates_are_those_of_the_run_that_restores_and_moments_those_of_the_one_that_saved(build, encoder, tmp_path):
    config = toy_config("finetune", encoder)
    saved = build(config.copy(copy_frozen=False))
    train(saved, 120)
    path = saved.save_to_path(tmp_path / "checkpoint")
    resumed = build(config.training(lr=7e-3, encoder_lr=3e-3, adam_epsilon=1e-2))
    resumed.restore_from_path(path)
    train(resumed, 160)
    groups = {name.split("_")[-1]: optimizer.param_groups[0] for name, optimizer in optimizers(resumed).items()}
    assert {name: (group["lr"], group["eps"]) for name, group in groups.items()} == {
        "head": (7e-3, 1e-2),
        "encoder": (3e-3, 1e-2),
    }
    for name, optimizer in optimizers(resumed).items():
        (steps,) = {int(moment["step"]) for moment in optimizer.state.values()}
        assert steps == resumed.updates > saved.updates, name


def assert_counts_agree(algorithm: LatentDQN, result: dict) -> None:
    assert sum(algorithm.steps_per_runner.values()) == algorithm.agent_steps
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] == algorithm.agent_steps
    assert result["latentrl"]["agent_steps"] == algorithm.agent_steps


@pytest.mark.parametrize("num_runners", [0, 1])
def test_counters_are_right_however_often_and_into_whatever_is_restored(build, encoder, tmp_path, num_runners):
    config = toy_config("frozen", encoder).env_runners(num_env_runners=num_runners)
    algorithm = build(config.copy())
    train(algorithm, 200)
    path, steps = algorithm.save_to_path(tmp_path / "checkpoint"), algorithm.agent_steps
    train(algorithm, 400)
    for _ in range(2):  # into one that has run on, and once more
        algorithm.restore_from_path(path)
        assert algorithm.agent_steps == steps
        assert_counts_agree(algorithm, algorithm.train())
    fresh = build(config.copy())
    fresh.restore_from_path(path)
    fresh.restore_from_path(path)
    assert fresh.agent_steps == steps
    assert_counts_agree(fresh, fresh.train())


@pytest.mark.parametrize("num_runners", [0, 1])
def test_games_that_were_open_are_cut_at_every_restore(build, encoder, tmp_path, num_runners):
    """What comes next is the start of a new game, never the rest of one that the replay knows nothing of."""
    algorithm = build(toy_config("frozen", encoder).env_runners(num_env_runners=num_runners))
    train(algorithm, 200)
    path = algorithm.save_to_path(tmp_path / "checkpoint")
    lanes, next_row = np.arange(4), algorithm.replay.written.copy()
    for times, agent_steps in enumerate((300, 340, 380)):  # games last 12 rows: no two end at the same place in one
        algorithm.restore_from_path(path)
        train(algorithm, agent_steps)
        assert (algorithm.replay.columns["age"][lanes, next_row] == 0).all(), f"at restore {times}"


@pytest.mark.parametrize("num_runners", [0, 1])
def test_a_synchronous_run_that_is_taken_back_repeats_itself(build, encoder, tmp_path, num_runners):
    config = toy_config("frozen", encoder, synchronous=True).env_runners(num_env_runners=num_runners)
    rewound, fresh = build(config.copy()), build(config.copy())
    train(rewound, 220)  # in the midst of every game
    path = rewound.save_to_path(tmp_path / "checkpoint")
    train(rewound, 300)
    for algorithm in (rewound, fresh):
        algorithm.restore_from_path(path)
        train(algorithm, 400)
    assert_same(rewound, fresh)


def test_workers_act_with_the_restored_weights_though_as_many_updates_were_made(build, encoder, tmp_path):
    saved = build(toy_config("frozen", encoder))
    path, weights = saved.save_to_path(tmp_path / "checkpoint"), saved.network_state()
    algorithm = build(toy_config("frozen", encoder).debugging(seed=1))
    algorithm.train()  # within the warm-up
    assert algorithm.updates == saved.updates == 0
    module = algorithm.env_runner.module
    assert any((module.get_state()[f"network.{name}"] != value).any() for name, value in weights.items())
    algorithm.restore_from_path(path)
    algorithm.train()
    assert algorithm.updates == 0
    for name, value in weights.items():
        np.testing.assert_array_equal(module.get_state()[f"network.{name}"], value)


def test_games_that_nobody_had_taken_are_there_after_a_restore(build, encoder, tmp_path):
    algorithm, resumed = build(toy_config("frozen", encoder)), build(toy_config("frozen", encoder))
    train(algorithm, 300)
    resumed.restore_from_path(algorithm.save_to_path(tmp_path / "checkpoint"))
    games = algorithm.take_finished_games()
    assert len(games) == algorithm.num_episodes > 0
    assert resumed.take_finished_games() == games
    resumed.restore_from_path(algorithm.save_to_path(tmp_path / "checkpoint"))
    assert resumed.take_finished_games() == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_run_as_it_was(build, encoder, tmp_path):
    algorithm = build(toy_config("frozen", encoder, synchronous=True))
    (tmp_path / "file").write_text("")
    before = everything(algorithm)
    with pytest.raises(UserError, match="cannot write the bundle"):
        algorithm.save_to_path(tmp_path / "file" / "checkpoint")
    assert everything(algorithm) == before


def test_a_sealed_folder_that_is_no_checkpoint_is_refused(build, encoder, tmp_path):
    algorithm = build(toy_config("frozen", encoder))
    with pytest.raises(UserError, match="is a bundle, but no run's checkpoint"):
        algorithm.restore_from_path(encoder)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=str(folder)):
            algorithm.restore_from_path(folder)


def test_what_rllib_offers_and_this_algorithm_does_not_is_refused_in_one_line(build, encoder, checkpoint):
    algorithm = build(toy_config("frozen", encoder))
    for call in (algorithm.evaluate, lambda: LatentDQN.from_checkpoint(checkpoint)):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)
