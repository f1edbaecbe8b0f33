"""Stock RLlib DQN on its new API stack, with RLlib's own Atari wrapper (84x84, four float32 frames)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ale_py
import gymnasium as gym
from ray.rllib.algorithms.dqn import DQN, DQNConfig
from ray.rllib.core import ALL_MODULES
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.wrappers.atari_wrappers import wrap_atari_for_new_api_stack
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
)
from ray.tune.registry import register_env

from peers.measuring import Counts, ray_here

BATCH = 32
STEPS_PER_UPDATE = 4
NATURE = DefaultModelConfig(
    conv_filters=[[32, 8, 4], [64, 4, 2], [64, 3, 1]], conv_activation="relu", head_fcnet_hiddens=[512]
)


def make_env(_: Any) -> gym.Env[Any, Any]:
    """Pong as RLlib wraps it."""
    gym.register_envs(ale_py)
    env = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    return wrap_atari_for_new_api_stack(env, dim=84, frameskip=4, framestack=4)


def rllib(num_env_runners: int, num_envs: int, warmup: int, is_nature: bool, num_gpus: int = 0) -> Iterator[Counts]:
    """Trains for ever, one update per four agent steps, double and dueling as it ships; yields once a second or so.

    Args:
        num_env_runners: Remote ones; 0 samples in-process.
        num_envs: Environments of each.
        warmup: Agent steps before the first update.
        is_nature: The convolutions of the DQN paper instead of RLlib's default ones.
        num_gpus: 1 learns on a GPU.
    """
    register_env("pong", make_env)
    with ray_here():
        config = _config(num_env_runners, num_envs, warmup).learners(num_gpus_per_learner=num_gpus)
        algorithm = (config.rl_module(model_config=NATURE) if is_nature else config).build_algo()
        try:
            while True:
                algorithm.train()
                yield _counts(algorithm)
        finally:
            algorithm.stop()


def _config(num_env_runners: int, num_envs: int, warmup: int) -> DQNConfig:
    steps = num_envs * STEPS_PER_UPDATE * max(1, num_env_runners)  # of one sampling round
    # RLlib takes the round for (num_env_runners + 1) runners' when it turns this into updates a round.
    native = BATCH / (num_envs * STEPS_PER_UPDATE * (num_env_runners + 1))
    return (
        DQNConfig()
        .environment("pong")
        .env_runners(
            num_env_runners=num_env_runners, num_envs_per_env_runner=num_envs, rollout_fragment_length=STEPS_PER_UPDATE
        )
        .training(
            train_batch_size_per_learner=BATCH,
            training_intensity=native * steps / STEPS_PER_UPDATE,
            num_steps_sampled_before_learning_starts=warmup,
        )
        .reporting(min_time_s_per_iteration=1, min_sample_timesteps_per_iteration=0)
        .debugging(seed=0, log_level="ERROR")
    )


def _counts(algorithm: DQN) -> Counts:
    sampled = algorithm.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
    trained = algorithm.metrics.peek((LEARNER_RESULTS, ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME), default=0)
    return Counts(int(sampled), int(trained) // BATCH)
