"""Stable-Baselines3's DQN: uint8 frames, its own Atari wrapper, the memory-saving buffer."""

from __future__ import annotations

from collections.abc import Iterator

import ale_py
import gymnasium as gym
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

from peers.measuring import Counts

STEPS_PER_UPDATE = 4
CHUNK_AGENT_STEPS = 64


def sb3(num_envs: int, warmup: int, device: str = "cpu") -> Iterator[Counts]:
    """Trains for ever, one update of 32 per four agent steps.

    Args:
        num_envs: Environments stepped together; a vector step counts as so many agent steps.
        warmup: Agent steps before the first update.
        device: Where it learns and chooses actions.
    """
    gym.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=num_envs, seed=0), n_stack=4)
    model = DQN(
        "CnnPolicy",
        env,
        batch_size=32,
        buffer_size=50_000,
        learning_starts=warmup,
        train_freq=max(1, STEPS_PER_UPDATE // num_envs),  # in vector steps
        gradient_steps=max(1, num_envs // STEPS_PER_UPDATE),
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        seed=0,
        device=device,
    )
    while True:
        model.learn(CHUNK_AGENT_STEPS, reset_num_timesteps=False, log_interval=None)  # type: ignore[arg-type]
        yield Counts(model.num_timesteps, model._n_updates)
