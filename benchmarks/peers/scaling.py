"""Rollout scaling: a simulated environment that sleeps, so that workers cost next to nothing and the loop is on trial.

A vector step of four environments sleeps 10 ms once and gives 128 floats for each, which stand where latents would.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ray.rllib.connectors.env_to_module import EnvToModulePipeline

from jobs.recipes import train_recipe
from peers.measuring import Counts, ray_here
from peers.ours import run, untrained_encoder
from pipeline.atari import Step
from pipeline.models.vae import VAESettings
from pipeline.schema import Preprocess
from rllib_ext.config import LatentDQNConfig
from rllib_ext.connectors import EncodeObservations

STEP_S = 0.01
NUM_ENVS = 4
NUM_FLOATS = 128
FRAGMENT_LENGTH = 32  # many workers: fewer exchanges, each with more in it
DECLARED_CPUS = 18
UPDATES_PER_AGENT_STEP = 1 / 16
EPISODE_STEPS = 500
NUM_OBSERVATIONS = 64

# A bundle whose latents are as long as the observations: 16 channels on a grid of 2 x 4 cells.
_HEIGHT, _WIDTH = 8, 16
_ENCODER = VAESettings(patch=4, widths=(8,), num_blocks=0, latent_channels=16)


class SleepingEnvironments:
    """Behind the `VectorAtari` interface; every environment ends its episode after `EPISODE_STEPS`."""

    def __init__(self, num_envs: int, step_s: float) -> None:
        """Draws the observations once: (N, E, 128) float16."""
        self.num_envs, self.num_actions, self._step_s = num_envs, 6, step_s
        shape = (NUM_OBSERVATIONS, num_envs, NUM_FLOATS)
        self._observations = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
        self._steps = 0

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        """Starts over."""
        self._steps = 0
        return self._result(is_over=False)

    def step(self, actions: np.ndarray) -> Step:
        """Sleeps once for all."""
        if self._step_s:
            time.sleep(self._step_s)
        self._steps += 1
        return self._result(is_over=self._steps % EPISODE_STEPS == 0)

    def close(self) -> None:
        """Nothing to free."""

    def _result(self, is_over: bool) -> Step:
        over, no = np.full(self.num_envs, is_over), np.zeros(self.num_envs, bool)
        rewards, lives = np.ones(self.num_envs, np.float32), np.zeros(self.num_envs, np.int32)
        return Step(self._observations[self._steps % NUM_OBSERVATIONS].copy(), rewards, over, no, lives)


def sleeping_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> SleepingEnvironments:
    """For `LatentDQNConfig.latent(env_factory=...)`."""
    return SleepingEnvironments(num_envs, STEP_S)


def tireless_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> SleepingEnvironments:
    """The same without the sleep."""
    return SleepingEnvironments(num_envs, 0.0)


class FloatsConfig(LatentDQNConfig):
    """Frozen mode whose environments give floats already: nothing is encoded."""

    def build_env_to_module_connector(
        self, env: Any = None, spaces: Any = None, device: Any = None
    ) -> EnvToModulePipeline:
        """Without the encoder."""
        pipeline = super().build_env_to_module_connector(env, spaces, device)
        pipeline.remove(EncodeObservations.__name__)
        return pipeline


def simulated_config(folder: Path, num_workers: int, *, sleeps: bool = True, **train: Any) -> LatentDQNConfig:
    """Simulated environments under the shipped recipe.

    Args:
        folder: For an encoder's bundle.
        num_workers: Remote rollout workers; 0 samples in this process.
        sleeps: 10 ms a vector step; or not at all.
        train: Changes to the Q-learning.
    """
    recipe = train_recipe("dqn")
    preprocess = Preprocess(
        game="simulated",
        protocol="simulated",
        ale_version="0",
        rom_md5="0",
        frame_skip=1,
        sticky_probability=0.0,
        max_pool=False,
        height=_HEIGHT,
        width=_WIDTH,
        grayscale=True,
        resize="none",
        action_set=tuple("ABCDEF"),
        noop_max=0,
        fire_reset=False,
    )
    changes = {
        "envs_per_runner": NUM_ENVS,
        "fragment_length": FRAGMENT_LENGTH,
        "updates_per_agent_step": UPDATES_PER_AGENT_STEP,
        "stack": 1,
        **train,
    }
    config = FloatsConfig().latent(
        preprocess=preprocess,
        mode="frozen",
        encoder=untrained_encoder(folder / "encoder", preprocess, _ENCODER),
        q=recipe.q,
        env_factory=sleeping_factory if sleeps else tireless_factory,
    )
    config = config.training(recipe.train.replace(**changes))
    built: LatentDQNConfig = config.env_runners(num_env_runners=num_workers).debugging(seed=0)
    return built


def scaling(num_workers: int, **changes: Any) -> Iterator[Counts]:
    """Trains for ever on `num_workers` rollout workers; `changes` as in `simulated_config`."""
    with tempfile.TemporaryDirectory() as folder, ray_here(max(DECLARED_CPUS, num_workers + 2)):
        yield from run(simulated_config(Path(folder), num_workers, **changes))
